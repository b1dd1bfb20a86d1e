"""The one sentence that ends a table where early exits do not pay: they cost too much, save too little, or something else is better."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ptee._common.text import percent
from ptee.production.curve import ROUNDING

LITTLE = 0.05  # of the cost; who saves less hardly saves anything
SLOWER = 0.95  # times the bare backbone's speed; above it the difference may be noise
CHEAPER = (
    "Take fewer or cheaper heads, or batches of another size"  # where heads take too long, however well they answer
)
ACCURATE, FAITHFUL = "is as accurate", "gives as many of the backbone's answers"  # what is as good, by the wish


class Way(NamedTuple):
    """A way to answer.

    Attributes:
        name: begins a sentence.
        cost: over the bare backbone's.
        lost: of accuracy or fidelity.
        words: its numbers, for the end of a sentence.
    """

    name: str
    cost: float
    lost: float
    words: str = ""


def bottom_line(
    own: Way,
    rivals: Iterable[Way] = (),
    *,
    as_good: str = ACCURATE,
    speedup: float | None = None,
    where: str = "",
    lower_t: bool = True,
) -> str:
    """Why these early exits do not pay, in a sentence; empty if they do.

    Args:
        own: of the early exits.
        rivals: a backbone that is cut off, a smaller network, a cascade.
        as_good: what one does that loses no more, in words.
        speedup: the bare backbone's time over that of the early exits, where it was measured, and `where` in words.
        lower_t: a lower T could help: no more is lost than was allowed, and not all images leave at exit 0.
    """
    if own.cost >= 1:
        because = f"{own.cost:.3f} times the bare backbone, because the heads cost more than leaving saves"
        if f"{own.cost:.3f}" == "1.000":
            because = "as much as the bare backbone, because leaving saves no more than the heads cost"
        advice = "Lower T, train longer" if lower_t else "Train longer"
        return f"Early exit does not pay: it costs {because}. {advice}, or use cheaper or fewer heads."
    rivals = [way for way in rivals if way.cost <= own.cost + ROUNDING and way.lost <= own.lost + ROUNDING]
    if rivals:
        best = min(rivals, key=lambda way: (way.lost, way.cost))
        costs = "costs less" if round(best.cost, 4) < round(own.cost, 4) else "costs the same"
        return f"{best.name} {as_good} and {costs}: {best.words}."
    if speedup is not None and speedup < SLOWER:
        return (
            f"The cost is {percent(1 - own.cost)} lower, but the measured time is {1 / speedup:.2f} times the bare backbone's {where}, so "
            "early exit does not pay here. ptee bench times other batch sizes."
        )
    if own.cost > 1 - LITTLE:
        saved = percent(1 - own.cost)
        return f"Early exit hardly pays: it saves {saved} of the cost. Allow a larger loss, train longer, or take a smaller network."
    return ""
