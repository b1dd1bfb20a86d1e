"""A p-value is right if, whatever the true shares are, it is at most delta in a share delta of all draws at most."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from ptee.production.few_images import images_needed, least_limit
from ptee.tuning.p_values import (
    NUISANCE_SHARE,
    images_needed_for_drop,
    least_limit_of_drop,
    p_value_of_drop,
    p_value_of_share,
)

DELTA = 0.05


def chance_of(lost: int, won: int, images: int, p_lost: float, p_won: float) -> float:
    """Of so many lost and won answers among the images."""
    neither = images - lost - won
    ways = math.comb(images, lost) * math.comb(images - lost, won)
    return ways * p_lost**lost * p_won**won * max(0.0, 1 - p_lost - p_won) ** neither


@pytest.mark.parametrize("delta", [0.05, 0.2])
@pytest.mark.parametrize("limit", [0.02, 0.05, 0.1, 0.3])
def test_a_drop_at_the_limit_is_taken_for_a_smaller_one_in_a_share_delta_of_all_draws_at_most(limit, delta):
    images = 24
    outcomes = [(lost, won) for lost in range(images + 1) for won in range(images + 1 - lost)]
    rejected = [o for o in outcomes if p_value_of_drop(*o, images, limit, delta) <= delta]
    assert rejected or limit == 0.02  # which needs more images
    for p_won in np.linspace(0, (1 - limit) / 2, 60):
        wrong = sum(chance_of(*o, images, p_won + limit, p_won) for o in rejected)
        assert wrong <= delta * (1 + 1e-3)


def test_more_that_is_lost_makes_it_less_sure_and_more_that_is_won_makes_it_surer():
    lost = [p_value_of_drop(k, 5, 1000, 0.01, DELTA) for k in range(0, 20, 2)]
    won = [p_value_of_drop(5, k, 1000, 0.01, DELTA) for k in range(0, 12, 2)]
    assert lost == sorted(lost)
    assert won == sorted(won, reverse=True)


def test_if_nothing_is_won_it_is_the_binomial_test_but_for_what_might_be_won():
    for lost in (0, 2, 10):
        exact = binom.cdf(lost, 2000, 0.01)
        assert exact <= p_value_of_drop(lost, 0, 2000, 0.01, DELTA) <= exact + 0.02


def test_it_is_never_surer_than_the_error_that_is_allowed_for_shares_that_are_not_tried():
    assert p_value_of_drop(0, 0, 10_000, 0.5, DELTA) >= NUISANCE_SHARE * DELTA


def test_what_is_won_counts():
    """By the lost ones alone, 20 of 1,500 are too many."""
    assert p_value_of_share(20, 1500, 0.01) > 0.5
    assert p_value_of_drop(20, 16, 1500, 0.01, DELTA) < DELTA


def test_a_drop_at_or_above_the_limit_is_never_shown_to_be_below_it():
    assert p_value_of_drop(10, 0, 1000, 0.01, DELTA) == 1
    assert p_value_of_drop(500, 0, 1000, 0.01, DELTA) == 1


@pytest.mark.parametrize(("most", "images"), [(0, 350), (4, 1000), (29, 4000)])
def test_so_many_answers_may_differ_that_at_most_one_in_a_hundred_is_shown_to(most, images):
    assert p_value_of_share(most, images, 0.01) <= DELTA < p_value_of_share(most + 1, images, 0.01)


@pytest.mark.parametrize("images", [10, 525, 999, 12_345])  # 7 / 525 * 525 is more than 7
@pytest.mark.parametrize("lost", [0, 1, 7])
def test_the_test_of_a_share_is_the_exact_binomial_one(lost, images):
    assert p_value_of_share(lost, images, 0.02) == pytest.approx(binom.cdf(lost, images, 0.02))


def test_one_point_at_95_percent_needs_299_images():
    assert images_needed(0.01, DELTA) == 299
    for p_value in (p_value_of_share(0, 299, 0.01), p_value_of_drop(0, 0, 299, 0.01, DELTA)):
        assert p_value <= DELTA
    assert p_value_of_share(0, 298, 0.01) > DELTA
    assert p_value_of_drop(0, 0, 298, 0.01, DELTA) > DELTA


@pytest.mark.parametrize(
    ("limit", "delta", "images"), [(0.99, 0.01, 1), (0.9, 0.01, 2), (0.5, 0.25, 2), (0.5, 0.24, 3)]
)
def test_a_whole_number_of_images_is_not_rounded_up_to_the_next(limit, delta, images):
    assert images_needed(limit, delta) == images


@pytest.mark.parametrize("images", [5, 180, 299])
def test_the_least_limit_is_that_which_needs_so_many_images(images):
    limit = least_limit(images, DELTA)
    assert images_needed(limit * 1.001, DELTA) <= images <= images_needed(limit * 0.999, DELTA)


@pytest.mark.parametrize("delta", [0.05, 0.01, 0.001])
@pytest.mark.parametrize("limit", [0.005, 0.01, 0.05])
def test_as_many_images_as_a_drop_needs_show_it_and_one_fewer_does_not(limit, delta):
    n = images_needed_for_drop(limit, delta)
    assert p_value_of_drop(0, 0, n, limit, delta) <= delta < p_value_of_drop(0, 0, n - 1, limit, delta)
    least = least_limit_of_drop(n, delta)
    assert p_value_of_drop(0, 0, n, least, delta) <= delta < p_value_of_drop(0, 0, n, least - 1e-4, delta)
