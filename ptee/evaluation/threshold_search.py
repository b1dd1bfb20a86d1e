"""The search for thresholds: from confidences, losses and costs to the best split of each exit's rows.

A threshold says no more than how many of the rows, the surest first, would leave at its exit: a prefix. With the other
exits' prefixes fixed, the best prefix of one exit is found exactly, by a running sum over its rows. From that everything
here is made: descent on cost + weight * loss, one exit after another, with the weight found by bisection; then moves of
two exits at once within the limit, which need no weight and reach the points that no weight can.

Which exits are on is tried too: an exit that is off costs no head. All choices of a batch are searched side by side.
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
LARGEST_EXACT = 6  # exits of which every subset is tried; of more, one after the other is switched off
WEIGHTS = (1e-3, 1e4)  # of one wrong answer against one backbone; the bisection is in logarithms
BISECTIONS, MOST_SWEEPS = 12, 20
POLISHED, PAIR_STEPS, MOST_ROUNDS = 4, 24, 3  # subsets; places tried of the first exit of a pair; rounds over all pairs
TOGETHER = 4  # subsets that are searched side by side: more do not fit into a processor's cache
ROUNDING = 1e-9  # of means over rows
TIE = 1e-7  # among equals in what is minimised, the one with less of what is limited


@dataclass(frozen=True)
class Choice:
    """How many rows, the surest first, would leave at each exit, and what it comes to.

    Attributes:
        on: (E,) bool, exits whose heads are there.
        taken: (E,) rows; 0 at exits that are off.
        cost: mean over the rows.
        loss: mean over the rows.
    """

    on: Tensor
    taken: Tensor
    cost: float
    loss: float


class Problem:
    """Rows, exits, and a limit on the mean of loss or cost; the other one is minimised."""

    def __init__(
        self,
        confidence: Tensor,
        loss: Tensor,
        costs: Tensor,
        head_costs: Tensor,
        looks_back: Tensor,
        *,
        limited: str,
        limit: float,
    ) -> None:
        """Sort each exit's rows.

        Args:
            confidence: (E, n) of the early exits.
            loss: (E+1, n) of leaving there.
            costs: (E+1,) with all heads there.
            head_costs: (E,) what each head adds to the costs from its exit on.
            looks_back: (E,) bool, heads that read what those before them said.
            limited: "loss" or "cost".
            limit: of its mean.
        """
        self.exits, self.rows = confidence.shape
        h = confidence.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.h, self.loss, self.costs, self.head_costs = h, loss.double(), costs, head_costs
        self.looks_back = looks_back
        self.limited, self.limit = limited, limit
        self.sorted, self.order = h.sort(dim=1, descending=True, stable=True)
        self.rank = self.order.argsort(1).int()
        self.ends = _ends(self.sorted)

    def priced(self, on: Tensor) -> Tensor:
        """(S, E+1) costs where only the heads that are on (S, E), and those that they read, are run."""
        missing = (self.head_costs * ~heads_run(on, self.looks_back)).cumsum(1)
        return self.costs - torch.cat([missing, missing[:, -1:]], 1)

    def walls(self, taken: Tensor, one: bool) -> list[float]:
        """The thresholds that take so many rows (E,), half way to the next row; `NEVER` where none is taken.

        Half way, as a confidence can differ in its last digits between two batches.

        Args:
            taken: rows at each exit.
            one: the same for all that take any.
        """
        gaps = [self._gap(n, int(k)) for n, k in enumerate(taken)]
        here = [gap for gap in gaps if gap is not None]
        if one and here:
            gaps = [gap and (max(low for low, _ in here), min(high for _, high in here)) for gap in gaps]
        return [_between(*gap) if gap else NEVER for gap in gaps]

    def _gap(self, n: int, taken: int) -> tuple[float, float] | None:
        """The confidences of the next row and of the last that is taken."""
        if taken == 0:
            return None
        following = self.sorted[n, taken].item() if taken < self.rows else -math.inf
        return following, self.sorted[n, taken - 1].item()

    def best(self, cost: Tensor, loss: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The best place along the last axis, and how good it is; infinite where nothing is within the limit."""
        least, bound = (cost, loss) if self.limited == "loss" else (loss, cost)
        fits = allowed & (bound <= self.limit + ROUNDING)
        return (least + TIE * bound).masked_fill(~fits, torch.inf).min(-1)[::-1]

    def outcome(self, price: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cost and loss (B,) of prefixes (B, E) at prices (B, E+1)."""
        left = torch.full((len(taken), self.rows), self.exits)
        for n in reversed(range(self.exits)):
            left = torch.where(self.rank[n] < taken[:, n, None], n, left)
        return price.gather(1, left).mean(1), self.loss.gather(0, left).mean(1)


def search(problem: Problem, one: bool = False) -> Choice | None:
    """The best choice that was found; None if nothing is within the limit.

    Args:
        problem: what is limited, and what is minimised.
        one: the same threshold for all exits that are on.
    """
    exits = problem.exits
    if exits <= LARGEST_EXACT:
        return _best_of(problem, torch.tensor(list(product([True, False], repeat=exits))), one)
    best, on = None, torch.ones(1, exits, dtype=torch.bool)
    while len(on):
        found = _best_of(problem, on, one)
        if best is not None and (found is None or _goodness(problem, found) >= _goodness(problem, best)):
            return best
        best = found or best
        start = on[0] if found is None else found.on
        on = start & ~torch.eye(exits, dtype=torch.bool)[start]  # each of those that are on, switched off
    return best


def _best_of(problem: Problem, on: Tensor, one: bool) -> Choice | None:
    """The best choice among subsets of exits (S, E)."""
    price = problem.priced(on)
    taken = _one_threshold(problem, on, price)
    if not one:
        taken = _several_thresholds(problem, on, price, taken)
    cost, loss = problem.outcome(price, taken)
    allowed = torch.ones_like(cost, dtype=torch.bool)
    fits = [problem.best(c[None], v[None], a[None])[1] < torch.inf for c, v, a in zip(cost, loss, allowed, strict=True)]
    choices = [
        Choice(taken[i] > 0, taken[i], float(cost[i]), float(loss[i])) for i, inside in enumerate(fits) if inside
    ]
    return min(choices, key=lambda choice: _goodness(problem, choice), default=None)


def _between(low: float, high: float) -> float:
    """Where all are taken, 0 takes all others like them too."""
    return min(0.0, high) if low == -math.inf else (low + high) / 2


def _goodness(problem: Problem, choice: Choice) -> tuple[float, float, int]:
    """Less is better; among equals, fewer exits."""
    pair = (choice.cost, choice.loss) if problem.limited == "loss" else (choice.loss, choice.cost)
    return round(pair[0], 9), round(pair[1], 9), int(choice.on.sum())


# ---------------------------------------------------------------------------------------------------- one threshold


def _one_threshold(problem: Problem, on: Tensor, price: Tensor) -> Tensor:
    """(S, E) rows that the best single threshold takes; 0 where none is within the limit.

    While T falls, a row moves to an earlier exit whenever T passes the highest confidence up to that exit; so the means
    at every T are a running sum over those values.
    """
    h = problem.h.masked_fill(~on[:, :, None], -torch.inf)
    values, order = h.cummax(1).values.flatten(1).sort(dim=1, descending=True, stable=True)  # (S, E n)
    cost = (price[:, :-1] - price[:, 1:])[:, :, None].expand(h.shape).flatten(1).gather(1, order)
    loss = (problem.loss[:-1] - problem.loss[1:]).flatten()[order]
    wall = torch.cat([torch.full_like(values[:, :1], torch.inf), values], 1)
    place, good = problem.best(
        price[:, -1:] + _running(cost) / problem.rows,
        problem.loss[-1].mean() + _running(loss) / problem.rows,
        _ends(values),
    )
    wall = wall.gather(1, place[:, None]).masked_fill(good.isinf()[:, None], torch.inf)
    return (h >= wall[:, :, None]).sum(2) * on


def _ends(values: Tensor) -> Tensor:
    """Which prefixes 0..n of descending values part no equals, and take nothing that is no number."""
    more = torch.cat([values[..., 1:], torch.full_like(values[..., :1], -torch.inf)], -1)
    last = (values > more) & (values > -torch.inf)
    return torch.cat([torch.ones_like(last[..., :1]), last], -1)


def _running(gains: Tensor) -> Tensor:
    """Sums of the first 0..n of the last axis."""
    return torch.cat([torch.zeros_like(gains[..., :1]), gains.cumsum(-1)], -1)


# ---------------------------------------------------------------------------------------------------- one for each exit


def _several_thresholds(problem: Problem, on: Tensor, price: Tensor, start: Tensor) -> Tensor:
    """(S, E) rows taken: the best of descent from two starts, the most promising of them improved in pairs."""
    parts = zip(on.split(TOGETHER), price.split(TOGETHER), start.split(TOGETHER), strict=True)
    taken = torch.stack([start, torch.cat([_descended(problem, *part) for part in parts])])
    cost, loss = (each.view(2, -1) for each in problem.outcome(price.repeat(2, 1), taken.flatten(0, 1)))
    which, good = problem.best(cost.T, loss.T, torch.ones_like(cost.T, dtype=torch.bool))
    taken = taken[which, torch.arange(len(on))]
    for s in good.argsort(stable=True)[:POLISHED].tolist():
        taken[s] = _improved(problem, on[s], price[s], taken[s])
    return taken


def _descended(problem: Problem, on: Tensor, price: Tensor, start: Tensor) -> Tensor:
    """(S, E) the best that descent finds within the limit while the weight is bisected, from two starts."""
    both, prices = on.repeat(2, 1), price.repeat(2, 1)
    taken = torch.cat([torch.zeros_like(start), start])
    low, high = (torch.full((len(both),), w, dtype=torch.float64).log() for w in WEIGHTS)
    best, good = taken, torch.full_like(low, torch.inf)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        taken = _descend(problem, both, prices, taken, middle.exp())
        cost, loss = problem.outcome(prices, taken)
        now = problem.best(cost[:, None], loss[:, None], torch.ones_like(cost, dtype=torch.bool)[:, None])[1]
        best, good = torch.where((now < good)[:, None], taken, best), torch.minimum(now, good)
        lighter = now.isfinite() == (problem.limited == "loss")  # a loss with room to spare may weigh less
        low, high = torch.where(lighter, low, middle), torch.where(lighter, middle, high)
    first = good[: len(on)] <= good[len(on) :]
    return torch.where(first[:, None], best[: len(on)], best[len(on) :])


def _descend(problem: Problem, on: Tensor, price: Tensor, taken: Tensor, weight: Tensor) -> Tensor:
    """(B, E) rows taken, such that no exit alone can lower the mean of cost + weight * loss."""
    value = [price[:, n, None] + weight[:, None] * problem.loss[n] for n in range(problem.exits + 1)]
    for _ in range(MOST_SWEEPS):
        before, taken = taken, taken.clone()
        reach = list(_reached(problem, taken))
        later = value[-1]
        for n in reversed(range(problem.exits)):
            gain = _running(((value[n] - later) * reach[n])[:, problem.order[n]])
            taken[:, n] = gain.masked_fill(~problem.ends[n], torch.inf).argmin(1) * on[:, n]
            later = torch.where(problem.rank[n] < taken[:, n, None], value[n], later)
        if torch.equal(before, taken):
            break
    return taken


def _reached(problem: Problem, taken: Tensor) -> Iterator[Tensor]:
    """(B, n) for each exit: which rows come there."""
    here = torch.ones(len(taken), problem.rows, dtype=torch.bool)
    for n in range(problem.exits):
        yield here
        here = here & (problem.rank[n] >= taken[:, n, None])


# ---------------------------------------------------------------------------------------------------- two at once


def _improved(problem: Problem, on: Tensor, price: Tensor, taken: Tensor) -> Tensor:
    """(E,) rows taken, such that no two exits (one of them in steps) do better within the limit."""
    here = on.nonzero()[:, 0].tolist()
    pairs = list(permutations(here, 2)) or [(n, n) for n in here]
    best = torch.inf
    for _ in range(MOST_ROUNDS):
        before = best
        for i, j in pairs:
            places = _steps(problem.ends[i], int(taken[i]))
            found, good = _moved(problem, price, taken, i, places, j)
            if good < best - ROUNDING:
                taken, best = found, good
        if best >= before - ROUNDING:
            break
    return taken


def _steps(ends: Tensor, now: int) -> Tensor:
    """Prefixes to try: some of those possible, the present one among them."""
    possible = ends.nonzero()[:, 0]
    spread = torch.linspace(0, len(possible) - 1, min(len(possible), PAIR_STEPS)).round().long()
    return torch.cat([torch.tensor([now]), possible[spread]]).unique()


def _moved(problem: Problem, price: Tensor, taken: Tensor, i: int, places: Tensor, j: int) -> tuple[Tensor, float]:
    """The best that comes of exit i at one of some places and exit j anywhere; and how good it is."""
    tried = taken.repeat(len(places), 1)
    tried[:, i] = places
    tried[:, j] = 0
    left = torch.full((len(tried), problem.rows), problem.exits)
    for n in reversed(range(j + 1, problem.exits)):
        left = torch.where(problem.rank[n] < tried[:, n, None], n, left)
    ahead = left  # where those leave who come to exit j and stay
    reach = torch.ones_like(left, dtype=torch.bool)
    for n in range(j):
        reach &= problem.rank[n] >= tried[:, n, None]
    cost = ((price[j] - price[ahead]) * reach)[:, problem.order[j]]
    loss = ((problem.loss[j] - problem.loss.gather(0, ahead)) * reach)[:, problem.order[j]]
    base_cost, base_loss = problem.outcome(price.expand(len(tried), -1), tried)
    place, good = problem.best(
        base_cost[:, None] + _running(cost) / problem.rows,
        base_loss[:, None] + _running(loss) / problem.rows,
        problem.ends[j],
    )
    first = int(good.argmin())
    tried[:, j] = place
    return tried[first], float(good[first])
