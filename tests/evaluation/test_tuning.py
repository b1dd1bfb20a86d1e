from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import small
import torch
from small import made
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError
from ptee.evaluation.targets import Solution, Wish
from ptee.evaluation.traces import Score
from ptee.evaluation.tuning import kept

labelled = partial(small.labelled, 60)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_tuning_sets_thresholds_that_meet_the_wish_when_the_model_is_run(training):
    model, (x, y) = made().train(training), labelled()
    found = ptee.tune(model, TensorDataset(x, y), max_fidelity_drop=0.25)
    assert model.threshold == list(found.threshold)
    assert model.training is training
    with torch.no_grad():
        out = model.eval().predict(x)
        bare = model.backbone(x).argmax(1)
    assert (out.logits.argmax(1) != bare).double().mean() <= 0.25
    assert found.fidelity_drop == pytest.approx((out.logits.argmax(1) != bare).double().mean().item())


def test_a_wish_that_is_refused_leaves_the_thresholds_alone():
    model = made()
    model.threshold = [0.3, 0.6]
    for wish in ({}, {"max_cost": 0.001}, {"max_drop": 0.1, "max_cost": 0.5}):
        with pytest.raises(PteeError):
            ptee.tune(model, TensorDataset(*labelled()), **wish)
    assert model.threshold == [0.3, 0.6]


def fared(fidelity: float, samples: int, kind: str = "max_fidelity_drop", accuracy: float = 0.88) -> str:
    """What is said of a wish on so many images, of which this share keeps its answer."""
    score = Score(0.9, fidelity, 0.5)
    found = Solution(Wish(kind, 0.02), (0.5,), (), score, Score(0.9, 1.0, 1.0), 100)
    bare = {"accuracy": 0.9, "fidelity": 1.0, "cost": 1.0}
    own = {"accuracy": accuracy, "fidelity": fidelity, "cost": 0.5}
    return kept(found, {"samples": samples, "rows": [bare, own]})


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.9, "0.0000 lost"), (0.9 + 1e-12, "0.0000 lost"), (0.88, "0.0200 lost"), (0.905, "0.0050 gained")],
)
def test_a_solution_says_in_words_what_is_lost(accuracy, words):
    found = Solution(Wish("max_drop", 0.02), (0.5,), (), Score(accuracy, 1.0, 0.5), Score(0.9, 1.0, 1.0), 100)
    assert f"accuracy {accuracy:.4f} ({words}), " in str(found)


def give_or_take(said: str) -> float:
    return float(said.split("give or take ")[1].split(" on ")[0])


@pytest.mark.parametrize("n", [50, 500, 5000])
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_how_well_a_loss_is_known_covers_it_on_nearly_all_samples_of_so_many_images(n, share):
    drawn = np.random.default_rng(0).binomial(n, share, 400) / n
    within = [abs(lost - share) <= give_or_take(fared(1 - lost, n)) + 0.5 / n for lost in drawn]
    assert np.mean(within) >= 0.9
    assert give_or_take(fared(1 - share, n)) < 2.5 * 1.96 * np.sqrt(share * (1 - share) / n) + 1 / n  # and no wider


def test_nothing_lost_on_a_few_images_is_not_known_to_be_nothing():
    assert "0.0000 of fidelity lost" in fared(1.0, 10)
    assert give_or_take(fared(1.0, 10)) > 0.1


def test_of_accuracy_and_cost_it_is_said_what_was_found():
    assert "0.0200 of accuracy lost, give or take" in fared(0.95, 1000, "max_drop")
    assert "0.0100 of accuracy gained, give or take" in fared(0.95, 1000, "max_drop", accuracy=0.91)
    assert fared(0.95, 1000, "max_cost").endswith("a cost of 0.5000.")
