"""The tensors in a file of weights. Files are read as data: nothing in them is run."""

from __future__ import annotations

import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import Argument, BackboneError, first_line, some
from ptee._common.files import from_json, packed_by, require_not_compressed
from ptee._common.process import alone
from ptee.backbones.record import require_weights

SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.")  # huggingface_hub's names for the parts of a large file
LARGEST_INDEX = 64 * 2**20  # bytes
DEEPEST, MOST_PLACES = 4, 1000  # dictionaries around a network, and in a file
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile and others
MOST_TENSORS, LONGEST, MOST_PARTS = 20_000, 512, 32  # in a file; letters of a name, and parts between its points
LONGEST_NAME = 60  # of a tensor, in a message
LFS = b"version https://git-lfs.github.com/"  # begins what stands in place of a file that git-lfs has not fetched
# What trainers keep beside weights, by kind. These values are passed over, and no code of theirs runs.
SETTINGS = r"collections\.defaultdict|(yacs|easydict|addict|ml_collections)\..+|(\w+\.)*AttributeDict"
ROWS = r"collections\.deque"
ARRAYS = r"numpy\.(ndarray|_?core\.multiarray\._reconstruct)"
VALUES = (
    r"(argparse|datetime|decimal|enum|fractions|functools|numpy|omegaconf|pathlib|types|typing|uuid)\..+"
    r"|(pytorch_lightning|lightning|lightning_fabric|torchmetrics|torch\.nn\.modules\.loss|torch\.optim)\..+"
    r"|builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|int|list|range|set|slice|str|tuple)"
)
COMMON = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
NUMPY = b"\x93NUMPY"  # begins a file of one array
OLDEST = b"\x80\x02\x8a\nl\xfc\x9cF\xf9"  # begins what torch.save wrote before it wrote zip files


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds: tensors by name, for each place in the file. They stay on the disk until they are read.

    A place is "" for the file itself, or "model.state_dict" for a dictionary in a dictionary.
    """

    file: Path
    places: dict[str, OrderedDict[str, Tensor]]
    nameless: tuple[str, ...] = ()  # places of lists of tensors

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return [name for state in self.places.values() for name in state]

    @property
    def numbers(self) -> int:
        """How many numbers all tensors have."""
        return sum(tensor.numel() for state in self.places.values() for tensor in state.values())


def refusal(file: str | Path, text: str, *advice: str | Argument) -> BackboneError:
    """The error for a file of weights that cannot be used."""
    return BackboneError(f"{file!s:.300} {text}", *advice, argument="weights", value=str(file))


def read_checkpoint(file: str | Path) -> Checkpoint:
    """Open a .safetensors file, the index of several, or what `torch.save` wrote."""
    path = Path(file)
    require_weights(path)
    part = SHARD.search(path.name)
    if part is not None and part[2] != "1":
        index = SHARD.sub(".", path.name, count=1) + ".index.json"
        raise refusal(file, f"is one of {part[2]} shards of a file. Give their index: {path.parent / index}.")
    try:
        found = _read_shards(path) if path.suffix.lower() == ".json" else _read(path)
        _require_tensors(path, found)
        _require_few_names(path, found)
        places, nameless = dict(_places(found)), tuple(_lists(found))
    except BackboneError:
        raise
    except Exception as error:
        raise refusal(file, _why_unreadable(path, error)) from error
    if not places:
        raise refusal(file, "holds no state_dict (names of tensors). Save model.state_dict() and nothing else.")
    return Checkpoint(path, places, nameless)


def _read(path: Path) -> Any:
    _require_fetched(path)
    _require_unpacked(path)
    is_zip, named = zipfile.is_zipfile(path), path.suffix.lower() == ".safetensors"
    _require_suffix(path, named, is_zip)
    if named:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            if len(names := file.keys()) > MOST_TENSORS:
                raise _too_many(path, len(names))
            return {name: file.get_tensor(name) for name in names}
    if is_zip:
        _require_whole(path)
    device = torch.device("cpu")  # not torch's default device, where a sparse tensor would lie
    with alone(), torch.serialization.safe_globals(_passed_over(path)), device:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


class _Value:
    """Stands for a value that is no tensor. It takes whatever it is made of, and keeps nothing."""

    def __init__(self, *parts: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class _Array(_Value):
    """Stands for an array of numpy."""


class _Settings:
    """Makes a plain dictionary in place of one of another kind."""

    def __new__(cls, *parts: object) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _Row:
    """Makes a plain list in place of one of another kind."""

    def __new__(cls, *parts: object) -> list[Any]:  # type: ignore[misc]
        return []


def _passed_over(path: Path) -> list[Any]:
    """What stands for each value in the file that torch does not read, and its name; nothing if one of them is unknown."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # torch's oldest format, or a damaged file
        names = list(COMMON)
    kinds = {_Settings: SETTINGS, _Row: ROWS, _Array: ARRAYS, _Value: VALUES}
    found = [(next((kind for kind, known in kinds.items() if re.fullmatch(known, name)), None), name) for name in names]
    return [] if any(kind is None for kind, _ in found) else found


