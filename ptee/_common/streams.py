"""Standard streams that are closed, full, or read by nobody. No heavy library is imported for it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

NOBODY_READS = 141  # the status of a program that writes to a pipe without a reader


def open_closed() -> None:
    """Let standard streams that are closed lead nowhere. Otherwise the next file would get their number, and their text."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w"))  # noqa: SIM115 - until the process ends


def lead_nowhere(name: str = "stdout") -> None:
    """Let a standard stream lead nowhere, with what it still holds: Python would write that at the end."""
    null = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    with suppress(OSError, ValueError):  # a program has put something without a number in its place
        os.dup2(null.fileno(), getattr(sys, name).fileno())
    setattr(sys, name, null)


def unwritable(why: OSError) -> tuple[str, int]:
    """What to say where standard output cannot be written, and the exit status."""
    if isinstance(why, BrokenPipeError):
        return (
            "Nobody reads the output any more, as after head, so ptee stopped. Send it to a file to have all of it.",
            NOBODY_READS,
        )
    return f"The output cannot be written: {why.strerror or why}. Send it elsewhere, such as > FILE.", 2
