"""Images for a backbone: which parts are drawn, and what the recipe becomes where there are no labels to learn from."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ptee._common.errors import Argument, DataError
from ptee.data.labels import LabelMap
from ptee.pipeline.images import described_change, from_data_sets, has_labels, recipe_for
from ptee.pipeline.recipe import make_recipe

GOOD = LabelMap((0, 1), "Two classes.")
NONE = LabelMap(
    None, "These are no classes of the backbone.", remedy=("Name them in ", Argument("classes", "FILE"), ".")
)
DOUBTFUL = LabelMap((0, 1), "Two classes.", doubt="The backbone is right by chance.")


def images(n: int, labels: bool = True) -> TensorDataset:
    return TensorDataset(
        torch.arange(n).float().expand(3, 4, 4, n).permute(3, 0, 1, 2),
        *([torch.zeros(n, dtype=torch.long)] if labels else []),
    )


def levels(part: object) -> list[int]:
    return [int(part[i][0].max()) for i in range(len(part))]


# ---------------------------------------------------------------------------------------------------- parts


def test_parts_that_are_missing_are_drawn_from_the_training_images_and_none_is_in_two():
    data = from_data_sets(images(20), None, None, seed=1)
    parts = [levels(part) for part in (data.train, data.calibration, data.validation)]
    assert [len(part) for part in parts] == [16, 2, 2]
    assert sorted(row for part in parts for row in part) == list(range(20))
    again, other = (from_data_sets(images(20), None, None, seed=seed) for seed in (1, 2))
    assert levels(again.validation) == parts[2] != levels(other.validation)


def test_parts_that_are_given_are_taken_as_they_are():
    train, validation, calibration = images(20), images(5), images(6)
    data = from_data_sets(train, validation, calibration, seed=0)
    assert (data.train, data.validation, data.calibration) == (train, validation, calibration)
    assert data.split["sizes"] == {"train": 20, "calibration": 6, "validation": 5}


class MNIST(TensorDataset):
    """Named like torchvision's."""


def test_digits_of_torchvision_are_not_mirrored_and_other_data_sets_are():
    digits, others = MNIST(*images(20).tensors), images(20)
    for train in (
        digits,
        Subset(digits, range(12)),
        ConcatDataset([others, digits]),
        Subset(Subset(digits, [1, 2]), [1]),
    ):
        assert not from_data_sets(train, others, others, seed=0).mirror
    others.datasets, others.dataset = 3, digits  # names of the user's own
    for train in (others, Subset(others, range(12)), ConcatDataset([others, others])):
        assert from_data_sets(train, digits, digits, seed=0).mirror


@pytest.mark.parametrize("labels", [True, False])
def test_whether_there_are_labels_is_seen_from_the_images(labels):
    assert has_labels(from_data_sets(images(20, labels), None, None, seed=0)) is labels


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("name", ["ptee", "pteenet", "eenet", "branchynet", "ztw"])
def test_with_labels_that_can_be_trusted_the_recipe_stays_as_it_is(name):
    assert recipe_for(GOOD, make_recipe(name)) == make_recipe(name)


@pytest.mark.parametrize("labels", [NONE, DOUBTFUL], ids=["none", "doubtful"])
def test_without_them_the_heads_learn_the_backbones_answers_and_fidelity_is_kept(labels):
    joint = recipe_for(labels, make_recipe("eenet"))
    assert (joint.training.targets, joint.thresholds.threshold) == ("pseudo", 0.5)
    soft = recipe_for(labels, make_recipe("ptee", {"max_loss": 0.03}))
    assert (soft.training.resolved_targets, soft.thresholds.max_fidelity_drop) == ("soft", 0.03)
    assert soft.thresholds.max_loss is None


def test_what_labels_that_are_in_doubt_change_is_said_and_nothing_where_nothing_changes():
    for settings, said in (
        ({}, " Thresholds are chosen for fidelity: at most 0.01 of the answers differ from the backbone's."),
        ({"max_cost": 0.5}, ""),
        ({"threshold": 0.5}, ""),
        ({"max_fidelity_drop": 0.02}, ""),
    ):
        recipe = make_recipe("ptee", settings)
        assert described_change(recipe, recipe_for(DOUBTFUL, recipe)) == said
        assert described_change(recipe, recipe_for(GOOD, recipe)) == ""


@pytest.mark.parametrize("labels", [NONE, DOUBTFUL], ids=["none", "doubtful"])
@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"max_drop": 0.02}, "max_fidelity_drop=0.02"),
        ({"targets": "labels"}, "targets='pseudo'"),
        ({"question": "best"}, "question='agrees'"),
    ],
    ids=str,
)
def test_what_needs_labels_is_refused_with_what_to_give_instead(labels, settings, instead):
    with pytest.raises(DataError) as refusal:
        recipe_for(labels, make_recipe("ptee", settings))
    assert str(refusal.value).endswith(f" Or give {instead}.")
    assert refusal.value.argument == next(iter(settings))
