"""What belongs to the whole process is changed here, by one thread at a time, and put back.

Standard output, log levels, warning filters, the environment, torch's switches and its random numbers are shared by all
threads. Two threads that each save and restore them lose what was there: the second saves what the first has put there, and
restores it last. So one lock is held for as long as anything of it is changed, and whoever changes it does so here.

Random numbers have a lock of their own, as a training keeps them for hours, and others may load a model meanwhile. Whoever
needs both takes that one first.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import checkpoint

LOUD = ("timm", "huggingface_hub", "httpx", "urllib3", "filelock")  # loggers that tell of downloads and retries

_CHANGES = threading.RLock()
_RANDOM = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """No other thread changes the process's state meanwhile. May be nested, and used as a decorator."""
    with _CHANGES:
        yield


class _Change:
    """A change of the process's state: made when it is first entered, undone when it is left as often, in any order.

    Args:
        make: gives a context that makes the change and undoes it.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make, self._users = make, 0
        self._made: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> None:
        _CHANGES.acquire()
        try:
            if not self._users:
                self._made = self._make()
                self._made.__enter__()
            self._users += 1
        except BaseException:
            _CHANGES.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._users -= 1
            if not self._users:
                self._made.__exit__(None, None, None)
        finally:
            _CHANGES.release()


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Unheard:
    """Standard output for all threads but the one that made this, whose words go nowhere."""

    def __init__(self, stdout: Any) -> None:
        self._stdout, self._thread = stdout, threading.get_ident()

    def write(self, text: str) -> int:
        """Write, or pretend to."""
        return len(text) if threading.get_ident() == self._thread else self._stdout.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)


@contextmanager
def _without_stdout() -> Iterator[None]:
    before = sys.stdout
    if before is None:  # a program without a console
        yield
        return
    sys.stdout = unheard = _Unheard(before)
    try:
        yield
    finally:
        if sys.stdout is unheard:  # else another thread has redirected it meanwhile, and will put it back itself
            sys.stdout = before


@contextmanager
def _without_logs() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_pickles() -> Iterator[None]:
    safe, unsafe = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch refuses to have both
    before = {name: os.environ.pop(name) for name in (safe, unsafe) if name in os.environ}
    os.environ[safe] = "1"
    try:
        yield
    finally:
        os.environ.pop(safe, None)
        os.environ.update(before)


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Uncheckpointed:
    """torch's reentrant checkpointing for all threads but the one that made this, which just calls what was to be called."""

    def __init__(self) -> None:
        self._own, self._thread = checkpoint.CheckpointFunction, threading.get_ident()

    def apply(self, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """In place of the same of torch.autograd.Function."""
        if threading.get_ident() == self._thread:
            return function(*args)
        return self._own.apply(function, preserve_rng_state, *args)


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    before = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _Uncheckpointed()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before  # type: ignore[misc]


no_warnings = _Change(_without_warnings)
no_stdout = _Change(_without_stdout)  # of this thread; others go on printing
no_logs = _Change(_without_logs)
no_pickles = _Change(_without_pickles)  # torch reads files as data, even where a library asks it to unpickle them
no_fused_attention = _Change(
    _without_fused_attention
)  # nn.MultiheadAttention and nn.TransformerEncoderLayer show their parts
no_checkpointing = _Change(_without_checkpointing)  # of this thread: a trace does not see into it


@contextmanager
def own_random_numbers(seed: int | None = None) -> Iterator[None]:
    """torch's random numbers are this thread's own, and go on afterwards as if none had been drawn.

    Waits for another thread that has them.

    Args:
        seed: to begin with; None goes on from where they are.
    """
    with _RANDOM, _forked():
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def few_random_numbers() -> Iterator[None]:
    """The same for a moment, without waiting: if another thread has them, they are not the user's, who misses none of them."""
    free = _RANDOM.acquire(blocking=False)
    try:
        with _forked() if free else nullcontext():
            yield
    finally:
        if free:
            _RANDOM.release()


def _forked() -> AbstractContextManager[None]:
    """Those of GPUs, too, once there are some: a seed is for all of them."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(devices=gpus)
