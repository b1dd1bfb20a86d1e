"""What belongs to the whole process is as it was before, however many threads have used ptee at once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from io import StringIO

import pytest
import torch
from device import here
from forked import in_a_child
from small import SIZE, labelled, made
from torch import nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.process import (
    LOUD,
    REPORTS_OFF,
    Lock,
    no_fused_attention,
    no_logs,
    no_pickles,
    no_stderr,
    no_stdout,
    no_warnings,
    own_export,
    own_random_numbers,
    report_nothing,
)
from ptee.analysis.arithmetic import exact_arithmetic, same_each_time
from ptee.backbones.library import building
from ptee.backbones.load import load_backbone

CHANGES = {
    "logs": no_logs,
    "warnings": no_warnings,
    "stdout": no_stdout,
    "stderr": no_stderr,
    "pickles": no_pickles,
    "attention": no_fused_attention,
    "arithmetic": exact_arithmetic,
    "same each time": same_each_time,
}


def state() -> dict[str, object]:
    """What ptee changes of the process."""
    return {
        "stdout": sys.stdout,
        "stderr": sys.stderr,
        "levels": [logging.getLogger(name).level for name in LOUD],
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "environment": dict(os.environ),
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
        "same algorithm": torch.backends.cudnn.deterministic,
    }


def at_once(*works: Callable[[], object]) -> list[object]:
    """Run each in a thread of its own, all begun together. Returns what they return."""
    meeting, device = threading.Barrier(len(works)), here()

    def begin(work: Callable[[], object]) -> object:
        meeting.wait(60)
        with device:  # a thread's own default is the CPU
            return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(120) for future in [pool.submit(begin, work) for work in works]]


def test_threads_that_load_build_and_augment_at_once_leave_the_process_as_it_was(tmp_path):
    made().save_pretrained(tmp_path)
    x, before = labelled(4)[0], state()

    def by_name() -> object:
        net = load_backbone("cifar_resnet8", pretrained=False).module
        return ptee.augment(net, exits=["layer1", "layer2"], input_size=(3, 32, 32)).predict(torch.randn(2, 3, 32, 32))

    def own() -> object:
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
        return ptee.augment(net.to(x.device), exits=["0"], input_size=SIZE).predict(x)

    def loaded() -> object:
        return ptee.load(tmp_path, made().backbone).predict(x)

    def repeated(work: Callable[[], object]) -> Callable[[], object]:
        return lambda: [work() for _ in range(3)]

    found = at_once(*[repeated(work) for work in (by_name, own, loaded, by_name, own, loaded)])
    assert all(out.logits.isfinite().all() for outs in found for out in outs)
    assert state() == before


def test_threads_inside_a_library_at_once_leave_the_process_as_it_was():
    before, inside = state(), threading.Semaphore(0)

    def work() -> None:
        with building("a network", {}, None):
            inside.release()
            inside.acquire(timeout=0.05)  # another thread may come in now, if anything lets it

    at_once(*[work] * 6)
    assert state() == before


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_undone_when_the_last_to_enter_it_has_left(name):
    change, before = CHANGES[name], state()
    with change:
        changed = state()
        with change:
            assert state() == changed
        assert state() == changed
    assert changed != before
    assert state() == before


def test_changes_may_be_left_in_any_order():
    before = state()
    stacks = [ExitStack() for _ in range(3)]
    for stack in stacks:
        for change in CHANGES.values():
            stack.enter_context(change)
    for stack in (stacks[0], stacks[2], stacks[1]):
        stack.close()
    assert state() == before


def test_during_a_long_change_others_come_and_go():
    before = state()
    with same_each_time:
        during = state()

        def work() -> None:
            with exact_arithmetic, same_each_time, no_warnings:
                pass
            assert state() == during

        at_once(*[work] * 3)
        assert state() == during
    assert state() == before


def test_while_heads_learn_the_same_algorithms_run_whatever_the_user_has_set(monkeypatch):
    cudnn, data, seen = torch.backends.cudnn, TensorDataset(*labelled(16)), []
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)

    def look(_: object) -> None:
        seen.append((cudnn.benchmark, cudnn.deterministic))

    model = made()
    ptee.train(model, data, epochs=1, views=1, device=here(), on_cache=look, on_epoch=look)
    assert seen == [(False, True)] * 2
    with pytest.raises(ZeroDivisionError):
        ptee.train(model, data, epochs=1, views=1, device=here(), on_epoch=lambda _: 1 // 0)
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)


def test_a_library_that_fails_leaves_the_process_as_it_was():
    before = state()
    with pytest.raises(ptee.PteeError, match="cannot be built"), building("a network", {}, None):
        raise OSError("on purpose")
    assert state() == before


def test_other_threads_go_on_printing_while_a_library_is_quiet(capsys):
    with no_stdout:
        print("of the library")
        at_once(lambda: print("of another thread"))
    print("afterwards")
    assert capsys.readouterr().out == "of another thread\nafterwards\n"


def test_standard_output_that_is_redirected_meanwhile_is_restored():
    before = sys.stdout
    outer, inner = ExitStack(), ExitStack()
    outer.enter_context(redirect_stdout(StringIO()))
    inner.enter_context(no_stdout)
    outer.close()
    inner.close()
    assert sys.stdout is before


def test_a_program_without_standard_output_can_build_networks(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    load_backbone("cifar_resnet8", pretrained=False)
    assert sys.stdout is None


# ---------------------------------------------------------------------------------------------------- random numbers


def test_threads_that_train_at_once_learn_what_each_learns_alone():
    data, device = TensorDataset(*labelled(16)), here()

    def trained(seed: int) -> list[torch.Tensor]:
        model = made("conv1")
        ptee.train(model, data, epochs=2, batch_size=4, seed=seed, shift=1, precision="no", device=device)
        return list(model.heads.state_dict().values())

    alone = [trained(seed) for seed in (1, 2, 3)]
    together = at_once(*[lambda seed=seed: trained(seed) for seed in (1, 2, 3)])
    assert all(
        torch.equal(a, b) for one, other in zip(alone, together, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_model_can_be_made_while_another_thread_trains():
    data, inside, done = TensorDataset(*labelled(8)), threading.Event(), threading.Event()

    def train() -> None:
        ptee.train(made(), data, epochs=1, on_epoch=lambda _: (inside.set(), done.wait(60)))

    def make() -> bool:
        assert inside.wait(60)
        load_backbone("cifar_resnet8", pretrained=False)
        ptee.augment(made().detach(), exits=["0"], head="conv1", input_size=SIZE)
        done.set()
        return True

    assert at_once(train, make)[1]


def test_random_numbers_go_on_as_if_none_had_been_drawn():
    before = torch.get_rng_state()
    with own_random_numbers(3):
        torch.rand(2)
        with own_random_numbers(wait=False):
            torch.rand(2)
    with own_random_numbers(wait=False):
        torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.cpu("its random numbers are kept themselves")
def test_a_gpu_that_is_used_later_begins_with_the_seed_of_the_user(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(42)
    with own_random_numbers(0):
        torch.manual_seed(7)
    assert seeds[-1] == 42
    seeds.clear()
    with own_random_numbers():
        torch.rand(2)
    assert not seeds, "one of its own is kept"


@pytest.mark.cpu("a child that was forked cannot use a GPU")
def test_a_forked_child_has_neither_the_locks_nor_the_changes_of_other_threads():
    before, inside, done = state(), threading.Event(), threading.Event()

    def hold() -> None:
        with own_random_numbers(), no_pickles, no_logs, no_fused_attention, no_warnings:
            inside.set()
            done.wait(60)

    def child() -> bool:
        free = state()
        with own_random_numbers(), no_pickles, no_stdout:
            changed = state() != before
        return free == before and changed and state() == before

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    try:
        assert in_a_child(child)
    finally:
        done.set()
        thread.join()
    assert state() == before


@pytest.mark.cpu("a child that was forked cannot use a GPU")
def test_a_forked_child_keeps_the_changes_of_the_thread_that_forked_it():
    with no_pickles, no_logs:
        inside = state()
        assert in_a_child(lambda: state() == inside)


@pytest.mark.cpu("a child that was forked cannot use a GPU")
def test_a_long_change_goes_on_in_a_forked_child():
    with same_each_time:
        assert in_a_child(lambda: torch.backends.cudnn.deterministic)


@pytest.mark.cpu("a child that was forked cannot use a GPU")
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_child_and_held_here():
    lock, inside, done = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    try:
        assert in_a_child(lambda: lock.acquire(blocking=False))
        assert not lock.acquire(blocking=False)
    finally:
        done.set()
        thread.join()


@pytest.mark.cpu("a child that was forked cannot use a GPU")
def test_a_lock_that_this_thread_holds_is_still_held_in_a_forked_child():
    lock = Lock()
    with lock:
        assert in_a_child(lambda: not at_once(lambda: lock.acquire(blocking=False))[0])


def test_while_ptee_exports_torch_writes_the_code_of_a_graph_only_where_it_is_run():
    from torch.fx import _lazy_graph_module as graphs

    with own_export:
        assert graphs._use_lazy_graph_module_flag
    assert not graphs._use_lazy_graph_module_flag


def test_an_export_goes_on_where_torch_has_no_such_graphs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.fx._lazy_graph_module", None)
    with own_export:
        pass


@pytest.mark.parametrize(
    "given", [{}, {"ORT_DISABLE_TELEMETRY": "0", "RAY_USAGE_STATS_ENABLED": "1"}], ids=["not", "on"]
)
def test_reports_over_the_network_are_off_where_nobody_has_said_anything(given, monkeypatch):
    for name in REPORTS_OFF:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    report_nothing()
    assert {name: os.environ[name] for name in REPORTS_OFF} == (given or REPORTS_OFF)


def test_onnx_runtime_is_told_before_it_begins(tmp_path):
    pytest.importorskip("onnxruntime")
    code = "from pathlib import Path\nfrom ptee.deploy.runner import onnx_piece\nonnx_piece(Path('none.onnx'), 'cpu')"
    env = {name: value for name, value in os.environ.items() if name not in ("CI", *REPORTS_OFF)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert "is no model that ONNX Runtime can read" in done.stderr
    assert list(tmp_path.iterdir()) == [], "where its reports are on, it keeps a number of this machine here"
