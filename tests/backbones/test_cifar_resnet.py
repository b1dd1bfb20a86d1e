"""The CIFAR networks are those of the paper, follow timm's conventions and load published checkpoints."""

from __future__ import annotations

import json
import tarfile

import pytest
import timm
import torch
from images import first_images
from safetensors.torch import load_file
from torch import nn

from ptee._common.errors import BackboneError, UnknownName
from ptee.backbones.cifar_resnet import BasicBlock, CifarResNet
from ptee.backbones.load import load_backbone, rebuild


def parameters_by_formula(depth: int) -> int:
    """Convolutions without bias, two numbers per channel of batch norm, a linear layer, nothing in the shortcuts."""
    n, (a, b, c) = (depth - 2) // 6, (16, 32, 64)
    convolutions = 9 * (3 * a + 2 * n * a * a + a * b + (2 * n - 1) * b * b + b * c + (2 * n - 1) * c * c)
    norms = 2 * (a + 2 * n * (a + b + c))
    return convolutions + norms + c * 10 + 10


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_are_those_of_the_formula_and_of_the_paper(depth, millions):
    parameters = sum(p.numel() for p in timm.create_model(f"cifar_resnet{depth}").parameters())
    assert parameters == parameters_by_formula(depth)
    assert parameters == pytest.approx(millions * 1e6, rel=0.025)  # table 6 of He et al.


def test_the_trained_resnet20_is_as_accurate_as_published(weights, real_data):
    model = timm.create_model("cifar_resnet20").eval()
    model.load_state_dict(load_file(weights / "cifar_resnet20.safetensors"))
    with tarfile.open(real_data / "cifar10" / "calibration.tar") as file:
        x, labels = first_images(file, 500)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        right = (model((x - mean) / std).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(0.887, abs=0.04)  # three standard errors of 500 images


def test_a_shortcut_takes_every_second_pixel_and_pads_with_zero_channels_on_both_sides():
    x = torch.randn(2, 16, 8, 8)
    shortcut = BasicBlock(16, 32, 2).shortcut(x)
    assert shortcut.shape == (2, 32, 4, 4)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert not shortcut[:, :8].any() and not shortcut[:, 24:].any()
    assert BasicBlock(16, 16, 1).shortcut(x) is x


def test_each_module_is_called_once_and_a_block_ends_with_its_relu():
    model, calls = CifarResNet(20).eval(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, _, output, name=name: calls.append((name, output)))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert sorted(name for name, _ in calls) == sorted(dict(model.named_modules()))
    assert all((output >= 0).all() for name, output in calls if name.startswith("layer") and name.count(".") == 1)


@pytest.mark.parametrize("size", [32, 33, 48])
def test_other_image_sizes_channels_and_classes(size):
    model = timm.create_model("cifar_resnet20", num_classes=7, in_chans=1).eval()
    assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("depth", [0, 2, 18, 21])
def test_a_depth_of_another_form_is_refused(depth):
    with pytest.raises(BackboneError, match=f"6n\\+2 layers, not {depth}"):
        CifarResNet(depth)


def test_timm_knows_the_input_and_that_there_are_no_weights():
    cfg = timm.get_pretrained_cfg("cifar_resnet56")
    assert (cfg.input_size, cfg.num_classes, cfg.classifier, cfg.crop_pct) == ((3, 32, 32), 10, "fc", 1.0)
    assert "cifar_resnet56" in timm.list_models("cifar_resnet*")
    assert "cifar_resnet56" not in timm.list_pretrained("cifar_resnet*")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("cifar_resnet56", pretrained=True)


def test_timms_conventions_hold():
    model = timm.create_model("cifar_resnet20").eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.get_classifier() is model.fc
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(features, pre_logits=True))
    maps = timm.create_model("cifar_resnet20", features_only=True, out_indices=(0, 1, 2))(x)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]


class ConvShortcut(nn.Module):
    """A block as the checkpoints with option B shortcuts have it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, 2, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


def test_a_block_with_a_convolution_as_its_shortcut_computes_what_the_paper_says():
    block, plain = BasicBlock(16, 32, 2, "conv").eval(), ConvShortcut(16, 32).eval()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(block(x), plain(x))


def test_another_shortcut_is_refused():
    with pytest.raises(UnknownName, match=r"Unknown shortcut 'none'\. .*Choices: conv, pad"):
        CifarResNet(20, shortcut="none")


@pytest.mark.parametrize(
    ("shortcut", "published"),
    [
        ("pad", lambda key: "module." + key.replace("fc.", "linear.")),
        ("conv", lambda key: key),
        ("conv", lambda key: "module." + key.replace("fc.", "linear.").replace("downsample", "shortcut")),
    ],
    ids=["option A, linear.", "option B, downsample.", "option B, shortcut. and linear."],
)
def test_published_checkpoints_load_whatever_their_layers_are_called(shortcut, published, tmp_path):
    trained = CifarResNet(20, num_classes=100, shortcut=shortcut).eval()
    state = {published(key): value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 92.6}, tmp_path / "w.th")
    backbone = load_backbone("cifar_resnet20", weights=tmp_path / "w.th", num_classes=100)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone.module(x), trained(x))
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert torch.equal(again.module(x), trained(x))
