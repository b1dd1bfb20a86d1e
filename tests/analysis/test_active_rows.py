"""The rows that are left: something that was computed earlier is matched to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptee.analysis.replay import ActiveRows


def test_at_the_start_all_rows_are_left_and_nothing_is_copied():
    rows, x = ActiveRows(3), torch.randn(3, 2)
    assert (rows.count, rows.moment, rows.since()) == (3, 0, None)
    assert rows.select(x) is x


@given(st.integers(1, 12), st.lists(st.integers(0, 2**12), max_size=4))
def test_the_rows_that_are_left_are_taken_from_a_tensor_of_any_earlier_moment(batch, departures):
    rows, left = ActiveRows(batch), list(range(batch))
    moments = [(rows.moment, torch.tensor(left))]
    for bits in departures:
        staying = [i for i in range(len(left)) if bits >> i & 1]
        rows.keep(torch.tensor(staying, dtype=torch.long))
        left = [left[i] for i in staying]
        moments.append((rows.moment, torch.tensor(left, dtype=torch.long)))
    assert rows.count == len(left)
    for moment, then in moments:
        assert rows.select(then, moment).tolist() == left


@pytest.mark.parametrize(("moment", "want"), [(0, [3]), (1, [1]), (2, None)])
def test_positions_count_the_rows_of_the_earlier_moment(moment, want):
    rows = ActiveRows(4)
    rows.keep(torch.tensor([1, 3]))
    rows.keep(torch.tensor([1]))
    found = rows.since(moment)
    assert (found if found is None else found.tolist()) == want
