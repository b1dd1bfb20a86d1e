"""Thresholds for a target, from traces: the lowest cost within an allowed loss, or the lowest loss within a cost.

The traces are of a sample of images. Thresholds fit its noise, so report on other images than those they were chosen on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ptee._common.errors import Argument, PteeError
from ptee.evaluation.config import ThresholdsConfig
from ptee.evaluation.threshold_search import ROUNDING, Problem, search
from ptee.evaluation.traces import Score, Traces
from ptee.exits.confidence import LEARNED

EXAMPLES = {"max_drop": "0.01", "max_fidelity_drop": "0.01", "max_cost": "0.6"}  # kinds of targets, and a limit to type
WORDS = {
    "max_drop": "accuracy at most {:g} below the backbone's",
    "max_fidelity_drop": "at most {:g} of the answers differ from the backbone's",
    "max_cost": "a mean cost of at most {:g}",
}
DEFAULTS = ThresholdsConfig()
AUTO: Literal["auto"] = "auto"  # a reserve that is estimated from the traces
FOLDS = 4  # of the cross-validation that estimates it
MAX_IMAGES = 10_000  # that it uses: with more it takes minutes, and thresholds hardly fit the noise of so many
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
        """The target of a recipe; None where its thresholds are given.

        Args:
            config: the recipe's thresholds.
            labelled: the images have labels that are classes of the backbone.
        """
        found = config.target(labelled)
        return None if found is None else cls(*found)

    @classmethod
    def given(cls, config: ThresholdsConfig) -> Target:
        """The target that a person gave.

        Raises:
            PteeError: if there is none.
        """
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
    """T of each exit for a person to read; one number where all are the same.

    Args:
        threshold: (E) T of each exit.
        off: exits that are off.

    >>> describe_thresholds([0.9, 2.0, 0.8], off=[1])
    '0.9, off, 0.8'
    """
    words = ["off" if n in off else f"{t:.4g}" for n, t in enumerate(threshold)]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


@dataclass(frozen=True)
class Solution:
    """Thresholds that were chosen, and what they give on the traces that they were chosen on. Prints as text.

    Attributes:
        target: what they were chosen for.
        threshold: (E) T of each exit; above every confidence for exits that are off.
        off: exits that do not pay: no image leaves there, and their heads need not be run.
        score: accuracy, fidelity and cost on those traces, without the heads of exits that are off.
        backbone: the same of the bare backbone.
        samples: number of images.
        margin: how much of the target's limit was kept in reserve for other images.
    """

    target: Target
    threshold: tuple[float, ...]
    off: tuple[int, ...]
    score: Score
    backbone: Score
    samples: int
    margin: float = 0.0

    @property
    def cost(self) -> float:
        """Mean cost on the traces."""
        return self.score.cost

    @property
    def drop(self) -> float | None:
        """By how much the accuracy is below the bare backbone's; negative where it is above. None without labels."""
        return accuracy_drop(self.score, self.backbone)

    @property
    def fidelity_drop(self) -> float:
        """Share of the answers that differ from the backbone's."""
        return 1 - self.score.fidelity

    def on(self, traces: Traces) -> Score:
        """Accuracy, fidelity and cost of these thresholds on other traces of the same model."""
        return scored(traces, self.threshold, self.off)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"threshold": list(self.threshold), "off": list(self.off), "drop": self.drop}

    def __str__(self) -> str:
        reserve = f", with {self.margin:.4f} of that in reserve for new images" if self.margin else ""
        drop, s = self.drop, self.score
        accuracy = "" if drop is None else f"accuracy {s.accuracy:.4f} ({below(drop)} the backbone's), "
        return (
            f"Target: {self.target}{reserve}.\nChosen: {self._chosen} On the {self.samples:,} images that this was chosen on: "
            f"{accuracy}fidelity {s.fidelity:.4f}, cost {s.cost:.4f}."
        )

    @property
    def _chosen(self) -> str:
        if len(self.off) == len(self.threshold):
            return "all exits off, because none of them pays; the backbone answers every image."
        off = " Exits that are off do not pay, and the cost is without their heads." if self.off else ""
        return f"T = {describe_thresholds(self.threshold, self.off)}.{off}"


def below(drop: float) -> str:
    """A drop in words, to stand before "the backbone's"."""
    return f"{-drop:.4f} above" if round(drop, 4) < 0 else f"{abs(drop):.4f} below"


