"""The header of a safetensors file, read before torch is imported: what the library writes is read, what it refuses is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ptee.backbones.weights import tensor_hash
from ptee.model import heads_file
from ptee.model.heads_file import TYPES, read_header, stored_hash

PLACES = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]}}  # fmt: skip


def written(path: Path, header: Any, data: int = 32) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    """The header above with one tensor changed."""
    return PLACES | {name: PLACES[name] | fields}


@pytest.mark.parametrize("chunk", [heads_file.CHUNK_BYTES, 7])
def test_what_the_library_writes_is_read_with_the_hash_of_each_tensor(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(heads_file, "CHUNK_BYTES", chunk)
    tensors = {
        name: torch.arange(6, device="cpu").reshape(2, 3).to(getattr(torch, name)) for name in TYPES.values()
    } | {"scalar": torch.tensor(0.5, device="cpu"), "empty": torch.zeros(0, 3, device="cpu")}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "w.safetensors")
    assert {name: (f"torch.{each.dtype}", each.shape) for name, each in found.items()} == {
        name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert {name: stored_hash(tmp_path / "w.safetensors", each) for name, each in found.items()} == {
        name: tensor_hash(tensor) for name, tensor in tensors.items()
    }


DAMAGED = {
    "no object": [], "text": b"\xff\xfe", "no JSON": b"{", "deep": b"[" * 200, "no entry": {"a": 1},
    "overlapping": changed("a", data_offsets=[8, 32]), "a gap": changed("b", data_offsets=[32, 40], shape=[]), "backwards": changed("a", data_offsets=[24, 0]),
    "negative": changed("a", data_offsets=[-24, 0]), "too few numbers": changed("a", shape=[2, 2]), "too many": changed("a", shape=[2, 4]),
    "a huge shape": changed("a", shape=[2**62, 2**62, 2**62]), "a negative side": changed("a", shape=[-2, -3]), "another type": changed("a", dtype="F64"),
    "an unknown type": changed("a", dtype="X7"), "beyond the end": PLACES | {"c": {"dtype": "U8", "shape": [9], "data_offsets": [32, 41]}},
    "less than the file": {"a": PLACES["a"]}, "a field missing": {"a": {"dtype": "F32", "shape": [2, 3]}},
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_header_that_the_library_refuses_is_refused(case, tmp_path):
    file = written(tmp_path / "w.safetensors", DAMAGED[case])
    with pytest.raises((SafetensorError, ValueError, TypeError)):
        load_file(file)
    with pytest.raises(ValueError, match=r"."):
        read_header(file)


def test_a_name_that_is_there_twice_is_refused_though_the_library_reads_it(tmp_path):
    header = json.dumps(PLACES).encode()[:-1] + b', "a": ' + json.dumps(PLACES["a"]).encode() + b"}"
    with pytest.raises(ValueError, match="is there twice"):
        read_header(written(tmp_path / "w.safetensors", header))


@pytest.mark.parametrize("length", [33, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_not_read(length, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(length.to_bytes(8, "little") + bytes(32))
    with pytest.raises(ValueError, match="ends within its header"):
        read_header(tmp_path / "w.safetensors")


def test_a_longer_header_than_a_run_has_is_not_read(tmp_path):
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write((5 * 2**20).to_bytes(8, "little"))
        file.truncate(6 * 2**20)  # it takes no room on the disk
    with pytest.raises(ValueError, match="header is longer than 4,194,304 bytes"):
        read_header(tmp_path / "w.safetensors")
