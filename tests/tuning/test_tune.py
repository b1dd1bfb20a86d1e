from __future__ import annotations

import contextlib
import copy
import inspect
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import small
import torch
from device import seeded
from small import SIZE, made
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.exits.times import BatchTimes
from ptee.tuning.config import Target, ThresholdsConfig
from ptee.tuning.solution import Solution
from ptee.tuning.traces import Score
from ptee.tuning.tune import describe_outcome

labelled = partial(small.labelled, 60)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_tuning_sets_thresholds_that_meet_the_target_when_the_model_is_run(training):
    model, (x, y) = made().train(training), labelled()
    found = ptee.tune(model, TensorDataset(x, y), max_fidelity_drop=0.25)
    assert model.threshold == list(found.threshold)
    assert model.training is training
    with torch.no_grad():
        out = model.eval().predict(x)
        bare = model.backbone(x).argmax(1)
    assert (out.logits.argmax(1) != bare).double().mean() <= 0.25
    assert found.fidelity_drop == pytest.approx((out.logits.argmax(1) != bare).double().mean().item())


def test_whoever_gives_tune_a_threshold_is_told_how_one_is_set():
    with pytest.raises(PteeError, match=r"^tune\(\) has no argument 'threshold'\. .*model\.threshold = 0\.7\.$"):
        ptee.tune(made(), TensorDataset(*labelled()), threshold=0.7)


@pytest.mark.parametrize("target", [{}, {"max_cost": 0.001}, {"max_drop": 0.1, "max_cost": 0.5}], ids=str)
def test_a_target_that_is_refused_leaves_the_thresholds_as_they_were(target):
    model = made()
    model.threshold = [0.3, 0.6]
    with pytest.raises(PteeError):
        ptee.tune(model, TensorDataset(*labelled()), **target)
    assert model.threshold == [0.3, 0.6]


def test_whoever_forgot_to_train_the_heads_is_told_so():
    model = ptee.augment(made().detach(), exits=["0", "2"], head="pool", input_size=SIZE)
    data = TensorDataset(*labelled())
    said = "The heads have learned nothing yet. Train them first: ptee.train(model, train_data)."
    with pytest.warns(UserWarning, match=re.escape(said)):
        ptee.tune(model, data, max_fidelity_drop=0.5, answers="own")
    assert said in str(ptee.evaluate(copy.deepcopy(model), data, speed=False))
    model.off = []
    ptee.train(model, data, epochs=1, views=1)
    assert said not in str(ptee.evaluate(model, data, speed=False))


