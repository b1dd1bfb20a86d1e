"""The multiply-accumulates that have run when each module's output is ready, counted with fvcore.

fvcore traces one forward pass and adds up the operators of each module. ptee needs them in order of execution: a row that
leaves after a module has paid for everything that ran before, in whatever module. The trace has the operators in that
order, so this count notes each operator when fvcore comes to it.

This count corrects fvcore in several points:
- It counts scaled_dot_product_attention, recurrent layers, convolutions with padding="same" and the rarer products.
- It counts a matrix product by its output. fvcore goes by the shape of the first factor, though the second may be repeated over more.
- It sees into nn.MultiheadAttention and nn.TransformerEncoderLayer, by switching off their fused paths.
- It counts in eval mode, and removes fvcore's hooks when the forward pass raises.
- It counts the scale and shift of batch norm as one multiply-accumulate. fvcore counts them as two.
- It traces repeat_interleave on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ptee._common.errors import BackboneError, first_line, ran_out_of_memory, some
from ptee._common.process import alone, no_checkpointing, no_fused_attention, no_warnings
from ptee.analysis.freezing import KeptBuffers, modes, set_modes

# Operators that compute products inside of one call, of which only torch's own count sees how many.
HIDING = frozenset({
    "aten::chain_matmul", "aten::linalg_multi_dot", "aten::matrix_power", "aten::linalg_matrix_power", "aten::cov", "aten::corrcoef",
})  # fmt: skip
COMPILED = {"dynamo-optimized": "torch.compile", "Tried to trace": "torch.jit"}  # by torch's words when it traces such
UNTRACED = {
    "observable data dependence": "it runs in a thread of its own, or not on the images",
    "stateless API": "it calls torch.func.functional_call",
}
UNREGISTERED = "requires grad as a constant"
TOLERANCE = 0.01  # share by which torch's count may be above fvcore's


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

    The module is counted in eval mode, and left as it was: mode, buffers and hooks. The example is one sample (1, ...).
    `products_only` counts convolutions and matrix products alone, as torch's FlopCounterMode does.
    """
    # A mode of the user, such as FlopCounterMode, would hide operators from the trace.
    no_modes = _disable_current_modes()
    with alone(), _left_as_it_was(module), torch.no_grad(), no_fused_attention, no_checkpointing, no_modes:
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


def _operators(module: nn.Module, example: Tensor) -> list[_Operator]:
    """The operators of one forward pass, in order of execution."""
    with no_warnings:  # it scripts functions, which torch says is deprecated
        from fvcore.nn import FlopCountAnalysis  # imported here, because it is slow to import

    class InOrder(FlopCountAnalysis):
        """fvcore's count, which also notes every operator in order of execution."""

        def __init__(self) -> None:
            super().__init__(module, example)
            self.operators: list[_Operator] = []
            self.hidden: list[str] = []  # names of code that is not traced
            self.seen = 0  # multiply-accumulates that torch's count sees, too
            for op, handle in (self._op_handles | HANDLES | NORMS).items():
                self.set_op_handle(op, self._noting(op, handle))

        def _noting(self, op: str, handle: Callable[..., Any]) -> Callable[..., Any]:
            def note(inputs: list[Any], outputs: list[Any]) -> Any:
                found = handle(inputs, outputs)
                macs = sum(found.values()) if isinstance(found, dict) else found
                self._note(outputs[0].node(), int(macs), op in PRODUCTS)
                self.seen += int(macs) * _is_seen(op, inputs)
                return found

            return note

        def _note(self, node: Any, macs: int, product: bool) -> None:
            self.operators.append(_Operator(frozenset(node.scopeName().split("/")), macs, product))

        def _should_ignore_node(self, node: Any) -> bool:
            # Operators that cost nothing are noted too: a ReLU's output is ready after everything that ran before it.
            self._note(node, 0, False)
            self.hidden += _hidden(node)
            return True

    analysis = InOrder().uncalled_modules_warnings(False).unsupported_ops_warnings(False).tracer_warnings("none")
    try:
        with no_warnings, _PlainRepeats():  # fvcore would switch warnings off itself, but for other threads too
            analysis.total()
    except (RuntimeError, AssertionError, TypeError) as why:  # the last two where fvcore meets what it does not expect
        if ran_out_of_memory(why):
            raise
        raise BackboneError(_not_traced(type(module).__name__, why)) from why
    _refuse_hidden(module, example, analysis.hidden, analysis.seen)
    return analysis.operators


