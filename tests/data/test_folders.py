"""Folders and tar files are read as people lay them out; what is not read is named."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from images import encoded, levels, numbered, opened, rows, write_folder, write_tar

from ptee._common.errors import DataError
from ptee.data.batches import batches, split_batch


def test_delivered_calibration_folder_is_used(folder):
    write_folder(folder / "calibration", numbered(4))
    data = opened(folder)
    assert list(data.split["sizes"].values()) == [20, 4, 6]
    assert data.split["rule"] == "split as delivered"


@pytest.mark.parametrize("top", [".", "train"])
def test_without_validation_part_split_is_80_10_10(tmp_path, top):
    write_folder(tmp_path / top, numbered(40))
    assert opened(tmp_path).split["sizes"] == {"train": 32, "calibration": 4, "validation": 4}


def test_class_called_train_is_a_class(tmp_path):
    data = opened(write_folder(tmp_path, ["car/0.png", "car/1.png", "train/2.png"]))
    assert data.class_names == ("car", "train")


def test_classes_are_numbered_by_name_and_files_come_in_order_of_names(tmp_path):
    write_folder(tmp_path / "train", ["b/2.png", "b/deep/1.png", "a/9.png", "a/10.PNG", "b/1.png"])
    write_folder(tmp_path / "calibration", ["b/0.png"])
    write_folder(tmp_path / "val", ["b/0.png"])
    data = opened(tmp_path)
    assert data.class_names == ("a", "b")
    assert levels(data.train) == [3, 2, 4, 0, 1]
    assert [data.train[i][1] for i in range(5)] == [0, 0, 1, 1, 1]


def test_validation_may_lack_classes(tmp_path):
    write_folder(tmp_path / "train", numbered(6, "abc"))
    write_folder(tmp_path / "val", ["c/0.png"])
    assert opened(tmp_path).validation[0][1] == 2


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "val"),
        ("TRAINING", "Testing"),
        ("training_set", "test_set"),
        ("trainset", "dev"),
        ("Train", "Validation"),
        ("train2017", "val2017"),
        ("training", "eval"),
        ("train", "validate"),
    ],
)
def test_parts_may_have_any_usual_name_in_any_case(tmp_path, train, val):
    write_folder(tmp_path / train, numbered(10))
    write_folder(tmp_path / val, numbered(3))
    data = opened(tmp_path)
    assert data.class_names == ("a", "b")
    assert data.split["parts"] == {"train": train, "validation": val}
    assert data.split["sizes"] == {"train": 9, "calibration": 1, "validation": 3}


def test_a_part_that_is_not_needed_is_named_as_not_read(folder):
    write_folder(folder / "test", numbered(4))
    write_folder(folder / "extra", ["0.png"])
    (folder / "loose.png").write_bytes(encoded(0))
    (folder / "more.zip").write_bytes(b"")
    data = opened(folder)
    assert data.split["parts"]["validation"] == "val"
    assert data.summary.endswith("not read: extra/, test/, more.zip, 1 picture outside of class folders.")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["val/ILSVRC2012_val_00000001.png"], r"val' holds pictures that lie in no class folders, beside 'train'"),
        (["val/"], r"val' holds no images, beside 'train'"),
        (["calibration/0.png"], r"calibration' holds pictures that lie in no class folders"),
    ],
    ids=["flat", "empty", "calibration"],
)
def test_a_part_without_class_folders_is_refused_by_name(tmp_path, names, said):
    write_folder(tmp_path / "train", numbered(10))
    with pytest.raises(DataError, match=said):
        opened(write_folder(tmp_path, names))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Testing/a/0.png", "Testing/b/1.png"], "'Testing', but no training images"),
        (["test/a/0.png", "images/b/1.png"], "'test', but no training images"),
        (["val/a/0.png", "train/1.png"], "'val', and the images of 'train' lie in no class folders"),
    ],
)
def test_parts_without_training_images_are_not_taken_for_classes(tmp_path, names, said):
    with pytest.raises(DataError, match=said):
        opened(write_folder(tmp_path, names))


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".Trash-0", "__MACOSX", "@eaDir"])
@pytest.mark.parametrize("where", ["", "a/"])
@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_hidden_folders_and_files_are_not_read(kind, where, hidden, request):
    source = request.getfixturevalue(kind)
    more = [f"{where}{hidden}/0.png", "a/._000.png"]
    if kind == "folder":
        write_folder(source / "train", more)
        (source / "train" / "a" / "notes.txt").write_text("notes")
    else:
        write_tar(source / "train.tar", numbered(20) + more)
    data = opened(source)
    assert (data.class_names, data.split["sizes"]["train"]) == (("a", "b"), 18)


def test_linked_folders_are_read_and_a_link_that_leads_back_is_not_followed(tmp_path):
    write_folder(tmp_path / "elsewhere", ["0.png", "1.png"])
    write_folder(tmp_path / "data" / "a", ["2.png"])
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    data = opened(tmp_path / "data")
    assert (data.class_names, sum(data.split["sizes"].values())) == (("a", "b"), 5)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    def refuse(path, onerror, **_):
        onerror(PermissionError(13, "Permission denied", path))

    monkeypatch.setattr("os.walk", refuse)
    with pytest.raises(DataError, match=r"Folder '.*a' cannot be read \(Permission denied\)"):
        opened(folder)


@pytest.mark.parametrize(
    ("more", "said"),
    [(["cat/0.gif", "cat/1.gif"], r"cat \(2 \.gif\)\. Save"), (["cat/"], r"cat \(empty\)\. Save")],
    ids=["unknown kind", "empty"],
)
@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_class_without_pictures_that_can_be_read_is_refused_by_name(kind, more, said, request):
    source = request.getfixturevalue(kind)
    if kind == "folder":
        write_folder(source / "train", more)
    else:
        write_tar(source / "train.tar", numbered(20) + more)
    with pytest.raises(DataError, match=f"Class folder of '.*train.*' without pictures .*: {said}"):
        opened(source)


def test_pictures_of_unknown_kinds_beside_others_are_named(folder):
    write_folder(folder / "train", ["a/x.gif", "b/y.heic"])
    write_folder(folder / "val", ["a/z.gif", "c/w.gif"])
    said = "not read: 1 .gif file of train, 1 .heic file of train, class c (1 .gif) of validation, 1 .gif file of validation."
    assert opened(folder).summary.endswith(said)


def test_links_in_a_tar_file_are_named_as_not_read(tars):
    with tarfile.open(tars / "train.tar", "a") as tar:
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "000.png"
        tar.addfile(link)
    assert "not read: 1 linked file of train" in opened(tars).summary


def test_archives_where_images_should_be_are_to_be_unpacked(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"No images .* Unpack train\.zip first"):
        opened(tmp_path)


def test_order_does_not_depend_on_file_system(folder, monkeypatch):
    expected = opened(folder)
    listed, walked = Path.iterdir, os.walk
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
    monkeypatch.setattr("os.walk", lambda top, **more: ((t, d, sorted(f)[::-1]) for t, d, f in walked(top, **more)))
    again = opened(folder)
    assert levels(again.train) == levels(expected.train)
    assert again.split == expected.split


def test_tars_and_folders_of_the_same_files_give_the_same(tars, folder):
    of_tars, of_folders = opened(tars), opened(folder)
    assert rows(of_tars) == rows(of_folders)
    assert of_tars.class_names == of_folders.class_names
    assert of_tars.split["files_sha256"] == of_folders.split["files_sha256"]


def test_labels_in_other_tars_follow_the_training_tar(tars):
    write_tar(tars / "train.tar", numbered(6, "abc"))
    write_tar(tars / "calibration.tar", ["c/0.png"])
    data = opened(tars)
    assert data.calibration[0][1] == 2
    assert data.split["rule"] == "split as delivered"


def test_nothing_is_written_beside_the_tars(tars):
    before = {path: path.stat().st_mtime_ns for path in tars.iterdir()}
    opened(tars).train[0]
    assert {path: path.stat().st_mtime_ns for path in tars.iterdir()} == before


def test_tar_inside_tar_is_read_where_its_pictures_lie(tars, tmp_path):
    inner = write_tar(tmp_path / "b.tar", ["0.png", "1.png", "2.png"])
    with tarfile.open(tars / "train.tar", "w") as tar:
        tar.add(inner, "b.tar")
    write_tar(tars / "validation.tar", ["b/0.png"])
    data = opened(tars)
    assert data.class_names == ("b",)
    assert sorted(levels(data.train) + levels(data.calibration)) == [0, 1, 2]


def test_workers_read_a_tar_that_was_read_before(tars):
    train = opened(tars).train
    expected = torch.stack([train[i][0] for i in range(len(train))])
    loader = batches(train, batch_size=4, shuffle=False, num_workers=2)
    assert torch.equal(torch.cat([split_batch(batch)[0] for batch in loader]), expected)


@pytest.mark.parametrize("source", ["folder", "tars", "digits"])
def test_data_sets_can_be_pickled_after_use(source, request):
    data = opened(source if source == "digits" else request.getfixturevalue(source))
    image, label = data.validation[0]
    again = pickle.loads(pickle.dumps(data)).validation[0]
    assert torch.equal(again[0], image) and again[1] == label


# a member is a header of 512 bytes and the picture, filled up to 512 more: the 20th starts at 19 * 1024
@pytest.mark.parametrize("end", [0, 100, 700, 19 * 1024, 19 * 1024 + 300, 19 * 1024 + 520, 20 * 1024])
def test_tar_that_is_cut_off_is_refused(tars, end):
    whole = (tars / "train.tar").read_bytes()
    (tars / "train.tar").write_bytes(whole[:end])
    with pytest.raises(DataError, match=r"train\.tar' is cut off or no tar file \(.*\): make or fetch it again"):
        opened(tars)


def test_tar_with_a_damaged_header_is_refused(tars):
    damaged = bytearray((tars / "train.tar").read_bytes())
    damaged[10 * 1024 : 10 * 1024 + 100] = b"x" * 100
    (tars / "train.tar").write_bytes(damaged)
    with pytest.raises(DataError, match=r"train\.tar' is cut off or no tar file"):
        opened(tars)


def test_member_that_is_no_picture_may_end_a_tar(tars):
    with tarfile.open(tars / "train.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    assert opened(tars).split["sizes"]["train"] == 18


@pytest.mark.parametrize(
    ("members", "words"),
    [([], "No images in '.*train.tar'"), (["a.txt"], "No images in"), (["0.png"], "outside of class folders")],
)
def test_tar_without_images_in_classes_is_refused(tars, members, words):
    write_tar(tars / "train.tar", members)
    with pytest.raises(DataError, match=words):
        opened(tars)


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_classes_unknown_in_training_are_refused_by_name(kind, request):
    source = request.getfixturevalue(kind)
    if kind == "folder":
        write_folder(source / "val", ["owl/0.png"])
    else:
        write_tar(source / "validation.tar", ["owl/0.png"])
    with pytest.raises(DataError, match=r"val.*' has classes that '.*train.*' has not: owl; remove or rename them\."):
        opened(source)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "No images in class folders of"),
        (["a/notes.txt"], "No images in class folders of"),
        (["train/0.png", "val/0.png"], "holds train and val without class folders"),
    ],
    ids=["empty", "no pictures", "parts without classes"],
)
def test_folder_without_images_in_classes_is_refused(tmp_path, names, words):
    with pytest.raises(DataError, match=f"{words}.*it should hold train/CLASS"):
        opened(write_folder(tmp_path, names))


def test_images_without_a_class_folder_are_refused_with_what_to_do_where_they_have_no_labels(tmp_path):
    with pytest.raises(DataError, match=r"lie in no class folder\. Where they have no labels, move them .*/all\."):
        opened(write_folder(tmp_path, ["0.png", "1.png"]))


@pytest.mark.parametrize(
    ("kind", "said"), [("folder", r"images' \(train, val\)"), ("tars", r"tars' \(train\.tar, validation\.tar\)")]
)
def test_folder_of_data_sets_is_refused_with_the_one_to_give(kind, said, request):
    place = request.getfixturevalue(kind).parent
    write_folder(place / "other", ["0.png"])
    with pytest.raises(DataError, match=f"did you mean '{place}/{said}\\?"):
        opened(place)


def test_a_folder_of_data_sets_is_refused_in_whatever_case_their_parts_are_spelt(tmp_path):
    write_folder(tmp_path / "pets" / "Train", numbered(4))
    write_folder(tmp_path / "pets" / "VAL", numbered(4))
    write_folder(tmp_path / "other", ["0.png"])
    with pytest.raises(DataError, match=r"did you mean '.*pets' \(Train, VAL\)"):
        opened(tmp_path)


def test_class_folders_may_have_folders_of_images_called_train_and_val(tmp_path):
    write_folder(tmp_path, [f"{name}/{part}/{n}.png" for name in "ab" for part in ("train", "val") for n in range(5)])
    assert opened(tmp_path).class_names == ("a", "b")


def test_one_folder_of_images_is_one_class(tmp_path):
    assert opened(write_folder(tmp_path, numbered(10, "a"))).class_names == ("a",)
