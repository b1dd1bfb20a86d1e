from __future__ import annotations

from collections import Counter

import pytest
import torch
from device import here, seeded
from small import once
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.data.batches import split_batch
from ptee.training.augmentation import AllViews, Views, draw_shifts, draw_views, make_view, shift_maps
from ptee.training.config import TrainingConfig
from ptee.training.step import Step
from ptee.training.trainer import resolve_config

N, SIZE = 12, (3, 16, 16)


def images() -> Tensor:
    return torch.randn(N, *SIZE, generator=seeded(1))


def data() -> TensorDataset:
    return TensorDataset(images(), torch.arange(N))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_view_zero_is_the_image_and_view_one_its_mirror_image():
    image = images()[0]
    assert torch.equal(make_view(image, 0, generator()), image)
    assert torch.equal(make_view(image, 1, generator()), image.flip(-1))


def test_images_of_numpy_have_views_too():
    image = images()[0].cpu()
    for number in range(4):
        assert torch.equal(make_view(image.numpy(), number, generator()), make_view(image, number, generator()))


def test_where_mirrors_are_of_another_class_no_view_is_one():
    ramp = torch.arange(16.0).expand(3, 16, 16)  # grows to the right, also where it is cut out of the padded image
    for number in range(1, 40):
        inner = make_view(ramp, number, generator(number), mirror=False)[:, :, 2:-2]
        assert (inner.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("mirror", [True, False])
def test_other_views_are_the_image_shifted_by_an_eighth_of_its_side_at_most(mirror):
    image, seen = images()[0].cpu(), Counter()  # where images of data sets lie
    for seed in range(300):
        got = make_view(image, 2, generator(seed), mirror=mirror)
        inner = got[:, 2:-2, 2:-2]
        for turned in (got, got.flip(-1)) if mirror else (got,):
            inner = turned[:, 2:-2, 2:-2]
            for down in range(-2, 3):
                for right in range(-2, 3):
                    if torch.equal(inner, image[:, 2 + down : 14 + down, 2 + right : 14 + right]):
                        seen[down, right, turned is got] += 1
    assert sum(seen.values()) == 300
    assert len(seen) == (50 if mirror else 25)


def test_a_view_is_the_same_whenever_it_is_made_and_another_for_another_seed_sample_or_number():
    one, two, other = (Views(data(), 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.sample(3, 2)[0], two.sample(3, 2)[0])
    same = Views(TensorDataset(images()[:1].expand(N, *SIZE)), 9)
    samples = (other.sample(3, 2), one.sample(3, 2), one.sample(3, 3), same.sample(4, 2), same.sample(5, 2))
    shown = [image for image, *_ in samples]
    assert not any(torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])


def test_making_views_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    Views(data(), 4).sample(0, 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 9)])
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_smallest_images_have_views_whatever_the_seed(size, seed):
    assert Views([torch.randn(3, *size)], 3, seed=seed).sample(0, 2).shape == (3, *size)


def test_every_epoch_draws_one_view_of_each_sample_as_likely_as_any_other():
    drawn = torch.stack([draw_views(1000, 4, 0, epoch) for epoch in range(20)])
    assert torch.bincount(drawn.flatten()).tolist() == pytest.approx([5000] * 4, rel=0.05)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[3], draw_views(1000, 4, 0, 3))


def test_an_epoch_is_as_long_as_the_data_and_shows_the_drawn_views():
    seen = Views(data(), 3, seed=5)
    seen.begin(2)
    assert len(seen) == N
    assert len(AllViews(seen)) == 3 * N
    for i in range(N):
        image, label = seen[i]
        again, number = AllViews(seen)[int(seen.drawn[i]) * N + i]
        assert torch.equal(image, again)
        assert label == number == i


