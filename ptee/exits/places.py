"""Places of exits in a person's words: a rule, fractions of the cost, or names of modules."""

from __future__ import annotations

from collections.abc import Sequence

from ptee._common.errors import unknown
from ptee.analysis.cut_points import survey
from ptee.backbones.load import Backbone
from ptee.exits.placement import INPUT, PLACEMENTS

MOST_NAMES = 12  # of rules and blocks in a message


def read_places(given: str | float | Sequence[float | str] | None, backbone: Backbone) -> str | list[float | str]:
    """Which of the three a person means.

    Args:
        given: one word, several between commas, or a list; "input" may stand first.
        backbone: whose modules may be named.

    Returns:
        A rule of `PLACEMENTS`, or a list of fractions or of module names.

    Raises:
        UnknownName: if a single word is neither a rule nor a module.
    """
    parts = (
        given.split(",") if isinstance(given, str) else [given] if isinstance(given, int | float) else list(given or [])
    )
    names = [name for name, _ in backbone.module.named_modules() if name]
    parts = [_name_or_number(part, names) for part in parts]
    numbers = [part if isinstance(part, int | float) else None for part in parts if part != INPUT]
    if all(number is not None for number in numbers):
        return [part for part in parts if part == INPUT] + [n for n in numbers if n is not None]
    if len(parts) != 1 or parts[0] in (INPUT, *names):
        return [str(part) for part in parts]
    if parts[0] in PLACEMENTS:
        return str(parts[0])
    cuts = survey(backbone.module.eval(), backbone.input.input_size).cuts
    blocks = [name for name in cuts if any(other.startswith(f"{name}.") for other in names)]
    raise unknown("placement or module", str(parts[0]), list(cuts), first=[*PLACEMENTS, *blocks][:MOST_NAMES])


def _name_or_number(part: float | str, names: Sequence[str]) -> float | str:
    """A module may be called "0"; then its name is meant, but a number between 0 and 1 is a fraction."""
    text = part.strip() if isinstance(part, str) else f"{part:g}"
    if text in names and (isinstance(part, str) or not 0 < part < 1):
        return text
    try:
        return float(part)
    except ValueError:
        return text
