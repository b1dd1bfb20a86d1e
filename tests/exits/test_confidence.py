"""Confidences by themselves: what they compute, in any precision, for any row; and who leaves."""

from __future__ import annotations

import math

import pytest
import torch
from device import here
from torch import Tensor
from torch.nn.functional import one_hot

from ptee._common.devices import _HAS_FLOAT64
from ptee._common.errors import PteeError, UnknownName
from ptee.exits.confidence import (
    CONFIDENCES,
    Calibrated,
    Confidence,
    find_confidence,
    first_exit,
    leaves,
    log_odds,
    register_confidence,
)

E, N, K = 3, 50, 5
each_confidence = pytest.mark.parametrize("name", CONFIDENCES)
CALIBRATED = Calibrated((0.5, 2.0, 1.0), (0.3, -0.2, 0.0))


def confidence(name: str) -> Confidence:
    return find_confidence(name, CALIBRATED)


def answers(classes: int = K) -> tuple[Tensor, Tensor]:
    """Logits (E, N, classes) and confidence logits (E, N)."""
    return 3 * torch.randn(E, N, classes), torch.randn(E, N)


@each_confidence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_h_is_float32_in_0_to_1_and_the_backbone_is_sure(name, dtype):
    logits, sure = answers()
    h = confidence(name).at_all_exits(logits.to(dtype), sure.to(dtype))
    assert (h.shape, h.dtype) == ((E + 1, N), torch.float32)
    assert 0 <= h.min() <= h.max() <= 1
    assert h[-1].tolist() == [1] * N


@each_confidence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32_also_for_1000_classes_and_inside_autocast(name, dtype):
    logits, sure = answers(1000)
    logits[0, :, 0] += 20  # p near 1, where half precision has few numbers
    half, half_sure = logits.to(dtype), sure.to(dtype)
    with torch.autocast(here().type, torch.bfloat16):
        h = confidence(name).at_all_exits(half, half_sure)
    exact = confidence(name).at_all_exits(half.double(), half_sure.double())
    torch.testing.assert_close(h, exact, rtol=1e-5, atol=1e-6)


@each_confidence
def test_a_row_does_not_depend_on_the_others(name):
    logits, sure = answers()
    h = confidence(name).at_all_exits(logits, sure)
    alone = [confidence(name).at_all_exits(logits[:, i, None], sure[:, i, None]) for i in range(N)]
    torch.testing.assert_close(torch.cat(alone, 1), h, rtol=1e-6, atol=1e-7)


@each_confidence
def test_adding_a_number_to_all_logits_of_a_row_changes_nothing(name):
    logits, sure = answers()
    h = confidence(name).at_all_exits(logits - logits.amax(-1, keepdim=True), sure)
    torch.testing.assert_close(h, confidence(name).at_all_exits(logits, sure))


@each_confidence
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_h_is_nan_where_a_logit_is_not_finite_and_the_other_rows_keep_theirs(name, bad):
    logits, sure = answers()
    clean = confidence(name).at_all_exits(logits, sure)
    logits[1, 3, 2], sure[1, 4] = bad, bad
    h = confidence(name).at_all_exits(logits, sure)
    assert h[1, [3, 4]].isnan().all()
    others = [n for n in range(N) if n not in (3, 4)]
    torch.testing.assert_close(h[:, others], clean[:, others])


@each_confidence
def test_a_logit_of_minus_infinity_only_rules_its_class_out(name):
    logits, sure = answers()
    logits[..., 0] = -math.inf
    h = confidence(name).at_all_exits(logits, sure)
    assert h.isfinite().all()
    if name != "entropy":  # which divides by log K
        torch.testing.assert_close(h, confidence(name).at_all_exits(logits[..., 1:], sure))


@each_confidence
def test_a_row_whose_classes_are_all_ruled_out_has_no_confidence(name):
    logits, sure = answers()
    logits[0, 0] = -math.inf
    assert confidence(name).at_all_exits(logits, sure)[0, 0].isnan()


@each_confidence
def test_one_class_is_no_error(name):
    logits, sure = answers(1)
    h = confidence(name).at_all_exits(logits, sure)[:-1]
    assert h.isfinite().all()
    if name in ("max_prob", "entropy", "margin"):  # which are of the class probabilities: there is no doubt
        assert (h == 1).all()


# the first exit says (1/2, 1/4, 1/4), the second says (1/3, 1/3, 1/3)
BY_HAND = {
    "learned": [1 / 4, 3 / 4],
    "max_prob": [1 / 2, 1 / 3],
    "margin": [1 / 4, 0],
    "entropy": [1 - 1.5 * math.log(2) / math.log(3), 0],
    "patience": [1 / 3, 2 / 3],
    "calibrated": [1 / (1 + math.exp(-(0.5 * 0 + 0.3))), 1 / (1 + math.exp(-(2 * math.log(1 / 2) - 0.2)))],
}


@each_confidence
def test_confidences_by_hand(name):
    logits = torch.tensor([[2.0, 1, 1], [1, 1, 1]]).log()[:, None]
    sure = torch.tensor([[1 / 3], [3.0]]).log()
    own = find_confidence(name, Calibrated((0.5, 2.0), (0.3, -0.2)))
    assert own.at_all_exits(logits, sure)[:-1, 0].tolist() == pytest.approx(BY_HAND[name], abs=1e-6)


