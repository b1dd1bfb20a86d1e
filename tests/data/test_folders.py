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
from ptee.data.folders import list_files

CUT_OFF = r"train\.tar' is cut off or no tar file \(.*\): make or fetch it again"


@pytest.fixture(params=["folder", "tars"])
def source(request) -> Path:
    """The same images as class folders or as tar files."""
    return request.getfixturevalue(request.param)


def write_part(source: Path, name: str, names: list[str]) -> None:
    """A part of the source; class folders keep the pictures that they have."""
    if (source / "train.tar").exists():
        write_tar(source / f"{name}.tar", names)
    else:
        write_folder(source / name, names)


def test_a_calibration_part_is_used_if_there_is_one(source):
    write_part(source, "calibration", numbered(4))
    data = opened(source)
    assert list(data.split["sizes"].values()) == [20, 4, 6]
    assert data.split["rule"] == "split as delivered"


@pytest.mark.parametrize("top", [".", "train"])
def test_without_a_validation_part_the_split_is_80_10_10(tmp_path, top):
    write_folder(tmp_path / top, numbered(40))
    assert opened(tmp_path).split["sizes"] == {"train": 32, "calibration": 4, "validation": 4}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["car/0.png", "car/1.png", "train/2.png"], ("car", "train")),
        (numbered(10, "a"), ("a",)),
        (
            [f"{name}/{part}/{n}.png" for name in "ab" for part in ("train_station", f"test_{name}") for n in range(5)],
            ("a", "b"),
        ),
    ],
    ids=["a class called train", "one class", "folders inside of classes"],
)
def test_class_folders_may_have_any_name_and_depth(names, classes, tmp_path):
    assert opened(write_folder(tmp_path, names)).class_names == classes


def test_classes_and_files_are_sorted_by_name(tmp_path):
    write_folder(tmp_path / "train", ["b/2.png", "b/deep/1.png", "a/9.png", "a/10.PNG", "b/1.png"])
    write_folder(tmp_path / "calibration", ["b/0.png"])
    write_folder(tmp_path / "val", ["b/0.png"])
    data = opened(tmp_path)
    assert data.class_names == ("a", "b")
    assert levels(data.train) == [3, 2, 4, 0, 1]
    assert [label for _, label in data.train] == [0, 0, 1, 1, 1]


def test_other_parts_may_lack_classes(source):
    write_part(source, "train", numbered(6, "abc"))
    write_part(source, "calibration", ["c/0.png"])
    assert opened(source).calibration[0][1] == 2


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
        ("TRAINing", "TESTset"),
        ("seg_train", "seg_test"),
        ("CIFAR10-Training", "CIFAR10-val"),
        ("birdsTrain", "birdsTest"),
        ("images for training", "images for testing"),
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


def test_class_folders_may_lie_one_folder_deeper_in_a_part_and_a_third_folder_is_named(tmp_path):
    write_folder(tmp_path / "seg_train" / "seg_train", numbered(10))
    write_folder(tmp_path / "seg_test" / "seg_test", numbered(3))
    write_folder(tmp_path / "seg_pred" / "seg_pred", ["0.png"])
    data = opened(tmp_path)
    assert (data.class_names, data.split["sizes"]["validation"]) == (("a", "b"), 3)
    assert data.summary.endswith("not read: seg_pred/.")


@pytest.mark.parametrize(
    "names", [("imagestrain", "imagesval"), ("trn", "tst"), ("fold1", "fold2"), ("gallery", "query")]
)
def test_folders_that_hold_the_same_class_folders_are_refused_as_parts(names, tmp_path):
    for name in names:
        write_folder(tmp_path / name, numbered(10))
    said = rf"The folders {', '.join(names)} of '.*' all hold a, b, so they look like parts, not classes: rename one to train and one to val\."
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


def test_many_classes_whose_pictures_lie_in_the_same_few_subfolders_are_classes(tmp_path):
    for name in ("cat", "dog", "owl"):
        write_folder(tmp_path / name, ["left/0.png", "left/1.png", "right/2.png", "right/3.png", "right/4.png"])
    data = opened(tmp_path)
    assert data.class_names == ("cat", "dog", "owl")
    assert data.summary.endswith("; each class holds left/ and right/: all are read.")


