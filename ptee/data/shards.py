"""Sources of very many images, which are read from beginning to end: webdataset shards, parquet tables, folders of pictures.

Each sample is a key, the bytes of an encoded picture, and a label: a number, or the name of a class. Nothing is decoded or
unpickled here.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

from ptee._common.errors import Argument, DataError, first_line, some
from ptee._common.files import as_path, from_json, is_folder, packed_by, require_utf8
from ptee._common.listing import EXTENSIONS, TarHeader, files_below, refuse_second_archive, require_usable
from ptee._common.text import number_of, shown
from ptee.data.batches import UNKNOWN_LABEL
from ptee.data.folders import list_files
from ptee.data.parts import arrow
from ptee.data.pictures import LARGEST_PICTURE, NOT_A_FILE
from ptee.data.splits import parts_of

TAR, PARQUET, PICTURES = "webdataset", "parquet", "pictures"
ENDINGS = {TAR: (".tar",), PARQUET: (".parquet",), PICTURES: EXTENSIONS}
WORDS = {TAR: "shard", PARQUET: "table", PICTURES: "picture"}
PART_BYTES = 64 * 2**20  # of a part's files, at least
PARTS = 16  # at most, unless the files are few
UNPACK = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}  # shards that were compressed
CLS, JSON, TEXT = LABEL_FILES = ("cls", "json", "txt")  # endings of what may hold a label in a shard
KEYS = ("key", "__key__", "id", "path", "file_name")  # columns that name an image
LABELS = ("label", "cls", "class", "fine_label")
IMAGES = ("image", "img", "png", "jpg", "jpeg", "bytes")
LARGEST_LABEL = 10**9 - 1  # of nine digits, which 32 bits hold; a larger number is no class
ROWS_AT_ONCE = 256
GIVE = "Give a folder of webdataset shards (*.tar), of *.parquet, or of CLASS/*.jpg: "


class Sample(NamedTuple):
    """An encoded picture. Its label is a number, or else `class_name` is the name of its class, or empty."""

    key: str
    image: bytes
    label: int
    class_name: str
    unsure: bool = False  # label and name stand where something else may stand: a caption, or a folder that is no class


@dataclass(frozen=True)
class Source:
    """Files that hold samples.

    Attributes:
        place: the absolute path of their folder.
        kind: a key of `ENDINGS`.
        files: paths below it, sorted.
        sizes: bytes of each.
        class_names: of folders of pictures, sorted; of tables, by the number of their labels, where Hugging Face's schema
            says them; else none.
        not_read: what else lies there, in words.
    """

    place: str
    kind: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    not_read: tuple[str, ...] = ()

    def parts(self) -> list[tuple[str, ...]]:
        """The files in parts of about equal bytes, the same each time."""
        each = max(PART_BYTES, -(-sum(self.sizes) // PARTS))
        found: list[list[str]] = [[]]
        size = 0
        for file, bytes_ in zip(self.files, self.sizes, strict=True):
            if size >= each:
                found.append([])
                size = 0
            found[-1].append(file)
            size += bytes_
        return [tuple(part) for part in found]

    def describe(self) -> dict[str, Any]:
        """What identifies it, JSON-able: names and sizes of its files, wherever they lie."""
        names = "".join(f"{file}\t{size}\n" for file, size in zip(self.files, self.sizes, strict=True))
        return {
            "kind": self.kind,
            "files": len(self.files),
            "bytes": sum(self.sizes),
            "crc32": zlib.crc32(names.encode()),
        }

    def count(self) -> int:
        """About how many samples it holds: of shards the first is counted, and the others are taken to be like it."""
        if self.kind == PICTURES:
            return len(self.files)
        first = Path(self.place, self.files[0])
        if self.kind == PARQUET:
            return sum(arrow().parquet.read_metadata(Path(self.place, file)).num_rows for file in self.files)
        return round(sum(1 for _ in samples(self, self.files[:1])) * sum(self.sizes) / max(1, first.stat().st_size))


def find_source(source: str | Path) -> Source:
    """The files of a source: a folder, or one shard or table."""
    path = as_path(source, "data")
    if not path.exists():
        raise DataError(f"There is no '{source!s:.300}'. {GIVE}", Argument("data", "FOLDER"), ".", argument="data")
    if path.is_dir():
        require_usable(str(source), path)
        _require_one_part(path)
    top, files = (path, _listed(path)) if path.is_dir() else (path.parent, [path.name])
    for kind, endings in ENDINGS.items():
        found = sorted(file for file in files if file.lower().endswith(endings))
        if found and kind == PICTURES and path.is_dir() and any("/" in file for file in found):
            return _of_classes(path)
        if found and (kind != PICTURES or path.is_dir()):
            names = _names_in_all(top, found) if kind == PARQUET else ()
            return _made(top, kind, found, class_names=names, not_read=_beside(kind, files))
    raise DataError(f"{source!s:.300} lists no images. {GIVE}", Argument("data", "FOLDER"), ".", argument="data")


def _require_one_part(top: Path) -> None:
    """Refuse a folder of training images and others: heads learn from one part, and thresholds are chosen on another."""
    parts = parts_of(entry.name for entry in sorted(top.iterdir()) if not entry.name.startswith("."))
    if {"train"} < set(parts.values()):
        one = next(name for name, part in parts.items() if part != "train")
        text = f"{top} holds {some(list(parts))}. Heads learn from one part, and thresholds are chosen on another. Give one of them: "
        raise DataError(text, Argument.text("data", top / one), ".", argument="data")


def _beside(kind: str, files: Sequence[str]) -> tuple[str, ...]:
    """Files of the other kinds, in words."""
    found = {other: sum(file.lower().endswith(ENDINGS[other]) for file in files) for other in ENDINGS if other != kind}
    return tuple(f"{number_of(n, WORDS[other])} beside the {WORDS[kind]}s" for other, n in found.items() if n)


def _listed(top: Path) -> list[str]:
    """Files below a folder, without hidden ones."""
    return [path.relative_to(top).as_posix() for path in files_below(top, {top.resolve(): top})]


def _of_classes(top: Path) -> Source:
    """Pictures in class folders, read and named as for other commands."""
    listing = list_files(top, report_only=True)
    files = [file for rows in listing.parts.values() for file, _ in rows]
    # Windows writes the end of the path, which is the name, with other slashes.
    places = sorted({Path(file.path[: -len(file.name)]) for file in files})
    if len(places) > 1:
        text = f"{top} holds {some([place.name for place in places])}. Give one of them: "
        raise DataError(text, Argument.text("data", places[0]), ".", argument="data")
    names = sorted(file.name for file in files)
    rest = tuple(words.removesuffix(f" of {part}") for words in listing.not_read for part in listing.parts)
    return _made(places[0], PICTURES, names, class_names=listing.class_names, not_read=rest)


def _made(top: Path, kind: str, files: Sequence[str], **more: tuple[str, ...]) -> Source:
    """The source of these files. A pipe named like a picture would be waited for."""
    for name in (str(top.resolve()), *files):
        require_utf8(name, "file or folder")
    sizes = []
    for path in (top / file for file in files):
        try:
            about = path.stat()
        except OSError as why:
            raise DataError(f"{path} cannot be read ({why.strerror}): mend it, or remove it.") from why
        if not S_ISREG(about.st_mode):
            raise DataError(f"{path} is {NOT_A_FILE}: remove it.")
        sizes.append(about.st_size)
    return Source(str(top.resolve()), kind, tuple(files), tuple(sizes), **more)


def require_apart(folder: Path, data: str | Path, source: Source) -> None:
    """Refuse to write tables into the folder of a source in which they would be read, too: the same call could not go on."""
    if (
        source.kind != TAR
        and is_folder(top := as_path(data, "data"))
        and folder.resolve().is_relative_to(top.resolve())
    ):
        text = f"{folder} lies in {data}, where what is written would be read with the images. Give another folder: "
        raise DataError(text, Argument("out", "FOLDER"), ".", argument="out", value=folder)


def class_of(name: str) -> str:
    """The class of CLASS/picture.jpg, also of CLASS/MORE/picture.jpg; empty without a folder."""
    return name.partition("/")[0] if "/" in name else ""


def _folder_of(name: str) -> str:
    """The folder around a picture in a shard, which timm takes for its class; empty without a folder."""
    return name.split("/")[-2] if "/" in name else ""


# ---------------------------------------------------------------------------------------------------- samples


def samples(source: Source, files: Sequence[str]) -> Iterator[Sample]:
    """The samples of some files, in their order."""
    of_table = partial(_of_table, class_names=source.class_names)
    read: Any = {TAR: _of_shard, PARQUET: of_table, PICTURES: _of_picture}[source.kind]
    for file in files:
        try:
            yield from read(Path(source.place, file), file)
        except DataError:
            raise
        except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, KeyError) as why:
            raise unreadable_file(Path(source.place, file), why) from why


def unreadable_file(path: Path | str, why: BaseException) -> DataError:
    """The error for a file of samples that cannot be read to its end."""
    return DataError(
        f"{path} cannot be read to its end: {first_line(why)} Replace it, and give the same command again."
    )


def _of_picture(path: Path, name: str) -> Iterator[Sample]:
    yield Sample(name, path.read_bytes(), UNKNOWN_LABEL, class_of(name), True)


def _of_shard(path: Path, name: str) -> Iterator[Sample]:
    """Members of one key stand one after another, as webdataset wants them."""
    found: dict[str, bytes] = {}
    before = ""
    for tar, member in _members(path):
        key, ending = _split(member.name)
        if not member.isreg() or not key:
            continue
        if found and key != before:
            yield from of_members(f"{name}/{before}", found)
            found = {}
        before = key
        if _is_read(ending):
            content = tar.extractfile(member)
            assert content is not None
            found[ending.lower()] = content.read()
        elif is_picture(_last(ending)):
            found[ending.lower()] = b""  # it is only named
    yield from of_members(f"{name}/{before}", found)


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a shard up to its end, each with the open shard. What tarfile would take for the end of a damaged one is an error."""
    if (packed := packed_by(path)) and packed not in UNPACK:
        raise DataError(f"{path} is compressed ({packed}): unpack it once, {packed} -dc OLD > NEW.")
    unpack: Any = UNPACK.get(packed, open)
    with (
        unpack(path, "rb") as stream,
        tarfile.open(fileobj=stream, mode="r|" if packed else "r:", tarinfo=TarHeader) as tar,
    ):
        for member in tar:
            tar.members = []  # type: ignore[attr-defined] # or it would keep all that it has read
            if _is_read(_split(member.name)[1]):
                _require_readable(path, member)
            yield tar, member
        refuse_second_archive(path, tar.fileobj)  # which reads on, so that checksums of a packed one are compared


