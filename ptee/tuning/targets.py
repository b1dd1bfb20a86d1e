"""Thresholds for a target, from traces: the lowest cost within an allowed loss, or the lowest loss within a cost.

Thresholds fit the noise of the images that they are chosen on, so report on other images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import PteeError
from ptee._common.text import number_of
from ptee.exits.blend import OWN, Blend, Exits
from ptee.production.few_images import too_few
from ptee.tuning.candidates import FOLDS, Candidate, searched, ways_to_answer
from ptee.tuning.config import Promise, Target, ThresholdsConfig, below, describe_thresholds
from ptee.tuning.reachable import Margin, losses_of, require_reachable, unreachable
from ptee.tuning.threshold_search import ROUNDING, Choice, Problem, objective
from ptee.tuning.traces import Score, Traces

DEFAULTS = ThresholdsConfig()
WITHIN = 1.96  # standard deviations to either side hold 95 % of a normal distribution
DRAWS = 50  # of as many images, with replacement
MAX_IMAGES = 10_000  # for it: more take minutes, and thresholds hardly fit the noise of so many
RISKY = (
    " Other thresholds would cost less here, but would probably lose more than the limit on new images. "
    "ptee tune RUN --{} {:g} --margin 0 (in Python: margin=0) takes them nevertheless."
)
BY_OBJECTIVE = attrgetter("objective")


@dataclass(frozen=True)
class Solution:
    """Thresholds that were chosen, and what they give on the images that they were chosen on. Prints as text.

    Attributes:
        target: what they were chosen for.
        threshold: (E) T of each exit; above every confidence for exits that are off.
        off: exits that do not pay: no image leaves there, and their heads do not run.
        score: accuracy, fidelity and cost on those images.
        backbone: the same of the bare backbone.
        samples: number of images.
        margin: how much of the target's limit was kept in reserve for other images.
        blend: the weights of blended answers; None if each exit answers by itself.
        remark: why answers are not blended although they were to be, in a sentence; else empty.
        unit: what the time is a fraction of, in words; empty if the cost was counted.
        promise: the guarantee that the target is kept; None if it is kept on average.
        several_risky: several thresholds would cost less, but need more reserve than the whole limit, so there is one for all.
    """

    target: Target
    threshold: tuple[float, ...]
    off: tuple[int, ...]
    score: Score
    backbone: Score
    samples: int
    margin: float = 0.0
    blend: Blend | None = None
    remark: str = ""
    unit: str = ""
    promise: Promise | None = None
    several_risky: bool = False

    @property
    def cost(self) -> float:
        """Mean cost, counted."""
        return self.score.cost

    @property
    def price(self) -> float:
        """What is to be as low as possible: the time if it was measured, else the cost."""
        return self.score.price

    @property
    def drop(self) -> float | None:
        """By how much the accuracy is below the bare backbone's; negative where it is above. None without labels."""
        if self.score.accuracy is None or self.backbone.accuracy is None:
            return None
        return self.backbone.accuracy - self.score.accuracy

    @property
    def fidelity_drop(self) -> float:
        """Share of the answers that differ from the backbone's."""
        return 1 - self.score.fidelity

    @property
    def on_exits(self) -> Exits:
        """The exits that are on."""
        return tuple(n for n in range(len(self.threshold)) if n not in self.off)

    def on(self, traces: Traces) -> Score:
        """Accuracy, fidelity and cost of these thresholds on other traces of the same model."""
        traces = self.answering(traces)
        return traces.score(traces.leaving(self.threshold), self.off)

    def answering(self, traces: Traces) -> Traces:
        """Traces of own answers, with the answers that these thresholds were chosen for."""
        return traces.blended(self.blend, self.on_exits) if self.blend is not None else traces

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        values = asdict(replace(self, blend=None)) | {"blend": self.blend and self.blend.to_dict()}
        return values | {"threshold": list(self.threshold), "off": list(self.off), "drop": self.drop}

    def __str__(self) -> str:
        drop, s = self.drop, self.score
        accuracy = "" if drop is None else f"accuracy {s.accuracy:.4f} ({below(drop)} the backbone's), "
        return (
            f"Target: {self.target}{self._how_sure}.\nChosen: {self._chosen} On the {number_of(self.samples, 'image')} that this was chosen on{self._with_weights}: "
            f"{accuracy}fidelity {s.fidelity:.4f}, cost {s.cost:.4f} of the multiply-accumulates{self._time}.{self._too_few}{self._few_images}"
            + (f"\n{self.remark}" if self.remark else "")
            + (f"\n{self.promise.without(self.price, self.unit)}" if self.promise else "")
        )

    @property
    def _how_sure(self) -> str:
        if self.promise is not None:
            return str(self.promise)
        reserve = f", with {self.margin:.4f} of that in reserve for new images" if self.margin else ""
        return reserve if self.target.kind == "max_cost" else f", on average{reserve}"

    @property
    def _with_weights(self) -> str:
        """Which of the two losses of blended answers this is; `ptee compare` names that of the final weights."""
        return ", each answered with weights that were fitted to the others" if self.blend else ""

    @property
    def _or_unsafe(self) -> str:
        return " or are not shown to be good enough" if self.promise and self.promise.each_exit else ""

    @property
    def _too_few(self) -> str:
        """The whole limit is in reserve, or it is less than several thresholds need."""
        if self.promise is not None:
            return ""
        if self.several_risky:
            return RISKY.format(self.target.kind.replace("_", "-"), self.target.limit)
        if not 0 < self.target.limit <= self.margin:
            return ""
        return " All that may be lost is in reserve: with more images to choose on, less reserve is needed, and more is saved."

    @property
    def _few_images(self) -> str:
        """Where a loss as large as the limit may well not show on the images at all."""
        on_average = self.promise is None and self.target.kind != "max_cost" and bool(self.on_exits)
        words = too_few(self.samples, self.target.limit) if on_average else ""
        return f" {words}".rstrip()

    @property
    def _time(self) -> str:
        return "" if self.score.time is None else f", expected time {self.score.time:.4f} of {self.unit}"

    @property
    def _chosen(self) -> str:
        if len(self.off) == len(self.threshold) and self.promise:
            return "all exits off; the backbone answers every image."
        if len(self.off) == len(self.threshold) and self.unit:
            how = self.unit.removeprefix("the bare backbone's time ")
            return f"all exits off: nothing within the target is faster than the bare backbone {how}."
        if len(self.off) == len(self.threshold):
            return "all exits off, because none of them pays; the backbone answers every image."
        off = (
            f" Exits that are off do not pay{self._or_unsafe}, and the cost is without their heads." if self.off else ""
        )
        blended = " Answers are blended." if self.blend else ""
        remark = f" {self.blend.remark}" if self.blend and self.blend.remark else ""
        return f"T = {describe_thresholds(self.threshold, self.off)}.{off}{blended}{remark}"


