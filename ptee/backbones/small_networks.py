"""Networks for small images beside the 6n+2 ResNets of `cifar_resnet`: EENet-8, and the 32x32 forms of well-known networks.

Importing this module registers them with timm, under the names in `default_cfgs`.

Sources: the 32x32 forms of ResNet and DenseNet have a 3x3 convolution of stride 1 in front and no pooling behind it. Those of VGG
(with batch norm) and AlexNet end in one map that is averaged. Their layers have the names of torchvision's and timm's, which are
those of published CIFAR checkpoints. EENet-8: Demir, Early-exit Convolutional Neural Networks, METU 2019, figure 4.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.models.vgg import cfgs as VGG_WIDTHS

from ptee.backbones.cifar_resnet import checkpoint_filter_fn as checkpoint_filter_fn  # for names as in "linear"
from ptee.backbones.cifar_resnet import register
from ptee.backbones.library import IMAGENET_MEAN, IMAGENET_STD

POOL = "M"  # in a list of layers
Layer = str | tuple[int, int, int, int]  # pooling, or a convolution: channels, kernel, stride, padding
ALEXNET: list[Layer] = [
    (64, 11, 4, 5), POOL, (192, 5, 1, 2), POOL, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), POOL
]  # fmt: skip


class SmallResNet(ResNet):
    """timm's ResNet with a stem for 32x32 images; (b, in_chans, h, w) -> (b, K)."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, **kwargs)
        self.add_module("conv1", _first_convolution(in_chans))
        self.add_module("maxpool", nn.Identity())


class SmallDenseNet(DenseNet):
    """timm's DenseNet with a stem for 32x32 images; (b, in_chans, h, w) -> (b, K)."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, in_chans=in_chans, **kwargs)
        self.features.conv0 = _first_convolution(in_chans)
        del self.features.pool0


def _first_convolution(in_chans: int) -> nn.Conv2d:
    made = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


class PlainNet(nn.Module):
    """Convolutions one after another, their mean over all positions, and a classifier; (b, in_chans, h, w) -> (b, K).

    Args:
        layers: of the convolutions.
        num_classes: K.
        in_chans: channels of the images.
        batch_norm: behind each convolution.
        hidden: width of two more layers in the classifier; 0 for none.
    """

    def __init__(
        self, layers: list[Layer], num_classes: int = 10, in_chans: int = 3, batch_norm: bool = False, hidden: int = 0
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        width = in_chans
        for layer in layers:
            if isinstance(layer, str):
                parts.append(nn.MaxPool2d(2))
                continue
            parts += [nn.Conv2d(width, *layer), *[nn.BatchNorm2d(layer[0])] * batch_norm, nn.ReLU(inplace=True)]
            width = layer[0]
        self.features = nn.Sequential(*parts)
        self.classifier: nn.Module = nn.Linear(hidden or width, num_classes)
        if hidden:
            wide = [nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, hidden)]
            self.classifier = nn.Sequential(*wide, nn.ReLU(inplace=True), nn.Dropout(), self.classifier)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, K) logits."""
        return self.classifier(self.features(x).mean((2, 3)))


class EENet8(nn.Module):
    """The network of the thesis on MNIST, without its exits: three residual blocks; (b, in_chans, h, w) -> (b, K).

    Its exits stand behind `block1` and `block2`. With 2 filters and two heads `pool` it has the thesis's 1,490 parameters.

    Args:
        filters: channels of the first block; the next two have twice and four times as many. The thesis has 2 and 4.
        num_classes: K.
        in_chans: channels of the images.
    """

    def __init__(self, filters: int = 2, num_classes: int = 10, in_chans: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, filters, 3, 1, 1), nn.BatchNorm2d(filters), nn.ReLU())
        self.block1 = EENet8Block(filters, filters, first=True)
        self.block2 = EENet8Block(filters, 2 * filters)
        self.block3 = EENet8Block(2 * filters, 4 * filters)
        self.norm = nn.BatchNorm2d(4 * filters)
        self.fc = nn.Linear(4 * filters, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, K) logits."""
        x = self.block3(self.block2(self.block1(self.stem(x))))
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class EENet8Block(nn.Module):
    """Two 3x3 convolutions behind batch norm and ReLU, and a shortcut. The first block is not halved, and its input is normal."""

    def __init__(self, c_in: int, c_out: int, first: bool = False) -> None:
        super().__init__()
        stride = 1 if first else 2
        self.norm1 = nn.Identity() if first else nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU())
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.norm2 = nn.Sequential(nn.BatchNorm2d(c_out), nn.ReLU())
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1)
        self.shortcut = nn.Identity() if first else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, h, w) -> (b, c_out, h/stride, w/stride)."""
        return self.conv2(self.norm2(self.conv1(self.norm1(x)))) + self.shortcut(x)


def hidden_of(tensors: Iterable[str]) -> int:
    """The width of further layers in the classifier of a VGG, by the names in a file of weights."""
    return 512 if any(name.endswith("classifier.6.weight") for name in tensors) else 0


# ---------------------------------------------------------------------------------------------------- the table


def _vgg(kind: str, **kwargs: Any) -> PlainNet:
    layers: list[Layer] = [width if isinstance(width, str) else (width, 3, 1, 1) for width in VGG_WIDTHS[kind]]
    return PlainNet(layers, batch_norm=True, **kwargs)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "eenet8": EENet8,
    "cifar_alexnet": partial(PlainNet, ALEXNET),
    "cifar_vgg13": partial(_vgg, "B"),
    "cifar_vgg16": partial(_vgg, "D"),
    "cifar_vgg19": partial(_vgg, "E"),
    "cifar_resnet18": partial(SmallResNet, block=BasicBlock, layers=(2, 2, 2, 2)),
    "cifar_resnet50": partial(SmallResNet, block=Bottleneck, layers=(3, 4, 6, 3)),
    "cifar_resnet101": partial(SmallResNet, block=Bottleneck, layers=(3, 4, 23, 3)),
    "cifar_resnet152": partial(SmallResNet, block=Bottleneck, layers=(3, 8, 36, 3)),
    "cifar_densenet121": partial(SmallDenseNet, growth_rate=32, block_config=(6, 12, 24, 16)),
}
IMAGES = {"input_size": (3, 32, 32), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # as the 6n+2 ResNets have them
MNIST = {"input_size": (1, 28, 28), "mean": (0.1307,), "std": (0.3081,)}
default_cfgs = {  # timm looks here for the input of each network; none has weights to download
    name: {"num_classes": 10, "crop_pct": 1.0, "interpolation": "bicubic", **(MNIST if name == "eenet8" else IMAGES)}
    for name in NETWORKS
}

for _name, _make in NETWORKS.items():
    register(_name, _make, __name__)