class Unread(torch.utils.data.Dataset):
    """Images that nobody may read."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image was read")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"max_cost": 0.001}, r"^max_cost=0\.001 cannot be reached: the lowest possible cost is 0\.\d+ "),
        ({"max_fidelity_drop": 0.01, "confidence": 0.95}, "needs at least 299 images, and 60 images are there"),
    ],
    ids=str,
)
def test_what_is_not_possible_is_refused_before_an_image_is_read(target, said):
    with pytest.raises(PteeError, match=said):
        ptee.tune(made(), Unread(), **target)


def test_a_target_in_seconds_is_not_refused_by_operations():
    model, rows = made(), torch.arange(5, dtype=torch.float64, device="cpu") / 4
    segments = torch.stack([0.01 * rows, 0.1 * rows, 0.89 * rows])  # exit 0 takes hardly any time, whatever it computes
    times = BatchTimes(segments, 0 * rows.expand(2, -1), 0.0, "units of a test")
    cost = model.plan.least_cost / 2
    found = ptee.tune(model, TensorDataset(*labelled()), max_cost=cost, times=times, answers="own")
    assert found.score.time <= cost < found.score.cost


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((torch.zeros(60, *SIZE), torch.zeros(60)), "^data is a tuple"),
        (TensorDataset(torch.zeros(0, *SIZE)), "^data is empty"),
    ],
    ids=["a tuple", "no images"],
)
def test_what_is_no_data_set_is_called_that_and_not_too_few_images(data, said):
    with pytest.raises(DataError, match=said):
        ptee.tune(made(), data, max_fidelity_drop=0.01, confidence=0.95)


def test_a_drop_of_accuracy_is_refused_where_the_backbone_is_near_chance_under_the_labels():
    model, x = made(), torch.randn(60, *small.SIZE)
    answers = model.bare(x).argmax(-1)
    wrong, before = TensorDataset(x, (answers + 1) % small.K), model.threshold
    said = r"max_drop=0\.1 needs labels under which the backbone is right\. The backbone is right on 0\.0% of 60 images.*max_fidelity_drop=0\.1"
    with pytest.raises(DataError, match=said) as refusal:
        ptee.tune(model, wrong, max_drop=0.1)
    assert (refusal.value.argument, model.threshold) == ("max_drop", before)
    ptee.tune(model, wrong, max_fidelity_drop=0.1)
    ptee.tune(model, TensorDataset(x, answers), max_drop=0.1)


def test_the_defaults_are_those_of_recipes_so_that_a_reserve_is_kept():
    defaults = inspect.signature(ptee.tune).parameters
    for name in ("max_drop", "max_fidelity_drop", "max_cost", "one_threshold", "margin"):
        assert defaults[name].default == getattr(ThresholdsConfig(), name)
    by_default, by_name, none = (
        ptee.tune(made(), TensorDataset(*labelled()), max_fidelity_drop=0.4, **margin)
        for margin in ({}, {"margin": "auto"}, {"margin": 0})
    )
    assert by_default == by_name
    assert none.margin == 0


# the sentence about the outcome


def outcome(
    fidelity: float,
    samples: int,
    kind: str = "max_fidelity_drop",
    accuracy: float | None = 0.88,
    limit: float = 0.02,
    end: float = 0.5,
    blend: Any = None,
) -> str:
    """The sentence about a target, if this share of so many images keeps the backbone's answer."""
    score = Score(0.9, fidelity, 0.5)
    found = Solution(Target(kind, limit), (0.5,), (), score, Score(0.9, 1.0, 1.0), 100, blend=blend)
    bare = {"accuracy": 0.9, "fidelity": 1.0, "cost": 1.0}
    own = {"accuracy": accuracy, "fidelity": fidelity, "cost": 0.5}
    return describe_outcome(found, {"samples": samples, "rows": [bare, own], "leaving": [1 - end, end]})[0]


def test_where_no_image_leaves_early_the_loss_is_certain():
    assert outcome(1.0, 1200, end=1.0).endswith(
        "Kept on 1,200 report images: 0.0000 of the answers differ (no image left early)."
    )


def test_where_the_end_answers_with_a_blend_the_loss_is_uncertain_though_no_image_leaves_early():
    assert "differ (95 % interval ± " in outcome(0.988, 500, end=1.0, blend=object())


def test_a_target_is_missed_or_kept_on_the_images_that_are_reported_on():
    assert outcome(0.95, 1200, "max_drop", limit=0.01) == (
        "Target: accuracy at most 0.01 below the backbone's. Missed on 1,200 report images: 0.0200 below (95 % interval ± 0.0128)."
    )
    assert "Kept on 1,200 report images: 0.0200 below" in outcome(0.95, 1200, "max_drop", limit=0.02)
    assert "Kept on 1,000 report images: 0.0100 above" in outcome(0.95, 1000, "max_drop", accuracy=0.91)
    assert outcome(0.97, 1000) == (
        "Target: at most 0.02 of the answers differ from the backbone's. Missed on 1,000 report images: 0.0300 of the answers differ "
        "(95 % interval ± 0.0110)."
    )
    kept = "Target: a mean cost of at most 0.6. Kept on 1,000 report images: 0.5000."
    assert outcome(0.95, 1000, "max_cost", limit=0.6) == kept
    missed = "Missed on 1,000 report images: 0.5000 (on the other images, which the thresholds were chosen on: 0.5000)."
    assert outcome(0.95, 1000, "max_cost", limit=0.4).endswith(missed)
    assert "Kept on 1 report image: 0.5000" in outcome(0.95, 1, "max_cost", limit=0.6)


