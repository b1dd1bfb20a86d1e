from __future__ import annotations

import pytest

from ptee._common.errors import PteeError
from ptee.evaluation.config import DEFAULT_LOSS, TARGETS, DropsConfig, ThresholdsConfig


@pytest.mark.parametrize(("labelled", "kind"), [(True, "max_drop"), (False, "max_fidelity_drop")])
def test_without_a_target_a_small_loss_is_allowed_of_accuracy_where_there_are_labels(labelled, kind):
    assert ThresholdsConfig().target(labelled) == (kind, DEFAULT_LOSS)
    assert ThresholdsConfig(max_loss=0.03).target(labelled) == (kind, 0.03)


@pytest.mark.parametrize("kind", TARGETS[1:])
def test_a_target_that_is_given_is_taken(kind):
    assert ThresholdsConfig(**{kind: 0.5}).target(labelled=True) == (kind, 0.5)


def test_thresholds_that_are_given_need_no_target():
    assert ThresholdsConfig(threshold=(0.9, 0.8)).target(labelled=True) is None


def test_two_ways_to_choose_thresholds_are_refused():
    with pytest.raises(PteeError, match=r"threshold=0\.5 and max_cost=0\.5 are given"):
        ThresholdsConfig(threshold=0.5, max_cost=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_drop": 0.02}, r"margin=0.05 leaves nothing of max_drop=0.02\. Give margin=0.02 or less\."),
        ({}, r"margin=0.05 leaves nothing of max_loss=0.01\. Give margin=0.01 or less\."),
    ],
    ids=str,
)
def test_a_margin_larger_than_the_limit_is_refused(settings, words):
    with pytest.raises(PteeError, match=words):
        ThresholdsConfig(margin=0.05, **settings)


@pytest.mark.parametrize("settings", [{"max_cost": 0.5}, {"max_drop": 0.05}], ids=str)
def test_a_margin_that_leaves_something_is_accepted(settings):
    assert ThresholdsConfig(margin=0.05, **settings).margin == 0.05


@pytest.mark.parametrize("settings", [{"margin": 0.05}, {"one_threshold": True}], ids=str)
def test_how_thresholds_are_chosen_is_no_question_where_they_are_given(settings):
    with pytest.raises(PteeError, match=r"is about thresholds that are chosen, and threshold=0\.5 is given"):
        ThresholdsConfig(threshold=0.5, **settings)


def test_the_drops_of_a_comparison_have_a_default():
    assert DropsConfig().drops == (0.0, 0.005, 0.01, 0.02)
