"""The images of the demo: handwritten digits on canvases, most of them easy to read and some of them hard.

The digits are scikit-learn's 1,797 real images of 8 x 8 pixels, so nothing is downloaded. Each digit belongs to one part
(train, calibration or validation), and a canvas shows only digits of its own part. The label of a canvas is the one digit
that is whole. The pieces of other digits around it are clutter. The same seed gives the same canvases.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ptee.data.folders import Listing
from ptee.data.splits import PARTS

DEMO = "demo"  # the name of the data source
SIDE = 28  # pixels of a canvas
HIGHEST = 16  # the brightest value in scikit-learn's digits
DIGITS_SHARE = (0.6, 0.2, 0.2)  # of the digits, for each part
CANVASES = {"train": 4000, "calibration": 1200, "validation": 1200}


class Hardness(NamedTuple):
    """How hard a canvas is to read. Where a field is a pair, each canvas draws a value from this range."""

    name: str
    share: float  # of the canvases
    size: tuple[int, int]  # of the digit, in pixels a side
    off_centre: float  # the largest distance from the middle, as a share of the free space
    pieces: tuple[int, int]  # of other digits
    contrast: tuple[float, float]  # brightness of the digit; 1 is white
    noise: float  # standard deviation, where white is 1


LEVELS = (
    Hardness("easy", 0.55, (19, 25), 0.3, (0, 0), (0.8, 1.0), 0.03),
    Hardness("medium", 0.25, (14, 19), 1.0, (1, 2), (0.7, 1.0), 0.06),
    Hardness("hard", 0.20, (11, 15), 1.0, (3, 5), (0.6, 0.9), 0.10),
)


def demo_listing(seed: int = 0) -> Listing:
    """The canvases of all parts. The seed draws the digits of the calibration and validation images, and their canvases.

    The training images are the same for every seed, because the demo's network has learned from them.
    """
    digits, labels = _digits()
    parts = {}
    for n, (part, own) in enumerate(zip(PARTS, _digits_of_parts(len(digits), seed), strict=True)):
        generator = np.random.default_rng((0 if part == "train" else seed, n))
        parts[part] = [_canvas(digits[own], labels[own], i, generator) for i in range(CANVASES[part])]
    names = tuple(f"digit {k}" for k in range(10))  # '0'..'9' would be taken for numbers of a backbone's classes
    return Listing(DEMO, parts, {part: part for part in PARTS}, names)


def hardness_of(index: int) -> Hardness:
    """The level of canvas number `index`. The levels are spread evenly, each with its share."""
    place, end = (index * 0.6180339887498949) % 1, 0.0  # multiples of the golden ratio are spread evenly
    for level in LEVELS:
        end += level.share
        if place < end:
            return level
    return LEVELS[-1]


def fingerprint(listing: Listing) -> str:
    """A hash of all pictures and labels. It changes if a library of another version draws other pictures."""
    found = hashlib.sha256()
    for part in listing.parts.values():
        for picture, label in part:
            found.update(picture.tobytes() + bytes([label]))
    return found.hexdigest()


def _digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(n, 8, 8) with values from 0 to 1, and (n,) labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / HIGHEST).astype(np.float32), found.target


def _digits_of_parts(n: int, seed: int) -> list[np.ndarray[Any, Any]]:
    """The positions of the digits that belong to each part."""
    order = np.random.default_rng(0).permutation(n)
    end, middle = (np.cumsum(DIGITS_SHARE[:-1]) * n).astype(int)
    if seed:
        order[end:] = np.random.default_rng(seed).permutation(order[end:])
    return np.split(order, [end, middle])


def _canvas(digits: Any, labels: Any, index: int, generator: np.random.Generator) -> tuple[Image.Image, int]:
    """One canvas and its label. The digits take turns, so each is shown about equally often."""
    level, own = hardness_of(index), index % len(digits)
    canvas = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(generator.integers(level.pieces[0], level.pieces[1] + 1)):
        _add(canvas, _piece(digits, generator), 1.0, generator)
    size = int(generator.integers(level.size[0], level.size[1] + 1))
    digit = _enlarged(digits[own], size) * generator.uniform(*level.contrast)
    _add(canvas, digit, level.off_centre, generator)
    canvas += generator.normal(0, level.noise, canvas.shape)
    return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8)), int(labels[own])


def _piece(digits: Any, generator: np.random.Generator) -> Any:
    """A quarter of some digit, dimmer than whole digits."""
    top, left = generator.integers(0, 5, 2)
    quarter = digits[generator.integers(len(digits))][top : top + 4, left : left + 4]
    return _enlarged(quarter, int(generator.integers(5, 9))) * generator.uniform(0.3, 0.6)


def _enlarged(image: Any, size: int) -> Any:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def _add(canvas: Any, image: Any, off_centre: float, generator: np.random.Generator) -> None:
    """Draw an image on a canvas. Where both have a bright pixel, the brighter one stays."""
    room = SIDE - len(image)
    top, left = ((room / 2) * (1 + off_centre * generator.uniform(-1, 1, 2))).round().astype(int)
    place = canvas[top : top + len(image), left : left + len(image)]
    np.maximum(place, image, out=place)
