"""Batches of images and labels, from the data sets and loaders of a user; and which labels are no classes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from numbers import Integral, Number
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ptee._common.devices import made_on_cpu
from ptee._common.errors import DataError, some
from ptee._common.text import type_name

UNKNOWN_LABEL = -1
IMAGE_KEYS, LABEL_KEYS = ("image", "images", "pixel_values"), ("label", "labels")  # of a mapping
MARKED_VALUES = 4096  # of an image, by which it is known again
MARK_BYTES = 6
MARK_LETTERS = 2 * MARK_BYTES
SAMPLED_MARKS = 256
MOST_RECORDS = 8
FEW = 3  # of these say little about the rest
NO_MARK = -1
# In a model's results: by which images are known again that its heads learned from, whose loss picked an epoch, and that h was fitted to.
TRAINED_ON, WATCHED, CALIBRATED_ON = "trained_on", "watched", "calibrated_on"
# Where a process that loads images ends, its connection is lost before torch raises the error that says so.
SECONDS_TO_END = 1.0


class CpuLoader(DataLoader[Any]):
    """A loader that reads images on the CPU, whatever torch's default device is.

    After `torch.set_default_device("cuda")` one of torch's own cannot shuffle, and its processes cannot make a tensor.
    """

    def __iter__(self) -> Any:
        with made_on_cpu():
            found = super().__iter__()  # starts the processes
        return _on_cpu(found, wait=SECONDS_TO_END if self.num_workers else 0.0)


def _on_cpu(items: Iterator[Any], wait: float) -> Iterator[Any]:
    """The items, each made on the CPU; the default device is the user's own again while one is used. `wait`: after a lost connection."""
    end = object()
    while True:
        with made_on_cpu():
            try:
                item = next(items, end)
            except (ConnectionError, EOFError):
                time.sleep(wait)
                raise
        if item is end:
            return
        yield item


def batches(
    data: Any,
    *,
    batch_size: int,
    shuffle: bool,
    generator: torch.Generator | None = None,
    num_workers: int = 0,
    argument: str = "data",
) -> DataLoader[Any]:
    """A loader of a map-style data set. A loader is returned as it is: it keeps its own batches and its own order.

    `argument` is what the caller calls the data.

    Raises:
        DataError: if `data` is empty, can be read only once, or is neither a data set nor a loader, or a number is wrong.
    """
    for name, number, least, most in (("batch_size", batch_size, 1, 2**31), ("num_workers", num_workers, 0, 2**12)):
        if not isinstance(number, Integral) or isinstance(number, bool) or not least <= number <= most:
            raise DataError(f"The {name} {number!r:.60} must be a whole number, at least {least} and at most {most:,}.")
    if wrong := _no_data(data):
        raise DataError(f"{described(argument, data)}, {wrong}", argument=argument, value=data)
    if length_hint(data, 1) == 0:  # the loader of an iterable data set has no length
        raise DataError(f"{argument} is empty: this {type(data).__name__} has length 0.", argument=argument, value=data)
    if is_loader(data):
        return data
    return CpuLoader(
        data, int(batch_size), shuffle, generator=generator, num_workers=int(num_workers), collate_fn=_collate
    )


def shared_batches(data: Any, sampler: Any, *, generator: torch.Generator | None, num_workers: int) -> DataLoader[Any]:
    """A loader of a map-style data set, of the rows that a sampler of batches gives. It draws as one of `batches` does."""
    how: dict[str, Any] = {"num_workers": int(num_workers), "collate_fn": _collate}
    return CpuLoader(data, batch_sampler=sampler, generator=generator, **how)


def own_generator() -> torch.Generator:
    """Random numbers for the processes of a loader: by torch's seed, but none of torch's are drawn."""
    return torch.Generator("cpu").manual_seed(torch.initial_seed())


def described(argument: str, data: Any) -> str:
    """What was given for an argument: `val_data is a str ('photos')`."""
    value = f" ({data!r:.60})" if isinstance(data, str | bytes | Number | Path) else ""
    return f"{argument} is a {type(data).__name__}{value}"


def number_of_images(data: Any) -> int | None:
    """How many images a map-style data set holds; None of anything else."""
    return None if _no_data(data) or is_loader(data) else len(data)


def _no_data(data: Any) -> str:
    """Why this is neither a data set nor a loader, and what to give; empty if it is one."""
    if isinstance(data, Iterator):
        return "which can be read only once: pass the DataLoader or data set it came from."
    if isinstance(data, str | Path) and (Path(data) / "manifest.json").is_file():
        return "which is a path: pass ptee.open_traces(FOLDER), or ptee.open_cache(FOLDER)."
    if isinstance(data, IterableDataset):
        return "which is an iterable data set: pass a DataLoader of it."
    if isinstance(data, type) or not (is_loader(data) or _is_map_style(data)):
        return (
            "which is neither a map-style data set nor a DataLoader: of tensors, make a "
            "torch.utils.data.TensorDataset(images, labels)."
        )
    return ""


