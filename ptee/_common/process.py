"""Changes of what belongs to the whole process: one thread at a time makes them, and undoes them.

Standard output, log levels, warning filters, the environment, torch's switches and its random numbers are shared by all
threads. If two threads each save and restore them, the second saves what the first has set, and restores that last. So one
lock is held as long as anything of it is changed, and all changes are made through this module.

Random numbers have a lock of their own, because a training keeps them for hours, and others may load a model meanwhile. Code
that needs both locks takes the one of the random numbers first. A `LongChange` holds no lock while it lasts.

A child process has only the thread that forked it. The locks and changes of all others end as it begins (`Lock`).

Only standard streams that are closed, full or read by nobody are changed without the lock, as a program begins or ends.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

# Loggers that tell of downloads and retries, and of what torch.export and fake runs raise in any case.
LOUD = (
    *("timm", "huggingface_hub", "httpx", "urllib3", "filelock", "ray", "ray.serve"),
    *("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._subclasses.fake_tensor"),
)

# Libraries that report their use over the network, unless the environment says no.
REPORTS_OFF = {"ORT_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}

NOBODY_READS = 141  # the status of a program that writes to a pipe without a reader


class Lock:
    """A lock for threads that a forked child finds free, even if another thread of its parent held it. May be taken again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take it; without `blocking` only if no other thread has it. Returns whether it was taken."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:  # a copy is a free lock
        return Lock, ()

    def _renew(self) -> bool:
        """Become a new lock if another thread holds this one, and return whether one did."""
        held = not self._lock.acquire(blocking=False)
        if held:
            self._lock = threading.RLock()
        else:
            self._lock.release()
        return held


_LOCKS: WeakSet[Lock] = WeakSet()
_CHANGES = Lock()
_RANDOM = Lock()
_IN_FORCE: list[Change] = []  # in the order in which they were made


@contextmanager
def alone() -> Iterator[None]:
    """No other thread changes the process's state meanwhile. May be nested, and used as a decorator."""
    with _CHANGES:
        yield


class Change:
    """A change of the process's state, from a context that makes and undoes it.

    The first to enter makes it, and the last to leave undoes it, in any order.
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
                _IN_FORCE.append(self)
            self._users += 1
        except BaseException:
            _CHANGES.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._users -= 1
            if not self._users:
                _IN_FORCE.remove(self)
                self._made.__exit__(None, None, None)
        finally:
            _CHANGES.release()

    def _end(self) -> None:
        """Undo it, whoever has entered it."""
        self._users = 0
        _IN_FORCE.remove(self)
        self._made.__exit__(None, None, None)


class LongChange(Change):
    """A change that lasts for hours. The lock is held only while it is made and while it is undone.

    Other changes come and go meanwhile, so what they set must suit this one, too. It goes on in a forked child: a training's
    loaders are its children.
    """

    def __enter__(self) -> None:
        super().__enter__()
        _CHANGES.release()

    def __exit__(self, *_: object) -> None:
        _CHANGES.acquire()
        super().__exit__()


def _renew() -> None:
    """In a forked child, free what other threads of its parent held, and undo what they changed."""
    for lock in list(_LOCKS):
        taken = lock._renew()
        if lock is _CHANGES and taken:
            for change in [change for change in reversed(_IN_FORCE) if not isinstance(change, LongChange)]:
                with suppress(Exception):  # the other thread was just making or undoing it
                    change._end()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_renew)


@Change
@contextmanager
def no_warnings() -> Iterator[None]:
    """No warning is shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@Change
@contextmanager
def float32_by_default() -> Iterator[None]:
    """What is built has the same numbers, whatever number type torch makes by default."""
    import torch

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        yield
    finally:
        torch.set_default_dtype(before)


