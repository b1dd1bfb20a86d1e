"""Work that is recorded once and then repeated: always on the same memory, with the values that lie there by then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptee._common.devices import RECORDING


class Recorder(Protocol):
    """Records work. What it allocates belongs to the recording and keeps its place in memory."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What the work returned, and what repeats it: it fills the tensors that were returned."""


class Rerun:
    """Repeats work by doing it again. Stands in for graphs where there are none."""

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """See `Recorder`."""
        kept, spec = tree_flatten(work())

        def again() -> None:
            for old, new in zip(kept, tree_flatten(work())[0], strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return tree_unflatten(kept, spec), again


class Graphs:
    """Records work as CUDA graphs. All graphs of one recorder share memory, so one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """See `Recorder`."""
        made: list[Any] = []

        def run(_: Callable[[], None]) -> None:
            made.clear()
            made.append(work())

        (replay,) = self.record_parts(run)
        return made[0], replay

    def record_parts(self, run: Callable[[Callable[[], None]], None]) -> list[Callable[[], None]]:
        """Record work that is done in one go as several parts: `run` calls what it is given between two. Gives what repeats each."""
        graphs: list[torch.cuda.CUDAGraph] = []

        def begin() -> None:
            graph = torch.cuda.CUDAGraph()
            # Not torch.cuda.graph: it collects garbage each time, and there are many recordings.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            graphs.append(graph)

        def end() -> None:
            try:
                graphs[-1].capture_end()
            except BaseException:
                self._pool = torch.cuda.graph_pool_handle()  # torch may not have ended recording into the old one
                raise
            finally:
                _forget_workspaces()

        def next_part() -> None:
            end()
            begin()

        current = torch.cuda.current_stream()
        with RECORDING:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # libraries choose their algorithms and take their memory before the recording
                    run(lambda: None)
                self._stream.synchronize()  # not the device: others may be at work there
                _give_back_if_scarce()
                _forget_workspaces()  # the recording takes its own: those outside may be freed by others
                begin()
                try:
                    run(next_part)
                except BaseException:
                    with suppress(RuntimeError):  # which would hide why
                        end()
                    raise
                end()
            current.wait_stream(self._stream)
            for graph in graphs:
                graph.replay()  # the capture itself computes nothing, and what was returned is read next
            current.synchronize()
        return [graph.replay for graph in graphs]


def dense(tensor: Tensor) -> Tensor:
    """The tensor, with a place for each number: nothing can be written into an expanded one."""
    expanded = any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.contiguous() if expanded else tensor


def give_back() -> None:
    """Give back all memory that torch only keeps."""
    with RECORDING:  # a recording could break
        torch.cuda.empty_cache()


def _give_back_if_scarce() -> None:
    """Give back memory that torch keeps, if less than that is free: a recording cannot use it, and cannot give it back."""
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if torch.cuda.mem_get_info()[0] < kept:
        torch.cuda.empty_cache()


def _forget_workspaces() -> None:
    """Products keep some memory for a stream from one call to the next. The next product takes new memory."""
    torch._C._cuda_clearCublasWorkspaces()
