"""The scripts that train heads in other ways and compare what they cost where as much is lost."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from learning import fit, heads, made, same

import ptee
from ptee.training.losses import LOSSES, separate_loss
from ptee.tuning.traces import Traces

SCRIPTS = str(Path(__file__).parents[1] / "recipes" / "scripts")


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("variants")
    sys.modules.pop("variants")


@pytest.fixture
def equal_loss(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("equal_loss")
    sys.modules.pop("equal_loss")


def trained(variants, name: str, **settings) -> ptee.EarlyExitModel:
    model = made()
    with variants.trained_as(name):
        fit(model, loss="separate", **settings)
    return model


@pytest.mark.parametrize("name", ["ranking", "averaged", "sharpness", "stagewise"])
def test_a_variant_trains_in_another_way_and_what_comes_after_it_as_before(variants, name):
    plain = heads(trained(variants, "one"))
    assert not same(heads(trained(variants, name)), plain)
    assert same(heads(trained(variants, "one")), plain)
    assert LOSSES["separate"] is separate_loss


def test_averaged_weights_are_the_mean_of_the_last_two_epochs(variants):
    steady = {"schedule": "constant"}
    second, third = (heads(trained(variants, "one", epochs=epochs, **steady)) for epochs in (2, 3))
    for key, value in heads(trained(variants, "averaged", epochs=3, **steady)).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (second[key] + third[key]) / 2)


def test_a_head_that_learns_for_the_blend_leaves_the_earlier_ones_alone(variants):
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 4, requires_grad=True)
    target = torch.arange(8) % 4
    variants.stagewise_loss(logits, torch.zeros(2, 8), torch.zeros(3), target).backward()
    assert logits.grad is not None and not logits.grad[0].any() and logits.grad[1].any()
    product = (logits[0].softmax(-1) * logits[1].softmax(-1)).log()[None]
    given = torch.cat([product, logits[2:]]).detach().requires_grad_()
    separate_loss(given, torch.zeros(1, 8), torch.zeros(2), target).backward()
    torch.testing.assert_close(logits.grad[1], given.grad[0])


def test_a_cost_between_two_points_lies_on_their_line(equal_loss):
    points = np.array([(0.2, 2.0), (0.6, 0.0), (0.4, 1.0)])
    assert equal_loss.costs_at(points, [0.5, 1.0, 1.5]).tolist() == pytest.approx([0.5, 0.4, 0.3])


def traces(answers, confidence, targets) -> Traces:
    """Of two exits; the second and the backbone are right."""
    n, targets = len(targets), torch.tensor(targets)
    answers = torch.stack([torch.tensor(answers), targets, targets])
    h = torch.stack([torch.tensor(confidence), torch.zeros(n), torch.ones(n)])
    costs = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    logits = 4 * torch.nn.functional.one_hot(answers, 3).float()
    return Traces(answers, h, targets, costs, torch.empty(0), logits=logits, confidence_logits=torch.zeros(2, n))


def test_thresholds_by_class_tell_apart_a_class_that_is_right_at_a_low_confidence(equal_loss):
    found = traces([0, 0, 1, 1, 1], [0.3, 0.9, 0.6, 0.5, 0.9], [0, 0, 2, 2, 1])  # class 1 is wrong up to .6
    cheapest = [min(p for p in way(found, found) if p[1] <= 0)[0] for way in (equal_loss.by_class, equal_loss.by_one)]
    assert cheapest == pytest.approx([(3 * 0.2 + 2) / 5, (2 * 0.2 + 3) / 5])


def test_a_confidence_that_sees_earlier_exits_is_higher_where_they_agree(equal_loss):
    """The first exit is wrong in every third image; where it is, so is the second."""
    wrong = torch.arange(90) % 3 == 0
    targets = [0] * 90
    first = traces(wrong.long().tolist(), [0.5] * 90, targets)
    first.answers[1] = torch.where(wrong, 2, 0)
    first.logits[1] = 4 * torch.nn.functional.one_hot(first.answers[1], 3).float()
    for earlier in (True, False):
        on_first, on_second = equal_loss.fitted(first, first, earlier=earlier)
        for found in (on_first, on_second):
            assert bool(found.confidence[1][~wrong].min() > found.confidence[1][wrong].max() + 0.5) == earlier
            assert found.confidence.shape == (3, 90) and (found.confidence[-1] == 1).all()
