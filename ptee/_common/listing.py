"""What a folder or a tar file holds, without what is hidden and links that lead to nothing; and whether it may hold images."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ptee._common.errors import DataError
from ptee._common.files import expanded, folders_like, require_utf8

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # of pictures that are read
SYSTEM_FOLDERS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found")
# Hidden folders that programs put among the files of a user.
LITTER = re.compile(
    r"[.](ipynb_checkpoints|[Tt]rash.*|thumbnails|git|svn|hg|dvc|cache|idea|vscode|AppleDouble|fseventsd|Spotlight.*)"
)
TAR_BLOCK_BYTES, READ_BYTES = 512, 2**20
FILE = re.compile(r"[.](?!tar$)[a-z]{2,4}$", re.IGNORECASE)  # ends the name of a file, as in readme.md

LAYOUTS = "train/CLASS/*.jpg with val/CLASS/*.jpg, or CLASS/*.jpg, or train.tar with validation.tar"
GIVE = "give a folder, 'digits' or the name of a data set of torchvision"
HUB = "hfds"  # timm's prefix for data sets of the Hugging Face hub
STREAMS = ("hfids", "tfds", "wds")  # timm's prefixes for data that can only be read from beginning to end


def require_place(source: str | Path) -> bool:
    """Refuse a data source of which the path alone tells that it is none. Otherwise it is a folder, or else may be a name."""
    name, path = str(source), expanded(source)
    if not name.strip():
        raise DataError(f"The name of the data source is empty: {GIVE}.", argument="data", value=source)
    if path.is_dir():
        require_usable(name, path)
        return True
    if path.exists():
        text = f"'{name}' is a file, not a folder: give a folder that holds {LAYOUTS}. Unpack archives that have other names."
        raise DataError(text, argument="data", value=source)
    is_prefixed = name.partition("/")[0] in (HUB, "torch", *STREAMS)  # so its slash does not mean a folder
    if isinstance(source, Path) or name.startswith((".", "~")) or (os.sep in name and not is_prefixed):
        meant = f". Did you mean '{like[0]}'?" if (like := folders_like(path)) else f": {GIVE}."
        raise DataError(f"Data folder '{name}' does not exist{meant}", argument="data", value=source)
    return False


def require_usable(source: str, path: Path) -> None:
    """Refuse the folders in which the system shows itself, of which /dev/shm alone holds files of users, and all of the disk.

    A run may name them, also by a link that lies there: /proc/self/root.
    """
    require_utf8(path.resolve(), "data folder")
    for place in (path.resolve(), Path(os.path.normpath(path.absolute()))):
        top = place.parts[1:3]
        if not top:
            raise DataError(f"'{source}' is the whole disk: {GIVE}.")
        if top[0] in ("proc", "sys", "dev") and top != ("dev", "shm"):
            raise DataError(f"'{source}' is a folder of the operating system, which holds no images: {GIVE}.")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds that is not hidden, sorted by name. An entry knows its kind without another look at the disk."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as why:
        raise not_listed(why) from why
    for link in (entry for entry in found if entry.is_symlink()):
        refuse_broken_link(Path(link))
    return found


def visible(folder: Path) -> list[Path]:
    """What a folder holds that is not hidden, sorted by name. A link to nothing that may stand for a folder is refused."""
    return [Path(entry.path) for entry in _entries(folder)]


def subfolders(folder: Path) -> list[Path]:
    """The folders among them, linked ones included."""
    entries = _entries(folder)
    # of a link that leads to itself, an entry cannot say whether it is a folder
    return [path for e in entries if (path := Path(e.path)) and (path.is_dir() if e.is_symlink() else e.is_dir())]


def is_one_of_several(folder: Path, holds: Callable[[Path], bool]) -> bool:
    """Whether the folder above has two folders or more, this one among them, and each holds such files, as class folders do."""
    try:
        beside = subfolders(folder.parent)
        return len(beside) > 1 and all(any(map(holds, visible(path))) for path in beside)
    except DataError:  # one that may not be read
        return False


def hidden_folders(folder: Path, holds: Callable[[Path], bool]) -> list[str]:
    """The names of hidden folders that hold such files, without those that programs put there."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name[0] == "." and not LITTER.fullmatch(e.name))
    found = []
    for name in names:
        with suppress(DataError):  # one that may not be read
            found += [name] * ((folder / name).is_dir() and any(map(holds, visible(folder / name))))
    return found


def refuse_broken_link(path: Path) -> None:
    """Refuse a link to nothing that may stand for a folder or a tar file: its images would be left out in silence."""
    if FILE.search(path.name):
        return
    try:
        path.stat()
    except OSError as why:
        raise DataError(
            f"'{path}' is a link{_target(path)}, which cannot be opened ({why.strerror}): mend or remove the link."
        ) from why


