"""Exported models in seconds: as an executor beside the bare backbone, and a folder by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from extras import needs_onnx
from small import SIZE, made

import ptee
from ptee._common.errors import PteeError
from ptee.deploy.runner import onnx_piece
from ptee.timing import exported_bench
from ptee.timing.exported import OnnxModel, bare_onnx, runner_laps, without_head
from ptee.timing.exported_bench import bench_exported
from ptee.timing.laps import Laps
from ptee.timing.measure import measure
from ptee.timing.run_bench import bench_run

pytestmark = pytest.mark.cpu("what is exported is timed on a CPU")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> ptee.EarlyExitModel:
    return made().eval()


@pytest.fixture(scope="module")
def runner(model, tmp_path_factory) -> ptee.Runner:
    return ptee.load_exported(ptee.export(model, Path(tmp_path_factory.mktemp("pt2")) / "out"))


@pytest.fixture(scope="module")
def fast(model) -> OnnxModel:
    return OnnxModel(model)


@needs_onnx
def test_the_model_by_onnx_runtime_answers_as_predict(model, fast):
    x = torch.randn(5, *SIZE)
    want, got = model.predict(x, [0.4, 0.6]), fast.predict(x, [0.4, 0.6])
    assert got.exit_index.tolist() == want.exit_index.tolist()
    torch.testing.assert_close(torch.as_tensor(got.logits), want.logits, rtol=1e-4, atol=1e-4)


@needs_onnx
@pytest.mark.slow
def test_the_bare_backbone_by_onnx_runtime_is_one_piece_and_the_model_stays_as_it_is(model):
    x, off = torch.randn(3, *SIZE), model.off
    bare = bare_onnx(model)
    assert len(bare.runner.pieces) == 1
    assert model.off == off
    torch.testing.assert_close(torch.as_tensor(bare.predict(x).logits), model.bare(x), rtol=1e-4, atol=1e-4)


@needs_onnx
@pytest.mark.slow
def test_without_its_head_a_piece_gives_what_is_alive_behind_its_cut_and_computes_less(model, tmp_path):
    import onnx

    file = ptee.export(model, tmp_path / "out", format="onnx") / "piece_0.onnx"
    bare, x = without_head(file), torch.randn(3, *SIZE).numpy()
    behind, alive = onnx_piece(bare, "cpu")(x), onnx_piece(file, "cpu")(x)
    assert len(alive) == len(behind) + 2
    for one, other in zip(behind, alive, strict=False):
        assert (one == other).all()
    nodes = [{node.op_type for node in onnx.load(each).graph.node} for each in (file, bare)]
    assert "Conv" in nodes[1] and {"Gemm", "MatMul"} & nodes[0] and not {"Gemm", "MatMul"} & nodes[1]


@needs_onnx
@pytest.mark.slow
def test_a_dear_head_is_no_part_of_the_backbones_time(model):
    times = measure(made("conv1"), [4], ["onnx"], rounds=3, seconds=0)
    assert max(max(head) for head in times.executors[0].heads) > 0


@needs_onnx
def test_marks_enclose_each_piece_once(fast):
    x = torch.randn(3, *SIZE)
    for pass_of, laps in ((fast.laps, 3 + 2), (fast.laps_without_heads, 3)):
        seen = Laps(CPU)
        pass_of(x, seen)
        assert len(seen.seconds()) == laps


@needs_onnx
@pytest.mark.slow
def test_onnx_is_an_executor_like_the_others(model):
    times = measure(model, [1, 4], ["onnx"], rounds=3, seconds=0)
    assert [m.executor for m in times.executors] == ["onnx"]
    found = bench_run(model, times, [4], torch.randn(8, *SIZE), rounds=3)
    ways = [(line.executor, line.leaving) for line in found.lines]
    assert ways[:2] == [("torch", "bare backbone"), ("onnx", "bare backbone")]
    assert [way for by, way in ways[2:] if by == "onnx"] == [
        "nobody",
        "half at exit 0",
        "all at exit 0",
        "own thresholds",
    ]
    assert "/ torch" in str(found)


def test_a_model_elsewhere_is_refused_by_name(model, monkeypatch):
    monkeypatch.setattr("ptee.timing.exported.one_parameter", lambda _: torch.zeros(1, device="meta"))
    with pytest.raises(PteeError, match=r"runs on a CPU here, and the model is on meta\. Give device=.cpu"):
        OnnxModel(model)


# ---------------------------------------------------------------------------------------------------- a folder by itself


def test_an_exported_model_is_timed_beside_itself_with_nobody_leaving(runner):
    found = bench_exported(runner, [1, 4], torch.randn(9, *SIZE), rounds=3)
    ways = [(line.batch, line.leaving) for line in found.lines]
    of_one = ["nobody", "all at exit 0", "own thresholds"]
    of_four = ["nobody", "half at exit 0", "all at exit 0", "own thresholds"]
    assert ways == [*((1, way) for way in of_one), *((4, way) for way in of_four)]
    nobody = [line for line in found.lines if line.leaving == "nobody"]
    assert [line.time for line in nobody] == [1, 1]
    assert json.loads(json.dumps(found.to_dict()))["lines"][0]["batch"] == 1
    for column in ("ms", "/ nobody", "counted", "limit"):
        assert f"\n{column}: " in f"\n{found.legend}"


def test_counted_costs_and_limits_are_of_the_rows_that_come_to_each_piece(monkeypatch, runner, model):
    seconds = {
        1: [0.0, 1.0, 2.0, 4.0, 0.0],
        2: [0.0, 2.0, 4.0, 8.0, 0.0],
        3: [0.0, 3.0, 6.0, 12.0, 0.0],
        4: [0.0, 4.0, 8.0, 16.0, 0.0],
    }
    monkeypatch.setattr(exported_bench, "in_turns", lambda laps, *_, **__: {n: [seconds[n]] for n in laps})
    monkeypatch.setattr(exported_bench, "timed", lambda calls, *_: {key: [14.0] * 3 for key in calls})
    first, _, last = model.costs
    found = {line.leaving: line for line in bench_exported(runner, [4]).lines}
    assert found["nobody"].counted == pytest.approx(last)
    assert found["half at exit 0"].counted == pytest.approx((first + last) / 2)
    assert found["nobody"].limit == pytest.approx((4 + 8 + 16) / 14)
    assert found["half at exit 0"].limit == pytest.approx((4 + 4 + 8) / 14)
    assert found["all at exit 0"].limit == pytest.approx(4 / 14)


def test_the_marks_of_a_folder_enclose_each_piece(runner):
    seen = Laps(CPU)
    runner_laps(runner, torch.randn(2, *SIZE), seen)
    assert len(seen.seconds()) == len(runner.pieces) + 2
