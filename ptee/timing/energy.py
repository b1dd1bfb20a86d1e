"""The energy that calls take, where the device counts it: on NVIDIA GPUs from Volta on, through pynvml."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import torch

from ptee._common.devices import wait

SECONDS = 1.0  # of one measurement: the counter moves every 20 to 100 ms
Meter = Callable[[], float]


def energy_meter(device: torch.device) -> Meter | None:
    """What gives the joules that a device has taken since its driver was loaded.

    None where the device does not tell (a CPU, a part of a shared GPU), or pynvml is missing (pip install nvidia-ml-py).
    """
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000  # it counts millijoules


def joules_of(call: Callable[[], object], meter: Meter, device: torch.device, seconds: float = SECONDS) -> float:
    """The mean of one call, repeated for so many seconds. What the device takes for itself meanwhile is part of it."""
    with torch.inference_mode():  # as where calls are timed: in another mode torch.compile compiles again
        call()
        wait(device)
        calls, before, start = 0, meter(), time.perf_counter()
        while calls == 0 or time.perf_counter() - start < seconds:
            call()
            wait(device)
            calls += 1
        return (meter() - before) / calls
