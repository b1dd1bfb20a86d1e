"""The curve that a run keeps: what some thresholds of a tuned model cost and lose, from the traces that it was tuned on.

For each weight w of what is lost, thresholds that minimise cost + w * loss. What they lose is measured by cross-validation: on
the images of each fold, by the thresholds of the others. Never leaving is always a point, and so are the thresholds that were chosen.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ptee.data.splits import shuffled
from ptee.exits.blend import BLENDED, OWN
from ptee.exits.config import NEVER
from ptee.production.curve import Curve, Point
from ptee.tuning.candidates import FOLDS
from ptee.tuning.config import Target
from ptee.tuning.reachable import losses_of
from ptee.tuning.solution import Solution
from ptee.tuning.targets import MAX_IMAGES
from ptee.tuning.threshold_search import Problem, path
from ptee.tuning.traces import Traces, at_exits

WEIGHTS, STEPS = (0.05, 1e3), 30  # of one wrong answer, in costs of the backbone


def operating_points(traces: Traces, found: Solution) -> Curve:
    """The curve of a model with the exits and answers of a solution.

    Args:
        traces: of the exits' own answers to the images that the solution was found on.
        found: the solution, which is one of the points.
    """
    images = traces.answers.shape[1]
    order = shuffled(images)
    some = found.answering(traces.rows(order[:MAX_IMAGES].to(traces.answers.device)))
    kinds = ["max_fidelity_drop"] if traces.targets is None else ["max_drop", "max_fidelity_drop"]
    never = _point(some, found, [NEVER] * traces.exits)
    points = [_chosen(some, found), *(point for kind in kinds for point in _points(some, found, kind))]
    return Curve(
        confidence=traces.confidence_name,
        answers=OWN if found.blend is None else BLENDED,
        off=found.off,
        images=some.answers.shape[1],
        time_of="" if traces.times is None else traces.times.unit,
        points=tuple(_undominated([never, *_cautious(points)], keep=(found.threshold, never.threshold))),
    )


def _chosen(traces: Traces, found: Solution) -> Point:
    """The solution itself. What it kept in reserve is expected to be lost on other images, too."""
    own = _point(traces, found, found.threshold)
    reserve = {"max_drop": "drop", "max_fidelity_drop": "fidelity_drop"}.get(found.target.kind)
    if reserve is None:
        return own
    lost = min(getattr(own, reserve) + found.margin, 1.0) if min(found.threshold) <= 1 else 0.0
    promised = found.target.limit if reserve == "fidelity_drop" else None
    return own.model_copy(update={reserve: lost, "promised": promised})


def _points(traces: Traces, found: Solution, kind: str) -> Iterator[Point]:
    n = traces.answers.shape[1]
    final = _path(traces, found, kind)
    lost = torch.zeros(len(final), 2, dtype=torch.float64, device=traces.confidence.device)
    folds = FOLDS if n >= 2 * FOLDS else 1
    fold = torch.arange(n, device=lost.device) % folds
    for left_out in range(folds):
        others = traces.rows(fold != left_out) if folds > 1 else traces
        held = traces.rows(fold == left_out)
        for i, threshold in enumerate(_path(others, found, kind)):
            lost[i] += _lost(held, threshold)
    # divided once: shares that are added up can exceed 1
    for threshold, (drop, differ) in zip(final, (lost / n).tolist(), strict=True):
        point = _point(traces, found, threshold)
        yield point.model_copy(update={"drop": point.drop if point.drop is None else drop, "fidelity_drop": differ})


def _cautious(points: list[Point]) -> list[Point]:
    """Whoever leaves more loses no less: where a cheaper point seems to lose less than a dearer one, it was lucky.

    The cheapest of many points within a limit would otherwise be one of the lucky ones, and lose more on other images. That holds
    for the solution, too: its reserve is an estimate.
    """
    cautious, drop, differ = [], -1.0, 0.0
    for point in sorted(points, key=lambda point: -point.price):
        drop, differ = max(drop, point.lost), max(differ, point.fidelity_drop)
        more = {"fidelity_drop": differ} | ({} if point.drop is None else {"drop": drop})
        cautious.append(point.model_copy(update=more))
    return cautious


def _path(traces: Traces, found: Solution, kind: str) -> list[list[float]]:
    """(S) thresholds, one for each weight of what is lost."""
    problem = Problem(
        traces.confidence[:-1], losses_of(traces, Target(kind, 0.0)), traces.costs_where, limited="loss", limit=0.0
    )
    on = torch.tensor([n in found.on_exits for n in range(traces.exits)], device=problem.h.device)
    low, high = (torch.tensor(w, dtype=torch.float64, device=on.device).log10().item() for w in WEIGHTS)
    weights = torch.logspace(low, high, STEPS, dtype=torch.float64, device=on.device)
    return [problem.thresholds(taken, one_threshold=False) for taken in path(problem, on, weights)]


def _lost(traces: Traces, threshold: list[float]) -> Tensor:
    """(2) sums over the images: of the drop of accuracy (without labels: of fidelity), and of answers that differ."""
    traces, leaving = traces.by(threshold), traces.leaving(threshold)
    differ = at_exits(traces.answers, leaving) != traces.bare
    return torch.stack([at_exits(traces.losses, leaving).sum(), differ.double().sum()])


def _point(traces: Traces, found: Solution, threshold: tuple[float, ...] | list[float]) -> Point:
    """What thresholds cost and lose on the images themselves."""
    score = traces.by(threshold).score(traces.leaving(threshold), found.off)
    bare = traces.alone.score_at(traces.exits)
    drop = None if score.accuracy is None or bare.accuracy is None else bare.accuracy - score.accuracy
    times = traces.times
    time_ms = None if score.time is None or times is None or times.bare_ms is None else score.time * times.bare_ms
    return Point(
        threshold=tuple(threshold), cost=score.cost, fidelity_drop=1 - score.fidelity, drop=drop, time_ms=time_ms
    )


def _undominated(points: list[Point], keep: tuple[tuple[float, ...], ...]) -> list[Point]:
    """The points that no other betters in everything, and those of the thresholds to keep; the cheapest first."""
    once: dict[tuple[float, ...], Point] = {}
    for point in points:
        if point.threshold not in once or point.promised is not None:
            once[point.threshold] = point
    kept = once.values()
    best = [point for point in kept if point.threshold in keep or not any(_betters(other, point) for other in kept)]
    return sorted(best, key=lambda point: (point.price, point.lost))


def _betters(one: Point, other: Point) -> bool:
    pairs = [(one.cost, other.cost), (one.fidelity_drop, other.fidelity_drop), (one.lost, other.lost)]
    pairs.append((one.price, other.price))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
