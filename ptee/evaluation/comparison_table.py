"""The result of a comparison: ways to answer, what each costs and loses, the table, and what follows from it in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ptee._common.files import plain
from ptee._common.text import Readable, number_of, table
from ptee.evaluation.bottom_line import CHEAPER, FAITHFUL, Way, bottom_line
from ptee.production.curve import ROUNDING
from ptee.production.few_images import too_few

COUNTED = "the bare backbone's multiply-accumulates"  # what costs are fractions of, if nothing was measured
ALTERNATIVES = {  # to early exits, by kind of line
    "static": "a smaller network alone",
    "cascade": "a cascade of two networks",
    "truncation": "a backbone that is cut off",
}


@dataclass(frozen=True)
class Entry:
    """One setting, chosen on the calibration images and measured on the report images.

    Attributes:
        allowed: the drop that thresholds were chosen for, with the margin "auto"; None if there are no thresholds.
        cost: mean multiply-accumulates for an image, heads passed on the way included, over the bare backbone's; or seconds.
        drop: of accuracy (without labels: of fidelity) against the bare backbone; negative if it is better.
        interval: of the drop, 95 %, by bootstrap over the images.
        drop_in_calibration: the same drop on the calibration images.
        threshold: (E) T of each exit, or None.
        off: exits that are off.
        own: the exits' own answers, because blended ones missed the target with their final weights.
        fidelity: share of the answers that are the backbone's, on the report images.
        blended: the answers are blended with weights that were fitted to the calibration images, and the drop there is that of these.
    """

    allowed: float | None
    cost: float
    drop: float
    interval: tuple[float, float]
    drop_in_calibration: float
    threshold: tuple[float, ...] | None = None
    off: tuple[int, ...] = ()
    own: bool = False
    fidelity: float = 1.0
    blended: bool = False

    def within(self, drop: float) -> bool:
        """The drop is at most this, on the calibration images and on the report images."""
        return max(self.drop, self.drop_in_calibration) <= drop + ROUNDING

    @property
    def missed(self) -> bool:
        """The drop on the report images is larger than allowed."""
        return self.allowed is not None and self.drop > self.allowed + ROUNDING

    @property
    def words(self) -> str:
        """Cost, and drop with its interval."""
        low, high = self.interval
        return f"cost {self.cost:.4f} and drop {_signed(self.drop)} (95 % interval {_signed(low)} to {_signed(high)})"

    def __str__(self) -> str:
        return f"{self.cost:.4f} ({_signed(self.drop)})" + " own" * self.own + " missed" * self.missed


@dataclass(frozen=True)
class Line:
    """One way to answer.

    Attributes:
        name: of the run or the network, and how it is used.
        kind: "adaptive", "static", "cascade", "truncation" or "oracle".
        entries: one for each allowed drop; a single one if there is nothing to choose.
        of: the run or the network that is used.
    """

    name: str
    kind: str
    entries: tuple[Entry, ...]
    of: str = ""


class Found(NamedTuple):
    """A line, and its cheapest entry within a drop."""

    line: Line
    entry: Entry

    def called(self, drop: float) -> str:
        """The line, and the column of the table where that is another than the drop's."""
        column = self.entry.allowed
        return self.line.name + ("" if column in (None, drop) else f" with its thresholds for <= {column:g} lost")

    def with_cost(self, drop: float) -> str:
        """The same, and what it costs."""
        return f"{self.called(drop)} (cost {self.entry.cost:.4f})"

    def way(self, own: Found, drop: float, by_fidelity: bool) -> Way:
        """As a rival of early exits. All lose no more than the drop: so the cheapest is the best, unless fidelity is the wish."""
        one, two = self.entry, own.entry
        than = f", as much as {own.called(drop)}"
        if f"{one.cost:.4f}" != f"{two.cost:.4f}":
            than = f" instead of {two.cost:.4f}, that of {own.called(drop)}"
        words = f"cost {one.cost:.4f}{than}"
        if not by_fidelity:
            return Way(self.called(drop), one.cost, one.cost, words)
        words = f"fidelity {one.fidelity:.4f} instead of {two.fidelity:.4f}, {words}"
        return Way(self.called(drop), one.cost, 1 - one.fidelity, words)


