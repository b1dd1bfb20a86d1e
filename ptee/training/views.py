"""Views: a data set whose images are seen from several sides, one of them in each epoch, all of them in a cache.

A view is made of the prepared tensor (c, h, w), which is what any data set gives, behind its own transforms. View 0 is the
image as it is, view 1 its mirror image, the others are cut out of the padded image at random and mirrored or not. What a
view shows depends on its number, the sample and the seed alone, so it is the same whenever and wherever it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

PADDED_PART = 8  # an image is padded by an eighth of its side, as CIFAR's usual 4 of 32 pixels
PRIME = 1_000_003


class Views(Dataset[Any]):
    """A map-style data set seen from one side of each sample, drawn anew for each epoch.

    Args:
        data: of images (c, h, w), alone or with a label in a pair or a mapping.
        views: how many each image has.
        seed: of what the views show, and of which is drawn.
        mirror: whether a mirror image shows the same class. If not, view 1 is a shifted one like the others.
    """

    def __init__(self, data: Any, views: int, *, seed: int = 0, mirror: bool = True) -> None:
        self.data, self.views, self.seed, self.mirror = data, views, seed, mirror
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Draw each sample's view for an epoch of this number."""
        self.drawn = draw(len(self.data), self.views, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.see(index, int(self.drawn[index]))

    def see(self, index: int, number: int) -> Any:
        """One sample in its view of this number."""
        lots = torch.Generator().manual_seed(((self.seed * PRIME + index) * PRIME + number) % 2**63)
        return _with_image(self.data[index], lambda image: view(image, number, lots, mirror=self.mirror))


class EveryView(Dataset[Any]):
    """All views of all samples: view 0 of each, then view 1 of each, and so on. For the cache.

    Args:
        of: the data set with views.
    """

    def __init__(self, of: Views) -> None:
        self.of = of

    def __len__(self) -> int:
        return len(self.of) * self.of.views

    def __getitem__(self, index: int) -> Any:
        number, sample = divmod(index, len(self.of))
        return self.of.see(sample, number)


def draw(samples: int, views: int, seed: int, epoch: int) -> Tensor:
    """(samples,) the number of each sample's view in an epoch.

    Args:
        samples: how many there are.
        views: how many each has.
        seed: of the training.
        epoch: its number.
    """
    lots = torch.Generator().manual_seed(seed * PRIME + epoch)
    return torch.randint(views, (samples,), generator=lots)


def view(image: Tensor, number: int, lots: torch.Generator, *, mirror: bool = True) -> Tensor:
    """One view of an image.

    Args:
        image: (c, h, w), prepared for the backbone.
        number: 0 for the image as it is, 1 for its mirror image, any other for one at random.
        lots: where the random numbers come from.
        mirror: whether mirror images are views.
    """
    from torchvision.transforms.v2 import functional

    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor) or number == 0:  # what is neither is refused where batches are made
        return image
    if number == 1 and mirror:
        return functional.horizontal_flip(image)
    height, width = image.shape[-2:]
    down, right = (min(max(1, side // PADDED_PART), side - 1) for side in (height, width))
    padded = functional.pad(image, [right, down, right, down], padding_mode="reflect")
    top, left = (int(torch.randint(2 * most + 1, (), generator=lots)) for most in (down, right))
    image = functional.crop(padded, top, left, height, width)
    turned = mirror and bool(torch.randint(2, (), generator=lots))
    return functional.horizontal_flip(image) if turned else image


def _with_image(sample: Any, change: Any) -> Any:
    """The sample with its image changed: it is the image, or has it in front or under a name."""
    if isinstance(sample, Mapping):
        name = next((key for key in ("image", "images", "pixel_values") if key in sample), None)
        return sample if name is None else {**sample, name: change(sample[name])}
    if isinstance(sample, (tuple, list)) and sample:
        return [change(sample[0]), *sample[1:]]
    return change(sample)
