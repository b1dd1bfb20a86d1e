"""What a server counts, for Prometheus."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client import Counter as Total

LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        exits: the names of the E exits.
        waiting: gives the rows in the queue of each piece.
        alarm: gives whether the monitor has raised an alarm, or None while it tests nothing; None if there is no monitor.
        page: gives the monitor's own page; empty without one.
    """

    def __init__(
        self,
        exits: Sequence[str],
        *,
        waiting: Callable[[], Sequence[int]] = tuple,
        alarm: Callable[[], bool | None] | None = None,
        page: Callable[[], str] = str,
    ) -> None:
        self._exits, self._page = exits, page
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # CPU seconds and memory of the server
        self.by_exit: Counter[int] = Counter()
        self.cost = 0.0
        self._requests = self._made(Total, "requests", "HTTP requests by path and status.", ["path", "status"])
        self._latency = self._made(
            Histogram, "latency_seconds", "From the arrival of an image to its answer.", ["exit"], buckets=LATENCY_S
        )
        self._batches = self._made(
            Histogram, "batch_rows", "Rows in the batches of each piece.", ["piece"], buckets=ROWS
        )
        self._seconds = self._made(Total, "piece_seconds", "Seconds that each piece was at work.", ["piece"])
        self._answers = self._made(Total, "answers", "Images answered at each exit; the last is the end.", ["exit"])
        self._shares()
        self._made(Gauge, "mean_cost", "Of all answers, in images of the bare backbone.").set_function(self._mean_cost)
        queue = self._made(Gauge, "queue_rows", "Images that wait for a piece.", ["piece"])
        for n in range(len(exits) + 1):
            queue.labels(n).set_function(lambda n=n: _at(waiting(), n))
        if alarm is not None:
            self._made(Gauge, "alarm", "1 if the promise no longer holds; NaN while nothing is tested.").set_function(
                lambda: math.nan if (raised := alarm()) is None else float(raised)
            )

    def _made(self, kind: Any, name: str, text: str, labels: Sequence[str] = (), **more: Any) -> Any:
        return kind(f"ptee_serve_{name}", text, labels, registry=self._registry, **more)

    def _shares(self) -> None:
        share = self._made(Gauge, "exit_share", "Share of the answers that each exit gave.", ["exit"])
        for n in range(len(self._exits) + 1):
            share.labels(n).set_function(lambda n=n: self.by_exit[n] / max(1, self.by_exit.total()))

    def _mean_cost(self) -> float:
        return self.cost / max(1, self.by_exit.total())

    def request(self, path: str, status: int) -> None:
        """A request was answered with this status."""
        self._requests.labels(path, status).inc()

    def answered(self, exits: Sequence[int], seconds: Sequence[float], cost: float) -> None:
        """Rows were answered at these exits, so long after they came, at this cost together."""
        for exit, waited in zip(exits, seconds, strict=True):
            self._latency.labels(exit).observe(waited)
        for exit, rows in Counter(exits).items():
            self.by_exit[exit] += rows
            self._answers.labels(exit).inc(rows)
        self.cost += cost

    def ran(self, piece: int, rows: int, seconds: float) -> None:
        """A piece answered a batch."""
        self._batches.labels(piece).observe(rows)
        self._seconds.labels(piece).inc(seconds)

    def text(self) -> str:
        """The page."""
        return generate_latest(self._registry).decode() + self._page()


def _at(values: Sequence[int], n: int) -> int:
    return values[n] if n < len(values) else 0  # there are fewer pieces by now
