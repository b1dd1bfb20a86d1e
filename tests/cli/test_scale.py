"""`ptee trace`, and commands that read what it wrote in place of images."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command import RANDOM, assert_refused, quietly, read_json
from killed import command_killed_at
from shards import shard

import ptee
from ptee.scale import trace as scale_trace

AGAIN = (
    "it may know its classes in another order. Names get other numbers by ptee trace or ptee cache with --overwrite and --classes FILE, which "
    "names the backbone's classes in its order. Labels that are numbers must be mended where they stand."
)


def near_chance(line: str) -> bool:
    """Random weights are right on some."""
    words = rf"The backbone is right on \d+\.\d% of 40 images, and would be on 10\.0% by chance: {re.escape(AGAIN)}"
    return re.fullmatch(words, line) is not None


@pytest.fixture
def source(elsewhere) -> Path:
    return shard(elsewhere / "a.tar", range(40))


@pytest.fixture(scope="module")
def traced_once(original, tmp_path_factory) -> tuple[Path, str]:
    """The images and their traces in one folder, and what was said as these were made."""
    place = tmp_path_factory.mktemp("traced")
    shard(place / "a.tar", range(40))
    return place, quietly("trace", original, "--data", place / "a.tar", "--out", place / "traces")


@pytest.fixture
def traced(traced_once, elsewhere) -> Path:
    """Those traces, to be changed at will."""
    return Path(shutil.copytree(traced_once[0] / "traces", "traces"))


def test_of_traces_it_is_said_what_they_are_of_and_what_they_are_for(traced_once, original):
    place, said = traced_once
    lines = said.splitlines()
    assert near_chance(lines.pop(2))
    assert lines == [
        f"{place.resolve()}: about 40 images in 1 file.",
        f"40 images in 1 part in {place / 'traces'}. All of them have labels.",
        f"Choose thresholds by them: ptee tune {original} --traces {place / 'traces'} --max-drop 0.01, or --max-fidelity-drop 0.01, "
        "which needs no labels",
    ]


def test_thresholds_are_chosen_on_half_of_the_traces_and_measured_on_the_others(run, finished, traced):
    done = run("tune", finished, "--traces", traced, "--max-fidelity-drop", 0.9, "--json")
    assert done.status == 0, done.err
    tuning = read_json(finished, "config.json")["results"]["tuning"]
    assert tuning["images"] == (
        "Thresholds are chosen on 20 of the 40 traced images, drawn with seed 0, and reported on the other 20."
    )
    found = json.loads(run("evaluate", finished, "--traces", traced, "--json").out)
    assert found["samples"] == 20
    assert found["rows"] == json.loads(done.out)["rows"]


def test_near_chance_a_target_of_accuracy_is_refused_for_traces_as_for_images(run, finished, traced):
    before = Path(finished, "config.json").read_bytes()
    words = ("tune", finished, "--traces", traced, "--max-drop", 0.01)
    assert_refused(
        run(*words), r"--max-drop 0\.01 needs labels under which the backbone is right.*Or give --max-fidelity-drop"
    )
    assert Path(finished, "config.json").read_bytes() == before
    for command in ("evaluate", "compare"):
        more = ("--lines", "own", "--drops", 0.5) if command == "compare" else ()
        assert AGAIN in run(command, finished, "--traces", traced, *more).out


def test_runs_are_compared_by_a_folder_of_each(run, finished, traced):
    done = run("compare", finished, "--traces", traced, "--lines", "own", "--drops", 0.5, "--json")
    assert (done.status, json.loads(done.out)["samples"]) == (0, 20), done.err


def test_the_same_command_again_changes_nothing(run, original, traced_once, traced):
    before = Path("traces", "manifest.json").read_bytes()
    done = run("trace", original, "--data", traced_once[0] / "a.tar", "--out", "traces")
    assert "1 of 1 parts are there already." in done.out
    assert Path("traces", "manifest.json").read_bytes() == before


def test_interrupted_it_says_what_goes_on_and_that_does(run, finished, source, monkeypatch):
    def press_ctrl_c(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    words = ("--data", source, "--out", "out")
    for command in ("trace", "cache"):
        with monkeypatch.context() as patch:
            patch.setitem(scale_trace.ENGINES, "local", press_ctrl_c)
            done = run(command, finished, *words, "--out", command)
            again = run(command, finished, *words, "--out", command, "--overwrite")
        assert (done.status, done.err) == (130, "Interrupted: whole parts are kept. The same command goes on.\n")
        assert again.err == "Interrupted: whole parts are kept. The same command without --overwrite goes on.\n"
        assert run(command, finished, *words, "--out", command).status == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "a.tar", "--out", "out", "--engine", "rey"), "Unknown engine 'rey'"),
        (("--data", "nowhere", "--out", "out"), "There is no 'nowhere'.*--data FOLDER"),
        (("--data", "a.tar", "--out", "out", "--logits", "many"), "no number"),
        (("--data", "a.tar", "--out", "a.tar"), "is a file"),
        (("--data", "a.tar"), "--out"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_one_line(words, said, run, finished, source):
    done = run("trace", finished, *words)
    assert done.status == 2
    assert_refused(done._replace(err=done.err.splitlines()[-1] + "\n"), said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tune", "--max-cost", 0.9, "--data", "a.tar"), "--data is about images"),
        (("compare", "--html", "x.html"), "--html shows images"),
        (("compare", "--static", "cifar_resnet8"), "needs the images|cannot|weights"),
    ],
)
def test_options_about_images_do_not_go_with_traces(words, said, run, finished, traced):
    name, *more = words
    assert_refused(run(name, finished, "--traces", traced, *more), said)


def test_a_folder_without_traces_says_how_to_make_some(run, finished, elsewhere):
    Path("empty").mkdir()
    assert_refused(run("evaluate", finished, "--traces", "empty"), "holds no traces.*ptee trace")


def test_a_cache_is_written_with_its_size_told_before(run, finished, source):
    done = run("cache", finished, "--data", source, "--out", "cache")
    assert done.status == 0, done.err
    *told, doubt, train = done.out.splitlines()
    assert near_chance(doubt)
    assert told == [
        "What the heads read of about 40 images takes about 1 MiB.",
        f"{source.parent.resolve()}: about 40 images in 1 file.",
        "40 images in 1 part in cache. All of them have labels.",
    ]
    assert train.startswith(
        "Train on it in Python, and choose thresholds afterwards (ptee tune trained): model = ptee.load('out')"
    )
    exec(train.partition("): ")[2], {"ptee": ptee})
    assert ptee.load("trained").off == ()
    assert_refused(
        run("cache", finished, "--data", source, "--out", "small", "--limit", 0.000001), "--limit|are allowed"
    )


def test_plan_says_what_training_on_so_many_images_takes(run, monkeypatch):
    monkeypatch.setattr("ptee.scale.budget.SECONDS", 0.01)
    words = ("plan", *RANDOM, "--images", 1000, "--device", "cpu", "--set", "training.epochs=3")
    found = json.loads(run(*words, "--json").out)
    assert (found["images"], found["epochs"], [c["passes"] for c in found["choices"]][-1]) == (1000, 3, 3)
    assert "1,000 images, 3 epochs" in run(*words).out


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("what", ["trace", "cache"])
def test_after_a_sigkill_the_same_command_goes_on(what, n, run, finished, source):
    words = (what, finished, "--data", source, "--out", "many")
    command_killed_at(n, "many", *words)
    assert Path("many", ".ptee.lock").exists()
    done = run(*words)
    assert done.status == 0, done.err
    assert not list(Path("many").glob(".*"))
