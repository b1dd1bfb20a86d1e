"""Exported models on other devices, and batches that are too large for them."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from device import drawn
from extras import needs_onnx
from PIL import Image
from small import SIZE, made
from torch import nn

import ptee
from ptee._common.errors import PteeError, RunError
from ptee.deploy.export import sign
from ptee.deploy.manifest import MANIFEST, MAX_ROWS, _require_own_weights
from ptee.deploy.runner import Runner, _program, main, onnx_piece


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ptee.export(made().cpu(), tmp_path_factory.mktemp("exported") / "out")


@pytest.fixture(scope="module")
def in_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ptee.export(made().cpu(), tmp_path_factory.mktemp("onnx") / "out", format="onnx")


def test_a_file_that_was_made_on_a_cpu_names_no_other_device_than_the_one_it_is_loaded_for(exported):
    for file in sorted(exported.glob("*.pt2")):
        module = _program(file, "meta")
        named = [value for node in module.graph.nodes for value in (*node.args, *node.kwargs.values())]
        assert {value.type for value in named if isinstance(value, torch.device)} <= {"meta"}
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} <= {"meta"}


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:x", "cpu:0", ""])
def test_a_device_that_does_not_exist_is_refused_before_a_file_is_opened(exported, device):
    if device:
        with pytest.raises(PteeError, match=f"device='{device}' is not possible. Give 'cpu' or 'cuda'"):
            ptee.load_exported(exported, device)
    else:
        assert ptee.load_exported(exported, device).device == "cpu"


def test_a_gpu_that_is_not_there_is_named_and_not_the_file(exported):
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(PteeError, match=f"device='{device}' is not possible: .* here. Give 'cpu' or another."):
        ptee.load_exported(exported, device)


@needs_onnx
@pytest.mark.parametrize("where", ["weights.bin", "../weights.bin", "/dev/zero"])
def test_an_onnx_file_whose_weights_lie_in_another_file_is_refused(where, in_onnx, tmp_path):
    import onnx

    folder = shutil.copytree(in_onnx, tmp_path / "out")
    values = json.loads((folder / MANIFEST).read_text())
    file = folder / values["pieces"][-1]["file"]
    network = onnx.load(file)
    weight = max(network.graph.initializer, key=lambda each: len(each.raw_data))
    for place in (folder, tmp_path):
        (place / "weights.bin").write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, where, 0, len(weight.raw_data))
    weight.ClearField("raw_data")
    network.doc_string = "a location of no weights"
    file.write_bytes(network.SerializeToString())
    sign(folder, values)
    with pytest.raises(RunError, match=rf"{file.name} has weights in another file, which is not read\. Export the"):
        ptee.load_exported(folder)


def test_a_length_that_is_written_with_more_bytes_than_it_needs_hides_no_weights(tmp_path):
    (tmp_path / "piece.onnx").write_bytes(b"\n\x88\x00location")
    with pytest.raises(RunError, match="has weights in another file"):
        _require_own_weights(tmp_path / "piece.onnx")


@needs_onnx
def test_a_module_may_be_called_location(tmp_path):
    layers = {"allocation": nn.Conv2d(3, 8, 3), "location": nn.Conv2d(8, 8, 3), "flat": nn.Flatten()}
    network = nn.Sequential(nn.Sequential(OrderedDict(layers)), nn.Linear(8 * 4 * 4, 4))
    model = ptee.augment(network.cpu(), exits=["0.allocation"], head="pool", input_size=(3, 8, 8))
    folder = ptee.export(model, tmp_path / "out", format="onnx")
    assert b"location" in b"".join(file.read_bytes() for file in folder.glob("*.onnx"))
    ptee.load_exported(folder)


@needs_onnx
def test_an_onnx_runtime_whose_gpu_part_does_not_load_does_not_answer_on_the_cpu(monkeypatch, tmp_path):
    import onnxruntime

    class OnTheCpu:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

        def disable_fallback(self) -> None: ...

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **how: OnTheCpu())
    with pytest.raises(PteeError, match="cannot load its CUDAExecutionProvider here, so device='cuda' is not possible"):
        onnx_piece(tmp_path / "piece.onnx", "cuda")


def test_an_exported_model_says_in_one_line_what_it_is(exported):
    assert repr(ptee.load_exported(exported)) == "Runner(Sequential, 2 exits, on cpu)"


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda runner: pickle.loads(pickle.dumps(runner))], ids=["copied", "pickled"]
)
def test_a_copy_opens_the_folder_again_and_has_the_thresholds_of_now(exported, again, monkeypatch):
    x = torch.randn(4, *SIZE, generator=drawn(0), device="cpu")
    monkeypatch.chdir(exported.parent)
    runner = ptee.load_exported(exported.name, threads=2)
    runner.threshold = [0.2, 2.0]
    monkeypatch.chdir("/")
    other = again(runner)
    assert other.threshold == [0.2, 2.0]
    assert other._again.keywords == {"threads": 2}
    assert torch.equal(other.predict(x).logits, runner.predict(x).logits)
    runner.threshold = 0.9
    assert other.threshold == [0.2, 2.0]


def test_a_copy_of_a_model_that_was_exported_again_is_refused(exported, tmp_path):
    """Thresholds of one exit would go for all exits of another model, without a word."""
    runner = ptee.load_exported(shutil.copytree(exported, tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    ptee.export(made().cpu(), tmp_path / "out")
    with pytest.raises(RunError, match=r"out holds another model than the one .* Open it by ptee\.load_exported"):
        copy.deepcopy(runner)


def test_pieces_without_a_folder_cannot_be_copied(exported):
    opened = ptee.load_exported(exported)
    runner = Runner(opened.manifest, opened.pieces, "cpu")
    with pytest.raises(PteeError, match=r"Only what ptee\.load_exported opened can be copied or pickled"):
        copy.copy(runner)


def test_a_device_of_torch_will_do(exported):
    x = torch.randn(2, *SIZE, generator=drawn(0), device="cpu")
    runner = ptee.load_exported(exported, torch.device("cpu"))
    assert torch.equal(runner.predict(x).logits, ptee.load_exported(exported).predict(x).logits)


def test_an_autocast_around_an_export_is_no_part_of_it(exported, tmp_path):
    x = torch.randn(7, *SIZE, generator=drawn(0), device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = ptee.export(made().cpu(), tmp_path / "out")
    assert torch.equal(ptee.load_exported(inside).predict(x).logits, ptee.load_exported(exported).predict(x).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_around_it_changes_nothing(exported, dtype):
    x = torch.randn(7, *SIZE, generator=drawn(0), device="cpu")
    runner = ptee.load_exported(exported)
    want = runner.predict(x)
    with torch.autocast("cpu", dtype):
        got = runner.predict(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_more_images_than_a_file_takes_are_refused_in_one_line(exported):
    runner = ptee.load_exported(exported)
    with pytest.raises(PteeError, match="up to 4,096 images at once, not 4,097"):
        runner.predict(torch.zeros(MAX_ROWS + 1, *SIZE, device="cpu"))


def test_pictures_for_a_network_of_ones_own_are_never_normalised_by_imagenets_mean(exported, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    said = (
        "mean and std of the images are not recorded .* so pictures cannot be prepared. Give `predict` images that you"
    )
    with pytest.raises(PteeError, match=said):
        ptee.load_exported(exported).images([tmp_path / "a.png"])
    assert main([str(exported), str(tmp_path / "a.png")]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert "their mean and std are not recorded" in (exported / "README.md").read_text()


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (
            torch.zeros(2, *SIZE, device="cpu"),
            r"takes an array of numpy .*, not Tensor\. Give x\.cpu\(\)\.numpy\(\)\.$",
        ),
        ([[0.0]], r"takes an array of numpy \(b, c, h, w\), not list\.$"),
        (np.zeros((2, *SIZE)), r"float32, not float64\. Give them normalised, as x\.astype\('float32'\)\.$"),
    ],
    ids=["a tensor", "a list", "another type"],
)
def test_onnx_refuses_what_is_no_such_array_and_says_what_to_type(x, said, exported):
    runner = ptee.load_exported(exported)
    runner.manifest = runner.manifest.model_copy(update={"format": "onnx"})
    with pytest.raises(PteeError, match=said):
        runner.predict(x)


def test_a_network_of_ones_own_is_exported_with_how_its_pictures_are_prepared(tmp_path, recwarn):
    folder = ptee.export(made().cpu(), tmp_path / "out", mean=[0, 0.5, 0], std=[1 / 255], interpolation="nearest")
    Image.new("RGB", (9, 9), (255, 0, 51)).save(tmp_path / "a.png")
    pixels = ptee.load_exported(folder).images([tmp_path / "a.png"])
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([255, -127.5, 51])
    assert ptee.load_exported(folder).manifest.interpolation == "nearest"
    assert not recwarn and "not recorded" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mean": [0.5]}, "mean and std go together"),
        ({"mean": [0.5], "std": [0]}, "std, so it must be positive"),
        ({"mean": 0.5, "std": 0}, "std, so it must be positive"),
        ({"mean": [120], "std": [60]}, "divide by 255"),
        ({"mean": [0.5, 0.5], "std": [1]}, "3 channels need 3 numbers for mean="),
        ({"interpolation": "cubic"}, "'cubic'.*bicubic"),
    ],
)
def test_a_mean_or_std_that_no_pixels_have_is_refused(given, said, tmp_path):
    with pytest.raises(PteeError, match=said):
        ptee.export(made().cpu(), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_row_leaves_where_its_confidence_is_the_threshold_and_at_no_exit_that_is_off():
    ends = [SimpleNamespace(exit=n, rows=((0, 1),)) for n in (0, 1, -1)]
    manifest: Any = SimpleNamespace(
        format="onnx", dtype="float32", input_size=(1, 1, 1), exits=("a", "b"), off=(0,), ends=(0, 1, 2),
        pieces=ends, thresholds=(0.1, 0.5), costs=(0.2, 0.5, 1.1),
    )  # fmt: skip

    def piece(x: Any) -> Any:
        return x, np.zeros((len(x), 2)), x.reshape(-1)

    runner = Runner(manifest, [piece, piece, lambda x: (np.ones((len(x), 2)), np.ones((len(x), 2)))], "cpu")
    h = np.array([0.5, 0.75, 0.25], dtype=np.float32).reshape(3, 1, 1, 1)
    assert runner.predict(h).exit_index.tolist() == [1, 1, 2]
    assert runner.predict(h, [0, 0.5 + 1e-12]).exit_index.tolist() == [2, 1, 2]
