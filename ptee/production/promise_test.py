"""Is a promise still kept? A test that may be looked at after every image, for ever.

The promise is that an answer differs from the backbone's with probability at most p. A capital of 1 bets against it (Waudby-Smith
and Ramdas, 2024): with each audited image it is multiplied by

    q / p  if the answers differ,  (1 - q) / (1 - p)  if they agree,      q > p.

While the promise holds, no capital is expected to grow, so the chance that it ever reaches 1 / alpha is at most alpha (Ville). A part w_k
of the capital begins to bet at image k, so that a promise that was kept for long is given up as fast as one that never was
(Shiryaev, 1963; e-detectors, Shin, Ramdas and Rinaldo, 2023). Several q share the capital.

mapie's RiskMonitoring has the same purpose (Podkopaev and Ramdas, 2022). It keeps every loss and computes all bounds anew with each
image, so a million images take a million squared steps, and it tests the mean since the beginning, which hides a late fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TIMES = (2, 4, 8, 16)  # the odds of q over those of p


@dataclass
class Bet:
    """One q: its capital, and since when it would have paid to bet on it (Page's CUSUM).

    Attributes:
        differ: what a differing answer multiplies the capital by.
        agree: likewise.
        capital: of the parts that have begun to bet.
        cusum: of the logarithm of the capital, from its last minimum on.
        since: the image behind that minimum.
        moment: when that image came, in seconds of the clock; `audited` and `differed` count from there on.
    """

    differ: float
    agree: float
    capital: float = 0.0
    cusum: float = 0.0
    since: int = 0
    moment: float = 0.0
    audited: int = 0
    differed: int = 0

    def see(self, differs: bool, entering: float, image: int, moment: float) -> None:
        """One more audited image; `entering` is the part of the capital that begins to bet."""
        factor = self.differ if differs else self.agree
        self.capital = (self.capital + entering) * factor
        if self.cusum <= 0:
            self.cusum, self.since, self.moment, self.audited, self.differed = 0.0, image, moment, 0, 0
        self.cusum += math.log(factor)
        self.audited += 1
        self.differed += differs


class PromiseTest:
    """Bets against the promise that answers differ with probability at most `limit`; wrong with probability `alpha` at most."""

    def __init__(self, limit: float, alpha: float) -> None:
        self.limit, self.alpha, self.seen = limit, alpha, 0
        odds = [times * limit / (1 - limit) for times in TIMES]
        self.bets = [Bet(o / (1 + o) / limit, 1 / (1 + o) / (1 - limit)) for o in odds]

    def see(self, differs: bool, image: int = 0, moment: float = 0.0) -> Bet | None:
        """One more audited image; the best bet once the promise is refuted, else None."""
        self.seen += 1
        waiting = _waiting(self.seen)
        entering = _waiting(self.seen - 1) - waiting
        for bet in self.bets:
            bet.see(differs, entering, image, moment)
        capital = waiting + sum(bet.capital for bet in self.bets) / len(self.bets)
        return max(self.bets, key=lambda bet: bet.capital) if capital >= 1 / self.alpha else None

    def audits_to_find(self, share: float) -> float:
        """About how many audits it takes to refute the promise where this share of the answers differs from the first one on.

        The best bet's part of the capital must grow to 1 / alpha, and with each audit its logarithm is expected to grow by

            share * log(q / p) + (1 - share) * log((1 - q) / (1 - p)).

        Infinite where that is not above 0, as it is while the promise is kept.
        """
        growth = max(share * math.log(bet.differ) + (1 - share) * math.log(bet.agree) for bet in self.bets)
        return math.inf if growth <= 0 else max(1.0, math.log(len(self.bets) / self.alpha) / growth)


def _waiting(images: int) -> float:
    """The part of the capital that has not begun to bet after so many images.

    It ends at 0, so that all capital bets some day. It falls slowly, so that even after millions of images some is left that has
    not been lost on them.
    """
    return math.log(2) / math.log(images + 2)
