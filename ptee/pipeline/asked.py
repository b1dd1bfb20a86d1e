"""What the words of a command ask for, as values: a backbone, its exits and heads, images, a wish, networks to compare with.

`o` are the options by name, as `options` and `cli` declare them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ptee._common.errors import CutError, PteeError, unknown
from ptee.analysis.cut_points import survey
from ptee.backbones import load as backbones
from ptee.backbones.load import Backbone
from ptee.data.labels import LabelMap, map_labels, with_labels
from ptee.data.sources import Data, image_transform, open_data, open_named
from ptee.evaluation.targets import WISHES, Wish, checked_margin
from ptee.exits.front import INPUT, FrontHead, named_front
from ptee.exits.heads import AUTO
from ptee.exits.placement import CHOSEN, PLACEMENTS, needs_images
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline.recipe import PLAIN, RECIPE, RECIPES

HEAD = "pool"  # where nothing else is said

Made = TypeVar("Made")
Options = dict[str, Any]
Say = Callable[..., None]  # prints a text; with err=True to the standard error


def backbone(o: Options) -> Backbone:
    """The one that is named.

    Raises:
        PteeError: if none is.
    """
    if o["model"] is None:
        raise PteeError("Which model? Give --model NAME, such as --model resnet50.")
    return backbones.load_backbone(
        o["model"],
        weights=o["weights"],
        pretrained=o["pretrained"],
        num_classes=o["num_classes"],
        input_size=o["input_size"],
        mean=o["mean"],
        std=o["std"],
        model_args=dict(o["model_args"]),
    )


def placing(network: Backbone, o: Options) -> dict[str, Any]:
    """Where exits are to stand and what is to stand there, as arguments of `make_plan` and `build`."""
    return {
        "exits": exits(o["exits"], network),
        "num_exits": o["num_exits"],
        "head": heads(o),
        "convention": o["cost_convention"],
        "head_budget": o["head_budget"],
        "front": front(network, o),
    }


def placed(make: Callable[..., Made], network: Backbone, o: Options) -> Made:
    """What `make_plan` or `build` makes of the network and what is asked for.

    A network that has no room for the recipe's own places gets as many by pareto as it has room for.
    """
    try:
        return make(network, **placing(network, o))
    except CutError:
        if o["recipe"] != RECIPE or o["exits"] != RECIPES[RECIPE]["exits"]:
            raise
        return make(network, **placing(network, o | {"exits": PLAIN["exits"], "head_budget": None}))


def untrained(network: Backbone, o: Options) -> EarlyExitModel:
    """The model with its exits; the same seed gives the same heads."""
    torch.manual_seed(o.get("seed", 0))
    return placed(build, network, o)


def exits(text: str | None, network: Backbone) -> Any:
    """A placement, fractions, or modules: what the words between the commas are.

    Raises:
        UnknownName: if a single word is nothing of these.
        PteeError: if the exits are to be chosen with images.
    """
    parts = [part.strip() for part in (text or "pareto").split(",") if part.strip()]
    first = [part for part in parts[:1] if part == INPUT]
    try:
        return [*first, *(float(part) for part in parts[len(first) :])]
    except ValueError:
        pass
    names = [name for name, _ in network.module.named_modules() if name]
    if len(parts) != 1 or parts[0] in (INPUT, *names):
        return parts
    if parts[0] == CHOSEN:
        raise needs_images()
    if parts[0] not in PLACEMENTS:
        cuts = survey(network.module.eval(), network.input.input_size).cuts
        blocks = [name for name in cuts if any(other.startswith(f"{name}.") for other in names)]
        raise unknown("placement or module", parts[0], [CHOSEN, *cuts], first=[*PLACEMENTS, *blocks][:12])
    return parts[0]


def heads(o: Options) -> list[str]:
    """Their names: one for all exits, or one for each."""
    return [name.strip() for name in (o["head"] or HEAD).split(",")]


def front(network: Backbone, o: Options) -> FrontHead | str | None:
    """What is to stand in front of the backbone, "auto", or None.

    Raises:
        PteeError: if something is said of a front that is not named.
    """
    given = {key: o[f"front_{key}"] for key in ("weights", "mean", "std") if o[f"front_{key}"]}
    if o["front"] in (None, AUTO):
        for key in given:
            raise PteeError(
                f"--front-{key} says something of a network that --front does not name. Name it, or leave it out."
            )
    return named_front(o["front"], network, pretrained=o["pretrained"], **given)


def images(
    source: str, network: Backbone, *, seed: int, root: str | Path | None = None, named: bool = False
) -> tuple[Data, LabelMap]:
    """The data as this backbone takes it, with its labels.

    Args:
        source: a folder, or the name of a data set.
        network: the backbone.
        seed: of what is drawn.
        root: where a torchvision data set lies.
        named: it is a name, even if a folder is called so.
    """
    view = network.input
    transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
    find = open_named if named else open_data
    data = find(source, transform=transform, root=Path(root) if root else None, seed=seed)
    labels = map_labels(data.class_names, network.num_classes)
    parts: dict[str, Any] = {n: with_labels(getattr(data, n), labels) for n in ("train", "calibration", "validation")}
    return replace(data, **parts), labels


def wish(o: Options) -> Wish | None:
    """What thresholds are to be chosen by; None where nothing is asked for.

    Raises:
        PteeError: if thresholds are given and asked for, or there are several wishes.
    """
    given = {kind: o[kind] for kind in WISHES}
    options = ", ".join(f"--{kind.replace('_', '-')}" for kind in WISHES)
    if any(limit is not None for limit in given.values()):
        if o["threshold"]:
            raise PteeError(f"--threshold gives T, {options} choose it: give one or the other.")
        wished = Wish.only(given)
        checked_margin(wished, o["margin"])
        return wished
    others = {"--one-threshold": o["one_threshold"], "--margin": o["margin"] != AUTO}
    for name in [name for name, is_given in others.items() if is_given]:
        if o["threshold"] or o.get("recipe") != RECIPE:  # which has a wish of its own
            raise PteeError(f"{name} needs one of {options}.")
    return None


def named_networks(texts: Sequence[str]) -> dict[str, Backbone]:
    """Smaller networks as the command names them.

    Args:
        texts: NAME with its published weights, or NAME=FILE; each name once.

    Raises:
        PteeError: if there is no such model, its weights cannot be had, or two have one name.
    """
    found: dict[str, Backbone] = {}
    for name, file in (text.partition("=")[::2] for text in texts):
        if name in found:
            raise PteeError(f"--static {name} is given twice. Give each network once.")
        names = replace(backbones.WEIGHTS_ALONE, weights=f"static={name}")
        found[name] = backbones.load_backbone(name, weights=file or None, names=names)
    return found


def names_of(runs: Sequence[str]) -> list[str]:
    """What to call runs: the name of each one's folder, or the whole path where two are called alike.

    Raises:
        PteeError: if one is given twice.
    """
    for run in runs:
        if runs.count(run) > 1:
            raise PteeError(f"The run {run} is given twice. Give each run once.")
    ends = [Path(run).absolute().name for run in runs]
    return [end if ends.count(end) == 1 else run for run, end in zip(runs, ends, strict=True)]
