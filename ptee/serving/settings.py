"""What may be changed of a server while it runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ptee._common.errors import Argument, PteeError
from ptee._common.process import Lock
from ptee._common.validation import FrozenConfig, Number, Whole
from ptee.exits.config import wrong_number
from ptee.production.settings import in_force

TOKEN = "PTEE_TOKEN"
SHORTEST_TOKEN, LONGEST_TOKEN = 16, 1000
WISHES = ("max_cost", "max_drop", "max_fidelity_drop")
OF_PIECES = ("off", "confidence", "answers")  # a change of these takes the model apart again

T = Annotated[Number, Field(ge=-1, le=2)]


class Change(FrozenConfig):
    """What a call may set; what is None stays as it is.

    Attributes:
        threshold: T of all exits, or of each.
        max_cost: thresholds from the curve of the run: what loses least at this mean cost.
        max_drop: the cheapest that lose no more accuracy.
        max_fidelity_drop: the cheapest that change no more of the answers.
        off: exits at which nobody leaves.
        confidence: what h is computed from.
        answers: "own" or "blended".
    """

    threshold: T | Annotated[tuple[T, ...], Field(min_length=1, max_length=1000)] | None = None
    max_cost: Number | None = None
    max_drop: Number | None = None
    max_fidelity_drop: Number | None = None
    off: Annotated[tuple[Annotated[Whole, Field(ge=0)], ...], Field(max_length=1000)] | None = None
    confidence: Annotated[str, Field(strict=True, max_length=60)] | None = None
    answers: Literal["own", "blended"] | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is to be set."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


def read_change(values: Any) -> Change:
    """A call that changes settings, checked.

    Raises:
        PteeError: in one line.
    """
    if not isinstance(values, dict) or not values:
        names = ", ".join(Change.model_fields)
        raise PteeError(f"Settings come as a JSON object with some of {names}.")
    change = Change(**values)
    if sum(name in change.given for name in ("threshold", *WISHES)) > 1:
        raise PteeError(f"Give one of threshold, {', '.join(WISHES)}.")
    return change


class ModelSettings:
    """Those of an early-exit model.

    Args:
        model: which is served.
        exchange: gets a copy of the model, set as it is to be (it shares the weights); whether other pieces must be made of that; and
            what sets the model itself, to call while no row is between the pieces.
    """

    def __init__(self, model: Any, exchange: Callable[[Any, bool, Callable[[], None]], None]) -> None:
        self._model, self._exchange = model, exchange
        self._lock = Lock()  # one change at a time

    def now(self) -> dict[str, Any]:
        """Those in force."""
        return _settings_of(self._model)

    def change(self, values: Any) -> dict[str, Any]:
        """Set some, all or none. Gives those in force then."""
        given = read_change(values).given
        with self._lock:
            if given:
                draft = copy.copy(self._model)
                _set(draft, given)
                if draft.confidence != self._model.confidence and not {"threshold", *WISHES} & given.keys():
                    raise PteeError(
                        "The thresholds were chosen for another confidence. Give threshold, too, or one of "
                        f"{', '.join(WISHES)}."
                    )
                names = {"threshold" if name in WISHES else name for name in given}
                wanted = {name: value for name, value in _settings_of(draft).items() if name in names}
                self._exchange(draft, not names.isdisjoint(OF_PIECES), lambda: self._put_in_force(wanted))
            return self.now()

    def _put_in_force(self, wanted: dict[str, Any]) -> None:
        before, answered_by = self.now(), in_force(self._model)
        try:
            _set(self._model, wanted)
        except BaseException:
            _set(self._model, before)
            raise
        monitor = self._model.monitored
        if monitor is not None and monitor.max_fidelity_drop is not None and in_force(self._model) != answered_by:
            monitor.renew(monitor.max_fidelity_drop)  # the same promise, for the thresholds that answer from now on


def _settings_of(model: Any) -> dict[str, Any]:
    return {
        "threshold": model.threshold,
        "off": list(model.off),
        "confidence": model.confidence,
        "answers": model.answers,
    }


def _set(model: Any, values: dict[str, Any]) -> None:
    wish = {name: values[name] for name in WISHES if name in values}
    if "answers" in values:  # blended answers allow fewer other settings
        model.answers = "own"
    for name in ("off", "confidence", "answers", "threshold"):
        if name in values:
            setattr(model, name, values[name])
    if wish:
        model.threshold = model.threshold_for(**wish)


class FixedSettings:
    """Those of what was exported: only thresholds can be others.

    Attributes:
        threshold: T of each exit.
    """

    def __init__(self, threshold: list[float], fixed: dict[str, Any]) -> None:
        self.threshold, self._fixed = threshold, fixed

    def now(self) -> dict[str, Any]:
        """Those in force."""
        return {"threshold": self.threshold, **self._fixed}

    def change(self, values: Any) -> dict[str, Any]:
        """Set the thresholds. Gives all settings then."""
        given = read_change(values).given
        if wrong := [name for name in given if name != "threshold"]:
            raise PteeError(
                f"{wrong[0]} cannot be changed in an exported model: only threshold can. Give threshold, or set {wrong[0]} before it is exported."
            )
        if not given:
            return self.now()
        many, exits = given["threshold"], len(self.threshold)
        each = [float(t) for t in many] if isinstance(many, tuple) else [float(many)]
        if len(each) not in (1, exits):
            raise wrong_number(str(len(each)), exits, many)
        self.threshold = each if len(each) == exits else each * exits
        return self.now()


def read_token(file: Path | None) -> str:
    """The token that changes settings: of a file, or of the environment (PTEE_TOKEN); empty if there is none.

    Raises:
        PteeError: if the file cannot be read, or the token is too short to be safe.
    """
    place = f"The file {file}" if file is not None else TOKEN
    try:
        text = os.environ.get(TOKEN, "") if file is None else file.read_text(encoding="utf-8")[: LONGEST_TOKEN + 1]
    except (OSError, ValueError) as why:
        raise PteeError(
            f"The token cannot be read from {file}: {why}. Give ", Argument("token_file", "FILE"), "."
        ) from why
    token = text.strip()
    if file is None and not token:
        return ""
    if (
        not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise PteeError(
            f"{place} holds no token: {SHORTEST_TOKEN} to {LONGEST_TOKEN} letters and digits without blanks. Make one: openssl rand -hex 32"
        )
    return token
