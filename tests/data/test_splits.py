"""No image is for two things; the same seed draws the same images, whatever was removed or moved."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from images import PARTS, levels, numbered, opened, rows, write_folder, write_tar
from torch.utils.data import TensorDataset

from ptee._common.errors import DataError
from ptee.data.pictures import File, copies
from ptee.data.splits import (
    Data,
    Unseen,
    copied,
    hold_out,
    images_to_report_on,
    part_of,
    parts_for_all,
    parts_for_tuning,
    parts_of,
    siblings,
    without_images,
)


def test_every_image_is_drawn_once_by_a_generator_of_its_own(tmp_path):
    write_folder(tmp_path, numbered(40))
    state = torch.get_rng_state()
    drawn = rows(opened(tmp_path, seed=3))
    assert sorted(level for part in PARTS for level in drawn[part]) == list(range(40))
    assert drawn == rows(opened(tmp_path, seed=3)) != rows(opened(tmp_path, seed=4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("n", [3, 8])
def test_few_images_give_one_to_each_part_at_least(tmp_path, n):
    sizes = opened(write_folder(tmp_path, numbered(n))).split["sizes"]
    assert sizes == {"train": n - 2, "calibration": 1, "validation": 1}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (numbered(2), "it has 2, and at least 3 are needed"),
        (["train/a/0.png", "val/a/0.png"], "it has 1, and at least 2 are needed, because those for calibration"),
    ],
)
def test_too_few_images_are_refused_with_their_number(tmp_path, names, said):
    with pytest.raises(DataError, match=said):
        opened(write_folder(tmp_path, names))


def test_split_record_survives_json_and_tells_files_apart(folder):
    before = opened(folder, seed=5)
    assert json.loads(json.dumps(before.split)) == before.split
    assert before.split["seed"] == 5
    (folder / "train" / "a" / "000.png").rename(folder / "train" / "a" / "new.png")
    assert opened(folder).split["files_sha256"] != before.split["files_sha256"]


def test_every_part_of_a_folder_knows_the_hash_of_its_files(folder):
    data = opened(folder)
    for part in PARTS:
        assert getattr(data, part).files_sha256 == data.split["files_sha256"]
    assert opened("digits").train.files_sha256 is None


def data(*delivered: str, n: int = 10) -> Data:
    sets = [list(range(start, start + n)) for start in (0, 100, 200)]
    return Data(*sets, ("a", "b"), "source", {"parts": dict.fromkeys(delivered)})


@pytest.mark.parametrize(
    ("delivered", "halved"),
    [
        (["train", "calibration", "validation"], False),
        (["train", "validation"], True),  # the backbone has seen calibration images that are drawn from training images
        (["train", "calibration"], False),
        (["train"], False),
    ],
    ids=str,
)
def test_images_to_tune_on_are_never_those_to_report_on(delivered, halved):
    source = data(*delivered)
    parts = parts_for_tuning(Unseen("run", source, source.validation, 0))
    chosen, left = set(parts.calibration), set(parts.report)
    assert not chosen & left
    assert (chosen | left == set(source.validation)) == halved
    assert parts.words.startswith(f"Thresholds are chosen on {'5 of the 10' if halved else 'the 10'}")


def test_halves_are_the_same_for_the_same_seed_only():
    source, unseen = data("train"), list(range(100))
    one, same, other = (parts_for_tuning(Unseen("run", source, unseen, seed)) for seed in (1, 1, 2))
    assert list(one.calibration) == list(same.calibration) != list(other.calibration)
    assert sorted([*one.calibration, *one.report]) == unseen


def test_one_image_is_too_few_to_choose_and_to_report():
    source = data("train", "validation", n=1)
    with pytest.raises(DataError, match=r"and there is one\. Give more: data=FOLDER\."):
        parts_for_tuning(Unseen("run", source, source.validation, 0))


def unseen(source: Data, seed: int = 0, *, whole: bool = True) -> Unseen:
    source.split["rule"] = f"drawn with seed {seed}"
    return Unseen(f"run{seed}", source, source.validation if whole else list(range(1000)), seed)


def test_runs_that_were_made_with_other_seeds_share_validation_images_that_were_delivered():
    source = data("train", "validation")
    parts = parts_for_all([unseen(source, 1), unseen(source, 2)])
    assert sorted([*parts.calibration, *parts.report]) == source.validation


def elsewhere() -> Data:
    return Data([], [], [1, 2, 3], ("a", "b"), "elsewhere", {"parts": {"train": None}})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (data("train"), r"run1 and run2 drew theirs with different seeds \(1, 2\).*data=FOLDER"),
        (elsewhere(), "run1 was measured on source, run2 on elsewhere"),
    ],
    ids=["other images were drawn", "other data"],
)
def test_runs_without_images_that_none_has_seen_are_refused(other, said):
    with pytest.raises(DataError, match=said):
        parts_for_all([unseen(data("train"), 1), unseen(other, 2)])


def test_a_run_of_other_data_keeps_to_what_the_others_have_not_seen():
    source = data("train")
    parts = parts_for_all([unseen(source, 2, whole=False), unseen(source, 1)])
    assert (parts.calibration, parts.report) == (source.calibration, source.validation)


@pytest.mark.parametrize("gone", [{17}, set()], ids=["removed", "still there"])
def test_without_a_removed_picture_the_others_are_split_as_before(gone, tmp_path):
    names = numbered(40)
    before = opened(write_folder(tmp_path, names))
    drawn = rows(before)
    for n in gone:
        (tmp_path / names[n]).unlink()
        assert opened(tmp_path).split["files_sha256"] != before.split["files_sha256"]
    after = opened(tmp_path, removed=[("train", names[17], "b")])
    assert after.split.get("removed", []) == [["train", names[n], "b"] for n in gone]
    assert after.split["files_sha256"] == before.split["files_sha256"]
    assert rows(after) == {part: [level for level in drawn[part] if level not in gone] for part in PARTS}


def test_held_out_images_are_drawn_by_the_seed_and_kept_from_the_rest():
    data = TensorDataset(torch.arange(100))
    rest, held = hold_out(data, 10, 3)
    assert sorted([*rest.indices, *held.indices]) == list(range(100)) and len(held) == 10
    assert hold_out(data, 10, 3)[1].indices == held.indices != hold_out(data, 10, 4)[1].indices


def test_held_out_images_are_the_same_without_a_removed_picture(tmp_path):
    names = numbered(40)
    whole = opened(write_folder(tmp_path, names)).train
    before = [levels(part) for part in hold_out(whole, 10, 3)]
    (tmp_path / names[before[0][4]]).unlink()
    gone = before[0][4]
    parts = hold_out(opened(tmp_path, removed=[("train", names[gone], names[gone][0])]).train, 10, 3)
    assert [levels(part) for part in parts] == [[level for level in part if level != gone] for part in before]
    assert [len(part) + len(part.gaps) for part in parts] == [len(part) for part in before]


def test_a_run_is_reported_on_images_that_it_has_not_seen(folder, tmp_path):
    delivered, data = opened(folder), opened(write_folder(tmp_path / "whole", numbered(20)))
    known = {"source": data.place, "files_sha256": data.split["files_sha256"]}
    assert images_to_report_on(delivered, {}, "run")[0] is delivered.validation
    assert images_to_report_on(data, known, "run")[0] is data.validation
    images, words = images_to_report_on(data, {"source": "elsewhere", "files_sha256": "another"}, "run")
    assert len(images) == 20 and "all 20 images" in words
    with pytest.raises(DataError, match=r"other files than when run was trained.*data=FOLDER"):
        images_to_report_on(data, known | {"files_sha256": "another"}, "run")


def recorded(run: Data) -> dict[str, Any]:
    """What a run knows of its images."""
    sample = run.split["train_sample"].split()
    return {"source": run.place, "files_sha256": run.split["files_sha256"], "train_sample": sample}


def test_training_images_are_known_in_another_folder_even_if_files_are_missing(tmp_path):
    names = numbered(40)
    run = opened(write_folder(tmp_path / "of the run", names))
    known = recorded(run)
    moved = (tmp_path / "of the run").rename(tmp_path / "moved")
    (moved / names[3]).unlink()
    with pytest.raises(
        DataError, match=r"moved holds images that run was trained on: of 32 of these, 3[12] are here\. .*data=FOLDER"
    ):
        images_to_report_on(opened(moved), known, "run")
    trained = [file.name for file in run.train.files]
    others = write_folder(tmp_path / "others", [f"{name[0]}/other{i}.png" for i, name in enumerate(names)])
    assert images_to_report_on(opened(others), known, "run")[1] == f"{others}: all 40 images."
    for name in trained[:8]:
        (moved / name).rename(others / name)
    assert re.search(
        r"run was trained on some of these, .*: of 32 of its training images, [78] are here\.$",
        images_to_report_on(opened(others), known, "run")[1],
    )


@pytest.mark.parametrize("kind", ["folders", "tar files"])
def test_training_images_are_known_among_the_validation_images_of_another_source(kind, tmp_path):
    names = numbered(40)
    run = opened(write_folder(tmp_path / "of the run", names))
    known = recorded(run)
    swapped = tmp_path / "swapped"
    if kind == "folders":
        write_folder(swapped / "val", names)
        write_folder(swapped / "train", [f"{name[0]}/other{i}.png" for i, name in enumerate(names)])
    else:
        write_tar(swapped / "validation.tar", names)
    with pytest.raises(DataError, match=r"swapped holds images that run was trained on"):
        images_to_report_on(opened(swapped, report_only=True), known, "run")


def test_other_pictures_of_the_same_names_are_no_training_images(tmp_path):
    names = numbered(40)
    run = opened(write_folder(tmp_path / "of the run", names))
    known = recorded(run)
    same_names = write_folder(
        tmp_path / "same names", ["a/more.png", *names]
    )  # each has the grey level of the next one
    images, words = images_to_report_on(opened(same_names), known, "run")
    assert len(images) == 41
    assert "was trained on" not in words


def test_the_training_images_of_a_run_are_refused_by_their_own_folder(folder):
    whole = opened(folder)
    known = {"source": whole.place, "files_sha256": whole.split["files_sha256"], "train": whole.split["parts"]["train"]}
    alone = {part: opened(folder / name) for part, name in whole.split["parts"].items()}
    with pytest.raises(DataError, match=r"train holds images that run was trained on\. Leave data= out .*data=FOLDER"):
        images_to_report_on(alone["train"], known, "run")
    assert images_to_report_on(alone["validation"], known, "run")[0]
    assert images_to_report_on(whole, known, "run")[0] is whole.validation


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("seg_test seg_train seg_pred", ["validation", "train"]),
        ("CIFAR10-Training CIFAR10-val", ["train", "validation"]),
        ("birdsTrain birdsTest", ["train", "validation"]),
        ("cifar_trainset cifar_testset cifar_devset", ["train", "validation", "validation"]),
        ("IDTrain IDCalib", ["train", "calibration"]),
        ("train my_val", ["train"]),
    ],
)
def test_names_of_parts_may_begin_with_other_words_that_are_the_same(names, parts):
    assert list(parts_of(names.split()).values()) == parts


@pytest.mark.parametrize(
    "names",
    [
        *("steam_train stress_test", "night_train night_bus", "strength_training trainer", "restrain trainA"),
        *("steam_train tram", "cifar_train", "cifar_test cifar_val", "imagestrain imagesval", ""),
    ],
)
def test_names_of_classes_may_hold_the_word_for_a_part(names):
    known = [name for name in names.split() if part_of(name) is None]
    assert not parts_of(known)


def test_names_of_classes_may_begin_with_the_word_for_a_part_if_none_says_training():
    assert not siblings(["train_station", "test_tube", "training_shoe", "steam_train"])


# ------------------------------------------------------------------------------------------------ copies


def test_validation_images_that_are_copies_of_training_images_are_counted_and_named(tmp_path):
    write_folder(tmp_path, [f"{part}/{name}" for part in ("train", "val") for name in numbered(20)])
    assert copied(opened(tmp_path)) == ""
    for name in ("a/000.png", "b/001.png", "b/003.png"):
        (tmp_path / "val" / f"{name}.png").write_bytes((tmp_path / "train" / name).read_bytes())
    said = copied(opened(tmp_path))
    assert said.startswith("At least 3 of the 23 validation images are also among the training or calibration images (")
    assert f"'{tmp_path}/val/a/000.png.png' is '{tmp_path}/train/a/000.png'" in said
    assert said.endswith("and 1 more). Results on such images are better than on new ones. Take them out of one part.")


def test_copies_in_tar_files_are_found_too(tars):
    for name in ("train.tar", "validation.tar"):
        write_tar(tars / name, numbered(20))
    assert copied(opened(tars)).startswith("At least 20 of the 20 validation images")


def test_only_so_many_files_are_read_for_copies_those_of_rare_sizes_first(tmp_path):
    paths = [tmp_path / f"{side}{n}" for side in "ab" for n in range(4)]
    for path in paths:
        path.write_bytes(b"12345" if path.name[1] == "0" else b"1234")
    ours, theirs = ([File(str(path), path.name) for path in half] for half in (paths[:4], paths[4:]))
    assert [(one.name, other.name) for one, other in copies(ours, theirs, most=7)] == [("a0", "b0")]
    assert len(copies(ours, theirs, most=8)) == 4


def test_pictures_that_are_no_files_are_not_compared():
    assert copied(opened("digits")) == ""


# ------------------------------------------------------------------------------------------------ classes without images


def test_classes_that_no_validation_image_shows_are_named(tmp_path):
    write_folder(tmp_path, [f"train/{name}" for name in numbered(20)] + ["val/a/0.png"])
    data = opened(tmp_path)
    assert without_images(data) == "No validation image shows b: the results say nothing of it."
    assert without_images(replace(data, validation=data.validation.relabelled(lambda _: -1))) == ""
    assert without_images(replace(data, validation=data.train)) == ""
    assert without_images(opened("digits")) == ""
