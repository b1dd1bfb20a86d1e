"""Batches of whatever a user hands over: map-style data sets and loaders, with labels or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ptee._common.errors import DataError, some

UNKNOWN_LABEL = -1


class CpuLoader(DataLoader[Any]):
    """A loader that reads images on the CPU, whatever torch's default device is.

    After `torch.set_default_device("cuda")` one of torch's own cannot shuffle, and its processes cannot make a tensor.
    """

    def __iter__(self) -> Any:
        with torch.device("cpu"):
            found = super().__iter__()  # starts the processes
        return _on_cpu(found)


def _on_cpu(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each made on the CPU; the default device is the user's own again while one is used."""
    end = object()
    while True:
        with torch.device("cpu"):
            item = next(items, end)
        if item is end:
            return
        yield item


def batches(
    data: Any, *, batch_size: int, shuffle: bool, generator: torch.Generator | None = None, num_workers: int = 0
) -> DataLoader[Any]:
    """The batches of a map-style data set; a loader is returned as it is, its own batches and order included.

    Raises:
        DataError: if `data` is empty, can be gone through only once, or is something else; or a number is none.
    """
    for name, number, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise DataError(f"The {name} {number!r} must be a whole number, {least} at least.")
    kind = type(data).__name__
    if isinstance(data, Iterator):
        raise DataError(f"Data is a {kind}, which can be read only once: pass the DataLoader or data set it came from.")
    if isinstance(data, IterableDataset):
        raise DataError(f"Data is a {kind}, which is an iterable data set: pass a DataLoader of it.")
    if is_loader(data):
        return _not_empty(data)
    if isinstance(data, (str, bytes, tuple, Mapping)) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        raise DataError(
            f"Data is a {kind}, which is neither a map-style data set nor a DataLoader: "
            "of tensors, make a torch.utils.data.TensorDataset(images, labels)."
        )
    return CpuLoader(
        _not_empty(data),
        int(batch_size),
        shuffle,
        generator=generator,
        num_workers=int(num_workers),
        collate_fn=_collate,
    )


def _collate(samples: list[Any]) -> Any:
    """A batch, or the refusal of what is no tensor yet."""
    try:
        return default_collate(samples)
    except RuntimeError as why:
        if "equal size" not in str(why):
            raise
        raise DataError(
            "The data set gives images, or labels, of several sizes, of which no batch can be made: resize images to the "
            "backbone's size, and give each one class number."
        ) from why
    except TypeError as why:
        if "PIL" in str(why):
            raise DataError(
                "The data set gives PIL images: give it transform=ToTensor(), with the backbone's size and normalisation."
            ) from why
        raise DataError(
            f"The data set gives a {_describe(samples[0])}, of which no batch can be made: give (image tensor, class number)."
        ) from why


def is_loader(data: Any) -> bool:
    """Those of timm and others look like torch's, but need not be one."""
    looks_so = hasattr(data, "__iter__") and hasattr(data, "__len__") and not hasattr(data, "__getitem__")
    return looks_so or isinstance(data, DataLoader)


def _not_empty(data: Any) -> Any:
    try:
        empty = len(data) == 0
    except TypeError:  # a loader of an iterable data set does not know
        empty = False
    if empty:
        raise DataError(f"Data is empty: this {type(data).__name__} has length 0.")
    return data


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images (b, c, h, w) and labels (b,) int64 on the CPU, or None, of whatever a loader yields.

    Takes `(images, labels)`, `(images,)`, images alone, or a mapping with image, images or pixel_values and perhaps
    label or labels. Labels that are all `UNKNOWN_LABEL` are none.

    Raises:
        DataError: if the batch is something else.
    """
    images, labels = _pick(batch)
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise DataError(f"A batch should be (images (b, c, h, w), labels (b,)), but it is a {_describe(batch)}.")
    numbers = None if labels is None else _class_numbers(labels, len(images))
    return images, None if numbers is None or (numbers == UNKNOWN_LABEL).all() else numbers


def _pick(batch: Any) -> tuple[Any, Any]:
    """Images and labels, None where there are none."""
    if isinstance(batch, Mapping):
        images = [batch[key] for key in ("image", "images", "pixel_values") if key in batch]
        labels = [batch[key] for key in ("label", "labels") if key in batch]
        return next(iter(images), None), next(iter(labels), None)
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    return (*parts, None)[:2] if len(parts) in (1, 2) else (None, None)


def _class_numbers(labels: Any, b: int) -> Tensor:
    try:
        numbers = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, device="cpu")
    if numbers.numel() != b or numbers.shape not in ((b,), (b, 1)) or numbers.is_floating_point():
        raise DataError(f"The labels of {b} images should be {b} class numbers, but they are a {_describe(labels)}.")
    return numbers.flatten().long()  # (b, 1) -> (b,)


def _describe(value: Any) -> str:
    """Types and shapes, as in `tuple (Tensor (4, 3, 8, 8) float32, str)`."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{kind} with keys {some(list(map(str, value)))}"
    if isinstance(value, (tuple, list)):
        return f"{kind} ({some(list(map(_describe, value)))})"
    return kind
