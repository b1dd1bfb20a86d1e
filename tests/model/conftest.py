"""A saved run, its model and its backbone."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from saved import make
from torch import nn

import ptee
from ptee.backbones.load import load_backbone
from ptee.model.early_exit import EarlyExitModel


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[EarlyExitModel, Path]:
    """A model and the folder it was saved in, to be left as they are."""
    torch.manual_seed(0)
    model, folder = make(), tmp_path_factory.mktemp("runs") / "original"
    model.results = {"rows": [], "samples": 3}
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def net(original) -> nn.Module:
    """The backbone that the run was made for."""
    return copy.deepcopy(original[0].backbone)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A saved run, to be changed at will."""
    return shutil.copytree(original[1], tmp_path / "run")


@pytest.fixture
def named(tmp_path) -> tuple[Path, Path]:
    """A run on a named backbone, and the file of that backbone's weights."""
    weights = tmp_path / "weights.safetensors"
    load_backbone("cifar_resnet8", pretrained=False)  # registers the name with timm
    safetensors.torch.save_file(timm.create_model("cifar_resnet8").state_dict(), weights)
    model = ptee.augment("cifar_resnet8", weights=str(weights), exits=["layer1"])
    model.save_pretrained(tmp_path / "named")
    return tmp_path / "named", weights
