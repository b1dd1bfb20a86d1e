"""The residual networks for 32x32 images: 6n+2 layers, three stages of n blocks with 16, 32 and 64 channels.

Importing this module registers them with timm, so that `timm.create_model("cifar_resnet56")` works.

Source: He et al., Deep residual learning for image recognition, CVPR 2016, section 4.2. The shortcuts there have no weights
(option A); those of some published checkpoints have weights (option B, `shortcut="conv"`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from ptee._common.errors import BackboneError, unknown
from ptee.backbones.library import IMAGENET_MEAN, IMAGENET_STD

DEPTHS = (8, 14, 20, 32, 44, 56, 110)
WIDTHS = (16, 32, 64)
SHORTCUTS = ("pad", "conv")  # He et al.'s options A and B


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; (b, c, h, w) -> (b, c_out, h/stride, w/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: str = "pad") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride, self.new_channels = stride, c_out - c_in
        self.downsample: nn.Module | None = None
        if shortcut == "conv" and (stride != 1 or c_in != c_out):
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU is a function here, not a module, so that each module is called once."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """A convolution; or every second pixel, with half of the new channels, all zero, before the old ones and half after."""
        if self.downsample is not None:
            return self.downsample(x)
        if self.stride == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A 6n+2 network in timm's conventions (`forward_features`, `forward_head`, `reset_classifier`).

    Args:
        depth: 6n + 2 with n >= 1, the number of layers with weights.
        num_classes: K; 0 leaves the classifier out.
        in_chans: channels of the images.
        shortcut: "pad" (option A) or "conv" (option B), where a stage begins.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_chans: int = 3, shortcut: str = "pad") -> None:
        super().__init__()
        if shortcut not in SHORTCUTS:
            raise unknown("shortcut", shortcut, SHORTCUTS)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            usual = ", ".join(map(str, DEPTHS))
            raise BackboneError(f"A CIFAR ResNet has 6n+2 layers, not {depth}. Choose {usual}, or another.")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, WIDTHS[-1]
        self.head_hidden_size = self.num_features
        self.feature_info = [
            {"num_chs": width, "reduction": 2**n, "module": f"layer{n + 1}"} for n, width in enumerate(WIDTHS)
        ]
        self.conv1 = nn.Conv2d(in_chans, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks, 1, shortcut)
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks, 2, shortcut)
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks, 2, shortcut)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, K) logits."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, 64, h/4, w/4)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, 64, h, w) -> (b, K) logits, or the (b, 64) means that the classifier reads."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for so many classes. `global_pool` is timm's argument; there is only the average here."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()


def _stage(c_in: int, c_out: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
    first = BasicBlock(c_in, c_out, stride, shortcut)
    return nn.Sequential(first, *[BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)])


def shortcut_of(tensors: Iterable[str]) -> str:
    """The kind of shortcut that a file of weights has, by the names of its tensors: only "conv" has weights."""
    return "conv" if any(".downsample.0." in name or ".shortcut.0." in name for name in tensors) else "pad"


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of public CIFAR ResNets that give other names to some layers, under the names here."""
    names = {key: re.sub(r"^linear\.", "fc.", key.replace(".shortcut.", ".downsample.")) for key in state_dict}
    return {names[key]: value for key, value in state_dict.items()}


default_cfgs = {  # timm looks here for the input of each network; none has weights to download
    f"cifar_resnet{depth}": {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": IMAGENET_MEAN,  # what the published checkpoints were trained with
        "std": IMAGENET_STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": "conv1",
        "classifier": "fc",
    }
    for depth in DEPTHS
}


def register(name: str, make: Callable[..., nn.Module], home: str) -> None:
    """Let timm build a network by this name. It looks into the module `home` for its `default_cfgs`."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(make, name, pretrained, **kwargs)

    build.__name__, build.__module__ = name, home
    register_model(build)


for _depth in DEPTHS:
    register(f"cifar_resnet{_depth}", partial(CifarResNet, _depth), __name__)
