"""The head of each exit by name: one for all or one for each, the front network's among them, "auto" ones sized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ptee._common.errors import PteeError
from ptee.analysis.cut_points import Cut
from ptee.exits.front import FRONT, FrontHead
from ptee.exits.heads import AUTO, BUILDS_ON, SIZED
from ptee.exits.residual_head import sized_names

HEAD_BUDGET = 0.05  # share of the backbone that an "auto" head may cost where nothing is said


def head_names(
    head: str | Sequence[str],
    budget: float | Sequence[float] | None,
    cuts: Sequence[Cut],
    macs: int,
    classes: int,
    front: FrontHead | str | None = None,
) -> list[str]:
    """The name of each exit's head; "auto" heads are sized.

    Args:
        head: as of `make_plan`.
        budget: as of `make_plan`.
        cuts: where the exits stand.
        macs: B.
        classes: K.
        front: the first exit's head, where it is a network of its own; "auto" for a learned head there.

    Raises:
        PteeError: if there is a budget and nothing to size, or it is none.
    """
    network = front if isinstance(front, FrontHead) else None
    names = _names(head, len(cuts), front)
    if set(SIZED) & set(names):
        shares = _budgets(budget, len(cuts), network)
        first = network.passes_on if network else None
        return sized_names(names, [cut.layout for cut in cuts], [share * macs for share in shares], classes, first)
    if budget is not None:
        raise PteeError(
            f"A head budget sizes auto heads, and the heads are {', '.join(names)}. Take head auto, or leave it out."
        )
    return names


def _names(head: str | Sequence[str], exits: int, front: FrontHead | str | None) -> list[str]:
    """Of the heads; what stands in front goes without saying. One name for all: the first head has none to build on."""
    if front is None:
        first, *others = _one_each("head", head, exits)
        return [first.removesuffix(BUILDS_ON) if len(_as_list(head)) == 1 else first, *others]
    if isinstance(front, str):
        given = _as_list(head)
        return [AUTO, *given * (exits - 1)] if len(given) == 1 else _one_each("head", head, exits)
    if isinstance(head, Sequence) and not isinstance(head, str) and len(head) == exits and head[0] == FRONT:
        head = head[1:]
    return [FRONT, *(_one_each("head", head, exits - 1) if exits > 1 else [])]


def _budgets(given: float | Sequence[float] | None, exits: int, front: FrontHead | None) -> list[float]:
    """Of the heads; a front network has none."""
    own = _one_each("head budget", HEAD_BUDGET if given is None else given, exits - (front is not None))
    for budget in own:
        if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget < math.inf:
            raise PteeError(f"A head budget {budget!r} is no share of the backbone above 0. Give one such as 0.05.")
    return [0.0] * (front is not None) + own


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _one_each(what: str, given: Any, exits: int) -> list[Any]:
    """One for each exit."""
    each = _as_list(given)
    if len(each) not in (1, exits):
        raise PteeError(f"{len(each)} values of {what} for {exits} exits. Give one, or one for each exit.")
    return each * (exits if len(each) == 1 else 1)
