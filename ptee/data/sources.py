"""From a data source to data sets: image folders, tar files, torchvision's data sets, scikit-learn's digits, the demo.

    source --open_data--> Data(train, calibration, validation)    heads learn on the first, thresholds are chosen on
                                                                  the second, results are reported on the third

A part that the source does not deliver is drawn from its training images, and `Data.split` records how. Opening decodes
no picture: each is read and decoded when it is asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ptee._common.errors import DataError, UnknownName, possible, unknown
from ptee.data.demo_images import DEMO, demo_listing, fingerprint
from ptee.data.pictures import LAYOUTS, PARTS, File, Listing, decode, list_files

if TYPE_CHECKING:
    from PIL.Image import Image

# What torchvision's `split` argument may be for training and validation; the first pair that is there is used.
# 'trainval' contains 'val', so it goes with 'test' alone.
SPLIT_PAIRS = (("train", "val"), ("train", "valid"), ("train", "test"), ("trainval", "test"), ("train-standard", "val"))
# Data sets whose mirror images are of another class or of none.
SIDED = (DEMO, "digits", "emnist", "gtsrb", "kmnist", "mnist", "omniglot", "qmnist", "renderedsst2", "svhn", "usps")
DRAWN_PERCENT = 10  # of the training images, for each part that is not delivered
GIVE = "give a folder, 'digits' or the name of a data set of torchvision"

Labelled = Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class Data:
    """Three map-style data sets of `(image (c, h, w), label)` and how they came about.

    Attributes:
        train: what heads learn on.
        calibration: what thresholds are chosen on.
        validation: what results are reported on.
        class_names: in the order of the labels.
        source: what was asked for; `open_data` takes it again.
        split: for JSON: kind and parts of the source, rule, seed, sizes, and for files a hash of their names.
        mirror: whether a mirror image shows the same class; false for data known to be of digits, letters or signs.
    """

    train: Labelled
    calibration: Labelled
    validation: Labelled
    class_names: tuple[str, ...]
    source: str
    split: dict[str, Any]
    mirror: bool = True

    @property
    def summary(self) -> str:
        """One sentence: where the images come from, how many there are, how they were split."""
        sizes = ", ".join(f"{size:,} for {part}" for part, size in self.split["sizes"].items())
        n = len(self.class_names)
        return f"{self.source}: images of {n} class{'es' * (n != 1)}, {sizes}; {self.split['rule']}."

    @property
    def place(self) -> str:
        """A folder as it is found from anywhere; a name as it is."""
        folder = self.split["kind"] in ("folder", "tar")
        return str(Path(self.source).expanduser().resolve()) if folder else self.source


class _Pictures(Labelled):
    """Pictures of a listing, decoded and transformed on access. Holds no open file, so any process may read it."""

    def __init__(self, pictures: Sequence[tuple[Any, int]], transform: Callable[[Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[index]
        return self.transform(decode(picture) if isinstance(picture, File) else picture), int(label)


def open_data(
    source: str | Path, *, transform: Callable[[Image], Tensor], root: Path | None = None, seed: int = 0
) -> Data:
    """Open a data source and split it. Nothing is downloaded or written.

    Args:
        source: a folder (of `train/CLASS/*` and `val/CLASS/*`, of `CLASS/*`, or of train.tar, calibration.tar and
            validation.tar), "digits", "demo" (digits on canvases, easy and hard ones), or a classification data set of
            torchvision. A folder goes before a name.
        transform: makes the tensor (c, h, w) of a picture; must be picklable where a loader has workers.
        root: the folder that holds torchvision's data set; the current one if not given.
        seed: which images are drawn for the parts that are not delivered: 10 % of the training images for each.

    Raises:
        DataError: if the source cannot be read, has too few images, or its parts disagree on the classes.
        UnknownName: if it is neither a folder nor the name of a data set.
    """
    return _split(_list(source, root or Path(), seed), source, transform, seed)


def open_named(name: str, *, transform: Callable[[Image], Tensor], root: Path | None = None, seed: int = 0) -> Data:
    """Open "digits", "demo" or a data set of torchvision as `open_data` does, whatever folders of that name there are.

    Raises:
        DataError: if it cannot be read.
        UnknownName: if there is no data set of that name.
    """
    return _split(_list_named(name, root or Path(), seed), name, transform, seed)


def _split(listing: Listing, source: str | Path, transform: Callable[[Image], Tensor], seed: int) -> Data:
    parts, rule = _complete({part: _Pictures(files, transform) for part, files in listing.parts.items()}, source, seed)
    sizes = {part: len(parts[part]) for part in PARTS}
    split = {"kind": listing.kind, "parts": listing.origin, "rule": rule, "seed": seed, "sizes": sizes}
    if listing.kind in ("folder", "tar"):
        split["files_sha256"] = _hash_of_names(listing)
        for part in parts.values():
            part.files_sha256 = split["files_sha256"]  # for a training that is resumed, which is given a part alone
    if listing.kind == DEMO:
        split["rule"], split["pictures_sha256"] = f"drawn with seed {seed}, no digit in two parts", fingerprint(listing)
    mirror = listing.kind in ("folder", "tar") or str(source).lower() not in SIDED
    return Data(**parts, class_names=listing.class_names, source=str(source), split=split, mirror=mirror)


def _complete(delivered: dict[str, Any], source: str | Path, seed: int) -> tuple[dict[str, Any], str]:
    """All parts, missing ones drawn from the training images; and in words how."""
    missing = [part for part in PARTS if part not in delivered]
    if not missing:
        return delivered, "split as delivered"
    n, names = len(delivered["train"]), " and ".join(missing)
    if n <= len(missing):
        needed = f"at least {1 + len(missing)} are needed, as those for {names} are drawn from them"
        raise DataError(f"'{source}' has too few training images: it has {n}, and {needed}.")
    size = max(1, round(n * DRAWN_PERCENT / 100))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = {part: order[i * size : (i + 1) * size] for i, part in enumerate(missing)}
    rows["train"] = order[size * len(missing) :]
    # sorted: pictures are read in the order in which they lie on the disk
    parts = delivered | {part: Subset(delivered["train"], sorted(indices)) for part, indices in rows.items()}
    each = "each " if len(missing) > 1 else ""
    return parts, f"{names}: {each}{DRAWN_PERCENT} % of the training images, drawn with seed {seed}"


def _hash_of_names(listing: Listing) -> str:
    """Of part, name and class of every file: where it agrees, the same seed gives the same split."""
    lines = (f"{part}/{file.name}\t{label}\n" for part, files in listing.parts.items() for file, label in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


# Where the pictures are


def _list(source: str | Path, root: Path, seed: int) -> Listing:
    name, path = str(source), Path(source).expanduser()
    if not name.strip():
        raise DataError(f"The name of the data source is empty: {GIVE}.")
    if path.is_dir():
        return list_files(path)
    if path.exists():
        raise DataError(f"'{name}' is a file, not a folder: give the folder around it, which should hold {LAYOUTS}.")
    if isinstance(source, Path) or os.sep in name or name.startswith((".", "~")):
        raise DataError(f"Data folder '{name}' does not exist: {GIVE}.")
    return _list_named(name, root, seed)


def _list_named(name: str, root: Path, seed: int) -> Listing:
    if name == DEMO:
        return demo_listing(seed)
    return _list_digits() if name == "digits" else _list_torchvision(name, root)


def _list_digits() -> Listing:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")  # (n, 8, 8), was 0..16
    pictures = [(Image.fromarray(rows), int(label)) for rows, label in zip(pixels, digits.target, strict=True)]
    # not '0'..'9', which would be numbers of whatever classes the backbone has
    return Listing("digits", {"train": pictures}, {"train": "digits"}, tuple(f"digit {i}" for i in range(10)))


# torchvision's data sets


def _list_torchvision(name: str, root: Path) -> Listing:
    from torchvision import datasets

    makers = {key: make for key, make in vars(datasets).items() if inspect.isclass(make) and _has_training_part(make)}
    lower = {key.lower(): key for key in makers}
    if name.lower() not in lower:
        names = possible(name, lower if name.islower() else makers, first=["digits", DEMO], most=len(lower) + 1)
        raise UnknownName(f"There is no folder {name!r}, and no data set of that name.{names}")
    make = makers[lower[name.lower()]]
    try:
        parts, origin = _open_parts(make, root)
        labels = [part[0][1] for part in parts.values()]
    except Exception as error:  # each data set has its own kinds
        raise DataError(_not_read(make, root, error)) from error
    for label in labels:
        if not isinstance(label, Integral):
            raise DataError(
                f"torchvision's {make.__name__} has {type(label).__name__} for a label, not a class number."
            )
    return Listing("torchvision", parts, origin, _class_names(parts))


def _has_training_part(make: type) -> bool:
    """And needs no other argument than `root`."""
    parameters = inspect.signature(make).parameters
    more = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]  # passed on to a class that takes `transform`
    needed = [p.name for p in parameters.values() if p.default is p.empty and p not in more]
    split = parameters.get("split")
    has_part = "train" in parameters or (split is not None and str(split.default).startswith("train"))
    return needed == ["root"] and has_part and ("transform" in parameters or bool(more))


def _open_parts(make: Callable[..., Any], root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    arguments = inspect.signature(make).parameters
    if "train" in arguments:
        parts = {"train": make(str(root), train=True), "validation": make(str(root), train=False)}
        return parts, {"train": "train=True", "validation": "train=False"}
    for train, validation in SPLIT_PAIRS:
        try:
            rest = make(str(root), split=validation)
            parts = {"train": make(str(root), split=train), "validation": rest}
            return parts, {"train": train, "validation": validation}
        except ValueError as error:
            if "Unknown value" not in str(error):  # torchvision's words for a split that a data set has not
                raise
    raise DataError(f"it has none of these pairs of splits: {', '.join(map('/'.join, SPLIT_PAIRS))}")


def _not_read(make: type, root: Path, error: Exception) -> str:
    """With torchvision's first sentence; the next is its advice to download, which is not ours to follow."""
    why = (str(error) or type(error).__name__).split("\n")[0].split(". ")[0].rstrip(".")
    fetch = f", or fetch it once with torchvision.datasets.{make.__name__}('{root}', download=True)"
    hint = fetch if "download" in inspect.signature(make).parameters else ""
    looked = f"torchvision's {make.__name__} was looked for in '{root.absolute()}'"
    return f"{looked}: {why}. Give the folder that holds it (--data-root FOLDER; in Python root=){hint}."


