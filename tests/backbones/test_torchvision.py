"""torchvision's models, with weights from its cache."""

from __future__ import annotations

import os

import pytest
import torch
import torchvision
from tiny import RunsCodeWhenUnpickled, one_line

from ptee._common.errors import BackboneError
from ptee.backbones.load import load_backbone, rebuild
from ptee.backbones.weights import weights_hash


def test_torchvisions_weights_come_from_its_cache_and_the_record_names_their_tag(tmp_path, monkeypatch):
    trained = torchvision.models.squeezenet1_1()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(trained.state_dict(), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = load_backbone("squeezenet1_1")
    assert weights_hash(backbone.module) == weights_hash(trained)
    assert backbone.source["weights"]["pretrained"]["tag"] == "IMAGENET1K_V1"
    assert weights_hash(rebuild(backbone.source).module) == weights_hash(trained)


def test_torchvisions_weights_that_would_run_code_are_refused_and_the_code_not_run(tmp_path, monkeypatch, environment):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    torch.save({"fc.bias": RunsCodeWhenUnpickled(tmp_path / "harm")}, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = dict(os.environ)
    with pytest.raises(BackboneError, match="squeezenet1_1 cannot be downloaded or loaded") as refusal:
        load_backbone("squeezenet1_1")
    one_line(refusal)
    assert not (tmp_path / "harm").exists()
    assert dict(os.environ) == before
