"""Cuts: modules on whose output alone everything later depends.

One forward pass over three random images is enough to find them all. `survey` notes every operator of it, who made each
value that depends on the images and when it was read last. A module's output is a cut when nothing else that depends
on the images is read after it. What such a reading cannot see (a row count kept in a Python number, views of one memory)
the proof sees: `prove` lets rows go at the cut and requires that the rest of the pass answers exactly those that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptee.errors import BackboneError, CutError, first_line, unknown
from ptee.layout import AxisTracker, Layout, image_axes, layout_of

SURVEY_ROWS = 3
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4}  # of the largest logit; half precision: 3e-2
KEPT = 2  # rows left in a proof: one alone would broadcast past a skip connection that carries the old rows


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
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    main: int
    carried: tuple[int, ...]
    overwritten: bool

    def feature_map(self, output: Any) -> Tensor:
        """The tensor that the head reads, out of what the module gave."""
        return tree_flatten(output)[0][self.main]

    def select(self, output: Any, rows: Tensor) -> Any:
        """The module's output with only these rows of the batch.

        Args:
            output: what the module gave: a tensor, or nested tuples, lists and dicts of tensors.
            rows: (kept,) positions in the batch as it is at this module.
        """
        leaves, spec = tree_flatten(output)
        for i in self.carried:
            leaves[i] = leaves[i][rows]  # index_select would lose channels_last
        return tree_unflatten(leaves, spec)


@dataclass(frozen=True)
class Survey:
    """What one forward pass showed.

    Attributes:
        cuts: by module name, in order of execution.
        refused: why each other module that ran is no cut.
        classes: K, the width of the answer.
    """

    cuts: dict[str, Cut]
    refused: dict[str, str]
    classes: int

    def cut(self, name: str, backbone: nn.Module) -> Cut:
        """The cut at a module, or a CutError that says why there is none."""
        if name in self.cuts:
            return self.cuts[name]
        if name not in dict(backbone.named_modules(remove_duplicate=False)) or not name:
            raise unknown("module", name, self.cuts)
        reason = self.refused.get(name, "it is not called in the forward pass")
        raise CutError(f"No exit can stand at {name!r}: {reason}. {remedy(name, self.cuts)}")


def survey(module: nn.Module, input_size: tuple[int, int, int]) -> Survey:
    """Find all cuts of a network in one forward pass.

    Args:
        module: a classifier in eval mode: (b, c, h, w) -> (b, K).
        input_size: (c, h, w).

    Raises:
        BackboneError: if the forward pass fails, or gives something else than one tensor (b, K).
    """
    images = random_images(module, SURVEY_ROWS, input_size)
    recorder = _Recorder(images)
    names = {m: n for n, m in module.named_modules() if n}
    with torch.no_grad(), recorder.listening(names):
        answer = _answer(module, images)
        recorder.read(answer)
    cuts, refused = {}, {}
    for event in recorder.events:
        verdict = recorder.verdict(event)
        if isinstance(verdict, Cut):
            cuts[event.name] = verdict
        else:
            refused[event.name] = verdict
    return Survey(cuts, refused, answer.shape[1])


def prove(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, str]:
    """Let rows go at each cut, and require that the network answers exactly those that are left.

    All cuts are tried in one pass, each of which takes one row away; only if that fails are they tried one by one.

    Args:
        module: the network in eval mode.
        cuts: what to prove, in order of execution.
        input_size: (c, h, w).

    Returns:
        Why each cut that failed is none, by name; empty when all are proven.

    Raises:
        BackboneError: if rows of one batch change one another's answers even without a cut.
    """
    reference = _Reference.of(module, random_images(module, len(cuts) + KEPT, input_size))
    reference.check_independence()
    if not cuts or reference.objection(cuts) is None:
        return {}
    reference = _Reference.of(module, random_images(module, KEPT + 2, input_size))
    return {cut.name: reason for cut in cuts if (reason := reference.objection([cut])) is not None}


def random_images(module: nn.Module, rows: int, input_size: tuple[int, int, int]) -> Tensor:
    """Noise of growing contrast (rows, c, h, w), with the module's own device and type, the same at each call."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.randn(rows, *input_size, generator=torch.Generator().manual_seed(0))
    noise = noise * torch.linspace(0.5, 1.5, rows)[:, None, None, None]
    return noise.to(like.device, like.dtype)


