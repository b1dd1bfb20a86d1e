"""Requests that no server expects, between good ones: is any answer wrong, is the server dead afterwards?

    python recipes/serving/fuzz.py http://127.0.0.1:8000 FOLDER --check RUN --requests 2000

Bodies are damaged, cut off, empty, huge, costly to decode or of another type; thresholds, methods, paths, headers and tokens
are nonsense; some connections speak no HTTP or end in the middle. Every tenth request is a good one, whose answer must be that
of `predict`.
"""

from __future__ import annotations

import io
import json
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
import httpx
import numpy as np
from load import Picture, expected, pictures
from PIL import Image

KINDS = (
    "image/png",
    "image/jpeg",
    "application/x-npy",
    "application/json",
    "text/plain",
    "",
    "image/png; x=\u00ff",
    "multipart/form-data",
)
PATHS = (
    "/predict",
    "/predict",
    "/predict",
    "/predict",
    "/settings",
    "/ready",
    "/metrics",
    "/../etc/passwd",
    "/predict/%00",
    "/" + "a" * 9000,
)
THRESHOLDS = (
    "0.5",
    "nan",
    "inf",
    "-1",
    "1e999",
    "",
    ",",
    "0.5,0.5,0.5,0.5",
    "x" * 5000,
    "0.5;rm -rf",
    "\u0660",
    "[1]",
    "0x1p3",
    "None",
)
WORDS = (
    b"",
    b"\x00" * 100,
    b"../../etc/passwd",
    b"null",
    b"{}",
    b"[]",
    b"[[[" * 50,
    b"1" * 5000,
    b'{"images": "file:///etc/passwd"}',
    b"\x80\x04cos\nsystem\n",
)


class Damaged(NamedTuple):
    """A request that should not be answered with images' classes, or only with right ones."""

    method: str
    path: str
    headers: dict[str, bytes]
    body: bytes


def damaged(chance: random.Random, good: Sequence[Picture]) -> Damaged:
    """One of many kinds."""
    body = chance.choice(
        [
            _changed(chance, chance.choice(good).body),
            chance.randbytes(chance.randrange(2000)),
            chance.choice(WORDS),
            _array(chance),
            _picture(chance),
        ]
    )
    path, headers = chance.choice(PATHS), {"Content-Type": chance.choice(KINDS)}
    if chance.random() < 0.3:
        path += f"?threshold={chance.choice(THRESHOLDS)}"
    if chance.random() < 0.2:
        headers["X-PTEE-Threshold"] = chance.choice(THRESHOLDS).encode("ascii", "replace").decode()
    if chance.random() < 0.2:
        headers["Authorization"] = chance.choice(["Bearer", "Bearer x", "Basic eDp5", "x" * 5000])
    method = chance.choice(["POST"] * 8 + ["GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "BREW"])
    return Damaged(method, path, {name: value.encode("latin-1", "replace") for name, value in headers.items()}, body)


def _changed(chance: random.Random, body: bytes) -> bytes:
    """An encoded picture with some bytes changed, cut out or doubled."""
    data = bytearray(body)
    for _ in range(chance.randrange(1, 20)):
        i = chance.randrange(len(data))
        data[i : i + chance.choice([0, 1, 1, 1, 50])] = chance.randbytes(chance.choice([0, 1, 1, 1, 50]))
        data = data or bytearray(b"x")
    return bytes(data)


def _array(chance: random.Random) -> bytes:
    """A .npy array whose header lies."""
    shape = chance.choice(
        ["(3, 32, 32)", "(10**9, 3, 32, 32)", "(1000000000, 3, 32, 32)", "(-1, 3, 32, 32)", "()", "__import__('os')"]
    )
    kind = chance.choice(["<f4", ">f8", "|O", "|V9", "<U4", "<c16", "|b1", "garbage"])
    header = (
        f"{{'descr': '{kind}', 'fortran_order': {chance.choice(['False', 'True', '1'])}, 'shape': {shape}}}\n".encode()
    )
    version = chance.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + chance.randbytes(chance.choice([0, 100, 12288]))


def _picture(chance: random.Random) -> bytes:
    """A PNG or JPEG that is sound, and costly: far longer than wide, or of very many scans."""
    stream, size = io.BytesIO(), chance.choice([(1, 1), (1, 60), (90, 1), (3000, 1), (1, 12_000), (64, 64)])
    if chance.random() < 0.5:
        Image.new("RGB", size).save(stream, "PNG")
        return stream.getvalue()
    Image.new("RGB", size).save(stream, "JPEG", progressive=True)
    body = stream.getvalue()
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * chance.choice([0, 50, 300]) + body[-2:]


def no_http(chance: random.Random, host: str, port: int) -> None:
    """A connection that speaks no HTTP, or ends in the middle."""
    lines = (b"GET", b"\x16\x03\x01\x02\x00", b"POST /predict HTTP/1.1\r\nContent-Length: 50\r\n\r\nx", b"A" * 70_000, b"POST /predict HTTP/9.9\r\n\r\n",
             b"POST /predict HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Type: image/png\r\n\r\nzz\r\n", b"\r\n\r\n\r\n")  # fmt: skip
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(chance.choice(lines))
        if chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset


def is_one_line(response: httpx.Response) -> bool:
    """Whether a refusal says why in one line."""
    is_json = response.headers.get("content-type") == "application/json"
    return len((response.json()["error"] if is_json else response.text).strip().splitlines()) == 1


def right(answer: dict[str, Any], want: tuple[int, np.ndarray]) -> bool:
    """Whether an answer is that of `predict`."""
    return answer["exit"] == want[0] and bool(np.abs(np.asarray(answer["logits"]) - want[1]).max() < 1e-3)


@click.command()
@click.argument("url")
@click.argument("source")
@click.option("--check", "run", required=True, help="The run that is served.")
@click.option("--requests", default=2000)
def main(url: str, source: str, run: str, requests: int) -> None:
    """Send them."""
    chance, good = random.Random(0), pictures(source, 200)
    want, place = expected(run, good), urlsplit(url)
    status: Counter[str] = Counter()
    wrong = 0
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        for n in range(requests):
            if n % 10 == 0:
                i = chance.randrange(len(good))
                response = client.post(
                    "/predict?logits=true", content=good[i].body, headers={"Content-Type": good[i].kind}
                )
                wrong += response.status_code != 200 or not right(response.json()["answers"][0], want[i])
                status["good"] += 1
            elif n % 10 == 5:
                no_http(chance, place.hostname or "", place.port or 80)
                status["no HTTP"] += 1
            else:
                request = damaged(chance, good)
                try:
                    response = client.request(
                        request.method, request.path, headers=request.headers, content=request.body
                    )
                except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as why:
                    status[type(why).__name__] += 1
                    continue
                status[str(response.status_code)] += 1
                if response.status_code >= 400 and request.method != "HEAD" and not is_one_line(response):
                    wrong += 1
                    print("not one line:", response.text[:200])
        alive = client.get("/ready").status_code == 200
    print(json.dumps(dict(sorted(status.items()))), f"wrong: {wrong}, alive: {alive}")
    sys.exit(bool(wrong) or not alive)


if __name__ == "__main__":
    main()
