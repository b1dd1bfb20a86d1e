"""What a folder holds, without what is hidden, and without links that lead to nothing; and whether it may hold images."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ptee._common.errors import DataError
from ptee._common.files import expanded, require_utf8

SYSTEM_FOLDERS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found")
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by the first bytes
FILE = re.compile(r"[.](?!tar$)[a-z]{2,4}$", re.IGNORECASE)  # ends the name of a file, as in readme.md

LAYOUTS = "train/CLASS/*.jpg with val/CLASS/*.jpg, or CLASS/*.jpg, or train.tar with validation.tar"
GIVE = "give a folder, 'digits' or the name of a data set of torchvision"
HUB = "hfds"  # timm's prefix for data sets of the Hugging Face hub
STREAMS = ("hfids", "tfds", "wds")  # timm's prefixes for data that can only be read from beginning to end


def require_place(source: str | Path) -> bool:
    """Refuse a data source of which the path alone tells that it is none. Otherwise it is a folder, or else may be a name.

    Raises:
        DataError: if it is a file, a path where there is nothing, or a folder that a run cannot record or in which the system
            shows itself.
    """
    name, path = str(source), expanded(source)
    if not name.strip():
        raise DataError(f"The name of the data source is empty: {GIVE}.", argument="data", value=source)
    if path.is_dir():
        _require_usable(name, path)
        return True
    if path.exists():
        text = f"'{name}' is a file, not a folder: give the folder around it, which should hold {LAYOUTS}."
        raise DataError(text, argument="data", value=source)
    is_prefixed = name.partition("/")[0] in (HUB, "torch", *STREAMS)  # so its slash does not mean a folder
    if isinstance(source, Path) or name.startswith((".", "~")) or (os.sep in name and not is_prefixed):
        raise DataError(f"Data folder '{name}' does not exist: {GIVE}.", argument="data", value=source)
    return False


def _require_usable(source: str, path: Path) -> None:
    """Of the folders in which the system shows itself, /dev/shm alone holds files of users."""
    require_utf8(path.resolve(), "data folder")
    top = path.resolve().parts[1:3]
    if top[:1] in (("proc",), ("sys",), ("dev",)) and top != ("dev", "shm"):
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
    """What a folder holds that is not hidden, sorted by name.

    Raises:
        DataError: if it cannot be listed, or a link in it that may stand for a folder leads to nothing.
    """
    return [Path(entry.path) for entry in _entries(folder)]


def subfolders(folder: Path) -> list[Path]:
    """The folders among them, linked ones included."""
    entries = _entries(folder)
    # of a link that leads to itself, an entry cannot say whether it is a folder
    return [path for e in entries if (path := Path(e.path)) and (path.is_dir() if e.is_symlink() else e.is_dir())]


def refuse_broken_link(path: Path) -> None:
    """Refuse a link to nothing that may stand for a folder or a tar file: its images would be left out in silence."""
    if FILE.search(path.name):
        return
    try:
        path.stat()
    except OSError as why:
        raise DataError(
            f"'{path}' is a link to '{path.readlink()}', which cannot be opened ({why.strerror}): mend or remove the link."
        ) from why


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is of the system and not of the user."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def not_listed(why: OSError) -> DataError:
    """The error for a folder that cannot be listed."""
    return DataError(
        f"Folder '{why.filename}' cannot be read ({why.strerror}): change its permissions, or move it away."
    )


def packed_by(path: Path) -> str:
    """The program that compressed a file, or an empty text."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(6)
    except OSError:
        return ""
    return next((name for magic, name in PACKED.items() if begin.startswith(magic)), "")
