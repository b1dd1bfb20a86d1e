"""Multiply-accumulates spent when each module's output is ready, counted with fvcore.

fvcore traces one forward pass and adds up its operators module by module. ptee needs them in order of execution: an
exit behind a module has paid for everything that ran before that module's output, wherever it ran. The trace keeps
that order, so the count listens to fvcore while it walks along.

What fvcore gets wrong alone is put right here: it has no handler for scaled_dot_product_attention nor for convolutions
with padding="same", cannot see into the fused paths of nn.MultiheadAttention and nn.TransformerEncoderLayer, runs the
model in the mode it finds, and leaves its hooks on when the forward pass raises. It counts a multiplication with its
addition as one, but not in batch norm, whose scale and shift it counts as two; here they are one as everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptee._common.errors import BackboneError
from ptee._common.process import alone, no_checkpointing, no_fused_attention, no_warnings

# Convolutions and matrix products: what makes a layer a layer. Normalisation, activation and pooling belong to it.
PRODUCTS = frozenset({
    "aten::_convolution", "aten::_convolution_mode", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::matmul",
    "aten::einsum", "aten::scaled_dot_product_attention",
})  # fmt: skip

LARGE = 10**8  # parameters above which a network is counted without being computed where that can be


@dataclass(frozen=True)
class Counts:
    """Multiply-accumulates of one forward pass of one sample.

    Modules are named as in `named_modules()`; those that were never called are absent.

    Attributes:
        total: of the whole pass.
        until: executed when the module has given its output (of its last call, if it is called again).
        inside: executed inside the module.
        products_until: number of convolutions and matrix products executed when the module has given its output.
        products: number of convolutions and matrix products executed inside the module.
    """

    total: int
    until: dict[str, int]
    inside: dict[str, int]
    products_until: dict[str, int]
    products: dict[str, int]


@dataclass(frozen=True)
class _Step:
    """One operator of the traced pass: in which modules it ran, what it costs."""

    modules: frozenset[str]
    macs: int
    product: bool


@torch.inference_mode(False)
def count(module: nn.Module, example: Tensor, products_only: bool = False) -> Counts:
    """Count what one forward pass of `module` costs, and how much of it has run at each module's output.

    The module is left as it was: mode, buffers and hooks.

    Args:
        module: anything with forward(x). Counted in eval mode.
        example: (1, ...) one sample on the module's device; counts grow with the batch.
        products_only: leave out all but convolutions and matrix products, as torch's own FlopCounterMode does.
    """
    with alone(), _left_as_it_was(module), torch.no_grad(), no_fused_attention, no_checkpointing:
        steps = _steps_of(module.eval(), example)
    if products_only:
        steps = [step if step.product else replace(step, macs=0) for step in steps]
    macs = list(accumulate((s.macs for s in steps), initial=0))
    products = list(accumulate((s.product for s in steps), initial=0))
    last: dict[str, int] = {}
    inside: dict[str, int] = {}
    inner_products: dict[str, int] = {}
    for i, step in enumerate(steps, 1):
        for name in step.modules:
            last[name] = i
            inside[name] = inside.get(name, 0) + step.macs
            inner_products[name] = inner_products.get(name, 0) + step.product
    return Counts(
        total=macs[-1],
        until={name: macs[i] for name, i in last.items()},
        inside=inside,
        products_until={name: products[i] for name, i in last.items()},
        products=inner_products,
    )


def parameters(module: nn.Module) -> int:
    """Number of parameters, batch norm's weight and bias included."""
    return sum(p.numel() for p in module.parameters())


def _steps_of(module: nn.Module, example: Tensor) -> list[_Step]:
    if parameters(module) > LARGE:
        try:
            with _idle(module):
                return _steps(module, example)
        except Exception:  # a convolution that no trace would show, or what the network cannot do with zeros
            pass
    return _steps(module, example)


