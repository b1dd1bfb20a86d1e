"""Thresholds from traces and a target: what costs least within a drop, or loses least within a cost.

A target is met on the traces that were given, and those are a sample: report on other images than those that thresholds
were chosen on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.evaluation.config import ThresholdsConfig
from ptee.evaluation.threshold_search import ROUNDING, Problem, search
from ptee.evaluation.traces import Score, Traces
from ptee.exits.confidence import LEARNED

TARGETS = {  # kinds, and what a limit is one of, in words
    "max_drop": "a drop of accuracy of at most",
    "max_fidelity_drop": "a drop of fidelity of at most",
    "max_cost": "a mean cost of at most",
}
PERCENTAGE = 10  # a limit of this or more was not meant as a fraction of the bare backbone
AUTO = "auto"  # a margin that the traces themselves say
FOLDS = 4  # of the traces, each once left out while thresholds are chosen
MOST_ROWS = 10_000  # of which that is found out; of more it takes minutes, and they lose no more than these


@dataclass(frozen=True)
class Target:
    """One of `TARGETS` and its limit.

    Attributes:
        kind: "max_drop" and "max_fidelity_drop" limit how much accuracy or fidelity may be lost against the bare
            backbone, "max_cost" the mean cost.
        limit: a fraction: .01 is one point of accuracy, .6 is 60 % of the bare backbone.
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
    def only(cls, targets: dict[str, float | None]) -> Target:
        """The one that is not None.

        Raises:
            PteeError: if there is none, there are several, or the limit is out of range.
        """
        given = {kind: limit for kind, limit in targets.items() if limit is not None}
        if len(given) != 1:
            found = f"{' and '.join(given)} are all given" if given else "No target is given"
            found = found.replace("all", "both") if len(given) == 2 else found
            raise PteeError(f"{found}: give one of {', '.join(f'{kind}=' for kind in TARGETS)}.")
        ((kind, limit),) = given.items()
        if isinstance(limit, bool) or not isinstance(limit, Real | Tensor):
            raise PteeError(f"{kind} is {limit!r}: give a number, such as {0.6 if kind == 'max_cost' else 0.01}.")
        if kind == "max_cost" and not 0 < limit < PERCENTAGE:
            raise PteeError(f"max_cost is {limit:g}: give a fraction of the bare backbone's cost, such as 0.6.")
        if kind != "max_cost" and not 0 <= limit < 1:
            raise PteeError(
                f"{kind} is {limit:g}: give a fraction of at least 0 and below 1, such as 0.01 for one point."
            )
        return cls(kind, float(limit))

    def __str__(self) -> str:
        return f"{TARGETS[self.kind]} {self.limit:g}"


@dataclass(frozen=True)
class Solution:
    """Thresholds and what they come to on the traces they were found on. Prints as a sentence.

    Attributes:
        target: what was asked for.
        threshold: (E) T of each exit; 2.0, which nobody reaches, for those that are off.
        off: exits that do not pay here: nobody leaves there, and their heads need not exist.
        score: accuracy, fidelity and cost on those traces; heads of exits that are off are not counted.
        backbone: the same of the bare backbone.
        samples: n.
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
        """Accuracy lost against the bare backbone; below 0 it is gained. None without labels."""
        return lost(self.score, self.backbone)

    @property
    def fidelity_drop(self) -> float:
        """Share of answers that are not the backbone's."""
        return 1 - self.score.fidelity

    def on(self, traces: Traces) -> Score:
        """Accuracy, fidelity and cost of these thresholds on other traces of the same model."""
        return scored(traces, self.threshold, self.off)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"threshold": list(self.threshold), "off": list(self.off), "drop": self.drop}

    def __str__(self) -> str:
        off = (
            f" Off, as they do not pay: exit {', '.join(map(str, self.off))}; cost is without their heads."
            if self.off
            else ""
        )
        accuracy = "" if self.drop is None else f"accuracy {self.score.accuracy:.4f} ({_lost(self.drop)}), "
        walls = ", ".join(f"{t:.4f}" for t in self.threshold)
        reserve = f" less {self.margin:.4f} in reserve" if self.margin else ""
        return (
            f"T = {walls} for {self.target}{reserve}: {accuracy}fidelity {self.score.fidelity:.4f}, cost {self.cost:.4f} "
            f"on the {self.samples:,} images they were found on.{off}"
        )


def _lost(drop: float) -> str:
    return f"{-drop:.4f} gained" if round(drop, 4) < 0 else f"{abs(drop):.4f} lost"


