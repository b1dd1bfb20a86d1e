"""Cuts: modules on whose output alone everything later depends.

One forward pass over three random images is enough to find them all. `survey` notes every operator of it, who made each
value that depends on the images and when it was read last. A module's output is a cut when nothing else that depends
on the images is read after it. What such a reading cannot see (a row count kept in a Python number, views of one memory)
the proof sees (`proof`).
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
    """A module's output through which everything passes.

    Attributes:
        name: the module, as in `named_modules()`.
        shape: of the tensor that the head reads, of one sample.
        layout: how to read that tensor as (b, c, h, w).
        main: which of the output's tensors that is, counted through nested tuples, lists and dicts.
        carried: all tensors of the output that carry the batch; they shrink together.
        overwritten: something later writes into that memory, so a head that keeps it needs a copy.
        steps: what need not run again where the forward pass must begin anew when rows go here (`replay`); none where
            the rows can go at the output itself.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    main: int
    carried: tuple[int, ...]
    overwritten: bool
    steps: tuple[Step, ...] = ()

    def feature_map(self, output: Any) -> Tensor:
        """The tensor that the head reads, out of what the module gave."""
        return tree_flatten(output)[0][self.main]

    def select(self, output: Any, rows: Tensor) -> Any:
        """The module's output with only these rows of the batch.

        Args:
            output: what the module gave: a tensor, or nested tuples, lists and dicts of tensors.
            rows: (kept,) positions in the batch as it is at this module.
        """
        return select(output, self.carried, rows, len(self.feature_map(output)))


@dataclass(frozen=True)
class Survey:
    """What one forward pass showed.

    Attributes:
        cuts: by module name, in order of execution.
        bypassed: modules past whose output something else is read, at which the pass can begin anew; for networks that
            have nothing better. In order of execution.
        cells: those of them past which only modules beside them are read, as a cell reads the two before it.
        steps: of each cut, should the rest of the pass remember the old batch; none where it cannot begin anew.
        refused: why each module that ran is none of `cuts`.
        order: all modules that ran, in order of execution.
        classes: K, the width of the answer.
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
            name: of the module.
            backbone: that was surveyed.
            bypassed: anything may be read past it, not only what a cell reads.
        """
        if name in self.cuts:
            return self.cuts[name]
        if name in self.bypassed and (bypassed or name in self.cells):
            return self.bypassed[name]
        if name not in dict(backbone.named_modules(remove_duplicate=False)) or not name:
            raise unknown("module", name, self.cuts)
        reason = self.refused.get(name, "it is not called in the forward pass")
        raise CutError(f"No exit can stand at {name!r}: {reason}. {remedy(name, self.cuts)}")


@torch.inference_mode(False)  # in which torch shows operators as they are written, not those that they are made of
def survey(module: nn.Module, input_size: tuple[int, int, int]) -> Survey:
    """Find all cuts of a network in one forward pass; of a heavy one, without computing it.

    Args:
        module: a classifier in eval mode: (b, c, h, w) -> (b, K).
        input_size: (c, h, w).

    Raises:
        BackboneError: as of `logits_of`.
    """
    return with_fake_tensors(_survey, module, random_images(module, SURVEY_ROWS, input_size))


def _survey(module: nn.Module, images: Tensor) -> Survey:
    recorder = _Recorder(images)
    names = {m: n for n, m in module.named_modules() if n}
    compound = {n for n, m in module.named_modules() if n and next(m.children(), None) is not None}
    with torch.no_grad(), recorder.listening(names):
        logits = logits_of(module, images)
        recorder.read(logits)
    verdicts = {event.name: recorder.verdict(event, bypass=event.name in compound) for event in recorder.events}
    found = {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, Cut)}
    refused = {event.name: recorder.verdict(event, bypass=False) for event in recorder.events}
    return Survey(
        cuts={name: cut for name, cut in found.items() if not cut.steps},
        bypassed={name: cut for name, cut in found.items() if cut.steps},
        cells={event.name for event in recorder.events if event.name in found and recorder.is_cell(event)},
        steps={event.name: recorder.steps(event) for event in recorder.events if event.name in found},
        refused={name: why for name, why in refused.items() if isinstance(why, str)},
        order=tuple(verdicts),
        classes=logits.shape[1],
    )


