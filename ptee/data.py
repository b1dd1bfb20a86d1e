"""From a data source to data sets: image folders, tar files, torchvision's data sets, scikit-learn's digits.

    source --open_data--> Data(train, calibration, validation)    heads learn on the first, thresholds are chosen on
                                                                  the second, results are reported on the third
    data set or loader --batches, split_batch--> images (b, c, h, w), labels (b,)
    class names --map_labels, with_labels--> labels as the backbone numbers its classes

A part that the source does not deliver is drawn from its training images, and `Data.split` records how. Opening decodes
no picture: each is read and decoded when it is asked for.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ptee.errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

# What the folders and tar files of a source may be called; the first that is there is used.
PARTS = {
    "train": ("train",),
    "calibration": ("calibration", "calib"),
    "validation": ("val", "valid", "validation", "test"),
}
# The same for torchvision's `split` argument. 'trainval' contains 'val', so it goes with 'test' alone.
SPLIT_PAIRS = (("train", "val"), ("train", "valid"), ("train", "test"), ("trainval", "test"), ("train-standard", "val"))
DRAWN_FRAC = 0.1  # of the training images, for each part that is not delivered
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
IMAGE_KEYS, LABEL_KEYS = ("image", "images", "pixel_values"), ("label", "labels")
UNKNOWN_LABEL = -1
LAYOUTS = "train/CLASS/*.jpg with val/CLASS/*.jpg, or CLASS/*.jpg, or train.tar with validation.tar"

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
    """

    train: Labelled | None
    calibration: Labelled
    validation: Labelled
    class_names: tuple[str, ...]
    source: str
    split: dict[str, Any]

    @property
    def summary(self) -> str:
        """One sentence: where the images come from, how many there are, how they were split."""
        sizes = ", ".join(f"{size:,} for {part}" for part, size in self.split["sizes"].items())
        return f"{self.source}: images of {len(self.class_names)} classes, {sizes}; {self.split['rule']}."


class _File(NamedTuple):
    """An encoded picture: `size` bytes of the file `path`, from `offset` on."""

    path: str
    name: str  # as in the listing of its part
    offset: int = 0
    size: int = -1  # to the end


@dataclass(frozen=True)
class _Listing:
    """What a source delivers, before missing parts are drawn; pictures are `_File` or `PIL.Image`."""

    kind: str
    parts: dict[str, Sequence[tuple[Any, int]]]
    origin: dict[str, str]  # what each part is called in the source
    class_names: tuple[str, ...]


class _Pictures(Labelled):
    """Pictures of a listing, decoded and transformed on access. Holds no open file, so any process may read it."""

    def __init__(self, pictures: Sequence[tuple[Any, int]], transform: Callable[[Image], Tensor]) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.pictures[index]
        return self.transform(_decode(picture) if isinstance(picture, _File) else picture), int(label)


def open_data(
    source: str | Path, *, transform: Callable[[Image], Tensor], root: Path | None = None, seed: int = 0
) -> Data:
    """Open a data source and split it. Nothing is downloaded, decoded or written.

    Args:
        source: a folder (`train/CLASS/*` and `val/CLASS/*`; `CLASS/*`; or train.tar, calibration.tar, validation.tar), or
            "digits", or the name of a classification data set of torchvision. An existing folder goes before a name.
        transform: makes the tensor (c, h, w) of a picture; must be picklable where a loader has workers.
        root: the folder that holds torchvision's data set; the current one if not given.
        seed: which images are drawn for the parts that are not delivered: 10 % of the training images for each.

    Raises:
        DataError: if the source cannot be read, has too few images, or its parts disagree on the classes.
        UnknownName: if it is neither a folder nor the name of a data set.
    """
    listing = _list(source, root)
    delivered: dict[str, Labelled] = {part: _Pictures(files, transform) for part, files in listing.parts.items()}
    parts, rule = _complete(delivered, str(source), seed)
    split: dict[str, Any] = {"kind": listing.kind, "parts": listing.origin, "rule": rule, "seed": seed}
    split["sizes"] = {part: _length(parts[part]) for part in PARTS}
    if listing.kind in ("folder", "tar"):
        split["files_sha256"] = _hash_of_names(listing)
    return Data(**parts, class_names=listing.class_names, source=str(source), split=split)