def test_patience_counts_how_many_exits_in_a_row_agree():
    classes = torch.tensor([[0, 1, 2, 0], [0, 2, 2, 1], [0, 2, 1, 0]])  # (E, n)
    h = CONFIDENCES["patience"].at_all_exits(one_hot(classes).float(), torch.zeros(3, 4))
    assert (4 * h[:-1]).tolist() == [[1, 1, 1, 1], [2, 1, 2, 1], [3, 2, 1, 1]]


def test_an_answer_that_is_not_finite_agrees_with_none():
    logits = one_hot(torch.tensor([[0], [0]]), 3).float()
    logits[0, 0, 0] = math.nan
    assert (3 * CONFIDENCES["patience"].at_all_exits(logits, torch.zeros(2, 1)))[1].tolist() == [1]


def test_log_odds_tell_rows_apart_whose_probability_rounds_to_1():
    logits = torch.tensor([[30.0, 0, 0], [40, 0, 0], [0, 300, -100], [0, -math.inf, -math.inf]])
    assert logits.softmax(-1).amax(-1).tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(log_odds(logits), torch.tensor([30 - math.log(2), 40 - math.log(2), 50, 50]))


def test_calibrated_with_scale_1_and_shift_0_is_the_largest_probability():
    logits, sure = answers()
    as_it_is = Calibrated((1.0,) * E, (0.0,) * E)
    torch.testing.assert_close(as_it_is.at_all_exits(logits, sure), CONFIDENCES["max_prob"].at_all_exits(logits, sure))


# ---------------------------------------------------------------------------------------------------- names


def test_an_unknown_confidence_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match=r"Unknown confidence 'entorpy'\. Did you mean 'entropy'"):
        find_confidence("entorpy")


def test_calibrated_is_refused_before_anything_was_calibrated():
    for use in (lambda: find_confidence("calibrated"), lambda: CONFIDENCES["calibrated"].at_all_exits(*answers())):
        with pytest.raises(
            PteeError, match=r"not been fitted.*ptee\.calibrate\(model, data\).*or choose.*learned, max_prob"
        ):
            use()


@pytest.fixture
def own_names(monkeypatch) -> None:
    monkeypatch.setattr("ptee.exits.confidence.CONFIDENCES", dict(CONFIDENCES))


def gini(probabilities: Tensor) -> Tensor:
    return probabilities.square().sum(-1)


@pytest.mark.usefixtures("own_names")
def test_a_registered_confidence_is_found_by_name():
    register_confidence("gini")(gini)
    register_confidence("gini")(gini)  # a notebook cell that is run twice
    logits, sure = answers()
    h = find_confidence("gini").at_all_exits(logits, sure)
    torch.testing.assert_close(h[:-1], gini(logits.softmax(-1)))


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("entropy", gini, "'entropy' is taken"),
        ("learned", gini, "'learned' is taken"),
        ("mine", lambda p: p, r"into \(b,\) numbers; it gave \(4, 10\)"),
        ("mine", lambda p: 1, "it gave int"),
        ("mine", lambda p: -p.amax(-1), r"must lie in 0\.\.1"),
        ("mine", lambda p: p.amax(-1) / p.max(), "depends on the other rows"),
        ("mine", lambda p: p.amax(-1) * math.nan, r"must lie in 0\.\.1"),
    ],
)
def test_a_function_that_is_no_confidence_is_refused(name, function, said):
    with pytest.raises(PteeError, match=said):
        register_confidence(name)(function)


# ---------------------------------------------------------------------------------------------------- who leaves


def test_a_row_leaves_at_the_first_exit_that_reaches_its_threshold():
    h = torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.1, 0.8, 0.5, 0.4]])
    assert first_exit(h, [0.5, 0.5]).tolist() == [0, 1, 0, 2]
    assert first_exit(h, torch.tensor([0.6, 0.4])).tolist() == [0, 1, 1, 1]


def test_nan_never_leaves():
    h = torch.tensor([[math.nan, 1.0], [math.nan, math.nan]])
    assert first_exit(h, [-math.inf, -math.inf]).tolist() == [2, 0]
    assert leaves(h[0], -math.inf).tolist() == [False, True]


def test_a_threshold_between_two_float32_numbers_is_not_rounded():
    h = torch.tensor([0.7])
    above = h.double().item() + 1e-12
    assert leaves(h, h.double().item()).tolist() == [True]
    assert leaves(h, above).tolist() == [False]
    assert first_exit(h[None], [above]).tolist() == [1]


@pytest.mark.parametrize("threshold", [1 + 1e-12, 0.1, 0.7], ids=str)
def test_without_float64_the_same_rows_leave(threshold, monkeypatch):
    near = torch.tensor(threshold, device="cpu").item()  # the float32 beside it, above or below
    h = torch.tensor([near, near - 1e-6, near + 1e-6])
    wide = torch.tensor([threshold], dtype=torch.float64, device="cpu")
    wanted = [number >= threshold for number in h.tolist()]
    monkeypatch.setitem(_HAS_FLOAT64, here().type, False)
    assert leaves(h, threshold).tolist() == leaves(h, wide).tolist() == wanted
    assert first_exit(h[None], [threshold]).tolist() == [int(not leaving) for leaving in wanted]
    assert leaves(h, math.inf).tolist() == [False] * 3
