"""The images of the demo: handwritten digits on canvases, most of them easy to read and some of them hard.

The digits are scikit-learn's, 1,797 real images of 8 x 8 pixels, so no connection is needed. Every digit belongs to one
part (train, calibration or validation), and everything on a canvas comes from digits of its part. The label of a canvas
is the one digit that is whole; the pieces of other digits around it are clutter. The same seed draws the same canvases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ptee.data.folders import Listing

DEMO = "demo"  # the name of the data source
SIDE = 28  # pixels of a canvas
HIGHEST = 16  # the brightest value in scikit-learn's digits
PARTS = ("train", "calibration", "validation")
DIGITS_SHARE = (0.6, 0.2, 0.2)  # of the digits, for each part
CANVASES = {"train": 4000, "calibration": 1200, "validation": 1200}


@dataclass(frozen=True)
class Hardness:
    """How hard a canvas is to read. Pairs are the ends of a range from which each canvas draws.

    Attributes:
        name: in a word.
        share: of the canvases.
        size: of the digit, in pixels a side.
        off_centre: how far the digit lies from the middle at most, as a share of the room there is.
        pieces: of other digits around it.
        contrast: brightness of the digit; 1 is white.
        noise: standard deviation, where white is 1.
    """

    name: str
    share: float
    size: tuple[int, int]
    off_centre: float
    pieces: tuple[int, int]
    contrast: tuple[float, float]
    noise: float


LEVELS = (
    Hardness("easy", 0.55, (19, 25), 0.3, (0, 0), (0.8, 1.0), 0.03),
    Hardness("medium", 0.25, (14, 19), 1.0, (1, 2), (0.7, 1.0), 0.06),
    Hardness("hard", 0.20, (11, 15), 1.0, (3, 5), (0.6, 0.9), 0.10),
)


def demo_listing(seed: int = 0) -> Listing:
    """The canvases of all parts.

    Args:
        seed: of the parts to which the digits belong, and of the canvases.
    """
    digits, labels = _digits()
    parts = {}
    for n, (part, own) in enumerate(zip(PARTS, _digits_of_parts(len(digits), seed), strict=True)):
        lots = np.random.default_rng((seed, n))
        parts[part] = [_canvas(digits[own], labels[own], i, lots) for i in range(CANVASES[part])]
    names = tuple(f"digit {k}" for k in range(10))  # not '0'..'9', which would be numbers of a backbone's classes
    return Listing(DEMO, parts, {part: part for part in PARTS}, names)


def hardness_of(index: int) -> Hardness:
    """The level of a canvas by its place in its part: as many of each level as its share says.

    Args:
        index: of the canvas.
    """
    place, reached = (index * 0.6180339887498949) % 1, 0.0
    for level in LEVELS:
        reached += level.share
        if place < reached:
            return level
    return LEVELS[-1]


def fingerprint(listing: Listing) -> str:
    """A hash of all pictures and labels: another rule, seed, or version of a library that draws otherwise has another.

    Args:
        listing: what `demo_listing` gave.
    """
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


def _digits_of_parts(n: int, seed: int) -> Sequence[np.ndarray[Any, Any]]:
    """Positions of the digits that belong to each part; no digit belongs to two."""
    order = np.random.default_rng(seed).permutation(n)
    ends = (np.cumsum(DIGITS_SHARE[:-1]) * n).astype(int)
    return np.split(order, ends)


def _canvas(digits: Any, labels: Any, index: int, lots: np.random.Generator) -> tuple[Image.Image, int]:
    """One canvas and its label. Digits take turns, so that every one is shown about as often as the others."""
    level, own = hardness_of(index), index % len(digits)
    canvas = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(lots.integers(level.pieces[0], level.pieces[1] + 1)):
        _add(canvas, _piece(digits, lots), 1.0, lots)
    size = int(lots.integers(level.size[0], level.size[1] + 1))
    digit = _enlarged(digits[own], size) * lots.uniform(*level.contrast)
    _add(canvas, digit, level.off_centre, lots)
    canvas += lots.normal(0, level.noise, canvas.shape)
    return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8)), int(labels[own])


def _piece(digits: Any, lots: np.random.Generator) -> Any:
    """A quarter of some digit, too little to be read as one, and dimmer than digits are."""
    top, left = lots.integers(0, 5, 2)
    quarter = digits[lots.integers(len(digits))][top : top + 4, left : left + 4]
    return _enlarged(quarter, int(lots.integers(5, 9))) * lots.uniform(0.3, 0.6)


def _enlarged(image: Any, size: int) -> Any:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)).clip(0, 1)


def _add(canvas: Any, image: Any, off_centre: float, lots: np.random.Generator) -> None:
    """Lay an image on a canvas; of two bright pixels the brighter one is seen."""
    room = SIDE - len(image)
    top, left = ((room / 2) * (1 + off_centre * lots.uniform(-1, 1, 2))).round().astype(int)
    place = canvas[top : top + len(image), left : left + len(image)]
    np.maximum(place, image, out=place)
