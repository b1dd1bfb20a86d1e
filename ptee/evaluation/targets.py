"""Thresholds for a target, from traces: the lowest cost within an allowed loss, or the lowest loss within a cost.

Thresholds fit the noise of the images that they are chosen on, so report on other images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ptee._common.errors import Argument, PteeError
from ptee.evaluation.candidates import FOLDS, Candidate, searched, ways_to_answer
from ptee.evaluation.config import ThresholdsConfig
from ptee.evaluation.threshold_search import ROUNDING, Choice, Problem, objective
from ptee.evaluation.traces import Score, Traces
from ptee.exits.blend import OWN, Blend, Exits
from ptee.exits.confidence import LEARNED

EXAMPLES = {"max_drop": "0.01", "max_fidelity_drop": "0.01", "max_cost": "0.6"}  # kinds of targets, and a limit to type
WORDS = {
    "max_drop": "accuracy at most {:g} below the backbone's",
    "max_fidelity_drop": "at most {:g} of the answers differ from the backbone's",
    "max_cost": "a mean cost of at most {:g}",
}
DEFAULTS = ThresholdsConfig()
MAX_IMAGES = 10_000  # for it: more take minutes, and thresholds hardly fit the noise of so many
PERCENTAGE = 10  # a threshold above it was meant as a percentage
Margin = float | Literal["auto"]


@dataclass(frozen=True)
class Target:
    """What thresholds are chosen for.

    Attributes:
        kind: "max_drop" and "max_fidelity_drop" limit how much accuracy or fidelity is lost against the bare backbone,
            "max_cost" limits the mean cost.
        limit: a fraction: .01 is one point of accuracy, .6 is 60 % of the bare backbone's cost.
    """

    kind: str
    limit: float

    @classmethod
    def of(cls, config: ThresholdsConfig, labelled: bool) -> Target | None:
        """The target of a recipe; None if its thresholds are given. `labelled`: labels are classes of the backbone."""
        found = config.target(labelled)
        return None if found is None else cls(*found)

    @classmethod
    def given(cls, config: ThresholdsConfig) -> Target:
        """The target that was given; a PteeError if there is none."""
        for kind in EXAMPLES:
            if (limit := getattr(config, kind)) is not None:
                return cls(kind, limit)
        drop, fidelity_drop, cost = (Argument(kind, example) for kind, example in EXAMPLES.items())
        raise PteeError(
            "There is no target for the thresholds. Give one: ", drop, ", ", fidelity_drop, " or ", cost, "."
        )

    @property
    def argument(self) -> Argument:
        """As a person types it."""
        return Argument(self.kind, f"{self.limit:g}")

    def __str__(self) -> str:
        return WORDS[self.kind].format(self.limit)


def describe_thresholds(threshold: Sequence[float], off: Sequence[int] = ()) -> str:
    """T of each exit for a person to read; one number if all are the same.

    >>> describe_thresholds([0.9, 2.0, 0.8], off=[1])
    '0.9, off, 0.8'
    """
    words = ["off" if n in off else f"{t:.4g}" for n, t in enumerate(threshold)]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


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
        unit: what the time is a fraction of, in words; empty if the cost was counted.
    """

    target: Target
    threshold: tuple[float, ...]
    off: tuple[int, ...]
    score: Score
    backbone: Score
    samples: int
    margin: float = 0.0
    blend: Blend | None = None
    unit: str = ""

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

    def on(self, traces: Traces) -> Score:
        """Accuracy, fidelity and cost of these thresholds on other traces of the same model."""
        traces = self.answering(traces)
        return traces.score(traces.leaving(self.threshold), self.off)

    def answering(self, traces: Traces) -> Traces:
        """Traces of own answers, with the answers that these thresholds were chosen for."""
        on = tuple(n for n in range(traces.exits) if n not in self.off)
        return traces.blended(self.blend, on) if self.blend is not None else traces

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        values = asdict(replace(self, blend=None)) | {"blend": self.blend and self.blend.to_dict()}
        return values | {"threshold": list(self.threshold), "off": list(self.off), "drop": self.drop}

    def __str__(self) -> str:
        reserve = f", with {self.margin:.4f} of that in reserve for new images" if self.margin else ""
        drop, s = self.drop, self.score
        accuracy = "" if drop is None else f"accuracy {s.accuracy:.4f} ({below(drop)} the backbone's), "
        return (
            f"Target: {self.target}{reserve}.\nChosen: {self._chosen} On the {self.samples:,} images that this was chosen on: "
            f"{accuracy}fidelity {s.fidelity:.4f}, cost {s.cost:.4f} of the multiply-accumulates{self._time}."
        )

    @property
    def _time(self) -> str:
        return "" if self.score.time is None else f", expected time {self.score.time:.4f} of {self.unit}"

    @property
    def _chosen(self) -> str:
        if len(self.off) == len(self.threshold) and self.unit:
            how = self.unit.removeprefix("the bare backbone's time ")
            return f"all exits off: nothing within the target is faster than the bare backbone {how}."
        if len(self.off) == len(self.threshold):
            return "all exits off, because none of them pays; the backbone answers every image."
        off = " Exits that are off do not pay, and the cost is without their heads." if self.off else ""
        blended = " Answers are blended." if self.blend else ""
        remark = f" {self.blend.remark}" if self.blend and self.blend.remark else ""
        return f"T = {describe_thresholds(self.threshold, self.off)}.{off}{blended}{remark}"


