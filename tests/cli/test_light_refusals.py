"""What files alone tell is refused before torch is imported, which takes seconds and most of a gigabyte."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Done, assert_refused, edited
from safetensors.torch import load_file, save_file

from ptee._common.text import printable
from ptee.backbones.weights import tensor_hash
from ptee.deploy.manifest import fingerprint as fingerprint_of_manifest

COMMANDS = {
    "evaluate": ("evaluate", "nope"),
    "tune": ("tune", "nope", "--max-drop", "0.01"),
    "compare": ("compare", "nope", "nope"),
    "bench": ("bench", "nope"),
    "export": ("export", "nope", "--out", "exported"),
}
LONG = "x" * 5000
# One process for all, because each start takes half a second. What is heavy cannot be imported there.
WITHOUT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
sys.modules |= dict.fromkeys(("torch", "timm", "torchvision"))
from ptee.cli.main import main
done = {}
for name, words in json.load(sys.stdin).items():
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(words)
        except SystemExit as end:
            done[name] = [end.code, out.getvalue(), err.getvalue()]
print(json.dumps(done))
"""


def all_of(folder: Path, commands: dict[str, tuple[str, ...]]) -> dict[str, Done]:
    """What came of each command where nothing heavy can be imported."""
    given = {"capture_output": True, "text": True, "cwd": folder, "timeout": 120, "env": os.environ | {"HF_HUB_OFFLINE": "1"}}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WITHOUT], input=json.dumps(commands), **given)
    assert done.returncode == 0, done.stderr
    return {name: Done(*values) for name, values in json.loads(done.stdout).items()}


# ---------------------------------------------------------------------------------------------------- folders that hold no run

