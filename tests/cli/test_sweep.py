"""`ptee sweep`: every combination is a run, complete ones are kept, and the backbone runs once where that is enough."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import slow
from command import NETWORK, SHORT, TEN, Run, assert_refused, evaluated, figures, files, pictures, quietly, read_json

from ptee._common import devices
from ptee._common.errors import RunError
from ptee.data import demo_images
from ptee.data.labels import LabelMap
from ptee.data.sources import open_named
from ptee.pipeline import fit as fitting
from ptee.pipeline.recipe import make_recipe
from ptee.pipeline.sweep import Sweep, SweepRow, _Images, read_sweep
from ptee.training import training_data

BASE = """
exits: {places: [layer1, layer2], head: pool}
training: {epochs: 1, batch_size: 8, precision: no, views: 2}
confidence: {name: max_prob}
thresholds: {max_fidelity_drop: 0.5}
"""


@pytest.fixture
def sweep(run, things, elsewhere) -> Run:
    """A sweep of a small recipe over the images of ten classes, into the folder `all`."""
    Path("base.yaml").write_text(BASE)
    source = (*NETWORK, "--weights", things / "weights.safetensors")

    def sweep(*over: str, recipe: str = "base.yaml", data: object = things / "ten", out: str = "all"):
        words = [word for each in over for word in ("--over", each)]
        return run("sweep", recipe, *words, *source, "--data", data, "--out", out)

    return sweep


@pytest.fixture(scope="session")
def swept_once(things, tmp_path_factory) -> Path:
    """What a sweep of one run leaves, to be left as it is."""
    place = tmp_path_factory.mktemp("swept")
    (place / "base.yaml").write_text(BASE)
    source = (*NETWORK, "--weights", things / "weights.safetensors", "--data", things / "ten", "--out", place / "all")
    quietly("sweep", place / "base.yaml", "--over", "seed=0", *source)
    return place / "all"


@pytest.fixture
def swept(swept_once, elsewhere) -> Path:
    """That folder, to be changed at will."""
    return Path(shutil.copytree(swept_once, "all"))


class Grid(NamedTuple):
    """A sweep of two settings."""

    folder: Path
    said: str
    names: list[str]  # of its runs


@pytest.fixture(scope="session")
def grid(things, tmp_path_factory) -> Grid:
    """A sweep of four runs, to be left as it is."""
    place = tmp_path_factory.mktemp("grid")
    (place / "base.yaml").write_text(BASE)
    source = (*NETWORK, "--weights", things / "weights.safetensors", "--data", things / "ten", "--out", place / "all")
    said = quietly("sweep", place / "base.yaml", "--over", "epochs=1,2", "--over", "seed=0,1", *source)
    return Grid(place / "all", said, [f"epochs={epochs}_seed={seed}" for epochs in (1, 2) for seed in (0, 1)])


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The folders of the runs that are trained."""
    names: list[str] = []
    fit = fitting._train

    def noted(model, data, recipe, job, *more):
        names.append(job.out.name)
        return fit(model, data, recipe, job, *more)

    monkeypatch.setattr(fitting, "_train", noted)
    return names


