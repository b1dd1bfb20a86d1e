"""The feature cache: the heads' inputs and the backbone's answers, computed once for all epochs.

The backbone is frozen, so its feature maps of an image never change. Each head's input is taken after its own layers without
parameters (of a pooled head: one vector), so the cache is small for pooled heads and large for convolutional ones. It is in
memory or, above a size, in files without a name, which are gone when the process ends, however it ends.

Of a data set with views all views are kept, and each epoch reads one of each image.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
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
from tqdm import tqdm

from ptee._common.errors import Argument, DataError, PteeError
from ptee._common.files import as_path, from_json, plain, to_json
from ptee._common.progress import with_bar
from ptee._common.text import number_of
from ptee._common.validation import checked
from ptee.backbones.weights import recorded_hash, recorded_hashes
from ptee.data.batches import UNKNOWN_LABEL, CpuLoader, batches, known_by_marks, split_batch
from ptee.data.parts import Manifest, key_hashes, numbers, read_marks, read_whole, row_groups
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Reading
from ptee.training.augmentation import AllViews, Views

IN_MEMORY = 2**30  # bytes up to which a cache stays in memory, in the precision it was computed in
LARGEST_SIDE = 2**16  # of a map
LIMIT = 32 * 2**30  # bytes above which a cache is refused


class CacheTooLargeError(DataError):
    """A cache that cannot be kept. `reason` says why, in a sentence."""

    reason: str = ""


@dataclass(frozen=True)
class NotCached:
    """The heads' inputs are not kept. Prints as a sentence."""

    reason: str

    def __str__(self) -> str:
        return f"{self.reason} So the backbone runs over the images in every epoch."


class Entry(NamedTuple):
    """Some samples of a cache, and their labels (b,), `UNKNOWN_LABEL` if there are none."""

    reading: Reading
    labels: Tensor


@dataclass(frozen=True)
class Estimate:
    """How large a cache would be. Prints as a sentence.

    Attributes:
        samples: their number.
        shapes: of each head's input for one sample, and of the logits.
        dtype: in which they were computed.
        views: of each sample.
        mirror: view 1 is the mirror image.
    """

    samples: int
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    views: int = 1
    mirror: bool = False

    @classmethod
    def of(cls, reading: Reading, samples: int, views: int = 1, mirror: bool = False) -> Estimate:
        """The estimate for so many samples, from one batch of them."""
        tensors = (*reading.inputs, reading.logits)
        dtype = max((t.dtype for t in tensors), key=lambda d: d.itemsize)
        return cls(samples, tuple(t.shape[1:] for t in tensors), dtype, views, mirror)

    @property
    def rows(self) -> int:
        """Number of all views of all samples."""
        return self.samples * self.views

    @property
    def stored(self) -> torch.dtype:
        """The computed type if that fits into memory, else half precision."""
        return self.dtype if self._bytes(self.dtype) <= IN_MEMORY else torch.float16

    @property
    def size(self) -> int:
        """Bytes."""
        return self._bytes(self.stored)

    @property
    def in_memory(self) -> bool:
        """Whether it is small enough."""
        return self.size <= IN_MEMORY

    def _bytes(self, dtype: torch.dtype) -> int:
        return self.rows * sum(shape.numel() for shape in self.shapes) * dtype.itemsize

    @property
    def images(self) -> str:
        """Number of images and views, in words."""
        crops = self.views - 1 - self.mirror
        kinds = ["itself", *["its mirror image"] * self.mirror, *[number_of(crops, "crop")] * bool(crops)]
        words = f" in {self.views} views each ({', '.join(kinds[:-1])} and {kinds[-1]})" if self.views > 1 else ""
        return number_of(self.samples, "image") + words

    def __str__(self) -> str:
        where = "in memory" if self.in_memory else "on disk until the training ends"
        return (
            f"The backbone runs once over {self.images}. What the heads read of them takes {amount(self.size)} {where}."
        )


