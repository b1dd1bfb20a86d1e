"""`ptee export --format triton`: a model repository for NVIDIA Triton. The pieces are ONNX models, and a Python model runs them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ptee._common.errors import PteeError
from ptee._common.process import report_nothing
from ptee._common.writing import fill_place, free_place, working_in, write_json, write_text
from ptee.deploy.export import ONNX, export
from ptee.deploy.manifest import Manifest, Piece, read_manifest
from ptee.model.early_exit import EarlyExitModel

TYPES = {"tensor(float)": "FP32", "tensor(float16)": "FP16", "tensor(double)": "FP64", "tensor(int64)": "INT64",
         "tensor(int32)": "INT32", "tensor(bool)": "BOOL"}  # fmt: skip
OF_DTYPE = {"float16": "FP16", "float32": "FP32", "float64": "FP64"}
MAX_BATCH = 64
DELAY_US = 5000  # that survivors wait for others
MODEL = Path(__file__).with_name("triton_model.py")


def export_triton(model: EarlyExitModel, folder: str | Path) -> Path:
    """Write a model repository. What it answers is compared with the model before it appears, but for Triton itself.

    Args:
        model: trained and tuned.
        folder: must not exist, or be empty.

    Returns:
        The folder, for `tritonserver --model-repository`.

    Raises:
        PteeError: as of `export`, and for numbers that ONNX Runtime has not.
        RunError: if the folder cannot be written.
    """
    target = free_place(folder)
    with working_in(target) as beside:
        onnx = export(model, beside / "onnx", format=ONNX)
        fill_place(target, partial(_write, onnx, read_manifest(onnx)))
    return target


def model_name(backbone: str) -> str:
    """Of the model that is called, such as "resnet50"."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", backbone)[:100] or "model"


def _write(onnx: Path, m: Manifest, made: Path) -> None:
    if m.dtype not in OF_DTYPE:
        raise PteeError(f"Triton's Python models have no {m.dtype}. Export the model in float16 or float32.")
    name, listed = model_name(m.backbone), []
    for n, piece in enumerate(m.pieces):
        before = m.pieces[n - 1].rows if n else ((0, 1),)
        entry = _write_piece(onnx, piece, before, f"{name}_piece_{n}", made)
        listed.append({"exit": piece.exit, "rows": piece.rows, **entry})
    version = made / name / "1"
    version.mkdir(parents=True)
    shutil.copyfile(MODEL, version / "model.py")
    kept = (
        "backbone",
        "input_size",
        "mean",
        "std",
        "interpolation",
        "classes",
        "class_names",
        "exits",
        "costs",
        "thresholds",
        "off",
    )
    values = m.model_dump(mode="json")
    write_json(version / "pieces.json", {key: values[key] for key in kept} | {"pieces": listed})
    write_text(made / name / "config.pbtxt", _config_of_model(name, m))


def _write_piece(onnx: Path, piece: Piece, before: Sequence[tuple[int, int]], name: str, made: Path) -> dict[str, Any]:
    """A piece as a model of its own. Gives the names of its tensors."""
    report_nothing()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx / piece.file), providers=["CPUExecutionProvider"])
    takes, gives = session.get_inputs(), session.get_outputs()
    folder = made / name / "1"
    folder.mkdir(parents=True)
    shutil.copyfile(onnx / piece.file, folder / "model.onnx")
    batched = set(before) | set(piece.rows) == {(0, 1)}
    write_text(made / name / "config.pbtxt", _config_of_piece(name, takes, gives, batched))
    most = MAX_BATCH if batched else 0  # 0: any number
    return {"model": name, "inputs": [t.name for t in takes], "outputs": [t.name for t in gives], "max_batch": most}


def _config_of_piece(name: str, takes: Sequence[Any], gives: Sequence[Any], batched: bool) -> str:
    """Where all rows lie in the first axis, Triton may join the rows of several requests."""
    first = int(batched)
    tensors = [("input", t.name, TYPES[t.type], t.shape[first:]) for t in takes]
    tensors += [("output", t.name, TYPES[t.type], t.shape[first:]) for t in {t.name: t for t in gives}.values()]
    batching = f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY_US} }}\n" if batched else ""
    most = MAX_BATCH if batched else 0
    return f'name: "{name}"\nplatform: "onnxruntime_onnx"\nmax_batch_size: {most}\n{batching}' + "".join(
        _tensor(*tensor, reshaped=batched) for tensor in tensors
    )


def _config_of_model(name: str, m: Manifest) -> str:
    outputs = {"LOGITS": ("FP32", [-1, m.classes]), "CLASS": ("INT64", [-1]), "PROBABILITY": ("FP32", [-1]), "EXIT": ("INT64", [-1]),
               "CONFIDENCE": ("FP32", [-1]), "COST": ("FP32", [-1])}  # fmt: skip
    return (
        f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\n'
        + _tensor("input", "IMAGES", OF_DTYPE[m.dtype], [-1, *m.input_size])
        + _tensor("input", "THRESHOLD", "FP32", [-1], optional=True)
        + "".join(_tensor("output", key, kind, dims) for key, (kind, dims) in outputs.items())
        + "instance_group { kind: KIND_CPU count: 1 }\n"
    )


def _tensor(
    side: str, name: str, kind: str, shape: Sequence[Any], *, optional: bool = False, reshaped: bool = False
) -> str:
    """An entry of a configuration. An axis of any length is -1; a tensor of rows alone has no axis beside that of the batch."""
    dims = [size if isinstance(size, int) else -1 for size in shape]
    scalar = reshaped and not dims
    shown = ", ".join(map(str, dims or [1]))
    more = " reshape { shape: [ ] }" * scalar + " optional: true" * optional
    return f"{side} {{ name: {json.dumps(name)} data_type: TYPE_{kind} dims: [ {shown} ]{more} }}\n"
