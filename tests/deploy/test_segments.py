"""The forward pass in pieces: what passes a cut, and that the pieces answer as the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from cases import slow
from device import seeded
from small import K, Normalises, chained, made
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.deploy.check import check_segments
from ptee.deploy.segments import Rows, Segment, segments

FAMILIES = {  # by how many tensors pass a cut
    "test_resnet": (64, 1),
    "test_vit": (160, 1),
    "test_convnext": (64, 1),
    "swin_tiny_patch4_window7_224": (224, 1),
    "crossvit_tiny_240": (240, 2),  # one for each of its two branches
}
SMALLER = {
    "swin_tiny_patch4_window7_224": {"depths": (2, 2), "num_heads": (1, 2), "embed_dim": 16},
    "crossvit_tiny_240": {"depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))},
}


def early(name: str, side: int, **wish: object) -> ptee.EarlyExitModel:
    network = timm.create_model(name, num_classes=10, **SMALLER.get(name, {}))
    return ptee.augment(network, num_exits=2, head="pool", input_size=(3, side, side), **wish)


USUAL = [("test_resnet", 1), ("test_vit", 3)]
MORE = [(name, ahead) for name in FAMILIES for ahead in (0, 1, 3) if (name, ahead) not in USUAL]


@pytest.mark.parametrize(("name", "ahead"), [*USUAL, *(slow(*pair) for pair in MORE)])
def test_pieces_answer_as_the_model_whichever_rows_go_on(name, ahead):
    side, alive = FAMILIES[name]
    model = early(name, side)
    pieces = segments(model, ahead=ahead)
    assert [p.exit for p in pieces] == [0, 1, -1]
    assert ahead or [len(p.rows) for p in pieces] == [alive, alive, 0]
    check_segments(model, pieces, [1, 2, 7])


@pytest.mark.parametrize("keep", [slow(False), True])
def test_heads_that_read_earlier_answers_get_those_of_their_rows(keep):
    model = chained()
    pieces = segments(model, keep_logits=keep)
    check_segments(model, pieces)
    assert pieces[1].earlier.keys() == ({0, 1} if keep else {1})  # the last head reads those of exit 1


def test_a_head_that_is_off_is_in_no_piece():
    model = made()
    model.off = [0]
    pieces = segments(model)
    assert [p.exit for p in pieces] == [1, -1]
    check_segments(model, pieces)


def test_an_exit_at_the_input_has_a_piece_of_its_own():
    front = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, K))
    model = ptee.augment(made().detach(), front=front, exits=["2"], head="pool", input_size=(3, 8, 8))
    pieces = segments(model)
    assert len(pieces) == 3
    check_segments(model, pieces)


def test_the_pieces_share_the_weights_of_the_model():
    model = made()
    pieces = segments(model)
    mine = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for piece in pieces for p in piece.module.parameters()} == mine


def test_a_model_is_as_before_when_it_was_taken_apart():
    model, x = made(), torch.randn(3, 3, 8, 8, generator=seeded(0))
    before = model.predict(x)
    segments(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.predict(x), strict=True))


class Remembers(nn.Module):
    """Its code keeps the number of rows from one end to the other, and folds positions into the batch meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        tokens = self.a(x).flatten(2).transpose(1, 2).reshape(b * 36, 6)
        mask = torch.arange(b * 36, device=x.device)[:, None] % 36 < 18  # follows from the number of rows alone
        return self.c((torch.relu(self.b(tokens)) * mask).reshape(b, 36, 6).mean(1))


def test_a_number_of_rows_that_code_remembers_is_that_of_the_rows_that_are_left():
    model = ptee.augment(Remembers(), exits=["a"], head="pool", input_size=(3, 8, 8))
    pieces = segments(model)
    check_segments(model, pieces, [1, 2, 7])


class Counts(nn.Module):
    """Its code makes an index in place, and looks into a table of weights with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, K)
        self.table = nn.Parameter(torch.randn(12, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        index = torch.arange(6, device=x.device)[None] * torch.ones(6, 1, device=x.device)
        index.view(-1).add_(5)
        return self.b((y * self.table[index.long()].sum(-1)).mean((2, 3)))


def test_a_table_that_follows_from_the_weights_is_the_same_in_each_call():
    model = ptee.augment(Counts(), exits=["a"], head="pool", input_size=(3, 8, 8))
    pieces = segments(model)
    for _ in range(3):
        check_segments(model, pieces, [1, 2])


class WritesLater(nn.Module):
    """Reads a value, and then changes it in place where it is large."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(self.a(x))
        before = z.mean((2, 3))
        z.clamp_(-0.5, 0.5)
        return self.c(before + z.mean((2, 3)))


def test_a_network_may_normalise_its_images_in_place():
    model = ptee.augment(Normalises(), exits=["a"], head="pool", input_size=(3, 8, 8))
    check_segments(model, segments(model))


