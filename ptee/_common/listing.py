"""What a folder holds, without what is hidden, and without links that lead to nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ptee._common.errors import DataError

SYSTEM_FOLDERS = ("$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found")
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by the first bytes
FILE = re.compile(r"[.](?!tar$)[a-z]{2,4}$", re.IGNORECASE)  # ends the name of a file, as in readme.md


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
