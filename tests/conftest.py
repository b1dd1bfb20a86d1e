"""One thread and the same random numbers for every test; where the real data and weights lie, if they are there."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on busy cores are many times slower on small tensors

import pytest
import torch

torch.set_num_threads(1)
TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))  # for processes that tests start


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