def below(drop: float) -> str:
    """A drop in words, before "the backbone's"."""
    return f"{-drop:.4f} above" if round(drop, 4) < 0 else f"{abs(drop):.4f} below"


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
    return _solved(ways_to_answer(traces, target.kind, answers), target, one_threshold, margin)


def _solved(kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin) -> Solution:
    """The best solution; where times are known, never one that is slower than the one by multiply-accumulates."""
    best = _of_all_kinds(kinds, target, one_threshold, margin)
    if kinds[0][0].traces.times is None or target.kind == "max_cost":
        return best
    counted = [[replace(candidate, counted=True) for candidate in kind] for kind in kinds]
    return min(best, _of_all_kinds(counted, target, one_threshold, margin), key=lambda s: s.price)


def _of_all_kinds(kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin) -> Solution:
    """The best solution of all kinds of answers.

    A reserve is an estimate. So all kinds get the largest one: otherwise the kind would win whose estimate is too low.
    """
    found, failed = _each_kind(kinds, target, one_threshold, margin)
    if not found:
        raise failed[-1]
    if isinstance(margin, str) and len(found) > 1:
        largest = max(solution.margin for solution in found)
        best = max(found, key=lambda s: s.margin)  # stays within the limit, whatever becomes of the others
        found = [best, *_each_kind(kinds, target, one_threshold, largest)[0]]
    return min(found, key=lambda s: s.price if target.kind != "max_cost" else -s.score.merit)


def _each_kind(
    kinds: Sequence[list[Candidate]], target: Target, one_threshold: bool, margin: Margin
) -> tuple[list[Solution], list[PteeError]]:
    """The solutions with each kind of answers, and why others have none."""
    found: list[Solution] = []
    failed: list[PteeError] = []
    for candidates in kinds:
        try:
            if isinstance(margin, str):
                found.append(_with_reserve(candidates, target, one_threshold))
            else:
                found.append(_within(candidates, target, one_threshold, margin))
        except PteeError as why:
            failed.append(why)
    return found, failed


def _within(candidates: list[Candidate], target: Target, one_threshold: bool, margin: float) -> Solution:
    """The best solution whose mean loss, or cost, is within the limit less a margin."""
    first = candidates[0].traces
    require_reachable(target, min(_alone(first)), margin)
    limit, limited = target.limit - margin, "cost" if target.kind == "max_cost" else "loss"
    best: tuple[Choice, Problem, Candidate] | None = None
    for candidate in candidates:
        traces = candidate.traces
        problem = Problem(
            traces.confidence[:-1], _loss(traces, target), traces.costs_where, limited=limited, limit=limit
        )
        for choice in searched(candidate, problem, one_threshold):
            if best is None or objective(problem, choice) < objective(problem, best[0]):
                best = choice, problem, candidate
    if best is None:
        raise _unreachable(target, candidates)
    choice, problem, candidate = best
    taken = tuple(n for n, number in enumerate(choice.taken.tolist()) if number)
    on = taken if candidate.on is None else candidate.on
    off = tuple(n for n in range(first.exits) if n not in on)
    threshold = tuple(problem.thresholds(choice.taken, one_threshold))
    score = candidate.traces.score(candidate.traces.leaving(threshold), off)
    bare = replace(first.alone.score_at(first.exits), cost=1.0, time=None if first.times is None else 1.0)
    unit = "" if first.times is None else first.times.unit
    return Solution(target, threshold, off, score, bare, problem.images, margin, candidate.blend, unit)


def _unreachable(target: Target, candidates: list[Candidate]) -> PteeError:
    text = " cannot be met: too many confidences are NaN. Train the heads again."
    if target.limit < 0:
        text = " cannot be met: the answers of the exits gain less than that on these images. Ask for a smaller gain, or for no reserve (margin 0)."
    return PteeError(target.argument, text, argument=target.kind, value=target.limit)


def _with_reserve(candidates: list[Candidate], target: Target, one_threshold: bool) -> Solution:
    """Keep in reserve what the thresholds lose more on images that they were not chosen on.

        reserve = min(max(optimism, 0), |limit|)

    One T for all exits is tried too: it fits less of the noise, so it needs a smaller reserve, and may cost less in the end.
    """
    if target.kind == "max_cost":
        return _within(candidates, target, one_threshold, margin=0)
    solutions, safe = [], []
    for one in (True,) if one_threshold or candidates[0].traces.exits == 1 else (True, False):
        optimism = _optimism(candidates, target, one)
        reserve = min(max(optimism, 0.0), abs(target.limit))
        solutions.append(_within(candidates, target, one, margin=reserve))
        if optimism <= abs(target.limit):  # else even the whole limit in reserve is too little
            safe.append(solutions[-1])
    return min(safe or solutions[:1], key=lambda s: s.price)


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
        chosen = next(c for c in candidates if c.on in (None, _on(found)))
        other = chosen.traces.rows(drawn[fold == left_out])
        loss += _loss(other, target).gather(0, other.leaving(found.threshold)[None]).sum().item()
    return loss / images - target.limit