class Cache(Dataset[Entry]):
    """What the heads read of a data set. `views` is the data set if its samples have several views.

    A CacheTooLargeError if it is larger than the limit (unless it is not `limited`), or if the disk is full.
    """

    def __init__(self, estimate: Estimate, views: Views | None = None, *, limited: bool = True) -> None:
        self.estimate, self.views = estimate, views
        if limited and estimate.size > LIMIT:
            raise _too_large(
                f"What the heads read of {estimate.images} takes {amount(estimate.size)}, and a cache may take "
                f"{amount(LIMIT)}. Run",
                ", or use heads that pool first",
            )
        self._tensors = [self._empty(shape) for shape in estimate.shapes]
        self.labels = torch.full((estimate.rows,), UNKNOWN_LABEL, device="cpu")

    def _empty(self, shape: torch.Size) -> Tensor:
        whole, dtype = torch.Size((self.estimate.rows, *shape)), self.estimate.stored
        if self.estimate.in_memory:
            return torch.empty(whole, dtype=dtype, device="cpu")
        try:
            with tempfile.TemporaryFile() as file:  # without a name; it lives as long as its mapping
                _reserve(file, whole.numel() * dtype.itemsize)
                return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=tuple(whole)))
        except OSError as why:
            raise _too_large(
                f"The disk of {tempfile.gettempdir()} has no room for {amount(self.estimate.size)} of what the heads read. "
                "Free some, set TMPDIR to another disk, or run"
            ) from why

    def put(self, rows: slice | Tensor, reading: Reading, labels: Tensor | None) -> None:
        """Write a batch into these rows."""
        for to, tensor in zip(self._tensors, (*reading.inputs, reading.logits), strict=True):
            to[rows] = kept = tensor.to(to.dtype)
            if to.dtype == torch.float16 and len(lost := tensor[kept.isinf() & tensor.isfinite()]):
                raise _too_large(
                    f"Some of what the heads read is as large as {lost.abs().max():g}, which half precision cannot hold, and "
                    "single precision takes too much memory. Run"
                )
        if labels is not None:
            self.labels[rows] = labels

    def __len__(self) -> int:
        return self.estimate.samples

    def __getitem__(self, rows: Sequence[int]) -> Entry:
        """A batch of these samples, each in the view that is drawn for this epoch."""
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
        """The same cache for another training with the same images and views, which draws its own."""
        other = copy.copy(self)
        other.views = views
        return other

    def loader(self, batch_size: int, shuffle: bool, generator: torch.Generator | None) -> DataLoader[Entry]:
        """Batches in the order of `batches`."""
        sampler = RandomSampler(self, generator=generator) if shuffle else SequentialSampler(self)
        whole = BatchSampler(sampler, batch_size, drop_last=False)
        return CpuLoader(self, batch_size=None, sampler=whole, generator=generator)

    def close(self) -> None:
        """Free its memory and its room on the disk."""
        self._tensors = []


@torch.no_grad()
def fill(
    model: EarlyExitModel,
    data: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
    around: Callable[[], AbstractContextManager[Any]],
    description: str = "cache",
    callback: Callable[[Estimate], None] | None = None,
) -> Cache:
    """Run the backbone once over a data set, and keep what the heads read.

    Args:
        model: in eval mode.
        data: map-style, of images that are the same each time; of `Views` all views.
        batch_size: images per batch.
        num_workers: processes that load images.
        around: a context for the forward pass, such as autocast.
        description: for the progress bar.
        callback: called with the size, as soon as it is known and there is room for it.
    """
    views = data if isinstance(data, Views) else None
    read = AllViews(views) if views else data
    loader = batches(read, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    cache: Cache | None = None
    start = 0
    for images, labels in map(split_batch, with_bar(loader, description)):
        with around():
            reading = model.read(model.prepared(images))
        if cache is None:
            kinds = (views.views, views.mirror) if views else ()
            cache = Cache(Estimate.of(reading, len(data), *kinds), views)
            if callback is not None:
                with tqdm.external_write_mode():  # or it would be printed behind the bar
                    callback(cache.estimate)
        cache.put(slice(start, start + len(images)), reading, labels)
        start += len(images)
        if views and read.changes:
            raise changing_images()
    assert cache is not None and start == cache.estimate.rows
    return cache


# ---------------------------------------------------------------------------------------------------- in shards


@dataclass(frozen=True)
class CacheFolder:
    """What `ptee cache` wrote: the heads' inputs of very many images. Training data of `ptee.train` in place of images."""

    folder: Path
    manifest: Manifest

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, index: int) -> Any:
        raise TypeError("A cache is read from beginning to end: give it to ptee.train.")

    @property
    def identity(self) -> str:
        """What it is a cache of, in short."""
        return hashlib.sha256(json.dumps(self.manifest.about, sort_keys=True).encode()).hexdigest()[:32]

    def require(self, model: EarlyExitModel) -> None:
        """Refuse a model whose heads read something else.

        Raises:
            DataError: saying what differs.
        """
        for key, now in from_json(to_json(what_heads_read(model))).items():
            before = self.manifest.about.get(key)
            if before == now or (key == "backbone" and _is_known(before, model)):
                continue
            text = f"{self.folder} is a cache of another {key} ({before!s:.60}, and this model has {now!s:.60}). Make one of it: "
            raise DataError(f"{text}ptee cache RUN.")

    def backbone_answers(self) -> tuple[Tensor, Tensor]:
        """The backbone's answers (n,) and the labels (n,), -1 where there is none."""
        answers, labels = [], []
        for group in row_groups(self.folder, self.manifest, ["label", "logits"]):
            logits = numbers(self.folder, group["logits"], self.manifest.about["classes"], np.float32)
            answers.append(torch.from_numpy(logits.argmax(-1)))
            labels.append(torch.from_numpy(numbers(self.folder, group["label"], 0, np.int32)).long())
        return torch.cat(answers), torch.cat(labels)

    def known_by(self) -> dict[str, Any]:
        """By which its images are known again."""
        return known_by_marks(read_marks(self.folder, self.manifest), len(self))

    def opened(self, model: EarlyExitModel) -> Cache:
        """All of it, in memory or in a file without a name, in an order that does not depend on who wrote it."""
        self.require(model)
        about, n = self.manifest.about, len(self)
        shapes = tuple(torch.Size(shape) for shape in about["shapes"])
        cache = self._room(Estimate(n, (*shapes, torch.Size([about["classes"]])), torch.float32))
        places = np.empty(n, dtype=np.int64)
        places[np.argsort(key_hashes(self.folder, self.manifest), kind="stable")] = np.arange(n)
        start = 0
        columns = [f"input{k}" for k in range(len(shapes))]
        for group in row_groups(self.folder, self.manifest, ["label", "logits", *columns]):
            rows = torch.from_numpy(places[start : start + len(group)])
            made = [numbers(self.folder, group[c], s.numel(), np.float16) for c, s in zip(columns, shapes, strict=True)]
            inputs = (torch.from_numpy(x).view(-1, *s) for x, s in zip(made, shapes, strict=True))
            logits = torch.from_numpy(numbers(self.folder, group["logits"], about["classes"], np.float32))
            labels = torch.from_numpy(numbers(self.folder, group["label"], 0, np.int32)).long()
            cache.put(rows, Reading(tuple(inputs), logits), labels)
            start += len(group)
        return cache

    def _room(self, estimate: Estimate) -> Cache:
        """An empty cache. How large it may be was said when the folder was made, so only the disk limits it."""
        try:
            return Cache(estimate, limited=False)
        except CacheTooLargeError as why:
            text = f"To learn from {self.folder} takes {amount(estimate.size)} on the disk of {tempfile.gettempdir()}, which has no room "
            raise DataError(f"{text}for it. Free some, or set TMPDIR to another disk.") from why


