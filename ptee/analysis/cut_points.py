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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ptee._common.errors import CutError, unknown
from ptee.analysis.axes import Axes, AxisTracker, image_axes, layout_of, memory_of
from ptee.analysis.classifier import logits_of
from ptee.analysis.fake_run import with_fake_tensors
from ptee.analysis.layout import Layout
from ptee.analysis.replay import Step, select

SURVEY_ROWS = 3


@dataclass(frozen=True)
class Cut:
    """A cut point: a module, and what its output holds.

    Attributes:
        name: the module, as in `named_modules()`.
        shape: shape of the tensor that the head reads, without the batch.
        layout: how to read that tensor as (b, c, h, w).
        main: which of the output's tensors that is, counted through nested tuples, lists and dicts.
        carried: all tensors of the output that carry the batch. They lose their rows together.
        overwritten: whether something later writes into the memory of the output, so that a head that keeps it needs a copy.
        steps: which modules need not run again, if the forward pass must start again when rows leave here (`replay`). Empty
            if it need not start again, because the rows can be taken out of the output itself.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    main: int
    carried: tuple[int, ...]
    overwritten: bool
    steps: tuple[Step, ...] = ()

    def feature_map(self, output: Any) -> Tensor:
        """The tensor that the head reads, taken from the module's output."""
        return tree_flatten(output)[0][self.main]

    def select(self, output: Any, rows: Tensor) -> Any:
        """The module's output with only these rows of the batch.

        Args:
            output: the module's output: a tensor, or nested tuples, lists and dicts of tensors.
            rows: (kept,) positions in the batch as it is at this module.
        """
        return select(output, self.carried, rows, len(self.feature_map(output)))


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
    """

    cuts: dict[str, Cut]
    bypassed: dict[str, Cut]
    cells: set[str]
    steps: dict[str, tuple[Step, ...]]
    refused: dict[str, str]
    order: tuple[str, ...]
    classes: int

    def cut(self, name: str, backbone: nn.Module, bypassed: bool = False) -> Cut:
        """The cut at a module, or a CutError that says why there is none.

        Args:
            name: the module.
            backbone: the network that was surveyed.
            bypassed: accept every module of `bypassed`, not only cells.
        """
        if name in self.cuts:
            return self.cuts[name]
        if name in self.bypassed and (bypassed or name in self.cells):
            return self.bypassed[name]
        if name not in dict(backbone.named_modules(remove_duplicate=False)) or not name:
            raise unknown("module", name, self.cuts)
        reason = self.refused.get(name, "it is not called in the forward pass")
        raise CutError(f"No exit can stand at {name!r}: {reason}. {remedy(name, self.cuts)}")


@torch.inference_mode(False)  # inside of it torch shows the parts of an operator in place of the operator
def survey(module: nn.Module, input_size: tuple[int, int, int]) -> Survey:
    """Find all cut points of a network in one forward pass. A heavy network runs without computing its values.

    Args:
        module: a classifier in eval mode: (b, c, h, w) -> (b, K).
        input_size: (c, h, w).

    Raises:
        BackboneError: see `logits_of`.
    """
    return with_fake_tensors(_survey, module, random_images(module, SURVEY_ROWS, input_size))


def _survey(module: nn.Module, images: Tensor) -> Survey:
    recorder = _Recorder(images)
    names = {m: n for n, m in module.named_modules() if n}
    compound = {n for n, m in module.named_modules() if n and next(m.children(), None) is not None}
    with torch.no_grad(), recorder.recording(names):
        logits = logits_of(module, images)
        recorder.mark_answer(logits)
    outputs = recorder.first_outputs
    results = {output.name: recorder.cut_or_reason(output, output.name in compound) for output in outputs}
    found = {name: result for name, result in results.items() if isinstance(result, Cut)}
    strict = {output.name: recorder.cut_or_reason(output, may_restart=False) for output in outputs}
    return Survey(
        cuts={name: cut for name, cut in found.items() if not cut.steps},
        bypassed={name: cut for name, cut in found.items() if cut.steps},
        cells={output.name for output in outputs if output.name in found and recorder.is_cell(output)},
        steps={output.name: recorder.steps(output) for output in outputs if output.name in found},
        refused={name: reason for name, reason in strict.items() if isinstance(reason, str)},
        order=tuple(results),
        classes=logits.shape[1],
    )


def random_images(module: nn.Module, rows: int, input_size: tuple[int, int, int]) -> Tensor:
    """Noise (rows, c, h, w), each image with more contrast than the one before. The same at each call.

    The images have the device and type of the module's parameters.
    """
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros((), device="cpu"))
    noise = torch.randn(rows, *input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    noise = noise * torch.linspace(0.5, 1.5, rows, device="cpu")[:, None, None, None]
    return noise.to(like.device, like.dtype)


def remedy(name: str, cuts: dict[str, Cut]) -> str:
    """What to type instead: the smallest module around this one that is a cut point."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (outer := ".".join(parts[:end])) in cuts:
            return f"Use {outer!r}, which holds it."
    return "`ptee plan` lists where exits can stand."


