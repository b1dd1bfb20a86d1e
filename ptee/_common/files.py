"""Files and paths: what a value means as a path, hashes, sizes, who compressed a file, and JSON for people and programs."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
from collections import Counter
from dataclasses import asdict
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from ptee._common.errors import NEAREST, Argument, DataError, PteeError
from ptee._common.text import escaped, shown

LONGEST_KEY = 60  # of JSON, in a message
DEEPEST = 100  # objects and lists of JSON inside one another; how many Python can read depends on its version
MOST_NAMES = 10_000  # that are compared with a wrong one
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by the first bytes
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"?|[][{}]')  # strings, whole, and brackets


def expanded(path: str | Path) -> Path:
    """A path with the home folder for ~, which a shell leaves where it is in quotes or behind an = sign."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's own fails where there is no such home folder


def as_path(value: Any, argument: str) -> Path:
    """A path that the user gives, `expanded`. What is empty, no path or not UTF-8 is refused."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Path) else ""
    if not text or "\0" in text:
        given = Argument(argument, shown(value))
        raise PteeError(given, " is no path. Give the name of a file or folder.", value=value)
    if (plain := escaped(text)) != text:
        given = Argument(argument, plain)
        raise PteeError(given, " has a name that is not UTF-8. Rename it.", value=value)
    return expanded(text)


def require_utf8(name: str | Path, what: str) -> None:
    """Refuse the name of something in a data source that has bytes which are not UTF-8: a run cannot record it."""
    if (shown := escaped(str(name))) != str(name):
        raise DataError(f"The {what} '{shown}' has a name that is not UTF-8. Rename it.")


def is_file(path: Path) -> bool:
    """Whether there is a file of this name. No file can have some names, such as those of thousands of letters."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name; as of `is_file`."""
    try:
        return path.is_dir()
    except OSError:
        return False


def folders_like(path: Path) -> list[Path]:
    """The folders whose names are spelt nearly as this one, where it would lie; the nearest first."""
    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES) if entry.name[0] != "." and entry.is_dir()]
    except (OSError, ValueError):
        return []
    return [
        path.parent / name for name in get_close_matches(path.name, names, NEAREST, cutoff=0.7) if name != path.name
    ]


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes, of which few are in memory at once."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def packed_by(path: Path) -> str:
    """The program that compressed a file, or an empty text."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(6)
    except OSError:
        return ""
    return next((name for magic, name in PACKED.items() if begin.startswith(magic)), "")


def require_not_compressed(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse a file of torch that unpacks to far more: torch does not compress tensors, so such a one was made to do harm."""
    packed, unpacked = path.stat().st_size, sum(part.file_size for part in archive.infolist())
    if unpacked > 2 * packed:
        raise ValueError(f"It unpacks to {unpacked:,} bytes from {packed:,}")


def to_json(values: Any) -> str:
    """Strict JSON. It has no infinite numbers and no NaN, so these become words ("Infinity")."""
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def from_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: if it is none, is nested too deeply, or has a key twice: which of the two counts would be a guess.
    """
    depth = 0
    for mark in _MARKS.findall(text):
        depth += (mark in "[{") - (mark in "]}")
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
    return json.loads(text, object_pairs_hook=_once)


def read_object(file: Path, largest: int) -> dict[str, Any]:
    """The JSON object in a file of at most so many bytes. An OSError or a ValueError says why there is none."""
    if file.stat().st_size > largest:
        raise ValueError(f"it is longer than {largest:,} bytes")
    values = from_json(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{name[:LONGEST_KEY]!r} is there twice")
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON-able values: tuples become lists, also within others."""
    found: dict[str, Any] = _with_lists(asdict(value))
    return found


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(each) for key, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, list | tuple) else value