def solve(
    traces: Traces,
    target: Target,
    *,
    one_threshold: bool = DEFAULTS.one_threshold,
    margin: Margin = DEFAULTS.margin,
    answers: str = OWN,
) -> Solution:
    """The thresholds that meet a target best on these traces, and the exits that should be off.

    Within a largest drop, the cost becomes as low as possible; within a largest cost, the loss of accuracy (without labels: of
    fidelity). The result is never worse than the best single threshold with any exits off.

    Args:
        traces: of the own answers to images that neither the backbone nor the heads were trained on.
        target: the limit.
        one_threshold: the same T for all exits that are on.
        margin: how much of the limit is kept in reserve, because new images lose more than those that T is chosen on. "auto":
            cross-validation estimates how much more; at most the whole limit. A largest cost gets no such reserve, nor do
            fewer than 8 images.
        answers: "own", "blended", or "auto": whichever meets the target better on images that its weights were not fitted to.

    Raises:
        PteeError: if the target cannot be met; the message says what can.
    """
    return _kept(
        _solved(ways_to_answer(traces, target.kind, answers), target, one_threshold, margin),
        traces,
        one_threshold,
        margin,
    )


@dataclass(frozen=True)
class _Way:
    """The best solution with one kind of answers, and with one threshold or several."""

    candidates: list[Candidate]
    one_threshold: bool
    solution: Solution

    @classmethod
    def found(cls, candidates: list[Candidate], target: Target, one_threshold: bool, margin: float) -> _Way:
        return cls(candidates, one_threshold, _within(candidates, target, one_threshold, margin))

    @property
    def objective(self) -> float:
        """Less is better."""
        return -self.solution.score.merit if self.solution.target.kind == "max_cost" else self.solution.price

    def with_reserve(self, least: float) -> list[_Way]:
        """The same with so much in reserve at least; empty if the target cannot be met then."""
        if self.solution.margin >= least:
            return [self]
        try:
            found = _Way.found(self.candidates, self.solution.target, self.one_threshold, least)
        except PteeError:
            return []
        return [replace(found, solution=replace(found.solution, several_risky=self.solution.several_risky))]


def _solved(kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin) -> _Way:
    """The best solution of all kinds of answers."""
    best, failed = _best_of_each(kinds, target, one_threshold, margin)
    if not any(best):
        every = [candidate for kind in kinds for candidate in kind]
        raise unreachable(target, every, one_threshold, margin) if target.limit < 0 else failed[-1]
    return min(filter(None, best), key=BY_OBJECTIVE)


