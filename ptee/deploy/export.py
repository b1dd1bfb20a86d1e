"""`ptee export`: the pieces of a model as files that need no Python code of the network."""

from __future__ import annotations

import importlib.util
import io
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ptee._common.errors import Argument, PteeError, RunError, first_line, unknown
from ptee._common.files import file_hash
from ptee._common.process import no_logs, no_stderr, no_stdout, no_warnings, own_export
from ptee._common.progress import with_bar
from ptee._common.text import number_of, shown, type_name
from ptee._common.validation import checked, is_name
from ptee._common.writing import (
    cannot_write,
    fill_place,
    free_place,
    is_left_over,
    link_or_copy,
    working_in,
    write_json,
    write_text,
)
from ptee.analysis.freezing import one_parameter
from ptee.backbones.library import per_channel, require_interpolation, require_pixels
from ptee.backbones.load import Backbone
from ptee.data.labels import classes_of_run
from ptee.deploy.capture import example_images
from ptee.deploy.check import check_segments
from ptee.deploy.manifest import LARGEST_MANIFEST, MANIFEST, MAX_ROWS, SCHEMA, fingerprint
from ptee.deploy.refusal import not_written
from ptee.deploy.runner import Runner, load_exported
from ptee.deploy.segments import Rows, Segment, segments
from ptee.exits.config import ALWAYS, NEVER
from ptee.exits.rule import ExitRule
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.images import require_eval
from ptee.model.saving import warn_of_changes

ONNX, PT2 = "onnx", "pt2"
FORMATS = (PT2, ONNX)
BATCHES = (1, 2, 7, 32)  # that are tried before anything is written
SAME = 1e-4  # share of the largest logit
EXAMPLE_ROWS = 5
FOR_EACH_EXIT = 7  # the batch that is answered once more for each exit
PIXELS_IN_CARD = """
`images` are prepared as for the backbone itself: their mean and std are not recorded, so `runner.images` takes no pictures.
"""
NEAR, FROM_THE_ENDS = 1e-6, 1e-5  # a confidence so near to a threshold may round to either side of it


