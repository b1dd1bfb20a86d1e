"""Cut points: the places in a network at which rows of the batch can leave.

A cut point is a module whose output is all that the rest of the forward pass needs to know of the images. Nothing passes
around it. So rows can be taken out of this one output, and the rest of the pass runs on with fewer rows.

`survey` finds all cut points in one forward pass over three random images. It records every operator. For each value that
depends on the images it notes which module made it, and when it was read for the last time. The output of a module is a
cut point if no other such value was made before it and is read after it.

A recording does not see everything: the network's code may keep the number of rows in a Python variable, or read the same
memory through another view. Those cases are found with numbers (`analysis.verify`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ptee._common.errors import BackboneError, CutError, some, unknown
from ptee.analysis.axes import Axes, AxisTracker, image_axes, layout_of, memory_of
from ptee.analysis.classifier import logits_of, require_no_probabilities
from ptee.analysis.fake_run import (
    arguments,
    draws_random_numbers,
    note_operator,
    python_numbers,
    random_numbers_matter,
    who_draws,
    with_fake_tensors,
)
from ptee.analysis.freezing import hooked, one_parameter
from ptee.analysis.layout import Layout
from ptee.analysis.replay import Step, select, take

SURVEY_ROWS = 3
GOLDEN = 0.618  # multiples of the golden ratio, without their whole parts, spread over 0 to 1 in no order


@dataclass(frozen=True)
class Cut:
    """A cut point: a module, and what its output holds.

    Attributes:
        name: the module, as in `named_modules()`.
        shape: shape of the tensor that the head reads, without the batch.
        layout: of that tensor.
        main: which of the output's tensors that is, counted through nested tuples, lists and dicts.
        carried: all tensors of the output that carry the batch and are read later. They lose their rows together.
        overwritten: whether something later writes into the memory of the output, so that a head that keeps it needs a copy.
        steps: which modules need not run again, if the forward pass must start again when rows leave here (`replay`). Empty
            if it need not start again, because the rows can be taken out of the output itself.
        unread: those of which only the shape may be read later. They lose rows, too, but where an earlier cut left them whole.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    main: int
    carried: tuple[int, ...]
    overwritten: bool
    steps: tuple[Step, ...] = ()
    unread: tuple[int, ...] = ()

    def feature_map(self, output: Any) -> Tensor:
        """The tensor that the head reads, taken from the module's output."""
        return tree_flatten(output)[0][self.main]

    def select(self, output: Any, rows: Tensor) -> Any:
        """The module's output with only these rows: (kept,) positions in the batch as it is at this module."""
        tensors, batch = tree_flatten(output)[0], len(self.feature_map(output))
        unread = [i for i in self.unread if len(tensors[i]) % batch == 0]
        return select(output, [*self.carried, *unread], lambda t: take(t, rows, batch))


@dataclass(frozen=True)
class Survey:
    """What one forward pass showed.

    Attributes:
        cuts: the cut points by module name, in order of execution.
        bypassed: modules around which other values pass, but at which the pass can start again. They serve networks that
            have no better places. In order of execution.
        cells: those modules around which only the outputs of their siblings pass, as a cell reads the two cells before it.
        steps: for each module of `cuts` and `bypassed`, which modules need not run again if the pass must start again there.
            Empty if it cannot start again there.
        refused: for each module that ran and is not in `cuts`, the reason.
        order: all modules that ran, in order of execution.
        classes: K, the number of logits.
        operators: all that ran.
    """

    cuts: dict[str, Cut]
    bypassed: dict[str, Cut]
    cells: set[str]
    steps: dict[str, tuple[Step, ...]]
    refused: dict[str, str]
    order: tuple[str, ...]
    classes: int
    operators: list[Any] = field(compare=False)  # a fake run may take other ones

    def possible(self, passed: Collection[str] = ()) -> list[str]:
        """The modules at which an exit can stand, in order of execution: of those of `bypassed`, the cells and the ones in `passed`."""
        bypassed = {name for name in self.bypassed if name in self.cells or name in passed}
        return [name for name in self.order if name in self.cuts or name in bypassed]

    def cut(self, name: str, backbone: nn.Module, passed: Collection[str] = ()) -> Cut:
        """The cut at a module of the surveyed network, or a CutError that says why there is none (`possible`)."""
        possible = self.possible(passed)
        if name in possible:
            return self.cuts[name] if name in self.cuts else self.bypassed[name]
        if name not in dict(backbone.named_modules(remove_duplicate=False)) or not name:
            raise unknown("module", name, possible)
        reason = self.refused.get(name, "it is not called in the forward pass")
        raise CutError(f"No exit can stand at {name!r}: {reason}. {remedy(name, possible)}")


