"""Ctrl-C keeps the last complete epoch, and --resume goes on from there to the same end."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command import MODEL, RANDOM, SHORT, TEN, assert_refused, evaluated, figures, files, pictures, read_json
from safetensors.torch import load_file

from ptee.cli import commands
from ptee.pipeline import fit as fitting

CALIBRATED = ("--set", "calibration_share=0.45")


def press_ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_to_the_same_end(run, things, interrupt):
    images = pictures(Path("images"), TEN, 6)
    source = (*MODEL, "--weights", things / "weights.safetensors", "--data", images)
    words = ("augment", *source, *SHORT, *CALIBRATED, "--epochs", 3)
    assert run(*words, "--out", "whole").status == 0
    interrupt(2)
    done = run(*words, "--out", "broken")
    assert done.status == 130
    assert re.search(r"Interrupted: 1 complete epoch.* kept in broken.*--resume goes on", done.err)
    assert [p.name for p in Path("broken").iterdir()] == ["checkpoint.safetensors"]
    interrupt(2)
    done = run(*words, "--out", "broken", "--overwrite")
    assert done.err.endswith("The same command with --resume in place of --overwrite goes on.\n")
    without = ("augment", *source, *SHORT, "--set", "calibration_share=0.5", "--epochs", 3)
    assert_refused(
        run(*without, "--out", "broken", "--resume"),
        "belongs to a training on other data .it was [0-9]+ long and is [0-9]+ long now.*--overwrite in place of --resume, or another --out",
    )
    done = run(*words, "--out", "broken", "--resume")
    assert done.status == 0, done
    assert "epoch 1/3" not in done.out
    assert not Path("broken", "checkpoint.safetensors").exists()
    whole, broken = (load_file(Path(name, "heads.safetensors")) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(value, broken[name]) for name, value in whole.items())
    whole, broken = (read_json(name, "config.json") for name in ("whole", "broken"))
    assert whole["threshold"] == broken["threshold"]
    assert whole["results"]["calibration"] == broken["results"]["calibration"]


@pytest.mark.parametrize("command", ["evaluate", "compare", "report", "export --out x"])
def test_a_command_that_takes_a_run_says_of_an_interrupted_training_how_it_goes_on(command, run, elsewhere):
    Path("broken").mkdir()
    Path("broken", "checkpoint.safetensors").write_bytes(b"")
    name, *more = command.split()
    said = r"^broken holds an interrupted training and no run yet\. What began it goes on with --resume\.$"
    assert_refused(run(name, "broken", *more), said)


def test_interrupted_before_the_training_began_it_says_that_nothing_was_kept(run, known, monkeypatch):
    monkeypatch.setattr(commands, "data_for", press_ctrl_c)
    done = run("augment", *known, *SHORT, "--out", "out")
    assert done.status == 130
    assert done.err.strip() == "Interrupted: no epoch of the exits was complete, so nothing was kept."


def test_interrupted_after_the_run_was_saved_it_says_that_the_run_is_complete(run, known, monkeypatch):
    monkeypatch.setattr(commands, "name_others", press_ctrl_c)
    done = run("augment", *known, *SHORT, "--threshold", 0.5, "--out", "out")
    assert done[::2] == (130, "Interrupted: the run in out is complete.\n")


def test_interrupted_in_the_first_epoch_nothing_is_written(run, known, interrupt, elsewhere):
    interrupt(1)
    said = "Interrupted: no epoch of the exits was complete, so nothing was kept.\n"
    assert run("augment", *known, *SHORT, "--out", "out")[::2] == (130, said)
    assert list(elsewhere.iterdir()) == []


def test_interrupted_in_the_first_epoch_a_run_that_was_to_be_replaced_is_as_it_was(run, known, finished, interrupt):
    before = files(finished)
    interrupt(1)
    done = run("augment", *known, *SHORT, "--out", finished, "--overwrite")
    assert done.err.endswith(f"nothing was kept. What was in {finished} is as it was.\n")
    assert files(finished) == before
    told = f"The run in {finished} is deleted as soon as the first epoch of the new one is complete.\n"
    assert done.out.count(told) == 1


@pytest.mark.parametrize("where", ["take_over", "_set_confidence", "_set_thresholds", "_save"])
def test_interrupted_beside_the_training_it_says_too_how_to_go_on(where, run, known, monkeypatch):
    words = ("augment", *known, *SHORT, "--threshold", 0.5, "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, where, press_ctrl_c)
        broken = run(*words)
    assert broken.status == 130
    assert re.search("Interrupted: .*kept in out.*--resume goes on", broken.err)
    done = run(*words, "--resume")
    assert done.status == 0
    was_over = re.search(r"\b(\d+) of \1 epochs are there\.\n", done.out) is not None
    assert was_over == ("epoch " not in done.out)
    assert "checkpoint.safetensors" not in files(Path("out"))


def test_interrupted_while_it_measures_only_the_measurement_is_left(run, known, monkeypatch):
    words = ("augment", *known, *SHORT, "--threshold", 0.5, "--out", "out")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "evaluate", press_ctrl_c)
        broken = run(*words)
    assert broken.status == 130
    assert "the run in out is complete but for its results" in broken.err
    said = "out holds a run that lacks its results; the same settings with --resume go on with it"
    assert_refused(run(*words), said)
    early = evaluated(run, "out")
    done = run(*words, "--resume")
    assert (done.status, "epoch " in done.out) == (0, False), done
    for name in ("config.json", "metrics.json"):
        assert figures(read_json("out", name)["results"]) == figures(early)


def test_once_an_epoch_is_complete_nothing_of_an_earlier_run_is_left(run, known, finished, interrupt):
    interrupt(2)
    assert run("augment", *known, *SHORT, "--out", finished, "--overwrite").status == 130
    assert {*files(finished)} == {"checkpoint.safetensors"}


def test_a_readme_that_somebody_wrote_outlives_the_run_that_is_replaced(run, known, finished, interrupt):
    (finished / "README.md").write_text("my own words")
    interrupt(2)
    assert run("augment", *known, *SHORT, "--out", finished, "--overwrite").status == 130
    assert files(finished)["README.md"] == b"my own words"
    assert {*files(finished)} == {"README.md", "checkpoint.safetensors"}


def test_with_random_weights_no_resumption_is_promised(run, things, interrupt):
    words = ("augment", *RANDOM, "--data", things / "ten", *SHORT, "--out", "out")
    interrupt(2)
    assert "--resume" not in run(*words).err
    assert_refused(run(*words, "--resume"), "backbone")


def test_without_a_training_to_go_on_with_a_resumption_is_refused(run, known, finished):
    assert_refused(
        run("augment", *known, *SHORT, "--out", finished, "--resume"),
        "training in out is complete.*--overwrite in place of --resume.*ptee tune out",
    )
    assert_refused(run("augment", *known, *SHORT, "--out", "new", "--resume"), "no interrupted training in new")


def test_a_resumption_with_an_image_in_place_of_another_is_refused(run, known, things, interrupt):
    images = Path(shutil.copytree(things / "ten", "images"))
    interrupt(2)
    run("augment", *known, *SHORT, "--data", images, "--out", "out")
    (images / "class0" / "0.png").rename(images / "class0" / "new.png")
    assert_refused(
        run("augment", *known, *SHORT, "--data", images, "--out", "out", "--resume"),
        r"on other data \(files with other names now",
    )


@pytest.mark.slow
def test_a_resumption_is_refused_where_any_picture_of_the_training_was_replaced_by_another(
    run, foreign, things, interrupt
):
    images = Path(shutil.copytree(things / "two", "images"))
    words = ("augment", *foreign[:-1], images, *SHORT, "--confidence", "max_prob")
    interrupt(2)
    run(*words, "--out", "out")
    refused = 0
    for number, picture in enumerate(sorted(images.glob("train/*/*.png"))):
        before = picture.read_bytes()
        shutil.copy(images / "val" / "cat" / "0.png", picture)
        done = run(*words, "--resume", "--out", shutil.copytree("out", f"out{number}"))
        picture.write_bytes(before)  # at another time
        if done.status:
            assert_refused(done, "belongs to a training on other data .images or labels of other content now")
            refused += 1
    assert refused == 11  # of 12: one was drawn for calibration
    assert run(*words, "--resume", "--out", "out").status == 0


def test_a_resumption_with_other_settings_is_refused_before_anything_is_loaded(run, known, interrupt, monkeypatch):
    words = ("augment", *known, *SHORT, "--out", "out")
    interrupt(2)
    run(*words)
    for module in ("ptee.pipeline.fit", "ptee.backbones.load"):
        monkeypatch.setitem(sys.modules, module, None)
    for more, said in ((("--epochs", 5), r"epochs 2 \(now 5\)"), (("--seed", 7), r"seed 0 \(now 7\)")):
        done = run(*words, *more, "--resume")
        assert_refused(
            done, rf"belongs to a training with {said}\. Use .*--overwrite in place of --resume, or another --out"
        )


def test_a_resumption_with_other_settings_is_refused_and_the_checkpoint_kept(run, known, interrupt):
    words = ("augment", *known, *SHORT, "--out", "out")
    interrupt(2)
    run(*words)
    before = files(Path("out"))
    assert_refused(run(*words, "--set", "lr=0.5", "--resume"), "lr 0.01.*now 0.5")
    assert_refused(run(*words), "interrupted training; the same settings with --resume go on with it.*--overwrite")
    assert files(Path("out")) == before
    assert run(*words, "--set", "lr=0.5", "--threshold", 0.5, "--overwrite").status == 0
