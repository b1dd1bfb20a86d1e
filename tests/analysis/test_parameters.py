"""The share of a network's parameters that has been used when a module ends."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import ptee.backbones.cifar_resnet  # noqa: F401 (timm knows its networks then)
from ptee.analysis.parameters import number_of_parameters, parameter_shares


def test_batch_norm_counts_and_a_shared_layer_counts_once():
    assert number_of_parameters(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))) == 3 * 8 * 9 + 2 * 8
    shared = nn.Linear(4, 4)
    assert number_of_parameters(nn.Sequential(shared, shared, nn.Linear(4, 2))) == (4 * 4 + 4) + (4 * 2 + 2)


def test_shares_add_up_in_the_order_of_execution():
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 4, bias=False)).eval()
    assert parameter_shares(net, (1, 1, 1)) == {"0": 0.2, "1": 0.2, "2": 1.0, "": 1.0}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_a_module_that_is_called_twice_counts_once():
    shared = nn.Linear(1, 1, bias=False)
    net = nn.Sequential(nn.Flatten(), shared, nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False), shared).eval()
    assert parameter_shares(net, (1, 1, 1))["3"] == 1.0


@pytest.mark.parametrize(("depth", "shares"), [(20, {"layer1": 5, "layer2": 23}), (110, {"layer1": 5, "layer2": 24})])
def test_shares_of_the_resnets_are_those_of_the_thesis(depth, shares):
    with (
        torch.no_grad()
    ):  # figures 4.1 and 4.6: .05 and .24, with a pool head, of networks with weights in their shortcuts
        found = parameter_shares(timm.create_model(f"cifar_resnet{depth}", shortcut="conv").eval(), (3, 32, 32))
    assert {name: round(100 * found[name]) for name in shares} == pytest.approx(shares, abs=1)