def is_loader(data: Any) -> bool:
    """Whether `data` gives batches. A loader of another library, such as timm's, need not be torch's class."""
    looks_so = hasattr(data, "__iter__") and hasattr(data, "__len__") and not hasattr(data, "__getitem__")
    return looks_so or isinstance(data, DataLoader)


def _is_map_style(data: Any) -> bool:
    is_other = isinstance(data, (str, bytes, tuple, Mapping))
    return not is_other and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _collate(samples: list[Any]) -> Any:
    """A batch of the samples. Where torch cannot make one, the error says what to change in the data set."""
    samples = list(map(_with_one_image, samples))
    if getattr(_pick(samples[0])[0], "ndim", 0) == 4:
        raise DataError("The items of this list are whole batches, not images. Give the loader that they come from.")
    try:
        return default_collate(samples)
    except RuntimeError as why:
        require_plain(_pick(samples[0])[0])
        if "infer dtype" in str(why):  # of a label that is None
            raise _no_batch(samples) from why
        if "equal size" not in str(why):
            raise
        raise DataError(
            "The images or labels of the data set differ in size, so they cannot form a batch: resize all images to the "
            "backbone's size, and give each image one class number."
        ) from why
    except (TypeError, ValueError, KeyError) as why:
        if "PIL" in str(why):
            raise DataError(
                "The data set gives PIL images: give it transform=ToTensor(), with the backbone's size and normalisation."
            ) from why
        raise _no_batch(samples) from why


def _no_batch(samples: list[Any]) -> DataError:
    """The error for samples of which torch cannot make a batch."""
    first, *others = dict.fromkeys(map(_describe, samples))
    and_another = f" and a {others[0]}" if others else ""
    return DataError(
        f"The data set gives a {first}{and_another}, which cannot form a batch: give (image tensor, class number)."
    )


