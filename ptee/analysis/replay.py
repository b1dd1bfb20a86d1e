"""A forward pass starts again with fewer rows, and nothing is computed twice.

When rows leave at a cut, the code of some networks still holds something of the whole batch: the number of rows in a Python
variable, a mask, the output of an earlier block. Nothing outside can change those variables. So the pass starts again with
the rows that are left, and the code sets its variables again.

The work is not done again. A `ReplayCache` keeps the outputs of the modules that ran before the cut (its `Step`s). In the
new pass each of these modules returns the output that it returned before, with only the rows that are left. `CachedModule`
takes the place of a module's `forward` for this. `run` catches `RestartForward`, which a hook raises when rows have left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptee._common.errors import PteeError

ANOTHER_WAY = (
    "This input takes another way through the backbone than the one the exits were planned for, or the backbone was changed "
    "after augment(). Plan the exits again."
)


class ActiveRows:
    """The rows of one call that have not left yet. All that must follow the rows of a call asks here.

    A moment is the number of times that rows had left by then. With it, something that was computed earlier can be matched
    to the rows that are left now. Moment 0 is the start.
    """

    def __init__(self, batch: int) -> None:
        self.count = batch  # of the rows that are left
        self._counts = [batch]  # at each moment
        self._stayed: list[Tensor] = []  # for each time that rows left: the others, as positions among the rows before

    @property
    def moment(self) -> int:
        """Now, for a later `since` or `select`."""
        return len(self._stayed)

    def keep(self, staying: Tensor) -> None:
        """Let all rows leave but these: (kept,) positions among the rows that are left."""
        self._stayed.append(staying)
        self.count = len(staying)
        self._counts.append(self.count)

    def take(self, tensor: Tensor, latest: int) -> Tensor:
        """The rows that are left of a tensor that a module returned at a moment; it may have made it before rows left inside of it."""
        number = len(tensor)
        moment = next((m for m in range(latest, -1, -1) if number % self._counts[m] == 0), latest)
        rows = self.since(moment)
        return tensor if rows is None else take(tensor, rows, self._counts[moment])

    def since(self, moment: int = 0) -> Tensor | None:
        """(count,) the rows that are left, as positions among those of an earlier moment. None if no row has left since."""
        rows = None
        for staying in self._stayed[moment:]:
            rows = staying if rows is None else rows.index_select(0, staying)
        return rows

    def select(self, tensor: Tensor, moment: int = 0) -> Tensor:
        """The part of a tensor (rows of an earlier moment, ...) that belongs to the rows that are left."""
        rows = self.since(moment)
        return tensor if rows is None else tensor.index_select(0, rows)


@dataclass(frozen=True)
class Step:
    """A call of a module that has ended when a cut is reached, so that it need not run again.

    Attributes:
        name: the module.
        leaves: which tensors of its output carry rows, counted through nested tuples, lists and dicts.
        needed: whether the rest of the pass reads their values. If not, only their shapes matter.
        overwritten: whether something later writes into them, so that a copy must be kept.
        repeated: which tensors hold the same for every row, whatever the image: positions, masks. Their values are kept.
    """

    name: str
    leaves: tuple[int, ...]
    needed: bool
    overwritten: bool
    repeated: tuple[int, ...] = ()


def take(tensor: Tensor, rows: Tensor, batch: int) -> Tensor:
    """The rows at these positions of a tensor (batch * n, ...), where n tokens or windows are folded into the batch."""
    if len(tensor) == batch:
        return tensor[rows]  # index_select would lose channels_last
    if len(tensor) % batch:
        raise PteeError(
            f"A tensor of shape {tuple(tensor.shape)} does not carry the {batch} rows that are left. {ANOTHER_WAY}"
        )
    return tensor.unflatten(0, (batch, -1))[rows].flatten(0, 1)


def select(output: Any, leaves: Sequence[int], rows_of: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with only some rows of the batch. `leaves` says which of its tensors carry rows."""
    flat, spec = tree_flatten(output)
    for i in leaves:
        flat[i] = rows_of(flat[i])
    return tree_unflatten(flat, spec)


def merged(plans: Sequence[Sequence[Step]]) -> dict[str, Step]:
    """The steps of several cuts of one network, by module. A merged step keeps what any of its cuts needs."""
    steps: dict[str, Step] = {}
    for step in (step for plan in plans for step in plan):
        other = steps.get(step.name, step)
        needed, overwritten = step.needed or other.needed, step.overwritten or other.overwritten
        leaves = tuple(sorted({*step.leaves, *other.leaves}))
        repeated = tuple(sorted({*step.repeated, *other.repeated} - {*leaves}))
        steps[step.name] = Step(step.name, leaves, needed, overwritten, repeated)
    return steps


# ---------------------------------------------------------------------------------------------------- the cache of a call