# ---------------------------------------------------------------------------------------------------- the recording


@dataclass
class _Value:
    """The values in one piece of memory. They depend on the images. Times count operators; the images have time 0."""

    made_at: int
    made_by: str  # the innermost module that was running, "" outside of all
    last_read: int
    last_write: int

    def __str__(self) -> str:
        if self.made_at == 0:
            return "the image itself"
        return f"the output of {self.made_by!r}" if self.made_by else "what was made outside of any module"


@dataclass(frozen=True)
class _Output:
    """The output of one call of a module."""

    name: str
    outer_calls: tuple[int, ...]  # numbers of the calls that were still running, outermost first
    time: int
    leaves: list[Any]  # its tensors, as their shapes, and whatever else it holds
    values: list[_Value | None]  # of each leaf; None if it is no tensor, or does not depend on the images
    layouts: list[Layout | None]
    carries_rows: list[bool]  # of each leaf: whether its first axis starts with the rows of the batch

    @property
    def dependent(self) -> list[int]:
        """The leaves that depend on the images."""
        return [i for i, value in enumerate(self.values) if value is not None]

    @property
    def repeated(self) -> tuple[int, ...]:
        """The leaves that do not depend on the images but have as many rows: positions, masks."""
        return tuple(
            i
            for i, (leaf, value) in enumerate(zip(self.leaves, self.values, strict=True))
            if value is None and isinstance(leaf, tuple) and leaf[:1] == (SURVEY_ROWS,)
        )

    @property
    def overwritten(self) -> bool:
        """Whether something later writes into its memory."""
        return any(v is not None and v.last_write > self.time for v in self.values)


