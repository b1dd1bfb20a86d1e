"""What a training takes before it begins: arithmetic from two measured rates."""

from __future__ import annotations

import pytest
import torch
from small import K, made

from ptee.scale import budget as module
from ptee.scale.budget import HEADS, NONE, POOLED, budget
from ptee.training.config import TrainingConfig

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def brief(monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.01)


@pytest.mark.cpu("it plans for the CPU")
def test_the_size_of_a_cache_is_what_the_heads_read_of_all_views():
    found = budget(made("conv1"), 1000, TrainingConfig(epochs=3, views=2, precision="no"), CPU)
    sizes = {choice.keeps: choice.size for choice in found.choices}
    maps = 6 * 6 * 6 + 6 * 4 * 4  # channels, height and width at the two exits
    assert sizes == {HEADS: 1000 * 2 * 4 * (maps + K), POOLED: 1000 * 2 * 4 * (6 + 6 + K), NONE: 0}
    assert {choice.keeps: choice.passes for choice in found.choices} == {HEADS: 2, POOLED: 2, NONE: 3}


@pytest.mark.cpu("it plans for the CPU")
def test_the_hours_follow_from_the_rates():
    found = budget(made(), 36_000, TrainingConfig(epochs=3, views=2, precision="no"), CPU)
    hours = {choice.keeps: choice.hours for choice in found.choices}
    assert hours[HEADS] == pytest.approx(10 * (2 / found.backbone_rate + 3 / found.heads_rate))
    assert hours[NONE] == pytest.approx(10 * (3 / found.backbone_rate + 3 / found.heads_rate))
    assert POOLED not in hours  # these heads pool already


@pytest.mark.cpu("it plans for the CPU")
def test_what_does_not_fit_is_said_with_what_happens_instead():
    found = budget(made("conv1"), 10**6, TrainingConfig(epochs=3, views=1), CPU, limit=10**8)
    assert [(choice.keeps, choice.fits) for choice in found.choices] == [(HEADS, False), (POOLED, True), (NONE, True)]
    pooled = next(choice for choice in found.choices if choice.keeps == POOLED)
    assert pooled.hours == pytest.approx(found.images / 3600 * found.views / found.backbone_rate)
    assert found.taken.keeps == NONE
    assert "the backbone runs in every epoch. Heads that pool first need" in str(found)
    assert "--head pool" in str(found)


@pytest.mark.cpu("it plans for the CPU")
def test_the_model_is_left_as_it_was():
    model = made("conv1")
    before = {name: value.clone() for name, value in model.heads.state_dict().items()}
    budget(model, 100, TrainingConfig(epochs=1), CPU)
    assert not model.training
    assert all(p.grad is None for p in model.heads.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.heads.state_dict().items())
