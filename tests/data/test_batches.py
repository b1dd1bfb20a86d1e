"""Data sets and loaders of a user become batches of images and labels."""

from __future__ import annotations

import re

import pytest
import torch
from device import seeded
from images import picture
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, random_split

from ptee._common.errors import DataError
from ptee.data.batches import batches, same_images, split_batch

IMAGES, LABELS = torch.rand(5, 3, 4, 4), torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    "data", [TensorDataset(IMAGES, LABELS), list(zip(IMAGES, LABELS.tolist(), strict=True))], ids=["dataset", "list"]
)
def test_a_map_style_data_set_becomes_batches(data):
    first, last = map(split_batch, batches(data, batch_size=3, shuffle=False))
    assert torch.equal(torch.cat([first[0], last[0]]), IMAGES)
    assert torch.equal(torch.cat([first[1], last[1]]), LABELS.cpu())


def test_shuffling_follows_the_generator():
    def order() -> list[int]:
        loader = batches(torch.arange(50), batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(1))
        return next(iter(loader)).tolist()

    assert order() == order() != list(range(50))


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([(picture(), 1)] * 2, "gives PIL images: give it transform=ToTensor()"),
        ([(IMAGES[0], None)] * 2, r"gives a tuple \(Tensor"),
        (
            [(IMAGES[0], 1), (IMAGES[0], None)],
            r"\(3, 4, 4\) float32, int\) and a tuple \(Tensor .*, NoneType\), which cannot form",
        ),
        ([(IMAGES[0], 2**70)] * 2, "int of 71 bits"),
        ([{"image": IMAGES[0]}, {"images": IMAGES[0]}], "dict with keys image and a dict with keys images"),
        (
            [(IMAGES, LABELS), (IMAGES[:2], LABELS[:2])],
            r"^The items of this list are whole batches, .*Give the loader that they come from\.$",
        ),
        ([{"image": IMAGES, "label": LABELS}] * 2, "whole batches"),
        ([(IMAGES[0], 0), (IMAGES[0][:, 1:], 0)], r"differ in size.*resize all images.*one class number"),
        ([(IMAGES[0], torch.zeros(1)), (IMAGES[0], torch.zeros(2))], "images or labels of the data set differ in size"),
    ],
    ids=[
        "pictures",
        "no label",
        "no label for some",
        "a label of 71 bits",
        "other keys",
        "batches, the last of which is smaller",
        "batches of one size",
        "images of several sizes",
        "labels of several sizes",
    ],
)
def test_samples_that_cannot_form_a_batch_are_refused(samples, said):
    with pytest.raises(DataError, match=said):
        next(iter(batches(samples, batch_size=2, shuffle=False)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 2**31 + 1}, "whole number, at least 1 and at most 2,147,483,648"),
        ({"num_workers": 10**30}, "whole number, at least 0 and at most 4,096"),
        ({"batch_size": 0}, "The batch_size 0 must be a whole number, at least 1"),
        ({"batch_size": 2.5}, "The batch_size 2.5 must be a whole number"),
        ({"num_workers": -1}, "The num_workers -1 must be a whole number, at least 0"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(change, said):
    with pytest.raises(DataError, match=said):
        batches(TensorDataset(IMAGES), **{"batch_size": 2, "shuffle": False} | change)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(IMAGES)


class OtherLoader:
    """Neither torch's nor indexable, like timm's PrefetchLoader."""

    def __iter__(self):
        return iter([(IMAGES, LABELS)])

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "loader", [DataLoader(TensorDataset(IMAGES), batch_size=2), DataLoader(Stream(), batch_size=2), OtherLoader()]
)
def test_a_loader_keeps_its_own_batches(loader):
    assert batches(loader, batch_size=64, shuffle=True) is loader


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (iter(DataLoader(TensorDataset(IMAGES))), "SingleProcessDataLoaderIter, which can be read only once"),
        ((x for x in IMAGES), "generator, which can be read only once"),
        (Stream(), "Stream, which is an iterable data set: pass a DataLoader"),
        ((IMAGES, LABELS), "tuple, which is neither.*TensorDataset"),
        ({"image": IMAGES}, "dict, which is neither"),
        ("cifar10", r"data is a str \('cifar10'\), which is neither"),
        (list, "type, which is neither"),
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
        {"image": [picture()] * 5, "pixel_values": IMAGES, "labels": LABELS},
        {"image": IMAGES, "label": LABELS, "labels": LABELS.tolist()},
    ],
)
def test_a_batch_with_labels_is_split(batch):
    images, labels = split_batch(batch)
    assert images is IMAGES
    assert labels.dtype == torch.int64 and torch.equal(labels, LABELS.cpu())


