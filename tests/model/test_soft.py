"""Soft answers: all exits blended by their confidences, at full cost."""

from __future__ import annotations

import pytest
import torch
from device import seeded
from small import SIZE, K, made
from tiny import one_line
from torch import Tensor

import ptee
from ptee._common.errors import PteeError
from ptee.exits.blend import Blend
from ptee.exits.confidence import CONFIDENCES, FromProbabilities


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    return made()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, *SIZE, generator=seeded(2))


def blended(model: ptee.EarlyExitModel, x: Tensor, off: tuple[int, ...] = ()) -> Tensor:
    """Y_0, row by row and class by class, in float64."""
    every = model.all_exits(x)
    y, h = every.logits.detach().double().softmax(-1), every.confidence.detach().double()
    answer = y[-1]
    for n in reversed(range(len(model.exits))):
        if n not in off:
            answer = h[n, :, None] * y[n] + (1 - h[n, :, None]) * answer
    return answer


@pytest.mark.parametrize("confidence", ["learned", "max_prob", "entropy", "patience"])
def test_the_answer_is_y_0_of_the_recursion(model, x, confidence):
    model.confidence = confidence
    torch.testing.assert_close(
        model.predict(x, soft=True).logits.double().exp(), blended(model, x), atol=1e-6, rtol=1e-5
    )


def test_it_costs_everything_and_says_so_whatever_the_thresholds_are(model, x):
    model.threshold = 0
    out = model.predict(x, soft=True)
    assert out.cost.tolist() == pytest.approx([model.costs[-1]] * len(x))
    assert out.exit_index.tolist() == [len(model.exits)] * len(x)
    assert out.confidence.tolist() == [1.0] * len(x)


@pytest.mark.parametrize("off", [(0,), (1,)])
def test_an_exit_that_is_off_has_no_part_and_costs_nothing(model, x, off):
    model.off = off
    out = model.predict(x, soft=True)
    torch.testing.assert_close(out.logits.double().exp(), blended(model, x, off), atol=1e-6, rtol=1e-5)
    assert out.cost[0].item() == pytest.approx(model.costs[-1])
    assert model.costs[-1] < made().costs[-1]


def test_an_exit_that_is_off_has_no_part_though_its_head_runs_for_a_later_one(x):
    model = made("pool+")
    model.off = (0,)
    torch.testing.assert_close(
        model.predict(x, soft=True).logits.double().exp(), blended(model, x, (0,)), atol=1e-6, rtol=1e-5
    )


def test_with_all_exits_off_it_is_the_backbones_answer(model, x):
    model.off = (0, 1)
    torch.testing.assert_close(model.predict(x, soft=True).logits, model.backbone(x).log_softmax(-1))


@pytest.mark.parametrize("layer", ["confidence", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_exit_that_is_not_sure_of_anything_has_no_part(model, x, value, layer):
    with torch.no_grad():
        getattr(model.heads[0], layer).bias.fill_(value)
    got = model.predict(x, soft=True).logits
    off = made()
    off.off = (0,)
    torch.testing.assert_close(got, off.predict(x, soft=True).logits)


def test_a_confidence_that_rounding_brings_above_1_is_1(model, x, monkeypatch):
    monkeypatch.setitem(CONFIDENCES, "mine", FromProbabilities(lambda p: p.sum(-1) + 1e-6))
    model.confidence = "mine"
    first = model.all_exits(x).logits[0]
    torch.testing.assert_close(model.predict(x, soft=True).logits, first.log_softmax(-1))


def test_no_rows_get_no_answers(model, x):
    assert model.predict(x[:0], soft=True).logits.shape == (0, K)


def test_a_threshold_for_soft_answers_is_refused_in_one_line(model, x):
    with pytest.raises(PteeError, match="no threshold") as refusal:
        model.predict(x, 0.5, soft=True)
    one_line(refusal)


def test_answers_that_are_blended_already_are_refused_in_one_line(model, x):
    weights = {(0, ()): (1.0,), (1, (0,)): (0.5, 0.5), (2, (0, 1)): (0.3, 0.3, 0.4)}
    model.blend = Blend(weights, True)
    model.confidence, model.answers = "max_prob", "blended"
    with pytest.raises(PteeError, match="answers = 'own'") as refusal:
        model.predict(x, soft=True)
    one_line(refusal)
