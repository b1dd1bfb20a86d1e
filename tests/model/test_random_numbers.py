"""What the user draws from torch does not depend on whether ptee was called before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import seeded
from torch import nn
from torch.utils.data import TensorDataset

import ptee

SIZE = (3, 8, 8)


def network() -> nn.Module:
    stages = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(6, 4))


CALLS: dict[str, Callable[..., Any]] = {
    "load": lambda model, folder, data: ptee.load(folder, model.detach()),
    "predict": lambda model, folder, data: model.predict(data.tensors[0]),
    "calibrate": lambda model, folder, data: ptee.calibrate(model, data),
    "tune": lambda model, folder, data: ptee.tune(model, data, max_cost=0.9),
    "evaluate": lambda model, folder, data: ptee.evaluate(model, data),
    "save": lambda model, folder, data: model.save_pretrained(folder),
}


@pytest.mark.parametrize("name", CALLS)
def test_torch_s_random_numbers_go_on_as_if_none_had_been_drawn(name, tmp_path):
    model = ptee.augment(network(), input_size=SIZE, exits=["0", "2"], head="pool")
    model.save_pretrained(tmp_path)
    generator = seeded(0)
    data = TensorDataset(torch.randn(40, *SIZE, generator=generator), torch.randint(4, (40,), generator=generator))
    before = torch.get_rng_state()
    CALLS[name](model, tmp_path, data)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_seed_gives_the_same_heads_also_where_a_run_was_loaded_before(tmp_path):
    net = network()
    ptee.augment(net, input_size=SIZE, exits=["0"], head="pool").save_pretrained(tmp_path)
    found = []
    for loads in (False, True):
        torch.manual_seed(3)
        if loads:
            ptee.load(tmp_path, net).detach()
        model = ptee.augment(net, input_size=SIZE, exits=["0"], head="pool")
        found.append([p.clone() for p in model.heads.parameters()])
        model.detach()
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