def _answer(module: nn.Module, images: Tensor) -> Tensor:
    kind, size = type(module).__name__, tuple(images.shape[1:])
    try:
        answer = module(images)
    except Exception as why:
        raise BackboneError(
            f"{kind} fails on images of size {size}: {first_line(why)} Give the size it takes: input_size=(c, h, w)."
        ) from why
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != len(images):
        got = f"shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise BackboneError(
            f"{kind} gives {got} for {len(images)} images; a classifier gives one tensor (b, K). "
            "Wrap it in a module that returns its logits."
        )
    return answer


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
    time: int
    leaves: list[Any]
    values: list[_Value | None]  # of each leaf; None: no tensor, or one that does not depend on the images
    layouts: list[Layout | None]
    calls: list[int] = field(default_factory=lambda: [1])


class _Recorder(TorchDispatchMode):
    """Notes who makes and who reads each value that depends on the images, and where the axes go."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.time = 0
        self.events: list[_Event] = []
        self._by_name: dict[str, _Event] = {}
        self._inside: list[str] = []
        self._values: list[_Value] = []
        self._current: dict[int, _Value] = {}
        self._axes = AxisTracker()
        self._axes.set(images, image_axes(images.shape))
        self._make(images)

    @contextmanager
    def listening(self, names: dict[nn.Module, str]) -> Iterator[None]:
        """Note what happens inside, and when each of these modules has given its output."""
        handles = []
        try:
            for module, name in names.items():
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
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
        memories = {_memory(t) for t in inputs}
        for t in outputs:
            if _memory(t) not in memories:
                self._current.pop(_memory(t), None)
                self._axes.forget(t)
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
        value = _Value(self.time, self._inside[-1] if self._inside else "", self.time, self.time)
        self._values.append(value)
        self._current[_memory(tensor)] = value
        return value

    def _find(self, tensor: Tensor) -> _Value | None:
        return self._current.get(_memory(tensor))

    def _leave(self, name: str, output: Any) -> None:
        self._inside.pop()
        if name in self._by_name:
            self._by_name[name].calls[0] += 1
            return
        leaves = tree_flatten(output)[0]
        values = [self._find(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
        axes = [self._axes.get(leaf) for leaf in leaves]
        layouts = [layout_of(a, leaf.shape) if a is not None else None for a, leaf in zip(axes, leaves, strict=True)]
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        event = _Event(name, self.time, shapes, values, layouts)
        self.events.append(event)
        self._by_name[name] = event

    def verdict(self, event: _Event) -> Cut | str:
        """The cut at this module's output, or why there is none."""
        if event.calls[0] > 1:
            return f"it is called {event.calls[0]} times in one forward pass, and its exit would fire each time"
        own = [i for i, value in enumerate(event.values) if value is not None]
        if not own:
            return "its output does not depend on the images"
        stale = self._stale(event, {id(event.values[i]) for i in own})
        if stale is not None:
            made = f"the output of {stale.maker!r}" if stale.maker else "what was made outside of any module"
            made = "the image itself" if stale.birth == 0 else made
            return f"what comes later also reads {made}, which passes around it"
        odd = [event.leaves[i] for i in own if not event.leaves[i] or event.leaves[i][0] != SURVEY_ROWS]
        if odd:
            return f"its output has a tensor of shape {odd[0]} that does not carry the {SURVEY_ROWS} rows in front"
        readable = [i for i in own if event.layouts[i] is not None]
        if not readable:
            return f"no rows, channels and positions could be told apart in its output of shape {event.leaves[own[0]]}"
        # Of several tensors the head reads the largest; of equals, the last.
        main = max(readable, key=lambda i: (np.prod(event.leaves[i]), i))
        layout = event.layouts[main]
        assert layout is not None
        overwritten = any(v is not None and v.last_write > event.time for v in event.values)
        return Cut(event.name, event.leaves[main][1:], layout, main, tuple(own), overwritten)

    def _stale(self, event: _Event, own: set[int]) -> _Value | None:
        """A value made before this output and read after it, though not part of it."""
        if not hasattr(self, "_times"):
            self._times = np.array([(v.birth, v.last_read) for v in self._values]).T
        born, read = self._times
        alive = np.flatnonzero((born <= event.time) & (read > event.time))
        return next((self._values[i] for i in alive if id(self._values[i]) not in own), None)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---------------------------------------------------------------------------------------------------- the proof