def test_folders_that_nearly_each_class_of_the_training_images_holds_are_named(tmp_path):
    classes = "abcdefghij"
    for part in ("train", "val"):
        write_folder(
            tmp_path / part, [f"{name}/{side}/{n}.png" for name in classes for side in "xyz" for n in range(2)]
        )
    assert "; each class holds x/, y/ and z/: all are read" in opened(tmp_path).summary
    for n in range(2):
        (tmp_path / "train" / "a" / "x" / f"{n}.png").unlink()
    write_folder(tmp_path, ["train/b/more/0.png", "train/c/0.png"])
    assert "; nearly each class holds x/, y/ and z/: all are read" in opened(tmp_path).summary


@pytest.mark.parametrize("top", ["", "train/"])
@pytest.mark.parametrize("classes", ["ab", "abcd"])
@pytest.mark.parametrize(
    ("images", "masks"),
    [("images", "masks"), ("images", "Lung Masks"), ("", "ground_truth"), ("x/images", "x/labels"), ("img", "GT")],
)
def test_masks_beside_the_pictures_of_classes_are_refused(images, masks, classes, top, tmp_path):
    for kind in (images, masks):
        write_folder(tmp_path, [f"{top}{name}/{kind}/{n}.png" for name in classes for n in range(4)])
    name = Path(masks).name
    said = rf"'{tmp_path / top}' holds a/{masks}/ with pictures that are named after others .* Move {name}/ out of the class folders\."
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


@pytest.mark.parametrize("top", ["", "train/"])
@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images/", "annotations/trimaps/"),  # Oxford-IIIT Pet
        ("images/001.Albatross/", "segmentations/001.Albatross/"),  # CUB-200
        ("JPEGImages/", "SegmentationClass/"),  # Pascal VOC
    ],
)
def test_a_folder_of_masks_beside_the_folder_of_images_is_no_class(images, masks, top, tmp_path):
    write_folder(tmp_path, [f"{top}{kind}{n}.png" for kind in (images, masks) for n in range(20)])
    with pytest.raises(DataError, match=rf"holds {masks.split('/')[0]}/ with pictures that are named after others"):
        opened(tmp_path)


def test_the_classes_of_images_and_of_their_masks_are_no_parts(tmp_path):
    names = [f"{kind}/{name}/{n}.png" for kind in ("images", "masks") for name in "ab" for n in range(9)]
    with pytest.raises(DataError, match=r"holds masks/ with pictures that are named after others"):
        opened(write_folder(tmp_path, names))


def test_masks_that_only_some_classes_can_have_are_refused(tmp_path):
    write_folder(tmp_path, ["ill/images/0.png", "ill/masks/0.png", "well/0.png", "well/1.png"])
    with pytest.raises(DataError, match="holds ill/masks/ with pictures"):
        opened(tmp_path)


@pytest.mark.parametrize("twin", ["{} (1)_mask.png", "{} (1)_mask_1.png", "{} (1)-segmentation.png", "{} (1).GT.png"])
def test_masks_beside_half_of_the_pictures_in_one_folder_are_refused(twin, tmp_path):
    write_folder(tmp_path, [f"{c}/{n} (1).png" for c in "ab" for n in range(8)])
    write_folder(tmp_path, [f"{c}/{twin.format(n)}" for c in "ab" for n in range(4)])
    with pytest.raises(
        DataError, match=r"At least half of the pictures in a/ of .* lie beside a mask of their own, such as 0 \(1\)"
    ):
        opened(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        [f"{sex}/{kind}/{n}.png" for sex in ("f", "m", "x") for kind in ("with_mask", "no_mask") for n in range(5)],
        [f"{kind}/{n}.png" for kind in ("mask", "no mask") for n in range(9)],
        [f"{kind}/{n}{tail}.png" for kind in "ab" for n in range(9) for tail in ("_left", "_right", "_mask" * (n < 3))],
        [f"{kind}/{n}_mask.png" for kind in "ab" for n in range(9)],
        [
            f"{name}/{n}.png"
            for name in ("with_mask/surgical_mask", "with_mask/n95", "without_mask/m")
            for n in range(5)
        ],
        [f"{name}/{n}.png" for name in ("ford/gt", "ford/mustang", "bmw/x") for n in range(5)],
        [*numbered(20), "a/masks/other.png"],
        [f"{kind}/{kind}{n}.png" for kind in ("images", "labels") for n in range(9)],
    ],
    ids=[
        "pictures of masks below",
        "pictures of masks",
        "few twins",
        "no pictures of the masks",
        "kinds of masks",
        "a car",
        "other names",
        "classes of these names",
    ],
)
def test_pictures_that_only_sound_like_masks_are_read(names, tmp_path):
    assert len(opened(write_folder(tmp_path, names)).class_names) > 1