@dataclass(frozen=True)
class Comparison(Readable):
    """Runs and the alternatives on the same images. Prints as a table.

    Attributes:
        backbone: its name.
        drops: the allowed drops, ascending.
        lines: one for each way to answer.
        calibration: number of images that thresholds were chosen on.
        samples: number of images that are reported on.
        accuracy: of the bare backbone on these; None without labels, and then drops are of fidelity.
        about: where the images came from, in a sentence.
        note: why there is no accuracy though there are labels, or why the accuracy means nothing, in a sentence; else empty.
        seen: sentences that heads were trained on some of these images, that some are for both purposes, or that a smaller network
            seems to know its classes in another order; else empty.
        unit: what costs are fractions of, in words.
        for_fidelity: names of the runs whose thresholds were chosen for fidelity: what answers as well as they do keeps as much of it.
    """

    backbone: str
    drops: tuple[float, ...]
    lines: tuple[Line, ...]
    calibration: int
    samples: int
    accuracy: float | None
    about: str = ""
    note: str = ""
    seen: str = ""
    unit: str = COUNTED
    for_fidelity: tuple[str, ...] = ()

    @property
    def _measure(self) -> str:
        """What drops are of."""
        return "fidelity" if self.accuracy is None else "accuracy"

    @property
    def verdict(self) -> list[str]:
        """For each allowed drop, what costs least within it, in words."""
        return [f"At most {drop:g} lost: {self._verdict(drop)}" for drop in self.drops]

    @property
    def bottom_line(self) -> str:
        """Why early exits do not pay here, in the sentence that comes last, for the largest drop at which they do not; else empty."""
        lines = [
            f"{'In short, for' if drop == self.drops[-1] else 'For'} {drop:g} lost at most: {words}"
            for drop in self.drops
            if (words := self._bottom_line(drop))
        ]
        return lines[-1] if lines else ""

    @property
    def _few_images(self) -> str:
        """Which of the allowed drops the calibration images may well not show, in a sentence on the largest; else empty."""
        return next(filter(None, (too_few(self.calibration, d, "calibration image") for d in self.drops[::-1])), "")

    def _bottom_line(self, drop: float) -> str:
        found = self._within(drop)
        own = next((f for f in found if f.line.kind == "adaptive"), None)
        if own is None:
            instead = "Train longer" if self.unit == COUNTED else CHEAPER
            return f"no early exits that save anything keep this. {instead}, or allow a larger loss."
        faithful = own.line.of in self.for_fidelity
        rivals = [f.way(own, drop, faithful) for f in found if f.line.kind != "adaptive"]
        as_good = FAITHFUL if faithful else "loses no more"
        return bottom_line(own.way(own, drop, faithful), rivals, as_good=as_good)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return plain(self) | {"verdict": self.verdict, "bottom_line": self.bottom_line}

    @property
    def legend(self) -> str:
        """What the table says, a line each."""
        widest = max((high - low for line in self.lines for e in line.entries for low, high in [e.interval]), default=0)
        kinds = {line.kind for line in self.lines}
        own = any(entry.own for line in self.lines for entry in line.entries)
        blended = any(entry.blended for line in self.lines for entry in line.entries)
        parts = [
            CELLS,
            OWN * own,
            COSTS,
            WEIGHTS * blended,
            TRUNCATION * ("truncation" in kinds),
            ORACLE * ("oracle" in kinds),
            SENTENCES,
        ]
        words = {"measure": self._measure, "unit": self.unit, "calibration": self.calibration, "half": widest / 2}
        return "\n".join(part.format(**words) for part in parts if part)

    def _within(self, drop: float) -> list[Found]:
        """Lines within a drop that cost less than the backbone, the cheapest first. The oracle cannot be used."""
        found = []
        for line in self.lines:
            inside = [e for e in line.entries if e.within(drop) and e.cost < 1 - ROUNDING]
            if inside and line.kind != "oracle":
                found.append(Found(line, min(inside, key=lambda e: e.cost)))
        return sorted(found, key=lambda f: f.entry.cost)

    def _verdict(self, drop: float) -> str:
        found = self._within(drop)
        if not found:
            return "nothing that keeps this is cheaper than the bare backbone."
        best, *others = found
        on_both = (
            f" on the {number_of(self.samples, 'report image')}, {_signed(best.entry.drop_in_calibration)} on the "
            f"{number_of(self.calibration, 'calibration image')}" + " with the final weights" * best.entry.blended
        )
        words = f"{best.called(drop)} is cheapest, with {best.entry.words}{on_both}."
        runs = [f for f in found if f.line.kind == "adaptive"]
        if best in runs:
            return words
        cheaper = [f.with_cost(drop) for f in (others[: others.index(runs[0])] if runs else others)]
        than = (
            f"the best run with early exits, {runs[0].with_cost(drop)}"
            if runs
            else "every run with early exits, as none saves anything"
        )
        also = f" So {'is' if len(cheaper) == 1 else 'are'} {', '.join(cheaper)}." if cheaper else ""
        return f"{words} It is {ALTERNATIVES[best.line.kind]}, and cheaper than {than}.{also}"

    def __str__(self) -> str:
        own = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        title = ("", *(f"<= {drop:g} lost" for drop in self.drops), "no threshold")
        return (
            f"{self.backbone}, {number_of(self.samples, 'image')}{own}; thresholds chosen on {number_of(self.calibration, 'calibration image')}\n"
            + f"cost: share of {self.unit}; in parentheses: the drop of {self._measure} on these images\n"
            + "".join(f"{words}\n" for words in (self.note, self.seen) if words)
            + f"\n{table([title, *map(self._cells, self.lines)], left=range(len(title)))}\n"
            + "".join(f"\n{sentence}" for sentence in [*self.verdict, self._few_images, self.bottom_line] if sentence)
        )

    def _cells(self, line: Line) -> tuple[str, ...]:
        if line.entries[0].allowed is None:
            return (line.name, *[""] * len(self.drops), str(line.entries[0]))
        return (line.name, *map(str, line.entries), "")


