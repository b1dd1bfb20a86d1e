"""Data sources become three data sets whose split can be redone; whatever cannot be read is refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ptee._common.errors import DataError, UnknownName
from ptee.data.batches import UNKNOWN_LABEL, batches, split_batch
from ptee.data.labels import map_labels, with_labels
from ptee.data.pictures import image_transform
from ptee.data.sources import open_data, open_named
from ptee.data.splits import Data

TRANSFORM = image_transform((3, 8, 8), (0.0,), (1.0,))
PARTS = ("train", "calibration", "validation")


def picture(level: int = 0, mode: str = "L", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, level).convert(mode)


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    picture(level).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, names: Iterable[str]) -> Path:
    """Pictures as `names` says, each of its own grey level."""
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(level))
    return folder


def write_tar(path: Path, names: Iterable[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for level, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(encoded(level))
            tar.addfile(member, io.BytesIO(encoded(level)))
    return path


def numbered(n: int, classes: str = "ab") -> list[str]:
    return [f"{classes[i % len(classes)]}/{i:03}.png" for i in range(n)]


def levels(dataset: Dataset) -> list[int]:
    """Which pictures a data set holds, in its order."""
    return [round(float(dataset[i][0].max()) * 255) for i in range(len(dataset))]  # type: ignore[arg-type]


def opened(source: Path | str, **more) -> Data:
    return open_data(source, transform=TRANSFORM, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty training and six validation images of two classes."""
    write_folder(tmp_path / "images" / "train", numbered(20))
    write_folder(tmp_path / "images" / "val", numbered(6))
    return tmp_path / "images"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """The same as tar files."""
    write_tar(tmp_path / "tars" / "train.tar", numbered(20))
    write_tar(tmp_path / "tars" / "validation.tar", numbered(6))
    return tmp_path / "tars"


# Folders


def test_item_is_float_image_and_plain_int(folder):
    image, label = opened(folder).validation[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and type(image) is Tensor
    assert type(label) is int


@pytest.mark.parametrize("train", ["train", "Train", "training", "TRAINING"])
@pytest.mark.parametrize("val", ["val", "Val", "Validation"])
def test_folders_of_parts_may_be_spelt_in_any_case(tmp_path, train, val):
    write_folder(tmp_path / train, numbered(10))
    write_folder(tmp_path / val, numbered(3))
    data = opened(tmp_path)
    assert data.class_names == ("a", "b")
    assert data.split["parts"] == {"train": train, "validation": val}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_second_folder_may_have_any_usual_name(tmp_path, name):
    write_folder(tmp_path / "train", numbered(10))
    write_folder(tmp_path / name, numbered(3))
    data = opened(tmp_path)
    assert data.split["sizes"] == {"train": 9, "calibration": 1, "validation": 3}
    assert data.split["parts"] == {"train": "train", "validation": name}


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


def test_order_does_not_depend_on_file_system(folder, monkeypatch):
    expected = opened(folder)
    listed, walked = Path.iterdir, os.walk
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(listed(path), reverse=True))
    monkeypatch.setattr("os.walk", lambda top: ((t, d, sorted(f, reverse=True)) for t, d, f in walked(top)))
    again = opened(folder)
    assert levels(again.train) == levels(expected.train)
    assert again.split == expected.split


def test_hidden_files_and_other_files_are_no_pictures(folder):
    (folder / "train" / "a" / "._000.png").write_bytes(b"junk")
    (folder / "train" / "a" / "notes.txt").write_text("notes")
    (folder / "train" / ".cache").mkdir()
    assert opened(folder).split["sizes"]["train"] == 18


def test_validation_may_lack_classes(tmp_path):
    write_folder(tmp_path / "train", numbered(6, "abc"))
    write_folder(tmp_path / "val", ["c/0.png"])
    assert opened(tmp_path).validation[0][1] == 2


def test_opening_decodes_nothing_and_bad_picture_is_named(folder):
    (folder / "val" / "a" / "000.png").write_bytes(b"no picture")
    data = opened(folder)
    with pytest.raises(DataError, match=r"Picture '.*val/a/000\.png' cannot be decoded"):
        data.validation[0]


# Splits


