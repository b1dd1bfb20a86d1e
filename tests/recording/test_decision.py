"""Who leaves at an exit, decided on the device: in torch and in a kernel."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from device import here, seeded
from torch import Tensor

from ptee.exits.confidence import CONFIDENCES, first_exit
from ptee.recording.decision import Answers, Staying, decide, end

COSTS = (0.1, 0.2, 0.5, 1.0)


def answers(rows: int, classes: int, thresholds: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Answers:
    made = Answers(rows, classes, COSTS, dtype, here())
    if thresholds is not None:
        made.thresholds[:rows] = thresholds
    return made


@pytest.mark.parametrize("b", [1, 2, 7, 40])
def test_each_row_leaves_at_its_first_exit_whatever_places_it_moves_through(b):
    h, logits = torch.rand(3, b, generator=seeded(b)), torch.randn(4, b, 5, generator=seeded(b))
    limits = torch.rand(b, 3, generator=seeded(b + 1), dtype=torch.float64)
    found, rows = answers(b, 5, limits), torch.arange(b)
    for n in range(3):
        own = rows.clamp(max=b - 1)  # what empty places hold is nobody's
        staying = decide(found, n, rows, logits[n][own], h[n][own])
        assert staying.number == (staying.rows < b).sum() == (staying.packed < b).sum()
        rows = staying.rows if n % 2 else staying.packed[: max(1, int(staying.number))]
    end(found, rows, logits[3][rows.clamp(max=b - 1)])
    got, exit, confidence, cost = found.of_rows(b)
    want = torch.stack([first_exit(h[:, [i]], limits[i])[0] for i in range(b)])
    assert torch.equal(exit, want)
    assert torch.equal(got, logits[want, torch.arange(b)])
    assert torch.equal(confidence, torch.cat([h, torch.ones(1, b)])[want, torch.arange(b)])
    assert torch.equal(cost, torch.tensor(COSTS)[want])


def test_order_says_from_which_places_the_rows_come_that_stay():
    rows = torch.tensor([0, 9, 2, 3, 9, 5])  # 9 is nobody
    found = answers(9, 2, torch.full((9, 3), 0.5, dtype=torch.float64))
    staying = decide(found, 0, rows, torch.zeros(6, 2), torch.tensor([0.1, 0.1, 0.9, 0.2, 0.9, 0.3]))
    assert staying.order[:3].tolist() == [0, 3, 5]
    assert staying.packed.tolist() == [0, 3, 5, 9, 9, 9]
    assert staying.rows.tolist() == [0, 9, 9, 3, 9, 5]


def test_a_confidence_of_nan_never_leaves():
    found = answers(2, 2)
    staying = decide(found, 0, torch.arange(2), torch.zeros(2, 2), torch.tensor([torch.nan, 0.0]))
    assert staying.packed.tolist() == [0, 2]


def test_answers_that_were_given_out_do_not_change():
    found = answers(2, 2)
    out = found.of_rows(2)
    end(found, torch.arange(2), torch.ones(2, 2))
    assert all((part == 0).all() for part in out)


@pytest.mark.cuda
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("b", [1, 7, 40, 256])
@pytest.mark.parametrize("name", ["learned", "max_prob", "margin"])
def test_the_kernel_decides_as_torch_does(name, b, classes):
    from ptee.recording import kernels

    kernel_decides_as_torch(kernels, name, b, classes)


@pytest.mark.cuda
def test_the_kernel_keeps_all_digits_of_double_precision():
    from ptee.recording import kernels

    kernel_decides_as_torch(kernels, "margin", 40, 10, torch.float64)


@pytest.mark.slow
@pytest.mark.cpu("the kernel runs as it is on a GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which comes with torch for NVIDIA GPUs")
def test_the_kernel_decides_as_torch_does_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read at the import, so in a process of its own
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def kernel_decides_as_torch(kernels, name: str, b: int, classes: int, dtype: torch.dtype = torch.float32) -> None:
    """Some rows are nobody's, and some have logits or confidence logits that are not finite."""
    g = seeded(b + classes)
    rows = torch.arange(b).where(torch.rand(b, generator=g) < 0.7, 300)
    logits, sure = 3 * torch.randn(b, classes, generator=g, dtype=dtype), torch.randn(b, generator=g)
    if b > 5:
        logits[1, 0], sure[2], logits[3, 1], logits[4] = torch.nan, torch.inf, -torch.inf, torch.inf
    h = CONFIDENCES[name](1, logits, [], sure, 3)
    limits = torch.rand(300, 3, generator=g, dtype=torch.float64)
    mine, its = answers(300, classes, limits, dtype), answers(300, classes, limits, dtype)
    want, number = decide(mine, 1, rows, logits, h), torch.zeros(1, dtype=torch.int64)
    kind = kernels.KINDS.get(name, kernels.GIVEN)
    got: Staying = kernels.decide(its, 1, rows, logits, h if kind == kernels.GIVEN else sure, kind, number)
    for a, other in zip(want, got, strict=True):
        assert torch.equal(a.flatten(), other.flatten())
    for a, other in zip(mine.of_rows(300), its.of_rows(300), strict=True):
        torch.testing.assert_close(other, a, equal_nan=True)
    if dtype == torch.float64:
        assert torch.equal(mine.logits.nan_to_num(), its.logits.nan_to_num()), "no digit is lost"


if __name__ == "__main__":
    from ptee.recording import kernels

    for case in (("learned", 1, 10), ("max_prob", 7, 10), ("margin", 40, 3), ("learned", 40, 1000)):
        kernel_decides_as_torch(kernels, *case)
    kernel_decides_as_torch(kernels, "margin", 40, 10, torch.float64)
