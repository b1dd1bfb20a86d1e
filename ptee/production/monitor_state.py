"""What `monitor.as_dict()` wrote, checked before a monitor goes on from it: a file may come from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from ptee._common.errors import PteeError
from ptee._common.validation import Name, Number, ReadRecord, Text, Whole, from_pydantic
from ptee.production.curve import MOST_POINTS, Share

AGAIN = "Give what monitor.as_dict() returned."
UNFIT = "its parts do not fit each other."

Positive = Annotated[Number, Field(ge=0, le=1e18)]
Moment = Annotated[Number, Field(ge=0, le=1e11)]  # seconds since 1970
LogCapital = Annotated[Number, Field(ge=-10, le=1000)]  # far beyond what any capital reaches before an alarm
Count = Annotated[Whole, Field(ge=0, le=10**18)]
Several = Field(max_length=MOST_POINTS + 1)


class _Audits(ReadRecord):
    audited: Count
    differed: Count

    @model_validator(mode="after")
    def _no_more_than_all(self) -> Self:
        if self.differed > self.audited:
            raise PteeError(UNFIT)
        return self


class SavedAlarm(_Audits):
    """An `Alarm`."""

    row: Count
    since_row: Count
    since: Annotated[Name, Field(max_length=40)]
    max_fidelity_drop: Share


class SavedBet(_Audits):
    """A `Bet`."""

    differ: Positive
    agree: Positive
    capital: Positive
    cusum: LogCapital
    since: Count
    moment: Moment


class SavedTest(ReadRecord):
    """A `PromiseTest`."""

    seen: Count
    bets: Annotated[tuple[SavedBet, ...], Several]


class SavedSettings(ReadRecord):
    """What the promise is of."""

    threshold: Annotated[tuple[Number, ...], Several]
    off: Annotated[tuple[Count, ...], Several]
    answers: Text
    confidence: Text


class State(_Audits):
    """All that a monitor knows."""

    exits: Annotated[tuple[Text, ...], Several]
    rows: Annotated[tuple[Count, ...], Several]
    cost: Annotated[tuple[Positive, ...], Several]
    confidence_sum: Annotated[tuple[Positive, ...], Several]
    failed: Count
    seconds: Positive
    max_fidelity_drop: Share | None
    alpha: Share
    promised_for: SavedSettings | None
    test: SavedTest | None
    alarm: SavedAlarm | None

    @property
    def images(self) -> int:
        """All that were counted."""
        return sum(self.rows)

    @property
    def _alarm_is_missing(self) -> bool:
        bets = () if self.test is None or self.alarm is not None else self.test.bets
        return bool(bets) and self.alpha * sum(bet.capital for bet in bets) / len(bets) >= 1

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        numbers = [len(each) for each in (self.rows, self.cost, self.confidence_sum)]
        latest = [bet.since for bet in self.test.bets] if self.test else []
        audits = [bet.audited for bet in self.test.bets] + [self.test.seen] if self.test else []
        if self.alarm is not None:
            latest += [self.alarm.row, self.alarm.since_row]
            audits.append(self.alarm.audited)
        fit = {*numbers} == {len(self.exits)} and self.audited <= self.images and not self._alarm_is_missing
        if not fit or max(latest, default=0) > self.images or max(audits, default=0) > self.audited:
            raise PteeError(UNFIT)
        return self


def read_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> State:
    """A state that was saved by a monitor like this one, whose own state is `own`."""
    try:
        saved = State.model_validate(json.loads(json.dumps(state)))
    except ValidationError as why:
        raise PteeError(f"This is no state of a monitor: {from_pydantic(why)} {AGAIN}") from why
    except (TypeError, ValueError, RecursionError) as why:
        raise PteeError(f"This is no state of a monitor. {AGAIN}") from why
    _require_same(saved, own)
    return saved


def _require_same(saved: State, own: Mapping[str, Any]) -> None:
    theirs = saved.model_dump(mode="json")
    pairs = {name: (theirs[name], own[name]) for name in ("exits", "max_fidelity_drop")}
    pairs["1 - confidence"] = theirs["alpha"], own["alpha"]
    if theirs["promised_for"] and own["promised_for"]:
        pairs |= {name: (value, own["promised_for"][name]) for name, value in theirs["promised_for"].items()}
    for name, (one, other) in pairs.items():
        if one != other:
            raise PteeError(
                f"This state is of another monitor: its {name} is {one!r:.60}, and here it is {other!r:.60}. Begin without it."
            )
    if _stakes(theirs["test"]) != _stakes(own["test"]):
        raise PteeError(f"This is no state of a monitor: {UNFIT} {AGAIN}")


def _stakes(test: Mapping[str, Any] | None) -> Sequence[tuple[float, float]]:
    return [] if test is None else [(bet["differ"], bet["agree"]) for bet in test["bets"]]
