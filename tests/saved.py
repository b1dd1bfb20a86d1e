"""A model that is saved, its folder, and what loading says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from device import seeded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ptee
from ptee._common.errors import RunError
from ptee.backbones.load import load_backbone
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_config import fingerprint

SIZE = (3, 16, 16)


class Net(nn.Module):
    """A user's network."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Conv2d(8, 16, 3, 2)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


def make(head: str | list[str] = "conv1", net: nn.Module | None = None) -> EarlyExitModel:
    """A model with exits behind both stages, its heads moved off their initial values and one threshold per exit."""
    backbone = load_backbone(net or Net(), input_size=SIZE)
    model = build(backbone, exits=["one", "two"], head=head)
    with torch.no_grad():
        for tensor in model.heads.state_dict().values():
            tensor += torch.rand(tensor.shape).to(tensor.dtype)
    model.threshold = [0.75, 0.625]
    return model


def edit(folder: Path, key: str, value: Any, signed: bool = True) -> None:
    """Put a value at a dotted key of config.json; numbers index lists. `signed`: as somebody would who knows the fingerprint."""
    config = json.loads((folder / "config.json").read_text())
    *outer, last = (int(part) if part.isdigit() else part for part in key.split("."))
    place = config
    for part in outer:
        place = place[part]
    place[last] = value
    if signed:
        with suppress(AttributeError, KeyError, TypeError):  # there is none of what is no config
            config["fingerprint"] = fingerprint(config)
    (folder / "config.json").write_text(json.dumps(config))


def as_schema_1(folder: Path) -> None:
    """As ptee wrote runs before the heads' hashes were kept."""
    config = json.loads((folder / "config.json").read_text())
    del config["tensors"], config["fingerprint"]
    (folder / "config.json").write_text(json.dumps(config | {"schema_version": 1}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the saved tensors of a run."""
    save_file(change(load_file(folder / "heads.safetensors")), folder / "heads.safetensors")
    as_schema_1(folder)


def refused(folder: Path | str, net: nn.Module | None, kind: type[Exception] = RunError) -> str:
    """What loading says, in one line, when it refuses."""
    with pytest.raises(kind) as refusal:
        ptee.load(folder, backbone=net)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def answers(model: EarlyExitModel) -> tuple[Tensor, ...]:
    x = torch.randn(6, *SIZE, generator=seeded(1))
    with torch.no_grad():
        return (*model.predict(x), *model.all_exits(x))


def assert_same(one: EarlyExitModel, two: EarlyExitModel) -> None:
    for got, want in zip(answers(one), answers(two), strict=True):
        assert torch.equal(got, want)
    assert one.threshold == two.threshold
    assert one.exits == two.exits
    assert one.costs == two.costs