def _not_traced(kind: str, why: Exception) -> str:
    """What to do about code that torch.jit cannot trace."""
    for words, maker in COMPILED.items():
        if words in str(why):
            return f"{kind} calls what {maker} made, and its operators cannot be counted. Let it call the code itself, without {maker}."
    if UNREGISTERED in str(why):
        return (
            f"{kind} computes with weights that are none of its parameters, such as those of modules in a plain list. Register "
            "them: nn.ModuleList, nn.ModuleDict, nn.Parameter."
        )
    reason = next((reason for words, reason in UNTRACED.items() if words in str(why)), None)
    return (
        f"{kind} cannot be counted: {reason or f'torch.jit cannot trace it ({first_line(why)})'}. Let its forward "
        "call its modules itself, one by one, in its own thread."
    )


class _WholeCount(FlopCounterMode):
    """torch's count, without the hooks that add it up for each module: they act on all modules, in all threads."""

    def __init__(self, *, display: bool) -> None:
        super().__init__(display=display)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]


class _NoModules:
    """Takes the place of torch's tracker of modules."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _PlainRepeats(TorchFunctionMode):
    """repeat_interleave gets numbers. A trace makes tensors of sizes, on the CPU, and it takes tensors of its own device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            first, *rest = args
            args = (first, *map(_plain, rest))
            kwargs = {name: _plain(value) if name == "repeats" else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Tensor) and not value.dim() else value


def _hidden(node: Any) -> list[str]:
    """The name of the code that a call runs, if fvcore does not see into it."""
    if node.kind() == "prim::CallFunction":
        return [next(node.inputs()).node().s("name")]
    if node.kind() == "prim::PythonOp":
        return [node.pyname()]
    known = node.kind().startswith(("aten::", "prim::")) and node.kind() not in HIDING
    return [] if known else [node.kind()]


def _is_seen(op: str, inputs: list[Any]) -> bool:
    """Whether torch's count sees these products, if recurrent layers run without oneDNN and cuDNN."""
    return op in PRODUCTS - UNSEEN and not (op in BY_VECTORS and any(len(_shape(factor)) < 2 for factor in inputs[:2]))


def _refuse_hidden(module: nn.Module, example: Tensor, hidden: list[str], macs: int) -> None:
    """Refuse code that is not seen and may compute products: more run than the `macs` that were counted, or nobody knows."""
    if not hidden:
        return
    # torch's count sees into all but custom operators, fused attention and recurrent layers of oneDNN and cuDNN
    with no_warnings, _plain_layers(), sdpa_kernel(SDPBackend.MATH), _WholeCount(display=False) as executed:
        module(example)
    own = {*hidden} - HIDING
    if any("::" in name for name in own) or executed.get_total_flops() > 2 * macs * (1 + TOLERANCE):
        advice = (
            "call plain functions and modules of PyTorch, without torch.jit, autograd.Function and custom operators"
        )
        raise BackboneError(
            f"{type(module).__name__} calls code whose multiply-accumulates cannot be counted ({some(list(dict.fromkeys(hidden)))}). "
            f"Let it {advice if own else 'multiply two matrices at a time, with @'}."
        )


@contextmanager
def _plain_layers() -> Iterator[None]:
    """Without oneDNN and cuDNN. Their `flags` of torch would read its old switches of TF32, and that may raise."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [(backend, backend.enabled) for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in before:
            backend.enabled = enabled


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _batch_norm_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """In eval mode it is x * scale + shift, with the statistics folded into both: one for each element."""
    return prod(_shape(inputs[0]))


def _norm_macs(weight: int, inputs: list[Any], outputs: list[Any]) -> int:
    """As fvcore estimates it, which takes five axes at most: four for each element, and one for the scale if there is one."""
    return prod(_shape(inputs[0])) * (4 + inputs[weight].isCompleteTensor())


# ---------------------------------------------------------------------------------------------------- products


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """q k^T and its product with v: q (..., l, d), k (..., s, d), v (..., s, e), of which one may serve several of another."""
    *batch, length, value_depth = _shape(outputs[0])
    source, depth = _shape(inputs[1])[-2:]
    return prod(batch) * length * source * (depth + value_depth)


def _convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """A convolution with padding="same", an operator that fvcore does not know. The weight has c / groups inputs."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:])


