"""Recipes fill in what was not said, and nothing else."""

from __future__ import annotations

import inspect

import pytest

from ptee.errors import PteeError, UnknownName
from ptee.recipes import PLAIN, RECIPES, followed
from ptee.training import train

NONE = dict.fromkeys(("recipe", "exits", "head", "loss", "targets", "temperature", "schedule", "gate", "epochs"), None)


def test_without_a_recipe_the_plain_way_is_gone():
    assert followed(NONE) == NONE | PLAIN


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


def test_the_plain_way_is_that_of_train():
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    shared = PLAIN.keys() & defaults.keys()
    assert {name: PLAIN[name] for name in shared} == {name: defaults[name] for name in shared}
    assert shared >= {"loss", "temperature", "schedule"}