def test_a_picture_that_a_transform_left_beside_its_tensor_is_no_image():
    samples = [{"image": picture(), "pixel_values": x, "label": int(y)} for x, y in zip(IMAGES, LABELS, strict=True)]
    images, labels = split_batch(next(iter(batches(samples, batch_size=5, shuffle=False))))
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS.cpu())


def test_samples_with_two_images_are_refused_by_name():
    samples = [{"image": x, "images": x} for x in IMAGES]
    with pytest.raises(DataError, match="images under 'image' and under 'images'"):
        next(iter(batches(samples, batch_size=5, shuffle=False)))


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), [IMAGES], {"images": IMAGES}, (IMAGES, None)])
def test_a_batch_without_labels_has_none(batch):
    assert split_batch(batch)[1] is None


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((IMAGES, LABELS, LABELS), "tuple (Tensor (5, 3, 4, 4) float32, Tensor (5,) int64, Tensor"),
        ((IMAGES[0], LABELS), "tuple (Tensor (3, 4, 4) float32"),
        ({"x": IMAGES}, "dict with keys x"),
        (
            {"image": IMAGES, "pixel_values": IMAGES},
            "The data has images under 'image' and under 'pixel_values'. Leave one of them out, or give pairs (image tensor, class number).",
        ),
        (
            {"image": IMAGES, "label": LABELS, "labels": 1 - LABELS},
            "The data has labels under 'label' and under 'labels', which differ. Leave one of them out",
        ),
        ({"image": IMAGES, "label": ["a"] * 5, "labels": LABELS}, "under 'label' and under 'labels', which differ."),
        ([], "list ()"),
        ("text", "it is a str"),
        ((IMAGES, LABELS[:3]), "The labels of 5 images should be 5 class numbers, but they are a Tensor (3,) int64"),
        ((IMAGES, LABELS.float()), "a Tensor (5,) float32. Give labels.long()."),
        ((IMAGES, LABELS + 0.5), "a Tensor (5,) float32."),
        ((IMAGES, torch.eye(5).long()), "a Tensor (5, 5) int64. Of one-hot labels give labels.argmax(-1)."),
        (
            (IMAGES, ["a", "b", "a", "c", "a"]),
            "Of names give the place of each in the backbone's order of classes: names.index(name).",
        ),
        ((IMAGES[:1], torch.eye(5)[:1]), "it is a Tensor (1, 5) float32. Of one-hot labels give labels.argmax(-1)."),
        ((IMAGES, ("cat",) * 5), "a tuple (str, str"),
    ],
)
def test_other_batches_are_refused_with_what_they_hold(batch, words):
    with pytest.raises(DataError, match=re.escape(words)):
        split_batch(batch)


def test_parts_of_a_data_set_are_not_the_same_images():
    whole = TensorDataset(torch.zeros(10, 3))
    one, other = random_split(whole, [5, 5], generator=seeded())
    assert not same_images(one, other)
    assert not same_images(DataLoader(one), DataLoader(other))
    assert not same_images(whole, one)
    assert same_images(DataLoader(one), one)
    assert same_images(whole, whole)
