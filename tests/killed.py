"""A process that is killed while it renames files: as tests play it in their own, and a real one."""

from __future__ import annotations

import signal
import subprocess
import sys
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


COMMAND = """
import os, pathlib, signal, sys
from ptee.cli.main import main
replace, left = pathlib.Path.replace, [int(sys.argv[1])]
def counted(self, to):
    if pathlib.Path(to).absolute().parent == pathlib.Path(sys.argv[2]).absolute():
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, to)
pathlib.Path.replace = counted
main(sys.argv[3:])
"""


def command_killed_at(n: int, folder: str, *words: object) -> None:
    """The command in a process of its own, which gets SIGKILL at its n-th rename into a folder, counted from 0."""
    line = [sys.executable, "-c", COMMAND, str(n), folder, *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done
