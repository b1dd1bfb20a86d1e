from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ptee
from ptee.training.step import BatchResult, EpochSums, parameter_costs


class OnMps(Tensor):
    """A tensor on a device without float64."""

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_an_epoch_is_added_up_without_float64_on_the_device():
    sums = EpochSums(2)
    counts = [torch.tensor(n, device="cpu").as_subclass(OnMps) for n in ([1, 2], [3, 4], [0, 4])]
    sums.add(BatchResult(torch.tensor(0.5, device="cpu").as_subclass(OnMps), *counts), rows=4)
    assert sums.tensor().tolist() == [4, 0, 2, 1, 2, 3, 4, 0, 4]


def test_the_cost_of_eenet8_in_parameters_is_that_of_the_thesis_with_all_heads_on_the_way():
    model = ptee.augment("eenet8", pretrained=False, exits="quadratic", num_exits=2, head="pool")
    bare, first, second = (
        1490 - 33 - 55,
        33,
        55,
    )  # two heads: 10 classes and a confidence, of 2 and of 4 numbers and a bias
    wanted = [137 / bare, (407 + first) / bare, (bare + first + second) / bare]
    assert parameter_costs(model, 2) == pytest.approx(wanted)
