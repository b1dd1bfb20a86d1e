"""Warnings that name the line of the caller's own code, however deep in ptee they arise."""

from __future__ import annotations

import sys
import warnings
from itertools import count

WITHIN = {"ptee", "torch", "accelerate", "contextlib", "functools"}  # no line of these is the caller's


def warn(text: str) -> None:
    """Warn at the line of the caller's code that called ptee."""
    frame = sys._getframe()
    for level in count(1):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in WITHIN or frame.f_back is None:
            warnings.warn(text, stacklevel=level)
            return
        frame = frame.f_back