def _tokens_convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """conv_tbc, whose weight is (k, c, o)."""
    return prod(_shape(outputs[0])) * prod(_shape(inputs[1])[:-1])


def _product_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """a @ b, and a vector in place of either, and a linear layer: each number of the output is a sum over the last axis of a."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _added_product_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """c + a @ b: a (..., n, m), b (..., m, p) or (m,)."""
    a, b = _shape(inputs[1]), _shape(inputs[2])
    return prod(a) * (b[-1] if len(b) > 1 else 1)


def _tensordot_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """a (n, m) and b (m, p) in any order of axes: (n m) (m p) (n p) is the square of n m p."""
    return isqrt(prod(prod(_shape(value)) for value in (*inputs[:2], outputs[0])))


def _bilinear_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """x (..., a) and y (..., b) with a weight (o, a, b)."""
    return prod(_shape(inputs[0])[:-1]) * prod(_shape(inputs[2]))


def _recurrent_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Every matrix of the layers, of both directions, once for each step of each sample."""
    lists = [value.node() for value in inputs if value.node().kind() == "prim::ListConstruct"]
    return prod(_shape(inputs[0])[:-1]) * _matrices(lists[-1].inputs())


def _cell_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """One step of a recurrent layer: the weights come after the images and the state."""
    return prod(_shape(inputs[0])[:-1]) * _matrices(inputs[2:4])


def _matrices(values: Iterable[Any]) -> int:
    """The numbers in those that are matrices; biases are vectors."""
    shapes = [_shape(value) for value in values]
    return sum(prod(shape) for shape in shapes if len(shape) == 2)


HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention_macs,
    "aten::_convolution_mode": _convolution_macs,
    "aten::conv_tbc": _tokens_convolution_macs,
    **dict.fromkeys(
        ("aten::matmul", "aten::linear", "aten::mv", "aten::dot", "aten::vdot", "aten::_int_mm"), _product_macs
    ),
    **dict.fromkeys(("aten::addmm", "aten::addmv", "aten::addbmm", "aten::baddbmm"), _added_product_macs),
    **dict.fromkeys(("aten::addmm_", "aten::addmv_", "aten::addbmm_", "aten::baddbmm_"), _added_product_macs),
    **dict.fromkeys(("aten::tensordot", "aten::inner"), _tensordot_macs),
    "aten::bilinear": _bilinear_macs,
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), _recurrent_macs),
    **dict.fromkeys(("aten::lstm_cell", "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell"), _cell_macs),
}
NORMS: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::batch_norm": _batch_norm_macs,
    "aten::instance_norm": partial(_norm_macs, 1),
    **dict.fromkeys(("aten::layer_norm", "aten::group_norm"), partial(_norm_macs, 2)),
}
# Convolutions and matrix products. Each makes a layer; normalisation, activation and pooling belong to the layer before.
PRODUCTS = frozenset({"aten::_convolution", "aten::mm", "aten::bmm", "aten::einsum", *HANDLES})
# What torch's own count leaves out: these, and products of which one factor is a vector.
UNSEEN = frozenset({
    "aten::mv", "aten::dot", "aten::vdot", "aten::addmv", "aten::addmv_", "aten::addbmm", "aten::addbmm_", "aten::bilinear",
    "aten::conv_tbc", "aten::_int_mm",
})  # fmt: skip
BY_VECTORS = frozenset({"aten::matmul", "aten::linear", "aten::inner", "aten::tensordot"})


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Restores modes, buffers and hooks at the end, also after an error."""
    training, parts, buffers = modes(module), list(module.modules()), KeptBuffers(module)
    hooks = [(registered, set(registered)) for m in parts for registered in (m._forward_pre_hooks, m._forward_hooks)]
    try:
        yield
    finally:
        set_modes(module, training)
        for registered, before in hooks:
            for key in set(registered) - before:
                if type(registered[key]).__module__.startswith("fvcore."):  # another thread may have put its own there
                    del registered[key]
        buffers.put_back()
