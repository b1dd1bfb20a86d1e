"""Measures the pieces of a model: the backbone from one exit to the next, and each head with its decision.

One pass gives all of them. The clock is looked at before and behind each head (on an NVIDIA GPU by events, which the GPU notes
itself), while nobody leaves. All executors and numbers of rows are measured in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptee import __version__
from ptee._common.errors import Argument, PteeError
from ptee._common.text import type_name
from ptee.analysis.freezing import one_parameter, running_on, sparing
from ptee.backbones.load import Backbone
from ptee.deploy.capture import example_images
from ptee.exits.blend import OWN
from ptee.exits.config import ALWAYS, NEVER
from ptee.exits.front import Prepare
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.forward import ExitEarly, running
from ptee.model.images import require_eval
from ptee.recording.compiled import compiled
from ptee.recording.graphs import Graphs, Recorder
from ptee.recording.optimized import OptimizedModel, optimize
from ptee.timing.exported import OnnxModel, bare_onnx, require_onnx
from ptee.timing.laps import MAX_SECONDS, Call, Mark, in_turns
from ptee.timing.settings import COMPILE, GRAPHS, HOOKS, ONNX, checked_executors, checked_sizes
from ptee.timing.times import Measured, Times, between, device_name, sizes_to_measure, unit_of


class _Timed(ExitEarly):
    """A call in which nobody leaves, and which marks the times before and behind each head."""

    mark: Mark

    def _pass(self, n: int, output: Any) -> Any:
        self.mark()
        try:
            return super()._pass(n, output)
        finally:
            self.mark()


def hook_laps(model: EarlyExitModel, x: Tensor, mark: Mark, one_leaves: bool = False) -> None:
    """What `predict` does while nobody leaves; or while one row leaves at each exit, so that the others are moved.

    Marks: the beginning, the beginning of the backbone, before and behind each head, the end of the backbone, and the end.
    """
    mark()
    model.require_ready(x)
    exits = len(model.exits)
    thresholds: Any = [NEVER] * exits
    if one_leaves:
        thresholds = torch.full((len(x), exits), NEVER, dtype=torch.float64, device="cpu")
        thresholds[:exits].fill_diagonal_(ALWAYS)
    never = model.thresholds_of_call(thresholds, len(x))
    call = _Timed(model, len(x), never)
    call.mark = mark
    with running(call):
        mark()
        answer = call.forward(model.backbone, x)
        mark()
    call.result(answer)
    mark()


def measure(
    model: EarlyExitModel,
    batch_sizes: Sequence[int] = (1, 32),
    executors: Sequence[str] | None = None,
    *,
    rounds: int = 7,
    seconds: float = MAX_SECONDS,
) -> Times:
    """Measure the pieces of a model, with all exits on, where it is and in its number type.

    Args:
        model: in eval mode.
        batch_sizes: the largest of them says up to how many rows is measured.
        executors: "hooks" (`model.predict`), "eager", "graphs", "compile" (of `ptee.optimize`), "onnx" (as exported). None: hooks,
            and graphs on an NVIDIA GPU.
        rounds: how often each is measured.
        seconds: after that no further round begins, but three are measured in any case.

    Raises:
        PteeError: if an executor or a batch size is not possible.
    """
    require_early_exit(model)
    require_eval(model)
    device = one_parameter(model.backbone).device
    wanted = checked_executors(executors or (HOOKS,))
    for name in wanted:
        require_executor(name, device)
    rows = sizes_to_measure(checked_sizes(batch_sizes))
    view = all_on(model)
    images = {n: example_images(view, n) for n in rows}
    with sparing(view.backbone, images[rows[0]]):
        runs = {name: _run_of(name, view, rows[-1]) for name in wanted}
        if executors is None and device.type == "cuda":
            with suppress(PteeError):  # if the model cannot be taken apart
                runs[GRAPHS] = _run_of(GRAPHS, view, rows[-1])
        laps: dict[Any, Any] = {(name, n): run.laps(images[n]) for n in rows for name, run in runs.items()}
        found = in_turns(laps | {("", n): [_laps(view.backbone, images[n])] for n in rows}, device, rounds, seconds)
    like = one_parameter(view.backbone)
    return Times(
        device=device.type,
        device_name=device_name(device),
        threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        ptee_version=__version__,
        dtype=type_name(like.dtype),
        backbone=view.plan.backbone,
        exits=tuple(e.name for e in view.exits),
        heads=tuple(e.head for e in view.exits),
        rows=tuple(rows),
        eager=tuple(found["", n][0][0] for n in rows),
        executors=tuple(_measured(name, [runs[name].parts(found[name, n]) for n in rows]) for name in runs),
    )


def require_executor(name: str, device: torch.device) -> None:
    """Refuse an executor that cannot run on a device, before a training whose thresholds it is to choose."""
    if name == GRAPHS and device.type != "cuda":
        raise PteeError(
            f"CUDA graphs need an NVIDIA GPU, and this runs on {device.type}. Give ",
            Argument.text("executor", HOOKS),
            ".",
        )
    if name == ONNX:
        require_onnx(device.type)


def all_on(model: EarlyExitModel) -> EarlyExitModel:
    """The same model with all exits on and own answers; the one that was given stays as it is."""
    view = copy.copy(model)
    view.answers = OWN
    view.off = ()
    return view


def measure_static(network: Backbone, model: EarlyExitModel, device: torch.device, batch: int) -> BatchTimes:
    """The times of a smaller network as the first exit of a cascade, whose second part is the bare backbone of a model."""
    prepare, small = Prepare(model.origin.input, network.input).to(device), network.module
    rows, dtype = sizes_to_measure([batch]), one_parameter(small).dtype
    with running_on(device, model), running_on(device, small):
        images = {n: example_images(model, n) for n in rows}

        def cascade(x: Tensor) -> Tensor:
            return small(prepare(x).to(dtype))

        calls: dict[Any, Any] = {n: [_laps(model.backbone, x), _laps(cascade, x)] for n, x in images.items()}
        image = images[rows[0]]
        with sparing(model.backbone, image), sparing(small, prepare(image).to(dtype)):
            found = in_turns(calls, device, rounds=7, seconds=MAX_SECONDS)
    bare, head = (between(rows, [found[n][i][0] for n in rows], batch) for i in (0, 1))
    unit = unit_of(HOOKS, batch, device.type)
    return BatchTimes(torch.stack([torch.zeros_like(bare), bare]) / bare[-1], head[None] / bare[-1], 0.0, unit)


# ---------------------------------------------------------------------------------------------------- executors


class _Parts(NamedTuple):
    """Seconds of the bare backbone, of a call beside its pieces, of E+1 pieces of the backbone, of E heads and of E moves."""

    bare: float
    call: float
    segments: list[float]
    heads: list[float]
    moves: list[float]


class _Hooks:
    """The model as it is, and the bare backbone as it is."""

    def __init__(self, model: EarlyExitModel) -> None:
        self.model = model

    def laps(self, x: Tensor) -> list[Callable[[Mark], Any]]:
        return [
            _laps(self.model.backbone, x),
            partial(hook_laps, self.model, x),
            *([partial(hook_laps, self.model, x, one_leaves=True)] if self._moves(x) else []),
        ]

    def _moves(self, x: Tensor) -> bool:
        """Whether moving can be measured: there are rows enough, and no pass starts again."""
        return len(x) > 2 * len(self.model.exits) and not any(cut.steps for cut in self.model.plan.cuts)

    def parts(self, found: list[list[float]]) -> _Parts:
        (bare,), (before, *pieces, after), *leaving = found
        heads = pieces[1::2]
        moving = leaving[0][2::2] if leaving else heads
        moves = [max(m - h, 0.0) for m, h in zip(moving, heads, strict=False)]
        return _Parts(bare, before + after, pieces[0::2], heads, moves)


class _InPieces:
    """The model in pieces, and the bare backbone by the same means."""

    def __init__(self, model: EarlyExitModel, executor: str, most: int) -> None:
        self.fast = in_pieces(executor, model, most)
        self.bare = bare_by(executor, model)

    def laps(self, x: Tensor) -> list[Callable[[Mark], Any]]:
        if isinstance(self.fast, OptimizedModel):
            self.fast.warm_up([len(x)])
        return [
            partial(_whole_laps, self.bare(x)),
            partial(self.fast.laps, x),
            partial(self.fast.laps_without_heads, x),
        ]

    def parts(self, found: list[list[float]]) -> _Parts:
        (bare,), (before, *pieces, after), segments = found
        heads = [max(whole - own, 0.0) for whole, own in zip(pieces[:-1], segments[:-1], strict=True)]
        return _Parts(bare, before + after, segments, heads, [0.0] * len(heads))


def _run_of(name: str, model: EarlyExitModel, most: int) -> _Hooks | _InPieces:
    return _Hooks(model) if name == HOOKS else _InPieces(model, name, most)


def in_pieces(executor: str, model: EarlyExitModel, most: int) -> OptimizedModel | OnnxModel:
    """The model as an executor other than `hooks` runs it, in batches up to the largest."""
    return OnnxModel(model) if executor == ONNX else optimize(model, max_batch=most, mode=executor)


def bare_by(executor: str, model: EarlyExitModel) -> Callable[[Tensor], Call]:
    """For images, what runs the bare backbone by an executor: as it is, in one CUDA graph, as torch.compile makes it, or by ONNX Runtime."""
    if executor == ONNX:
        exported = bare_onnx(model)
        return lambda x: partial(exported.predict, x)
    if executor not in (GRAPHS, COMPILE):
        return lambda x: partial(model.backbone, x)
    bare = copy.deepcopy(model).detach()  # its hooks would be compiled, too
    if executor == COMPILE:
        return partial(by_compile, bare)
    graphs: list[Recorder] = []  # one, which all sizes share the memory of

    def recorded(x: Tensor) -> Call:
        with torch.cuda.device(x.device):
            graphs[:] = graphs or [Graphs()]
            return in_a_graph(bare, x, graphs[0])

    return recorded


def in_a_graph(backbone: nn.Module, x: Tensor, graphs: Recorder | None = None) -> Call:
    """The bare backbone in a CUDA graph of its own. It takes images and gives answers away."""
    static = x.clone(memory_format=torch.preserve_format)
    with torch.cuda.device(x.device), torch.no_grad():
        answer, replay = (graphs or Graphs()).record(partial(backbone, static))

    def call(read: nn.Module = backbone) -> Tensor:  # whose weights the graph reads, so they must stay
        static.copy_(x)
        replay()
        return answer.clone()

    return call


def by_compile(backbone: nn.Module, x: Tensor) -> Call:
    """The bare backbone as torch.compile makes it."""
    fast = compiled(backbone, "reduce-overhead" if x.is_cuda else None)
    return lambda: fast(x).clone()


# ---------------------------------------------------------------------------------------------------- calls with marks


def _laps(network: Callable[[Tensor], Any], x: Tensor) -> Callable[[Mark], None]:
    """A call with a mark before and one behind it."""
    return partial(_whole_laps, partial(network, x))


def _whole_laps(call: Call, mark: Mark) -> None:
    mark()
    call()
    mark()


def _measured(executor: str, parts: list[_Parts]) -> Measured:
    bare, call, *pieces = zip(*parts, strict=True)
    segments, heads, moves = (tuple(zip(*of_rows, strict=True)) for of_rows in pieces)
    return Measured(executor=executor, bare=bare, call=call, segments=segments, heads=heads, moves=moves)