CELLS = """\
Each column: the largest drop of {measure} that was allowed. "no threshold": lines without one, such as a
smaller network alone.
Each cell: the cost, and in parentheses the drop of {measure} on the report images. "missed": it is larger than allowed."""
OWN = '"own": each exit answers by itself, because blended answers missed the target with their final weights.'
COSTS = """\
cost: mean over the images, heads included, as a share of {unit}.
Thresholds, and which exits are off, are chosen on {calibration:,} calibration images with the reserve of ptee tune. Where
thresholds for a smaller drop cost less, they are taken.
The 95 % intervals of the drops reach up to {half:.4f} to each side."""
WEIGHTS = """\
with the final weights: those of blended answers were fitted to the calibration images themselves. ptee tune names
another drop there: each image is answered with weights that were fitted to the others."""
TRUNCATION = "truncation: the backbone cut off at an exit. Exits that are no better than a cheaper one are left out."
ORACLE = """\
oracle: every image leaves at the first exit that agrees with the backbone. Exits that cost more than they save are off. No real
confidence can know that."""
SENTENCES = """\
The sentences below the table name what stays within a drop on the calibration images and on the report images. As the latter take part in
the choice, the drop of the line that is named is a little too good there. An evaluation on other images
says what it is on new ones."""


def _signed(drop: float) -> str:
    return f"{round(drop, 4) + 0.0:+.4f}"  # no -0.0000
