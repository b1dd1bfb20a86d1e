"""A memory that is freed and used again is another one: a survey finds the same whatever lay in memory before."""

from __future__ import annotations

import gc
import random

import pytest
import timm
import torch
import torchvision

from ptee.analysis.cut_points import Survey, survey
from ptee.analysis.memory_keys import memory_of

NETWORKS = {
    "timm": [
        "test_resnet",
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "levit_128s",
        "gcvit_xxtiny",
        "test_mambaout",
    ],
    "torchvision": ["swin_t", "swin_v2_t", "shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_1", "densenet121"],
}
SIZES = {"gcvit_xxtiny": 224, "levit_128s": 224, "test_vit": 160}


def test_a_view_lies_in_the_memory_of_its_tensor() -> None:
    x = torch.zeros(4, 4)
    assert memory_of(x) == memory_of(x[1:].t())
    assert memory_of(x) != memory_of(x.clone())


def test_a_memory_that_was_freed_is_never_taken_for_a_new_one() -> None:
    seen = set()
    for _ in range(200):
        seen.add(memory_of(torch.zeros(1000)))
    assert len(seen) == 200


def test_to_know_a_memory_does_not_keep_its_numbers() -> None:
    key = memory_of(torch.zeros(1000))
    assert key.expired()


def churn(rng: random.Random, kept: list[torch.Tensor]) -> list[torch.Tensor]:
    """Lay other things in memory, and leave holes of many sizes where the last ones lay."""
    if rng.random() < 0.3:
        gc.collect()
    kept[:] = [torch.randn(rng.randint(1, 400_000)) for _ in range(rng.randint(0, 60))]
    return kept


@pytest.mark.parametrize("name", [f"{home}/{name}" for home, names in NETWORKS.items() for name in names])
def test_a_survey_finds_the_same_every_time(name: str) -> None:
    home, _, model = name.partition("/")
    make = timm.create_model if home == "timm" else torchvision.models.get_model
    net, size, rng = make(model).eval(), SIZES.get(model, 64), random.Random(0)
    kept: list[torch.Tensor] = []
    found: list[Survey] = []
    for _ in range(10 if "swin" in model else 3):  # whose masks are made in the pass: there, addresses came back
        churn(rng, kept)
        found.append(survey(net, (3, size, size)))
    assert all(again == found[0] for again in found)