def _require_readable(path: Path, member: tarfile.TarInfo) -> None:
    if member.islnk() or member.issym():
        text = "is a link, which no reader of shards follows. Make the shard with tar --dereference --hard-dereference."
        raise DataError(f"{path}: its member {shown(member.name)} {text}")
    if member.size > LARGEST_PICTURE:
        size = f"would take {member.size:,} bytes of memory, and {LARGEST_PICTURE:,} are read at most"
        raise DataError(f"{path}: its member {shown(member.name)} {size}. Remove it.")


def require_whole_shard(path: Path) -> None:
    """Refuse a shard of which a reader of tar files would pass over a part, because it is damaged, cut off, or several in one."""
    try:
        for _ in _members(path):
            pass
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as why:
        raise unreadable_file(path, why) from why


def _split(name: str) -> tuple[str, str]:
    """The key of a member and its ending: `a/7.seg.png` is `seg.png` of `a/7`."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2]) if match else ("", "")


def is_picture(ending: str) -> bool:
    """Whether a member of a shard is a picture."""
    return f".{ending.lower()}" in EXTENSIONS


def _is_read(ending: str) -> bool:
    return ending.lower() in LABEL_FILES or is_picture(ending)


def _last(ending: str) -> str:
    return ending.rpartition(".")[2]


def of_members(key: str, members: Mapping[str, bytes]) -> Iterator[Sample]:
    """The sample of some members of a shard, if one is a picture."""
    pictures = [ending for ending in members if is_picture(ending)]
    hidden = [ending for ending in members if is_picture(_last(ending))]
    if hidden and not pictures:
        raise DataError(
            f"{key} has the picture {hidden[0]!r}, and none called .png, .jpg or the like: in shards all that follows the first point of a name stands "
            "for its kind: rename the pictures, without such points."
        )
    if CLS in members and not pictures:
        raise DataError(
            f"{key}.{CLS} has no picture called .png, .jpg or the like beside it. In shards the members of one image stand one after another: write them so, "
            "as tar --sort=name does."
        )
    if pictures:
        yield Sample(key, members[pictures[0]], *_label_of(key, members))


def _label_of(key: str, members: Mapping[str, bytes]) -> tuple[int, str, bool]:
    """The label, the name and `unsure` of a sample. In KEY.cls there is nothing but a label; elsewhere there may be a caption."""
    number, name = read_label(key, members.get(CLS))
    if number >= 0 or name:
        return number, name, False
    folder = _folder_of(key.partition("/")[2])
    text = "" if folder else members.get(TEXT, b"").decode(errors="replace")
    for value in (*_fields(members.get(JSON, b"")), text):
        number, name = _possible_label(key, value)
        if number >= 0 or name:
            return number, name, True
    return UNKNOWN_LABEL, folder, bool(folder)


def _fields(content: bytes) -> list[Any]:
    """What JSON says of a picture where a label may stand."""
    try:
        said = from_json(content.decode())
    except (ValueError, RecursionError):
        return []
    return [said[name] for name in LABELS if name in said] if isinstance(said, dict) else []


def _possible_label(key: str, value: Any) -> tuple[int, str]:
    """As `read_label`; what is no label, such as a list, is none."""
    try:
        return read_label(key, value)
    except DataError:
        return UNKNOWN_LABEL, ""


def read_label(key: str, value: Any) -> tuple[int, str]:
    """A label as it stands in a source: a number and an empty text, or -1 and the name of a class, or -1 and an empty text."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        text = value
    text = text.strip() if isinstance(text, str) else text
    if text in (None, "", "-1", -1) or text != text:  # -1 and NaN stand for no label
        return UNKNOWN_LABEL, ""
    if isinstance(text, str) and not re.fullmatch("[0-9]+", text):
        return UNKNOWN_LABEL, text
    number = int(text) if isinstance(text, int) and not isinstance(text, bool) else -1
    if isinstance(text, str | float) and float(text).is_integer():
        number = int(float(text))
    if not 0 <= number <= LARGEST_LABEL:
        raise DataError(f"{key} has the label {shown(text)}. Give each image the number or the name of its class.")
    return number, ""


