from __future__ import annotations

import math

import pytest

from ptee._common.errors import PteeError
from ptee.pipeline.recipe import make_recipe
from ptee.tuning.config import DEFAULT_LOSS, TARGETS, DropsConfig, Target, ThresholdsConfig


@pytest.mark.parametrize(("labelled", "kind"), [(True, "max_drop"), (False, "max_fidelity_drop")])
def test_without_a_target_a_small_loss_is_allowed_of_accuracy_where_there_are_labels(labelled, kind):
    assert ThresholdsConfig().target(labelled) == Target(kind, DEFAULT_LOSS)
    assert ThresholdsConfig(max_loss=0.03).target(labelled) == Target(kind, 0.03)


@pytest.mark.parametrize("kind", TARGETS[1:])
def test_a_target_that_is_given_is_taken(kind):
    assert ThresholdsConfig(**{kind: 0.5}).target(labelled=True) == Target(kind, 0.5)


def test_thresholds_that_are_given_need_no_target():
    assert ThresholdsConfig(threshold=(0.9, 0.8)).target(labelled=True) is None


REFUSED = {
    "no target": ({}, r"no target.*Give one: max_drop=0.01, max_fidelity_drop=0.01 or max_cost=0.6\.", None),
    "two": ({"max_drop": 0.1, "max_cost": 0.5}, "max_drop=0.1 and max_cost=0.5 are given", "max_drop"),
    "a percentage": ({"max_drop": 2}, r"max_drop=2 must be below 1\. Did you mean 0\.02\?$", "max_drop"),
    "a negative drop": ({"max_fidelity_drop": -0.1}, "max_fidelity_drop=-0.1 must be 0 or more", "max_fidelity_drop"),
    "NaN": ({"max_drop": math.nan}, "max_drop=nan must be a finite number", "max_drop"),
    "words": ({"max_drop": "0.1"}, "max_drop='0.1' must be a number", "max_drop"),
    "True": ({"max_cost": True}, "max_cost=True must be a number", "max_cost"),
    "no cost": ({"max_cost": 0}, "max_cost=0 must be above 0", "max_cost"),
    "a cost in percent": ({"max_cost": 60}, "max_cost=60 must be below 10", "max_cost"),
    "a negative margin": ({"max_drop": 0.1, "margin": -1}, "margin=-1 must be 0 or more", "margin"),
    "a margin of words": ({"max_drop": 0.1, "margin": "much"}, "margin='much' must be a number, or 'auto'", "margin"),
    "a margin of None": ({"max_drop": 0.1, "margin": None}, "margin=None must be a number, or 'auto'", "margin"),
    "a margin larger than the drop": (
        {"max_fidelity_drop": 0.1, "margin": 0.2},
        r"margin=0.2 leaves nothing of max_fidelity_drop=0.1\. Give margin=0.1 or less",
        "margin",
    ),
    "a margin larger than the default": (
        {"margin": 0.05},
        r"margin=0.05 leaves nothing of max_loss=0.01\. Give",
        "margin",
    ),
    "one threshold of 1": (
        {"max_drop": 0.1, "one_threshold": 1},
        "one_threshold=1 must be True or False",
        "one_threshold",
    ),
}


@pytest.mark.parametrize(("arguments", "words", "argument"), REFUSED.values(), ids=REFUSED)
def test_a_target_that_cannot_be_is_refused_in_one_line_that_names_the_argument(arguments, words, argument):
    with pytest.raises(PteeError, match=words) as refused:
        Target.given(ThresholdsConfig(**arguments))
    assert "\n" not in str(refused.value)
    assert refused.value.argument == argument
    assert refused.value.value is arguments.get(argument)


@pytest.mark.parametrize("settings", [{"max_cost": 0.5}, {"max_drop": 0.05}], ids=str)
def test_a_margin_that_leaves_something_is_accepted(settings):
    assert ThresholdsConfig(margin=0.05, **settings).margin == 0.05


@pytest.mark.parametrize("settings", [{"margin": 0.05}, {"one_threshold": True}], ids=str)
def test_how_thresholds_are_chosen_is_no_question_where_they_are_given(settings):
    with pytest.raises(PteeError, match=r"is about thresholds that are chosen, and threshold=0\.5 is given"):
        ThresholdsConfig(threshold=0.5, **settings)


def test_the_drops_of_a_comparison_have_a_default():
    assert DropsConfig().drops == (0.0, 0.005, 0.01, 0.02)


def test_a_drop_below_zero_is_called_a_gain():
    assert str(Target("max_drop", -0.008)) == "accuracy at least 0.008 above the backbone's"
    assert str(Target("max_drop", 0.0)) == "accuracy at most 0 below the backbone's"


@pytest.mark.parametrize("threshold", [70, [0.5, 70]])
def test_a_threshold_in_percent_is_refused_before_anything_is_loaded(threshold):
    with pytest.raises(PteeError, match=r"did you mean (0\.5,)?0\.7\?$"):
        make_recipe(None, {"threshold": threshold})
