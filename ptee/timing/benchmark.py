"""Time beside the bare backbone's.

The speed of a machine drifts, so absolute seconds mean little. Every time is divided by the bare backbone's, measured in turns
with it in the same process, and shown beside the counted cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptee._common.clock import in_turns, ratio
from ptee._common.progress import with_bar
from ptee._common.text import number_of, or_dash, table
from ptee.analysis.freezing import device_of, hooked, sparing
from ptee.exits.config import ALWAYS, NEVER
from ptee.exits.placement import INPUT
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.forward import StopForward
from ptee.timing.settings import checked_sizes, leaving_at_first
from ptee.timing.times import in_threads

MAX_SECONDS = 120  # for one batch size; after that no further round begins


@dataclass(frozen=True)
class Case:
    """One batch size, and one number of images that leave. Times and costs are divided by the bare backbone's.

    Attributes:
        batch: number of images in the batch.
        leaving: how many of them leave, in words.
        time: measured.
        counted: the mean cost, in multiply-accumulates.
        limit: the time if images that leave cost nothing after exit 0; None if none leave.
        saved: (1 - time) / (1 - limit), the share of the possible saving that is reached; None if none leave.
    """

    batch: int
    leaving: str
    time: float
    counted: float
    limit: float | None
    saved: float | None


@dataclass(frozen=True)
class Bench:
    """Speed of a model beside its bare backbone's. Prints as a table."""

    backbone: str
    device: str
    threads: int
    exits: int
    cases: tuple[Case, ...]
    legend: ClassVar[str] = """\
time: measured in turns with the bare backbone, divided by its time.
cost: mean multiply-accumulates for an image, heads included, divided by the bare backbone's.
time over cost: by how much the time is longer than the cost says.
best time: the time if images that leave cost nothing after exit 0.
saving reached: (1 - time) / (1 - best time)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        title = ("batch", "who leaves", "time", "cost", "time over cost", "best time", "saving reached")
        return (
            f"{self.backbone} with {number_of(self.exits, 'exit')} on {self.device}{in_threads(self.device, self.threads)}\n"
            + "Times and costs are divided by the bare backbone's.\n\n"
            + table([title, *map(_cells, self.cases)], left={1})
        )


def _cells(case: Case) -> tuple[str, ...]:
    best, saved = or_dash(case.limit, ".3f"), or_dash(case.saved, ".1%")
    over = f"{case.time / case.counted - 1:+.1%}"
    return (str(case.batch), case.leaving, f"{case.time:.3f}", f"{case.counted:.3f}", over, best, saved)


def bench(model: EarlyExitModel, batch_sizes: Sequence[int] = (1, 32), *, rounds: int = 7) -> Bench:
    """Time a model beside its bare backbone if no image leaves, if half leave at exit 0, and if all leave there."""
    require_early_exit(model)
    checked_sizes(batch_sizes)
    cases = [case for b in with_bar(batch_sizes, "measuring sizes of batches") for case in _cases(model, b, rounds)]
    device = device_of(model.heads)
    return Bench(model.plan.backbone, device.type, torch.get_num_threads(), len(model.exits), tuple(cases))


def _cases(model: EarlyExitModel, b: int, rounds: int) -> list[Case]:
    ways = leaving_at_first(b)
    times = _times(model, b, ways, rounds)
    limits = {"all at exit 0": times["to exit 0"]}
    if b >= 2:  # all run to exit 0, and those that stay run on
        parts = zip(times["to exit 0"], times["bare, half"], times["to exit 0, half"], strict=True)
        limits["half at exit 0"] = [to_exit + whole - half_to_exit for to_exit, whole, half_to_exit in parts]
    cases = []
    for way, leaving in ways.items():
        counted = (leaving * model.costs[0] + (b - leaving) * model.costs[-1]) / b
        measured = ratio(times[way], times["bare"])
        limit = ratio(limits[way], times["bare"]) if leaving else None
        saved = None if limit is None else (1 - measured) / (1 - limit)
        cases.append(Case(b, way, measured, counted, limit, saved))
    return cases


def _times(model: EarlyExitModel, b: int, ways: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """Seconds of the model for each number of images that leave, and of the parts of the backbone that make up the limits."""
    x = model.prepared(torch.randn(b, *model.plan.input_size, dtype=torch.float32, device="cpu"))
    staying = x[b // 2 :]
    calls: dict[str, Callable[[], object]] = {
        "bare": lambda: model.backbone(x),
        "bare, half": lambda: model.backbone(staying),
        "to exit 0": lambda: _up_to_first_exit(model, x),
        "to exit 0, half": lambda: _up_to_first_exit(model, staying),
    }
    for way, leaving in ways.items():
        calls[way] = partial(model.predict, x, _threshold(model, b, leaving))
    with sparing(model.backbone, x):
        return in_turns(calls, x.device, rounds=rounds, seconds=MAX_SECONDS)


def _threshold(model: EarlyExitModel, b: int, leaving: int) -> Any:
    """Thresholds with which the first images of a batch leave at exit 0, and no other image leaves at all."""
    if leaving in (0, b):
        return [ALWAYS if leaving else NEVER, *[NEVER] * (len(model.exits) - 1)]
    # On the CPU, where the check for NaN does not wait for a GPU.
    threshold = torch.full((b, len(model.exits)), NEVER, dtype=torch.float64, device="cpu")
    threshold[:leaving, 0] = ALWAYS
    return threshold


def _up_to_first_exit(model: EarlyExitModel, x: Tensor) -> None:
    if model.exits[0].name == INPUT:  # nothing of the backbone comes before it
        return

    def stop(_: object) -> None:
        raise StopForward

    with suppress(StopForward), hooked({model.backbone.get_submodule(model.exits[0].name): stop}):
        model.backbone(x)