@pytest.mark.parametrize(("one", "two"), [("train", "test"), ("Training", "val"), ("train", "calib")])
def test_parts_inside_of_classes_are_refused_with_where_to_move_them(one, two, tmp_path):
    write_folder(tmp_path, [f"{c}/{part}/{n}.png" for c in ("cat", "dog") for part in (one, two) for n in range(5)])
    said = rf"holds parts of its own \({one}, {two}\): move them to {one}/CLASS and {two}/CLASS, here {one}/cat and {two}/cat,"
    with pytest.raises(DataError, match=said):
        opened(tmp_path)


def test_what_lies_beside_the_parts_is_named(folder):
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


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_one_part_as_a_folder_and_another_as_a_tar_file_are_refused(kind, tmp_path):
    folder, tar = ("train", "val") if kind == "folder" else ("val", "train")
    write_folder(tmp_path / folder, numbered(10))
    write_tar(tmp_path / f"{tar}.tar", numbered(10))
    with pytest.raises(DataError, match=r"is a (folder|tar file), but 'train.*' a (tar file|folder): make both"):
        opened(tmp_path)


LAYOUTS = ".*it should hold train/CLASS"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Testing/a/0.png", "Testing/b/1.png"], "'Testing', but no training images"),
        (["test/a/0.png", "images/b/1.png"], "'test', but no training images"),
        (["val/a/0.png", "train/1.png"], "'val', and the images of 'train' lie in no class folders"),
        (["train/0.png", "val/0.png"], f"holds train and val without class folders{LAYOUTS}"),
        (["cars_train/0.png", "cars_test/0.png"], f"holds cars_test and cars_train without class folders{LAYOUTS}"),
        ([], f"No images in class folders of{LAYOUTS}"),
        (["a/notes.txt"], f"No images in class folders of{LAYOUTS}"),
        (["train.zip"], r"No images .* Unpack train\.zip first"),
        (["0.png", "1.png"], r"lie in no class folder\. If they have no labels, move them .*/all\."),
        (["pets/pets/train/a/0.png", "pets/pets/val/a/0.png"], r"did you mean '.*pets/pets' \(train, val\)\?"),
        (["pets/Train/a/0.png", "pets/VAL/a/0.png", "more/0.png"], r"did you mean '.*pets' \(Train, VAL\)\?"),
    ],
)
def test_a_folder_without_training_images_in_classes_is_refused(tmp_path, names, said):
    with pytest.raises(DataError, match=said):
        opened(write_folder(tmp_path, names))


def test_a_single_class_folder_is_refused_with_the_folder_above(tmp_path):
    folder = write_folder(tmp_path, ["pets/cat/0.png", "pets/dog/1.png"])
    with pytest.raises(DataError, match=r"lie in no class folder\. Did you mean the folder above: .*pets\? If"):
        opened(folder / "pets" / "cat")


def test_a_class_folder_of_one_part_is_refused_with_the_folder_that_holds_all_parts(tmp_path):
    folder = write_folder(
        tmp_path, [f"pets/{part}/{name}/0.png" for part in ("train", "val") for name in ("cat", "dog")]
    )
    with pytest.raises(DataError, match=r"lie in no class folder\. Did you mean the folder above: .*/pets\? If"):
        opened(folder / "pets" / "train" / "cat")


@pytest.mark.parametrize("names", [["pets/val/a/0.png", "pets/val/b/1.png"], ["pets/pets/test/a/0.png"]])
def test_a_folder_around_validation_images_is_not_taken_for_a_class(names, tmp_path):
    with pytest.raises(DataError, match=r"did you mean '.*pets' \((val|test)\)\?"):
        opened(write_folder(tmp_path, names), report_only=True)


