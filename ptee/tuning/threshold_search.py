"""The search for thresholds.

    minimise    (1/n) sum_i cost[e_i]
    subject to  (1/n) sum_i loss[e_i, i] <= limit
    where       e_i = min {k : h[k, i] >= T[k]}, and E if no exit k has that

over the thresholds T and over which exits are on; or with cost and loss in each other's place. The head of an exit that is off
costs nothing.

A threshold decides how many images an exit takes, the most confident first. If the other exits stay as they are, running sums
give the best number for one exit exactly. The rest is built from that: coordinate descent on cost + weight * loss, with the
weight found by bisection; then moves of two exits at a time, which reach solutions that no weight gives. Several subsets of
exits are searched at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

from ptee.exits.config import NEVER
from ptee.production.curve import ROUNDING

MAX_EXACT = 6  # up to so many exits every subset is tried; with more, those of `few_on`, and exits are switched off one after another
WEIGHTS = (1e-3, 1e4)  # of one wrong answer, in costs of the backbone; bisected on a logarithmic scale
BISECTIONS, MAX_SWEEPS = 12, 20
IMPROVED = 4  # subsets that moves of two exits are tried on
PAIR_STEPS, MAX_ROUNDS = 24, 3  # numbers tried for the first exit of a pair; rounds over all pairs
AT_ONCE = 2**14  # images times subsets of exits that are searched at once: more do not fit into a processor's cache
TIE = 1e-7  # weight of what is limited, to choose among solutions that are equal in what is minimised


@dataclass(frozen=True)
class Choice:
    """How many images each exit takes, (E,), and the mean cost and loss. An exit that takes none is off."""

    taken: Tensor
    cost: float
    loss: float


class Problem:
    """Confidences, losses and costs of n images, and a limit on the mean loss or cost; the other one is minimised.

    Args:
        confidence: (E, n) of the early exits.
        loss: (E+1, n) of leaving there.
        price: gives the costs (S, E+1) of leaving, for subsets of exits that are on (S, E).
        limited: "loss" or "cost".
        limit: of its mean.
    """

    def __init__(
        self, confidence: Tensor, loss: Tensor, price: Callable[[Tensor], Tensor], *, limited: str, limit: float
    ) -> None:
        self.exits, self.images = confidence.shape
        self.h = confidence.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.loss, self.price, self.limited, self.limit = loss, price, limited, limit
        self.sorted, self.order = self.h.sort(dim=1, descending=True, stable=True)
        self.rank = self.order.argsort(1).int()
        self.ends = _ends(self.sorted)

    def thresholds(self, taken: Tensor, one_threshold: bool) -> list[float]:
        """The thresholds by which the exits take so many images (E,); `NEVER` if none.

        They lie half way to the next confidence, because the last digits of a confidence depend on the size of the batch.
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

    def best(self, cost: Tensor, loss: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The index of the best along the last axis, and its objective; infinite if none is within the limit."""
        objective, limited = (cost, loss) if self.limited == "loss" else (loss, cost)
        fits = limited <= self.limit + ROUNDING
        if allowed is not None:
            fits = fits & allowed
        return (objective + TIE * limited).masked_fill(~fits, torch.inf).min(-1)[::-1]

    def leaving(self, taken: Tensor) -> Tensor:
        """(B, n) the exit at which each image leaves if the exits take so many (B, E)."""
        leaving = taken.new_full((len(taken), self.images), self.exits)
        for n in reversed(range(self.exits)):
            leaving = torch.where(self.rank[n] < taken[:, n, None], n, leaving)
        return leaving

    def outcome(self, price: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cost and loss (B,) if the exits take so many images (B, E), at prices (B, E+1)."""
        leaving = self.leaving(taken)
        return price.gather(1, leaving).mean(1), self.loss.gather(0, leaving).mean(1)


def search(problem: Problem, one_threshold: bool = False, on: Sequence[int] | None = None) -> Choice | None:
    """The best choice that was found; None if nothing is within the limit.

    With `on`, these exits are on and no others, and one of them at least takes an image.
    """
    exits, device = problem.exits, problem.h.device
    if on is not None:
        only = torch.tensor([[n in on for n in range(exits)]], device=device)
        found = _best_of(problem, only, one_threshold)
        return found if found is not None and (found.taken.any() or not on) else None
    if exits <= MAX_EXACT:
        return _best_of(problem, torch.tensor(list(product([True, False], repeat=exits)), device=device), one_threshold)
    few = _best_of(problem, torch.tensor(few_on(exits), device=device), one_threshold)
    both = filter(None, [few, _switched_off(problem, one_threshold)])
    return min(both, key=lambda choice: objective(problem, choice), default=None)


def few_on(exits: int) -> list[list[bool]]:
    """All exits off, and each alone on: where heads are dear, switching off one exit at a time may not come to these."""
    return [[False] * exits, *([n == on for n in range(exits)] for on in range(exits))]


def _switched_off(problem: Problem, one_threshold: bool) -> Choice | None:
    """The best choice that was found by switching off exits one after another, while that betters it."""
    best, some = None, torch.ones(1, problem.exits, dtype=torch.bool, device=problem.h.device)
    while len(some):
        found = _best_of(problem, some, one_threshold)
        if best is not None and (found is None or objective(problem, found) >= objective(problem, best)):
            return best
        best = found or best
        start = some[0] if found is None else found.taken > 0
        each = torch.eye(problem.exits, dtype=torch.bool, device=start.device)[start]
        some = start & ~each  # in each subset one more exit is off
    return best


def path(problem: Problem, on: Tensor, weights: Tensor) -> Tensor:
    """(S, E) numbers of images taken for which no exit alone can lower the mean of cost + weight * loss, for weights (S,).

    The exits `on` (E,) are on. Nothing is limited.
    """
    every = on.expand(len(weights), -1)
    return _descend(problem, every, problem.price(every), torch.zeros_like(every, dtype=torch.long), weights)


def _best_of(problem: Problem, on: Tensor, one_threshold: bool) -> Choice | None:
    """The best choice among subsets of exits (S, E)."""
    choices = search_each(problem, on, one_threshold)
    return min(choices, key=lambda choice: objective(problem, choice), default=None)


def search_each(problem: Problem, on: Tensor, one_threshold: bool) -> list[Choice]:
    """The best choice that was found for each subset of exits (S, E), without those that have none within the limit."""
    price = problem.price(on)
    taken = _one_threshold(problem, on, price)
    if not one_threshold:
        taken = _several_thresholds(problem, on, price, taken)
    cost, loss = problem.outcome(price, taken)
    fits = problem.best(cost[:, None], loss[:, None])[1].isfinite()
    return [Choice(taken[i], float(cost[i]), float(loss[i])) for i in fits.nonzero()[:, 0].tolist()]


def _between(low: float, high: float) -> float:
    """Half way; where all images are taken, a threshold that every confidence reaches."""
    return min(0.0, high) if low == -math.inf else (low + high) / 2


def objective(problem: Problem, choice: Choice) -> tuple[float, float, int]:
    """Less is better; of equals, the one with fewer exits."""
    pair = (choice.cost, choice.loss) if problem.limited == "loss" else (choice.loss, choice.cost)
    return round(pair[0], 9), round(pair[1], 9), int((choice.taken > 0).sum())


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
    """Which numbers 0..n of descending values a threshold can take: it cannot separate equal ones, or take NaN (-inf)."""
    more = torch.cat([values[..., 1:], torch.full_like(values[..., :1], -torch.inf)], -1)
    last = (values > more) & (values > -torch.inf)
    return torch.cat([torch.ones_like(last[..., :1]), last], -1)


def _running(gains: Tensor) -> Tensor:
    """Sums of the first 0..n of the last axis."""
    return torch.cat([torch.zeros_like(gains[..., :1]), gains.cumsum(-1)], -1)


# ---------------------------------------------------------------------------------------------------- one for each exit


def _several_thresholds(problem: Problem, on: Tensor, price: Tensor, start: Tensor) -> Tensor:
    """(S, E) numbers of images taken: by descent, and for the best subsets improved by moves of two exits."""
    batch = max(4, AT_ONCE // max(problem.images, 1))
    parts = zip(on.split(batch), price.split(batch), start.split(batch), strict=True)
    taken = torch.stack([start, torch.cat([_descended(problem, *part) for part in parts])])
    cost, loss = (each.view(2, -1) for each in problem.outcome(price.repeat(2, 1), taken.flatten(0, 1)))
    which, objective = problem.best(cost.T, loss.T)
    taken = taken[which, torch.arange(len(on), device=on.device)]
    for s in objective.argsort(stable=True)[:IMPROVED].tolist():
        taken[s] = _improved(problem, on[s], price[s], taken[s])
    return taken


def _descended(problem: Problem, on: Tensor, price: Tensor, start: Tensor) -> Tensor:
    """(S, E) the best that descent finds while the weight is bisected. It starts twice: from none taken, and from one T."""
    both, prices = on.repeat(2, 1), price.repeat(2, 1)
    taken = torch.cat([torch.zeros_like(start), start])
    low, high = (problem.h.new_full((len(both),), w).log() for w in WEIGHTS)
    best, lowest = taken, torch.full_like(low, torch.inf)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        taken = _descend(problem, both, prices, taken, middle.exp())
        cost, loss = problem.outcome(prices, taken)
        now = problem.best(cost[:, None], loss[:, None])[1]
        best, lowest = torch.where((now < lowest)[:, None], taken, best), torch.minimum(now, lowest)
        lighter = now.isfinite() == (problem.limited == "loss")  # within the limit of loss: a loss may weigh less
        low, high = torch.where(lighter, low, middle), torch.where(lighter, middle, high)
    first = lowest[: len(on)] <= lowest[len(on) :]
    return torch.where(first[:, None], best[: len(on)], best[len(on) :])


def _descend(problem: Problem, on: Tensor, price: Tensor, taken: Tensor, weight: Tensor) -> Tensor:
    """(B, E) numbers of images taken for which no exit alone can lower the mean of cost + weight * loss."""
    value = [price[:, n, None] + weight[:, None] * problem.loss[n] for n in range(problem.exits + 1)]
    switched_on = on.any(0).nonzero()[:, 0].tolist()
    for _ in range(MAX_SWEEPS):
        before, taken = taken, taken.clone()
        reached = list(_reached(problem, taken))
        later = value[-1]
        for n in reversed(switched_on):
            gain = _running(((value[n] - later) * reached[n])[:, problem.order[n]])
            taken[:, n] = gain.masked_fill(~problem.ends[n], torch.inf).argmin(1) * on[:, n]
            later = torch.where(problem.rank[n] < taken[:, n, None], value[n], later)
        if torch.equal(before, taken):
            break
    return taken


def _reached(problem: Problem, taken: Tensor) -> Iterator[Tensor]:
    """For each exit, (B, n) which images reach it."""
    staying = torch.ones(len(taken), problem.images, dtype=torch.bool, device=taken.device)
    for n in range(problem.exits):
        yield staying
        staying = staying & (problem.rank[n] >= taken[:, n, None])


# ---------------------------------------------------------------------------------------------------- two exits at a time


def _improved(problem: Problem, on: Tensor, price: Tensor, taken: Tensor) -> Tensor:
    """(E,) numbers of images taken that no move of two exits (the first in steps) can better."""
    exits = on.nonzero()[:, 0].tolist()
    pairs = list(permutations(exits, 2)) or [(n, n) for n in exits]
    best = torch.inf
    tried: set[tuple[int, int]] = set()  # with the numbers as they are now: they would give the same again
    for _ in range(MAX_ROUNDS):
        before = best
        for i, j in pairs:
            if (i, j) in tried:
                continue
            numbers = _steps(problem.ends[i], int(taken[i]))
            moved, objective = _moved(problem, price, taken, i, numbers, j)
            tried.add((i, j))
            if objective < best - ROUNDING:
                tried = tried if torch.equal(moved, taken) else set()
                taken, best = moved, objective
        if best >= before - ROUNDING:
            break
    return taken


def _steps(ends: Tensor, now: int) -> Tensor:
    """Some of the numbers of images that a threshold can take, and the present number."""
    possible = ends.nonzero()[:, 0]
    spread = (
        torch.linspace(0, len(possible) - 1, min(len(possible), PAIR_STEPS), dtype=torch.float64, device=ends.device)
        .round()
        .long()
    )
    return torch.cat([possible.new_tensor([now]), possible[spread]]).unique()


def _moved(problem: Problem, price: Tensor, taken: Tensor, i: int, numbers: Tensor, j: int) -> tuple[Tensor, float]:
    """The best if exit i takes one of some numbers and exit j any number; and its objective."""
    tried = taken.repeat(len(numbers), 1)
    tried[:, i] = numbers
    tried[:, j] = 0
    order = problem.order[j]
    rank, losses = problem.rank[:, order], problem.loss[:, order]
    later_cost = price[-1].expand(len(tried), problem.images)  # of images that exit j does not take
    later_loss = losses[-1].expand_as(later_cost)
    for n in reversed(range(j + 1, problem.exits)):
        leave = rank[n] < tried[:, n, None]
        later_cost = torch.where(leave, price[n], later_cost)
        later_loss = torch.where(leave, losses[n], later_loss)
    reached = torch.ones_like(later_cost, dtype=torch.bool)
    for n in range(j):
        reached &= rank[n] >= tried[:, n, None]
    cost, loss = (price[j] - later_cost) * reached, (losses[j] - later_loss) * reached
    base_cost, base_loss = problem.outcome(price.expand(len(tried), -1), tried)
    number, objective = problem.best(
        base_cost[:, None] + _running(cost) / problem.images,
        base_loss[:, None] + _running(loss) / problem.images,
        problem.ends[j],
    )
    first = int(objective.argmin())
    tried[:, j] = number
    return tried[first], float(objective[first])