@Change
@contextmanager
def no_logs() -> Iterator[None]:
    """The loud loggers are silent."""
    levels = {name: logging.getLogger(name).level for name in LOUD}
    try:
        for name in LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class _Muted:
    """A stream that drops what the thread that made it writes. Other threads go on printing."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _without(name: str) -> Iterator[None]:
    before = getattr(sys, name)
    if before is None:  # a program without a console
        yield
        return
    muted = _Muted(before)
    setattr(sys, name, muted)
    try:
        yield
    finally:
        if getattr(sys, name) is muted:  # else another thread has redirected it meanwhile, and will restore it itself
            setattr(sys, name, before)


no_stdout = Change(lambda: _without("stdout"))  # this thread prints nothing
no_stderr = Change(lambda: _without("stderr"))


@Change
@contextmanager
def no_pickles() -> Iterator[None]:
    """torch reads files as data, even where a library asks it to unpickle them."""
    safe, unsafe = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch refuses to have both
    before = {name: os.environ.pop(name) for name in (safe, unsafe) if name in os.environ}
    os.environ[safe] = "1"
    try:
        yield
    finally:
        os.environ.pop(safe, None)
        os.environ.update(before)


@Change
@contextmanager
def no_fused_attention() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoderLayer call their parts one by one."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@Change
@contextmanager
def own_export() -> Iterator[None]:
    """torch.export patches torch for all threads while it runs, so ptee runs one at a time.

    Meanwhile torch writes the code of a graph only where that code is run. Otherwise it writes it after every pass, which takes a
    quarter of the time.
    """
    lazily: Any = nullcontext
    with suppress(ImportError):  # it is no public part of torch
        from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazily
    with lazily(True):
        yield


class _NoCheckpoints:
    """Takes the place of torch's reentrant checkpointing. In the thread that made it, it just calls the function."""

    def __init__(self, own: Any) -> None:
        self._own, self._thread = own, threading.get_ident()

    def apply(self, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if threading.get_ident() == self._thread:
            return function(*args)
        return self._own.apply(function, preserve_rng_state, *args)


@Change
@contextmanager
def no_checkpointing() -> Iterator[None]:
    """This thread does no reentrant gradient checkpointing, because a trace does not see into it."""
    from torch.utils import checkpoint

    before = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NoCheckpoints(before)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before  # type: ignore[misc]


@contextmanager
def own_random_numbers(seed: int | None = None, *, wait: bool = True) -> Iterator[None]:
    """torch's random numbers belong to this thread, and go on afterwards as if none had been drawn.

    This waits for another thread that has them. A few numbers may be drawn without waiting, from those of that thread: they
    are not the user's, so the user misses none.
    """
    import torch

    owned = _RANDOM.acquire(blocking=wait)
    try:
        with _forked() if owned else nullcontext():
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        if owned:
            _RANDOM.release()


@contextmanager
def _forked() -> Iterator[None]:
    """A seed is for GPUs, too. Before CUDA begins, torch keeps it for them; so the user's is given again at the end.

    A seed that the user gave to GPUs alone before CUDA began cannot be asked for, and is lost then.
    """
    import torch

    begun, seed = torch.cuda.is_initialized(), torch.initial_seed()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if begun else ()):
        try:
            yield
        finally:
            if not begun and (torch.initial_seed() != seed or torch.cuda.is_initialized()):
                torch.cuda.manual_seed_all(seed)


def report_nothing() -> None:
    """To be called before ONNX Runtime (from 1.29 on) or Ray is imported, which report their use by default. What the user has set stays."""
    for name, value in REPORTS_OFF.items():
        os.environ.setdefault(name, value)


# ---------------------------------------------------------------------------------------------------- standard streams


def ready_streams() -> None:
    """Let standard streams that are closed lead nowhere, and escape letters that the others cannot write.

    Of a closed one the next file would get the number, and its text. On Windows a pipe knows about 200 letters.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _nowhere("r" if name == "stdin" else "w"))
        elif name != "stdin" and getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _nowhere(mode: str) -> Any:
    return Path(os.devnull).open(mode, encoding="utf-8")


def lead_nowhere(name: str = "stdout") -> None:
    """Let a standard stream lead nowhere, with what it still holds: Python would write that at the end."""
    null = _nowhere("w")
    with suppress(OSError, ValueError):  # a program has put something without a number in its place
        os.dup2(null.fileno(), getattr(sys, name).fileno())
    setattr(sys, name, null)


def unwritable(why: OSError) -> tuple[str, int]:
    """What to say where standard output cannot be written, and the exit status."""
    if isinstance(why, BrokenPipeError):
        text = "Nobody reads the output any more, as after head, so ptee stopped. Send it to a file to have all of it."
        return text, NOBODY_READS
    return f"The output cannot be written: {why.strerror or why}. Send it elsewhere, such as > FILE.", 2