@checked
def open_cache(folder: str | Path) -> CacheFolder:
    """What `ptee.cache` or `ptee cache` wrote into a folder, as training data.

    Raises:
        DataError: if it is not finished, is damaged, or holds something else.
    """
    path = as_path(folder, "folder")
    manifest = read_whole(path, "cache")
    shapes, classes = manifest.about.get("shapes"), manifest.about.get("classes")
    if not (_are_shapes(shapes) and type(classes) is int and 0 < classes <= LARGEST_SIDE and manifest.rows):
        raise DataError(f"{path}: its manifest does not say what it holds. Make it again: ptee cache RUN.")
    return CacheFolder(path, manifest)


def _is_known(recorded: Any, model: EarlyExitModel) -> bool:
    return any(recorded == each for each in recorded_hashes(model.backbone, model.plan.input_size))


def _are_shapes(values: Any) -> bool:
    sides = [side for shape in values if isinstance(shape, list) for side in shape] if isinstance(values, list) else []
    return bool(sides) and all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides)


def what_heads_read(model: EarlyExitModel) -> dict[str, Any]:
    """What decides the inputs of a model's heads, JSON-able.

    Raises:
        PteeError: if a head is a network of its own, which reads the images.
    """
    if any(hasattr(head, "network") for head in model.heads):
        raise PteeError("A front reads the images themselves, so there is nothing to cache. Take exits without one.")
    layers = [[str(head.layout), *map(repr, head.parts()[0])] for head in model.heads]  # type: ignore[operator]
    return {
        "backbone": recorded_hash(model.backbone, model.plan.input_size),
        "input": plain(model.origin.input),
        "exits": [e.name for e in model.exits],
        "layers": layers,
        "classes": model.num_classes,
    }


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the room now: a file with holes would kill the process when the disk fills up."""
    if shutil.disk_usage(tempfile.gettempdir()).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def _too_large(reason: str, more: str = "") -> CacheTooLargeError:
    """The error for a cache that cannot be; the reason ends in "run", in front of what to do instead."""
    instead = Argument("cache", "False")
    error = CacheTooLargeError(f"{reason} the backbone in every epoch (", instead, f"){more}.", argument="cache")
    error.reason = f"{reason.partition('. ')[0]}."
    return error


def changing_images() -> DataError:
    """The error for data that must not change and does."""
    text = (
        "The data gives another image when it is read again, and a cache would keep the first one for all epochs. Give "
    )
    more = ", or remove the random transforms and let ptee make views of the images ("
    instead = Argument("cache", "False"), more, Argument("views", "4"), ")."
    return DataError(text, *instead, argument="cache", value=True)


def amount(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{math.ceil(size / 2**20)} MiB"


def entries(loader: Any) -> Iterator[tuple[Any, Tensor | None]]:
    """Batches of a cache's or another loader: what the heads read or images, and labels or None."""
    for batch in loader:
        if isinstance(batch, Entry):
            yield batch.reading, None if (batch.labels == UNKNOWN_LABEL).all() else batch.labels
        else:
            yield split_batch(batch)
