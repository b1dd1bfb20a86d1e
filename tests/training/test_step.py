from __future__ import annotations

import pytest
import torch
from learning import images, made
from torch import Tensor

import ptee
from ptee.training.config import TrainingConfig
from ptee.training.losses import LOSSES
from ptee.training.step import BatchResult, EpochSums, Step, parameter_costs


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


def test_an_epoch_of_which_one_batch_has_no_labels_has_no_accuracy():
    counts = [torch.tensor(n, device="cpu") for n in ([1, 2], [3, 4], [0, 4])]
    sums = EpochSums(2)
    for right in (None, counts[0]):
        sums.add(BatchResult(torch.tensor(0.5, device="cpu"), right, *counts[1:]), rows=4)
    assert EpochSums.means(sums.tensor()).accuracy is None


def test_soft_targets_are_the_backbones_probabilities_at_the_temperature_of_the_loss():
    model, config = made().eval(), TrainingConfig(loss="separate", targets="soft", temperature=2).resolved()
    every = model.all_exits(images())
    soft = (every.logits[-1] / 2).softmax(-1)
    costs = torch.tensor(model.costs, dtype=torch.float32)
    want = LOSSES["separate"](every.logits, every.confidence_logits, costs, soft, temperature=2)
    torch.testing.assert_close(Step(model, config)(images(), None).loss, want)


def test_the_cost_of_eenet8_in_parameters_is_that_of_the_thesis_with_all_heads_on_the_way():
    model = ptee.augment("eenet8", pretrained=False, exits="quadratic", num_exits=2, head="pool")
    bare, first, second = (
        1490 - 33 - 55,
        33,
        55,
    )  # two heads: 10 classes and a confidence, of 2 and of 4 numbers and a bias
    wanted = [137 / bare, (407 + first) / bare, (bare + first + second) / bare]
    assert parameter_costs(model, 2) == pytest.approx(wanted)
