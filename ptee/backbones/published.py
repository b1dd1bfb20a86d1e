"""Which published network of timm does as well as another for less: before exits are trained, this should be known.

The table `timm_imagenet.csv` holds facts of timm's published results: top-1 on ImageNet's validation images, operations, and images
a second on one GPU and one CPU. `recipes/scripts/published.py` makes it anew. No network is loaded here.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ptee._common.errors import BackboneError, PteeError, possible, unknown
from ptee._common.text import Readable, table
from ptee.backbones.library import IMAGENET

if TYPE_CHECKING:
    from ptee.backbones.load import Backbone

FILE = Path(__file__).with_name("timm_imagenet.csv")
OF_PTEE = ("cifar_", "eenet")  # begin the names of ptee's own networks, which are for small images
SOURCE = "timm's results of 2026-08-08"
MACHINES = (
    "Top-1 is of ImageNet's validation images. GPU: images a second on an RTX 5090, mixed precision, large batches; CPU: on an "
    "i9-10940X, float32, compiled, batches of one."
)
DROPS = (0.0, 0.01)  # of accuracy, for the short advice
FRONT_SHARES = (0.05, 0.1, 0.2, 0.3)  # of the operations, for a network in front
AUTO_FRONT_SHARE = 0.2  # the front that `--front auto-timm` takes
LEAST_GAIN = 0.95  # a network that needs more of the operations than that is no advice


class Published(NamedTuple):
    """One network at one image size.

    Attributes:
        name: with the tag of its weights.
        side: of its images, in pixels.
        top1: accuracy on ImageNet's validation images, 0 to 1.
        operations: multiply-accumulates for an image, in billions.
        gpu: images a second.
        cpu: likewise; None where timm did not measure it.
    """

    name: str
    side: int
    top1: float
    operations: float
    gpu: float
    cpu: float | None


class Measure(NamedTuple):
    """What a network costs: its unit in the table, and the cost itself, where less is better."""

    title: str
    cost: Callable[[Published], float]


MEASURES = {
    "operations": Measure("fewest operations", lambda row: row.operations),
    "gpu": Measure("fastest on the GPU", lambda row: 1 / row.gpu),
    "cpu": Measure("fastest on the CPU", lambda row: 1 / row.cpu if row.cpu else float("inf")),
}


@cache
def results() -> tuple[Published, ...]:
    """All rows, the most accurate first."""
    with FILE.open(encoding="utf-8", newline="") as stream:
        rows = [_row(line) for line in csv.DictReader(stream)]
    return tuple(sorted(rows, key=lambda row: (-row.top1, row.operations, row.name)))


def _row(line: dict[str, str]) -> Published:
    speed, cpu = float(line["gpu_images_per_s"]), line["cpu_images_per_s"]
    top1, operations = float(line["top1"]) / 100, float(line["gmacs"])
    return Published(line["model"], int(line["img_size"]), top1, operations, speed, float(cpu) if cpu else None)


def find_published(name: str, side: int | None = None) -> Published | None:
    """The row of a network, by timm's name of it, with or without `timm/`; None if there is none.

    A name without a tag has timm's default weights. Of rows with images of other sizes, that nearest to `side` pixels is taken, by
    default the smallest.
    """
    name = name.removeprefix("timm/")
    if "." not in name:
        name = _with_default_tag(name)
    rows = [row for row in results() if row.name == name]
    return min(rows, key=lambda row: abs(row.side - (side or 0)), default=None)


def _with_default_tag(name: str) -> str:
    """timm is asked only where there is a choice: to import it takes seconds."""
    tagged = {row.name for row in results() if row.name.partition(".")[0] == name}
    if len(tagged) > 1:
        from timm.models import get_pretrained_cfg

        return f"{name}.{getattr(get_pretrained_cfg(name), 'tag', '')}"
    return next(iter(tagged), name)


def as_good(own: Published, drop: float, by: str) -> Published | None:
    """The network that costs least among those that lose at most `drop` of accuracy, `own` if none costs less; None if none gains
    as much as is asked."""
    good = [row for row in (own, *results()) if row.top1 >= own.top1 - drop - 1e-9]
    return min(good, key=MEASURES[by].cost, default=None)


def best_front(own: Published, share: float) -> Published | None:
    """The most accurate network that needs at most this share of the operations; None if there is none."""
    return next((row for row in results() if row.operations <= share * own.operations), None)


@dataclass(frozen=True)
class Advice(Readable):
    """What else could be taken in place of a network. Prints as a table.

    Attributes:
        own: the network that was asked about.
        instead: allowed drop, measure, and the network that costs least by it.
        fronts: share of the operations, and the most accurate network within it, to answer before `own`.
    """

    own: Published
    instead: tuple[tuple[float, str, Published], ...]
    fronts: tuple[tuple[float, Published], ...]
    legend: ClassVar[str] = (
        f"{SOURCE.capitalize()}. {MACHINES} allowed: points of accuracy that may be lost. operations: of the network's own. "
        "All these networks answer in ImageNet's 1,000 classes, and many were chosen by these validation images. They tell "
        "nothing of a network that was trained further."
    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "source": SOURCE,
            "own": self.own._asdict(),
            "instead": [{"drop": drop, "by": by} | row._asdict() for drop, by, row in self.instead],
            "fronts": [{"share": share} | row._asdict() for share, row in self.fronts],
        }

    def __str__(self) -> str:
        own = self.own
        title = f"{own.name}, {own.side} x {own.side} pixels: {own.top1:.2%} at {own.operations:g} G multiply-accumulates. {SOURCE.capitalize()}."
        head = ("allowed", "by", "network", "pixels", "top-1", "operations", "GPU", "CPU")
        rows = [
            (f"{100 * drop:g} point{'s' * (drop != 0.01)}", MEASURES[by].title, *self._cells(row))
            for drop, by, row in self.instead
        ]
        text = f"{title}\n{table([head, *rows], left={1, 2})}"
        if not self.fronts:
            return text
        columns = ("at most", "network in front", *head[3:])
        fronts = [(f"{share:g}", *self._cells(row)) for share, row in self.fronts]
        return f"{text}\n\nThe most accurate network in front, by its share of the operations:\n{table([columns, *fronts], left={1})}"

    def _cells(self, row: Published) -> tuple[str, ...]:
        own = self.own
        cpu = f"{row.cpu / own.cpu:.2g}x" if row.cpu and own.cpu else "-"
        share, gpu = row.operations / own.operations, row.gpu / own.gpu
        name = "(itself)" if row == own else row.name
        return name, str(row.side), f"{row.top1:.2%}", f"{share:.2g}", f"{gpu:.2g}x", cpu


def advise(model: str, *, drops: Sequence[float] = (0.0, 0.005, 0.01), by: Sequence[str] = tuple(MEASURES)) -> Advice:
    """Which published networks are as good as one of timm's, for less.

    Args:
        model: its name.
        drops: of accuracy, 0.01 is one percentage point.
        by: some of `MEASURES`.

    Raises:
        UnknownName: if there is no such measure.
        BackboneError: if timm published no results for the network.
    """
    if wrong := [each for each in by if each not in MEASURES]:
        raise unknown("measure", wrong[0], MEASURES, argument="by")
    if wrong_drops := [drop for drop in drops if not -1 < drop < 1]:
        raise PteeError(
            f"A drop of {wrong_drops[0]:g} is no share of the images. Give 0.01 for one point.",
            argument="drops",
            value=wrong_drops[0],
        )
    own = find_published(model)
    if own is None:
        raise _nothing_known(model)
    fronts = [(share, best_front(own, share)) for share in FRONT_SHARES]
    return Advice(
        own,
        tuple((drop, each, row) for drop in drops for each in by if (row := as_good(own, drop, each))),
        tuple((share, row) for share, row in fronts if row is not None),
    )


def _nothing_known(model: str) -> BackboneError:
    names = {row.name.partition(".")[0] for row in results()}
    other = model.startswith(OF_PTEE)
    near = " They are of networks for ImageNet, and this one is for small images." if other else possible(model, names)
    return BackboneError(
        f"Nothing is known of {model!r:.200}: {SOURCE} do not name it.{near} With a run and a smaller network of your "
        "own: ptee compare RUN --static NAME=FILE.", argument="model", value=model,
    )  # fmt: skip


def _known(backbone: Backbone) -> Published | None:
    """The row of a backbone that answers in ImageNet's classes with timm's own weights, or would."""
    weights = (backbone.source or {}).get("weights") or {}
    if backbone.label_space != IMAGENET or backbone.learnt or "file" in weights:
        return None
    return find_published(backbone.name, backbone.input.input_size[-1])


def in_short(backbone: Backbone) -> str:
    """A few lines about published networks that are as good as this one, for less; empty if none is, or nothing is known."""
    own = _known(backbone)
    if own is None:
        return ""
    lines: dict[str, None] = {}  # each once
    for drop in DROPS:
        fewest, fastest = as_good(own, drop, "operations"), as_good(own, drop, "gpu")
        if fewest and fastest and fewest.operations <= LEAST_GAIN * own.operations:
            lines[f"  {100 * drop:g} point{'s' * (drop != 0.01)} lost: {_gains(own, fewest, fastest)}."] = None
    if not lines:
        return ""
    return "\n".join([f"By {SOURCE} other networks do as well on ImageNet (ptee advise {own.name}):", *lines])


def _gains(own: Published, fewest: Published, fastest: Published) -> str:
    found = f"{fewest.name} at {fewest.operations / own.operations:.2g} of the operations"
    if fastest.gpu <= own.gpu:
        return found
    return f"{found}, {fastest.name} at {fastest.gpu / own.gpu:.2g} times the speed on a GPU"


def front_of(backbone: Backbone) -> str:
    """The published network that should answer before a backbone: the most accurate one at `AUTO_FRONT_SHARE` of its operations."""
    own = _known(backbone)
    if own is None:
        raise _nothing_known(backbone.name)
    found = best_front(own, AUTO_FRONT_SHARE)
    if found is None:
        raise BackboneError(f"No published network needs at most {AUTO_FRONT_SHARE:g} of the operations of {own.name}.")
    return found.name
