"""The record of a backbone, which may come from a stranger."""

from __future__ import annotations

import json

import pytest
import timm
from safetensors.torch import save_file
from tiny import one_line
from torch import nn

from ptee._common.errors import BackboneError
from ptee.backbones.load import load_backbone, rebuild


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """The record of a network whose weights are in a file."""
    file = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), file)
    return load_backbone("cifar_resnet8", weights=file).source


PRETRAINED = {"tag": None, "hub": None, "revision": None}


@pytest.mark.parametrize(
    "change",
    [
        {"library": "os"},
        {"library": ["timm"]},
        {"library": "torchvision"},  # which has no cifar_resnet8
        {"name": 3},
        {"name": "no_such_network"},
        {"name": "../resnet18"},
        {"name": "file:resnet18"},
        {"library": "torchvision", "name": "hf-hub:someone/model"},
        {"args": []},
        {"args": {"checkpoint_path": "x.pth"}},
        {"args": {"cache_dir": "x"}},
        {"args": {"pretrained_cfg": "x"}},
        {"args": {"pretrained_cfg_overlay": {"url": "http://x"}}},
        {"args": {"in_chans": {"a": 1}}},
        {"num_classes": True},
        {"num_classes": 0},
        {"num_classes": "10"},
        {"num_classes": 11},
        {"weights": None},
        {"weights": {}},
        {"weights": {"file": 3}},
        {"weights": {"file": ""}},
        {"weights": {"file": "//machine/share/w.safetensors"}},
        {"weights": {"file": "\\\\machine\\share\\w.safetensors"}},
        {"weights": {"url": "http://x"}},
        {"weights": {"pretrained": "latest"}},
        {"weights": {"pretrained": PRETRAINED | {"revision": "main"}}},
        {"weights": {"pretrained": PRETRAINED | {"tag": 1}}},
        {"weights": {"pretrained": PRETRAINED}},  # there are none
        {"input": None},
        {"input": {"input_size": [3, 32, 32]}},
        {"input": {"input_size": [3, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": ["a"], "std": [0.5], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": [], "std": [0.5], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.0], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": 2}},
        {"another": 1},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_record_that_is_not_as_it_was_written_is_refused(record, change):
    with pytest.raises(BackboneError, match="backbone=") as refusal:
        rebuild(record | change)
    one_line(refusal)


@pytest.mark.parametrize("source", [None, [], "timm", {}])
def test_what_is_no_record_is_refused(source):
    with pytest.raises(BackboneError, match="backbone="):
        rebuild(source)


def test_a_record_whose_file_is_gone_names_it_and_asks_for_the_backbone(record, tmp_path):
    record = record | {"weights": record["weights"] | {"file": str(tmp_path / "w.safetensors")}}
    with pytest.raises(BackboneError, match=r"no weights file .*w\.safetensors.*backbone="):
        rebuild(record)


def test_a_record_keeps_arguments_and_input(tmp_path):
    save_file(timm.create_model("test_vit", img_size=32, in_chans=1).state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(
        "test_vit", weights=tmp_path / "w.safetensors", input_size=(1, 32, 32), mean=[0.1], std=[0.2]
    )
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert again.input == backbone.input
    assert (again.input.input_size, again.input.mean, again.input.std) == ((1, 32, 32), (0.1,), (0.2,))


def test_an_argument_that_json_cannot_say_leaves_no_record(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(
        "test_resnet", weights=tmp_path / "w.safetensors", model_args={"norm_layer": nn.BatchNorm2d}
    )
    assert backbone.source is None