def _class_names(parts: dict[str, Any]) -> tuple[str, ...]:
    """WordNet ids where there are any, else names, else made up."""
    for attribute in ("wnids", "classes"):
        if getattr(parts["train"], attribute, None):
            return tuple(map(str, getattr(parts["train"], attribute)))
    return tuple(f"class {i}" for i in range(1 + max(max(_labels(part)) for part in parts.values())))


def _labels(dataset: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            return [int(label) for label in getattr(dataset, attribute)]
    return [int(dataset[i][1]) for i in range(len(dataset))]  # decodes every picture; only GTSRB, FER2013 and PCAM


# From pictures to what a backbone reads


@dataclass(frozen=True)
class _ToInput:
    """A picture as a backbone wants it: (c, h, w) float32, normalised."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    def __call__(self, image: Image) -> Tensor:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.v2 import functional

        channels, height, width = self.input_size
        image = image.convert("RGB" if channels == 3 else "L")
        scale = max(height / image.height, width / image.width)
        size = [max(height, round(scale * image.height)), max(width, round(scale * image.width))]
        if size != [image.height, image.width]:
            image = functional.resize(image, size, InterpolationMode(self.interpolation))
        image = functional.center_crop(image, [height, width])
        x = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)  # (c, h, w) in 0..1
        return functional.normalize(x, list(self.mean), list(self.std))


def image_transform(
    input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> Callable[[Image], Tensor]:
    """What makes a backbone's input of a picture: resized until it just covers the input, centre cropped, normalised.

    Args:
        input_size: (c, h, w); c is 3 for colours or 1 for grey levels.
        mean: of each channel, for values in 0..1; one number stands for all channels.
        std: the same.
        interpolation: as torchvision's `InterpolationMode` names it.

    Raises:
        DataError: if c is neither 3 nor 1, or `mean` or `std` has another length.
        UnknownName: if there is no such interpolation.
    """
    from torchvision.transforms import InterpolationMode

    c, h, w = input_size
    if c not in (1, 3):
        raise DataError(f"The backbone reads {c} channels, but pictures have 3 or 1: pass tensors from Python.")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, c):
            raise DataError(f"The {name} has {len(values)} numbers for {c} channels: give {c}.")
    modes = [mode.value for mode in InterpolationMode]
    if interpolation not in modes:
        raise unknown("interpolation", interpolation, modes)
    return _ToInput((c, h, w), tuple(mean), tuple(std), interpolation)
