from __future__ import annotations

import torch
from torch import Tensor

from ptee.training.step import BatchResult, EpochSums


class OnMps(Tensor):
    """A tensor on a device without float64."""

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_an_epoch_is_added_up_without_float64_on_the_device():
    sums = EpochSums()
    counts = [torch.tensor(n, device="cpu").as_subclass(OnMps) for n in ([1, 2], [3, 4], [0, 4])]
    sums.add(BatchResult(torch.tensor(0.5, device="cpu").as_subclass(OnMps), *counts), rows=4)
    assert sums.tensor().tolist() == [4, 0, 2, 1, 2, 3, 4, 0, 4]
