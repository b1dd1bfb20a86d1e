"""Cuts in the middle of code that remembers the old batch.

Where rows go at a cut, some networks' own code still holds values of the whole batch: the number of rows in a Python
variable, a mask, the output of the block before the last. Nobody else can change those variables. So the forward pass is
begun anew with the rows that are left, and every module that was done before the cut gives what it gave, for these rows,
without computing it again; what its surroundings remember then fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Step:
    """A module whose calls are over when a cut is reached, so that it need not run again.

    Attributes:
        name: the module.
        leaves: which of its output's tensors carry rows, counted through nested tuples, lists and dicts.
        folds: of each of these, as in `take`.
        needed: its values are read behind the cut; else only their shapes matter.
        overwritten: something later writes into them, so a copy is kept.
    """

    name: str
    leaves: tuple[int, ...]
    folds: tuple[int, ...]
    needed: bool
    overwritten: bool

    def select(self, output: Any, rows: Tensor) -> Any:
        """The module's output with only these rows of the batch.

        Args:
            output: what the module gave: a tensor, or nested tuples, lists and dicts of tensors.
            rows: (kept,) positions in the batch as it was at this module.
        """
        leaves, spec = tree_flatten(output)
        for i, fold in zip(self.leaves, self.folds, strict=True):
            leaves[i] = take(leaves[i], rows, fold)
        return tree_unflatten(leaves, spec)


def take(tensor: Tensor, rows: Tensor, fold: int = 1) -> Tensor:
    """Some rows of a batch.

    Args:
        tensor: (b * fold, ...), the rows in front, each with `fold` entries of its own.
        rows: (kept,) positions in the batch.
        fold: tokens or windows packed into one axis with the batch; 1 for none.
    """
    if fold == 1:
        return tensor[rows]  # index_select would lose channels_last
    return tensor.unflatten(0, (-1, fold))[rows].flatten(0, 1)


def merged(plans: Sequence[Sequence[Step]]) -> dict[str, Step]:
    """The steps of several cuts of one network, by module."""
    steps: dict[str, Step] = {}
    for step in (step for plan in plans for step in plan):
        other = steps.get(step.name, step)
        needed, overwritten = step.needed or other.needed, step.overwritten or other.overwritten
        steps[step.name] = Step(step.name, step.leaves, step.folds, needed, overwritten)
    return steps


class Memory:
    """What the modules gave in one call, and which rows went since.

    Args:
        steps: what to keep, by module.
    """

    def __init__(self, steps: Mapping[nn.Module, Step]) -> None:
        self._steps = steps
        self._given: dict[nn.Module, list[tuple[int, Any]]] = {}  # how many had gone before, and the output
        self._asked: dict[nn.Module, int] = {}
        self._gone: list[Tensor] = []
        self.begun_anew = False

    def begin_anew(self) -> None:
        """The forward pass starts again."""
        self._asked.clear()
        self.begun_anew = True

    def keep_rows(self, rows: Tensor) -> None:
        """Only these rows go on.

        Args:
            rows: (kept,) positions in the batch as it was.
        """
        self._gone.append(rows)

    def left(self, batch: Tensor) -> Tensor:
        """What is left of the batch that the call began with."""
        rows = self._since(0)
        return batch if rows is None else batch[rows]

    def _since(self, gone: int) -> Tensor | None:
        """Who is left of those who were there when so many parties had gone; None for all."""
        rows = None
        for staying in self._gone[gone:]:
            rows = staying if rows is None else rows[staying]
        return rows

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called: it gives what it gave, or runs."""
        step = self._steps.get(module)
        if step is None:
            return forward(*args, **kwargs)
        given = self._given.setdefault(module, [])
        number = self._asked[module] = self._asked.get(module, 0) + 1
        if number <= len(given):
            return self._recall(step, *given[number - 1])
        output = forward(*args, **kwargs)
        given.append((len(self._gone), _kept(step, output)))
        return output

    def _recall(self, step: Step, before: int, output: Any) -> Any:
        rows = self._since(before)
        leaves, spec = tree_flatten(output)
        if not step.needed:
            leaves = [_like(leaf) if isinstance(leaf, _Shape) else leaf for leaf in leaves]
        whole = tree_unflatten(leaves, spec)
        return whole if rows is None else step.select(whole, rows)


@dataclass(frozen=True)
class _Shape:
    """What is left of a tensor whose values nobody reads."""

    like: Tensor  # (), for type and device
    shape: tuple[int, ...]


def _kept(step: Step, output: Any) -> Any:
    leaves, spec = tree_flatten(output)
    for i in step.leaves:
        leaf = leaves[i]
        if not step.needed:
            leaves[i] = _Shape(leaf.new_zeros(()), tuple(leaf.shape))
        elif step.overwritten:
            leaves[i] = leaf.clone()
    return tree_unflatten(leaves, spec)


def _like(shape: _Shape) -> Tensor:
    return torch.zeros(shape.shape, dtype=shape.like.dtype, device=shape.like.device)


# ------------------------------------------------------------------------------------------- modules that can be asked


class Recallable:
    """Takes the place of a module's `forward`, and asks the memory of the call that is going on, if there is one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")  # somebody else's, put in that place before
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module runs, or gives what it gave."""
        memory = _MEMORY.get()
        if memory is None:
            return self._forward(*args, **kwargs)
        return memory.call(self.module, self._forward, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return (
            type(self.module).forward(self.module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)
        )


def make_recallable(modules: Sequence[nn.Module]) -> None:
    """From now on these modules can be asked for what they gave."""
    for module in modules:
        wrapper = module.__dict__.get("forward")
        if not isinstance(wrapper, Recallable):
            module.forward = wrapper = Recallable(module)
        wrapper.users += 1


def make_plain(modules: Sequence[nn.Module]) -> None:
    """Undo `make_recallable`; a module is as it was when the last who asked for it is done."""
    for module in modules:
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, Recallable):
            wrapper.users -= 1
            if not wrapper.users:
                del module.forward
                if wrapper.own is not None:
                    module.forward = wrapper.own


_MEMORY: ContextVar[Memory | None] = ContextVar("what the modules gave in the call that is going on", default=None)


class Again(BaseException):  # not an Exception: a backbone's own `except Exception` must not swallow it
    """Rows have gone: the forward pass begins anew with the others."""


def run(backbone: nn.Module, images: Tensor, memory: Memory) -> Tensor:
    """A forward pass, begun anew with the rows that are left whenever a hook raises `Again`.

    Args:
        backbone: whose modules remember, where `memory` has steps for them.
        images: (b, c, h, w).
        memory: of this call.

    Returns:
        What the backbone answers for the rows that are left.
    """
    token = _MEMORY.set(memory)
    try:
        while True:
            try:
                return backbone(memory.left(images))
            except Again:
                memory.begin_anew()
    finally:
        _MEMORY.reset(token)
