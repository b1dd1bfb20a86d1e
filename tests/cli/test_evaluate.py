"""`ptee evaluate`: a saved run measured again on the images that its heads have not seen, at any threshold."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import MODEL, SHORT, TEN, assert_refused, edited, evaluated, figures, files, pictures, quietly, read_json
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

import ptee


def test_evaluate_repeats_what_augment_measured_on_the_same_images(run, finished):
    done = run("evaluate", finished, "--json", "--no-speed")
    assert done.status == 0
    assert "drawn with seed 3" in done.err
    recorded, again = read_json(finished, "metrics.json")["results"], json.loads(done.out)
    assert figures(again) == figures(recorded)
    assert again["about"] == recorded["about"]


def test_evaluate_prints_a_table_for_people(run, finished):
    done = run("evaluate", finished, "--threshold", "0.25")
    assert done.status == 0
    assert "Speed is measured for about 20 seconds, on a slow machine for minutes. --no-speed (in" in done.out
    assert re.search(r"backbone.*exit 0.*exit 1.*early exit, T = 0\.25", done.out, re.DOTALL)


def test_explain_says_what_the_columns_mean(run, finished):
    plain, explained = (run("evaluate", finished, "--no-speed", *more).out for more in ((), ("--explain",)))
    assert explained.startswith(plain.rstrip())
    assert len(explained) > len(plain) + 100


@pytest.mark.parametrize(("threshold", "used"), [("0.7", [0.7, 0.7]), ("0,2", [0, 2]), ("2", [2, 2])])
def test_evaluate_takes_any_threshold_and_leaves_the_run_alone(threshold, used, run, finished):
    before = files(finished)
    results = evaluated(run, finished, "--threshold", threshold)
    assert results["threshold"] == used
    if used[0] != 0.7:
        assert results["leaving"] == ([1, 0, 0] if used[0] == 0 else [0, 0, 1])
    assert files(finished) == before


NOTES = [
    ("2", "T above 1: nobody leaves."),
    ("70", "T above 1: nobody leaves. A confidence lies between 0 and 1: did you mean 0.7?"),
    ("70,85", "T above 1: nobody leaves. A confidence lies between 0 and 1: did you mean 0.7,0.85?"),
    ("-1", "T at or below 0: everybody leaves at exit 0."),
    ("0.5", ""),
]


@pytest.mark.parametrize(("threshold", "said"), NOTES)
def test_a_threshold_that_no_confidence_decides_is_remarked_on(threshold, said, run, finished):
    edited(finished, lambda config: config.update(off=[]))
    done = run("evaluate", finished, f"--threshold={threshold}", "--no-speed")
    assert (done.status, done.err.strip()) == (0, said)


def test_a_run_whose_images_all_leave_at_once_is_called_a_shorter_network(run, finished):
    done = run("evaluate", finished, "--threshold", 0, "--no-speed")
    assert "100% of the images leave at exit 0 (layer1): this is a shorter network" in done.out


def test_the_json_has_no_infinity_and_no_nan(run, finished):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    done = run("evaluate", finished, "--threshold", "inf", "--json", "--no-speed")
    assert json.loads(done.out, parse_constant=refuse)["leaving"] == [0, 0, 1]


REFUSED = {
    "a folder without a run": ("EMPTY", "holds no config.json"),
    "a folder that is not there": ("nowhere", "no folder nowhere"),
    "a repository, offline": ("user/nowhere", "user/nowhere"),
}


@pytest.mark.parametrize(("folder", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_run_is_refused(folder, said, run, things):
    assert_refused(run("evaluate", things / "empty" if folder == "EMPTY" else folder), said)


@pytest.mark.parametrize(
    "command", [["evaluate"], ["tune", "--max-drop", "0.1"], ["bench", "--save"]], ids=lambda words: words[0]
)
@pytest.mark.parametrize("name", ["sq", "runs", "runs/sqq"])
def test_a_run_that_may_be_meant_is_named(name, command, run, finished, elsewhere):
    shutil.copytree(finished, elsewhere / "runs" / "sq")
    assert_refused(run(*command, name), r"Did you mean runs/sq\?$")


# ---------------------------------------------------------------------------------------------------- data and weights


def test_other_images_are_measured_all_even_where_labels_cannot_be_mapped(run, finished, things):
    assert evaluated(run, finished, "--data", things / "two")["samples"] == 12
    pictures(Path("others"), TEN, 2)
    assert evaluated(run, finished, "--data", "others")["samples"] == 20


@pytest.mark.parametrize(
    "command", [("evaluate",), ("tune", "--max-fidelity-drop", 0.9), ("compare", "--lines", "own", "--drops", 0.5)]
)
def test_what_lies_beside_the_class_folders_and_is_not_read_is_named(command, run, finished):
    pictures(Path("others"), TEN, 3)
    for file in Path("others", "class3").iterdir():
        file.rename(file.with_suffix(".gif"))
    Path("others", "class4", "0.png").rename(Path("others", "class4", "0.heic"))
    shutil.copy(Path("others", "class5", "0.png"), "others")
    Path("others", "more.zip").touch()
    done = run(command[0], finished, *command[1:], "--data", "others", "--json")
    said = "; not read: class class3 (3 .gif), 1 .heic file, more.zip, 1 picture outside of class folders."
    assert done.status == 0 and said in done.out + done.err


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate",),
        ("evaluate", "--workers", "1"),
        ("tune", "--max-fidelity-drop", "0.9"),
        ("compare",),
        ("report", "--out", "r.html"),
    ],
    ids=" ".join,
)
def test_all_pictures_that_cannot_be_read_are_named_at_once(command, run, finished):
    pictures(Path("others"), TEN, 9)
    broken = [Path("others", *name) for name in (("class1", "4.png"), ("class3", "7.png"), ("class8", "2.png"))]
    for file in broken:
        file.write_bytes(b"no picture")
    done = run(command[0], finished, *command[1:], "--data", "others")
    assert done.status == 2
    assert done.err.splitlines()[-1].startswith("3 of 90 pictures cannot be read. Replace or remove them")
    assert all(f"'{file}'" in done.err for file in broken)


def test_the_data_are_found_from_another_folder(run, known, things, monkeypatch, elsewhere):
    monkeypatch.chdir(things)
    words = ("--threshold", 0.5, "--out", elsewhere / "out")
    assert run("augment", *known[:-1], "ten", *SHORT, *words).status == 0
    monkeypatch.chdir(elsewhere)
    assert run("evaluate", "out", "--no-speed").status == 0


CHANGES = {
    "seed": lambda results: results["data"]["split"].update(seed=9),
    "files": lambda results: results["data"]["split"].update(files_sha256="0" * 64),
    "removed": lambda results: results["data"]["split"].update(removed=[["train", "a/x.png", "a"]]),
    "chosen on": lambda results: results["tuning"].update(source="elsewhere"),
    "no tuning": lambda results: results.pop("tuning"),
    "nothing": lambda results: results.clear(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_which_images_are_reported_on_cannot_be_changed_by_hand(what, run, finished):
    edited(finished, lambda config: CHANGES[what](config["results"]), signed=False)
    assert_refused(run("evaluate", finished, "--no-speed"), "was changed or damaged: .* or its images are not those")


def test_the_place_of_the_images_may_be_changed_by_hand(run, finished, things):
    Path("moved").symlink_to(things / "ten")
    place = str(Path("moved").absolute())
    edited(finished, lambda config: config["results"]["data"].update(source=place), signed=False)
    assert evaluated(run, finished)["samples"] == read_json(finished, "metrics.json")["results"]["samples"]


def test_data_are_asked_for_where_none_were_recorded(run, finished):
    edited(finished, lambda config: config.update(results=None))
    assert_refused(run("evaluate", finished), "--data FOLDER")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1], []),
        ({"source": 1}, []),
        ({"source": "ten", "split": [1]}, ["--data", "TEN"]),
        ({"root": 1}, ["--data", "TEN"]),
    ],
    ids=str,
)
def test_what_a_run_says_of_its_data_is_not_trusted(data, words, run, finished, things):
    edited(finished, lambda config: config["results"].update(data=data, tuning=data))
    done = run("evaluate", finished, *(things / "ten" if word == "TEN" else word for word in words), "--no-speed")
    assert done.status in (0, 2), done.err


@pytest.mark.parametrize("command", [("evaluate",), ("tune", "--max-cost", 1)], ids=str)
def test_it_is_said_where_the_backbone_is_hardly_better_than_chance(command, run, finished):
    done = run(command[0], finished, *command[1:], "--no-speed")
    assert re.search(r"right on \d+\.\d% of 30 images, and would be on 10\.0% by chance.*--classes FILE", done.out)


def test_weights_that_were_moved_are_asked_for_and_taken(run, things, tmp_path):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    shutil.copy(things / "weights.safetensors", old)
    words = ("--data", things / "ten", *SHORT, "--threshold", 0.5, "--out", "out")
    assert run("augment", *MODEL, "--weights", old, *words).status == 0
    old.rename(new)
    assert_refused(
        run("evaluate", "out"),
        r"^The backbone cannot be rebuilt: There is no weights file .*old\.safetensors\. Say where a file of its weights is: --weights FILE\.$",
    )
    assert run("evaluate", "out", "--weights", new, "--no-speed").status == 0
    tensors, others = load_file(new), tmp_path / "others.safetensors"
    less = {name: tensor for name, tensor in tensors.items() if "fc" not in name}
    wider = {name: torch.cat([t, t], 1) if t.dim() == 4 else t for name, t in tensors.items()}
    more_classes = tensors | {name: torch.cat([t, t]) for name, t in tensors.items() if "fc" in name}
    for wrong in (less, wider, more_classes):
        save_file(wrong, others)
        done = run("evaluate", "out", "--weights", others)
        assert_refused(done, r"\. Give the weights that the run was made with: --weights FILE\.$")
        assert not re.search("--model|--num-classes|--input-size|backbone=|  ", done.err)


@pytest.fixture(scope="module")
def drawn(things, tmp_path_factory) -> tuple[Path, Path]:
    """Images of which some were drawn for a run's validation, and that run."""
    place = tmp_path_factory.mktemp("drawn")
    images = Path(shutil.copytree(things / "ten", place / "images"))
    source = (*MODEL, "--weights", things / "weights.safetensors", "--data", images)
    quietly("augment", *source, *SHORT, "--threshold", 0.5, "--out", place / "out")
    return images, place / "out"


