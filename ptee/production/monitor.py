"""What a model does in production: counters, audited images, and whether its promise is still kept."""

from __future__ import annotations

import json
import math
import random
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ptee import __version__
from ptee._common.errors import Argument, PteeError, first_line
from ptee._common.validation import FrozenConfig, Number, Whole, from_pydantic
from ptee.exits.blend import OWN
from ptee.production.curve import MOST_POINTS
from ptee.production.promise_test import Bet, PromiseTest

AUDIT, CONFIDENCE = 0.05, 0.95
NEVER_LEAVE = "never_leave"
NEVER = 2.0  # a threshold that no confidence reaches
AT_ONCE = 32  # images of an audit that the backbone answers at once, so that its memory stays small
FARTHEST = 1e15  # images until the next audit, at most
COUNTED = 3  # for each exit: rows, cost, confidence
AGAIN = "Give what monitor.as_dict() returned."

Positive = Annotated[Number, Field(ge=0, le=1e18)]
Moment = Annotated[Number, Field(ge=0, le=1e11)]  # seconds since 1970
Count = Annotated[Whole, Field(ge=0, le=10**18)]
PerExit = Annotated[tuple[Positive, ...], Field(max_length=MOST_POINTS + 1)]


class MonitorConfig(FrozenConfig):
    """The settings of a monitor."""

    audit: Annotated[Number, Field(ge=0, le=1)] = AUDIT
    confidence: Annotated[Number, Field(gt=0, lt=1)] = CONFIDENCE
    max_fidelity_drop: Annotated[Number, Field(gt=0, lt=1)] | None = None
    on_alarm: Literal["never_leave"] | Callable[..., Any] | None = None
    seed: Whole | None = None


class Answers(Protocol):
    """What a model answered: `ptee.ExitOutput`."""

    @property
    def logits(self) -> Tensor:
        """(b, K)."""

    @property
    def exit_index(self) -> Tensor:
        """(b,)."""

    @property
    def confidence(self) -> Tensor:
        """(b,)."""

    @property
    def cost(self) -> Tensor:
        """(b,)."""


A = TypeVar("A", bound=Answers)


@dataclass(frozen=True)
class Alarm:
    """That the promise no longer holds. Prints as a sentence.

    Attributes:
        row: at which image it was found; the first since the monitor began is 1.
        since_row: from about which image on it did not hold.
        since: when that image came, in UTC.
        audited: images that were audited from there on.
        differed: of these, those whose answer differed from the backbone's.
        max_fidelity_drop: the share that was promised.
    """

    row: int
    since_row: int
    since: str
    audited: int
    differed: int
    max_fidelity_drop: float

    def __str__(self) -> str:
        return (
            f"The promise does not hold since about image {self.since_row:,} ({self.since}): {self.differed:,} of {self.audited:,} audited "
            f"answers differ from the backbone's, and at most {self.max_fidelity_drop:g} of them may. Found at image {self.row:,}."
        )


