from __future__ import annotations

import math
import random

import pytest

from ptee.production.promise_test import TIMES, PromiseTest


def alarm_at(test: PromiseTest, losses: list[bool]) -> int | None:
    """The number of the image at which the promise is given up."""
    return next((n for n, differs in enumerate(losses, 1) if test.see(differs, n) is not None), None)


def drawn(seed: int, images: int, rate: float) -> list[bool]:
    random_numbers = random.Random(seed)
    return [random_numbers.random() < rate for _ in range(images)]


def test_no_bet_is_expected_to_grow_while_the_promise_holds():
    for bet in PromiseTest(0.01, 0.05).bets:
        assert 0.01 * bet.differ + 0.99 * bet.agree == pytest.approx(1)
        assert 0.001 * bet.differ + 0.999 * bet.agree < 1


def test_all_capital_is_put_on_one_image_or_the_other():
    test = PromiseTest(0.01, 1e-9)
    for n in range(100):
        before = [bet.capital for bet in test.bets]
        assert test.see(False, n) is None
        entering = math.log(2) / math.log(n + 2) - math.log(2) / math.log(n + 3)
        for bet, capital in zip(test.bets, before, strict=True):
            assert bet.capital == pytest.approx((capital + entering) * bet.agree)
    assert len(test.bets) == len(TIMES)


def test_capital_that_waits_and_capital_that_wins_nothing_are_1_together():
    test = PromiseTest(0.01, 1 - 1e-9)
    for bet in test.bets:
        bet.agree = 1.0
    assert not any(test.see(False, n) for n in range(1, 100))
    test.alpha = 1 + 1e-9
    assert all(test.see(False, n) for n in range(100, 200))


def test_a_promise_that_is_kept_is_given_up_in_few_of_many_streams():
    alarms = [alarm_at(PromiseTest(0.05, 0.05), drawn(seed, 2000, 0.05)) for seed in range(20)]
    assert sum(found is not None for found in alarms) <= 2


def test_a_promise_that_was_kept_for_long_is_given_up_soon_and_the_fall_is_dated():
    losses = drawn(0, 3000, 0.01) + drawn(1, 1000, 0.1)
    test = PromiseTest(0.01, 0.05)
    found = next(bet for n, differs in enumerate(losses, 1) if (bet := test.see(differs, n)) is not None)
    assert 3000 < test.seen < 3300
    assert 2900 < found.since <= test.seen
    assert found.audited == test.seen - found.since + 1


@pytest.mark.parametrize(("limit", "share"), [(0.01, 0.05), (0.01, 0.04), (0.05, 0.15), (0.2, 0.5)])
def test_about_so_many_audits_as_is_said_find_a_fall(limit, share):
    said = PromiseTest(limit, 0.05).audits_to_find(share)
    found = sorted(alarm_at(PromiseTest(limit, 0.05), drawn(seed, int(6 * said), share)) or 10**9 for seed in range(40))
    assert 0.5 * said < found[20] < 1.5 * said


def test_a_promise_that_is_kept_is_never_found_broken():
    test = PromiseTest(0.01, 0.05)
    assert test.audits_to_find(0.01) == test.audits_to_find(0) == math.inf
    assert test.audits_to_find(1) >= 1
    assert PromiseTest(1 - 1e-15, 0.05).audits_to_find(1) > 1e6
