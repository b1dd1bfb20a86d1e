"""Small networks with a part that makes cut points difficult, and a few real ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from ptee.analysis.cut_points import Survey, survey

SIZE = (3, 16, 16)


class Net(nn.Module):
    """A convolution to (b, 8, 8, 8), the part under test, and a classifier."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.entry, self.part, self.classifier = nn.Conv2d(3, 8, 3, 2, 1), part, nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.part(self.entry(x)).mean((2, 3)))


class Applying(nn.Module):
    """A part that does what a function does."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def conv(c_in: int = 8, c_out: int = 8) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Two(nn.Module):
    """Two convolutions, with something of their own between or around them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = conv(), conv()


class InPlace(Two):
    """What `one` gave is overwritten after its hook."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x.relu_().mul_(-1)
        return self.two(x)


class Skip(Two):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class Cell(nn.Module):
    """Reads the outputs of the two cells before it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.one(x).relu() + self.two(before)


class Cells(nn.Module):
    """A chain of cells. Around each pass a row count, a mask of all rows, and the output of the cell before."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.classifier = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.cells = nn.ModuleList(Cell() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        rows, mask = len(x), x.new_ones(len(x), 1, 1, 1)
        before = x = self.entry(x)
        for cell in self.cells:
            before, x = x, (cell(x, before) * mask).view(rows, 8, 16, 16)
        return self.classifier(x.mean((2, 3)))


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


REAL_SIZE = (3, 32, 32)
REAL = {
    "resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "mobilenetv3_small_100": lambda: timm.create_model("mobilenetv3_small_100", num_classes=5),
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5),
    "swin_tiny": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 2), num_heads=(3, 6), num_classes=5
    ),
    "hrnet_w18_small": lambda: timm.create_model("hrnet_w18_small", num_classes=5),  # lists of tensors
}
each_network = pytest.mark.parametrize("name", REAL)


@functools.cache
def real(name: str) -> tuple[nn.Module, Survey]:
    torch.manual_seed(0)
    net = REAL[name]().eval()
    return net, survey(net, REAL_SIZE)
