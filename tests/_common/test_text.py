from __future__ import annotations

import pytest
from device import here
from hypothesis import given
from hypothesis import strategies as st
from small import labelled, made
from torch.utils.data import TensorDataset

import ptee
from ptee._common.text import beside, percent, shown


def test_a_number_that_python_does_not_write_is_described():
    assert shown(16**5000) == "a number of thousands of digits"


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0, 1, "0.0%"), (1, 1, "100.0%"), (0.25, 1, "25.0%"), (0.9996, 1, ">99.9%"), (0.9996, 0, ">99%"), (0.0004, 1, "<0.1%"),
        (0.996, 0, ">99%"), (1 - 1e-17, 1, "100.0%"), (-1e-17, 1, "0.0%"), (1.004, 0, "100%"),
    ],
)  # fmt: skip
def test_only_none_and_all_are_0_and_100_per_cent(share, digits, text):
    assert percent(share, digits) == text


@given(value=st.floats(-1, 2), limit=st.sampled_from([0.0, 0.01, 0.5, 1.0, -0.02, 0.123456]))
def test_a_number_beside_its_limit_is_seen_to_be_within_or_beyond_it(value, limit):
    told = float(beside(value, limit))
    assert (told > limit) == (round(value, 9) > limit)
    assert abs(told - value) <= 0.5001e-4


class Printer:
    """IPython's, as far as it matters: the first class that has either method says how an object is shown."""

    def __init__(self, value: object) -> None:
        self.said = ""
        found = next(c for c in type(value).__mro__ if {"_repr_pretty_", "__repr__"} & vars(c).keys())
        if shows := vars(found).get("_repr_pretty_"):
            shows(value, self, False)
        else:
            self.text(repr(value))

    def text(self, text: str) -> None:
        self.said += text


def test_results_as_the_last_line_of_a_notebook_s_cell_show_what_print_shows():
    model, data = made(), TensorDataset(*labelled(60))
    results = [model.plan, ptee.train(model, data, epochs=1, device=here()), ptee.calibrate(model, data)]
    results += [ptee.tune(model, data, max_fidelity_drop=0.5), model.curve, ptee.evaluate(model, data, speed=False)]
    for each in [*results, ptee.compare({"a": model}, data, data)]:
        assert Printer(each).said == str(each) != repr(each)
