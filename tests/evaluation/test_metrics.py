from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptee.evaluation.metrics import BINS, calibration_error, failure_auroc

rows = st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40)


def split(rows: list[tuple[int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([h / 8 for h, _ in rows]), torch.tensor([holds for _, holds in rows])


@given(rows)
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows):
    sure = [h for h, holds in rows if holds]
    unsure = [h for h, holds in rows if not holds]
    pairs = [(h > g) + (h == g) / 2 for h in sure for g in unsure]
    assert failure_auroc(*split(rows)) == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@given(rows)
def test_calibration_error_is_the_mean_distance_bin_by_bin(rows):
    bins: dict[int, list[float]] = {}
    for h, holds in rows:
        bins.setdefault(min(BINS - 1, int(h / 8 * BINS)), []).append(h / 8 - holds)
    assert calibration_error(*split(rows)) == pytest.approx(
        sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows), abs=1e-6
    )


def test_agrees_with_scikit_learn():
    from sklearn.metrics import roc_auc_score

    h = torch.rand(200)
    holds = torch.rand(200) < h
    assert failure_auroc(h, holds) == pytest.approx(roc_auc_score(~holds, 1 - h))


def test_a_confidence_that_is_right_as_often_as_it_says_is_calibrated():
    h = torch.rand(100_000)
    assert calibration_error(h, torch.rand(100_000) < h) < 0.01
    assert calibration_error(h, torch.rand(100_000) < 0.5) == pytest.approx(0.25, abs=0.01)


def test_what_is_no_number_is_least_sure_and_has_no_calibration():
    h, holds = torch.tensor([math.nan, 0.5, 1.0]), torch.tensor([False, True, True])
    assert failure_auroc(h, holds) == 1
    assert calibration_error(h, holds) == pytest.approx(0.25)
    assert calibration_error(torch.tensor([math.nan]), torch.tensor([True])) == 0