def _steps(module: nn.Module, example: Tensor) -> list[_Step]:
    with no_warnings:  # it scripts functions, which torch calls deprecated
        from fvcore.nn import FlopCountAnalysis  # imported late: it costs start-up time

    class InOrder(FlopCountAnalysis):
        """fvcore's count, which also notes every operator in order of execution."""

        def __init__(self) -> None:
            super().__init__(module, example)
            self.steps: list[_Step] = []
            extra = {
                "aten::scaled_dot_product_attention": _attention_macs,
                "aten::baddbmm": _baddbmm_macs,
                "aten::_convolution_mode": _convolution_macs,
                "aten::batch_norm": _batch_norm_macs,
            }
            for op, handle in (self._op_handles | extra).items():
                self.set_op_handle(op, self._noting(op, handle))

        def _noting(self, op: str, handle: Callable[..., Any]) -> Callable[..., Any]:
            def note(inputs: list[Any], outputs: list[Any]) -> Any:
                found = handle(inputs, outputs)
                macs = sum(found.values()) if isinstance(found, dict) else found
                self._note(outputs[0].node(), int(macs), op in PRODUCTS)
                return found

            return note

        def _note(self, node: Any, macs: int, product: bool) -> None:
            self.steps.append(_Step(frozenset(node.scopeName().split("/")), macs, product))

        def _should_ignore_node(self, node: Any) -> bool:
            # The free operators too: the output of a ReLU is ready after everything that ran before it.
            self._note(node, 0, False)
            return True

    analysis = InOrder().uncalled_modules_warnings(False).unsupported_ops_warnings(False).tracer_warnings("none")
    try:
        with no_warnings:  # which it would switch off itself, without a thought of other threads
            analysis.total()
    except RuntimeError as why:
        if "dynamo-optimized" not in str(why):
            raise
        raise BackboneError(
            f"{type(module).__name__} calls a function that torch.compile made, whose operators cannot be counted. Let it call "
            "the function itself, without torch.compile."
        ) from why
    return analysis.steps


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """q k^T and its product with v: q (..., l, d), k (..., s, d), v (..., s, e)."""
    *batch, length, depth = _shape(inputs[0])
    source, value_depth = _shape(inputs[2])[-2:]
    return prod(batch) * length * source * (depth + value_depth)


def _batch_norm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """In eval mode x * scale + shift, the statistics folded into both: one for each element."""
    return prod(_shape(inputs[0]))


def _convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """With padding="same", an operator of its own, which fvcore does not know. The weight has c / groups inputs."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _baddbmm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    batch, n, m = _shape(inputs[1])
    return batch * n * m * _shape(inputs[2])[-1]


class _UntracedError(Exception):
    """A convolution ran under a dispatch mode, where the trace does not record it."""


class _Idle(TorchDispatchMode):
    """Matrix products and attention give zeros of their shape: the trace has them, nobody works them out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, value = args[0], args[2]
            b, heads, length = query.shape[:-1]
            answer = query.new_zeros(b, length, heads, value.shape[-1]).transpose(1, 2)  # as it lies in memory there
            return answer, query.new_zeros(b, heads, length)
        if func is aten.convolution.default:
            raise _UntracedError
        return func(*args, **(kwargs or {}))


@contextmanager
def _idle(module: nn.Module) -> Iterator[None]:
    """Keeps the parts of a network that hold no convolution from computing their products."""
    parts = [m for m in _outermost(module) if "forward" not in vars(m)]

    def idle(part: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Idle():
                return type(part).forward(part, *args, **kwargs)

        return forward

    try:
        for part in parts:
            part.forward = idle(part)
        yield
    finally:
        for part in parts:
            vars(part).pop("forward", None)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts without a convolution; of a list its members, for nobody calls a list."""
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if not listed and not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Puts mode, buffers and hooks back, whatever happens inside."""
    modes = {m: m.training for m in module.modules()}
    hooks = {m: (dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in module.modules()}
    buffers = [
        (m, name, b, b._version, b.detach().clone())
        for m in module.modules()
        for name, b in m._buffers.items()
        if b is not None and not b.is_inference()
    ]
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
        for m, (before, after) in hooks.items():
            for now, then in ((m._forward_pre_hooks, before), (m._forward_hooks, after)):
                for key in set(now) - set(then):
                    del now[key]
        with torch.no_grad():
            for m, name, buffer, version, value in buffers:
                m._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)
