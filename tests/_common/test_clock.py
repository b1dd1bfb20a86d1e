from __future__ import annotations

import pytest
import torch

from ptee._common import clock as clock_module
from ptee._common.clock import in_turns, ratio

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that moves only when a test moves it."""
    now = [0.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: now[0])
    return now


def test_every_call_is_timed_once_in_every_round_after_one_that_does_not_count():
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, rounds=4)
    assert order == ["a", "b"] * 5
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 4, "b": 4}


def test_the_times_are_those_of_the_calls_and_nothing_is_differentiated(clock):
    lengths, modes = iter([100.0, 1, 2, 3]), []

    def call() -> None:
        clock[0] += next(lengths)
        modes.append(torch.is_inference_mode_enabled())

    assert in_turns({"call": call}, CPU, rounds=3, seconds=1000) == {"call": [1, 2, 3]}
    assert modes == [True] * 4


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (4.5, 4), (100.0, 7)])
def test_no_round_begins_after_the_time_is_up_but_three_are_timed(seconds, rounds, clock):
    def call() -> None:
        clock[0] += 1

    assert len(in_turns({"call": call}, CPU, rounds=7, seconds=seconds)["call"]) == rounds


def test_the_ratio_is_the_median_of_the_ratios_of_each_round():
    # The machine slows down tenfold in the second round; the ratio of medians would be 40 / 4.
    assert ratio([2.0, 40, 40], [1.0, 10, 4]) == 4
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])