def solve(
    traces: Traces,
    *,
    max_drop: float | None = None,
    max_fidelity_drop: float | None = None,
    max_cost: float | None = None,
    one_threshold: bool = DEFAULTS.one_threshold,
    margin: Margin = DEFAULTS.margin,
) -> Solution:
    """The thresholds that meet a target best on these traces, and the exits that are better off.

    Give one target. For a largest drop: the lowest cost within it. For a largest cost: the lowest loss of accuracy (without
    labels: of fidelity) within it. The result is never worse than the best single threshold, with any exits off.

    Args:
        traces: of images that neither the backbone nor the heads were trained on.
        max_drop: largest loss of accuracy against the bare backbone, as a fraction.
        max_fidelity_drop: largest share of answers that differ from the backbone's.
        max_cost: largest mean cost, as a fraction of the bare backbone's.
        one_threshold: the same T for all exits that are on.
        margin: how much of the limit is kept in reserve for new images, which lose more than those that T is chosen on. "auto":
            how much more is estimated by cross-validation; the reserve is at most the whole limit. A largest cost gets no
            such reserve, nor do fewer than 8 images.

    Raises:
        PteeError: if there is not exactly one target, or it cannot be met; the message says what can be.
    """
    config = ThresholdsConfig(
        max_drop=max_drop, max_fidelity_drop=max_fidelity_drop, max_cost=max_cost, one_threshold=one_threshold, margin=margin
    )  # fmt: skip
    return solve_target(traces, Target.given(config), one_threshold=config.one_threshold, margin=config.margin)


def solve_target(
    traces: Traces, target: Target, *, one_threshold: bool = DEFAULTS.one_threshold, margin: Margin = DEFAULTS.margin
) -> Solution:
    """`solve` for a target and a margin that were checked."""
    if isinstance(margin, str):
        return _with_reserve(traces, target, one_threshold)
    require_reachable(target, min(_costs_alone(traces)), margin)
    heads = torch.zeros_like(traces.costs[:-1]) if traces.head_costs is None else traces.head_costs
    problem = Problem(
        traces.confidence[:-1],
        _loss(traces, target),
        traces.costs,
        heads,
        traces.reading,
        limited="cost" if target.kind == "max_cost" else "loss",
        limit=target.limit - margin,
    )
    choice = search(problem, one_threshold)
    if choice is None:
        raise PteeError(
            target.argument, " cannot be met: too many confidences are NaN. Train the heads again.",
            argument=target.kind, value=target.limit,
        )  # fmt: skip
    off = tuple(n for n, on in enumerate(choice.on.tolist()) if not on)
    threshold = tuple(problem.thresholds(choice.taken, one_threshold))
    return Solution(target, threshold, off, scored(traces, threshold, off), _bare(traces), problem.images, margin)


def _with_reserve(traces: Traces, target: Target, one_threshold: bool) -> Solution:
    """Keep in reserve what thresholds lose more on images that they were not chosen on.

        reserve = min(max(optimism, 0), limit)

    One T for all exits is tried too: it fits less of the noise, so it needs less in reserve, and may cost less in the end.
    """
    if target.kind == "max_cost":
        return solve_target(traces, target, one_threshold=one_threshold, margin=0)
    traces = replace(traces, logits=None)  # they are large, and not needed here
    solutions, safe = [], []
    for one in (True,) if one_threshold or len(traces.costs) == 2 else (True, False):
        optimism = _optimism(traces, target, one)
        reserve = min(max(optimism, 0.0), target.limit)
        solutions.append(solve_target(traces, target, one_threshold=one, margin=reserve))
        safe += (
            solutions[-1:] if optimism <= target.limit else []
        )  # else even a reserve of the whole limit is too little
    return min(safe or solutions[:1], key=lambda s: s.cost)


def _optimism(traces: Traces, target: Target, one_threshold: bool) -> float:
    """How much more than the limit is lost on images that the thresholds were not chosen on, by cross-validation.

    optimism = (1/n) sum_i loss_i(thresholds chosen on the folds without image i) - limit
    """
    drawn = torch.randperm(traces.answers.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")[
        :MAX_IMAGES
    ]
    traces, images = traces.rows(drawn), len(drawn)
    if images < 2 * FOLDS:
        return 0.0
    order, loss = torch.arange(images, device=traces.answers.device), 0.0
    for fold in range(FOLDS):
        left_out = order % FOLDS == fold
        found = solve_target(traces.rows(~left_out), target, one_threshold=one_threshold, margin=0)
        other = traces.rows(left_out)
        loss += _loss(other, target).gather(0, other.leaving(found.threshold)[None]).sum().item()
    return loss / images - target.limit


def _loss(traces: Traces, target: Target) -> Tensor:
    """(E+1, n) what is lost if an image leaves there: 1 where only the backbone is right, -1 where only the exit is."""
    require_labels(target, labelled=traces.targets is not None, why=traces.note)
    wanted = traces.answers[-1] if target.kind == "max_fidelity_drop" else traces.targets
    right = traces.answers.eq(traces.answers[-1] if wanted is None else wanted).double()
    return right[-1] - right


