"""Building exits: choose the cuts, read what head stands at each, build the heads, count what they cost.

names --parse_head--> HeadSpec --sized--> HeadSpec --build_head--> ExitHead --counted--> Plan
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.devices import made_on_cpu
from ptee._common.errors import Argument, CutError, PteeError, RunError, UnknownName, about, unknown
from ptee._common.process import float32_by_default
from ptee.analysis.cut_points import Cut, random_images, survey
from ptee.analysis.layout import Layout
from ptee.analysis.macs import count
from ptee.analysis.parameters import number_of_parameters, parameter_shares
from ptee.analysis.verify import require_same_in_large_batches
from ptee.backbones.load import Backbone
from ptee.exits.config import (
    AUTO,
    DEFAULT_BUDGETS,
    DEFAULT_PLACES,
    FRONT,
    OPERATIONS,
    PARAMETERS,
    PLACES_BEHIND_FRONT,
    with_defaults,
)
from ptee.exits.front import FrontHead
from ptee.exits.head_spec import FRONT_SPEC, RESIDUAL, HeadSpec, as_list, is_conv, one_each, parse_head
from ptee.exits.heads import ExitHead, feature_factory, vector_length
from ptee.exits.placement import INPUT, PLACEMENTS, Placer
from ptee.exits.plan import Plan, TimesOfModules, counted
from ptee.exits.residual_head import ResidualFeatures, sized

HEAD_BUDGET = 0.05  # share of the backbone's cost that an "auto" head may have where nothing is said


def build_exits(
    backbone: Backbone,
    *,
    exits: str | float | Sequence[float] | Sequence[str] | None = None,
    num_exits: int | None = None,
    places_by: str = OPERATIONS,
    head: str | Sequence[str] | None = None,
    head_budget: float | Sequence[float] | None = None,
    front: FrontHead | str | None = None,
    placed: bool = False,
    saved: Mapping[str, Tensor] | None = None,
    times: TimesOfModules | None = None,
) -> tuple[Plan, list[ExitHead]]:
    """Place exits on a backbone, verify their cuts, build their heads, and count what they cost.

    A backbone that has no room for exits at the default places gets those that the rule pareto finds room for.

    Args:
        backbone: frozen, in eval mode.
        exits: as of `augment`, and so are num_exits, places_by, head and head_budget. None: the default of `ExitsConfig`.
        front: the head of an exit at the input, before all others; "auto" for a residual head there.
        placed: `exits` are names from the plan of a saved run.
        saved: the tensors of a saved run's heads; other heads are refused before they are built.
        times: of the backbone: then fractions are of its time, and the plan shows it.

    Returns:
        The plan, and the new heads that it counted, in train mode, on the CPU in float32.
    """
    exits, head_budget = _plain(exits), _plain(head_budget)
    places, head, budget = with_defaults(exits, num_exits, head, head_budget, front)
    size = backbone.input.input_size
    found = survey(backbone.module, size)
    counts = count(backbone.module, random_images(backbone.module, 1, size))
    sizes = _parameters(backbone, places_by, times)
    placer = Placer(backbone, found, counts, placed, shares=times.shares if times else sizes)
    try:
        with about("exits", exits, CutError, UnknownName):
            cuts = placer.place(places, num_exits, front is not None)
    except CutError:
        if places not in (DEFAULT_PLACES, PLACES_BEHIND_FRONT):
            raise
        places, budget = "pareto", None if budget == DEFAULT_BUDGETS else budget
        cuts = placer.place(places, num_exits, front is not None)
    if inside := [cut for cut in cuts if cut.name != INPUT]:
        require_same_in_large_batches(backbone.module, inside[0], size, counts.total, found.operators)
    specs = head_specs(head, budget, cuts, counts.total, found.classes, front)
    if saved is not None:
        require_saved(specs, cuts, saved)
    heads = build_heads(specs, cuts, found.classes, front)
    shares = [0.0 if cut.name == INPUT else placer.cost(cut) for cut in cuts]
    rows = counted(shares, cuts, heads, list(map(str, specs)), counts.total)
    made = Plan(
        backbone=backbone.name, placement=_words(places, "time" if times else "cost" if sizes is None else PARAMETERS), input_size=size, exits=rows, macs=counts.total,
        parameters=number_of_parameters(backbone.module), classes=found.classes, cuts=tuple(cuts),
    )  # fmt: skip
    if times is not None:
        made = replace(made, times=tuple(times.shares.get(cut.name, 0.0) for cut in cuts), unit=times.unit)
    if sizes is not None:
        made = replace(made, parameter_shares=tuple(sizes.get(cut.name, 0.0) for cut in cuts))
    return made.switched_off(()), heads


def _parameters(backbone: Backbone, places_by: str, times: TimesOfModules | None) -> Mapping[str, float] | None:
    """Share of the backbone's parameters up to the end of each module, if places are chosen by these."""
    if places_by not in (OPERATIONS, PARAMETERS):
        raise unknown("unit of places", str(places_by), (OPERATIONS, PARAMETERS), argument="places_by")
    if places_by == OPERATIONS:
        return None
    if times is not None:
        text = " and places by time are two ways to place exits. Leave out one of them."
        raise PteeError(Argument.text("places_by", PARAMETERS), text, value=places_by)
    return parameter_shares(backbone.module, backbone.input.input_size)


