"""More training data out of what the heads read: feature maps shifted, samples mixed. No image is read for it.

Both treat all heads alike, as one image would that was moved or blended: a displacement is in pixels of the input, and
partners and weights of a mixture are the same at every exit. Only maps (b, c, h, w) are shifted; tokens that a head reads
as a grid are such maps, and vectors have no place to be shifted to.

Source: Zhang et al., mixup: Beyond empirical risk minimization, ICLR 2018, here of features and targets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Mixture(NamedTuple):
    """Who is mixed with whom.

    Attributes:
        partner: (b,) number of each sample's partner.
        weight: (b,) of the sample itself, one half at least, so that a mixture is still mostly itself.
    """

    partner: Tensor
    weight: Tensor


def displacements(b: int, most: int, lots: torch.Generator | None = None) -> Tensor:
    """(b, 2) whole pixels of the input, down and to the right, each from -most to most, all as likely.

    Args:
        b: number of samples.
        most: the largest displacement.
        lots: where random numbers come from; None for torch's own.
    """
    return torch.randint(-most, most + 1, (b, 2), generator=lots)


def shift(x: Tensor, by: Tensor, size: tuple[int, int]) -> Tensor:
    """Feature maps moved by the nearest whole number of their positions; zeros come in. Anything else as it is.

    Args:
        x: (b, c, h, w), or (b, F).
        by: (b, 2) pixels of the input, down and to the right.
        size: (h, w) of the input.
    """
    if x.dim() != 4:
        return x
    h, w = x.shape[2:]
    strides = torch.tensor([size[0] / h, size[1] / w])
    places = (by / strides).round().long()
    if not places.any():
        return x
    down, right = places.to(x.device).unbind(1)
    rows = torch.arange(h, device=x.device) - down[:, None]  # (b, h) where each row comes from
    columns = torch.arange(w, device=x.device) - right[:, None]  # (b, w)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None]  # (b, h, w)
    source = (rows.clamp(0, h - 1) * w)[:, :, None] + columns.clamp(0, w - 1)[:, None]  # (b, h, w)
    moved = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
    return moved.masked_fill(~inside[:, None], 0)


def mixture(b: int, alpha: float, lots: torch.Generator | None = None) -> Mixture:
    """A partner for each sample, and a weight from Beta(alpha, alpha), turned round where it is below one half.

    Args:
        b: number of samples.
        alpha: 0.2 mixes little, 1 evenly.
        lots: where random numbers come from; None for torch's own.
    """
    seed = int(torch.randint(2**31, (), generator=lots))  # torch's own Beta takes no generator
    weight = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, b)).float()
    return Mixture(torch.randperm(b, generator=lots), torch.maximum(weight, 1 - weight))


def mix(x: Tensor, how: Mixture) -> Tensor:
    """Each row with its partner's.

    Args:
        x: (b, ...) of floats.
        how: partners and weights.
    """
    weight = how.weight.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))
    return weight * x + (1 - weight) * x[how.partner.to(x.device)]


def as_probabilities(target: Tensor, classes: int) -> Tensor:
    """(b, K) of labels (b,); probabilities as they are.

    Args:
        target: (b,) int64, or (b, K).
        classes: K.
    """
    return target if target.dim() == 2 else F.one_hot(target, classes).float()
