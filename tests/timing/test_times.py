"""times.json: what a run keeps of its pieces, read with suspicion."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from device import here
from measured import values
from small import made

from ptee._common.errors import PteeError, RunError
from ptee.timing.settings import checked_sizes
from ptee.timing.times import LARGEST_FILE, Times, device_name, read_times, save_times, sizes_to_measure


@pytest.fixture(autouse=True)
def on_the_cpu(device: torch.device) -> None:
    """Times lie there, wherever the network ran."""
    torch.set_default_device("cpu")


def test_what_was_saved_is_read_again(tmp_path):
    times = Times(**values())
    save_times(times, tmp_path)
    assert read_times(tmp_path) == times
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


def test_between_two_numbers_of_rows_that_were_measured_times_are_on_a_line_and_no_rows_take_none():
    at = Times(**values()).at(4)
    assert at.segments[0].tolist() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])  # of the bare backbone's 2 s for 4 rows
    assert at.heads[1].tolist() == pytest.approx([0, 0.05, 0.05, 0.05, 0.05])
    assert at.call == pytest.approx(0.1)
    assert at.unit == "the bare backbone's time (hooks, batch 4, cpu)"
    assert Times(**values()).at(1).segments[2].tolist() == pytest.approx([0, 0.5])


def test_a_batch_or_an_executor_that_was_not_measured_is_refused():
    with pytest.raises(
        PteeError,
        match=r"at_batch=8 was not measured: the largest batch was 4\. Give at_batch=4, or measure again: .*--executor hooks --batch-sizes 8",
    ):
        Times(**values()).at(8)
    with pytest.raises(
        PteeError, match=r"graphs was not measured, only hooks.*--executor hooks,graphs --batch-sizes 4 --save"
    ):
        Times(**values()).at(4, "graphs")
    with pytest.raises(PteeError, match=r"--executor hooks,onnx --batch-sizes 8 --save$"):
        Times(**values()).at(8, "onnx")


def test_executors_whose_times_are_replaced_are_named(tmp_path, recwarn):
    by_hooks = Times(**values())
    by_onnx = by_hooks.changed(executors=[by_hooks.executors[0].changed(executor="onnx")])
    save_times(by_hooks, tmp_path)
    save_times(by_hooks, tmp_path)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"Times of hooks that .* kept are replaced\. .*--executor hooks,onnx$"):
        save_times(by_onnx, tmp_path)
    assert read_times(tmp_path) == by_onnx


BROKEN = {
    "an unknown field": ({"secret": 1}, "secret"),
    "rows that do not grow": ({"rows": [4, 1]}, "rows"),
    "too many rows": ({"rows": [1, 2, 4]}, "do not fit"),
    "a time below 0": ({"eager": [-1.0, 2.0]}, "eager"),
    "no time at all": ({"eager": [0.0, 2.0]}, "took no time"),
    "a batch beyond all batches": ({"rows": [1, 10**9]}, "rows"),
    "an exit without head": ({"heads": ["pool"]}, "do not fit"),
    "a device that steers the terminal": ({"device_name": "\x1b[2J"}, "device_name"),
    "no executor": ({"executors": []}, "executors"),
    "a word for a number": ({"threads": "many"}, "threads"),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_right_is_refused_in_one_line(change, said, tmp_path):
    (tmp_path / "times.json").write_text(json.dumps(values(schema_version=1) | change))
    with pytest.raises(RunError, match=said) as refused:
        read_times(tmp_path)
    assert f"Measure again: ptee bench {tmp_path} --save" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "no JSON object"), ("{", "cannot be read"), (" " * (LARGEST_FILE + 1), "longer than"), ('{"schema_version": 99}', "Upgrade")],
    ids=["a list", "half a file", "a large file", "a newer version"],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(text, said, tmp_path):
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(RunError, match=said):
        read_times(tmp_path)


def test_a_run_without_times_says_how_to_measure_them(tmp_path):
    with pytest.raises(RunError, match=r"keeps no times of its pieces\. Measure them: ptee bench .* --save"):
        read_times(tmp_path)


def own(**changes: object) -> Times:
    like = here()
    return Times(**values(**{"device": like.type, "device_name": device_name(like), **changes}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"exits": ["0", "1"]}, "with exits 0, 1, and here it is 0, 2"),
        ({"heads": ["pool", "conv1"]}, "with heads pool, conv1, and here it is pool, pool"),
        ({"device": "mps"}, "with device mps"),
        ({"device_name": "another box"}, "with device_name another box"),
        ({"dtype": "float16"}, "with dtype float16, and here it is float32"),
        ({"backbone": "resnet50"}, "with backbone resnet50"),
    ],
    ids=str,
)
def test_times_of_something_else_are_refused_by_name(change, said):
    model = made()
    own().require_of(model, here(), "times.json")
    with pytest.raises(PteeError, match=said):
        own(**change).require_of(model, here(), "times.json")


@pytest.mark.parametrize(("sizes", "rows"), [([1], [1]), ([1, 8], [1, 2, 3, 4, 6, 8]), ([5], [1, 2, 3, 4, 5])], ids=str)
def test_there_are_two_numbers_of_rows_for_each_doubling(sizes, rows):
    assert sizes_to_measure(sizes) == rows


def test_sizes_to_time_may_be_numpy_s_whole_numbers_and_no_truth_values():
    sizes = checked_sizes(np.array([1, 32]))
    assert sizes == [1, 32]
    assert [type(b) for b in sizes] == [int, int]
    with pytest.raises(PteeError, match="A batch of True images cannot be timed"):
        checked_sizes([True])