def solve(
    traces: Traces,
    *,
    max_drop: float | None = None,
    max_fidelity_drop: float | None = None,
    max_cost: float | None = None,
    one: bool = False,
    margin: float | str = 0.0,
) -> Solution:
    """The thresholds that meet a target best on these traces, and the exits that are better off.

    Give one target. Of a largest drop, what costs least within it; of a largest cost, what loses least accuracy (without
    labels: fidelity). Never worse than the best single threshold, and than leaving exits off.

    Args:
        traces: of images that neither the backbone nor the heads were trained on.
        max_drop: largest loss of accuracy against the bare backbone, as a fraction.
        max_fidelity_drop: largest share of answers that are not the backbone's.
        max_cost: largest mean cost, as a fraction of the bare backbone's.
        one: the same T for all exits that are on.
        margin: how much of the limit is kept in reserve: thresholds found on a few images fit their noise, and other
            images lose more. "auto": as much more as images lost that were left out, by a quarter of these at a time (at most
            all of it; nothing of a cost, or on fewer than 8 images). One T for all exits is then tried too, as it needs
            less in reserve.

    Raises:
        PteeError: if there is not exactly one target, or it cannot be met; then what can be is said.
    """
    target = Target.only({"max_drop": max_drop, "max_fidelity_drop": max_fidelity_drop, "max_cost": max_cost})
    return solve_target(traces, target, one=one, margin=margin)


def solve_target(traces: Traces, target: Target, *, one: bool = False, margin: float | str = 0.0) -> Solution:
    """`solve` for a target that was read already."""
    if margin == AUTO:
        return _with_reserve(traces, target, one)
    margin = checked_margin(target, margin)
    require_reachable(target, min(_costs_alone(traces)), margin)
    limited = "cost" if target.kind == "max_cost" else "loss"
    heads = torch.zeros_like(traces.costs[:-1]) if traces.head_costs is None else traces.head_costs
    problem = Problem(
        traces.confidence[:-1],
        _loss(traces, target),
        traces.costs,
        heads,
        traces.reading,
        limited=limited,
        limit=target.limit - margin,
    )
    choice = search(problem, one)
    if choice is None:
        raise PteeError(
            f"{str(target).capitalize()} cannot be reached: too many confidences are no numbers. Train the heads again."
        )
    off = tuple(n for n, here in enumerate(choice.on.tolist()) if not here)
    walls = tuple(problem.walls(choice.taken, one))
    return Solution(target, walls, off, scored(traces, walls, off), _bare(traces), problem.rows, margin)


def _with_reserve(traces: Traces, target: Target, one: bool) -> Solution:
    """What costs least of one T and, if that is allowed, of one for each exit, both less what they would lose elsewhere."""
    if target.kind == "max_cost":
        return solve_target(traces, target, one=one)
    traces = replace(traces, logits=None)  # they are large, and nobody asks for them
    found, kept = [], []
    for way in (True,) if one or len(traces.costs) == 2 else (True, False):
        more = _optimism(traces, target, way)
        found.append(solve_target(traces, target, one=way, margin=min(max(more, 0.0), target.limit)))
        kept += found[-1:] if more <= target.limit else []  # of the others even a margin of all may be too little
    return min(kept or found[:1], key=lambda s: s.cost)


def _optimism(traces: Traces, target: Target, one: bool) -> float:
    """How much more than the target allows is lost on images that the thresholds were not chosen on."""
    drawn = torch.randperm(traces.answers.shape[1], generator=torch.Generator().manual_seed(0))[:MOST_ROWS]
    traces, rows = traces.rows(drawn), len(drawn)
    if rows < 2 * FOLDS:
        return 0.0
    order, loss = torch.arange(rows), 0.0
    for fold in range(FOLDS):
        left_out = order % FOLDS == fold
        found = solve_target(traces.rows(~left_out), target, one=one)
        other = traces.rows(left_out)
        loss += _loss(other, target).gather(0, other.leaving(found.threshold)[None]).sum().item()
    return loss / rows - target.limit


def _loss(traces: Traces, target: Target) -> Tensor:
    """(E+1, n) what is lost where a row leaves: 1 for a right answer less than the backbone, -1 for one more."""
    require_labels(target, labelled=traces.targets is not None, why=traces.note)
    wanted = traces.answers[-1] if target.kind == "max_fidelity_drop" else traces.targets
    right = traces.answers.eq(traces.answers[-1] if wanted is None else wanted).double()
    return right[-1] - right


def require_labels(target: Target, labelled: bool, why: str = "") -> None:
    """Refuse a drop of accuracy where there is none.

    Args:
        target: any; the others need no labels.
        labelled: whether the images have labels that are classes of the backbone.
        why: they have not, in a sentence.

    Raises:
        PteeError: saying what is possible.
    """
    if target.kind == "max_drop" and not labelled:
        why = why or "These images have no labels that are classes of the backbone."
        raise PteeError(f"{why} So no accuracy can be lost: give max_fidelity_drop= or max_cost=.")