def batch_of(samples: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Images and labels of some samples, as `split_batch` gives them."""
    return split_batch(_collate(samples))


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images (b, c, h, w) and labels (b,) int64 of a loader's batch. Labels lie on the CPU, and
    are None if there are none or all are unknown.

    A batch is `(images, labels)`, `(images,)`, images alone, or a mapping with image, images or pixel_values, and label
    or labels.
    """
    images, labels = _pick(batch)
    if not isinstance(images, Tensor) or images.ndim != 4:
        text = f"A batch should be (images (b, c, h, w), labels (b,)), but it is a {_describe(batch)}."
        raise DataError(f"{text}{_meant(batch)}")
    require_plain(images)
    numbers = None if labels is None else _class_numbers(labels, len(images))
    return images, None if numbers is None or (numbers == UNKNOWN_LABEL).all() else numbers


def numbered(labels: Tensor | None, images: Tensor) -> Tensor:
    """The labels (b,) of some images, as `split_batch` gives them; `UNKNOWN_LABEL` where there are none."""
    return torch.full((len(images),), UNKNOWN_LABEL, device="cpu") if labels is None else labels


def odd_labels(labels: Tensor, classes: int) -> str:
    """What is wrong with labels of which some are no class of the backbone. Empty if nothing is."""
    if not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return ""
    odd = labels[(labels < 0) | (labels >= classes)]
    if len(odd) < len(labels):
        values = some([str(value) for value in odd.unique().tolist()])
        return f"some of the labels are no classes of the backbone, which are 0 to {classes - 1}: {values}"
    return f"the labels are {int(labels.min())} to {int(labels.max())}, the backbone's classes 0 to {classes - 1}"


def labels_of_other_classes(labels: Tensor, classes: int) -> str:
    """The same of labels of which none is a class.

    Raises:
        DataError: if some are classes and others are not; -1 is no label.
    """
    within = (labels >= 0) & (labels < classes)
    strange = labels[~within & (labels != UNKNOWN_LABEL)]
    if within.any() and len(strange):
        values, counts = strange.unique(return_counts=True)
        each = [f"{value} ({n:,} of {len(labels):,} images)" for value, n in zip(values.tolist(), counts, strict=True)]
        raise DataError(
            f"There are labels that are no classes of the backbone, which are 0 to {classes - 1}: {some(each)}. Correct them, or "
            "leave these images out. If they mean that an image has no label, leave out all labels."
        )
    return odd_labels(labels, classes)


def require_plain(images: Any) -> None:
    """Refuse a tensor that does not hold its numbers one by one."""
    if isinstance(images, Tensor) and (odd := odd_tensor(images)):
        raise DataError(f"Images come as a plain tensor (b, c, h, w), and these are {odd}.")


def odd_tensor(x: Tensor) -> str:
    """What is special about a tensor, and what makes it a plain one; empty if it is one."""
    if x.is_nested:
        return "nested, each of a size of its own. Give torch.stack of images of one size"
    if x.layout is not torch.strided:
        return f"sparse ({type_name(x.layout)}). Give x.to_dense()"
    if x.is_quantized:
        return f"quantised ({type_name(x.dtype)}). Give x.dequantize()"
    if x.is_meta:
        return "on the meta device, without numbers. Give images of which there are some"
    return ""


def _pick(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        labels = [batch[key] for key in LABEL_KEYS if key in batch]
        if len(labels) > 1 and not _same_numbers(*labels):
            raise _two_of("labels", LABEL_KEYS, ", which differ")
        return batch.get(image_key(batch)), next(iter(labels), None)
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    return (*parts, None)[:2] if len(parts) in (1, 2) else (None, None)


def _meant(batch: Any) -> str:
    """What to give in place of a batch without images, with a blank before it; empty where nobody can tell."""
    if isinstance(batch, Mapping):
        if image_key(batch) is not None:
            return ""
        image, label = (" or ".join(map(repr, keys)) for keys in (IMAGE_KEYS, LABEL_KEYS))
        return f" In a mapping the image stands under {image}, and its label under {label}."
    parts = batch if isinstance(batch, tuple | list) else ()
    ranks = [part.dim() if isinstance(part, Tensor) else None for part in parts]
    if len(ranks) == 2 and ranks[1] == 4:
        return " Give them the other way round: each item is (image, label)."
    if 4 in ranks:
        return " Each item is (image, label) or (image,): leave out the rest."
    three = " Grey images need an axis for their channel (image[None]), and a loader of single images a batch_size."
    return three if 3 in ranks[:1] else ""


def image_key(of: Mapping[str, Any]) -> str | None:
    """The name of the image in a sample, or of the images in a batch; None if there is none. A picture beside a tensor is not meant."""
    keys = [key for key in IMAGE_KEYS if key in of]
    if len(keys) > 1:
        names = keys
        keys = [key for key in names if isinstance(of[key], Tensor | np.ndarray)]
        if len(keys) != 1:
            raise _two_of("images", names)
    return next(iter(keys), None)


def _same_numbers(one: Any, other: Any) -> bool:
    try:
        return torch.equal(*(torch.as_tensor(labels, device="cpu") for labels in (one, other)))
    except (TypeError, ValueError, RuntimeError):
        return False


def _two_of(what: str, names: Sequence[str], more: str = "") -> DataError:
    """The error for a mapping in which two things may be meant."""
    both = " and under ".join(map(repr, names[:2]))
    return DataError(
        f"The data has {what} under {both}{more}. Leave one of them out, or give pairs (image tensor, class number)."
    )


def _with_one_image(sample: Any) -> Any:
    """A sample without the pictures that stand in a mapping beside its image: of these torch makes no batch."""
    if not isinstance(sample, Mapping) or sum(key in sample for key in IMAGE_KEYS) < 2:
        return sample
    own = image_key(sample)
    return {key: value for key, value in sample.items() if key == own or key not in IMAGE_KEYS}


def _class_numbers(labels: Any, b: int) -> Tensor:
    try:
        numbers = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, device="cpu")
    if numbers.shape not in ((b,), (b, 1)) or numbers.is_floating_point():
        said = "The label of 1 image should be 1 class number, but it is"
        if b != 1:
            said = f"The labels of {b} images should be {b} class numbers, but they are"
        advice = ""
        if numbers.shape in ((b,), (b, 1)) and numbers.equal(numbers.round()):
            advice = " Give labels.long()."
        elif numbers.dim() == 2 and len(numbers) == b and numbers.shape[1] > 1:
            advice = " Of one-hot labels give labels.argmax(-1)."
        elif isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
            advice = " Of names give the place of each in the backbone's order of classes: names.index(name)."
        raise DataError(f"{said} a {_describe(labels)}.{advice}")
    return numbers.flatten().long()  # (b, 1) -> (b,)


def _describe(value: Any) -> str:
    """Types and shapes: `tuple (Tensor (4, 3, 8, 8) float32, str)`."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {tuple(value.shape)} {type_name(value.dtype)}"
    if isinstance(value, int) and value.bit_length() > 63:
        return f"{kind} of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return f"{kind} with keys {some(list(map(str, value)))}"
    if isinstance(value, (tuple, list)):
        return f"{kind} ({some(list(map(_describe, value)))})"
    return kind


def same_images(one: Any, other: Any) -> bool:
    """Whether two arguments are the same data set, or loaders of the same one."""
    one, other = (getattr(data, "dataset", data) if is_loader(data) else data for data in (one, other))
    return one is other


# ---------------------------------------------------------------------------------------------------- images known again


def marks_of(images: Tensor) -> Tensor:
    """(b,) int64, a hash of some values of each image (b, c, h, w), the same in any process; NO_MARK for an image of one colour."""
    places, first = _marked_places(images.shape[1:])
    channel, row, column = places.to(images.device)
    few = images.detach()[:, channel, row, column].to("cpu", torch.float32)
    hashes = [blake2b(values.numpy().tobytes(), digest_size=MARK_BYTES).digest() for values in few]
    marks = torch.tensor([int.from_bytes(one, "big") for one in hashes], dtype=torch.int64, device="cpu")
    alike = (few == few[:, first]).all(1) | ~few.isfinite().all(1)
    return marks.where(~alike, NO_MARK)


@lru_cache(maxsize=8)
def _marked_places(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Where the values of a mark are in an image (c, h, w): (3, n) channel, row and column; and (n,) the first of each one's channel.

    Each value is compared with the first of its channel, as white need not be the same in all.
    """
    places = torch.linspace(0, shape.numel() - 1, MARKED_VALUES, dtype=torch.float64, device="cpu").long()
    found = torch.stack(torch.unravel_index(places, shape))
    return found, torch.searchsorted(found[0], found[0])


def number_of_shared(marks: Tensor, others: Tensor) -> int:
    """How many of these marks (n,) are among others (m,)."""
    return int(torch.isin(marks[marks != NO_MARK], others).sum())


def number_of_repeats(marks: Tensor) -> int:
    """How many of these marks (n,) stand there once more. Images of one colour have none, so each of them counts as another."""
    known = marks[marks != NO_MARK]
    return len(known) - len(known.unique())


def all_over(n: int, most: int) -> list[int]:
    """Some of n places, the first and the last among them."""
    return torch.linspace(0, n - 1, min(most, n), dtype=torch.float64, device="cpu").long().tolist()


def known_by(data: Any, changes: bool = False) -> dict[str, Any]:
    """By what the images of a data set, or of a loader of one, are known again: their number, and the marks of some all over it.

    Nothing of a loader that makes its batches in its own way. Where each reading may draw other images (`changes`), their number is
    None: nobody knows how many of them are known.
    """
    if is_loader(data):
        plain = isinstance(data, DataLoader) and data.batch_size is not None and data.worker_init_fn is None
        if not (plain and data.collate_fn is default_collate and _is_map_style(data.dataset)):
            return {}
        data, changes = data.dataset, True
    marks = [marks_of(batch_of([data[i]])[0]) for i in all_over(len(data), SAMPLED_MARKS)]
    return known_by_marks(torch.cat(marks), None if changes else len(data))


def known_by_marks(marks: Tensor, number: int | None) -> dict[str, Any]:
    """The same of this number of images, from the marks of all or of some."""
    return {"images": number, "marks": sample_of_marks(marks)}


def with_record(records: Any, seen: Mapping[str, Any]) -> list[Any]:
    """The records of all trainings of some heads, the last of these with what `known_by` gave. A stranger may have written the others."""
    before = [record for record in records if record != seen] if isinstance(records, list) else []
    return [*before, seen][-MOST_RECORDS:]


def share_known_again(record: Any, marks: Tensor) -> tuple[float, bool]:
    """About which share of the images with these marks (n,) is in a record of `known_by`, and whether that share is sure.

    It is not sure if only a few marks are found, or if the record does not say how many images it stands for. A stranger may have
    written the record.
    """
    record = record if isinstance(record, dict) else {}
    known, size = marks_in(record.get("marks")), record.get("images")
    if not (here := number_of_shared(known, marks)):
        return 0.0, False
    counted = type(size) is int and size > 0
    share = here / len(known) * (size if counted else len(marks)) / len(marks)
    return min(1.0, share), counted and (here > FEW or here == len(known))


def sample_of_marks(marks: Tensor) -> str:
    """A few of them as text. They are the same ones whatever the order of the images is."""
    known = marks[marks != NO_MARK].unique()[:SAMPLED_MARKS].tolist()
    return "".join(f"{mark:0{MARK_LETTERS}x}" for mark in known)


def marks_in(sample: Any) -> Tensor:
    """The marks in such a text; none in what is no such text, as in a file of a stranger."""
    known = isinstance(sample, str) and re.fullmatch(f"([0-9a-f]{{{MARK_LETTERS}}}){{0,{SAMPLED_MARKS}}}", sample)
    found = re.findall(f".{{{MARK_LETTERS}}}", sample) if known else []
    return torch.tensor([int(mark, 16) for mark in found], dtype=torch.int64, device="cpu")
