"""Recipes fill in what was not said, and nothing else."""

from __future__ import annotations

import pytest

from ptee._common.errors import PteeError, UnknownName
from ptee.pipeline.recipe import PLAIN, RECIPE, RECIPES, followed

OPTIONS = (
    *(
        "recipe",
        "exits",
        "num_exits",
        "head",
        "head_budget",
        "front",
        "loss",
        "targets",
        "temperature",
        "schedule",
        "gate",
    ),
    *("epochs", "augment", "shift", "optimizer", "lr", "weight_decay", "cost_weight"),
)
NONE = dict.fromkeys(OPTIONS)


def test_where_no_recipe_is_named_it_is_ours():
    assert followed(NONE) == NONE | PLAIN | RECIPES[RECIPE] | {"recipe": RECIPE}


def test_a_loss_of_all_heads_together_is_another_way_and_takes_nothing_of_a_recipe():
    assert followed(NONE | {"loss": "v1"}) == NONE | PLAIN | {"loss": "v1"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_was_not_said(name):
    assert followed(NONE | {"recipe": name}) == NONE | PLAIN | RECIPES[name] | {"recipe": name}


def test_what_was_said_stands():
    said = {"recipe": "pteenet", "head": "conv1", "exits": "0.2,0.5", "epochs": 3}
    got = followed(NONE | said)
    assert {key: got[key] for key in said} == said
    assert got["targets"] == "pseudo"


@pytest.mark.parametrize(("name", "head"), [("ztw", "conv2+"), ("branchynet", "conv2")])
def test_papers_whose_exits_learn_from_labels_each_for_itself(name, head):
    got = followed(NONE | {"recipe": name})
    assert [got[key] for key in ("exits", "head", "loss", "targets")] == ["pareto", head, "each", "labels"]
    with pytest.raises(PteeError, match=rf"recipe '{name}' .* --loss v1"):
        followed(NONE | {"recipe": name, "loss": "v1"})


@pytest.mark.parametrize(
    "said", [{"exits": "layer1,layer2"}, {"head": "pool"}, {"num_exits": 4}, {"front": "cifar_resnet20"}], ids=str
)
def test_the_budgets_of_three_heads_go_with_those_three(said):
    assert followed(NONE | {"recipe": "ptee"})["head_budget"] == (0.15, 0.03, 0.03)
    assert followed(NONE | {"recipe": "ptee"} | said)["head_budget"] is None


def test_another_number_of_exits_is_placed_by_a_rule():
    assert followed(NONE | {"num_exits": 4})["exits"] == "pareto"


@pytest.mark.parametrize("front", ["cifar_resnet20", "auto"])
def test_a_front_stands_for_the_first_exit(front):
    assert followed(NONE | {"front": front})["exits"] == "0.4,0.7"
    assert followed(NONE | {"front": front})["head"] == "auto+"


def test_a_front_that_is_learnt_has_the_budget_of_the_first():
    assert followed(NONE | {"front": "auto"})["head_budget"] == (0.15, 0.03, 0.03)


def test_options_of_plan_alone_can_follow_a_recipe():
    some = dict.fromkeys(("recipe", "exits", "num_exits", "head", "head_budget", "front"))
    assert followed(some)["head"] == "auto"


def test_a_temperature_goes_with_the_probabilities_it_is_of():
    got = followed(NONE | {"recipe": "ptee", "targets": "labels"})
    assert (got["targets"], got["temperature"]) == ("labels", 1.0)
    assert followed(NONE | {"recipe": "ptee"})["temperature"] == 2.0


def test_a_recipe_for_heads_alone_refuses_a_loss_of_them_together():
    with pytest.raises(PteeError, match=r"recipe 'ptee' .* --loss v1"):
        followed(NONE | {"recipe": "ptee", "loss": "v1"})


def test_an_unknown_recipe_is_refused_by_name():
    with pytest.raises(UnknownName, match=r"'ptenet'.*Did you mean 'pteenet'"):
        followed(NONE | {"recipe": "ptenet"})


def test_a_loss_weight_that_nothing_would_read_is_refused():
    with pytest.raises(PteeError, match=r"cost weight .* --loss v1"):
        followed(NONE | {"cost_weight": 0.2})
    assert followed(NONE | {"cost_weight": 0.2, "loss": "v1"})["cost_weight"] == 0.2


def test_the_rate_of_muon_goes_with_muon():
    got = followed(NONE | {"optimizer": "adam"})
    assert (got["lr"], got["weight_decay"]) == (PLAIN["lr"], PLAIN["weight_decay"])
    assert followed(NONE | {"optimizer": "adam", "lr": 0.5})["lr"] == 0.5
    assert followed(NONE | {"optimizer": "muon"})["lr"] == RECIPES["ptee"]["lr"]


@pytest.mark.parametrize("said", [{"head": "auto"}, {"exits": "0.03,0.4,0.7"}, {"gate": "agrees"}], ids=str)
def test_saying_what_is_taken_anyway_changes_nothing(said):
    assert followed(NONE | said) == followed(NONE)


def test_exits_that_are_chosen_get_the_heads_for_which_the_choice_is_sound():
    assert followed(NONE | {"exits": "auto"})["head"] == "pool"
    assert followed(NONE | {"exits": "auto", "front": "auto"})["head"] == "pool"
    assert followed(NONE | {"exits": "auto", "head": "conv1"})["head"] == "conv1"


def test_gates_can_be_left_out():
    assert followed(NONE | {"gate": "none"})["gate"] is None
