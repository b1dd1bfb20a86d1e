"""A trained model beside its bare backbone, by each executor: what leaving saves, what the pieces alone would take, what is lost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ptee._common.clock import in_turns, noise, ratio, spread
from ptee._common.progress import with_bar
from ptee._common.text import Readable, number_of, or_dash, table
from ptee.analysis.freezing import sparing
from ptee.deploy.capture import example_images
from ptee.exits.blend import OWN
from ptee.exits.config import ALWAYS, NEVER
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel
from ptee.timing.energy import energy_meter, joules_of
from ptee.timing.laps import repeats_for
from ptee.timing.measure import all_on, bare_by, in_pieces
from ptee.timing.settings import COMPILE, GRAPHS, HOOKS, ONNX, leaving_at_first
from ptee.timing.times import Times, in_threads

BARE, OWN_THRESHOLDS = "bare backbone", "own thresholds"
AS_IT_IS = ("torch", BARE)
OTHERS = (GRAPHS, COMPILE, ONNX)  # which run the bare backbone by other means, too
MOST_BATCHES, MOST_IMAGES = 64, 1024  # of real images that are timed
MAX_SECONDS = 60.0  # for one batch size
SIZES = "measuring sizes of batches"
LEGEND = """\
by: what runs it. torch: the backbone as it is. hooks: model.predict; eager, graphs, compile: ptee.optimize in that mode; onnx: ONNX Runtime, as exported.
ms: of one batch, the median of the rounds. own thresholds: the run's, on some real images.
/ bare: divided by the time of the bare backbone in the same round, by the same means (as it is, in one CUDA graph, by torch.compile, by ONNX Runtime).
/ torch: divided by the time of the bare backbone as it is, where that differs.
counted: mean multiply-accumulates of an image, heads included, divided by the bare backbone's.
limit: the time of the pieces alone, at the numbers of rows that they ran at.
mJ/image: the energy of the whole GPU meanwhile, where it tells, by NVIDIA's counter.
lost: / bare less the limit: calls, moving rows, waiting. Below 0: less than the clock can tell."""
Key = TypeVar("Key")


@dataclass(frozen=True)
class Line:
    """One way to use the network in batches of one size.

    Attributes:
        batch: images in a batch.
        executor: what runs it.
        leaving: who leaves, in words; `BARE` for the backbone alone.
        seconds: of a batch.
        time: divided by that of the bare backbone by the same executor.
        over_eager: divided by that of the bare backbone as it is.
        counted: the mean cost in multiply-accumulates; None for the backbone alone.
        limit: the time of the pieces alone, at the numbers of rows that they ran at; None for the backbone alone.
        joules: of a batch; None where the device does not tell.
        spread: the longest round less the shortest, divided by the median.
    """

    batch: int
    executor: str
    leaving: str
    seconds: float
    time: float
    over_eager: float
    counted: float | None = None
    limit: float | None = None
    joules: float | None = None
    spread: float = 0.0

    @property
    def lost(self) -> float | None:
        """What is spent beside the pieces: on calls, on moving rows, on waiting."""
        return None if self.limit is None else self.time - self.limit


@dataclass(frozen=True)
class RunBench(Readable):
    """Times of a model beside its bare backbone. Prints as a table.

    Attributes:
        times: of its pieces.
        lines: one for each batch size, executor and way to leave.
        note: why there are no real images among them, in a sentence; else empty.
    """

    times: Times
    lines: tuple[Line, ...]
    note: str = ""
    legend: ClassVar[str] = LEGEND

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        lines = [asdict(line) | {"lost": line.lost} for line in self.lines]
        return {"times": self.times.model_dump(mode="json"), "lines": lines, "note": self.note}

    def __str__(self) -> str:
        t = self.times
        return (
            f"{t.backbone} with {number_of(len(t.exits), 'exit')} on {t.device_name}{in_threads(t.device, t.threads)}, {t.dtype}\n"
            "Times are shares of the bare backbone's time; counted: of its multiply-accumulates.\n\n"
            f"{lines_table(self.lines, 'bare')}{remarks(self.note, self.lines)}"
        )


RATIOS = "/ {} is the median of each round's own quotient, so it is not that of two numbers below ms."
BELOW_ZERO = "lost below 0 is noise: less than the clock can tell, as the limit was measured apart."


def lines_table(lines: Sequence[Line], base: str) -> str:
    """The lines as a table, and what must be known to read it. `base`: what times are divided by."""
    others = any(line.executor in OTHERS and line.over_eager != line.time for line in lines)
    energy = any(line.joules is not None for line in lines)
    ratios = (f"/ {base}", *["/ torch"] * others)
    title = ("batch", "by", "who leaves", "ms", *ratios, "counted", "limit", "lost", *["mJ/image"] * energy)
    shown = table([title, *(_cells(line, others, energy) for line in lines)], left={1, 2})
    return f"{shown}\n\n{RATIOS.format(base)}" + f" {BELOW_ZERO}" * any((line.lost or 0) < 0 for line in lines)


def remarks(note: str, lines: Sequence[Line]) -> str:
    """What else is to be said below the table: why something was left out, and that it was not quiet."""
    return "".join(f"\n\n{words}" for words in (note, noise(line.spread for line in lines)) if words)


def _cells(line: Line, others: bool, energy: bool) -> tuple[str, ...]:
    spent = None if line.joules is None else 1000 * line.joules / line.batch
    eager, joules = [line.over_eager] * others, [spent] * energy
    numbers = [or_dash(n, ".3f") for n in (line.time, *eager, line.counted, line.limit, line.lost, *joules)]
    return (str(line.batch), line.executor, line.leaving, f"{1000 * line.seconds:.2f}", *numbers)


def bench_run(
    model: EarlyExitModel,
    times: Times,
    batch_sizes: Sequence[int],
    images: Tensor | None = None,
    *,
    rounds: int = 7,
    note: str = "",
) -> RunBench:
    """Time a model by each executor whose pieces were measured, in batches up to the largest that was.

    `images` are real ones (n, c, h, w), in the order in which they would come; without any, `note` says why.
    """
    view, most = all_on(model), max(batch_sizes)
    every = [m.executor for m in times.executors]
    models: dict[str, tuple[Any, Any]] = {}
    same = not model.off and model.answers == OWN  # then the pieces are the same, and so are the thresholds
    with sparing(model.backbone, example_images(model, 1)):
        for name in every:
            made = [m if name == HOOKS else in_pieces(name, m, most) for m in ([view] if same else [view, model])]
            models[name] = made[0], made[-1]
        lines = [line for b in with_bar(batch_sizes, SIZES) for line in _lines(models, times, b, images, rounds)]
    return RunBench(times, tuple(lines), note or too_few(images, batch_sizes))


def too_few(images: Tensor | None, batch_sizes: Sequence[int]) -> str:
    """A sentence if there are fewer images than the largest batches have; else empty."""
    larger = [str(b) for b in batch_sizes if images is not None and len(images) < b]
    if images is None or not larger:
        return ""
    return f"Left out in batches of {', '.join(larger)}: own thresholds, which need as many images. {number_of(len(images), 'image', 'is')} there."


def _lines(
    models: Mapping[str, tuple[Any, Any]], times: Times, b: int, images: Tensor | None, rounds: int
) -> list[Line]:
    model, own = map(_early_exit, next(iter(models.values())))
    x = example_images(model, b)
    batches = [_like(part, x) for part in some_batches(images, b)]
    calls: dict[tuple[str, str], Any] = {AS_IT_IS: partial(model.backbone, x)}
    for name, (fast, tuned) in models.items():
        if _bare(name) not in calls:
            calls[_bare(name)] = bare_by(name, model)(x)
        for way, threshold in _ways(model, b).items():
            calls[name, way] = partial(fast.predict, x, threshold)
        if batches:
            calls[name, OWN_THRESHOLDS] = partial(with_each, tuned, batches)
    found, meter = timed(calls, x.device, rounds), energy_meter(x.device)
    lines = []
    for (name, way), call in calls.items():
        each_call = len(batches) if way == OWN_THRESHOLDS else 1
        each = [s / each_call for s in found[name, way]]
        joules = None if meter is None else joules_of(call, meter, x.device) / each_call
        over = ratio(each, found[_bare(name)]), ratio(each, found[AS_IT_IS])
        bare = way == BARE
        counted, limit = (None, None) if bare else _expected(model, own, times.at(b, name), way, b, batches)
        lines.append(Line(b, name, way, statistics.median(each), *over, counted, limit, joules, spread(each)))
    return lines


def _early_exit(run: Any) -> EarlyExitModel:
    """The model that is run as it is, or in pieces."""
    found: EarlyExitModel = run if isinstance(run, EarlyExitModel) else run.model
    return found


def _bare(executor: str) -> tuple[str, str]:
    """The bare backbone that an executor is compared with."""
    return (executor, BARE) if executor in OTHERS else AS_IT_IS


def some_batches(images: Tensor | None, b: int) -> list[Tensor]:
    """Some real images in whole batches, spread over all of them."""
    if images is None or len(images) < b:
        return []
    number = max(1, min(MOST_BATCHES, MOST_IMAGES // b, len(images) // b))
    step = len(images) / (number * b)
    return list(images[[int(i * step) for i in range(number * b)]].split(b))


def _like(images: Tensor, like: Tensor) -> Tensor:
    last = like.is_contiguous(memory_format=torch.channels_last)
    return images.to(like).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _ways(model: EarlyExitModel, b: int) -> dict[str, Tensor]:
    """Thresholds by which nobody, the first half or all of a batch leave at exit 0, and nobody behind it."""
    ways = {}
    for words, leaving in leaving_at_first(b).items():
        # For each row, so that it is waited for who leaves also where nobody does.
        ways[words] = torch.full((b, len(model.exits)), NEVER, dtype=torch.float64, device="cpu")
        ways[words][:leaving, 0] = ALWAYS
    return ways


def with_each(model: Any, batches: Sequence[Any]) -> None:
    """Answer batch by batch."""
    for x in batches:
        model.predict(x)


def timed(calls: Mapping[Key, Any], device: torch.device, rounds: int) -> dict[Key, list[float]]:
    """Seconds of each call in every round. Short ones are repeated."""
    named = {str(key): call for key, call in calls.items()}
    first = in_turns(named, device, rounds=1)
    times = {name: repeats_for(first[name][0]) for name in named}
    repeated = {name: partial(_repeat, call, times[name]) for name, call in named.items()}
    found = in_turns(repeated, device, rounds=rounds, seconds=MAX_SECONDS)
    return {key: [s / times[str(key)] for s in found[str(key)]] for key in calls}


def _repeat(call: Any, times: int) -> None:
    for _ in range(times):
        call()


def _expected(
    model: EarlyExitModel, own: EarlyExitModel, times: BatchTimes, way: str, b: int, batches: Sequence[Tensor]
) -> tuple[float, float]:
    """The counted cost, and the time of the pieces at the rows that come to them."""
    if way == OWN_THRESHOLDS:
        exits = [own.predict(x).exit_index.tolist() for x in batches]
        return _of(own, times, exits)
    leaving = leaving_at_first(b)[way]
    return _of(model, times, [[0] * leaving + [len(model.exits)] * (b - leaving)])


def _of(model: EarlyExitModel, times: BatchTimes, exits: Sequence[Sequence[int]]) -> tuple[float, float]:
    every = range(len(model.exits) + 1)
    run = torch.tensor([n not in model.plan.skipped for n in every[:-1]], device="cpu")
    counted = sum(model.costs[e] for batch in exits for e in batch) / sum(map(len, exits))
    limits = [times.at_rows(run, [sum(e >= n for e in batch) for n in every]) for batch in exits]
    return counted, sum(limits) / len(limits)