def _target(link: Path) -> str:
    try:
        return f" to '{link.readlink()}'"
    except OSError:  # within /proc
        return ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is of the system and not of the user."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def folders_by_place(folders: Sequence[Path]) -> dict[Path, Path]:
    """Each class folder by where it lies. Two that are one are refused."""
    found: dict[Path, Path] = {}
    for path in folders:
        other = found.setdefault(path.resolve(), path)
        if other != path:
            raise _two_classes(other, path)
    return found


def _two_classes(one: Path, other: Path) -> DataError:
    """The error of two ways to one folder: each of its pictures would have two labels."""
    link = next((path for path in (other, one, *other.parents) if path.is_symlink()), other)
    return DataError(
        f"'{one}' and '{other}' are the same folder, so its pictures would have two classes: remove the link '{link}'."
    )


def files_below(folder: Path, reached: dict[Path, Path]) -> Iterator[Path]:
    """The files below a folder, in linked folders too. `reached` is of `folders_by_place`."""

    def refuse(why: OSError) -> None:
        raise not_listed(why) from why

    # os.walk asks nothing of each file: for a million files it is minutes faster than Path.rglob with is_file
    for top, inner, names in os.walk(folder, followlinks=True, onerror=refuse):
        below = sorted((Path(top, name) for name in inner if not is_hidden(name)), key=lambda p: (p.is_symlink(), p))
        inner[:] = [path.name for path in below if _is_new(path, folder, reached)]
        yield from (Path(top, name) for name in names if not is_hidden(name))


def _is_new(path: Path, folder: Path, reached: dict[Path, Path]) -> bool:
    """Whether a folder below a class folder is to be read: each is read once, and no link to a folder that contains it.

    `reached`: the folders of all classes so far, by where they lie. One that is of another class, too, is refused.
    """
    try:
        place = path.resolve()
    except OSError as why:  # a link within /proc
        raise not_listed(why) from why
    if path.is_symlink() and path.parent.resolve().is_relative_to(place):
        return False
    other = reached.setdefault(place, path)
    if not other.is_relative_to(folder) and _has_pictures(place):
        raise _two_classes(other, path)
    return other == path


def _has_pictures(folder: Path) -> bool:
    return any(name.lower().endswith(EXTENSIONS) for _, _, names in os.walk(folder) for name in names)


def not_listed(why: OSError) -> DataError:
    """The error for a folder that cannot be listed."""
    return DataError(
        f"Folder '{why.filename}' cannot be read ({why.strerror}): change its permissions, or move it away."
    )


class TarHeader(tarfile.TarInfo):
    """A header of a tar file. tarfile takes a damaged one, or the end of the file, for the end of the archive, which is a block of zeros."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        """Called by tarfile."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as why:
            raise tarfile.ReadError(f"no member and no end at byte {tar.offset:,}") from why


def tar_members(
    path: Path, stream: BinaryIO, above: tuple[str, ...] = (), start: int = 0
) -> Iterator[tuple[tuple[str, ...], tarfile.TarInfo, int]]:
    """The visible members of a tar file and of the tar files inside it: names from the top, member, offset in the file.

    `stream` is the file, or a tar file inside it with the names `above` around it, which begins at `start`. A damaged one raises
    tarfile.TarError.
    """
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=TarHeader) as tar:
        # the last of a name
        members = {tuple(part for part in m.name.split("/") if part not in ("", ".")): m for m in tar}
        stream.seek(tar.offset + TAR_BLOCK_BYTES)
        refuse_second_archive(path, stream)
        for names, member in members.items():
            offset = start + member.offset_data
            if not names or any(map(is_hidden, names)):
                continue
            if member.isfile() and Path(names[-1]).suffix.lower() == ".tar":
                inner: Any = tar.extractfile(member)
                yield from tar_members(path, inner, (*above, *names[:-1], Path(names[-1]).stem), offset)
            else:
                yield (*above, *names), member, offset


def refuse_second_archive(path: Path, stream: Any) -> None:
    """Refuse what `cat a.tar b.tar` makes: all programs read the first alone. `stream` stands behind the first block of its end."""
    rest = stream.read(READ_BYTES)
    while rest and rest == bytes(len(rest)):  # any number of zeros may lie between
        rest = stream.read(READ_BYTES)
    zeros = len(rest) - len(rest.lstrip(b"\0"))
    try:
        tarfile.TarInfo.frombuf(rest[zeros - zeros % TAR_BLOCK_BYTES :][:TAR_BLOCK_BYTES], "utf-8", "surrogateescape")
    except tarfile.TarError:  # nothing, or what is no tar file
        return
    raise DataError(
        f"'{path}' is several tar files one behind the other, and only the first would be read: join the single "
        "ones by tar --concatenate --file=a.tar b.tar, or unpack each."
    )