def require_labels(target: Target, labelled: bool, why: str = "") -> None:
    """Refuse a limit on the drop of accuracy where there is no accuracy.

    Args:
        target: any; the others need no labels.
        labelled: the images have labels that are classes of the backbone.
        why: they have none, in a sentence.

    Raises:
        PteeError: saying what is possible.
    """
    if target.kind == "max_drop" and not labelled:
        raise PteeError(
            why or "These images have no labels that are classes of the backbone.", " So a drop of accuracy cannot be limited. Give ",
            Argument("max_fidelity_drop", f"{target.limit:g}"), " or ", Argument("max_cost", EXAMPLES["max_cost"]), ".",
            argument="max_drop", value=target.limit,
        )  # fmt: skip


def require_reachable(target: Target, least: float, margin: Margin = 0.0) -> None:
    """Refuse a cost that is lower than what is possible.

    Args:
        target: any; drops are never refused.
        least: the cost if every image leaves at the cheapest exit, and only its head is run.
        margin: kept in reserve.

    Raises:
        PteeError: saying what is possible.
    """
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
    """A sentence about thresholds with which all images, or none, leave at once: no confidence is above 1 or below 0."""
    if threshold and min(threshold) > 1:
        parts = ",".join(f"{t / 100:g}" for t in threshold)
        percent = min(threshold) > PERCENTAGE and max(threshold) <= 100
        meant = f" A confidence lies between 0 and 1: did you mean {parts}?" if percent else ""
        return f"T above 1: nobody leaves.{meant}"
    if threshold and threshold[0] <= 0:
        return "T at or below 0: everybody leaves at exit 0."
    return None


def scored(traces: Traces, threshold: Sequence[float], off: Sequence[int] = ()) -> Score:
    """Accuracy, fidelity and cost of thresholds, without the heads of exits that are off."""
    leaving = traces.leaving(threshold)
    score = traces.score(leaving)
    return Score(score.accuracy, score.fidelity, traces.costs_without(off)[leaving].mean().item())


def accuracy_drop(score: Score, backbone: Score) -> float | None:
    """By how much the accuracy is below the backbone's; None without labels."""
    if score.accuracy is None or backbone.accuracy is None:
        return None
    return backbone.accuracy - score.accuracy


def _bare(traces: Traces) -> Score:
    """The backbone without any heads."""
    score = traces.score(traces.at(len(traces.costs) - 1))
    return Score(score.accuracy, score.fidelity, 1.0)


# ---------------------------------------------------------------------------------------------------- to compare with


def truncation(traces: Traces) -> tuple[Score, ...]:
    """For each exit, the network cut off there: everybody leaves at it, and it has no other heads but those that it reads."""
    costs = _costs_alone(replace(traces, confidence_name=LEARNED))  # nobody asks for a confidence
    scores = [traces.score(traces.at(n)) for n in range(len(costs))]
    return tuple(Score(score.accuracy, score.fidelity, cost) for score, cost in zip(scores, costs, strict=True))


def _costs_alone(traces: Traces) -> list[float]:
    """(E) the cost of leaving at each exit while all others are off."""
    exits = range(len(traces.costs) - 1)
    return [traces.costs_without([m for m in exits if m != n])[n].item() for n in exits]


def oracle(traces: Traces, wanted: Tensor | None = None) -> Score:
    """Every image leaves at the first exit that gives the wanted answer, or at the end if none does.

    No confidence can know this. It shows what the heads would allow with a perfect decision.

    Args:
        traces: of all exits; every head that is passed counts.
        wanted: (n,) answers; None: the backbone's.
    """
    return traces.score(first_to_give(traces, traces.answers[-1] if wanted is None else wanted))


def first_to_give(traces: Traces, wanted: Tensor) -> Tensor:
    """(n,) the first exit that gives the wanted answer, E where none does.

    Args:
        traces: of all exits.
        wanted: (n,) answers.
    """
    given = traces.answers == wanted
    given[-1] = True
    return given.int().argmax(0)


def curve(
    traces: Traces,
    drops: Sequence[float],
    *,
    one_threshold: bool = DEFAULTS.one_threshold,
    margin: Margin = DEFAULTS.margin,
) -> tuple[Solution, ...]:
    """The best thresholds for each allowed drop of accuracy (without labels: of fidelity).

    The reserve "auto" can be so large that the thresholds for a smaller drop cost less. Then those are taken.
    """
    kind = "max_fidelity_drop" if traces.targets is None else "max_drop"
    targets = [Target.given(ThresholdsConfig(**{kind: drop})) for drop in drops]
    found: dict[Target, Solution] = {}
    for target in sorted(targets, key=lambda target: target.limit):
        own = solve_target(traces, target, one_threshold=one_threshold, margin=margin)
        best = min([own, *found.values()], key=lambda s: s.cost)
        reserve = target.limit - best.target.limit + best.margin
        found[target] = own if best is own else replace(best, target=target, margin=reserve)
    return tuple(found[target] for target in targets)