def _complete(delivered: dict[str, Labelled], source: str, seed: int) -> tuple[dict[str, Labelled], str]:
    """All parts, missing ones drawn from the training images; and a sentence on what was done."""
    train = delivered["train"]
    missing = [part for part in PARTS if part not in delivered]
    if not missing:
        return delivered, "split as delivered"
    n = _length(train)
    if n < 1 + len(missing):
        raise DataError(
            f"'{source}' has too few training images ({n}): {' and '.join(missing)} images are drawn from them, "
            f"which takes {1 + len(missing)} at least; add images."
        )
    size = max(1, round(DRAWN_FRAC * n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = {part: order[i * size : (i + 1) * size] for i, part in enumerate(missing)}
    drawn["train"] = order[size * len(missing) :]
    # sorted: files are read in the order in which they lie on the disk
    parts = delivered | {part: Subset(train, sorted(rows)) for part, rows in drawn.items()}
    share = f"{DRAWN_FRAC:.0%}".replace("%", " %")
    each = "each " if len(missing) > 1 else ""
    return parts, f"{' and '.join(missing)}: {each}{share} of the training images, drawn with seed {seed}"


def _hash_of_names(listing: _Listing) -> str:
    """Of part, name and class of every file: the same hash and seed give the same split."""
    digest = hashlib.sha256()
    for part, files in listing.parts.items():
        for file, label in files:
            digest.update(f"{part}/{file.name}\t{label}\n".encode())
    return digest.hexdigest()


def _length(data: Any) -> int:
    return len(data)


# Where the pictures are


def _list(source: str | Path, root: Path | None) -> _Listing:
    name, path = str(source), Path(source).expanduser()
    if not name.strip():
        raise DataError("The name of the data source is empty: give a folder, 'digits' or a data set of torchvision.")
    if path.is_dir():
        return _list_files(path)
    if path.exists():
        raise DataError(f"'{name}' is a file: give the folder that holds it; it should hold {LAYOUTS}.")
    if name == "digits":
        return _list_digits()
    if isinstance(source, Path) or any(mark in name for mark in ("/", os.sep, "~")) or name.startswith("."):
        raise DataError(f"Data folder '{name}' does not exist: give a folder, 'digits' or a data set of torchvision.")
    return _list_torchvision(name, root or Path())


def _list_files(folder: Path) -> _Listing:
    tars = _paths_of_parts(folder, lambda name: (folder / f"{name}.tar").is_file(), ".tar")
    if "train" in tars:
        return _label("tar", {part: _read_tar(path) for part, path in tars.items()}, tars, folder)
    # a part holds class folders; a class may be called 'train' too, but holds pictures
    folders = _paths_of_parts(folder, lambda name: any(map(Path.is_dir, _visible(folder / name))), "")
    if "train" not in folders:
        folders = {"train": folder}
    return _label("folder", {part: _read_folder(path) for part, path in folders.items()}, folders, folder)


def _paths_of_parts(folder: Path, is_part: Callable[[str], bool], suffix: str) -> dict[str, Path]:
    found = {part: next(filter(is_part, names), None) for part, names in PARTS.items()}
    return {part: folder / f"{name}{suffix}" for part, name in found.items() if name}


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, by name, whatever order the file system has; nothing if it is no folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def _read_folder(folder: Path) -> list[tuple[_File, str]]:
    """The pictures below each class folder, and their classes."""
    classes = [path for path in _visible(folder) if path.is_dir()]
    names = {name for part in PARTS.values() for name in part}
    files = {path.name: _pictures_below(path) for path in classes}
    if not any(files.values()):
        raise DataError(f"No images in class folders of '{folder}': it should hold {LAYOUTS}.")
    if names.issuperset(files):
        raise DataError(f"'{folder}' holds {', '.join(files)} but not train/CLASS/*.jpg: it should hold {LAYOUTS}.")
    empty = [name for name, found in files.items() if not found]
    if empty and folder.name not in PARTS["calibration"] + PARTS["validation"]:
        raise DataError(f"Class folder '{folder / empty[0]}' holds no images: add some or remove it.")
    return [(_File(path, os.path.relpath(path, folder)), name) for name in files for path in files[name]]


def _pictures_below(folder: Path) -> list[str]:
    # os.walk needs no stat for each file, as Path.rglob does: seconds instead of minutes on ImageNet
    found = (Path(top, name) for top, _, names in os.walk(folder) for name in names)
    return sorted(str(path) for path in found if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."))


def _read_tar(path: Path) -> list[tuple[_File, str]]:
    """The pictures in one tar file and their classes, indexed by timm's reader.

    timm's reader keeps an open file, which a loader's workers would share, each moving the other's position. So only
    its index is kept: where in the file each picture lies.
    """
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    # tarfile takes a file cut off between two members for a whole one; a whole one ends with two blocks of zeros
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        whole = file.read() == bytes(1024)
    try:
        if not whole:
            raise DataError("it is cut off")
        reader = ReaderImageInTar(str(path), cache_tarinfo=False)  # True would leave a pickle beside the data
    except Exception as error:  # tarfile and timm raise many kinds
        why = "it holds no images (.jpg, .jpeg, .png)" if "not enough values" in str(error) else error
        raise DataError(f"'{path}' cannot be read as a tar file of CLASS/*.jpg: {why}.") from error
    files = []
    for (member, _, tar_inside), target in zip(reader.samples, reader.targets, strict=True):
        offset = member.offset_data + (tar_inside.offset_data if tar_inside else 0)
        files.append((_File(str(path), member.name, offset, member.size), reader.class_idx_to_name[target]))
    if not all(name for _, name in files):
        raise DataError(f"'{path}' holds images outside of class folders: its members should be CLASS/*.jpg.")
    return [pair for pair in files if not Path(pair[0].name).name.startswith(".")]


def _label(kind: str, parts: dict[str, list[tuple[_File, str]]], paths: dict[str, Path], source: Path) -> _Listing:
    """Number the classes in the order of their names among the training images, as torchvision does."""
    class_names = tuple(sorted({name for _, name in parts["train"]}))
    number = {name: index for index, name in enumerate(class_names)}
    for part, files in parts.items():
        strange = sorted({name for _, name in files} - set(class_names))
        if strange:
            raise DataError(
                f"'{paths[part]}' has classes that '{paths['train']}' has not: {_some(strange)}; remove or rename them."
            )
    labelled = {part: [(file, number[name]) for file, name in files] for part, files in parts.items()}
    origin = {part: os.path.relpath(path, source) for part, path in paths.items()}
    return _Listing(kind, dict(labelled), origin, class_names)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _decode(file: _File) -> Image:
    from PIL import Image

    try:
        with Path(file.path).open("rb") as stream:
            stream.seek(file.offset)
            image = Image.open(BytesIO(stream.read(file.size)))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        inside = f" in '{file.path}'" if file.size >= 0 else ""
        name = file.name if file.size >= 0 else file.path
        raise DataError(f"Picture '{name}'{inside} cannot be decoded; replace or remove it.") from error
    return image


def _list_digits() -> _Listing:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")  # (n, 8, 8) from 0..16
    pictures = [(Image.fromarray(rows), int(label)) for rows, label in zip(pixels, digits.target, strict=True)]
    # not '0'..'9': digits are no class numbers of whatever backbone reads them
    return _Listing("digits", {"train": pictures}, {"train": "all"}, tuple(f"digit {i}" for i in range(10)))


# torchvision's data sets


def _list_torchvision(name: str, root: Path) -> _Listing:
    classes = _torchvision_classes()
    by_lower_name = {known.lower(): known for known in classes}
    if name.lower() not in by_lower_name:
        choices = [*by_lower_name, "digits"] if name.islower() else [*classes, "digits"]
        raise unknown("data folder or data set", name, choices)
    make = classes[by_lower_name[name.lower()]]
    try:
        parts, origin = _open_torchvision(make, root)
    except Exception as error:  # each data set has its own kinds
        raise DataError(_not_found(make, root, error)) from error
    for part in parts.values():
        label = part[0][1] if len(part) else None
        if not isinstance(label, Integral):
            raise DataError(
                f"torchvision's {make.__name__} has {type(label).__name__} for a label, not a class number."
            )
    return _Listing("torchvision", dict(parts), origin, _class_names(parts))


def _torchvision_classes() -> dict[str, type]:
    """Those that need nothing but `root` and have a training part."""
    from torchvision import datasets

    return {name: each for name, each in vars(datasets).items() if inspect.isclass(each) and _has_training_part(each)}


def _has_training_part(make: type) -> bool:
    parameters = inspect.signature(make).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    takes_transform = "transform" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    training_part = "train" in parameters or (
        "split" in parameters and str(parameters["split"].default).startswith("train")
    )
    return needed == ["root"] and takes_transform and training_part


def _open_torchvision(make: Callable[..., Any], root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    parameters = inspect.signature(make).parameters
    fixed = {"root": str(root)} | ({"download": False} if "download" in parameters else {})  # SEMEION's default is True
    if "train" in parameters:
        parts = {"train": make(**fixed, train=True), "validation": make(**fixed, train=False)}
        return parts, {"train": "train=True", "validation": "train=False"}
    for train, validation in SPLIT_PAIRS:
        try:
            last = make(**fixed, split=validation)
            parts = {"train": make(**fixed, split=train), "validation": last}
            return parts, {"train": f"split='{train}'", "validation": f"split='{validation}'"}
        except ValueError as error:
            if "Unknown value" not in str(error):  # torchvision's words for a split that a data set has not
                raise
    raise DataError(f"it has none of these pairs of splits: {', '.join(map('/'.join, SPLIT_PAIRS))}")


def _not_found(make: type, root: Path, error: Exception) -> str:
    """torchvision's own words, less its advice, which would be wrong here."""
    why = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    fetch = f", or fetch it once with torchvision.datasets.{make.__name__}('{root}', download=True)"
    can_download = "download" in inspect.signature(make).parameters
    return (
        f"torchvision's {make.__name__} cannot be read from '{root.absolute()}': {why}. "
        f"Give the folder that holds it as root{fetch if can_download else ''}."
    )


def _class_names(parts: dict[str, Any]) -> tuple[str, ...]:
    """WordNet ids where there are any, then names, then numbers as far as the labels go."""
    train = parts["train"]
    for attribute in ("wnids", "classes"):
        if getattr(train, attribute, None):
            return tuple(map(str, getattr(train, attribute)))
    for attribute in ("targets", "labels", "_labels"):
        if getattr(train, attribute, None) is not None:
            highest = max(int(label) for part in parts.values() for label in getattr(part, attribute))
            return tuple(f"class {i}" for i in range(highest + 1))
    highest = max(int(part[i][1]) for part in parts.values() for i in range(len(part)))
    return tuple(f"class {i}" for i in range(highest + 1))


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
        scale = max(height / image.height, width / image.width)  # 1 where nothing is to be resampled
        size = [max(height, round(scale * image.height)), max(width, round(scale * image.width))]
        if size != [image.height, image.width]:
            image = functional.resize(image, size, InterpolationMode(self.interpolation))
        image = functional.center_crop(image, [height, width])
        x = functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)  # (c, h, w) in 0..1
        return functional.normalize(x, list(self.mean), list(self.std))


def image_transform(
    input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> Callable[[Image], Tensor]:
    """What makes a backbone's input of a picture: the whole picture, its longer side cropped to the input's shape.

    Args:
        input_size: (c, h, w); c is 3 for colours or 1 for grey levels.
        mean: of each channel, in 0..1; one number stands for all channels.
        std: the same.
        interpolation: as torchvision's `InterpolationMode` names it.

    Raises:
        DataError: if c is neither 3 nor 1, or `mean` or `std` has another length.
        UnknownName: if there is no such interpolation.
    """
    from torchvision.transforms import InterpolationMode

    channels = input_size[0]
    if channels not in (1, 3):
        raise DataError(f"Pictures have 3 channels or 1, but the backbone reads {channels}: pass tensors from Python.")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise DataError(f"The {name} has {len(values)} numbers for {channels} channels: give 1 or {channels}.")
    if interpolation not in (modes := [mode.value for mode in InterpolationMode]):
        raise unknown("interpolation", interpolation, modes)
    c, h, w = input_size
    return _ToInput((c, h, w), tuple(mean), tuple(std), interpolation)


# Data from Python


class Batches(Protocol):
    """Batches that can be gone through again and again: a DataLoader, or something like it."""

    def __iter__(self) -> Iterator[Any]: ...  # noqa: D105

    def __len__(self) -> int: ...  # noqa: D105


def batches(
    data: Any, *, batch_size: int, shuffle: bool, generator: torch.Generator | None = None, num_workers: int = 0
) -> Batches:
    """The batches of a map-style data set; a loader is returned as it is, its own batches and order included.

    Raises:
        DataError: if `data` is empty, can be gone through only once, or is something else.
    """
    kind = type(data).__name__
    if _is_loader(data):
        return _not_empty(data)
    if isinstance(data, Iterator):
        raise DataError(f"Data is a {kind}, which can be read only once: pass the DataLoader or data set it came from.")
    if isinstance(data, IterableDataset):
        raise DataError(f"Data is a {kind}, an iterable data set: pass it as a torch DataLoader.")
    if isinstance(data, (str, bytes, tuple, Mapping)) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        raise DataError(
            f"Data is a {kind}, which is neither a map-style data set nor a DataLoader: "
            "for tensors, pass torch.utils.data.TensorDataset(images, labels)."
        )
    return DataLoader(
        _not_empty(data), batch_size=batch_size, shuffle=shuffle, generator=generator, num_workers=num_workers
    )


def _is_loader(data: Any) -> bool:
    return isinstance(data, DataLoader) or (
        # timm's and accelerate's loaders need not be torch's
        hasattr(data, "__iter__") and hasattr(data, "__len__") and not hasattr(data, "__getitem__")
    )


def _not_empty(data: Any) -> Any:
    try:
        empty = len(data) == 0
    except TypeError:  # a loader of an iterable data set does not know
        empty = False
    if empty:
        raise DataError(f"Data is empty: the {type(data).__name__} has length 0.")
    return data


def split_batch(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images (b, c, h, w) and labels (b,) int64, or None, of whatever a loader yields.

    Takes `(images, labels)`, `(images,)`, images alone, or a mapping with image, images or pixel_values and perhaps
    label or labels.

    Raises:
        DataError: if the batch is something else.
    """
    if isinstance(batch, Tensor):
        images, labels = batch, None
    elif isinstance(batch, Mapping):
        images, labels = (next((batch[k] for k in keys if k in batch), None) for keys in (IMAGE_KEYS, LABEL_KEYS))
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        images, labels = batch[0], batch[1] if len(batch) == 2 else None
    else:
        images, labels = None, None
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise DataError(f"A batch should be (images (b, c, h, w), labels (b,)), but it is {_describe(batch)}.")
    return images, None if labels is None else _class_numbers(labels, len(images))


def _class_numbers(labels: Any, b: int) -> Tensor:
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, 0)
    if numbers.shape == (b, 1):
        numbers = numbers.flatten()  # (b, 1) -> (b,)
    if numbers.shape != (b,) or numbers.is_floating_point() or numbers.is_complex():
        raise DataError(f"The labels of {b} images should be class numbers ({b},), but they are {_describe(labels)}.")
    return numbers.long()


def _describe(value: Any) -> str:
    """Types and shapes, as in `tuple (Tensor (4, 3, 8, 8) float32, str)`."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"{kind} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{kind} with keys {_some(list(map(str, value)))}"
    if isinstance(value, (tuple, list)):
        return f"{kind} ({_some(list(map(_describe, value)), 3)})"
    return kind


# The backbone's classes


@dataclass(frozen=True)
class LabelMap:
    """The backbone's class for each class of the data.

    Attributes:
        indices: one for each class of the data; None where the classes cannot be mapped.
        reason: a sentence for the user.
    """

    indices: tuple[int, ...] | None
    reason: str

    def __call__(self, label: int) -> int:
        """The backbone's number of a class; -1 if it is not known."""
        return UNKNOWN_LABEL if self.indices is None else self.indices[label]


def map_labels(class_names: Sequence[str], num_classes: int) -> LabelMap:
    """How the classes of the data become the backbone's.

    WordNet ids go to their places in ImageNet-1k if the backbone has 1000 classes. Names that are class numbers of the
    backbone go to these. Else as many classes as the backbone has keep their order.
    """
    n = len(class_names)
    if num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in class_names):
        return _map_wordnet(class_names)
    if all(name.isascii() and name.isdigit() and int(name) < num_classes for name in class_names):
        numbers = tuple(map(int, class_names))
        if len(set(numbers)) == n:  # '7' and '07' would be one class
            return LabelMap(numbers, f"The {n} class names are taken as numbers of the backbone's classes.")
    if n == num_classes:
        return LabelMap(
            tuple(range(n)), f"The {n} classes are taken for the backbone's, in this order: {_some(class_names)}."
        )
    return LabelMap(None, f"{n} classes ({_some(class_names)}) cannot be mapped to the backbone's {num_classes}.")


def _map_wordnet(class_names: Sequence[str]) -> LabelMap:
    from timm.data import ImageNetInfo

    place = {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    strange = [name for name in class_names if name not in place]
    if strange:
        return LabelMap(None, f"These WordNet ids are not among the classes of ImageNet-1k: {_some(strange)}.")
    n = len(class_names)
    return LabelMap(
        tuple(place[name] for name in class_names), f"{n} WordNet ids are mapped to classes of ImageNet-1k."
    )


class _Relabelled(Labelled):
    def __init__(self, dataset: Labelled, label_map: LabelMap) -> None:
        self.dataset, self.label_map = dataset, label_map

    def __len__(self) -> int:
        return _length(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return image, self.label_map(int(label))


def with_labels(dataset: Labelled, label_map: LabelMap) -> Labelled:
    """The same images with the backbone's labels; all -1 where they cannot be mapped."""
    return _Relabelled(dataset, label_map)
