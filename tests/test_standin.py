"""The stand-in for a GPU computes as the CPU does, and refuses to mix devices."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device import here
from torch import nn
from torch.nn import functional as F

import ptee

TESTS = Path(__file__).parent
only_there = pytest.mark.skipif(here().type != "standin", reason="is of the stand-in: run with --device standin")


@pytest.mark.slow
@pytest.mark.cpu("it starts the tests of the stand-in")
@pytest.mark.skipif(not all(map(shutil.which, ("ninja", "g++"))), reason="needs a C++ compiler and pip install ninja")
def test_what_follows_and_the_tests_of_a_model_pass_on_the_stand_in():
    files = [str(TESTS / file) for file in ("test_standin.py", "model/test_early_exit.py", "training/test_trainer.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "standin", *files]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@only_there
def test_tensors_of_two_devices_are_refused_but_for_single_numbers_and_indices():
    x, on_cpu = torch.ones(4), torch.ones(4, device="cpu")
    for mixed in (lambda: x + on_cpu, lambda: torch.cat([x, on_cpu]), lambda: F.linear(x[None], on_cpu[None])):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    assert (x + on_cpu[0]).device.type == "standin"
    assert x[torch.tensor([1, 2], device="cpu")].tolist() == [1, 1]


@only_there
@pytest.mark.parametrize("training", [True, False])
def test_a_network_computes_as_on_the_cpu(training):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.rand(6, 3, 8, 8)
    network(x)
    on_cpu = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).cpu()
    on_cpu.load_state_dict(network.state_dict())
    ours, theirs = network.train(training)(x), on_cpu.train(training)(x.cpu())
    assert torch.allclose(ours.cpu(), theirs, atol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for a, b in zip(network.parameters(), on_cpu.parameters(), strict=True):
        assert torch.allclose(a.grad.cpu(), b.grad, atol=1e-4)
    assert torch.allclose(network[1].running_mean.cpu(), on_cpu[1].running_mean)


@only_there
def test_without_a_device_named_ptee_takes_it():
    from ptee._common.devices import resolve_device

    assert resolve_device(None).type == "standin"
    with pytest.raises(ptee.PteeError, match="CUDA graphs need an NVIDIA GPU, and this model is on standin"):
        ptee.optimize(ptee.augment(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
                                   exits=["0"], input_size=(3, 8, 8)), mode="graphs")  # fmt: skip


@only_there
def test_random_numbers_are_drawn_with_a_generator_of_their_own_device():
    own, of_cpu = torch.Generator(here()), torch.Generator("cpu")
    drawn = [torch.rand(3, generator=own.manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].device.type == "standin"
    assert sorted(torch.randperm(4, generator=own).tolist()) == [0, 1, 2, 3]
    assert torch.equal(drawn[0].cpu(), torch.rand(3, device="cpu", generator=of_cpu.manual_seed(1)))
    for generator, device in ((of_cpu, here()), (own, torch.device("cpu"))):
        with pytest.raises(RuntimeError, match="device type for generator but found"):
            torch.empty(3, device=device).normal_(generator=generator)
        with pytest.raises(RuntimeError, match="device type for generator but found"):
            torch.randperm(3, device=device, generator=generator)
