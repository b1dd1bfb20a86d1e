"""A folder of tables in parts: what many processes compute of many images, written part by part and read row by row.

    FOLDER/manifest.json            what the rows are of, and which parts are whole
    FOLDER/part-00000/*.parquet     some thousand rows each
    FOLDER/unreadable.json          images that cannot be used, by name, and why

A part is written under another name, and renamed when it is whole; only then the manifest names it, with a hash of each of its
files. So half a part is never taken for a whole one, and files of other folders are refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ptee import __version__
from ptee._common.errors import Argument, DataError, PteeError, RunError, first_line
from ptee._common.files import file_hash, from_json, is_file, read_object, to_json
from ptee._common.process import Lock
from ptee._common.writing import (
    alone,
    cannot_write,
    clear_unfinished,
    is_left_over,
    require_writable,
    write_json,
    writing_in,
)
from ptee.data.batches import UNKNOWN_LABEL

MANIFEST, UNREADABLE = "manifest.json", "unreadable.json"
LARGEST_MANIFEST = 64 * 2**20  # bytes
ROWS_AT_ONCE = 8192  # that are read into memory, and in one group of a file
FEW = 10  # unreadable images that are always allowed; a share of less says nothing
OUT, OVERWRITE = Argument("out", "FOLDER"), Argument("overwrite", "True")
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$"  # of a part or a file: no path leads out of the folder


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PartFile(_Strict):
    """A file of a part."""

    name: str = Field(pattern=NAME)
    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Part(_Strict):
    """A part that is whole: its number of rows with an answer, of those with a label, of images that cannot be used; its files."""

    name: str = Field(pattern=NAME)
    rows: int = Field(ge=0)
    unreadable: int = Field(ge=0)
    labelled: int = Field(0, ge=0)
    files: list[PartFile]


class Manifest(_Strict):
    """What a folder of parts holds. `about` says of what: two folders with the same `about` hold the same rows."""

    kind: Literal["traces", "cache"]
    schema_version: Literal[2] = 2
    ptee_version: str
    about: dict[str, Any]
    planned: int = Field(ge=1)  # parts
    max_unreadable: float = 1.0  # share of the images
    parts: list[Part]

    @property
    def whole(self) -> bool:
        """Whether all parts are there."""
        return len(self.parts) == self.planned

    @property
    def rows(self) -> int:
        """Of all parts, without images that cannot be used."""
        return sum(part.rows for part in self.parts)

    @property
    def labelled(self) -> int:
        """Of the rows, those with a label."""
        return sum(part.labelled for part in self.parts)

    @property
    def unreadable(self) -> int:
        """Images that cannot be read, or that the backbone does not answer."""
        return sum(part.unreadable for part in self.parts)


def arrow() -> Any:
    """pyarrow, which reads and writes the tables."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as why:
        raise PteeError("Tables in parts need pyarrow: pip install 'ptee-exits[ray]'.") from why
    return pyarrow


# ---------------------------------------------------------------------------------------------------- reading


def is_parts_folder(folder: Path, kind: str) -> bool:
    """Whether a folder says that it holds parts of this kind."""
    try:
        return read_object(folder / MANIFEST, LARGEST_MANIFEST).get("kind") == kind
    except (OSError, ValueError):
        return False


def read_manifest(folder: Path, kind: str) -> Manifest:
    """The manifest of a folder."""
    if not is_file(folder / MANIFEST):
        make = "ptee trace" if kind == "traces" else "ptee cache"
        raise DataError(f"{folder!s:.300} holds no {kind}: it has no {MANIFEST}. Make some: {make}.")
    try:
        found = Manifest(**read_object(folder / MANIFEST, LARGEST_MANIFEST))
    except ValidationError as why:
        first = why.errors()[0]
        raise DataError(
            f"{folder / MANIFEST} is damaged or of another version: {'.'.join(map(str, first['loc']))}: {first['msg']}. Make it again (",
            OVERWRITE,
            ").",
        ) from why
    except (OSError, ValueError, TypeError) as why:
        raise DataError(f"{folder / MANIFEST} cannot be read: {first_line(why)}") from why
    if found.kind != kind:
        raise DataError(f"{folder} holds {found.kind}, and {kind} are wanted. Give another folder.")
    return found


def read_whole(folder: Path, kind: str) -> Manifest:
    """The manifest of a folder that is finished. If more images cannot be used than it was allowed, it is refused."""
    manifest = read_manifest(folder, kind)
    if not manifest.whole:
        done = f"{len(manifest.parts)} of its {manifest.planned} parts are there"
        raise DataError(f"{folder} is not finished: {done}. The command that began it goes on with it.")
    _require_few_unreadable(folder, manifest)
    return manifest


