"""The HTTP interface, the same in one process and under Ray: images in, answers out; settings, health and counters."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ptee._common.errors import PteeError
from ptee._common.files import from_json
from ptee.serving.engine import BusyError
from ptee.serving.metrics import Metrics
from ptee.serving.pieces import About
from ptee.serving.queues import Answer
from ptee.serving.uploads import JSON, Limits, UploadError, images_of, is_large, kind_of, read_thresholds, refused

THRESHOLD_HEADER = "x-ptee-threshold"
QUERY = ("threshold", "logits")
DECODED_AT_ONCE = 2  # large uploads
NO_TOKEN = (
    "This server was started without a token, so its settings cannot be changed. Set PTEE_TOKEN or give --token-file."
)


@dataclass(frozen=True)
class Rules:
    """What callers may do.

    Attributes:
        limits: of uploads.
        bounds: between which T of a request must lie.
        token: that changes settings; empty: nobody may.
        uploads: bytes of bodies that are received or wait to be decoded.
        decoding: large uploads that are decoded or wait for it.
    """

    limits: Limits = field(default_factory=Limits)
    bounds: tuple[float, float] = (0.0, 2.0)
    token: str = field(default="", repr=False)
    uploads: int = 2**28
    decoding: int = 64


class Backend(Protocol):
    """What answers images."""

    about: About
    metrics: Metrics

    def require_room(self, rows: int) -> None:
        """Raise a BusyError if there is no room for so many more."""

    async def answer(self, images: np.ndarray, threshold: np.ndarray | None) -> Sequence[Answer]:
        """The answers to images (b, c, h, w), with thresholds (b, E) or those in force."""

    def settings(self) -> dict[str, Any]:
        """Those in force."""

    def change(self, values: Any) -> dict[str, Any]:
        """Change some. May take seconds."""

    def not_ready(self) -> str:
        """Why it cannot answer now; empty if it can."""

    def close(self) -> None:
        """Called when the last answer is given."""


def app_of(backend: Backend, rules: Rules) -> Starlette:
    """The application of a backend, for any server of ASGI."""
    return _Served(backend, rules).app()


class _Served:
    """The handlers."""

    def __init__(self, backend: Backend, rules: Rules) -> None:
        self.backend, self.rules = backend, rules
        self.receiving = 0  # bytes of bodies that are not decoded yet
        self.waiting = 0  # large uploads that are decoded or wait for it
        self.decoding = asyncio.Semaphore(DECODED_AT_ONCE)

    def app(self) -> Starlette:
        @asynccontextmanager
        async def life(_: Starlette) -> Any:
            yield
            await run_in_threadpool(self.backend.close)

        ways = {
            ("/predict", "POST"): self.predict, ("/model", "GET"): self.model, ("/settings", "GET"): self.settings,
            ("/settings", "PATCH"): self.change, ("/health", "GET"): self.health, ("/ready", "GET"): self.ready,
            ("/metrics", "GET"): self.metrics,
        }  # fmt: skip
        routes = [Route(path, self._counted(path, way), methods=[method]) for (path, method), way in ways.items()]
        faults: Any = {HTTPException: self._no_such_way}
        self.served = Starlette(routes=routes, exception_handlers=faults, lifespan=life)
        self.served.state.stopping = False
        return self.served

    async def _no_such_way(self, request: Request, why: Any) -> Response:
        self.backend.metrics.request("other", why.status_code)
        ways = "POST /predict; GET /model, /settings, /health, /ready and /metrics; PATCH /settings"
        return _error(why.status_code, f"There is no {request.method} of this path. Possible: {ways}.")

    def _counted(
        self, path: str, way: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def counted(request: Request) -> Response:
            response = await _told(way, request)
            self.backend.metrics.request(path, response.status_code)
            if self.served.state.stopping:
                response.headers["Connection"] = "close"
            return response

        return counted

    # -------------------------------------------------------------------------------------------- answers

    async def predict(self, request: Request) -> Response:
        """A picture or array in, its class, probability, exit and cost out."""
        kind = kind_of(request.headers.get("content-type", ""))
        _require_known(request)
        limits = self._limits(request)
        self._require_room()  # before the body is read
        async with self._body(request) as body:
            images = await self._images(kind, body)
        wide = None if limits is None else np.broadcast_to(limits, (len(images), len(limits)))
        found = await self.backend.answer(images, wide)
        whole = request.query_params.get("logits") == "true"  # "false" is the only other value
        shown = [self._shown(answer, whole) for answer in found]
        return JSONResponse({"answers": shown})

    def _limits(self, request: Request) -> np.ndarray | None:
        text = request.query_params.get("threshold", request.headers.get(THRESHOLD_HEADER))
        return None if text is None else read_thresholds(text, len(self.backend.about.exits), self.rules.bounds)

    async def _images(self, kind: str, body: bytes) -> np.ndarray:
        given = kind, body, self.backend.about, self.rules.limits
        if not is_large(kind, body, self.backend.about):
            return images_of(*given)
        self._require_room()
        self.waiting += 1
        try:
            async with self.decoding:
                return await run_in_threadpool(images_of, *given)
        finally:
            self.waiting -= 1

    def _require_room(self) -> None:
        """For one image more: those that are decoded will come to the backend, too."""
        if self.waiting >= self.rules.decoding:
            raise BusyError(f"{self.waiting} uploads wait to be decoded.")
        self.backend.require_room(self.waiting + 1)

    def _shown(self, answer: Answer, whole: bool) -> dict[str, Any]:
        about = self.backend.about
        names = about.class_names
        shown = {
            "class": answer.number, "name": names[answer.number] if names else None, "probability": answer.probability,
            "exit": answer.exit, "confidence": answer.confidence, "cost": answer.cost,
        }  # fmt: skip
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in shown.items()}
        return finite | ({"logits": [v if math.isfinite(v) else None for v in answer.logits.tolist()]} if whole else {})

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, if it is small enough and comes soon enough. All bodies together are bounded, too, until each is left."""
        most = self.rules.limits.bytes
        declared = request.headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or int(declared[:20]) > most:
            raise refused(413, f"This body is too large. Send at most {most:,} bytes.")
        parts: list[bytes] = []
        try:
            await self._receive(request, most, parts)
            yield b"".join(parts)
        finally:
            self.receiving -= sum(map(len, parts))

    async def _receive(self, request: Request, most: int, parts: list[bytes]) -> None:
        seconds = self.rules.limits.seconds
        try:
            await asyncio.wait_for(self._every_part(request, most, parts), seconds)
        except asyncio.TimeoutError:
            raise refused(408, f"The body did not come within {seconds:g} s.") from None

    async def _every_part(self, request: Request, most: int, parts: list[bytes]) -> None:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            self.receiving += len(part)
            if size > most:
                raise refused(413, f"This body is too large. Send at most {most:,} bytes.")
            if self.receiving > self.rules.uploads:
                raise BusyError("Too many uploads come at once.")

    # -------------------------------------------------------------------------------------------- settings

    async def model(self, _: Request) -> Response:
        """What is served."""
        limits = {key: value for key, value in asdict(self.rules.limits).items() if key != "seconds"}
        return JSONResponse(self.backend.about.described() | {"limits": limits, "threshold_bounds": self.rules.bounds})

    async def settings(self, _: Request) -> Response:
        """Those in force."""
        return JSONResponse(self.backend.settings())

    async def change(self, request: Request) -> Response:
        """Change some: for who has the token."""
        self._require_token(request)
        if request.query_params:
            raise refused(400, "Settings come in the body, as JSON, and not in the query.")
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind != JSON:
            raise refused(415, f"Settings come as JSON, not as {kind!r:.60}. Send Content-Type: {JSON}.")
        async with self._body(request) as body:
            try:
                values = from_json(body.decode())
            except (ValueError, RecursionError):
                raise refused(400, 'Settings come as JSON, such as {"threshold": 0.7}.') from None
        return JSONResponse(await run_in_threadpool(self.backend.change, values))

    def _require_token(self, request: Request) -> None:
        if not self.rules.token:
            raise refused(403, NO_TOKEN)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.rules.token.encode()):
            raise refused(401, "Give the server's token: Authorization: Bearer TOKEN.")

    # -------------------------------------------------------------------------------------------- health

    async def health(self, _: Request) -> Response:
        """Whether the process is alive."""
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        """Whether images are answered."""
        why = "The server is stopping." if self.served.state.stopping else self.backend.not_ready()
        return _error(503, why, 1.0) if why else JSONResponse({"status": "ready"})

    async def metrics(self, _: Request) -> Response:
        """The counters, for Prometheus."""
        return PlainTextResponse(self.backend.metrics.text(), media_type="text/plain; version=0.0.4")


