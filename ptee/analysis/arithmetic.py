"""Comparing the outputs of a network: how near counts as equal, and arithmetic that is exact enough for it.

On a GPU a row gets slightly different logits in a batch than alone. The GPU uses another algorithm for another number of
rows, and may round float32 to TF32. Inside of `exact_arithmetic` both are off. If outputs still differ too much, they are
computed again in float64. There the differences that come from rounding are gone, but the influence of one row on another
stays.

On a GPU a training promises: the same seed, data and settings give the same heads, bit for bit, on the same kind of GPU with the
same versions of torch and CUDA. So `same_each_time` is on while heads learn. Without it cuDNN adds up the gradients of
convolutions in any order, and with torch.backends.cudnn.benchmark = True it takes the algorithm that was faster by the clock.
That is enough for ptee's own heads and losses: of the operators that torch.use_deterministic_algorithms lists, they use only
convolutions and gather, where no two gradients meet; and cuBLAS is repeatable on one stream. Not promised are a user's own
heads and backbones that use other listed operators, several GPUs, and the same last bits in batches of another size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.devices import widest
from ptee._common.process import Change, LongChange

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}
MIN_SCALE = 1e-3  # if all values are below this, they are the rounding errors of zeros

# The switches by backend and operator. torch.backends calls them cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul and so on.
_BACKENDS = {"cuda": ("matmul", "conv", "rnn"), "mkldnn": ("matmul", "conv", "rnn")}
_FULL = "ieee"  # float32 without rounding to a shorter type


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """How much two outputs for one row may differ by rounding alone, as a share of the largest value.

    A device that rounds float32 to TF32 or bfloat16 has the tolerance of half precision.
    """
    if dtype == torch.float32 and _rounds_float32(device):
        return TOLERANCES[torch.float16]
    return TOLERANCES.get(dtype, TOLERANCES[torch.float16])


def _rounds_float32(device: torch.device) -> bool:
    backend = {"cuda": "cuda", "cpu": "mkldnn"}.get(device.type)
    return backend is not None and any(_read(backend, op) in ("tf32", "bf16") for op in _BACKENDS[backend])


# ---------------------------------------------------------------------------------------------------- exact switches


@contextmanager
def _repeatable_switches() -> Iterator[None]:
    with ExitStack() as undo:
        _set(undo, torch.backends.cudnn, "benchmark", False)
        _set(undo, torch.backends.cudnn, "deterministic", True)
        yield


@contextmanager
def _exact_switches() -> Iterator[None]:
    with _repeatable_switches(), ExitStack() as undo:
        _use_full_float32(undo)
        yield


same_each_time = LongChange(_repeatable_switches)  # the same algorithm runs each time, whatever the user has set
exact_arithmetic = Change(_exact_switches)  # and float32 is not rounded to a shorter type


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _use_full_float32(undo: ExitStack) -> None:
    """Switch off TF32 and bfloat16 in products of float32. To read torch's old switches (`allow_tf32`) may raise.

    An operator without a setting of its own follows its backend, and a backend without one follows the general setting.
    One that gets a setting does not follow any more. So only those that do not follow now get one.
    """
    for backend, operators in _BACKENDS.items():
        follows = _read(backend, "all") == _read("generic", "all")
        undo.callback(_write, backend, "all", "none" if follows else _read(backend, "all"))
        _write(backend, "all", _FULL)
        for op in operators:
            if (precision := _read(backend, op)) != _FULL:
                undo.callback(_write, backend, op, precision)
                _write(backend, op, _FULL)


def _read(backend: str, op: str) -> str:
    return torch._C._get_fp32_precision_getter(backend, op)


def _write(backend: str, op: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, op, precision)


# ---------------------------------------------------------------------------------------------------- float64


def exact_copy(module: nn.Module) -> nn.Module | None:
    """A copy of a network that computes in float64, or None if there can be none.

    It is on the CPU if the network's device does not support float64.
    """
    for moved in (lambda copied: copied, lambda copied: copied.cpu()):
        try:
            return moved(copy.deepcopy(module)).double()
        except Exception:  # it cannot be copied, or the device has no room or no float64
            continue
    return None


def scratch_copy(module: nn.Module) -> nn.Module | None:
    """A copy of a network for trials: whatever its code keeps or changes there, the network is as it was. None if there can be none.

    The weights of torch's own layers are shared, because they may be large, but no tensor is the network's own.
    """
    layers = [part for part in module.modules() if type(part).__module__.startswith("torch.nn.")]
    weights = [p for part in layers for p in part.parameters(recurse=False)]
    try:
        return copy.deepcopy(module, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in weights})
    except Exception:  # whatever its code raises
        return None


def exact_images(images: Tensor, module: nn.Module) -> Tensor:
    """The images for an exact copy, with its type and on its device."""
    return images.to(next((p.device for p in module.parameters()), images.device)).double()


def relative_gap(want: Tensor, got: Tensor) -> float:
    """How far values are from those that they should be, as a share of their size; NaN and inf are near themselves alone.

    In the root mean square: of code that casts to another type, rounding may move a few values by a whole step.
    """
    want, got = (_real(t).to(widest(t.device)) for t in (want, got))  # of which no square is infinite
    same = (got == want) | (got.isnan() & want.isnan())
    off, size = torch.where(same, 0, got - want), torch.where(want.isfinite(), want, 0)
    gap, scale = (t.square().mean().sqrt().item() for t in (off, size))
    return gap / max(scale, MIN_SCALE)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def keeps_rows_apart(module: nn.Module, images: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Whether `run`, (module, images) -> (b, n), gives each row the same output in a batch as alone.

    If the outputs differ, they are compared again in float64. The module is in eval mode, and the rows of the images differ.
    """
    with torch.no_grad(), exact_arithmetic:
        if _same_alone(module, images, run):
            return True
        exact = exact_copy(module)
        try:
            return exact is not None and _same_alone(exact, exact_images(images, exact), run)
        except Exception:  # the network's code casts to a type of its own
            return False


def _same_alone(module: nn.Module, images: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    together = run(module, images.clone())
    alone = torch.cat([run(module, image) for image in images.clone().split(1)])
    # In float64, too, the tolerance is that of float32: a part of the network may compute in float32 whatever it is given.
    relative = max(tolerance(together.dtype, together.device), TOLERANCES[torch.float32])
    allowed = relative * max(together.abs().max().item(), MIN_SCALE)
    return torch.allclose(alone, together, rtol=0, atol=allowed, equal_nan=True)
