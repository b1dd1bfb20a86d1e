"""Work that is recorded as CUDA graphs, in one part or several. A stand-in for CUDA keeps the order of the calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from ptee._common.devices import wait
from ptee.recording.graphs import Graphs, dense

pytestmark = pytest.mark.cpu("a stand-in is in the place of CUDA")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What CUDA is asked to do."""
    calls: list[str] = []
    unended: list[tuple[int, int]] = []  # pools that a recording broke in
    handles = count(1)

    class Graph:
        def capture_begin(self, pool: tuple[int, int], **how: object) -> None:
            calls.append("begin")
            if pool in unended:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            self.pool = pool

        def capture_end(self) -> None:
            calls.append("end")
            if "work fails" in calls:
                unended.append(self.pool)
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def replay(self) -> None:
            calls.append("replay")

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    fakes = {
        "graph_pool_handle": lambda: (0, next(handles)),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "memory_reserved": lambda: 10,
        "memory_allocated": lambda: 4,
        "mem_get_info": lambda: (6, 16),
        "empty_cache": lambda: calls.append("memory is given back"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return calls


def test_work_is_tried_twice_then_recorded_and_repeated_once(calls):
    made, replay = Graphs().record(lambda: calls.append("work") or len(calls))
    assert calls == ["work", "work", "begin", "work", "end", "replay"]
    assert made == 4
    replay()
    assert calls[-1] == "replay"


def test_memory_that_is_kept_and_scarce_is_given_back_before_a_recording(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 16))
    Graphs().record(lambda: calls.append("work"))
    assert calls[:4] == ["work", "work", "memory is given back", "begin"]


def test_one_thread_records_at_a_time(calls):
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go_on.wait(10)
        calls.append("first")

    threads = [
        threading.Thread(target=Graphs().record, args=(work,)) for work in (first, lambda: calls.append("second"))
    ]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert "second" not in calls
    go_on.set()
    for thread in threads:
        thread.join()
    assert calls.index("second") > max(i for i, call in enumerate(calls) if call == "first")


def test_who_waits_for_the_whole_gpu_waits_until_nothing_is_recorded(calls, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: calls.append("waited"))
    begun, go_on = threading.Event(), threading.Event()
    recording = threading.Thread(target=Graphs().record, args=(lambda: (begun.set(), go_on.wait(10)),))
    recording.start()
    begun.wait(10)
    waiting = threading.Thread(target=wait, args=(torch.device("cuda"),))
    waiting.start()
    waiting.join(0.2)
    assert "waited" not in calls
    go_on.set()
    for thread in (recording, waiting):
        thread.join()
    assert calls[-2:] == ["replay", "waited"]


def test_an_expanded_tensor_gets_a_place_for_each_number():
    gate = torch.randn(2, 3, 1, 1).expand(2, 3, 4, 4)
    assert torch.equal(dense(gate), gate)
    dense(gate).zero_()
    plain = torch.randn(2, 3, 4, 4)
    assert dense(plain) is plain


def test_parts_are_recorded_one_behind_the_other(calls):
    def run(next_part: Callable[[], None]) -> None:
        calls.append("one")
        next_part()
        calls.append("two")

    assert len(Graphs().record_parts(run)) == 2
    assert calls == ["one", "two"] * 2 + ["begin", "one", "end", "begin", "two", "end", "replay", "replay"]


def test_the_reason_why_work_cannot_be_recorded_is_not_hidden_by_what_follows(calls):
    def work() -> None:
        if "begin" in calls:
            calls.append("work fails")
            raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        Graphs().record(work)
    assert calls == ["begin", "work fails", "end"]
