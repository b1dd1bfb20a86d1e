"""The memory of a GPU that recordings take, told before it is taken, and kept below a limit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ptee._common.errors import Argument, PteeError
from ptee.recording.graphs import give_back

GIB = 2**30


def taken(device: torch.device) -> int:
    """Bytes that torch has taken of a GPU; 0 elsewhere, where nothing is recorded."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def peak(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes of a GPU that are in use at once while some work is done, beside those that are in use before.

    torch's own peak of that GPU begins anew.
    """
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


class Budget:
    """What the recordings of one model have taken of a device. `limit`: of all of them, in bytes; None for none."""

    def __init__(self, device: torch.device, limit: int | None) -> None:
        self.device, self.limit, self.spent = device, limit, 0

    def allows(self, needed: Callable[[], int]) -> bool:
        """Whether so many bytes more are within the limit. They are asked for only where there is one."""
        return self.limit is None or self.spent + needed() <= self.limit

    def spend(self, work: Callable[[], None]) -> None:
        """Do work that takes memory, and note how much."""
        before = self._held()
        work()
        self.spent += self._held() - before

    def _held(self) -> int:
        """Bytes that torch has taken and cannot give back."""
        if self.limit is not None and self.device.type == "cuda":
            give_back()
        return taken(self.device)

    def refusal(self, rows: int, needed: int) -> PteeError:
        """The error for a bucket of so many rows that does not fit."""
        assert self.limit is not None
        size, spent, limit = (f"{n / GIB:.2f} GiB" for n in (needed, self.spent, self.limit))
        more = Argument("max_memory", f"{(self.spent + needed) / GIB:.2g}")
        text = f"Recording batches of {rows} takes about {size} of the GPU beside {spent} of smaller and larger ones, and {limit} is the limit. Give "
        return PteeError(text, more, " or more, or a smaller ", Argument("max_batch"), ".", argument="max_memory")
