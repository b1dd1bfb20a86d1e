"""`ptee serve --local` as a process: a stop that loses nothing, ports, tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from served import free_port, images, npy
from small import made
from uvicorn.server import ServerState

import ptee
from ptee._common.errors import PteeError
from ptee.serving import local
from ptee.serving.local import _bounded_protocol, reserved
from ptee.serving.settings import TOKEN, read_token

pytestmark = pytest.mark.cpu("arrays come in host memory")
NPY = {"Content-Type": "application/x-npy"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ptee.export(made(), tmp_path_factory.mktemp("serve") / "exported")


@pytest.fixture
def started(exported: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    words = ["serve", str(exported), "--local", "--port", str(port), "--grace-s", "0.5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ptee", *words], stdout=subprocess.PIPE, text=True, env=os.environ | {TOKEN: "0123456789abcdef"},
        cwd=Path(ptee.__file__).parents[1],
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("Answering at"):
            break
    yield process, f"http://127.0.0.1:{port}"
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_sigterm_loses_nothing_that_was_sent(started):
    process, url = started
    found: list[int] = []
    failed: list[float] = []  # when these requests began

    def ask() -> None:
        with httpx.Client(base_url=url, headers=NPY, timeout=30, trust_env=False) as client:
            while not failed:
                began = time.monotonic()
                try:
                    found.append(len(client.post("/predict", content=npy(images(8))).json()["answers"]))
                except httpx.TransportError:  # the port is closed by now
                    failed.append(began)

    callers = [threading.Thread(target=ask) for _ in range(6)]
    for caller in callers:
        caller.start()
    time.sleep(0.5)
    before, stopped = len(found), time.monotonic()
    process.send_signal(signal.SIGTERM)
    for caller in callers:
        caller.join(30)
    assert process.wait(30) == 0
    assert set(found) == {8} and len(found) > before > 0
    assert failed and min(failed) > stopped + 0.4
    assert process.stdout.read().endswith("Stopped. All that came was answered.\n")


@pytest.mark.slow
def test_a_client_that_sends_half_a_request_keeps_nobody_waiting(started):
    _, url = started
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: 999\r\n\r\nhalf"
        )
        assert httpx.post(f"{url}/predict", content=npy(images(1)), headers=NPY, trust_env=False).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("part", [b"X-%d: " + b"a" * 50_000 + b"\r\n", b"a" * 50_000])
def test_headers_without_an_end_are_cut_off(started, part):
    _, url = started
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as endless:
        endless.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-First: ")
        with pytest.raises(OSError):
            for n in range(1000):
                endless.sendall(part.replace(b"%d", str(n).encode()))
    assert httpx.post(f"{url}/predict", content=npy(images(1)), headers=NPY, trust_env=False).status_code == 200


@pytest.mark.slow
def test_many_requests_and_large_bodies_of_one_connection_are_within_the_limit(started):
    _, url = started
    with httpx.Client(base_url=url, headers=NPY, timeout=30, trust_env=False) as client:
        for _ in range(300):
            assert client.post("/predict", content=npy(images(64)), headers={"X-Long": "a" * 2000}).status_code == 200
            assert client.post("/predict", content=iter([npy(images(64))])).status_code == 200


class Connections:
    """Clients of the protocol that `run_http` uses, in this event loop. The server answers "ok" to everything."""

    async def __aenter__(self) -> Connections:
        config = uvicorn.Config(self._ok, interface="asgi3", lifespan="off", log_level="error", timeout_keep_alive=30)
        kind, state = _bounded_protocol(), ServerState()
        loop = asyncio.get_running_loop()
        self.made: list[asyncio.Protocol] = []
        self.server = await loop.create_server(lambda: self._kept(kind(config, state, {})), "127.0.0.1", 0)
        self.open: list[asyncio.StreamWriter] = []
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self.open:
            writer.close()
        self.server.close()

    def _kept(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        self.made.append(protocol)
        return protocol

    async def _ok(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def sent(self, text: bytes) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection(*self.server.sockets[0].getsockname())
        writer.write(text)
        self.open.append(writer)
        return reader


GET, HALF = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: "


async def is_closed(reader: asyncio.StreamReader, within_s: float = 5) -> bool:
    """Whether the server closes it, whatever it says before."""
    try:
        await asyncio.wait_for(reader.read(), within_s)
    except asyncio.TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


@pytest.mark.parametrize("begins", [[b""], [HALF], [GET + HALF], [GET, b"\r\n"], [GET, HALF]])
def test_a_connection_without_whole_headers_is_closed(monkeypatch, begins):
    monkeypatch.setattr(local, "HEADERS_S", 0.2)

    async def seen() -> bool:
        async with Connections() as all:
            reader = await all.sent(begins[0])
            for more in begins[1:]:
                await reader.read(15)
                all.open[-1].write(more)
            return await is_closed(reader)

    assert asyncio.run(seen())


@pytest.mark.parametrize(("number", "closed"), [(local.MOST_QUEUED + 1, False), (2_000, True)])
def test_a_connection_that_queues_many_requests_is_closed(number, closed):
    async def seen() -> tuple[bool, int]:
        async with Connections() as all:
            state = await is_closed(await all.sent(GET * number), 1)
            return state, sum(len(each.pipeline) for each in all.made)

    state, queued = asyncio.run(seen())
    assert state is closed
    assert queued <= local.MOST_QUEUED


def test_an_answered_connection_and_a_slow_body_stay_open(monkeypatch):
    monkeypatch.setattr(local, "HEADERS_S", 0.2)

    async def seen() -> list[bool]:
        async with Connections() as all:
            body = GET.replace(b"GET", b"POST").replace(b"x\r\n", b"x\r\nContent-Length: 9\r\n")
            return await asyncio.gather(*[is_closed(await all.sent(text), 0.6) for text in (GET, body + b"part")])

    assert asyncio.run(seen()) == [False, False]


def test_a_full_server_closes_the_oldest_connection_without_whole_headers(monkeypatch):
    monkeypatch.setattr(local, "most_connections", lambda: 5)

    async def seen() -> tuple[list[bytes], list[bool]]:
        async with Connections() as all:
            halves = [await all.sent(HALF) for _ in range(20)]
            answer = await (await all.sent(GET)).read(15)
            closed = await asyncio.gather(*(is_closed(half, 1) for half in halves))
            return answer, closed

    answer, closed = asyncio.run(seen())
    assert answer == b"HTTP/1.1 200 OK"
    assert closed == [True] * 16 + [False] * 4


def test_a_server_that_is_full_of_answered_connections_takes_no_more(monkeypatch):
    monkeypatch.setattr(local, "most_connections", lambda: 5)

    async def seen() -> tuple[list[bytes], bool]:
        async with Connections() as all:
            answers = [await (await all.sent(GET)).read(15) for _ in range(5)]
            return answers, await is_closed(await all.sent(GET))

    assert asyncio.run(seen()) == ([b"HTTP/1.1 200 OK"] * 5, True)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(PteeError, match=r"host='127\.0\.0\.1'|cannot be taken"):
        reserved("no.such.host.invalid", 8000)
    with pytest.raises(PteeError, match="cannot be taken"):
        reserved("192.0.2.1", 8000)


# ---------------------------------------------------------------------------------------------------- tokens


def test_a_token_comes_from_a_file_or_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv(TOKEN, "a" * 16)
    assert read_token(None) == "a" * 16
    (tmp_path / "token").write_text("b" * 20 + "\n")
    assert read_token(tmp_path / "token") == "b" * 20


@pytest.mark.parametrize("text", ["", "short", "a b" * 10, "ä" * 20, "a" * 2000, "a" * 10 + "\n" + "a" * 10])
def test_a_token_that_is_not_safe_is_refused(tmp_path, text):
    (tmp_path / "token").write_text(text)
    with pytest.raises(PteeError, match="openssl rand") as refused:
        read_token(tmp_path / "token")
    assert text.strip() == "" or text.strip() not in str(refused.value)
