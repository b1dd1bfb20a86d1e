"""Seconds of calls that are measured in turns, and their ratios: the speed of a machine drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from ptee._common.devices import wait
from ptee._common.progress import with_bar

NOISY = 0.5  # of the median
Key = TypeVar("Key")


def turns(keys: Sequence[Key], rounds: int, seconds: float, doing: str) -> Iterator[tuple[int, Key]]:
    """Each key in every round, with the number of the round; 0 is for warming up.

    After `seconds` no further round begins, but three do in any case.
    """
    begun = time.perf_counter()
    for i, (n, key) in with_bar([(i, turn) for i in range(rounds + 1) for turn in enumerate(keys)], doing):
        if i > 3 and n == 0 and time.perf_counter() - begun > seconds:
            return
        yield i, key


def in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 7, seconds: float = 20.0
) -> dict[str, list[float]]:
    """Seconds of each call in every one of the `turns`, but for the first. The clock is read when the device has finished."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for i, name in turns(list(calls), rounds, seconds, "measuring speed"):
            wait(device)
            start = time.perf_counter()
            calls[name]()
            wait(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of time / base. The two times of one round were measured under the same load."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def spread(times: Sequence[float]) -> float:
    """The longest round less the shortest, divided by the median."""
    return (max(times) - min(times)) / statistics.median(times)


def noise(spreads: Iterable[float]) -> str:
    """A sentence if rounds differ by more than half; else empty."""
    most = max(spreads, default=0.0)
    if most <= NOISY:
        return ""
    return f"The rounds of one line differ by {most:.0%}, as where other programs run meanwhile. Repeat it on a quiet machine."