class _Recorder(TorchDispatchMode):
    """Records who makes and who reads each value that depends on the images, and follows the axes."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.time = 0
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
        """Record the operators that run inside, and the outputs of these modules."""
        handles = []
        try:
            for module, name in names.items():
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: self._leave(name, out)))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def mark_answer(self, logits: Tensor) -> None:
        """The network's answer is read after everything else."""
        if (value := self._find(logits)) is not None:
            value.last_read = self.time + 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.time += 1
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        known = [value for t in inputs if (value := self._find(t)) is not None]
        for value in known:
            value.last_read = self.time
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        if known:
            self._mark_dependent(func, args, kwargs or {}, outputs)
        self._axes.follow(func.overloadpacket.__name__, args, outputs)
        return out

    def _mark_dependent(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """The operator read something that depends on the images. So its outputs, and what it wrote in place, do too."""
        if func._schema.is_mutable:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = [named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
            for t in tree_flatten(written)[0]:
                if isinstance(t, Tensor):
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
        leaves = tree_flatten(output)[0]
        axes = [self._axes.get(leaf) for leaf in leaves]
        recorded = _Output(
            name,
            tuple(number for _, number in self._running),
            self.time,
            [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            [self._find(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves],
            [layout_of(a, leaf.shape) if a is not None else None for a, leaf in zip(axes, leaves, strict=True)],
            [isinstance(leaf, Tensor) and _carries_rows(leaf, a) for leaf, a in zip(leaves, axes, strict=True)],
        )
        self._outputs.append(recorded)
        if self._calls[name] == 1:
            self.first_outputs.append(recorded)

    # ------------------------------------------------------------------------------------------- what the recording says

    def cut_or_reason(self, output: _Output, may_restart: bool) -> Cut | str:
        """The cut at this output, or the reason why there is none.

        Args:
            output: of a module's first call.
            may_restart: if other values pass around the output, the pass may start again there.
        """
        if self._calls[output.name] > 1:
            return (
                f"it is called {self._calls[output.name]} times in one forward pass, and an exit must be reached once"
            )
        if not output.dependent:
            return "its output does not depend on the images"
        around = self._values_around(output)
        steps = self.steps(output) if around and may_restart else ()
        if around and not steps:
            return f"the rest of the network also reads {around[0]}, which passes around it"
        return self._cut_at(output, steps)

    def _cut_at(self, output: _Output, steps: tuple[Step, ...]) -> Cut | str:
        """The cut at an output around which nothing passes, or at which the pass starts again."""
        without_rows = [output.leaves[i] for i in output.dependent if not output.carries_rows[i]]
        if without_rows:
            return (
                f"the first axis of a tensor in its output, of shape {without_rows[0]}, is not the {SURVEY_ROWS} images"
            )
        readable = [i for i in output.dependent if output.layouts[i] is not None]
        if not readable:
            shape = output.leaves[output.dependent[0]]
            return f"images, channels and positions cannot be told apart in its output of shape {shape}"
        # Of several tensors the head reads the largest. If several are the largest, it reads the last of them.
        main = max(readable, key=lambda i: (np.prod(output.leaves[i]), i))
        layout = output.layouts[main]
        assert layout is not None
        carried = tuple(output.dependent)
        return Cut(output.name, output.leaves[main][1:], layout, main, carried, output.overwritten, steps)

    def steps(self, output: _Output) -> tuple[Step, ...]:
        """The calls that have ended at this output and need not run again if the pass starts again there.

        Only outermost calls: what ran inside of them does not run again either. Empty if one of them returned a tensor
        without the rows of the batch.
        """
        ended = self._outputs[: self._outputs.index(output) + 1]
        ended = [o for o in ended if o.dependent and o.outer_calls == output.outer_calls[: len(o.outer_calls)]]
        if any(not o.carries_rows[i] for o in ended for i in o.dependent):
            return ()
        around = {id(value) for value in self._values_around(output) if value.made_at}  # all but the images
        read = around | {id(output.values[i]) for i in output.dependent}
        returned = {id(o.values[i]) for o in ended for i in o.dependent}
        # A value that no call returned was computed between the calls, from any of their outputs. Then all are needed.
        all_needed = not read <= returned
        return tuple(
            Step(
                o.name,
                tuple(o.dependent),
                needed=all_needed or any(id(o.values[i]) in read for i in o.dependent),
                overwritten=o.overwritten,
                repeated=o.repeated,
            )
            for o in ended
        )

    def is_cell(self, output: _Output) -> bool:
        """Whether only the outputs of its siblings pass around it."""
        siblings = {id(v) for o in self._outputs if _parent(o.name) == _parent(output.name) for v in o.values}
        return all(id(value) in siblings for value in self._values_around(output))

    def _values_around(self, output: _Output) -> list[_Value]:
        """The values that pass around an output: made before it, read after it, and not part of it."""
        made_at, last_read = self._times
        passing = np.flatnonzero((made_at <= output.time) & (last_read > output.time))
        own = {id(output.values[i]) for i in output.dependent}
        return [self._values[i] for i in passing if id(self._values[i]) not in own]

    @cached_property
    def _times(self) -> np.ndarray[Any, Any]:
        return np.array([(v.made_at, v.last_read) for v in self._values]).T


def _carries_rows(tensor: Tensor, axes: Axes | None) -> bool:
    """Whether the first axis is the batch, or the batch with something else folded into it."""
    folded, rest = divmod(tensor.shape[0], SURVEY_ROWS) if tensor.dim() else (0, 1)
    if rest or folded <= 1:
        return not rest and folded == 1
    first = axes is not None and axes[0] and axes[0][0]  # if nothing is known, verification will tell
    return not first or (first.letter, first.size) == ("b", SURVEY_ROWS)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
