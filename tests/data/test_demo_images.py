"""The canvases of the demo: the same ones for a seed, no digit in two parts, and the right label on each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ptee.data import demo_images
from ptee.data.demo_images import LEVELS, SIDE, demo_listing, fingerprint, hardness_of
from ptee.data.pictures import image_transform
from ptee.data.sources import open_data, open_named


@pytest.fixture(autouse=True)
def few_canvases(monkeypatch) -> None:
    monkeypatch.setattr(demo_images, "CANVASES", {"train": 60, "calibration": 50, "validation": 40})


def test_a_seed_always_draws_the_same_canvases():
    assert fingerprint(demo_listing(3)) == fingerprint(demo_listing(3)) != fingerprint(demo_listing(4))


def test_the_training_images_are_the_same_for_every_seed():
    one, other = (demo_listing(seed).parts for seed in (3, 4))
    same = {part: [p.tobytes() for p, _ in one[part]] == [p.tobytes() for p, _ in other[part]] for part in one}
    assert same == {"train": True, "calibration": False, "validation": False}


def test_a_canvas_is_a_grey_picture_of_the_size_that_the_demos_network_reads():
    picture, label = demo_listing().parts["train"][0]
    assert (picture.size, picture.mode, type(label)) == ((SIDE, SIDE), "L", int)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_digit_belongs_to_one_part(seed):
    parts = demo_images._digits_of_parts(1797, seed)
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(1797))


def test_a_canvas_shows_only_digits_of_its_part(monkeypatch):
    """If the digits of one part are white and all others black, only the canvases of that part are bright."""
    monkeypatch.setattr(demo_images, "LEVELS", tuple(level._replace(noise=0) for level in LEVELS))
    digits, labels = demo_images._digits()
    for n, part in enumerate(demo_images.PARTS):
        white = np.zeros_like(digits)
        white[demo_images._digits_of_parts(len(digits), 0)[n]] = 1
        monkeypatch.setattr(demo_images, "_digits", lambda white=white: (white, labels))
        bright = {name: {max(p.getextrema()) > 0 for p, _ in own} for name, own in demo_listing().parts.items()}
        assert bright == {name: {name == part} for name in demo_images.PARTS}


@pytest.mark.parametrize("level", LEVELS, ids=[level.name for level in LEVELS])
def test_the_label_of_a_canvas_is_that_of_the_whole_digit_on_it(level, monkeypatch):
    """Each digit is drawn in a grey level that tells its label, brighter than any clutter."""
    monkeypatch.setattr(demo_images, "LEVELS", (level._replace(noise=0, contrast=(1, 1)),))
    _, labels = demo_images._digits()
    grey = np.broadcast_to(((1 + labels) / 10).astype(np.float32)[:, None, None], (len(labels), 8, 8))
    monkeypatch.setattr(demo_images, "_digits", lambda: (grey, labels))
    monkeypatch.setattr(demo_images, "_piece", lambda *_: np.full((6, 6), 0.05, np.float32))
    for picture, label in demo_listing().parts["validation"]:
        assert round(picture.getextrema()[1] / 255 * 10) - 1 == label


@pytest.mark.parametrize("start", [0, 1000, 2345])
def test_any_hundred_canvases_have_each_level_with_its_share(start):
    names = [hardness_of(i).name for i in range(start, start + 100)]
    for level in LEVELS:
        assert names.count(level.name) == pytest.approx(100 * level.share, abs=3)


@pytest.mark.parametrize("find", [open_data, open_named])
def test_the_demo_is_a_data_source_with_three_parts(find):
    data = find("demo", transform=image_transform((1, SIDE, SIDE), (0,), (1,)), seed=5)
    assert data.split["sizes"] == {"train": 60, "calibration": 50, "validation": 40}
    assert data.split["rule"] == "split as delivered"  # so the seed does not matter
    assert data.train[0][0].shape == (1, SIDE, SIDE)
    assert data.class_names[3] == "digit 3"
    assert not data.mirror