def _require_known(request: Request) -> None:
    """Refuse a misspelt `?treshold=0.7`: ignored, it would be answered by other thresholds than the caller believes."""
    given = [name for name, _ in request.query_params.multi_items()]
    if unknown := [name for name in given if name not in QUERY]:
        raise refused(400, f"There is no {unknown[0]!r:.60} in a query here. Possible: {', '.join(QUERY)}.")
    if twice := [name for name in QUERY if given.count(name) > 1]:
        raise refused(400, f"{twice[0]} is given twice. Give it once.")
    if len(request.headers.getlist(THRESHOLD_HEADER)) > 1:
        raise refused(400, f"{THRESHOLD_HEADER} is given twice. Give it once.")
    if "threshold" in given and THRESHOLD_HEADER in request.headers:
        raise refused(400, f"The threshold is given in the query and as {THRESHOLD_HEADER}. Give it once.")
    if (logits := request.query_params.get("logits", "false")) not in ("true", "false"):
        raise refused(400, f"logits is {logits!r:.60}. Give true or false.")


async def _told(way: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    """The response of a handler; one line where it refuses or fails. Nobody outside learns more of a failure."""
    try:
        return await way(request)
    except UploadError as why:
        return _error(why.status, str(why))
    except BusyError as why:
        return _error(503, str(why), why.seconds)
    except PteeError as why:
        return _error(400, str(why))
    except ClientDisconnect:
        return _error(400, "The connection was closed.")
    except Exception as why:  # whatever a network or a library raises
        return _error(500, f"This could not be answered: {type(why).__name__}.")


def _error(status: int, text: str, again_s: float | None = None) -> Response:
    headers = {} if again_s is None else {"Retry-After": str(max(1, math.ceil(again_s)))}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": " ".join(text.split())}, status, headers)
