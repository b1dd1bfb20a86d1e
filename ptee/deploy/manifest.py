"""What lies in the folder of an exported model, checked as it is read: the folder may come from a stranger."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ptee._common.errors import RunError
from ptee._common.files import from_json

SCHEMA = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1_000_000  # bytes
TENSORS_OF = {"float16": 2, "float32": 4, "float64": 8, "bfloat16": 2}

Count = Annotated[int, Field(ge=1, le=10**6)]
Share = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(_Strict):
    """A file.

    Attributes:
        file: its name in the folder.
        sha256: of its content.
        exit: the exit at its end, -1 for the last piece.
        rows: for each tensor that is alive behind it, the axis of the rows, and how many entries belong to a row.
    """

    file: Annotated[str, Field(pattern=r"^piece_\d{1,4}\.(pt2|onnx)$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    exit: Annotated[int, Field(ge=-1, le=1000)]
    rows: Annotated[list[tuple[Annotated[int, Field(ge=0, le=8)], Count]], Field(max_length=1000)]


class Manifest(_Strict):
    """The whole folder. Sizes are of one image; costs are fractions of the bare backbone's multiply-accumulates."""

    schema_version: Annotated[int, Field(ge=1)]
    format: Literal["pt2", "onnx"]
    backbone: Name
    input_size: tuple[Count, Count, Count]
    dtype: Literal["float16", "float32", "float64", "bfloat16"]
    mean: Annotated[list[float], Field(max_length=1000)]
    std: Annotated[list[float], Field(max_length=1000)]
    interpolation: Name
    classes: Count
    exits: Annotated[list[Name], Field(min_length=1, max_length=1000)]
    costs: list[Share]
    thresholds: list[float]
    confidence: Name
    off: list[Annotated[int, Field(ge=0, le=1000)]]
    answers: Literal["own", "blended"]
    pieces: Annotated[list[Piece], Field(min_length=1, max_length=1001)]
    versions: dict[Name, Name]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; each file that it names is there and has its hash.

    Raises:
        RunError: saying in one line what is wrong.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise RunError(f"{folder} holds no exported model: there is no {MANIFEST}. Make one with ptee export.")
    try:
        if file.stat().st_size > LARGEST_MANIFEST:
            raise ValueError("it is too large")
        values = from_json(file.read_text(encoding="utf-8"))
        version = values.get("schema_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > SCHEMA:
            raise RunError(
                f"{file} was written by a newer ptee (schema {version}, this one reads {SCHEMA}). Upgrade ptee."
            )
        found = Manifest.model_validate(values)
    except ValidationError as why:
        first = why.errors()[0]
        raise RunError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}. Export the model again.") from why
    except (OSError, ValueError) as why:
        raise RunError(f"{file} cannot be read: {why}. Export the model again.") from why
    _require_whole(folder, found)
    return found


def _require_whole(folder: Path, manifest: Manifest) -> None:
    exits = len(manifest.exits)
    order = [piece.exit for piece in manifest.pieces]
    if (
        len(manifest.costs) != exits + 1
        or len(manifest.thresholds) != exits
        or order[-1] != -1
        or order[:-1] != sorted({*order[:-1]})
    ):
        raise RunError(f"{folder / MANIFEST}: exits, costs, thresholds and pieces do not fit. Export the model again.")
    if not all(n < exits for n in order):
        raise RunError(
            f"{folder / MANIFEST}: a piece has the exit {max(order)}, and there are {exits}. Export the model again."
        )
    for piece in manifest.pieces:
        file = folder / piece.file
        if file.is_symlink() or not file.is_file():
            raise RunError(f"{file} is missing. Export the model again.")
        if hashlib.sha256(file.read_bytes()).hexdigest() != piece.sha256:
            raise RunError(f"{file} was changed after the export. Export the model again.")