def rows(data: Data) -> dict[str, list[int]]:
    return {part: levels(getattr(data, part)) for part in PARTS}


def test_split_is_disjoint_and_complete(tmp_path):
    drawn = rows(opened(write_folder(tmp_path, numbered(40))))
    assert sorted(level for part in PARTS for level in drawn[part]) == list(range(40))


def test_same_seed_same_split_other_seed_other_split(tmp_path):
    write_folder(tmp_path, numbered(40))
    assert rows(opened(tmp_path, seed=3)) == rows(opened(tmp_path, seed=3)) != rows(opened(tmp_path, seed=4))


def test_split_leaves_global_random_numbers_alone(tmp_path):
    write_folder(tmp_path, numbered(10))
    state = torch.get_rng_state()
    opened(tmp_path)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("n", [3, 8])
def test_few_images_give_one_to_each_part_at_least(tmp_path, n):
    sizes = opened(write_folder(tmp_path, numbered(n))).split["sizes"]
    assert sizes == {"train": n - 2, "calibration": 1, "validation": 1}


def test_too_few_images_are_refused_with_their_number(tmp_path):
    with pytest.raises(DataError, match=r"it has 2, and at least 3 are needed"):
        opened(write_folder(tmp_path, numbered(2)))


def test_one_training_image_beside_validation_is_refused(tmp_path):
    write_folder(tmp_path / "train", ["a/0.png"])
    write_folder(tmp_path / "val", ["a/0.png"])
    with pytest.raises(DataError, match=r"it has 1, and at least 2 are needed, as those for calibration"):
        opened(tmp_path)


def test_split_record_survives_json_and_tells_files_apart(folder):
    before = opened(folder, seed=5)
    assert json.loads(json.dumps(before.split)) == before.split
    assert before.split["seed"] == 5
    (folder / "train" / "a" / "000.png").rename(folder / "train" / "a" / "new.png")
    assert opened(folder).split["files_sha256"] != before.split["files_sha256"]


def test_every_part_of_a_folder_knows_the_hash_of_its_files(folder):
    data = opened(folder)
    label_map = map_labels(data.class_names, 2)
    for part in PARTS:
        assert with_labels(getattr(data, part), label_map).files_sha256 == data.split["files_sha256"]
    assert with_labels(opened("digits").train, label_map).files_sha256 is None


def test_summary_says_source_sizes_and_rule(folder):
    assert opened(folder).summary == (
        f"{folder}: images of 2 classes, 18 for train, 2 for calibration, 6 for validation; "
        "calibration: 10 % of the training images, drawn with seed 0."
    )


# Tar files


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


def test_bad_picture_in_a_tar_is_named(tars):
    with tarfile.open(tars / "validation.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a/bad.png"))
    with pytest.raises(DataError, match=r"Picture 'a/bad\.png' in '.*validation\.tar' cannot be decoded"):
        opened(tars).validation[0]


# What is no source


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


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Data folder '.*/nowhere' does not exist: give a folder"):
        opened(tmp_path / "nowhere")


def test_file_is_refused_with_the_layouts(tars):
    with pytest.raises(DataError, match=r"train\.tar' is a file, not a folder"):
        opened(tars / "train.tar")


def test_empty_name_is_not_the_current_folder():
    with pytest.raises(DataError, match="empty"):
        opened("")


@pytest.mark.parametrize(
    ("name", "near"),
    [("CIFR10", "'CIFAR10'"), ("mnits", "'mnist'"), ("digit", "'digits'"), ("FashonMNIST", "'FashionMNIST'")],
)
def test_unknown_name_suggests_closest(name, near):
    with pytest.raises(UnknownName, match=f"no folder '{name}', and no data set of that name. Did you mean .*{near}"):
        opened(name)


def test_unknown_name_gets_all_names_with_the_digits_first():
    with pytest.raises(UnknownName, match=r"no folder 'nope', .*Choices: digits, .*cifar10,.*mnist.*\.$"):
        opened("nope")


@pytest.mark.parametrize("name", ["CocoDetection", "FakeData", "ImageFolder", "EMNIST"])
def test_torchvision_class_that_needs_more_than_root_is_unknown(name):
    with pytest.raises(UnknownName, match=name):
        opened(name)


