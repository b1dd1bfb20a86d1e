"""A process that is killed while it renames files, as tests play it in their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest


class Killed(BaseException):
    """Nothing catches it."""


@contextmanager
def killed_at(n: int) -> Iterator[list[bool]]:
    """The process is killed at its n-th rename, counted from 0: neither that one nor any later one is made.

    Gives a list that afterwards says whether it came so far.
    """
    replace, seen, killed = Path.replace, [0], []

    def counted(self: Path, to: Path) -> Any:
        seen[0] += 1
        if seen[0] > n:
            raise Killed
        return replace(self, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counted)
        with suppress(Killed):
            yield killed
    killed.append(seen[0] > n)
