"""The results of an evaluation: the numbers, the tables they print as, and in words what is wrong with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptee._common.clock import noise
from ptee._common.files import plain
from ptee._common.text import Readable, describe_thresholds, number_of, or_dash, percent, table
from ptee.evaluation.bottom_line import ACCURATE, CHEAPER, FAITHFUL, Way, bottom_line
from ptee.model.forward import COLLAPSED
from ptee.tuning.traces import Score

MANY_DIFFER = 0.05  # share of answers that differ from the backbone's; more are too many
BLENDED_END = "blended end"  # the name of a row
WIDEST = 40  # letters of thresholds in the first column; longer ones are in the second table only
# It stands also where these exits were chosen just now: the same target would give the same ones.
ON_AGAIN = (
    "ptee tune for another target may switch {them} on (in Python, by hand: set model.off = [] and model.threshold)."
)


@dataclass(frozen=True)
class Row:
    """One scenario, measured on a data set.

    Attributes:
        name: "backbone", "exit 0" (every image leaves there), "exit 1", ..., "blended end" (no image leaves, and the answers
            are blended), "early exit".
        module: the exit's module, or empty.
        accuracy: share of the answers that are the label; None without labels.
        fidelity: share of the answers that are the backbone's.
        cost: mean multiply-accumulates for an image, heads passed on the way included, over the bare backbone's.
        right: of the images that leave here at the model's thresholds, the share whose answer is the label (without labels: the
            backbone's answer); None if none leaves. In the backbone's row: of the images that never left.
        calibration_error: of an exit's confidence h on all images: mean distance of h from the share of right answers, over
            bins of h; where h was calibrated to agree with the backbone, of answers that do. None in other rows.
        failure_auroc: of an exit's confidence h on all images: the chance that h is higher for a right answer than for a wrong
            one. .5 is chance, 1 is perfect. None in other rows, and if all answers are right or all are wrong.
        images_per_s: measured, or None.
        speedup: the bare backbone's time over this one's, measured in turns, or None.
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
class Results(Readable):
    """The numbers of an early-exit model on a data set. Prints as two tables.

    Attributes:
        backbone: its name.
        samples: n.
        threshold: (E) T of each exit.
        rows: the bare backbone, every image leaving at each exit, all images going to the end if answers are blended, the
            early-exit model at its thresholds.
        leaving: (E+1) share of the images that leave at each exit.
        device: where speed was measured.
        batch_size: at which speed was measured.
        about: where the data came from, in a sentence.
        note: why there is no accuracy though the data has labels, in a sentence; else empty.
        doubt: that the backbone is near chance under the labels, or right on far fewer images than usual, in a sentence; else empty. Then
            no accuracy says anything.
        seen: sentences that the heads were not trained; or that they were, or the thresholds chosen, on some of these images; else empty.
        usual_right: on which share of how many images the backbone is right, where that is in no doubt: here, or else before.
        truncation: for each exit, the score of the backbone cut off there, with no other head.
        off: exits that are off: no image leaves there, whatever T is.
        outcome: how the target of the thresholds fares on these data, in a sentence; else empty.
        loses_too_much: whether more is lost on these data than that target allows; None if it is none of a loss, or not known.
        asked: what the calibrated confidence is the probability of, which the calibration error is about: "the backbone's answer", or
            empty if that is what is right.
        by_time: the thresholds were chosen by seconds.
        spread: of the rounds in which speed was measured: the longest less the shortest, divided by the median; the most of any row.
        for_fidelity: the thresholds were chosen for fidelity: what answers as well keeps as much of it.
        confidence: the name of what decided who leaves; empty if it is not known.
        answers: own or blended; empty if that is not known.
    """

    backbone: str
    samples: int
    threshold: list[float]
    rows: tuple[Row, ...]
    leaving: list[float]
    device: str
    batch_size: int
    about: str = ""
    note: str = ""
    truncation: tuple[Score, ...] = ()
    off: tuple[int, ...] = ()
    outcome: str = ""
    loses_too_much: bool | None = None
    asked: str = ""
    for_fidelity: bool = False
    by_time: bool = False
    spread: float = 0.0
    confidence: str = ""
    answers: str = ""
    doubt: str = ""
    seen: str = ""
    usual_right: tuple[float, int] | None = None

    @property
    def early_exit(self) -> Row:
        """The row of the early-exit model at its thresholds."""
        return self.rows[-1]

    @property
    def exits(self) -> tuple[Row, ...]:
        """The rows in which every image leaves at one exit."""
        return tuple(row for row in self.rows[1:-1] if row.name != BLENDED_END)

    @property
    def blended_end(self) -> Row | None:
        """The row in which all images go to the end and the answers are blended; None if each exit answers by itself."""
        return next((row for row in self.rows if row.name == BLENDED_END), None)

    @property
    def all_off(self) -> bool:
        """No exit is on."""
        return len(self.off) == len(self.exits)

    @property
    def timed(self) -> bool:
        """Speed was measured."""
        return self.early_exit.speedup is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return plain(self) | {"verdict": self.verdict, "bottom_line": self.bottom_line}

    @property
    def verdict(self) -> list[str]:
        """What is wrong with the early-exit model, a sentence each. Nothing if T is above 1, where no image leaves."""
        if self.all_off:
            off = "Every exit is off, so the backbone answers all images, whatever T is."
            instead = f"{CHEAPER}." if self.by_time else "Train longer, or give more images to choose T on."
            wrong = [f"{off} {ON_AGAIN.format(them='exits')} {instead}"]
        elif min(self.threshold) > 1:
            wrong = []
        else:
            wrong = [_collapsed(self), "" if self.doubt else _differs(self)]
        return [*filter(None, [*wrong, self.bottom_line])]

    @property
    def bottom_line(self) -> str:
        """Why early exits do not pay here, or nobody can tell, in the sentence that comes last; empty if they do, or if none are on."""
        return self.doubt or ("" if self.all_off or min(self.threshold) > 1 else _bottom_line(self))

    @property
    def legend(self) -> str:
        """What the columns mean, a line each."""
        right = "the label" if self.early_exit.accuracy is not None else "the backbone's answer"
        speed = (
            f"images/s, speed: measured on {self.device} in batches of {self.batch_size}. Slow networks get smaller batches than were asked "
            "for. speed is the bare backbone's time divided by this one's, measured in turns."
        )
        return LEGEND.format(right=right, asked=self.asked or right) + (f"\n{speed}" if self.timed else "")

    def __str__(self) -> str:
        timed = f"; speed on {self.device} in batches of {self.batch_size}" if self.timed else ""
        some_off = bool(self.off) and not self.all_off
        again = ON_AGAIN.format(them="it" if len(self.off) == 1 else "them")
        off = f"Off: {_exits(self.off)}. No image leaves there, whatever T is. {again}"
        last = self.bottom_line
        before = self.verdict[:-1] if last else self.verdict
        sentences = [*filter(None, [noise([self.spread]), off * some_off, *before, self.seen, self.outcome, last])]
        return (
            f"{self.backbone}, {number_of(self.samples, 'image')}; cost in multiply-accumulates{timed}\n"
            + (f"{self.note}\n" if self.note else "")
            + f"\n{_scenarios(self)}\n\n{_at_exits(self)}"
            + ("\n" if sentences else "")
            + "".join(f"\n{sentence}" for sentence in sentences)
        )