@pytest.mark.parametrize("name", ["CIFAR10", "svhn", "ImageNet", "GTSRB", "Places365"])
def test_missing_torchvision_data_says_what_was_looked_for_and_where(name, tmp_path):
    with pytest.raises(
        DataError, match=rf"(?i)torchvision's {name} was looked for in '{tmp_path}': .*\. Give the folder"
    ):
        opened(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make_error", [lambda path: opened(path / "no"), lambda path: opened("CIFAR10", root=path)])
def test_refusals_are_one_line(make_error, tmp_path):
    with pytest.raises(DataError) as caught:
        make_error(tmp_path)
    assert "\n" not in str(caught.value)


# torchvision and scikit-learn


class Toys(Dataset):
    """As torchvision makes them, with pictures whose grey level says the split."""

    SPLITS = ("train", "test")

    def __init__(self, root: str, split: str = "train", transform=None, download: bool = False) -> None:
        if split not in self.SPLITS:
            raise ValueError(f"Unknown value '{split}' for argument split.")
        assert not download
        self.level, self.labels = self.SPLITS.index(split), np.array([0, 2] * 5)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        return picture(self.level), self.labels[index]


class TrainvalToys(Toys):
    SPLITS = ("trainval", "val", "test")

    def __init__(self, root: str, split: str = "trainval", transform=None) -> None:
        super().__init__(root, split)


class NamedToys(Toys):
    SPLITS = ("train", "val", "test")
    wnids = ("n01440764", "n02102040", "n02979186")
    classes = (("tench", "Tinca tinca"), ("spaniel",), ("player",))


class BoxToys(Toys):
    def __getitem__(self, index: int):
        return picture(), {"boxes": []}


@pytest.fixture(autouse=True)
def toys_in_torchvision(monkeypatch):
    for make in (Toys, NamedToys, BoxToys, TrainvalToys):
        monkeypatch.setattr(f"torchvision.datasets.{make.__name__}", make, raising=False)


def test_split_argument_gives_training_and_test_part(tmp_path):
    data = opened("toys", root=tmp_path)
    assert data.split["parts"] == {"train": "train", "validation": "test"}
    assert set(levels(data.train) + levels(data.calibration)) == {0} and set(levels(data.validation)) == {1}
    assert type(data.train[0][1]) is int


def test_val_goes_before_test():
    assert opened("NamedToys").split["parts"] == {"train": "train", "validation": "val"}


def test_trainval_goes_with_test_as_it_contains_val():
    assert opened("TrainvalToys").split["parts"] == {"train": "trainval", "validation": "test"}


def test_wordnet_ids_go_before_names_and_missing_names_are_made_up():
    assert opened("NamedToys").class_names == NamedToys.wnids
    assert opened("Toys").class_names == ("class 0", "class 1", "class 2")


def test_data_set_without_class_numbers_is_refused():
    with pytest.raises(DataError, match="BoxToys has dict for a label"):
        opened("BoxToys")


def test_folder_goes_before_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "digits", numbered(5))
    assert opened("digits").split["kind"] == "folder"


@pytest.mark.parametrize(("name", "kind"), [("digits", "digits"), ("Toys", "torchvision"), ("toys", "torchvision")])
def test_a_name_alone_is_no_folder_of_that_name(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / name, numbered(5))
    data = open_named(name, transform=TRANSFORM, seed=3)
    assert (data.source, data.split["kind"], data.split["seed"]) == (name, kind, 3)


def test_a_name_alone_that_is_none_is_unknown(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UnknownName, match="images"):
        open_named("images", transform=TRANSFORM)


def test_digits_are_grey_pictures_of_ten_classes():
    data = open_data("digits", transform=image_transform((1, 8, 8), (0,), (1,)))
    assert data.split["sizes"] == {"train": 1437, "calibration": 180, "validation": 180}
    assert len(data.class_names) == 10 and data.train[0][0].shape == (1, 8, 8)
    assert max(levels(data.validation)) == 255


