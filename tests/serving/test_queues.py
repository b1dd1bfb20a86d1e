"""Which rows go next, and how large a batch is."""

from __future__ import annotations

import numpy as np
import pytest

from ptee.serving.pieces import IMAGES
from ptee.serving.policy import policy_of
from ptee.serving.queues import Chunk, Queues, Request, joined


def rows(n: int, since: float = 0.0, first: int = 0) -> Chunk:
    request = Request(n, lambda found: None, False, since)
    values = np.arange(first, first + n, dtype=np.float32)[:, None]
    return Chunk([values], IMAGES, [(request, i) for i in range(n)], np.full((n, 2), 0.5), since)


def taken(queues: Queues, now: float = 0.0) -> tuple[int, int] | None:
    """The piece, and the rows of its batch."""
    found = queues.take(now)
    return found and (found[0], sum(map(len, found[1])))


def test_nobody_is_next_in_empty_queues():
    assert Queues((4, 4), 1.0).take(0.0) is None


def test_rows_that_arrive_go_at_once_while_survivors_gather():
    queues = Queues((4, 4), 1.0)
    queues.put(1, rows(2))
    queues.put(0, rows(1))
    assert [taken(queues), taken(queues), taken(queues)] == [(0, 1), (1, 2), None]


def test_a_full_batch_of_survivors_goes_before_those_that_arrive():
    queues = Queues((4, 4), 1.0)
    queues.put(0, rows(9))
    queues.put(1, rows(3))
    queues.put(1, rows(2))
    assert [taken(queues) for _ in range(5)] == [(1, 4), (0, 4), (0, 4), (0, 1), (1, 1)]


def test_survivors_that_have_waited_long_enough_go_first():
    queues = Queues((4, 4, 4), 1.0)
    queues.put(0, rows(4))
    queues.put(1, rows(1, since=0.0))
    queues.put(2, rows(1, since=0.5))
    assert taken(queues, 0.9) == (0, 4)
    queues.put(0, rows(4))
    assert [taken(queues, 1.0), taken(queues, 1.0)] == [(1, 1), (0, 4)]
    assert taken(queues, 1.5) == (2, 1)


def test_where_nobody_may_wait_those_who_are_farthest_go_first():
    queues = Queues((4, 4), 0.0)
    queues.put(0, rows(4))
    queues.put(1, rows(1))
    assert taken(queues) == (1, 1)


def test_rows_keep_their_order_and_their_values_when_they_are_split_and_joined():
    queues = Queues((4,), 1.0)
    for part in (rows(3), rows(6, first=3), rows(1, first=9)):
        queues.put(0, part)
    batches = [joined(queues.take(0.0)[1]) for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert np.concatenate([batch.alive[0] for batch in batches])[:, 0].tolist() == list(range(10))
    assert [i for batch in batches for _, i in batch.of] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0]
    assert queues.waiting == [0]


@pytest.mark.parametrize(("axis", "each"), [(0, 1), (0, 3), (1, 1), (1, 4)])
def test_rows_may_lie_in_any_axis_with_several_entries(axis, each):
    values = np.arange(5 * each * 2).reshape((5 * each, 2) if axis == 0 else (2, 5 * each))
    request = Request(5, lambda found: None, False, 0.0)
    chunk = Chunk([values], ((axis, each),), [(request, i) for i in range(5)], np.zeros((5, 1)), 0.0)
    parts = chunk.split(2)
    assert np.array_equal(joined(parts).alive[0], values)
    stays = chunk.select(np.array([1, 4]), [values], ((axis, each),), 1.0)
    folded = values.reshape((5, each, 2) if axis == 0 else (2, 5, each))
    assert np.array_equal(stays.alive[0], np.take(folded, [1, 4], axis).reshape((-1, 2) if axis == 0 else (2, -1)))


# ---------------------------------------------------------------------------------------------------- sizes by measure


def sizes(*seconds: dict[int, float], p99_ms: float | None = None) -> tuple[int, ...]:
    return policy_of(seconds, max_wait_s=0.001, p99_ms=p99_ms, max_queue=9).sizes


def test_collecting_is_off_where_rows_get_no_cheaper_together():
    assert sizes({1: 1.0, 2: 1.9, 4: 3.8}) == (1,)


def test_the_smallest_batch_whose_rows_are_nearly_as_cheap_as_they_get():
    assert sizes({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.1}, {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}) == (4, 8)


def test_batches_are_made_smaller_until_a_row_is_through_in_half_of_the_wish():
    fast = {1: 0.010, 2: 0.011, 4: 0.012, 8: 0.013}
    slow = {1: 0.010, 2: 0.020, 4: 0.025, 8: 0.040}
    assert sizes(fast, slow) == (8, 8)
    assert sizes(fast, slow, p99_ms=80) == (8, 4)
    assert sizes(fast, slow, p99_ms=1) == (1, 1)


def test_the_policy_says_what_it_measured():
    text = str(policy_of([{1: 0.002, 2: 0.0021}, {1: 0.001, 2: 0.002}], max_wait_s=0.001, p99_ms=None, max_queue=9))
    assert "2.00" in text and "1.05" in text and "does not pay" in text
