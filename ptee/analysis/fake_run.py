"""Fake runs: forward passes of a network in which something is not what it is in use.

`with_fake_tensors` computes only shapes, no values: torch's fake tensors have a shape, a type and a device, but no values, so
an operator on them costs next to nothing.

`random_numbers_matter` passes a batch again with the lowest and the highest numbers that an operator could have drawn. A network
is random only if its answers change: not if it seeds what it draws at each call, multiplies it by 0, or draws only to log. So it
is with the numbers of Python's `random` and of `numpy.random`.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ptee._common.process import no_logs, own_random_numbers
from ptee.analysis.arithmetic import exact_arithmetic, scratch_copy
from ptee.analysis.freezing import hooked, one_parameter

T = TypeVar("T")

HEAVY = 5e10  # multiply-accumulates of one pass above which a fake run is faster than a real one
PATCH = 16 * 16  # pixels of a patch of a ViT; each patch uses all parameters once
# Passes in which each number is the lowest or the highest, by a coin: what is equal everywhere may cancel out.
MIXED = 2
# Words in the state of a Mersenne Twister, from which it draws bits that are all 0, all 1, and 0 and 1 in turn. The last give a
# whole number in any range; numbers of a range and of a normal distribution are drawn again until they fit.
LOWEST, HIGHEST, MIDDLE = 0, 0x12DD9BB3, 0x6D78EF1D
MOST = 8.0  # standard deviations that a number of a normal distribution is away from the mean, at most


def with_fake_tensors(work: Callable[[nn.Module, Tensor], T], module: nn.Module, images: Tensor) -> T:
    """Do work that needs only shapes: on a fake copy of the network if the network is heavy, else on the network itself.

    Nothing fake stays in the network, even if its code keeps a tensor for later. If the fake run fails, the work is done
    once more on the network itself.
    """
    macs = sum(p.numel() for p in module.parameters()) * images.shape[-2:].numel() / PATCH * len(images)
    if macs > HEAVY:
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            fake = _fake_copy(module, mode)
            with no_logs, mode:
                return work(fake, mode.from_tensor(images))
        except Exception:  # the network cannot be copied, or its code looks at values
            pass
    return work(module, images)


def operators_run(module: nn.Module, input_size: tuple[int, int, int], rows: Sequence[int]) -> list[list[Any]]:
    """The operators that run on so many images, for each of these numbers of rows.

    They are taken from fake runs, which cost as little for large images as for small ones. Empty lists if the network allows none.
    """
    found: list[list[Any]] = [[] for _ in rows]
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake = _fake_copy(module, mode)
        like = one_parameter(fake)
        with no_logs, torch.no_grad(), mode:
            for n, noted in zip(rows, found, strict=True):
                images = like.new_empty(n, *input_size)
                with _Operators(noted):
                    fake(images)
    except Exception:  # the network cannot be copied, or its code looks at values
        return [[] for _ in rows]
    return found


def _fake_copy(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(t): mode.from_tensor(t) for t in tensors})


def note_operator(noted: list[Any], func: Any, args: Any) -> None:
    """Note an operator with the switches and the shares that it gets, but no sizes: they differ with the number of rows."""
    if func.namespace != "prim":  # by one of these a fake tensor looks up its device
        noted.append((func, *(a for a in args if isinstance(a, bool | float))))


class _Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note_operator(self._noted, func, args)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------------- random numbers


def draws_random_numbers(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether an operator has drawn random numbers. Attention calls one with dropout 0 in eval mode, which draws none.

    Of numbers from a generator of its own, which the network may seed at each call, only verification can tell.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    if not any(t.numel() for t in tree_flatten(out)[0] if isinstance(t, Tensor)):
        return False
    named = arguments(func, args, kwargs)
    certain = any(isinstance(p := named.get(key), int | float) and p in (0, 1) for key in ("p", "dropout_p", "dropout"))
    return not (certain or False in (named.get("train"), named.get("training")) or named.get("generator") is not None)


def arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator by name, with the defaults of those that were not given."""
    schema = func._schema.arguments
    return {a.name: a.default_value for a in schema} | dict(zip((a.name for a in schema), args, strict=False)) | kwargs


def random_numbers_matter(module: nn.Module, images: Tensor) -> bool:
    """Whether the answer to these images depends on the random numbers that a network in eval mode draws.

    Yes if that cannot be told: the images have no values, the network cannot be copied, or the lowest and highest number that an
    operator can draw are not known.
    """
    if isinstance(images, FakeTensor) or (copied := scratch_copy(module)) is None:
        return True
    try:
        with own_random_numbers(wait=False), _python_numbers_kept(), exact_arithmetic, torch.no_grad():
            answers, states = zip(*(_answer(copied, images, _Draws()) for _ in range(2)), strict=True)
            seeded = {i for i, (one, other) in enumerate(zip(*states, strict=False)) if one == other}
            others = [_answer(copied, images, _Draws(share, seeded))[0] for share in (0.0, 1.0, *[0.5] * MIXED)]
            return not all(torch.equal(answers[0], other) for other in [*answers[1:], *others])
    except Exception:  # such an operator, or whatever the network's code raises
        return True


