"""One thread, one device and the same random numbers for every test; where the real data and weights lie."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores are many times slower on small tensors

import pytest
import torch

from ptee._common.devices import resolve_device
from ptee._common.errors import DeviceError

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


def _for_processes_that_tests_start(folder: Path) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


_for_processes_that_tests_start(TESTS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the networks and images of all tests lie: cpu, cuda or standin"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tensors that a test file makes as it is read lie on the device, too."""
    if config.getoption("--device").startswith("standin"):
        _load_standin()
    _set_default(wanted_device(config))


def _load_standin() -> None:
    """Here; in processes that tests start torch loads it itself."""
    folder = TESTS / "standin"
    _for_processes_that_tests_start(folder)
    sys.path.insert(0, str(folder))
    from standin_device import load

    load()


def _set_default(device: torch.device) -> None:
    """None on a CPU: a default device makes every call of torch slower."""
    torch.set_default_device(None if device.type == "cpu" else device)


def wanted_device(config: pytest.Config) -> torch.device:
    """The device that `--device` names."""
    try:
        return resolve_device(config.getoption("--device"))
    except DeviceError as why:
        raise pytest.UsageError(str(why)) from why


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Some tests run on a GPU only, and a few on the CPU only."""
    device = wanted_device(config).type
    for item in items:
        if device != "cuda" and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
        elif device != "cpu" and (marker := item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto` one more than there are cores: some tests wait for other processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_collection_finish() -> None:
    """What is there before the first test stays, and garbage is looked for less often: else that takes a fifth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """What a test makes lies on this device, unless it says otherwise."""
    wanted = wanted_device(request.config)
    _set_default(wanted)
    yield wanted
    _set_default(wanted)


@pytest.fixture(autouse=True)
def same_random_numbers(request: pytest.FixtureRequest) -> None:
    """On a CPU its generator alone: for every other kind of device torch would note the seed with all calls that led to it."""
    if wanted_device(request.config).type == "cpu":
        torch.default_generator.manual_seed(0)
    else:
        torch.manual_seed(0)


@pytest.fixture
def weights() -> Path:
    """The folder of real trained weights; the test is skipped where it is absent."""
    if not (SHARED / "weights").is_dir():
        pytest.skip(f"needs the real weights in {SHARED / 'weights'}")
    return SHARED / "weights"


@pytest.fixture
def real_data() -> Path:
    """The folder of real images; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs the real images in {SHARED / 'data'}")
    return SHARED / "data"
