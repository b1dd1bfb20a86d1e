"""The feature cache: what the heads read and what the backbone answered, computed once and trained on in every epoch.

The backbone is frozen, so its feature maps of an image never change. Each head reads its map after its own parameter-free
part (a pooled head: one vector), so the cache of a whole data set is small for pooled heads and large for convolutional ones.
It lies in memory or, above a size, in files without a name: they are gone when the process ends, however it ends.

Of a data set with views all of them are kept, and each epoch reads one of each image.
"""

from __future__ import annotations

import copy
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from tqdm.auto import tqdm

from ptee._common.errors import Argument, DataError
from ptee._common.progress import with_bar
from ptee.data.batches import UNKNOWN_LABEL, CpuLoader, batches, split_batch
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Reading
from ptee.training.augmentation import AllViews, Views

IN_MEMORY = 2**30  # bytes up to which a cache stays in memory, in the precision it was computed in
LIMIT = 32 * 2**30  # bytes above which none is made


class Entry(NamedTuple):
    """Some samples of a cache.

    Attributes:
        reading: what the heads read, and the backbone's logits.
        labels: (b,) int64, `UNKNOWN_LABEL` where there are none.
    """

    reading: Reading
    labels: Tensor


@dataclass(frozen=True)
class Estimate:
    """How large a cache would be. Prints as a sentence.

    Attributes:
        samples: in the data.
        shapes: of what each head reads of one sample, and of the logits.
        dtype: in which it was computed.
        views: of each sample.
    """

    samples: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    views: int = 1

    @property
    def rows(self) -> int:
        """All views of all samples."""
        return self.samples * self.views

    @property
    def stored(self) -> torch.dtype:
        """As it was computed where that fits into memory, in half precision otherwise."""
        return self.dtype if self._bytes(self.dtype) <= IN_MEMORY else torch.float16

    @property
    def size(self) -> int:
        """Bytes."""
        return self._bytes(self.stored)

    def __str__(self) -> str:
        where = "in memory" if self.in_memory else "on disk until the training ends"
        return f"The backbone runs once over {_images(self)}. What the heads read of them takes {_amount(self.size)} {where}."

    @property
    def in_memory(self) -> bool:
        """Whether it is small enough."""
        return self.size <= IN_MEMORY

    def _bytes(self, dtype: torch.dtype) -> int:
        return self.rows * sum(shape.numel() for shape in self.shapes) * dtype.itemsize


class Cache(Dataset[Entry]):
    """What the heads read of a data set.

    Args:
        estimate: of its size.
        folder: on whose disk a large one lies; None for the system's own folder.
        views: the data set, where its samples have several views.

    Raises:
        DataError: if it is larger than the limit, or the disk is full.
    """

    def __init__(self, estimate: Estimate, folder: Path | None = None, views: Views | None = None) -> None:
        self.estimate, self.views = estimate, views
        self._folder = folder or Path(tempfile.gettempdir())
        if estimate.size > LIMIT:
            raise DataError(
                f"What the heads read of {_images(estimate)} takes {_amount(estimate.size)}, and a cache may take "
                f"{_amount(LIMIT)}. Run the backbone in every epoch (",
                Argument("cache", "False"),
                "), or take heads that pool first.",
                argument="cache",
            )
        self._tensors = [self._empty(shape) for shape in estimate.shapes]
        self.labels = torch.full((estimate.rows,), UNKNOWN_LABEL, device="cpu")

    def _empty(self, shape: torch.Size) -> Tensor:
        whole, dtype = torch.Size((self.estimate.rows, *shape)), self.estimate.stored
        if self.estimate.in_memory:
            return torch.empty(whole, dtype=dtype, device="cpu")
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:  # without a name; it lives as long as its mapping
                self._reserve(file, whole.numel() * dtype.itemsize)
                return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=tuple(whole)))
        except OSError as why:
            raise DataError(
                f"The disk of {self._folder} has no room for {_amount(self.estimate.size)} of what the heads read. Free some, "
                "set TMPDIR to another disk, or run the backbone in every epoch (",
                Argument("cache", "False"),
                ").",
                argument="cache",
            ) from why

    def _reserve(self, file: IO[bytes], size: int) -> None:
        """Take the room now: a file with holes would end the process when the disk fills up."""
        if shutil.disk_usage(self._folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)

    def put(self, start: int, reading: Reading, labels: Tensor | None) -> None:
        """Write a batch, from this row on."""
        end = start + len(reading.logits)
        for to, tensor in zip(self._tensors, (*reading.inputs, reading.logits), strict=True):
            to[start:end] = tensor
            if to.dtype == torch.float16 and not to[start:end].isfinite().all() and tensor.isfinite().all():
                raise DataError(
                    f"Some of what the heads read is as large as {tensor.abs().max():g}, which half precision cannot hold, and "
                    "single precision takes too much memory. Run the backbone in every epoch (",
                    Argument("cache", "False"),
                    ").",
                    argument="cache",
                )
        if labels is not None:
            self.labels[start:end] = labels

    def __len__(self) -> int:
        return self.estimate.samples

    def __getitem__(self, rows: Sequence[int]) -> Entry:
        """A batch: these samples, in this order, each in the view that is drawn for this epoch."""
        at = torch.as_tensor(rows, device="cpu")
        if self.views is not None:
            at = at + len(self) * self.views.drawn[at]
        *inputs, logits = (tensor[at] for tensor in self._tensors)
        return Entry(Reading(tuple(inputs), logits), self.labels[at])

    def begin(self, epoch: int) -> None:
        """Draw the view of each sample for the epoch of this number."""
        if self.views is not None:
            self.views.begin(epoch)

    def with_views(self, views: Views | None) -> Cache:
        """The same numbers for another training, which draws views of its own.

        Args:
            views: that training's data, of the same images in the same views; None where they have no views.
        """
        other = copy.copy(self)
        other.views = views
        return other

    def loader(self, batch_size: int, shuffle: bool, generator: torch.Generator | None = None) -> DataLoader[Entry]:
        """Batches, in the order in which `batches` gives them."""
        sampler = RandomSampler(self, generator=generator) if shuffle else SequentialSampler(self)
        whole = BatchSampler(sampler, batch_size, drop_last=False)
        return CpuLoader(self, batch_size=None, sampler=whole, generator=generator)

    def close(self) -> None:
        """Give its memory and its room on the disk back."""
        self._tensors = []


