"""An exported model in seconds: by the files of its folder alone, so beside itself with nobody leaving."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ptee._common.clock import ratio, spread
from ptee._common.progress import with_bar
from ptee._common.text import Readable, number_of
from ptee.deploy.arrays import Array
from ptee.deploy.runner import Runner
from ptee.exits.config import ALWAYS, NEVER
from ptee.timing.exported import runner_laps
from ptee.timing.laps import MAX_SECONDS, in_turns
from ptee.timing.run_bench import (
    OWN_THRESHOLDS,
    SIZES,
    Line,
    lines_table,
    remarks,
    some_batches,
    timed,
    too_few,
    with_each,
)
from ptee.timing.settings import leaving_at_first
from ptee.timing.times import between, device_name, in_threads, sizes_to_measure

NOBODY = "nobody"
LEGEND = """\
by: what ran it: the format of the files.
ms: of one batch, the median of the rounds. own thresholds: those of the manifest, on real images.
/ nobody: divided by the time of a batch from which nobody leaves. To see it beside the bare backbone: ptee bench RUN --executor onnx.
counted: mean multiply-accumulates of an image, heads included, divided by the bare backbone's.
limit: the time of the pieces alone, at the numbers of rows that they ran at.
lost: / nobody less the limit. Below 0: less than the clock can tell."""


@dataclass(frozen=True)
class ExportedBench(Readable):
    """Times of an exported model. Prints as a table.

    Attributes:
        model: what was timed and where, in a line.
        lines: one for each batch size and way to leave.
        note: why there are no real images among them, in a sentence; else empty.
    """

    model: str
    lines: tuple[Line, ...]
    note: str = ""
    legend: ClassVar[str] = LEGEND

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.model}\n\n{lines_table(self.lines, NOBODY)}{remarks(self.note, self.lines)}"


def bench_exported(
    runner: Runner, batch_sizes: Sequence[int], images: Tensor | None = None, *, rounds: int = 7, note: str = ""
) -> ExportedBench:
    """Time an exported model: also on real images (n, c, h, w), in the order in which they would come, or `note` says why not."""
    m, device = runner.manifest, torch.device(runner.device)
    rows = sizes_to_measure(list(batch_sizes))
    laps = {n: [partial(runner_laps, runner, _example(runner, n))] for n in rows}
    found = in_turns(laps, device, rounds=rounds, seconds=MAX_SECONDS)
    pieces = [[found[n][0][1 + k] for n in rows] for k in range(len(m.pieces))]  # the first lap is the call's
    lines = [line for b in with_bar(batch_sizes, SIZES) for line in _lines(runner, b, rows, pieces, images, rounds)]
    threads = in_threads(device.type, torch.get_num_threads())
    where = f"{m.backbone} with {number_of(len(m.exits), 'exit')}, exported as {m.format}, on {device_name(device)}{threads}, {m.dtype}"
    return ExportedBench(where, tuple(lines), note or too_few(images, batch_sizes))


def _example(runner: Runner, rows: int) -> Array:
    """Images of noise: (b, c, h, w)."""
    x = np.random.default_rng(0).standard_normal((rows, *runner.manifest.input_size), dtype=np.float32)
    return runner.from_host(x)


def _lines(
    runner: Runner, b: int, rows: Sequence[int], pieces: Sequence[Sequence[float]], images: Tensor | None, rounds: int
) -> list[Line]:
    m, x = runner.manifest, _example(runner, b)
    first = m.pieces[0].exit
    calls: dict[str, Any] = {}
    for words, leaving in (leaving_at_first(b) if len(m.pieces) > 1 else {NOBODY: 0}).items():
        limits = np.full((b, len(m.exits)), NEVER)
        limits[:leaving, first] = ALWAYS
        calls[words.replace("exit 0", f"exit {first}")] = partial(runner.predict, x, limits)
    batches = [runner.from_host(part.float().numpy()) for part in some_batches(images, b)]
    if batches:
        calls[OWN_THRESHOLDS] = partial(with_each, runner, batches)
    found = timed(calls, torch.device(runner.device), rounds)
    nobody = found[NOBODY]
    alone = [between(rows, seconds, b).tolist() for seconds in pieces]
    lines = []
    for words, call in calls.items():
        own = words == OWN_THRESHOLDS
        each = [s / (len(batches) if own else 1) for s in found[words]]
        answers = [runner.predict(part) for part in batches] if own else [call()]
        limit = statistics.mean(_limit(runner, out.exit_index, alone) for out in answers) / statistics.median(nobody)
        counted = statistics.mean(float(cost) for out in answers for cost in out.cost)
        time = ratio(each, nobody)
        lines.append(Line(b, m.format, words, statistics.median(each), time, time, counted, limit, spread=spread(each)))
    return lines


def _limit(runner: Runner, exits: Array, alone: Sequence[Sequence[float]]) -> float:
    """Seconds of the pieces at the numbers of rows that come to them."""
    left = np.asarray([int(e) for e in exits])
    return sum(seconds[int((left >= end).sum())] for end, seconds in zip(runner.manifest.ends, alone, strict=True))