def test_what_misses_a_target_by_less_than_the_digits_shown_gets_more_digits():
    assert "Missed on 90,000 report images: 0.01002 of" in outcome(1 - 0.01002, 90_000, limit=0.01)
    assert "Missed on 90,000 report images: 0.01002 below" in outcome(0.9, 90_000, "max_drop", 0.88998, limit=0.01)
    assert "Missed on 90,000 report images: 0.5000 (" in outcome(0.9, 90_000, "max_cost", limit=0.49999)


def test_without_labels_it_is_not_known_whether_a_drop_of_accuracy_was_kept():
    words = "Not known for 1,000 report images, which have no labels: 0.0500 of the answers differ"
    assert words in outcome(0.95, 1000, "max_drop", accuracy=None)


def uncertainty(words: str) -> float:
    return float(words.split("interval ± ")[1].split(")")[0])


@pytest.mark.parametrize("n", [50, 500, 5000])
@pytest.mark.parametrize("share", [0.02, 0.1])
def test_the_uncertainty_covers_the_true_loss_for_nearly_all_samples_of_so_many_images(n, share):
    drawn = np.random.default_rng(0).binomial(n, share, 400) / n
    within = [abs(lost - share) <= uncertainty(outcome(1 - lost, n)) + 0.5 / n for lost in drawn]
    assert np.mean(within) >= 0.9
    assert uncertainty(outcome(1 - share, n)) < 2.5 * 1.96 * np.sqrt(share * (1 - share) / n) + 1 / n  # and not more


def test_no_loss_on_a_few_images_is_uncertain():
    assert "0.0000 of the answers differ" in outcome(1.0, 10)
    assert uncertainty(outcome(1.0, 10)) > 0.1


def drawn(n: int, seed: int = 0) -> TensorDataset:
    return TensorDataset(torch.randn(n, *SIZE, generator=seeded(seed)))


def test_who_reports_on_images_that_thresholds_were_chosen_on_is_told_so(tmp_path):
    model, ours, others = made(), drawn(80), drawn(80, seed=1)
    ptee.tune(model, ours, max_cost=0.9)
    both = ConcatDataset([others, Subset(ours, range(40))])
    for data in (ours, DataLoader(ours, 7)):
        assert "chosen on these images, so what is lost here may be less" in str(
            ptee.evaluate(model, data, speed=False)
        )
    found = str(ptee.evaluate(model, both, speed=False))
    assert re.search(
        r"chosen on about [234]\d% of these images, so what is lost here may be less .* Give images that", found
    )
    assert not ptee.evaluate(model, others, speed=False).seen
    model.save_pretrained(tmp_path / "run")
    again = ptee.load(tmp_path / "run", backbone=made().detach())
    assert ptee.evaluate(again, ours, speed=False).seen
    assert ptee.evaluate(again, Subset(ours, range(40)), speed=False).seen.startswith(
        "The thresholds were chosen on these"
    )
    assert not ptee.evaluate(again, ours, threshold=0.5, speed=False).seen
    again.threshold = again.threshold_for(max_cost=0.8)
    assert ptee.evaluate(again, ours, speed=False).seen
    again.threshold = 0.5
    assert not ptee.evaluate(again, ours, speed=False).seen


@pytest.mark.parametrize("marks", [None, "x", "0" * 11, "0" * 12 * 257, "-" * 12, [1], {}], ids=str)
def test_marks_of_a_stranger_are_no_marks(marks):
    model, ours = made(), drawn(40)
    ptee.tune(model, ours, max_cost=0.9)
    model.results["tuning"]["marks"] = marks
    assert not ptee.evaluate(model, ours, speed=False).seen


def test_a_few_copies_of_images_that_thresholds_were_chosen_on_are_told_of_and_no_other_images_asked_for():
    model, ours = made(), drawn(64)
    ptee.tune(model, ours, max_cost=0.9)
    few, many = (
        ptee.evaluate(model, ConcatDataset([drawn(80, seed=1), Subset(ours, range(n))]), speed=False) for n in (1, 20)
    )
    assert (
        few.seen
        == "The thresholds were chosen on a few of these images, so what is lost here may be less than on new ones."
    )
    assert many.seen.endswith("Give images that nothing was trained or chosen on.")


