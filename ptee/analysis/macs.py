"""The multiply-accumulates that have run when each module's output is ready, counted with fvcore.

fvcore traces one forward pass and adds up the operators of each module. ptee needs them in order of execution: a row that
leaves after a module has paid for everything that ran before, in whatever module. The trace has the operators in that
order, so this count notes each operator when fvcore comes to it.

This count corrects fvcore in several points:
- It counts scaled_dot_product_attention, and convolutions with padding="same".
- It sees into nn.MultiheadAttention and nn.TransformerEncoderLayer, by switching off their fused paths.
- It counts in eval mode, and removes fvcore's hooks when the forward pass raises.
- It counts the scale and shift of batch norm as one multiply-accumulate. fvcore counts them as two.
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

# Convolutions and matrix products. Each makes a layer; normalisation, activation and pooling belong to the layer before.
PRODUCTS = frozenset({
    "aten::_convolution", "aten::_convolution_mode", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::matmul",
    "aten::einsum", "aten::scaled_dot_product_attention",
})  # fmt: skip

LARGE = 10**8  # parameters above which a network is counted without computing its matrix products, if possible


@dataclass(frozen=True)
class Counts:
    """Multiply-accumulates of one forward pass of one sample.

    Modules are named as in `named_modules()`. Modules that were never called are absent.

    Attributes:
        total: of the whole pass.
        until: those that have run when the module's output is ready (after its last call, if it is called several times).
        inside: those that run inside of the module.
        products_until: number of convolutions and matrix products that have run when the module's output is ready.
        products: number of convolutions and matrix products that run inside of the module.
    """

    total: int
    until: dict[str, int]
    inside: dict[str, int]
    products_until: dict[str, int]
    products: dict[str, int]


@dataclass(frozen=True)
class _Operator:
    """An operator of the traced pass: the modules in which it ran, its cost, and whether it is a matrix product."""

    modules: frozenset[str]
    macs: int
    product: bool


@torch.inference_mode(False)
def count(module: nn.Module, example: Tensor, products_only: bool = False) -> Counts:
    """Count what one forward pass costs, and how much of it has run when each module's output is ready.

    The module is left as it was: mode, buffers and hooks.

    Args:
        module: any module with forward(x). It is counted in eval mode.
        example: (1, ...) one sample, on the module's device. A larger batch would give larger counts.
        products_only: count only convolutions and matrix products, as torch's FlopCounterMode does.
    """
    with alone(), _left_as_it_was(module), torch.no_grad(), no_fused_attention, no_checkpointing:
        operators = _operators(module.eval(), example)
    if products_only:
        operators = [op if op.product else replace(op, macs=0) for op in operators]
    return _counts(operators)


def _counts(operators: list[_Operator]) -> Counts:
    macs = list(accumulate((op.macs for op in operators), initial=0))
    products = list(accumulate((op.product for op in operators), initial=0))
    last: dict[str, int] = {}
    inside: dict[str, int] = {}
    inner_products: dict[str, int] = {}
    for i, op in enumerate(operators, 1):
        for name in op.modules:
            last[name] = i
            inside[name] = inside.get(name, 0) + op.macs
            inner_products[name] = inner_products.get(name, 0) + op.product
    return Counts(
        total=macs[-1],
        until={name: macs[i] for name, i in last.items()},
        inside=inside,
        products_until={name: products[i] for name, i in last.items()},
        products=inner_products,
    )


def parameters(module: nn.Module) -> int:
    """The number of parameters, including weight and bias of batch norms."""
    return sum(p.numel() for p in module.parameters())


def _operators(module: nn.Module, example: Tensor) -> list[_Operator]:
    """The operators of one forward pass, in order of execution."""
    if parameters(module) > LARGE:
        try:
            with _without_products(module):
                return _traced(module, example)
        except Exception:  # there is a convolution that the trace would miss, or the network fails on zeros
            pass
    return _traced(module, example)


def _traced(module: nn.Module, example: Tensor) -> list[_Operator]:
    with no_warnings:  # it scripts functions, which torch says is deprecated
        from fvcore.nn import FlopCountAnalysis  # imported here, because it is slow to import

    class InOrder(FlopCountAnalysis):
        """fvcore's count, which also notes every operator in order of execution."""

        def __init__(self) -> None:
            super().__init__(module, example)
            self.operators: list[_Operator] = []
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
            self.operators.append(_Operator(frozenset(node.scopeName().split("/")), macs, product))

        def _should_ignore_node(self, node: Any) -> bool:
            # Operators that cost nothing are noted too: a ReLU's output is ready after everything that ran before it.
            self._note(node, 0, False)
            return True

    analysis = InOrder().uncalled_modules_warnings(False).unsupported_ops_warnings(False).tracer_warnings("none")
    try:
        with no_warnings:  # fvcore would switch them off itself, but for other threads too
            analysis.total()
    except RuntimeError as why:
        if "dynamo-optimized" not in str(why):
            raise
        raise BackboneError(
            f"{type(module).__name__} calls a function that torch.compile made, and its operators cannot be counted. Let it "
            "call the function itself, without torch.compile."
        ) from why
    return analysis.operators


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """q k^T and its product with v: q (..., l, d), k (..., s, d), v (..., s, e)."""
    *batch, length, depth = _shape(inputs[0])
    source, value_depth = _shape(inputs[2])[-2:]
    return prod(batch) * length * source * (depth + value_depth)


def _batch_norm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """In eval mode it is x * scale + shift, with the statistics folded into both: one for each element."""
    return prod(_shape(inputs[0]))


def _convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """A convolution with padding="same", an operator that fvcore does not know. The weight has c / groups inputs."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _baddbmm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    batch, n, m = _shape(inputs[1])
    return batch * n * m * _shape(inputs[2])[-1]


class _UntracedError(Exception):
    """A convolution ran inside of a dispatch mode, where the trace does not record it."""


class _ZeroProducts(TorchDispatchMode):
    """Matrix products and attention return zeros of the right shape: the trace records them, but they are not computed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            query, value = args[0], args[2]
            b, heads, length = query.shape[:-1]
            answer = query.new_zeros(b, length, heads, value.shape[-1]).transpose(
                1, 2
            )  # the operator's order in memory
            return answer, query.new_zeros(b, heads, length)
        if func is aten.convolution.default:
            raise _UntracedError
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_products(module: nn.Module) -> Iterator[None]:
    """Inside, the parts of a network that contain no convolution do not compute their matrix products."""
    parts = [m for m in _outermost(module) if "forward" not in vars(m)]

    def with_zeros(part: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with _ZeroProducts():
                return type(part).forward(part, *args, **kwargs)

        return forward

    try:
        for part in parts:
            part.forward = with_zeros(part)
        yield
    finally:
        for part in parts:
            vars(part).pop("forward", None)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts without a convolution. Of a list these are its members, because a list itself is never called."""
    listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if not listed and not any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()):
        yield module
    else:
        for child in module.children():
            yield from _outermost(child)


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Restores modes, buffers and hooks at the end, also after an error."""
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