KINDS = {
    "a pair": lambda x: (x, 1),
    "a list of one": lambda x: [x],
    "the image": lambda x: x,
    "a mapping": lambda x: {"label": 1, "pixel_values": x},
    "a mapping with the picture": lambda x: {"label": 1, "image": "a picture", "pixel_values": x},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_image_of_any_sample_is_seen_and_the_rest_stays(kind):
    image = images()[0]
    samples = Views([kind(image)], 2).sample(0, 1), kind(image.flip(-1))
    got, want = (split_batch(default_collate([sample])) for sample in samples)
    assert torch.equal(got[0], want[0])
    assert got[1] == want[1]


# shifted feature maps


def shifted_by_hand(x: Tensor, down: int, right: int) -> Tensor:
    """One map (c, h, w), position by position."""
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            if 0 <= i - down < x.shape[1] and 0 <= j - right < x.shape[2]:
                out[:, i, j] = x[:, i - down, j - right]
    return out


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_maps_are_shifted_by_whole_positions_and_zeros_come_in(stride):
    x, pixels = torch.randn(6, 4, 5, 7), draw_shifts(6, 9)
    got = shift_maps(x, pixels, (5 * stride, 7 * 2 * stride))
    for row in range(6):
        down, right = (round(n / of) for n, of in zip(pixels[row].tolist(), (stride, 2 * stride), strict=True))
        assert torch.equal(got[row], shifted_by_hand(x[row], down, right))


def test_a_shift_beyond_the_map_leaves_nothing_of_it():
    assert not shift_maps(torch.ones(1, 2, 4, 4), torch.tensor([[0, 40]]), (4, 4)).any()


def test_pooled_vectors_are_not_shifted():
    v = torch.randn(6, 8)
    assert shift_maps(v, draw_shifts(6, 4), (16, 16)) is v


def test_all_shifts_are_equally_likely():
    found = draw_shifts(9000, 1).add(1)
    counts = torch.bincount(found[:, 0] * 3 + found[:, 1], minlength=9)
    assert counts.tolist() == pytest.approx([1000] * 9, rel=0.15)


# in training


class Mean(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@once
def made(head: str = "conv1") -> ptee.EarlyExitModel:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 2), torch.nn.Conv2d(6, 8, 3, 2), Mean(), torch.nn.Linear(8, N))
    return ptee.augment(net, exits=["0"], head=head, input_size=SIZE)


def losses(head: str = "conv1", **settings: object) -> list[float]:
    settings = {"epochs": 3, "lr": 1e-3, "views": 1, "shift": 0, "cache": False} | settings
    history = ptee.train(made(head), data(), data(), batch_size=4, device=here(), precision="no", **settings)
    return [x for epoch in history.epochs for x in (epoch.loss, epoch.val_loss)]


@pytest.fixture(scope="module")
def unchanged() -> list[float]:
    return losses()


CHANGES = [{"views": 4}, {"shift": 4}, {"shift": 4, "views": 2, "targets": "labels"}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_augmentation_is_the_same_from_a_cache_and_without(change, unchanged):
    fresh = losses(**change)
    assert losses(cache=True, **change) == pytest.approx(fresh, rel=1e-4)
    assert fresh != pytest.approx(unchanged, rel=1e-3)


def test_without_mirror_images_other_views_are_seen():
    assert losses(views=2) != pytest.approx(losses(views=2, mirror=False), rel=1e-3)


def test_a_resumed_training_goes_on_with_the_same_views_and_shifts(tmp_path):
    settings = {"views": 3, "shift": 2, "cache": True, "schedule": "constant"}
    whole, checkpoint = losses(**settings), tmp_path / "c.safetensors"
    losses(**settings, epochs=1, checkpoint=checkpoint)
    assert losses(**settings, checkpoint=checkpoint, resume=True) == pytest.approx(whole, rel=1e-6)


def test_validation_images_are_not_augmented():
    model, (x, labels) = made().eval(), data().tensors
    plain, changed = (
        Step(model, TrainingConfig(shift=shift).resolved())(x, labels).loss for shift in (0, 4)
    )  # in eval mode
    assert torch.equal(plain, changed)


def test_auto_makes_two_views_of_a_data_set_and_shifts_what_heads_read_as_maps():
    config = resolve_config(TrainingConfig(), made(), data())
    assert (config.views, config.shift, config.epochs) == (2, 2, 40)
    assert resolve_config(TrainingConfig(), made("pool"), data()).shift == 0
    assert resolve_config(TrainingConfig(), made(), DataLoader(data(), 4)).views == 1


class KMNIST(TensorDataset):
    """Named like torchvision's."""


def test_letters_of_torchvision_are_not_mirrored():
    letters = KMNIST(*data().tensors)
    assert [resolve_config(TrainingConfig(), made(), each).mirror for each in (data(), letters)] == [True, False]


def test_a_loader_makes_its_own_batches_and_gets_no_views():
    with pytest.raises(DataError, match=r"views=4 needs a data set, and this is a DataLoader.*views=1"):
        ptee.train(made(), DataLoader(data(), 4), epochs=1, device=here(), views=4)


@pytest.mark.parametrize(
    ("head", "shift", "words"),
    [
        ("pool", 4, r"shift=4 .*'pool' heads.*'conv1'"),
        ("conv1", 1000, r"shift=1000 moves images of 16 x 16 pixels out of sight.*shift=2"),
    ],
    ids=["heads that read vectors", "a whole image"],
)
def test_a_shift_that_cannot_be_is_refused(head, shift, words):
    with pytest.raises(PteeError, match=words):
        losses(head, shift=shift)