def trained_on(*data: TensorDataset, **how: Any) -> ptee.EarlyExitModel:
    model = made()
    for each in data:
        ptee.train(model, each, epochs=1, views=1, **how)
    return model


def test_who_measures_on_images_that_the_heads_were_trained_on_is_told_so(tmp_path):
    ours, others = drawn(80), drawn(80, seed=1)
    trained_on(ours).save_pretrained(tmp_path / "run")
    model = ptee.load(tmp_path / "run", backbone=made().detach())
    half = ConcatDataset([others, Subset(ours, range(40))])
    for data, some in ((ours, "these images"), (half, "about 33% of these images")):
        said = f"^The heads were trained on {some}, so results may be better here than on new ones\\. Give images that nothing was trained or"
        assert re.search(said, ptee.evaluate(model, data, threshold=0.5, speed=False).seen)
        with pytest.warns(UserWarning, match=said):
            ptee.tune(model, data, max_cost=0.9)
        with pytest.warns(UserWarning, match=said.replace("^", "^mine: ")):
            compared = ptee.compare({"mine": model}, others, data, drops=[0.1])
        assert f"\nmine: The heads were trained on {'about' if 'about' in some else 'these'}" in str(compared)
    assert not ptee.evaluate(model, others, threshold=0.5, speed=False).seen


def told(model: ptee.EarlyExitModel, data: Any) -> str:
    """Which of these images a model says that its heads were trained on."""
    said = ptee.evaluate(model, data, threshold=0.5, speed=False).seen
    found = re.match(r"The heads were trained on (.*), so", said)
    return found[1] if found else said


def test_images_of_all_trainings_of_the_heads_are_known_again():
    one, two, new = (drawn(60, seed=n) for n in range(3))
    model = trained_on(one, two, two)
    assert [told(model, data) for data in (one, two, ConcatDataset([one, two]), new)] == [*["these images"] * 3, ""]


class Flipped(TensorDataset):
    """Half of its images are mirrored, others each time."""

    def __getitem__(self, index: int):
        image, *label = super().__getitem__(index)
        return (image.flip(-1) if torch.rand(()) < 0.5 else image, *label)


def test_of_a_loader_and_of_images_drawn_anew_nobody_knows_how_many_were_trained_on():
    ours, new = drawn(60), drawn(60, seed=1)
    plain = DataLoader(ours, 20)
    own_way = DataLoader(ours, 20, collate_fn=lambda rows: torch.utils.data.default_collate(rows))
    for data, words in (
        (plain, "some of these images"),
        (Flipped(*ours.tensors), "some of these images"),
        (own_way, ""),
    ):
        model = trained_on(data, cache=False)
        assert [told(model, ours), told(model, new)] == [words, ""]


def test_a_few_hits_of_many_training_images_are_some_and_no_share():
    ours = drawn(3000)
    model = trained_on(ours)
    assert (
        told(model, Subset(ours, range(0, 3000, 100))) == "some of these images"
    )  # about 2 or 3 of 256 are among these 30
    assert told(model, ConcatDataset([drawn(3000, seed=1), Subset(ours, [0])])) == "a few of these images"


def test_nothing_is_guaranteed_on_images_that_the_heads_were_trained_on():
    ours, others = drawn(80), drawn(80, seed=1)
    model = trained_on(ours)
    before = model.threshold
    with pytest.raises(DataError, match=r"^Nothing can be guaranteed here\. The heads were trained on these images"):
        ptee.tune(model, ours, max_fidelity_drop=0.5, confidence=0.9)
    assert model.threshold == before
    with pytest.warns(UserWarning, match="a few of these images"):  # may be copies
        ptee.tune(model, ConcatDataset([others, Subset(ours, [0])]), max_fidelity_drop=0.5, confidence=0.9)


