"""Pieces that are recorded through the hooks, for models that torch.export cannot capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from device import here, seeded
from small import SIZE, K, chained, made
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.arithmetic import tolerance
from ptee.analysis.cut_points import Cut
from ptee.deploy.capture import example_images
from ptee.model.forward import StopForward
from ptee.recording import hooked_pieces, optimized
from ptee.recording.buckets import Bucket
from ptee.recording.hooked_pieces import HookedPieces, Memory, _Heads, check_recorded


class Network(nn.Module):
    """A network with steps between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)).mean((2, 3)))


class LooksAtRows(Network):
    """Its code compares the number of rows with a number."""

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        x = self.b(self.a(x))
        x = x * 1.0 if rows > 5 else x
        return self.c(x.view(rows, 6, -1).mean(2))


class MadeBefore(LooksAtRows):
    """What it makes of the weights before the exits is read behind them."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.c.weight.abs().sum() * torch.ones(len(x), 1, dtype=x.dtype)
        return super().forward(x) * scale


class WritesBefore(MadeBefore):
    """And written into."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.c.weight.abs().sum() * torch.ones(1, dtype=x.dtype)
        x = self.b(self.a(x)).mean((2, 3))
        scale += 1
        return self.c(x) * scale * (1 if len(x) > 5 else 1.0)


class AsksForValues(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.b(x * 0 if float(x.amax()) > 1e9 else x).mean((2, 3)))


def of(network: Callable[[], nn.Module]) -> ptee.EarlyExitModel:
    """A model with two exits whose heads differ from row to row."""
    torch.manual_seed(0)
    model = ptee.augment(network(), exits=["a", "b"], head="pool", input_size=SIZE)
    with torch.no_grad():
        for p in model.heads.parameters():
            p += torch.randn_like(p)
    return model


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

    def _record(self, bucket: Bucket) -> None:
        self._pass(_Heads(self, bucket, lambda: None))
        bucket.alive = [[t.clone() for t in alive] for alive in bucket.alive]
        bucket.staying = [type(s)(*(t.clone() for t in s)) for s in bucket.staying]
        bucket.replay = [partial(self._again, bucket, n) for n in range(len(self.exits) + 1)]

    @torch.no_grad()
    def _again(self, bucket: Bucket, piece: int) -> None:
        call = _From(self, bucket, piece)
        try:
            with hooked_pieces.running(call):
                call.at_end(call.forward(self.model.backbone, bucket.images))
        except StopForward:
            pass


class Once:
    """Stands in for a recorder where nothing is repeated."""

    def record_parts(self, run: Callable[[Callable[[], None]], None]) -> list[Callable[[], None]]:
        parts: list[Callable[[], None]] = [lambda: None]
        run(lambda: parts.append(lambda: None))
        return parts


@pytest.fixture(params=["stand-in", pytest.param("graphs", marks=pytest.mark.cuda)])
def pieces(request, monkeypatch) -> type[HookedPieces]:
    if request.param == "graphs":
        return HookedPieces
    monkeypatch.setattr(hooked_pieces, "Graphs", Once)
    monkeypatch.setattr(optimized, "HookedPieces", Again)
    monkeypatch.setattr(optimized.OptimizedModel, "_on_gpu", True)
    return Again


@pytest.mark.parametrize("confidence", ["learned", "max_prob", "patience"])
@pytest.mark.parametrize("model", [partial(of, LooksAtRows), partial(of, MadeBefore), made, chained])
def test_the_same_rows_leave_at_the_same_exits_as_of_the_model(model, confidence, pieces):
    early = model()
    early.confidence = confidence
    x = 3 * torch.randn(16, *early.plan.input_size, generator=seeded(1))
    h = early.all_exits(x).confidence[:-1].sort(dim=1).values
    limits = ((h[:, 8] + h[:, 9]) / 2).tolist() if confidence != "patience" else [0.3, 0.5, 0.6][: len(h)]
    recorded = pieces(early, 16, example_images(early, 1))
    check_recorded(early, recorded, 16)
    for b in (1, 2, 7, 16):
        want = early.predict(x[:b], limits)
        with torch.no_grad():
            logits, exits, confident, cost = recorded(x[:b], limits)
        near = tolerance(x.dtype, here())
        assert torch.equal(exits, want.exit_index)
        torch.testing.assert_close(logits, want.logits, rtol=near, atol=near)
        torch.testing.assert_close(confident, want.confidence, rtol=near, atol=near)
        torch.testing.assert_close(cost, want.cost)


def test_pieces_that_answer_otherwise_are_refused(pieces):
    early = of(LooksAtRows)
    recorded = pieces(early, 8, example_images(early, 1))
    recorded.bucket_for(2).replay[2] = lambda: None  # where two of seven rows end
    with pytest.raises(PteeError, match=r"they give other answers to a batch of 7 \(off by"):
        check_recorded(early, recorded, 8)


def test_memory_that_a_later_piece_reads_is_kept(pieces):
    early = of(MadeBefore)
    bucket = pieces(early, 4, example_images(early, 1)).bucket_for(4)
    assert [4, 1] in [list(t.shape) for t in bucket.kept]
    plain = of(LooksAtRows)
    bucket = pieces(plain, 4, example_images(plain, 1)).bucket_for(4)
    assert [4, 1] not in [list(t.shape) for t in bucket.kept]


def test_a_value_that_changes_behind_an_exit_is_refused(pieces):
    early = of(WritesBefore)
    with pytest.raises(PteeError, match=r"aten\.add_.* writes into memory that an earlier piece has made"):
        pieces(early, 4, example_images(early, 1)).bucket_for(4)


def test_memory_belongs_to_the_piece_that_made_it():
    memory = Memory()
    with memory:
        moved, made_first, read_at_once = torch.ones(3), torch.ones(4), torch.ones(5)
        read_at_once.sum()
        memory.next_piece([moved])
        made_first.view(2, 2).sum()
        moved.add_(1)
    assert [t.numel() for t in memory.kept.values()] == [4, 3]


def test_optimize_takes_hooks_where_export_fails(pieces):
    early = of(LooksAtRows)
    fast = optimized.OptimizedModel(early, 16, "graphs")
    assert isinstance(fast._buckets, pieces)
    x = torch.randn(9, *SIZE)
    assert torch.equal(fast.predict(x, 0.5).exit_index, early.predict(x, 0.5).exit_index)
    laps: list[None] = []
    fast.laps_without_heads(x, lambda: laps.append(None))
    assert len(laps) == 4


def test_a_model_that_can_neither_be_captured_nor_recorded_is_refused_with_both_reasons(pieces):
    reasons = r"^WritesBefore cannot be recorded through its hooks \(aten\.add_.* made\), and torch\.export cannot capture Writ"
    with pytest.raises(PteeError, match=reasons):
        optimized.OptimizedModel(of(WritesBefore), 16, "graphs")


@pytest.mark.cuda
def test_a_model_that_asks_for_values_cannot_be_recorded():
    with pytest.raises(
        PteeError, match=r"^AsksForValues cannot be recorded .*, and torch\.export cannot capture AsksForValues"
    ):
        ptee.optimize(of(AsksForValues), max_batch=8)


@pytest.mark.cpu("on an NVIDIA GPU it is recorded")
def test_without_a_gpu_a_model_that_export_refuses_is_refused():
    with pytest.raises(PteeError, match=r"^torch\.export cannot capture LooksAtRows"):
        ptee.optimize(of(LooksAtRows), max_batch=8)