def test_a_folder_around_training_images_is_not_taken_for_a_class(tmp_path):
    with pytest.raises(DataError, match=r"did you mean '.*pets' \(train\)\?"):
        opened(write_folder(tmp_path, [f"pets/train/{name}" for name in numbered(20)]))


def test_a_folder_of_tar_data_sets_is_refused_with_the_one_to_give(tars):
    write_folder(tars.parent / "other", ["0.png"])
    with pytest.raises(DataError, match=rf"did you mean '{tars}' \(train\.tar, validation\.tar\)\?"):
        opened(tars.parent)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".Trash-0", "__MACOSX", "@eaDir"])
@pytest.mark.parametrize("where", ["", "a/"])
def test_hidden_folders_and_files_are_not_read(source, where, hidden):
    write_part(source, "train", [*numbered(20), f"{where}{hidden}/0.png", "a/._000.png", "a/notes.txt"])
    data = opened(source)
    assert (data.class_names, data.split["sizes"]["train"]) == (("a", "b"), 18)


def test_hidden_folders_of_pictures_beside_the_classes_are_named(folder):
    write_folder(folder / "train", [".cat/0.png", ".hidden/notes/0.png", ".thumbnails/0.png", ".git/x"])
    write_folder(folder, ["val/.cat/0.png", ".val/a/0.png"])
    assert opened(folder).summary.endswith("not read: .cat/ of train, .cat/ of validation.")


def test_a_hidden_link_to_itself_is_left_out(tmp_path):
    write_folder(tmp_path, numbered(20))
    (tmp_path / ".x").symlink_to(".x")
    assert opened(tmp_path).class_names == ("a", "b")


@pytest.mark.parametrize("name", ["val.tar.gz", "validation.tgz", "val.zip"])
def test_a_part_that_is_compressed_is_refused(name, source):
    val = next(path for path in source.iterdir() if path.name.startswith("val"))
    val.rename(source / ".away")
    (source / name).touch()
    with pytest.raises(DataError, match=rf"{name}' is compressed, beside 'train.*': unpack it once, or move it away"):
        opened(source)


@pytest.mark.parametrize(
    "name", ["validation-00000-of-00001.parquet", "val.tfrecord", "test.h5", "val_images.npy", "calibration.arrow"]
)
def test_a_part_of_a_kind_that_is_not_read_is_refused(name, tmp_path):
    write_folder(tmp_path / "train", numbered(20))
    (tmp_path / name).touch()
    said = rf"{name}' is of a kind that is not read, beside 'train': save its pictures as val/CLASS/\*\.png, or move it away"
    with pytest.raises(
        DataError, match=said.replace("val/", "calibration/" if name.startswith("cal") else "validation/")
    ):
        opened(tmp_path)


def test_lists_that_sound_like_parts_and_packed_pictures_are_named(folder):
    for name in ("train.csv", "val.txt", "test.parquet", "more.npz", "readme.md"):
        (folder / name).touch()
    assert opened(folder).summary.endswith("not read: more.npz, test.parquet, train.csv, val.txt.")


def test_lists_of_parts_beside_classes_are_named(tmp_path):
    write_folder(tmp_path, numbered(20))
    for name in ("train.txt", "test.txt", "labels.txt"):
        (tmp_path / name).touch()
    assert opened(tmp_path).summary.endswith("not read: test.txt, train.txt.")


def test_hidden_classes_in_a_folder_without_parts_are_named(tmp_path):
    write_folder(tmp_path, [*numbered(20), ".cat/0.GIF"])
    assert opened(tmp_path).summary.endswith("not read: .cat/.")


def test_files_without_an_extension_in_class_folders_are_counted(source):
    write_part(source, "train", [*numbered(20), "a/0001", "a/0002", "b/0003"])
    assert opened(source).summary.endswith("not read: 3 files without extension of train.")


def test_archives_in_class_folders_are_counted(tmp_path):
    write_folder(tmp_path, numbered(20))
    for name in ("a/more.zip", "b/more.zip", "b/0.png.gz", "b/all.parquet", "b/0.xml"):
        (tmp_path / name).touch()
    assert opened(tmp_path).summary.endswith("not read: 1 .gz file, 1 .parquet file, 2 .zip files.")


