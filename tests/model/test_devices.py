"""What holds on the CPU holds on every device: run with `--device cuda` where there is a GPU."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from small import SIZE as SMALL
from small import made
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.cut_points import survey
from ptee.analysis.macs import count
from ptee.analysis.verify import verify_cut_points

SIZE, K = (3, 64, 64), 10
SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "scripts" / "check_device.py"


def script() -> ModuleType:
    """The script that checks a device."""
    spec = importlib.util.spec_from_file_location("check_device", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECKS = script()
NETS = {
    "cnn": lambda: timm.create_model("test_resnet", num_classes=K),
    "vit": lambda: timm.create_model("test_vit", num_classes=K, img_size=64),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=K),
}
each_net = pytest.mark.parametrize("name", NETS)
each_type = pytest.mark.parametrize("type_name", CHECKS.TYPES)


def net(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    return NETS[name]().eval().to(device, dtype)


def images(device: torch.device, dtype: torch.dtype = torch.float32, rows: int = 6) -> Tensor:
    return torch.randn(rows, *SIZE, generator=torch.Generator().manual_seed(3), device="cpu").to(device, dtype)


@each_type
@each_net
def test_every_cut_of_a_survey_is_proven(name, type_name, device):
    backbone = net(name, device, CHECKS.TYPES[type_name])
    assert verify_cut_points(backbone, list(survey(backbone, SIZE).cuts.values()), SIZE) == {}


@functools.cache
def model(name: str, device: torch.device, type_name: str = "float32") -> ptee.EarlyExitModel:
    """One for all promises, as in the script."""
    return ptee.augment(net(name, device, CHECKS.TYPES[type_name]), num_exits=2, input_size=SIZE)


@pytest.mark.parametrize("promise", CHECKS.PROMISES + CHECKS.OF_TRAINED, ids=lambda promise: promise.__name__)
@each_net
def test_a_promise_is_kept(name, promise, device):
    CHECKS.kept(promise, model(name, device))


@pytest.mark.parametrize("type_name", sorted({*CHECKS.TYPES} - {"float32"}))
@pytest.mark.parametrize("promise", CHECKS.PROMISES, ids=lambda promise: promise.__name__)
def test_a_promise_is_kept_in_every_type(promise, type_name, device):
    CHECKS.kept(promise, model("cnn", device, type_name))


@pytest.mark.cuda
@pytest.mark.parametrize("tf32", [True, False])
@each_net
def test_a_network_gets_exits_whatever_is_said_of_tf32(name, tf32, device):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        assert len(ptee.augment(net(name, device), num_exits=2, input_size=SIZE).exits) == 2
        assert conv.fp32_precision == ("tf32" if tf32 else "ieee")
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


# ---------------------------------------------------------------------------------------------------- inference mode


@each_net
def test_in_inference_mode_a_survey_finds_the_same(name, device):
    backbone = net(name, device)
    outside = survey(backbone, SIZE)
    with torch.inference_mode():
        assert survey(backbone, SIZE) == outside


@each_net
def test_in_inference_mode_a_model_is_made_trained_saved_and_loaded(name, device, tmp_path):
    backbone, x = net(name, device), images(device)
    with torch.inference_mode():
        model = ptee.augment(backbone, num_exits=2, head="conv1", input_size=SIZE)
        data = TensorDataset(images(torch.device("cpu")), torch.arange(len(x)))
        ptee.train(model, data, epochs=1, batch_size=3, device=device, cache=True)
        with torch.inference_mode():
            inside = model.predict(x, 0.0).logits
        model.save_pretrained(tmp_path)
        again = ptee.load(tmp_path, model.detach())
        assert torch.equal(again.predict(x, 0.0).logits, inside)
        assert [e.name for e in ptee.plan(again.detach(), num_exits=2, input_size=SIZE).exits]
    assert not any(p.is_inference() for p in again.heads.parameters())


def test_a_model_that_was_moved_in_inference_mode_can_be_saved_and_gives_its_backbone_back_and_does_not_learn(tmp_path):
    model = made()
    backbone = model.backbone
    with torch.inference_mode():
        model.double().float()
    data = TensorDataset(torch.randn(8, *SMALL), torch.arange(8) % 4)
    with pytest.raises(PteeError, match=r"moved or copied under torch\.inference_mode.* Give copy\.deepcopy\(model\)"):
        ptee.train(model, data, epochs=1, batch_size=4)
    ptee.train(copy.deepcopy(model), data, epochs=1, batch_size=4, views=1, precision="no")
    model.save_pretrained(tmp_path)
    x = torch.randn(3, *SMALL)
    assert torch.equal(ptee.load(tmp_path, backbone=copy.deepcopy(backbone)).predict(x).logits, model.predict(x).logits)
    assert model.detach() is backbone


def test_a_learned_head_at_the_images_learns_from_images_of_inference_mode(device):
    backbone = net("cnn", device)
    with torch.inference_mode():
        model = ptee.augment(backbone, num_exits=2, front="auto", input_size=SIZE)
        x = images(device)
        assert x.is_inference()
        ptee.train(model, TensorDataset(x, torch.arange(len(x))), epochs=1, batch_size=3, device=device)


# ---------------------------------------------------------------------------------------------------- the script


def test_the_script_prints_a_line_for_each_promise_and_ends_with_status_1_where_one_is_broken(device, monkeypatch):
    def a_promise_that_nobody_keeps(*_: object) -> None:
        raise AssertionError("broken")

    kept = CHECKS.above_one_all_get_the_backbones_answers
    words = ["--device", str(device), "--family", "timm/test_resnet", "--type", "float32"]
    for promises, status in (((kept,), 0), ((kept, a_promise_that_nobody_keeps), 1)):
        monkeypatch.setattr(CHECKS, "PROMISES", promises)
        monkeypatch.setattr(CHECKS, "OF_TRAINED", promises[:1])
        done = CliRunner().invoke(CHECKS.main, words)
        gets_exits, *lines, summary = done.output.splitlines()
        assert (done.exit_code, len(lines)) == (status, len(promises) + 1), done.output
        assert gets_exits.endswith("ok") and [line.endswith("ok") for line in lines].count(False) == status
        assert summary.startswith(f"{len(lines) + 1 - status} of {len(lines) + 1} hold")
    said = r"FAILED: AssertionError: broken \[test_devices\.py:\d+ in a_promise_that_nobody_keeps\]"
    assert re.search(said, done.output)


def test_a_failure_is_told_with_the_place_in_ptee_and_where_it_came_from(device):
    def a_layer(*_: object) -> None:
        raise ZeroDivisionError

    backbone = net("cnn", device)
    backbone.layer1.register_forward_hook(a_layer)
    _, wrong, _ = CHECKS.outcome(count, backbone, images(device, rows=1))
    assert re.search(r"\[test_devices\.py:\d+ in a_layer <- \w+\.py:\d+ in \w+\]$", wrong), wrong
