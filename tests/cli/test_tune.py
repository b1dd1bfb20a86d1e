"""`ptee tune`: thresholds are chosen anew on some images, reported on others, and kept in the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from command import SHORT, assert_refused, edited, evaluated, figures, files, read_json
from safetensors.torch import load_file

import ptee
from ptee.pipeline import saved_run
from ptee.pipeline.recipe import make_recipe
from ptee.tuning.solution import RISKY, Solution


def test_tune_keeps_thresholds_in_the_run_and_measures_on_other_images(run, finished):
    before = load_file(finished / "heads.safetensors")
    done = run("tune", finished, "--max-fidelity-drop", 0.5, "--no-speed")
    assert done.status == 0
    assert "Thresholds are chosen on the 3 calibration images and reported on the 3 validation images." in done.out
    assert "Target: at most 0.5 of the answers differ from the backbone's, on average" in done.out
    config, metrics = read_json(finished, "config.json"), read_json(finished, "metrics.json")
    assert config["results"] == metrics["results"]
    assert config["threshold"] == config["results"]["threshold"] == config["results"]["tuning"]["threshold"]
    assert config["threshold"] in [point["threshold"] for point in config["curve"]["points"]]
    assert config["curve"]["images"] == 3
    assert config["results"]["data"]["split"]["seed"] == 3
    assert metrics["training"]
    after = load_file(finished / "heads.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    again = evaluated(run, finished)
    assert figures(again) == figures(config["results"])
    said = "The run's own thresholds were chosen on the 3 calibration images and those given are measured on the 3 validation images."
    assert said not in again["about"]
    assert said in evaluated(run, finished, "--threshold", 0.7)["about"]


def test_the_run_s_recipe_has_the_new_target(run, finished):
    assert run("tune", finished, "--max-cost", 0.9, "--one-threshold", "--no-speed").status == 0
    thresholds = make_recipe(finished).thresholds
    assert (thresholds.max_cost, thresholds.max_fidelity_drop, thresholds.one_threshold) == (0.9, None, True)


def test_a_dry_run_shows_thresholds_and_changes_nothing(run, finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    done = run("tune", finished, "--max-fidelity-drop", 0.5, "--no-speed", "--dry-run")
    assert done.status == 0
    assert "Chosen: T = " in done.out
    assert done.out.endswith(f"{finished} is as it was: --dry-run keeps nothing.\n")
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_what_tune_advises_to_type_has_the_name_of_the_run(run, finished, monkeypatch):
    monkeypatch.setattr(Solution, "_too_few", property(lambda _: RISKY.format("max-drop", 0.01)))
    done = run("tune", finished.rename("my run"), "--max-fidelity-drop", 0.5, "--no-speed")
    assert "ptee tune 'my run' --max-drop 0.01 --margin 0" in done.out


def test_where_the_same_thresholds_are_chosen_again_it_says_that_nothing_changed(run, finished):
    words = ("tune", finished, "--max-fidelity-drop", 0.5, "--no-speed")
    assert run(*words).out.endswith(f"\nThe thresholds are kept in {finished}.\n")
    again, dry = run(*words), run(*words, "--dry-run")
    assert again.out.endswith(f"\nNothing changed: {finished} had these thresholds already.\n")
    assert dry.out.endswith(f"\nNothing would change: {finished} had these thresholds already.\n")


def test_a_guarantee_is_kept_with_the_run(run, finished):
    done = run("tune", finished, "--max-fidelity-drop", 0.7, "--confidence", 0.95, "--no-speed")
    assert done.status == 0, done
    assert "at most 0.7 of the answers differ from the backbone's, guaranteed at 95 % by 3 images." in done.out
    assert "Without the guarantee, on average: cost " in done.out
    assert read_json(finished, "config.json")["results"]["tuning"]["promise"]["confidence"] == 0.95
    assert make_recipe(finished).thresholds.confidence == 0.95


def test_a_guarantee_by_the_images_that_early_stopping_went_by_is_refused(run, finished):
    recipe = make_recipe(finished).with_settings({"training.patience": 2})
    (finished / "recipe.yaml").write_text(recipe.to_yaml())
    words = ("tune", finished, "--max-fidelity-drop", 0.7, "--no-speed", "--dry-run")
    said = r"^out was trained with patience=2, which picked the epoch by its loss on these images, so they cannot show what --confidence 0\.95 guarantees\. Give others: --data FOLDER\.$"
    assert_refused(run(*words, "--confidence", 0.95), said)
    assert run(*words).status == 0


def test_as_json_the_results_are_all_there_is_on_standard_output(run, finished):
    done = run("tune", finished, "--max-cost", 0.9, "--one-threshold", "--json", "--no-speed")
    assert done.status == 0
    assert json.loads(done.out)["tuning"]["target"] == {"kind": "max_cost", "limit": 0.9}
    assert "Thresholds are chosen on" in done.err


REFUSED = {
    "no target": ([], "no target for the thresholds. Give one: --max-drop 0.01, --max-fidelity-drop 0.01 or --max-cost 0.6"),
    "a threshold in place of a target": (
        ["--threshold", 0.7],
        r"^--threshold is no option of this command\. tune chooses .* by ptee evaluate out --threshold 0\.7, .*ptee\.load\('out'\); .*threshold = 0\.7",
    ),
    "two targets": (["--max-drop", 0.1, "--max-cost", 0.5], "--max-drop 0.1 and --max-cost 0.5 are given"),
    "a margin that is none": (["--max-cost", 0.9, "--margin", "much"], "--margin much must be a number, or 'auto'"),
    "a margin above the drop": (["--max-drop", 0.1, "--margin", 0.2], "--margin 0.2 leaves nothing of --max-drop 0.1"),
    "a cost that cannot be reached": (["--max-cost", 0.01], "--max-cost 0.01 cannot be reached.*or more"),
    "a guarantee by few images": (
        ["--max-fidelity-drop", 0.1, "--confidence", 0.95],
        "--max-fidelity-drop 0.1 at --confidence 0.95 needs at least 29 images, and 3 images are there.*--max-fidelity-drop 0.6316 or more",
    ),
    "a guarantee at each exit by few images": (
        ["--max-fidelity-drop", 0.1, "--confidence", 0.95, "--each-exit"],
        "at --confidence 0.95 and --each-exit needs at least 38 images, and 3 images are there",
    ),
    "a guarantee of a cost": (["--max-cost", 0.9, "--confidence", 0.95], "--confidence 0.95 does not go with --max-cost 0.9"),
    "a guarantee that is no number": (["--max-drop", 0.1, "--confidence", "max_prob"], "--confidence max_prob must be a number.*0.95.*model.confidence = NAME"),
    "a guarantee without doubt": (["--max-drop", 0.1, "--confidence", 1], "--confidence 1 must be below 1"),
    "a guarantee in percent": (["--max-drop", 0.1, "--confidence", "95%"], r"--confidence 95% must be a number\. Did you mean 0\.95\?$"),
    "a drop in percent": (["--max-drop", "1%"], r"--max-drop 1% must be a number\. Did you mean 0\.01\?$"),
    "a cost in percent": (["--max-cost", "50"], r"--max-cost 50 must be below 10\. Did you mean 0\.5\?$"),
    "each exit without a guarantee": (["--max-drop", 0.1, "--each-exit"], "--each-exit is about a guarantee.*--confidence 0.95"),
    "a drop near chance": (["--max-drop", 0.1], "--max-drop 0.1 needs labels.*--classes FILE.*--max-fidelity-drop 0.1"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_a_target_that_cannot_be_met_leaves_the_run_as_it_was(words, said, run, finished):
    before = files(finished)
    assert_refused(run("tune", finished, *words, "--no-speed"), said)
    assert files(finished) == before


def test_interrupted_it_says_that_the_run_is_as_it_was(run, finished, monkeypatch):
    def press_ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = files(finished)
    monkeypatch.setattr(saved_run, "evaluate", press_ctrl_c)
    done = run("tune", finished, "--max-cost", 0.9, "--no-speed")
    said = f"Interrupted: the run in {finished} is as it was, with the thresholds that it had.\n"
    assert (done.status, done.err, files(finished)) == (130, said, before)


def test_thresholds_of_a_run_that_is_not_on_this_disk_cannot_be_kept(run):
    assert_refused(run("tune", "user/run", "--max-drop", 0.1), "no folder user/run")


@pytest.mark.parametrize("text", ["garbage", "[]", "null"])
def test_a_run_that_is_damaged_is_not_tuned_by_half(text, run, finished):
    (finished / "metrics.json").write_text(text)
    before = files(finished)
    done = run("tune", finished, "--max-cost", 0.9, "--no-speed")
    assert_refused(done, "metrics.json is no .*Copy the run again")
    assert files(finished) == before


# ---------------------------------------------------------------------------------------------------- which images


def test_delivered_validation_images_are_halved_and_only_the_rest_is_reported_on(run, foreign):
    done = run("augment", *foreign, *SHORT, "--max-fidelity-drop", 0.1, "--seed", 5, "--out", "out")
    assert done.status == 0, done
    words = "Thresholds are chosen on 6 of the 12 validation images, drawn with seed 5, and reported on the other 6."
    assert words in done.out
    recorded = read_json("out", "config.json")["results"]
    assert (recorded["tuning"]["images"], recorded["samples"]) == (words, 6)
    again = evaluated(run, "out")
    assert figures(again) == figures(recorded)
    assert words in again["about"]
    other = evaluated(run, "out", "--threshold", 0.7)
    assert (other["samples"], words in other["about"]) == (6, False)
    drawn = "6 of the 12 validation images, drawn with seed 5, and those given are measured on the other 6."
    assert f"The run's own thresholds were chosen on {drawn}" in other["about"]


def test_other_data_are_halved_too(run, finished, things):
    done = run("tune", finished, "--max-cost", 0.9, "--data", things / "two", "--no-speed")
    assert "chosen on 6 of the 12 validation images, drawn with seed 3" in done.out
    assert evaluated(run, finished, "--data", things / "two")["samples"] == 6
    own = evaluated(run, finished)
    assert own["samples"] == 3
    said = f"The run's thresholds were chosen on '{things / 'two'}'"
    assert f"{said}." in own["about"]
    assert said not in evaluated(run, finished, "--threshold", 0.7)["about"]
    edited(finished, lambda config: config["results"]["tuning"].pop("marks"))  # as of an older ptee
    assert f"{said}; whether some of its images are among these is not known." in evaluated(run, finished)["about"]


def test_images_that_thresholds_were_chosen_on_are_known_again_one_by_one(run, finished, things):
    assert run("tune", finished, "--max-cost", 0.9, "--data", things / "two", "--no-speed").status == 0
    shutil.copytree(things / "two" / "val", "some")
    said = "The thresholds were chosen on about 50% of these images, so what is lost here may be less"
    assert said in run("evaluate", finished, "--data", "some", "--no-speed").out


def test_of_thresholds_that_were_chosen_in_python_it_is_said_that_they_were(run, finished):
    model = ptee.load(finished)
    data = [(torch.randn(model.plan.input_size), 0) for _ in range(8)]
    ptee.tune(model, data, max_cost=0.9)
    model.save_pretrained(finished)
    assert (
        "Thresholds are chosen on 8 images that ptee.tune was given in Python."
        in Path(finished, "README.md").read_text()
    )
    said = "The run's thresholds were chosen in Python."
    assert evaluated(run, finished)["about"].endswith(said)
    assert said not in evaluated(run, finished, "--threshold", 0.7)["about"]
    edited(finished, lambda config: config["results"]["tuning"].pop("marks"))  # as of an older ptee
    assert f"{said} Whether on some of these images is not known." in evaluated(run, finished)["about"]


def test_what_python_measured_anew_stands_in_both_files_of_a_run(finished):
    model = ptee.load(finished)
    model.threshold = 0.3
    ptee.evaluate(model, [(torch.randn(model.plan.input_size), 0) for _ in range(8)], keep=True, speed=False)
    model.save_pretrained(finished)
    config, metrics = (read_json(finished, name) for name in ("config.json", "metrics.json"))
    assert config["results"] == metrics["results"]
    assert metrics["results"]["samples"] == 8
    assert metrics["training"]["epochs"], "what belongs to the training is kept"


@pytest.fixture
def tuned_on_two(run, finished, things) -> Path:
    """A run whose thresholds were chosen on half of the images of the folder `two`, which is a copy."""
    shutil.copytree(things / "two", "two")
    assert run("tune", finished, "--max-cost", 0.9, "--data", "two", "--no-speed").status == 0
    return finished


def test_of_a_part_of_the_images_that_chose_the_thresholds_it_is_said_that_it_lies_among_them(run, tuned_on_two):
    about = evaluated(run, tuned_on_two, "--data", "two/val")["about"]
    assert re.search(
        r"chosen on some images of '.*two', and these lie there, too\. Without --data the others are taken\.", about
    )


def test_images_that_thresholds_were_chosen_on_are_known_again_in_another_folder(run, tuned_on_two):
    shutil.copytree("two", "moved")
    here, there = (evaluated(run, tuned_on_two, "--data", place) for place in ("two", "moved"))
    assert there["samples"] == 6
    assert figures(there) == figures(here)
    said = f"The files have the names of those in '{Path('two').resolve()}', on which the thresholds were chosen"
    assert [said in each["about"] for each in (here, there)] == [False, True]


def test_where_files_were_added_those_that_thresholds_were_chosen_on_cannot_be_told(run, tuned_on_two):
    some = next(Path("two", "val").rglob("*.png"))
    shutil.copy(some, some.with_name("another.png"))
    said = "two has other files than when the thresholds were chosen.*ptee tune"
    assert_refused(run("evaluate", tuned_on_two, "--data", "two", "--no-speed"), said)
    assert evaluated(run, tuned_on_two, "--data", "two", "--threshold", 0.7)["samples"] == 13


def test_a_run_of_before_the_files_were_recorded_knows_its_own_images_again(run, foreign, things):
    shutil.copytree(things / "two", "two")
    assert run("augment", *foreign[:-1], "two", *SHORT, "--max-fidelity-drop", 0.1, "--out", "out").status == 0
    edited("out", lambda config: config["results"]["tuning"].pop("files_sha256"))
    Path("two").rename("moved")
    assert evaluated(run, "out", "--data", "moved")["samples"] == 6


def test_the_folder_of_its_own_training_images_is_refused(run, things, foreign):
    assert run("augment", *foreign, *SHORT, "--threshold", 0.5, "--out", "mine").status == 0
    for command, *more in (("tune", "--max-cost", "0.9"), ("evaluate",), ("compare",)):
        done = run(command, "mine", *more, "--data", things / "two" / "train")
        said = r"train holds images that mine was trained on\. Leave --data out for those that it has not seen"
        assert_refused(done, said)
    assert run("evaluate", "mine", "--data", things / "two" / "val", "--no-speed").status == 0
