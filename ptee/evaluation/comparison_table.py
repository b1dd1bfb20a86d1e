"""What came of a comparison: ways to answer, what each costs and loses, and what is said of them in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ptee._common.text import table

ROUNDING = 1e-9  # of sums of shares
INSTEAD = {  # of early exits: kinds of lines
    "static": "a smaller network alone",
    "cascade": "two networks one after the other",
    "truncation": "a backbone that is cut off",
}


@dataclass(frozen=True)
class Entry:
    """One setting, chosen on the calibration images and measured on the report images.

    Attributes:
        allowed: the drop that thresholds were chosen for, with some of it in reserve as by the margin "auto" of `solve`; None
            where there are none.
        cost: mean multiply-accumulates spent, heads passed on the way included, over the bare backbone's.
        drop: accuracy (without labels: fidelity) lost against the bare backbone; below 0 it is gained.
        interval: of the drop, 95 %, by bootstrap over the images.
        drop_in_calibration: the same drop on the calibration images.
        threshold: (E) T of each exit, or None.
        off: exits whose heads are not there.
    """

    allowed: float | None
    cost: float
    drop: float
    interval: tuple[float, float]
    drop_in_calibration: float
    threshold: tuple[float, ...] | None = None
    off: tuple[int, ...] = ()

    def within(self, drop: float) -> bool:
        """Whether no more is lost, on the calibration and on the report images."""
        return max(self.drop, self.drop_in_calibration) <= drop + ROUNDING

    @property
    def words(self) -> str:
        """Cost and drop, and how well it is known."""
        low, high = self.interval
        verb = "gaining" if self.drop < 0 else "losing"
        return f"{self.cost:.4f}, {verb} {abs(self.drop):.4f} (95 %: {_signed(low)} to {_signed(high)} lost)"

    def __str__(self) -> str:
        return f"{self.cost:.4f} ({_signed(self.drop)})"


@dataclass(frozen=True)
class Line:
    """One way to answer.

    Attributes:
        name: of the run or the network, and what is done with it.
        kind: "adaptive", "static", "cascade", "truncation" or "oracle".
        entries: one for each allowed drop; a single one where there is nothing to choose.
        of: the run or the network that it is a way to use.
    """

    name: str
    kind: str
    entries: tuple[Entry, ...]
    of: str = ""


class Found(NamedTuple):
    """A line, and its entry that costs least within a drop."""

    line: Line
    entry: Entry

    def __str__(self) -> str:
        return f"{self.line.name} ({self.entry.cost:.4f})"


@dataclass(frozen=True)
class Comparison:
    """Runs and what could be taken instead, on the same images. Prints as a table.

    Attributes:
        backbone: its name.
        drops: that were allowed, ascending.
        lines: one for each way to answer.
        calibration: number of images that thresholds were chosen on.
        samples: number of images that are reported on.
        accuracy: the bare backbone's on those; None without labels, and then every drop is one of fidelity.
        about: where the images came from, in a sentence.
        note: why there is no accuracy though there are labels, in a sentence; else empty.
    """

    backbone: str
    drops: tuple[float, ...]
    lines: tuple[Line, ...]
    calibration: int
    samples: int
    accuracy: float | None
    about: str = ""
    note: str = ""

    @property
    def verdict(self) -> list[str]:
        """For each allowed drop, what costs least within it, in words."""
        return [f"At most {drop:g} lost: {self._verdict(drop)}" for drop in self.drops]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"verdict": self.verdict}

    def _within(self, drop: float) -> list[Found]:
        """What saves anything within a drop, the cheapest first. The oracle is no way to answer."""
        found = []
        for line in self.lines:
            inside = [e for e in line.entries if e.within(drop) and e.cost < 1 - ROUNDING]
            if inside and line.kind != "oracle":
                found.append(Found(line, min(inside, key=lambda e: e.cost)))
        return sorted(found, key=lambda f: f.entry.cost)

    def _verdict(self, drop: float) -> str:
        found = self._within(drop)
        if not found:
            return "nothing that keeps to it costs less than the bare backbone."
        ahead = [f for f in found if f.line.kind == "adaptive"][:1]
        instead = found[: found.index(ahead[0])] if ahead else found
        best = f"{found[0].line.name} costs least, {found[0].entry.words}."
        if not instead:
            return best
        runs = f", the best of which is {ahead[0]}" if ahead else ", none of which saves anything within it"
        others = ", ".join(map(str, instead[1:]))
        return f"{best} That is {INSTEAD[found[0].line.kind]}, and better than the runs with early exits{runs}." + (
            f" Better than those, too: {others}." if others else ""
        )

    def __str__(self) -> str:
        measure = "fidelity" if self.accuracy is None else "accuracy"
        own = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        widest = max((high - low for line in self.lines for e in line.entries for low, high in [e.interval]), default=0)
        title = ("", *(f"<= {drop:g} lost" for drop in self.drops), "as it is")
        return (
            f"{self.backbone}, {self.samples:,} images{own}\n"
            + (f"{self.note}\n" if self.note else "")
            + table([title, *map(self._cells, self.lines)], left={0})
            + f"\nThresholds and exits that are off are chosen on {self.calibration:,} other images, for the drop of {measure} "
            "over each column less what is\nkept in reserve for images like these; where to cut off, too: wherever no other "
            "place is both cheaper and better there.\nIn each cell: cost, multiply-accumulates over the bare backbone's, heads "
            "included; and in parentheses the drop that it really\nhas on the images that are reported on, with 95 % "
            f"intervals of up to {widest / 2:.4f} to each side. Below, what keeps to a drop\nkeeps to it on both, whatever was allowed."
            + self._of_oracles()
            + "".join(f"\n{sentence}" for sentence in self.verdict)
        )  # fmt: skip

    def _of_oracles(self) -> str:
        if not any(line.kind == "oracle" for line in self.lines):
            return ""
        return "\nOracle: everybody leaves at the first exit that agrees with the backbone, which nothing can know."

    def _cells(self, line: Line) -> tuple[str, ...]:
        if line.entries[0].allowed is None:
            return (line.name, *[""] * len(self.drops), str(line.entries[0]))
        return (line.name, *map(str, line.entries), "")


def _signed(drop: float) -> str:
    return f"{round(drop, 4) + 0.0:+.4f}"  # no -0.0000
