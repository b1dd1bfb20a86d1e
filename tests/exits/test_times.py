from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ptee.exits.times import BatchTimes

ALL = torch.tensor([True, True], device="cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(device: torch.device) -> None:
    """Times lie there, wherever the network ran."""
    torch.set_default_device("cpu")


def with_steps(batch: int, step: int) -> BatchTimes:
    """Every piece takes one unit for each `step` rows that have begun, as in buckets; a head takes a tenth of that."""
    rows = torch.tensor([math.ceil(r / step) for r in range(batch + 1)], dtype=torch.float64)
    return BatchTimes(rows.expand(3, -1), 0.1 * rows.expand(2, -1), 0.5, "units")


def by_hand(times: BatchTimes, shares: list[float]) -> float:
    """Every way in which the images of a batch can leave, with its chance."""
    total = 0.0
    for leaving in itertools.product(range(3), repeat=times.batch):
        come = [sum(e >= n for e in leaving) for n in range(3)]
        chance = math.prod(shares[e] for e in leaving)
        total += chance * (times.call + times.at_rows(ALL, come))
    return total


@pytest.mark.parametrize("shares", [[0.5, 0.25, 0.25], [0.1, 0.0, 0.9], [0.0, 0.3, 0.7]], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_expected_time_is_the_mean_over_all_ways_to_leave(batch, shares):
    times = with_steps(batch, 2)
    assert times.expected(ALL, shares) == pytest.approx(by_hand(times, shares))


def test_where_all_leave_at_one_exit_nothing_is_spent_behind_it():
    times = with_steps(4, 1)
    assert times.expected(ALL, [1.0, 0, 0]) == pytest.approx(0.5 + 4 * 1.1)
    assert times.expected(ALL, [0.0, 0, 1]) == pytest.approx(0.5 + 4 * 3.2)


def test_a_head_that_does_not_run_costs_nothing_and_without_heads_it_is_the_bare_backbone():
    times = with_steps(4, 1)
    assert times.expected(torch.tensor([False, True]), [0, 0, 1]) == pytest.approx(0.5 + 4 * 3.1)
    assert times.expected(torch.tensor([False, False]), [0, 0, 1]) == 1
    assert times.at_rows(torch.tensor([False, True]), [4, 4, 4]) == pytest.approx(4 * 3.1)


def test_the_more_leave_early_the_less_it_takes():
    times = with_steps(8, 3)
    found = [times.expected(ALL, [share, 0.0, 1 - share]) for share in torch.linspace(0, 1, 11).tolist()]
    assert found == sorted(found, reverse=True)


def test_prices_of_times_that_are_linear_are_all_the_same_and_add_up_to_the_time():
    rows = torch.arange(5.0, dtype=torch.float64) / 4
    times = BatchTimes(torch.stack([0.2 * rows, 0.8 * rows]), 0.1 * rows[None], 0.0, "units")
    for prices in times.prices():
        assert prices.where(torch.tensor([[True], [False]])).tolist() == [
            pytest.approx([0.3, 1.1]), pytest.approx([0.2, 1.0]),
        ]  # fmt: skip


def test_prices_of_steps_say_what_the_upper_and_the_lower_half_of_a_batch_add():
    rows = torch.tensor([0, 3, 3, 3, 4], dtype=torch.float64)  # nearly all is spent on the first row
    mean, upper, lower = BatchTimes(rows[None].expand(2, -1), rows[None], 0.0, "units").prices()
    assert (mean.segments[0], upper.segments[0], lower.segments[0]) == (4, 2, 6)


def test_where_more_rows_were_measured_to_take_less_a_row_takes_nothing_and_not_less():
    rows = torch.tensor([0, 2, 3, 2, 1], dtype=torch.float64)
    _, upper, lower = BatchTimes(rows[None].expand(2, -1), rows[None], 0.0, "units").prices()
    assert (upper.segments[0], upper.heads[0], lower.segments[0]) == (0, 0, 6)


def test_moving_rows_costs_where_some_leave_and_others_stay():
    times = with_steps(2, 1)
    dear = replace(times, moves=torch.ones(2, 3, dtype=torch.float64))
    for shares, moved in ([0.0, 0.0, 1.0], 0), ([1.0, 0.0, 0.0], 0), ([0.5, 0.0, 0.5], 0.5), ([0.0, 0.5, 0.5], 0.5):
        assert dear.expected(ALL, shares) - times.expected(ALL, shares) == pytest.approx(moved, abs=1e-9)