def test_linked_folders_are_read_unless_a_link_leads_back(tmp_path):
    write_folder(tmp_path / "elsewhere", ["0.png", "1.png"])
    write_folder(tmp_path / "data" / "a", ["2.png"])
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data")
    write_folder(tmp_path / "another", ["3.png", "4.png"])
    (tmp_path / "data" / "b").symlink_to(tmp_path / "another")
    data = opened(tmp_path / "data")
    assert (data.class_names, sum(data.split["sizes"].values())) == (("a", "b"), 5)


@pytest.mark.parametrize("link", ["train/c", "train/c.v2", "train/a/more", "val", "calibration.tar"])
def test_a_link_that_leads_to_nothing_is_refused_by_name(link, tmp_path):
    write_folder(tmp_path / "train", numbered(20))
    (tmp_path / link).symlink_to("/nowhere/c")
    with pytest.raises(
        DataError, match=rf"{link}' is a link to '/nowhere/c', which cannot be opened .*: mend or remove the link"
    ):
        opened(tmp_path)


@pytest.mark.parametrize("link", ["train/readme.md", "train/a/notes.txt"])
def test_links_of_other_files_may_lead_to_nothing(link, folder):
    (folder / link).symlink_to("/nowhere")
    assert opened(folder).split["sizes"]["train"] == 18


def test_a_link_that_leads_to_itself_is_refused_by_name(folder):
    (folder / "train" / "readme.md").symlink_to("readme.md")
    (folder / "train" / "c").symlink_to("c")
    with pytest.raises(DataError, match=r"train/c' is a link to 'c', which cannot be opened"):
        opened(folder)


@pytest.mark.parametrize("names", [("train", "val"), ("train.tar", "validation.tar")], ids=["folder", "tars"])
def test_two_parts_that_are_the_same_are_refused(names, tmp_path, request):
    one, other = names
    source = request.getfixturevalue("tars" if one.endswith("tar") else "folder")
    (source / other).rename(tmp_path / "old")
    (source / other).symlink_to(one)
    with pytest.raises(DataError, match=rf"'{one}' and '{other}' of '.*' are the same images: remove '{other}'"):
        opened(source)


@pytest.mark.parametrize("part", ["train", "val"])
def test_two_classes_that_are_the_same_folder_are_refused(part, folder):
    (folder / part / "c").symlink_to(folder / part / "a")
    said = rf"'.*{part}/a' and '.*{part}/c' are the same folder, .* two classes: remove the link '.*{part}/c'"
    with pytest.raises(DataError, match=said):
        opened(folder)


def test_a_link_that_cannot_be_followed_below_a_class_is_refused_by_name(folder, monkeypatch):
    (folder / "train" / "a" / "cwd").mkdir()
    follow = Path.resolve

    def refuse(path, strict=False):
        if path.name == "cwd":
            raise PermissionError(13, "Permission denied", str(path))
        return follow(path, strict)

    monkeypatch.setattr(Path, "resolve", refuse)
    with pytest.raises(DataError, match=r"Folder '.*a/cwd' cannot be read \(Permission denied\)"):
        opened(folder)


def test_a_link_that_does_not_say_where_it_leads_is_refused_by_name(folder, monkeypatch):
    (folder / "train" / "a" / "cwd").symlink_to("/nowhere")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "readlink", refuse)
    with pytest.raises(DataError, match=r"a/cwd' is a link, which cannot be opened \(No such file.*remove the link"):
        opened(folder)


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
def test_a_class_without_pictures_that_can_be_read_is_refused_by_name(source, more, said):
    write_part(source, "train", numbered(20) + more)
    with pytest.raises(DataError, match=f"Class folder of '.*train.*' without pictures .*: {said}"):
        opened(source)


def test_pictures_of_unknown_kinds_beside_others_are_named(folder):
    write_folder(folder / "train", ["a/x.gif", "b/y.heic"])
    write_folder(folder / "val", ["a/z.gif", "c/w.gif"])
    said = "not read: 1 .gif file of train, 1 .heic file of train, class c (1 .gif) of validation, 1 .gif file of validation."
    assert opened(folder).summary.endswith(said)


LINKS = {  # each with the folder that it leads to, and the two ways there
    "to another class": ("a/x", "b", "b", "a/x"),
    "to a class before": ("b/x", "a", "a", "b/x"),
    "deeper to another class": ("a/in/x", "b", "b", "a/in/x"),
    "to a folder within another class": ("a/x", "b/in", "a/x", "b/in"),
    "a class that is a folder within another": ("c", "b/in", "c", "b/in"),
    "a class that holds the others": ("c", ".", "a", "c/a"),
}


