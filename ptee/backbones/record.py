"""The record that a run keeps of a network, by which it can be built again.

A record may come from a stranger, so every field of it is checked. Nothing here needs torch, so a wrong one is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tarfile import is_tarfile
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from ptee._common.errors import Argument, BackboneError, PteeError, some
from ptee._common.files import is_file, packed_by
from ptee._common.validation import FrozenConfig, Number, Whole
from ptee.backbones import timm, torchvision
from ptee.backbones.library import MOST_CLASSES, Library, ModelRequest, checked_size, require_pixels
from ptee.backbones.source import COMMIT

# The ends of names of such files.
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json", ".pth", ".pt", ".bin", ".ckpt")
STARTS = (b"PK", b"\x80", b"\x93NUMPY", b"version h")  # of zip files, pickles, arrays, and pointers of git-lfs
LIBRARIES: dict[str, Library] = {"timm": timm, "torchvision": torchvision}  # a name belongs to the first that has it


def _local(file: str) -> str:
    # for Windows, two slashes at the start name another machine, and looking there means logging in
    if not file or "\0" in file or file.replace("\\", "/").startswith("//"):
        raise PydanticCustomError("local", "Input should be a file of this machine")
    return file


def _not_a_folder(name: str) -> str:
    if name.startswith("local-dir:"):  # would open a folder of this machine that a stranger names
        raise PydanticCustomError("name", "Input should be the name of a model")
    return name


class _Origin(FrozenConfig):
    tag: str | None
    hub: str | None
    revision: Annotated[str, Field(pattern=f"^{COMMIT.pattern}$")] | None


class _File(FrozenConfig):
    file: Annotated[str, AfterValidator(_local)]


class _Published(FrozenConfig):
    pretrained: _Origin


class _Images(FrozenConfig):
    input_size: Annotated[list[int], AfterValidator(checked_size)]
    mean: Annotated[list[Number], Field(min_length=1)]
    std: Annotated[list[Number], Field(min_length=1)]
    interpolation: str


class _Record(FrozenConfig):
    """`Backbone.source`."""

    library: str
    name: Annotated[str, AfterValidator(_not_a_folder)]
    args: dict[str, JsonValue]
    num_classes: Annotated[Whole, Field(gt=0, le=MOST_CLASSES)]
    weights: _File | _Published | None  # None: random, or a run keeps them
    input: _Images


def checked_record(source: Any) -> tuple[str, ModelRequest]:
    """The library and what to ask of it. A field of another form than in `Backbone.source` is refused by name."""
    if not isinstance(source, Mapping) or str(source.get("library")) not in LIBRARIES:
        raise BackboneError("its record names no library of models.")
    try:
        record = _Record(**source)
    except PteeError as why:
        raise BackboneError(f"its record is wrong: {why}") from why
    own, images = record.weights, record.input
    file = own.file if isinstance(own, _File) else None
    origin = own.pretrained.model_dump() if isinstance(own, _Published) else {}
    require_pixels(images.mean, images.std)
    label = record.name if record.library == "timm" else f"{record.library}/{record.name}"
    size: Any = images.input_size
    request = ModelRequest(
        *(record.name, label, file, isinstance(own, _Published), record.num_classes),
        *(size, images.mean, images.std, record.args, origin),
        interpolation=images.interpolation,
    )
    return record.library, request


def require_weights(file: str | Path) -> None:
    """Refuse a file of weights that is not there, is a folder, or begins as no such file does."""
    if (path := Path(file)).suffix == ".py":
        text = f"{file!s:.300} is a Python file. Save the weights with torch.save(net.state_dict(), 'weights.pth'), and give that."
        raise BackboneError(text, argument="weights", value=str(file))
    if parts := _distributed(path):
        text = f"{file!s:.300} is a distributed checkpoint of torch, in several files."
        make = f" Make one of them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {parts!s:.300} FILE.pth."
        raise BackboneError(text, make, argument="weights", value=str(file))
    if is_file(path):
        if not _may_hold_weights(path):
            text = (
                f"{file!s:.300} cannot be read: it begins neither as a .safetensors file nor as what torch.save writes."
            )
            raise BackboneError(text, " Get it again.", argument="weights", value=str(file))
        return
    text, advice = f"There is no weights file {file!s:.300}.", " Give a .safetensors or .pth file that exists."
    if found := _inside(path):
        text, advice = f"{file!s:.300} is a folder.", f" Give the file of weights in it: {some(found)}."
    raise BackboneError(text, advice, argument="weights", value=str(file))


def _distributed(path: Path) -> Path | None:
    """The folder of a distributed checkpoint (FSDP), if this is one or lies in one."""
    folder = path.parent if path.suffix == ".distcp" else path
    return folder if is_file(folder / ".metadata") and any(folder.glob("*.distcp")) else None


def _may_hold_weights(path: Path) -> bool:
    """Whether a file begins as weights do, or as something that `checkpoint` knows and calls by its name."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
        known = start[8:] == b"{" or start.startswith(STARTS) or path.suffix.lower() == ".json"
        return known or bool(packed_by(path)) or is_tarfile(path)
    except OSError:  # which is told when it is read
        return True


def _inside(folder: Path) -> list[str]:
    """The files of weights in a folder. An index of shards stands for them; without any, what such a file is called."""
    try:
        if not folder.is_dir():
            return []
        files = sorted(path for path in folder.iterdir() if path.name.lower().endswith(WEIGHTS))
    except OSError:
        return []
    indices = [path for path in files if path.suffix == ".json"]
    return list(map(str, indices or files or [folder / "model.safetensors"]))


@contextmanager
def rebuilding(argument: str) -> Iterator[None]:
    """Errors say which network of a run cannot be built again: `argument` is "backbone" or "front"."""
    try:
        yield
    except PteeError as error:
        what = "front network" if argument == "front" else argument
        parts = _without_advice(error) if are_about_weights(error) else error.parts
        advice = f" Give the network itself from Python, {argument}=NETWORK."
        raise BackboneError(f"The {what} cannot be rebuilt: ", *parts, advice, argument=argument) from error


def are_about_weights(error: BaseException | None) -> bool:
    """Whether an error is one of the weights of a network: then another file of weights mends it."""
    named = (
        (error.argument, *(part.name for part in error.parts if isinstance(part, Argument)))
        if isinstance(error, PteeError)
        else ()
    )
    return not {"weights", "num_classes"}.isdisjoint(named)


def _without_advice(error: PteeError) -> tuple[str | Argument, ...]:
    """What an error says of a file of weights, without the advice to change the model: a run names its own.

    The advice begins with the last words before the first argument that it names, or with the second part.
    """
    first = next((n for n, part in enumerate(error.parts) if isinstance(part, Argument)), 2)
    return (*(str(part).rstrip() for part in error.parts[: first - 1]),)
