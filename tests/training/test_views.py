from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

import ptee
from ptee._common.errors import DataError
from ptee.data.batches import split_batch
from ptee.training.views import EveryView, Views, draw, view

N, SIZE = 12, (3, 16, 16)


def images() -> Tensor:
    return torch.randn(N, *SIZE, generator=torch.Generator().manual_seed(1))


def data() -> TensorDataset:
    return TensorDataset(images(), torch.arange(N))


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_view_zero_is_the_image_and_view_one_its_mirror_image():
    image = images()[0]
    assert torch.equal(view(image, 0, lots()), image)
    assert torch.equal(view(image, 1, lots()), image.flip(-1))


def test_images_of_numpy_have_views_too():
    image = images()[0]
    for number in range(4):
        assert torch.equal(view(image.numpy(), number, lots()), view(image, number, lots()))


def test_where_mirrors_are_of_another_class_no_view_is_one():
    ramp = torch.arange(16.0).expand(3, 16, 16)  # grows to the right, also where it is cut out of the padded image
    for number in range(1, 40):
        inner = view(ramp, number, lots(number), mirror=False)[:, :, 2:-2]
        assert (inner.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("mirror", [True, False])
def test_other_views_are_the_image_shifted_by_an_eighth_of_its_side_at_most(mirror):
    image, seen = images()[0], Counter()
    for seed in range(300):
        got = view(image, 2, lots(seed), mirror=mirror)
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
    assert torch.equal(one.see(3, 2)[0], two.see(3, 2)[0])
    same = Views(TensorDataset(images()[:1].expand(N, *SIZE)), 9)
    shown = [other.see(3, 2)[0], one.see(3, 2)[0], one.see(3, 3)[0], same.see(4, 2)[0], same.see(5, 2)[0]]
    assert not any(torch.equal(a, b) for i, a in enumerate(shown) for b in shown[:i])


def test_making_views_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    Views(data(), 4).see(0, 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 9)])
def test_the_smallest_images_have_views_too(size):
    assert view(torch.randn(3, *size), 2, lots()).shape == (3, *size)


def test_every_epoch_draws_one_view_of_each_sample_as_likely_as_any_other():
    drawn = torch.stack([draw(1000, 4, 0, epoch) for epoch in range(20)])
    assert torch.bincount(drawn.flatten()).tolist() == pytest.approx([5000] * 4, rel=0.05)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[3], draw(1000, 4, 0, 3))


def test_an_epoch_is_as_long_as_the_data_and_shows_the_drawn_views():
    seen = Views(data(), 3, seed=5)
    seen.begin(2)
    assert len(seen) == N
    assert len(EveryView(seen)) == 3 * N
    for i in range(N):
        image, label = seen[i]
        again, number = EveryView(seen)[int(seen.drawn[i]) * N + i]
        assert torch.equal(image, again)
        assert label == number == i


KINDS = {
    "a pair": lambda x: (x, 1),
    "a list of one": lambda x: [x],
    "the image": lambda x: x,
    "a mapping": lambda x: {"label": 1, "pixel_values": x},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_image_of_any_sample_is_seen_and_the_rest_stays(kind):
    image = images()[0]
    samples = Views([kind(image)], 2).see(0, 1), kind(image.flip(-1))
    got, want = (split_batch(default_collate([sample])) for sample in samples)
    assert torch.equal(got[0], want[0])
    assert got[1] == want[1]


def made() -> ptee.EarlyExitModel:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 2), torch.nn.Conv2d(6, 8, 3, 2), Mean(), torch.nn.Linear(8, N))
    return ptee.augment(net, exits=["0"], head="conv1", input_size=SIZE)


class Mean(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def losses(**settings: object) -> list[float]:
    model = made()
    history = ptee.train(model, data(), data(), batch_size=4, epochs=3, device="cpu", precision="no", **settings)
    return [x for epoch in history.epochs for x in (epoch.loss, epoch.val_loss)]


def test_views_from_a_cache_train_as_views_made_on_the_way():
    fresh, kept = losses(augment=4), losses(augment=4, cache=True)
    assert kept == pytest.approx(fresh, rel=1e-5)
    assert fresh != pytest.approx(losses(), rel=1e-3)


def test_data_without_mirrors_see_other_views():
    assert losses(augment=2) != pytest.approx(losses(augment=2, mirror=False), rel=1e-3)


def test_a_resumed_training_goes_on_with_the_same_views(tmp_path):
    whole, checkpoint = losses(augment=3, cache=True), tmp_path / "c.safetensors"
    ptee.train(
        made(), data(), data(), batch_size=4, epochs=1, device="cpu", precision="no", augment=3, checkpoint=checkpoint
    )
    assert losses(augment=3, cache=True, checkpoint=checkpoint, resume=True) == pytest.approx(whole, rel=1e-6)


def test_a_loader_yields_its_own_images_and_gets_no_views():
    with pytest.raises(DataError, match=r"4 views.*DataLoader.*pass its data set"):
        ptee.train(made(), DataLoader(data(), 4), epochs=1, device="cpu", augment=4)


@pytest.mark.parametrize("seed", [20_240_615, 2**32 - 1])
def test_any_seed_will_do(seed):
    seen = Views([(torch.randn(3, 8, 8), 0)], 4, seed=seed)
    assert seen.see(0, 3)[0].shape == (3, 8, 8)
