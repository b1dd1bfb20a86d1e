"""Fake runs: a forward pass of a large network in which only shapes are computed, no values.

torch's fake tensors have a shape, a type and a device, but no values, so an operator on them costs next to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

T = TypeVar("T")

HEAVY = 5e10  # multiply-accumulates of one pass above which a fake run is faster than a real one
PATCH = 16 * 16  # pixels of a patch of a ViT; each patch uses all parameters once


def with_fake_tensors(work: Callable[[nn.Module, Tensor], T], module: nn.Module, images: Tensor) -> T:
    """Do work that needs only shapes: on a fake copy of the network if the network is heavy, else on the network itself.

    Nothing fake stays in the network, even if its code keeps a tensor for later. If the fake run fails, the work is done
    once more on the network itself.
    """
    macs = sum(p.numel() for p in module.parameters()) * images.shape[-2:].numel() / PATCH * len(images)
    if macs > HEAVY:
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            tensors = [*module.parameters(), *module.buffers()]
            fake = copy.deepcopy(module, {id(t): mode.from_tensor(t) for t in tensors})
            with mode:
                return work(fake, mode.from_tensor(images))
        except Exception:  # the network cannot be copied, or its code looks at values
            pass
    return work(module, images)
