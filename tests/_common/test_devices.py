from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import _get_current_function_mode_stack

from ptee._common import devices
from ptee._common.devices import (
    LAUNCH,
    accelerator_on,
    made_on_cpu,
    process_state,
    require_one_process,
    resolve_device,
    widest,
)
from ptee._common.errors import DeviceError, PteeError


def test_the_cpu_is_always_there():
    assert resolve_device("cpu:0") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", 1.5, 10**40])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(DeviceError, match=rf"There is no device '{name}' on this machine\. Possible: cpu"):
        resolve_device(name)


def test_what_is_made_on_the_cpu_lies_there_whatever_the_default_device():
    with torch.device("meta"):
        with made_on_cpu():
            assert torch.empty(1).device.type == "cpu"
        assert torch.empty(1).device.type == "meta"


@pytest.mark.cpu("there is a default device")
def test_where_the_cpu_is_the_default_no_device_is_set_for_what_is_made():
    with made_on_cpu():
        assert not _get_current_function_mode_stack()


def test_apples_gpu_has_no_float64_and_other_devices_are_tried_for_real(monkeypatch):
    assert widest(torch.device("mps")) == torch.float32
    monkeypatch.setattr(devices, "_HAS_FLOAT64", {})
    with FakeTensorMode():
        assert widest(torch.device("cpu")) == torch.float64
        assert widest(torch.device("meta")) == torch.float32  # its tensors have no values to compute with


# ---------------------------------------------------------------------------------------------------- several processes

HALF_LAUNCHED = {
    "RANK=1 WORLD_SIZE=2": "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1": "MASTER_ADDR, MASTER_PORT are missing",
    "LOCAL_RANK=0": "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing",
    "RANK=one WORLD_SIZE=2": "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing",
}


@pytest.fixture
def as_new() -> Iterator[None]:
    """accelerate has not looked at the environment yet."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("as_new")
@pytest.mark.parametrize("words", HALF_LAUNCHED)
@pytest.mark.parametrize("ask", [lambda: process_state(cpu=True), lambda: accelerator_on("cpu", "no").__enter__()])
def test_one_of_several_processes_that_does_not_know_the_others_is_refused(words, ask, monkeypatch):
    given = dict(word.split("=") for word in words.split())
    for name in LAUNCH:
        monkeypatch.setenv(name, given[name]) if name in given else monkeypatch.delenv(name, raising=False)
    with pytest.raises(PteeError) as refusal:
        ask()
    line = str(refusal.value)
    assert "\n" not in line
    assert HALF_LAUNCHED[words] in line
    assert "torchrun" in line
    assert line.endswith("unset " + " ".join(name for name in LAUNCH if name in given))


@pytest.mark.usefixtures("as_new")
def test_processes_on_the_cpu_do_not_meet_on_a_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `accelerate launch --cpu` does
    assert process_state()._cpu
    asked, ask = [], process_state
    monkeypatch.setattr(devices, "process_state", lambda **how: asked.append(how) or ask(**how))
    with accelerator_on("cpu", "no"):
        assert asked[0] == {"cpu": True}


def test_a_gpu_without_a_number_is_the_one_that_was_chosen(monkeypatch):
    cuda = {"is_initialized": lambda: True, "current_device": lambda: 1}
    accelerator = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device("cuda"),
        "device_count": lambda: 2,
    }
    for place, fakes in ((torch.cuda, cuda), (torch.accelerator, accelerator)):
        for name, fake in fakes.items():
            monkeypatch.setattr(place, name, fake)
    assert resolve_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert resolve_device("cuda") == torch.device("cuda", 0)


def test_a_rank_alone_is_that_of_a_scheduler_and_no_launch(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert process_state().is_main_process


def test_what_one_process_does_is_refused_in_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(devices, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(PteeError, match="A sweep runs in one process, and 2 were started"):
        require_one_process()
    monkeypatch.setattr(devices, "process_state", lambda: SimpleNamespace(num_processes=1))
    require_one_process()
