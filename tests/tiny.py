"""A small classifier, and the files of weights that trainers make of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import Tensor, nn

from ptee._common.process import own_random_numbers
from ptee.backbones.weights import weights_hash


class Tiny(nn.Module):
    """A user's own classifier, with parts that tell eval mode from training and one frozen layer."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)
        self.conv.weight.requires_grad_(False)
        self.bn.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with something in front of every name."""
    return {prefix + key: value for key, value in state.items()}


def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with other numbers."""
    return {key: value + 1 for key, value in state.items()}


def fresh(num_classes: int = 4) -> Tiny:
    """The classifier with other random numbers than that of the same test."""
    with own_random_numbers(99):
        return Tiny(num_classes)


class RunsCodeWhenUnpickled:
    """Makes a folder when a pickle of it is read as code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def one_line(refusal: pytest.ExceptionInfo) -> str:
    """The text of an error, which has one line."""
    text = str(refusal.value)
    assert "\n" not in text
    return text


def as_it_was(module: nn.Module) -> tuple:
    """What must not change of a module that is only looked at."""
    return (
        [p.requires_grad for p in module.parameters()],
        [m.training for m in module.modules()],
        weights_hash(module),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    )
