"""Blocks: they are found in networks of many kinds from the structure alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import timm
import torch
import torchvision
from cases import slow
from torch import Tensor, nn

from ptee.analysis.blocks import blocks
from ptee.analysis.cut_points import Survey, random_images, survey
from ptee.analysis.macs import Counts, count


@dataclass
class Kind:
    """A network, its input, and the classes of its units."""

    make: Callable[[], nn.Module]
    size: tuple[int, int, int]
    units: tuple[str, ...]
    stem: tuple[str, ...] = ()  # what stands before the first block
    between: tuple[str, ...] = ()  # classes of modules between units that may end a block too


def cnn() -> nn.Module:
    """A user's plain network: convolutions, batch norms, pools."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5))


def mlp() -> nn.Module:
    """A user's network on flattened images."""
    widths = (192, 64, 64, 32, 32)
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(32, 5))


TIMM = functools.partial(functools.partial, timm.create_model, num_classes=5)  # a name -> what makes it
TORCHVISION = torchvision.models
NETS = {
    "resnet18": Kind(TIMM("resnet18"), (3, 64, 64), ("BasicBlock",), ("conv1", "bn1", "act1", "maxpool")),
    "resnet50d": Kind(TIMM("resnet50d"), (3, 64, 64), ("Bottleneck",), ("conv1", "bn1", "act1", "maxpool")),
    "vgg11_bn": Kind(
        functools.partial(TORCHVISION.vgg11_bn, init_weights=False, num_classes=5), (3, 32, 32), ("Conv2d",),
        ("features.0", "features.1", "features.2", "features.3"), ("MaxPool2d", "ReLU", "AdaptiveAvgPool2d"),
    ),
    "mobilenet_v2": Kind(TORCHVISION.mobilenet_v2, (3, 64, 64), ("InvertedResidual",), ("features.0",)),
    "vit_tiny": Kind(
        TIMM("vit_tiny_patch16_224", img_size=64, depth=4), (3, 64, 64), ("Block",), ("patch_embed", "norm_pre")
    ),
    "swin_tiny": Kind(
        TIMM("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 4, 2), num_heads=(3, 6, 12)),
        (3, 64, 64), ("SwinTransformerBlock",), ("patch_embed",), ("PatchMerging",),
    ),
    "convnext_atto": Kind(TIMM("convnext_atto"), (3, 64, 64), ("ConvNeXtBlock",), ("stem",), ("Sequential",)),
    "densenet121": Kind(
        TIMM("densenet121"), (3, 64, 64), ("DenseBlock",), ("features.conv0", "features.norm0", "features.pool0"),
        ("DenseTransition",),
    ),
    "regnet_y_400mf": Kind(TORCHVISION.regnet_y_400mf, (3, 64, 64), ("ResBottleneckBlock",), ("stem",)),
    "squeezenet1_1": Kind(TORCHVISION.squeezenet1_1, (3, 64, 64), ("Fire",), ("features.0", "features.1", "features.2")),
    "cifar_resnet20": Kind(lambda: cifar(20), (3, 32, 32), ("BasicBlock",), ("conv1", "bn1")),
    "a user's CNN": Kind(cnn, (3, 16, 16), ("Conv2d",), ("0", "1", "2", "3"), ("MaxPool2d", "Flatten")),
    "a user's MLP": Kind(mlp, (3, 8, 8), ("Linear",), ("0", "1", "2"), ("ReLU",)),
}  # fmt: skip
SLOW = ("densenet121", "regnet_y_400mf")
each_network = pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in NETS])
# their convolutions or linear layers stand alone, and a block ends with what follows each: activation, pool
PLAIN = ("vgg11_bn", "a user's CNN", "a user's MLP")


def cifar(depth: int) -> nn.Module:
    from ptee.backbones.cifar_resnet import CifarResNet

    return CifarResNet(depth)


@dataclass
class Found:
    module: nn.Module
    survey: Survey
    counts: Counts
    blocks: list[str]

    def named(self, *classes: str) -> list[str]:
        """The modules of these classes, by name, in order."""
        return [name for name, m in self.module.named_modules() if type(m).__name__ in classes]


def find(module: nn.Module, size: tuple[int, int, int]) -> Found:
    found, counts = survey(module.eval(), size), count(module, random_images(module, 1, size))
    return Found(module, found, counts, blocks(module, found, counts))


@functools.cache
def found(name: str) -> Found:
    torch.manual_seed(0)
    return find(NETS[name].make(), NETS[name].size)


@each_network
def test_blocks_end_at_cut_points_each_with_layers_and_costs_of_its_own(name):
    f = found(name)
    assert f.blocks
    assert set(f.blocks) <= set(f.survey.cuts)
    for counts in (f.counts.products_until, f.counts.until):
        assert all(counts[one] < counts[two] for one, two in pairwise(f.blocks))


@each_network
def test_no_block_is_in_the_stem_inside_a_unit_or_the_classifier(name):
    f, kind = found(name), NETS[name]
    assert not set(f.blocks) & set(kind.stem)
    outer = (*kind.stem, *f.named(*kind.units))
    assert not [block for block in f.blocks if any(block.startswith(f"{name}.") for name in outer)]
    assert f.counts.products_until[f.blocks[-1]] < f.counts.products_until[""]


