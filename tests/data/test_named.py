"""Data sets are found by their names: the digits, torchvision's, and those of the Hugging Face hub."""

from __future__ import annotations

import sys
from io import BytesIO
from typing import ClassVar

import numpy as np
import pytest
from images import TRANSFORM, encoded, levels, numbered, opened, picture, write_folder
from torch.utils.data import Dataset

from ptee._common.errors import DataError, UnknownName
from ptee.data.named import NAMED
from ptee.data.pictures import image_transform
from ptee.data.sources import open_data, open_named


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CIFR10", "Did you mean .*'CIFAR10'"),
        ("mnits", "Did you mean .*'mnist'"),
        ("digit", "Did you mean .*'digits'"),
        ("FashonMNIST", "Did you mean .*'FashionMNIST'"),
        ("nope", r"Choices: digits, .*cifar10,.*mnist.*\.$"),
        *[(name, "") for name in ("CocoDetection", "FakeData", "ImageFolder", "EMNIST")],  # need more than a root
    ],
)
def test_an_unknown_name_suggests_the_closest(name, said):
    with pytest.raises(UnknownName, match=f"no folder '{name}', and no data set of that name. .*{said}"):
        opened(name)


def test_a_folder_of_nearly_this_name_is_suggested_first(tmp_path, monkeypatch):
    (tmp_path / "pics").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownName, match=r"no data set of that name\. Did you mean 'pics'\?$"):
        opened("picz")
    with pytest.raises(DataError, match=r"picz' does not exist\. Did you mean '.*/pics'\?$"):
        opened(tmp_path / "picz")


@pytest.mark.parametrize("name", NAMED)
def test_a_data_set_that_ptee_names_is_opened_without_a_connection_and_the_same_each_time(name):
    first, again = (open_named(name, transform=TRANSFORM) for _ in range(2))
    assert len(first.train) > len(first.validation) > 0
    assert len(first.class_names) > 1
    assert first.validation[0][0].equal(again.validation[0][0])
    assert first.split == again.split


@pytest.mark.parametrize("name", ["CIFAR10", "svhn", "ImageNet", "GTSRB", "Places365"])
def test_a_missing_data_set_of_torchvision_says_what_was_looked_for_and_where(name, tmp_path):
    said = rf"(?i)torchvision's {name} was looked for in '{tmp_path}': .*\. Give the folder"
    with pytest.raises(DataError, match=said):
        opened(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


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


def test_the_split_argument_gives_training_and_test_part(tmp_path):
    data = opened("toys", root=tmp_path)
    assert data.split["parts"] == {"train": "train", "validation": "test"}
    assert set(levels(data.train) + levels(data.calibration)) == {0} and set(levels(data.validation)) == {1}
    assert type(data.train[0][1]) is int


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("NamedToys", {"train": "train", "validation": "val"}),
        ("TrainvalToys", {"train": "trainval", "validation": "test"}),  # it contains val
    ],
)
def test_val_goes_before_test_unless_the_training_images_contain_it(name, parts):
    assert opened(name).split["parts"] == parts


def test_wordnet_ids_go_before_names_and_missing_names_are_made_up():
    assert opened("NamedToys").class_names == NamedToys.wnids
    assert opened("Toys").class_names == ("class 0", "class 1", "class 2")


def test_a_data_set_without_class_numbers_is_refused():
    with pytest.raises(DataError, match="BoxToys has dict for a label"):
        opened("BoxToys")


@pytest.mark.parametrize(("name", "kind"), [("digits", "digits"), ("Toys", "torchvision"), ("toys", "torchvision")])
def test_a_name_alone_is_no_folder_of_that_name(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / name, numbered(5))
    data = open_named(name, transform=TRANSFORM, seed=3)
    assert (data.source, data.split["kind"], data.split["seed"]) == (name, kind, 3)


def test_digits_are_grey_pictures_of_ten_classes():
    data = open_data("digits", transform=image_transform((1, 8, 8), (0,), (1,)))
    assert data.split["sizes"] == {"train": 1437, "calibration": 180, "validation": 180}
    assert len(data.class_names) == 10 and data.train[0][0].shape == (1, 8, 8)
    assert max(levels(data.validation)) == 255


def test_timms_names_of_torchvisions_data_sets_work():
    assert opened("torch/toys").split["kind"] == "torchvision"
    with pytest.raises(DataError, match="torchvision's FashionMNIST was looked for"):
        opened("torch/fashion_mnist")


@pytest.mark.parametrize("name", ["tfds/mnist", "wds/pets", "hfids/user/pets"])
def test_streams_are_refused_with_what_to_give(name):
    with pytest.raises(DataError, match=r"is a stream, and ptee needs images that it can pick .*'hfds/"):
        opened(name)


class Reader(list):
    """A split of a data set of the hub, as timm's reader gives it."""

    class_to_idx: ClassVar = {"dog": 1, "cat": 0}


@pytest.fixture
def hub(monkeypatch) -> None:
    def create_reader(name: str, root: str | None, split: str) -> Reader:
        if name != "hfds/user/pets":
            raise ConnectionError("Offline mode is enabled. Try later.")
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split '{split}'")
        return Reader((BytesIO(encoded(i)), i % 2) for i in range(20 if split == "train" else 6))

    monkeypatch.setattr("timm.data.readers.create_reader", create_reader)


def test_a_data_set_of_the_hub_is_read_by_timm(hub):
    data = opened("hfds/user/pets")
    assert data.class_names == ("cat", "dog")
    assert data.split["parts"] == {"train": "train", "validation": "test"}
    assert levels(data.validation) == [0, 1, 2, 3, 4, 5]
    assert data.split["sizes"] == {"train": 18, "calibration": 2, "validation": 6}


def test_a_data_set_of_the_hub_that_cannot_be_had_is_refused_in_one_line(hub):
    with pytest.raises(DataError, match=r"hfds/nowhere.*ConnectionError: Offline mode is enabled\.$"):
        opened("hfds/nowhere")


def test_without_the_package_datasets_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data.readers.reader_hfds", None)
    with pytest.raises(DataError, match="needs the package datasets: pip install datasets"):
        opened("hfds/user/pets")
