"""Stands in for CUDA graphs of pieces that are recorded through the hooks: a piece is repeated by running the whole model again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ptee.analysis.cut_points import Cut
from ptee.exits.placement import INPUT
from ptee.model.forward import StopForward, running
from ptee.recording import hooked_pieces, optimized
from ptee.recording.buckets import Bucket
from ptee.recording.hooked_pieces import HookedPieces, _Heads


class _From(_Heads):
    """Runs one piece alone: the cut before it gives what lies in the bucket, and the cut behind it ends the pass."""

    def __init__(self, pieces: Again, bucket: Bucket, piece: int) -> None:
        super().__init__(pieces, Bucket(bucket.images, bucket.rows), lambda: None)
        self.whole, self.piece = bucket, piece

    def on_head_output(self, n: int, cut: Cut, output: Any, said: Any, earlier: Any) -> Any:
        here = self.pieces.exits.index(n)
        if here < self.piece - 1:
            return None
        if here == self.piece - 1:
            flat, spec = tree_flatten(output)
            given = [t.clone() for t in self.whole.alive[here]]
            maps, logits = given[: len(cut.carried)], given[len(cut.carried) :]
            for i, t in zip(cut.carried, maps, strict=True):
                flat[i] = t
            if self.keeps_logits:
                self._logits = {m: (0, y) for m, y in zip([*earlier, n], logits, strict=True)}
            self.places = self.whole.staying[here].rows
            return tree_unflatten(flat, spec)
        self.bucket.staying = list(self.whole.staying[:here])  # so that it knows its number
        self.bucket.alive.clear()
        super().on_head_output(n, cut, output, said, earlier)
        for old, new in zip(self.whole.alive[here], self.bucket.alive[0], strict=True):
            old.copy_(new)
        for old, new in zip(self.whole.staying[here], self.bucket.staying[here], strict=True):
            old.copy_(new)
        raise StopForward


class Again(HookedPieces):
    """Repeats pieces by running the model again. Stands in for graphs where there are none."""

    def _record_parts(self, bucket: Bucket, kind: type) -> list[Callable[[], None]]:
        if kind is not _Heads:  # those without heads are timed, and nobody reads what they give
            return super()._record_parts(bucket, kind)
        for _ in range(2):  # one before the recording
            self._pass(kind(self, bucket, lambda: None))
        bucket.alive = [[t.clone() for t in alive] for alive in bucket.alive]
        bucket.staying = [type(s)(*(t.clone() for t in s)) for s in bucket.staying]
        return [partial(self._again, bucket, n) for n in range(len(self.exits) + 1)]

    @torch.no_grad()
    def _again(self, bucket: Bucket, piece: int) -> None:
        call = _From(self, bucket, piece)
        at_input = piece > 0 and self.model.exits[0].name == INPUT
        images = bucket.alive[0][0] if at_input else bucket.images
        try:
            with running(call):
                call.at_end(call.forward(self.model.backbone, images))
        except StopForward:
            pass


class Once:
    """Stands in for a recorder where nothing is repeated."""

    def record_parts(self, run: Callable[[Callable[[], None]], None]) -> list[Callable[[], None]]:
        parts: list[Callable[[], None]] = [lambda: None]
        run(lambda: parts.append(lambda: None))
        return parts


def stand_in(monkeypatch) -> type[HookedPieces]:
    """Put it in the place of graphs, as if there were a GPU."""
    monkeypatch.setattr(hooked_pieces, "Graphs", Once)
    monkeypatch.setattr(optimized, "HookedPieces", Again)
    monkeypatch.setattr(optimized.OptimizedModel, "_on_gpu", True)
    return Again
