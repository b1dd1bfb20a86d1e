"""Cuts in the middle of code that remembers the whole batch.

When rows leave at a cut, the code of some networks still holds values of the whole batch: the number of rows in a Python
variable, a mask, the output of an earlier block. Nobody else can change those variables. So the forward pass starts again
with the rows that are left. Every module that was done before the cut gives its earlier output for these rows, without
computing it again, and the variables around it get the right values.
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


class ActiveRows:
    """The rows of one call that have not left yet. Everything that follows the rows of a call asks here.

    A moment is the number of times that rows had left by then, so that what was computed earlier can be matched to the rows
    that are here now.

    Attributes:
        count: how many are here.

    Args:
        batch: number of rows at the beginning.
    """

    def __init__(self, batch: int) -> None:
        self.count = batch
        self._stayed: list[Tensor] = []  # each time rows left: the others, as positions among the rows before

    @property
    def moment(self) -> int:
        """Now, for `since` and `select` later."""
        return len(self._stayed)

    def keep(self, staying: Tensor) -> None:
        """All other rows leave.

        Args:
            staying: (kept,) positions among the rows that are here.
        """
        self._stayed.append(staying)
        self.count = len(staying)

    def since(self, moment: int = 0) -> Tensor | None:
        """(count,) the rows that are here, as positions among those of an earlier moment; None if nobody has left since.

        Args:
            moment: 0 for the beginning.
        """
        rows = None
        for staying in self._stayed[moment:]:
            rows = staying if rows is None else rows.index_select(0, staying)
        return rows

    def select(self, tensor: Tensor, moment: int = 0) -> Tensor:
        """What a tensor of an earlier moment says of the rows that are here.

        Args:
            tensor: (rows of that moment, ...).
            moment: 0 for the beginning.
        """
        rows = self.since(moment)
        return tensor if rows is None else tensor.index_select(0, rows)


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
class _Kept:
    """What a call of a module gave.

    Attributes:
        moment: of `ActiveRows`, when it gave it.
        batch: how many rows were there.
        output: what it gave.
    """

    moment: int
    batch: int
    output: Any


class ReplayCache:
    """What modules gave in one call, to be given again for the rows that are left when the pass starts again.

    Args:
        steps: what to keep, by module.
        rows: of the call.
    """

    def __init__(self, steps: Mapping[nn.Module, Step], rows: ActiveRows) -> None:
        self.rows = rows
        self.restarted = self._started = False
        self._steps = steps
        self._kept: dict[nn.Module, list[_Kept]] = {}
        self._calls: Counter[nn.Module] = Counter()  # in this pass
        self._inside: list[list[nn.Module]] = []  # for each step that is running, what was kept meanwhile

    def start(self, images: Tensor) -> Tensor:
        """A forward pass starts. Returns the images of the rows that are here.

        Args:
            images: (b, c, h, w) with which the call began.
        """
        self._calls.clear()
        self._inside.clear()
        rows = self.rows.since()
        self.restarted = rows is not None and self._started  # rows may have left at the input, before the first pass
        self._started = True
        if rows is not None:
            return images[rows]
        return images.clone() if self._steps else images  # the backbone may write into it, and it is needed again

    def require(self, steps: Sequence[Step]) -> None:
        """Refuse to start again where other modules ran than those of the plan, or more often.

        Raises:
            PteeError: naming one of them.
        """
        planned = Counter(step.name for step in steps)
        for module, step in self._steps.items():
            ran = len(self._kept.get(module, ()))
            if ran != planned[step.name]:
                raise PteeError(
                    f"{step.name} ran {ran} times before an exit, {planned[step.name]} times when the exits were planned. "
                    f"{ANOTHER_WAY}"
                )

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called: it gives what it gave before, or runs."""
        step = self._steps.get(module)
        if step is None:
            return forward(*args, **kwargs)
        kept = self._kept.setdefault(module, [])
        self._calls[module] += 1
        if self._calls[module] <= len(kept):
            output = self._replay(step, kept[self._calls[module] - 1])
        else:
            output = self._run(step, module, forward, args, kwargs)
        if self._inside:
            self._inside[-1].append(module)
        return output

    def _run(self, step: Step, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._inside.append([])
        output = forward(*args, **kwargs)
        for inner in self._inside.pop():  # it will not be called again: this module gives its output without
            self._kept[inner].pop()
            self._calls[inner] -= 1
        # A user's own hooks on the module see what it gives; they must not see zeros.
        needed = step.needed or bool(module._forward_hooks)
        self._kept[module].append(_Kept(self.rows.moment, self.rows.count, _stored(step, output, needed)))
        return output

    def _replay(self, step: Step, kept: _Kept) -> Any:
        leaves, spec = tree_flatten(kept.output)
        whole = tree_unflatten([_zeros(leaf) if isinstance(leaf, _Shape) else leaf for leaf in leaves], spec)
        rows = self.rows.since(kept.moment)
        return whole if rows is None else select(whole, step.leaves + step.repeated, rows, kept.batch)


@dataclass(frozen=True)
class _Shape:
    """What is left of a tensor whose values nobody reads."""

    like: Tensor  # (), for type and device
    shape: tuple[int, ...]


def _stored(step: Step, output: Any, needed: bool) -> Any:
    leaves, spec = tree_flatten(output)
    for i in step.leaves + step.repeated:
        leaf = leaves[i]
        if not needed and i in step.leaves:
            leaves[i] = _Shape(leaf.new_zeros(()), tuple(leaf.shape))
        elif step.overwritten:
            leaves[i] = leaf.clone()
    return tree_unflatten(leaves, spec)


def _zeros(shape: _Shape) -> Tensor:
    return torch.zeros(shape.shape, dtype=shape.like.dtype, device=shape.like.device)


# ------------------------------------------------------------------------------------------- modules that are cached


class CachedModule:
    """Takes the place of a module's `forward`, and asks the cache of the call that is running, if there is one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")  # somebody else's, put in that place before
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module runs, or gives what it gave before."""
        cache = _CACHE.get()
        if cache is None:
            return self._forward(*args, **kwargs)
        return cache.call(self.module, self._forward, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        return (
            type(self.module).forward(self.module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)
        )


def make_cached(modules: Sequence[nn.Module]) -> None:
    """From now on a call can keep what these modules give."""
    for module in modules:
        wrapper = module.__dict__.get("forward")
        if not isinstance(wrapper, CachedModule):
            module.forward = wrapper = CachedModule(module)
        wrapper.users += 1


def undo_cached(modules: Sequence[nn.Module]) -> None:
    """Undo `make_cached`; a module is as it was when its last user is done."""
    for module in modules:
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, CachedModule):
            wrapper.users -= 1
            if not wrapper.users:
                del module.forward
                if wrapper.own is not None:
                    module.forward = wrapper.own


_CACHE: ContextVar[ReplayCache | None] = ContextVar("the replay cache of the call that is running", default=None)


class RestartForward(BaseException):  # not an Exception: a backbone's own `except Exception` must not swallow it
    """Rows have left: the forward pass starts again with the others."""


def run(backbone: nn.Module, images: Tensor, cache: ReplayCache) -> Tensor:
    """A forward pass, started again with the rows that are left whenever a hook raises `RestartForward`.

    Args:
        backbone: whose modules are cached, where `cache` has steps for them.
        images: (b, c, h, w).
        cache: of this call.

    Returns:
        What the backbone answers for the rows that are left.
    """
    token = _CACHE.set(cache)
    try:
        while True:
            try:
                return backbone(cache.start(images))
            except RestartForward:
                continue
    finally:
        _CACHE.reset(token)