def _names_in_all(top: Path, tables: Sequence[str]) -> tuple[str, ...]:
    """The class names that the tables of a folder give their numbers. Other ones in one of them are refused."""
    named = {file: names for file in tables if (names := _names_of_labels(top / file))}
    first = next(iter(named), "")
    for file, names in named.items():
        if names != named[first]:
            raise DataError(
                f"{first} and {file} of {top} name the numbers of their classes differently ({some(named[first])}; {some(names)}): give the "
                "tables of one data set."
            )
    return named.get(first, ())


def _names_of_labels(path: Path) -> tuple[str, ...]:
    """The class names that Hugging Face's schema gives the numbers in a table; else none."""
    try:
        schema = arrow().parquet.read_schema(path)
        _, label, _ = columns_of(path, schema.names)
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (OSError, ValueError, KeyError, TypeError):  # a table that cannot be read is named where it is read
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _of_table(path: Path, name: str, class_names: Sequence[str]) -> Iterator[Sample]:
    with arrow().parquet.ParquetFile(path) as table:
        image, label, key = columns_of(path, table.schema_arrow.names)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[c for c in (image, label, key) if c]):
            for row in batch.to_pylist():
                yield of_row(name, row[image], row.get(label or ""), row.get(key or ""), class_names)


def columns_of(path: Path | str, names: Sequence[str]) -> tuple[str, str | None, str | None]:
    """Which columns of a table hold images, labels and keys."""
    image, label, key = (next((n for n in known if n in names), None) for known in (IMAGES, LABELS, KEYS))
    if image is None:
        raise DataError(f"{path} has no column of images ({', '.join(IMAGES)}). It has {', '.join(names)[:200]}.")
    return image, label, key


def of_row(file: str, image: Any, label: Any, key: Any, class_names: Sequence[str] = ()) -> Sample:
    """The sample of a row. An image is bytes, or {bytes, path} as Hugging Face's tables have it; without a key its checksum.

    `class_names`: of numbers that Hugging Face's schema names.
    """
    content = image.get("bytes") if isinstance(image, Mapping) else image
    named = key or (isinstance(image, Mapping) and image.get("path")) or ""
    content = content if isinstance(content, bytes) else b""
    place = f"{file}/{named or f'{zlib.crc32(content):08x}'}"
    number, class_name = read_label(place, label)
    if class_names and number >= 0:
        if number >= len(class_names):
            raise DataError(f"{place} has the label {number}, and its table names {len(class_names)} classes.")
        number, class_name = UNKNOWN_LABEL, class_names[number]
    return Sample(place, content, number, class_name)
