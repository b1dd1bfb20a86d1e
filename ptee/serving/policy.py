"""How many rows make a batch of each piece, by measure: where rows do not get cheaper together, nobody waits for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ptee._common.text import Readable, table
from ptee.deploy.arrays import Array, as_numpy
from ptee.serving.pieces import Pieces

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NEAR_BEST = 1.05  # a smaller batch is taken if its rows are as cheap as this
PAYS = 0.9  # of the time alone: collecting rows that gain less only lets them wait
ROUNDS, SECONDS = 5, 6.0  # of the measurement of a piece; after the seconds no larger batch is tried


@dataclass(frozen=True)
class Policy(Readable):
    """What was measured, and what follows from it. Prints as a table.

    Attributes:
        seconds: for each piece the time of a batch by its size, where nobody leaves.
        sizes: for each piece the rows of a full batch.
        max_wait_s: how long a row may wait behind an exit for others.
        p99_s: what is to be answered in this time, or refused; None: no such wish.
        max_queue: rows that may be there at once.
    """

    seconds: tuple[dict[int, float], ...]
    sizes: tuple[int, ...]
    max_wait_s: float
    p99_s: float | None
    max_queue: int

    @property
    def way_s(self) -> float:
        """A row's time through all pieces, each in a full batch."""
        return _way(self.seconds, self.sizes)

    @property
    def row_s(self) -> float:
        """A row's share of the time of all pieces."""
        return sum(times[size] / size for times, size in zip(self.seconds, self.sizes, strict=True))

    def __str__(self) -> str:
        rows = [("piece", "ms alone", "rows together", "ms each", "")]
        for n, (times, size) in enumerate(zip(self.seconds, self.sizes, strict=True)):
            each = 1000 * times[size] / size
            note = "" if size > 1 else "collecting does not pay: off"
            rows.append((str(n), f"{1000 * times[1]:.2f}", str(size), f"{each:.2f}", note))
        return table(rows, left={0, 4})


def measure(pieces: Pieces, max_batch: int) -> tuple[dict[int, float], ...]:
    """For each piece the seconds of a batch by its size, while all rows stay."""
    size = pieces.about.input_size
    found: list[dict[int, float]] = [{} for _ in pieces.steps]
    for b in (b for b in SIZES if b <= max_batch):
        alive: Sequence[Array] = [pieces.given(np.zeros((b, *size), dtype=np.float32))]
        began = time.perf_counter()
        for times, step in zip(found, pieces.steps, strict=True):
            given = alive
            times[b] = min(_seconds(lambda step=step, given=given: step.run(*given)) for _ in range(ROUNDS))  # type: ignore[misc]
            alive = step.run(*given)[:-2]
        if time.perf_counter() - began > SECONDS / 2:
            break
    return tuple(found)


def _seconds(call: Callable[[], Sequence[Array]]) -> float:
    began = time.perf_counter()
    as_numpy(call()[-1])  # which waits for a GPU
    return time.perf_counter() - began


def policy_of(
    seconds: Sequence[dict[int, float]], *, max_wait_s: float, p99_ms: float | None, max_queue: int
) -> Policy:
    """What follows from the times of batches.

    Args:
        seconds: as of `measure`.
        max_wait_s: how long a row may wait behind an exit for others.
        p99_ms: the wish for the slowest answers. Batches are made so small that a row is through in half of it.
        max_queue: rows that may be there at once.
    """
    sizes = [_enough(times) for times in seconds]
    while p99_ms is not None and max(sizes) > 1 and _way(seconds, sizes) > p99_ms / 2000:
        longest = max((n for n, size in enumerate(sizes) if size > 1), key=lambda n: seconds[n][sizes[n]])
        sizes[longest] //= 2
    return Policy(tuple(seconds), tuple(sizes), max_wait_s, None if p99_ms is None else p99_ms / 1000, max_queue)


def _enough(times: dict[int, float]) -> int:
    """The smallest batch whose rows are nearly as cheap as they get; 1 if that is hardly less than alone."""
    each = {b: t / b for b, t in times.items()}
    best = min(each.values())
    return 1 if best > PAYS * each[1] else next(b for b, t in each.items() if t <= NEAR_BEST * best)


def _way(seconds: Sequence[dict[int, float]], sizes: Sequence[int]) -> float:
    return sum(times[size] for times, size in zip(seconds, sizes, strict=True))
