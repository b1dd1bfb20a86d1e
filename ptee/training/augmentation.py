"""Augmentation: views of the images, and random shifts of the feature maps that the heads read.

A view is made of the image tensor (c, h, w), after the data set's own transforms. View 0 is the image itself, view 1 its mirror
image; the others are random crops of the padded image, mirrored or not. What a view shows depends only on its number, the sample
and the seed. Each epoch draws one view of each image; a cache holds all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ptee._common.errors import Argument, PteeError
from ptee.data.batches import image_key
from ptee.data.named import holds_sided
from ptee.model.early_exit import EarlyExitModel
from ptee.training.config import JOINT, TrainingConfig, shift_for

PADDED_PART = 8  # an image is padded by an eighth of its side, as CIFAR's usual 4 of 32 pixels
PRIME = 1_000_003


class Views(Dataset[Any]):
    """A map-style data set with one view of each sample, drawn in each epoch.

    Args:
        data: of images (c, h, w), alone or with a label in a pair or a mapping.
        views: number of views of each image.
        seed: decides what the views show, and which one an epoch draws.
        mirror: a mirror image shows the same class. If not, view 1 is a random crop like the others.
    """

    def __init__(self, data: Any, views: int, *, seed: int = 0, mirror: bool = True) -> None:
        self.data, self.views, self.seed, self.mirror = data, views, seed, mirror
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Draw the view of each sample for the epoch of this number."""
        self.drawn = draw_views(len(self.data), self.views, self.seed, epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.sample(index, int(self.drawn[index]))

    def sample(self, index: int, number: int, look: Callable[[int, Any], None] | None = None) -> Any:
        """One sample in its view of this number. `look` is called with its index and its image before that."""
        generator = torch.Generator().manual_seed(((self.seed * PRIME + index) * PRIME + number) % 2**63)

        def view(image: Any) -> Any:
            if look is not None:
                look(index, image)
            return make_view(image, number, generator, mirror=self.mirror)

        return _with_image(self.data[index], view)


class AllViews(Dataset[Any]):
    """View 0 of all samples, then view 1 of all samples, and so on. For the cache.

    `changes` becomes true where an image is another one when it is read for another view.
    """

    def __init__(self, data: Views) -> None:
        self.data = data
        # In memory that the processes of a loader share: 1 more than the checksum of each image, 0 where none was read.
        self.checksums = torch.zeros(len(data), dtype=torch.int64, device="cpu").share_memory_()
        self.changes = torch.zeros((), dtype=torch.bool, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.data) * self.data.views

    def __getitem__(self, index: int) -> Any:
        number, sample = divmod(index, len(self.data))
        return self.data.sample(sample, number, self._compare)

    def _compare(self, index: int, image: Any) -> None:
        if isinstance(image, Tensor):
            image = image.detach().cpu().contiguous().view(torch.uint8).numpy()
        if isinstance(image, np.ndarray):  # anything else is refused when batches are made
            before, now = int(self.checksums[index]), 1 + crc32(np.ascontiguousarray(image).data)
            if before and before != now:
                self.changes.fill_(True)
            self.checksums[index] = now


def draw_views(samples: int, views: int, seed: int, epoch: int) -> Tensor:
    """(samples,) the view of each sample in an epoch, 0..views-1."""
    generator = torch.Generator().manual_seed(seed * PRIME + epoch)
    return torch.randint(views, (samples,), generator=generator, device="cpu")


def make_view(image: Tensor, number: int, generator: torch.Generator, *, mirror: bool = True) -> Tensor:
    """The view of this number of an image (c, h, w)."""
    from torchvision.transforms.v2 import functional

    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor) or number == 0:  # anything else is refused when batches are made
        return image
    if number == 1 and mirror:
        return functional.horizontal_flip(image)
    cropped = _random_crop(image, generator)
    flip = mirror and bool(torch.randint(2, (), generator=generator, device="cpu"))
    return functional.horizontal_flip(cropped) if flip else cropped


def _random_crop(image: Tensor, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    height, width = image.shape[-2:]
    down, right = (min(max(1, side // PADDED_PART), side - 1) for side in (height, width))
    padded = functional.pad(image, [right, down, right, down], padding_mode="reflect")
    top, left = (int(torch.randint(2 * limit + 1, (), generator=generator, device="cpu")) for limit in (down, right))
    return functional.crop(padded, top, left, height, width)


def _with_image(sample: Any, change: Callable[[Any], Any]) -> Any:
    """The sample with its image changed: the image is the sample, its first item, or has a name in it."""
    if isinstance(sample, Mapping):
        name = image_key(sample)
        return sample if name is None else {**sample, name: change(sample[name])}
    if isinstance(sample, (tuple, list)) and sample:
        return [change(sample[0]), *sample[1:]]
    return change(sample)


def resolved_mirror(config: TrainingConfig, data: Any) -> bool:
    """Whether mirror images are shown: never of data sets that are known to be of digits, letters or signs."""
    return config.mirror and not holds_sided(data)


def resolved_shift(config: TrainingConfig, model: EarlyExitModel) -> int:
    """How many pixels of the input maps are shifted by at most, also if the config says "auto". A PteeError if this model cannot."""
    if config.shift == 0:
        return 0
    if config.shift == "auto" and config.backbone == JOINT:
        return 0  # its maps are its own to learn
    maps, size = _reads_maps(model), model.plan.input_size
    if config.shift == "auto":
        return shift_for(size) if maps else 0
    given = Argument("shift", str(config.shift))
    if not maps:
        text = f" moves feature maps, but {model.plan.head!r} heads read pooled vectors. Take other heads, such as 'conv1', or "
        raise PteeError(given, text, Argument("shift", "0"), ".", value=config.shift)
    if config.shift >= min(size[1:]):
        text = f" moves images of {size[1]} x {size[2]} pixels out of sight. Give fewer, such as "
        raise PteeError(given, text, Argument("shift", str(shift_for(size))), ".", value=config.shift)
    return config.shift


@torch.no_grad()
def _reads_maps(model: EarlyExitModel) -> bool:
    """Whether some head learns from a map (b, c, h, w), which can be shifted."""
    reading = model.eval().read(model.prepared(torch.zeros(2, *model.plan.input_size, device="cpu")))
    return any(x.dim() == 4 for x in reading.inputs)


def draw_shifts(b: int, max_shift: int) -> Tensor:
    """(b, 2) pixels of the input, down and to the right; each number from -max_shift to max_shift is equally likely."""
    return torch.randint(-max_shift, max_shift + 1, (b, 2), device="cpu")


def shift_maps(x: Tensor, pixels: Tensor, input_size: tuple[int, int]) -> Tensor:
    """Feature maps (b, c, h, w) shifted by the nearest whole number of positions, with zeros at the edge. Vectors stay.

    `pixels` (b, 2) are those of the input of size (h, w), down and to the right.
    """
    if x.dim() != 4:
        return x
    h, w = x.shape[2:]
    strides = torch.tensor([input_size[0] / h, input_size[1] / w], dtype=torch.float32, device=pixels.device)
    positions = (pixels / strides).round().long()
    if not positions.any():
        return x
    down, right = positions.to(x.device).unbind(1)
    rows = torch.arange(h, device=x.device) - down[:, None]  # (b, h) where each row comes from
    columns = torch.arange(w, device=x.device) - right[:, None]  # (b, w)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None]  # (b, h, w)
    source = (rows.clamp(0, h - 1) * w)[:, :, None] + columns.clamp(0, w - 1)[:, None]  # (b, h, w)
    shifted = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return shifted.masked_fill(~inside[:, None], 0)
