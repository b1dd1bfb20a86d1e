"""How many images it takes to show a loss at all."""

from __future__ import annotations

import math

from ptee._common.text import number_of

UNSEEN = 0.05  # chance that no image shows the loss that is allowed
ROUNDING = 1e-9  # of a number of images, which would be rounded up
LARGE = 0.01  # a loss that is worth a word if the images may not show it


def images_needed(limit: float, delta: float) -> int:
    """The fewest images with which a loss of at most this limit can be shown: if none of them loses anything.

        (1 - limit)^n <= delta

    >>> images_needed(0.01, 0.05)
    299
    """
    return math.ceil(math.log(delta) / math.log1p(-limit) - ROUNDING)


def least_limit(images: int, delta: float) -> float:
    """The smallest limit that so many images can show.

    >>> round(least_limit(299, 0.05), 4)
    0.01
    """
    return 1 - delta ** (1 / images)


def too_few(images: int, limit: float, kind: str = "image") -> str:
    """A sentence, if a loss as large as this limit may well not show on so many images; else empty.

    >>> too_few(5, 0.02)
    '5 images are too few to show a loss of 0.02 (that takes 149): expect to lose more on new ones.'
    """
    if not 0 < limit < 1 or images >= (needed := images_needed(limit, UNSEEN)):
        return ""
    few = number_of(images, kind, "is")
    return f"{few} too few to show a loss of {limit:g} (that takes {needed:,}): expect to lose more on new ones."


def too_few_for_cost(images: int) -> str:
    """A sentence, if the mean cost of so many images may well be far from that of new ones; else empty. An image costs 0 to about 1.

    >>> too_few_for_cost(40)
    '40 images are few to know a mean cost: on new ones it may be up to 0.15 higher.'
    """
    if images >= images_needed(LARGE, UNSEEN):
        return ""
    few = number_of(images, "image", "is")
    return f"{few} few to know a mean cost: on new ones it may be up to {1.96 * 0.5 / math.sqrt(images):.2g} higher."


def hidden(images: int) -> str:
    """A part of a sentence on which loss may not show on so many images, after a comma; empty if it is small.

    >>> hidden(5), hidden(299)
    (', on which a loss below 0.45 may not show', '')
    """
    least = least_limit(images, UNSEEN)
    return f", on which a loss below {least:.2g} may not show" if images < images_needed(LARGE, UNSEEN) else ""