def _on(found: Solution) -> Exits:
    return tuple(n for n in range(len(found.threshold)) if n not in found.off)


def _loss(traces: Traces, target: Target) -> Tensor:
    """(E+1, n) what leaving at each exit loses, of fidelity where that is limited."""
    require_labels(target, labelled=traces.targets is not None, why=traces.note)
    return (replace(traces, targets=None) if target.kind == "max_fidelity_drop" else traces).losses


def require_labels(target: Target, labelled: bool, why: str = "") -> None:
    """Refuse a limit on the drop of accuracy if there is no accuracy.

    Args:
        target: of any kind.
        labelled: the images have labels that are classes of the backbone.
        why: they have none, in a sentence.
    """
    if target.kind == "max_drop" and not labelled:
        raise PteeError(
            why or "These images have no labels that are classes of the backbone.", " So a drop of accuracy cannot be limited. Give ",
            Argument("max_fidelity_drop", f"{target.limit:g}"), " or ", Argument("max_cost", EXAMPLES["max_cost"]), ".",
            argument="max_drop", value=target.limit,
        )  # fmt: skip


def require_reachable(target: Target, least: float, margin: Margin = 0.0) -> None:
    """Refuse a limit on the cost that is lower than the least cost, which is that of leaving at the cheapest exit alone."""
    reserve = 0.0 if isinstance(margin, str) else margin
    possible = min(least, 1.0)  # with all exits off
    if target.kind != "max_cost" or target.limit - reserve >= possible - ROUNDING:
        return
    without_margin = (" less ", Argument("margin", f"{reserve:g}")) if reserve else ()
    enough = math.ceil((possible + reserve - ROUNDING) * 100) / 100
    raise PteeError(
        target.argument, *without_margin, f" cannot be reached: the lowest possible cost is {possible:.4f} of the bare backbone's. "
        "Give ", Argument("max_cost", f"{enough:g}"), " or more.", argument="max_cost", value=target.limit,
    )  # fmt: skip


def remark(threshold: Sequence[float] | None) -> str | None:
    """A sentence about thresholds at which every image leaves at exit 0, or none leaves: h lies between 0 and 1."""
    if threshold and min(threshold) > 1:
        parts = ",".join(f"{t / 100:g}" for t in threshold)
        percent = min(threshold) > PERCENTAGE and max(threshold) <= 100
        meant = f" A confidence lies between 0 and 1: did you mean {parts}?" if percent else ""
        return f"T above 1: nobody leaves.{meant}"
    if threshold and threshold[0] <= 0:
        return "T at or below 0: everybody leaves at exit 0."
    return None


def truncation(traces: Traces) -> tuple[Score, ...]:
    """For each exit, the score of the network cut off there: the only heads are its own and those that it reads."""
    alone = replace(traces, confidence_name=LEARNED)  # no confidence is needed
    scores = [traces.score_at(n) for n in range(traces.exits)]
    counted, times = _costs_alone(alone), [None] * traces.exits if traces.times is None else _times_alone(alone)
    return tuple(replace(s, cost=c, time=t) for s, c, t in zip(scores, counted, times, strict=True))


def _alone(traces: Traces) -> list[float]:
    """(E) the price of leaving at each exit while all others are off."""
    return _costs_alone(traces) if traces.times is None else _times_alone(traces)


def _times_alone(traces: Traces) -> list[float]:
    return [traces.time(traces.at(n), [m for m in range(traces.exits) if m != n]) or 0.0 for n in range(traces.exits)]


def _costs_alone(traces: Traces) -> list[float]:
    """(E) the cost of leaving at each exit while all others are off."""
    only = torch.eye(traces.exits, dtype=torch.bool, device=traces.costs.device)
    return traces.costs_where(only)[:, :-1].diag().tolist()


def curve(
    traces: Traces, drops: Sequence[float], *, one_threshold: bool = DEFAULTS.one_threshold, answers: str = OWN
) -> tuple[Solution, ...]:
    """The best thresholds for each allowed drop of accuracy (without labels: of fidelity), with the margin "auto".

    That reserve can be so large that the thresholds for a smaller drop cost less. Then those are taken.
    """
    kind = "max_fidelity_drop" if traces.targets is None else "max_drop"
    targets = [Target.given(ThresholdsConfig(**{kind: drop})) for drop in drops]
    found: dict[Target, Solution] = {}
    kinds = ways_to_answer(traces, targets[0].kind, answers)
    for target in sorted(targets, key=lambda target: target.limit):
        own = _solved(kinds, target, one_threshold, "auto")
        best = min([own, *found.values()], key=lambda s: s.price)
        reserve = target.limit - best.target.limit + best.margin
        found[target] = own if best is own else replace(best, target=target, margin=reserve)
    return tuple(found[target] for target in targets)
