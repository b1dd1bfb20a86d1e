"""Several processes that train together as one would: each takes its share of every batch, and batch norm counts all rows.

Gradients are averaged over the processes, so a loss is weighted by the rows of its share. Then the sum is the same as that of one
process, but for the order in which its terms are added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Share:
    """Which rows of a batch a process takes: every `processes`-th from `number` on, of `whole`."""

    whole: int
    number: int
    processes: int

    @property
    def rows(self) -> int:
        """How many these are."""
        return len(range(self.number, self.whole, self.processes))

    @property
    def weight(self) -> float:
        """What the mean over these rows counts, if the mean over all processes is to be that over all rows."""
        return self.rows * self.processes / self.whole

    def of(self, rows: Any) -> Any:
        """These rows of all."""
        return rows[self.number :: self.processes]


class ShareOfBatches:
    """Of each batch of a sampler the share of one process. `fewest`: batches in which a process would have fewer rows are left out."""

    def __init__(self, batches: Any, number: int, processes: int, fewest: int) -> None:
        self.batches, self.number, self.processes, self.fewest = batches, number, processes, fewest
        self.given: deque[Share] = deque()  # a loader with processes of its own runs ahead

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.given.clear()
        for batch in self.batches:
            share = Share(len(batch), self.number, self.processes)
            if share.whole // share.processes >= self.fewest and share.rows:
                self.given.append(share)
                yield share.of(batch)


class SharedLoader:
    """A loader that yields the shares of one process. `share` is that of the batch that was yielded last."""

    def __init__(self, loader: Iterable[Any], sampler: ShareOfBatches) -> None:
        self.loader, self.sampler = loader, sampler
        self.share: Share | None = None

    def __len__(self) -> int:
        return length_hint(self.sampler, 0)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.share = self.sampler.given.popleft()
            yield batch


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process cannot be reached any more."""
    from torch.distributed import DistError

    words = str(error)
    return isinstance(error, DistError) or any(name in words for name in ("gloo", "NCCL", "Connection closed by peer"))


# ---------------------------------------------------------------------------------------------------- batch norm


@contextmanager
def shared_batch_norm(module: nn.Module) -> Iterator[None]:
    """Meanwhile batch norm in training mode counts the rows of all processes. torch's own SyncBatchNorm needs a GPU."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.forward = partial(_normalized, norm, norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def _normalized(norm: Any, alone: Any, x: Tensor) -> Tensor:
    if not norm.training:
        return alone(x)
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    n = _summed(wide.new_full((1,), wide.numel() / wide.shape[1]))
    mean = _summed(wide.sum(dims)) / n
    centred = wide - _as(mean, x)
    variance = _summed(centred.square().sum(dims)) / n
    if norm.track_running_stats and norm.running_mean is not None:
        _keep(norm, mean.detach(), (variance * n / (n - 1)).detach())
    found = centred * _as((variance + norm.eps).rsqrt(), x)
    if norm.affine:
        found = found * _as(norm.weight, x) + _as(norm.bias, x)
    return found.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each process's loss depends on every one's numbers, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduced(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _reduced(gradient)


def _reduced(x: Tensor) -> Tensor:
    found = x.contiguous().clone()
    torch.distributed.all_reduce(found)
    return found


def _summed(x: Tensor) -> Tensor:
    return _Sum.apply(x)


def _as(x: Tensor, like: Tensor) -> Tensor:
    """(c,) in the place of the channels."""
    return x.view(1, -1, *[1] * (like.dim() - 2))


@torch.no_grad()
def _keep(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), share)
