"""Cuts in the middle of code that remembers the old batch.

Where rows go at a cut, some networks' own code still holds values of the whole batch: the number of rows in a Python
variable, a mask, the output of the block before the last. Nobody else can change those variables. So the forward pass is
begun anew with the rows that are left, and every module that was done before the cut gives what it gave, for these rows,
without computing it again; what its surroundings remember then fits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptee._common.errors import PteeError

ANOTHER_WAY = (
    "This input takes another way through the backbone than the one the exits were planned for, or the backbone was changed "
    "after augment(). Plan anew."
)


@dataclass(frozen=True)
class Step:
    """A call of a module that is over when a cut is reached, so that it need not run again.

    Attributes:
        name: the module.
        leaves: which of its output's tensors carry rows, counted through nested tuples, lists and dicts.
        needed: its values are read behind the cut; else only their shapes matter.
        overwritten: something later writes into them, so a copy is kept.
        repeated: which tensors hold the same for every row, whatever the image: positions, masks. Their values matter.
    """

    name: str
    leaves: tuple[int, ...]
    needed: bool
    overwritten: bool
    repeated: tuple[int, ...] = ()


def take(tensor: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Some rows of a batch.

    Args:
        tensor: (batch * fold, ...), the rows in front, each with as many entries of its own: one, or the tokens or windows
            that share the first axis with the batch.
        rows: (kept,) positions in the batch.
        batch: number of rows.

    Raises:
        PteeError: if the tensor does not hold so many rows.
    """
    if len(tensor) == batch:
        return tensor[rows]  # index_select would lose channels_last
    if len(tensor) % batch:
        raise PteeError(
            f"A tensor of shape {tuple(tensor.shape)} does not carry the {batch} rows that are here. {ANOTHER_WAY}"
        )
    return tensor.unflatten(0, (batch, -1))[rows].flatten(0, 1)


def select(output: Any, leaves: Sequence[int], rows: Tensor, batch: int) -> Any:
    """A module's output with only these rows of the batch.

    Args:
        output: what the module gave: a tensor, or nested tuples, lists and dicts of tensors.
        leaves: which of its tensors carry rows.
        rows: (kept,) positions in the batch as it was at this module.
        batch: how many rows it had there.
    """
    flat, spec = tree_flatten(output)
    for i in leaves:
        flat[i] = take(flat[i], rows, batch)
    return tree_unflatten(flat, spec)


def merged(plans: Sequence[Sequence[Step]]) -> dict[str, Step]:
    """The steps of several cuts of one network, by module: what any call of it and any cut needs."""
    steps: dict[str, Step] = {}
    for step in (step for plan in plans for step in plan):
        other = steps.get(step.name, step)
        needed, overwritten = step.needed or other.needed, step.overwritten or other.overwritten
        leaves = tuple(sorted({*step.leaves, *other.leaves}))
        repeated = tuple(sorted({*step.repeated, *other.repeated} - {*leaves}))
        steps[step.name] = Step(step.name, leaves, needed, overwritten, repeated)
    return steps


@dataclass(frozen=True)
class _Given:
    """What a call of a module gave: how many parties had gone before, how many rows were there, the output."""

    gone: int
    batch: int
    output: Any


class Memory:
    """What the modules gave in one call, and which rows went since.

    Args:
        steps: what to keep, by module.
    """

    def __init__(self, steps: Mapping[nn.Module, Step]) -> None:
        self._steps = steps
        self._given: dict[nn.Module, list[_Given]] = {}
        self._asked: Counter[nn.Module] = Counter()
        self._inside: list[list[nn.Module]] = []  # for each step that is running, what was kept meanwhile
        self._gone: list[Tensor] = []
        self.batch: int | None = None  # rows that are here
        self.begun_anew = self._begun = False

    def begin(self, images: Tensor) -> Tensor:
        """A forward pass begins. Returns what is left of the images with which the call began."""
        self._asked.clear()
        self._inside.clear()
        rows = self._since(0)
        self.begun_anew = rows is not None and self._begun  # rows may have gone before the first pass, at the input
        self._begun = True
        self.batch = len(images) if rows is None else len(rows)
        if rows is not None:
            return images[rows]
        return images.clone() if self._steps else images  # the backbone may write into it, and it is needed again

    def keep_rows(self, rows: Tensor) -> None:
        """Only these rows go on.

        Args:
            rows: (kept,) positions in the batch as it was.
        """
        self._gone.append(rows)
        self.batch = len(rows)

    def require(self, steps: Sequence[Step]) -> None:
        """Refuse to begin anew where other modules ran than those of the plan, or more often.

        Raises:
            PteeError: naming one of them.
        """
        planned = Counter(step.name for step in steps)
        for module, step in self._steps.items():
            if len(self._given.get(module, ())) != planned[step.name]:
                raise PteeError(
                    f"{step.name} ran {len(self._given.get(module, ()))} times before an exit, {planned[step.name]} times when "
                    f"the exits were planned. {ANOTHER_WAY}"
                )

    def _since(self, gone: int) -> Tensor | None:
        """Who is left of those who were there when so many parties had gone; None for all."""
        rows = None
        for staying in self._gone[gone:]:
            rows = staying if rows is None else rows[staying]
        return rows

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called: it gives what it gave, or runs."""
        step = self._steps.get(module)
        if step is None or self.batch is None:
            return forward(*args, **kwargs)
        given = self._given.setdefault(module, [])
        self._asked[module] += 1
        if self._asked[module] <= len(given):
            output = self._recall(step, given[self._asked[module] - 1])
        else:
            output = self._run(step, module, forward, args, kwargs)
        if self._inside:
            self._inside[-1].append(module)
        return output

    def _run(self, step: Step, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._inside.append([])
        output = forward(*args, **kwargs)
        for inner in self._inside.pop():  # it will not be called again: this module gives its output without
            self._given[inner].pop()
            self._asked[inner] -= 1
        # Somebody's own hooks on the module see what it gives; they are not to see zeros.
        needed = step.needed or bool(module._forward_hooks)
        assert self.batch is not None
        self._given[module].append(_Given(len(self._gone), self.batch, _kept(step, output, needed)))
        return output

    def _recall(self, step: Step, given: _Given) -> Any:
        rows = self._since(given.gone)
        leaves, spec = tree_flatten(given.output)
        whole = tree_unflatten([_like(leaf) if isinstance(leaf, _Shape) else leaf for leaf in leaves], spec)
        return whole if rows is None else select(whole, step.leaves + step.repeated, rows, given.batch)


@dataclass(frozen=True)
class _Shape:
    """What is left of a tensor whose values nobody reads."""

    like: Tensor  # (), for type and device
    shape: tuple[int, ...]


def _kept(step: Step, output: Any, needed: bool) -> Any:
    leaves, spec = tree_flatten(output)
    for i in step.leaves + step.repeated:
        leaf = leaves[i]
        if not needed and i in step.leaves:
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
                return backbone(memory.begin(images))
            except Again:
                continue
    finally:
        _MEMORY.reset(token)
