"""Pictures: where each one lies, how it is decoded and checked, and how it becomes the input of a backbone."""

from __future__ import annotations

import copy
import errno
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from hashlib import sha256
from heapq import nsmallest
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from zlib import crc32

from torch import Tensor
from torch.utils.data import Dataset

from ptee._common.errors import DataError, some, unknown
from ptee._common.progress import with_bar
from ptee.data.pixels import FORMATS, SCANS, eight_bits, require_sides, scans_of

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Labelled = Dataset[tuple[Tensor, int]]
Key = tuple[str, str, str]  # part, name and class of a file
CHECKED_AT_ONCE = 64  # pictures for one thread at a time; handing over a small one costs more than checking it
COMPARED_AT_MOST = 2_000  # files that are read to find copies
SAMPLED = 64  # files by which training images are known in other folders
HALF = 16  # letters of one of the two hashes of such a file
NAMED_AT_MOST = 100  # unreadable pictures in one message
LARGEST_PICTURE = 2**30  # bytes of one encoded picture
NOT_A_FILE = "not a regular file"
# Words for what shows where something is on a picture: as the name of a folder, and behind the name of the picture.
MASKS = r"masks?|trimaps?|labels?|annotations?|ground[ _-]?truths?|gt|segs?|segmentations?|segmentation(?:class|object)"
IMAGES_FOLDER = re.compile(r"(?:jpeg)?images?|imgs?|pictures?|photos?|x-?rays?|inputs?|originals?", re.IGNORECASE)
MASKS_FOLDER = re.compile(rf"(?:.*[ _.-])?masks?|{MASKS}", re.IGNORECASE | re.DOTALL)
MASK_OF = re.compile(rf"[ _.-](?:{MASKS})(?:[ _.-]?\d+)?\Z", re.IGNORECASE)
NEARLY_EACH = 0.9  # of the classes


class File(NamedTuple):
    """An encoded picture: `size` bytes of the file `path`, from `offset` on. Without a path, the picture was removed."""

    path: str
    name: str  # inside its part
    part: str = ""
    class_name: str = ""
    offset: int = 0
    size: int = -1  # to the end

    @property
    def key(self) -> Key:
        """Identifies the picture, also after the data have moved to another place."""
        return self.part, self.name, self.class_name

    @property
    def words(self) -> str:
        """Where the picture is, for a message."""
        return f"{self.name}' in '{self.path}" if self.size >= 0 else self.path


class BrokenPictureError(DataError):
    """A picture that was asked for cannot be read."""


class UnreadablePicturesError(DataError):
    """Pictures that cannot be read; `keys` holds the `File.key` of each."""

    keys: list[Key]


class Pictures(Labelled):
    """Pictures with labels, decoded and transformed on access. No file stays open, so any process can read them.

    Attributes:
        rows: pictures (`File` or `PIL.Image`) with the labels of the data.
        gaps: positions of pictures that were removed because they could not be read. Splits are drawn as if they were there.
        files_sha256: a hash of the names of all files of the source, or None.
    """

    def __init__(
        self, rows: Sequence[tuple[Any, int]], transform: Callable[[Image], Tensor], files_sha256: str | None = None
    ) -> None:
        self.gaps: tuple[int, ...] = ()
        if isinstance(rows, list):  # other sequences are data sets, and reading a row of those decodes the picture
            self.gaps = tuple(i for i, (picture, _) in enumerate(rows) if _is_removed(picture))
            rows = [row for row in rows if not _is_removed(row[0])]
        self.rows, self.transform, self.files_sha256 = rows, transform, files_sha256
        self.label_map: Callable[[int], int] = int

    @property
    def files(self) -> list[File]:
        """The files among the pictures."""
        return [picture for picture, _ in self.rows if isinstance(picture, File)] if isinstance(self.rows, list) else []

    @cached_property
    def checksums(self) -> list[int]:
        """Of the encoded pictures, in their order; empty if they are no files."""
        return list(_of_each(_checksum, self.files, "reading pictures"))

    def relabelled(self, label_map: Callable[[int], int]) -> Pictures:
        """The same pictures with other labels."""
        found = copy.copy(self)
        found.label_map = label_map
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.rows[index]
        image = decode(picture) if isinstance(picture, File) else picture
        return self.transform(image), self.label_map(int(label))


