"""timm's models, with weights from a cache of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from tiny import RunsCodeWhenUnpickled, one_line

from ptee._common.errors import BackboneError
from ptee.backbones.load import InputConfig, load_backbone, rebuild
from ptee.backbones.weights import weights_hash

HALF = (0.5, 0.5, 0.5)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_timms_weights_come_from_the_hub_and_the_record_names_tag_and_commit(hub):
    trained = timm.create_model("test_resnet")
    hub("timm/test_resnet.r160_in1k", trained.state_dict())
    backbone = load_backbone("test_resnet")
    assert weights_hash(backbone.module) == weights_hash(trained)
    assert backbone.source["name"] == "test_resnet.r160_in1k"
    origin = {"tag": "r160_in1k", "hub": "timm/test_resnet.r160_in1k", "revision": COMMIT}
    assert backbone.source["weights"] == {"pretrained": origin}
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert weights_hash(again.module) == weights_hash(trained)
    assert again.source["weights"]["pretrained"]["revision"] == COMMIT


def test_a_hub_repository_brings_its_architecture_classes_and_input(hub):
    trained = timm.create_model("cifar_resnet8", num_classes=6)
    cfg = {"input_size": [3, 32, 32], "mean": HALF, "std": HALF, "num_classes": 6, "classifier": "fc"}
    cfg |= {"first_conv": "conv1", "interpolation": "bilinear"}
    config = {"architecture": "cifar_resnet8", "num_classes": 6, "pretrained_cfg": cfg}
    hub("someone/six", trained.state_dict(), config)
    backbone = load_backbone("hf-hub:someone/six")
    assert weights_hash(backbone.module) == weights_hash(trained)
    assert (backbone.num_classes, backbone.input) == (6, InputConfig((3, 32, 32), HALF, HALF, "bilinear"))
    assert backbone.source["weights"]["pretrained"]["revision"] == COMMIT
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert weights_hash(again.module) == weights_hash(trained)
    with pytest.raises(BackboneError, match="6 classes, not 10"):
        load_backbone("hf-hub:someone/six", num_classes=10)


def test_weights_on_the_hub_that_would_run_code_are_refused_and_the_code_not_run(
    hub, tmp_path, monkeypatch, environment
):
    cfg = {"num_classes": 6, "classifier": "fc", "first_conv": "conv1", "hf_hub_filename": "hostile.bin"}
    hub("someone/six", {}, {"architecture": "cifar_resnet8", "num_classes": 6, "pretrained_cfg": cfg})
    file = tmp_path / "hub" / "models--someone--six" / "snapshots" / COMMIT / "hostile.bin"
    torch.save({"fc.bias": RunsCodeWhenUnpickled(tmp_path / "harm")}, file)
    # as timm did before 1.0.26
    monkeypatch.setattr("timm.models._hub._torch_load", lambda file, **_: torch.load(file, weights_only=False))
    with pytest.raises(BackboneError, match="someone/six cannot be downloaded or loaded") as refusal:
        load_backbone("hf-hub:someone/six")
    one_line(refusal)
    assert not (tmp_path / "harm").exists()


@pytest.mark.slow
def test_the_hub_out_of_reach_is_told_in_one_line(tmp_path):
    source = """
import sys
import torch, timm, torchvision
from huggingface_hub import constants
from ptee.backbones.load import load_backbone
from ptee._common.errors import BackboneError
for offline in (False, True):
    constants.HF_HUB_OFFLINE = offline
    for name in ("resnet18", "torchvision/resnet18", "hf-hub:someone/model"):
        try:
            load_backbone(name)
        except BackboneError as error:
            print(error)
"""
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"),
                           "http://127.0.0.1:9")  # fmt: skip
    environment = os.environ | closed | {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    names = ["resnet18", "torchvision/resnet18", "hf-hub:someone/model"] * 2
    assert len(lines) == 6
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name} cannot be downloaded")
        assert "weights=FILE" in line and ("pretrained=False" in line) == ("hub" not in name)
