"""A child process that has only the thread that forked it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable


def in_a_child(work: Callable[[], bool]) -> bool:
    """What this returns in a process that is forked here. A child that hangs or fails is no answer."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=lambda: answers.put(bool(work())))
    child.start()
    child.join(30)
    if hangs := child.is_alive():
        child.kill()
        child.join()
    assert not hangs, "the child hangs"
    assert child.exitcode == 0
    return answers.get()
