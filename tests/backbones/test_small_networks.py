"""Networks for small images: of the published sizes, with published names of their weights, and room for exits."""

from __future__ import annotations

import tarfile

import pytest
import timm
import torch
from cases import slow
from images import first_images
from safetensors.torch import save_file

import ptee
from ptee.backbones.load import load_backbone, rebuild
from ptee.backbones.small_networks import NETWORKS

SLOW = slow("cifar_densenet121")
SMALL = ["eenet8", "cifar_alexnet", "cifar_resnet18", SLOW]
MILLIONS = {  # as published: ../shared/data/README.md, github.com/kuangliu/pytorch-cifar, Simonyan & Zisserman without 3 layers
    "cifar_densenet121": 6.96, "cifar_vgg19": 20.04, "cifar_resnet18": 11.17, "cifar_resnet50": 23.52, "cifar_resnet101": 42.51,
}  # fmt: skip


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", MILLIONS)
def test_a_network_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        assert parameters(timm.create_model(name)) == pytest.approx(MILLIONS[name] * 1e6, rel=1e-3)


def test_eenet8_has_the_thesis_number_of_parameters_up_to_each_exit():
    net = timm.create_model("eenet8")
    model = ptee.augment(net, exits="quadratic", num_exits=2, head="pool")
    assert [e.name for e in model.exits] == ["block1", "block2"]
    heads = [parameters(head) for head in model.heads]
    up_to_first = parameters(net.stem) + parameters(net.block1)
    assert up_to_first + heads[0] == 137  # custom_eenet.py of github.com/eksuas/eenets.pytorch
    assert up_to_first + parameters(net.block2) + heads[1] == 407
    assert parameters(net) + sum(heads) == 1490


def test_eenet8_with_four_filters_begins_with_four():
    assert load_backbone("eenet8", pretrained=False, model_args={"filters": 4}).module.fc.in_features == 16


@pytest.mark.parametrize("name", SMALL)
def test_exits_find_places_in_a_network_and_at_t_above_one_the_answers_are_its_own(name):
    backbone = load_backbone(name, pretrained=False, num_classes=7)
    x = torch.randn(3, *backbone.input.input_size)
    with torch.inference_mode():
        own = backbone.module(x)
    model = ptee.augment(backbone.module, exits="pareto", num_exits=2, head="pool")
    assert len(model.exits) == 2
    assert own.shape == (3, 7)
    assert torch.equal(model.predict(x, threshold=2.0).logits, own)


@pytest.mark.parametrize("name", [name for name in NETWORKS if "resnet1" not in name or name == "cifar_resnet18"])
def test_other_channels_and_classes(name):
    made = timm.create_model(name, in_chans=2, num_classes=5).eval()
    assert made(torch.randn(1, 2, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize("name", [slow("cifar_vgg19"), SLOW])
def test_trained_networks_load_and_are_as_accurate_as_measured(name, weights, real_data):
    backbone = load_backbone(name, weights=weights / f"{name}.safetensors")
    with tarfile.open(real_data / "cifar10" / "calibration.tar") as file:
        x, labels = first_images(file, 100)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.input.mean, backbone.input.std))
    with torch.inference_mode():
        right = (backbone.module((x - mean) / std).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(0.885, abs=0.1)  # three standard errors of 100 images


def test_a_resnet_loads_under_the_names_that_other_authors_give(tmp_path):
    state = timm.create_model("cifar_resnet18").state_dict()
    names = {key: key.replace(".downsample.", ".shortcut.").replace("fc.", "linear.") for key in state}
    save_file({names[key]: value + 1 for key, value in state.items()}, tmp_path / "w.safetensors")
    loaded = load_backbone("cifar_resnet18", weights=tmp_path / "w.safetensors").module.state_dict()
    assert all(torch.equal(loaded[key], value + 1) for key, value in state.items())


def test_a_vgg_with_more_layers_in_its_classifier_loads_and_is_built_again(tmp_path):
    state = timm.create_model("cifar_vgg13", hidden=512).state_dict()
    save_file(dict(state), tmp_path / "w.safetensors")
    backbone = load_backbone("cifar_vgg13", weights=tmp_path / "w.safetensors")
    again = rebuild(backbone.source)
    assert all(torch.equal(again.module.state_dict()[key], value) for key, value in state.items())
