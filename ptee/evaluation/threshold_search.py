"""The search for thresholds.

    minimise    (1/n) sum_i cost[e_i]
    subject to  (1/n) sum_i loss[e_i, i] <= limit
    where       e_i = min {k : h[k, i] >= T[k]}, and E if no exit k has that

over the thresholds T and over which exits are on; or cost and loss change places. An exit that is off costs no head.

At one exit a threshold says no more than how many images, the most confident first, it takes from those that come there. While
the other exits stay as they are, the best number for one exit is found exactly, by running sums. Everything here is built from
that: coordinate descent on cost + weight * loss, with the weight found by bisection; then moves of two exits at a time within
the limit, which reach solutions that no weight gives. Several subsets of exits are searched at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

from ptee.exits.plan import heads_run

NEVER = 2.0  # a threshold that no confidence reaches
MAX_EXACT = 6  # up to so many exits every subset is tried; with more, exits are switched off one after the other
WEIGHTS = (1e-3, 1e4)  # of one wrong answer, in costs of the backbone; bisected on a logarithmic scale
BISECTIONS, MAX_SWEEPS = 12, 20
IMPROVED = 4  # subsets that moves of two exits are tried on
PAIR_STEPS, MAX_ROUNDS = 24, 3  # numbers tried for the first exit of a pair; rounds over all pairs
BATCH = 4  # subsets that are searched at once: more do not fit into a processor's cache
ROUNDING = 1e-9  # of means over the images
TIE = 1e-7  # weight of what is limited, to decide between solutions that are equal in what is minimised


@dataclass(frozen=True)
class Choice:
    """How many images the threshold of each exit lets leave, and the mean cost and loss.

    Attributes:
        on: (E,) bool, exits that are on.
        taken: (E,) the number of images, of all and the most confident first, whose confidence reaches T; 0 at exits that are
            off.
        cost: mean over the images.
        loss: mean over the images.
    """

    on: Tensor
    taken: Tensor
    cost: float
    loss: float


class Problem:
    """Confidences, costs and losses of images, and a limit on the mean of loss or cost; the other one is minimised."""

    def __init__(
        self,
        confidence: Tensor,
        loss: Tensor,
        costs: Tensor,
        head_costs: Tensor,
        reads_earlier: Tensor,
        *,
        limited: str,
        limit: float,
    ) -> None:
        """Sort the images by the confidence at each exit.

        Args:
            confidence: (E, n) of the early exits.
            loss: (E+1, n) of leaving there.
            costs: (E+1,) of leaving there when all heads are run.
            head_costs: (E,) what each head adds to the costs from its exit on.
            reads_earlier: (E,) bool, exits that read the answers of earlier ones.
            limited: "loss" or "cost".
            limit: of its mean.
        """
        self.exits, self.images = confidence.shape
        h = confidence.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.h, self.loss, self.costs, self.head_costs = h, loss.double(), costs, head_costs
        self.reads_earlier = reads_earlier
        self.limited, self.limit = limited, limit
        self.sorted, self.order = h.sort(dim=1, descending=True, stable=True)
        self.rank = self.order.argsort(1).int()
        self.ends = _ends(self.sorted)

    def priced(self, on: Tensor) -> Tensor:
        """(S, E+1) costs if only the heads of exits that are on (S, E), and the heads that those read, are run."""
        missing = (self.head_costs * ~heads_run(on, self.reads_earlier)).cumsum(1)
        return self.costs - torch.cat([missing, missing[:, -1:]], 1)

    def thresholds(self, taken: Tensor, one_threshold: bool) -> list[float]:
        """The thresholds that take so many images (E,); `NEVER` where none is taken.

        They lie half way to the next confidence, because the last digits of a confidence depend on the size of the batch.

        Args:
            taken: number of images at each exit.
            one_threshold: the same for all exits that take any.
        """
        gaps = [self._gap(n, int(k)) for n, k in enumerate(taken)]
        on = [gap for gap in gaps if gap is not None]
        if one_threshold and on:
            gaps = [gap and (max(low for low, _ in on), min(high for _, high in on)) for gap in gaps]
        return [_between(*gap) if gap else NEVER for gap in gaps]

    def _gap(self, n: int, taken: int) -> tuple[float, float] | None:
        """The highest confidence that is not taken, and the lowest that is."""
        if taken == 0:
            return None
        following = self.sorted[n, taken].item() if taken < self.images else -math.inf
        return following, self.sorted[n, taken - 1].item()

    def best(self, cost: Tensor, loss: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the best along the last axis, and its objective; infinite where nothing is within the limit."""
        objective, limited = (cost, loss) if self.limited == "loss" else (loss, cost)
        fits = allowed & (limited <= self.limit + ROUNDING)
        return (objective + TIE * limited).masked_fill(~fits, torch.inf).min(-1)[::-1]

    def outcome(self, price: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cost and loss (B,) if the exits take so many images (B, E), at prices (B, E+1)."""
        leaving = taken.new_full((len(taken), self.images), self.exits)
        for n in reversed(range(self.exits)):
            leaving = torch.where(self.rank[n] < taken[:, n, None], n, leaving)
        return price.gather(1, leaving).mean(1), self.loss.gather(0, leaving).mean(1)


def search(problem: Problem, one_threshold: bool = False) -> Choice | None:
    """The best choice that was found; None if nothing is within the limit.

    Args:
        problem: what is limited, and what is minimised.
        one_threshold: the same for all exits that are on.
    """
    exits = problem.exits
    if exits <= MAX_EXACT:
        return _best_of(
            problem, torch.tensor(list(product([True, False], repeat=exits)), device=problem.h.device), one_threshold
        )
    best, on = None, torch.ones(1, exits, dtype=torch.bool, device=problem.h.device)
    while len(on):
        found = _best_of(problem, on, one_threshold)
        if best is not None and (found is None or _objective(problem, found) >= _objective(problem, best)):
            return best
        best = found or best
        start = on[0] if found is None else found.on
        on = (
            start & ~torch.eye(exits, dtype=torch.bool, device=start.device)[start]
        )  # in each subset one more exit is off
    return best


def _best_of(problem: Problem, on: Tensor, one_threshold: bool) -> Choice | None:
    """The best choice among subsets of exits (S, E)."""
    price = problem.priced(on)
    taken = _one_threshold(problem, on, price)
    if not one_threshold:
        taken = _several_thresholds(problem, on, price, taken)
    cost, loss = problem.outcome(price, taken)
    allowed = torch.ones_like(cost, dtype=torch.bool)
    fits = [problem.best(c[None], v[None], a[None])[1] < torch.inf for c, v, a in zip(cost, loss, allowed, strict=True)]
    choices = [
        Choice(taken[i] > 0, taken[i], float(cost[i]), float(loss[i])) for i, inside in enumerate(fits) if inside
    ]
    return min(choices, key=lambda choice: _objective(problem, choice), default=None)


def _between(low: float, high: float) -> float:
    """Half way; where all images are taken, a threshold that every confidence reaches."""
    return min(0.0, high) if low == -math.inf else (low + high) / 2


def _objective(problem: Problem, choice: Choice) -> tuple[float, float, int]:
    """Less is better; of equals, the one with fewer exits."""
    pair = (choice.cost, choice.loss) if problem.limited == "loss" else (choice.loss, choice.cost)
    return round(pair[0], 9), round(pair[1], 9), int(choice.on.sum())


# ---------------------------------------------------------------------------------------------------- one threshold


def _one_threshold(problem: Problem, on: Tensor, price: Tensor) -> Tensor:
    """(S, E) numbers of images that the best single threshold takes; 0 where none is within the limit.

    As T falls, an image moves to an earlier exit when T passes its highest confidence up to that exit. So the means at every T
    are running sums over those highest confidences.
    """
    h = problem.h.masked_fill(~on[:, :, None], -torch.inf)
    values, order = h.cummax(1).values.flatten(1).sort(dim=1, descending=True, stable=True)  # (S, E n)
    cost = (price[:, :-1] - price[:, 1:])[:, :, None].expand(h.shape).flatten(1).gather(1, order)
    loss = (problem.loss[:-1] - problem.loss[1:]).flatten()[order]
    threshold = torch.cat([torch.full_like(values[:, :1], torch.inf), values], 1)
    index, objective = problem.best(
        price[:, -1:] + _running(cost) / problem.images,
        problem.loss[-1].mean() + _running(loss) / problem.images,
        _ends(values),
    )
    threshold = threshold.gather(1, index[:, None]).masked_fill(objective.isinf()[:, None], torch.inf)
    return (h >= threshold[:, :, None]).sum(2) * on


def _ends(values: Tensor) -> Tensor:
    """Which of the first 0..n of descending values a threshold can take: it cannot part equal values, nor take NaN (-inf)."""
    more = torch.cat([values[..., 1:], torch.full_like(values[..., :1], -torch.inf)], -1)
    last = (values > more) & (values > -torch.inf)
    return torch.cat([torch.ones_like(last[..., :1]), last], -1)


def _running(gains: Tensor) -> Tensor:
    """Sums of the first 0..n of the last axis."""
    return torch.cat([torch.zeros_like(gains[..., :1]), gains.cumsum(-1)], -1)


# ---------------------------------------------------------------------------------------------------- one for each exit


def _several_thresholds(problem: Problem, on: Tensor, price: Tensor, start: Tensor) -> Tensor:
    """(S, E) numbers of images taken: by descent, and for the best subsets improved by moves of two exits."""
    parts = zip(on.split(BATCH), price.split(BATCH), start.split(BATCH), strict=True)
    taken = torch.stack([start, torch.cat([_descended(problem, *part) for part in parts])])
    cost, loss = (each.view(2, -1) for each in problem.outcome(price.repeat(2, 1), taken.flatten(0, 1)))
    which, objective = problem.best(cost.T, loss.T, torch.ones_like(cost.T, dtype=torch.bool))
    taken = taken[which, torch.arange(len(on), device=on.device)]
    for s in objective.argsort(stable=True)[:IMPROVED].tolist():
        taken[s] = _improved(problem, on[s], price[s], taken[s])
    return taken


def _descended(problem: Problem, on: Tensor, price: Tensor, start: Tensor) -> Tensor:
    """(S, E) the best that descent finds within the limit while the weight is bisected, from two starts: none taken, and one T."""
    both, prices = on.repeat(2, 1), price.repeat(2, 1)
    taken = torch.cat([torch.zeros_like(start), start])
    low, high = (problem.h.new_full((len(both),), w).log() for w in WEIGHTS)
    best, lowest = taken, torch.full_like(low, torch.inf)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        taken = _descend(problem, both, prices, taken, middle.exp())
        cost, loss = problem.outcome(prices, taken)
        now = problem.best(cost[:, None], loss[:, None], torch.ones_like(cost, dtype=torch.bool)[:, None])[1]
        best, lowest = torch.where((now < lowest)[:, None], taken, best), torch.minimum(now, lowest)
        lighter = now.isfinite() == (problem.limited == "loss")  # within the limit of loss: a loss may weigh less
        low, high = torch.where(lighter, low, middle), torch.where(lighter, middle, high)
    first = lowest[: len(on)] <= lowest[len(on) :]
    return torch.where(first[:, None], best[: len(on)], best[len(on) :])


def _descend(problem: Problem, on: Tensor, price: Tensor, taken: Tensor, weight: Tensor) -> Tensor:
    """(B, E) numbers of images taken, such that no exit alone can lower the mean of cost + weight * loss."""
    value = [price[:, n, None] + weight[:, None] * problem.loss[n] for n in range(problem.exits + 1)]
    for _ in range(MAX_SWEEPS):
        before, taken = taken, taken.clone()
        reached = list(_reached(problem, taken))
        later = value[-1]
        for n in reversed(range(problem.exits)):
            gain = _running(((value[n] - later) * reached[n])[:, problem.order[n]])
            taken[:, n] = gain.masked_fill(~problem.ends[n], torch.inf).argmin(1) * on[:, n]
            later = torch.where(problem.rank[n] < taken[:, n, None], value[n], later)
        if torch.equal(before, taken):
            break
    return taken


def _reached(problem: Problem, taken: Tensor) -> Iterator[Tensor]:
    """(B, n) for each exit: which images come there."""
    staying = torch.ones(len(taken), problem.images, dtype=torch.bool, device=taken.device)
    for n in range(problem.exits):
        yield staying
        staying = staying & (problem.rank[n] >= taken[:, n, None])


# ---------------------------------------------------------------------------------------------------- two exits at a time


def _improved(problem: Problem, on: Tensor, price: Tensor, taken: Tensor) -> Tensor:
    """(E,) numbers of images taken, such that no move of two exits (the first of them in steps) does better."""
    exits = on.nonzero()[:, 0].tolist()
    pairs = list(permutations(exits, 2)) or [(n, n) for n in exits]
    best = torch.inf
    for _ in range(MAX_ROUNDS):
        before = best
        for i, j in pairs:
            numbers = _steps(problem.ends[i], int(taken[i]))
            moved, objective = _moved(problem, price, taken, i, numbers, j)
            if objective < best - ROUNDING:
                taken, best = moved, objective
        if best >= before - ROUNDING:
            break
    return taken


def _steps(ends: Tensor, now: int) -> Tensor:
    """Some of the numbers of images that a threshold can take, and the present number."""
    possible = ends.nonzero()[:, 0]
    spread = torch.linspace(0, len(possible) - 1, min(len(possible), PAIR_STEPS), device=ends.device).round().long()
    return torch.cat([possible.new_tensor([now]), possible[spread]]).unique()


def _moved(problem: Problem, price: Tensor, taken: Tensor, i: int, numbers: Tensor, j: int) -> tuple[Tensor, float]:
    """The best if exit i takes one of some numbers and exit j any number; and its objective."""
    tried = taken.repeat(len(numbers), 1)
    tried[:, i] = numbers
    tried[:, j] = 0
    later = taken.new_full((len(tried), problem.images), problem.exits)  # where images leave that pass exit j
    for n in reversed(range(j + 1, problem.exits)):
        later = torch.where(problem.rank[n] < tried[:, n, None], n, later)
    reached = torch.ones_like(later, dtype=torch.bool)
    for n in range(j):
        reached &= problem.rank[n] >= tried[:, n, None]
    cost = ((price[j] - price[later]) * reached)[:, problem.order[j]]
    loss = ((problem.loss[j] - problem.loss.gather(0, later)) * reached)[:, problem.order[j]]
    base_cost, base_loss = problem.outcome(price.expand(len(tried), -1), tried)
    number, objective = problem.best(
        base_cost[:, None] + _running(cost) / problem.images,
        base_loss[:, None] + _running(loss) / problem.images,
        problem.ends[j],
    )
    first = int(objective.argmin())
    tried[:, j] = number
    return tried[first], float(objective[first])
