"""Comparing early-exit models of one backbone, and what a user would take instead of them, on the same images.

Instead of them: a smaller network alone; that network first and the backbone where it is not sure; the backbone cut off at
one exit. Whatever can be chosen (thresholds, exits that do not pay, where to cut off) is chosen on the calibration
images, and every figure is of the report images, so a drop that was allowed is not the drop that is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from ptee._common.devices import resolve_device
from ptee._common.errors import PteeError, unknown
from ptee._common.progress import with_bar
from ptee.analysis.freezing import modes, set_modes
from ptee.analysis.macs import count
from ptee.backbones.load import Backbone, load_backbone
from ptee.backbones.weights import weights_hash
from ptee.evaluation.comparison_table import Comparison, Entry, Line
from ptee.evaluation.targets import AUTO, curve, first_to_give, truncation
from ptee.evaluation.traces import Score, Traces, compact, record, repeated, require_same_images
from ptee.exits.confidence import CONFIDENCES, LEARNED, MAX_PROB, find_confidence
from ptee.exits.front import Prepare, require_same_question
from ptee.model.early_exit import EarlyExitModel, require_early_exit

DROPS = (0.0, 0.005, 0.01, 0.02)
RESAMPLES, SEED = 2000, 0  # of the bootstrap
COVERED = 0.95  # by an interval
LINES = (
    "own",
    "one_threshold",
    MAX_PROB,
    "entropy",
    "patience",
    "oracle",
    "truncation",
)  # of a run, unless others are asked for
WORDS = {
    MAX_PROB: "max probability",
    "entropy": "entropy (BranchyNet)",
}  # behind a run's name; else the confidence's own name


class Way(NamedTuple):
    """How a run decides who leaves.

    Attributes:
        words: behind its name.
        confidence: a name of `CONFIDENCES`; None for the one that the run has.
        one: all exits have the same threshold.
    """

    words: str
    confidence: str | None = None
    one: bool = False


def ways() -> dict[str, Way]:
    """The lines of a run that decide who leaves, by name: with its own confidence, and with each of `CONFIDENCES`."""
    others = {name: Way(f", {WORDS.get(name, name)}", name) for name in CONFIDENCES}
    return {"own": Way(""), "one_threshold": Way(", one T", one=True)} | others


def compare(
    models: Mapping[str, EarlyExitModel],
    calibration: Any,
    report: Any,
    *,
    static: Mapping[str, str | nn.Module | Backbone] | None = None,
    drops: Sequence[float] = DROPS,
    lines: Sequence[str] = LINES,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    about: str = "",
) -> Comparison:
    """Compare early-exit models of one backbone with each other, with smaller networks and with a cut-off backbone.

    Each model answers all images once, each at every exit; the rest is arithmetic.

    Args:
        models: names, and models with the same backbone.
        calibration: what thresholds are chosen on: a map-style data set of (image, label) or (image,), or a loader that
            gives them in the same order each time. Images that nothing was trained on.
        report: other images, for every figure.
        static: names, and smaller classifiers of the same classes: a name that `ptee.augment` takes for a backbone, what
            `ptee.backbones.load.load_backbone` gave, or a module that takes images as the backbone does.
        drops: of accuracy (without labels: fidelity) that are allowed; .01 is one point.
        lines: which lines each model gets: "own" (its own confidence), "one_threshold", any name of `CONFIDENCES`, "oracle",
            "truncation". Fewer make a short table of many models. What is said in words is of these.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the first model is.
        progress: show bars, where standard error is a terminal.
        about: a sentence about the data, kept with the results.

    Raises:
        PteeError: if the backbones differ, a network cannot take part, or a drop, a line or the data cannot be used.
    """
    allowed, wanted = checked_drops(drops), checked_lines(lines)
    first = _of_one_backbone(models)
    for name, model in product(set(wanted) & set(CONFIDENCES), models.values()):
        find_confidence(name, model.calibrated)  # refuse before anything takes long
    networks = {name: _network(name, given, first) for name, given in (static or {}).items()}
    for data in (calibration, report):
        _require_order(data)
    place = next(first.heads.parameters()).device if device is None else resolve_device(device)
    images = _Images(calibration, report, place, batch_size, num_workers, progress)
    found: list[Line] = []
    pair: Pair | None = None
    for name, model in models.items():
        before, pair = pair, _recorded(model, images)
        for earlier, now in zip(before or pair, pair, strict=True):
            require_same_images(earlier.sample, now.sample)
        found += with_bar(_of_run(name, pair, allowed, wanted), f"thresholds of {name}", progress)
    assert pair is not None
    for name, network in networks.items():
        cost = _macs(network) / first.plan.macs
        beside = Pair(
            *(_beside(logits, t, cost) for logits, t in zip(_said(network, first, images, pair), pair, strict=True))
        )
        found += _of_network(name, first.plan.backbone, beside, allowed)
    accuracy = pair.report.score(pair.report.at(len(pair.report.costs) - 1)).accuracy
    chosen_on, samples = (t.answers.shape[1] for t in pair)
    note = pair.calibration.note or pair.report.note
    return Comparison(first.plan.backbone, allowed, tuple(found), chosen_on, samples, accuracy, about, note)


def checked_drops(drops: Sequence[float]) -> tuple[float, ...]:
    """Allowed drops in ascending order, each once.

    Raises:
        PteeError: if there is none, or one is no fraction.
    """
    if isinstance(drops, str) or not isinstance(drops, Iterable):
        raise PteeError(f"The drops are {drops!r}: give several, such as [0, 0.01].")
    drops = list(drops)
    wrong = [drop for drop in drops if not isinstance(drop, Real) or not 0 <= drop < 1]
    if wrong or not drops:
        shown = [f"{drop:g}" if isinstance(drop, Real) else repr(drop) for drop in wrong]
        found = f"A drop of {shown[0]} cannot be" if wrong else "No drop is given"
        raise PteeError(f"{found}: give fractions of at least 0 and below 1, such as 0.01 for one point.")
    return tuple(sorted({float(drop) for drop in drops}))


def checked_lines(lines: Sequence[str]) -> tuple[str, ...]:
    """Names of a run's lines, in the order of the table.

    Raises:
        UnknownName: if there is no such line.
        PteeError: if there is no way to decide who leaves among them, so that nothing could be said of the run.
    """
    deciding = ways()
    known = (*deciding, "oracle", "truncation")
    for name in lines:
        if name not in known:
            raise unknown("line", name, known)
    if not set(lines) & set(deciding):
        raise PteeError(
            f"No way to decide who leaves is among the lines ({', '.join(lines) or 'none'}). Add one or more of {', '.join(deciding)}."
        )
    return tuple(name for name in known if name in lines)


# ---------------------------------------------------------------------------------------------------- what is compared


class Pair(NamedTuple):
    """Traces of the two parts."""

    calibration: Traces
    report: Traces


@dataclass(frozen=True)
class _Images:
    """Both parts, and how they are gone through."""

    calibration: Any
    report: Any
    device: torch.device
    batch_size: int
    num_workers: int
    progress: bool

    @property
    def parts(self) -> tuple[Any, Any]:
        return self.calibration, self.report

    @property
    def how(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "num_workers": self.num_workers, "progress": self.progress}


def _of_one_backbone(models: Mapping[str, EarlyExitModel]) -> EarlyExitModel:
    """The first model, where all stand on the same backbone and take the same images."""
    if not isinstance(models, Mapping):
        raise PteeError(
            f"Models are given by name, not as {type(models).__name__}: give each with its name, such as {{'mine': model}}."
        )
    if not models:
        raise PteeError("There is no model to compare. Give one or more, each with its name.")
    for model in models.values():
        require_early_exit(model)
    (first, one), *others = models.items()
    own = weights_hash(one.backbone) if others else ""
    for name, other in others:
        found = own if other.backbone is one.backbone else weights_hash(other.backbone)
        if found != own:
            raise PteeError(
                f"{name} stands on another backbone ({other.origin.name}, weights {found[:16]}) than {first} "
                f"({one.origin.name}, weights {own[:16]}). Compare models of one backbone."
            )
        if _view(other) != _view(one):
            raise PteeError(
                f"{name} takes images of another size, mean or deviation than {first}. Compare like models."
            )
    return one


def _view(model: EarlyExitModel) -> list[tuple[float, ...]]:
    images = model.origin.input
    return [tuple(images.input_size), tuple(images.mean), tuple(images.std)]


def _network(name: str, given: str | nn.Module | Backbone, model: EarlyExitModel) -> Backbone:
    if not isinstance(given, Backbone):
        view = model.origin.input if isinstance(given, nn.Module) else None
        like: dict[str, Any] = (
            {} if view is None else {"input_size": view.input_size, "mean": view.mean, "std": view.std}
        )
        given = load_backbone(given, **like)
    require_same_question(f"The network {name}", given, model.origin.input, model.num_classes)
    return given


def _require_order(data: Any) -> None:
    """Networks go over the images one after another, and their answers are put side by side."""
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise PteeError(
            "The loader shuffles, so no two networks would see the images in the same order: shuffle=False."
        )


# ---------------------------------------------------------------------------------------------------- what they say


def _recorded(model: EarlyExitModel, images: _Images) -> Pair:
    """Labels count only where both parts have them."""
    home, was_training = next(model.heads.parameters()).device, model.training
    try:
        model.to(images.device)
        pair = Pair(*(record(model, part, **images.how) for part in images.parts))
    finally:
        model.to(home).train(was_training)
    if any(traces.targets is None for traces in pair):
        return Pair(*(replace(traces, targets=None) for traces in pair))
    return pair


def _said(network: Backbone, model: EarlyExitModel, images: _Images, pair: Pair) -> list[Tensor]:
    """(n, K) logits of a network for both parts, of which there are traces."""
    prepare = Prepare(model.origin.input, network.input).to(images.device)
    with _at_work(network.module, images.device) as like, torch.inference_mode():
        said = []
        for part, traces in zip(images.parts, pair, strict=True):
            again = repeated(part, traces, words=network.name, **images.how)
            seen = (prepare(x.to(images.device)).to(like.dtype) for x in again)
            said.append(torch.cat([network.module(x).float().cpu() for x in seen]))
        return said


@contextmanager
def _at_work(module: nn.Module, device: torch.device) -> Iterator[Tensor]:
    """A network in eval mode on a device, and one of its tensors; put back as it was."""
    like, before = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(())), modes(module)
    home = like.device
    try:
        module.to(device).eval()
        yield like
    finally:
        set_modes(module.to(home), before)


def _macs(network: Backbone) -> int:
    like = next((p for p in network.module.parameters() if p.is_floating_point()), torch.zeros(()))
    return count(network.module, like.new_zeros(1, *network.input.input_size)).total


def _beside(logits: Tensor, whole: Traces, cost: float) -> Traces:
    """The cascade: a network whose sure answers spare the backbone, and the backbone."""
    assert whole.logits is not None
    return Traces(
        torch.stack([logits.argmax(-1), whole.answers[-1]]),
        torch.ones(2, len(logits)),
        whole.targets,
        torch.tensor([cost, 1 + cost], dtype=torch.float64),
        whole.sample,
        logits=torch.stack([compact(logits), whole.logits[-1]]),
        head_costs=torch.tensor([cost], dtype=torch.float64),
        confidence_logits=torch.zeros(1, len(logits)),
    ).under(MAX_PROB)


# ---------------------------------------------------------------------------------------------------- what it comes to


def _of_run(name: str, pair: Pair, drops: Sequence[float], wanted: Sequence[str]) -> Iterator[Line]:
    own = pair.report.confidence_name
    for way in (way for key, way in ways().items() if key in wanted):
        if way.confidence != own or "own" not in wanted:  # else it is there already
            decided = Pair(*(t.under(way.confidence or own) for t in pair))
            yield _tuned(name, way.words, "adaptive", decided, drops, way.one)
    if "oracle" in wanted:
        last = pair.report.answers.shape[0] - 1
        agreeing = _entry(pair, lambda t: first_to_give(t, t.answers[last]))
        yield Line(f"{name}, oracle", "oracle", (agreeing,), name)
    for n in _worth_cutting_at(truncation(pair.calibration)) if "truncation" in wanted else []:
        yield Line(f"{name}, truncation at exit {n}", "truncation", (_cut_off(pair, n),), name)


def _of_network(name: str, backbone: str, pair: Pair, drops: Sequence[float]) -> Iterator[Line]:
    yield Line(name, "static", (_cut_off(pair, 0),), name)
    yield _tuned(name, f", then {backbone}", "cascade", pair, drops)


def _tuned(of: str, words: str, kind: str, pair: Pair, drops: Sequence[float], one: bool = False) -> Line:
    """Thresholds for each allowed drop, from the calibration images."""
    solutions = zip(drops, curve(pair.calibration, drops, one=one, margin=AUTO), strict=True)
    return Line(of + words, kind, tuple(_at(pair, drop, found.threshold, found.off) for drop, found in solutions), of)


def _at(pair: Pair, allowed: float, threshold: tuple[float, ...], off: tuple[int, ...]) -> Entry:
    return replace(_entry(pair, lambda t: t.leaving(threshold), off), allowed=allowed, threshold=threshold)


def _cut_off(pair: Pair, n: int) -> Entry:
    """Everybody leaves at exit n, whose head is the only one, but for those that it reads."""
    alone = Pair(*(replace(traces, confidence_name=LEARNED) for traces in pair))  # nobody asks for a confidence
    return _entry(alone, lambda t: t.at(n), tuple(m for m in range(len(pair.report.costs) - 1) if m != n))


def _entry(pair: Pair, leave: Callable[[Traces], Tensor], off: tuple[int, ...] = ()) -> Entry:
    """What it comes to if rows leave where they are told to."""
    leaving = leave(pair.report)
    there, here = _losses(pair.calibration, leave(pair.calibration)), _losses(pair.report, leaving)
    cost = pair.report.costs_without(off)[leaving].mean().item()
    some_leave = bool((leaving < len(pair.report.costs) - 1).any())
    return Entry(None, cost, here.mean().item(), _interval(here, some_leave), there.mean().item(), off=off)


def _losses(traces: Traces, leaving: Tensor) -> Tensor:
    """(n,) 1 for a right answer less than the bare backbone, -1 for one more."""
    wanted = traces.answers[-1] if traces.targets is None else traces.targets
    right = traces.answers.eq(wanted).double()
    return right[-1] - right.gather(0, leaving[None])[0]


def _interval(losses: Tensor, some_leave: bool) -> tuple[float, float]:
    """Of the mean, by bootstrap. As each is -1, 0 or 1, how often they are drawn is all that counts.

    What none of n images shows is not taken for never: it counts as one of them. Where nobody leaves nothing can be lost.
    """
    n = len(losses)
    seen = np.array([(losses == value).sum().item() for value in (1, -1, 0)], dtype=float)
    seen[:2] = seen[:2].clip(min=float(some_leave))
    drawn = np.random.default_rng(SEED).multinomial(n, seen / seen.sum(), RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def _worth_cutting_at(scores: Sequence[Score]) -> list[int]:
    """Exits that no other one beats, at the same cost or less."""
    merits = [(-s.cost, s.fidelity if s.accuracy is None else s.accuracy) for s in scores]
    return [n for n, own in enumerate(merits) if not any(_beats(other, own) for other in merits)]


def _beats(other: tuple[float, float], own: tuple[float, float]) -> bool:
    return other != own and all(theirs >= ours for theirs, ours in zip(other, own, strict=True))
