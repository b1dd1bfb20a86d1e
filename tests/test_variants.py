"""The scripts that train heads in other ways and compare what they cost where as much is lost."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
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


def test_the_ranking_loss_pushes_right_answers_above_wrong_ones(variants):
    logits = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 1.5]], [[0.0, 0.0]] * 3])  # the second is wrong
    target, given = torch.tensor([0, 1, 1]), (torch.zeros(1, 3), torch.zeros(2))
    plain, ranked = (loss(logits, *given, target).item() for loss in (separate_loss, variants.ranking_loss))
    odds = [2.0, 1.0, 1.5]  # of two classes: the difference of their logits
    assert ranked - plain == pytest.approx(0.1 * sum(max(0, 1 + odds[1] - odds[n]) for n in (0, 2)) / 2, rel=1e-4)


def test_a_sharpness_aware_step_of_no_length_leaves_the_weights_where_they_were(variants):
    model, before = made(), heads(made())
    with variants.trained_as("sharpness"):
        fit(model, loss="separate", lr=1e-12, optimizer="adam", weight_decay=0.0, epochs=1, schedule="constant")
    for name, value in heads(model).items():
        if "running" not in name and value.is_floating_point():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


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
    assert equal_loss.costs_at(points, [0.5, 1.0, 1.5, 9.0]).tolist() == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert np.isnan(equal_loss.costs_at(points, [-0.1])).all(), "no point loses so little"


def test_a_point_that_costs_more_and_loses_more_than_another_does_not_count(equal_loss):
    points = np.array([(1.0, 0.0), (0.6, -0.1), (0.5, 0.2)])
    assert equal_loss.costs_at(points, [0.0]).tolist() == pytest.approx([0.6 - 0.1 / 3])


def test_lines_are_compared_seed_by_seed_and_only_where_both_reach(equal_loss):
    falling = {seed: np.array([(0.6 + seed, 0.0), (0.3 + seed, 1.5)]) for seed in range(3)}
    late = {seed: np.add(points, (0.1, 0.6)) for seed, points in falling.items() if seed}
    cells = equal_loss.line("late", late, falling)
    assert cells[:3] == ["late", "2", "-"] and cells[-1] == "+0.220, +0.220"
    one = falling | {0: np.add(falling[0], (0.0, 0.25))}
    assert equal_loss.line("one", one)[2] == "2.100 ± 0.707 (2 of 3)"


def test_names_that_differ_before_the_seed_are_lines_of_their_own(equal_loss, monkeypatch, tmp_path):
    names = ("v10", "v11", "v60", "v61", "one0")
    for name in names:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(equal_loss, "traces_of", lambda run: run)
    monkeypatch.setattr(equal_loss, "curve", lambda way, run: np.array([(len(run.name) / 10, 0.0)]))
    printed = CliRunner().invoke(equal_loss.main, [*(str(tmp_path / name) for name in names), "--base", "one"]).output
    lines = [[cell.strip() for cell in row.split("|")[1:4]] for row in printed.splitlines()[2:]]
    assert lines == [["one", "1", "0.400"], ["v1", "2", "0.300 ± 0.000"], ["v6", "2", "0.300 ± 0.000"]]


def traces(*of: list[float]) -> Traces:
    """Of two exits; the second and the backbone are right. On the CPU, as traces are."""
    with torch.device("cpu"):
        return _traces(*of)


def _traces(answers: list[float], confidence: list[float], targets: list[float]) -> Traces:
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
    wrong = torch.arange(90, device="cpu") % 3 == 0
    targets = [0] * 90
    first = traces(wrong.long().tolist(), [0.5] * 90, targets)
    first.answers[1] = torch.where(wrong, 2, 0)
    first.logits[1] = 4 * torch.nn.functional.one_hot(first.answers[1], 3).float()
    for earlier in (True, False):
        on_first, on_second = equal_loss.fitted(first, first, earlier=earlier)
        for found in (on_first, on_second):
            assert bool(found.confidence[1][~wrong].min() > found.confidence[1][wrong].max() + 0.5) == earlier
            assert found.confidence.shape == (3, 90) and (found.confidence[-1] == 1).all()
