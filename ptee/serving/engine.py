"""Answers rows of many callers in one process: threads that take batches out of the queues of the pieces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from ptee._common.errors import PteeError
from ptee.deploy.arrays import Array, answers_at_end, select_rows
from ptee.deploy.runner import Answers
from ptee.serving.pieces import IMAGES, Pieces, Step, in_host_memory
from ptee.serving.policy import Policy
from ptee.serving.queues import Answer, Chunk, Queues, Request, joined

if TYPE_CHECKING:
    from ptee.serving.metrics import Metrics

FADES = 0.98  # of what is remembered of the pace, with each batch
SLOWEST, STEP = 0.99, 0.1  # the share of answers whose time is to be foreseen, and how fast that is learnt
LEAST, MOST = 0.5, 2.0  # times of what the pace says
Done = Callable[[list[Answer] | Exception], None]
Watch = Callable[[Array, bool], Callable[[Any], Any]]


class BusyError(PteeError):
    """There is no room for more rows.

    Attributes:
        seconds: after which it is worth trying again.
    """

    def __init__(self, text: str, seconds: float = 1.0) -> None:
        super().__init__(text)
        self.seconds = seconds


class Engine:
    """Runs rows through the pieces of a model. Any thread may call it.

    Args:
        pieces: of the model.
        policy: sizes of batches, and what may wait.
        threshold: gives T of each exit for callers that say none.
        heard: is told of each batch.
        watch: `model.watching` of a model with a monitor; None: nobody watches.
        workers: threads that compute.
    """

    def __init__(
        self,
        pieces: Pieces,
        policy: Policy,
        *,
        threshold: Callable[[], Sequence[float]],
        heard: Metrics,
        watch: Watch | None = None,
        workers: int = 1,
    ) -> None:
        self.pieces, self.policy = pieces, policy
        self._threshold, self._heard, self._watch = threshold, heard, watch
        self._queues = Queues(policy.sizes, policy.max_wait_s)
        self._lock = threading.Condition()
        self._inside = self._running = 0  # rows without an answer; batches under way
        self._held = self._closed = False
        self._later: list[tuple[Request, Array, np.ndarray | None]] = []  # what came while it was held
        self._busy_s, self._answered = 50 * policy.row_s, 50.0  # lately
        self._late = 1.0  # 99 of 100 answers come within so many times of what the pace says
        self._threads = [threading.Thread(target=self._work, name=f"pieces-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    # -------------------------------------------------------------------------------------------- callers

    @property
    def inside(self) -> int:
        """Rows that have no answer yet."""
        return self._inside

    @property
    def alive(self) -> bool:
        """Whether rows are taken and answered."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def waiting(self) -> list[int]:
        """Rows in the queue of each piece."""
        return list(self._queues.waiting)

    def expected_s(self) -> float:
        """In what time a row that comes now would be answered, in 99 of 100 cases."""
        return self._late * self.by_pace_s()

    def by_pace_s(self) -> float:
        """The same, if all went on as lately."""
        return self._inside * self._busy_s / self._answered / len(self._threads) + self.policy.way_s

    def came(self, by_pace_s: float, seconds: float) -> None:
        """A caller who would have waited so long by the pace waited this long: the factor becomes a quantile of what is seen."""
        with self._lock:
            step = STEP * (SLOWEST if seconds > self._late * by_pace_s else SLOWEST - 1)
            self._late = min(max(LEAST, self._late + step), MOST)

    def require_room(self, rows: int) -> None:
        """Refuse rows for which there is no room, or that would be answered later than is wished.

        Raises:
            BusyError: saying when to try again.
        """
        if self._closed:
            raise BusyError("The server is stopping. Try another one.")
        if self._inside + rows > self.policy.max_queue and self._inside:
            raise BusyError(
                f"{self._inside} images wait, and there is room for {self.policy.max_queue}.", self.expected_s()
            )
        if self.policy.p99_s is not None and self._inside and (wait := self.expected_s()) > self.policy.p99_s:
            raise BusyError(
                f"An answer would take about {wait:.2f} s, and {self.policy.p99_s:g} s are wished for.", wait
            )

    def submit(self, images: np.ndarray, limits: np.ndarray | None, done: Done) -> None:
        """Answer images (b, c, h, w) float32. `done` gets the answers, or what went wrong, in another thread.

        Args:
            images: as the backbone takes them.
            limits: thresholds (b, E); None: those in force now.
            done: called once.

        Raises:
            BusyError: if there is no room.
        """
        request = Request(len(images), done, limits is not None, time.monotonic())
        given = self.pieces.given(images)
        with self._lock:
            self.require_room(request.rows)
            self._inside += request.rows
            if self._held:
                self._later.append((request, given, limits))
            else:
                self._put(request, given, limits)

    def _put(self, request: Request, given: Array, limits: np.ndarray | None) -> None:
        """Into the first queue, with the thresholds that go with the pieces there."""
        if limits is None:
            exits = len(self.pieces.about.exits)
            limits = np.broadcast_to(np.asarray(self._threshold(), dtype=np.float64), (request.rows, exits))
        kept = given if self._watch is not None else None
        rows = [(request, i) for i in range(request.rows)]
        self._queues.put(0, Chunk([given], IMAGES, rows, limits, request.began, kept))
        self._lock.notify()

    # -------------------------------------------------------------------------------------------- its life

    def exchange(self, pieces: Pieces, policy: Policy, put_in_force: Callable[[], object] = bool) -> None:
        """Go on with other pieces and thresholds. Rows that are there end with the old ones; those that come meanwhile wait.

        Args:
            pieces: may be the same.
            policy: the same.
            put_in_force: called in between, while no row is in any piece, to set other thresholds. If it raises, all stays as it was.

        Raises:
            PteeError: if a worker asks for it, which would wait for itself.
        """
        if threading.current_thread() in self._threads:
            raise PteeError("Settings cannot change while a batch is answered. Change them in another thread.")
        with self._lock:
            self._held = True
            try:
                while self._running or sum(self._queues.waiting):
                    self._lock.wait(1.0)
                put_in_force()
                self._queues = Queues(policy.sizes, policy.max_wait_s)
                self.pieces, self.policy = pieces, policy
            finally:
                self._held, later, self._later = False, self._later, []
                for came in later:
                    self._put(*came)
                self._lock.notify_all()

    def close(self) -> None:
        """Take no more rows, answer those that are there, and end."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    # -------------------------------------------------------------------------------------------- workers

    def _work(self) -> None:
        while (taken := self._taken()) is not None:
            n, chunks = taken
            try:
                self._run(n, joined(chunks))
            except Exception as why:  # whatever a network raises: the callers hear of it, and the server goes on
                for request in {id(request): request for c in chunks for request, _ in c.of}.values():
                    self._failed(request, why)
            finally:
                with self._lock:
                    self._running -= 1
                    self._lock.notify_all()

    def _taken(self) -> tuple[int, list[Chunk]] | None:
        with self._lock:
            while (taken := self._queues.take(time.monotonic())) is None:
                if self._closed and not self._inside:
                    return None
                self._lock.wait()
            self._running += 1
            return taken

    def _run(self, n: int, batch: Chunk) -> None:
        began = time.monotonic()
        pieces, step = self.pieces, self.pieces.steps[n]
        if n == len(pieces.steps) - 1:
            own, blended = step.run(*batch.alive)
            logits = answers_at_end(pieces.possible(batch.limits), own, blended)
            self._spent(n, len(batch), began, len(batch))
            self._answer(step, batch, logits, np.ones(len(batch), dtype=np.float32))
            return
        *alive, logits, h = step.run(*batch.alive)
        sure = in_host_memory(h)
        leaving = pieces.leaving(step, sure, batch.limits)
        gone, stay = np.flatnonzero(leaving), np.flatnonzero(~leaving)
        self._spent(n, len(batch), began, len(gone))
        if len(stay):
            with self._lock:
                self._queues.put(n + 1, batch.select(stay, alive, step.rows, time.monotonic()))
                self._lock.notify()
        if len(gone):
            leavers = batch.select(gone, (), (), began)
            self._answer(step, leavers, logits if not len(stay) else select_rows(logits, gone, 0, 1), sure[gone])

    def _spent(self, n: int, rows: int, began: float, answered: int) -> None:
        seconds = time.monotonic() - began
        self._heard.ran(n, rows, seconds)
        with self._lock:
            self._busy_s = FADES * self._busy_s + seconds
            self._answered = FADES * self._answered + answered

    def _answer(self, step: Step, batch: Chunk, logits: Array, h: np.ndarray) -> None:
        cost = self.pieces.costs[step.exit]
        answers = answers_of(step, cost, in_host_memory(logits), h)
        now = time.monotonic()
        for (request, i), answer in zip(batch.of, answers, strict=True):
            request.answers[i] = answer
        waited = [now - request.began for request, _ in batch.of]
        # first, so that who is told can read it
        self._heard.answered([step.exit] * len(batch), waited, cost * len(batch))
        for request, _ in batch.of:
            self._one_less(request)
        if self._watch is not None:
            self._watched(step, batch, logits, h)

    def _one_less(self, request: Request) -> None:
        with self._lock:
            if request.failed:
                return
            self._inside -= 1
            request.left -= 1
            if request.left:
                return
        _tell(request, [answer for answer in request.answers if answer is not None])

    def _failed(self, request: Request, why: Exception) -> None:
        """The whole request: its other rows go on, and nobody hears of them."""
        with self._lock:
            if request.failed:
                return
            request.failed = True
            self._inside -= request.left
        _tell(request, why)

    def _watched(self, step: Step, batch: Chunk, logits: Array, h: np.ndarray) -> None:
        """Let the monitor see rows that were answered. It audits those without thresholds of their own."""
        import torch

        assert self._watch is not None
        for own in (False, True):
            rows = np.flatnonzero([request.own_threshold == own for request, _ in batch.of])
            if len(rows):
                said = select_rows(logits, rows, 0, 1)
                exits = torch.full((len(rows),), step.exit, device=said.device)
                cost = torch.full((len(rows),), self.pieces.costs[step.exit], dtype=torch.float32, device=said.device)
                sure = torch.from_numpy(h[rows]).to(said.device)
                self._watch(select_rows(batch.images, rows, 0, 1), not own)(Answers(said, exits, sure, cost))


def _tell(request: Request, found: list[Answer] | Exception) -> None:
    with suppress(RuntimeError):  # its event loop has ended: nobody waits
        request.done(found)


def answers_of(step: Step, cost: float, logits: np.ndarray, h: np.ndarray) -> list[Answer]:
    """The answers of rows that leave behind a piece, from logits (b, K) and h (b,) in host memory; `cost` of each."""
    columns = zip(logits.argmax(1).tolist(), largest_probability(logits).tolist(), h.tolist(), logits, strict=True)
    return [Answer(number, probability, step.exit, sure, cost, row) for number, probability, sure, row in columns]


def largest_probability(logits: np.ndarray) -> np.ndarray:
    """(b,) of the softmax of (b, K)."""
    wide = logits.astype(np.float64)
    found: np.ndarray = 1 / np.exp(wide - wide.max(1, keepdims=True)).sum(1)
    return found
