"""Where to compute: the device, its best precision, and the number of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ptee._common.errors import DeviceError, PteeError, first_line
from ptee._common.text import shown

T = TypeVar("T")
# Held by a thread that records CUDA graphs, one at a time, also while torch compiles for it. Whoever waits for the whole GPU
# meanwhile breaks the recording.
RECORDING = threading.RLock()
_HAS_FLOAT64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}  # others are tried, once
PLACE = ("MASTER_ADDR", "MASTER_PORT")  # where the processes meet
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", *PLACE)  # what torchrun puts into the environment
MPI = (  # what MPI's launchers put there, and accelerate reads
    *("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)


def resolve_device(name: str | torch.device | None) -> torch.device:
    """The device of that name. None is a GPU where there is one, otherwise the CPU."""
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return gpu or torch.device("cpu")
    there = ["cpu", *(f"{gpu.type}:{i}" for i in range(torch.accelerator.device_count()) if gpu)]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        device = None
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    # The current GPU, as torch takes it; before CUDA begins, that is the first.
    if device is not None and device.index is None:
        current = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_initialized() else 0
        device = torch.device(device.type, current)
    if device is None or str(device) not in there:
        text = f"There is no device {shown(str(name) if isinstance(name, str | int | float | torch.device) else name)} on this machine. Possible: {', '.join(there)}."
        raise DeviceError(text, argument="device", value=name)
    return device


def best_precision(device: torch.device) -> str:
    """ "bf16" where the device has instructions for it, otherwise "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if device.type == "cpu":
        fast = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
        has = getattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda: False
        )  # a private name, which a later torch may not have
        return "bf16" if fast and has() else "no"
    return "no"


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    if (kind := device.type) not in _HAS_FLOAT64:
        _HAS_FLOAT64[kind] = _computes_in_float64(kind)
    return torch.float64 if _HAS_FLOAT64[kind] else torch.float32


def _computes_in_float64(kind: str) -> bool:
    with _disable_current_modes():  # in a trace every device has it
        try:
            return torch.ones(1, dtype=torch.float64, device=kind).add(1).item() == 2
        except (RuntimeError, TypeError):
            return False


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """No autocast of the caller's holds, and none that begins inside keeps copies of weights, which change.

    torch would keep them until the outermost autocast ends.
    """
    torch.clear_autocast_cache()
    with torch.autocast(device.type, enabled=False, cache_enabled=False):
        yield


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """No autocast holds on this kind of device. Nothing is done where it is off already: to switch it takes longer than to look.

    A graph that torch.export or torch.compile captures meanwhile is told in any case, as it may run inside of an autocast.
    """
    told = torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()
    return torch.autocast(kind, enabled=False) if told else nullcontext()


def made_on_cpu() -> AbstractContextManager[Any]:
    """What is made meanwhile lies on the CPU, whatever torch's default device is.

    Where that is the CPU anyhow, nothing is set: with a device set, each call of torch takes longer.
    """
    default = torch.empty(0, device=None).device  # torch 2.9's get_default_device fails after set_default_device(None)
    return nullcontext() if default.type == "cpu" else torch.device("cpu")


def made_with_values() -> AbstractContextManager[Any]:
    """What is made meanwhile lies on torch's default device; on the CPU if that is meta, where tensors have no values."""
    default = torch.empty(0, device=None).device
    return torch.device("cpu") if default.type == "meta" else nullcontext()


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Meanwhile torch computes in so many CPU threads; None for its own choice.

    On tiny tensors, several threads spend their time waiting for each other.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


def process_state(**how: Any) -> Any:
    """accelerate's state: whether this process is one of several that train together, and which. `how` as of its PartialState.

    Raises:
        PteeError: if the environment says that there are several, and not how to reach them.
    """
    from accelerate.state import PartialState
    from accelerate.utils import parse_flag_from_env

    how.setdefault(
        "cpu", parse_flag_from_env("ACCELERATE_USE_CPU")
    )  # of `accelerate launch --cpu`; PartialState does not read it
    given = {name: os.environ[name] for name in (*LAUNCH, *MPI) if name in os.environ}
    try:
        return PartialState(**how)
    except (ValueError, RuntimeError) as why:
        if not given:
            raise
        PartialState._reset_state()
        for name in LAUNCH:  # accelerate fills in some
            os.environ.pop(name, None)
        os.environ.update(given)
        raise _not_launched(given, first_line(why)) from why


def _not_launched(given: Mapping[str, str], why: str) -> PteeError:
    missing = [name for name in (PLACE if {*MPI} & given.keys() else LAUNCH) if name not in given]
    what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else why.rstrip(".")
    there = ", ".join(f"{name}={value:.40}" for name, value in given.items())
    return PteeError(
        f"The environment has {there}, as one of several processes that train together, but {what}. Start them with torchrun or "
        f"accelerate launch; for one process alone: unset {' '.join(given)}"
    )


def _was_launched() -> bool:
    """Whether the environment says that this may be one of several processes."""
    return bool({*LAUNCH, *MPI} & os.environ.keys())


def require_launch(device: str | torch.device | None) -> None:
    """Refuse a process that is one of several which cannot be reached, before it does minutes of work on this device.

    Where the environment says nothing of several processes, nothing is imported or changed.
    """
    if _was_launched():
        with _state_on(device):
            pass


def require_one_process() -> None:
    """Refuse a sweep, which only one process does, where this is one of several that train together."""
    if _was_launched() and (several := process_state().num_processes) > 1:
        raise PteeError(
            f"A sweep runs in one process, and {several} were started. Start it without torchrun or accelerate launch."
        )


@contextmanager
def _state_on(device: str | torch.device | None) -> Iterator[torch.device]:
    """accelerate's state, for this device unless several processes train together. Gives the device.

    accelerate keeps one state for all Accelerators of a process. It is restored afterwards.
    """
    from accelerate.state import AcceleratorState, PartialState

    shared = (PartialState._shared_state, AcceleratorState._shared_state)
    before = [dict(state) for state in shared]
    on_cpu = {"cpu": True} if str(device).startswith("cpu") else {}  # else several processes would meet on the GPUs
    alone = process_state(**on_cpu).num_processes == 1
    try:
        if alone:
            chosen = resolve_device(device)
            AcceleratorState._reset_state(reset_partial_state=True)
            process_state(cpu=chosen.type == "cpu").device = chosen
        yield process_state().device
    finally:
        if any(before) or alone:
            for state, was in zip(shared, before, strict=True):
                state.clear()
                state.update(was)


def of_main_process(call: Callable[[], T], device: str | torch.device | None) -> T:
    """What a call gives. Of several processes that train together on such a device, the first makes it, and all get what it gave."""
    if not _was_launched():
        return call()
    from accelerate.utils import broadcast_object_list

    with _state_on(device):
        state = process_state()
        found: list[Any] = [call() if state.is_main_process else None]
        if state.num_processes > 1:
            broadcast_object_list(found)
        return found[0]


@contextmanager
def accelerator_on(device: str | torch.device | None, precision: str) -> Iterator[Any]:
    """An Accelerator for this device and precision."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    with _state_on(device) as chosen:
        mixed = best_precision(chosen) if precision == "auto" else precision
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # "cost" has no gradient for the logits
        yield Accelerator(mixed_precision=mixed, cpu=chosen.type == "cpu", kwargs_handlers=[unused])


def wait(device: torch.device) -> None:
    """Return when the device has finished its work."""
    if device.type != "cpu":
        with RECORDING:
            torch.accelerator.synchronize(device)