def _require_few_unreadable(folder: Path, manifest: Manifest) -> None:
    """Refuse a folder in which more images cannot be used than it was allowed."""
    bad, rows = manifest.unreadable, manifest.rows + manifest.unreadable
    if bad > max(FEW, manifest.max_unreadable * rows):
        make = "ptee trace" if manifest.kind == "traces" else "ptee cache"
        allowed = Argument("max_unreadable", f"{min(1.0, 2 * bad / rows):.2g}")
        raise DataError(
            f"{bad:,} of {rows:,} images cannot be used; they are named in {folder / UNREADABLE}. Replace them and "
            f"begin {make} again (", OVERWRITE, "), or allow it more: ", allowed, ".",
        )  # fmt: skip


def row_groups(folder: Path, manifest: Manifest, columns: Sequence[str]) -> Iterator[Any]:
    """Tables of some thousand rows with these columns, part by part, without images that cannot be used. A changed file is refused."""
    pa = arrow()
    for part in sorted(manifest.parts, key=lambda part: part.name):
        rows = 0
        for file in part.files:
            path = folder / part.name / file.name
            _require_same(path, file)
            try:
                with pa.parquet.ParquetFile(path, memory_map=True) as table:
                    for batch in table.iter_batches(ROWS_AT_ONCE, columns=["fault", *columns]):
                        readable = batch.filter(pa.compute.equal(batch["fault"], ""))
                        rows += len(readable)
                        yield readable
            except (pa.ArrowException, OSError, KeyError, ValueError) as why:
                raise DataError(f"{path} is no table of such rows: {first_line(why)}") from why
        if rows != part.rows:
            raise DataError(f"{folder / part.name} has {rows:,} rows, and its manifest says {part.rows:,}.")


def key_hashes(folder: Path, manifest: Manifest) -> np.ndarray:
    """(n,) uint64, a hash of each row's key, in the order of the rows. Sorted by it, rows do not depend on who wrote them."""
    parts = [np.zeros(0, np.uint64)]
    for group in row_groups(folder, manifest, ["key"]):
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in group["key"].to_pylist())
        parts.append(np.frombuffer(b"".join(digests), np.uint64))
    return np.concatenate(parts)


def read_marks(folder: Path, manifest: Manifest) -> Tensor:
    """(n,) int64 by which images are known again, in the order of the rows."""
    found = [numbers(folder, group["mark"], 0, np.int64) for group in row_groups(folder, manifest, ["mark"])]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *found]))


def numbers(folder: Path, column: Any, width: int, kind: Any) -> np.ndarray:
    """The numbers (b, width) of a column of lists, or (b,) if width is 0."""
    values = column.flatten() if width else column
    rows = values.to_numpy(zero_copy_only=False)
    if rows.dtype != kind or len(rows) != max(width, 1) * len(column):
        raise DataError(f"{folder}: a column has other numbers than its manifest says. Make it again.")
    return (rows.reshape(-1, width) if width else rows).copy()  # Arrow's own memory cannot be written


def _require_same(path: Path, file: PartFile) -> None:
    try:
        about = path.stat()
        same = about.st_size == file.size and _sha256_once(path, about.st_size, about.st_mtime_ns) == file.sha256
    except OSError as why:
        raise DataError(f"{path} cannot be read: {why.strerror}. Delete its folder, and make it again.") from why
    if not same:
        raise DataError(f"{path} is cut off, changed or of another folder. Delete its folder, and make it again.")


@lru_cache(1024)
def _sha256_once(path: Path, size: int, changed: int) -> str:
    """Of a file that is read several times, column by column."""
    return file_hash(path)


# ---------------------------------------------------------------------------------------------------- writing


class PartsWriter:
    """The one writer of a folder: which parts are missing, and what becomes of a part that was made."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._one_at_a_time = Lock()

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of these parts that are not there yet."""
        there = {part.name for part in self.manifest.parts}
        return [name for name in names if name not in there]

    @contextmanager
    def part(self, name: str) -> Iterator[Path]:
        """An empty folder to write the tables of a part into. Afterwards the part is whole, or on failure not there."""
        try:
            with writing_in(self.folder) as beside:
                yield beside
                part, faults = _summary(name, beside)
                # of a process that ended before the manifest named it
                shutil.rmtree(self.folder / name, ignore_errors=True)
                shutil.copymode(self.folder, beside)
                beside.rename(self.folder / name)
                beside.mkdir()  # for the context manager to remove
        except OSError as why:  # of what is read, an error is named where it is read
            raise cannot_write(self.folder / name, reason_of(why)) from why
        with self._one_at_a_time:
            self._add(part, faults)

    def _add(self, part: Part, faults: list[dict[str, str]]) -> None:
        if faults:
            file = self.folder / UNREADABLE
            before = read_object(file, LARGEST_MANIFEST)["images"] if is_file(file) else []
            write_json(file, {"images": [row for row in before if row not in faults] + faults})
        self.manifest.parts.append(part)
        write_json(self.folder / MANIFEST, self.manifest.model_dump(mode="json"))
        _require_few_unreadable(self.folder, self.manifest)