def _require_fetched(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise refusal(path, "is a pointer of git-lfs, not the file itself. Fetch it: git lfs pull.")


def _require_unpacked(path: Path) -> None:
    """Refuse an archive of a file of weights, and arrays of numpy."""
    with path.open("rb") as file:
        start = file.read(len(NUMPY))
    if packed := packed_by(path):
        raise refusal(path, f"is compressed ({packed}). Unpack it: {packed} -dc {path.name} > FILE.pth.")
    if _is_tar(path):
        raise refusal(path, "is a tar archive. Unpack it, and give the file of weights that is in it.")
    parts = []
    if start != NUMPY and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.namelist()
        if any(part.endswith((".pkl", "/version")) for part in parts):  # torch's own
            return
    if start == NUMPY or (parts and all(part.endswith(".npy") for part in parts)):
        raise refusal(path, "holds arrays of numpy. Save them as tensors (torch.from_numpy), by name, with torch.save.")
    if parts:
        text = f"is a zip archive of {shown(parts, 3)}, not written by torch.save. Unpack it, and give the file of weights in it."
        raise refusal(path, text)


def _is_tar(path: Path) -> bool:
    """Whether this is a tar archive of something. A file of zeros, which a broken download leaves, is taken for an empty one."""
    if not tarfile.is_tarfile(path):
        return False
    with tarfile.open(path) as archive:
        return archive.next() is not None


def _require_suffix(path: Path, named: bool, is_zip: bool) -> None:
    """Refuse a file of one kind that has the suffix of the other. `named`: .safetensors."""
    with path.open("rb") as file:
        start = file.read(len(OLDEST))
    header = int.from_bytes(start[:8], "little")
    if named and (is_zip or start == OLDEST):
        raise refusal(path, f"was written by torch.save and is no safetensors file. Name it {path.stem}.pth.")
    if not named and not is_zip and start[8:] == b"{" and header < path.stat().st_size:
        raise refusal(path, f"is a safetensors file. Name it {path.stem}.safetensors.")


def _require_whole(path: Path) -> None:
    """Refuse a file of torch.save that is not as it was written, and one of torch.jit.save or torch.export.save.

    torch itself compares no checksums.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.filename.endswith("/constants.pkl") for part in parts):
            raise refusal(
                path, "is TorchScript, a program and no file of weights. Load it, and save model.state_dict()."
            )
        if any(part.filename.endswith("/archive_format") for part in parts):
            text = "is a program of torch.export and no file of weights. Load it (torch.export.load), and save its state_dict."
            raise refusal(path, text)
        if len(parts) > 2 * MOST_TENSORS:  # that of an optimizer may be as many, by number
            raise _too_many(path, len(parts))
        require_not_compressed(path, archive)
        has_checksums = any(part.CRC for part in parts)  # torch can be told to write none
        if has_checksums and (damaged := archive.testzip()) is not None:
            raise ValueError(f"It is damaged in {damaged[-LONGEST_NAME:]!r}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names. The files lie beside it."""
    _require_fetched(index)
    if index.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"An index of shards has {LARGEST_INDEX:,} bytes at most")
    found = from_json(index.read_text(encoding="utf-8"))
    home = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(home, dict) or not home:
        raise ValueError("It is no index of shards: it has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(map(str, home.values())):
        if Path(name).name != name or "\\" in name or ":" in name or not (index.parent / name).is_file():
            raise ValueError(f"Its shard {name[:LONGEST_NAME]!r} is no file beside it")
        shard = _read(index.parent / name)
        wanted = [key for key, file in home.items() if file == name]
        absent = [key for key in wanted if not isinstance(shard.get(key), Tensor)]
        if absent:
            raise ValueError(f"Its shard {name} lacks {shown(absent, 3)}")
        tensors |= {key: shard[key] for key in wanted}
    return tensors


def _places(found: Any) -> Iterator[tuple[str, OrderedDict[str, Tensor]]]:
    """Every dictionary in the file that has tensors in it, the outermost first."""
    for place, value in _dictionaries(found):
        state = OrderedDict((key, part) for key, part in value.items() if isinstance(key, str) and _is_plain(part))
        if state:
            names, versions = [_bare(name) for name in state], getattr(value, "_metadata", None)
            if len(set(names)) == len(names):  # else two would have one name
                state = OrderedDict(zip(names, state.values(), strict=True))
                versions = versions and OrderedDict((_bare(name), version) for name, version in versions.items())
            state._metadata = versions  # type: ignore[attr-defined]
            yield place, state


def _require_tensors(path: Path, found: Any) -> None:
    """Refuse arrays and sparse tensors under names such as fc.bias: they are weights, and were passed over."""
    for place, value in _dictionaries(found):
        named = {key: part for key, part in value.items() if isinstance(key, str) and "." in key}
        arrays = [key for key, part in named.items() if isinstance(part, _Array)]
        packed = [key for key, part in named.items() if isinstance(part, Tensor) and part.layout is not torch.strided]
        under = f"under {place!r:.60} " if place else ""
        if arrays:
            text = f"holds weights {under}as arrays of numpy ({shown(arrays, 3)}). Save them as tensors (torch.from_numpy)."
            raise refusal(path, text)
        if packed:
            text = f"holds weights {under}that are sparse or packed ({shown(packed, 3)}). Save them as plain tensors (.to_dense())."
            raise refusal(path, text)


def _require_few_names(path: Path, found: Any) -> None:
    """Comparing more names, or longer ones, with those of a network would take long."""
    names = [
        (place, key)
        for place, value in _dictionaries(found)
        for key, part in value.items()
        if isinstance(key, str) and isinstance(part, Tensor)
    ]
    if len(names) > MOST_TENSORS:
        raise _too_many(path, len(names))
    for place, name in names:
        if len(name) > LONGEST or name.count(".") >= MOST_PARTS:
            under = f"under {place!r:.60} " if place else ""
            text = f"has {under}names of more than {LONGEST} letters or {MOST_PARTS} parts: {shown([name])}. Save the network's "
            raise refusal(path, f"{text}state_dict and nothing else; if these names are its own, rename them.")


def _too_many(path: Path, n: int) -> BackboneError:
    most = f"at most {MOST_TENSORS:,} are read"
    return refusal(path, f"holds {n:,} tensors, and {most}. Save the network's state_dict and nothing else.")


def _lists(found: Any) -> Iterator[str]:
    """The place of every list of tensors in those dictionaries: some trainers keep averaged weights so."""
    for place, value in _dictionaries(found):
        for key, part in value.items():
            if isinstance(key, str) and isinstance(part, list | tuple) and part and all(map(_is_plain, part)):
                yield f"{place}.{key}" if place else key


def _dictionaries(found: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every dictionary in the file by its place, the outermost first."""
    waiting, seen = [("", found, 0)], set()
    while waiting:
        place, value, depth = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        yield place, value
        if depth < DEEPEST and len(seen) < MOST_PLACES:
            inner = [(key, part) for key, part in value.items() if isinstance(key, str) and isinstance(part, Mapping)]
            waiting += [(f"{place}.{key}" if place else key, part, depth + 1) for key, part in inner]


def _bare(name: str) -> str:
    """The name of a tensor or module without those of modules that torch puts around others."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _why_unreadable(path: Path, error: Exception) -> str:
    try:  # lists what a pickle would call without calling it; fails on damaged files and on torch's oldest format
        code = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        code = []
    if code:
        return (
            f"holds more than weights ({some(code, 3)}), and reading that could run code. Save the state_dict alone, best as "
            ".safetensors."
        )
    if isinstance(error, pickle.UnpicklingError):  # its own text is about versions of PyTorch
        return "cannot be read: it is damaged, no weights file, or could run code. Get it again."
    return f"cannot be read: {first_line(error)} Get it again."


def shown(names: list[str], most: int = 5) -> str:
    """The first names, each one short and printable, and how many more there are."""
    return some([_short(name) for name in names[:most]] + names[most:], most)


def _short(name: str) -> str:
    name = name if name.isprintable() else ascii(name)[1:-1]
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}...{name[-half:]}"
