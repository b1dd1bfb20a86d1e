"""Weights from a file into a module, and the hash by which they are known."""

from __future__ import annotations

import argparse
import copy
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from tiny import RunsCodeWhenUnpickled, Tiny, fresh, one_line
from torch import Tensor, nn

from ptee._common.errors import BackboneError
from ptee.analysis.freezing import freeze
from ptee.backbones.checkpoint import read_checkpoint
from ptee.backbones.load import load_backbone, rebuild
from ptee.backbones.weights import load_weights, weights_hash


def floats(state: dict, change: Callable) -> dict:
    return {key: change(value) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda s: s, ".pth"),
        (lambda s: s, ".safetensors"),
        (lambda s: OrderedDict(s), ".SAFETENSORS"),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)}, ".th"),
        (lambda s: {"state_dict": s, "optimizer": {"lr": 0.1}}, ".bin"),
        (
            lambda s: {"model": s, "best": np.float64(0.9), "random": np.random.get_state(), "names": np.array(["a"])},
            ".pth",
        ),
        (
            lambda s: {
                "model": defaultdict(list, s),
                "last": deque([1.0]),
                "at": datetime(2020, 1, 1),
                "to": Path("x"),
            },
            ".pt",
        ),
        (lambda s: floats(s, Tensor.half), ".safetensors"),
        (lambda s: floats(s, Tensor.bfloat16), ".pth"),
        (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, ".safetensors"),
    ],
    ids=[
        "pth",
        "safetensors",
        "capitals",
        "timm's",
        "dictionary",
        "numpy's",
        "others'",
        "float16",
        "bfloat16",
        "no batch counters",
    ],
)
def test_weights_of_any_format_and_type_load(wrap, suffix, tmp_path):
    trained = Tiny()
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().half().float()  # so that rounding to either type changes nothing
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix.lower() == ".safetensors" else torch.save)(wrap(trained.state_dict()), file)
    module = fresh()
    load_weights(module, read_checkpoint(file))
    assert weights_hash(module) == weights_hash(trained)


def test_formats_that_depend_on_a_version_number_load_from_safetensors(tmp_path):
    trained = torchvision.models.mnasnet0_5()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("mnasnet0_5", weights=tmp_path / "w.safetensors")
    assert weights_hash(backbone.module) == weights_hash(trained)


def test_a_prefix_that_the_model_itself_has_stays(tmp_path):
    trained, module = (nn.Sequential(OrderedDict(model=network)) for network in (Tiny(), fresh()))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "w.pth")
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)


def test_numbers_of_numpy_beside_weights_of_the_oldest_format_are_passed_over(tmp_path):
    trained, module = Tiny(), fresh()
    found = {"model": trained.state_dict(), "best": np.float32(0.5)}
    torch.save(found, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(module, read_checkpoint(tmp_path / "w.pth"))
    assert weights_hash(module) == weights_hash(trained)


@pytest.mark.parametrize("place", ["model", "ema"])
def test_weights_that_are_arrays_of_numpy_are_named(place, tmp_path):
    state = Tiny().state_dict()
    arrays = {name: value.cpu().numpy() for name, value in state.items()}
    torch.save({"model": state, "confusion": np.eye(3)} | {place: arrays}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=f"under '{place}' as arrays of numpy .*torch.from_numpy"):
        read_checkpoint(tmp_path / "w.pth")


def test_what_stands_for_other_values_is_forgotten_when_the_file_was_read(tmp_path):
    torch.save({"model": Tiny().state_dict(), "best": np.float64(0.5)}, tmp_path / "w.pth")
    before = torch.serialization.get_safe_globals()
    read_checkpoint(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pth")


def test_what_lightning_keeps_of_a_training_is_passed_over(tmp_path):
    trained, module = Tiny(), fresh()
    how = {"loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": how}, tmp_path / "last.ckpt")
    load_weights(module, read_checkpoint(tmp_path / "last.ckpt"))
    assert weights_hash(module) == weights_hash(trained)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_would_run_code_are_refused_and_the_code_not_run(tmp_path, legacy):
    file = tmp_path / "hostile.pth"
    hostile = {"fc.bias": RunsCodeWhenUnpickled(tmp_path / "harm")}
    torch.save(hostile, file, _use_new_zipfile_serialization=not legacy)
    said = r"hostile\.pth (holds more than weights .*mkdir|cannot be read).*run code"
    with pytest.raises(BackboneError, match=said) as refusal:
        load_backbone("cifar_resnet8", weights=file)
    one_line(refusal)
    assert not (tmp_path / "harm").exists()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b"\x10\0\0\0\0\0\0\0not a checkpoint"),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x80\x02garbage"),
        truncated,
    ],
    ids=["garbage", "empty", "a pickle of nothing", "cut off"],
)
def test_a_corrupt_file_is_refused_by_name(tmp_path, suffix, spoil):
    file = tmp_path / f"corrupt{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(Tiny().state_dict(), file)
    spoil(file)
    with pytest.raises(BackboneError, match=rf"corrupt\{suffix} cannot be read") as refusal:
        load_backbone("cifar_resnet8", weights=file)
    one_line(refusal)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": 1}}, {1: torch.zeros(1)}])
