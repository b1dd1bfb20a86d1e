"""Residual heads: small residual networks, as large as a budget allows.

`res-32x2-64x2` has two stages of two residual blocks each, with 32 and 64 channels. Each stage halves the sides of the map;
a stage `16x3s1` keeps them. The head `auto` is such a network; its size is chosen when the exits are planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from ptee.exits.head_spec import RESIDUAL, HeadSpec, Stage

Shape = tuple[int, int, int]  # (c, h, w) of a map

SMALLEST_SIDE = 4  # positions; a map of that side is not halved again
MAX_BLOCKS = 4  # of a stage
MIN_CHANNELS, USUAL_CHANNELS, MAX_CHANNELS = 8, 128, 256


class _Block(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        size = _kernel_size(stride)
        self.conv1 = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around: nn.Module = nn.Identity()  # saved runs have this name
        if stride > 1 or channels != width:
            mean = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.around = nn.Sequential(mean, nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.around(x)).relu()


def _kernel_size(stride: int) -> int:
    """Odd, and large enough that no position is skipped."""
    return max(3, stride + 1 - stride % 2)


class ResidualFeatures(nn.Module):
    """The layers of a residual head: batch norm, residual blocks, global average pool. `channels` are those of the map."""

    def __init__(self, stages: Sequence[Stage], channels: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        width = channels
        for stage in stages:
            for n in range(stage.blocks):
                blocks.append(_Block(width, stage.channels, stage.stride if n == 0 else 1))
                width = stage.channels
        self.entry = nn.Sequential(nn.BatchNorm2d(channels), blocks[0])
        self.rest = nn.Sequential(*blocks[1:])

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, channels of the last stage)."""
        if not is_batchedtensor(x):  # of torch.func.vmap, which knows no such formats
            x = x.contiguous(memory_format=torch.channels_last)  # in which convolutions are fastest
        return self.rest(self.entry(x)).mean((2, 3))


def residual_macs(stages: Sequence[Stage], shape: Shape, classes: int) -> int:
    """Multiply-accumulates of a residual head's convolutions and linear layers for one map."""
    channels, height, width = shape
    total = 0
    for stage in stages:
        height, width = -(-height // stage.stride), -(-width // stage.stride)
        wide = stage.channels
        weights = wide * channels * _kernel_size(stage.stride) ** 2 + 9 * wide**2 * (2 * stage.blocks - 1)
        if stage.stride > 1 or channels != wide:
            weights += wide * channels  # of the shortcut
        total += height * width * weights
        channels = wide
    return total + channels * (classes + 1)


# ---------------------------------------------------------------------------------------------------- sizes


def sized(spec: HeadSpec, shape: Shape, max_macs: float, classes: int) -> HeadSpec:
    """The residual head that costs `max_macs` at most, in place of "auto"; a pool head if none is so small.

    Wide first, up to what is usual for the map, then deep, then wider.
    """
    for strides in _strides(shape):
        fitting = [stages for stages in _stages(strides) if residual_macs(stages, shape, classes) <= max_macs]
        if fitting:
            widest = max(shape[0], 2 * MIN_CHANNELS) * 2 ** len(strides)  # an image has three channels of its own
            usual = min(USUAL_CHANNELS, widest)
            best = max(fitting, key=lambda stages: _size(stages[-1], usual))
            return HeadSpec(RESIDUAL, best, spec.builds_on_previous)
    return HeadSpec("pool", (), spec.builds_on_previous)


def _size(last: Stage, usual: int) -> tuple[int, int, int]:
    return min(last.channels, usual), last.blocks, last.channels


def _stages(strides: Sequence[int]) -> Iterator[tuple[Stage, ...]]:
    """Stages of these strides, each twice as wide as the one before; all widths and depths."""
    doublings = len(strides) - 1
    step = MIN_CHANNELS << doublings
    for width in range(step, MAX_CHANNELS + 1, step):
        for blocks in range(1, MAX_BLOCKS + 1):
            yield tuple(Stage(width >> (doublings - i), blocks, stride) for i, stride in enumerate(strides))


def _strides(shape: Shape) -> list[list[int]]:
    """Strides of the stages, best first: halve the map until it is small, or get there in fewer and larger steps."""
    side, halvings = min(shape[1:]), 0
    while side > SMALLEST_SIDE:
        side, halvings = -(-side // 2), halvings + 1
    return [[2 ** (1 + skipped), *[2] * (halvings - 1 - skipped)] for skipped in range(min(halvings, 4))] or [[1]]