def _summary(name: str, folder: Path) -> tuple[Part, list[dict[str, str]]]:
    """What the manifest says of a part, and the images of it that cannot be used."""
    pa = arrow()
    files, faults, rows, labelled = [], [], 0, 0
    for path in sorted(folder.glob("*.parquet")):
        with pa.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=["key", "fault", "label"]):
                good = pa.compute.equal(batch["fault"], "")
                rows += len(labels := batch.filter(good)["label"])
                labelled += pa.compute.sum(pa.compute.not_equal(labels, UNKNOWN_LABEL)).as_py() or 0
                faults += batch.select(["key", "fault"]).filter(pa.compute.invert(good)).to_pylist()
        files.append(PartFile(name=path.name, size=path.stat().st_size, sha256=file_hash(path)))
    return Part(name=name, rows=rows, unreadable=len(faults), labelled=labelled, files=files), faults


@contextmanager
def parts_writer(
    folder: Path, kind: Any, about: Mapping[str, Any], planned: int, *, limit: float, overwrite: bool = False
) -> Iterator[PartsWriter]:
    """Meanwhile no other process writes into the folder. Whole parts of the same rows that are there are kept.

    `about` says what the rows are of, JSON-able; parts of others are refused, or replaced with `overwrite`. `limit`: the share of
    images that may be unreadable.
    """
    require_writable(folder)
    with ExitStack() as meanwhile:
        try:
            meanwhile.enter_context(alone(folder, wait=0, instead=("give another folder: ", OUT)))
        except RunError as why:
            raise DataError(*why.parts) from why
        manifest = _begun(folder, kind, about, planned, limit, overwrite)
        clear_unfinished(folder)
        yield PartsWriter(folder, manifest)


def _begun(folder: Path, kind: Any, about: Mapping[str, Any], planned: int, limit: float, overwrite: bool) -> Manifest:
    """The manifest of a folder that was begun with the same rows, else a new one; it is written."""
    as_read = from_json(to_json(dict(about)))
    found = Manifest(kind=kind, ptee_version=__version__, about=as_read, planned=planned, parts=[])
    if is_parts_folder(folder, kind):
        if overwrite:
            for name in _parts_named_in(folder):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / UNREADABLE).unlink(missing_ok=True)
        else:
            old = read_manifest(folder, kind)
            _require_alike(folder, old, found)
            found = old
            found.parts = [part for part in old.parts if _is_whole(folder, part)]  # the others are made again
    elif others := [path.name for path in folder.iterdir() if not is_left_over(path.name)]:
        raise DataError(f"{folder} holds something else ({others[0]}). Give a new folder: ", OUT, ".")
    found.max_unreadable = min(1.0, limit)
    _require_few_unreadable(folder, found)  # the same call, given again, is not allowed more
    write_json(folder / MANIFEST, found.model_dump(mode="json"))
    return found


def _parts_named_in(folder: Path) -> list[str]:
    """The parts that a manifest names, also one of another version."""
    parts = read_object(folder / MANIFEST, LARGEST_MANIFEST).get("parts")
    names = [part.get("name") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return [name for name in names if isinstance(name, str) and re.fullmatch(NAME, name)]


def _is_whole(folder: Path, part: Part) -> bool:
    """Whether a part is as it was written."""
    try:
        for file in part.files:
            _require_same(folder / part.name / file.name, file)
    except DataError:
        return False
    return True


def _require_alike(folder: Path, old: Manifest, new: Manifest) -> None:
    if old.about == new.about and old.planned == new.planned:
        return
    differs = _difference(old.about, new.about) or ("number of parts", old.planned, new.planned)
    what, _, part = differs[0].replace("_", " ").partition(".")
    both = f"({f'{part}: ' * bool(part)}{differs[1]!s:.60}; now {differs[2]!s:.60})"
    whole = " It is finished, and can be read as it is." * old.whole
    text = f"{folder} holds {new.kind} of another {what} {both}.{whole} Give another folder, "
    raise DataError(text, OUT, ", or replace it: ", OVERWRITE, ".")


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The dotted name of the first value that differs, and both values."""
    for key in {**old, **new}:
        one, two = old.get(key, "nothing"), new.get(key, "nothing")
        if one != two:
            inner = _difference(one, two) if isinstance(one, Mapping) and isinstance(two, Mapping) else None
            return (key, one, two) if inner is None else (f"{key}.{inner[0]}", *inner[1:])
    return None


def reason_of(why: OSError) -> str:
    """What the system says of an error. Arrow adds words of its own."""
    return os.strerror(why.errno) if why.errno else first_line(why).rstrip(".")


def write_tables(tables: Iterator[Any], file: Path, callback: Callable[[int], None] | None = None) -> None:
    """Write tables one after another into one file, some thousand rows at once. `callback` gets the rows of each table."""
    pa = arrow()
    waiting: list[Any] = []
    writer = None
    try:
        for table in tables:
            waiting.append(table)
            if callback is not None:
                callback(len(table))
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                writer = writer or pa.parquet.ParquetWriter(file, table.schema)
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer = writer or pa.parquet.ParquetWriter(file, waiting[0].schema)
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()
