"""The stand-in for a GPU, as torch's device "standin". torch calls `load` by the entry point beside this file.

It is built once with the machine's C++ compiler, in half a minute, and kept where torch keeps its extensions.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import torch

NAME = "standin"


def load() -> None:
    """Make the device known to torch, once a process."""
    if hasattr(torch, NAME):
        return
    from torch.utils.cpp_extension import load as build

    build("ptee_standin", [str(Path(__file__).with_name("device.cpp"))], extra_cflags=["-O1", "-w"])
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=None)


def _module() -> ModuleType:
    """What torch asks of `torch.standin`. Its random numbers are those of the CPU."""
    found = ModuleType(f"torch.{NAME}")
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": nullcontext,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
    }
    for name, answer in answers.items():
        setattr(found, name, answer)
    return found
