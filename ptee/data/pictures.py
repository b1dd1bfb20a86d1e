"""Image folders and tar files: which pictures lie in them, of which part and class, and where. Finding decodes none."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ptee._common.errors import DataError, some

if TYPE_CHECKING:
    from PIL.Image import Image

# What the folders and tar files of a source may be called, in any case; the first that is there is used.
PARTS = {
    "train": ("train", "training"),
    "calibration": ("calibration",),
    "validation": ("val", "valid", "validation", "test"),
}
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LAYOUTS = "train/CLASS/*.jpg with val/CLASS/*.jpg, or CLASS/*.jpg, or train.tar with validation.tar"
TAR_BLOCK_BYTES = 512


class File(NamedTuple):
    """An encoded picture: `size` bytes of the file `path`, from `offset` on."""

    path: str
    name: str  # inside its part
    offset: int = 0
    size: int = -1  # to the end


@dataclass(frozen=True)
class Listing:
    """What a source delivers, before missing parts are drawn; pictures are `File` or `PIL.Image`."""

    kind: str
    parts: Mapping[str, Sequence[tuple[Any, int]]]
    origin: dict[str, str]  # what each part is called in the source
    class_names: tuple[str, ...]


def list_files(folder: Path) -> Listing:
    """The pictures of a folder that is a data set, in tar files or class folders.

    Raises:
        DataError: if it holds none, classes that the training images lack, several data sets, or a damaged tar file.
    """
    tars, folders = _tars(folder), _part_folders(folder)
    if "train" in tars:
        return _number_classes("tar", {part: _read_tar(path) for part, path in tars.items()}, tars)
    if "train" not in folders:
        _refuse_data_sets(folder)
        folders = {"train": folder}
    return _number_classes("folder", {part: _read_folder(path) for part, path in folders.items()}, folders)


def _tars(folder: Path) -> dict[str, Path]:
    return _find_parts({path.stem: path for path in _visible(folder) if path.suffix.lower() == ".tar"})


def _part_folders(folder: Path) -> dict[str, Path]:
    """A part holds class folders; pictures may be in a class that is called 'train'."""
    return _find_parts({path.name: path for path in _visible(folder) if any(map(Path.is_dir, _visible(path)))})


def _refuse_data_sets(folder: Path) -> None:
    """Its folders would be taken for classes; but where some are whole data sets, one of those was meant."""
    candidates = [path for path in _visible(folder) if any(p.stem.lower() in PARTS["train"] for p in _visible(path))]
    found = {path: _tars(path) | _part_folders(path) for path in candidates}
    whole = [
        f"'{path}' ({', '.join(part.name for part in parts.values())})"
        for path, parts in found.items()
        if {"train", "validation"} <= parts.keys()
    ]
    if whole:
        raise DataError(
            f"'{folder}' does not hold classes, but data sets with parts of their own: did you mean {' or '.join(whole)}?"
        )


def _find_parts(paths: dict[str, Path]) -> dict[str, Path]:
    lower = {name.lower(): path for name, path in paths.items()}  # of Train and train the latter, which comes later
    found = {part: next((lower[name] for name in names if name in lower), None) for part, names in PARTS.items()}
    return {part: path for part, path in found.items() if path}


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names; nothing if it is no folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def _read_folder(folder: Path) -> list[tuple[File, str]]:
    """The pictures below each class folder, and their classes."""
    files = {path.name: _pictures_below(path) for path in _visible(folder) if path.is_dir()}
    if not any(files.values()):
        if any(path.suffix.lower() in EXTENSIONS for path in _visible(folder)):
            raise DataError(
                f"The images of '{folder}' lie in no class folder. Where they have no labels, move them into a single one: "
                f"{folder / 'all'}."
            )
        raise DataError(f"No images in class folders of '{folder}': it should hold {LAYOUTS}.")
    if {name for names in PARTS.values() for name in names}.issuperset(map(str.lower, files)):
        raise DataError(f"'{folder}' holds {' and '.join(files)} without class folders: it should hold {LAYOUTS}.")
    return [(File(path, os.path.relpath(path, folder)), name) for name in files for path in files[name]]


def _pictures_below(folder: Path) -> list[str]:
    # os.walk asks nothing of each single file, which on a million files is minutes less than Path.rglob and is_file
    found = (Path(top, name) for top, _, names in os.walk(folder) for name in names if name[0] != ".")
    return sorted(str(path) for path in found if path.suffix.lower() in EXTENSIONS)


def _read_tar(path: Path) -> list[tuple[File, str]]:
    """The pictures in one tar file and their classes, found by timm's reader.

    The reader itself would keep an open file, which the workers of a loader share, each moving the other's position.
    So only where the pictures lie is kept.
    """
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        reader = ReaderImageInTar(str(path), cache_tarinfo=False)  # True would leave a pickle beside the data
        starts = [member.offset_data + (outer.offset_data if outer else 0) for member, _, outer in reader.samples]
        members = [member for member, _, _ in reader.samples]
        _check_end(path, max(start + member.size for start, member in zip(starts, members, strict=True)))
    except ValueError as error:  # timm unpacks an empty list
        raise DataError(f"No images in '{path}': its members should be CLASS/*.jpg, *.jpeg or *.png.") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"'{path}' is cut off or no tar file ({error}): make or fetch it again.") from error
    names = [reader.class_idx_to_name[target] for target in reader.targets]
    if not all(names):
        raise DataError(f"'{path}' holds images outside of class folders: its members should be CLASS/*.jpg.")
    files = [File(str(path), m.name, start, m.size) for m, start in zip(members, starts, strict=True)]
    return [(f, name) for f, name in zip(files, names, strict=True) if not Path(f.name).name.startswith(".")]


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header or the end of the file for the end of the archive, which is a block of zeros."""
    with path.open("rb") as file:
        file.seek(-(-end // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES)
        block = file.read(TAR_BLOCK_BYTES)
    if block != bytes(TAR_BLOCK_BYTES):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # a member that is no picture, or HeaderError


def _number_classes(kind: str, parts: dict[str, list[tuple[File, str]]], paths: dict[str, Path]) -> Listing:
    """Classes in the order of their names, as torchvision numbers them; the training images say which there are."""
    class_names = tuple(sorted({name for _, name in parts["train"]}))
    number = {name: index for index, name in enumerate(class_names)}
    for part, files in parts.items():
        strange = sorted({name for _, name in files}.difference(class_names))
        if strange:
            where = f"'{paths[part]}' has classes that '{paths['train']}' has not"
            raise DataError(f"{where}: {some(strange)}; remove or rename them.")
    labelled = {part: [(file, number[name]) for file, name in files] for part, files in parts.items()}
    return Listing(kind, labelled, {part: path.name for part, path in paths.items()}, class_names)


def decode(file: File) -> Image:
    """The picture in a file.

    Raises:
        DataError: naming the one that cannot be decoded.
    """
    from PIL import Image

    try:
        with Path(file.path).open("rb") as stream:
            stream.seek(file.offset)
            image = Image.open(BytesIO(stream.read(file.size)))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = f"{file.name}' in '{file.path}" if file.size >= 0 else file.path
        raise DataError(f"Picture '{name}' cannot be decoded: replace or remove it.") from error
    return image