def _is_removed(picture: Any) -> bool:
    return isinstance(picture, File) and not picture.path


# ------------------------------------------------------------------------------------------------ decode and check


def decode(file: File) -> Image:
    """The picture in a file, with 8 bits for each value; a BrokenPictureError if there is none."""
    try:
        return _decoded(_read(file))
    except DataError as why:
        raise BrokenPictureError(f"Picture '{file.words}' cannot be used: {why}") from why
    except Exception as why:  # whatever Pillow raises
        text = f"Picture '{file.words}' cannot be decoded ({_reason(why)}): replace or remove it."
        raise BrokenPictureError(text) from why


def decode_bytes(content: bytes) -> Image:
    """The encoded picture, with 8 bits for each value.

    Raises:
        DataError: saying in a few words why it cannot be decoded.
    """
    if (scans := scans_of(content)) > SCANS:
        raise DataError(f"it has {scans:,} scans, and {SCANS} are read at most")
    try:
        return _decoded(BytesIO(content))
    except DataError:
        raise
    except Exception as why:  # whatever Pillow raises
        raise DataError(_reason(why)) from why


def _reason(error: Exception) -> str:
    """Why a picture cannot be decoded, in words."""
    from PIL import UnidentifiedImageError
    from PIL.Image import MAX_IMAGE_PIXELS, DecompressionBombError

    if isinstance(error, UnidentifiedImageError):
        return f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, or damaged"
    if isinstance(error, DecompressionBombError):
        return f"it has more than {2 * (MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller"
    if isinstance(error, MemoryError):
        return "there is no memory for it; make it smaller"
    if "MAX_TEXT" in str(error):
        return "the text stored beside its pixels is too large; save it without"
    if isinstance(error, OSError) and error.strerror:  # of the system, not of Pillow
        return error.strerror
    return NOT_A_FILE if str(error) == NOT_A_FILE else "damaged"


def _decoded(encoded: BytesIO) -> Image:
    from PIL import Image

    image = Image.open(encoded, formats=FORMATS)
    image.load()
    return eight_bits(image)


def _read(file: File) -> BytesIO:
    """All of its bytes, so that no file stays open."""
    found = Path(file.path).stat()
    if not stat.S_ISREG(found.st_mode):  # reading a named pipe would wait for ever
        raise OSError(NOT_A_FILE)
    if (found.st_size if file.size < 0 else file.size) > LARGEST_PICTURE:
        raise OSError(errno.EFBIG, f"it has more than {LARGEST_PICTURE:,} bytes")
    with Path(file.path).open("rb") as stream:
        stream.seek(file.offset)
        return BytesIO(stream.read(file.size))


def check_pictures(parts: Iterable[Any]) -> None:
    """Read every file of some data sets. Data sets that do not read files are skipped.

    JPEG is decoded at an eighth of its size, which finds the same faults much faster. Other formats are decoded whole. PNG is
    compared with its checksums, too: decoding does not look at those of its palette.
    """
    files = list(dict.fromkeys(file for part in parts for file in _files(part)))
    faults = _of_each(_fault, files, "checking pictures")
    broken = {file: fault for file, fault in zip(files, faults, strict=True) if fault}
    if not broken:
        return
    named = some([f"'{file.words}' ({fault})" for file, fault in broken.items()], NAMED_AT_MOST)
    error = UnreadablePicturesError(
        f"{len(broken):,} of {len(files):,} pictures cannot be read. Replace or remove {'them' if len(broken) > 1 else 'it'}, "
        f"and give the same command again: {named}."
    )
    error.keys = [file.key for file in broken]
    raise error


@contextmanager
def all_broken_named(parts: Iterable[Any]) -> Iterator[None]:
    """If a picture cannot be read meanwhile, name all such pictures of these data sets. Good pictures are not read twice."""
    try:
        yield
    except BrokenPictureError:
        check_pictures(parts)
        raise


def _files(part: Any) -> list[File]:
    """The files of a data set, or of those that it is a subset or made of."""
    inner = getattr(part, "datasets", None) or ([part.dataset] if hasattr(part, "dataset") else [])
    return getattr(part, "files", None) or [file for each in inner for file in _files(each)]