@dataclass(frozen=True)
class _Kept:
    """The output of one call of a module, with the moment of `ActiveRows` at which it was returned."""

    moment: int
    output: Any


class ReplayCache:
    """The outputs of modules in one call of the model, to be returned again when the forward pass starts again."""

    def __init__(self, steps: Mapping[nn.Module, Step], rows: ActiveRows) -> None:
        self.rows = rows
        self.restarted = self._started = False
        self._steps = steps
        self._kept: dict[nn.Module, list[_Kept]] = {module: [] for module in steps}
        self._calls: Counter[nn.Module] = Counter()  # in this pass
        self._inside: list[list[nn.Module]] = []  # for each step that is running, which steps have ended inside of it

    def start(self, images: Tensor) -> Tensor:
        """Start a forward pass. Of all images of the call, returns those of the rows that are left."""
        self._calls.clear()
        self._inside.clear()
        rows = self.rows.since()
        self.restarted = rows is not None and self._started  # rows may leave at the input, before the first pass
        self._started = True
        if rows is not None:
            return images[rows]
        return images.clone() if self._steps else images  # the backbone may write into them, and a new pass needs them

    def require(self, steps: Sequence[Step]) -> None:
        """Refuse to start again if the modules that ran are not those of the plan, or ran more often."""
        planned = Counter(step.name for step in steps)
        for module, step in self._steps.items():
            ran = len(self._kept[module])
            if ran != planned[step.name]:
                raise PteeError(
                    f"{step.name} ran {ran} times before an exit, {planned[step.name]} times when the exits were planned. "
                    f"{ANOTHER_WAY}"
                )

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a module: it returns the output of its earlier call if there was one, otherwise it runs."""
        step = self._steps.get(module)
        if step is None:
            return forward(*args, **kwargs)
        self._calls[module] += 1
        if self._calls[module] <= len(self._kept[module]):
            output = self._replay(step, self._kept[module][self._calls[module] - 1])
        else:
            output = self._run(step, module, forward, args, kwargs)
        if self._inside:
            self._inside[-1].append(module)
        return output

    def _run(self, step: Step, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._inside.append([])
        output = forward(*args, **kwargs)
        for inner in self._inside.pop():  # when this module is replayed, those inside of it are not called
            self._kept[inner].pop()
            self._calls[inner] -= 1
        # A user's own hooks on the module see its output, and must not see zeros.
        needed = step.needed or bool(module._forward_hooks)
        self._kept[module].append(_Kept(self.rows.moment, _stored(step, output, needed)))
        return output

    def _replay(self, step: Step, kept: _Kept) -> Any:
        return select(kept.output, step.leaves + step.repeated, lambda t: self.rows.take(t, kept.moment))


def _stored(step: Step, output: Any, needed: bool) -> Any:
    leaves, spec = tree_flatten(output)
    for i in step.leaves + step.repeated:
        if not needed and i in step.leaves:
            leaves[i] = leaves[i].new_zeros(()).expand_as(leaves[i])  # the shape in the memory of one number
        elif step.overwritten:
            leaves[i] = leaves[i].clone()
    return tree_unflatten(leaves, spec)


# ------------------------------------------------------------------------------------------- modules that are cached


class CachedModule:
    """Takes the place of a module's `forward`. It asks the cache of the call that is running, if there is one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")  # another `forward` that somebody had put on the module before
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the module's earlier call, or of its `forward`."""
        cache = _CACHE.get()
        if cache is None:
            return self._forward(*args, **kwargs)
        return cache.call(self.module, self._forward, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def make_cached(modules: Sequence[nn.Module]) -> None:
    """Let calls keep the outputs of these modules, until `undo_cached`."""
    for module in modules:
        wrapper = module.__dict__.get("forward")
        if not isinstance(wrapper, CachedModule):
            module.forward = wrapper = CachedModule(module)
        wrapper.users += 1


def undo_cached(modules: Sequence[nn.Module]) -> None:
    """Undo `make_cached`. A module is as it was before when its last user has done so."""
    for module in modules:
        wrapper = module.__dict__.get("forward")
        if isinstance(wrapper, CachedModule):
            wrapper.users -= 1
            if not wrapper.users and wrapper.own is not None:
                module.forward = wrapper.own
            elif not wrapper.users:
                del module.forward


_CACHE: ContextVar[ReplayCache | None] = ContextVar("the replay cache of the call that is running", default=None)


class RestartForward(BaseException):  # not an Exception: a backbone's own `except Exception` must not swallow it
    """Rows have left, and the forward pass must start again with the others."""


def run(backbone: nn.Module, images: Tensor, cache: ReplayCache) -> Tensor:
    """The backbone's output for the rows that are left at the end. `make_cached` was called for the modules of the cache."""
    token = _CACHE.set(cache)
    try:
        while True:
            try:
                return backbone(cache.start(images))
            except RestartForward:
                continue
    finally:
        _CACHE.reset(token)
