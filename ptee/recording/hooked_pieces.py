"""Pieces that are recorded through the hooks, for models that `torch.export` cannot capture.

The model runs once for each size of batches while a GPU records what it is told. The hook at each cut runs the head, ends the
recording of this piece and begins that of the next. So code that looks at the number of rows is no obstacle: a recording has one
number. Code that looks at the values in the images is: nothing is computed while a GPU records.

By the definition of a cut all that later pieces read of the images goes through it. What does not depend on the images, such as
a mask made in the first piece, may be read later, too. A batch may begin a bucket in the middle, so such a value is computed once,
and its memory is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ptee._common.errors import PteeError
from ptee.analysis.arithmetic import tolerance
from ptee.analysis.axes import memory_of
from ptee.analysis.cut_points import Cut, random_images
from ptee.deploy.check import BATCHES, gap_between
from ptee.deploy.segments import Rows
from ptee.exits.heads import HeadOutput
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Call, running
from ptee.model.thresholds import NEVER
from ptee.recording.buckets import Bucket, Buckets
from ptee.recording.graphs import Graphs

Run = Callable[[Callable[[], None]], None]


class PartsRecorder(Protocol):
    """Records work that is done in one go as several parts."""

    def record_parts(self, run: Run) -> list[Callable[[], None]]:
        """See `Graphs`."""


class HookedPieces(Buckets):
    """Runs batches through pieces that were recorded through the hooks.

    Args:
        model, max_batch, example: as of `Buckets`.
    """

    def __init__(self, model: EarlyExitModel, max_batch: int, example: Tensor) -> None:
        exits = [n for n in range(len(model.exits)) if n not in model.plan.skipped]
        super().__init__(model, exits, max_batch, example)
        self._recorder: PartsRecorder = Graphs()
        self._without_heads: list[Bucket] = []  # which are kept as long as they may be repeated

    def replays_without_heads(self, rows: int) -> list[Callable[[], None]]:
        """What repeats each piece without its head, in a recording of its own."""
        bucket = self._empty(self.bucket_for(rows).size)
        self._without_heads.append(bucket)
        with torch.no_grad():
            return self._recorder.record_parts(lambda next_part: self._pass(_Cuts(self, bucket, next_part)))

    def _record(self, bucket: Bucket) -> None:
        bucket.replay.extend(self._recorder.record_parts(lambda next_part: self._pass(_Heads(self, bucket, next_part))))

    def _pass(self, call: _Cuts) -> None:
        """One pass of the bucket's images through the whole model."""
        bucket = call.bucket
        bucket.clear()
        with ExitStack() as stack:
            stack.enter_context(running(call))
            stack.enter_context(call.memory)
            answer = call.forward(self.model.backbone, bucket.images)
            call.check_all_passed()
            call.at_end(answer)
        bucket.kept.extend(call.memory.kept.values())


def check_recorded(model: EarlyExitModel, pieces: Buckets, max_batch: int) -> None:
    """Let rows leave at all exits, also where that makes smaller buckets of what is left, and compare all answers with the model's.

    Args:
        model: from which the pieces were made.
        pieces: recorded, to be checked as they are.
        max_batch: the largest batch that they take.

    Raises:
        PteeError: if an answer is another one.
    """
    ends = len(model.exits) + 1
    for b in (b for b in BATCHES if b <= max_batch):
        x = random_images(model.backbone, b, model.plan.input_size)
        for turn in range(2):  # what lies in memory is another image's by then
            exits = (torch.arange(b, device=x.device) + turn) % ends  # where each row is to leave
            for n in model.off:
                exits[exits == n] = ends - 1
            thresholds = [torch.where(exits == n, 0.0, NEVER).double() for n in range(ends - 1)]
            x = x.flip(0)
            with torch.no_grad():
                own = model.all_exits(x.clone())
                every = torch.cat([model.blended(own).logits[:-1], own.logits[-1:]])
                want = every[exits, torch.arange(b, device=x.device)]
            logits, left, *_ = pieces(x.clone(), thresholds)
            gap = gap_between(want, logits)
            if not (torch.equal(left, exits) and gap <= tolerance(x.dtype, x.device)):
                raise PteeError(
                    f"recorded, they give other answers to a batch of {b} (off by {gap:.1e}) than the model"
                )


