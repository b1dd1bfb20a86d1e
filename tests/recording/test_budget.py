"""The memory of recordings is told before, and has a limit. A stand-in says what a GPU would."""

from __future__ import annotations

import pytest
import torch
from device import seeded
from small import SIZE, made

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.arithmetic import tolerance
from ptee.exits.config import NEVER
from ptee.recording import buckets, budget

A_ROW = 2**28  # bytes: four rows take a GiB


@pytest.fixture
def gpu(monkeypatch) -> None:
    """Recording a bucket takes what a pass of its size is said to take."""

    def peak(device: torch.device, work) -> int:
        rows: list[int] = []
        handle = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: rows.append(len(args[0]))
        )
        try:
            work()
        finally:
            handle.remove()
        return rows[0] * A_ROW

    def spend(self, work) -> None:
        before = set(self.buckets)
        work()
        self.spent += sum(set(self.buckets) - before) * A_ROW

    monkeypatch.setattr(buckets, "peak", peak)
    monkeypatch.setattr(budget.Budget, "spend", spend)


def optimized(**more) -> tuple[ptee.EarlyExitModel, object]:
    early = made()
    fast = ptee.optimize(early, mode="eager", max_batch=16, **more)
    fast._buckets.budget.buckets = fast._buckets._buckets
    return early, fast


def half(early: ptee.EarlyExitModel, x: torch.Tensor) -> list[float]:
    """Thresholds under which half of the rows leave at the first exit."""
    h = early.all_exits(x).confidence[0].detach().sort().values
    return [float(h[len(x) // 2 - 1] + h[len(x) // 2]) / 2, NEVER]


def test_what_a_size_takes_is_told_before(gpu):
    _, fast = optimized()
    assert fast.memory_for(8) == 8 * A_ROW and fast.memory_for(7) == fast.memory_for(8)
    assert not fast._buckets._buckets, "nothing was recorded"
    with pytest.raises(PteeError, match="1 to 16 images"):
        fast.memory_for(17)


def test_a_batch_for_which_there_is_no_room_is_refused(gpu):
    _, fast = optimized(max_memory=2)
    with pytest.raises(PteeError, match=r"batches of 16 takes about 4\.00 GiB .*2\.00 GiB is the limit.*max_memory=4"):
        fast.predict(torch.zeros(16, *SIZE))
    assert len(fast.predict(torch.zeros(8, *SIZE)).logits) == 8


def test_rows_go_on_in_the_larger_batch_where_a_smaller_one_cannot_be_recorded(gpu):
    early, fast = optimized(max_memory=4.5)
    x = torch.randn(16, *SIZE, generator=seeded(3))
    limits = half(early, x)
    want, got = early.predict(x, limits), fast.predict(x, limits)
    assert set(fast._buckets._buckets) == {16}
    assert torch.equal(got.exit_index, want.exit_index)
    near = tolerance(x.dtype, x.device)
    torch.testing.assert_close(got.logits, want.logits, rtol=near, atol=near)


def test_what_a_size_takes_is_asked_once_however_often_there_is_no_room(gpu, monkeypatch):
    early, fast = optimized(max_memory=4.5)
    x = torch.randn(16, *SIZE, generator=seeded(3))
    limits, asked, tell = half(early, x), [], buckets.peak
    monkeypatch.setattr(buckets, "peak", lambda device, work: (asked.append(device), tell(device, work))[1])
    for _ in range(3):
        fast.predict(x, limits)
    assert len(asked) == 2, "of 16 rows and of 8"


def test_without_a_limit_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(buckets, "peak", None)
    early, fast = optimized()
    x = torch.randn(16, *SIZE, generator=seeded(3))
    fast.predict(x, half(early, x))
    assert set(fast._buckets._buckets) == {8, 16}


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "4"])
def test_a_limit_that_is_no_number_of_gib_is_refused(wrong):
    with pytest.raises(PteeError, match=r"max_memory=.* is no number of GiB above 0"):
        ptee.optimize(made(), max_memory=wrong)
