"""The lines that a run gets in a comparison, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ptee._common.errors import PteeError, unknown
from ptee.exits.config import BLENDED, CONFIDENCES, MAX_PROB, OWN

LINES = (
    "own",
    BLENDED,
    "one_threshold",
    MAX_PROB,
    "entropy",
    "patience",
    "oracle",
    "truncation",
)  # of a run by default
WITHOUT_LOGITS = {"own", "one_threshold", "oracle", "truncation"}
WORDS = {MAX_PROB: "max probability", "entropy": "entropy (BranchyNet)"}  # of confidences; the others have their name


class Way(NamedTuple):
    """How a run decides which images leave.

    Attributes:
        words: added to the run's name.
        confidence: a key of `CONFIDENCES`; None for the run's own.
        one: all exits have the same threshold.
        answers: "own" or "blended"; None for the run's own.
    """

    words: str
    confidence: str | None = None
    one: bool = False
    answers: str | None = OWN


def ways() -> dict[str, Way]:
    """The lines of a run with thresholds, by name: with its own confidence, and with each of `CONFIDENCES`."""
    others = {name: Way(f", {WORDS.get(name, name)}", name) for name in CONFIDENCES}
    run = {"own": Way("", answers=None), BLENDED: Way(", blended", answers=BLENDED)}
    return run | {"one_threshold": Way(", one T", one=True, answers=None)} | others


def checked_lines(lines: Sequence[str]) -> tuple[str, ...]:
    """Names of a run's lines, in the order of the table. At least one of them must have thresholds."""
    deciding = ways()
    known = (*deciding, "oracle", "truncation")
    for name in lines:
        if name not in known:
            raise unknown("line", name, known, argument="lines")
    if not set(lines) & set(deciding):
        raise PteeError(
            f"None of the lines ({', '.join(lines) or 'none'}) has thresholds to choose. Add one or more of {', '.join(deciding)}."
        )
    return tuple(name for name in known if name in lines)