class _Saved(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _SavedAlarm(_Saved):
    row: Count
    since_row: Count
    since: Annotated[str, Field(strict=True, max_length=40)]
    audited: Count
    differed: Count
    max_fidelity_drop: Positive


class _SavedBet(_Saved):
    differ: Positive
    agree: Positive
    capital: Annotated[Number, Field(ge=0)]
    cusum: Number
    since: Count
    moment: Moment
    audited: Count
    differed: Count


class _SavedTest(_Saved):
    seen: Count
    bets: tuple[_SavedBet, ...]


class _State(_Saved):
    """What `as_dict` wrote, checked: a file may come from elsewhere."""

    exits: tuple[str, ...]
    rows: tuple[Count, ...]
    cost: PerExit
    confidence_sum: PerExit
    audited: Count
    differed: Count
    seconds: Positive
    max_fidelity_drop: Positive | None
    alpha: Positive
    test: _SavedTest | None
    alarm: _SavedAlarm | None


class Monitor:
    """Counts what a model answers, and tests whether its early answers still agree with its backbone. Made by `model.monitor`.

    All its methods may be called from any thread. It ends with `stop`, or at the end of a `with` block.

    Attributes:
        model: which it watches.
        settings: as they were given.
        max_fidelity_drop: the largest share of answers that may differ from the backbone's; None if nothing is audited.
    """

    def __init__(self, model: Any, settings: MonitorConfig, promise: tuple[float | None, float]) -> None:
        self.model, self.settings = model, settings
        self.max_fidelity_drop, self._alpha = promise
        self._lock, self._random = threading.RLock(), random.Random(settings.seed)
        self._test = None if self.max_fidelity_drop is None else PromiseTest(self.max_fidelity_drop, self._alpha)
        self._alarm: Alarm | None = None
        self._drawn = self._audited = self._differed = self._failed = 0  # images that came, and audits
        self._seconds = 0.0
        self._next = self._gap() - 1  # how many images come before the next one that is audited
        with torch.inference_mode(False):  # so that calls of any mode can add to it
            self._sums = torch.zeros(COUNTED, len(model.exits) + 1, dtype=torch.float64, device="cpu")

    # -------------------------------------------------------------------------------------------- watching

    def watch(self, x: Tensor, audited: bool = True) -> Callable[[A], A]:
        """Draw the images (b, c, h, w) to audit before they are answered. What is returned looks at the answers and gives them back."""
        positions, first = self._draw(len(x)) if audited else ([], 0)
        images = x.detach()[positions] if positions else x[:0]  # a copy: a backbone may write into what it gets

        def see(out: A) -> A:
            self._count(out)
            if positions:
                self._audit(images, positions, first, out)
            return out

        return see

    def _audit(self, images: Tensor, positions: Sequence[int], first: int, out: Answers) -> None:
        """Whatever happens here, the caller has the answer already."""
        try:
            self._see(self._differs(images, positions, out), [first + n for n in positions])
        except Exception as why:  # the backbone's, or that of `on_alarm`
            with self._lock:
                self._failed += 1
            if self._failed == 1:
                warnings.warn(f"An audit failed, and the answers stand: {first_line(why)}", stacklevel=4)

    def _gap(self) -> float:
        """How many images further the next audited one is: each is drawn with the same chance, at no cost for the others."""
        share = self.settings.audit
        if share in (0, 1):
            return math.inf if share == 0 else 1
        return 1 + math.floor(min(math.log(1 - self._random.random()) / math.log1p(-share), FARTHEST))

    def _draw(self, rows: int) -> tuple[list[int], int]:
        """Which images of a batch are audited, and the number of its first image."""
        positions = []
        with self._lock:
            while self._next < rows:
                positions.append(int(self._next))
                self._next += self._gap()
            self._next -= rows
            first = self._drawn + 1
            self._drawn += rows
        return positions, first

    def _count(self, out: Answers) -> None:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if out.cost.device.type != "mps":  # which has no float64
                self._sums = self._sums.to(out.cost.device)  # no synchronisation with the host
            here = [t.to(self._sums) for t in (torch.ones_like(out.cost), out.cost, out.confidence)]
            self._sums.index_add_(1, out.exit_index.to(self._sums.device), torch.stack(here))

    def _differs(self, images: Tensor, positions: Sequence[int], out: Answers) -> list[bool]:
        """Whether the answers at these positions differ from the backbone's own."""
        at = torch.tensor(positions, device=out.logits.device)
        answers, left = out.logits[at].argmax(-1), out.exit_index[at] < len(self.model.exits)
        differs = torch.zeros_like(left)
        if self.model.answers != OWN:
            left = torch.ones_like(left)  # the end answers with a blend, too
        if left.any():
            began = time.perf_counter()
            bare = torch.cat([self.model.bare(some).argmax(-1) for some in images[left].split(AT_ONCE)])
            differs[left] = bare != answers[left]
            self._spent(time.perf_counter() - began)
        found: list[bool] = differs.tolist()
        return found

    def _spent(self, seconds: float) -> None:
        with self._lock:
            self._seconds += seconds

    def _see(self, differs: Sequence[bool], rows: Sequence[int]) -> None:
        raised = False
        with self._lock:
            for each, row in zip(differs, rows, strict=True):
                self._audited += 1
                self._differed += each
                if self._test is None or self._alarm is not None:
                    continue
                if (bet := self._test.see(each, row, time.time())) is not None:
                    self._alarm, raised = _alarm(bet, row, self._test.limit), True
        if raised:
            self._act()

    def _act(self) -> None:
        """What was to be done on an alarm: once, and outside of the lock."""
        if self.settings.on_alarm == NEVER_LEAVE:
            self.model.threshold = NEVER
        elif callable(self.settings.on_alarm):
            self.settings.on_alarm(self)

    # -------------------------------------------------------------------------------------------- reading

    @property
    def alarm(self) -> Alarm | None:
        """Since when the promise no longer holds; None while nothing speaks against it."""
        with self._lock:
            return self._alarm

    def as_dict(self) -> dict[str, Any]:
        """All that is known, JSON-able; `resume` takes it again."""
        with self._lock:
            rows, cost, confidence = self._sums.tolist()
            return {
                "ptee_version": __version__,
                "exits": [*(e.name for e in self.model.exits), ""],
                "rows": [int(n) for n in rows],
                "mean_cost": _mean(sum(cost), sum(rows)),
                "mean_confidence": [_mean(h, n) for h, n in zip(confidence, rows, strict=True)],
                "cost": cost,
                "confidence_sum": confidence,
                "audit": self.settings.audit,
                "audited": self._audited,
                "differed": self._differed,
                "failed": self._failed,
                "seconds": self._seconds,
                "max_fidelity_drop": self.max_fidelity_drop,
                "confidence": self.settings.confidence,
                "alpha": self._alpha,
                "test": self._test and {"seen": self._test.seen, "bets": [asdict(bet) for bet in self._test.bets]},
                "alarm": self._alarm and asdict(self._alarm),
            }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave: of the same exits, and of the same promise.

        Raises:
            PteeError: if it is no such state. Nothing is changed then.
        """
        with self._lock:
            saved = self._checked(state)
            with torch.inference_mode(False):
                self._sums = torch.tensor(
                    [saved.rows, saved.cost, saved.confidence_sum], dtype=torch.float64, device="cpu"
                )
            self._drawn, self._audited, self._differed = sum(saved.rows), saved.audited, saved.differed
            self._seconds = saved.seconds
            self._alarm = None if saved.alarm is None else Alarm(**saved.alarm.model_dump())
            if self._test is not None and saved.test is not None:
                self._test.seen, self._test.bets = saved.test.seen, [Bet(**b.model_dump()) for b in saved.test.bets]
        if saved.alarm is not None:
            self._act()

    def _checked(self, state: Mapping[str, Any]) -> _State:
        try:
            saved = _State.model_validate(json.loads(json.dumps(state)))
        except ValidationError as why:
            raise PteeError(f"This is no state of a monitor: {from_pydantic(why)} {AGAIN}") from why
        except (TypeError, ValueError) as why:
            raise PteeError(f"This is no state of a monitor. {AGAIN}") from why
        own = self.as_dict()
        same = {
            "exits": (list(saved.exits), own["exits"]),
            "max_fidelity_drop": (saved.max_fidelity_drop, self.max_fidelity_drop),
            "1 - confidence": (saved.alpha, self._alpha),
        }
        for name, (theirs, ours) in same.items():
            if theirs != ours:
                raise PteeError(
                    f"This state is of another monitor: its {name} is {theirs}, and here it is {ours}. Begin without it."
                )
        bets = [] if saved.test is None else [(bet.differ, bet.agree) for bet in saved.test.bets]
        if {len(saved.rows), len(saved.cost), len(saved.confidence_sum)} != {len(saved.exits)} or bets != self._stakes:
            raise PteeError(f"This is no state of a monitor: its parts do not fit each other. {AGAIN}")
        return saved

    @property
    def _stakes(self) -> list[tuple[float, float]]:
        return [] if self._test is None else [(bet.differ, bet.agree) for bet in self._test.bets]

    def prometheus(self) -> str:
        """All counters in the text format of Prometheus, for a page that it reads."""
        now = self.as_dict()
        names = [f'{{exit="{n}",module="{_label(name)}"}}' for n, name in enumerate(now["exits"])]
        of_exits = {
            "rows": ("Images answered at each exit; the last is the end of the backbone.", now["rows"]),
            "cost": ("Their multiply-accumulates, in images of the bare backbone.", now["cost"]),
            "confidence": ("The sum of their confidence.", now["confidence_sum"]),
        }
        lines = []
        for name, (text, values) in of_exits.items():
            lines += _metric(f"{name}_total", "counter", text, zip(names, values, strict=True))
        single = {
            "audited_total": ("counter", "Images whose answer was compared with the backbone's.", now["audited"]),
            "audited_differed_total": ("counter", "Those of them that differed.", now["differed"]),
            "audits_failed_total": ("counter", "Batches whose audit ended in an error.", now["failed"]),
            "audit_seconds_total": ("counter", "Seconds of the backbone for these.", now["seconds"]),
            "alarm": ("gauge", "1 if the promise no longer holds.", int(now["alarm"] is not None)),
        }
        if self.max_fidelity_drop is not None:
            single["max_fidelity_drop"] = ("gauge", "Share of answers that may differ.", self.max_fidelity_drop)
        for name, (kind, text, value) in single.items():
            lines += _metric(name, kind, text, [("", value)])
        return "\n".join(lines) + "\n"

    # -------------------------------------------------------------------------------------------- its life

    def stop(self) -> None:
        """Watch no further. What was counted stays."""
        if self.model.monitored is self:
            self.model.monitored = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the model is not watched."""

    def __reduce__(self) -> Any:
        return type(None), ()  # nor is one that was pickled

    def __repr__(self) -> str:
        rows = sum(self.as_dict()["rows"])
        return f"Monitor({rows:,} images, {self._audited:,} audited, {self._differed:,} differed, alarm={self.alarm})"


def _alarm(bet: Bet, row: int, limit: float) -> Alarm:
    since = datetime.fromtimestamp(bet.moment, timezone.utc).isoformat(timespec="seconds")
    return Alarm(row, bet.since, since, bet.audited, bet.differed, limit)


def _mean(total: float, n: float) -> float | None:
    return total / n if n else None


def _metric(name: str, kind: str, text: str, values: Any) -> list[str]:
    head = [f"# HELP ptee_{name} {text}", f"# TYPE ptee_{name} {kind}"]
    return head + [f"ptee_{name}{label} {value}" for label, value in values]


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def new_monitor(model: Any, settings: MonitorConfig) -> Monitor:
    """A monitor of a model, for the promise that is given, or else for the one that the model was tuned for.

    Raises:
        PteeError: if the model has a monitor already, or nothing is promised.
    """
    if model.monitored is not None and model.monitored.model is model:  # else it watches what this is a copy of
        raise PteeError("This model has a monitor already: model.monitored. Stop it first: model.monitored.stop().")
    alpha = 1 - settings.confidence
    given = settings.max_fidelity_drop
    if given is not None or settings.audit == 0:
        return Monitor(model, settings, (given, alpha))
    return Monitor(model, settings, (_promise_of_curve(model), alpha))


def _promise_of_curve(model: Any) -> float:
    """The largest fidelity drop that the thresholds in force were chosen for."""
    point = model.valid_curve().at(model.threshold) if model.curve is not None else None
    if point is not None and point.promised:
        return float(point.promised)
    lost = 0.0 if point is None else point.fidelity_drop
    like = f"{math.ceil(100 * lost) / 100:g}" if 0 < lost < 0.99 else "0.01"
    raise PteeError(
        "These thresholds were chosen for no share of answers that differ from the backbone's. Say which share may: ",
        Argument("max_fidelity_drop", like), ".", argument="max_fidelity_drop",
    )  # fmt: skip
