"""Image folders and tar files: which pictures lie in them, of which part and class, and where. Finding decodes none.

The classes, hidden folders, links and unread files are looked after here, as neither timm's nor torchvision's reader names
what it passes over.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ptee._common.errors import DataError, some
from ptee.data.pictures import File

PARTS = ("train", "calibration", "validation")
# What a part may be called, in any case, best first; "set" and other words may follow: test_set, val2017, "Training images".
NAMES = {
    "train": ("train", "training"),
    "calibration": ("calibration", "calib"),
    "validation": (
        *("val", "valid", "validation", "validate", "validating", "dev", "development"),
        *("eval", "evaluation", "evaluate", "test", "testing", "holdout"),
    ),
}
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pictures, too, but neither torchvision nor ptee reads them, so a backbone was not trained on them.
UNREAD = (
    *(".avif", ".cr2", ".dds", ".dng", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jxl", ".nef"),
    *(".npy", ".pbm", ".pcx", ".raw", ".svg", ".tga"),
)
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip")
SYSTEM_FOLDERS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found")
LINK = "linked"  # in a tar file
LAYOUTS = "train/CLASS/*.jpg with val/CLASS/*.jpg, or CLASS/*.jpg, or train.tar with validation.tar"
TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Listing:
    """What a source delivers, before missing parts are drawn.

    Attributes:
        kind: of the source: "folder", "tar", or another.
        parts: for each, pictures (`File` or `PIL.Image`) with their labels.
        origin: what each part is called in the source.
        class_names: in the order of the labels.
        not_read: what lies in the source beside that, in words.
    """

    kind: str
    parts: Mapping[str, Sequence[tuple[Any, int]]]
    origin: dict[str, str]
    class_names: tuple[str, ...]
    not_read: tuple[str, ...] = ()


@dataclass
class _Found:
    """What lies in one part."""

    files: dict[str, list[File]]  # of each class, those without pictures included
    not_read: list[str] = field(default_factory=list)
    others: dict[str, Counter[str]] = field(default_factory=dict)  # how many files a class holds of other kinds


class _Named(NamedTuple):
    rank: tuple[int, int, str]
    path: Path


def list_files(folder: Path, *, report_only: bool = False, removed: Sequence[tuple[str, str, str]] = ()) -> Listing:
    """The pictures of a folder that is a data set, in tar files or class folders.

    Args:
        folder: that is there.
        report_only: validation images alone will do.
        removed: keys of files that could not be read and may be missing now.

    Raises:
        DataError: if it holds none, classes that the training images lack, several data sets, a part or a class that
            cannot be read, or a damaged tar file.
    """
    tars = {path: part_of(path.stem) for path in _visible(folder) if path.suffix.lower() == ".tar" and path.is_file()}
    named = {path: part_of(path.name) for path in _subfolders(folder)}
    folders = {path: part for path, part in named.items() if part and _subfolders(path)}
    needed = ("train", "validation") if report_only else ("train",)
    found, kind = _best(tars), "tar"
    if not any(part in found for part in needed):
        found, kind = _best(folders), "folder"
    whole = not any(part in found for part in needed)
    if whole:
        _refuse_unknown_parts(folder, named, {path: part for path, part in (tars | folders).items() if part})
        _refuse_data_sets(folder)
        found = {"train": folder}
    not_read = [] if whole else _beside(folder, found, named, PARTS[2:] if report_only else PARTS)
    read = _read_tar if kind == "tar" else _read_folder
    parts = {part: read(path, part) for part, path in found.items()}
    for part, each in parts.items():
        not_read += _told_of(each, part, found[part], strict=part == "train" and not report_only)
    return _number_classes(kind, parts, found, removed, tuple(not_read))


def part_of(name: str) -> str | None:
    """The part that a folder or tar file of this name holds, or None."""
    return next((part for part, words in NAMES.items() if _first_word(name) in words), None)


def _first_word(name: str) -> str:
    return re.sub("(set|data|images)$", "", re.match("[a-z]*", name.strip().lower())[0])  # type: ignore[index]


def _best(paths: Mapping[Path, str | None]) -> dict[str, Path]:
    """The path for each part that has the best name, in the order of parts."""
    ranked: dict[str, list[_Named]] = {part: [] for part in PARTS}
    for path, part in paths.items():
        if part is not None:
            rank = (NAMES[part].index(_first_word(path.stem)), len(path.stem), path.stem)
            ranked[part].append(_Named(rank, path))
    return {part: min(named).path for part, named in ranked.items() if named}


def _visible(folder: Path) -> list[Path]:
    """What a folder holds that is not hidden, in the order of names; nothing if it is no folder."""
    try:
        return sorted(path for path in folder.iterdir() if not _is_hidden(path.name)) if folder.is_dir() else []
    except OSError as why:
        raise _not_listed(why) from why


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


def _not_listed(why: OSError) -> DataError:
    return DataError(
        f"Folder '{why.filename}' cannot be read ({why.strerror}): change its permissions, or move it away."
    )


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:  # which knows folders without asking for each file
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not _is_hidden(entry.name))
    except OSError as why:
        raise _not_listed(why) from why


# ------------------------------------------------------------------------------------------------ what is refused or told


def _refuse_unknown_parts(folder: Path, named: Mapping[Path, str | None], parts: Mapping[Path, str]) -> None:
    """Parts without the training images would be taken for classes."""
    if not parts:
        return
    flat = [path.name for path, part in named.items() if part == "train" and path not in parts]
    why = f", and the images of '{flat[0]}' lie in no class folders" if flat else ", but no training images"
    holds = " and ".join(f"'{path.name}'" for path in parts)
    raise DataError(f"'{folder}' holds {holds}{why}: it should hold {LAYOUTS}.")


def _refuse_data_sets(folder: Path) -> None:
    """Its folders would be taken for classes; but where some are whole data sets, one of those was meant."""
    whole = []
    for path in _subfolders(folder):
        inside = {each: part_of(each.stem) for each in _visible(path)}
        likely = {each: part for each, part in inside.items() if part}
        parts = _best({each: part for each, part in likely.items() if _is_part(each)})
        if {"train", "validation"} <= parts.keys():
            whole.append(f"'{path}' ({', '.join(part.name for part in parts.values())})")
    if whole:
        raise DataError(
            f"'{folder}' does not hold classes, but data sets with parts of their own: did you mean {' or '.join(whole)}?"
        )


def _is_part(path: Path) -> bool:
    return bool(_subfolders(path)) if path.is_dir() else path.suffix.lower() == ".tar"


def _beside(
    folder: Path, found: Mapping[str, Path], named: Mapping[Path, str | None], wanted: Sequence[str]
) -> list[str]:
    """What lies beside the parts that are read.

    Raises:
        DataError: if it looks like a part that is wanted and missing.
    """
    for path, part in named.items():
        if part in wanted and part not in found:
            holds = "pictures that lie in no class folders" if any(map(_is_picture, _visible(path))) else "no images"
            raise DataError(
                f"'{path}' holds {holds}, beside '{next(iter(found.values())).name}': sort its pictures into class folders of "
                "the same names, or move it away."
            )
    rest = [path for path in _visible(folder) if path not in found.values()]
    return [f"{path.name}/" for path in rest if path.is_dir()] + _loose(rest)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS + UNREAD and not path.is_dir()


def _loose(paths: Sequence[Path]) -> list[str]:
    """Archives and pictures beside folders."""
    n = sum(map(_is_picture, paths))
    archives = [path.name for path in paths if path.suffix.lower() in (".tar", *ARCHIVES) and not path.is_dir()]
    return archives + ([f"{n:,} picture{'s' * (n != 1)} outside of class folders"] if n else [])


def _told_of(found: _Found, part: str, path: Path, *, strict: bool) -> list[str]:
    """What is not read of a part, in words.

    Raises:
        DataError: if `strict` and it holds classes without pictures, which the backbone may have.
    """
    empty = [name for name, files in found.files.items() if not files]
    kinds = {name: ", ".join(f"{n} {kind}" for kind, n in found.others.get(name, {}).items()) for name in empty}
    words = [f"{name} ({kinds[name]})" if kinds[name] else f"{name} (empty)" for name in empty]
    if empty and strict:
        raise DataError(
            f"Class folder{'s' * (len(empty) > 1)} of '{path}' without pictures that can be read: {some(words)}. Save the "
            f"pictures as .png or .jpg, or remove the folder{'s' * (len(empty) > 1)}."
        )
    told = [f"class {name} of {part}" for name in words]
    pictures: Counter[str] = Counter()
    for name, kind_counts in found.others.items():
        if name not in empty:
            pictures += Counter({kind: n for kind, n in kind_counts.items() if kind in (*UNREAD, LINK)})
    told += [f"{n:,} {kind} file{'s' * (n > 1)} of {part}" for kind, n in pictures.items()]
    return told + [f"{words} of {part}" for words in found.not_read]


# ------------------------------------------------------------------------------------------------ read


def _read_folder(folder: Path, part: str) -> _Found:
    """The pictures below each class folder."""
    found = _Found({}, _loose(_visible(folder)))
    for path in _subfolders(folder):
        names, found.others[path.name] = _files_below(path)
        below = len(str(path))
        found.files[path.name] = [
            File(name, path.name + name[below:].replace(os.sep, "/"), part, path.name) for name in names
        ]
    if not any(found.files.values()):
        _refuse_no_images(folder, found)
    if all(map(part_of, found.files)):
        parts = " and ".join(found.files)
        raise DataError(f"'{folder}' holds {parts} without class folders: it should hold {LAYOUTS}.")
    return found


def _refuse_no_images(folder: Path, found: _Found) -> None:
    if any(map(_is_picture, _visible(folder))):
        raise DataError(
            f"The images of '{folder}' lie in no class folder. Where they have no labels, move them into a single one: "
            f"{folder / 'all'}."
        )
    archives = [path.name for path in _visible(folder) if path.suffix.lower() in ARCHIVES]
    unpack = f" Unpack {some(archives)} first." if archives else ""
    kinds = sum(found.others.values(), Counter())
    holds = f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else ""
    raise DataError(f"No images in class folders of '{folder}'{holds}: it should hold {LAYOUTS}.{unpack}")


def _files_below(folder: Path) -> tuple[list[str], Counter[str]]:
    """The pictures below a class folder, as torchvision finds them, but for hidden ones; and how many others of each kind."""
    pictures, others = [], Counter[str]()
    # os.walk asks nothing of each single file, which on a million files is minutes less than Path.rglob and is_file
    for top, inner, names in os.walk(folder, followlinks=True, onerror=_refuse_unlisted):
        inner[:] = [name for name in inner if not _is_hidden(name) and not _leads_back(top, name)]
        for path in (Path(top, name) for name in names if not _is_hidden(name)):
            if path.suffix.lower() in EXTENSIONS:
                pictures.append(str(path))
            else:
                others[path.suffix.lower() or "without extension"] += 1
    return sorted(pictures), others


def _refuse_unlisted(why: OSError) -> None:
    raise _not_listed(why) from why


def _leads_back(top: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    path = Path(top, name)
    return path.is_symlink() and Path(top).resolve().is_relative_to(path.resolve())


def _read_tar(path: Path, part: str) -> _Found:
    """The pictures in one tar file, by the folder or inner tar file that each lies in, which timm calls their class.

    timm's reader would keep an open file, which the workers of a loader share, each moving the other's position. So only
    where the pictures lie is kept.
    """
    found = _Found({})
    files: list[File] = []
    try:
        with path.open("rb") as stream:
            end = _read_members(stream, path, part, found, files)
        _check_end(path, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"'{path}' is cut off or no tar file ({error}): make or fetch it again.") from error
    if not files:
        raise DataError(f"No images in '{path}': its members should be CLASS/*.jpg or *.png.")
    for file in files:
        if not file.class_name:
            raise DataError(f"'{path}' holds images outside of class folders: its members should be CLASS/*.jpg.")
        found.files[file.class_name].append(file)
    return found


def _read_members(
    stream: BinaryIO, path: Path, part: str, found: _Found, files: list[File], class_name: str = "", start: int = 0
) -> int:
    """Add the pictures of a tar file, or of one inside it that begins at `start`; where the last member ends."""
    end, folders, classes = start, [], set()
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            names = [name for name in member.name.split("/") if name not in ("", ".")]
            offset = start + member.offset_data
            end = max(end, offset + member.size * member.isfile())
            if any(map(_is_hidden, names)):
                continue
            *above, name = names or [""]
            inside, extension = above[-1] if above else class_name, Path(name).suffix.lower()
            if member.isdir():
                folders.append((*above, name))
            elif member.isfile() and extension == ".tar":
                inner: Any = tar.extractfile(member)
                _read_members(inner, path, part, found, files, Path(name).stem, offset)
            elif member.isfile() and extension in EXTENSIONS:
                classes.add(tuple(above))
                found.files.setdefault(inside, [])
                files.append(File(str(path), member.name, part, inside, offset, member.size))
            elif extension in EXTENSIONS + UNREAD:
                found.files.setdefault(inside, [])
                found.others.setdefault(inside, Counter())[extension if member.isfile() else LINK] += 1
    beside = {place[:-1] for place in classes if place}
    for place in folders:
        if place not in classes and place[:-1] in beside:  # an empty class
            found.files.setdefault(place[-1], [])
    return end


def _check_end(path: Path, end: int) -> None:
    """tarfile takes a damaged header or the end of the file for the end of the archive, which is a block of zeros."""
    with path.open("rb") as file:
        file.seek(-(-end // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES)
        block = file.read(TAR_BLOCK_BYTES)
    if block != bytes(TAR_BLOCK_BYTES):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # a member that is no picture, or HeaderError


# ------------------------------------------------------------------------------------------------ labels


def _number_classes(
    kind: str,
    parts: Mapping[str, _Found],
    paths: Mapping[str, Path],
    removed: Sequence[tuple[str, str, str]],
    not_read: tuple[str, ...],
) -> Listing:
    """Classes in the order of their names as text; the training images say which there are."""
    first = next(iter(parts))  # "train" if it is there
    telling = [parts[first]] if first == "train" else list(parts.values())
    class_names = tuple(sorted({name for found in telling for name, files in found.files.items() if files}))
    number = {name: index for index, name in enumerate(class_names)}
    for part, found in parts.items():
        strange = sorted({name for name, files in found.files.items() if files}.difference(class_names))
        if strange:
            where = f"'{paths[part]}' has classes that '{paths[first]}' has not"
            raise DataError(f"{where}: {some(strange)}; remove or rename them.")
    labelled = {}
    for part, found in parts.items():
        files = [file for each in found.files.values() for file in each]
        there = {file.name for file in files}
        gone = [(name, own) for whose, name, own in removed if whose == part and name not in there and own in number]
        files += [File("", name, part, own) for name, own in gone]
        labelled[part] = [(file, number[file.class_name]) for file in sorted(files, key=_order(kind))]
    return Listing(kind, labelled, {part: path.name for part, path in paths.items()}, class_names, not_read)


def _order(kind: str) -> Any:
    """The order of files, which does not depend on the file system or on what was removed."""
    from timm.utils.misc import natural_key

    if kind == "tar":
        return lambda file: (natural_key(file.name), file.name)
    return lambda file: (file.class_name, file.name)
