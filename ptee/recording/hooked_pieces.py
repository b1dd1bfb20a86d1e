"""Pieces that are recorded through the hooks, for models that `torch.export` cannot capture.

The model runs once for each size of batches while a GPU records what it is told. The hook at each cut runs the head, ends the
recording of this piece and begins that of the next. So code that looks at the number of rows is no obstacle: a recording has one
number. Code that looks at the values in the images is: nothing is computed while a GPU records.

A batch may begin a bucket in the middle, with what was alive at the cut in a larger one. `memory` sees to it that a piece reads
nothing else but what never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptee._common.errors import PteeError
from ptee.analysis.cut_points import Cut
from ptee.deploy.segments import Rows
from ptee.exits.heads import HeadOutput
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Call, running
from ptee.recording.buckets import Bucket, Buckets
from ptee.recording.graphs import Graphs, dense
from ptee.recording.memory import Memory


class HookedPieces(Buckets):
    """Runs batches through pieces that were recorded through the hooks."""

    how = "through the hooks of"

    def __init__(self, model: EarlyExitModel, max_batch: int, example: Tensor) -> None:
        exits = [n for n in range(len(model.exits)) if n not in model.plan.skipped]
        super().__init__(model, exits, max_batch, example)
        self._recorder = Graphs()
        self._without_heads: list[Bucket] = []  # which are kept as long as they may be repeated

    def replays_without_heads(self, rows: int) -> list[Callable[[], None]]:
        """What repeats each piece without its head, in a recording of its own."""
        bucket = self._empty(self.bucket_for(rows).size)
        self._without_heads.append(bucket)
        with torch.no_grad(), self._in_words(bucket):
            return self._parts(bucket, _Cuts)

    def _record(self, bucket: Bucket) -> None:
        bucket.replay.extend(self._parts(bucket, _Heads))
        bucket.constants = [(t, t.clone()) for t in bucket.made]  # outside of what recordings share

    def _parts(self, bucket: Bucket, kind: type[_Cuts]) -> list[Callable[[], None]]:
        """What repeats each piece of a pass of this kind."""
        try:
            return self._record_parts(bucket, kind)
        except PteeError as why:
            raise self._not_recorded(bucket, str(why)) from why

    def _record_parts(self, bucket: Bucket, kind: type[_Cuts]) -> list[Callable[[], None]]:
        return self._recorder.record_parts(lambda next_part: self._pass(kind(self, bucket, next_part)))

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
        bucket.made.extend(call.memory.constants.values())


class _Cuts(Call):
    """A pass that is recorded in pieces, without heads."""

    def __init__(self, pieces: HookedPieces, bucket: Bucket, next_part: Callable[[], None]) -> None:
        model = pieces.model
        super().__init__(model, bucket.size)
        self.skipped = model.plan.skipped
        self.pieces, self.bucket, self.next_part = pieces, bucket, next_part
        self.memory = Memory(bucket.images)

    def _at_exit(self, n: int, cut: Cut, output: Any, z: Tensor) -> Any:
        return self._end_piece(cut, output, [])

    def _end_piece(self, cut: Cut, output: Any, others: Sequence[Tensor]) -> Any:
        """End the recording of this piece. Gives what replaces the backbone's output, whose rows can be written one by one."""
        flat, spec = tree_flatten(output)
        for i in cut.carried:
            flat[i] = dense(flat[i])
        maps = [flat[i] for i in cut.carried]
        self.bucket.alive.append([*maps, *others])
        self.bucket.where.append([Rows(0, len(t) // self.bucket.size) for t in maps] + [Rows()] * len(others))
        self.memory.next_piece(self.bucket.alive[-1])
        with self.memory.unwatched():  # CUDA may note its random numbers
            self.next_part()
        return tree_unflatten(flat, spec)

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
        with self.memory.unwatched():
            staying = self.pieces._decided(piece, self.places, said.logits, said.confidence_logit, earlier)
        self.places = staying.rows
        self.bucket.staying.append(staying)
        return self._end_piece(cut, output, [*earlier.values(), said.logits] if self.keeps_logits else [])

    def at_end(self, answer: Tensor) -> None:
        """Take the answers of the rows that are left."""
        with self.memory.unwatched():
            self.pieces._ended(self.places, answer, self._earlier())