def _plain(given: Any) -> Any:
    """Arrays and tensors as lists."""
    return given.tolist() if hasattr(given, "tolist") else given


def _words(places: str | float | Sequence[float] | Sequence[str], of: str) -> str:
    """Where the exits stand, for the title of a plan."""
    parts = places if isinstance(places, list | tuple) else str(places).split(",")
    where = ", ".join(map(str, parts))
    if where in PLACEMENTS:
        return where
    numbers = all(isinstance(e, int | float) or e.replace(".", "", 1).isdecimal() for e in parts)
    return f"exits at or behind {where} of the {of}" if numbers else f"exits at {where}"


# ---------------------------------------------------------------------------------------------------- one head


def build_head(spec: HeadSpec, layout: Layout, classes: int) -> ExitHead:
    """A new head, from a spec that is neither "auto" nor "front"."""
    with made_on_cpu(), float32_by_default:  # the same seed gives the same head
        features = _features(spec, layout)
        length = spec.stages[-1].channels if spec.stages else vector_length(spec.kind, features, layout)
        return ExitHead(layout, features, length, classes, builds_on_previous=spec.builds_on_previous)


def _features(spec: HeadSpec, layout: Layout) -> nn.Module:
    if spec.kind == RESIDUAL:
        return ResidualFeatures(spec.stages, layout.channels)
    return feature_factory(spec.kind)(layout.channels, layout.height, layout.width)


def build_heads(
    specs: Sequence[HeadSpec], cuts: Sequence[Cut], classes: int, front: FrontHead | str | None = None
) -> list[ExitHead]:
    """New heads, one for each exit; a front network is the first of them. The first head cannot build on another."""
    if specs[0].builds_on_previous:
        first = str(specs[0])
        text = f"The first head {first!r} has none before it to build on. Leave out the +."
        raise PteeError(text, argument="head", value=first)
    return [
        front if isinstance(front, FrontHead) and n == 0 else build_head(spec, cut.layout, classes)
        for n, (spec, cut) in enumerate(zip(specs, cuts, strict=True))
    ]


def require_saved(specs: Sequence[HeadSpec], cuts: Sequence[Cut], saved: Mapping[str, Tensor]) -> None:
    """Refuse heads whose layers are not those of the saved tensors, before they take memory: a stranger may have named them."""
    for n, (spec, cut) in enumerate(zip(specs, cuts, strict=True)):
        if not (spec.kind == RESIDUAL or is_conv(spec.kind)):
            continue
        with torch.device("meta"):  # shapes alone
            wanted = _features(spec, cut.layout).state_dict(prefix=f"{n}.features.")
        for key, tensor in wanted.items():
            found = saved.get(key)
            if found is None or found.shape != tensor.shape:
                has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise RunError(
                    f"The head {str(spec)!r} of exit {n} wants a tensor {key!r} of shape {tuple(tensor.shape)}, and in the run "
                    f"it {has}. Copy the run again."
                )


# ---------------------------------------------------------------------------------------------------- a spec for each exit


def head_specs(
    head: str | Sequence[str],
    budget: float | Sequence[float] | None,
    cuts: Sequence[Cut],
    macs: int,
    classes: int,
    front: FrontHead | str | None = None,
) -> list[HeadSpec]:
    """The spec of each exit's head; those that are "auto" get a size from `budget`, a share of the backbone's `macs`."""
    specs = _named(head, len(cuts), front)
    if not any(spec.kind == AUTO for spec in specs):
        if budget is not None:
            names = ", ".join(map(str, specs))
            text = f"A head budget sizes auto heads, and the heads are {names}. Take head auto, or leave it out."
            raise PteeError(text, argument="head_budget", value=budget)
        return specs
    shares = _budgets(budget, specs)
    shapes = [(cut.layout.channels, cut.layout.height, cut.layout.width) for cut in cuts]
    return [
        sized(spec, shape, share * macs, classes) if spec.kind == AUTO else spec
        for spec, shape, share in zip(specs, shapes, shares, strict=True)
    ]


def _named(head: str | Sequence[str], exits: int, front: FrontHead | str | None) -> list[HeadSpec]:
    """The specs that the names stand for. A front need not be named. One name for all has no + at the first exit."""
    names = as_list(head)
    if isinstance(front, FrontHead):
        others = names[1:] if len(names) == exits and names[0] == FRONT else names
        return [FRONT_SPEC, *(one_each("head", list(map(parse_head, others)), exits - 1) if exits > 1 else [])]
    specs = [parse_head(name) for name in names]
    if len(specs) != 1:
        return one_each("head", specs, exits)
    first = HeadSpec(AUTO) if front is not None else HeadSpec(specs[0].kind, specs[0].stages)
    return [first, *specs * (exits - 1)]


def _budgets(given: float | Sequence[float] | None, specs: Sequence[HeadSpec]) -> list[float]:
    """The share of each head; a front network has none."""
    front = [0.0] * (specs[0] == FRONT_SPEC)
    own = one_each("head budget", as_list(HEAD_BUDGET if given is None else given), len(specs) - len(front))
    for budget in own:
        if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget < math.inf:
            text = f"A head budget {budget!r} is no share of the backbone above 0. Give one such as 0.05."
            raise PteeError(text, argument="head_budget", value=budget)
    return front + own
