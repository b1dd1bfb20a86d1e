"""`ptee export --int8`: the pieces of a run in whole numbers of 8 bits, beside the same in float32 on images.

ONNX Runtime replaces each convolution and product by one of whole numbers. What a value can be is measured on images (static
quantisation), for weights channel by channel. The quantised pieces decide who leaves, so exits, answers and cost change with
them: all of it is measured on other images, printed, and kept in the manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptee._common.clock import in_turns, ratio
from ptee._common.errors import DataError, PteeError, first_line
from ptee._common.process import no_logs, no_stderr, no_stdout, no_warnings, report_nothing
from ptee._common.text import Readable, number_of, or_dash, percent, table
from ptee._common.writing import free_place, working_in, writing_in
from ptee.data.batches import UNKNOWN_LABEL, batches, numbered, split_batch
from ptee.data.pictures import all_broken_named
from ptee.deploy.export import ONNX, export, publish, require_libraries, sign
from ptee.deploy.manifest import MANIFEST, Answered, Int8
from ptee.deploy.runner import Runner, load_exported
from ptee.exits.config import NEVER
from ptee.pipeline.saved_run import open_run

CALIBRATED_ON, COMPARED_ON = 256, 1000  # images at most
OPERATORS = ["Conv", "MatMul", "Gemm"]
BATCH = 32
TIMED = (1, BATCH)  # sizes of batches
FLOAT, INT8 = "float32", "int8"


@dataclass(frozen=True)
class Exported(Readable):
    """What was written, and how it answers beside float32. Prints as a table.

    Attributes:
        folder: with the pieces.
        int8: what was measured.
        leaving: for each of both the share of the images that leaves at each exit, and at the end.
    """

    folder: Path
    int8: Int8
    leaving: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"folder": str(self.folder), "int8": self.int8.model_dump(mode="json")}

    def __str__(self) -> str:
        title = (
            "",
            "accuracy",
            "fidelity",
            "cost",
            "MB",
            *(f"time, batch {b}" for b in TIMED),
            "leaving at each exit, the end",
        )
        rows = [title]
        for m in self.int8.measured:
            leaving = ", ".join(percent(share) for share in self.leaving[m.numbers])
            accuracy = or_dash(m.accuracy, ".4f")
            times = [f"{t:.2f}" for t in m.times] + ["-"] * (len(TIMED) - len(m.times))  # too few images for a batch
            rows.append(
                (m.numbers, accuracy, f"{m.fidelity:.4f}", f"{m.cost:.4f}", f"{m.bytes / 1e6:.1f}", *times, leaving)
            )
        return (
            f"{table(rows, left={0, len(title) - 1})}\n\nCalibrated on {number_of(self.int8.calibrated_on, 'image')}, compared on "
            f"{number_of(self.int8.compared_on, 'other')} at the same thresholds. fidelity: share of the answers that are those of the backbone in "
            "float32; cost in multiply-accumulates; time divided by that of float32, both in turns."
        )


def export_int8(run: str, out: Path, calibrate: str, *, weights: Path | None) -> Exported:
    """Write a saved run in whole numbers, and compare it with the same in float32.

    Args:
        run: a folder, or user/repo on the hub.
        out: a new folder.
        calibrate: images: a folder, or the name of a data set.
        weights: a file of the backbone's weights.

    Raises:
        PteeError: if there are too few images, or a piece cannot be quantised.
    """
    require_libraries(ONNX)
    target = free_place(out)
    opened = open_run(run, weights=weights, data=calibrate)
    images, labels = _some(opened.left_by_tuning(given=True)[0])
    few = min(CALIBRATED_ON, len(images) // 2)
    if few < 1:
        raise DataError(
            f"{calibrate} has {number_of(len(images), 'image')} for this. Give 2 or more, better 1,000.",
            argument="calibrate",
        )
    with working_in(target) as beside:
        whole, made = export(opened.model, beside / FLOAT, format=ONNX), beside / INT8
        quantise(whole, made, images[:few].numpy())
        found, leaving = compared({FLOAT: whole, INT8: made}, images[few:], labels[few:])
        int8 = Int8(calibrated_on=few, compared_on=len(images) - few, measured=found)
        sign(made, json.loads((made / MANIFEST).read_text("utf-8")) | {"int8": int8.model_dump(mode="json")})
        load_exported(made)
        publish(made, target)
    return Exported(target, int8, leaving)


def _some(data: Any) -> tuple[Tensor, Tensor]:
    """Images (n, c, h, w) of a data set in a random order, and their labels (n,)."""
    order = np.random.default_rng(0).permutation(len(data))[: CALIBRATED_ON + COMPARED_ON].tolist()
    loader: Any = batches(torch.utils.data.Subset(data, order), batch_size=128, shuffle=False, num_workers=0)
    with all_broken_named([data]):
        parts = [split_batch(part) for part in loader]
    return torch.cat([x for x, _ in parts]), torch.cat([numbered(y, x) for x, y in parts])


# ---------------------------------------------------------------------------------------------------- whole numbers


def quantise(source: Path, target: Path, images: np.ndarray) -> None:
    """Write what lies in a folder of ONNX pieces in whole numbers.

    Args:
        source: of the pieces in float32.
        target: a new folder.
        images: (n, c, h, w) by which it is found out what values can be. All of them go through all pieces.
    """
    shutil.copytree(source, target)
    values = json.loads((source / MANIFEST).read_text("utf-8"))
    alive, rows = [images], [[0, 1]]
    for entry in values["pieces"]:
        file = source / entry["file"]
        session = _session(file)
        names = [given.name for given in session.get_inputs()]
        parts = [dict(zip(names, part, strict=True)) for part in _parts(alive, rows)]
        try:
            _quantise(file, target / entry["file"], parts)
        except Exception as why:  # whatever the library raises
            raise PteeError(
                f"{values['backbone']}: ONNX Runtime cannot quantise {file.name}: {first_line(why)}"
            ) from why
        rows = entry["rows"]
        given = [session.run(None, part)[:-2] for part in parts]
        alive = [np.concatenate(each, where[0]) for each, where in zip(zip(*given, strict=True), rows, strict=True)]
    sign(target, values)


def _session(file: Path) -> Any:
    report_nothing()
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _parts(alive: Sequence[np.ndarray], rows: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, ...]]:
    """The tensors in batches."""
    number = alive[0].shape[rows[0][0]] // rows[0][1]
    cuts = range(BATCH, number, BATCH)
    each = [np.split(t, [n * many for n in cuts], axis) for t, (axis, many) in zip(alive, rows, strict=True)]
    return zip(*each, strict=True)


def _quantise(source: Path, target: Path, parts: Sequence[dict[str, np.ndarray]]) -> None:
    report_nothing()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(parts)

        def get_next(self) -> Any:
            return next(self.left, None)

    with writing_in(target.parent) as beside, no_warnings, no_logs, no_stdout, no_stderr:
        prepared = beside / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


# ---------------------------------------------------------------------------------------------------- beside float32


def compared(folders: dict[str, Path], images: Tensor, labels: Tensor) -> tuple[list[Answered], dict[str, list[float]]]:
    """How exported models answer the same images, the first of them being what the others are compared with; who leaves where."""
    runners = {name: load_exported(folder) for name, folder in folders.items()}
    first = next(iter(runners))
    x = images.numpy()
    want = _joined(runners[first], x, NEVER)[0]
    times = {b: _times(runners, x[:b]) for b in TIMED if b <= len(x)}
    found, leaving = [], {}
    for name, runner in runners.items():
        answers, exits, cost = _joined(runner, x, None)
        leaving[name] = (np.bincount(exits, minlength=len(runner.threshold) + 1) / len(x)).tolist()
        known = not bool((labels == UNKNOWN_LABEL).any())
        found.append(
            Answered(
                numbers=name,
                accuracy=float((answers == labels.numpy()).mean()) if known else None,
                fidelity=float((answers == want).mean()),
                cost=float(cost.mean()),
                bytes=sum((folders[name] / piece.file).stat().st_size for piece in runner.manifest.pieces),
                times=tuple(ratio(of[name], of[first]) for of in times.values()),
            )
        )
    return found, leaving


def _joined(runner: Runner, x: np.ndarray, threshold: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) classes, exits and costs."""
    outs = [runner.predict(x[i : i + BATCH], threshold) for i in range(0, len(x), BATCH)]
    parts = [(out.logits.argmax(1), out.exit_index, out.cost.astype(np.float64)) for out in outs]
    classes, exits, cost = (np.concatenate(part) for part in zip(*parts, strict=True))
    return classes, exits, cost


def _times(runners: dict[str, Runner], x: np.ndarray) -> dict[str, list[float]]:
    return in_turns(
        {name: partial(_some_calls, runner, x) for name, runner in runners.items()}, torch.device("cpu"), rounds=9
    )


def _some_calls(runner: Runner, x: np.ndarray) -> None:
    for _ in range(max(1, BATCH // len(x))):
        runner.predict(x)
