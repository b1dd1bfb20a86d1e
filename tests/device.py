"""Where the tensors of the tests lie, as `--device` says, and random numbers that are made there."""

from __future__ import annotations

import torch


def here() -> torch.device:
    """The device of this run."""
    return torch.empty(0).device  # torch 2.9's get_default_device fails after set_default_device(None)


def drawn(seed: int = 0) -> torch.Generator:
    """Random numbers on the CPU, for what is drawn with `device="cpu"`: the same on every machine, whatever the device."""
    return torch.Generator("cpu").manual_seed(seed)


def seeded(seed: int = 0) -> torch.Generator:
    """Random numbers that are the same each time."""
    return torch.Generator(here()).manual_seed(seed)
