"""The forward pass of an early-exit model as one graph, with a mark at each cut and a number of rows that stays open."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ptee._common.errors import PteeError
from ptee._common.process import no_logs, no_stderr, own_export
from ptee.analysis.cut_points import Cut, random_images
from ptee.deploy.manifest import MAX_ROWS
from ptee.deploy.refusal import not_captured
from ptee.exits.front import FrontHead
from ptee.exits.heads import HeadOutput
from ptee.exits.placement import INPUT
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import RecordAll, running

EXAMPLE_ROWS = 3
T = TypeVar("T")


@torch.library.custom_op("ptee::cut", mutates_args=())
def _mark(x: Tensor, exit: int) -> Tensor:
    """Marks a cut in a captured graph. It never runs: the graph is taken apart there."""
    return x.clone()


@_mark.register_fake
def _(x: Tensor, exit: int) -> Tensor:
    return torch.empty_like(x)


class _Marking(RecordAll):
    """All heads run that would run in `predict`, and a mark is left at each cut."""

    def __init__(self, passes: _Passes, batch: int) -> None:
        super().__init__(passes, batch)
        self.skipped = passes.skipped

    def forward(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """The backbone's answer. The exit at the input, if there is one, marks the images."""
        if self.plan.exits[0].name == INPUT and (marked := self._pass(0, images)) is not None:
            images = marked
        return self._run_backbone(backbone, images)

    def on_head_output(self, n: int, cut: Cut, output: Any, said: HeadOutput, earlier: Mapping[int, Tensor]) -> Any:
        """Keep the head's answer, and mark the place."""
        self.outputs.append(said)  # and ask nothing of its size: the captured graph would have that size alone
        return tree_map_only(Tensor, lambda t: _mark(t, n), output)


class _OtherModulesRunError(PteeError):
    """Not all exits were reached: a copy's code may hold the modules that were copied, as a function put in place of forward does."""


class _Passes(nn.Module):
    """What is captured: images -> (the backbone's answer, each exit's answer)."""

    def __init__(self, model: EarlyExitModel) -> None:
        super().__init__()
        self.backbone, self.heads = model.backbone, model.heads
        self.exit_hooks, self.plan = model.exit_hooks, model.plan
        self.skipped = model.plan.skipped  # computed here: nothing of it belongs into the graph

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """See `captured`."""
        call = _Marking(self, x.shape[0])  # len(x) would fix the number of rows
        with running(call):
            answer = call.forward(self.backbone, x)
        if call.passed < len(self.plan.exits):
            raise _OtherModulesRunError("The backbone takes another way than the one the exits were planned for.")
        return answer, [(said.logits, said.confidence_logit) for said in call.outputs]


def _beside(model: EarlyExitModel) -> _Passes:
    """What is captured, with modules of its own: torch.export puts others' tensors into modules, and threads may be running these.

    It shares the weights, and what cannot be copied, such as a lock. A model whose own code forbids copies, or holds the modules that
    it runs in another way, is captured as it is.
    """
    passes = _Passes(model)
    shared = [*passes.parameters(), *passes.buffers(), passes.plan]
    shared += [head._hold for head in model.heads if isinstance(head, FrontHead)]  # it would release what it never held
    copied = _copy(passes, shared) or _copy(passes, [*shared, *_not_copied(passes, shared)])
    return passes if copied is None else copied


def _not_copied(module: nn.Module, shared: Sequence[Any]) -> list[Any]:
    """What modules keep in attributes and cannot be copied: locks, open files, tensors of a graph of autograd."""
    shared = [*shared, *module.modules()]
    kept = [value for part in module.modules() for value in vars(part).values()]
    return [value for value in kept if value is not None and _copy(value, shared) is None]


def _copy(value: T, shared: Sequence[Any]) -> T | None:
    try:
        return copy.deepcopy(value, {id(one): one for one in shared})
    except Exception:  # whatever its code raises
        return None


def example_images(model: EarlyExitModel, rows: int) -> Tensor:
    """Noise (rows, c, h, w) for a model, in the memory format of its weights."""
    x = random_images(model.backbone, rows, model.plan.input_size)
    maps = [p for p in model.backbone.parameters() if p.dim() == 4 and not p.is_contiguous()]
    last = any(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def captured(model: EarlyExitModel) -> fx.GraphModule:
    """The graph: images (b, c, h, w) -> (the backbone's answer (b, K), (logits, confidence logit) of each exit whose head runs)."""
    try:
        return _captured(_beside(model), model)
    except _OtherModulesRunError:
        return _captured(_Passes(model), model)


def _captured(passes: _Passes, model: EarlyExitModel) -> fx.GraphModule:
    x = example_images(model, EXAMPLE_ROWS)
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    try:
        with own_export, no_logs, no_stderr, torch.no_grad():
            # a network may keep what it computes at first: it does so here, as the tensors of torch.export hold no numbers
            passes(x.clone())
            program = torch.export.export(passes, (x,), dynamic_shapes=({0: rows},), strict=False)
    except PteeError:
        raise
    except Exception as why:  # whatever the backbone's code and torch.export raise
        raise not_captured(model.plan.backbone, why) from why
    return program.module()
