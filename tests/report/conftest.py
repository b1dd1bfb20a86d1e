"""A run whose names are those of an attacker, measured on made-up answers, and its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from device import seeded
from torch import nn

import ptee
from ptee.evaluation.comparison_table import Comparison, Entry, Line
from ptee.report.page import write_page
from ptee.report.reported import Reported
from ptee.tuning.traces import Traces

EVIL = '<script>alert("x")</script>'
N, K = 60, 4
EPOCH = {"number": 1, "loss": 2.0, "val_loss": None, "accuracy": None, "fidelity": [0.5, 0.7, 1.0]}


def backbone() -> nn.Module:
    stages = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(6, K))


def answers(labels: bool = True) -> Traces:
    """Exits that are right about 2 and 3 of 4 images, and surer of these."""
    generator = seeded(0)
    bare = torch.randint(K, (N,), generator=generator)
    right = torch.stack([torch.arange(N) % 4 < 2 + n for n in range(2)])
    said = torch.where(right, bare, (bare + 1) % K)
    h = torch.rand(2, N, generator=generator) * 0.8 + 0.2 * right
    return Traces(
        torch.stack([*said, bare]), torch.cat([h, torch.ones(1, N)]), bare if labels else None,
        torch.tensor([0.3, 0.7, 1.1], dtype=torch.float64), torch.zeros(1, 3, 8, 8),
    )  # fmt: skip


def described(labels: bool = True) -> Reported:
    torch.manual_seed(0)
    model = ptee.augment(backbone(), exits=["0", "2"], head="pool", input_size=(3, 8, 8))
    model.threshold = [0.9, 0.6]
    entry = Entry(0.01, 0.5, 0.01, (0.0, 0.02), 0.0, (0.9, 0.6), fidelity=0.98)
    compared = Comparison("net", (0.01,), (Line(EVIL, "adaptive", (entry,), EVIL),), N, N, 1.0 if labels else None)
    images = [(torch.rand(3, 8, 8, generator=seeded(n)), 0) for n in range(N)]
    metrics = {"training": {"epochs": [EPOCH, EPOCH | {"number": 2}], "warning": EVIL}}
    return Reported(
        EVIL, model, metrics, answers(labels), compared, images, [EVIL] * K, EVIL, f"name: {EVIL}", folders={EVIL: EVIL}
    )  # fmt: skip


@pytest.fixture(scope="session")
def evil() -> Reported:
    with torch.device("cpu"):
        return described()


@pytest.fixture(scope="session")
def page(evil, tmp_path_factory) -> Path:
    """Its page."""
    place = tmp_path_factory.mktemp("page") / "report.html"
    write_page(evil, place)
    return place


@pytest.fixture(scope="session")
def unlabelled(evil) -> Reported:
    with torch.device("cpu"):
        return replace(evil, traces=answers(labels=False), comparison=described(labels=False).comparison)
