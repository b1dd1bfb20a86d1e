"""Within `shared_caches`, trainings that read the same images in the same way share one pass of the backbone."""

from __future__ import annotations

import pytest
import torch
from device import here
from small import labelled, made
from torch.utils.data import Subset, TensorDataset

from ptee.training import training_data
from ptee.training.trainer import train
from ptee.training.training_data import shared_caches

HOW = {"epochs": 1, "batch_size": 8, "device": here(), "precision": "no", "views": 2, "shift": 0}


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(*labelled(24))


@pytest.fixture
def caches(monkeypatch) -> list[object]:
    """All caches that are filled."""
    filled: list[object] = []
    fill = training_data.fill

    def noted(*words: object, **more: object) -> object:
        filled.append(fill(*words, **more))
        return filled[-1]

    monkeypatch.setattr(training_data, "fill", noted)
    return filled


def heads(model) -> list[torch.Tensor]:
    return [p.clone() for p in model.heads.parameters()]


def test_a_second_training_runs_the_backbone_no_more_and_ends_with_the_same_heads(data, caches):
    model, start = made(), {}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, data, **HOW)
    alone = heads(model)
    with shared_caches():
        for lr in (0.05, None):
            model.load_state_dict(start)
            train(model, data, **HOW, **({"lr": lr} if lr else {}))
    assert len(caches) == 2  # that of the training alone, and the shared one
    assert all(map(torch.equal, heads(model), alone))


def test_outside_no_cache_is_kept(data, caches):
    model = made()
    with shared_caches():
        train(model, data, **HOW)
    train(model, data, **HOW)
    assert len(caches) == 2
    assert [cache._tensors for cache in caches] == [[], []]


@pytest.mark.parametrize(
    ("first", "second", "passes"),
    [
        ({"seed": 0}, {"seed": 1}, 1),
        ({"lr": 0.01}, {"lr": 0.02, "loss": "joint"}, 1),
        ({"views": 3, "seed": 0}, {"views": 3, "seed": 1}, 2),
        ({"views": 2}, {"views": 3}, 2),
        ({"mirror": False, "seed": 0}, {"mirror": False, "seed": 1}, 2),
        ({"batch_size": 8}, {"batch_size": 6}, 2),
    ],
    ids=str,
)
def test_settings_share_a_pass_only_where_they_do_not_change_what_is_read(first, second, passes, data, caches):
    model = made()
    with shared_caches():
        for settings in (first, second):
            train(model, data, **{**HOW, **settings})
    assert len(caches) == passes


def test_parts_of_a_data_set_are_known_by_their_rows(data, caches):
    model = made()
    with shared_caches():
        for rows in (range(12), list(range(12)), range(12, 24)):
            train(model, Subset(data, rows), **HOW)
        train(model, TensorDataset(*data.tensors), **HOW)  # equal, but another object
    assert len(caches) == 3 - 1 + 1


def test_another_backbone_and_heads_that_read_something_else_have_a_pass_of_their_own(data, caches):
    with shared_caches():
        for head in ("pool", "bnpool", "conv1"):
            train(made(head), data, **HOW)
    assert len(caches) == 3
