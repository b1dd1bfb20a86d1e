"""Evaluation: what the backbone, each exit alone and the early-exit model reach, and what they cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from ptee._common.devices import resolve_device
from ptee._common.text import table
from ptee.evaluation.benchmark import ALWAYS, NEVER, in_turns, ratio
from ptee.evaluation.metrics import calibration_error, failure_auroc
from ptee.evaluation.targets import truncation
from ptee.evaluation.traces import Score, Traces, record
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.forward import COLLAPSED
from ptee.model.thresholds import Thresholds

LOST = 0.05  # share of the answers that are not the backbone's above which an early-exit model is called bad
SLOWER = 0.95  # of the bare backbone's speed, below which it is more than noise
WIDEST = 16  # characters of thresholds in the table's first column
PROBE, FEWEST = 8, 16  # images: to see how long they take; that are timed at least
SPEED_SECONDS = 20.0  # after which no further round of timing begins
ROUND_SHARE = 0.4  # of them that one round may take, where FEWEST do not take longer


@dataclass(frozen=True)
class Row:
    """One way to answer, measured on a data set.

    Attributes:
        name: "backbone", "exit 0", ..., "early exit".
        module: the exit's module, or empty.
        accuracy: share of answers equal to the label; None without labels.
        fidelity: share of answers equal to the backbone's.
        cost: mean multiply-accumulates spent, heads passed on the way included, over the bare backbone's.
        right: of the samples that leave here at the model's thresholds, the share whose answer is the label (without
            labels: the backbone's); None where nobody leaves.
        calibration_error: of an exit: mean distance of h from the share of answers that are the label (without labels:
            the backbone's), over 15 bins of h, on all images; None in other rows.
        failure_auroc: of an exit: the chance that h is lower where the answer is not that than where it is; .5 knows
            nothing, 1 all. None in other rows, and where all answers are alike.
        images_per_s: measured, or None.
        speedup: the bare backbone's time over this one's, measured in turn with it, or None.
    """

    name: str
    module: str
    accuracy: float | None
    fidelity: float
    cost: float
    right: float | None = None
    calibration_error: float | None = None
    failure_auroc: float | None = None
    images_per_s: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Results:
    """The numbers of an early-exit model on a data set. Prints as a table.

    Attributes:
        backbone: its name.
        samples: n.
        threshold: (E) T of each exit.
        rows: the bare backbone, each exit alone, the early-exit model at its thresholds.
        leaving: (E+1) share of the samples that leave at each exit.
        device: where speed was measured.
        batch_size: at which speed was measured.
        about: where the data came from, in a sentence.
        note: why there is no accuracy though the data has labels, in a sentence; else empty.
        truncation: accuracy, fidelity and cost of the backbone cut off at each exit, whose head is then the only one.
        off: exits at which nobody leaves, whatever the threshold.
    """

    backbone: str
    samples: int
    threshold: list[float]
    rows: tuple[Row, ...]
    leaving: list[float]
    device: str
    batch_size: int
    about: str = field(default="")
    note: str = field(default="")
    truncation: tuple[Score, ...] = ()
    off: tuple[int, ...] = ()

    @property
    def early_exit(self) -> Row:
        """The row of the early-exit model at its thresholds."""
        return self.rows[-1]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [asdict(row) for row in self.rows]
        return asdict(self) | {"rows": rows, "off": list(self.off), "verdict": self.verdict}

    @property
    def verdict(self) -> list[str]:
        """What is wrong with the early-exit model, a sentence each; nothing where T above 1 keeps everybody in."""
        if len(self.off) == len(self.leaving) - 1:
            return [f"Every exit is off, so the backbone answers all images, whatever T is. {_ON_AGAIN}"]
        return [] if min(self.threshold) > 1 else list(self._faults())

    def _faults(self) -> Iterator[str]:
        backbone, own = self.rows[0], self.early_exit
        share, n = max((share, n) for n, share in enumerate(self.leaving[:-1]))
        if share > COLLAPSED:
            where = f"exit {n} ({self.rows[1 + n].module})"
            yield f"{share:.0%} of the images leave at {where}: this is a shorter network, not an adaptive one. Raise T, or allow less to be lost."
        worse = own.accuracy is None or backbone.accuracy is None or own.accuracy < backbone.accuracy
        if 1 - own.fidelity > LOST and worse:
            right = "" if own.accuracy is None else f" (accuracy {own.accuracy:.4f} instead of {backbone.accuracy:.4f})"
            yield f"{1 - own.fidelity:.1%} of the answers are not the backbone's{right}. Raise T, allow less to be lost, or train longer."
        cut_off = [n for n, score in enumerate(self.truncation) if score.cost <= own.cost and _as_good(score, own)]
        if cut_off:
            n = max(cut_off, key=lambda n: (_merit(self.truncation[n]), -n))
            score = self.truncation[n]
            right = "" if score.accuracy is None else f"accuracy {score.accuracy:.4f}, "
            well = "as well for less" if round(score.cost, 4) < round(own.cost, 4) else "just as well"
            yield (
                f"Cutting the backbone off at exit {n} ({self.rows[1 + n].module}) does {well}: {right}fidelity "
                f"{score.fidelity:.4f} at cost {score.cost:.4f}, as everybody leaves there and no head is run but its own and those that it builds on."
            )
        if own.cost >= 1:
            yield (
                f"It does not pay: it costs {own.cost:.3f} times the bare backbone, as the heads cost more than leaving "
                "saves. Lower T, train longer, or take cheaper or fewer heads."
            )
        elif own.speedup is not None and own.speedup < SLOWER:
            yield (
                f"Counted it saves {1 - own.cost:.1%}, but measured it takes {1 / own.speedup:.2f} times as long as the bare backbone "
                f"on {self.device} in batches of {self.batch_size}: here it does not pay. ptee bench times other batch sizes."
            )

    def __str__(self) -> str:
        timed = ["images/s", "speed"] if self.early_exit.speedup is not None else []
        title = ("", "module", "accuracy", "fidelity", "cost", "leaving", "of them right", "AUROC", *timed)
        walls = "T = " + ", ".join(
            f"{t:.4g}" for t in (self.threshold if len(set(self.threshold)) > 1 else self.threshold[:1])
        )
        below = f"\nEarly exit at {walls}." if len(walls) > WIDEST else ""
        names = {self.early_exit.name: "early exit" if below else f"early exit, {walls}"}
        lines = [
            (names.get(r.name, r.name), r.module, *_cells(r, self._leaving(i), bool(timed)))
            for i, r in enumerate(self.rows)
        ]
        return (
            f"{self.backbone}, {self.samples} images\n"
            + (f"{self.note}\n" if self.note else "")
            + table([title, *lines], left={0, 1})
            + below
            + self._switched_off
            + "\nRows of exits: everybody leaves there; but leaving, of them right: who does at T (first row: at the end"
            f"{'' if self.early_exit.accuracy is not None else '; right: as the backbone'}). "
            "fidelity: share of answers\nequal to the backbone's. cost: multiply-accumulates, heads included, over the bare "
            "backbone's. AUROC:\nhow well h tells wrong answers from right ones (.5: not at all)."
            + (f" speed: over the bare backbone's,\n{self._where_timed}" if timed else "")
            + "".join(f"\n{sentence}" for sentence in self.verdict)
        )

    @property
    def _switched_off(self) -> str:
        some = 0 < len(self.off) < len(self.leaving) - 1
        exits = f"exit{'s' * (len(self.off) > 1)} {', '.join(map(str, self.off))}"
        return f"\nOff: {exits}. Nobody leaves there, whatever T is. {_ON_AGAIN}" if some else ""

    @property
    def _where_timed(self) -> str:
        return f"measured in turns with it on {self.device}, batch {self.batch_size}."

    def _leaving(self, i: int) -> str:
        """The share that leaves at the exit of this row; the backbone's is for those who never left."""
        last = len(self.rows) - 1
        return "" if i == last else f"{self.leaving[-1 if i == 0 else i - 1]:.1%}"


_ON_AGAIN = "ptee tune chooses anew which exits are on (from Python: model.off = [], and a new model.threshold)."


def _cells(row: Row, leaving: str, timed: bool) -> tuple[str, ...]:
    shown = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
    return (
        shown(row.accuracy, ".4f"), f"{row.fidelity:.4f}", f"{row.cost:.4f}",
        leaving, shown(row.right, ".4f"), shown(row.failure_auroc, ".3f"),
        *([shown(row.images_per_s, ",.0f"), shown(row.speedup, ".2f") + "x" * (row.speedup is not None)] if timed else []),
    )  # fmt: skip


def _as_good(score: Score, own: Row) -> bool:
    return _merit(score) >= (own.fidelity if own.accuracy is None else own.accuracy)


def _merit(score: Score) -> float:
    return score.fidelity if score.accuracy is None else score.accuracy


def evaluate(
    model: EarlyExitModel,
    data: Any,
    *,
    threshold: Thresholds | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    speed: bool = True,
    speed_seconds: float = SPEED_SECONDS,
    about: str = "",
) -> Results:
    """Measure a model on data: accuracy, fidelity, cost, where samples leave, and speed beside the bare backbone.

    Every exit answers every image once; the early-exit row follows by arithmetic. Speed is measured by running it.

    Args:
        model: any early-exit model.
        data: a map-style data set of (image, label) or (image,), or a loader. With labels that are no classes of the
            backbone there is no accuracy, and the results say so.
        threshold: one number or one per exit; None: the model's own, which is left as it is.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the model is.
        speed: measure images per second.
        speed_seconds: for that, in about; but at least four rounds are timed.
        about: a sentence about the data, kept with the results.

    Raises:
        PteeError: if the threshold, the data or the device cannot be used.
    """
    require_early_exit(model)
    home, was_training = next(model.heads.parameters()).device, model.training
    place = home if device is None else resolve_device(device)
    view = copy.copy(model)  # the same modules with a threshold of its own: other threads see nothing of it
    if threshold is not None:
        view.threshold = threshold
    try:
        view.to(place).eval()
        traces = record(view, data, batch_size=batch_size, num_workers=num_workers, logits=False)
        rows, leaving = _rows(view, traces)
        images = traces.sample.to(place)
        if speed:
            images = _few_enough(view, images, ROUND_SHARE * speed_seconds)
            rows = _timed(view, images, rows, batch_size, speed_seconds)
        return Results(
            model.plan.backbone,
            traces.answers.shape[1],
            view.threshold,
            tuple(rows),
            leaving,
            place.type,
            min(batch_size, len(images)),
            about,
            traces.note,
            truncation(traces),
            view.off,
        )
    finally:
        model.to(home).train(was_training)


def _rows(model: EarlyExitModel, traces: Traces) -> tuple[list[Row], list[float]]:
    leaving = traces.leaving([NEVER if n in model.off else t for n, t in enumerate(model.threshold)])
    last = len(model.exits)
    ways = {"backbone": ("", traces.at(last))}
    ways |= {f"exit {n}": (e.name, traces.at(n)) for n, e in enumerate(model.exits)}
    ways["early exit"] = ("", leaving)
    order = [*(f"exit {n}" for n in range(last)), "backbone"]
    right = {name: traces.right(leaving, n) for n, name in enumerate(order)} | {"early exit": None}
    rows = []
    for name, (module, where) in ways.items():
        score = traces.score(where)
        here = order.index(name) if name in order else None
        costs = traces.costs_without([n for n in model.off if n != here])  # alone, an exit that is off has its head
        cost = 1.0 if name == "backbone" else costs[where].mean().item()  # bare: it passes no head
        known = _reliability(traces, order.index(name)) if name in order[:-1] else (None, None)
        rows.append(Row(name, module, score.accuracy, score.fidelity, cost, right[name], *known))
    return rows, traces.shares(leaving)


def _reliability(traces: Traces, n: int) -> tuple[float, float | None]:
    """Calibration error and AUROC of an exit's confidence."""
    wanted = traces.answers[-1] if traces.targets is None else traces.targets
    h, holds = traces.confidence[n], traces.answers[n].eq(wanted)
    return calibration_error(h, holds), failure_auroc(h, holds)


def _few_enough(model: EarlyExitModel, images: torch.Tensor, seconds: float) -> torch.Tensor:
    """Some of the images, spread over all, so that timing every way to answer them does not take long."""
    if len(images) <= FEWEST:
        return images
    some = {"backbone": lambda: model.backbone(images[:PROBE])}
    each = in_turns(some, images.device, rounds=1)["backbone"][0] / PROBE
    affordable = seconds / (each * (len(model.exits) + 2))
    return images[:: math.ceil(len(images) / max(affordable, FEWEST))]


def _timed(model: EarlyExitModel, images: torch.Tensor, rows: list[Row], batch_size: int, seconds: float) -> list[Row]:
    """Add images per second, each row timed in turn with the bare backbone on images of the data set."""
    chunks = images.split(batch_size)
    exits = len(model.exits)
    walls: list[Any] = [[NEVER] * n + [ALWAYS] + [NEVER] * (exits - n - 1) for n in range(exits)]
    calls: dict[str, Any] = {"backbone": lambda: [model.backbone(x) for x in chunks]}
    for n, (row, wall) in enumerate(zip(rows[1:], [*walls, None], strict=True)):
        if n not in model.off:
            calls[row.name] = partial(_predict_all, model, chunks, wall)
    times = in_turns(calls, images.device, seconds=seconds)
    base = times["backbone"]
    timed = []
    for row in rows:
        if row.name not in times:
            timed.append(row)
            continue
        relative = ratio(times[row.name], base)
        rate = len(images) / (sorted(base)[len(base) // 2] * relative)
        timed.append(Row(**(asdict(row) | {"images_per_s": rate, "speedup": 1 / relative})))
    return timed


def _predict_all(model: EarlyExitModel, chunks: tuple[torch.Tensor, ...], threshold: Any) -> None:
    for x in chunks:
        model.predict(x, threshold)
