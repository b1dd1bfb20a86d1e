"""What lies in the folder of an exported model, checked as it is read: the folder may come from a stranger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import PteeError, RunError
from ptee._common.files import file_hash, is_file
from ptee._common.validation import LARGEST_IMAGE, FrozenConfig, Name, Number, Whole, read_record
from ptee._common.writing import settle
from ptee.backbones.library import LEAST_STD

SCHEMA = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**20  # bytes
AGAIN = "Export the model again."
ELSEWHERE, LENGTH_ENDS = b"location", (8, 0)  # a length of 8 is the byte 8, or written longer, 0 at its end
_NOT_KNOWN = "The mean and std of the images are not recorded (nobody gave them)"
_GIVE_THEM = "or export the model again with them: ptee.export(model, FOLDER, mean=..., std=...)."
UPLOADS_NOT_KNOWN = f"{_NOT_KNOWN}, so pictures are refused. Send arrays that you prepared, {_GIVE_THEM}"
PICTURES_NOT_KNOWN = (
    f"{_NOT_KNOWN}, so pictures cannot be prepared. Give `predict` images that you prepared, {_GIVE_THEM}"
)

Count = Annotated[Whole, Field(ge=1, le=10**6)]
MAX_ROWS = 4096  # of a batch, in what torch.export makes
Hash = Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{64}$")]
Axis = Annotated[Whole, Field(ge=0, le=8)]


class Piece(FrozenConfig):
    """A file.

    Attributes:
        file: its name in the folder.
        sha256: of its content.
        exit: the exit at its end, -1 for the last piece.
        rows: for each tensor that is alive behind it, the axis of the rows, and how many entries belong to a row.
    """

    file: Annotated[str, Field(strict=True, pattern=r"^piece_\d{1,4}\.(pt2|onnx)$")]
    sha256: Hash
    exit: Annotated[Whole, Field(ge=-1, le=1000)]
    rows: Annotated[tuple[tuple[Axis, Count], ...], Field(max_length=1000)]


class Answered(FrozenConfig):
    """How an exported model answered images.

    Attributes:
        numbers: "float32" or "int8".
        accuracy: None without labels.
        fidelity: share of the answers that are those of the backbone in float32.
        cost: mean, of the backbone's multiply-accumulates.
        bytes: of the pieces.
        times: of batches of 1 and 32, divided by those of float32.
    """

    numbers: Name
    accuracy: Number | None
    fidelity: Number
    cost: Number
    bytes: Annotated[Whole, Field(ge=0)]
    times: Annotated[tuple[Number, ...], Field(max_length=9)]


class Int8(FrozenConfig):
    """Pieces in whole numbers of 8 bits: on how many images they were calibrated, and beside float32 on how many others."""

    calibrated_on: Count
    compared_on: Count
    measured: Annotated[tuple[Answered, ...], Field(max_length=9)]


class Manifest(FrozenConfig):
    """The whole folder. Sizes are of one image; costs are fractions of the bare backbone's multiply-accumulates."""

    schema_version: Annotated[Whole, Field(ge=1)]
    format: Literal["pt2", "onnx"]
    backbone: Name
    input_size: tuple[Count, Count, Count]
    dtype: Literal["float16", "float32", "float64", "bfloat16"]
    mean: tuple[Number, ...]
    std: tuple[Annotated[Number, Field(ge=LEAST_STD)], ...]
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
    classes: Count
    class_names: Annotated[tuple[Name, ...], Field(max_length=10**6)] = ()  # by the logits; empty if not known
    exits: Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
    costs: tuple[Annotated[Number, Field(ge=0)], ...]
    thresholds: tuple[Number, ...]
    confidence: Name
    off: tuple[Annotated[Whole, Field(ge=0)], ...]
    answers: Literal["own", "blended"]
    pieces: Annotated[tuple[Piece, ...], Field(min_length=1, max_length=1001)]
    versions: dict[Name, Name]
    int8: Int8 | None = None
    pixels_known: Annotated[bool, Field(strict=True)] = True  # false: mean and std are ImageNet's, as nobody gave any
    fingerprint: Hash

    @model_validator(mode="after")
    def _fits(self) -> Self:
        exits, order = len(self.exits), [piece.exit for piece in self.pieces]
        channels, height, width = self.input_size
        if channels * height * width > LARGEST_IMAGE:
            raise PteeError(f"input_size={list(self.input_size)} is larger than images can be.")
        sizes = len(self.costs), len(self.thresholds)
        if sizes != (exits + 1, exits) or {len(self.mean), len(self.std)} - {1, channels}:
            raise PteeError("costs, thresholds, mean or std do not fit the exits and channels.")
        if self.class_names and len(self.class_names) != self.classes:
            raise PteeError("there are other class_names than classes.")
        every = {*range(exits)}
        if order[-1] != -1 or order[:-1] != sorted({*order[:-1]} & every) or not {*self.off} <= every:
            raise PteeError("pieces and exits that are off do not fit the exits.")
        return self

    @property
    def ends(self) -> tuple[int, ...]:
        """The exit at the end of each piece, as they are counted from 0; the number of exits for the last piece."""
        return (*(piece.exit for piece in self.pieces[:-1]), len(self.exits))


def is_exported(folder: str) -> bool:
    """Whether a folder holds what `ptee export` wrote, and no run."""
    settle(Path(folder))
    return is_file(Path(folder) / MANIFEST) and not is_file(Path(folder) / "config.json")


def fingerprint(values: Mapping[str, Any]) -> str:
    """A hash of all of a manifest but the thresholds, which may be changed by hand."""
    kept = {name: value for name, value in values.items() if name not in ("thresholds", "fingerprint")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; each file that it names is there and has its hash."""
    file = folder / MANIFEST
    settle(folder)
    if not is_file(file):
        raise RunError(f"{folder!s:.200} holds no exported model: there is no {MANIFEST}. Make one with ptee export.")
    found, values = read_record(Manifest, file, LARGEST_MANIFEST, SCHEMA, AGAIN)
    if found.fingerprint != fingerprint(values):
        raise RunError(f"{file} was changed. Only thresholds may be changed by hand. {AGAIN}")
    for piece in found.pieces:
        _require_whole(folder / piece.file, piece.sha256)
        if found.format == "onnx":
            _require_own_weights(folder / piece.file)
    return found


def _require_whole(file: Path, expected: str) -> None:
    if file.is_symlink() or not file.is_file():
        raise RunError(f"{file} is missing. {AGAIN}")
    if file_hash(file) != expected:
        raise RunError(f"{file} was changed after the export. {AGAIN}")


def _require_own_weights(file: Path) -> None:
    """Refuse an ONNX file with weights in other files: no hash covers these, and a stranger may name any file of this machine.

    Each such weight says where it is behind the key `location`, which protobuf writes behind its length of 8 letters.
    """
    if not file.stat().st_size:
        return
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
        place = content.find(ELSEWHERE)
        while place >= 0:
            if place and content[place - 1] in LENGTH_ENDS:
                raise RunError(f"{file} has weights in another file, which is not read. {AGAIN}")
            place = content.find(ELSEWHERE, place + 1)