def random_images(module: nn.Module, rows: int, input_size: tuple[int, int, int]) -> Tensor:
    """Noise of growing contrast (rows, c, h, w), with the module's own device and type, the same at each call."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.randn(rows, *input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    noise = noise * torch.linspace(0.5, 1.5, rows, device="cpu")[:, None, None, None]
    return noise.to(like.device, like.dtype)


def remedy(name: str, cuts: dict[str, Cut]) -> str:
    """What to type instead: the smallest enclosing module that is a cut."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (outer := ".".join(parts[:end])) in cuts:
            return f"Use {outer!r}, which holds it."
    return "`ptee plan` lists where exits can stand."


# ---------------------------------------------------------------------------------------------------- the survey


@dataclass
class _Value:
    """A piece of memory that depends on the images, from when it got its values until they were read last."""

    birth: int
    maker: str
    last_read: int
    last_write: int


@dataclass(frozen=True)
class _Event:
    """A module has given its output."""

    name: str
    around: tuple[int, ...]  # numbers of the calls inside of which it was called
    time: int
    leaves: list[Any]
    values: list[_Value | None]  # of each leaf; None: no tensor, or one that does not depend on the images
    layouts: list[Layout | None]
    carries: list[bool]  # of each leaf: whether the rows lie in front, each in one piece

    @property
    def own(self) -> list[int]:
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
        """Something writes into its memory later."""
        return any(v is not None and v.last_write > self.time for v in self.values)


