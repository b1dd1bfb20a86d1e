from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from measured import values
from small import SIZE, made

from ptee._common.progress import LogLines
from ptee.timing import run_bench
from ptee.timing.measure import measure
from ptee.timing.run_bench import AS_IT_IS, BELOW_ZERO, RATIOS, Line, RunBench, bench_run
from ptee.timing.times import Times


@pytest.fixture(scope="module")
def times() -> Times:
    return measure(made(), [1, 4], ["hooks", "eager"], rounds=3, seconds=0)


def test_every_batch_size_has_every_executor_and_every_way_to_leave(times):
    found = bench_run(made(), times, [1, 4], torch.randn(9, *SIZE), rounds=3)
    ways = [(line.batch, line.executor, line.leaving) for line in found.lines]
    of_one = ["nobody", "all at exit 0", "own thresholds"]
    of_four = ["nobody", "half at exit 0", "all at exit 0", "own thresholds"]
    assert ways == [
        (1, *AS_IT_IS), *((1, by, way) for by in ("hooks", "eager") for way in of_one),
        (4, *AS_IT_IS), *((4, by, way) for by in ("hooks", "eager") for way in of_four),
    ]  # fmt: skip
    for line in found.lines:
        assert (line.counted is None) == (line.limit is None) == (line.leaving == "bare backbone")


def test_without_real_images_there_are_no_own_thresholds(times):
    found = bench_run(made(), times, [4], None, rounds=3, note="Left out.")
    assert "own thresholds" not in [line.leaving for line in found.lines]
    assert "\n\nLeft out." in str(found)


def test_counted_costs_and_limits_are_of_the_rows_that_come_to_each_piece(monkeypatch, times):
    monkeypatch.setattr(run_bench, "in_turns", lambda calls, *_, **__: {name: [1.0] * 3 for name in calls})
    model = made()
    model.threshold = 0.0
    times = times.model_copy(update=Times(**values(device=times.device)).model_dump(include={"rows", "eager"}))
    times = Times(**{**times.model_dump(), "executors": values()["executors"]})
    found = {line.leaving: line for line in bench_run(model, times, [4], torch.randn(8, *SIZE)).lines}
    first, _, last = model.costs
    assert found["nobody"].counted == pytest.approx(last)
    assert found["half at exit 0"].counted == pytest.approx((first + last) / 2)
    assert found["own thresholds"].counted == pytest.approx(first)
    # (of 2 s) all pieces of 4 rows; and 4 rows to exit 0, two from there
    assert found["nobody"].limit == pytest.approx((0.4 + 0.1 + 1.0 + 0.4 + 0.1) / 2)
    assert found["half at exit 0"].limit == pytest.approx((0.4 + 0.4 + 0.1 + 0.1 + (0.5 + 0.5 / 3)) / 2)
    assert found["own thresholds"].limit == found["all at exit 0"].limit == pytest.approx((0.4 + 0.4) / 2)
    assert found["nobody"].time == 1
    assert found["nobody"].lost == pytest.approx(0)


def test_the_table_names_its_units_and_the_legend_its_columns():
    lines = (
        Line(4, "torch", "bare backbone", 0.01, 1.0, 1.0),
        Line(4, "hooks", "nobody", 0.012, 1.2, 1.2, 1.02, 1.1),
        Line(4, "graphs", "nobody", 0.006, 1.1, 0.6, 1.02, 1.0),
    )
    found = RunBench(Times(**values()), lines[:2])
    assert str(found).splitlines() == [
        "Sequential with 2 exits on box, 1 thread, float32",
        "Times are shares of the bare backbone's time; counted: of its multiply-accumulates.",
        "",
        "batch  by     who leaves        ms  / bare  counted  limit   lost",
        "-----------------------------------------------------------------",
        "    4  torch  bare backbone  10.00   1.000        -      -      -",
        "    4  hooks  nobody         12.00   1.200    1.020  1.100  0.100",
        "",
        RATIOS.format("bare"),
    ]
    below_zero = RunBench(Times(**values()), (lines[0], replace(lines[1], limit=1.3)))
    assert str(below_zero).endswith(f"{RATIOS.format('bare')} {BELOW_ZERO}")
    noisy = RunBench(Times(**values()), (lines[0], replace(lines[1], spread=0.83)))
    assert str(noisy).endswith(
        "The rounds of one line differ by 83%, as where other programs run meanwhile. Repeat it on a quiet machine."
    )
    assert "/ torch" in str(RunBench(Times(**values()), lines))
    for column in ("by", "ms", "/ bare", "/ torch", "counted", "limit", "lost"):
        assert f"\n{column}: " in f"\n{found.legend}"
    assert json.loads(json.dumps(found.to_dict()))["lines"][1]["lost"] == pytest.approx(0.1)


def test_steps_that_are_short_each_are_counted_together_in_a_log(monkeypatch, times, capsys):
    monkeypatch.setattr(run_bench, "with_bar", lambda items, words: LogLines(items, words, seconds=0.01))
    slow = lambda calls, *_, **__: time.sleep(0.1) or {name: [1.0] * 3 for name in calls}  # noqa: E731
    monkeypatch.setattr(run_bench, "in_turns", slow)
    bench_run(made(), times, [1, 4])
    assert "measuring sizes of batches: 1 of 2 done" in capsys.readouterr().err
