"""Pieces measured with a clock that moves only when a layer runs: what is spent where is known exactly."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from device import here
from small import SIZE, Normalises, chained, made
from torch import nn

import ptee
from ptee._common.errors import PteeError
from ptee.backbones.load import load_backbone
from ptee.timing import laps
from ptee.timing import measure as timing_measure
from ptee.timing.backbone import time_of_modules
from ptee.timing.laps import Laps, in_turns
from ptee.timing.measure import all_on, bare_by, hook_laps, measure, measure_static
from ptee.timing.run_bench import bench_run

pytestmark = pytest.mark.cpu("a GPU looks at its own clock")


@pytest.mark.parametrize("way", ["measure", "bench a run", "evaluate", "modules", "a smaller network"])
def test_a_network_that_writes_into_its_images_is_timed_on_the_same_images_each_time(way):
    model = ptee.augment(Normalises(), exits=["a"], input_size=SIZE, head="pool")
    images, kept = torch.randn(20, *SIZE), Kept()
    times = measure(model, [2], rounds=3)
    model.backbone.a.register_forward_pre_hook(kept)
    if way == "measure":
        measure(model, [2], rounds=3)
    elif way == "bench a run":
        bench_run(model, times, [2], images, rounds=3)
    elif way == "evaluate":
        ptee.evaluate(model, [(image.clone(), 0) for image in images], speed=True, speed_seconds=0.1)
    elif way == "a smaller network":
        other = made("pool")
        measure_static(model.origin, other, here(), 2)
    else:
        time_of_modules(model.origin, here(), 2, rounds=3)
    assert 0 < kept.largest < 30
    again = images[:2].clone().to(here())
    model.backbone(again)
    assert not torch.equal(again.cpu(), images[:2])  # as before


class Kept:
    """The largest number that a layer was given."""

    largest = 0.0

    def __call__(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.largest = max(self.largest, float(args[0].abs().max()))


class Clock:
    """Each part of a model takes as many seconds as it is told, times the rows."""

    def __init__(self) -> None:
        self.now = 0.0

    def slow(self, module: nn.Module, seconds: float) -> None:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.now += seconds * len(args[0])

        module.register_forward_pre_hook(hook)


@pytest.fixture
def clock(monkeypatch) -> Iterator[Clock]:
    made_up = Clock()
    monkeypatch.setattr(laps.time, "perf_counter", lambda: made_up.now)
    yield made_up


@pytest.fixture
def slow(clock) -> ptee.EarlyExitModel:
    """Layers 0 and 1 before and behind exit 0 take 1 and 2 seconds a row, layer 5 behind exit 1 takes 4; the heads 0.5 and 0.25."""
    model = made()
    for layer, seconds in ((0, 1.0), (1, 2.0), (5, 4.0)):
        clock.slow(model.backbone[layer], seconds)
    for head, seconds in zip(model.heads, (0.5, 0.25), strict=True):
        clock.slow(head, seconds)
    return model


def test_each_piece_and_each_head_gets_what_was_spent_in_it(slow):
    times = measure(slow, [1, 4], rounds=3, seconds=1e9)
    (hooks,) = times.executors
    assert times.rows == (1, 2, 3, 4)
    for i, rows in enumerate(times.rows):
        assert [t[i] for t in hooks.segments] == pytest.approx([1 * rows, 2 * rows, 4 * rows])
        assert [t[i] for t in hooks.heads] == pytest.approx([0.5 * rows, 0.25 * rows])
        assert hooks.bare[i] == times.eager[i] == pytest.approx(7 * rows)
        assert hooks.call[i] == 0
    assert (times.exits, times.heads, times.dtype, times.device) == (("0", "2"), ("pool", "pool"), "float32", "cpu")


def test_exits_that_are_off_are_measured_and_stay_off(slow):
    slow.off = [0]
    times = measure(slow, [2], rounds=3, seconds=1e9)
    assert times.executors[0].heads[0][-1] == pytest.approx(1.0)
    assert (slow.off, slow.threshold) == ((0,), [0.5, 0.5])


def test_measuring_leaves_no_hook_behind_and_changes_no_answer():
    model, x = made(), torch.randn(4, *SIZE)
    before, hooks = model.predict(x), [len(part._forward_hooks) for part in model.modules()]
    measure(model, [4], ["hooks", "eager"], rounds=3, seconds=0)
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    for old, new in zip(before, model.predict(x), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(made, id="heads alone", marks=pytest.mark.slow),
        pytest.param(chained, id="heads that read earlier ones"),
    ],
)
def test_the_pieces_of_an_optimized_model_are_as_many_as_those_of_the_hooks(model):
    times = measure(model(), [3], ["hooks", "eager"], rounds=3, seconds=0)
    for m in times.executors:
        assert (len(m.segments), len(m.heads)) == (len(times.exits) + 1, len(times.exits))
        assert min(map(min, m.segments)) >= 0
        assert min(map(min, m.heads)) >= 0


def test_one_row_leaves_at_each_exit_where_moving_is_measured():
    model, x = all_on(made()), torch.randn(6, *SIZE)
    seen: list[int] = []
    handle = model.backbone[5].register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    for one_leaves in (False, True):
        hook_laps(model, x, lambda: None, one_leaves)
    handle.remove()
    assert seen == [6, 4]


def test_marks_enclose_the_backbone_and_each_head():
    model, marks = all_on(made()), Laps(here())
    hook_laps(model, torch.randn(2, *SIZE), marks)
    assert len(marks.seconds()) == 3 + 2 * len(model.exits)


def test_passes_are_picked_as_a_whole_so_that_the_parts_add_up(clock):
    lengths = iter([(9.0, 9.0), (1.0, 5.0), (4.0, 1.0), (50.0, 1.0), (1.0, 60.0)])  # the first does not count

    def call(mark) -> None:
        mark()
        for seconds in next(lengths):
            clock.now += seconds
            mark()

    assert in_turns({"a": [call]}, torch.device("cpu"), 4, 1e9) == {"a": [[2.5, 3.0]]}


@pytest.mark.parametrize(
    ("sizes", "executors", "said"),
    [([0], None, "such as batch_sizes"), ([1], ["hook"], "Did you mean 'hooks'"), ([1], ["graphs"], "need an NVIDIA GPU"), ([10**6], None, "1 to 4096")],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(sizes, executors, said):
    with pytest.raises(PteeError, match=said):
        measure(made(), sizes, executors)


def test_the_time_up_to_a_module_is_what_was_spent_until_it_had_run(slow, clock):
    backbone = load_backbone(slow.detach(), input_size=SIZE)
    hooks = [len(part._forward_hooks) for part in backbone.module.modules()]
    found = time_of_modules(backbone, here(), 2, rounds=3)
    assert [found.shares[name] for name in ("0", "1", "2", "5")] == pytest.approx([1 / 7, 3 / 7, 3 / 7, 1])
    assert found.seconds == pytest.approx(14)
    assert [len(part._forward_hooks) for part in backbone.module.modules()] == hooks


def test_a_smaller_network_is_the_first_exit_of_a_cascade(slow, clock):
    small = made().detach()
    clock.slow(small[0], 0.7)
    times = measure_static(load_backbone(small, input_size=SIZE), slow, here(), 2)
    assert times.heads[0].tolist() == pytest.approx([0, 0.05, 0.1])  # of 14 s
    assert times.segments[:, -1].tolist() == pytest.approx([0, 1])


def test_the_weights_that_a_recorded_backbone_reads_stay_as_long_as_it_is_called(monkeypatch):
    read = []

    class Graph:
        def record(self, work: partial) -> tuple[object, object]:
            read.append(weakref.ref(work.func))
            return work(), lambda: None

    monkeypatch.setattr(timing_measure, "Graphs", Graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    model = made()
    call = bare_by("graphs", model)(torch.zeros(4, *SIZE))
    gc.collect()
    assert read[0]() is not None
    assert read[0]() is not model.backbone
    del call
    gc.collect()
    assert read[0]() is None


def test_the_compiled_backbone_is_compiled_at_every_size_of_batches(monkeypatch):
    made_for, compile = [], torch.compile

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> object:
        return lambda *tensors: (made_for.append(len(tensors[-1])), graph(*tensors))[1]

    monkeypatch.setattr(
        torch, "compile", lambda piece, *, dynamic, **how: compile(piece, backend=backend, dynamic=dynamic)
    )
    model, sizes = made(), range(1, 13)
    for _ in range(2):  # once to measure the pieces, once for the table
        made_for.clear()
        call = bare_by("compile", model)
        with torch.no_grad():
            for b in sizes:
                call(torch.zeros(b, *SIZE))()
        assert len(made_for) == len(sizes)