def test_a_file_without_a_state_dict_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BackboneError, match=r"other\.pth holds no state_dict"):
        read_checkpoint(tmp_path / "other.pth")


def test_a_python_file_is_no_weights(tmp_path):
    (tmp_path / "net.py").write_text("net = 1")
    with pytest.raises(BackboneError, match=r"net\.py is a Python file\. Save the weights with torch\.save"):
        read_checkpoint(tmp_path / "net.py")


@pytest.mark.parametrize("file", ["missing.safetensors", "x" * 5000])
def test_a_file_that_is_not_there_is_refused_by_name(tmp_path, file):
    with pytest.raises(BackboneError, match="There is no weights file"):
        read_checkpoint(tmp_path / file)


def test_weights_of_another_number_of_classes_load_if_that_is_given(tmp_path):
    save_file(timm.create_model("cifar_resnet8", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    backbone = load_backbone("cifar_resnet8", weights=tmp_path / "seven.safetensors", num_classes=7)
    assert backbone.num_classes == rebuild(backbone.source).num_classes == 7


def test_the_hash_tells_any_change_of_name_type_shape_or_number():
    module = nn.Linear(2, 3)
    hashes = {weights_hash(module), weights_hash(copy.deepcopy(module).half()), weights_hash(nn.Sequential(module))}
    changed = copy.deepcopy(module)
    changed.bias.data[0] = torch.nextafter(changed.bias.data[0], torch.tensor(9.0))
    reshaped = copy.deepcopy(module)
    reshaped.weight = nn.Parameter(module.weight.data.reshape(3, 2).reshape(1, 6).reshape(2, 3))
    assert len(hashes | {weights_hash(changed), weights_hash(reshaped)}) == 5


def test_the_hash_is_the_same_for_a_copy_another_memory_format_and_other_modes():
    module = Tiny()
    want = weights_hash(module)
    assert want == weights_hash(copy.deepcopy(module))
    assert want == weights_hash(copy.deepcopy(module).to(memory_format=torch.channels_last).eval())
    assert len(want) == 64
    freeze(module)
    assert weights_hash(module) == want


def test_bfloat16_scalars_and_empty_tensors_have_a_hash():
    module = nn.BatchNorm2d(3).bfloat16()
    module.register_buffer("empty", torch.empty(0, 3))
    module.register_buffer("truth", torch.tensor(True))
    want = weights_hash(module)
    module.truth.fill_(False)
    assert weights_hash(module) != want


def test_quantised_weights_have_the_hash_of_their_parts():
    torchao = pytest.importorskip("torchao.quantization")
    first, second = (nn.Sequential(nn.Linear(64, 8)).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    assert weights_hash(first) == weights_hash(second)
    third = nn.Sequential(nn.Linear(64, 8)).eval()
    torchao.quantize_(third, torchao.Int8WeightOnlyConfig())
    assert weights_hash(first) != weights_hash(third)


def test_tensors_of_a_subclass_without_bytes_have_the_hash_of_their_parts():
    from torch.testing._internal.two_tensor import TwoTensor

    def net(number: float) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(TwoTensor(torch.zeros(2), torch.full((2,), number)), requires_grad=False)
        return module

    assert weights_hash(net(1.0)) == weights_hash(net(1.0)) != weights_hash(net(2.0))
