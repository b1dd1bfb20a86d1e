"""Recorded pieces that `torch.export` gives (`segments`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptee.deploy.segments import Segment, without_head
from ptee.model.early_exit import EarlyExitModel
from ptee.recording.buckets import Bucket, Buckets
from ptee.recording.decision import Staying
from ptee.recording.graphs import Graphs, Recorder, Rerun, dense

Piece = Callable[..., Any]


class ExportedPieces(Buckets):
    """Runs batches through recorded segments of a model. `compiled` compiles a piece; None: pieces run as they are."""

    def __init__(
        self,
        model: EarlyExitModel,
        segments: Sequence[Segment],
        max_batch: int,
        example: Tensor,
        compiled: Callable[[Piece], Piece] | None = None,
    ) -> None:
        super().__init__(model, [s.exit for s in segments[:-1]], max_batch, example)
        self.segments, self._compiled = segments, compiled or (lambda piece: piece)
        self._pieces = [
            replace(s, module=self._compiled(s.module), ahead=s.ahead and self._compiled(s.ahead)) for s in segments
        ]
        self._bare: list[Any] = []
        self._recorder: Recorder = Graphs() if self.device.type == "cuda" else Rerun()

    def replays_without_heads(self, rows: int) -> list[Callable[[], None]]:
        """What repeats each piece without its head, on what the whole pieces have left in the bucket for so many rows."""
        bucket = self.bucket_for(rows)
        taken = [(bucket.images,), *bucket.alive]
        bare = [self._compiled(without_head(segment)) for segment in self.segments]
        self._bare.append(bare)  # their weights must stay: a recording reads them
        with torch.no_grad(), self._in_words(bucket):
            return [self._recorder.record(partial(piece, *t))[1] for piece, t in zip(bare, taken, strict=True)]

    def _record(self, bucket: Bucket) -> None:
        takes: Sequence[Tensor] = (bucket.images,)
        rows = bucket.rows
        for n in range(len(self.exits)):
            (takes, staying), replay = self._recorder.record(self._exit(n, takes, rows))
            rows = staying.rows
            bucket.alive.append(takes)
            bucket.where.append(self.segments[n].rows)
            bucket.staying.append(staying)
            bucket.replay.append(replay)
        bucket.replay.append(self._recorder.record(self._end(takes, rows))[1])

    def _exit(self, n: int, takes: Sequence[Tensor], rows: Tensor) -> Callable[[], tuple[Sequence[Tensor], Staying]]:
        piece = self._pieces[n]

        def work() -> tuple[Sequence[Tensor], Staying]:
            alive, logits, sure = piece.module(*takes)
            staying = self._decided(n, rows, logits, sure, self._earlier(n, takes))
            alive = piece.ahead(*alive) if piece.ahead else alive
            return [dense(t) for t in alive], staying

        return work

    def _end(self, takes: Sequence[Tensor], rows: Tensor) -> Callable[[], None]:
        def work() -> None:
            self._ended(rows, self._pieces[-1].module(*takes), self._earlier(len(self.exits), takes))

        return work

    def _earlier(self, n: int, takes: Sequence[Tensor]) -> dict[int, Tensor]:
        """The logits of the exits before piece n, where they are kept: they are among what it takes."""
        return {m: takes[i] for m, i in self.segments[n - 1].earlier.items()} if n else {}
