"""A model served by one process: `ptee serve RUN --local`."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptee._common.errors import Argument, PteeError
from ptee._common.validation import named
from ptee.deploy.runner import Runner
from ptee.serving.engine import Engine
from ptee.serving.metrics import Metrics
from ptee.serving.pieces import About, Pieces, pieces_of_model, pieces_of_runner
from ptee.serving.policy import Policy, measure, policy_of
from ptee.serving.queues import Answer
from ptee.serving.settings import FixedSettings, ModelSettings
from ptee.serving.uploads import images_from_python, thresholds_from_python

LAST_S = 0.5  # in which the last connections that were taken send their requests
HEADERS_S = 10.0  # until the headers of a request are whole
MOST_QUEUED = 16  # requests of one connection that wait for the answer to one before them
BESIDE_BODY = 2**17  # bytes of a request: the first line, headers, lengths of chunks, trailers


@dataclass(frozen=True)
class Batching:
    """How rows are collected.

    Attributes:
        max_batch: the largest batch.
        max_wait_ms: how long a row may wait behind an exit for others; None: a quarter of p99_ms, or 25 ms without that wish.
        p99_ms: the wish for the slowest answers: what would take longer is refused; None: no wish.
        max_queue: images that may be there at once.
        rebatch: collect rows of several callers for the later pieces, where it pays.
        workers: threads that compute.
    """

    max_batch: int = 64
    max_wait_ms: float | None = None
    p99_ms: float | None = None
    max_queue: int = 512
    rebatch: bool = True
    workers: int = 1

    @property
    def max_wait_s(self) -> float:
        """How long a row may wait behind an exit for others, in seconds."""
        wait_ms = (self.p99_ms or 100) / 4 if self.max_wait_ms is None else self.max_wait_ms
        return wait_ms / 1000 if self.rebatch else 0.0


class LocalServer:
    """Answers images in this process, in Python or over HTTP (`app_of`).

    Args:
        model: an early-exit model in eval mode, or what `ptee.load_exported` gave.
        batching: how rows are collected.

    Attributes:
        about: the model.
        metrics: counters.
        policy: what was measured at the start.
    """

    def __init__(self, model: Any, batching: Batching | None = None) -> None:
        self._model, self._how = model, batching or Batching()
        self._exported = isinstance(model, Runner)
        pieces, self.policy = self._made(model)
        how = self._how
        self.about: About = pieces.about
        alarm, page = self._watched()
        self.metrics = Metrics(self.about.exits, waiting=lambda: self._engine.waiting(), alarm=alarm, page=page)
        self._settings: ModelSettings | FixedSettings
        if self._exported:
            fixed = {"off": list(pieces.off), "confidence": pieces.confidence, "answers": pieces.answers}
            settings = FixedSettings(model.threshold, fixed)
            self._settings, threshold = settings, lambda: settings.threshold
        else:
            self._settings, threshold = ModelSettings(model, self._exchange), lambda: model.threshold
        watch = None if alarm is None else lambda x, audited: model.watching(x, audited=audited, at_once=how.max_batch)
        self._engine = Engine(
            pieces, self.policy, threshold=threshold, heard=self.metrics, watch=watch, workers=self._how.workers
        )  # fmt: skip

    def _made(self, model: Any) -> tuple[Pieces, Policy]:
        how = self._how
        pieces = pieces_of_runner(model) if self._exported else pieces_of_model(model)
        times = measure(pieces, min(how.max_batch, how.max_queue))
        return pieces, policy_of(times, max_wait_s=how.max_wait_s, p99_ms=how.p99_ms, max_queue=how.max_queue)

    def _watched(self) -> tuple[Callable[[], bool | None] | None, Callable[[], str]]:
        """Of the model's monitor: whether it has raised an alarm, which nobody knows while nothing is tested, and its page."""
        monitor = None if self._exported else self._model.monitored
        if monitor is None:
            return None, str
        return lambda: True if monitor.alarm is not None else False if monitor.tested else None, monitor.prometheus

    def _exchange(self, draft: Any, others: bool, put_in_force: Callable[[], None]) -> None:
        """Go on with the settings of a draft; until then rows are answered by those that were."""
        pieces, policy = self._made(draft) if others else (self._engine.pieces, self.policy)
        self._engine.exchange(pieces, policy, put_in_force)
        self.policy = policy

    # -------------------------------------------------------------------------------------------- as of `Backend`

    def require_room(self, rows: int) -> None:
        """Raise a BusyError if there is no room for so many more."""
        self._engine.require_room(rows)

    @named
    async def answer(self, images: np.ndarray, threshold: Any = None) -> Sequence[Answer]:
        """The answers to images (b, c, h, w) float32, as the backbone takes them.

        Args:
            images: any number, normalised.
            threshold: one number, one for each exit, or (b, E): one for each image and exit. None: those in force.

        Raises:
            BusyError: if there is no room for them.
            PteeError: if the images are no such array of finite numbers, or the thresholds are of another shape.
        """
        images = images_from_python(images, self.about)
        if not len(images):  # no row would come to an end and tell it
            return []
        limits = None
        if threshold is not None:  # wrong ones would end other callers' rows, too
            limits = thresholds_from_python(threshold, len(images), len(self.about.exits))
        loop, began, by_pace = asyncio.get_running_loop(), time.monotonic(), self._engine.by_pace_s()
        future: asyncio.Future[list[Answer]] = loop.create_future()

        def end(found: list[Answer] | Exception) -> None:
            if future.cancelled():
                return
            if isinstance(found, Exception):
                future.set_exception(found)
            else:
                future.set_result(found)

        def done(found: list[Answer] | Exception) -> None:
            loop.call_soon_threadsafe(end, found)

        self._engine.submit(images, limits, done)
        answers = await future
        self._engine.came(by_pace, time.monotonic() - began)
        return answers

    def settings(self) -> dict[str, Any]:
        """Those in force."""
        return self._settings.now()

    def change(self, values: Any) -> dict[str, Any]:
        """Change some, as `PATCH /settings` does. Gives those in force then."""
        return self._settings.change(values)

    def not_ready(self) -> str:
        """Why it cannot answer now; empty if it can."""
        return "" if self._engine.alive else "The server is stopping."

    def close(self) -> None:
        """Answer what is there, and end."""
        self._engine.close()


