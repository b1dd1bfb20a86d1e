"""`ptee bench RUN`, and `--cost time` of tune, compare, augment and plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import RANDOM, SHORT, assert_refused, quietly, read_json

from ptee.pipeline.recipe import make_recipe
from ptee.timing.times import read_times

ON_CPU = ("--device", "cpu")
QUICK = (*ON_CPU, "--batch-sizes", "2", "--rounds", 3)  # the pieces are measured for 1 row, too
ONE = (*ON_CPU, "--batch-sizes", "1", "--rounds", 3, "--executor", "hooks")


@pytest.fixture(scope="session")
def timed_once(original, tmp_path_factory) -> Path:
    """A run that keeps its times, to be left as it is."""
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("timed") / "out"))
    quietly("bench", folder, *QUICK, "--executor", "hooks", "--save")
    return folder


@pytest.fixture
def timed(timed_once, elsewhere) -> Path:
    """That run, to be changed at will."""
    return Path(shutil.copytree(timed_once, "out"))


def with_heads(folder: Path, seconds: float) -> None:
    """The heads of a run take so long."""
    times = read_json(folder, "times.json")
    m = times["executors"][0]
    m["bare"] = m["call"] = [1.0] * len(times["rows"])
    m["segments"] = [[1 / len(m["segments"])] * len(times["rows"])] * len(m["segments"])
    m["heads"] = m["moves"] = [[seconds] * len(times["rows"])] * len(m["heads"])
    m["call"] = [0.0] * len(times["rows"])
    (folder / "times.json").write_text(json.dumps(times))


def test_bench_of_a_run_prints_a_table_and_keeps_the_times_where_it_is_asked_to(run, finished):
    done = run("bench", finished, *QUICK, "--save", "--explain")
    assert done.status == 0
    assert "own thresholds" in done.out
    assert "\nlimit: " in done.out
    then = f"Thresholds by them: ptee tune {finished} --max-drop 0.01 --cost time --at-batch 2"
    assert done.out.endswith(f"\n\nThe times of the pieces are kept in {finished / 'times.json'}. {then}\n")
    times = read_times(finished)
    assert [m.executor for m in times.executors] == ["hooks", "eager"]
    assert times.rows == (1, 2)


def test_bench_of_a_run_as_json_holds_everything_and_keeps_nothing_unasked(run, finished):
    found = json.loads(run("bench", finished, *ONE, "--json").out)
    assert found["times"]["rows"] == [1]
    assert {line["leaving"] for line in found["lines"]} == {
        "bare backbone",
        "nobody",
        "all at exit 0",
        "own thresholds",
    }
    assert not (finished / "times.json").exists()


def test_where_times_are_kept_is_said_beside_the_json(run, finished):
    done = run("bench", finished, *ONE, "--json", "--save")
    assert json.loads(done.out)["times"]["rows"] == [1]
    assert "are kept in" in done.err


def test_without_its_images_a_run_is_timed_on_noise_and_a_sentence_says_so(run, finished, monkeypatch):
    from ptee._common.errors import Argument, DataError
    from ptee.pipeline import timed_run

    def gone(*_: object, **__: object) -> None:
        raise DataError("The images are gone. Give ", Argument("data", "FOLDER"), ".")

    monkeypatch.setattr(timed_run, "open_run", gone)
    done = run("bench", finished, *ONE)
    assert done.status == 0
    assert "Left out: the run's own thresholds on real images. The images are gone. Give --data FOLDER." in done.out
    assert "own thresholds " not in done.out.partition("Left out")[0]


def test_tuning_by_time_takes_the_times_of_the_run_and_its_recipe_says_so(run, timed):
    with_heads(timed, 0.0)
    done = run("tune", timed, *ON_CPU, "--max-fidelity-drop", 0.9, "--cost", "time", "--at-batch", 2, "--no-speed")
    assert done.status == 0, done.err
    assert "expected time" in done.out
    assert "of the bare backbone's time (hooks, batch 2, cpu)" in done.out
    thresholds = make_recipe(timed).thresholds
    assert (thresholds.cost, thresholds.at_batch) == ("time", 2)
    tuning = read_json(timed, "config.json")["results"]["tuning"]
    assert tuning["score"]["time"] < 1
    assert tuning["unit"] == "the bare backbone's time (hooks, batch 2, cpu)"


def test_the_executor_whose_times_are_taken_can_be_named(run, timed):
    words = (
        "tune",
        timed,
        *ON_CPU,
        "--max-fidelity-drop",
        0.9,
        "--cost",
        "time",
        "--at-batch",
        2,
        "--no-speed",
        "--executor",
    )
    assert_refused(
        run(*words, "eager"),
        r"eager was not measured, only hooks\. .*ptee bench out --executor hooks,eager --batch-sizes 2 --save",
    )
    assert run(*words, "hooks").status == 0
    assert make_recipe(timed).thresholds.executor == "hooks"


def test_if_no_exit_is_fast_enough_all_are_off(run, timed):
    with_heads(timed, 5.0)
    done = run("tune", timed, *ON_CPU, "--max-fidelity-drop", 0.9, "--cost", "time", "--at-batch", 2, "--no-speed")
    assert "nothing within the target is faster than the bare backbone" in done.out
    assert "Take fewer or cheaper heads, or batches of another size." in done.out
    assert "Train longer" not in done.out
    assert read_json(timed, "config.json")["off"] == [0, 1]


def test_a_comparison_by_time_says_its_unit_and_times_smaller_networks_too(run, timed, things):
    words = ("compare", timed, *ON_CPU, "--cost", "time", "--at-batch", 2, "--drops", 0.5)
    static = ("--static", f"cifar_resnet8={things / 'weights.safetensors'}")
    done = run(*words, *static, "--lines", "own,truncation,oracle")
    assert done.status == 0, done.err
    assert "cost: share of the bare backbone's time (hooks, batch 2, cpu)" in done.out
    counted = run(*(word for word in words if word not in ("--cost", "time", "--at-batch", 2)), "--lines", "own")
    assert "cost: share of the bare backbone's multiply-accumulates" in counted.out


def test_augment_by_time_measures_the_pieces_and_keeps_them(run, known, elsewhere):
    done = run("augment", *known, *SHORT, "--cost", "time", "--at-batch", 2, "--device", "cpu", "--out", "mine")
    assert done.status == 0, done.err
    assert "The pieces are measured in batches of up to 2 on cpu." in done.out
    assert read_times(Path("mine")).rows == (1, 2)
    assert read_json("mine", "config.json")["results"]["tuning"]["unit"].endswith("(hooks, batch 2, cpu)")


def test_a_plan_by_time_has_a_column_of_time_and_places_exits_by_it(run, monkeypatch):
    from ptee.exits.plan import TimesOfModules
    from ptee.timing import backbone

    names = [f"layer{n}.{k}" for n in (1, 2, 3) for k in (0, 1, 2)]
    shares = dict(zip(names, (0.1, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94), strict=True))
    made = lambda *_, **__: TimesOfModules(shares, 1.0, "a clock")  # noqa: E731
    monkeypatch.setattr(backbone, "time_of_modules", made)
    words = (
        "plan",
        "--model",
        "cifar_resnet20",
        "--no-pretrained",
        "--head",
        "pool",
        "--input-size",
        "3,16,16",
        "--exits",
        "0.5,0.7",
        "--device",
        "cpu",
    )
    done = run(*words, "--cost", "time")
    assert "time: share of a clock, up to the exit" in done.out
    assert "0.5, 0.7 of the time" in done.out
    found = json.loads(run(*words, "--cost", "time", "--json").out)
    assert [row["name"] for row in found["exits"]] == ["layer1.1", "layer2.0"]
    assert found["times"] == [0.5, 0.7]
    assert [row["name"] for row in json.loads(run(*words, "--json").out)["exits"]] != ["layer1.1", "layer2.0"]


@pytest.mark.slow
def test_an_exported_model_is_evaluated_and_timed_like_a_run(run, finished, things):
    assert run("export", finished, "--out", "files").status == 0
    where = ("--data", things / "ten", "--device", "cpu")
    done = run("evaluate", "files", *where)
    assert done.status == 0, done.err
    assert "cost in multiply-accumulates" in done.out
    every = json.loads(run("evaluate", "files", *where, "--threshold", 0, "--json").out)
    none = json.loads(run("evaluate", "files", *where, "--threshold", 2, "--json").out)
    assert (every["leaving"][0], none["leaving"][-1], none["fidelity"]) == (1, 1, 1)
    assert none["accuracy"] == none["backbone_accuracy"]
    assert_refused(run("evaluate", "files"), "does not say which images it was made with. Give some: --data FOLDER")
    done = run("bench", "files", *QUICK)
    assert done.status == 0, done.err
    assert "for which real images are needed (--data)" in done.out
    assert "own thresholds" in run("bench", "files", *QUICK, *where[:2]).out
    assert_refused(run("bench", "files", "--save"), "--save is about a run, and files is an exported model")


def test_times_of_another_machine_are_refused_by_name(run, timed):
    times = read_json(timed, "times.json")
    (timed / "times.json").write_text(json.dumps(times | {"device_name": "another"}))
    done = run("tune", timed, "--max-fidelity-drop", 0.9, "--cost", "time", "--at-batch", 2, "--device", "cpu")
    assert_refused(done, r"times\.json was measured with device_name another, and here it is .*ptee bench out --save")


def test_a_suggested_command_has_the_name_of_the_run_as_a_shell_takes_it(run, timed):
    mine = timed.rename("my run")
    times = read_json(mine, "times.json")
    (mine / "times.json").write_text(json.dumps(times | {"device_name": "another"}))
    for words in (("tune", mine, "--max-fidelity-drop", 0), ("compare", mine)):
        done = run(*words, *ON_CPU, "--cost", "time", "--at-batch", 2)
        assert_refused(done, "with device_name another.* Measure again: ptee bench 'my run' --save$")
    (mine / "times.json").unlink()
    done = run("tune", mine, "--max-fidelity-drop", 0, "--cost", "time")
    assert_refused(done, "ptee bench 'my run' --save$")
    done = run("bench", mine, *ONE, "--save")
    assert "Thresholds by them: ptee tune 'my run' --max-drop 0.01 --cost time" in done.out


REFUSED = {
    "no times": (["--cost", "time"], "keeps no times of its pieces.*ptee bench .* --save"),
    "an unknown cost": (["--cost", "money"], "--cost money is unknown.*operations"),
    "a batch of nothing": (["--cost", "time", "--at-batch", 0], "--at-batch 0 must be 1 or more"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_tuning_by_time_refuses_in_one_line_what_cannot_be(words, said, run, finished):
    assert_refused(run("tune", finished, "--max-fidelity-drop", 0.5, "--no-speed", *words), said)


def test_a_batch_that_was_not_measured_is_refused(run, timed):
    done = run("tune", timed, "--max-cost", 0.9, "--cost", "time", "--at-batch", 64, "--no-speed", "--device", "cpu")
    assert_refused(done, "--at-batch 64 was not measured: the largest batch was 2.*--batch-sizes 64 --save")


UNUSED = {
    "tune": ("tune", "RUN", "--max-fidelity-drop", 0.5, "--executor", "onnx", "--at-batch", 7),
    "compare": ("compare", "RUN", "--at-batch", 7),
    "report": ("report", "RUN", "--at-batch", 7),
    "augment": ("augment", "--set", "thresholds.at_batch=7"),
    "plan": ("plan", *RANDOM, "--at-batch", 7),
}


@pytest.mark.parametrize("words", UNUSED.values(), ids=UNUSED)
def test_what_is_about_seconds_is_refused_where_operations_are_counted(words, run, finished):
    given = [finished if word == "RUN" else word for word in words]
    assert_refused(run(*given), "--at-batch 7 is about costs in seconds.* Give --cost time, too")
    if "--executor" in words:
        assert_refused(run(*given[:-2]), "--executor onnx is about costs in seconds.* Give --cost time, too")


BENCH = {
    "a run and a model": (["RUN", "--model", "resnet50"], "Both the run out and --model resnet50 are given"),
    "other exits for a run": (["RUN", "--exits", "linear"], "--exits is about a model with untrained exits"),
    "random weights for a run": (["RUN", "--no-pretrained"], "--no-pretrained is about a model"),
    "a setting for a run": (["RUN", "--set", "exits.head=pool"], "--head is about a model"),
    "images without a run": ([*RANDOM, "--data", "x"], "--data is about a saved run"),
    "an unknown executor": (["RUN", "--executor", "hook"], "hook.*Did you mean 'hooks'"),
    "graphs on a CPU": (["RUN", "--executor", "graphs", "--device", "cpu"], "need an NVIDIA GPU.*Give --executor hooks"),
    "a batch of nothing": (["RUN", "--batch-sizes", "0"], "such as --batch-sizes 1,32"),
    "no folder to write into": (["user/repo", "--save"], "There is no folder user/repo"),
    "an executor without a run": ([*RANDOM, "--executor", "hooks"], "--executor is about a saved run"),
    "nothing to keep times in": ([*RANDOM, "--save"], "--save is about a saved run"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), BENCH.values(), ids=BENCH)
def test_bench_refuses_in_one_line_what_cannot_be(words, said, run, finished):
    given = [finished if word == "RUN" else word for word in words]
    assert_refused(run("bench", *given), said)


def test_a_run_that_is_made_anew_forgets_the_times_of_the_old_one(run, timed, known):
    copy = timed.rename("again")
    assert (copy / "times.json").exists()
    words = ("--threshold", 0.5, "--out", copy, "--overwrite", "--device", "cpu")
    assert run("augment", *known, *SHORT, *words).status == 0
    assert not (copy / "times.json").exists()