def _best_of_each(
    kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin
) -> tuple[list[_Way | None], list[PteeError]]:
    """The best solution with each kind of answers, None if there is none; and why there is none.

    Where times are known, it is never one that is slower than the one by multiply-accumulates.
    """
    best, failed = _of_each(kinds, target, one_threshold, margin)
    if kinds[0][0].traces.times is None or target.kind == "max_cost":
        return best, failed
    counted, _ = _of_each([[replace(c, counted=True) for c in kind] for kind in kinds], target, one_threshold, margin)
    found = ([way for way in both if way is not None] for both in zip(best, counted, strict=True))
    return [min(ways, key=BY_OBJECTIVE, default=None) for ways in found], failed


def _of_each(
    kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin
) -> tuple[list[_Way | None], list[PteeError]]:
    """The best solution with each kind of answers, by seconds if these are known and not only counted ones are wanted.

    A reserve is an estimate. So all kinds get the largest one: otherwise the kind would win whose estimate is too low.
    """
    ways_of_each: list[list[_Way]] = []
    failed: list[PteeError] = []
    for candidates in kinds:
        try:
            ways_of_each.append(_ways(candidates, target, one_threshold, margin))
        except PteeError as why:
            ways_of_each.append([])
            failed.append(why)
    largest = max((min(ways, key=BY_OBJECTIVE).solution.margin for ways in ways_of_each if ways), default=0.0)
    again = ([kept for way in ways for kept in way.with_reserve(largest)] for ways in ways_of_each)
    return [min(ways, key=BY_OBJECTIVE, default=None) for ways in again], failed


def _kept(way: _Way, traces: Traces, one_threshold: bool, margin: Margin) -> Solution:
    """The solution, if its blended answers keep the target with their final weights, too; else one with own answers.

    Thresholds are chosen on answers with the weights of folds. On the same images, final weights may differ from them by chance only.
    """
    found, target = way.solution, way.solution.target
    if found.blend is None:
        return found
    chosen_on = next(c for c in way.candidates if c.on == found.on_exits).traces
    by_time = target.kind == "max_cost" and traces.times is not None
    spent, deviation = (_time_spent if by_time else _mean_spent)(chosen_on, found.answering(traces), found)
    if spent <= target.limit + WITHIN * deviation + ROUNDING:
        return found
    because = f"with their final weights, blended answers miss the target here ({spent:.4f})"
    kinds = ways_to_answer(traces, target.kind, OWN)
    try:
        own = _solved(kinds, target, one_threshold, margin).with_reserve(found.margin)
    except PteeError:
        own = []
    if not own:
        every = [candidate for kind in kinds for candidate in kind]
        raise unreachable(target, every, one_threshold, margin, who=f"{because}, and by themselves the exits")
    return replace(own[0].solution, remark=f"Each exit answers by itself: {because}.")


def _mean_spent(folds: Traces, final: Traces, found: Solution) -> tuple[float, float]:
    """The mean with final weights, and the standard deviation of its difference from that with the weights of folds."""
    on_folds, spent = (_spent(t, found) for t in (folds, final))
    return spent.mean().item(), (spent - on_folds).std().item() / math.sqrt(len(spent))


def _time_spent(folds: Traces, final: Traces, found: Solution) -> tuple[float, float]:
    """The same of the expected time, which is no mean over the images: the deviation is over draws of them."""
    on_folds, leaving = (t.leaving(found.threshold) for t in (folds, final))
    random = torch.Generator(device="cpu").manual_seed(0)
    gaps = []
    for _ in range(DRAWS):
        drawn = torch.randint(len(leaving), (len(leaving),), generator=random, device="cpu").to(leaving.device)
        gaps.append((final.time(leaving[drawn], found.off) or 0.0) - (final.time(on_folds[drawn], found.off) or 0.0))
    return final.time(leaving, found.off) or 0.0, stdev(gaps)


def _spent(traces: Traces, found: Solution) -> Tensor:
    """(n,) for each image, that whose mean is limited."""
    leaving = traces.leaving(found.threshold)
    if found.target.kind == "max_cost":
        return traces.costs_without(found.off)[leaving]
    return losses_of(traces, found.target).gather(0, leaving[None])[0]


def _ways(candidates: list[Candidate], target: Target, one_threshold: bool, margin: Margin) -> list[_Way]:
    """One threshold and several, each with the reserve that it needs. What needs more than the whole limit is left out.

        reserve = min(max(optimism, 0), |limit|)

    One T for all exits fits less of the noise than several. So it needs a smaller reserve, and may cost less in the end.
    """
    if not isinstance(margin, str) or target.kind == "max_cost":
        return [_Way.found(candidates, target, one_threshold, 0.0 if isinstance(margin, str) else margin)]
    ways: list[_Way] = []
    safe: list[_Way] = []
    failed: list[PteeError] = []
    for one in (True,) if one_threshold or candidates[0].traces.exits == 1 else (True, False):
        try:
            optimism = _optimism(candidates, target, one)
            ways.append(_Way.found(candidates, target, one, min(max(optimism, 0.0), abs(target.limit))))
            safe += ways[-1:] * (optimism <= abs(target.limit))
        except PteeError as why:
            failed.append(why)
    if not ways:
        raise failed[-1]
    if safe == ways or len(ways) < 2:
        return ways
    first, several = ways  # of which one is left out
    risky = first in (safe or [first]) and several.objective < first.objective
    return [replace(first, solution=replace(first.solution, several_risky=True))] if risky else safe or [first]


