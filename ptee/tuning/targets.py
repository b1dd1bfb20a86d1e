"""Thresholds for a target, from traces: the lowest cost within an allowed loss, or the lowest loss within a cost.

Thresholds fit the noise of the images that they are chosen on, so report on other images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from statistics import stdev

import torch
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.data.splits import shuffled
from ptee.exits.blend import OWN
from ptee.production.curve import ROUNDING
from ptee.tuning.candidates import FOLDS, Candidate, searched, ways_to_answer
from ptee.tuning.config import Target, ThresholdsConfig
from ptee.tuning.reachable import Margin, losses_of, require_reachable, unreachable
from ptee.tuning.solution import Solution
from ptee.tuning.threshold_search import Choice, Problem, objective
from ptee.tuning.traces import Traces, at_exits

DEFAULTS = ThresholdsConfig()
WITHIN = 1.96  # standard deviations to either side hold 95 % of a normal distribution
DRAWS = 50  # of as many images, with replacement
MAX_IMAGES = 10_000  # for it: more take minutes, and thresholds hardly fit the noise of so many
BY_OBJECTIVE = attrgetter("objective")


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
    fidelity). With the same reserve, and where costs are counted, own answers are never worse than the best single threshold
    with any exits off; of more than six exits, with all on, all off, or one alone on.

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
    kinds = ways_to_answer(traces, target.kind, answers)
    found = _kept(_solved(kinds, target, one_threshold, margin), traces, one_threshold, margin)
    if found.several_risky and not _cheaper_without_reserve(found, kinds, traces):
        return replace(found, several_risky=False)
    return found


def _cheaper_without_reserve(found: Solution, kinds: Sequence[list[Candidate]], traces: Traces) -> bool:
    """Whether margin=0 gives a lower cost, which blended answers may miss with their final weights."""
    try:
        other = _kept(_solved(kinds, found.target, False, 0.0), traces, False, 0.0)
    except PteeError:
        return False
    return other.price < found.price - ROUNDING


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

    def all_off(self) -> list[_Way]:
        """The bare backbone with the same reserve; empty if it does not meet the target."""
        bare = [candidate for candidate in self.candidates if candidate.on == ()]
        try:
            return [_Way.found(bare, self.solution.target, self.one_threshold, self.solution.margin)]
        except PteeError:
            return []


def _solved(kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin) -> list[_Way]:
    """The best solution with each kind of answers that meets the target, the best of all first."""
    best, failed = _best_of_each(kinds, target, one_threshold, margin)
    if not any(best):
        every = [candidate for kind in kinds for candidate in kind]
        raise unreachable(target, every, one_threshold, margin) if target.limit < 0 else failed[-1]
    return sorted(filter(None, best), key=BY_OBJECTIVE)


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


def _kept(ways: Sequence[_Way], traces: Traces, one_threshold: bool, margin: Margin) -> Solution:
    """The first solution with the cost that the model will have, or another if its final weights make that the better one.

    Thresholds are chosen on answers with the weights of folds. On the same images, final weights may differ from them by chance only.
    If blended answers miss the target with them, own answers are taken. If they keep it and are worse than the next solution
    (where there is none: than the bare backbone), that one is.
    """
    way, *others = ways
    found, target = way.solution, way.solution.target
    if found.blend is None:
        return found
    chosen_on = next(c for c in way.candidates if c.on == found.on_exits).traces
    by_time = target.kind == "max_cost" and traces.times is not None
    spent, deviation = (_time_spent if by_time else _mean_spent)(chosen_on, found.answering(traces), found)
    if spent > target.limit + WITHIN * deviation + ROUNDING:
        return _own_instead(found, traces, one_threshold, margin, spent)
    score = found.on(traces)
    final = replace(way, solution=replace(found, score=score))
    for other in others or way.all_off():
        if final.objective > other.objective + ROUNDING:
            return _instead(other.solution, final)
    return replace(found, score=replace(found.score, cost=score.cost, time=score.time))


def _instead(better: Solution, blended: _Way) -> Solution:
    """The better solution, with the reason why its answers are not blended."""
    by_cost, labelled = better.target.kind == "max_cost", better.score.accuracy is not None
    what = f"have the {'accuracy' if labelled else 'fidelity'}" if by_cost else "cost"
    because = f"with their final weights, blended answers {what} {abs(blended.objective):.4f} here"
    return replace(better, remark=f"Each exit answers by itself: {because}." if better.on_exits else "")


def _own_instead(found: Solution, traces: Traces, one_threshold: bool, margin: Margin, spent: float) -> Solution:
    """The best solution with own answers, because blended ones miss the target: what is limited is then `spent`."""
    because = f"with their final weights, blended answers miss the target here ({spent:.4f})"
    kinds = ways_to_answer(traces, found.target.kind, OWN)
    try:
        own = _solved(kinds, found.target, one_threshold, margin)[0].with_reserve(found.margin)
    except PteeError:
        own = []
    if not own:
        every = [candidate for kind in kinds for candidate in kind]
        raise unreachable(found.target, every, one_threshold, margin, who=f"{because}, and by themselves the exits")
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
    return at_exits(losses_of(traces, found.target), leaving)


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
    order = shuffled(whole.answers.shape[1])
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
        loss += at_exits(losses_of(other, target), other.leaving(found.threshold)).sum().item()
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
    targets = [Target(limited, drop) for drop in drops]
    candidates = [found for kind in kinds for found in ways_to_answer(traces, targets[0].kind, kind)]
    found: dict[str, dict[Target, Solution]] = {kind: {} for kind in kinds}
    for target in sorted(targets, key=lambda target: target.limit):
        best, failed = _best_of_each(candidates, target, one_threshold, "auto")
        for kind, way in zip(kinds, best, strict=True):
            if way is None:
                raise failed[-1]
            own = _kept([way], traces, one_threshold, "auto")
            found[kind][target] = _cheapest(own, found[kind].values())
    return {kind: tuple(of_kind[target] for target in targets) for kind, of_kind in found.items()}


def _cheapest(own: Solution, for_smaller_drops: Iterable[Solution]) -> Solution:
    best, target = min([own, *for_smaller_drops], key=lambda s: s.price), own.target
    reserve = target.limit - best.target.limit + best.margin
    return own if best is own else replace(best, target=target, margin=reserve)
