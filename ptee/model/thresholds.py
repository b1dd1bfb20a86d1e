"""Thresholds as a user gives them, checked, and expanded to one for each exit.

A row leaves at the first exit n with h_n >= T_n. A user gives one number for all exits or one for each exit; for a single
call, also one for each row and exit.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ptee._common.errors import PteeError, warn
from ptee._common.text import shown
from ptee.exits.config import doubt, not_a_number, threshold_numbers, wrong_number

Thresholds = float | Sequence[float] | Tensor


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
        given = [value] if isinstance(value, int) else list(value)
    except TypeError:
        words = (
            f"Exits that are off are given by their numbers, such as [1], not as {shown(value)}; [] switches all on."
        )
        raise PteeError(words, argument="off", value=value) from None
    try:
        numbers = [operator.index(n) for n in given if not isinstance(n, bool)]
    except TypeError:
        numbers = []
    if len({n for n in numbers if n in range(exits)}) < len(given):
        text = f"Exits {given} cannot be off: exits have the numbers 0 to {exits - 1}, each once."
        raise PteeError(text, argument="off", value=value)
    return numbers


def _as_tensor(threshold: Thresholds) -> Tensor:
    """Tensors stay in their place and type, but for whole numbers; all else becomes float64, not rounded to float32 first."""
    if isinstance(threshold, Tensor) and threshold.is_floating_point():
        return threshold.detach()
    given = torch.from_numpy(threshold_numbers(threshold))
    return given.to(threshold.device, _widest(threshold.device)) if isinstance(threshold, Tensor) else given


def _refuse_nan(threshold: Tensor) -> None:
    if threshold.isnan().any():
        raise not_a_number(threshold)


def _doubt(threshold: list[float]) -> None:
    if words := doubt(threshold):
        warn(words)


def _moved(threshold: Tensor, device: torch.device) -> Tensor:
    return threshold.to(device, min(threshold.dtype, _widest(device), key=lambda dtype: dtype.itemsize))


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
