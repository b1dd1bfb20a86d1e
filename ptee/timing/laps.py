"""Laps: the seconds between marks inside of one pass, for calls that are measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ptee._common.clock import turns
from ptee._common.devices import wait

LONG_ENOUGH = 0.02  # seconds of one measurement
MOST_REPEATS = 50
MAX_SECONDS = 120.0  # after that no further round begins
Call = Callable[[], Any]
Mark = Callable[[], None]


class Laps:
    """Looks at the clock whenever it is called."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def __call__(self) -> None:
        """Look now; on an NVIDIA GPU, when it has come so far."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append(event)
        else:
            wait(self.device)
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each look and the next."""
        wait(self.device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            return [one.elapsed_time(two) / 1000 for one, two in pairs]
        return [two - one for one, two in pairs]


def in_turns(
    calls: Mapping[Any, Sequence[Callable[[Mark], Any]]], device: torch.device, rounds: int, seconds: float
) -> dict[Any, list[list[float]]]:
    """For each key and each of its calls, the usual length of its laps, over the `turns` but for the first."""
    every = [(key, i, call) for key, of_key in calls.items() for i, call in enumerate(of_key)]
    times: dict[Any, list[list[float]]] = {(key, i): [] for key, i, _ in every}
    repeats = dict.fromkeys(times, 1)
    with torch.no_grad():
        for i, (key, k, call) in turns(every, rounds, seconds, "measuring pieces"):
            laps = [_laps(call, device) for _ in range(repeats[key, k])]
            repeats[key, k] = repeats_for(sum(laps[-1]))
            times[key, k] += laps if i else []
    return {key: [_usual(times[key, k]) for k in range(len(of_key))] for key, of_key in calls.items()}


def repeats_for(seconds: float) -> int:
    """How often a call of so many seconds is repeated to be measured."""
    return max(1, min(MOST_REPEATS, int(LONG_ENOUGH / max(seconds, 1e-6))))


def _laps(call: Callable[[Mark], Any], device: torch.device) -> list[float]:
    laps = Laps(device)
    wait(device)
    call(laps)
    return laps.seconds()


def _usual(passes: list[list[float]]) -> list[float]:
    """The mean of each lap over the faster half of the passes: what other programs take only makes a pass longer.

    Laps are not picked one by one: a short lap escapes other programs more often, and the parts would not add up to the whole.
    """
    faster = sorted(passes, key=sum)[: (len(passes) + 1) // 2]
    return [statistics.mean(lap) for lap in zip(*faster, strict=True)]