@pytest.fixture
def images(drawn, things) -> Path:
    """Those images as they were; the run is in out."""
    folder, original = drawn
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(things / "ten", folder)
    shutil.copytree(original, "out")
    return folder


def test_with_an_image_more_the_unseen_ones_cannot_be_told_and_others_are_asked_for(run, images):
    shutil.copy(images / "class0" / "0.png", images / "class0" / "new.png")
    for words in ((), ("--data", images)):
        assert_refused(run("evaluate", "out", *words), r"images.*Put .* back.*--data FOLDER")
    (images / "class0" / "new.png").unlink()
    assert figures(evaluated(run, "out")) == figures(read_json("out", "metrics.json")["results"])


def test_of_the_same_images_in_another_place_only_the_unseen_ones_are_measured(run, images):
    images.rename("moved")
    recorded = read_json("out", "metrics.json")["results"]
    assert figures(evaluated(run, "out", "--data", "moved")) == figures(recorded)


class Toys(Dataset):
    """As torchvision makes them: ten pictures in train, five in test."""

    def __init__(self, root: str, train: bool = True, transform: Any = None) -> None:
        assert (Path(root) / "toys.bin").is_file()
        self.labels = list(range(10 if train else 5))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (16, 16), (20 * index, 0, 0)), self.labels[index]


