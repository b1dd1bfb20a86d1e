"""Wall-clock time beside the bare backbone, in the same process and in turns.

A machine's speed drifts, so absolute seconds mean little: every figure is a ratio to the bare backbone, timed in turn
with it. The counted saving stands beside the measured one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ptee._common.errors import PteeError
from ptee._common.text import table
from ptee.exits.placement import INPUT
from ptee.model.early_exit import EarlyExitModel, require_early_exit

NEVER, ALWAYS = 2.0, 0.0  # thresholds that no confidence, and every finite one, reaches


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 7, seconds: float = 20.0
) -> dict[str, list[float]]:
    """Seconds of each call, all of them timed once in every round.

    Args:
        calls: what to time, by name.
        device: waited for before the clock is read. Progress is shown where standard error is a terminal.
        rounds: how often, after one round that is not counted.
        seconds: start no further round after so long, but do three.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    with torch.inference_mode(), _bar((rounds + 1) * len(calls)) as bar:
        for i in range(rounds + 1):
            for name, call in calls.items():
                wait(device)
                start = time.perf_counter()
                call()
                wait(device)
                if i:
                    times[name].append(time.perf_counter() - start)
                bar.update()
            if i >= 3 and time.perf_counter() - begun > seconds:
                break
    return times


def _bar(steps: int) -> tqdm[Any]:
    return tqdm(total=steps, desc="measuring speed", leave=False, disable=None)


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of time over base: each round's two stood under the same load."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def wait(device: torch.device) -> None:
    """Until it has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Case:
    """One way to leave, timed at one batch size. Times and costs are fractions of the bare backbone's.

    Attributes:
        batch: b.
        leaving: in words.
        time: measured.
        counted: the mean cost, by operations.
        limit: time that would be spent if what leaves cost nothing after its exit, measured in the same run; None
            where nobody leaves.
        saved: the share of that possible saving that is had; None where nobody leaves.
    """

    batch: int
    leaving: str
    time: float
    counted: float
    limit: float | None
    saved: float | None


@dataclass(frozen=True)
class Bench:
    """Speed of a model beside its bare backbone."""

    backbone: str
    device: str
    threads: int
    exits: int
    cases: tuple[Case, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        blank = lambda x: "" if x is None else f"{x:.3f}"  # noqa: E731
        rows = [
            (str(c.batch), c.leaving, f"{c.time:.3f}", f"{c.counted:.3f}", f"{c.time / c.counted - 1:+.1%}", blank(c.limit),
             "" if c.saved is None else f"{c.saved:.1%}")
            for c in self.cases
        ]  # fmt: skip
        title = ("batch", "leaving", "time", "counted", "over counted", "limit", "of the limit saved")
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        return (
            f"{self.backbone} with {self.exits} exits on {where}; time and cost over the bare backbone's\n"
            + table([title, *rows], left={1})
            + "\nlimit: the bare backbone's time less what it spends behind exit 0 on the rows that leave there."
        )


def bench(model: EarlyExitModel, batch_sizes: Sequence[int] = (1, 32), *, rounds: int = 7) -> Bench:
    """Time a model beside its bare backbone: nobody leaves, half of the rows leave at exit 0, all leave there.

    Args:
        model: on the device to be timed.
        batch_sizes: b of each measurement.
        rounds: how often each is timed; medians of the ratios are given.
    """
    require_early_exit(model)
    if any(b < 1 for b in batch_sizes):
        raise PteeError(f"Batch sizes {list(batch_sizes)} must be positive.")
    cases = [case for b in batch_sizes for case in _cases(model, b, rounds)]
    device = next(model.heads.parameters()).device
    return Bench(model.plan.backbone, device.type, torch.get_num_threads(), len(model.exits), tuple(cases))


def _cases(model: EarlyExitModel, b: int, rounds: int) -> list[Case]:
    like = next(model.heads.parameters())
    x = torch.randn(b, *model.plan.input_size, device=like.device, dtype=like.dtype)
    half = b // 2
    ways = {"nobody": 0, "half at exit 0": half, "all at exit 0": b} if half else {"nobody": 0, "all at exit 0": b}
    thresholds = {way: _leaving(model, b, n, x.device) for way, n in ways.items()}
    calls: dict[str, Callable[[], object]] = {
        "bare": lambda: model.backbone(x),
        "bare, others": lambda: model.backbone(x[half:]),
        "to exit 0": lambda: _up_to_first_exit(model, x),
        "to exit 0, others": lambda: _up_to_first_exit(model, x[half:]),
    }
    for way, threshold in thresholds.items():
        calls[way] = partial(model.predict, x, threshold)
    times = in_turns(calls, x.device, rounds=rounds, seconds=120)
    bare = times["bare"]
    limits = {
        # Everybody runs to exit 0; behind it only the others.
        "half at exit 0": [
            a + o - p
            for a, o, p in zip(times["to exit 0"], times["bare, others"], times["to exit 0, others"], strict=True)
        ],
        "all at exit 0": times["to exit 0"],
    }
    cases = []
    for way, leaving in ways.items():
        counted = (leaving * model.costs[0] + (b - leaving) * model.costs[-1]) / b
        measured = ratio(times[way], bare)
        limit = ratio(limits[way], bare) if leaving else None
        saved = None if limit is None else (1 - measured) / (1 - limit)
        cases.append(Case(b, way, measured, counted, limit, saved))
    return cases


def _leaving(model: EarlyExitModel, b: int, leaving: int, device: torch.device) -> Any:
    """Thresholds (b, E) that send the first rows out at exit 0 and nobody else anywhere."""
    if leaving in (0, b):
        return [ALWAYS if leaving else NEVER, *[NEVER] * (len(model.exits) - 1)]
    wall = torch.full((b, len(model.exits)), NEVER)
    wall[:leaving, 0] = ALWAYS
    return wall  # on the CPU: its NaN check then waits for nothing


class _Reached(BaseException):
    """The backbone has run as far as it was to be timed."""


def _up_to_first_exit(model: EarlyExitModel, x: Tensor) -> None:
    if model.exits[0].name == INPUT:  # nothing of the backbone comes before it
        return

    def stop(*_: object) -> None:
        raise _Reached

    handle = model.backbone.get_submodule(model.exits[0].name).register_forward_hook(stop)
    try:
        model.backbone(x)
    except _Reached:
        pass
    finally:
        handle.remove()
