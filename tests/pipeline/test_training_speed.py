from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.pipeline import training_speed
from ptee.pipeline.training_speed import TrainingBench, bench_training

SIZE = (3, 8, 8)


class Net(nn.Module):
    """Counts the images that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc, self.images = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.fc(self.two(self.one(x)).mean((2, 3)))


def made(head: str = "pool") -> ptee.EarlyExitModel:
    return ptee.augment(Net(), exits=["one", "two"], head=head, input_size=SIZE)


def told(**times: float) -> TrainingBench:
    return TrainingBench("net", "pool", 2, "cpu", 1, 100, 20, **times)


def test_the_sums_are_one_cache_and_so_many_epochs_on_it_beside_as_many_with_the_backbone():
    found = told(fill=1.1, cached=0.02, fresh=1.2)
    assert found.passes == pytest.approx(1.1 + 20 * 0.02)
    assert found.times_less == pytest.approx(20 * 1.2 / (1.1 + 20 * 0.02))
    assert "20 epochs on the cache cost 1.50 times one pass of the backbone, 16.0 times less" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["times_less"] == found.times_less


def test_the_backbone_runs_as_often_as_is_said():
    model = made()
    model.backbone.images = 0
    bench_training(model, images=10, epochs=20, batch_size=4, rounds=3)
    # once to warm up; then each round: the bare pass, the cache alone, the cache of a training, an epoch without one
    assert model.backbone.images == 10 + 3 * 4 * 10


def test_every_time_is_a_ratio_to_the_bare_pass_of_its_own_round(monkeypatch):
    seconds = iter([1.0, 2, 10, 20, 2, 4])  # pass and cache in three rounds, of which one is slow
    epochs = iter([0.1, 3, 1.0, 30, 0.2, 6])
    monkeypatch.setattr(training_speed, "_seconds", lambda *_: next(seconds))
    monkeypatch.setattr(training_speed, "_last_epoch", lambda *_: next(epochs))
    found = bench_training(made(), images=4)
    assert (found.fill, found.cached, found.fresh) == pytest.approx((2, 0.1, 3))


@pytest.mark.parametrize("head", ["pool", "bnpool"])
def test_timing_leaves_the_heads_as_they_were(head):
    model = made(head)
    before = {name: value.clone() for name, value in model.heads.state_dict().items()}
    found = bench_training(model, images=6)
    assert all(torch.equal(value, before[name]) for name, value in model.heads.state_dict().items())
    assert not model.training
    assert min(found.fill, found.cached, found.fresh) > 0


@pytest.mark.parametrize(("images", "epochs"), [(1, 20), (8, 0)])
def test_too_little_to_be_timed_is_refused(images, epochs):
    with pytest.raises(PteeError, match=f"{images} images and {epochs} epochs"):
        bench_training(made(), images=images, epochs=epochs)
