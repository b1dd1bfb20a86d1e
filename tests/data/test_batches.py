"""Data sets and loaders of a user become batches of images and labels."""

from __future__ import annotations

import re

import pytest
import torch
from images import picture
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ptee._common.errors import DataError
from ptee.data.batches import batches, split_batch

IMAGES, LABELS = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    "data",
    [TensorDataset(IMAGES, LABELS), list(zip(IMAGES, LABELS.tolist(), strict=True))],
    ids=["dataset", "list"],
)
def test_map_style_data_becomes_batches(data):
    first, last = map(split_batch, batches(data, batch_size=3, shuffle=False))
    assert torch.equal(torch.cat([first[0], last[0]]), IMAGES)
    assert torch.equal(torch.cat([first[1], last[1]]), LABELS.cpu())


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
    assert labels.dtype == torch.int64 and torch.equal(labels, LABELS.cpu())


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
