from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptee.evaluation.metrics import BINS, calibration_error, failure_auroc

rows = st.lists(st.tuples(st.integers(0, 32), st.booleans()), min_size=1, max_size=40)


def split(rows: list[tuple[int, bool]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([h / 32 for h, _ in rows]), torch.tensor([right for _, right in rows])


@settings(deadline=None)  # the first example imports scikit-learn
@given(rows)
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows):
    of_right, of_wrong = [h for h, right in rows if right], [h for h, right in rows if not right]
    pairs = [(h > g) + (h == g) / 2 for h in of_right for g in of_wrong]
    assert failure_auroc(*split(rows)) == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@given(rows)
def test_calibration_error_is_the_mean_distance_bin_by_bin(rows):
    bins: dict[int, list[float]] = {}
    for h, right in rows:
        bins.setdefault(min(BINS - 1, int(h / 32 * BINS)), []).append(h / 32 - right)
    assert calibration_error(*split(rows)) == pytest.approx(
        sum(abs(sum(gaps)) for gaps in bins.values()) / len(rows), abs=1e-6
    )


def test_a_confidence_that_is_the_share_of_right_answers_has_no_calibration_error():
    h = torch.rand(100_000)
    assert calibration_error(h, torch.rand(100_000) < h) < 0.01
    assert calibration_error(h, torch.rand(100_000) < 0.5) == pytest.approx(0.25, abs=0.01)


def test_nan_is_below_every_confidence_and_is_left_out_of_the_calibration_error():
    h, right = torch.tensor([math.nan, -math.inf, 0.5, 1.0]), torch.tensor([False, False, True, True])
    assert failure_auroc(h, right) == 1
    assert failure_auroc(h[:2], right[1:3]) == 0.5
    assert calibration_error(h, right) == pytest.approx(0.25)
    assert calibration_error(h[:1], right[:1]) == 0