# Transform


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("c", [1, 3])
def test_any_kind_of_picture_gives_the_channels_asked_for(mode, c):
    x = image_transform((c, 6, 6), (0.5,), (0.5,))(picture(255, mode, (9, 9)))
    assert x.shape == (c, 6, 6) and torch.allclose(x, torch.ones(c, 6, 6))


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_picture_of_the_right_size_is_only_normalised():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels = torch.tensor(np.asarray(noise(7, 5)), dtype=torch.float64).permute(2, 0, 1) / 255  # (h, w, c) -> (c, h, w)
    expected = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(image_transform((3, 7, 5), mean, std)(noise(7, 5)).double(), expected, atol=1e-6)


def test_square_picture_is_resized_whole():
    resized = noise(16, 16).resize((8, 8), Image.Resampling.BICUBIC)
    expected = torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 255  # (h, w, c) -> (c, h, w)
    assert torch.allclose(TRANSFORM(noise(16, 16)), expected)


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (3, 100), (9, 8), (1, 1)])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_picture_covers_any_input_shape(size, shape):
    assert image_transform((3, *shape), (0,), (1,))(picture(255, "RGB", size)).min() == 1


def test_longer_side_is_cropped_around_the_centre():
    image = picture(0, "L", (24, 8))
    image.paste(255, (8, 0, 16, 8))
    assert TRANSFORM(image).min() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((4, 8, 8), (0,), (1,)), "reads 4 channels, but pictures have 3 or 1"),
        (((3, 8, 8), (0, 0), (1,)), "The mean has 2 numbers for 3 channels"),
        (((1, 8, 8), (0,), (1, 1, 1)), "The std has 3 numbers for 1 channels"),
        (((3, 8, 8), (0,), (1,), "bicubc"), "Unknown interpolation 'bicubc'. Did you mean 'bicubic'"),
    ],
)
def test_impossible_input_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        image_transform(*arguments)


# Data from Python

IMAGES, LABELS = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    "data",
    [TensorDataset(IMAGES, LABELS), list(zip(IMAGES, LABELS.tolist(), strict=True))],
    ids=["dataset", "list"],
)
def test_map_style_data_becomes_batches(data):
    first, last = map(split_batch, batches(data, batch_size=3, shuffle=False))
    assert torch.equal(torch.cat([first[0], last[0]]), IMAGES)
    assert torch.equal(torch.cat([first[1], last[1]]), LABELS)


def test_shuffling_follows_the_generator():
    def order() -> list[int]:
        loader = batches(torch.arange(50), batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(1))
        return next(iter(loader)).tolist()

    assert order() == order() != list(range(50))


class Samples(Dataset):
    """Twice the same."""

    def __init__(self, sample: object) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> object:
        return self.sample


@pytest.mark.parametrize(
    ("sample", "said"),
    [((picture(), 1), "gives PIL images: give it transform=ToTensor()"), ((IMAGES[0], None), "gives a tuple (Tensor")],
    ids=["pictures", "no label"],
)
def test_samples_of_which_no_batch_can_be_made_are_refused(sample, said):
    with pytest.raises(DataError, match=re.escape(said)):
        next(iter(batches(Samples(sample), batch_size=2, shuffle=False)))


@pytest.mark.parametrize(
    "other", [(IMAGES[0][:, 1:], torch.zeros(1)), (IMAGES[0], torch.zeros(2))], ids=["images", "labels"]
)
def test_samples_of_several_sizes_are_refused(other):
    samples = [(IMAGES[0], torch.zeros(1)), other]
    with pytest.raises(DataError, match=r"images, or labels, of several sizes.*resize images.*one class number"):
        next(iter(batches(samples, batch_size=2, shuffle=False)))


class OtherLoader:
    """Neither torch's nor indexable, like timm's PrefetchLoader."""

    def __iter__(self):
        return iter([(IMAGES, LABELS)])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"batch_size": 0}, "The batch_size 0 must be a whole number, 1 at least"),
        ({"batch_size": 2.5}, "The batch_size 2.5 must be a whole number"),
        ({"num_workers": -1}, "The num_workers -1 must be a whole number, 0 at least"),
    ],
    ids=str,
)
def test_batches_of_no_number_are_refused(wish, said):
    with pytest.raises(DataError, match=said):
        batches(TensorDataset(IMAGES), **{"batch_size": 2, "shuffle": False} | wish)