class _Recorder(TorchDispatchMode):
    """Notes who makes and who reads each value that depends on the images, and where the axes go."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.time = 0
        self.events: list[_Event] = []  # of the first call of each module
        self._ended: list[_Event] = []  # of all calls, in the order of their ends
        self._calls: Counter[str] = Counter()
        self._inside: list[tuple[str, int]] = []  # modules that are running, and the numbers of their calls
        self._values: list[_Value] = []
        self._current: dict[StorageWeakRef, _Value] = {}
        self._axes = AxisTracker(len(images))
        self._axes.set(images, image_axes(images.shape))
        self._make(images)

    @contextmanager
    def listening(self, names: dict[nn.Module, str]) -> Iterator[None]:
        """Note what happens inside, and when each of these modules has given its output."""
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

    def read(self, answer: Tensor) -> None:
        """The network's answer is read when all is done."""
        if (value := self._find(answer)) is not None:
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
            self._depend(func, args, kwargs or {}, outputs)
        self._axes.follow(func.overloadpacket.__name__, args, outputs)
        return out

    def _depend(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        """Outputs and whatever is written in place now depend on the images."""
        if func._schema.is_mutable:
            named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = [named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
            for t in tree_flatten(written)[0]:
                if isinstance(t, Tensor):
                    (self._find(t) or self._make(t)).last_write = self.time
        for t in outputs:
            if self._find(t) is None:
                self._make(t)

    def _make(self, tensor: Tensor) -> _Value:
        value = _Value(self.time, self._inside[-1][0] if self._inside else "", self.time, self.time)
        self._values.append(value)
        self._current[memory_of(tensor)] = value
        return value

    def _find(self, tensor: Tensor) -> _Value | None:
        return self._current.get(memory_of(tensor))

    def _enter(self, name: str) -> None:
        self._calls[name] += 1
        self._inside.append((name, self._calls.total()))

    def _leave(self, name: str, output: Any) -> None:
        self._inside.pop()
        leaves = tree_flatten(output)[0]
        axes = [self._axes.get(leaf) for leaf in leaves]
        event = _Event(
            name,
            tuple(number for _, number in self._inside),
            self.time,
            [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            [self._find(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves],
            [layout_of(a, leaf.shape) if a is not None else None for a, leaf in zip(axes, leaves, strict=True)],
            [isinstance(leaf, Tensor) and _carries_rows(leaf, a) for leaf, a in zip(leaves, axes, strict=True)],
        )
        self._ended.append(event)
        if self._calls[name] == 1:
            self.events.append(event)

    def verdict(self, event: _Event, bypass: bool) -> Cut | str:
        """The cut at this module's output, or why there is none; `bypass`: other values may be read past it."""
        if self._calls[event.name] > 1:
            return (
                f"it is called {self._calls[event.name]} times in one forward pass, and its exit would fire each time"
            )
        if not event.own:
            return "its output does not depend on the images"
        stale = self._stale(event)
        steps = self.steps(event) if stale and bypass else ()
        if stale and not steps:
            made = f"the output of {stale[0].maker!r}" if stale[0].maker else "what was made outside of any module"
            made = "the image itself" if stale[0].birth == 0 else made
            return f"what comes later also reads {made}, which passes around it"
        if odd := [event.leaves[i] for i in event.own if not event.carries[i]]:
            return f"its output has a tensor of shape {odd[0]} that does not carry the {SURVEY_ROWS} rows in front"
        readable = [i for i in event.own if event.layouts[i] is not None]
        if not readable:
            shape = event.leaves[event.own[0]]
            return f"no rows, channels and positions could be told apart in its output of shape {shape}"
        # Of several tensors the head reads the largest; of equals, the last.
        main = max(readable, key=lambda i: (np.prod(event.leaves[i]), i))
        layout = event.layouts[main]
        assert layout is not None
        return Cut(event.name, event.leaves[main][1:], layout, main, tuple(event.own), event.overwritten, steps)

    def steps(self, event: _Event) -> tuple[Step, ...]:
        """What is over when this module has given its output, outermost modules only; none where that holds no rows."""
        over = self._ended[: self._ended.index(event) + 1]
        over = [e for e in over if e.own and e.around == event.around[: len(e.around)]]
        if any(not e.carries[i] for e in over for i in e.own):
            return ()
        read = {id(value) for value in self._stale(event) if value.birth} | {id(event.values[i]) for i in event.own}
        given = {id(e.values[i]) for e in over for i in e.own}
        return tuple(
            Step(
                e.name,
                tuple(e.own),
                needed=not read <= given or any(id(e.values[i]) in read for i in e.own),
                overwritten=e.overwritten,
                repeated=e.repeated,
            )
            for e in over
        )

    def is_cell(self, event: _Event) -> bool:
        """Past it, only outputs of modules beside it are read."""
        beside = {id(v) for e in self._ended if _parent(e.name) == _parent(event.name) for v in e.values}
        return all(id(value) in beside for value in self._stale(event))

    @cached_property
    def _times(self) -> np.ndarray[Any, Any]:
        return np.array([(v.birth, v.last_read) for v in self._values]).T

    def _stale(self, event: _Event) -> list[_Value]:
        """Values made before this output and read after it, though not part of it."""
        born, read = self._times
        alive = np.flatnonzero((born <= event.time) & (read > event.time))
        own = {id(event.values[i]) for i in event.own}
        return [self._values[i] for i in alive if id(self._values[i]) not in own]


def _carries_rows(tensor: Tensor, axes: Axes | None) -> bool:
    packed, rest = divmod(tensor.shape[0], SURVEY_ROWS) if tensor.dim() else (0, 1)
    if rest or packed <= 1:
        return not rest and packed == 1
    known = axes is not None and axes[0] and axes[0][0]  # where nothing is known, the proof will tell
    return not known or (known.letter, known.size) == ("b", SURVEY_ROWS)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
