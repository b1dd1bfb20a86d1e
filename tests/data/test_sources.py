"""A source becomes three data sets, or one to report on; whatever cannot be read is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from images import numbered, opened, rows, write_folder
from torch import Tensor

from ptee._common.errors import DataError
from ptee.data.labels import map_labels
from ptee.data.shards import find_source
from ptee.data.sources import require_source


def test_an_item_is_a_float_image_and_an_int(folder):
    image, label = opened(folder).validation[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and type(image) is Tensor
    assert type(label) is int


def test_the_summary_says_source_sizes_and_rule(folder):
    assert opened(folder).summary == (
        f"{folder}: images of 2 classes, 18 for train, 2 to watch the training, 6 for validation; "
        "those to watch the training are 10 % of the 20 training images, drawn with seed 0; thresholds are chosen on "
        "half of the validation images."
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere/", r"Data folder '.*/nowhere' does not exist: give a folder"),
        ("train.tar", r"train\.tar' is a file, not a folder"),
    ],
)
def test_a_path_that_is_no_folder_is_refused_in_one_line(name, said, tars):
    with pytest.raises(DataError, match=said) as caught:
        opened(tars / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "d\udcff", r"The data folder '.*/d\\xff'"),
        ("train", "train\udcff", r"The folder or tar file 'train\\xff'"),
        ("*/a", "t\udcff", r"The class folder 't\\xff'"),
    ],
    ids=["all", "part", "class"],
)
def test_names_that_a_run_cannot_record_are_refused(old, new, said, folder):
    for path in list(folder.glob(old)) if old else [folder]:
        path.rename(path.with_name(new))
    with pytest.raises(DataError, match=f"{said} has a name that is not UTF-8. Rename it."):
        opened(folder if old else folder.with_name(new))
    if not old:
        with pytest.raises(DataError, match="not UTF-8"):
            require_source(str(folder.with_name(new)))


def test_other_names_are_recorded_as_utf8(folder):
    (folder / "train" / "a" / "000.png").rename(folder / "train" / "a" / "p\udcff.png")
    (folder / "notes\udcff").mkdir()
    assert opened(folder).split["not_read"] == ["notes\\xff/"]
    with pytest.raises(DataError, match=r"removed picture 'a/p\\xe9.png' .* Begin anew with overwrite=True."):
        opened(folder, removed=[("train", "a/p\udce9.png", "a")])


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(DataError, match="empty"):
        opened("")


def test_a_folder_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "digits", numbered(5))
    assert opened("digits").split["kind"] == "folder"


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_validation_images_alone_will_do_for_a_report(kind, request):
    source = request.getfixturevalue(kind)
    expected = rows(opened(source))["validation"]
    for path in source.glob("train*"):
        path.rename(source.parent / path.name)
    with pytest.raises(DataError, match=r"no training images|No images in class folders"):
        opened(source)
    data = opened(source, report_only=True)
    assert rows(data) == {"train": [], "calibration": [], "validation": expected}
    assert data.class_names == ("a", "b")
    assert ": images of 2 classes, 6 for validation; split as delivered." in data.summary


ALL = "all of them to report on"


@pytest.mark.parametrize(
    ("names", "reported", "rule"),
    [
        (["a/0.png"], 1, ALL),
        (["a/0.png", "b/1.png"], 2, ALL),
        (["train/a/0.png", "val/a/1.png", "val/a/2.png"], 2, "split as delivered"),
    ],
)
def test_a_few_images_will_do_for_a_report(tmp_path, names, reported, rule):
    data = opened(write_folder(tmp_path, names), report_only=True)
    assert len(data.validation) == reported
    assert data.split["rule"] == rule


def test_for_a_report_the_split_is_that_of_the_training(folder):
    assert opened(folder, report_only=True).split == opened(folder).split


def test_for_a_report_a_class_folder_without_pictures_is_named(tmp_path):
    write_folder(tmp_path, ["val/a/0.png", "val/b/"])
    assert "not read: class b (empty) of validation" in opened(tmp_path, report_only=True).summary


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system does not show itself in folders")
@pytest.mark.parametrize(
    "source",
    [
        "/proc",
        "/sys",
        "/dev",
        "/proc/self/fd",
        "/tmp/../proc",
        "/",
        "/..",
        "/proc/self/root",
        "/proc/self/root/tmp",
        "/proc/self/cwd",
    ],
)
def test_folders_of_the_operating_system_are_not_searched(source):
    for look in (opened, require_source, find_source):
        with pytest.raises(
            DataError,
            match=r"(is a folder of the operating system, which holds no images|is the whole disk): give a folder",
        ):
            look(source)


@pytest.mark.parametrize(
    ("name", "folder", "sizes", "indices"),
    [
        (None, "cifar10", [50_000, 4_000, 4_000], range(10)),
        (None, "imagenette", [1_980, 220, 1_400], (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)),
        ("MNIST", "mnist", [14_400, 1_600, 10_000], range(10)),
    ],
    ids=["tar files", "WordNet folders", "a name"],
)
def test_real_data_open(name, folder, sizes, indices, real_data):
    data = opened(name, root=real_data / folder) if name else opened(real_data / folder)
    assert list(data.split["sizes"].values()) == sizes
    assert map_labels(data.class_names, 1000 if folder == "imagenette" else 10).indices == tuple(indices)
    assert data.train[0][0].shape == (3, 8, 8)


@pytest.mark.parametrize(("source", "mirror"), [("folder", True), ("tars", True), ("digits", False)])
def test_a_mirror_image_of_a_digit_is_no_digit(source, mirror, request):
    assert opened(source if source == "digits" else request.getfixturevalue(source)).mirror is mirror


def test_where_thresholds_are_given_nothing_is_said_of_choosing_them(folder):
    data = opened(folder)
    assert data.described() == data.summary
    assert "thresholds are chosen" not in data.described(chosen=False)
