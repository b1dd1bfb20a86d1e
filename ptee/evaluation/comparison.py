"""Compare early-exit models of one backbone with each other and with the alternatives, on the same images.

The alternatives are a smaller network alone, a cascade of that network and the backbone, and the backbone cut off at one exit.
Everything that can be chosen (thresholds, exits that are off, where to cut off) is chosen on the calibration images. All numbers
are of the report images, so the drop that is found differs from the drop that was allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from ptee._common.errors import Argument, PteeError, warn
from ptee._common.progress import with_bar
from ptee._common.validation import BATCH_SIZE, checked
from ptee.analysis.freezing import device_of, one_parameter, running_on
from ptee.analysis.macs import count
from ptee.backbones.library import require_alike
from ptee.backbones.load import Backbone, load_backbone
from ptee.backbones.weights import answering_hash
from ptee.data.batches import batches, number_of_shared, same_images
from ptee.data.recorded import recorded
from ptee.evaluation.class_order import another_order
from ptee.evaluation.comparison_lines import LINES, WITHOUT_LOGITS, checked_lines, ways
from ptee.evaluation.comparison_table import COUNTED, Comparison, Entry, Line
from ptee.evaluation.results import doubted
from ptee.exits.blend import BLENDED, OWN
from ptee.exits.confidence import CONFIDENCES, LEARNED, MAX_PROB, find_confidence
from ptee.exits.config import NEVER
from ptee.exits.front import Prepare, require_same_question
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.images import require_answers
from ptee.model.saving import warn_of_changes
from ptee.tuning.candidates import can_blend
from ptee.tuning.config import DropsConfig, Target
from ptee.tuning.solution import Solution
from ptee.tuning.targets import curves, solve
from ptee.tuning.traces import (
    Score,
    Traces,
    as_answered,
    at_exits,
    compact,
    record,
    repeated,
    require_same_images,
    truncation,
)
from ptee.tuning.tune import known_images

DROPS = DropsConfig().drops
RESAMPLES, SEED = 2000, 0  # of the bootstrap
COVERED = 0.95  # by an interval
KNOWN = 0.5  # the threshold of an oracle, whose h is 0 or 1
COPIES = 0.01  # share of the report images that may be copies of calibration images without a word


@checked
def compare(
    models: Mapping[str, EarlyExitModel],
    calibration: Any,
    report: Any,
    *,
    static: Mapping[str, str | nn.Module | Backbone] | None = None,
    drops: Sequence[float] = DROPS,
    lines: Sequence[str] = LINES,
    times: Mapping[str, BatchTimes] | None = None,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    about: str = "",
    keep: dict[str, Traces] | None = None,
) -> Comparison:
    """Compare early-exit models of one backbone with each other, with smaller networks and with a cut-off backbone.

    Every exit of every model answers all images once. Everything else is computed from these answers.

    Args:
        models: with the same backbone, by name: {"mine": model}.
        calibration: images to choose thresholds on, which nothing was trained on: a map-style data set of (image, label) or
            (image,), or a loader that gives them in the same order each time.
        report: other images, for all numbers.
        static: smaller classifiers of the same classes, by name: a name that `ptee.augment` takes for a backbone, what
            `ptee.backbones.load.load_backbone` gave, or a module that takes images as the backbone does.
        drops: allowed drops of accuracy (without labels: of fidelity); .01 is one point.
        lines: which lines each model gets: "own" (its own confidence and kind of answers), "blended", "one_threshold", "oracle", "truncation", and
            confidences: "max_prob", "entropy", "margin", "patience", ... Fewer make a short table of many models. The sentences below the table are about these lines.
        times: of the pieces of every model and smaller network by name, in batches of one size: then all costs are of seconds.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the first model is.
        progress: show bars if standard error is a terminal.
        about: a sentence about the data, kept with the results.
        keep: gets the traces of the report images of each model, by name, with the answers that it gives and without logits.

    Raises:
        PteeError: if the backbones differ, a network cannot take part, or a drop, a line or the data cannot be used.
    """
    allowed, wanted = tuple(sorted({*DropsConfig(drops=drops).drops})), checked_lines(lines)
    first = _of_one_backbone(models)
    for model in models.values():
        warn_of_changes(model.origin)
    for name, model in product(set(wanted) & set(CONFIDENCES), models.values()):
        find_confidence(name, model.calibrated)  # refuse before anything takes long
    networks = {name: smaller_network(name, given, first) for name, given in (static or {}).items()}
    unit = _unit(times, [*models, *networks])
    parts = (calibration, report)
    if same_images(*parts):
        warn(
            "calibration and report are the same images, so numbers may be better than on new ones. Give other images to report on."
        )
    _require_data(parts, networks, batch_size, num_workers)
    place = device_of(first.heads, device)
    how: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    logits = _need_logits(models, parts, wanted)
    found: list[Line] = []
    seen: list[str] = []
    pair: Pair | None = None
    for name, model in models.items():
        now = _labelled_alike(record(model, part, device=place, own=True, logits=logits, **how) for part in parts)
        for before, again in zip(pair or now, now, strict=True):
            require_same_images(before.sample, again.sample)
        pair = now
        known = [known_images(model, traces.marks, own=False) for traces in (pair.report, pair.calibration)]
        seen += [f"{name}: {words}" for words in filter(None, known)][:1]  # of both it is mostly the same
        if keep is not None:
            keep[name] = replace(as_answered(model, pair.report), logits=None, confidence_logits=None)
        found += _of_run(name, _with_times(pair, times, name), allowed, wanted, model.answers, progress)
    assert pair is not None
    if not same_images(*parts) and (words := _shared(pair)):
        seen.append(words)
    for words in seen:
        warn(words)
    for name, network in networks.items():
        cost = _macs(network) / first.plan.macs
        both = zip(parts, pair, strict=True)
        cascade = Pair(*(_cascade(_logits(network, first, part, t, place, **how), t, cost) for part, t in both))
        answers, known = torch.cat([traces.answers for traces in cascade], dim=1)
        seen += filter(None, [another_order(name, answers, known, first.num_classes)])
        found += _of_network(name, first.plan.backbone, _with_times(cascade, times, name), allowed)
    return Comparison(
        backbone=first.plan.backbone,
        drops=allowed,
        lines=tuple(found),
        calibration=pair.calibration.answers.shape[1],
        samples=pair.report.answers.shape[1],
        accuracy=pair.report.score_at(pair.report.exits).accuracy,
        about=about,
        note=next(filter(None, (_note(first, traces) for traces in pair)), ""),
        seen=" ".join(seen),
        unit=unit,
        for_fidelity=tuple(name for name, model in models.items() if model.for_fidelity),
    )


def _require_data(parts: Sequence[Any], networks: Mapping[str, Backbone], batch_size: int, num_workers: int) -> None:
    """Refuse calibration or report data that cannot be read image by image, in one order, where images are needed."""
    for argument, part in zip(("calibration", "report"), parts, strict=True):
        if recorded(part) is None:
            batches(part, batch_size=batch_size, shuffle=False, num_workers=num_workers, argument=argument)
            _require_order(part)
        elif networks:
            text = f"The network {next(iter(networks))} needs the images, and these are traces. Leave it out, or give images."
            raise PteeError(text, argument="static")


def _need_logits(models: Mapping[str, EarlyExitModel], parts: Sequence[Any], wanted: Sequence[str]) -> bool:
    """Whether logits are to be kept. Of recorded traces only if some line needs them: those of a million images may take gigabytes."""
    if not any(recorded(part) is not None for part in parts):
        return True
    return any(model.answers == BLENDED for model in models.values()) or bool({*wanted} - WITHOUT_LOGITS)


def _unit(times: Mapping[str, BatchTimes] | None, names: Sequence[str]) -> str:
    """What costs are fractions of, in words. Refuses times of some of the networks, or at different batches."""
    if times is None:
        return COUNTED
    if missing := [name for name in names if name not in times]:
        raise PteeError(f"There are no times of {missing[0]}. Give those of all networks that are compared.")
    units = list(dict.fromkeys(times[name].unit for name in names))
    if len({times[name].batch for name in names}) > 1:
        raise PteeError(f"Times of different batches cannot be compared: {'; '.join(units)}.")
    return units[0]


def _with_times(pair: Pair, times: Mapping[str, BatchTimes] | None, name: str) -> Pair:
    """The same with the times of this model or network."""
    return Pair(*(replace(traces, times=(times or {}).get(name)) for traces in pair))


# ---------------------------------------------------------------------------------------------------- what is compared


class Pair(NamedTuple):
    """Traces of the calibration and the report images."""

    calibration: Traces
    report: Traces


def _hash(model: EarlyExitModel) -> str:
    return answering_hash(model.backbone, model.plan.input_size)


def _shared(pair: Pair) -> str:
    """A sentence, if images that are reported on are among those that thresholds are chosen on; else none."""
    ours, theirs = pair.report.marks, pair.calibration.marks
    if ours is None or theirs is None:
        return ""
    shared = number_of_shared(ours, theirs)
    if shared <= COPIES * len(ours):
        return ""
    return (
        f"{shared:,} of the {len(ours):,} report images are calibration images, too, so numbers may be better than on new ones. Give "
        "other images to report on."
    )


def _of_one_backbone(models: Mapping[str, EarlyExitModel]) -> EarlyExitModel:
    """The first model, if all have the same backbone and take the same images."""
    example = "such as {'mine': model}"
    if not isinstance(models, Mapping):
        raise PteeError(f"Give the models by name, {example}, not as {type(models).__name__}.", argument="models")
    if not models:
        raise PteeError(f"There is no model to compare. Give one or more by name, {example}.", argument="models")
    for model in models.values():
        require_early_exit(model)
    (first, one), *others = models.items()
    own = _hash(one) if others else ""
    for name, other in others:
        found = own if other.backbone is one.backbone else _hash(other)
        if found != own:
            raise PteeError(
                f"{name} has another backbone ({other.origin.name}, weights {found[:16]}) than {first} "
                f"({one.origin.name}, weights {own[:16]}). Compare models of one backbone."
            )
        require_alike(name, other.origin.input, first, one.origin.input)
    return one


def smaller_network(name: str, given: str | nn.Module | Backbone, model: EarlyExitModel) -> Backbone:
    """A smaller classifier of the same classes, ready to be compared with a model."""
    if not isinstance(given, Backbone):
        own = model.origin.input
        like: dict[str, Any] = {"input_size": own.input_size, "mean": own.mean, "std": own.std}
        given = load_backbone(given, **(like if isinstance(given, nn.Module) else {}))
    require_same_question(f"The network {name}", given, model.origin.input, model.num_classes)
    return given


def _require_order(data: Any) -> None:
    """The networks run over the images one after another, and their answers are compared image by image."""
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise PteeError(
            "The loader shuffles, so two networks would not see the images in the same order. Give a loader with ",
            Argument("shuffle", "False"), ".",
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- answers


def _labelled_alike(traces: Iterable[Traces]) -> Pair:
    """Traces of both parts. Labels are used only if both parts have them."""
    pair = Pair(*traces)
    return pair if all(t.targets is not None for t in pair) else Pair(*(replace(t, targets=None) for t in pair))


def _note(model: EarlyExitModel, traces: Traces) -> str:
    """Why there is no accuracy of these images though there are labels, or why the accuracy means nothing, in a sentence; else empty."""
    return traces.note or doubted(model, traces.score_at(traces.exits).accuracy, traces.answers.shape[1])


def _logits(
    network: Backbone, model: EarlyExitModel, part: Any, traces: Traces, place: torch.device, **how: Any
) -> Tensor:
    """(n, K) logits of a network for the images of some traces."""
    prepare = Prepare(model.origin.input, network.input).to(place)
    dtype = one_parameter(network.module).dtype
    with running_on(place, network.module), torch.inference_mode():
        again = repeated(part, traces, words=network.name, **how)
        logits = torch.cat([network.module(prepare(x.to(place, copy=True)).to(dtype)).float().cpu() for x in again])
    require_answers(logits.isnan().any(-1), part, f"{network.name}'s")
    return logits


def _macs(network: Backbone) -> int:
    like = one_parameter(network.module)
    return count(network.module, like.new_zeros(1, *network.input.input_size)).total


def _cascade(logits: Tensor, backbone: Traces, cost: float) -> Traces:
    """A cascade as traces: a smaller network is the only exit, and the backbone runs if that is not confident."""
    assert backbone.logits is not None
    return Traces(
        torch.stack([logits.argmax(-1), backbone.answers[-1]]),
        torch.ones(2, len(logits), dtype=torch.float32, device=logits.device),
        backbone.targets,
        backbone.costs.new_tensor([cost, 1 + cost]),
        backbone.sample,
        logits=torch.stack([compact(logits), backbone.logits[-1]]),
        head_costs=backbone.costs.new_tensor([cost]),
        confidence_logits=torch.zeros(1, len(logits), dtype=torch.float32, device=logits.device),
    ).under(MAX_PROB)


# ---------------------------------------------------------------------------------------------------- lines of the table


def _of_run(
    name: str, pair: Pair, drops: Sequence[float], wanted: Sequence[str], answers: str, progress: bool = False
) -> Iterator[Line]:
    own = pair.report.confidence_name
    solved: dict[tuple[str, bool], dict[str, tuple[Solution, ...]]] = {}
    done: set[tuple[str, bool, str]] = set()
    to_solve = [way for key, way in ways().items() if key in wanted]
    for way in with_bar(to_solve, f"thresholds of {name}", progress):
        how, kind = (way.confidence or own, way.one), way.answers or answers
        decided = Pair(*(t.under(how[0]) for t in pair))
        if how not in solved:
            solved[how] = _solutions(decided.calibration, drops, way.one)
        if kind in solved[how] and (*how, kind) not in done:  # else it is the same line again
            done.add((*how, kind))
            yield _tuned(name, way.words, "adaptive", decided, drops, solved[how][kind])
    if "oracle" in wanted:
        used = {solution.off for kinds in solved.values() for found in kinds.values() for solution in found}
        yield Line(f"{name}, oracle", "oracle", (_oracle(pair, used),), name)
    for n in _worth_cutting_at(truncation(pair.calibration)) if "truncation" in wanted else []:
        yield Line(f"{name}, truncation at exit {n}", "truncation", (_cut_off(pair, n),), name)


def _of_network(name: str, backbone: str, pair: Pair, drops: Sequence[float]) -> Iterator[Line]:
    yield Line(name, "static", (_cut_off(pair, 0),), name)
    for kind, solutions in _solutions(pair.calibration, drops).items():
        words = f", then {backbone}{'' if kind == OWN else f', {kind}'}"
        yield _tuned(name, words, "cascade", pair, drops, solutions)


def _solutions(traces: Traces, drops: Sequence[float], one: bool = False) -> dict[str, tuple[Solution, ...]]:
    """By kind of answers. Both are solved, also if one line is wanted: as in `ptee.tune`, both keep the larger reserve."""
    kinds = [OWN, BLENDED] if can_blend(traces) else [OWN]
    return curves(traces, drops, kinds, one_threshold=one)


def _tuned(of: str, words: str, kind: str, pair: Pair, drops: Sequence[float], solutions: Sequence[Solution]) -> Line:
    """A line with thresholds for each allowed drop, which were chosen on the calibration images."""

    def entry(drop: float, found: Solution) -> Entry:
        measured = _entry(Pair(*map(found.answering, pair)), lambda t: t.leaving(found.threshold), found.off)
        return replace(
            measured, allowed=drop, threshold=found.threshold, own=bool(found.remark), blended=found.weights_fitted
        )

    return Line(of + words, kind, tuple(map(entry, drops, solutions)), of)


def _oracle(pair: Pair, used: Iterable[tuple[int, ...]]) -> Entry:
    """Every image leaves at the first exit that agrees with the backbone, of those exits with which that costs least.

    Which exits are off is chosen on the calibration images, as for a run whose confidence knows which answers agree. With many exits
    not every choice is tried, so those of the run's own lines are, too.
    """
    knowing = Pair(*(_knowing(traces) for traces in pair))
    there = knowing.calibration
    found = solve(there, Target("max_fidelity_drop", 0.0), one_threshold=True, margin=0.0)

    def first_of(off: tuple[int, ...]) -> Callable[[Traces], Tensor]:
        return lambda t: t.leaving([NEVER if n in off else KNOWN for n in range(t.exits)])

    off = min([found.off, *sorted(used)], key=lambda off: there.score(first_of(off)(there), off).price)
    return _entry(knowing, first_of(off), off)


def _knowing(traces: Traces) -> Traces:
    """The same with a confidence that is 1 where an exit agrees with the backbone, and 0 elsewhere."""
    agrees = (traces.answers == traces.answers[-1]).float()
    return replace(traces, confidence=agrees, confidence_name=LEARNED, logits=None, confidence_logits=None)


def _cut_off(pair: Pair, n: int) -> Entry:
    """Every image leaves at exit n. The only heads are its own and those that it reads."""
    alone = Pair(*(replace(traces, confidence_name=LEARNED) for traces in pair))  # no confidence is needed
    return _entry(alone, lambda t: t.at(n), tuple(m for m in range(pair.report.exits) if m != n))


def _entry(pair: Pair, leave: Callable[[Traces], Tensor], off: tuple[int, ...] = ()) -> Entry:
    """Cost and drop if each image leaves at the exit that `leave` gives for it, (n,)."""
    leaving = leave(pair.report)
    losses = at_exits(pair.report.losses, leaving)
    in_calibration = at_exits(pair.calibration.losses, leave(pair.calibration))
    score = pair.report.score(leaving, off)
    some_leave = bool((leaving < pair.report.exits).any())
    low, high = _interval(losses, some_leave)
    interval = (low if pair.report.targets is not None else max(low, 0.0), high)  # fidelity cannot be gained
    drops = losses.mean().item(), interval, in_calibration.mean().item()
    return Entry(None, score.price, *drops, off=off, fidelity=score.fidelity)


def _interval(losses: Tensor, some_leave: bool) -> tuple[float, float]:
    """95 % interval of the mean loss, by bootstrap: how often it is 1, -1 and 0 is drawn from a multinomial distribution.

    Two images are added on either side (Agresti and Coull, 1998), because no loss on a few images does not mean that there
    never is one. But if no image leaves early, nothing can be lost.
    """
    n = len(losses)
    counts = np.array([(losses == value).sum().item() for value in (1, -1, 0)], dtype=float)
    counts[:2] += 2 * some_leave
    drawn = np.random.default_rng(SEED).multinomial(n, counts / counts.sum(), RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def _worth_cutting_at(scores: Sequence[Score]) -> list[int]:
    """Exits that no other exit beats: it would be as cheap and as good, and better in one of the two."""
    pairs = [(score.price, -score.merit) for score in scores]
    return [n for n, own in enumerate(pairs) if not any(o != own and o[0] <= own[0] and o[1] <= own[1] for o in pairs)]
