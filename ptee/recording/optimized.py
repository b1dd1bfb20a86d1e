"""`ptee.optimize`: an early-exit model whose forward pass runs in recorded pieces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.devices import without_autocast
from ptee._common.errors import Argument, PteeError, unknown
from ptee._common.process import Lock
from ptee._common.text import shown
from ptee._common.validation import checked, named, whole
from ptee.analysis.freezing import one_parameter
from ptee.deploy.capture import example_images
from ptee.deploy.check import check_segments
from ptee.deploy.manifest import MAX_ROWS
from ptee.deploy.segments import segments
from ptee.exits.config import NEVER, with_off
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.forward import ExitOutput
from ptee.model.images import is_plain, require_eval, wrong_size, wrong_type
from ptee.model.production import SLIPS
from ptee.model.settings import Thresholds
from ptee.recording.buckets import Buckets
from ptee.recording.budget import GIB
from ptee.recording.check import COMPILED, check_recorded, check_size
from ptee.recording.compiled import AUTO, COMPILE, EAGER, GRAPHS, compiled
from ptee.recording.exported_pieces import ExportedPieces
from ptee.recording.hooked_pieces import HookedPieces

MODES = (AUTO, GRAPHS, COMPILE, EAGER)
MADE_WITH = ("max_batch", "mode")
SETTINGS = ("blend", "calibrated", "results", "curve")  # of a model, beside its properties
_training, _version = attrgetter("training"), attrgetter("_version")
AHEAD = 1  # products that a GPU goes on with while the host reads how many rows stay; with 0 it waits, with 3 it does too much


class OptimizedModel(nn.Module):
    """Answers as the early-exit model that it was made from, faster. Made by `optimize`.

    It shares weights, thresholds and all other settings with that model: set them here or there. Thresholds change nothing that
    was recorded. After a change of `off`, `confidence`, `answers`, a weight or a module, the next call takes the model apart again.
    Other changes are not seen, such as what is written through a weight's `.data`, a number that a module keeps, a tensor that is
    no buffer, or a hook: call `optimize` again after them.

    One call runs at a time; other threads wait. Autocast has no effect: give `optimize` a number type.

    Attributes:
        model: the early-exit model.
        max_batch: larger batches are answered in parts.
        mode: "graphs", "compile" or "eager".
    """

    def __init__(self, model: EarlyExitModel, max_batch: int, mode: str, limit: int | None = None) -> None:
        super().__init__()
        self.model, self.max_batch, self.mode, self._limit = model, max_batch, mode, limit
        self._example = example_images(model, 1)
        self._lock = Lock()
        # the pieces without heads, if they are timed
        self._bare: dict[int, tuple[Buckets, list[Callable[[], None]]]] = {}
        with _as_recorded(self._example):
            self._take_apart()
        self.eval()

    def __getstate__(self) -> Any:
        text = "An optimized model cannot be copied or pickled. Copy its .model, and call ptee.optimize on the copy."
        raise PteeError(text)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> OptimizedModel:
        """What `to`, `half` and `cuda` call."""
        raise PteeError(
            "An optimized model cannot be moved. Move the early-exit model, and call ptee.optimize on it again."
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are the model's."""
        if name in MADE_WITH and name in vars(self):
            raise PteeError(
                f"{name} is what ptee.optimize was called with. Call it again: ptee.optimize(fast.model, {name}={value!r:.100})."
            )
        if isinstance(getattr(EarlyExitModel, name, None), property) or name in (*SETTINGS, *SLIPS):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, K) of images (b, c, h, w), each row's from the exit at which it left."""
        return self.predict(x).logits

    @torch.compiler.disable
    @named
    def predict(self, x: Tensor, threshold: Thresholds | None = None) -> ExitOutput:
        """Answer each row at the first exit that is confident enough; only the other rows go on.

        Args:
            x: (b, c, h, w) images of the size that the model was planned for, on its device and of its number type.
            threshold: for this call; anything that broadcasts to (b, E). None: `self.threshold`.

        Raises:
            PteeError: for other images, or a threshold that is NaN or of another shape.
        """
        if not self._fits(x):
            return self._without_pieces(x, threshold)  # which watches an empty batch itself
        seen = self.model.watching(x, audited=threshold is None, at_once=self.max_batch)
        out = self._predict(x, threshold, None)
        with without_autocast(x.device.type):  # as in the pieces, so that an audit is in the same number type
            return seen(out)

    def laps(self, x: Tensor, mark: Callable[[], None]) -> None:
        """`predict` of a batch up to the largest while nobody leaves. `mark` is called before, behind each piece, and at the end.

        The first two and the last two marks enclose what a call does beside its pieces.
        """
        if not self._fits(x):
            self._without_pieces(x, NEVER)
            return
        mark()
        self._predict(x[: self.max_batch], NEVER, mark)
        mark()

    def laps_without_heads(self, x: Tensor, mark: Callable[[], None]) -> None:
        """The pieces for a batch of this size without their heads. `mark` is called before the first and behind each."""
        with self._lock, _as_recorded(x):
            self._keep_up()
            made_for, replays = self._bare.get(len(x), (None, []))
            if made_for is not self._buckets:
                replays = self._buckets.replays_without_heads(len(x))
                self._bare[len(x)] = self._buckets, replays
            mark()
            for replay in replays:
                replay()
                mark()

    def _predict(self, x: Tensor, threshold: Thresholds | None, mark: Callable[[], None] | None) -> ExitOutput:
        rows = x.shape[0]
        with self._lock, _as_recorded(x):
            while True:
                with self.model.choosing:
                    settings, given = self._settings(), self.model.thresholds_of_call(threshold, rows)
                # The head of an exit that is off runs where a later one reads its answer.
                thresholds = with_off(given, settings[0].off)
                parts = [self._up_to_date(x[i : i + self.max_batch], _part(thresholds, i, self.max_batch), mark)
                         for i in range(0, rows, self.max_batch)]  # fmt: skip
                if self._is_made_for(settings):  # else another thread has chosen others meanwhile
                    return parts[0] if len(parts) == 1 else ExitOutput(*map(torch.cat, zip(*parts, strict=True)))

    def _up_to_date(
        self, x: Tensor, thresholds: Sequence[float | Tensor], mark: Callable[[], None] | None = None
    ) -> ExitOutput:
        """The answers of the model as it is now.

        To look at each module and weight takes the host longer than to start a piece. So it looks while the first piece runs, whose
        old weights are still there. If something changed, all is done again.
        """
        if self._buckets.has_recorded(x.shape[0]) and self._is_made_for(self._settings()):
            try:
                return self._buckets(x, thresholds, mark, self._require_unchanged)
            except Exception:
                if self._made_of.unchanged():
                    raise
        require_eval(self.model)
        self._keep_up()
        return self._buckets(x, thresholds, mark)

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Record the pieces for batches of these sizes now, not when they are first seen."""
        sizes = self._checked_sizes(list(sizes) if isinstance(sizes, Iterable) else [sizes])
        with self._lock, _as_recorded(self._example):
            self._keep_up()
            for size in sizes:
                self._buckets.bucket_for(size)

    def memory_for(self, rows: int) -> int:
        """About how many bytes of the GPU recording batches of this size takes; 0 on a CPU, where nothing is recorded."""
        (rows,) = self._checked_sizes([rows])
        with self._lock, _as_recorded(self._example):
            self._keep_up()
            return self._buckets.memory_for(rows)

    def _checked_sizes(self, sizes: Sequence[int]) -> list[int]:
        numbers = [whole(n) or 0 for n in sizes]
        if wrong := [n for n, size in zip(sizes, numbers, strict=True) if not 1 <= size <= self.max_batch]:
            raise PteeError(
                f"Batches have 1 to {self.max_batch} images (max_batch), and {wrong[0]!r} is none of these sizes."
            )
        return numbers

    def _fits(self, x: Any) -> bool:
        like = self._example
        fits = is_plain(x) and x.shape[1:] == like.shape[1:] and x.dtype == like.dtype and x.device == like.device
        return fits and x.shape[0] > 0 and not self.model.detached

    def _without_pieces(self, x: Tensor, threshold: Thresholds | None) -> ExitOutput:
        """An empty batch is answered by the model. All else is refused, also what the model would take."""
        self.model.require_ready(x)
        if x.dtype != self._example.dtype:
            raise wrong_type(x, self._example.dtype, "the pieces were made for this type")
        if x.shape[1:] != self._example.shape[1:]:
            raise wrong_size(x, self.model.plan.input_size, "the pieces were made for this size")
        return self.model.predict(x, threshold)

    def _settings(self) -> tuple[Any, ...]:
        """All that is part of a recording."""
        model = self.model
        return model.plan, model.answers, model.blend, model.calibrated

    def _keep_up(self) -> None:
        """Take the model apart again if its settings, weights or modules are others by now."""
        if not (self._is_made_for(self._settings()) and self._made_of.unchanged()):
            now = example_images(self.model, 1)
            if (now.dtype, now.device) != (self._example.dtype, self._example.device):
                raise PteeError("The model was moved after ptee.optimize. Call it again.")
            self._bare.clear()
            self._take_apart()

    def _take_apart(self) -> None:
        settings = self._settings()  # asked first: another thread may choose others meanwhile
        self._buckets, self._made_for, self._made_of = self._made(), settings, _Contents(self.model)

    def _is_made_for(self, settings: tuple[Any, ...]) -> bool:
        return all(map(is_, settings, self._made_for))

    def _require_unchanged(self) -> None:
        if self._made_of.training():
            require_eval(self.model)
        if not self._made_of.unchanged():
            raise PteeError("Weights or modules changed after they were recorded.")  # which the caller mends

    @property
    def _on_gpu(self) -> bool:
        return self._example.device.type == "cuda"

    def _made(self) -> Buckets:
        require_early_exit(self.model)  # its backbone may be in training mode by now
        try:
            pieces = segments(self.model, keep_logits=self.model.rule.reads_earlier, ahead=AHEAD if self._on_gpu else 0)
            check_segments(self.model, pieces)
        except PteeError as why:
            if self.mode == COMPILE or not self._on_gpu:
                raise
            return self._through_hooks(why)
        by = compiled if self.mode == COMPILE else None
        made = ExportedPieces(self.model, pieces, self.max_batch, self._example, by)
        made.budget.limit = self._limit
        if by or self._on_gpu:  # else pieces run as they were checked
            made.check = partial(check_size, allowed=COMPILED if by else 1.0)
        return made

    def _through_hooks(self, why: PteeError) -> Buckets:
        """Pieces for a model that cannot be captured, and why it cannot."""
        made = HookedPieces(self.model, self.max_batch, self._example)
        made.budget.limit = self._limit
        try:
            check_recorded(made)
        except PteeError as other:
            raise PteeError(f"{why} {other}") from other
        made.check = check_size
        return made


class _Contents:
    """The parameters, buffers and modules of a model as they are now, to see in each call whether they still are.

    The memory of the parameters and buffers is kept as long as this is: a recording may still read it. Each call looks at all of
    them, often hundreds, and `map` takes less time for that than a loop.
    """

    def __init__(self, model: EarlyExitModel) -> None:
        places: list[Any] = [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]
        held = [(d, name, value) for d in places for name, value in d.items()]
        self._dicts, self._names, self._values = zip(*held, strict=True)
        tensors = {value for value in self._values if isinstance(value, Tensor)}
        plain = (Tensor, nn.Parameter)  # others, such as quantised ones, may have no memory of their own
        self._placed = [t for t in tensors if type(t) in plain]
        self._pointers = self._pointers_now()
        self._memory = [t.detach() for t in self._placed]
        self._counted = [t for t in tensors if not t.is_inference()]  # these count what is written into them
        self._versions = self._versions_now()
        self._parts = [model, *model.heads.modules()]

    def unchanged(self) -> bool:
        """Whether all are the same objects, were not moved, and were not written into."""
        return (
            all(map(is_, map(dict.get, self._dicts, self._names), self._values))
            and self._versions_now() == self._versions
            and self._pointers_now() == self._pointers
        )

    def training(self) -> bool:
        """Whether the model or a part of a head is in training mode."""
        return any(map(_training, self._parts))

    def _pointers_now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._placed))

    def _versions_now(self) -> list[int]:
        return list(map(_version, self._counted))


@contextmanager
def _as_recorded(like: Tensor) -> Iterator[None]:
    """Recordings know no autocast, their memory is written again outside of inference mode, and their GPU is the current one."""
    where = torch.cuda.device(like.device) if like.is_cuda else nullcontext()
    with where, torch.inference_mode(False), torch.no_grad(), without_autocast(like.device.type):
        yield


def _part(thresholds: Sequence[float | Tensor], first: int, rows: int) -> list[float | Tensor]:
    """The thresholds of some rows of a batch."""
    return [t if isinstance(t, float) or not t.dim() else t[first : first + rows] for t in thresholds]


@checked
def optimize(
    model: EarlyExitModel,
    *,
    max_batch: int = 256,
    mode: str = AUTO,
    dtype: torch.dtype | None = None,
    max_memory: float | None = None,
) -> OptimizedModel:
    """Make a trained and tuned model faster: its forward pass is taken apart at the exits, and each piece is recorded.

    Args:
        model: in eval mode, on its device.
        max_batch: larger batches are answered in parts.
        mode: "graphs": each piece is a CUDA graph for each size of batches; a model that torch.export cannot capture is recorded
            through its hooks. "compile": each piece goes through torch.compile, on a GPU also into a CUDA graph; that takes a
            minute for each size of batches. "eager": pieces as they are, and on an NVIDIA GPU the same as "graphs". "auto":
            "graphs" on an NVIDIA GPU, else "eager".
        dtype: of weights and images, such as torch.float16. A copy of the model gets it. None: as they are.
        max_memory: GiB of the GPU that recordings may take, beside weights and images. Rows for which no smaller batch can be
            recorded any more go on in the larger one; a batch for which there is no room is refused. `memory_for` tells before
            how much a size takes. None: no limit.

    Raises:
        PteeError: if the model cannot be taken apart, or a mode is not possible here.
    """
    require_early_exit(model)
    require_eval(model)
    if mode not in MODES:
        raise unknown("mode", mode, MODES, argument="mode")
    if (most := whole(max_batch)) is None or not 1 <= most <= MAX_ROWS:
        text = f"A batch has 1 to {MAX_ROWS} images; max_batch={max_batch!r} is not possible."
        raise PteeError(text, argument="max_batch", value=max_batch)
    kind = one_parameter(model.backbone).device.type
    if mode == AUTO:
        mode = GRAPHS if kind == "cuda" else EAGER
    if mode == GRAPHS and kind != "cuda":
        text = f"CUDA graphs need an NVIDIA GPU, and this model is on {kind}. Give mode='compile' or 'eager'."
        raise PteeError(text, argument="mode", value=mode)
    if kind == "cuda" and find_spec("triton") is None:  # it compiles the decision who leaves
        raise PteeError("On a GPU ptee.optimize needs Triton: pip install triton (on Windows triton-windows).")
    if dtype is not None:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise PteeError(
                f"A number type is one such as torch.float16, not {shown(dtype)}.", argument="dtype", value=dtype
            )
        model = copy.deepcopy(model).to(dtype)
    if max_memory is not None and not (isinstance(max_memory, int | float) and 0 < max_memory < math.inf):
        text = " is no number of GiB above 0. Leave it out for no limit."
        raise PteeError(Argument("max_memory", shown(max_memory)), text, value=max_memory)
    return OptimizedModel(model, most, mode, None if max_memory is None else int(max_memory * GIB))