def test_the_name_of_a_data_set_stays_its_name_when_a_folder_is_called_so_later(run, known, monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.Toys", Toys, raising=False)
    Path("toys.bin").touch()
    assert run("augment", *known[:-1], "toys", *SHORT, "--threshold", 0.5, "--out", "out").status == 0
    recorded = read_json("out", "metrics.json")["results"]
    (tmp_path / "later").mkdir()
    shutil.move("out", tmp_path / "later")
    monkeypatch.chdir(tmp_path / "later")
    pictures(Path("toys"), TEN, 3)
    assert figures(evaluated(run, "out")) == figures(recorded)


def test_a_threshold_for_exits_that_are_off_is_said_to_change_nothing(run, finished):
    for off, which in (([0], "Exit 0 is"), ([0, 1], "All exits are")):
        edited(finished, lambda config, off=off: config.update(off=off))
        done = run("evaluate", finished, "--threshold", 0.2, "--no-speed")
        assert done.status == 0
        assert re.fullmatch(
            f"{which} off in .*: --threshold changes nothing there. To choose anew, .*: ptee tune out --max-fidelity-drop 0.01\\n",
            done.err,
        )
    assert run("evaluate", finished, "--no-speed").err == ""
    assert "measured: no exit is on" in run("evaluate", finished).out


def test_the_confidence_of_a_run_is_set_as_the_refusal_says(run, finished):
    done = run("evaluate", finished, "--confidence", "entropy")
    assert_refused(done, "is set in Python: .*model.confidence = NAME")
    said = re.search(r"in Python: (.*)\.$", done.err).group(1)
    assert "ptee.load('out')" in said
    exec(said, {"ptee": ptee, "NAME": "entropy"})
    assert ptee.load(finished).confidence == "entropy"
    assert run("evaluate", finished, "--no-speed").status == 0
