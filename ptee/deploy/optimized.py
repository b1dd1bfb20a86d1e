"""`ptee.optimize`: an early-exit model whose forward pass runs in recorded pieces."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import PteeError, unknown
from ptee.deploy.buckets import Buckets, _Answering
from ptee.deploy.segments import segments
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.forward import ExitOutput, one_parameter
from ptee.model.images import wrong_size, wrong_type
from ptee.model.thresholds import Thresholds

AUTO, GRAPHS, COMPILE, EAGER = "auto", "graphs", "compile", "eager"
AHEAD = int(__import__('os').environ.get('AHEAD', 0))
MODES = (AUTO, GRAPHS, COMPILE, EAGER)


class OptimizedModel(nn.Module):
    """Answers as the early-exit model that it was made from, faster.

    It shares weights, thresholds and all other settings with that model: set them here or there. Thresholds change nothing that
    is recorded. After a change of `off`, `confidence` or `answers`, the next call records all pieces again.

    Attributes:
        model: the early-exit model.
    """

    def __init__(self, model: EarlyExitModel, max_batch: int, mode: str) -> None:
        super().__init__()
        self.model, self.max_batch, self.mode = model, max_batch, mode
        self._lock = threading.Lock()
        self._made: Buckets | None = None
        self._made_for: tuple[Any, ...] = ()
        self._example = _example(model)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @property
    def threshold(self) -> list[float]:
        """T of each exit, as `EarlyExitModel.threshold`."""
        return self.model.threshold

    @threshold.setter
    def threshold(self, value: Thresholds) -> None:
        self.model.threshold = value

    @property
    def off(self) -> tuple[int, ...]:
        """The exits that are off, as `EarlyExitModel.off`."""
        return self.model.off

    @off.setter
    def off(self, value: Sequence[int]) -> None:
        self.model.off = value

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, K) of images (b, c, h, w), each row's from the exit at which it left."""
        return self.predict(x).logits

    @torch.compiler.disable
    @torch.no_grad()
    def predict(self, x: Tensor, threshold: Thresholds | None = None) -> ExitOutput:
        """As `EarlyExitModel.predict`."""
        rows = len(x)
        if not self._fits(x) or not rows:
            return self._refused(x, threshold)
        thresholds = self.model._in_force(threshold, rows)
        with self._lock:
            run = self._buckets()
            if rows <= self.max_batch:
                return run(x, thresholds)
            parts = [
                run(part, [t if isinstance(t, float) or not t.dim() else t[i : i + self.max_batch] for t in thresholds])
                for i, part in zip(range(0, rows, self.max_batch), x.split(self.max_batch), strict=True)
            ]
        return ExitOutput(*map(torch.cat, zip(*parts, strict=True)))

    def _fits(self, x: Any) -> bool:
        like = self._example
        return isinstance(x, Tensor) and x.shape[1:] == like.shape[1:] and x.dtype == like.dtype and x.device == like.device

    def _refused(self, x: Tensor, threshold: Thresholds | None) -> ExitOutput:
        """No rows are answered by the model itself. Images that it would take and the pieces do not are refused."""
        self.model._ready_for(x)
        if not len(x) and x.shape[1:] == self._example.shape[1:]:
            return self.model.predict(x, threshold)
        if x.dtype != self._example.dtype:
            raise wrong_type(x, self._example.dtype, "the pieces were made for one number type")
        raise wrong_size(x, self.model.plan.input_size, "the pieces were made for one size of images")

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Record the pieces for batches of these sizes now, not when they are first seen."""
        with self._lock:
            for size in sizes:
                self._buckets().bucket_for(min(size, self.max_batch))

    def _buckets(self) -> Buckets:
        model = self.model
        now = (model.plan, model.answers, model.blend, model.calibrated)
        if self._made is None or any(a is not b for a, b in zip(now, self._made_for, strict=True)):
            self._made, self._made_for = None, now
            pieces = segments(model, keep_logits=_Answering(model).reads_earlier, ahead=AHEAD)
            run = [_compiled(p.module) if self.mode == COMPILE else p.module for p in pieces]
            if self.mode == COMPILE:
                pieces = [replace(p, ahead=p.ahead and _compiled(p.ahead)) for p in pieces]
            self._made = Buckets(model, pieces, run, self.max_batch, self._example)
        return self._made


def _compiled(module: nn.Module) -> Any:
    import torch._dynamo

    made = torch.compile(module, dynamic=False)

    def call(*tensors: Tensor) -> Any:
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096):
            return made(*tensors)

    return call


def _example(model: EarlyExitModel) -> Tensor:
    like = one_parameter(model.backbone)
    x = torch.zeros(1, *model.plan.input_size, device=like.device, dtype=like.dtype)
    last = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in model.backbone.parameters()
    )
    return x.contiguous(memory_format=torch.channels_last) if last else x


def optimize(
    model: EarlyExitModel, *, max_batch: int = 256, mode: str = AUTO, dtype: torch.dtype | None = None
) -> OptimizedModel:
    """Make a model faster that is trained and tuned.

    Args:
        model: in eval mode, on its device.
        max_batch: larger batches are answered in parts.
        mode: "graphs": each piece of the forward pass is a CUDA graph for each size of batches. "compile": the pieces go through
            torch.compile first. "eager": pieces without either, on any device. "auto": "graphs" on an NVIDIA GPU, else "eager".
        dtype: of weights and images, such as torch.float16; a copy of the model gets it. None: as they are.

    Raises:
        PteeError: if the model cannot be taken apart.
    """
    require_early_exit(model)
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    kind = one_parameter(model.backbone).device.type
    if mode == AUTO:
        mode = GRAPHS if kind == "cuda" else EAGER
    if mode == GRAPHS and kind != "cuda":
        raise PteeError(f"CUDA graphs need an NVIDIA GPU, and this model is on {kind}. Give mode='compile' or 'eager'.")
    made = OptimizedModel(model, max_batch, mode)
    made._buckets()
    return made