@pytest.mark.parametrize("loader", [DataLoader(TensorDataset(IMAGES), batch_size=2), OtherLoader()])
def test_loader_keeps_its_own_batches(loader):
    assert batches(loader, batch_size=64, shuffle=True) is loader


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


def test_loader_of_a_stream_is_a_loader():
    loader = DataLoader(Stream(), batch_size=2)
    assert batches(loader, batch_size=1, shuffle=False) is loader


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (iter(DataLoader(TensorDataset(IMAGES))), "SingleProcessDataLoaderIter, which can be read only once"),
        ((x for x in IMAGES), "generator, which can be read only once"),
        (Stream(), "Stream, which is an iterable data set: pass a DataLoader"),
        ((IMAGES, LABELS), "tuple, which is neither.*TensorDataset"),
        ({"image": IMAGES}, "dict, which is neither"),
        ("cifar10", "str, which is neither"),
        (None, "NoneType, which is neither"),
        ([], "empty: this list has length 0"),
        (TensorDataset(IMAGES[:0]), "empty: this TensorDataset has length 0"),
        (DataLoader(TensorDataset(IMAGES), batch_size=9, drop_last=True), "empty: this DataLoader"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_other_data_is_refused_by_name(data, words):
    with pytest.raises(DataError, match=words):
        batches(data, batch_size=2, shuffle=False)


@pytest.mark.parametrize(
    "batch",
    [
        (IMAGES, LABELS),
        [IMAGES, LABELS.int()],
        (IMAGES, LABELS[:, None]),
        (IMAGES, LABELS.tolist()),
        {"image": IMAGES, "label": LABELS},
        {"pixel_values": IMAGES, "labels": LABELS, "index": LABELS},
    ],
)
def test_batch_with_labels_is_split(batch):
    images, labels = split_batch(batch)
    assert images is IMAGES
    assert labels.dtype == torch.int64 and torch.equal(labels, LABELS)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), [IMAGES], {"images": IMAGES}, (IMAGES, None)])
def test_batch_without_labels_has_none(batch):
    assert split_batch(batch)[1] is None


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((IMAGES, LABELS, LABELS), r"tuple \(Tensor \(5, 3, 4, 4\) float32, Tensor \(5,\) int64, Tensor"),
        ((IMAGES[0], LABELS), r"tuple \(Tensor \(3, 4, 4\) float32"),
        ({"x": IMAGES}, "dict with keys x"),
        ([], r"list \(\)"),
        ("text", "it is a str"),
        ((IMAGES, LABELS[:3]), r"The labels of 5 images should be 5 class numbers, but they are a Tensor \(3,\) int64"),
        ((IMAGES, LABELS.float()), r"a Tensor \(5,\) float32"),
        ((IMAGES, torch.eye(5).long()), r"a Tensor \(5, 5\) int64"),
        ((IMAGES, ("cat",) * 5), r"a tuple \(str, str"),
    ],
)
def test_other_batches_are_refused_with_what_they_hold(batch, words):
    with pytest.raises(DataError, match=words):
        split_batch(batch)


# Label maps


def test_wordnet_ids_go_to_their_places_in_imagenet():
    label_map = map_labels(["n01440764", "n01443537", "n15075141"], 1000)
    assert label_map.indices == (0, 1, 999)
    assert "ImageNet-1k" in label_map.reason


def test_wordnet_id_outside_of_imagenet_cannot_be_mapped():
    label_map = map_labels(["n01440764", "n00000000"], 1000)
    assert label_map.indices is None and "n00000000" in label_map.reason


@pytest.mark.parametrize(
    ("class_names", "num_classes", "indices"),
    [
        (["0", "7"], 10, (0, 7)),
        (["0", "1", "10", "2"], 100, (0, 1, 10, 2)),
        (sorted(map(str, range(1000))), 1000, tuple(map(int, sorted(map(str, range(1000)))))),
        (sorted(map(str, range(12))), 12, tuple(range(12))),
        ([f"{i:02}" for i in range(12)], 12, tuple(range(12))),
        (list(map(str, range(12))), 12, tuple(range(12))),
        (["1", "2"], 2, (0, 1)),
        (["07", "7"], 10, None),
        (["cat", "dog"], 2, (0, 1)),
        (["n01440764", "n02102040"], 2, (0, 1)),
        (["0 - zero", "1 - one"], 2, (0, 1)),
        (["cat", "dog"], 3, None),
        (["²", "cat"], 3, None),
    ],
)
def test_names_become_the_backbones_classes(class_names, num_classes, indices):
    label_map = map_labels(class_names, num_classes)
    assert label_map.indices == indices
    assert label_map.reason.endswith(".")