class _Cuts(Call):
    """A pass that is recorded in pieces, without heads."""

    def __init__(self, pieces: HookedPieces, bucket: Bucket, next_part: Callable[[], None]) -> None:
        model = pieces.model
        super().__init__(model.exit_hooks, list(model.heads), model.plan, bucket.size)
        self.skipped = model.plan.skipped
        self.pieces, self.bucket, self.next_part = pieces, bucket, next_part
        self.memory = Memory()

    def _at_exit(self, n: int, cut: Cut, output: Any, z: Tensor) -> Any:
        self._end_piece(cut, output, [])

    def _end_piece(self, cut: Cut, output: Any, others: Sequence[Tensor]) -> None:
        flat = tree_flatten(output)[0]
        maps = [flat[i] for i in cut.carried]
        self.bucket.alive.append([*maps, *others])
        self.bucket.where.append([Rows(0, len(t) // self.bucket.size) for t in maps] + [Rows()] * len(others))
        self.memory.next_piece(self.bucket.alive[-1])
        self.next_part()

    def at_end(self, answer: Tensor) -> None:
        """Called with the backbone's answer."""


class _Heads(_Cuts):
    """A pass that is recorded in pieces."""

    def __init__(self, pieces: HookedPieces, bucket: Bucket, next_part: Callable[[], None]) -> None:
        super().__init__(pieces, bucket, next_part)
        self.keeps_logits |= pieces.rule.reads_earlier
        self.places = bucket.rows

    def _at_exit(self, n: int, cut: Cut, output: Any, z: Tensor) -> Any:
        return Call._at_exit(self, n, cut, output, z)

    def on_head_output(self, n: int, cut: Cut, output: Any, said: HeadOutput, earlier: Mapping[int, Tensor]) -> Any:
        """Decide who leaves, and end the piece."""
        piece = len(self.bucket.staying)
        staying = self.pieces._decided(piece, self.places, said.logits, said.confidence_logit, earlier)
        self.places = staying.rows
        self.bucket.staying.append(staying)
        self._end_piece(cut, output, [*earlier.values(), said.logits] if self.keeps_logits else [])

    def at_end(self, answer: Tensor) -> None:
        """Take the answers of the rows that are left."""
        self.pieces._ended(self.places, answer, self._earlier())


class Memory(TorchDispatchMode):
    """Holds the memory of what one piece makes and a later one reads, so that nothing else is ever written there.

    Attributes:
        kept: one tensor for each such piece of memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[StorageWeakRef, Tensor] = {}
        self._made: dict[StorageWeakRef, int] = {}  # in which piece
        self._moved: set[StorageWeakRef] = set()  # what is written anew before each piece that reads it
        self._piece = 0

    def next_piece(self, alive: Sequence[Tensor]) -> None:
        """From here on another piece runs, which is given these tensors."""
        self._piece += 1
        self._moved.update(map(memory_of, alive))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it reads and makes."""
        kwargs = kwargs or {}
        given = {memory_of(t): t for t in _tensors((args, kwargs))}
        for memory, tensor in given.items():
            if self._made.get(memory, self._piece) < self._piece:
                self.kept.setdefault(memory, tensor)
                if memory not in self._moved and memory in _written(func, args, kwargs):
                    raise PteeError(f"{func} writes into memory that an earlier piece has made")
        out = func(*args, **kwargs)
        for memory in map(memory_of, _tensors(out)):
            if memory not in given:  # neither a view nor what was written into
                self._made[memory] = self._piece
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[StorageWeakRef]:
    """The memory that an operator changes."""
    taken = func._schema.arguments
    values = {a.name: value for a, value in zip(taken, args, strict=False)} | dict(kwargs)
    changed = [values.get(a.name) for a in taken if a.alias_info is not None and a.alias_info.is_write]
    return set(map(memory_of, _tensors(changed)))
