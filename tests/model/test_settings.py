"""Thresholds as a person gives them: to a model or to one call, in any form, or refused."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest
import torch
from device import here
from small import labelled, made
from torch import Tensor

from ptee._common.devices import _HAS_FLOAT64
from ptee._common.errors import PteeError
from ptee.model.settings import for_each_exit, for_each_row

b, E = 6, 2
NEVER, ALWAYS = 2.0, 0.0
FORMS = {
    "a list": [ALWAYS, NEVER],
    "a tuple": (ALWAYS, NEVER),
    "a list of one list": [[ALWAYS, NEVER]],
    "whole numbers": [0, 2],
    "a float32 tensor": torch.tensor([ALWAYS, NEVER]),
    "a float64 tensor": torch.tensor([ALWAYS, NEVER], dtype=torch.float64),
    "a tensor of whole numbers": torch.tensor([0, 2]),
    "a tensor that wants gradients": torch.tensor([ALWAYS, NEVER], requires_grad=True),
    "a NumPy array": torch.tensor([ALWAYS, NEVER], device="cpu").numpy(),
    "one row for all": torch.tensor([[ALWAYS, NEVER]]),
    "a parameter of torch": torch.nn.Parameter(torch.tensor([ALWAYS, NEVER])),
    "a list of tensors": [torch.tensor(ALWAYS), torch.tensor([NEVER], requires_grad=True)[0]],
    "a list of tensors of one number": [torch.tensor([ALWAYS]), torch.tensor([NEVER])],
    "decimals": [Decimal(0), Decimal(2)],
    "below 0, which is as 0": [-1, NEVER],
}


def images() -> Tensor:
    return labelled(b)[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_threshold_is_given_or_set_in_any_form_and_reads_as_a_list(form):
    model = made()
    assert model.predict(images(), FORMS[form]).exit_index.tolist() == [0] * b
    model.threshold = FORMS[form]
    assert model.predict(images()).exit_index.tolist() == [0] * b
    model.threshold.append(0.1)  # a copy
    assert model.threshold == [-1.0 if "below" in form else ALWAYS, NEVER]
    assert all(type(t) is float for t in model.threshold)


@pytest.mark.parametrize("shape", [(b, E), (b, 1), (1, E), (1, 1), (E,), (1,), ()], ids=str)
def test_a_call_takes_every_shape_that_broadcasts(shape):
    assert made().predict(images(), torch.full(shape, ALWAYS)).exit_index.tolist() == [0] * b
    assert made().predict(images(), torch.full(shape, NEVER)).exit_index.tolist() == [E] * b


REFUSED = {
    "three for two exits": ([0.5, 0.5, 0.5], r"\b3\b.*\b2\b"),
    "none": ([], r"\b0\b.*\b2\b"),
    "NaN": (math.nan, "NaN"),
    "a NaN among them": ([0.5, math.nan], "NaN"),
    "a word": ("high", "'high'"),
    "a list with None": ([0.5, None], "None"),
    "a complex number": (1j, "1j"),
    "a complex tensor": (torch.tensor(1j), "number"),
    "a truth": (True, "True"),
    "truths": ([True, False], "True"),
    "a truth among numbers": ([True, 0.5], "True"),
    "a number in quotes": ("0.7", "'0.7'"),
    "a tensor of truths": (torch.ones(2) > 0, "True"),
}


@pytest.mark.parametrize(("threshold", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bad_threshold_is_refused_and_the_one_in_force_stays(threshold, said):
    model = made()
    model.threshold = [0.1, 0.2]
    with pytest.raises(PteeError, match=said):
        model.threshold = threshold
    with pytest.raises(PteeError, match=said):
        model.predict(images(), threshold)
    assert model.threshold == [0.1, 0.2]


@pytest.mark.parametrize(
    ("given", "meant"), [(70, "nobody leaves.*did you mean 0.7?"), ([0.7, 85], "at exit 1.*did you mean 0.7,0.85?")]
)
def test_a_threshold_that_was_meant_as_a_percentage_is_doubted_and_stays_what_it_is(given, meant):
    model = made()
    with pytest.warns(UserWarning, match=meant):
        model.threshold = given
    assert model.threshold == (given if isinstance(given, list) else [given] * E)
    with pytest.warns(UserWarning, match=meant):
        model.predict(images(), given)


@pytest.mark.parametrize("shape", [(b, 3), (b + 1, E), (2, 1), (1, 1, E), (b,)], ids=str)
def test_a_threshold_that_does_not_broadcast_is_refused_with_both_shapes(shape):
    with pytest.raises(PteeError, match=rf"\({', '.join(map(str, shape))},?\).*\({b}, {E}\)"):
        made().predict(images(), torch.full(shape, 0.5))


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (2, 4)], ids=str)
def test_the_threshold_is_set_by_one_number_for_each_exit_and_not_by_a_table(shape):
    with pytest.raises(PteeError, match=f"{shape[0]} x {shape[1]} thresholds for 4 exits"):
        for_each_exit(torch.full(shape, 0.1).tolist(), 4)


def test_numbers_are_not_rounded_to_float32():
    assert for_each_exit([0.1, 0.2], 2) == (0.1, 0.2)
    assert for_each_row([0.1, 0.2], 2, 5, torch.device("cpu")) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("device", "given", "sent"),
    [
        ("mps", torch.float64, torch.float32),  # there is no float64
        ("mps", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float64, torch.float64),
    ],
)
def test_a_threshold_goes_to_a_device_once_in_a_type_that_is_there(device, given, sent):
    asked: list[Any] = []

    class Staying(Tensor):
        def to(self, *where: Any) -> Tensor:
            asked.append(where)
            return self

    for_each_row(torch.zeros(1, 2, dtype=given).as_subclass(Staying), 2, 3, torch.device(device))
    assert [where for where in asked if where[0] == torch.device(device)] == [(torch.device(device), sent)]


def test_on_a_device_without_float64_no_threshold_gets_lower(monkeypatch):
    monkeypatch.setitem(_HAS_FLOAT64, here().type, False)
    above = 1 + 1e-12  # float32 would round it to 1, and a row of confidence 1 would leave
    each = for_each_row(torch.tensor([[above, 0.5]], dtype=torch.float64, device="cpu"), 2, 3, here())
    assert [t.dtype for t in each] == [torch.float32] * 2
    assert [t.tolist() for t in each] == [[1 + 2**-23] * 3, [0.5] * 3]