def _within(candidates: list[Candidate], target: Target, one_threshold: bool, margin: float) -> Solution:
    """The best solution whose mean loss, or cost, is within the limit less a margin."""
    first = candidates[0].traces
    require_reachable(target, min(first.prices_alone), margin)
    limit, limited = target.limit - margin, "cost" if target.kind == "max_cost" else "loss"
    best: tuple[Choice, Problem, Candidate] | None = None
    for candidate in candidates:
        traces = candidate.traces
        problem = Problem(
            traces.confidence[:-1], losses_of(traces, target), traces.costs_where, limited=limited, limit=limit
        )
        for choice in searched(candidate, problem, one_threshold):
            if best is None or objective(problem, choice) < objective(problem, best[0]):
                best = choice, problem, candidate
    if best is None:
        raise unreachable(target, margin=margin)
    choice, problem, candidate = best
    taken = tuple(n for n, number in enumerate(choice.taken.tolist()) if number)
    on = taken if candidate.on is None else candidate.on
    off = tuple(n for n in range(first.exits) if n not in on)
    threshold = tuple(problem.thresholds(choice.taken, one_threshold))
    score = candidate.traces.score(candidate.traces.leaving(threshold), off)
    bare = replace(first.alone.score_at(first.exits), cost=1.0, time=None if first.times is None else 1.0)
    unit = "" if first.times is None else first.times.unit
    return Solution(target, threshold, off, score, bare, problem.images, margin, candidate.blend, unit=unit)


def _optimism(candidates: list[Candidate], target: Target, one_threshold: bool) -> float:
    """How much more than the limit is lost on images that the thresholds were not chosen on, by cross-validation.

    optimism = (1/n) sum_i loss_i(thresholds chosen on the folds without image i) - limit
    """
    whole = candidates[0].traces
    order = torch.randperm(whole.answers.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
    drawn = order[:MAX_IMAGES].to(whole.answers.device)
    images = len(drawn)
    if images < 2 * FOLDS:
        return 0.0
    fold, loss = torch.arange(images, device=drawn.device) % FOLDS, 0.0
    for left_out in range(FOLDS):
        others = [replace(c, traces=c.traces.rows(drawn[fold != left_out])) for c in candidates]
        found = _within(others, target, one_threshold, margin=0)
        chosen = next(c for c in candidates if c.on in (None, found.on_exits))
        other = chosen.traces.rows(drawn[fold == left_out])
        loss += losses_of(other, target).gather(0, other.leaving(found.threshold)[None]).sum().item()
    return loss / images - target.limit


def curves(
    traces: Traces,
    drops: Sequence[float],
    kinds: Sequence[str] = (OWN,),
    *,
    one_threshold: bool = DEFAULTS.one_threshold,
) -> dict[str, tuple[Solution, ...]]:
    """The best thresholds for each allowed drop of accuracy (without labels: of fidelity), by kind of answers, own or blended.

    The margin is "auto", and as with `solve(answers="auto")` all kinds get the largest reserve. It can be so large that the
    thresholds for a smaller drop cost less. Then those are taken.
    """
    limited = "max_fidelity_drop" if traces.targets is None else "max_drop"
    targets = [Target.given(ThresholdsConfig(**{limited: drop})) for drop in drops]
    candidates = [found for kind in kinds for found in ways_to_answer(traces, targets[0].kind, kind)]
    found: dict[str, dict[Target, Solution]] = {kind: {} for kind in kinds}
    for target in sorted(targets, key=lambda target: target.limit):
        best, failed = _best_of_each(candidates, target, one_threshold, "auto")
        for kind, way in zip(kinds, best, strict=True):
            if way is None:
                raise failed[-1]
            own = _kept(way, traces, one_threshold, "auto")
            found[kind][target] = _cheapest(own, found[kind].values())
    return {kind: tuple(of_kind[target] for target in targets) for kind, of_kind in found.items()}


def _cheapest(own: Solution, for_smaller_drops: Iterable[Solution]) -> Solution:
    best, target = min([own, *for_smaller_drops], key=lambda s: s.price), own.target
    reserve = target.limit - best.target.limit + best.margin
    return own if best is own else replace(best, target=target, margin=reserve)
