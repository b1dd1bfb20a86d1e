"""What a user sets on a model at any time: thresholds, exits that are off, the confidence, and own or blended answers.

A row leaves at the first exit n with h_n >= T_n. A user gives one number for all exits or one for each exit; for a single
call, also one for each row and exit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptee._common.devices import widest
from ptee._common.errors import PteeError, unknown, warn
from ptee._common.process import Lock
from ptee._common.text import shown
from ptee._common.validation import whole
from ptee.exits.blend import BLENDED, OWN, Blend, confidence_of_blend, require_blend
from ptee.exits.confidence import Calibrated, find_confidence, not_below
from ptee.exits.config import doubt, not_a_number, threshold_numbers, wrong_number
from ptee.exits.plan import Plan
from ptee.exits.rule import ExitRule

Thresholds = float | Sequence[float] | Tensor
DEFAULT_THRESHOLD = 0.5  # PTEENet's


class Settings:
    """Of an early-exit model. `choosing` is held while several are set, or read, that belong together."""

    plan: Plan
    calibrated: Calibrated | None
    blend: Blend | None
    choosing: Lock

    @property
    def threshold(self) -> list[float]:
        """T of each exit; a row leaves at the first exit n with h_n >= T_n.

        Set it at any time, to one number or to one for each exit. Above 1 no row leaves. At 0 every row leaves, except
        one whose confidence is not finite: it never leaves. Below 0 is as 0. Raises PteeError for NaN, for what is no number and for a
        wrong number of values. Warns of what was meant as a percentage, such as 70.
        """
        return list(self._thresholds)

    @threshold.setter
    def threshold(self, value: Thresholds) -> None:
        self._thresholds = for_each_exit(value, len(self.plan.exits))

    @property
    def confidence(self) -> str:
        """What h is computed from: a name of `CONFIDENCES`, such as "learned", "max_prob" or "calibrated".

        Set it at any time, and then choose the thresholds again (`ptee.tune`): they stay as they are, but h means
        something else. Raises PteeError for an unknown name, and for "calibrated" before `ptee.calibrate`.
        """
        return self.plan.confidence

    @confidence.setter
    def confidence(self, name: str) -> None:
        find_confidence(name, self.calibrated)
        if self.answers == BLENDED:
            require_blend(self.blend, name, self.off, len(self.plan.exits))
        self.plan = self.plan.with_confidence(name)

    @property
    def answers(self) -> str:
        """ "own": an exit answers by itself. "blended": it adds up what the exits so far have said, and so does the end.

        Set it at any time, and then choose the thresholds again (`ptee.tune`, which also fits the weights of the blend). A row
        whose thresholds are all above 1 gets the backbone's own answer in any case. Raises PteeError for another value, and
        for "blended" if there are no weights for the exits that are on.
        """
        return self._answers

    @answers.setter
    def answers(self, value: str) -> None:
        if value not in (OWN, BLENDED):
            raise unknown("kind of answers", value, (OWN, BLENDED), argument="answers")
        if value == BLENDED:
            require_blend(self.blend, self.confidence, self.off, len(self.plan.exits))
        self._answers = value

    @property
    def rule(self) -> ExitRule:
        """What the exits answer and how sure they are, as this model is set now."""
        blend = self.blend if self.answers == BLENDED else None
        name = self.confidence if blend is None else confidence_of_blend(self.confidence)
        return ExitRule(find_confidence(name, self.calibrated), blend, self.off, len(self.plan.exits))

    def choose(self, threshold: Thresholds, off: Sequence[int], blend: Blend | None) -> None:
        """Set thresholds, exits that are off and the weights of blended answers (None: own answers) together.

        A call that another thread begins meanwhile has all of the new or all of the old.
        """
        with self.choosing:
            self._answers = OWN
            self.threshold, self.off, self.blend = threshold, off, blend or self.blend
            self.answers = OWN if blend is None else BLENDED

    @property
    def off(self) -> tuple[int, ...]:
        """The numbers of the exits that are switched off: no row leaves there, whatever T is.

        Their heads do not run and cost nothing, unless the head of a later exit builds on their logits. Set it at any
        time. Raises PteeError for a number that is no exit.
        """
        return self.plan.off

    @off.setter
    def off(self, value: Sequence[int]) -> None:
        numbers = exit_numbers(value, len(self.plan.exits))
        if self.answers == BLENDED:
            require_blend(self.blend, self.confidence, numbers, len(self.plan.exits))
        self.plan = self.plan.switched_off(numbers)


def for_each_exit(threshold: Thresholds, exits: int) -> tuple[float, ...]:
    """T_0 .. T_{E-1}, from one number or one for each exit. Refuses NaN, what is no number, and a wrong number of values.

    Warns of what was meant as a percentage; so does `for_each_row`.
    """
    given = _as_tensor(threshold)
    if tuple(given.shape) not in ((), (1,), (exits,), (1, 1), (1, exits)):
        many = " x ".join(map(str, given.shape))
        raise wrong_number(many, exits, threshold)
    _refuse_nan(given)
    _doubt(given.flatten().tolist())
    return tuple(given.expand(1, exits)[0].tolist())


def for_each_row(threshold: Thresholds, exits: int, rows: int, device: torch.device) -> list[float | Tensor]:
    """The threshold of each exit, a number or a tensor (b,) on the device, from anything that broadcasts to (b, E)."""
    wide = _as_tensor(threshold)
    if wide.dim() > 2 or any(
        have not in (1, want) for have, want in zip(reversed(wide.shape), (exits, rows), strict=False)
    ):
        raise PteeError(
            f"A threshold of shape {tuple(wide.shape)} does not broadcast to (b, E) = ({rows}, {exits}). Give a number, "
            f"one for each of the {exits} exits, or one for each row and exit.",
            argument="threshold", value=threshold,
        )  # fmt: skip
    _refuse_nan(wide)
    if wide.dim() < 2 and wide.device.type == "cpu":
        _doubt(wide.flatten().tolist())
        return wide.expand(exits).tolist()
    here = _moved(wide, device)  # one transfer for all exits
    return list(here.expand(exits).unbind() if here.dim() < 2 else here.expand(rows, exits).unbind(1))


def exit_numbers(value: int | Sequence[int], exits: int) -> list[int]:
    """The numbers of some exits, given as one or several. Refuses a number that is no exit or is given twice."""
    try:
        if isinstance(value, str):  # else a list of its letters
            raise TypeError("a text")
        one = whole(value)
        given = list(value) if one is None else [one]  # type: ignore[arg-type]  # a truth value is no list
    except TypeError:
        words = (
            f"Exits that are off are given by their numbers, such as [1], not as {shown(value)}; [] switches all on."
        )
        raise PteeError(words, argument="off", value=value) from None
    numbers = [number for n in given if (number := whole(n)) is not None]
    if len({n for n in numbers if n in range(exits)}) < len(given):
        text = f"Exits {given} cannot be off: exits have the numbers 0 to {exits - 1}, each once."
        raise PteeError(text, argument="off", value=value)
    return numbers


def _as_tensor(threshold: Thresholds) -> Tensor:
    """Tensors stay in their place and type, but for whole numbers; all else becomes float64, not rounded to float32 first."""
    if isinstance(threshold, Tensor) and threshold.is_floating_point():
        return threshold.detach()
    given = torch.from_numpy(threshold_numbers(threshold))
    return _moved(given, threshold.device) if isinstance(threshold, Tensor) else given


def _refuse_nan(threshold: Tensor) -> None:
    if threshold.isnan().any():
        raise not_a_number(threshold)


def _doubt(threshold: list[float]) -> None:
    if words := doubt(threshold):
        warn(words)


def _moved(threshold: Tensor, device: torch.device) -> Tensor:
    return not_below(threshold, min(threshold.dtype, widest(device), key=lambda dtype: dtype.itemsize), device)