def _of_each(function: Callable[[File], T], files: Sequence[File], doing: str) -> Iterator[T]:
    """What a function gives for each file."""
    chunks = [files[i : i + CHECKED_AT_ONCE] for i in range(0, len(files), CHECKED_AT_ONCE)]
    pool = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes without holding Python's lock
    try:
        results = pool.map(lambda c: [*map(function, c)], chunks)
        for _, found in zip(with_bar(chunks, doing), results, strict=True):
            yield from found
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C ends it, too


def _checksum(file: File) -> int:
    try:
        return crc32(_read(file).getbuffer())
    except OSError:  # which is told when the picture is decoded
        return 0


def _fault(file: File) -> str:
    """What is wrong with a picture. Empty if nothing is."""
    from PIL import Image

    try:
        encoded = _read(file)
        image = Image.open(encoded, formats=FORMATS)
        require_sides(image.size)  # before a draft rounds them
        if image.format == "PNG":
            image.verify()
            encoded.seek(0)
            image = Image.open(encoded, formats=FORMATS)
        if image.format == "JPEG":
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        eight_bits(image)
    except DataError as why:
        return str(why).split(". ")[0]
    except Exception as why:  # whatever Pillow raises
        return _reason(why)
    return ""


# ------------------------------------------------------------------------------------------------ copies


def copies(some_files: Sequence[File], others: Sequence[File], most: int = COMPARED_AT_MOST) -> list[tuple[File, File]]:
    """Files whose very bytes are among other files, each with the first that is the same.

    Only files of equal size are read, and at most so many, those of rare sizes first.
    """
    by_size: defaultdict[int, tuple[list[File], list[File]]] = defaultdict(lambda: ([], []))
    for side, files in enumerate((some_files, others)):
        for file in files:
            by_size[_size(file)][side].append(file)
    found: list[tuple[File, File]] = []
    pairs = (both for size, both in by_size.items() if size > 0 and all(both))
    for ours, theirs in sorted(pairs, key=lambda both: sum(map(len, both))):
        if (most := most - len(ours) - len(theirs)) < 0:
            break
        same = {_hash(file): file for file in reversed(theirs)}
        found += [(file, same[key]) for file in ours if (key := _hash(file)) in same and key]
    return found


def sample_of(files: Iterable[File]) -> list[str]:
    """By which a few of these files are known again in another folder: for each a hash of its name, then one of its bytes."""
    few = nsmallest(SAMPLED, (file for file in files if file.path), key=_hash_of_name)
    return [_hash_of_name(file) + hashed.hex()[:HALF] for file in few if (hashed := _hash(file))]


def number_in_sample(files: Iterable[File], sample: Sequence[str]) -> int:
    """How many of a sample are among these files, with the same name and the same bytes."""
    names, whole = {one[:HALF] for one in sample}, set(sample)
    alike = [(name, file) for file in files if file.path and (name := _hash_of_name(file)) in names]
    return len({one for name, file in alike if (one := name + _hash(file).hex()[:HALF]) in whole})


def _hash_of_name(file: File) -> str:
    return sha256(file.name.encode("utf-8", "surrogateescape")).hexdigest()[:HALF]


def _hash(file: File) -> bytes:
    """Of its bytes; empty if it cannot be read. Two PNG files have the same crc32 once in 65,536: their own checksums cancel out."""
    try:
        return sha256(_read(file).getbuffer()).digest()
    except OSError:
        return b""


def _size(file: File) -> int:
    """Its bytes; -1 if it cannot be read, which is told when the picture is decoded."""
    if file.size >= 0:
        return file.size
    try:
        return Path(file.path).stat().st_size
    except OSError:
        return -1


# ------------------------------------------------------------------------------------------------ masks among the pictures


def is_no_picture(name: str) -> bool:
    """Whether a folder says by its name that it holds no images but what belongs to them, as masks."""
    return MASKS_FOLDER.fullmatch(name) is not None


