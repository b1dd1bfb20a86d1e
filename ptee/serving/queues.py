"""Rows of many callers that wait for the pieces of a model, and which of them go next.

Each piece has a queue of its own. Rows that stay at an exit wait in the queue of the next piece, where they meet those of other
callers: a later piece so gets full batches although most rows have left. What goes next:

1. a queue whose first row has waited for as long as it may;
2. else the last piece for which there are rows enough: it ends their way;
3. else the first piece that has any. So nobody waits while a worker is idle, and survivors gather while others arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ptee.deploy.arrays import Array, join_rows, select_rows
from ptee.serving.pieces import Where, part_of


class Answer(NamedTuple):
    """What a row is answered.

    Attributes:
        number: of the class.
        probability: of that class, by the softmax of the logits.
        exit: where it left, 0..E; E is the end of the backbone.
        confidence: h there; 1 at E.
        cost: as a fraction of the bare backbone.
        logits: (K,) float32.
    """

    number: int
    probability: float
    exit: int
    confidence: float
    cost: float
    logits: np.ndarray


@dataclass(eq=False)
class Request:
    """The rows of one call.

    Attributes:
        rows: how many.
        done: called once, in a worker's thread, with all answers in the order of the rows or with what went wrong.
        own_threshold: the caller gave thresholds, so that the promise of the model's own is not about these rows.
        began: when it came, by the monotonic clock.
        answers: so far.
        left: rows without an answer.
    """

    rows: int
    done: Callable[[list[Answer] | Exception], None]
    own_threshold: bool
    began: float
    answers: list[Answer | None] = field(default_factory=list)
    left: int = 0
    failed: bool = False

    def __post_init__(self) -> None:
        self.answers, self.left = [None] * self.rows, self.rows


@dataclass(eq=False)
class Chunk:
    """Rows that stand one behind another in a queue.

    Attributes:
        alive: the tensors that the next piece takes.
        where: the rows lie in these.
        of: for each row its request, and its number there.
        limits: (n, E) thresholds of each row.
        since: when the first of them came into this queue.
        images: what the rows were when they came, for an audit; None if there is none.
    """

    alive: Sequence[Array]
    where: Where
    of: Sequence[tuple[Request, int]]
    limits: np.ndarray
    since: float
    images: Array | None = None

    def __len__(self) -> int:
        return len(self.of)

    def split(self, n: int) -> tuple[Chunk, Chunk]:
        """The first n rows, and the others."""
        return self._part(0, n), self._part(n, len(self))

    def _part(self, first: int, last: int) -> Chunk:
        alive = [part_of(t, first, last, where) for t, where in zip(self.alive, self.where, strict=True)]
        images = None if self.images is None else self.images[first:last]
        return Chunk(alive, self.where, self.of[first:last], self.limits[first:last], self.since, images)

    def select(self, rows: np.ndarray, behind: Sequence[Array], where: Where, now: float) -> Chunk:
        """Some of the rows as they stand behind a piece, which has left these tensors alive."""
        whole = len(rows) == len(self)
        alive = behind if whole else [select_rows(t, rows, *w) for t, w in zip(behind, where, strict=True)]
        images = None if self.images is None else self.images if whole else select_rows(self.images, rows, 0, 1)
        return Chunk(alive, where, [self.of[i] for i in rows], self.limits[rows], now, images)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Several chunks of one queue as one."""
    first = chunks[0]
    if len(chunks) == 1:
        return first
    columns = zip(*(chunk.alive for chunk in chunks), strict=True)
    alive = [join_rows(parts, where[0]) for parts, where in zip(columns, first.where, strict=True)]
    images = [chunk.images for chunk in chunks]
    together = None if any(part is None for part in images) else join_rows(images)
    of = [row for chunk in chunks for row in chunk.of]
    return Chunk(alive, first.where, of, np.concatenate([c.limits for c in chunks]), first.since, together)


class Queues:
    """One for each piece. Not for several threads at once: the engine has a lock.

    Args:
        sizes: for each piece how many rows make a full batch; none is larger.
        max_wait_s: how long a row may wait behind an exit for others.
    """

    def __init__(self, sizes: Sequence[int], max_wait_s: float) -> None:
        self.sizes, self.max_wait_s = tuple(sizes), max_wait_s
        self._chunks: list[deque[Chunk]] = [deque() for _ in sizes]
        self.waiting = [0] * len(sizes)  # rows in each

    def put(self, n: int, chunk: Chunk) -> None:
        """Rows wait for piece n."""
        self._chunks[n].append(chunk)
        self.waiting[n] += len(chunk)

    def take(self, now: float) -> tuple[int, list[Chunk]] | None:
        """The number of a piece and a batch for it; None if nobody waits."""
        n = self._next(now)
        return None if n is None else (n, self._batch(n))

    def _next(self, now: float) -> int | None:
        some = [n for n, rows in enumerate(self.waiting) if rows]
        if not some:
            return None
        late = [n for n in some if n and now - self._chunks[n][0].since >= self.max_wait_s]
        full = [n for n in some if self.waiting[n] >= self.sizes[n]]
        return late[-1] if late else full[-1] if full else some[0]

    def _batch(self, n: int) -> list[Chunk]:
        taken: list[Chunk] = []
        room = self.sizes[n]
        while room and self._chunks[n]:
            chunk = self._chunks[n].popleft()
            if len(chunk) > room:
                chunk, rest = chunk.split(room)
                self._chunks[n].appendleft(rest)
            taken.append(chunk)
            room -= len(chunk)
        self.waiting[n] -= sum(map(len, taken))
        return taken
