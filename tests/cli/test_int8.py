"""`ptee export --int8`: a run in whole numbers, beside float32."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from extras import needs_onnx

import ptee

pytestmark = [
    pytest.mark.cpu("files are made on the CPU"),
    needs_onnx,
]
INT8 = ("--format", "onnx", "--int8", "--out", "files")


@pytest.mark.slow
def test_a_run_in_whole_numbers_is_smaller_and_says_how_it_answers_beside_float32(run, finished, things):
    done = run("export", finished, *INT8, "--calibrate", things / "many")
    assert done.status == 0, done.err
    assert [line.split()[0] for line in done.out.splitlines()[2:4]] == ["float32", "int8"]
    assert done.out.endswith("Written to files. Try it: python -m ptee.deploy.runner files IMAGE\n")
    kept = json.loads(Path("files", "manifest.json").read_text())["int8"]
    whole, small = kept["measured"]
    assert (whole["numbers"], small["numbers"]) == ("float32", "int8")
    assert small["bytes"] < whole["bytes"] / 2
    assert abs(small["fidelity"] - whole["fidelity"]) < 0.3
    assert kept["calibrated_on"] + kept["compared_on"] == 100
    assert ptee.load_exported("files").manifest.int8 is not None


@pytest.mark.slow
def test_nothing_is_written_where_a_piece_cannot_be_quantised(run, finished, things, monkeypatch):
    def fails(*_: object) -> None:
        raise ValueError("no such\noperator")

    monkeypatch.setattr("ptee.pipeline.int8._quantise", fails)
    done = run("export", finished, *INT8, "--calibrate", things / "many")
    assert done.status == 2
    assert "ONNX Runtime cannot quantise piece_0.onnx: ValueError: no such." in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("files").exists()


REFUSED = {
    "for torch": (("--int8", "--calibrate", "x", "--out", "files"), r"Give --format onnx"),
    "without images": (INT8, "Give some that the heads were not trained on: --calibrate FOLDER"),
    "images without int8": (("--calibrate", "x", "--out", "files"), "Give --int8, too"),
    "images that are not there": ((*INT8, "--calibrate", "nowhere"), "nowhere"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_possible_is_refused_in_one_line(words, said, run, finished):
    done = run("export", finished, *words)
    assert done.status == 2
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_without_onnx_runtime_one_line_says_what_to_install(run, finished, things, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("ptee.deploy.export.importlib.util.find_spec", lambda name: None)
    done = run("export", finished, *INT8, "--calibrate", things / "many")
    assert (done.status, done.err) == (
        2,
        "ONNX needs onnx, onnxscript, onnxruntime: pip install onnx onnxscript onnxruntime\n",
    )


def test_with_too_few_images_for_a_batch_its_time_is_a_dash():
    from ptee.deploy.manifest import Answered, Int8
    from ptee.pipeline.int8 import Exported

    one = Answered(numbers="int8", accuracy=None, fidelity=1.0, cost=1.0, bytes=10**6, times=(0.5,))
    text = str(Exported(Path("files"), Int8(calibrated_on=2, compared_on=2, measured=(one,)), {"int8": [1.0]}))
    assert text.splitlines()[2].split() == ["int8", "-", "1.0000", "1.0000", "1.0", "0.50", "-", "100.0%"]
