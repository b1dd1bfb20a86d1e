"""A model served by Ray Serve: one deployment for each piece, with handles between them.

The replicas of a piece collect the rows of many requests (`serve.batch`), answer those that leave, and hand the others to the next
piece. So pieces can have different numbers of replicas, on different machines. The HTTP interface is that of `--local`.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.context import _get_global_client  # nothing public tells at which address Serve answers

from ptee._common.errors import Argument, PteeError, first_line
from ptee._common.process import no_logs, report_nothing
from ptee.deploy.arrays import Array, answers_at_end, join_rows, select_rows
from ptee.serving.app import Rules, app_of
from ptee.serving.engine import BusyError, answers_of
from ptee.serving.local import reserved
from ptee.serving.metrics import Metrics
from ptee.serving.pieces import IMAGES, About, Source, in_host_memory, part_of, to_host
from ptee.serving.policy import measure, policy_of
from ptee.serving.queues import Answer
from ptee.serving.settings import FixedSettings

APP = "ptee"
FIRST_WAIT_S = 0.002  # of rows that arrive; those that stay at an exit may wait longer
TRIES, PAUSE_S = 5, 0.2  # where a replica dies, its rows are sent to another
DRAINS_S = 600.0


@dataclass
class Rows:
    """Rows of one request on their way to a piece.

    Attributes:
        alive: what the piece takes, in host memory.
        limits: (b, E) their thresholds.
    """

    alive: list[Array]
    limits: np.ndarray

    def __len__(self) -> int:
        return len(self.limits)


class Piece:
    """A replica of one piece.

    Args:
        source: of the model.
        n: which piece.
        behind: the handle of the next piece; None for the last.
    """

    def __init__(self, source: Source, n: int, behind: Any = None) -> None:
        self._pieces, _ = source.pieces()
        self._step, self._next, self._most = self._pieces.steps[n], behind, source.max_batch
        self._first, self._where = n == 0, IMAGES if n == 0 else self._pieces.steps[n - 1].rows
        self._like = self._pieces.given(np.zeros((1, *self._pieces.about.input_size), dtype=np.float32))
        times = measure(self._pieces, source.max_batch)
        size = policy_of(times, max_wait_s=source.max_wait_s, p99_ms=None, max_queue=source.max_queue).sizes[n]
        together: Any = self._together  # `serve.batch` gives it more methods than it says
        together.set_max_batch_size(size)
        together.set_batch_wait_timeout_s(FIRST_WAIT_S if n == 0 else source.max_wait_s if size > 1 else 0.0)

    async def __call__(self, rows: Rows) -> list[Answer]:
        """The answers to rows, in their order."""
        left, stay, alive = await self._together(rows)
        if len(stay):
            ahead = await surely(self._next, Rows(alive, rows.limits[stay]))
            left.update(zip(stay.tolist(), ahead, strict=True))
        return [left[i] for i in range(len(rows))]

    @serve.batch(max_batch_size=1, batch_wait_timeout_s=FIRST_WAIT_S)
    async def _together(self, parts: list[Rows]) -> list[tuple[dict[int, Answer], np.ndarray, list[Array]]]:
        # Its size is in requests, most of which are of one row. `_in_batches` counts rows.
        return await asyncio.to_thread(self._answered, parts)  # meanwhile other rows may arrive

    def _answered(self, parts: Sequence[Rows]) -> list[tuple[dict[int, Answer], np.ndarray, list[Array]]]:
        """For each request its rows that leave with their answers, those that stay, and what is alive of these."""
        columns = zip(*(part.alive for part in parts), strict=True)
        joined = [join_rows(list(c), axis) for c, (axis, _) in zip(columns, self._where, strict=True)]
        leaving, behind, logits, h = self._in_batches(joined, np.concatenate([part.limits for part in parts]))
        answers = answers_of(self._step, self._pieces.costs[self._step.exit], logits, h)
        found, first = [], 0
        for part in parts:
            last = first + len(part)
            stay = np.flatnonzero(~leaving[first:last])
            left = {i: answers[first + i] for i in np.flatnonzero(leaving[first:last]).tolist()}
            whole = zip(behind, self._step.rows, strict=True)
            alive = [select_rows(part_of(t, first, last, w), stay, *w) for t, w in whole] if len(stay) else []
            found.append((left, stay, alive))
            first = last
        return found

    def _in_batches(
        self, alive: Sequence[Array], limits: np.ndarray
    ) -> tuple[np.ndarray, list[Array], np.ndarray, np.ndarray]:
        """As `_run`, in batches of at most `max_batch` rows: a request may have more."""
        found = []
        for first in range(0, len(limits), self._most):
            last = min(first + self._most, len(limits))
            given = [self._here(part_of(t, first, last, w)) for t, w in zip(alive, self._where, strict=True)]
            found.append(self._run(given, limits[first:last]))
        if len(found) == 1:
            return found[0]
        leaving, behind, logits, h = zip(*found, strict=True)
        columns = zip(
            zip(*behind, strict=True), self._step.rows, strict=False
        )  # nothing is alive behind the last piece
        joined = [join_rows(list(c), axis) for c, (axis, _) in columns]
        return np.concatenate(leaving), joined, np.concatenate(logits), np.concatenate(h)

    def _run(
        self, given: Sequence[Array], limits: np.ndarray
    ) -> tuple[np.ndarray, list[Array], np.ndarray, np.ndarray]:
        """Who leaves, what is alive behind the piece, and all answers with h, in host memory."""
        if self._next is None:
            own, blended = self._step.run(*given)
            everybody = np.ones(len(limits), dtype=bool)
            logits = in_host_memory(answers_at_end(self._pieces.possible(limits), own, blended))
            return everybody, [], logits, everybody.astype(np.float32)
        *alive, logits, h = self._step.run(*given)
        sure = in_host_memory(h)
        leaving = self._pieces.leaving(self._step, sure, limits)
        return leaving, [to_host(t) for t in alive], in_host_memory(logits), sure

    def _here(self, t: Array) -> Array:
        """An array that came from another process, as the piece takes it."""
        if isinstance(t, np.ndarray) and not t.flags.writeable:  # it lies in memory that processes share
            t = t.copy()
        if self._first:
            return self._pieces.given(t)
        if isinstance(self._like, np.ndarray):
            return t
        import torch

        return (torch.from_numpy(t) if isinstance(t, np.ndarray) else t).to(self._like.device)


async def surely(handle: Any, rows: Rows) -> list[Answer]:
    """The answers of a deployment. A replica that died has answered nothing, so its rows are sent again."""
    for attempt in range(TRIES):
        try:
            return list(await handle.remote(rows))
        except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError):
            if attempt == TRIES - 1:
                raise
            await asyncio.sleep(PAUSE_S * 2**attempt)
    raise AssertionError


# ---------------------------------------------------------------------------------------------------- callers


class RayBackend:
    """Answers images through the deployments, from any process of the cluster.

    Args:
        first: the handle of the first piece.
        about: the model.
        threshold: T of each exit at the start.
        fixed: the other settings.
        max_queue: images that may be on their way from here.
        p99_s: what would probably take longer is refused.
        kept: the actor that keeps the thresholds; None: nobody does.

    Attributes:
        inside: images on their way.
        closing: no more are taken.
    """

    def __init__(
        self, first: Any, about: About, threshold: list[float], fixed: dict[str, Any], max_queue: int, p99_s: float | None,
        *, kept: Any = None,
    ) -> None:  # fmt: skip
        self._first, self._kept, self.about, self.max_queue, self.p99_s = first, kept, about, max_queue, p99_s
        self._settings = FixedSettings(threshold, fixed)
        self.metrics = Metrics(about.exits)
        self.inside, self.closing = 0, False
        self._row_s, self._last = 0.01, time.monotonic()

    def require_room(self, rows: int) -> None:
        """Raise a BusyError if there is no room for more."""
        wait = self.inside * self._row_s
        full = self.inside and self.inside + rows > self.max_queue
        late = self.inside and self.p99_s is not None and wait > self.p99_s
        if self.closing or full or late:
            raise BusyError("The server is stopping." if self.closing else f"{self.inside} images wait.", wait)

    async def answer(self, images: np.ndarray, threshold: np.ndarray | None = None) -> Sequence[Answer]:
        """The answers to images (b, c, h, w) float32, with thresholds (b, E) or those in force."""
        limits = np.asarray(self._settings.threshold if threshold is None else threshold, dtype=np.float64)
        wide = np.broadcast_to(limits, (len(images), len(self.about.exits)))
        self.require_room(len(images))
        self.inside += len(images)
        began = time.monotonic()
        try:
            found = await surely(self._first, Rows([images], wide))
        finally:
            self.inside -= len(images)
        now = time.monotonic()
        self._row_s += 0.02 * ((now - max(self._last, began)) / len(found) - self._row_s)
        self._last = now
        self.metrics.answered([a.exit for a in found], [now - began] * len(found), sum(a.cost for a in found))
        return found

    def settings(self) -> dict[str, Any]:
        """Those in force."""
        return self._settings.now()

    def change(self, values: Any) -> dict[str, Any]:
        """Change the thresholds."""
        now = self._settings.change(values)
        if self._kept is not None:
            with suppress(ray.exceptions.RayError):  # who deployed all was killed
                ray.get(self._kept.exchange.remote(self._settings.threshold))
        return now

    def not_ready(self) -> str:
        """Why it cannot answer now; empty if it can."""
        return "The server is stopping." if self.closing else ""

    def close(self) -> None:
        """There is nothing to end in this process."""

    async def drain(self) -> None:
        """Take no more, and wait until all that is on its way is answered."""
        self.closing = True
        while self.inside:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)  # the last responses leave


# ---------------------------------------------------------------------------------------------------- the application


@dataclass(frozen=True)
class Front:
    """What the HTTP interface needs to know: of the model, and of what callers may do."""

    about: About
    threshold: list[float]
    fixed: dict[str, Any]
    rules: Rules
    max_queue: int
    p99_s: float | None


_HERE: dict[str, tuple[RayBackend, Rules]] = {}  # of this replica


def build() -> Any:
    """The application of ASGI, in the process of a replica that `_Ingress` has begun."""
    return app_of(*_HERE[APP])


class _Kept:
    """The thresholds in force, in an actor that lives as long as the process that deployed all."""

    def __init__(self, threshold: list[float]) -> None:
        self.threshold = threshold

    def exchange(self, threshold: list[float] | None = None) -> list[float]:
        self.threshold = threshold or self.threshold
        return self.threshold


class _Ingress:
    """Takes requests of HTTP. One that Ray starts again goes on with the thresholds of the one before."""

    def __init__(self, first: Any, front: Front, kept: Any) -> None:
        threshold = front.threshold
        with suppress(ray.exceptions.RayError):  # who deployed all was killed
            threshold = ray.get(kept.exchange.remote())
        backend = RayBackend(first, front.about, threshold, front.fixed, front.max_queue, front.p99_s, kept=kept)
        _HERE[APP] = backend, front.rules

    async def drain(self) -> None:
        """See `RayBackend`."""
        await _HERE[APP][0].drain()


def name_of(n: int) -> str:
    """The deployment of a piece."""
    return f"piece-{n}"


def application(source: Source, front: Front, *, pieces: int, workers: int, cpus: float) -> Any:
    """The deployments, bound to one another: what `serve.run` takes."""
    actor: dict[str, Any] = {"num_cpus": min(1.0, 0.8 * cpus / (pieces * workers))}
    if source.device.startswith("cuda"):
        actor["num_gpus"] = 1 / pieces
    ongoing = 2 * source.max_queue
    how: Any = {"num_replicas": workers, "max_ongoing_requests": ongoing, "ray_actor_options": actor}
    behind: Any = None
    for n in reversed(range(pieces)):
        piece: Any = serve.deployment(Piece, name=name_of(n), **how)
        behind = piece.bind(source, n, behind)

    ingress: Any = serve.ingress(build)(_Ingress)
    door: Any = serve.deployment(
        ingress, name="http", max_ongoing_requests=2 * ongoing, ray_actor_options={"num_cpus": 0}
    )
    kept: Any = ray.remote(_Kept)
    return door.bind(behind, front, kept.options(num_cpus=0).remote(front.threshold))


def deployed(
    source: Source,
    rules: Rules,
    *,
    host: str,
    port: int,
    workers: int,
    p99_s: float | None,
    begun: Callable[[], object] = bool,
) -> RayBackend:
    """Deploy a model on the cluster that RAY_ADDRESS names, or on this machine. Gives what answers from Python.

    `begun` is called when Ray runs, before the deployments are there.

    Raises:
        PteeError: if the model cannot be opened, there is no such cluster, it is one of another version, it serves a model
            already, or its Ray Serve answers at another address.
    """
    found, threshold = source.pieces()
    fixed = {"off": list(found.off), "confidence": found.confidence, "answers": found.answers}
    front = Front(found.about, threshold, fixed, rules, source.max_queue, p99_s)
    _start(host, port)
    begun()
    try:
        with no_logs:
            cpus = ray.cluster_resources().get("CPU", 1.0)
            made = application(source, front, pieces=len(found.steps), workers=workers, cpus=cpus)
            serve.run(made, name=APP, route_prefix="/", logging_config={"enable_access_log": False})
    except Exception as why:  # whatever Ray raises
        end()
        raise _not_started(why) from why
    first = serve.get_deployment_handle(name_of(0), app_name=APP)
    return RayBackend(first, found.about, threshold, fixed, source.max_queue, p99_s)


def _start(host: str, port: int) -> None:
    """Ray and its HTTP server, unless they run. What others serve there stays as it is, also where this is refused."""
    connected = ray.is_initialized()
    report_nothing()
    try:
        with no_logs:
            ray.init(
                ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
            _require_place(host, port)
            serve.start(http_options={"host": host, "port": port})
    except Exception as why:  # whatever Ray raises
        if not connected:
            ray.shutdown()
        if isinstance(why, PteeError):
            raise
        raise _not_started(why) from why


def _require_place(host: str, port: int) -> None:
    """Refuse to take the place of another server, and an address at which a Ray Serve that runs already does not answer."""
    if APP in serve.status().applications:
        raise PteeError(
            "This Ray cluster serves a model already. Stop that ptee serve; if it was killed, remove what it left: "
            f"python -c \"from ray import serve; serve.delete('{APP}')\". Or give another cluster by RAY_ADDRESS."
        )
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        reserved(host, port).close()  # Ray would say it late, and in many lines
    elif (running.http_config.host, running.http_config.port) != (host, port):
        there = running.http_config
        raise PteeError(
            f"Ray Serve of this cluster answers at {there.host}:{there.port} already, and has no other address. Give ",
            Argument.text("host", there.host), " and ", Argument("port", str(there.port)), ".", argument="port", value=port,
        )  # fmt: skip


def _not_started(why: Exception) -> PteeError:
    return PteeError(f"Ray Serve did not start: {first_line(why)} Serve in one process with --local.")


def drain_and_end() -> None:
    """Take no more requests, answer those that are there, and remove the deployments."""
    try:
        with no_logs:
            serve.get_deployment_handle("http", app_name=APP).drain.remote().result(timeout_s=DRAINS_S)
    finally:
        end()


def end() -> None:
    """Remove the deployments. A cluster that was started here ends, too; another one keeps what else it serves."""
    if ray.is_initialized():
        with no_logs, suppress(Exception):  # Ray may have failed before there was anything to remove
            serve.delete(APP)
        ray.shutdown()


def run_with_ray(source: Source, rules: Rules, *, started: Callable[[], object], **how: Any) -> None:
    """Serve until SIGTERM or Ctrl-C. What was sent until then is answered.

    Args:
        source: of the model.
        rules: what callers may do.
        started: called when requests are answered.
        how: as of `deployed`.
    """
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def hear() -> None:  # Ray sets handlers of its own more than once, and they end the program at once
        for number in signals:
            signal.signal(number, lambda *_: stop.set())

    try:
        deployed(source, rules, begun=hear, **how)
        hear()
        if not stop.is_set():
            started()
        while not stop.wait(0.5):
            pass
        drain_and_end()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