def test_nothing_is_guaranteed_on_images_that_a_training_picked_its_epoch_by(tmp_path):
    ours, watched, others = drawn(80), drawn(80, seed=1), drawn(80, seed=2)
    model = trained_on(ours, val_data=watched, patience=1)
    ptee.train(model, ours, epochs=1, views=1, val_data=others)  # only looked at
    model.save_pretrained(tmp_path / "run")
    model = ptee.load(tmp_path / "run", backbone=model.detach())
    why = r"^A training with patience picked its epoch by its loss on about 67% of these images, .* show what confidence=0.9 guarantees\. Give"
    with pytest.raises(DataError, match=why):
        ptee.tune(model, ConcatDataset([watched, Subset(others, range(40))]), max_fidelity_drop=0.5, confidence=0.9)
    ptee.tune(model, others, max_fidelity_drop=0.5, confidence=0.9)
    ptee.tune(model, watched, max_fidelity_drop=0.5)


def test_nothing_is_guaranteed_on_images_that_the_confidence_was_calibrated_on(tmp_path):
    ours, others = drawn(80), drawn(80, seed=1)
    model = made()
    ptee.calibrate(model, ours)
    model.save_pretrained(tmp_path / "run")
    model = ptee.load(tmp_path / "run", backbone=model.detach())
    why = r"^The confidence was calibrated on these images, so they cannot show what confidence=0.9 guarantees\. Give images that nothing"
    with pytest.raises(DataError, match=why):
        ptee.tune(model, ours, max_fidelity_drop=0.5, confidence=0.9)
    ptee.tune(model, others, max_fidelity_drop=0.5, confidence=0.9)
    model.confidence = "max_prob"
    ptee.tune(model, ours, max_fidelity_drop=0.5, confidence=0.9)
    ptee.calibrate(model, others)
    ptee.tune(model, ours, max_fidelity_drop=0.5, confidence=0.9)


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
def test_a_training_that_changes_no_head_leaves_the_results_and_what_is_known_of_images(error):
    class Stopping(TensorDataset):
        reads = 0

        def __getitem__(self, index: int):
            self.reads += 1
            if self.reads > 130:
                raise error("It stops.")
            return super().__getitem__(index)

    ours, others = drawn(60), drawn(60, seed=1)
    model = trained_on(ours)
    ptee.evaluate(model, others, speed=False, keep=True)
    results, weights = dict(model.results), copy.deepcopy(model.heads.state_dict())
    with contextlib.suppress(DataError, KeyboardInterrupt):
        ptee.train(model, Stopping(*others.tensors), epochs=1, views=1)
    assert all(torch.equal(weights[name], value) for name, value in model.heads.state_dict().items())
    assert model.results == results
    assert (told(model, ours), told(model, others)) == ("these images", "")


def test_results_of_other_heads_are_forgotten_when_these_are_trained_again():
    model, ours, others = made(), drawn(80), drawn(80, seed=1)
    ptee.evaluate(model, others, speed=False, keep=True)
    ptee.train(model, ours, epochs=1, views=1)
    assert "rows" not in model.results


@pytest.mark.parametrize(
    "record", [None, 3, [], {}, [3], [{"images": -5, "marks": [1]}], [{"images": "x", "marks": "zz"}]], ids=str
)
def test_what_a_stranger_wrote_of_training_images_does_no_harm(record):
    model, ours = made(), drawn(40)
    model.results = {"trained_on": record, "watched": record}
    assert told(model, ours) == ""
    ptee.tune(model, ours, max_fidelity_drop=0.9, confidence=0.5)


def test_white_pictures_with_a_small_object_are_not_taken_for_one_another():
    white = torch.tensor([2.2, 2.4, 2.6])[:, None, None].expand(3, 48, 48)
    one, two = (white.repeat(60, 1, 1, 1) for _ in range(2))
    for n in range(60):
        one[n, :, n % 40, n % 37], two[n, :, n % 37, n % 40] = (n + 1) / 60, -(n + 1) / 60
    labels = torch.zeros(60, dtype=torch.int64)
    model = ptee.augment(small.made().detach(), exits=["0"], input_size=(3, 48, 48))
    ptee.train(model, TensorDataset(one, labels), epochs=1, views=1)
    assert told(model, TensorDataset(two, labels)) == ""