@pytest.mark.parametrize(("link", "to", "one", "other"), LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_link_from_one_class_into_another_is_refused_by_name(link, to, one, other, part, folder):
    write_folder(folder / part, ["a/in/x1.png", "b/in/x2.png"])
    (folder / part / link).symlink_to(folder / part / to)
    said = rf"'.*{part}/{one}' and '.*{part}/{other}' are the same folder, .* two classes: remove the link '.*{part}/{link}'"
    with pytest.raises(DataError, match=said):
        opened(folder)


def test_two_classes_that_link_to_one_folder_elsewhere_are_refused(folder, tmp_path):
    write_folder(tmp_path / "elsewhere", ["0.png"])
    for name in "ab":
        (folder / "train" / name / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"a/more' and '.*b/more' are the same folder.*remove the link '.*b/more'"):
        opened(folder)


def test_two_classes_may_link_to_one_folder_without_pictures(folder, tmp_path):
    before = len(opened(folder).train)
    (tmp_path / "about").mkdir()
    (tmp_path / "about" / "licence.txt").write_text("free")
    for name in "ab":
        (folder / "train" / name / "about").symlink_to(tmp_path / "about")
    assert len(opened(folder).train) == before


def test_a_folder_outside_of_a_class_may_link_back_to_it(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "train" / "a")
    before = rows(opened(folder))
    (folder / "train" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert rows(opened(folder)) == before


def test_a_folder_is_read_once_however_many_links_lead_there(tmp_path):
    write_folder(tmp_path / "data", ["a/0.png", "a/in/1.png", "b/2.png"])
    write_folder(tmp_path / "one", ["3.png"])
    write_folder(tmp_path / "two", ["4.png"])
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data" / "a" / "in")
    for name in ("one", "two"):  # which contain each other
        (tmp_path / "data" / "a" / name).symlink_to(tmp_path / name)
        for other in ("one", "two"):
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    names = [file.name for file, _ in list_files(tmp_path / "data").parts["train"]]
    assert names == ["a/0.png", "a/in/1.png", "a/one/3.png", "a/two/4.png", "b/2.png"]


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    "names", [[f"train/{NFC}/0.png", f"train/{NFD}/1.png"], [f"train/{NFC}/0.png", f"val/{NFD}/1.png"]]
)
def test_classes_that_differ_only_in_how_accents_are_written_are_refused(names, tmp_path):
    with pytest.raises(DataError, match=r"two ways that look the same, 'cafe\\u0301' and 'caf\\xe9': rename"):
        opened(write_folder(tmp_path, names))


def test_a_class_name_with_a_line_break_breaks_no_line(source):
    write_part(source, "train", [*numbered(20), "a\nb/0.png"])
    write_part(
        source, "val" if source.is_dir() and not (source / "train.tar").exists() else "validation", ["c\nd/0.png"]
    )
    with pytest.raises(DataError) as refusal:
        opened(source)
    assert "c\\nd" in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "words"), [(tarfile.FIFOTYPE, "named-pipe"), (tarfile.CHRTYPE, "device"), (tarfile.BLKTYPE, "device")]
)
def test_special_files_in_a_tar_file_are_called_what_they_are(tars, kind, words):
    with tarfile.open(tars / "train.tar", "a") as tar:
        special = tarfile.TarInfo("a/special.png")
        special.type = kind
        tar.addfile(special)
    assert f"not read: 1 {words} file of train" in opened(tars).summary


def levels_of_train(source):
    found = rows(opened(source))
    return sorted(found["train"] + found["calibration"])


@pytest.mark.parametrize("name", ["a/000.png", "./a/000.png", "a//000.png"])
def test_of_two_members_in_one_place_the_later_replaces_the_earlier(name, tars):
    write_tar(tars / "train.tar", [*numbered(20), name])
    assert levels_of_train(tars) == [*range(1, 21)]


def test_of_two_members_in_one_place_of_an_inner_tar_the_later_replaces_the_earlier(tars, tmp_path):
    inner = write_tar(tmp_path / "a.tar", ["000.png", "000.png", "000.png"])
    with tarfile.open(tars / "train.tar", "a") as tar:
        tar.add(inner, "a.tar")
    assert levels_of_train(tars) == sorted([*range(20), 2])


