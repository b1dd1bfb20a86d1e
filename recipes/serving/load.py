"""A load on `ptee serve`, from a process of its own: Poisson arrivals of real images, whether answers come or not.

    python recipes/serving/load.py http://127.0.0.1:8000 FOLDER --rate 200 --seconds 20 --p99-ms 100
    python recipes/serving/load.py http://127.0.0.1:8000 FOLDER --find --p99-ms 100        # the knee, then 1, 2 and 4 times of it
    python recipes/serving/load.py http://127.0.0.1:8000 http://127.0.0.1:8001 FOLDER --rate 200,400 --rounds 5      # two in turns

FOLDER holds CLASS/*.jpg or *.png, or is a tar file of that. *Goodput* is the number of answers a second that came within the bound.
The knee is the largest rate of which 99 of 100 are answered within the bound. With `--check RUN` each answer is compared with
`predict` of the run.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
CONNECTIONS = 256  # at once; who finds none free waits, as behind a proxy
PATIENCE = 10.0  # seconds: who has no answer then goes away
LATE = 0.005  # seconds: a request that begins so much too late shows that this process is too slow


@dataclass(frozen=True)
class Picture:
    """An encoded picture: its type, its bytes and its class."""

    kind: str
    body: bytes
    label: str


@dataclass
class Outcome:
    """What came of a load. `wrong`: answers that are not those of `predict`; `lost`: requests whose connection broke; `gave_up`: without an answer for ten seconds; `late`: begun late."""

    rate: float
    seconds: float
    sent: int = 0
    status: Counter[int] = field(default_factory=Counter)
    waited: list[float] = field(default_factory=list)
    right: int = 0
    cost: float = 0.0
    exits: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    late: int = 0
    gave_up: int = 0

    def within(self, bound_s: float) -> int:
        """Answers that came in time."""
        return sum(waited <= bound_s for waited in self.waited)


def pictures(source: str, most: int) -> list[Picture]:
    """Those of a folder or a tar file, in an order of their own that is always the same."""
    path = Path(source)
    if path.is_file():
        with tarfile.open(path) as tar:
            files = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()]  # type: ignore[union-attr]
    else:
        files = [(str(f), f.read_bytes()) for f in sorted(path.rglob("*")) if f.is_file()]
    found = [
        Picture(TYPES[Path(n).suffix.lower()], b, Path(n).parent.name)
        for n, b in files
        if Path(n).suffix.lower() in TYPES
    ]
    random.Random(0).shuffle(found)
    return found[:most]


class Connections:
    """Connections of HTTP/1.1 that stay open. httpx takes about a millisecond of CPU for a request, and more with many under way."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def post(self, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the response."""
        async with self._room:
            return await self._posted(path, kind, body)

    async def _posted(self, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
        """A request that an old connection did not take is sent again on a new one."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        while self._free:
            reader, writer = self._free.pop()
            try:
                return await self._sent(reader, writer, head.encode() + body)
            except (ConnectionError, asyncio.IncompleteReadError):
                writer.close()
        return await self._sent(*await asyncio.open_connection(self.host, self.port), head.encode() + body)

    async def _sent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> tuple[int, bytes]:
        try:
            writer.write(data)
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines if line)
            body = await reader.readexactly(int(headers["content-length"]))
        except asyncio.CancelledError:
            writer.close()  # the answer would be taken for that of the next request
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._free.append((reader, writer))
        return int(first.split()[1]), body

    def close(self) -> None:
        """All of them."""
        for _, writer in self._free:
            writer.close()


async def load(
    url: str, given: Sequence[Picture], rate: float, seconds: float, check: Sequence[Any] = (), seed: int = 0
) -> Outcome:
    """Send requests at random times, so many a second on average, and wait for what comes of each."""
    found, chance, ways = Outcome(rate, seconds), random.Random(seed), Connections(url)
    tasks: set[asyncio.Task[None]] = set()
    began, due = time.perf_counter(), 0.0
    while (due := due + chance.expovariate(rate)) < seconds:
        if (early := due - (time.perf_counter() - began)) > 0:
            await asyncio.sleep(early)
        elif found.sent % 10 == 0:
            await asyncio.sleep(0)  # late: answers are to be read all the same
        n = found.sent % len(given)
        found.sent += 1
        task = asyncio.create_task(_one(ways, given[n], began + due, found, check[n] if check else None))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    ways.close()
    return found


async def _one(ways: Connections, picture: Picture, due: float, found: Outcome, want: Any) -> None:
    """One request. Its time counts from when it was due, also if this process was late."""
    path = "/predict" if want is None else "/predict?logits=true"
    found.late += time.perf_counter() - due > LATE
    try:
        status, body = await asyncio.wait_for(ways.post(path, picture.kind, picture.body), PATIENCE)
    except asyncio.TimeoutError:
        found.gave_up += 1
        return
    except (OSError, asyncio.IncompleteReadError) as why:
        found.lost[type(why).__name__] += 1
        return
    waited = time.perf_counter() - due
    found.status[status] += 1
    if status != 200:
        return
    (answer,) = json.loads(body)["answers"]
    found.waited.append(waited)
    found.right += answer["name"] == picture.label
    found.cost += answer["cost"]
    found.exits[answer["exit"]] += 1
    if want is not None and (answer["exit"] != want[0] or np.abs(np.asarray(answer["logits"]) - want[1]).max() > 1e-3):
        found.wrong += 1


def expected(run: str, given: Sequence[Picture]) -> list[tuple[int, np.ndarray]]:
    """Exit and logits of each picture, by `predict`."""
    import torch
    from PIL import Image

    import ptee
    from ptee.data.pictures import image_transform

    model = ptee.load(run)
    view = model.origin.input
    read = image_transform(model.plan.input_size, view.mean, view.std, view.interpolation)
    found = []
    for i in range(0, len(given), 100):
        x = torch.stack([read(Image.open(BytesIO(p.body))) for p in given[i : i + 100]])
        with torch.no_grad():
            out = model.predict(x)
        found += list(zip(out.exit_index.tolist(), out.logits.numpy(), strict=True))
    return found


def row(o: Outcome, bound_s: float) -> str:
    """A line of the table."""
    n = max(1, len(o.waited))
    p50, p99 = (np.percentile(o.waited or [float("nan")], q) * 1000 for q in (50, 99))
    refused = o.status[503] / max(1, o.sent)
    return (
        f"| {o.rate:.0f} | {o.sent} | {o.within(bound_s) / o.seconds:.0f} | {p50:.0f} | {p99:.0f} | {refused:.1%} | "
        f"{sum(o.lost.values())} | {o.right / n:.4f} | {o.cost / n:.3f} | {o.exits[0] / n:.2f} | {o.wrong} | {o.late / max(1, o.sent):.1%} |"
    )


HEAD = (
    "| sent a second | requests | goodput | p50 ms | p99 ms | refused | lost | accuracy | cost | at exit 0 | wrong | sent late |\n|"
    + "---|" * 12
)


def cpu_seconds(url: str) -> float:
    """Of the server so far, as its own /metrics say."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as page:
        return float(re.search(rb"^process_cpu_seconds_total (\S+)", page.read(), re.M)[1])  # type: ignore[index]


def in_turns(
    urls: Sequence[str], given: Sequence[Picture], rates: Sequence[float], seconds: float, rounds: int, bound: float
) -> None:
    """Load several servers in turns, so that each meets the same machine. Print medians over the rounds."""
    found: dict[tuple[str, float], list[tuple[float, ...]]] = {}
    for turn in range(rounds):
        for rate in rates:
            for url in urls:
                before = cpu_seconds(url)
                o = asyncio.run(load(url, given, rate, seconds, seed=turn))
                cpu_ms = 1000 * (cpu_seconds(url) - before) / max(1, len(o.waited))
                p50, p99 = (np.percentile(o.waited or [float("nan")], q) * 1000 for q in (50, 99))
                n = max(1, len(o.waited))
                each = (o.within(bound) / seconds, p50, p99, o.status[503] / o.sent, cpu_ms, o.right / n, o.cost / n)
                found.setdefault((url, rate), []).append((*each, o.gave_up / o.sent, sum(o.lost.values())))
                print(".", end="", file=sys.stderr, flush=True)
    print(
        "\n| server | sent a second | goodput | of the first | p50 ms | p99 ms | refused | gave up | CPU ms an answer | accuracy | cost | lost |"
    )
    print("|" + "---|" * 12)
    for rate in rates:
        first = np.array(found[urls[0], rate])
        for url in urls:
            own = np.array(found[url, rate])
            good, p50, p99, refused, cpu, right, cost, tired, _ = np.median(own, axis=0)
            ratio = np.median(own[:, 0] / np.maximum(first[:, 0], 1e-9))
            print(
                f"| {url} | {rate:.0f} | {good:.0f} | {ratio:.2f} | {p50:.0f} | {p99:.0f} | {refused:.0%} | {tired:.0%} | {cpu:.2f} | {right:.4f} | "
                f"{cost:.3f} | {own[:, -1].sum():.0f} |"
            )


@click.command()
@click.argument("url", nargs=-1, required=True)
@click.argument("source")
@click.option("--rate", "rates", default="100", help="Requests a second; several separated by commas.")
@click.option("--seconds", default=20.0)
@click.option("--rounds", default=1, help="With several servers: how often each is loaded, in turns.")
@click.option("--p99-ms", default=100.0, help="The bound.")
@click.option("--images", "most", default=4000)
@click.option("--find", is_flag=True, help="Find the knee, then send 1, 2 and 4 times as much.")
@click.option("--check", default=None, help="A run: compare each answer with predict.")
@click.option("--every", default=0.0, help="Print a line every so many seconds, for a long load.")
def main(url: tuple[str, ...], source: str, rates: str, seconds: float, rounds: int, p99_ms: float, **o: Any) -> None:
    """Load one server, or several in turns."""
    given, bound, each = pictures(source, o["most"]), p99_ms / 1000, [float(rate) for rate in rates.split(",")]
    if len(url) > 1:
        in_turns(url, given, each, seconds, rounds, bound)
        return
    want = expected(o["check"], given) if o["check"] else []
    print(HEAD, flush=True)
    if o["find"]:
        found = knee(url[0], given, bound, seconds, each[0])
        each = [times * found for times in (1, 2, 4)]
    wrong = 0
    for rate in each:
        for n in range(round(seconds / o["every"]) if o["every"] else 1):
            outcome = asyncio.run(load(url[0], given, rate, o["every"] or seconds, want, n))
            print(row(outcome, bound), flush=True)
            wrong += outcome.wrong + sum(outcome.lost.values()) + outcome.gave_up
    sys.exit(bool(wrong))


def knee(url: str, given: Sequence[Picture], bound: float, seconds: float, low: float) -> float:
    """The largest rate of which 99 of 100 are answered within the bound, to about 5 %."""

    def holds(rate: float) -> bool:
        o = asyncio.run(load(url, given, rate, min(8.0, seconds)))
        print(row(o, bound), flush=True)
        return o.within(bound) >= 0.99 * o.sent

    high = low
    while holds(high):
        low, high = high, high * 1.5
    if low == high:
        low = high / 4
    while high / low > 1.06:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    print(f"the knee: {low:.0f} a second", flush=True)
    return low


if __name__ == "__main__":
    main()
