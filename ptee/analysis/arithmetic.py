"""An arithmetic in which answers can be compared: how near is equal, and what makes one row's answer depend on the batch.

A GPU takes another algorithm for another number of rows, and rounds float32 to TF32 on the way, so a row's answer in a
batch differs from its answer alone by far more than float32 rounds. While answers are compared all of that is off. What
still lies too far apart is asked again in float64, where noise vanishes and rows that are mixed stay mixed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}
LEAST = 1e-3  # a largest answer below this is the noise of what should be zero

# (backend, operators): what torch.backends calls cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul and so on.
_BACKENDS = {"cuda": ("matmul", "conv", "rnn"), "mkldnn": ("matmul", "conv", "rnn")}
_FULL = "ieee"  # float32 as it is


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """How far two answers to one row may lie apart, as a share of the largest answer, by rounding alone.

    Args:
        dtype: of the answers.
        device: where they were computed. Where it rounds float32 to TF32 or bfloat16, half precision's tolerance holds.
    """
    if dtype == torch.float32 and _rounds_float32(device):
        return TOLERANCES[torch.float16]
    return TOLERANCES.get(dtype, TOLERANCES[torch.float16])


def _rounds_float32(device: torch.device) -> bool:
    backend = {"cuda": "cuda", "cpu": "mkldnn"}.get(device.type)
    if backend is None:
        return False
    if _has_new_switches():
        return any(_read(backend, op) in ("tf32", "bf16") for op in _BACKENDS[backend])
    if backend == "cuda":
        return torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return torch.get_float32_matmul_precision() == "medium"


# ---------------------------------------------------------------------------------------------------- what is set meanwhile

_LOCK = threading.Lock()
_USERS: list[Callable[[], None]] = []  # one for each thread inside; the first of them puts everything back


@contextmanager
def comparable() -> Iterator[None]:
    """Meanwhile float32 is rounded nowhere to less, and the same algorithms run each time.

    What it sets belongs to the whole process. So the first who enters sets it and the last who leaves puts it back, in
    whatever thread they are; other work of this process is as exact meanwhile, and a little slower.
    """
    with _LOCK:
        _USERS.append(_set_all() if not _USERS else _nothing)
    try:
        yield
    finally:
        with _LOCK:
            if len(_USERS) > 1:
                _USERS.pop()
            else:
                _USERS.pop()()


def _nothing() -> None:
    """Somebody else puts it back."""


def _set_all() -> Callable[[], None]:
    """Set everything; what is returned puts it back."""
    undo: list[Callable[[], None]] = []

    def put_back() -> None:
        for step in reversed(undo):
            step()

    try:
        undo.append(_set_attribute(torch.backends.cudnn, "benchmark", False))
        undo.append(_set_attribute(torch.backends.cudnn, "deterministic", True))
        for step in _full_float32() if _has_new_switches() else _full_float32_of_old():
            undo.append(step)
    except BaseException:
        put_back()
        raise
    return put_back


def _set_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _has_new_switches() -> bool:
    """From torch 2.9 on; where they say something, to read the old ones (`allow_tf32`) may raise, so those are left alone."""
    return hasattr(torch._C, "_get_fp32_precision_getter")


def _full_float32() -> Iterator[Callable[[], None]]:
    """No TF32 and no bfloat16 in products of float32."""
    before = {(backend, op): _read(backend, op) for backend, ops in _BACKENDS.items() for op in (*ops, "all")}

    def put_back() -> None:
        for key, value in before.items():
            if _read(*key) != value:
                _write(*key, value)

    yield put_back
    for backend, operators in _BACKENDS.items():
        # What an operator has not been told it takes from its backend, and a backend from what holds for all. Whoever is
        # told something does not follow any more, so only those are told that do not follow now.
        follows = _read(backend, "all") == _read("generic", "all")
        yield _set_precision(backend, "all", "none" if follows else _read(backend, "all"))
        for op in operators:
            if _read(backend, op) != _FULL:
                yield _set_precision(backend, op, _read(backend, op))


def _set_precision(backend: str, op: str, before: str) -> Callable[[], None]:
    _write(backend, op, _FULL)
    return lambda: _write(backend, op, before)


def _read(backend: str, op: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, op)


def _write(backend: str, op: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, precision)


def _full_float32_of_old() -> Iterator[Callable[[], None]]:
    """The same, by the switches before torch 2.9."""
    before = torch.get_float32_matmul_precision()
    yield _set_attribute(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    yield lambda: torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------------- float64


def exact_copy(module: nn.Module) -> nn.Module | None:
    """A copy of a network that computes in float64, on the CPU where its device cannot; None where there is none."""
    for elsewhere in (lambda copied: copied, lambda copied: copied.cpu()):
        try:
            return elsewhere(copy.deepcopy(module)).double()
        except Exception:  # it cannot be copied, or the device has no room for it or no such type
            continue
    return None


def exact_images(images: Tensor, module: nn.Module) -> Tensor:
    """Images for an exact copy, of its type and on its device."""
    return images.to(next((p.device for p in module.parameters()), images.device)).double()


def keeps_rows_apart(module: nn.Module, images: Tensor, ask: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Whether each row is answered in a batch as it is alone; asked again in float64 where float32 leaves a doubt.

    Args:
        module: in eval mode.
        images: (b, ...) whose rows differ.
        ask: (module, images) -> (b, n).
    """
    with torch.no_grad(), comparable():
        if _near(module, images, ask):
            return True
        exact = exact_copy(module)
        if exact is None:
            return False
        try:
            return _near(exact, exact_images(images, exact), ask)
        except Exception:  # it casts to a type of its own
            return False


def _near(module: nn.Module, images: Tensor, ask: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    together = ask(module, images.clone())
    alone = torch.cat([ask(module, image) for image in images.clone().split(1)])
    # float64 is asked for no more than float32, for a part of the network may compute in that whatever it is given.
    relative = max(tolerance(together.dtype, together.device), TOLERANCES[torch.float32])
    near = relative * max(together.abs().max().item(), LEAST)
    return torch.allclose(alone, together, rtol=0, atol=near, equal_nan=True)
