"""What a page says about a run, as arithmetic on its traces: no image is run through the model here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptee.evaluation.metrics import BINS
from ptee.evaluation.results_table import BLENDED_END
from ptee.exits.config import with_off
from ptee.tuning.traces import Score, Traces, at_exits

STEPS = 100  # of the slider from T = 0 to 1; one more, above 1, where no image leaves
COLUMNS = 20  # of a histogram of h
LEAST = 10  # images in a bin whose share says something


@dataclass(frozen=True, kw_only=True)
class Step(Score):
    """What some thresholds give.

    Attributes:
        t: one threshold for all exits; None for the run's own, one for each exit.
        right: (E+1) of all images, the share that leaves at each exit and is right there (without labels: agrees).
        wrong: (E+1) likewise, and is not.
    """

    t: float | None = None
    right: list[float]
    wrong: list[float]


def step(traces: Traces, thresholds: Sequence[float], off: Sequence[int], t: float | None = None) -> Step:
    """What these thresholds (E,) give while some exits are off."""
    kept = with_off(thresholds, off)
    traces = traces.by(kept)
    leaving = traces.leaving(kept)
    score, right = traces.score(leaving, off), at_exits(traces.right, leaving)
    shares, well = traces.shares(leaving), _shares(leaving[right], traces)
    wrong = [all_ - good for all_, good in zip(shares, well, strict=True)]
    return Step(**vars(score), t=t, right=well, wrong=wrong)


def steps(traces: Traces, off: Sequence[int]) -> list[Step]:
    """What each threshold gives, if all exits have the same."""
    every = [n / STEPS for n in range(STEPS + 1)] + [1 + 1 / STEPS]
    return [step(traces, [t] * traces.exits, off, t) for t in every]


def _shares(leaving: Tensor, traces: Traces) -> list[float]:
    n = traces.answers.shape[1]
    return [count / n for count in torch.bincount(leaving, minlength=traces.exits + 1).tolist()]


class Columns(NamedTuple):
    """A histogram of h: the middle of each column, and the share of all images in it that is right, and wrong."""

    middles: list[float]
    right: list[float]
    wrong: list[float]


def histogram(h: Tensor, right: Tensor) -> Columns:
    """Of the confidence (n,) of one exit."""
    places = (h.nan_to_num(0).clamp(0, 1) * COLUMNS).long().clamp(max=COLUMNS - 1)
    count = [torch.bincount(places[which], minlength=COLUMNS) / max(1, len(h)) for which in (right, ~right)]
    return Columns([(n + 0.5) / COLUMNS for n in range(COLUMNS)], *(shares.tolist() for shares in count))


class Reliability(NamedTuple):
    """For each bin of h that holds enough images: the mean h, the share of yes, and how many images."""

    said: list[float]
    true: list[float]
    images: list[int]


def reliability(h: Tensor, true: Tensor) -> Reliability:
    """How far the confidence (n,) of one exit is the probability of `true` (n,)."""
    known = h.isfinite()
    h, true = h[known].double().clamp(0, 1), true[known].double()
    places = (h * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(places, minlength=BINS)
    full = count >= LEAST
    means = [torch.bincount(places, x, minlength=BINS)[full] / count[full] for x in (h, true)]
    return Reliability(means[0].tolist(), means[1].tolist(), count[full].tolist())


def mixed_up(traces: Traces, leaving: Tensor, most: int = 12) -> list[tuple[int, int, int]]:
    """What early exits mix up that the backbone does not: (class, answer, images), the most frequent first."""
    answers = at_exits(traces.answers, leaving)
    new = (answers != traces.truth) & (traces.bare == traces.truth) & (leaving < traces.exits)
    pairs = Counter(zip(traces.truth[new].tolist(), answers[new].tolist(), strict=True))
    return [(*pair, count) for pair, count in pairs.most_common(most)]


def put_right(traces: Traces, leaving: Tensor) -> int:
    """How many images early exits answer rightly that the backbone does not."""
    return int((at_exits(traces.right, leaving) & (traces.bare != traces.truth) & (leaving < traces.exits)).sum())


def changed_at_the_end(traces: Traces, leaving: Tensor) -> tuple[int, int]:
    """How many images blended answers get wrong, and right, at the end of the backbone, other than the backbone alone."""
    ends = leaving == traces.exits
    blended, alone = traces.right[-1] & ends, traces.alone.right[-1] & ends
    return int((alone & ~blended).sum()), int((blended & ~alone).sum())


def spread_over(places: Tensor, most: int) -> list[int]:
    """Some of these indices (k,), spread over all of them."""
    if len(places) <= most:
        return [int(i) for i in places]
    return [int(places[len(places) * n // most]) for n in range(most)]


def recorded(results: Mapping[str, Any]) -> Step | None:
    """The same of what a run recorded, which has no traces; None if nothing was measured."""
    rows, leaving = results.get("rows"), results.get("leaving")
    if not rows or not leaving:
        return None
    blended = [row for row in rows if row["name"] == BLENDED_END]
    own, ends = rows[-1], [*(row for row in rows[1:-1] if row not in blended), *(blended or rows[:1])]
    right = [share * (row["right"] or 0.0) for share, row in zip(leaving, ends, strict=True)]
    wrong = [share - good for share, good in zip(leaving, right, strict=True)]
    return Step(own["accuracy"], own["fidelity"], own["cost"], right=right, wrong=wrong)
