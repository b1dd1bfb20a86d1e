"""A model that cannot be captured is refused in one line, with the operator and the line of its code that stands in the way."""

from __future__ import annotations

import errno
import functools
import linecache

import numpy as np
import pytest
import torch
from device import seeded
from extras import needs_onnx
from small import K, made
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError, RunError
from ptee.deploy.refusal import at
from ptee.deploy.segments import segments

pytestmark = pytest.mark.cpu("what is captured is the same on every device")


class Network(nn.Module):
    """A network with a step in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.step(self.a(x))).mean((2, 3)))

    def step(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Asks(Network):
    def step(self, x: Tensor) -> Tensor:
        if x.max() > 1e9:
            x = x + 1
        return x


class Takes(Network):
    def step(self, x: Tensor) -> Tensor:
        largest = x.amax().item()
        return x * 0 if largest > 1e9 else x


class LeavesTorch(Network):
    def step(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.abs(x.numpy()))


class Counts(Network):
    def step(self, x: Tensor) -> Tensor:
        rows = len(x)
        return x * 1.0 if rows > 5 else x


CASES = {
    Asks: r"bool in test_refusal\.py, line \d+ \(if x\.max\(\) > 1e9:\) stands in the way\. .* the values in the images\.",
    Takes: r"bool in test_refusal\.py, line \d+ \(return x \* 0 if largest > 1e9 else x\) stands in the way",
    LeavesTorch: r"numpy in test_refusal\.py, line \d+ \(return torch\.from_numpy\(np\.abs\(x\.numpy\(\)\)\)\) stands in",
    Counts: r"test_refusal\.py, line \d+ \(rows = len\(x\)\) turns the number of rows into a fixed number\. Use x\.shape",
}


@pytest.mark.parametrize(("network", "said"), CASES.items(), ids=lambda c: getattr(c, "__name__", ""))
def test_the_operator_and_the_line_that_stand_in_the_way_are_named(network, said, capfd):
    model = ptee.augment(network(), exits=["a"], head="pool", input_size=(3, 8, 8))
    capfd.readouterr()
    with pytest.raises(PteeError, match=rf"^torch\.export cannot capture {network.__name__}: {said}") as refused:
        segments(model)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")  # torch.export prints its graph


@functools.cache
def table(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, n, dtype=dtype, device=device)


class Caches(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.c((x * table(x.shape[-1], x.dtype, x.device)).mean((2, 3)))


def test_a_table_that_a_network_keeps_for_each_number_type_is_made_of_numbers_before_the_capture():
    model = ptee.augment(Caches(), exits=["a"], head="pool", input_size=(3, 8, 8)).double()
    segments(model)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=seeded(0))
    assert type(model.predict(x, 2.0).logits) is Tensor


class Bessel(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.special.bessel_j0(self.a(x))
        return self.c(self.b(x).mean((2, 3)))


@needs_onnx
def test_an_operator_that_onnx_does_not_have_is_named_with_the_line_that_asks_for_it(tmp_path):
    model = ptee.augment(Bessel(), exits=["a"], head="pool", input_size=(3, 8, 8))
    said = (
        r"^Bessel cannot be written as onnx: \S*bessel_j0\S* in test_refusal\.py, line \d+ \(x = torch\.special\.bess"
    )
    with pytest.raises(PteeError, match=said) as refused:
        ptee.export(model, tmp_path / "out", format="onnx")
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_step_of_a_graph_is_named_with_the_line_that_asks_for_it():
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    assert at(node) == "aten.relu.default"
    node.meta["stack_trace"] = (
        f'  File "{__file__}", line 3, in forward\n    x\n  File "{torch.__file__}", line 9, in y\n    z\n'
    )
    assert at(node) == f"aten.relu.default in test_refusal.py, line 3 ({linecache.getline(__file__, 3).strip()})"


@needs_onnx
def test_a_number_type_that_onnx_runtime_cannot_run_is_named_without_the_place_of_a_file(tmp_path):
    said = r"in float64 cannot be run: .* Call model\.float\(\) first, or use another format="
    with pytest.raises(PteeError, match=said) as why:
        ptee.export(made().double(), tmp_path / "out", format="onnx")
    assert "/" not in str(why.value)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_no_reason_for_another_format(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ptee.deploy.export._save", full)
    with pytest.raises(RunError, match=r"Cannot write .*piece_0\.pt2: No space left on device\. Make room"):
        ptee.export(made(), tmp_path / "out")