@pytest.mark.parametrize(
    ("class_names", "num_classes", "said"),
    [
        (sorted(map(str, range(12))), 12, r"in this order: 0, 1, 10, 11, 2 .*ImageFolder.*write 02 for 2\.$"),
        ([f"{i:02}" for i in range(12)], 12, r"in this order: 00, 01, 02, 03, 04 and 7 more\.$"),
        (sorted(map(str, range(10))), 10, r"in this order: 0, 1, 2, 3, 4 and 5 more\.$"),
        (["1", "10", "2"], 12, "names are taken for numbers of the backbone's 12"),
        (sorted(map(str, range(1000))), 1000, "names are taken for numbers of the backbone's 1000"),
        (["cat", "dog"], 3, r"cannot be mapped to the backbone's 3: name their folders by its numbers, 0 to 2\.$"),
        (["all"], 3, r"cannot be mapped to the backbone's 3\.$"),  # as where there are no labels
        (["a", "b", "c"], 2, r"cannot be mapped to the backbone's 2\.$"),
    ],
    ids=["text", "padded", "ten", "some of the classes", "ImageNet", "no numbers", "no labels", "too many"],
)
def test_the_reason_says_how_names_were_read_or_what_to_call_them(class_names, num_classes, said):
    reason = map_labels(class_names, num_classes).reason
    assert re.search(said, reason)
    assert "\n" not in reason


def test_folders_of_numbers_get_the_classes_that_image_folder_gave_them(tmp_path):
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path, [f"{i}/{i}.png" for i in range(12)])
    data = opened(tmp_path)
    mapped = with_labels(data.train, map_labels(data.class_names, 12))
    trained = dict(ImageFolder(str(tmp_path)).samples)
    for i, level in enumerate(levels(data.train)):
        assert mapped[i][1] == trained[str(tmp_path / f"{level}" / f"{level}.png")]


def test_digits_are_no_class_numbers_of_a_larger_backbone():
    assert map_labels(opened("digits").class_names, 1000).indices is None


@pytest.mark.parametrize(("names", "expected"), [(["1", "0"], [1, 0]), (["x", "y"], [UNKNOWN_LABEL] * 2)])
def test_relabelled_data_has_mapped_labels_and_the_same_images(names, expected):
    data = TensorDataset(IMAGES[:2], torch.tensor([0, 1]))
    relabelled = with_labels(data, map_labels(names, 3))
    assert [relabelled[i][1] for i in range(2)] == expected
    assert all(torch.equal(relabelled[i][0], IMAGES[i]) for i in range(2)) and len(relabelled) == 2


# Real data


def test_real_cifar10_tars_are_three_parts(real_data):
    data = opened(real_data / "cifar10")
    assert data.split["sizes"] == {"train": 50_000, "calibration": 4_000, "validation": 4_000}
    assert data.class_names[0] == "airplane" and data.train[0][0].shape == (3, 8, 8)
    assert data.split["rule"] == "split as delivered"


def test_real_imagenette_is_mapped_to_imagenet(real_data):
    data = opened(real_data / "imagenette")
    assert data.split["sizes"] == {"train": 1_980, "calibration": 220, "validation": 1_400}
    assert map_labels(data.class_names, 1000).indices == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def test_real_mnist_opens_by_name(real_data):
    data = opened("MNIST", root=real_data / "mnist")
    assert data.split["sizes"] == {"train": 14_400, "calibration": 1_600, "validation": 10_000}
    assert map_labels(data.class_names, 10).indices == tuple(range(10))


@pytest.mark.parametrize(("source", "mirror"), [("folder", True), ("tars", True), ("digits", False)])
def test_a_mirror_image_of_a_digit_is_no_digit(source, mirror, request):
    assert opened(source if source == "digits" else request.getfixturevalue(source)).mirror is mirror