LEGEND = """\
all leave at exit n: the heads before it that are on run, too.
accuracy: share of the answers that are the label.
fidelity: share of the answers that are the backbone's.
cost: mean multiply-accumulates for an image, heads included, divided by the bare backbone's.
T: an image leaves at the first exit whose confidence is at least T. off: no image leaves there; never: none does, but its head runs.
leave here: share of the images that leave at this exit when the model runs.
of these right: share of those images whose answer is {right}.
AUROC: the chance that the confidence is higher for a right answer than for a wrong one; 0.5 is chance, 1 is perfect.
ECE: expected calibration error: how far the confidence is, on average, from the share of answers that are {asked}."""


# ---------------------------------------------------------------------------------------------------- the tables


def _scenarios(results: Results) -> str:
    """A row for each way to use the network."""
    timed = ("images/s", "speed") if results.timed else ()
    names = [
        "backbone",
        *(f"all leave at {_exit(results, n)}{', off' * (n in results.off)}" for n in range(len(results.exits))),
        *(["all go to the end, blended"] if results.blended_end else []),
        _early_exit(results),
    ]
    lines = []
    for name, row in zip(names, results.rows, strict=True):
        speed = (or_dash(row.images_per_s, ",.0f"), or_dash(row.speedup, ".2f", "x")) if timed else ()
        lines.append((name, or_dash(row.accuracy, ".4f"), f"{row.fidelity:.4f}", f"{row.cost:.4f}", *speed))
    return table([("", "accuracy", "fidelity", "cost", *timed), *lines], left={0})