@torch.inference_mode(False)  # inside of it torch shows the parts of an operator in place of the operator
def survey(module: nn.Module, input_size: tuple[int, int, int]) -> Survey:
    """Find all cut points of a classifier in eval mode, in one forward pass over images of size (c, h, w)."""
    return with_fake_tensors(_survey, module, random_images(module, SURVEY_ROWS, input_size))


def _survey(module: nn.Module, images: Tensor) -> Survey:
    recorder, numbers = _Recorder(images), python_numbers()
    with torch.no_grad(), recorder.recording({m: n for n, m in module.named_modules() if n}):
        logits = logits_of(module, images)
        recorder.mark_answer(logits)
    require_no_probabilities(logits, type(module).__name__, recorder.operators)
    drawn = [recorder.random] if recorder.random else []
    drawn += [library for library, state in python_numbers().items() if state != numbers[library]]
    if drawn and random_numbers_matter(module, images):
        why = recorder.random or f"{who_draws(module, images)} draws random numbers ({drawn[0]})"
        raise BackboneError(
            f"{type(module).__name__} is random in eval mode: {why}. Let it be random only if self.training, as nn.Dropout is."
        )
    cuts: dict[str, Cut] = {}
    bypassed: dict[str, Cut] = {}
    refused: dict[str, str] = {}
    for output in (outputs := recorder.first_outputs):
        result = recorder.cut_or_reason(output)
        if isinstance(result, str):
            refused[output.name] = result
            if list(module.get_submodule(output.name).children()):
                result = recorder.cut_or_reason(output, may_restart=True)
        if isinstance(result, Cut):
            (bypassed if result.steps else cuts)[output.name] = result
    found = [output for output in outputs if output.name in cuts or output.name in bypassed]
    return Survey(
        cuts=cuts,
        bypassed=bypassed,
        cells={output.name for output in found if recorder.is_cell(output)},
        steps={output.name: recorder.steps(output) for output in found},
        refused=refused,
        order=tuple(output.name for output in outputs),
        classes=logits.shape[1],
        operators=recorder.operators,
    )


def random_images(module: nn.Module, rows: int, input_size: tuple[int, int, int]) -> Tensor:
    """Noise (rows, c, h, w) of contrasts from 1.5, the first, to 0.05, the last, in no order between. The same at each call.

    So code that orders rows by values, or looks if one is above 1, does not treat all alike. Device and type are the module's.
    """
    like, seeded = one_parameter(module), torch.Generator().manual_seed(0)
    noise = torch.randn(rows, *input_size, generator=seeded, dtype=torch.float32, device="cpu")
    shares = torch.arange(rows - 1, -1, -1, dtype=torch.float32, device="cpu") * GOLDEN % 1
    shares[0] = rows > 1
    return (noise * (0.05 + 1.45 * shares)[:, None, None, None]).to(like.device, like.dtype)


