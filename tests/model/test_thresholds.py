"""Thresholds as a person gives them, without a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ptee.model.thresholds import for_each_exit, for_each_row

CPU = torch.device("cpu")


def test_one_number_stands_for_all_exits():
    assert for_each_exit(0.7, 3) == (0.7, 0.7, 0.7)


def test_numbers_are_not_rounded_to_float32():
    assert for_each_exit([0.1, 0.2], 2) == (0.1, 0.2)
    assert for_each_row([0.1, 0.2], 2, 5, CPU) == [0.1, 0.2]


def test_a_table_becomes_a_column_for_each_exit():
    columns = for_each_row([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], 2, 3, CPU)
    assert [c.tolist() for c in columns] == [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]


@pytest.mark.parametrize(
    ("device", "given", "sent"),
    [
        ("mps", torch.float64, torch.float32),  # there is no float64
        ("mps", torch.float32, torch.float32),
        ("mps", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float64, torch.float64),
    ],
)
def test_a_threshold_goes_to_a_device_in_a_type_that_is_there(device, given, sent):
    asked: list[Any] = []

    class Staying(Tensor):
        def to(self, *where: Any) -> Tensor:
            asked.append(where)
            return self

    for_each_row(torch.zeros(1, 2, dtype=given).as_subclass(Staying), 2, 3, torch.device(device))
    assert asked == [(torch.device(device), sent)]  # once, not at each exit