def rows(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def test_every_combination_is_a_run_and_all_are_in_one_table_one_csv_and_one_figure(grid, run):
    table = rows(grid.folder / "sweep.csv")
    assert sorted(files_in(grid.folder)) == sorted([*grid.names, "sweep.csv", "sweep.html"])
    assert [row["run"] for row in table] == grid.names
    for name, row in zip(grid.names, table, strict=True):
        metrics = read_json(grid.folder / name, "metrics.json")
        results = metrics["results"]
        assert f"{results['rows'][-1]['cost']:.4f}" == row["cost"]
        assert len(metrics["training"]["epochs"]) == int(row["training.epochs"])
        (line,) = (line for line in grid.said.splitlines() if line.startswith(f"{name} "))
        fares = "kept" if " Kept on " in results["outcome"] else "missed"
        assert line.split()[-1] == fares and f" {fares.capitalize()} on " in results["outcome"]
        assert name.replace("_", ", ") in (grid.folder / "sweep.html").read_text()
    assert figures(evaluated(run, grid.folder / "epochs=2_seed=1")) == figures(results)


def files_in(folder: str | Path) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


def test_a_run_of_a_sweep_has_the_numbers_that_it_has_alone(grid, run, things):
    Path("base.yaml").write_text(BASE)
    source = (*NETWORK, "--weights", things / "weights.safetensors", "--data", things / "ten")
    assert run("augment", *source, "--recipe", "base.yaml", "--epochs", 2, "--no-speed", "--out", "alone").status == 0
    alone, swept = files(Path("alone")), files(grid.folder / "epochs=2_seed=0")
    assert alone["heads.safetensors"] == swept["heads.safetensors"]
    assert figures(read_json("alone", "metrics.json")["results"]) == figures(
        json.loads(swept["metrics.json"])["results"]
    )


CALIBRATED = BASE.replace("{name: max_prob}", "{}")  # which these images are too few for


@pytest.mark.parametrize("recipe", [slow(BASE, id="unchanged"), pytest.param(CALIBRATED, id="adapted to the images")])
def test_the_same_command_keeps_complete_runs_and_adds_what_is_new(recipe, sweep, trained):
    Path("base.yaml").write_text(recipe)
    assert sweep("epochs=1").status == 0
    before = files(Path("all/epochs=1"))
    done = sweep("epochs=1,2")
    assert done.status == 0
    assert trained == ["epochs=1", "epochs=2"]
    assert files(Path("all/epochs=1")) == before
    assert "epochs=1 is complete already" in done.out
    assert len(rows("all/sweep.csv")) == 2


def test_what_a_killed_sweep_was_writing_is_cleared_by_the_next(sweep):
    for folder in ("all/.writing-1", "all/epochs=1/.writing-2"):
        Path(folder).mkdir(parents=True)
        Path(folder, "sweep.html").write_text("half of it")
    Path("all/epochs=1/.ptee.lock").touch()
    assert sweep("epochs=1").status == 0
    assert sorted(files_in("all")) == ["epochs=1", "sweep.csv", "sweep.html"]
    assert not [name for name in files_in("all/epochs=1") if name.startswith(".")]


def test_after_ctrl_c_the_same_command_goes_on(sweep, grid, interrupt):
    interrupt(2)
    broken = sweep("epochs=2", "seed=0,1")
    assert broken.status == 130
    assert "The same command goes on." in broken.err
    done = sweep("epochs=2", "seed=0,1")
    assert (done.status, done.err) == (0, "")
    assert "epoch 1/2" not in done.out.partition("Run 2 of 2")[0]
    assert rows("all/sweep.csv") == rows(grid.folder / "sweep.csv")[2:]


def test_without_labels_of_the_backbone_the_heads_learn_its_answers(sweep, things):
    done = sweep("loss=joint,separate", data=things / "two")
    assert done.status == 0, done
    assert [row["accuracy"] for row in rows("all/sweep.csv")] == ["-", "-"]


# ---------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "an unknown setting": (["sed=0,1"], "Unknown setting 'sed'. Did you mean 'seed'"),
    "no values": (["seed"], "'seed' has no values. Write NAME=VALUE,VALUE, such as seed=0,1,2"),
    "a value that is lacking": (["epochs=1,,2"], r"'epochs=1,,2' cannot be read: beside a comma there is nothing\. Write epochs=1,2\.$"),
    "no value": (["epochs=1,null"], "--over training.epochs=null must be a whole number, or 'auto'. Leave it out for the default"),
    "a setting twice": (["seed=0", "seed=1"], "The setting seed is given twice"),
    "a value twice": (["seed=0,0"], "Two runs would be called seed=0"),
    "a value that cannot be": (["seed=0,-1"], "seed=-1 must be 0 or more"),
    "an unknown word": (["loss=joint,jont"], "training.loss=jont is unknown. Did you mean 'joint'"),
    "an unknown module": (["exits=layer1,layer9"], "'layer9'"),
    "an unknown head": (["head=pool,poool"], "'poool'.*Did you mean 'pool'"),
    "a shift of vectors": (["shift=0,2"], "training.shift=2 moves feature maps"),
    "a cost that cannot be reached": (["max_cost=0.9,0.01"], "max_cost=0.01 cannot be reached"),
    "settings that do not go together": (["temperature=1,3", "loss=joint"], "temperature=3"),
    "too many runs": (["seed=" + ",".join(map(str, range(1001)))], "These are 1,001 runs; a sweep has 1,000 at most"),
}  # fmt: skip


