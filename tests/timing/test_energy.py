"""Energy, with a stand-in for NVIDIA's library: its counter moves by 5 J with each call."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from small import SIZE, made

from ptee.timing import energy, run_bench
from ptee.timing.energy import energy_meter, joules_of
from ptee.timing.measure import measure
from ptee.timing.run_bench import bench_run


class NVMLError(Exception):
    pass


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A GPU that has taken 7 J."""
    told = SimpleNamespace(millijoules=7000, asked=[])
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: told.asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: told.millijoules,
    )
    told.library = library
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return told


def test_the_meter_reads_the_counter_of_the_gpu_that_torch_means(gpu):
    assert energy_meter(torch.device("cuda"))() == 7.0
    assert gpu.asked == ["GPU-1234"]


def test_a_gpu_that_does_not_tell_has_no_meter(gpu):
    def refuse(_: object) -> int:
        raise NVMLError("Not Supported")

    gpu.library.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert energy_meter(torch.device("cuda")) is None


def test_a_cpu_and_a_machine_without_the_library_have_no_meter(gpu, monkeypatch):
    assert energy_meter(torch.device("cpu")) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert energy_meter(torch.device("cuda")) is None


@pytest.mark.parametrize("seconds", [0, 0.01])
def test_the_energy_of_a_call_is_the_mean_over_the_calls(gpu, seconds):
    def call() -> None:
        gpu.millijoules += 5000

    assert joules_of(call, lambda: gpu.millijoules / 1000, torch.device("cpu"), seconds) == 5.0


def test_energy_is_measured_as_time_is_and_after_a_first_call_which_may_compile(gpu):
    modes = []

    def call() -> None:
        gpu.millijoules += 5000 if modes else 10**6
        modes.append(torch.is_inference_mode_enabled())

    assert joules_of(call, lambda: gpu.millijoules / 1000, torch.device("cpu"), 0) == 5.0
    assert all(modes)


def test_bench_shows_energy_where_there_is_a_meter(monkeypatch):
    spent = iter(range(10**9))
    monkeypatch.setattr(run_bench, "energy_meter", lambda device: lambda: next(spent))
    monkeypatch.setattr(run_bench, "joules_of", lambda call, meter, device: energy.joules_of(call, meter, device, 0))
    found = bench_run(
        made(), measure(made(), [2], ["hooks"], rounds=3, seconds=0), [2], torch.randn(8, *SIZE), rounds=3
    )
    assert [line.joules for line in found.lines][:2] == [1.0, 1.0]
    assert found.lines[-1].joules == pytest.approx(1 / 4)  # of one of four batches of real images
    assert "mJ/image" in str(found) and "500.000" in str(found)
    assert found.to_dict()["lines"][0]["joules"] == 1.0
