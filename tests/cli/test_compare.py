"""`ptee compare`: runs of one backbone beside each other and beside smaller networks, on images that none has seen."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import slow
from command import BRIEF, MODEL, SHORT, assert_refused, edited, files, quietly, read_json
from safetensors.torch import load_file, save_file

from ptee._common.errors import PteeError
from ptee.backbones.library import IMAGENET_MEAN, IMAGENET_STD, InputConfig
from ptee.backbones.load import load_backbone
from ptee.cli.runs import compare
from ptee.cli.values import names_of, static_networks
from ptee.evaluation.comparison_lines import LINES
from ptee.pipeline.saved_run import _prepared_otherwise


def test_the_default_lines_of_the_command_are_those_of_python():
    option = next(p for p in compare.params if p.name == "lines")
    assert option.default.split(",") == list(LINES)


def test_compare_puts_runs_and_a_smaller_network_side_by_side(run, finished, things):
    shutil.copytree(finished, "twin")
    before = files(finished)
    static = ("--static", f"cifar_resnet8={things / 'weights.safetensors'}")
    done = run("compare", finished, "twin", *static, "--drops", "0,0.5", "--lines", "own,oracle", "--json")
    assert done.status == 0, done
    assert (
        "The thresholds of each line are chosen on the 3 calibration images and reported on the 3 validation images."
        in done.err
    )
    found = json.loads(done.out)
    lines = {each["name"]: each["entries"] for each in found["lines"]}
    assert lines["out"] == lines["twin"]
    assert [each["allowed"] for each in lines["out"]] == [0, 0.5]
    assert len(lines["cifar_resnet8"]) == 1
    assert len(found["verdict"]) == 2
    assert files(finished) == before


def test_a_smaller_network_with_weights_of_ones_own_takes_the_images_of_the_run(run, finished, things, monkeypatch):
    seen = {}
    monkeypatch.setattr("ptee.pipeline.saved_run.compare", lambda *_, static, **how: seen.update(static))
    edited(finished, lambda config: config["backbone"]["input"].update(mean=[0.25, 0.5, 0.5]))  # as after --mean
    words = ("compare", finished, "--static", f"cifar_resnet8={things / 'weights.safetensors'}", "--drops", "0.5")
    assert "takes images" not in run(*words).out
    assert seen["cifar_resnet8"].input.mean == (0.25, 0.5, 0.5)


def test_of_a_smaller_network_with_averaged_weights_it_says_which_were_taken(
    run, finished, things, monkeypatch, tmp_path
):
    monkeypatch.setattr("ptee.pipeline.saved_run.compare", lambda *_, **__: None)
    state = load_file(things / "weights.safetensors")
    torch.save({"model": {key: value + 1 for key, value in state.items()}, "model_ema": state}, tmp_path / "w.pth")
    done = run("compare", finished, "--static", f"cifar_resnet8={tmp_path / 'w.pth'}", "--drops", "0.5")
    assert "its averaged weights (model_ema) are taken, not the raw ones (model)" in done.err


def test_one_of_a_thousand_classes_takes_the_images_that_it_was_published_for():
    theirs = load_backbone("timm/resnet10t", num_classes=1000, pretrained=False, input_size=(3, 64, 64), mean=[0.5])
    network = replace(theirs, source={"library": "timm", "weights": {"file": "w.pth"}})
    images = InputConfig((3, 32, 32), IMAGENET_MEAN, IMAGENET_STD)
    (words,) = _prepared_otherwise({"net": network}, images)
    std = ", ".join(f"{v:g}" for v in theirs.input.std)
    assert words.startswith(
        f"net takes images of 64 x 64 pixels, normalised by mean 0.5, 0.5, 0.5 and std {std}, as timm has it for that name. If"
    )
    assert not [*_prepared_otherwise({"net": network}, theirs.input)]


@pytest.fixture(scope="module")
def digits_once(things, tmp_path_factory) -> Path:
    """A folder with a run of a network with seven classes, and a small network of timm with as many beside it."""
    place = tmp_path_factory.mktemp("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("cifar_resnet8", "cifar_resnet14"):
            network = load_backbone(name, num_classes=7, pretrained=False).module
            save_file(network.state_dict(), place / f"{name}.safetensors")
    words = ("--model", "cifar_resnet14", "--weights", place / "cifar_resnet14.safetensors", "--num-classes", 7)
    small = ("--input-size", "3,16,16", "--exits", "layer1,layer2", "--data", things / "two")
    quietly("augment", *words, *small, *SHORT, "--threshold", 0.5, "--out", place / "digits")
    return place


@pytest.fixture
def digits(digits_once, elsewhere) -> Path:
    """That run and those networks in the folder to work in."""
    shutil.copytree(digits_once, elsewhere, dirs_exist_ok=True)
    return Path("digits")


@pytest.mark.parametrize(
    "command",
    [("compare", "--lines", "own"), ("report", "--lines", "own"), slow(("plot", "--out", "p.html"))],
    ids=lambda words: words[0],
)
def test_a_smaller_network_from_a_file_is_built_for_the_classes_of_the_run(run, digits, command):
    name, *more = command
    done = run(name, digits, "--static", "cifar_resnet8=cifar_resnet8.safetensors", "--drops", "0.5", *more)
    assert (done.status, done.err if name != "plot" else "") == (0, "")


def test_a_smaller_network_may_be_the_runs_own_with_another_file(run, digits):
    words = ("--static", "cifar_resnet14=cifar_resnet14.safetensors", "--drops", "0.5", "--lines", "own", "--json")
    done = run("compare", digits, *words)
    lines = {each["name"]: each["entries"] for each in json.loads(done.out)["lines"]}
    assert lines["cifar_resnet14"][0]["cost"] == pytest.approx(1)
    assert lines["cifar_resnet14"][0]["fidelity"] == 1


def test_a_smaller_network_with_the_name_of_a_run_is_told_from_it(run, digits):
    digits.rename("cifar_resnet8")
    words = ("--static", "cifar_resnet8=cifar_resnet8.safetensors", "--drops", "0.5", "--lines", "own", "--json")
    names = [each["name"] for each in json.loads(run("compare", "cifar_resnet8", *words).out)["lines"]]
    assert "network cifar_resnet8" in names
    assert len(set(names)) == len(names)


def test_a_smaller_network_of_other_classes_is_refused_with_both_numbers(run, digits, things):
    other = f"cifar_resnet8={things / 'weights.safetensors'}"
    assert_refused(
        run("compare", digits, "--static", other),
        r"^The network cifar_resnet8: .*weights.safetensors has 10 classes \(fc\.weight, fc\.bias\), the model has 7\. "
        r"Give a file of its weights for these 7 classes: --static cifar_resnet8=FILE\.$",
    )


def test_compare_prints_a_table_for_people(run, finished, things):
    done = run("compare", finished, "--drops", "0.1", "--data", things / "two")
    assert (done.status, done.err) == (0, "")
    assert "chosen on 6 of the 12 validation images, drawn with seed 3" in done.out
    for words in ("cannot be mapped", "<= 0.1 lost", "out, oracle", "At most 0.1 lost: "):
        assert words in done.out


@pytest.mark.parametrize("command", [("compare", "other"), ("report", "--against", "other")], ids=["compare", "report"])
def test_runs_that_take_other_images_are_refused_at_once_with_what_differs(run, finished, monkeypatch, command):
    shutil.copytree(finished, "other")
    elsewhere = {"mean": [0.25, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    edited("other", lambda config: config["backbone"]["input"].update(elsewhere))
    edited("other", lambda config: config["results"]["data"].update(source="elsewhere"))
    monkeypatch.setitem(sys.modules, "ptee.pipeline.saved_run", None)
    done = run(command[0], finished, *command[1:])
    assert_refused(
        done, r"^other takes images of another mean and std than out: mean \(0\.25, 0\.5, 0\.5\), not \(0\.485,"
    )


def test_runs_whose_pictures_are_resized_otherwise_are_refused(run, finished):
    shutil.copytree(finished, "other")
    edited("other", lambda config: config["backbone"]["input"].update(interpolation="nearest"))
    assert_refused(
        run("compare", finished, "other"), "other takes pictures that are resized by nearest, and out by bicubic"
    )


def test_a_comparison_is_drawn_on_a_page_where_one_is_asked_for(run, finished):
    done = run("compare", finished, "--drops", "0.1", "--lines", "own,oracle", "--html", "curve.html")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("Drawn in curve.html\n")
    assert "At most 0.1 lost: " in Path("curve.html").read_text()
    assert run("compare", finished, "--html", "curve.png").status == 2


def test_a_row_for_each_run_is_written_where_one_is_asked_for(run, finished):
    shutil.copytree(finished, "twin")
    done = run("compare", finished, "twin", "--drops", "0.1", "--lines", "own", "--csv", "results.csv")
    assert (done.status, done.err) == (0, "")
    first, second = csv.DictReader(Path("results.csv").read_text().splitlines())
    results = read_json(finished, "metrics.json")["results"]
    assert (first["run"], second["run"]) == ("out", "twin")
    assert first | {"run": "twin"} == second
    assert float(first["fidelity"]) == results["rows"][-1]["fidelity"]
    assert (first["img_size"], first["samples"], first["device"]) == ("16", str(results["samples"]), "")
    assert [float(t) for t in first["threshold"].split()] == pytest.approx(results["threshold"], rel=1e-5)
    Path("file").touch()
    assert run("compare", finished, "--csv", "file/results.csv").status == 2
    assert_refused(run("compare", finished, "--csv", "."), "is a folder. Give a file, such as --csv report.csv")
    assert_refused(run("compare", finished, "--csv", "results.txt"), "Give a name that ends in .csv")


def test_a_run_of_heads_that_read_earlier_answers_is_compared_by_the_lines_that_are_asked_for(run, known):
    words = ("--recipe", "ztw", "--targets", "pseudo", "--no-speed", "--threshold", 0.5, "--out", "runs/ztw")
    assert run("augment", *known, *BRIEF, *words).status == 0
    assert [each["head"] for each in read_json("runs/ztw", "config.json")["exits"]] == ["conv2", "conv2+"]
    done = run("compare", "runs/ztw", "--lines", "entropy, own", "--json")
    assert [each["name"] for each in json.loads(done.out)["lines"]] == ["ztw", "ztw, entropy (BranchyNet)"]


def test_runs_of_another_backbone_are_not_compared(run, finished, things):
    torch.manual_seed(1)
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), "other.safetensors")
    other = (*MODEL, "--weights", "other.safetensors", "--data", things / "ten", *SHORT)
    assert run("augment", *other, "--seed", 3, "--threshold", 0.5, "--out", "other").status == 0
    assert_refused(run("compare", finished, "other"), "other has another backbone")


def test_runs_that_drew_their_images_with_other_seeds_are_not_compared(run, finished, second, things):
    assert_refused(run("compare", finished, second), r"different seeds \(3, 4\).*--data FOLDER")
    words = ("--data", things / "two", "--lines", "own", "--drops", "0.5")
    assert run("compare", finished, second, *words).status == 0


REFUSED = {
    "a line that is none": (["--lines", "own,max"], "Unknown line 'max'. Did you mean 'max_prob'"),
    "a run beside itself": (["RUN"], "out is given twice"),
    "a run beside itself under another name": (["./out"], "out is given twice"),
    "drops of one word": (["--drops", "low"], "'low' is not a number or a list.* such as 0,0.01"),
    "a drop that is no fraction": (["--drops", "0.01,2"], r"--drops 2\.0 must be below 1\. Did you mean 0\.02\?"),
    "drops in percent": (["--drops", "0,1%"], r"such as 0,0\.01\. Did you mean 0,0\.01\?"),
    "an unknown network": (["--static", "resnet81=x"], "'resnet81'.*Did you mean"),
    "a network without weights": (["--static", "cifar_resnet8"], "--static cifar_resnet8=FILE"),
    "no run": (["EMPTY"], "config.json"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_a_comparison_that_cannot_be_is_refused_in_one_line(words, said, run, finished, things):
    places = {"EMPTY": things / "empty", "RUN": finished}
    assert_refused(run("compare", finished, *(places.get(word, word) for word in words)), said)


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("runs", "names"),
    [(["runs/a", "runs/b/"], ["a", "b"]), (["x/a", "y/a", "b"], ["x/a", "y/a", "b"]), (["user/run"], ["run"])],
    ids=str,
)
def test_runs_are_called_by_the_end_of_their_path_where_that_is_enough(runs, names):
    assert list(names_of(tuple(runs))) == names


def test_a_run_is_called_like_its_folder_from_within_as_well(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert list(names_of((".", "../other/"))) == ["mine", "other"]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["cifar_resnet21"], "Unknown model 'cifar_resnet21'. Did you mean"),
        (["cifar_resnet8=none.safetensors"], "none.safetensors"),
    ],
    ids=str,
)
def test_a_network_that_cannot_be_loaded_is_refused(texts, words, finished):
    with pytest.raises(PteeError, match=words):
        static_networks(tuple(texts), [str(finished)])


def test_a_published_network_of_other_classes_is_refused_before_images_are_read(finished, monkeypatch):
    published = load_backbone("cifar_resnet8", num_classes=100, pretrained=False)
    monkeypatch.setattr("ptee.backbones.load.load_backbone", lambda *_, **__: published)
    with pytest.raises(PteeError, match=r"The network cifar_resnet8 has 100 classes, the run 10\. Give a file of its"):
        static_networks(("cifar_resnet8",), [str(finished)])