@pytest.mark.parametrize("name", [name for name in NETS if name not in PLAIN])
def test_a_block_ends_after_every_unit_and_otherwise_only_between_units(name):
    f, kind = found(name), NETS[name]
    assert [b for b in f.blocks if b in f.named(*kind.units)] == f.named(*kind.units)
    assert set(f.blocks) <= set(f.named(*kind.units, *kind.between))


@pytest.mark.parametrize(("name", "count"), [("vgg11_bn", 9), ("a user's CNN", 3), ("a user's MLP", 3)])
def test_in_a_plain_network_a_block_ends_after_every_layer_but_the_first_and_the_last(name, count):
    f, kind = found(name), NETS[name]
    assert len(f.blocks) == count
    assert not set(f.blocks) & set(f.named(*kind.units, "BatchNorm2d")), (
        "activation and pool belong to the layer before"
    )
    assert [f.counts.products_until[b] for b in f.blocks] == list(range(2, 2 + count))


# ---------------------------------------------------------------------------------------------------- wrapped networks


class Wrapped(nn.Module):
    """A wrapper that a user writes around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x * 2 - 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "vit_tiny", "squeezenet1_1"])
def test_a_wrapped_network_has_the_same_blocks(name):
    wrapped = find(Wrapped(found(name).module), NETS[name].size)
    assert wrapped.blocks == [f"net.{block}" for block in found(name).blocks]


# ---------------------------------------------------------------------------------------------------- small cases


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x).relu())


def test_a_stage_is_divided_into_its_blocks():
    stages = [nn.Sequential(Residual(), Residual()), nn.Sequential(Residual())]
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *stages, nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find(net, (3, 8, 8)).blocks == ["1.0", "1.1", "2.0"]


class OtherResidual(Residual):
    pass


def test_a_stem_of_several_layers_is_no_block_even_if_all_blocks_have_different_classes():
    stem = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    net = nn.Sequential(stem, nn.Sequential(Residual(), OtherResidual()), nn.Conv2d(8, 5, 8), nn.Flatten())
    assert find(net, (3, 8, 8)).blocks == ["1.0", "1.1"]


def test_a_stem_of_several_layers_behind_a_first_layer_is_no_block_either():
    stem = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), stem, nn.Sequential(Residual(), Residual()), nn.Conv2d(8, 5, 8), nn.Flatten()
    )
    assert find(net, (3, 8, 8)).blocks == ["2.0", "2.1"]


class Skips(nn.Module):
    """Two levels, in which one convolution ends what another one adds, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.fc = nn.Conv2d(3, 8, 3, padding=1), Residual(), nn.Linear(8, 5)
        self.levels = nn.ModuleList(nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for one, end in self.levels:
            x = end(x + one(x))
        return self.fc(self.block(x).mean((2, 3)))


class Levels(nn.Module):
    """Two levels of three branches, each with one convolution as its end, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.fc = nn.Conv2d(3, 8, 3, padding=1), Residual(), nn.Linear(8, 5)
        self.levels = nn.ModuleList(nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for one, two, three, end in self.levels:
            x = end(one(x) + two(x) * three(x))
        return self.fc(self.block(x).mean((2, 3)))


@pytest.mark.parametrize(("kind", "end"), [(Levels, 3), (Skips, 1)])
def test_a_layer_at_the_end_of_others_ends_a_block_even_before_the_first_block_of_one_module(kind, end):
    assert find(kind(), (3, 8, 8)).blocks == [f"levels.0.{end}", f"levels.1.{end}", "block"]


def test_an_activation_after_a_block_is_not_the_end_of_the_block():
    blocks = (Residual(), nn.ReLU(), Residual(), nn.ReLU())
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 5, 8), nn.Flatten())
    assert find(net, (3, 8, 8)).blocks == ["1", "3"]


def test_a_network_of_one_layer_has_no_block():
    assert find(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)).blocks == []


@pytest.mark.parametrize("places", [(3,), (0, 1), (1, 2), (0, 1, 2, 3)], ids=str)
def test_an_identity_between_blocks_is_no_block_of_its_own(places):
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 1)]
    for n in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), *([nn.Identity()] if n in places else [])]
    net = nn.Sequential(*layers, nn.Conv2d(8, 5, 8), nn.Flatten())
    f = find(net, (3, 8, 8))
    order = list(f.survey.cuts)
    assert len(f.blocks) == 4
    assert f.blocks == sorted(f.blocks, key=order.index)


class TwoStreams(nn.Module):
    """Its only cut point is its end."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList(nn.Linear(6, 6) for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        left = right = x.flatten(1)[:, :6]
        for one, two in zip(self.left, self.right, strict=True):
            left, right = one(left), two(right)
        return self.head(torch.cat([left, right], 1))


def test_a_network_without_cut_points_before_its_end_has_no_block():
    assert find(TwoStreams(), (3, 2, 2)).blocks == []