# ---------------------------------------------------------------------------------------------------- HTTP


def reserved(host: str, port: int) -> socket.socket:
    """A socket on this port, before anything that takes long.

    Raises:
        PteeError: if there is no such host, or the port is in use.
    """
    try:
        family, kind, number, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, number)
    except (OSError, UnicodeError) as why:
        raise PteeError(f"{host!r:.60} is no address of this machine: {why}. Give ", Argument.text("host", "127.0.0.1"), ".",
                        argument="host", value=host) from why  # fmt: skip
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(place)
        found.listen(2048)
    except OSError as why:
        found.close()
        raise PteeError(f"Port {port} of {host} cannot be taken: {why.strerror}. Give another: ", Argument("port", "8001"), ".",
                        argument="port", value=port) from why  # fmt: skip
    return found


def run_http(app: Any, where: socket.socket, started: Callable[[], object], *, grace_s: float) -> None:
    """Serve until SIGTERM or Ctrl-C. What was sent until then is answered.

    For `grace_s` seconds the server still takes requests, says that it is not ready, and closes each connection behind an
    answer; so those that share the load look elsewhere. A second signal cuts this short.

    Args:
        app: as of `app_of`.
        where: as of `reserved`.
        started: called when requests are answered.
        grace_s: see above.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started()

        def capture_signals(self) -> Any:
            # uvicorn's own raises the signal again at the end: the status would be that of a process that was killed.
            return _signals_end(self, app, grace_s)

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
        backlog=max(1, most_connections() // 2),  # asyncio takes so many at once, before any of them can be closed
        http=_bounded_protocol(),
    )
    asyncio.run(Server(config).serve([where]))


@contextmanager
def _signals_end(server: Any, app: Any, grace_s: float) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def leave() -> None:
        server.should_exit = True

    def take_no_more() -> None:
        for listening in server.servers:
            listening.close()
        loop.call_later(LAST_S, leave)

    def end() -> None:
        if app.state.stopping:
            leave()
        app.state.stopping = True
        loop.call_later(grace_s, take_no_more)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def most_connections() -> int:
    """Open at once: half of the files that this process may open."""
    import resource

    return min(4096, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def _bounded_protocol() -> Any:
    """uvicorn's protocol, which closes a connection that sends more or too slowly. The parser written in C has no limits of its own.

    Where all connections are taken, a new one takes the place of the one that has waited longest for whole headers.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    most = most_connections()
    waiting: dict[Any, asyncio.TimerHandle] = {}  # connections without whole headers, oldest first

    class Bounded(HttpToolsProtocol):
        _beside, _allowed = 0, BESIDE_BODY  # so far, of all requests of the connection
        _in_body = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                oldest = next(iter(waiting), self)
                oldest._give_up()
            if not transport.is_closing():
                self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_no_more()
            super().connection_lost(exc)

        def _wait_for_headers(self) -> None:
            if self not in waiting:
                waiting[self] = self.loop.call_later(HEADERS_S, self._give_up)

        def _wait_no_more(self) -> None:
            timer = waiting.pop(self, None)
            if timer is not None:
                timer.cancel()

        def _give_up(self) -> None:
            self._wait_no_more()
            self.connections.discard(self)
            self.transport.abort()

        def data_received(self, data: bytes) -> None:
            if not self._in_body:
                self._wait_for_headers()
            self._beside += len(data)
            super().data_received(data)
            if self._beside > self._allowed and self.transport is not None:
                self.transport.close()

        def on_message_begin(self) -> None:
            if len(self.pipeline) >= MOST_QUEUED:
                self._give_up()
                raise ConnectionAbortedError  # which ends the parsing of what has come already
            self._wait_for_headers()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._wait_no_more()
            self._in_body = True
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._beside -= len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_body = False
            self._allowed += BESIDE_BODY
            super().on_message_complete()

    return Bounded