@torch.no_grad()
def fill(
    model: EarlyExitModel,
    data: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
    around: Callable[[], AbstractContextManager[Any]],
    folder: Path | None = None,
    description: str = "cache",
    callback: Callable[[Estimate], None] | None = None,
) -> Cache:
    """Run the backbone once over a data set, and keep what the heads read.

    Args:
        model: in eval mode.
        data: map-style, of images that are the same each time; of `Views` all views.
        batch_size: images per batch.
        num_workers: processes that load images.
        prepare: brings images to the model's device and type.
        around: a context for the forward pass, such as autocast.
        folder: on whose disk a large cache lies; None for the system's own folder.
        description: for the progress bar.
        callback: called with the size, as soon as it is known and there is room for it.

    Raises:
        DataError: if the cache would be too large, or the disk is full.
    """
    views = data if isinstance(data, Views) else None
    loader = batches(AllViews(views) if views else data, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    cache: Cache | None = None
    start = 0
    for images, labels in map(split_batch, with_bar(loader, description)):
        with around():
            reading = model.read(prepare(images))
        if cache is None:
            cache = Cache(estimate(reading, len(data), views.views if views else 1), folder, views)
            _announce(cache.estimate, callback)
        cache.put(start, reading, labels)
        start += len(images)
    assert cache is not None and start == cache.estimate.rows
    return cache


def _announce(size: Estimate, callback: Callable[[Estimate], None] | None) -> None:
    if callback is not None:
        with tqdm.external_write_mode():  # or it would be printed behind the bar
            callback(size)


def estimate(reading: Reading, samples: int, views: int = 1) -> Estimate:
    """How large a cache of so many samples would be, from one batch.

    Args:
        reading: of any batch.
        samples: in the data.
        views: of each sample.
    """
    tensors = (*reading.inputs, reading.logits)
    dtype = max((t.dtype for t in tensors), key=lambda d: d.itemsize)
    return Estimate(samples, tuple(t.shape[1:] for t in tensors), dtype, views)


def _images(estimate: Estimate) -> str:
    return f"{estimate.samples:,} images" + (f" in {estimate.views} views each" if estimate.views > 1 else "")


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{math.ceil(size / 2**20)} MiB"


def entries(loader: Any) -> Iterator[tuple[Any, Tensor | None]]:
    """Batches of a cache's loader or of any other: what the step takes, and labels or None."""
    for batch in loader:
        if isinstance(batch, Entry):
            yield batch.reading, None if (batch.labels == UNKNOWN_LABEL).all() else batch.labels
        else:
            yield split_batch(batch)
