"""A saved run of a small network, and sources of noise for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shards import picture, shard

import ptee
from ptee.backbones.load import load_backbone


@pytest.fixture(scope="session")
def a_run(tmp_path_factory) -> Path:
    """A run whose heads are as they were drawn."""
    place = tmp_path_factory.mktemp("scale")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), place / "weights.safetensors")
        weights = place / "weights.safetensors"
        model = ptee.augment(
            "cifar_resnet8", weights=weights, exits=["layer1", "layer2"], head="pool", input_size=(3, 16, 16)
        )
    model.threshold = 0.3
    model.save_pretrained(place / "run")
    (place / "picture.png").write_bytes(picture(0))
    return place / "run"


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Thirty pictures in three shards."""
    place = tmp_path_factory.mktemp("shards")
    for k in range(3):
        shard(place / f"{k}.tar", range(10 * k, 10 * k + 10))
    return place


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Each shard becomes a part of its own."""
    monkeypatch.setattr("ptee.data.shards.PART_BYTES", 1)
