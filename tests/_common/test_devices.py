from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ptee._common.devices import LAUNCH, process_state, resolve_device
from ptee._common.errors import DeviceError


def test_the_cpu_is_always_there():
    assert resolve_device("cpu:0") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", 1.5, 10**40])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(DeviceError, match=rf"There is no device '{name}' on this machine\. Possible: cpu"):
        resolve_device(name)


# ---------------------------------------------------------------------------------------------------- several processes

HALF_LAUNCHED = {
    "RANK=1 WORLD_SIZE=2": "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1": "MASTER_ADDR, MASTER_PORT are missing",
    "LOCAL_RANK=0": "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing",
    "RANK=one WORLD_SIZE=2": "LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing",
}


@pytest.mark.parametrize("words", HALF_LAUNCHED)
@pytest.mark.parametrize("ask", ["process_state(cpu=True)", "accelerator_on('cpu', 'no').__enter__()"])
def test_one_of_several_processes_that_does_not_know_the_others_is_refused(words, ask):
    code = f"from ptee._common.devices import *\ntry: {ask}\nexcept PteeError as why: print(why)"
    given = dict(word.split("=") for word in words.split())
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, timeout=100)
    (line,) = done.stdout.splitlines()
    assert HALF_LAUNCHED[words] in line
    assert "torchrun" in line
    assert line.endswith("unset " + " ".join(name for name in LAUNCH if name in given))


def test_a_rank_alone_is_that_of_a_scheduler_and_no_launch(monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert process_state().is_main_process
