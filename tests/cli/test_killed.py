"""A run that one command changes while another has read it, and runs whose writer was killed: each run is of one version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import slow
from command import SHORT, assert_refused, files, read_json
from killed import command_killed_at, killed_at

import ptee
from ptee._common.errors import RunError
from ptee._common.writing import free_place, locked
from ptee.deploy.export import publish
from ptee.deploy.runner import load_exported
from ptee.pipeline import saved_run, timed_run
from ptee.timing.times import read_times

BENCH = ("--device", "cpu", "--batch-sizes", 1, "--rounds", 3, "--executor", "hooks", "--save")
TUNE = ("--max-fidelity-drop", 0.5, "--no-speed")
MOST_RENAMES = 30
CHANGED = r"out was changed after it was read, so it is left as it is\. Give the same command again\."


def changed_meanwhile(monkeypatch, module: object, name: str, change: Callable[[], object]) -> None:
    """Something else happens to the run when this function of a command begins."""
    own = getattr(module, name)

    def meanwhile(*words: object, **options: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, own)
            change()
        return own(*words, **options)

    monkeypatch.setattr(module, name, meanwhile)


def another_run(original: Path, out: Path) -> None:
    """A run with other heads is saved over it."""
    model = ptee.load(original)
    with torch.no_grad():
        for weights in model.heads.parameters():
            weights *= 2
    model.save_pretrained(out)


@pytest.mark.parametrize(
    ("words", "module", "name"),
    [(("tune", "out", *TUNE), saved_run, "choose_thresholds"), (("bench", "out", *BENCH), timed_run, "measure")],
    ids=["tune", "bench"],
)
def test_a_run_that_was_replaced_meanwhile_stays_as_it_is(words, module, name, run, original, finished, monkeypatch):
    changed_meanwhile(monkeypatch, module, name, lambda: another_run(original, finished))
    done = run(*words)
    assert_refused(done, CHANGED)
    assert "cost" in done.out or "ms" in done.out, "what was measured is printed in any case"
    assert not (finished / "times.json").exists()
    assert ptee.load(finished).threshold == ptee.load(original).threshold
    assert not list(finished.glob(".*"))


def test_of_two_that_tune_at_once_the_first_counts(run, finished, monkeypatch):
    changed_meanwhile(
        monkeypatch, saved_run, "choose_thresholds", lambda: run("tune", finished, "--max-cost", 0.9, "--no-speed")
    )
    assert_refused(run("tune", finished, *TUNE), CHANGED)
    config, metrics = read_json(finished, "config.json"), read_json(finished, "metrics.json")
    assert config["results"] == metrics["results"]
    assert config["results"]["tuning"]["target"]["kind"] == "max_cost"


def test_a_folder_that_is_written_is_not_tuned(run, finished, monkeypatch):
    before = files(finished)
    monkeypatch.setattr("filelock.FileLock.acquire", busy)
    assert_refused(
        run("tune", finished, *TUNE), r"Another process writes into out\. Wait for it, or choose another folder"
    )
    assert files(finished) == before


def busy(self: object, **_: object) -> None:
    from filelock import Timeout

    raise Timeout("")


def test_a_model_is_saved_over_the_run_that_it_was_read_from_and_over_no_other(finished, original):
    mine, other = ptee.load(finished), ptee.load(finished)
    other.threshold = 0.25
    other.save_pretrained(finished)
    other.save_pretrained(finished)
    mine.threshold = 0.75
    with pytest.raises(RunError, match=r"is left as it is\. Load it again, or choose another folder\."):
        mine.save_pretrained(finished)
    assert ptee.load(finished).threshold[0] == 0.25
    mine.save_pretrained("elsewhere")
    assert ptee.load("elsewhere").threshold[0] == 0.75
    shutil.rmtree(finished)
    mine.save_pretrained(finished)
    ptee.load(original).save_pretrained(finished)  # which it was not read from


def test_models_that_only_wrote_a_folder_may_write_it_again_and_one_that_was_read_from_it_may_not(original):
    mine, other = ptee.load(original), ptee.load(original)
    mine.save_pretrained("best")
    read = ptee.load("best")
    for model, threshold in ((other, 0.25), (mine, 0.5), (other, 0.75)):
        model.threshold = threshold
        model.save_pretrained("best")
        assert ptee.load("best").threshold[0] == threshold
    with pytest.raises(RunError, match=r"best was changed after it was read"):
        read.save_pretrained("best")
    assert ptee.load("best").threshold[0] == 0.75


# ---------------------------------------------------------------------------------------------------- killed


def saved(folder: Path) -> None:
    model = ptee.load(folder)
    with torch.no_grad():
        for weights in model.heads.parameters():
            weights *= 2
    model.threshold = 0.3
    model.save_pretrained(folder)


@pytest.mark.parametrize("what", [*map(slow, ("save_pretrained", "tune", "bench"))])
def test_after_a_kill_at_any_rename_the_run_is_wholly_old_or_wholly_new(what, run, original):
    def change(folder: Path) -> None:
        if what == "save_pretrained":
            saved(folder)
        else:
            run(what, folder, *{"tune": TUNE, "bench": BENCH}[what])

    def found(folder: Path) -> dict[str, bytes]:
        ptee.load(folder)
        if (folder / "times.json").exists():
            read_times(folder)
        return {name: text for name, text in files(folder).items() if name != "times.json"}

    old = found(original)
    shutil.copytree(original, "new")
    change(Path("new"))
    new, seen = found(Path("new")), []
    for n in range(MOST_RENAMES):
        shutil.copytree(original, "out")
        with killed_at(n) as killed:
            change(Path("out"))
        seen.append((found(Path("out")) == old, found(Path("out")) == new))
        shutil.rmtree("out")
        if not killed[0]:
            break
    assert all(map(any, seen)), seen
    assert seen[-1][1], seen


@pytest.mark.slow
def test_after_a_kill_at_any_rename_of_a_training_there_is_the_old_run_or_the_new_one_or_none(run, known, original):
    words = ("augment", *known, *SHORT, "--max-fidelity-drop", 0.99, "--set", "thresholds.margin=0", "--seed", 5)
    kinds = set()
    for n in range(MOST_RENAMES):
        shutil.copytree(original, "out")
        with killed_at(n) as killed:
            assert run(*words, "--overwrite", "--out", "out").status == 0
        kinds.add(kind_of(Path("out"), run, words))
        shutil.rmtree("out")
        if not killed[0]:
            break
    assert kinds == {"old", "none", "unmeasured", "new"}


def kind_of(folder: Path, run: Callable, words: tuple) -> str:
    """Which of both runs is there. What was trained so far can be resumed."""
    try:
        ptee.load(folder)
    except RunError as why:
        assert "no run yet" in str(why) or "no run was completed there" in str(why)
        assert run(*words, "--resume", "--out", folder).status == 0
        ptee.load(folder)
        assert not list(folder.glob(".*"))
        return "none"
    config, metrics = read_json(folder, "config.json"), read_json(folder, "metrics.json")
    assert config["results"] == metrics["results"]
    seed = config["results"]["data"]["split"]["seed"]
    assert f"seed: {seed}\n" in (folder / "recipe.yaml").read_text()
    if "rows" not in config["results"]:
        return "unmeasured"
    return "old" if seed == 3 else "new"


@pytest.mark.slow
def test_after_a_kill_at_any_rename_an_exported_model_is_there_as_a_whole_or_not_at_all(original):
    made, seen = ptee.export(ptee.load(original), "made"), []
    for n in range(MOST_RENAMES):
        with killed_at(n) as killed:
            publish(made, Path("out"))
        try:
            load_exported("out")
            seen.append("whole")
        except RunError as why:
            assert "holds no exported model" in str(why)
            seen.append("none")
            publish(made, free_place("out"))
        assert files(Path("out")) == files(made)
        shutil.rmtree("out")
        if not killed[0]:
            break
    assert seen == ["none", *["whole"] * (len(seen) - 1)]
    assert len(seen) > 4


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 2])
def test_an_export_that_got_sigkill_is_whole_or_the_same_command_makes_it(n, run, original):
    command_killed_at(n, "out", "export", original, "--out", "out")
    assert Path("out", ".ptee.lock").exists()
    if n == 0:
        assert run("export", original, "--out", "out").status == 0
        assert not list(Path("out").glob(".*"))
    load_exported("out")
    assert_refused(run("export", original, "--out", "out"), "out exists. Name a folder that does not")


@pytest.mark.slow
@pytest.mark.parametrize(("n", "more"), [(0, ()), (1, ("--resume",))])
def test_a_training_that_got_sigkill_is_begun_again_or_resumed(n, more, run, known):
    words = ("augment", *known, *SHORT, "--max-fidelity-drop", 0.99, "--set", "thresholds.margin=0", "--out", "out")
    command_killed_at(n, "out", *words)
    assert Path("out", ".ptee.lock").exists()
    done = run(*words, *more)
    assert done.status == 0, done
    ptee.load("out")
    assert not list(Path("out").glob(".*"))


def test_the_next_that_writes_clears_what_a_killed_process_has_left(run, finished):
    (finished / ".writing-x" / "kept").mkdir(parents=True)
    (finished / ".ptee.lock").touch()
    assert run("tune", finished, *TUNE).status == 0
    assert not list(finished.glob(".*"))
    with locked(finished):
        assert json.loads((finished / "config.json").read_text())