def require_no_masks(source: Path, files: Iterable[File]) -> None:
    """Refuse masks and the like beside the pictures that they are named after: heads would learn from them as from images of the class."""
    own: defaultdict[str, set[str]] = defaultdict(set)  # by folder: its pictures, without extensions
    for file in files:
        folder, _, name = file.name.rpartition("/")
        own[folder].add(name.rpartition(".")[0])
    below: defaultdict[str, set[str]] = defaultdict(
        set
    )  # of masks or images: the pictures in it, however deep they lie
    for folder, stems in own.items():
        for place in (folder[:end] for end in [*(slash.start() for slash in re.finditer("/", folder)), len(folder)]):
            if is_no_picture(name := place.rpartition("/")[2]) or IMAGES_FOLDER.fullmatch(name):
                below[place] |= stems
    pictured = defaultdict(set, {folder: set(stems) for folder, stems in own.items()})  # with those in images/
    for folder, stems in below.items():
        above, _, name = folder.rpartition("/")
        if IMAGES_FOLDER.fullmatch(name):
            pictured[above] |= stems
    for folder, stems in below.items():
        above, _, name = folder.rpartition("/")
        of = {MASK_OF.sub("", stem) for stem in stems}
        if is_no_picture(name) and 2 * len(of & pictured[above]) >= len(of):
            raise DataError(
                f"'{source}' holds {folder}/ with pictures that are named after others beside it, as masks are. Every picture below a class "
                f"folder is taken for an image of the class. Move {name}/ out of {'the class folders' if above else 'it'}. If it holds such "
                "images, rename it."
            )
    for folder, stems in own.items():
        twins = {stem for stem in stems if MASK_OF.search(stem) and MASK_OF.sub("", stem) in stems}
        if twins and 2 * len(twins) >= len(stems) - len(twins):
            raise DataError(
                f"At least half of the pictures in {folder}/ of '{source}' lie beside a mask of their own, such as {min(twins)}, which would "
                "be taken for an image of the class. Move the masks out of the class folders. If they are such images, rename them."
            )


def same_folders(classes: Mapping[str, Sequence[File]]) -> str:
    """In words: the folders that each class holds, if there are several. They may not all hold images of the class."""
    inner = [{names[0] for names in _inner_folders(name, files) if names} for name, files in classes.items() if files]
    held = Counter(name for names in inner for name in names)
    common = sorted(f"{name}/" for name, n in held.items() if n >= NEARLY_EACH * len(inner))
    if len(inner) < 2 or len(common) < 2:
        return ""
    each = "each class" if all(held[name[:-1]] == len(inner) for name in common) else "nearly each class"
    *first, last = common
    return f"{each} holds {some(common) if len(common) > 5 else f'{some(first)} and {last}'}: all are read"


def folders_within(files: Iterable[File]) -> list[str]:
    """The names of all folders that lie in class folders."""
    classes: defaultdict[str, list[File]] = defaultdict(list)
    for file in files:
        classes[file.class_name].append(file)
    return sorted({names[0] for name, own in classes.items() for names in _inner_folders(name, own) if names})


def _inner_folders(class_name: str, files: Iterable[File]) -> set[tuple[str, ...]]:
    """The names of the folders between the folder of a class and its pictures; () where there are none."""
    above = {tuple(place.split("/")) for place in {file.name.rpartition("/")[0] for file in files}}
    return {names[names.index(class_name) + 1 :] if class_name in names else () for names in above}


# ------------------------------------------------------------------------------------------------ input of a backbone


def image_transform(
    input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> Callable[[Image], Tensor]:
    """Makes a backbone's input (c, h, w) float32 of a picture: timm's transform for evaluation, with a crop of 100 %.

    `mean` and `std` have one number for each channel, or one for all, for pixels in 0..1. `interpolation` is named as in
    torchvision's `InterpolationMode`.

    Raises:
        DataError: if c is neither 3 (colours) nor 1 (grey levels).
        UnknownName: if there is no such interpolation.
    """
    from timm.data import create_transform
    from torchvision.transforms import Compose, InterpolationMode

    from ptee._common.devices import made_on_cpu

    if input_size[0] not in (1, 3):
        raise DataError(
            f"The backbone reads {input_size[0]} channels, but pictures have 3 or 1: pass tensors from Python."
        )
    modes = [mode.value for mode in InterpolationMode if mode.value != "nearest-exact"]  # which timm does not know
    if interpolation not in modes:
        raise unknown("interpolation", interpolation, modes)
    args: dict[str, Any] = {"interpolation": interpolation, "mean": tuple(mean), "std": tuple(std), "crop_pct": 1.0}
    convert = partial(_convert, mode="RGB" if input_size[0] == 3 else "L")
    with made_on_cpu():  # it keeps mean and std as tensors
        return Compose([convert, create_transform(input_size, is_training=False, **args)])


def _convert(image: Image, mode: str) -> Image:
    return eight_bits(image).convert(mode)
