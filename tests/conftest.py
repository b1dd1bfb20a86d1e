"""One thread and the same random numbers for every test; where the real data and weights lie, if they are there."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores are many times slower on small tensors

import pytest
import torch

from ptee._common.devices import resolve_device
from ptee._common.errors import DeviceError

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])
)  # for processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests of devices compute: cpu or cuda")


def absent(device: str) -> str:
    """Why there is no such device here; empty where there is one."""
    try:
        resolve_device(device)
    except DeviceError as why:
        return str(why)
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU run with `--device cuda` alone; those of any device only where it is there."""
    wanted = str(config.getoption("--device"))
    missing = absent(wanted)
    for item in items:
        if item.get_closest_marker("cuda") and not wanted.startswith("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --device cuda"))
        elif missing and (item.get_closest_marker("cuda") or "device" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where to compute, as `--device` says."""
    return resolve_device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
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
