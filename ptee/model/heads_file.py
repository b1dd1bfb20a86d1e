"""A safetensors file before any tensor of it is made: its header, and hashes of its bytes, read with suspicion.

The library checks a header as well, but only while it loads the tensors into NumPy or torch, which a refusal need not wait for.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ptee._common.files import from_json
from ptee._common.validation import from_pydantic

LARGEST_HEADER_BYTES = 4 * 2**20
CHUNK_BYTES = 2**20
TYPES = {  # the format's name of a type: torch's name, and the bytes of a number
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "C64": ("complex64", 8),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "BOOL": ("bool", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
}  # fmt: skip
Size = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class Stored(NamedTuple):
    """Where a tensor lies in the file. `dtype` is torch's name of its type."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: Annotated[tuple[Size, ...], Field(max_length=8)]
    data_offsets: tuple[Size, Size]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name. They fill it without gaps, and none overlaps another.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying what is wrong with it.
    """
    header, length, size = _header(path)
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    try:
        entries = _ENTRIES.validate_python(header)
    except ValidationError as why:
        raise ValueError(str(from_pydantic(why))) from why
    found, end = {}, 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, stop = (8 + length + offset for offset in entry.data_offsets)
        dtype, width = TYPES.get(entry.dtype, (entry.dtype, -1))
        if begin != end or stop - begin != math.prod(entry.shape) * width:
            raise ValueError(f"its tensor {name!r:.80} does not fill its place")
        found[name], end = Stored(dtype, entry.shape, begin, stop - begin), stop
    if end != size:
        raise ValueError("it does not end where its tensors do")
    return found


def read_notes(path: Path) -> dict[str, Any]:
    """What was written beside the tensors of a file; empty if there is nothing. Raises as `read_header`."""
    header, _, _ = _header(path)
    notes = header.get("__metadata__") if isinstance(header, dict) else None
    return notes if isinstance(notes, dict) else {}


def _header(path: Path) -> tuple[Any, int, int]:
    """The header of a file, its length, and the size of the file, in bytes."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise ValueError("it ends within its header")
        if length > LARGEST_HEADER_BYTES:
            raise ValueError(f"its header is longer than {LARGEST_HEADER_BYTES:,} bytes")
        return from_json(file.read(length).decode("utf-8")), length, size


def stored_hash(path: Path, tensor: Stored) -> str:
    """`ptee.backbones.weights.tensor_hash` of a tensor in the file."""
    digest = hashlib.sha256(f"\0torch.{tensor.dtype}\0{tensor.shape}\0".encode())
    with path.open("rb") as file:
        file.seek(tensor.begin)
        for begin in range(0, tensor.length, CHUNK_BYTES):
            digest.update(file.read(min(CHUNK_BYTES, tensor.length - begin)))
    return digest.hexdigest()[:16]