@pytest.mark.parametrize(("over", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_trained(over, said, sweep, trained):
    assert_refused(sweep(*over), said)
    assert trained == [] and not Path("all").exists()


def test_a_sweep_needs_a_model_and_images(run):
    assert_refused(run("sweep", "--over", "seed=0,1", "--out", "all"), "Give --model NAME")
    words = ("--over", "seed=0,1", "--out", "all", *NETWORK, "--no-pretrained")
    assert_refused(run("sweep", *words), "--data FOLDER")


JOINT = "backbone: joint" + BASE.replace("epochs: 1", "epochs: 1, loss: joint_each_exit")


def test_runs_whose_backbone_learnt_from_another_are_not_kept_as_of_this_one(run, things, elsewhere, trained):
    Path("joint.yaml").write_text(JOINT)
    shutil.copy(things / "weights.safetensors", "copied.safetensors")
    words = ("sweep", "joint.yaml", "--over", "seed=0", "--data", things / "ten", "--out", "all")
    given = (*words, *NETWORK, "--weights", things / "weights.safetensors")
    other = ("--model", "cifar_resnet32", "--input-size", "3,16,16", "--no-pretrained")
    assert run(*given).status == 0
    before = files(Path("all/seed=0"))
    assert "complete already" in run(*given).out
    for source in ((*NETWORK, "--no-pretrained"), (*NETWORK, "--weights", "copied.safetensors"), other):
        assert_refused(run(*words, *source), "seed=0 holds a run of another backbone.*--out")
    assert files(Path("all/seed=0")) == before
    assert trained == ["seed=0"]


def test_a_sweep_of_a_backbone_that_learns_from_scratch_keeps_complete_runs(run, things, elsewhere, trained):
    Path("joint.yaml").write_text(JOINT)
    words = ("sweep", "joint.yaml", "--over", "seed=0", "--data", things / "ten", "--out", "all", *NETWORK)
    for _ in range(2):
        assert run(*words, "--no-pretrained").status == 0
    assert trained == ["seed=0"]


@pytest.mark.parametrize("other", ["another recipe", "other images"])
def test_runs_of_another_recipe_or_of_other_images_are_neither_kept_nor_written_over(other, sweep, swept, trained):
    before = files(swept / "seed=0")
    Path("other.yaml").write_text(BASE.replace("batch_size: 8", "batch_size: 4"))
    pictures(Path("others"), TEN, 3)
    changed = {"recipe": "other.yaml"} if other == "another recipe" else {"data": "others"}
    assert_refused(sweep("seed=0,1", **changed), f"seed=0 holds a run of {other}.*--out")
    assert files(swept / "seed=0") == before
    assert trained == []


# ---------------------------------------------------------------------------------------------------- one cache for many runs


DAMAGE = {
    "rows that are numbers": lambda rows: [1, 2],
    "no cost": lambda rows: [{"accuracy": 1.0}, {"accuracy": 1.0, "fidelity": 1.0}],
    "a cost in words": lambda rows: [rows[0], rows[-1] | {"cost": "low"}],
    "one row": lambda rows: rows[:1],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_of_a_sweep_is_refused_by_name_before_anything_is_trained(damage, sweep, swept, trained):
    metrics = read_json(swept / "seed=0", "metrics.json")
    metrics["results"]["rows"] = damage(metrics["results"]["rows"])
    (swept / "seed=0" / "metrics.json").write_text(json.dumps(metrics))
    assert_refused(sweep("seed=1,0"), r"all/seed=0: metrics\.json does not hold what was measured\. Delete the folder")
    assert trained == []


def test_a_run_that_lost_its_recipe_is_named(sweep, swept):
    (swept / "seed=0" / "recipe.yaml").unlink()
    assert_refused(sweep("seed=0"), r"all/seed=0 is a folder without recipe\.yaml")


@pytest.fixture
def filled(monkeypatch) -> list[str]:
    """How often, and on what, the backbone runs to fill a cache."""
    passes: list[str] = []
    fill = training_data.fill

    def noted(model, data, *, description, **more):
        passes.append(description.split(" once over the ")[1])
        return fill(model, data, description=description, **more)

    monkeypatch.setattr(training_data, "fill", noted)
    return passes


SAME = ["training images, 2 views", "validation images"]


@pytest.mark.parametrize("over", ["head=pool,pool+", *map(slow, ("lr=0.01,0.02", "epochs=1,2", "max_cost=0.7,0.9"))])
def test_runs_that_read_the_same_share_one_pass_of_the_backbone(over, sweep, filled):
    assert sweep(over).status == 0
    assert filled == SAME


@pytest.mark.parametrize(
    "over", ["head=pool,conv1", *map(slow, ("seed=0,1", "views=2,3", "exits=layer1,layer2", "batch_size=4,8"))]
)
def test_runs_that_read_something_else_have_a_pass_of_their_own(over, sweep, filled):
    assert sweep(over).status == 0
    assert len([passed for passed in filled if passed.startswith("training")]) == 2


def test_each_seed_draws_its_own_images_of_the_demo(monkeypatch):
    monkeypatch.setattr(demo_images, "CANVASES", {"train": 20, "calibration": 10, "validation": 10})
    images = _Images(lambda seed: (open_named("demo", transform=str, seed=seed), LabelMap((0,), "")))
    one, other, again = (images.for_recipe(make_recipe(None, {"seed": seed}))[0] for seed in (0, 1, 0))
    assert one.split["pictures_sha256"] == again.split["pictures_sha256"] != other.split["pictures_sha256"]


def test_where_all_images_are_delivered_other_seeds_share_the_pass_too(sweep, filled, things, tmp_path):
    for part in ("train", "calibration", "val"):
        pictures(tmp_path / "parts" / part, ["cat", "dog"], 3)
    assert sweep("seed=0,1", data=tmp_path / "parts").status == 0
    assert filled == SAME


def test_a_run_alone_fills_caches_of_its_own(run, known, filled):
    for out in ("one", "two"):
        assert run("augment", *known, *SHORT, "--threshold", 0.5, "--out", out).status == 0
    assert filled == SAME * 2


def test_a_sweep_is_for_one_process(sweep, monkeypatch):
    monkeypatch.setattr(devices, "LAUNCH", ("PTEE_TEST_LAUNCH",))
    monkeypatch.setenv("PTEE_TEST_LAUNCH", "1")
    state = SimpleNamespace(num_processes=2, is_main_process=True, device=torch.device("cpu"))
    monkeypatch.setattr(devices, "process_state", lambda **_: state)
    assert_refused(sweep("epochs=1,2"), "A sweep runs in one process, and 2 were started")


def test_a_table_of_single_runs_is_read_as_a_sweep_without_settings(tmp_path):
    rows = SweepRow("a", {}, dict.fromkeys(("cost", "accuracy", "fidelity", "backbone"), 0.5))
    (tmp_path / "sweep.csv").write_text(Sweep((rows,), tmp_path).to_csv())
    assert read_sweep(tmp_path).rows == (rows,)


@pytest.mark.parametrize(
    "title", ["run,cost", "", "run,cost,accuracy,fidelity", "x,cost,accuracy,fidelity,backbone's accuracy"]
)
def test_a_table_of_something_else_is_no_sweep(title, tmp_path):
    (tmp_path / "sweep.csv").write_text(f"{title}\na,1,1,1,1\n")
    with pytest.raises(RunError, match=r"holds no sweep: sweep\.csv cannot be read"):
        read_sweep(tmp_path)


WHOLE = "run,training.seed,cost,accuracy,fidelity,backbone's accuracy\n"
ODD = {
    "a cost that is no number": f"{WHOLE}a,1,nan,1,1,1\n",
    "an endless accuracy": f"{WHOLE}a,1,1,1e999,1,1\n",
    "a cost below 0": f"{WHOLE}a,1,-1,1,1,1\n",
    "a column twice": f"{WHOLE.replace('training.seed', 'x,x')}a,1,2,1,1,1,1\n",
    "more runs than a sweep has": WHOLE + "a,1,1,1,1,1\n" * 1001,
    "more bytes than a table has": WHOLE + "a,1,1,1,1,1\n" * 400_000,
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_a_table_that_no_sweep_writes_is_refused(text, tmp_path):
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(RunError, match=r"holds no sweep: sweep\.csv cannot be read"):
        read_sweep(tmp_path)