def test_steps_keep_their_order_where_one_writes_into_what_another_reads():
    model = ptee.augment(WritesLater(), exits=["a"], head="pool", input_size=(3, 8, 8))
    x = 50 * torch.randn(5, 3, 8, 8, generator=seeded(0))
    want, alive = model.all_exits(x), (x,)
    *pieces, last = segments(model)
    for piece in pieces:
        alive, logits, _ = piece.module(*alive)
        torch.testing.assert_close(logits, want.logits[piece.exit])
    torch.testing.assert_close(last.module(*alive), want.logits[-1])


class OfTwo(nn.Module):
    """Computes one value anew, and gives the other on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.conv(both[0]).relu(), both[1]


class FillsIn(nn.Module):
    """Makes a tensor of no image, writes how bright each image is into a part of it, and reads it behind a cut.

    Args:
        alias: read it through a view that was taken before anything was written.
    """

    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.alias = alias
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 6, 3), OfTwo(), OfTwo(), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        bright = torch.zeros(x.shape[0], 6, device=x.device, dtype=x.dtype)
        seen = bright.view(x.shape[0], 6) if self.alias else bright
        bright[:, :3] = (x.mean((2, 3)) - 1).clamp(min=0)  # nothing for noise, by which pieces are checked
        z, seen = self.c(self.b((self.a(x), seen)))
        return self.d(z.mean((2, 3)) * (1 + seen))


@pytest.mark.parametrize("alias", [False, True], ids=["as it is", "through an earlier view"])
def test_what_images_are_written_into_is_handed_on(alias):
    model = ptee.augment(FillsIn(alias), exits=["b"], head="pool", input_size=(3, 8, 8))
    x = 5 + torch.randn(5, 3, 8, 8, generator=seeded(0))
    first, last = segments(model)
    with torch.no_grad():
        want = model.all_exits(x).logits[-1]
        alive, *_ = first.module(x)
        torch.testing.assert_close(last.module(*alive), want)


class Hides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = self.a(x).relu()
        return self.b(y.mean((2, 3)))


def test_a_cut_that_torch_export_hides_is_refused():
    model = ptee.augment(Hides(), exits=["a"], head="pool", input_size=(3, 8, 8))
    try:
        check_segments(model, segments(model))
    except PteeError as why:
        assert "autocast" in str(why)


def test_rows_that_are_folded_with_tokens_are_selected_together():
    rows = Rows(0, 4)
    tensor = torch.arange(12.0)[:, None]
    assert rows.select(tensor, torch.tensor([2, 0])).flatten().tolist() == [8, 9, 10, 11, 0, 1, 2, 3]
    out = torch.zeros(8, 1)
    assert rows.select(tensor, torch.tensor([2, 0]), out=out) is out
    assert out[0] == 8


def test_rows_that_are_folded_into_another_axis_than_the_first_are_selected_there():
    tensor, rows = torch.arange(12.0).reshape(2, 6), torch.tensor([2, 0])
    assert torch.equal(Rows(1, 2).select(tensor, rows), tensor[:, [4, 5, 0, 1]])


class DependsOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).mean((2, 3))
        return self.b(y) if bool((self.b.weight > 9).all()) or y.isnan().any() else self.b(y.relu())


def test_a_model_whose_code_looks_at_values_is_refused_in_one_line():
    model = ptee.augment(DependsOnValues(), exits=["a"], head="pool", input_size=(3, 8, 8))
    with pytest.raises(PteeError, match=r"torch\.export cannot capture DependsOnValues") as refused:
        segments(model)
    assert "\n" not in str(refused.value)


class EachRow(nn.Module):
    """torch.vmap runs a function for each row, which torch.export captures so that it cannot run."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.mean().sigmoid())(x)


def test_pieces_that_fail_where_the_model_answers_are_refused_in_one_line():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), EachRow(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K))
    model = ptee.augment(net, exits=["0"], head="pool", input_size=(3, 8, 8))
    with pytest.raises(PteeError, match="its pieces fail") as refusal:
        check_segments(model, segments(model))
    assert "\n" not in str(refusal.value)


def test_pieces_that_answer_otherwise_are_refused():
    model = made()
    first, *others = segments(model)
    wrong = Segment(lambda x: first.module(x.flip(-1)), None, first.rows, first.exit, first.earlier)
    with pytest.raises(PteeError, match=r"in pieces, exit 0 gives other answers to a batch of 1"):
        check_segments(model, [wrong, *others])


@pytest.mark.parametrize(("off_by", "refused"), [(1e-6, False), (1e-2, True)])
def test_noise_of_a_confidence_that_is_nearly_nothing_is_no_other_answer(off_by, refused):
    model = made()
    with torch.no_grad():
        model.heads[0].confidence.weight.zero_()  # so its logit is 1e-5, and noise is a tenth of it
        model.heads[0].confidence.bias.fill_(1e-5)
    first, *others = segments(model)

    def noisy(*alive: Tensor) -> object:
        left, logits, sure = first.module(*alive)
        return left, logits, sure + off_by

    pieces = [replace(first, module=noisy), *others]
    if refused:
        with pytest.raises(PteeError, match="exit 0 gives other answers"):
            check_segments(model, pieces)
    else:
        check_segments(model, pieces)
