"""How sure it is that no more is lost than a limit: p-values of the hypothesis that more is, from n independent images.

    fidelity   the loss of an image is 0 or 1: the exact binomial test
    accuracy   it is 1, 0 or -1, because an exit can also be right where the backbone is wrong: an exact test, below

The mean of three values is often bounded as if it were any number in an interval, by Hoeffding and Bentkus or by betting. That is
valid, too, but knows less: `recipes/scripts/check_guarantees.py --tests` compares them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ptee.production.few_images import images_needed, least_limit

Floats = NDArray[np.float64]
NUISANCE_SHARE = 1e-4  # of the error that is allowed, for a share of won answers outside of its interval
SHARES = 33  # of won answers that are tried, between the ends of the interval
NEGLIGIBLE = 1e-9  # probability


def images_needed_for_drop(limit: float, delta: float) -> int:
    """The same for a drop of accuracy, whose test also allows for answers that are won: from 99 % on it needs more images.

    >>> images_needed_for_drop(0.01, 0.05), images_needed_for_drop(0.01, 0.01)
    (299, 529)
    """
    few = images_needed(limit, delta)
    return few + bisect_left(range(9 * few), True, key=lambda more: _shows(few + more, limit, delta))


def least_limit_of_drop(images: int, delta: float) -> float:
    """The smallest drop of accuracy that so many images can show, to a ten thousandth."""
    least = math.floor(least_limit(images, delta) * 1e4)
    return (
        least + bisect_left(range(10_000 - least), True, key=lambda more: _shows(images, (least + more) / 1e4, delta))
    ) / 1e4


def _shows(images: int, limit: float, delta: float) -> bool:
    """Whether so many images show that the drop is smaller, if no answer changes."""
    return limit > 0 and p_value_of_drop(0, 0, images, limit, delta) <= delta


@lru_cache(maxsize=100_000)
def p_value_of_share(lost: int, images: int, limit: float) -> float:
    """That a share above the limit loses something, if `lost` of so many images do: the exact binomial test."""
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value  # takes a second to import

    rate = np.array([lost / images * (1 - 1e-12)])  # it is multiplied by n again and rounded up
    return float(compute_hoeffding_bentkus_p_value(rate, images, limit, binary=True)[0, 0])


@lru_cache(maxsize=100_000)
def p_value_of_drop(lost: int, won: int, images: int, limit: float, delta: float) -> float:
    """That accuracy drops by more than the limit, if so many images lose the right answer and so many win it.

    With p the share that is won and p + limit the share that is lost, the probability of an outcome at most as far above the
    drop's limit as this one, by the score statistic (Tango, 1998), is summed over all outcomes; the largest one for any p in its
    (1 - 1e-4 delta) interval of Clopper and Pearson counts, plus 1e-4 delta for p outside of it (Berger and Boos, 1994).
    """
    from scipy.stats import beta, binom  # takes half a second to import

    score = float(_score(np.array(lost), np.array(won), images, limit))
    if score >= 0:
        return 1.0
    tail = NUISANCE_SHARE * delta
    low = float(beta.ppf(tail / 2, won, images - won + 1)) if won else 0.0
    high = float(beta.ppf(1 - tail / 2, won + 1, images - won)) if won < images else 1.0
    high = min(high, (1 - limit) / 2)
    if low > high:
        return tail
    shares = np.linspace(math.sqrt(low), math.sqrt(high), SHARES) ** 2
    fewest, most = (int(binom.ppf(q, images, p)) for q, p in ((NEGLIGIBLE, low), (1 - NEGLIGIBLE, high)))
    of_won = np.arange(fewest, min(most, images) + 1)
    of_lost = _most_lost(of_won, images, limit, score)
    rest = np.clip(
        (shares + limit) / np.maximum(1 - shares, 1e-12), 0, 1
    )  # of those that do not win, the share that loses
    each = binom.pmf(of_won[:, None], images, shares) * binom.cdf(of_lost[:, None], images - of_won[:, None], rest)
    return min(1.0, float(each.sum(0).max()) + tail + 2 * NEGLIGIBLE)


def _score(lost: NDArray[np.int64], won: NDArray[np.int64], images: int, limit: float) -> Floats:
    """How far the drop lies above the limit, in standard deviations: Tango's statistic for paired shares."""
    b = -(lost + won) + (2 * images - lost + won) * limit
    c = -won * limit * (1 - limit)
    share = (np.sqrt(np.maximum(b * b - 8 * images * c, 0)) - b) / (
        4 * images
    )  # won, most likely if the drop is the limit
    return np.asarray((lost - won - images * limit) / np.sqrt(images * (2 * share + limit - limit**2)))


def _most_lost(won: NDArray[np.int64], images: int, limit: float, score: float) -> NDArray[np.int64]:
    """For each number of won answers, the largest number of lost ones whose score is at most this; -1 if none is."""
    low, high = np.full(len(won), -1), images - won
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = _score(middle, won, images, limit) <= score + 1e-9
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low
