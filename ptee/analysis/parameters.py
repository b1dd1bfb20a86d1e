"""How many parameters a network has. Their shares are what EENet's thesis calls cost, and far from those of the operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ptee.analysis.cut_points import random_images
from ptee.analysis.freezing import hooked


def number_of_parameters(module: nn.Module) -> int:
    """Including weight and bias of batch norms."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def parameter_shares(module: nn.Module, input_size: tuple[int, int, int]) -> dict[str, float]:
    """The share of a network's parameters that has been used when each of its modules ends, by name, in order of execution.

    `module` is in eval mode. A module that is called twice counts once, at its first call.
    """
    names = {part: name for name, part in module.named_modules()}
    seen: set[nn.Parameter] = set()
    used: dict[str, int] = {}

    def begin(part: nn.Module) -> None:
        seen.update(part.parameters(recurse=False))

    def end(name: str, _: Any) -> None:
        used.setdefault(name, sum(p.numel() for p in seen))

    with hooked(
        {part: partial(end, name) for part, name in names.items()}, {part: partial(begin, part) for part in names}
    ):
        module(random_images(module, 1, input_size))
    total = number_of_parameters(module)
    return {name: number / total for name, number in used.items()}