def test_links_in_a_tar_file_are_named(tars):
    with tarfile.open(tars / "train.tar", "a") as tar:
        link = tarfile.TarInfo("a/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "000.png"
        tar.addfile(link)
    assert "not read: 1 linked file of train" in opened(tars).summary


def test_a_picture_that_is_stored_without_its_zeros_is_named(tars):
    sparse = tarfile.TarInfo("a/sparse.bmp")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": "512"}
    sparse.pax_headers["GNU.sparse.map"] = "512,0"
    with tarfile.open(tars / "train.tar", "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse)
    assert "not read: 1 sparse file of train" in opened(tars).summary


@pytest.mark.parametrize("zeros", [0, 512, 2**20 - 1024, 2**20, 2**20 + 512, 2**22])
def test_a_tar_file_behind_another_is_refused(zeros, tars):
    with (tars / "train.tar").open("ab") as file:
        file.write(bytes(zeros) + (tars / "validation.tar").read_bytes())
    with pytest.raises(DataError, match=r"train\.tar' is several tar files one behind the other.*--concatenate"):
        opened(tars)


@pytest.mark.parametrize("more", [bytes(3 * 10240), bytes(3 * 2**20), b"a note", bytes(2**21) + b"a note"])
def test_what_is_no_tar_file_may_lie_behind_one(tars, more):
    before = opened(tars)
    with (tars / "train.tar").open("ab") as file:
        file.write(more)
    assert rows(opened(tars)) == rows(before)


def test_the_order_does_not_depend_on_the_file_system(folder, monkeypatch):
    expected, walked = opened(folder), os.walk
    monkeypatch.setattr("os.walk", lambda top, **more: ((t, d, sorted(f)[::-1]) for t, d, f in walked(top, **more)))
    again = opened(folder)
    assert levels(again.train) == levels(expected.train)
    assert again.split == expected.split


def test_tars_and_folders_of_the_same_files_give_the_same(tars, folder):
    of_tars, of_folders = opened(tars), opened(folder)
    assert rows(of_tars) == rows(of_folders)
    assert of_tars.class_names == of_folders.class_names
    assert of_tars.split["files_sha256"] == of_folders.split["files_sha256"]


def test_a_tar_inside_a_tar_is_a_class(tars, tmp_path):
    inner = write_tar(tmp_path / "b.tar", ["0.png", "1.png", "2.png"])
    with tarfile.open(tars / "train.tar", "w") as tar:
        tar.add(inner, "b.tar")
    write_tar(tars / "validation.tar", ["b/0.png"])
    data = opened(tars)
    assert data.class_names == ("b",)
    assert sorted(levels(data.train) + levels(data.calibration)) == [0, 1, 2]


@pytest.mark.parametrize("top", ["", "data/"])
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Training", "test_set"), ("seg_train", "seg_val")])
def test_a_tar_file_that_holds_parts_of_its_own_is_refused(train, val, top, tars):
    write_tar(
        tars / "train.tar", [f"{top}{train}/{n}" for n in numbered(20)] + [f"{top}{val}/{n}" for n in numbered(6)]
    )
    said = rf"train\.tar' holds parts of its own \({train}, {val}\): unpack it, and give the folder that holds them"
    with pytest.raises(DataError, match=said):
        opened(tars)


def test_parts_that_a_tar_file_holds_as_tar_files_are_refused(tars, tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tars / "train.tar", "test/train.tar")
        tar.add(tars / "validation.tar", "test/val.tar")
    (tmp_path / "all.tar").rename(tars / "train.tar")
    with pytest.raises(DataError, match=r"holds parts of its own \(train, val\)"):
        opened(tars)


def test_pictures_of_unknown_kinds_outside_of_classes_in_a_tar_file_are_named(tars):
    write_tar(tars / "train.tar", [*numbered(20), "logo.gif"])
    assert opened(tars).summary.endswith("not read: 1 picture outside of class folders of train.")


def test_in_a_tar_file_classes_may_lie_in_groups(tmp_path):
    write_tar(tmp_path / "train.tar", ["pets/cat/0.png", "pets/dog/1.png", "wild/owl/2.png", "more/wild/owl/3.png"])
    assert opened(tmp_path).class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog"], ["cat", "dog", "owl"]], ids=len)
@pytest.mark.parametrize("images", ["", "images/"])
def test_masks_in_a_tar_file_are_refused(images, classes, tmp_path):
    names = [f"{name}/{kind}{n}.png" for name in classes for kind in (images, "masks/") for n in range(5)]
    write_tar(tmp_path / "train.tar", names)
    with pytest.raises(DataError, match="holds cat/masks/ with pictures"):
        opened(tmp_path)


def test_parts_of_pictures_of_masks_are_no_classes(tmp_path):
    write_folder(
        tmp_path,
        [f"{part}/{name}/{n}.png" for part in "AB" for name in ("with_mask", "without_mask") for n in range(4)],
    )
    with pytest.raises(DataError, match="they look like parts, not"):
        opened(tmp_path)


def test_groups_of_classes_in_a_tar_file_may_hold_the_same_classes(tmp_path):
    write_tar(
        tmp_path / "train.tar",
        [f"{group}/{name}/{n}.png" for group in ("h1", "h2", "h3") for name in ("benign", "malign") for n in range(4)],
    )
    assert opened(tmp_path).class_names == ("benign", "malign")


def test_workers_read_a_tar_that_was_read_before(tars):
    train = opened(tars).train
    expected = torch.stack([train[i][0] for i in range(len(train))])
    loader = batches(train, batch_size=4, shuffle=False, num_workers=2)
    assert torch.equal(torch.cat([split_batch(batch)[0] for batch in loader]), expected)


def test_data_sets_can_be_pickled_after_use(source):
    data = opened(source)
    image, label = data.validation[0]
    again = pickle.loads(pickle.dumps(data)).validation[0]
    assert torch.equal(again[0], image) and again[1] == label


# a member is a header of 512 bytes and the picture, filled up to 512 more: the 20th starts at 19 * 1024
@pytest.mark.parametrize("end", [0, 100, 700, 19 * 1024, 19 * 1024 + 300, 19 * 1024 + 520, 20 * 1024])
def test_a_tar_that_is_cut_off_is_refused(tars, end):
    whole = (tars / "train.tar").read_bytes()
    (tars / "train.tar").write_bytes(whole[:end])
    with pytest.raises(DataError, match=CUT_OFF):
        opened(tars)


@pytest.mark.parametrize("inside", [False, True], ids=["outer", "inner"])
def test_a_tar_with_a_damaged_header_is_refused(tars, inside, tmp_path):
    path = write_tar(tmp_path / "c.tar", numbered(20)) if inside else tars / "train.tar"
    damaged = bytearray(path.read_bytes())
    damaged[10 * 1024 : 10 * 1024 + 100] = b"x" * 100
    path.write_bytes(damaged)
    if inside:
        with tarfile.open(tars / "train.tar", "a") as tar:
            tar.add(path, "c.tar")
    with pytest.raises(DataError, match=CUT_OFF):
        opened(tars)


def test_a_member_that_is_no_picture_may_end_a_tar(tars):
    with tarfile.open(tars / "train.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("readme.txt"))
    assert opened(tars).split["sizes"]["train"] == 18


@pytest.mark.parametrize(
    ("members", "words"),
    [([], "No images in '.*train.tar'"), (["a.txt"], "No images in"), (["0.png"], "outside of class folders")],
)
def test_a_tar_without_images_in_classes_is_refused(tars, members, words):
    write_tar(tars / "train.tar", members)
    with pytest.raises(DataError, match=words):
        opened(tars)


def test_classes_that_the_training_images_lack_are_refused_by_name(source):
    write_part(source, "val" if (source / "val").exists() else "validation", ["owl/0.png"])
    said = r"val.*' has classes that '.*train.*' does not have: owl; remove or rename them\."
    with pytest.raises(DataError, match=said):
        opened(source)


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_file_is_refused_with_the_way_to_unpack_it(mode, name, tmp_path):
    with tarfile.open(tmp_path / "train.tar", mode) as packed:
        packed.addfile(tarfile.TarInfo("cat/a.png"))
    with pytest.raises(DataError, match=rf"train\.tar' is compressed \({name}\): unpack it once, {name} -dc OLD > NEW"):
        opened(tmp_path)
