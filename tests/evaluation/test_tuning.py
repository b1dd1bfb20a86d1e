from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import small
import torch
from small import made
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.data.splits import Data
from ptee.evaluation.targets import Solution, Wish
from ptee.evaluation.traces import Score
from ptee.evaluation.tuning import Unseen, kept, parts_for_all, parts_for_tuning

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


def data(*delivered: str, n: int = 10) -> Data:
    sets = [list(range(start, start + n)) for start in (0, 100, 200)]
    return Data(*sets, ("a", "b"), "source", {"parts": dict.fromkeys(delivered)})


@pytest.mark.parametrize(
    ("delivered", "halved"),
    [
        (["train", "calibration", "validation"], False),
        (
            ["train", "validation"],
            True,
        ),  # calibration images drawn from the training images: the backbone has seen them
        (["train", "calibration"], False),
        (["train"], False),
    ],
    ids=str,
)
def test_images_to_tune_on_are_never_those_to_report_on(delivered, halved):
    source = data(*delivered)
    parts = parts_for_tuning(source, source.validation, 0)
    chosen, left = set(parts.calibration), set(parts.report)
    assert not chosen & left
    assert (chosen | left == set(source.validation)) == halved
    assert parts.words.startswith(f"Thresholds are chosen on {'5 of the 10' if halved else 'the 10'}")


def test_halves_are_the_same_for_the_same_seed_only():
    source, unseen = data("train"), list(range(100))
    one, same, other = (parts_for_tuning(source, unseen, seed) for seed in (1, 1, 2))
    assert list(one.calibration) == list(same.calibration) != list(other.calibration)
    assert sorted([*one.calibration, *one.report]) == unseen


def test_one_image_is_too_few_to_choose_and_to_report():
    source = data("train", "validation", n=1)
    with pytest.raises(DataError, match="has 1"):
        parts_for_tuning(source, source.validation, 0)


def unseen(source: Data, seed: int = 0, *, whole: bool = True) -> Unseen:
    source.split["rule"] = f"drawn with seed {seed}"
    return Unseen(f"run{seed}", source, source.validation if whole else list(range(1000)), seed)


def test_runs_that_were_made_with_other_seeds_share_validation_images_that_were_delivered():
    source = data("train", "validation")
    parts = parts_for_all([unseen(source, 1), unseen(source, 2)])
    assert sorted([*parts.calibration, *parts.report]) == source.validation


def test_images_that_were_drawn_for_one_run_are_no_other_runs_to_report_on():
    with pytest.raises(DataError, match=r"run1 and run2 drew theirs with other seeds \(1, 2\).*--data FOLDER"):
        parts_for_all([unseen(data("train"), 1), unseen(data("train"), 2)])


def test_a_run_of_other_data_keeps_to_what_the_others_have_not_seen():
    source = data("train")
    parts = parts_for_all([unseen(source, 2, whole=False), unseen(source, 1)])
    assert (parts.calibration, parts.report) == (source.calibration, source.validation)


def test_runs_of_other_data_want_the_same_images():
    other = Data(*[[1, 2, 3]] * 3, ("a", "b"), "elsewhere", {"parts": {"train": None}})
    with pytest.raises(DataError, match="run1 was measured on source, run2 on elsewhere"):
        parts_for_all([unseen(data("train"), 1), unseen(other, 2)])


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