BACKBONE = {
    "name": "net", "hash": "0", "classes": 10,
    "input": {"input_size": [3, 20000, 20000], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"},
}  # fmt: skip
TOO_LARGE = {
    "schema_version": 1,
    "heads_file": "heads.safetensors",
    "backbone": BACKBONE,
    "exits": [{"name": "a", "head": "pool"}],
    "threshold": [0.5],
}
SMALL = {**TOO_LARGE, "backbone": BACKBONE | {"input": BACKBONE["input"] | {"input_size": [3, 8, 8]}}}
DEEP = functools.reduce(lambda inner, _: [inner], range(90), [])
CONFIGS = {
    "no JSON": ("{", "no complete JSON"),
    "90 deep": (json.dumps({"schema_version": 1, "a": DEEP}), "deep in each other"),
    "another program's": ("{}", "no schema_version"),
    "an image of a gigabyte": (json.dumps(TOO_LARGE), "larger than any image"),
    "heads in another folder": (json.dumps(SMALL | {"heads_file": "../heads.safetensors"}), "not in the folder"),
    "no heads": (json.dumps(SMALL), r"holds no heads\.safetensors"),
}

# ---------------------------------------------------------------------------------------------------- runs that were changed

Change = Callable[[Path], object]


def record(**fields: Any) -> Change:
    """The record of the backbone with other fields."""
    return lambda run: edited(run, lambda config: config["backbone"]["source"].update(fields))


def of_classes(number: int) -> Change:
    """Another number of classes wherever config.json has it."""

    def change(config: dict[str, Any]) -> None:
        config["backbone"]["classes"] = config["backbone"]["source"]["num_classes"] = number

    return lambda run: edited(run, change)


def bytes_of_heads(change: Callable[[bytes], bytes]) -> Change:
    """Heads of which the file was changed."""

    def changed(run: Path) -> None:
        file = run / "heads.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return changed


def tensor(name: str, change: Callable[[Any], Any]) -> Change:
    """Heads with a tensor made of the first head's weights, and a config.json that knows it."""

    def changed(run: Path) -> None:
        found = load_file(run / "heads.safetensors")
        found[name] = change(found["0.logits.weight"]).clone()
        save_file(found, run / "heads.safetensors")
        known = {name: {"dtype": str(each.dtype)[6:], "sha256": tensor_hash(each)} for name, each in found.items()}
        edited(run, lambda config: config.update(tensors=known))

    return changed


def in_place_of_heads(put: Callable[[Path], object]) -> Change:
    """Something else under the name of the heads."""

    def changed(run: Path) -> None:
        (run / "heads.safetensors").unlink()
        put(run / "heads.safetensors")

    return changed


def images(**fields: Any) -> Change:
    """Other words about the images that the run was made with."""
    return lambda run: edited(run, lambda config: config["results"]["data"].update(fields))


def images_of_network(**fields: Any) -> Change:
    """Other images that the backbone takes."""
    return lambda run: edited(run, lambda config: config["backbone"]["input"].update(fields))


def answers(**fields: Any) -> Change:
    """Other answers of the exits."""
    return lambda run: edited(run, lambda config: config["answers"].update(fields))


def head(**fields: Any) -> Change:
    """Another record of the first exit."""
    return lambda run: edited(run, lambda config: config["exits"][0].update(fields))


def file_of_weights(start: bytes) -> Change:
    """A run that names a file of its backbone's weights, which begins so."""

    def changed(run: Path) -> None:
        (run / "w.pth").write_bytes(start)
        record(weights={"file": str(run / "w.pth")})(run)

    return changed


ORIGIN = {"tag": None, "hub": "stranger/net", "revision": "0" * 40}
RUNS: dict[str, tuple[Change, str]] = {
    "10^7 classes in the record": (record(num_classes=10**7), "num_classes=10000000 must be 1000000 or less"),
    "10^7 classes": (of_classes(10**7), "backbone.classes=10000000 must be 1000000 or less"),
    "10^6 classes": (of_classes(10**6), r"'0\.logits\.weight' has shape \(10, \d+\), the head \(1000000, \d+\)"),
    "other classes in the record": (record(num_classes=11), "is for 10 classes, its backbone has 11"),
    "no library": (record(library="nope"), "names no library of models"),
    "a folder as the name": (record(name="local-dir:/etc"), "must be the name of a model"),
    "a stranger's repository": (record(name="hf-hub:stranger/net", weights={"pretrained": ORIGIN}), "would be fetched"),
    "another machine": (record(weights={"file": "\\/host\\share"}), "must be a file of this machine.*--weights FILE"),
    "weights that are gone": (record(weights={"file": "/nope/w.pth"}), "no weights file /nope/w.pth.*--weights FILE"),
    "endless weights": (record(weights={"file": "/dev/zero"}), "There is no weights file /dev/zero"),
    "a page for weights": (file_of_weights(b"<!DOCTYPE html>\n"), r"w\.pth cannot be read: it begins neither as .*--weights FILE"),
    "no bytes of weights": (file_of_weights(b""), r"w\.pth cannot be read: it begins neither as"),
    "a head that there is not": (head(head="conv999999"), "^run a head that there is not: Unknown head 'conv999999'"),
    "a head that is too large": (head(head="res-99999x9"), "A stage of the head 'res-99999x9' is too large"),
    "an exit without a name": (head(name=""), r"exits\[0\]\.name='' must be the name of a module"),
    "one field more": (record(more=1), "more=1 is unknown"),
    "an image of a gigabyte": (record(input={"input_size": [3, 20000, 20000], "mean": [0.5], "std": [0.5], "interpolation": ""}), "too large"),
    "pixels without a spread": (images_of_network(std=[1e-308]), r"std, so it must be positive \(1e-06 or more\)"),
    "pixels beyond white": (images_of_network(mean=[1e308] * 3), "Pixels lie between 0 and 1, and so does their mean"),
    "pixels of two channels": (images_of_network(mean=[0.5, 0.5]), "Images of 3 channels need 3 numbers for backbone.input.mean"),
    "blended answers without weights": (answers(name="blended", blend=None), "no weights for the blended answers"),
    "no record": (lambda run: edited(run, lambda config: config["backbone"].update(source=None)), r"as backbone=\.\.\. in Python: model = ptee\.load\('.*', backbone=\.\.\.\), then ptee\.evaluate.*serve, bench and evaluate take what"),
    "heads with a flipped bit": (bytes_of_heads(lambda old: old[:-1] + bytes([old[-1] ^ 1])), "is damaged, or of another training"),
    "heads cut off": (bytes_of_heads(lambda old: old[:-4]), "cut off or damaged"),
    "heads with more behind them": (bytes_of_heads(lambda old: old + b"more"), "cut off or damaged"),
    "heads of zeros": (bytes_of_heads(lambda old: bytes(len(old))), "cut off or damaged"),
    "no bytes of heads": (bytes_of_heads(lambda old: b""), "cut off or damaged"),
    "heads with an endless header": (bytes_of_heads(lambda old: b"\xff" * 8 + old[8:]), "cut off or damaged"),
    "heads of another type": (bytes_of_heads(lambda old: old.replace(b'"F32"', b'"I32"')), "is damaged, or of another training"),
    "a tensor of no exit": (tensor("9.logits.weight", lambda old: old), r"'9\.logits\.weight' belongs to no head"),
    "a head without inputs": (tensor("0.logits.weight", lambda old: old[:, :0]), r"'0\.logits\.weight' has shape \(10, 0\)"),
    "a pipe for heads": (in_place_of_heads(os.mkfifo), r"holds no heads\.safetensors"),
    "endless heads": (in_place_of_heads(lambda file: file.symlink_to("/dev/zero")), r"holds no heads\.safetensors"),
    "the whole disk": (images(source="/"), "is not read unasked"),
    "images on another machine": (images(source="\\/host\\share"), "is not read unasked"),
    "no seed": (images(split={"seed": 2**63}), "is no seed"),
    "no images": (images(source=None), "does not say which images"),
}  # fmt: skip


def kept(name: str, text: str) -> Change:
    """Another text in a file that `ptee tune` would change."""
    return lambda run: (run / name).write_text(text)


TUNED: dict[str, tuple[Change, str]] = {
    "half of its metrics": (kept("metrics.json", '{"results": {'), r"metrics\.json is no complete JSON"),
    "a list for metrics": (kept("metrics.json", "[]"), r"metrics\.json is no JSON object"),
    "half of its recipe": (kept("recipe.yaml", "training: ["), r"recipe\.yaml cannot be read"),
    "another setting in its recipe": (kept("recipe.yaml", "training: {epoch: 1}"), r"training\.epoch=1 is unknown"),
}

PAGES: dict[str, tuple[Change, str]] = {
    **{name: TUNED[name] for name in ("half of its metrics", "a list for metrics")},
    "null for metrics": (kept("metrics.json", "null"), r"metrics\.json is no JSON object"),
    "metrics 90 deep": (
        kept("metrics.json", json.dumps({"a": DEEP})),
        r"in metrics\.json lists and objects lie more than 32 deep",
    ),
}
DRAWING = {
    "report": ("report",),
    "report recorded": ("report", "--recorded"),
    "plot": ("plot", "--out", "p.html", "--kind", "epochs"),
}

# ---------------------------------------------------------------------------------------------------- exported models

PIECE = {"file": "piece_0.pt2", "sha256": "0" * 64, "exit": -1, "rows": []}
MANIFEST: dict[str, Any] = {
    "schema_version": 1, "format": "pt2", "backbone": "net", "input_size": [3, 8, 8], "dtype": "float32", "mean": [0.5], "std": [0.5],
    "interpolation": "bilinear", "classes": 10, "exits": ["a"], "costs": [0.5, 1.0], "thresholds": [0.5], "confidence": "max_prob", "off": [],
    "answers": "own", "pieces": [PIECE], "versions": {}, "fingerprint": "",
}  # fmt: skip


def manifest(**fields: Any) -> str:
    """A manifest with other fields, as somebody would write who knows the fingerprint."""
    values = MANIFEST | fields
    return json.dumps(values | {"fingerprint": fingerprint_of_manifest(values)})


EXPORTED = {
    "no JSON": ("{", "cannot be read"),
    "a list": ("[]", "no JSON object"),
    "a mark of the byte order": ("\ufeff" + manifest(), "cannot be read"),
    "a field twice": (manifest()[:-1] + ', "off": [0]}', "'off' is there twice"),
    "endless costs": (manifest(costs=[float("inf"), 1.0]), r"costs\[0\]=inf must be a finite number"),
    "costs of nothing": (manifest(costs=[-1.0, 1.0]), r"costs\[0\]=-1\.0 must be 0 or more"),
    "a threshold that is none": (manifest(thresholds=["NaN"]), r"thresholds\[0\]='NaN' must be a number"),
    "exits in another order": (manifest(pieces=[PIECE, PIECE]), "do not fit the exits"),
    "an image of a gigabyte": (manifest(input_size=[3, 20000, 20000]), "larger than images can be"),
    "a name that turns the line": (manifest(backbone="\u202eten"), "backbone='.*ten'"),
    "a piece that is gone": (manifest(), r"piece_0\.pt2 is missing"),
    "a changed field": (manifest().replace("bilinear", "bicubic"), "was changed"),
}

# ---------------------------------------------------------------------------------------------------- recipes and settings

RECIPES = {
    "unknown": ("nope", "Unknown recipe 'nope'"),
    "aliases": ("aliases.yaml", "aliases .* are not read"),
    "a tag": ("tag.yaml", "tags .* are not read here: write the value alone"),
    "a pipe": ("pipe.yaml", r"There is no recipe file pipe\.yaml"),
    "endless": ("zero.yaml", r"There is no recipe file zero\.yaml"),
}
TRAINING = {
    "augment": ("augment", "--recipe"),
    "augment a model": ("augment", "--model", "resnet18", "--data", "nope", "--recipe"),
    "plan": ("plan", "--model", "resnet18", "--recipe"),
    "bench": ("bench", "--model", "resnet18", "--recipe"),
    "sweep": ("sweep", "--over", "seed=0,1", "--model", "resnet18", "--data", "nope", "--out", "out"),
    "recipe": ("recipe",),
}
SETTINGS = {
    "augment without a model": (("augment", "--data", "nope"), "--data needs a model"),
    "augment": (("augment", "--set", "training.epochs=none"), r"--set training\.epochs|--epochs none"),
    "sweep": (("sweep", "--over", "epoch=5", "--model", "resnet18", "--out", "out"), "Unknown setting 'epoch'"),
    "sweep without images": (("sweep", "--over", "seed=0,1", "--model", "resnet18", "--out", "out"), "No images"),
    "plan without a model": (("plan",), "Which model"),
    "bench without a model": (("bench",), "Which model"),
}
R50 = ("--model", "resnet50", "--data", "nope")
TWO = ("--exits", "0.2,0.5")
OVER = ("sweep", "--model", "resnet18", "--data", "nope", "--out", "out", "--over")
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "a head": (("augment", *R50, "--head", "nope"), "Unknown head 'nope'"),
    "a head of the demo": (("augment", "--head", "nope"), "Unknown head 'nope'"),
    "a head of a plan": (("plan", "--model", "resnet50", "--head", "nope"), "Unknown head 'nope'"),
    "a head of a sweep": ((*OVER, "exits.head=pool,nope"), "Unknown head 'nope'"),
    "a confidence": (("augment", *R50, "--confidence", "nope"), "Unknown confidence 'nope'"),
    "a confidence of a sweep": ((*OVER, "confidence.name=learned,nope"), "Unknown confidence 'nope'"),
    "three heads for two exits": (("augment", *R50, *TWO, "--head", "pool,pool,pool"), "3 values of head for 2 exits"),
    "three budgets for two exits": (("augment", *R50, *TWO, "--head-budget", ".1,.1,.1"), "3 values of head budget for 2"),
    "three thresholds for two exits": (("augment", *R50, *TWO, "--threshold", ".5,.5,.5"), "3 thresholds for 2 exits"),
    "a budget of nothing": (("augment", *R50, "--head-budget", "0"), "--head-budget 0 must be above 0"),
    "no exits": (("augment", *R50, "--set", "exits.number=0"), "must be 1 or more"),
    "an epoch too many": (("augment", "--epochs", "3", "--set", "epochs=4"), r"^training\.epochs is given twice, by --set and by --epochs\. Give it once\.$"),
    "a guarantee and a confidence": (("augment", "--confidence", ".95", "--confidence", "max_prob"), r"^--confidence is given twice.*--set thresholds\.confidence=0\.95\.$"),
    "a setting twice": (("plan", "--set", "exits.number=3", "--set", "num_exits=4"), r"^exits\.number is given twice by --set\. Give it once\.$"),
    "a batch without its cost": (("compare", "run", "--at-batch", "4"), "--at-batch 4 is about costs in seconds"),
    "a batch of a sweep without its cost": ((*OVER, "at_batch=4"), "at_batch 4|at_batch=4"),
    "a batch of a sweep by operations": ((*OVER, "at_batch=4", "--over", "cost=operations"), "at_batch 4|at_batch=4"),
    "a front without weights": (("augment", *R50, "--front", "resnet18", "--front-weights", "w.pth"), "no weights file w.pth"),
    "a folder of something else": (("augment", *R50, "--out", "full"), "full holds something else than a run"),
    "thresholds of a run": (("evaluate", "run", "--threshold", ".1,.2,.3,.4,.5,.6"), "There are 6 thresholds for"),
    "a threshold of NaN": (("evaluate", "run", "--threshold", "nan"), "'nan' is not a number"),
    "images and traces": (("evaluate", "run", "--data", "full", "--traces", "full"), "--data is about images"),
    "no times": (("tune", "run", "--max-fidelity-drop", "0.1", "--cost", "time"), "run keeps no times"),
    "no times to compare": (("compare", "run", "--cost", "time"), "run keeps no times"),
    "a line": (("compare", "run", "--lines", "own,nope"), "Unknown line 'nope'"),
    "a line of a report": (("report", "run", "--lines", "own,nope"), "Unknown line 'nope'"),
    "a line of a figure": (("plot", "run", "--lines", "own,nope", "--out", "a.html"), "Unknown line 'nope'"),
    "a drop": (("compare", "run", "--drops", "2"), "--drops 2.0 must be below 1"),
    "a run twice": (("compare", "run", "run"), "given twice"),
    "a page": (("compare", "run", "--html", "a.pdf"), "not the name of a page"),
    "a sheet": (("compare", "run", "--csv", "a.pdf"), "not the name of a table"),
    "a report": (("report", "run", "--out", "a.pdf"), "not the name of a page"),
    "a picture": (("plot", "run", "--out", "a.pdf"), "not the name of a picture"),
    "an executor": (("bench", "run", "--executor", "nope"), "Unknown executor 'nope'"),
    "no images in a batch": (("bench", "run", "--batch-sizes", "0"), "A batch of 0 images"),
    "no images in a batch of a model": (("bench", "--model", "resnet50", "--batch-sizes", "0"), "A batch of 0 images"),
    "a place that is taken": (("export", "run", "--out", "full"), "full exists"),
    "whole numbers for torch": (("export", "run", "--out", "new", "--int8", "--calibrate", "full"), "Give --format onnx"),
    "whole numbers of no images": (("export", "run", "--out", "new", "--int8", "--format", "onnx"), "--calibrate FOLDER"),
    "images for no whole numbers": (("export", "run", "--out", "new", "--calibrate", "full"), "Give --int8"),
    "a file for a sweep": ((*OVER[:6], "full/file", "--over", "seed=0,1"), "full/file is a file"),
    "no folder of images": (("augment", *R50[:2], "--data", "./nope"), "Data folder './nope' does not exist"),
    "a file of images": (("augment", *R50[:2], "--data", "full/file"), "'full/file' is a file, not a folder"),
    "no folder of images for a sweep": ((*OVER[:3], "--data", "./nope", *OVER[5:], "seed=0,1"), "Data folder './nope'"),
    "no folder of images of a run": (("evaluate", "run", "--data", "./nope"), "Data folder './nope' does not exist"),
    "no folder to tune on": (("tune", "run", "--max-cost", "0.5", "--data", "./nope"), "Data folder './nope' does not exist"),
    "no folder to compare on": (("compare", "run", "--data", "./nope"), "Data folder './nope' does not exist"),
    "no folder to time on": (("bench", "run", "--data", "./nope"), "Data folder './nope' does not exist"),
    "no folder to report on": (("report", "run", "--data", "./nope"), "Data folder './nope' does not exist"),
    "no folder to draw": (("plot", "run", "--data", "./nope", "--out", "a.html"), "Data folder './nope' does not exist"),
    "the system's folder": (("evaluate", "run", "--data", "/proc"), "a folder of the operating system"),
    "no folder to calibrate on": (
        ("export", "run", "--out", "new", "--int8", "--format", "onnx", "--calibrate", "./nope"), "Data folder './nope' does not exist",
    ),
    "a tracker": (("augment", "--log", "nope"), "Unknown tracker 'nope'"),
    "a share above 1": (("trace", "run", "--data", "full", "--out", "new", "--max-unreadable", "2"), "not in the range"),
    "a limit of NaN": (("cache", "run", "--data", "full", "--out", "new", "--limit", "nan"), "'nan' is no finite number"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(original, tmp_path_factory) -> dict[str, Done]:
    """What came of all commands of this file."""
    folder = tmp_path_factory.mktemp("light")
    commands = dict(COMMANDS)
    commands |= {f"{name} of a name": tuple(w.replace("nope", LONG) for w in words) for name, words in COMMANDS.items()}
    for name, (text, _) in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
        commands[f"folder {name}"] = ("evaluate", name)
    for name, (change, _) in RUNS.items():
        run = shutil.copytree(original, folder / f"run {name}")
        change(run)
        commands[f"run {name}"] = ("evaluate", run.name)
    (folder / "aliases.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\n")
    (folder / "tag.yaml").write_text("about: !!python/object/apply:os.system [ls]\n")
    os.mkfifo(folder / "pipe.yaml")
    (folder / "zero.yaml").symlink_to("/dev/zero")
    for name, (change, _) in TUNED.items():
        run = shutil.copytree(original, folder / f"tuned {name}")
        change(run)
        commands[f"tuned {name}"] = ("tune", run.name, "--max-fidelity-drop", "0.5")
    for name, (change, _) in PAGES.items():
        run = shutil.copytree(original, folder / f"page {name}")
        change(run)
        commands |= {f"{drawing} {name}": (*words, run.name) for drawing, words in DRAWING.items()}
    for name, (text, _) in EXPORTED.items():
        (folder / f"exported {name}").mkdir()
        (folder / f"exported {name}" / "manifest.json").write_text(text)
        commands[f"exported {name}"] = ("evaluate", f"exported {name}", "--data", ".")
    for recipe, _ in RECIPES.values():
        commands |= {f"{words} {recipe}": (*TRAINING[words], recipe) for words in TRAINING}
    commands |= {f"settings {name}": words for name, (words, _) in SETTINGS.items()}
    shutil.copytree(original, folder / "run")
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    commands |= {f"option {name}": words for name, (words, _) in OPTIONS.items()}
    return all_of(folder, {name: tuple(map(str, words)) for name, words in commands.items()})


def assert_light(done: Done, said: str) -> None:
    assert_refused(done, said)
    assert done.out == ""
    assert printable(done.err) == done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_that_is_not_there_is_refused_before_torch_is_imported(command, refused):
    assert_light(refused[command], r"^There is no folder nope\. (Give|Thresholds) ")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_no_folder_can_have_is_refused_before_torch_is_imported(command, refused):
    assert_light(refused[f"{command} of a name"], r"^There is no folder x{200}\. (Give|Thresholds) ")


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_that_holds_no_run_is_refused_before_torch_is_imported(case, refused):
    assert_light(refused[f"folder {case}"], CONFIGS[case][1])


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_cannot_be_trusted_is_refused_before_torch_is_imported(case, refused):
    assert_light(refused[f"run {case}"], RUNS[case][1])


@pytest.mark.parametrize("case", TUNED)
def test_a_run_that_cannot_be_changed_is_refused_before_thresholds_are_chosen(case, refused):
    assert_light(refused[f"tuned {case}"], TUNED[case][1])


@pytest.mark.parametrize("case", PAGES)
@pytest.mark.parametrize("drawing", DRAWING)
def test_a_run_that_no_page_can_be_drawn_of_is_refused_before_torch_is_imported(drawing, case, refused):
    assert_light(refused[f"{drawing} {case}"], PAGES[case][1])


@pytest.mark.parametrize("case", EXPORTED)
def test_an_exported_model_that_cannot_be_trusted_is_refused_before_torch_is_imported(case, refused):
    assert_light(refused[f"exported {case}"], EXPORTED[case][1])


@pytest.mark.parametrize("case", RECIPES)
@pytest.mark.parametrize("command", TRAINING)
def test_a_recipe_that_is_none_is_refused_before_torch_is_imported(command, case, refused):
    recipe, said = RECIPES[case]
    assert_light(refused[f"{command} {recipe}"], said)


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_cannot_be_is_refused_before_torch_is_imported(case, refused):
    assert_light(refused[f"settings {case}"], SETTINGS[case][1])


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_be_is_refused_before_torch_is_imported(case, refused):
    assert_light(refused[f"option {case}"], OPTIONS[case][1])