def remedy(name: str, possible: Collection[str]) -> str:
    """What to type instead: the smallest module around this one at which an exit can stand, or else all of these."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (outer := ".".join(parts[:end])) in possible:
            return f"Use {outer!r}, which holds it."
    return f"Exits can stand at {some(list(possible))}." if possible else "No exit can stand anywhere in this network."


# ---------------------------------------------------------------------------------------------------- the recording


@dataclass(eq=False)
class _Value:
    """The values in one piece of memory. They depend on the images. Times count operators; the images have time 0."""

    made_at: int
    made_by: str  # the innermost module that was running, "" outside of all
    last_read: int
    last_write: int


@dataclass(frozen=True)
class _Leaf:
    """A tensor in the output of a call. Its value is None if it does not depend on the images."""

    shape: tuple[int, ...]
    value: _Value | None
    layout: Layout | None
    is_floating: bool
    carries_rows: bool  # whether its first axis starts with the rows of the batch


@dataclass(frozen=True, eq=False)
class _Output:
    """The output of one call of a module."""

    name: str
    outer_calls: tuple[int, ...]  # numbers of the calls that were still running, outermost first
    time: int
    leaves: dict[int, _Leaf]  # its tensors, counted through nested tuples, lists and dicts

    @cached_property  # each is asked for at every module that ends later
    def dependent(self) -> dict[int, _Leaf]:
        """The leaves that depend on the images."""
        return {i: leaf for i, leaf in self.leaves.items() if leaf.value is not None}

    @property
    def read_later(self) -> dict[int, _Leaf]:
        """Those that the rest of the forward pass reads. What it does not read tells a head of nothing that the answer needs."""
        later = {i: leaf for i, leaf in self.dependent.items() if leaf.value and leaf.value.last_read > self.time}
        return later or self.dependent

    @cached_property
    def values(self) -> set[_Value]:
        """The values of the leaves that depend on the images."""
        return {leaf.value for leaf in self.leaves.values() if leaf.value is not None}

    @cached_property
    def repeated(self) -> tuple[int, ...]:
        """The leaves that do not depend on the images but have as many rows: positions, masks."""
        return tuple(i for i, leaf in self.leaves.items() if leaf.value is None and leaf.shape[:1] == (SURVEY_ROWS,))

    @cached_property
    def carries_rows(self) -> bool:
        """Whether all leaves that depend on the images carry the rows of the batch."""
        return all(leaf.carries_rows for leaf in self.dependent.values())

    @cached_property
    def overwritten(self) -> bool:
        """Whether something later writes into its memory."""
        return any(value.last_write > self.time for value in self.values)

    @cached_property
    def as_step(self) -> tuple[Step, Step]:
        """It as a step whose values the rest of the pass does not read, and as one whose values it reads."""
        unread = Step(self.name, tuple(self.dependent), False, self.overwritten, self.repeated)
        return unread, replace(unread, needed=True)

    @property
    def shared_and_overwritten(self) -> bool:
        """Whether something later writes into memory that several of its tensors share."""
        uses = Counter(leaf.value for leaf in self.dependent.values())
        return any(count > 1 and value is not None and value.last_write > self.time for value, count in uses.items())


class _Recorder(TorchDispatchMode):
    """Records who makes and who reads each value that depends on the images, and follows the axes."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.time = 0
        self.operators: list[Any] = []
        self.random = ""  # the first random number that is drawn, in words
        self.first_outputs: list[_Output] = []  # of the first call of each module
        self._outputs: list[_Output] = []  # of all calls, in the order in which they ended
        self._calls: Counter[str] = Counter()
        self._running: list[tuple[str, int]] = []  # modules, and the numbers of their calls
        self._values: list[_Value] = []
        self._in_memory: dict[StorageWeakRef, _Value] = {}
        self._axes = AxisTracker(len(images))
        self._axes.set(images, image_axes(images.shape))
        self._add(images)

    @contextmanager
    def recording(self, names: dict[nn.Module, str]) -> Iterator[None]:
        """Record the operators that run inside of this context, and the outputs of these modules."""
        begin = {module: partial(self._enter, name) for module, name in names.items()}
        end = {module: partial(self._leave, name) for module, name in names.items()}
        with hooked(end, begin), self:
            yield

    def mark_answer(self, logits: Tensor) -> None:
        """The network's answer is read after everything else."""
        if (value := self._find(logits)) is not None:
            value.last_read = self.time + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.time += 1
        note_operator(self.operators, func, args)
        outputs = tensors_in(out)
        known = [value for t in tensors_in((args, kwargs)) if (value := self._find(t)) is not None]
        for value in known:
            value.last_read = self.time
        if known:
            self._mark_dependent(func, args, kwargs, outputs)
        self._axes.follow(func.overloadpacket.__name__, args, outputs)
        if not self.random and draws_random_numbers(func, args, kwargs, out):
            where = repr(self._running[-1][0]) if self._running else "its own forward"
            self.random = f"{where} draws random numbers ({func})"
        return out

    def _mark_dependent(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """The operator read something that depends on the images. So its outputs, and what it wrote in place, do too."""
        for t in written_by(func, args, kwargs):
            (self._find(t) or self._add(t)).last_write = self.time
        for t in outputs:
            if self._find(t) is None:
                self._add(t)

    def _add(self, tensor: Tensor) -> _Value:
        value = _Value(self.time, self._running[-1][0] if self._running else "", self.time, self.time)
        self._values.append(value)
        self._in_memory[memory_of(tensor)] = value
        return value

    def _find(self, tensor: Tensor) -> _Value | None:
        return self._in_memory.get(memory_of(tensor))

    def _enter(self, name: str) -> None:
        self._calls[name] += 1
        self._running.append((name, self._calls.total()))

    def _leave(self, name: str, output: Any) -> None:
        self._running.pop()
        leaves = {i: self._leaf(t) for i, t in enumerate(tree_flatten(output)[0]) if isinstance(t, Tensor)}
        recorded = _Output(name, tuple(number for _, number in self._running), self.time, leaves)
        self._outputs.append(recorded)
        if self._calls[name] == 1:
            self.first_outputs.append(recorded)

    def _leaf(self, tensor: Tensor) -> _Leaf:
        axes, shape = self._axes.get(tensor), tuple(tensor.shape)
        layout = layout_of(axes, shape) if axes is not None else None
        return _Leaf(shape, self._find(tensor), layout, tensor.is_floating_point(), _carries_rows(shape, axes))

    # ------------------------------------------------------------------------------------------- what the recording says

    def cut_or_reason(self, output: _Output, may_restart: bool = False) -> Cut | str:
        """The cut at the output of a module's first call, or the reason why there is none.

        With `may_restart`, values may pass around the output if the pass can start again there.
        """
        if (calls := self._calls[output.name]) > 1:
            return f"it is called {calls} times in one forward pass, and an exit must be reached once"
        if not output.dependent:
            return "its output does not depend on the images"
        around = self._values_around(output)
        steps = self.steps(output) if around and may_restart else ()
        if around and not steps:
            return f"the rest of the network also reads {self._words(around[0])}, which passes around it"
        return _cut_at(output, steps)

    def steps(self, output: _Output) -> tuple[Step, ...]:
        """The outermost calls that have ended at this output and need not run again if the pass starts again there.

        Empty if one of them returned a tensor without the rows of the batch.
        """
        ended = self._outputs[: self._outputs.index(output) + 1]
        ended = [o for o in ended if o.dependent and o.outer_calls == output.outer_calls[: len(o.outer_calls)]]
        if not all(o.carries_rows for o in ended):
            return ()
        around = {value for value in self._values_around(output) if value.made_at}  # all but the images
        read = around | output.values
        # A value that no call returned was computed between the calls, from any of their outputs. Then all are needed.
        all_needed = not read <= set().union(*(o.values for o in ended))
        return tuple(o.as_step[all_needed or not o.values.isdisjoint(read)] for o in ended)

    def is_cell(self, output: _Output) -> bool:
        """Whether only the outputs of its siblings pass around it."""
        if not (around := self._values_around(output)):
            return True
        parent = output.name.rpartition(".")[0]
        siblings = [o.values for o in self._outputs if o.name.rpartition(".")[0] == parent]
        return set().union(*siblings).issuperset(around)

    def _values_around(self, output: _Output) -> list[_Value]:
        """The values that pass around an output: made before it, read after it, and not part of it."""
        made_at, last_read = self._times
        passing = np.flatnonzero((made_at <= output.time) & (last_read > output.time))
        own = output.values
        return [self._values[i] for i in passing if self._values[i] not in own]

    def _words(self, value: _Value) -> str:
        if not value.made_at:
            return "the image itself"
        if not (maker := value.made_by):
            return "what was made outside of any module"
        given = any(value in output.values for output in self._outputs if output.name == maker)
        return f"{'the output of' if given else 'what was made inside of'} {maker!r}"

    @cached_property
    def _times(self) -> np.ndarray[Any, Any]:
        return np.array([(v.made_at, v.last_read) for v in self._values]).T


def _cut_at(output: _Output, steps: tuple[Step, ...]) -> Cut | str:
    """The cut at an output around which nothing passes, or at which the pass starts again."""
    read = output.read_later
    if without_rows := [leaf.shape for leaf in read.values() if not leaf.carries_rows]:
        return f"the first axis of a tensor in its output, of shape {without_rows[0]}, is not the {SURVEY_ROWS} images"
    if output.shared_and_overwritten:
        return "tensors in its output share memory that is written into later, and rows are taken out of each by itself"
    readable = {i: leaf for i, leaf in read.items() if leaf.layout is not None}
    if not readable:
        shape = next(iter(read.values())).shape
        return f"images, channels and positions cannot be told apart in its output of shape {shape}"
    # Of several tensors the head reads the largest, and the last of several largest ones. A mask is read only if there is no other.
    main = max(readable, key=lambda i: (readable[i].is_floating, prod(readable[i].shape), i))
    layout = readable[main].layout
    assert layout is not None
    unread = tuple(i for i, leaf in output.dependent.items() if i not in read and leaf.carries_rows)
    return Cut(output.name, readable[main].shape[1:], layout, main, tuple(read), output.overwritten, steps, unread)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator changes."""
    if not func._schema.is_mutable:
        return []
    named = arguments(func, args, kwargs)
    return tensors_in([named[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write])


def _carries_rows(shape: tuple[int, ...], axes: Axes | None) -> bool:
    """Whether the first axis is the batch, or the batch with something else folded into it."""
    folded, rest = divmod(shape[0], SURVEY_ROWS) if shape else (0, 1)
    if rest or folded <= 1:
        return not rest and folded == 1
    first = axes is not None and axes[0] and axes[0][0]  # if nothing is known, verification will tell
    return not first or (first.letter, first.size) == ("b", SURVEY_ROWS)
