"""A safetensors file before any tensor of it is made: its header, and hashes of its bytes. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from ptee._common.files import from_json

LARGEST_HEADER_BYTES = 4 * 2**20
TIMES_IN_CHECKPOINT = 4  # as many tensors: the heads, the best ones, and for each two numbers of its optimizer
CHUNK_BYTES = 2**20
TYPES = {  # the format's names of types, and torch's
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


class Stored(NamedTuple):
    """Where a tensor lies in the file. `dtype` is torch's name of its type."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    length: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, by name.

    Raises:
        OSError: if it cannot be read.
        ValueError: saying what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open

    header, length = _header(path)
    try:
        with safe_open(path, "np"):  # which looks at all entries: the tensors fill the file without gaps
            pass
    except SafetensorError as why:
        raise ValueError(str(why)) from why
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = TYPES.get(entry["dtype"], entry["dtype"])
            found[name] = Stored(kind, tuple(entry["shape"]), 8 + length + begin, end - begin)
    return found


def read_notes(path: Path) -> dict[str, Any]:
    """What was written beside the tensors of a checkpoint; empty if there is nothing. Raises as `read_header`."""
    header, _ = _header(path, TIMES_IN_CHECKPOINT * LARGEST_HEADER_BYTES)
    notes = header.get("__metadata__") if isinstance(header, dict) else None
    return notes if isinstance(notes, dict) else {}


def _header(path: Path, largest: int = LARGEST_HEADER_BYTES) -> tuple[Any, int]:
    """The header of a file, and its length in bytes."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            raise ValueError("it ends within its header")
        if length > largest:
            raise ValueError(f"its header is longer than {largest:,} bytes")
        return from_json(file.read(length).decode("utf-8")), length


def stored_hash(path: Path, tensor: Stored) -> str:
    """`ptee.backbones.weights.tensor_hash` of a tensor in the file."""
    digest = hashlib.sha256(f"\0torch.{tensor.dtype}\0{tensor.shape}\0".encode())
    with path.open("rb") as file:
        file.seek(tensor.begin)
        for begin in range(0, tensor.length, CHUNK_BYTES):
            digest.update(file.read(min(CHUNK_BYTES, tensor.length - begin)))
    return digest.hexdigest()[:16]
