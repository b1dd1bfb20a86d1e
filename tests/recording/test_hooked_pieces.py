"""Pieces that are recorded through the hooks, for models that torch.export cannot capture."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from awkward import REAL, REAL_SIZE, Cells
from cases import slow
from device import here, seeded
from rerun import Once, stand_in
from small import SIZE, K, chained, made
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.arithmetic import tolerance
from ptee.analysis.axes import memory_of
from ptee.backbones.load import load_backbone
from ptee.deploy.capture import example_images
from ptee.exits.config import NEVER
from ptee.model.build import build
from ptee.recording import optimized
from ptee.recording.buckets import Buckets
from ptee.recording.check import check_recorded
from ptee.recording.hooked_pieces import HookedPieces


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


class KeepsMask(Network):
    """Keeps a mask for the number of rows that it saw last."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.mask is None or len(self.mask) != len(x):
            self.mask = torch.ones(len(x), 1, 1, 1, dtype=x.dtype)
        return self.c(self.b(x * self.mask).mean((2, 3)))


class WritesOutside(Network):
    """Writes the number of rows into a buffer, and reads it behind the exits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.rows.fill_(float(len(x)))
        return self.c(self.b(self.a(x)).mean((2, 3))) * (self.rows / self.rows)


class WritesIntoImages(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


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


@pytest.fixture(params=["stand-in", pytest.param("graphs", marks=pytest.mark.cuda)])
def pieces(request, monkeypatch) -> type[HookedPieces]:
    if request.param == "graphs":
        return HookedPieces
    return stand_in(monkeypatch)


@pytest.mark.parametrize("confidence", ["learned", "max_prob", "patience"])
@pytest.mark.parametrize("model", [partial(of, LooksAtRows), partial(of, MadeBefore), made, chained])
def test_the_same_rows_leave_at_the_same_exits_as_of_the_model(model, confidence, pieces):
    early = model()
    early.confidence = confidence
    x = 3 * torch.randn(16, *early.plan.input_size, generator=seeded(1))
    h = early.all_exits(x).confidence[:-1].sort(dim=1).values
    limits = ((h[:, 8] + h[:, 9]) / 2).tolist() if confidence != "patience" else [0.3, 0.5, 0.6][: len(h)]
    recorded = pieces(early, 16, example_images(early, 1))
    check_recorded(recorded)
    for b in (1, 2, 7, 16):
        want = early.predict(x[:b], limits)
        with torch.no_grad():
            logits, exits, confident, cost = recorded(x[:b], limits)
        near = tolerance(x.dtype, here())
        assert torch.equal(exits, want.exit_index)
        torch.testing.assert_close(logits, want.logits, rtol=near, atol=near)
        torch.testing.assert_close(confident, want.confidence, rtol=near, atol=near)
        torch.testing.assert_close(cost, want.cost)


@pytest.mark.parametrize(
    "name", ["swin_tiny", slow("hrnet_w18_small"), slow("vit_tiny")]
)  # rows packed with tokens, lists of maps
def test_real_networks_answer_as_they_are(name, pieces):
    torch.manual_seed(0)
    early = ptee.augment(REAL[name](), exits="pareto", num_exits=2, head="pool", input_size=REAL_SIZE)
    check_recorded(pieces(early, 8, example_images(early, 1)))


def test_an_exit_at_the_input_reads_the_images(pieces):
    early = build(load_backbone(made().detach(), input_size=SIZE), exits=["2"], head="pool", front=made().detach())
    assert early.exits[0].name == "input"
    check_recorded(pieces(early, 8, example_images(early, 1)))


def test_a_network_may_write_into_its_images(pieces):
    early = of(WritesIntoImages)
    recorded = pieces(early, 8, example_images(early, 1))
    check_recorded(recorded)
    x = torch.randn(4, *SIZE)
    kept = x.clone()
    recorded(x, [0.5, 0.5])
    assert torch.equal(x, kept)


class Wrong:
    """Makes pieces wrong in one answer."""

    def __init__(self, pieces: Buckets, exit: int, what: str) -> None:
        self.decided, self.ended, self.exit, self.what = pieces._decided, pieces._ended, exit, what
        pieces._decided, pieces._ended = self._decided, self._ended
        if what == "cost":
            pieces.answers.costs[exit] += 0.1

    def _decided(self, n: int, rows: Tensor, logits: Tensor, sure: Tensor, earlier: object) -> object:
        here = n == self.exit
        return self.decided(
            n, rows, logits + (here and self.what == "logits"), sure + (here and self.what == "confidence"), earlier
        )

    def _ended(self, rows: Tensor, own: Tensor, earlier: object) -> None:
        self.ended(rows, own + (self.exit == 3 and self.what == "logits"), earlier)


WRONG = [*((exit, "logits") for exit in range(4)), *((exit, "confidence") for exit in range(3)), (1, "cost")]


@pytest.mark.parametrize("max_batch", [1, slow(2), 16])
@pytest.mark.parametrize(("exit", "what"), WRONG)
def test_one_wrong_answer_anywhere_is_found(exit, what, max_batch, pieces):
    early = chained()
    recorded = pieces(early, max_batch, example_images(early, 1))
    Wrong(recorded, exit, what)
    with pytest.raises(PteeError, match=rf"gives other answers to a batch of \d than as it is \({what} off by"):
        check_recorded(recorded)


def test_a_right_model_with_confidences_that_are_no_numbers_passes(pieces):
    early = of(LooksAtRows)
    with torch.no_grad():
        early.heads[0].confidence.bias.fill_(torch.nan)
    check_recorded(pieces(early, 8, example_images(early, 1)))


def test_memory_that_a_later_piece_reads_is_kept(pieces):
    early = of(MadeBefore)
    bucket = pieces(early, 4, example_images(early, 1)).bucket_for(4)
    assert [4, 1] in [list(t.shape) for t in bucket.kept]
    plain = of(LooksAtRows)
    bucket = pieces(plain, 4, example_images(plain, 1)).bucket_for(4)
    assert [4, 1] not in [list(t.shape) for t in bucket.kept]


def test_what_an_older_recording_wrote_over_is_put_back_when_rows_come(pieces):
    """Recordings share memory: one that was made before may use that of a constant in between."""
    early = of(MadeBefore)
    recorded = pieces(early, 8, example_images(early, 1))
    recorded.bucket_for(8)
    smaller = recorded.bucket_for(4)
    (constant, value), *more = smaller.constants
    assert not more and torch.equal(constant, value) and constant.data_ptr() != value.data_ptr()
    constant.fill_(77)
    x = torch.randn(8, *SIZE, generator=seeded(3))
    h = early.all_exits(x).confidence[0].detach().sort().values
    limits = [float(h[3] + h[4]) / 2, NEVER]  # half of the rows go on, in the smaller bucket
    want = early.predict(x, limits)
    with torch.no_grad():
        logits, *_ = recorded(x, limits)
    assert torch.equal(constant, value)
    near = tolerance(x.dtype, here())
    torch.testing.assert_close(logits, want.logits, rtol=near, atol=near)


def test_cuda_may_note_its_random_numbers_between_two_pieces(monkeypatch):
    """As older versions of torch do where a recording begins: nothing of the model is written."""
    noted = torch.zeros(1)

    class Notes(Once):
        def record_parts(self, run):
            def begin() -> None:
                noted.fill_(0)
                parts.append(lambda: None)

            parts = [lambda: None]
            run(begin)
            return parts

    monkeypatch.setattr("ptee.recording.hooked_pieces.Graphs", Notes)
    early = of(LooksAtRows)
    assert len(HookedPieces(early, 4, example_images(early, 1)).bucket_for(4).replay) == 3


def test_what_a_module_keeps_for_itself_is_kept_for_each_size(pieces):
    early = of(KeepsMask)
    recorded = pieces(early, 4, example_images(early, 1))
    bucket = recorded.bucket_for(4)
    mask = memory_of(early.backbone.mask)
    gone = weakref.ref(early.backbone.mask)
    recorded.bucket_for(2)
    gc.collect()
    assert gone() is not None
    assert mask in map(memory_of, bucket.kept)


REFUSED = {
    WritesBefore: r"aten\.add_.* writes into memory that an earlier piece has made",
    WritesOutside: r"aten\.fill_.* writes into memory that outlives the pass",
    AsksForValues: r"aten\._local_scalar_dense.* asks for values, and nothing is computed while a GPU records",
}


@pytest.mark.parametrize(("network", "said"), REFUSED.items(), ids=lambda c: getattr(c, "__name__", ""))
def test_what_cannot_be_repeated_is_refused_by_name(network, said, pieces):
    early = of(network)
    with pytest.raises(
        PteeError, match=rf"^Batches of 4 cannot be recorded through the hooks of {network.__name__}: {said}\.$"
    ):
        pieces(early, 4, example_images(early, 1)).bucket_for(4)


def test_values_of_images_that_go_past_an_exit_are_refused_by_name(pieces):
    size = (3, 16, 16)
    early = build(load_backbone(Cells().eval(), input_size=size), exits=["cells.0", "cells.1"], placed=True)
    with pytest.raises(PteeError, match=r"reads what depends on the images and went past an exit"):
        pieces(early, 4, example_images(early, 1)).bucket_for(4)


def test_an_error_of_the_model_s_own_code_is_refused_in_one_line(pieces):
    class Chokes(LooksAtRows):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 8:
                raise ValueError("eight rows")
            return super().forward(x)

    early = of(Chokes)
    recorded = pieces(early, 8, example_images(early, 1))
    for record in (recorded.bucket_for, recorded.replays_without_heads):
        with pytest.raises(
            PteeError, match=r"^Batches of 8 cannot be recorded through the hooks of Chokes: ValueError: eight rows\.$"
        ):
            record(8)


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
    reasons = r"^torch\.export cannot capture AsksForValues: .* Single images cannot be recorded .*: aten\._local_scalar_dense"
    with pytest.raises(PteeError, match=reasons):
        optimized.OptimizedModel(of(AsksForValues), 16, "graphs")


@pytest.mark.cpu("on an NVIDIA GPU it is recorded")
def test_without_a_gpu_a_model_that_export_refuses_is_refused():
    with pytest.raises(PteeError, match=r"^torch\.export cannot capture LooksAtRows"):
        ptee.optimize(of(LooksAtRows), max_batch=8)
