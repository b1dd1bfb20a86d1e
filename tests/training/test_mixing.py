from __future__ import annotations

import pytest
import torch
from small import once
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError
from ptee.training.mixing import Mixture, as_probabilities, displacements, mix, mixture, shift
from ptee.training.settings import Settings
from ptee.training.step import Step

b, SIZE = 6, (3, 16, 16)


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive(x: Tensor, down: int, right: int) -> Tensor:
    """One map (c, h, w), position by position."""
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            if 0 <= i - down < x.shape[1] and 0 <= j - right < x.shape[2]:
                out[:, i, j] = x[:, i - down, j - right]
    return out


def test_no_displacement_changes_nothing():
    x = torch.randn(b, 4, 5, 7)
    assert torch.equal(shift(x, torch.zeros(b, 2, dtype=torch.long), (5, 7)), x)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_maps_are_moved_by_their_own_positions_and_zeros_come_in(stride):
    x, by = torch.randn(b, 4, 5, 7), displacements(b, 9, lots())
    got = shift(x, by, (5 * stride, 7 * stride))
    for row in range(b):
        down, right = (round(pixels / stride) for pixels in by[row].tolist())
        assert torch.equal(got[row], naive(x[row], down, right))


def test_a_displacement_beyond_the_map_leaves_nothing_of_it():
    assert not shift(torch.ones(1, 2, 4, 4), torch.tensor([[0, 40]]), (4, 4)).any()


def test_vectors_have_no_place_to_be_shifted_to():
    v = torch.randn(b, 8)
    assert shift(v, displacements(b, 4, lots()), (16, 16)) is v


def test_every_displacement_is_as_likely():
    found = displacements(9000, 1, lots()).add(1)
    counts = torch.bincount(found[:, 0] * 3 + found[:, 1], minlength=9)
    assert counts.tolist() == pytest.approx([1000] * 9, rel=0.15)


@pytest.mark.parametrize(
    "draw",
    [lambda seed: displacements(b, 4, lots(seed)), lambda seed: torch.stack([*mixture(b, 0.3, lots(seed))])],
    ids=["displacements", "mixture"],
)
def test_one_seed_draws_the_same_and_another_seed_something_else(draw):
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_mixture_is_mostly_itself_as_beta_says():
    how = mixture(20_000, 0.5, lots())
    assert sorted(how.partner.tolist()) == list(range(20_000))
    assert how.weight.min() >= 0.5
    # of Beta(a, a), weight times its counterpart has the mean a / (2 (2 a + 1))
    assert (how.weight * (1 - how.weight)).mean().item() == pytest.approx(0.5 / (2 * 2), rel=0.03)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4)])
def test_mixed_rows_are_the_weighted_sum_of_both(shape):
    x = torch.randn(shape)
    got = mix(x, Mixture(torch.tensor([1, 1]), torch.tensor([0.75, 0.6])))
    torch.testing.assert_close(got, torch.stack([0.75 * x[0] + 0.25 * x[1], x[1]]))


def test_labels_are_mixed_as_probabilities():
    target = as_probabilities(torch.tensor([2, 0]), 3)
    mixed = mix(target, Mixture(torch.tensor([1, 0]), torch.tensor([0.75, 1.0])))
    torch.testing.assert_close(mixed, torch.tensor([[0.25, 0, 0.75], [1, 0, 0]]))


# in training


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@once
def made(head: str = "conv1") -> ptee.EarlyExitModel:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1), Mean(), nn.Linear(8, 5))
    return ptee.augment(net, exits=["0", "1"], head=head, input_size=SIZE)


def data() -> TensorDataset:
    order = lots(3)
    return TensorDataset(torch.randn(24, *SIZE, generator=order), torch.randint(5, (24,), generator=order))


def losses(head: str = "conv1", **settings: object) -> list[float]:
    history = ptee.train(
        made(head),
        data(),
        data(),
        loss="each",
        batch_size=8,
        epochs=2,
        device="cpu",
        precision="no",
        lr=1e-4,
        **settings,
    )
    return [x for epoch in history.epochs for x in (epoch.loss, epoch.val_loss)]


@pytest.fixture(scope="module")
def unchanged() -> dict[str, list[float]]:
    return {targets: losses(targets=targets) for targets in ("labels", "pseudo", "soft")}


CHANGES = [{"shift": 4}, {"mixup": 0.5}, {"shift": 4, "mixup": 0.5}]


@pytest.mark.parametrize("targets", ["labels", "pseudo", "soft"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_read_from_a_cache_is_changed_as_what_is_read_on_the_way(change, targets, unchanged):
    fresh = losses(targets=targets, **change)
    assert losses(targets=targets, cache=True, **change) == pytest.approx(fresh, rel=1e-5)
    assert fresh[0] != pytest.approx(unchanged[targets][0], rel=1e-4)


def test_heads_that_read_only_vectors_are_told_that_a_shift_would_do_nothing():
    with pytest.raises(PteeError, match=r"shift 4.*'pool' heads.*'conv1'.*augment="):
        losses("pool", shift=4)


def test_a_shift_by_a_whole_image_is_refused():
    with pytest.raises(PteeError, match=r"shift 1000 moves what is seen of images of .* out of sight"):
        losses("conv1", shift=1000)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_measured_is_not_changed(change):
    model = made().eval()
    x, labels = data().tensors
    plain, changed = (Step(model, Settings(loss="each", **more))(x, labels).loss for more in ({}, change))
    assert torch.equal(plain, changed)
