"""`ptee augment`: a run that says what was measured, refusals before any training, and folders that are left alone."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from cases import slow
from command import BRIEF, RANDOM, SHORT, TEN, assert_refused, figures, files, pictures, read_json
from safetensors.torch import load_file

import ptee
from ptee.analysis.cut_points import random_images
from ptee.backbones.load import load_backbone
from ptee.cli import values as cli_values
from ptee.pipeline import fit as fitting
from ptee.pipeline import images
from ptee.pipeline.demo import another_threshold

# ---------------------------------------------------------------------------------------------------- a run


def test_augment_leaves_a_run_that_says_what_was_measured(run, known):
    done = run("augment", *known, *BRIEF, "--threshold", "0.9,0.8", "--out", "out")
    assert done.status == 0, done
    assert {*files(Path("out"))} == {"README.md", "config.json", "heads.safetensors", "metrics.json", "recipe.yaml"}
    config, metrics = read_json("out", "config.json"), read_json("out", "metrics.json")
    assert config["threshold"] == [0.9, 0.8]
    assert config["results"] == metrics["results"]
    assert [row["name"] for row in metrics["results"]["rows"]] == ["backbone", "exit 0", "exit 1", "early exit"]
    assert all(row["speedup"] > 0 for row in metrics["results"]["rows"])
    assert all(exit_["head"].startswith("res-") for exit_ in config["exits"])
    assert len(metrics["training"]["epochs"]) == 2
    for line in ("epoch 1/2", "epoch 2/2", "T = 0.9, 0.8", "Saved in out", "10 classes"):
        assert line in done.out


def test_a_run_says_how_pictures_are_prepared_and_who_says_so(run, known, said):
    own = "mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225"
    size = "--input-size as given, the rest as timm has it for cifar_resnet8."
    ask = "If your weights were trained otherwise, give --mean and --std."
    assert f"Pictures are resized (bicubic), cut to 16 x 16 and normalised by {own}: {size} {ask}\n" in said
    given = ("--mean", 0.5, "--std", 0.25, "--interpolation", "nearest")
    done = run("augment", *known, *SHORT, *given, "--threshold", 0.5, "--out", "two")
    own = "mean 0.5, 0.5, 0.5 and std 0.25, 0.25, 0.25"
    assert f"Pictures are resized (nearest), cut to 16 x 16 and normalised by {own}: as given.\n" in done.out


@pytest.mark.cpu("files are exported on the CPU")
def test_pictures_of_a_run_are_resized_as_when_it_was_made(run, known, things, monkeypatch):
    words = ("--interpolation", "nearest", "--exits", "layer1", "--threshold", 0.5, "--out", "out")
    assert run("augment", *known, *SHORT, *words).status == 0
    config = read_json("out", "config.json")["backbone"]
    assert config["input"]["interpolation"] == config["source"]["input"]["interpolation"] == "nearest"
    assert "pictures are resized by nearest" in Path("out", "README.md").read_text()
    seen, made = [], images.image_transform
    monkeypatch.setattr(images, "image_transform", lambda *view: (seen.append(view[-1]), made(*view))[1])
    for words in (
        ("evaluate", "out", "--no-speed"),
        ("tune", "out", "--max-cost", 1, "--no-speed"),
        ("compare", "out", "--lines", "own", "--drops", 0.5),
    ):
        assert run(*words).status == 0
    assert seen == ["nearest"] * 3
    assert run("export", "out", "--out", "exported").status == 0
    assert read_json("exported", "manifest.json")["interpolation"] == "nearest"
    assert run("evaluate", "exported", "--data", things / "ten").status == 0
    assert seen == ["nearest"] * 4


def test_a_way_to_resize_that_is_none_is_refused_with_the_nearest(run, known):
    assert_refused(run("augment", *known, "--interpolation", "bicubik"), "'bicubik'. Did you mean 'bicubic'")


def test_the_saved_model_is_the_one_that_was_trained(finished, things):
    model = ptee.load(finished)
    backbone = load_backbone("cifar_resnet8", weights=things / "weights.safetensors").module
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.predict(x, 2).logits, backbone(x))
    assert model.results["samples"] == 3


def test_the_recipe_of_a_run_is_kept_in_it_and_gives_the_same_numbers_again(run, known):
    assert run("augment", *known, *SHORT, "--seed", 2, "--max-fidelity-drop", 0.4, "--out", "one").status == 0
    source = (*known[:4], *known[6:])  # the exits are the recipe's
    assert run("augment", *source, "--recipe", "one", "--no-speed", "--out", "two").status == 0
    assert Path("one", "recipe.yaml").read_text() == Path("two", "recipe.yaml").read_text()
    assert_same_heads("one", "two")
    one, two = (read_json(name, "config.json") for name in ("one", "two"))
    assert one["threshold"] == two["threshold"]
    assert figures(one["results"]) == figures(two["results"])


def test_another_seed_gives_other_heads(original, second):
    one, other = (load_file(folder / "heads.safetensors") for folder in (original, second))
    assert one.keys() == other.keys()
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def assert_same_heads(one: str, other: str) -> None:
    first, second = (load_file(Path(name, "heads.safetensors")) for name in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_augment_takes_every_way_of_learning(run, known):
    changes = ("temperature=3", "schedule=cosine", "views=3", "mirror=false", "shift=2", "patience=1", "cache=false")
    more = [word for change in changes for word in ("--set", change)]
    words = ("--loss", "each", "--targets", "soft", *more, "--head", "conv1", "--threshold", 0.5, "--out", "out")
    done = run("augment", *known, *SHORT, *words)
    assert done.status == 0, done.err
    assert "epoch 2/2" in done.out


def test_the_other_threshold_that_is_suggested_lies_near_the_runs_own(finished):
    model = ptee.load(finished)
    model.threshold, model.off = [0.0316, 0.9], [1]
    assert another_threshold(model, Path("my run")) == "Another threshold: ptee evaluate 'my run' --threshold 0.063"
    model.threshold = 0
    assert another_threshold(model, Path("out")).endswith("--threshold 0.7")


@pytest.mark.parametrize("off", [slow([]), [0], [0, 1]], ids=str)
def test_another_threshold_is_suggested_if_an_exit_is_on(off, run, known, monkeypatch):
    measure = fitting._measure

    def switched_off(model: ptee.EarlyExitModel, *more: object) -> None:
        model.off = off
        measure(model, *more)

    monkeypatch.setattr(fitting, "_measure", switched_off)
    done = run("augment", *known, *SHORT, "--out", "out")
    assert done.status == 0, done
    assert ("Another threshold" in done.out) == (len(off) < 2)


def test_if_labels_cannot_be_mapped_the_heads_learn_the_backbones_answers(run, foreign):
    done = run("augment", *foreign, *SHORT, "--loss", "joint", "--out", "out")
    assert done.status == 0, done
    said = (
        r"cat, dog.*cannot be mapped.*\(--classes FILE\).*The heads learn the backbone's own answers\. "
        r"Thresholds are chosen for fidelity: at most 0\.01 of the answers differ from the backbone's\.\n"
    )
    assert re.search(said, done.out)
    assert {row["accuracy"] for row in read_json("out", "metrics.json")["results"]["rows"]} == {None}


def test_a_collapse_of_the_training_is_told(run, known):
    words = ("--loss", "cost", "--set", "lr=0.5", *SHORT, "--threshold", 0.5)
    done = run("augment", *known, *words, "--out", "out")
    assert done.status == 0
    assert "Warning: Training collapsed" in done.out


def test_a_threshold_that_no_confidence_decides_is_remarked_on_before_the_training(run, known):
    done = run("augment", *known, *SHORT, "--threshold", 2, "--out", "out")
    assert done.status == 0
    assert done.err.startswith("T above 1: nobody leaves.\n")


def test_speed_need_not_be_measured(original):
    """This run was made where it cannot be."""
    assert [row["speedup"] for row in read_json(original, "metrics.json")["results"]["rows"]] == [None] * 4


def test_that_a_run_of_random_weights_is_lost_to_the_command_is_said_before_the_training(run, things):
    done = run("augment", *RANDOM, "--data", things / "ten", *SHORT, "--threshold", 0.5, "--out", "out")
    assert done.status == 0
    assert re.search(r"weights are random.*--weights FILE.*epoch 1/2", done.out, re.DOTALL)
    assert "ptee evaluate" not in done.out
    assert_refused(run("evaluate", "out"), "random")


# ---------------------------------------------------------------------------------------------------- the confidence

CALIBRATED = ("--set", "calibration_share=0.3")


def test_the_confidence_is_calibrated_on_images_of_its_own_and_saved(run, known, things):
    done = run("augment", *known, "--data", things / "many", *SHORT, *CALIBRATED, "--out", "out")
    assert done.status == 0, done
    assert "The heads learn from 56 of the 80 training images. The confidence h is fitted on the other 24" in done.out
    model = ptee.load("out")
    assert model.confidence == "calibrated"
    assert model.results["calibration"]["images"] == 24
    assert run("evaluate", "out", "--no-speed").status == 0


def test_too_few_images_to_calibrate_leave_the_largest_probability(original, said):
    assert "24 training images are too few to fit the confidence h on some of them" in said
    model = ptee.load(original)
    assert (model.confidence, "calibration" in model.results) == ("max_prob", False)
    every = model.all_exits(random_images(model.backbone, 5, model.origin.input.input_size))
    torch.testing.assert_close(every.confidence[:-1], every.logits[:-1].softmax(-1).amax(-1))


@pytest.mark.parametrize("name", ["learned", slow("entropy")])
def test_another_confidence_is_saved_by_its_name(name, run, known):
    done = run("augment", *known, *SHORT, "--confidence", name, "--threshold", 0.5, "--out", "out")
    assert (done.status, ptee.load("out").confidence) == (0, name)
    assert "calibrate" not in done.out


# ---------------------------------------------------------------------------------------------------- refusals

R = (*RANDOM, "--data", "TEN")
REFUSED = {
    "no data for a network of other classes": (RANDOM, "--data FOLDER"),
    "no data, and Imagenette out of reach": (["--model", "resnet18", "--no-pretrained"], "Imagenette.*--data"),
    "weights that cannot be had": (["--model", "resnet18", "--data", "TEN"], "resnet18.*--weights FILE.*--no-pretrained"),
    "a folder without images": ([*RANDOM, "--data", "EMPTY"], "empty"),
    "a data set that lies elsewhere": ([*RANDOM, "--data", "CIFAR10"], "CIFAR10.*--data-root"),
    "labels that cannot be mapped": ([*RANDOM, "--data", "TWO", "--targets", "labels"], "cat, dog.*--targets pseudo"),
    "a recipe for labels that cannot be mapped": ([*RANDOM, "--data", "TWO", "--recipe", "ztw"], "cat, dog.*--targets pseudo"),
    "a question about labels that cannot be mapped": ([*RANDOM, "--data", "TWO", "--question", "best"], "cat, dog.*--question agrees"),
    "a drop of accuracy without labels": ([*RANDOM, "--data", "TWO", "--max-drop", 0.1], "no labels.*--max-fidelity-drop 0.1"),
    "unknown targets": ([*R, "--targets", "pseudos"], "pseudos.*Did you mean 'pseudo'"),
    "an unknown loss": ([*R, "--loss", "v3"], "--loss v3.*joint"),
    "an unknown precision": ([*R, "--set", "precision=bf61"], "bf61.*Did you mean"),
    "an unknown device": ([*R, "--device", "cuda:99"], "cuda:99.*cpu"),
    "an unknown confidence": ([*R, "--confidence", "calibrate"], "'calibrate'.*Did you mean 'calibrated'"),
    "a question about another confidence": ([*R, "--confidence", "entropy", "--question", "right"], "--question right.*--confidence entropy"),
    "too few images to calibrate": ([*R, "--set", "calibration_share=0.2"], "0.2 of 24.*calibration_share"),
    "no epochs": ([*R, "--epochs", 0], "--epochs"),
    "a price of NaN": ([*R, "--loss", "joint", "--cost-weight", "nan"], "--cost-weight nan"),
    "a price for heads that learn alone": ([*R, "--cost-weight", 0.5], "--cost-weight 0.5 needs a joint loss"),
    "a shift of vectors": ([*R, "--head", "pool", "--set", "shift=4"], "shift=4 moves feature maps"),
    "thresholds for other exits": ([*R, "--threshold", "0.5,0.5,0.5"], "3 thresholds for 2"),
    "a threshold of NaN": ([*R, "--threshold", "0.5,nan"], "nan"),
    "a threshold in percent": ([*R, "--threshold", 70], r"nobody leaves.*between 0 and 1: did you mean 0\.7\?$"),
    "a threshold of words": ([*R, "--threshold", "high"], "high"),
    "a threshold and a target": ([*R, "--threshold", 0.5, "--max-drop", 0.1], "--threshold 0.5 and --max-drop 0.1 are given"),
    "a drop above 1": ([*R, "--max-drop", 2], "--max-drop 2 must be below 1"),
    "a margin for thresholds that are given": ([*R, "--threshold", 0.5, "--set", "margin=0.1"], "margin=0.1.*--threshold 0.5"),
    "a margin above the drop": ([*R, "--max-drop", 0.1, "--set", "margin=0.2"], "margin=0.2 leaves nothing of --max-drop 0.1"),
    "a cost that cannot be reached": ([*R, "--max-cost", 0.01], "--max-cost 0.01 cannot be reached: .* Give --max-cost .* or more"),
    "a cost that the margin puts out of reach": ([*R, "--max-cost", 0.9, "--set", "margin=0.89"], "0.89.* cannot be reached"),
    "a guarantee by few images": (
        [*R, "--max-fidelity-drop", 0.1, "--confidence", 0.95],
        "--max-fidelity-drop 0.1 at --confidence 0.95 needs at least 29 images, and 3 images are there",
    ),
    "a guarantee at each exit by few images": (
        [*R, "--max-fidelity-drop", 0.1, "--confidence", 0.95, "--set", "each_exit=true"],
        "at --confidence 0.95 and .*each_exit=True needs at least 38 images, and 3 images are there",
    ),
    "a guarantee of thresholds that are given": ([*R, "--threshold", 0.5, "--confidence", 0.9], "--confidence 0.9 is about thresholds that are chosen"),
    "a guarantee above 1": ([*R, "--confidence", 95], "--confidence 95 must be below 1"),
    "each exit without a guarantee": ([*R, "--set", "each_exit=true"], "each_exit=True is about a guarantee.*--confidence 0.95"),
    "a resumption of nothing": ([*R, "--resume"], "no interrupted training in out.*--resume"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_augment_refuses_in_one_line_before_the_training_and_writes_nothing(
    words, said, run, things, elsewhere, monkeypatch
):
    monkeypatch.setattr(fitting, "run_training", None)
    places = {"EMPTY": things / "empty", "TEN": things / "ten", "TWO": things / "two"}
    assert_refused(run("augment", *(places.get(word, word) for word in words), "--out", "out"), said)
    assert list(elsewhere.iterdir()) == []


MISSING = {
    "weights": (["--weights", "none.pth"], "There is no file none.pth. Give one that exists"),
    "weights that are a folder": (["--weights", "."], ". is a folder. Give a file, such as one in it"),
    "class names": (["--classes", "none.txt"], "There is no file none.txt. Give one that exists"),
    "a folder": (["--data", "some/where"], "Data folder 'some/where' does not exist"),
    "a folder, or a data set of that name": (["--data", "nowhere"], "no folder 'nowhere', and no data set.*digits, "),
    "a data set that can be indexed": (["--data", "wds/some"], "'wds/some' is a stream"),
}


@pytest.mark.parametrize("command", ["augment", "sweep"])
@pytest.mark.parametrize(("words", "said"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_said_before_the_weights_of_a_model_are_downloaded(command, words, said, run, monkeypatch):
    monkeypatch.setattr("ptee.backbones.load.load_backbone", None)
    over = ("--over", "seed=0,1") if command == "sweep" else ()
    assert_refused(run(command, "--model", "resnet50", *words, *over, "--out", "out"), said)


def test_settings_are_checked_before_any_model_is_built(run, known, monkeypatch):
    monkeypatch.setattr("ptee.backbones.load.load_backbone", None)
    assert_refused(run("augment", *known, "--loss", "v3"), "v3")


@pytest.mark.parametrize("option", ["data", "weights", "classes", "num-classes", "input-size", "model-arg"])
def test_what_needs_a_model_is_refused_without_one(option, run):
    Path("here").touch()
    value = {"num-classes": "10", "input-size": "32", "model-arg": "a=1"}.get(option, "here")
    assert_refused(run("augment", f"--{option}", value), f"--{option} needs a model. Give --model NAME")


# ---------------------------------------------------------------------------------------------------- the folder


def test_without_out_the_run_is_called_after_its_model(run, known):
    assert run("augment", *known, *SHORT, "--threshold", 0.5).status == 0
    assert Path("runs", "cifar_resnet8", "config.json").is_file()


@pytest.mark.parametrize("folder", ["out", "deep/er/out"])
def test_an_empty_or_new_folder_is_used(folder, run, known):
    Path("out").mkdir()
    assert run("augment", *known, *SHORT, "--threshold", 0.5, "--out", folder).status == 0
    assert Path(folder, "config.json").is_file()


@pytest.mark.parametrize(("out", "said"), [("file", "file is a file"), ("file/run", "file/run.*file is a file")])
def test_a_file_is_no_folder_for_a_run(out, said, run, known):
    Path("file").write_text("mine")
    assert_refused(run("augment", *known, *SHORT, "--out", out), said)
    assert Path("file").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_before_the_training(run, known, monkeypatch):
    def fail(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fitting, "run_training", None)
    monkeypatch.setattr("ptee._common.writing.writing_in", fail)
    assert_refused(run("augment", *known, *SHORT, "--out", "out"), "Cannot write out: Permission denied")


@pytest.mark.parametrize("name", ["notes.txt", "metrics.json", "config.json"])
def test_a_folder_with_something_else_in_it_is_left_alone(name, run, known):
    Path("out").mkdir()
    Path("out", name).write_text('{"model_type": "bert"}')
    done = run("augment", *known, *SHORT, "--out", "out")
    assert files(Path("out")) == {name: b'{"model_type": "bert"}'}
    assert_refused(done, "out.*--out")


def test_an_earlier_run_is_left_alone(run, known, finished):
    before = files(finished)
    assert_refused(run("augment", *known, *SHORT, "--out", finished), "out holds a run.*--overwrite")
    for mistake, said in (
        (("--model", "resnet5000"), "'resnet5000'"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--data", "CIFAR11"), "CIFAR11"),
    ):
        assert_refused(run("augment", *known, *SHORT, *mistake, "--out", finished), said)
    assert files(finished) == before


@pytest.mark.parametrize("words", [["--loss", "v3"], ["--head", "poool"], ["--threshold", "1,2,3"]], ids=" ".join)
def test_a_mistake_costs_no_earlier_run(words, run, known, finished):
    before = files(finished)
    assert run("augment", *known, *SHORT, *words, "--out", finished, "--overwrite").status == 2
    assert files(finished) == before


def test_a_damaged_image_costs_no_earlier_run(run, known, things, finished):
    images = Path(shutil.copytree(things / "ten", "images"))
    for image in images.glob("*/0.png"):
        image.write_text("damaged")
    before = files(finished)
    done = run("augment", *known, "--data", images, *SHORT, "--out", finished, "--overwrite")
    assert_refused(done, "10 of 30 pictures cannot be read")
    assert files(finished) == before


def test_an_earlier_run_is_written_over_where_that_is_said(run, known, finished):
    words = ("--exits", "layer3.0", "--threshold", 0.5, "--out", finished, "--overwrite")
    assert run("augment", *known, *SHORT, *words).status == 0
    assert [e.name for e in ptee.load(finished).exits] == ["layer3.0"]


@pytest.mark.parametrize(("name", "option"), [("config.json", "--overwrite"), ("checkpoint.safetensors", "--resume")])
def test_where_nothing_is_given_the_second_run_is_told_what_to_type(name, option, run):
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo", name).write_text(json.dumps({"schema_version": 1}))
    assert_refused(run("augment"), f"runs/demo holds.*{option}")


def test_nothing_is_written_of_a_run_that_fails(run, known, monkeypatch, elsewhere):
    def fail(*_: object, **__: object) -> None:
        raise LookupError("somewhere")

    monkeypatch.setattr(fitting, "run_training", fail)
    assert run("augment", *known, *SHORT, "--out", "out").status == 1
    assert list(elsewhere.iterdir()) == []


def test_copies_of_training_images_among_the_validation_images_are_told(run, tmp_path):
    for part, count in (("train", 3), ("val", 1)):
        pictures(tmp_path / "data" / part, TEN, count)
    (tmp_path / "data/val/class1/0.png").write_bytes((tmp_path / "data/train/class2/1.png").read_bytes())
    words = ("--data", tmp_path / "data", "--threshold", 0.5, "--out", tmp_path / "run")
    done = run("augment", *RANDOM, *SHORT, *words)
    assert done.status == 0
    assert "Warning: At least 1 of the 10 validation images is also among the training or calibration" in done.out


def test_a_module_that_there_is_not_is_refused_before_images_are_read(run, known, monkeypatch):
    monkeypatch.setattr(cli_values, "open_for", lambda *_, **__: pytest.fail("images were opened"))
    done = run("augment", *known, "--exits", "layer1,layerr2", "--out", "out")
    assert_refused(done, "Unknown module 'layerr2'. Did you mean 'layer2'")


def test_one_share_of_the_operations_places_one_exit(run, known):
    assert run("augment", *known, *SHORT, "--exits", "0.4", "--threshold", 0.5, "--out", "out").status == 0
    assert len(ptee.load("out").exits) == 1


def test_classes_that_no_validation_image_shows_are_named_beside_the_results_too(run, known, elsewhere):
    pictures(elsewhere / "parted" / "train", TEN, 2)
    pictures(elsewhere / "parted" / "val", TEN[:9], 2)
    said = "No validation image shows class9: the results say nothing of it."
    done = run("augment", *known[:-1], "parted", *SHORT, "--out", "out")
    assert done.status == 0, done
    assert said in done.out[done.out.index("Chosen: ") : done.out.index("when it runs")]
    assert said in run("evaluate", "out", "--no-speed").out
    pictures(elsewhere / "plain", TEN, 3)  # of which one is drawn for validation, and all are reported on
    assert "No validation image" not in run("evaluate", "out", "--data", "plain", "--no-speed").out
