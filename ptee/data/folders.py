"""Image folders and tar files: which pictures lie in them, and of which part and class. No picture is decoded.

timm's and torchvision's readers do not say what they leave out, so ptee has its own: it names every class, part, archive and
kind of picture that it does not read.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from ptee._common.errors import DataError, some
from ptee._common.files import packed_by
from ptee._common.listing import (
    EXTENSIONS,
    LAYOUTS,
    files_below,
    folders_by_place,
    hidden_folders,
    is_one_of_several,
    refuse_broken_link,
    subfolders,
    tar_members,
    visible,
)
from ptee._common.text import number_of, spelt
from ptee.data.pictures import File, Key, is_no_picture, require_no_masks, same_folders
from ptee.data.splits import PART_OF, PARTS, first_word, part_of, parts_of, siblings, with_all_parts, word_of

# Pictures that neither torchvision nor ptee reads, so the backbone was not trained on them.
UNREAD = (
    *(".avif", ".cr2", ".dds", ".dng", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".jxl", ".nef"),
    *(".npy", ".pbm", ".pcx", ".raw", ".svg", ".tga"),
)
ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip")
# Files that may hold the pictures of a whole part, and are not read.
PACKED = (".arrow", ".beton", ".h5", ".hdf5", ".lmdb", ".npy", ".npz", ".parquet", ".rec", ".tfrecord", ".tfrecords")
LINK, SPARSE = "linked", "sparse"  # a picture in a tar file that is a link to another, or is stored without its zeros
SPECIAL = {tarfile.FIFOTYPE: "named-pipe", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device"}
BARE = "without extension"  # a file that may be a picture, and is not read
# May be pictures or hold some, and are not read.
NO_PICTURES = (*UNREAD, *ARCHIVES, *PACKED, LINK, SPARSE, *SPECIAL.values())


@dataclass(frozen=True)
class Listing:
    """What a source delivers."""

    kind: str  # of the source: "folder", "tar", or another
    parts: Mapping[str, Sequence[tuple[Any, int]]]  # for each part, pictures (`File` or `PIL.Image`) with their labels
    origin: dict[str, str]  # the name of each part in the source
    class_names: tuple[str, ...]  # in the order of the labels
    not_read: tuple[str, ...] = ()  # what else lies in the source, in words
    all_read: str = ""  # which folders of classes are read, though they may be no pictures of the class, in words


@dataclass
class _Part:
    """What lies in one part."""

    files: dict[str, list[File]] = field(default_factory=dict)  # by class; classes without pictures included
    # by class: kind, number
    others: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    loose: list[str] = field(default_factory=list)  # outside of class folders, in words

    @property
    def classes(self) -> set[str]:
        """The classes that have pictures."""
        return {name for name, files in self.files.items() if files}


def list_files(folder: Path, *, report_only: bool = False, removed: Sequence[Key] = ()) -> Listing:
    """The pictures of a folder that holds tar files or class folders, as `sources.open_data` takes it.

    Raises:
        DataError: if it holds no pictures, several data sets, classes that the training images lack, or a part, a class or
            a tar file that cannot be read.
    """
    tars = _named(path for path in visible(folder) if path.suffix.lower() == ".tar" and path.is_file())
    named = _named(subfolders(folder))
    folders = {path: part for path, part in named.items() if part and subfolders(path)}
    needed = {"train", "validation"} if report_only else {"train"}
    kind, found = "tar", _best(tars)
    if not needed & found.keys():
        kind, found = "folder", _best(folders)
    if needed & found.keys():
        not_read = _beside(folder, found, tars | named, PARTS[2:] if report_only else PARTS)
        found = {part: _inner(path, part) for part, path in found.items()}
    else:
        _refuse_unknown_parts(folder, named, [path for path, part in (tars | folders).items() if part])
        _refuse_data_sets(folder, report_only)
        _refuse_parts_of_classes(folder)
        _refuse_same_subfolders(folder)
        found, not_read = {"train": folder}, []
    _refuse_same(folder, found)
    read = _read_tar if kind == "tar" else _read_folder
    parts = {part: read(path, part) for part, path in found.items()}
    if "train" in parts and not report_only:
        _refuse_empty_classes(parts["train"], found["train"])
    for part, own in parts.items():
        require_no_masks(found[part], (file for files in own.files.values() for file in files))
    not_read += [words for part, own in parts.items() for words in _left_out(own, part * (found[part] != folder))]
    all_read = same_folders(next(iter(parts.values())).files)
    return replace(_number_classes(kind, parts, found, removed), not_read=tuple(not_read), all_read=all_read)


def _named(paths: Iterable[Path]) -> dict[Path, str | None]:
    """The part that each path says."""
    of_name = {path.name: path for path in paths}
    parts = parts_of(of_name)
    return {path: parts.get(name) for name, path in of_name.items()}


def _inner(path: Path, part: str) -> Path:
    """The class folders of a part may lie in one folder more of a like name: seg_train/seg_train/CLASS."""
    inside = visible(path) if path.is_dir() else []
    if len(inside) == 1 and inside[0].is_dir() and PART_OF.get(word_of(inside[0].name)[0]) == part:
        return inside[0] if subfolders(inside[0]) else path
    return path


def _best(paths: Mapping[Path, str | None]) -> dict[str, Path]:
    """For each part, the path that has the best name."""

    def rank(path: Path) -> tuple[int, int, str]:
        word = first_word(path.stem) if part_of(path.stem) else word_of(path.name)[0]
        return list(PART_OF).index(word), len(path.stem), path.stem

    of_part = {part: [path for path in paths if paths[path] == part] for part in PARTS}
    return {part: min(own, key=rank) for part, own in of_part.items() if own}


# ------------------------------------------------------------------------------------------------ what is refused or named


def _refuse_unknown_parts(folder: Path, named: Mapping[Path, str | None], parts: Sequence[Path]) -> None:
    """Without training images, the folders of other parts would be taken for classes."""
    if not parts:
        return
    flat = [path.name for path, part in named.items() if part == "train" and path not in parts]
    why = f", and the images of '{flat[0]}' lie in no class folders" if flat else ", but no training images"
    holds = " and ".join(f"'{path.name}'" for path in parts)
    raise DataError(f"'{folder}' holds {holds}{why}: it should hold {LAYOUTS}.")


def _refuse_data_sets(folder: Path, report_only: bool) -> None:
    """Folders that are whole data sets would be taken for classes. `report_only`: validation images alone will do."""
    whole, tops = [], subfolders(folder)
    for path in map(_unwrapped, tops):
        inside = {each: part_of(each.stem) for each in visible(path)}
        parts = _best({each: part for each, part in inside.items() if part and _is_part(each)})
        alone = len(tops) == 1 and ("train" in parts or (report_only and "validation" in parts))
        if alone or {"train"} < parts.keys():
            whole.append(f"'{path}' ({', '.join(part.name for part in parts.values())})")
    if whole:
        raise DataError(
            f"'{folder}' does not hold classes, but data sets with parts of their own: did you mean {' or '.join(whole)}?"
        )


def _unwrapped(folder: Path, deepest: int = 5) -> Path:
    """The folder, or the one that it holds if it holds nothing else, but no part: an archive is often unpacked into a folder of its name."""
    inside = visible(folder)
    if deepest and len(inside) == 1 and subfolders(folder) and not part_of(inside[0].name):
        return _unwrapped(inside[0], deepest - 1)
    return folder


def _refuse_parts_of_classes(folder: Path) -> None:
    """Parts inside of classes would be mixed, and images drawn from all of them."""
    for path in subfolders(folder):
        if found := siblings(_with_pictures(path)):
            parts = sorted(found, key=lambda name: PARTS.index(found[name]))
            to, here = (" and ".join(f"{part}/{name}" for part in parts) for name in ("CLASS", path.name))
            raise DataError(
                f"Class folder '{path}' holds parts of its own ({some(parts)}): move them to {to}, here {here}, and those of the "
                "other classes too."
            )


def _refuse_same_subfolders(folder: Path) -> None:
    """Folders that all hold the same class folders are parts, whatever their names. More of them than that are classes in two levels."""
    tops = subfolders(folder)
    same = _with_pictures(tops[0]) if len(tops) > 1 else []
    if any(len({*map(is_no_picture, names)}) == 2 for names in (same, [top.name for top in tops])):
        return  # images/ and masks/, of which `require_no_masks` speaks
    if len(same) >= max(2, len(tops)) and all(_with_pictures(top) == same for top in tops[1:]):
        raise DataError(
            f"The folders {some([top.name for top in tops])} of '{folder}' all hold {some(same)}, so they look like parts, not "
            "classes: rename one to train and one to val. If they are classes, move the pictures of each into it, without subfolders."
        )


def _with_pictures(folder: Path) -> list[str]:
    return [path.name for path in subfolders(folder) if any(map(_is_picture, visible(path)))]


def _refuse_same(folder: Path, found: Mapping[str, Path]) -> None:
    """Two parts that are one folder or one file: results would be of images that the heads have seen."""
    for one, other in combinations(found.values(), 2):
        if one.samefile(other):
            raise DataError(
                f"'{one.name}' and '{other.name}' of '{folder}' are the same images: remove '{other.name}', and images are drawn in "
                "its place, or replace it by others."
            )


def _is_part(path: Path) -> bool:
    return bool(subfolders(path)) if path.is_dir() else path.suffix.lower() == ".tar"


def _beside(
    folder: Path, found: Mapping[str, Path], named: Mapping[Path, str | None], wanted: Collection[str]
) -> list[str]:
    """What lies beside the parts that are read. What looks like a missing part that is wanted is refused."""
    first = next(iter(found.values()))
    for path, part in named.items():
        if part in wanted and part not in found:
            raise DataError(f"'{path}' {_why_no_part(path, first)}, or move it away.")
    rest = [path for path in visible(folder) if path not in found.values()]
    for path in rest:
        part = _part_in_name(path)
        if part in wanted and part not in found and path.suffix.lower() in (*ARCHIVES, *PACKED):
            what, instead = "of a kind that is not read", f"save its pictures as {part}/CLASS/*.png"
            if path.suffix.lower() in ARCHIVES:
                what, instead = "compressed", "unpack it once"
            raise DataError(f"'{path}' is {what}, beside '{first.name}': {instead}, or move it away.")
    return [f"{path.name}/" for path in rest if path.is_dir()] + _loose(rest)


def _why_no_part(path: Path, first: Path) -> str:
    """Why a path is not read as a part beside the part `first`, and what to do."""
    kinds = ("folder", "tar file") if path.is_dir() else ("tar file", "folder")
    if first.is_dir() != path.is_dir() and (not path.is_dir() or subfolders(path)):
        return f"is a {kinds[0]}, but '{first.name}' a {kinds[1]}: make both folders or both tar files"
    holds = "pictures that lie in no class folders" if any(map(_is_picture, visible(path))) else "no images"
    return f"holds {holds}, beside '{first.name}': sort its pictures into class folders of the same names"


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS + UNREAD and not path.is_dir()


def _part_in_name(path: Path) -> str | None:
    """The part that a file says by its name, as val.csv and validation-00000-of-00001.parquet do."""
    return None if path.is_dir() else part_of(path.name.partition(".")[0])


def _loose(paths: Sequence[Path]) -> list[str]:
    """The files among some paths that hold pictures, or may say which images are for what, in words."""
    n = sum(map(_is_picture, paths))
    kinds = (".tar", *ARCHIVES, *PACKED)
    files = [path for path in paths if not path.is_dir() and not _is_picture(path)]
    named = [path.name for path in files if path.suffix.lower() in kinds or _part_in_name(path)]
    return named + ([number_of(n, "picture", which=" outside of class folders")] if n else [])


def _refuse_empty_classes(found: _Part, path: Path) -> None:
    """The backbone may have classes of which no picture can be read."""
    if empty := _empty_classes(found):
        s = "s" * (len(empty) > 1)
        raise DataError(
            f"Class folder{s} of '{path}' without pictures that can be read: {some(empty)}. Save the pictures as .png or .jpg, "
            f"or remove the folder{s}."
        )


def _empty_classes(found: _Part) -> list[str]:
    """Classes without pictures, each with what it holds instead."""
    empty = [name for name, files in found.files.items() if not files]
    return [f"{name} ({_numbers(found.others[name]) or 'empty'})" for name in empty]


def _numbers(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def _left_out(found: _Part, part: str) -> list[str]:
    """What is not read of a part, in words. `part` is empty if the source has no parts."""
    pictures: Counter[str] = Counter()
    for name in found.classes:
        pictures.update({kind: n for kind, n in found.others[name].items() if kind in NO_PICTURES})
    kinds = [number_of(n, f"{kind} file") for kind, n in sorted(pictures.items())]
    if bare := sum(found.others[name][BARE] for name in found.classes):
        kinds.append(number_of(bare, "file", which=f" {BARE}"))
    left = [*(f"class {c}" for c in _empty_classes(found)), *kinds, *found.loose]
    return [f"{words} of {part}" for words in left] if part else left


# ------------------------------------------------------------------------------------------------ read


def _read_folder(folder: Path, part: str) -> _Part:
    """The pictures below each class folder."""
    found = _Part(loose=_loose(visible(folder)) + [f"{name}/" for name in hidden_folders(folder, _is_picture)])
    reached = folders_by_place(subfolders(folder))
    for path in subfolders(folder):
        pictures, found.others[path.name] = _files_below(path, reached)
        start = len(str(path))
        found.files[path.name] = [
            File(picture, path.name + picture[start:].replace(os.sep, "/"), part, path.name) for picture in pictures
        ]
    if not found.classes:
        _refuse_no_images(folder, found)
    if len(parts_of(found.files)) == len(found.files):
        parts = " and ".join(found.files)
        raise DataError(f"'{folder}' holds {parts} without class folders: it should hold {LAYOUTS}.")
    return found


def _refuse_no_images(folder: Path, found: _Part) -> None:
    if any(map(_is_picture, visible(folder))):
        above, several = with_all_parts(folder.parent), is_one_of_several(folder, _is_picture)
        meant = f" Did you mean the folder above: {above}?" * several
        alone = f" If they have no labels, move them into a single one: {folder / 'all'}."
        raise DataError(f"The images of '{folder}' lie in no class folder.{meant}{alone}")
    archives = [path.name for path in visible(folder) if path.suffix.lower() in ARCHIVES]
    unpack = f" Unpack {some(archives)} first." if archives else ""
    holds = f" ({kinds})" if (kinds := _numbers(sum(found.others.values(), Counter()))) else ""
    raise DataError(f"No images in class folders of '{folder}'{holds}: it should hold {LAYOUTS}.{unpack}")


def _files_below(folder: Path, reached: dict[Path, Path]) -> tuple[list[str], Counter[str]]:
    """The pictures below a class folder, and how many other files there are of each kind. `reached` is of `folders_by_place`."""
    pictures, others = [], Counter[str]()
    for path in files_below(folder, reached):
        if path.suffix.lower() in EXTENSIONS:
            pictures.append(str(path))
        else:
            if path.is_symlink():
                refuse_broken_link(path)
            others[path.suffix.lower() or BARE] += 1
    return sorted(pictures), others


def _read_tar(path: Path, part: str) -> _Part:
    """The pictures in one tar file. As in timm, the class is the folder or the inner tar file around a picture.

    Only the positions of the pictures are kept. timm's reader keeps an open file, which the workers of a loader would share.
    """
    found, folders, with_pictures = _Part(), [], set()
    loose = 0
    try:
        with path.open("rb") as stream:
            for place, member, offset in tar_members(path, stream):
                *above, name = place
                class_name, extension = above[-1] if above else "", Path(name).suffix.lower()
                if member.isdir():
                    folders.append(place)
                elif member.isfile() and not member.issparse() and extension in EXTENSIONS:
                    with_pictures.add(tuple(above))
                    file = File(str(path), member.name, part, class_name, offset, member.size)
                    found.files.setdefault(class_name, []).append(file)
                elif extension in EXTENSIONS + UNREAD and not above:
                    loose += 1
                elif extension in EXTENSIONS + UNREAD:
                    found.files.setdefault(class_name, [])
                    found.others[class_name][_kind(member, extension)] += 1
                elif member.isfile() and not extension and above:
                    found.others[class_name][BARE] += 1
    except (tarfile.TarError, OSError, EOFError) as error:
        if packed := packed_by(path):
            raise DataError(f"'{path}' is compressed ({packed}): unpack it once, {packed} -dc OLD > NEW.") from error
        raise DataError(f"'{path}' is cut off or no tar file ({error}): make or fetch it again.") from error
    if not found.classes:
        raise DataError(f"No images in '{path}': its members should be CLASS/*.jpg or *.png.")
    if "" in found.classes:
        raise DataError(f"'{path}' holds images outside of class folders: its members should be CLASS/*.jpg.")
    _refuse_parts_in_tar(path, with_pictures)
    if loose:
        found.loose.append(number_of(loose, "picture", which=" outside of class folders"))
    class_folders = {place[:-1] for place in with_pictures}  # the folders that hold the class folders
    for place in folders:
        if place not in with_pictures and place[:-1] in class_folders:
            found.files.setdefault(place[-1], [])
    return found


def _refuse_parts_in_tar(path: Path, folders: Iterable[tuple[str, ...]]) -> None:
    """Classes of several parts would be joined: training would be on images to report on."""
    inside: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for place in folders:
        for level in range(len(place) - 1):
            inside[place[:level]].add(place[level])
    for names in inside.values():
        if {"train"} < set((parts := parts_of(names)).values()):
            own = some(sorted(parts, key=lambda name: PARTS.index(parts[name])))
            raise DataError(f"'{path}' holds parts of its own ({own}): unpack it, and give the folder that holds them.")


def _kind(member: tarfile.TarInfo, extension: str) -> str:
    if member.issparse():
        return SPARSE
    return extension if member.isfile() else SPECIAL.get(member.type, LINK)


# ------------------------------------------------------------------------------------------------ labels


def _number_classes(
    kind: str, parts: Mapping[str, _Part], paths: Mapping[str, Path], removed: Sequence[Key]
) -> Listing:
    """Labels are numbers of the classes, sorted by name as text. The training images say which classes there are."""
    first = next(iter(parts))  # "train" if it is there
    known = parts[first].classes if first == "train" else set().union(*(own.classes for own in parts.values()))
    _refuse_two_spellings(known.union(*(own.classes for own in parts.values())))
    number = {name: index for index, name in enumerate(sorted(known))}
    labelled = {}
    for part, own in parts.items():
        if strange := sorted(own.classes - known):
            where = f"'{paths[part]}' has classes that '{paths[first]}' does not have"
            raise DataError(f"{where}: {some(strange)}; remove or rename them.")
        files = [file for each in own.files.values() for file in each]
        there = {file.name for file in files}
        files += [File("", n, part, c) for whose, n, c in removed if whose == part and n not in there and c in number]
        labelled[part] = [(file, number[file.class_name]) for file in sorted(files, key=_order(kind))]
    origin = {part: path.name for part, path in paths.items()}
    return Listing(kind, labelled, origin, tuple(number))


def _refuse_two_spellings(names: Iterable[str]) -> None:
    """Refuse names that look the same: Unicode writes an accent with its letter or after it, and macOS changes that in copies."""
    found: dict[str, str] = {}
    for name in sorted(names):
        other = found.setdefault(spelt(name), name)
        if other != name:
            raise DataError(
                f"Class '{name}' is written in two ways that look the same, {other!a} and {name!a}: rename its folders to "
                "one of them."
            )


def _order(kind: str) -> Callable[[File], Any]:
    """Sorts files by name, so that the order depends neither on the file system nor on what was removed."""
    from timm.utils.misc import natural_key

    if kind == "tar":
        return lambda file: (natural_key(file.name), file.name)
    return lambda file: (file.class_name, file.name)
