"""A network's shadow: its structure without its numbers, to see what a large one does at the price of its shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

T = TypeVar("T")

HEAVY = 5e10  # multiply-accumulates of one pass above which the shadow is the faster of the two
PATCH = 16 * 16  # pixels that share the parameters, roughly: of a ViT's patch


def with_fake_tensors(work: Callable[[nn.Module, Tensor], T], module: nn.Module, images: Tensor) -> T:
    """Do something that needs shapes alone, on a shadow of the network if it is a heavy one that has a shadow.

    The shadow is a copy, so that what the network's code keeps for later is no shadow.

    Args:
        work: (network, images) -> what is wanted; may be done twice.
        module: the network.
        images: (b, c, h, w).
    """
    weight = sum(p.numel() for p in module.parameters()) * images.shape[-2:].numel() / PATCH * len(images)
    if weight > HEAVY:
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            tensors = [*module.parameters(), *module.buffers()]
            like = copy.deepcopy(module, {id(t): mode.from_tensor(t) for t in tensors})
            with mode:
                return work(like, mode.from_tensor(images))
        except Exception:  # it cannot be copied, or its code looks at numbers
            pass
    return work(module, images)
