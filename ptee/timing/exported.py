"""A model as `ptee export --format onnx` writes it, to be timed: the same pieces, heads and decisions, run by ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ptee._common.errors import Argument, PteeError
from ptee.analysis.freezing import one_parameter
from ptee.deploy.arrays import Array
from ptee.deploy.export import export, require_libraries
from ptee.deploy.runner import Answers, Runner, load_exported, onnx_piece
from ptee.exits.blend import OWN
from ptee.exits.config import NEVER
from ptee.model.early_exit import EarlyExitModel
from ptee.model.settings import Thresholds
from ptee.timing.laps import Mark


class OnnxModel:
    """An early-exit model that ONNX Runtime runs, in as many threads as torch has. Its files are gone when it is made.

    The model is on a CPU. It stays as it is, and its later settings have no effect here.
    """

    def __init__(self, model: EarlyExitModel) -> None:
        require_onnx(one_parameter(model.backbone).device.type)
        self.model = model
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            made = export(model, Path(folder) / "onnx", format="onnx")
            self.runner = load_exported(made, threads=threads)
            files = [made / piece.file for piece in self.runner.manifest.pieces[:-1]]
            self._without_heads = [onnx_piece(without_head(file), "cpu", threads) for file in files]

    def predict(self, x: Tensor, threshold: Thresholds | None = None) -> Answers:
        """As `EarlyExitModel.predict`, in arrays."""
        return self.runner.predict(x.numpy(), threshold)

    def laps(self, x: Tensor, mark: Mark) -> None:
        """As of `runner_laps`."""
        runner_laps(self.runner, x.numpy(), mark)

    def laps_without_heads(self, x: Tensor, mark: Mark) -> None:
        """The pieces without their heads. Marks: the beginning, and behind each."""
        alive: list[Array] = [x.numpy()]
        mark()
        for piece in [*self._without_heads, self.runner.pieces[-1]]:
            alive = list(piece(*alive))
            mark()


def require_onnx(where: str) -> None:
    """Refuse to time by ONNX Runtime on another device than the CPU, and without it."""
    if where != "cpu":
        raise PteeError(
            f"The executor onnx runs on a CPU here, and the model is on {where}. Give ",
            Argument.text("device", "cpu"),
            ".",
        )
    require_libraries("onnx")


def without_head(file: Path) -> Path:
    """A new file beside that of a piece: up to what is alive behind its cut. ONNX Runtime would run a head whose answer nobody wants."""
    from onnx import load
    from onnx.utils import extract_model

    graph, made = load(file, load_external_data=False).graph, file.with_suffix(".bare.onnx")
    stored = {value.name for value in graph.initializer}
    takes = [value.name for value in graph.input if value.name not in stored]
    extract_model(str(file), str(made), takes, [value.name for value in graph.output][:-2])
    return made


def runner_laps(runner: Runner, x: Array, mark: Mark) -> None:
    """`predict` while nobody leaves. Marks: the beginning, before the first piece, behind each piece, and the end."""

    def marked(piece: Callable[..., Sequence[Array]], *alive: Array) -> list[Array]:
        if piece is runner.pieces[0]:
            mark()
        found = list(piece(*alive))
        mark()
        return found

    mark()
    Runner(runner.manifest, [partial(marked, piece) for piece in runner.pieces], runner.device).predict(x, NEVER)
    mark()


def bare_onnx(model: EarlyExitModel) -> OnnxModel:
    """The bare backbone by the same means: one piece, as all exits are off."""
    view = copy.copy(model)
    view.answers, view.off = OWN, range(len(model.exits))
    return OnnxModel(view)