@dataclass(frozen=True)
class _Reference:
    """The answers of a whole batch, and how near to them the same rows must come."""

    module: nn.Module
    images: Tensor
    answers: Tensor
    tolerance: float

    @classmethod
    def of(cls, module: nn.Module, images: Tensor) -> _Reference:
        reference = cls._in_own_precision(module, images)
        if reference._rows_differ():
            return reference
        # Untrained networks can answer almost the same for every image; float64 still tells the rows apart.
        try:
            return cls._in_own_precision(copy.deepcopy(module).double(), images.double())
        except Exception:  # it cannot be copied, or casts to a type of its own
            return reference

    @classmethod
    def _in_own_precision(cls, module: nn.Module, images: Tensor) -> _Reference:
        with torch.no_grad():
            answers = _answer(module, images)
        tolerance = TOLERANCES.get(answers.dtype, 3e-2) * max(answers.abs().max().item(), 1e-30)
        return cls(module, images, answers, tolerance)

    def _rows_differ(self) -> bool:
        n = len(self.answers)
        gaps = [(self.answers[i] - self.answers[j]).abs().max().item() for i in range(n) for j in range(i)]
        return min(gaps) > 10 * self.tolerance

    def check_independence(self) -> None:
        """The same rows in a smaller batch must get the same answers."""
        with torch.no_grad():
            gap = (self.answers[-KEPT:] - _answer(self.module, self.images[-KEPT:])).abs().max().item()
        if not gap <= self.tolerance:
            raise BackboneError(
                f"{type(self.module).__name__} answers the same image differently in another batch (off by {gap:.1e}): "
                "its rows influence one another, so none of them can leave early."
            )

    def objection(self, cuts: Sequence[Cut]) -> str | None:
        """Why these are no cuts, or None where the proof succeeds: the first rows leave, as many at each."""
        images = self.images
        leaving = (len(images) - KEPT) // len(cuts)

        def hook(cut: Cut) -> Any:
            def drop(_module: nn.Module, _args: Any, output: Any) -> Any:
                here = len(cut.feature_map(output))
                return cut.select(output, torch.arange(leaving, here, device=images.device))

            return self.module.get_submodule(cut.name).register_forward_hook(drop)

        handles = [hook(cut) for cut in cuts]
        try:
            with torch.no_grad():
                got = self.module(images)
        except Exception as why:  # whatever the network's own code raises on fewer rows
            return f"the rest of the forward pass fails with fewer rows ({first_line(why).rstrip('.')})"
        finally:
            for handle in handles:
                handle.remove()
        if got.shape != self.answers[-KEPT:].shape:
            return f"with {KEPT} rows left the network still answers with shape {tuple(got.shape)}"
        gap = (got - self.answers[-KEPT:]).abs().max().item()
        if not gap <= self.tolerance:
            return f"resuming from it gives logits off by {gap:.1e} (allowed: {self.tolerance:.1e})"
        return None