def _answer(module: nn.Module, images: Tensor, draws: _Draws) -> tuple[Tensor, list[str]]:
    """The network's answer, and the state of the random numbers before each draw."""
    torch.rand((), device="cpu")  # each pass begins in another state; a seed would also be one for other threads
    torch.rand((), device=images.device)
    draws.begin()
    with draws:
        return module(images.clone()).clone(), draws.states


class _Draws(TorchDispatchMode):
    """Notes the state of the random numbers before each draw, and puts the lowest or highest possible numbers for those drawn.

    Args:
        share: of the numbers that are the highest; None: all are as drawn.
        seeded: draws that are left as they are, by their place in the pass.
    """

    def __init__(self, share: float | None = None, seeded: set[int] | None = None) -> None:
        super().__init__()
        self.states: list[str] = []
        self._share, self._seeded = share, seeded or set()
        self._coins = torch.Generator().manual_seed(0)

    def begin(self) -> None:
        """Put the numbers of Python and NumPy in another state, or in one from which they draw the lowest and highest."""
        words = np.random.RandomState().randint(0, 2**32, 624, np.uint64).tolist()
        if self._share is not None:
            coins = torch.rand(312, generator=self._coins, device="cpu") < self._share
            words = [HIGHEST if coin else LOWEST for coin in coins.tolist()] + 312 * [MIDDLE]
        random.setstate((3, (*words, 0), None))
        if _numpy_states():
            np.random.set_state(("MT19937", np.array(words, np.uint32), 0, 0, 0.0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        may_draw = torch.Tag.nondeterministic_seeded in func.tags
        state = _states() if may_draw else ""
        out = func(*args, **kwargs)
        if may_draw and draws_random_numbers(func, args, kwargs, out):
            if self._share is not None and len(self.states) not in self._seeded:
                lowest, highest = _bounds(func, arguments(func, args, kwargs), out)
                coins = torch.rand(out.shape, generator=self._coins, device="cpu") < self._share
                out.copy_(torch.where(coins.to(out.device), out.new_tensor(highest), out.new_tensor(lowest)))
            self.states.append(state)
        return out


def python_numbers() -> dict[str, Any]:
    """The states of the random numbers of Python and of NumPy."""
    return {"random": random.getstate(), "numpy.random": pickle.dumps(_numpy_states())}


def _numpy_states() -> list[Any]:
    """The state, unless NumPy draws from another kind of generator (numpy.random.set_bit_generator)."""
    return [state] if isinstance(state := np.random.get_state(), tuple) else []


@contextmanager
def _python_numbers_kept() -> Iterator[None]:
    python, numpy = random.getstate(), _numpy_states()
    try:
        yield
    finally:
        random.setstate(python)
        for state in numpy:
            np.random.set_state(state)


def who_draws(module: nn.Module, images: Tensor) -> str:
    """The part of a network that draws random numbers of Python or NumPy, in words."""
    found: list[str] = []
    running, before = ["its own forward"], python_numbers()

    def look() -> None:
        if not found and python_numbers() != before:
            found.append(running[-1])

    def begin(name: str) -> None:
        look()
        running.append(repr(name))

    def end(_: object) -> None:
        look()
        running.pop()

    parts = {part: name for name, part in module.named_modules() if name}
    with torch.no_grad(), hooked(dict.fromkeys(parts, end), {p: partial(begin, name) for p, name in parts.items()}):
        module(images.clone())
    return (found or running)[0]


def _states() -> str:
    """The state of torch's random numbers. Numbers that are equal by chance have another."""
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return hashlib.sha256(b"".join(state.numpy().tobytes() for state in [torch.get_rng_state(), *gpu])).hexdigest()


def _bounds(func: Any, named: dict[str, Any], out: Any) -> tuple[float, float]:
    """The lowest and the highest number that an operator can draw."""
    name = func.overloadpacket.__name__.removesuffix("_").removesuffix("_like")
    low, high = 0.0, 1.0
    if name == "randn":
        low, high = -MOST, MOST
    elif name == "normal" and isinstance(named.get("mean"), int | float) and isinstance(named.get("std"), int | float):
        low, high = named["mean"] - MOST * named["std"], named["mean"] + MOST * named["std"]
    elif name == "uniform":
        low, high = named["from"], named["to"]
    elif name == "randint" and isinstance(named.get("low", 0), int) and isinstance(named["high"], int):
        low, high = named.get("low", 0), named["high"] - 1
    elif name not in ("rand", "bernoulli"):
        raise ValueError(f"{name} has no lowest and highest number")  # so the network counts as random
    if name in ("rand", "uniform"):  # the upper end is never drawn
        high -= 4 * torch.finfo(out.dtype).eps * (high - low)
    return low, high