def checked_margin(target: Target, margin: float | str) -> float:
    """What is kept in reserve of a target, as a number; of "auto" nothing is known before the traces are.

    Raises:
        PteeError: if it is none, or leaves nothing of an allowed drop.
    """
    if margin == AUTO:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, Real) or not 0 <= margin < math.inf:
        raise PteeError(
            f"margin is {margin}: give what to keep in reserve of {target}, such as {target.limit / 4:g}, or {AUTO!r}."
        )
    if target.kind != "max_cost" and margin > target.limit:
        raise PteeError(
            f"{str(target).capitalize()} leaves nothing after a margin of {margin:g}. Give a margin of {target.limit:g} or less."
        )
    return float(margin)


def require_reachable(target: Target, least: float, margin: float | str = 0.0) -> None:
    """Refuse a cost below all that is possible.

    Args:
        target: any; drops are never refused.
        least: what leaving everybody at the cheapest exit costs, with no other head there. With all exits off it is 1.
        margin: to be kept in reserve.

    Raises:
        PteeError: saying what is possible.
    """
    possible, margin = min(least, 1.0), checked_margin(target, margin)
    if target.kind == "max_cost" and target.limit - margin < possible - ROUNDING:
        asked = f"{target} less a margin of {margin:g}" if margin else f"{target}"
        raise PteeError(
            f"{asked.capitalize()} cannot be reached: even leaving everybody at the cheapest exit costs {least:.4f} of the bare "
            f"backbone. Give {math.ceil((possible + margin) * 100) / 100:g} or more."
        )


def remark(threshold: Sequence[float] | None) -> str | None:
    """A sentence about T that no confidence, between 0 and 1, decides: a percentage keeps everybody in."""
    if threshold and min(threshold) > 1:
        parts = ",".join(f"{t / 100:g}" for t in threshold)
        percent = min(threshold) > PERCENTAGE and max(threshold) <= 100
        meant = f" A confidence lies between 0 and 1: did you mean {parts}?" if percent else ""
        return f"T above 1: nobody leaves.{meant}"
    if threshold and threshold[0] <= 0:
        return "T at or below 0: everybody leaves at exit 0."
    return None


def scored(traces: Traces, threshold: Sequence[float], off: Sequence[int] = ()) -> Score:
    """Accuracy, fidelity and cost of thresholds; heads of the exits that are off are not counted."""
    leaving = traces.leaving(threshold)
    score = traces.score(leaving)
    return Score(score.accuracy, score.fidelity, traces.costs_without(off)[leaving].mean().item())


def lost(score: Score, backbone: Score) -> float | None:
    """Accuracy lost against the backbone; None without labels."""
    if score.accuracy is None or backbone.accuracy is None:
        return None
    return backbone.accuracy - score.accuracy


def _bare(traces: Traces) -> Score:
    """The backbone, which passes no head."""
    score = traces.score(traces.at(len(traces.costs) - 1))
    return Score(score.accuracy, score.fidelity, 1.0)


# ---------------------------------------------------------------------------------------------------- to compare with


def truncation(traces: Traces) -> tuple[Score, ...]:
    """For each exit, the network cut off there: everybody leaves at it, and it has no other heads but those that it reads."""
    costs = _costs_alone(replace(traces, confidence_name=LEARNED))  # nobody asks for a confidence
    scores = [traces.score(traces.at(n)) for n in range(len(costs))]
    return tuple(Score(score.accuracy, score.fidelity, cost) for score, cost in zip(scores, costs, strict=True))


def _costs_alone(traces: Traces) -> list[float]:
    """(E) of leaving at each exit where the others are off."""
    exits = range(len(traces.costs) - 1)
    return [traces.costs_without([m for m in exits if m != n])[n].item() for n in exits]


def oracle(traces: Traces, wanted: Tensor | None = None) -> Score:
    """Everybody leaves at the first exit that gives the wanted answer, those whom none gives it at the end.

    No policy can know this: what it costs is what the heads would allow, and the rest is lost by the decision.

    Args:
        traces: of all exits, whose heads are all counted.
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
    traces: Traces, drops: Sequence[float], *, one: bool = False, margin: float | str = 0.0
) -> tuple[Solution, ...]:
    """The best thresholds at each allowed drop of accuracy (without labels: of fidelity), each less a margin.

    Where "auto" keeps so much in reserve of a drop that a smaller one costs less, the thresholds are those of the smaller.
    """
    kind = "max_fidelity_drop" if traces.targets is None else "max_drop"
    targets = [Target.only({kind: drop}) for drop in drops]
    found: dict[Target, Solution] = {}
    for target in sorted(targets, key=lambda target: target.limit):
        own = solve_target(traces, target, one=one, margin=margin)
        best = min([own, *found.values()], key=lambda s: s.cost)
        found[target] = (
            own if best is own else replace(best, target=target, margin=target.limit - best.target.limit + best.margin)
        )
    return tuple(found[target] for target in targets)