class AnsweringPiece(nn.Module):
    """A piece that also says how sure its exit is. It gives (what is alive ..., logits (b, K), h (b,)); the last piece gives
    (the backbone's answer, the blended answer), twice the same where answers are not blended. All logits have one number type."""

    def __init__(self, piece: Segment, before: Segment | None, rule: ExitRule, dtype: torch.dtype) -> None:
        super().__init__()
        self.piece, self.dtype = piece.module, dtype
        self.exit, self.rule = piece.exit, rule
        self.earlier = before.earlier if before else {}

    def forward(self, *alive: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        earlier = {m: alive[i] for m, i in self.earlier.items()}
        if self.exit < 0:
            own = self.piece(*alive)
            everywhere = dict.fromkeys(range(self.rule.num_exits), 0.0)
            return own, self.rule.at_end(own, earlier, everywhere)
        behind, logits, sure = self.piece(*alive)
        answer, h = self.rule.at_exit(self.exit, logits, sure, earlier)
        return *behind, answer.to(self.dtype), h


@checked
def export(
    model: EarlyExitModel,
    folder: str | Path,
    *,
    format: str = PT2,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    interpolation: str | None = None,
    class_names: Sequence[str] = (),
) -> Path:
    """Write the pieces of a model, and all that is needed to run them, into a new folder.

    Args:
        model: trained and tuned, in eval mode. It stays as it is.
        folder: must not exist, or be empty.
        format: "pt2", programs of torch.export for torch alone, or "onnx", for ONNX Runtime.
        mean: of the pixels, in 0..1: a number for each channel, or one. With `std`, for a module of your own: by these, pictures are
            normalised as the module takes its images. None: the model's.
        std: by which the difference is divided. [1 / 255] gives pixels of 0 to 255.
        interpolation: by which pictures are resized, such as "bilinear". None: the model's.
        class_names: in the order of the logits. Empty: as the data of the run has them.

    Returns:
        The folder. `ptee.load_exported` runs it.

    Raises:
        PteeError: if the model cannot be taken apart, or what was written answers otherwise.
        RunError: if the folder cannot be written.
    """
    require_early_exit(model)
    require_eval(model)
    if format not in FORMATS:
        raise unknown("format", format, FORMATS, argument="format")
    require_libraries(format)
    origin = _prepared_by(model.origin, mean, std, interpolation)
    names = checked_names(class_names, model.num_classes) or class_names_of(model)
    like = one_parameter(model.backbone)
    if like.device.type != "cpu":
        raise PteeError(f"This model is on {like.device.type}, and files are made on the CPU. Call model.cpu() first.")
    warn_of_changes(model.origin)
    target = free_place(folder)
    # An autocast around the call is no part of the model.
    with torch.autocast("cpu", enabled=False), working_in(target) as made:
        pieces = segments(model, keep_logits=model.rule.reads_earlier)
        check_segments(model, pieces, BATCHES)
        _write(model, origin, pieces, made, format, names)
        _require_same(model, made)
        publish(made, target)
    return target


def _prepared_by(
    origin: Backbone,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    interpolation: str | None,
) -> Backbone:
    """What is written of the backbone, with what the user says of its pictures."""
    view = origin.input
    if interpolation is not None:
        require_interpolation(interpolation)
        view = replace(view, interpolation=interpolation)
    if mean is None and std is None:
        return replace(origin, input=view)
    if mean is None or std is None:
        raise PteeError("mean and std go together. Give both, or none.", argument="std" if std is None else "mean")
    channels = view.input_size[0]
    centre, width = per_channel("mean", mean, (), channels), per_channel("std", std, (), channels)
    require_pixels(centre, width)
    return replace(origin, input=replace(view, mean=centre, std=width), pixels_known=True)


def publish(made: Path, target: Path) -> None:
    """Put all files of a folder into a `free_place`, or none: another process may have written there meanwhile."""

    def hand_on(new: Path) -> None:
        for file in made.iterdir():
            if not is_left_over(file.name):
                link_or_copy(file, new / file.name)

    fill_place(target, hand_on)


def sign(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest of a folder, with the hash of each piece as it is now."""
    for entry in values["pieces"]:
        entry["sha256"] = file_hash(folder / entry["file"])
    write_json(folder / MANIFEST, values | {"fingerprint": fingerprint(values)})


def require_libraries(format: str) -> None:
    """Refuse to begin where a library is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if format == ONNX and missing:
        raise PteeError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}")


def _write(
    model: EarlyExitModel, origin: Backbone, pieces: Sequence[Segment], folder: Path, format: str, names: Sequence[str]
) -> None:
    alive: tuple[Tensor, ...] = (example_images(model, EXAMPLE_ROWS),)
    dtype = model.answer_type(alive[0])
    rows: Sequence[Rows] = (Rows(),)
    listed = []
    for n, piece in enumerate(with_bar(pieces, "Exporting pieces")):
        module = AnsweringPiece(piece, pieces[n - 1] if n else None, model.rule, dtype)
        file = folder / f"piece_{n}.{format}"
        program = _program(module, alive, rows)
        try:
            _save(program, file, format)
        except Exception as why:  # whatever the exporter raises
            if isinstance(why, OSError) and why.errno:
                raise cannot_write(folder.parent / file.name, str(why.strerror)) from why
            assert isinstance(piece.module, fx.GraphModule)
            raise not_written(model.plan.backbone, format, why, piece.module.graph.nodes) from why
        with torch.no_grad():
            given = module(*alive)
        alive, rows = given[:-2], piece.rows
        layout = [[where.axis, where.each] for where in piece.rows]
        listed.append({"file": file.name, "exit": piece.exit, "rows": layout})
    sign(folder, _manifest(model, origin, listed, format, names))
    write_text(folder / "README.md", _card(model, origin, format))


def _program(module: nn.Module, alive: tuple[Tensor, ...], rows: Sequence[Rows]) -> torch.export.ExportedProgram:
    count = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    shapes = tuple({where.axis: where.each * count if where.each > 1 else count} for where in rows)
    with own_export, no_logs, no_stderr, torch.no_grad():
        return torch.export.export(module.eval(), alive, dynamic_shapes=(shapes,), strict=False)


def _save(program: torch.export.ExportedProgram, file: Path, format: str) -> None:
    if format == PT2:
        program._example_inputs = None  # as large as the weights of a small network
        content = io.BytesIO()  # on a full disk torch's own writer ends the process
        torch.export.save(program, content)
        file.write_bytes(content.getbuffer())
        return
    with own_export, no_warnings, no_logs, no_stdout, no_stderr:
        made = torch.onnx.export(program, dynamo=True, verbose=False)
        assert made is not None
        made.save(str(file))


def _manifest(
    model: EarlyExitModel, origin: Backbone, pieces: list[dict[str, Any]], format: str, names: Sequence[str]
) -> dict[str, Any]:
    images = origin.input
    return {
        "schema_version": SCHEMA,
        "format": format,
        "backbone": model.plan.backbone,
        "input_size": list(model.plan.input_size),
        "dtype": type_name(example_images(model, 1).dtype),
        "mean": list(images.mean),
        "std": list(images.std),
        "interpolation": images.interpolation,
        "classes": model.num_classes,
        "class_names": list(names),
        "exits": [e.name for e in model.exits],
        "costs": list(model.costs),
        "thresholds": [min(max(t, -1.0), 2.0) if math.isinf(t) else t for t in model.threshold],
        "confidence": model.confidence,
        "off": list(model.off),
        "answers": model.answers,
        "pieces": pieces,
        "versions": {"torch": str(torch.__version__)},
        **({} if origin.pixels_known else {"pixels_known": False}),
    }


def checked_names(names: Sequence[str], classes: int) -> list[str]:
    """Names of classes that a user gives. Refuses another number of them, and such as no file may have."""
    if names and len(names) != classes:
        text = f"{number_of(len(names), 'name')} for {classes:,} classes. Give one for each class."
        raise PteeError(text, argument="class_names", value=names)
    if odd := next((name for name in names if not is_name(name)), None):
        text = f"{shown(odd)} is no name of a class: it is one short line of text."
        raise PteeError(text, argument="class_names", value=names)
    return list(names)


def class_names_of(model: EarlyExitModel) -> list[str]:
    """The names of the classes as the run's data has them; empty if it does not say, or they are too long or odd for a manifest."""
    names = classes_of_run(model.results, model.num_classes)
    return names if len(str(names)) <= LARGEST_MANIFEST // 4 and all(map(is_name, names)) else []


def _require_same(model: EarlyExitModel, folder: Path) -> None:
    """Refuse files that answer otherwise than the model: where all rows leave at one exit or at none, and where some leave at each."""
    runner, exits = _loaded(model, folder), len(model.exits)
    for b in BATCHES:
        x = example_images(model, b)
        with torch.no_grad():
            h = model.blended(model.all_exits(x.clone())).confidence[:-1].double()
        between = _between(h)
        all_rows = torch.ones(b, dtype=torch.bool, device="cpu")
        ways = [(between, ((h - between[:, None]).abs() > NEAR).all(0))]
        if b == FOR_EACH_EXIT:
            each = torch.full((exits + 1, exits), NEVER, dtype=torch.float64, device="cpu").fill_diagonal_(ALWAYS)
            ways += [(limits, all_rows) for limits in each]
        if not all(_answers_alike(model, runner, x, *way) for way in ways):
            instead = "Use another format" if x.dtype == torch.float32 else "Call model.float() first"
            raise PteeError(
                f"{model.plan.backbone} as {runner.manifest.format} gives other answers than the model to a batch of {b}. {instead}."
            )


def _loaded(model: EarlyExitModel, folder: Path) -> Runner:
    """The files that were written. ONNX Runtime lacks operators of some number types, and says so with the place of a file."""
    try:
        return load_exported(folder)
    except RunError as why:
        cause, dtype = why.__cause__ or why, example_images(model, 1).dtype
        said = first_line(cause).replace(f"{folder}{os.sep}", "")
        instead = "Use" if dtype == torch.float32 else "Call model.float() first, or use"
        raise PteeError(
            f"What was written of {model.plan.backbone} in {type_name(dtype)} cannot be run: {said} "
            f"{instead} another ", Argument("format"), ".", argument="format",
        ) from why  # fmt: skip


def _answers_alike(model: EarlyExitModel, runner: Runner, x: Tensor, limits: Tensor, clear: Tensor) -> bool:
    """Whether those of the rows that are clear leave at the same exits, with the same logits, by thresholds (E,)."""
    with torch.no_grad():
        want = model.predict(x.clone(), limits.tolist())
    given = x.clone()  # a network may write into its images
    got = runner.predict(given.numpy() if runner.manifest.format == ONNX else given, limits)
    exits, logits = (torch.as_tensor(t, device="cpu") for t in (got.exit_index, got.logits))
    off, allowed = (logits - want.logits)[clear].abs(), SAME * max(want.logits.abs().max().item(), 1)
    return torch.equal(exits[clear], want.exit_index[clear]) and (not len(off) or off.max().item() <= allowed)


def _between(h: Tensor) -> Tensor:
    """(E,) For each exit a threshold between the confidences of two rows; away from 0 and 1, where runtimes round otherwise.

    Args:
        h: (E, b).
    """
    ordered, k = h.sort(dim=1).values, h.shape[1] // 2
    middle = (ordered[:, k] + ordered[:, max(0, k - 1)]) / 2 if h.shape[1] > 1 else ordered[:, 0] / 2
    return middle.clamp(FROM_THE_ENDS, 1 - FROM_THE_ENDS)


def _card(model: EarlyExitModel, origin: Backbone, format: str) -> str:
    needs = "torch" if format == PT2 else "onnxruntime and numpy"
    return f"""# {model.plan.backbone} with early exits, exported as {format}

{number_of(len(model.exits), "exit")}, {model.num_classes} classes. Made by ptee. It needs {needs}.

```python
import ptee

runner = ptee.load_exported(".")
out = runner.predict(images)     # .logits .exit_index .confidence .cost
runner.threshold = 0.7
```
{"" if origin.pixels_known else PIXELS_IN_CARD}"""