def _at_exits(results: Results) -> str:
    """What happens at each exit when the model runs at its thresholds."""
    lines = [("when it runs", "T", "leave here", "of these right", "AUROC", "ECE")]
    for n, row in enumerate(results.exits):
        off = n in results.off
        leave = "-" if off else percent(results.leaving[n])
        t = describe_thresholds(results.threshold[n : n + 1], [0] if off else [])
        quality = or_dash(row.failure_auroc, ".3f"), or_dash(row.calibration_error, ".3f")
        lines.append((_exit(results, n), t, leave, or_dash(row.right, ".4f"), *quality))
    right = or_dash((results.blended_end or results.rows[0]).right, ".4f")
    lines.append(("end of the backbone", "", percent(results.leaving[-1]), right, "", ""))
    return table(lines, left={0})


def _early_exit(results: Results) -> str:
    if results.all_off:
        return "early exit, every exit off"
    thresholds = describe_thresholds(results.threshold, results.off)
    return f"early exit, T = {thresholds}" if len(thresholds) <= WIDEST else "early exit, T as below"


def _exit(results: Results, n: int) -> str:
    return f"exit {n} ({results.exits[n].module})"


def _exits(numbers: tuple[int, ...]) -> str:
    return f"exit{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


# ---------------------------------------------------------------------------------------------------- what is wrong


def _collapsed(results: Results) -> str:
    """Nearly all images leave at one exit."""
    share, n = max((share, n) for n, share in enumerate(results.leaving[:-1]))
    if share <= COLLAPSED:
        return ""
    chosen = "Choose T for a smaller loss." if results.threshold[n] <= 0 else "Raise T, or choose T for a smaller loss."
    return f"{percent(share, 0)} of the images leave at {_exit(results, n)}: this is a shorter network, not an adaptive one. {chosen}"


def _differs(results: Results) -> str:
    """Many answers differ from the backbone's, they are not better ones, and nobody allowed it."""
    backbone, own = results.rows[0], results.early_exit
    better = own.accuracy is not None and backbone.accuracy is not None and own.accuracy >= backbone.accuracy
    if 1 - own.fidelity <= MANY_DIFFER or better or results.loses_too_much is False:
        return ""
    accuracy = "" if own.accuracy is None else f" (accuracy {own.accuracy:.4f} instead of {backbone.accuracy:.4f})"
    return f"{percent(1 - own.fidelity)} of the answers differ from the backbone's{accuracy}. Raise T, choose T for a smaller loss, or train longer."


def _bottom_line(results: Results) -> str:
    """It costs more than the backbone, saves little, is slower, or the backbone cut off at some exit is as good."""
    row = results.early_exit
    own = Score(row.accuracy, row.fidelity, row.cost)
    faithful = results.for_fidelity or row.accuracy is None

    def lost(score: Score) -> float:
        return 1 - (score.fidelity if faithful else score.merit)

    cut_off = [
        Way(f"The backbone cut off at {_exit(results, n)}, with no other heads,", s.cost, lost(s), _numbers(s))
        for n, s in enumerate(results.truncation)
        if not (results.leaving[n] == 1 and {*range(n)} <= {*results.off})  # that is what this model is
    ]
    return bottom_line(
        Way("", own.cost, lost(own)),
        cut_off,
        as_good=FAITHFUL if faithful else ACCURATE,
        speedup=None if noise([results.spread]) else row.speedup,
        where=f"on {results.device} in batches of {results.batch_size}",
        lower_t=not results.loses_too_much and results.leaving[0] < 1,
    )


def _numbers(score: Score) -> str:
    accuracy = "" if score.accuracy is None else f"accuracy {score.accuracy:.4f}, "
    return f"{accuracy}fidelity {score.fidelity:.4f}, cost {score.cost:.4f}"
