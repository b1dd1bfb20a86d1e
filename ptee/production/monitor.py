"""What a model does in production: counters, audited images, and whether its promise is still kept."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from ptee import __version__
from ptee._common.devices import wait, widest
from ptee._common.errors import Argument, PteeError, first_line, warn
from ptee._common.process import Lock
from ptee._common.validation import FrozenConfig, Number, Whole
from ptee.exits.blend import OWN
from ptee.exits.config import NEVER
from ptee.production.monitor_state import read_state
from ptee.production.prometheus import prometheus_text
from ptee.production.promise_test import Bet, PromiseTest
from ptee.production.settings import in_force

AUDIT, CONFIDENCE = 0.05, 0.95
NEVER_LEAVE = "never_leave"
AT_ONCE = 32  # images of an audit that the backbone answers at once, so that its memory stays small
FARTHEST = 1e15  # images until the next audit, at most
COUNTED = 3  # for each exit: rows, cost, confidence
SAVED = ("threshold", "off", "answers", "confidence")  # of what a promise is of, in a state
WORSE, LATE = 4, 1_000_000  # answers that differ so many times as often should be found within so many images


class MonitorConfig(FrozenConfig):
    """The settings of a monitor."""

    audit: Annotated[Number, Field(ge=0, le=1)] = AUDIT
    confidence: Annotated[Number, Field(gt=0, lt=1)] = CONFIDENCE
    max_fidelity_drop: Annotated[Number, Field(gt=0, lt=1)] | None = None
    on_alarm: Literal["never_leave"] | Callable[..., Any] | None = None
    seed: Whole | None = None


Answers = Any  # what a model answered: `ptee.ExitOutput`, of a folder that imports this one
A = TypeVar("A")


@dataclass(frozen=True)
class Alarm:
    """That the promise no longer holds. Prints as a sentence.

    Images have numbers in the order in which they were answered, from 1 on. All that the monitor counts have one.

    Attributes:
        row: the number of the image at which it was found.
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


class Monitor:
    """Counts what a model answers, and tests whether its early answers still agree with its backbone. Made by `model.monitor`.

    All its methods may be called from any thread. It ends with `stop`, or at the end of a `with` block.

    The promise is of the thresholds, the exits that are off, the kind of answers and the confidence that were in force when it was
    made. Answers by others are counted and not audited; a warning says so.

    Attributes:
        model: which it watches.
        settings: as they were given.
        max_fidelity_drop: the largest share of answers that may differ from the backbone's; None if nothing is audited.
    """

    def __init__(self, model: Any, settings: MonitorConfig, max_fidelity_drop: float | None) -> None:
        self.model, self.settings, self._alpha = model, settings, 1 - settings.confidence
        self._lock, self._random = Lock(), random.Random(settings.seed)
        self._images = self._audited = self._differed = self._failed = 0
        self._seconds = 0.0
        self._promise(max_fidelity_drop)
        self._next = self._gap() - 1  # how many images come before the next one that is audited
        with torch.inference_mode(False):  # so that calls of any mode can add to it
            self._sums = torch.zeros(COUNTED, len(model.exits) + 1, dtype=torch.float64, device="cpu")

    def _promise(self, max_fidelity_drop: float | None) -> None:
        """A promise of the model as it is now, and a new test of it."""
        self.max_fidelity_drop = max_fidelity_drop if self.settings.audit else None
        self._test = None if self.max_fidelity_drop is None else PromiseTest(self.max_fidelity_drop, self._alpha)
        self._promised_for, self._kept = in_force(self.model), True
        self._alarm: Alarm | None = None

    # -------------------------------------------------------------------------------------------- watching

    def watch(self, x: Tensor, *, audited: bool, at_once: int) -> Callable[[A], A]:
        """Draw the images (b, c, h, w) to audit before they are answered. What is returned looks at the answers and gives them back.

        Args:
            x: the images.
            audited: the model's own thresholds answer them.
            at_once: so many of them the backbone may answer at once; it gets `AT_ONCE` at most.
        """
        positions = self._draw(len(x)) if audited and self._is_promised() else []
        images = x.detach()[positions] if positions else x[:0]  # a copy: a backbone may write into what it gets

        def see(out: A) -> A:
            first = self._count(out)
            if positions and self._is_promised():  # another thread may have changed the thresholds
                self._audit(images, positions, first, out, min(at_once, AT_ONCE))
            return out

        return see

    def _is_promised(self) -> bool:
        """Whether a promise is made for the model as it is. Says so when it no longer is."""
        with self._lock:
            if self._test is None:
                return False
            before, now = self._kept, in_force(self.model)
            self._kept = kept = now == self._promised_for
            ends = before and not kept and self._alarm is None
            changed = ", ".join(name for name, value in now.items() if value != self._promised_for.get(name))
        if ends:
            warn(
                f"The promise of this monitor is not of the model as it is now: {changed} changed. Until that is changed back, answers are "
                f"counted and not audited. To promise for the model as it is: monitor.renew(max_fidelity_drop={self.max_fidelity_drop:g})."
            )
        return kept

    def _audit(self, images: Tensor, positions: Sequence[int], first: int, out: Answers, at_once: int) -> None:
        """Whatever happens here, the caller has the answer already."""
        raised = False
        try:
            raised = self._see(self._differs(images, positions, out, at_once), [first + n for n in positions])
            if raised:
                self._act()
        except Exception as why:
            with self._lock:
                self._failed += 1
            if self._failed == 1 or raised:  # there is one alarm, and more than one audit may fail
                what = "The monitor raised an alarm, and its on_alarm failed" if raised else "An audit failed"
                warn(f"{what}. The answers stand. {first_line(why)}")

    def _gap(self) -> float:
        """How many images further the next audited one is: each is drawn with the same chance, at no cost for the others."""
        share = self.settings.audit
        if share in (0, 1):
            return math.inf if share == 0 else 1
        return 1 + math.floor(min(math.log(1 - self._random.random()) / math.log1p(-share), FARTHEST))

    def _draw(self, rows: int) -> list[int]:
        """Which images of a batch are audited."""
        positions = []
        with self._lock:
            while self._next < rows:
                positions.append(int(self._next))
                self._next += self._gap()
            self._next -= rows
        return positions

    def _count(self, out: Answers) -> int:
        """The number of the first of these images."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            device = out.cost.device
            if device != self._sums.device and widest(device) is self._sums.dtype:
                self._sums = self._sums.to(device)
                wait(device)  # once: other streams add to it, too
            here = [t.to(self._sums) for t in (torch.ones_like(out.cost), out.cost, out.confidence)]
            self._sums.index_add_(1, out.exit_index.to(self._sums.device), torch.stack(here))
            first = self._images + 1
            self._images += len(out.cost)
        return first

    def _differs(self, images: Tensor, positions: Sequence[int], out: Answers, at_once: int) -> list[bool]:
        """Whether the answers at these positions differ from the backbone's own."""
        at = torch.tensor(positions, device=out.logits.device)
        answers, left = out.logits[at].argmax(-1), out.exit_index[at] < len(self.model.exits)
        differs = torch.zeros_like(left)
        if self.model.answers != OWN:
            left = torch.ones_like(left)  # the end answers with a blend, too
        if left.any():
            began = time.perf_counter()
            bare = torch.cat([self.model.bare(some).argmax(-1) for some in images[left].split(at_once)])
            differs[left] = bare != answers[left]
            with self._lock:
                self._seconds += time.perf_counter() - began
        found: list[bool] = differs.tolist()
        return found

    def _see(self, differs: Sequence[bool], rows: Sequence[int]) -> bool:
        """Take audits into the test. Whether there is an alarm now that was not there before."""
        raised = False
        with self._lock:
            for each, row in zip(differs, rows, strict=True):
                self._audited += 1
                self._differed += each
                if self._test is None or self._alarm is not None:
                    continue
                if (bet := self._test.see(each, row, time.time())) is not None:
                    self._alarm, raised = _alarm(bet, row, self._test.limit), True
        return raised

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

    @property
    def tested(self) -> bool:
        """Whether audits test the promise: one is made for the model as it is now, and there is no alarm."""
        with self._lock:
            return self._test is not None and self._alarm is None and in_force(self.model) == self._promised_for

    def images_to_find(self, share: float) -> float:
        """About how many images it takes from the beginning to find that so many answers differ: the fewer are audited, the more.

        A fall after a long good time takes a few times as many. Infinite for a share that is within the promise.

        Args:
            share: of the answers; 0.05 is five in a hundred.

        Raises:
            PteeError: if it is no share, or nothing is audited.
        """
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise PteeError(Argument("share", f"{share!r}"), " must be a number from 0 to 1.", value=share)
        if self._test is None:
            raise PteeError("This monitor audits nothing, so it finds nothing. Give audit= and max_fidelity_drop=.")
        return self._test.audits_to_find(share) / self.settings.audit

    def as_dict(self) -> dict[str, Any]:
        """All that is known, JSON-able; `resume` takes it again."""
        with self._lock:
            wait(self._sums.device)  # also for what other streams have still to add
            rows, cost, confidence = self._sums.tolist()
            promised_for = {name: copy.copy(self._promised_for[name]) for name in SAVED}
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
                "promised_for": self._test and promised_for,
                "tested": self.tested,
                "test": self._test and {"seen": self._test.seen, "bets": [asdict(bet) for bet in self._test.bets]},
                "alarm": self._alarm and asdict(self._alarm),
            }

    def prometheus(self) -> str:
        """All counters in the text format of Prometheus, for a page that it reads."""
        return prometheus_text(self.as_dict())

    # -------------------------------------------------------------------------------------------- its life

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what `as_dict` gave: of the same exits, and of the same promise.

        Raises:
            PteeError: if it is no such state. Nothing is changed then.
        """
        with self._lock:
            saved = read_state(state, self.as_dict())
            sums = [saved.rows, saved.cost, saved.confidence_sum]
            with torch.inference_mode(False):
                self._sums = torch.tensor(sums, dtype=torch.float64, device="cpu")
            self._images, self._audited, self._differed = saved.images, saved.audited, saved.differed
            self._failed, self._seconds = saved.failed, saved.seconds
            self._alarm = None if saved.alarm is None else Alarm(**saved.alarm.model_dump())
            if self._test is not None and saved.test is not None:
                self._test.seen, self._test.bets = saved.test.seen, [Bet(**b.model_dump()) for b in saved.test.bets]
        if saved.alarm is not None:
            self._act()

    def renew(self, max_fidelity_drop: float | None = None) -> None:
        """Make a promise for the model as it is now, in place of the one before; an alarm ends. All counters go on.

        Args:
            max_fidelity_drop: the promise. None: what the thresholds in force were chosen for.

        Raises:
            PteeError: if the number is not possible, or nothing is promised.
        """
        settings = self.settings.changed(max_fidelity_drop=max_fidelity_drop)
        promise = _promise_of(self.model, settings)
        with self._lock:
            self.settings = settings
            self._promise(promise)
        _warn_if_late(self)

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
        return f"Monitor({self._images:,} images, {self._audited:,} audited, {self._differed:,} differed, alarm={self.alarm})"


def _alarm(bet: Bet, row: int, limit: float) -> Alarm:
    since = datetime.fromtimestamp(bet.moment, timezone.utc).isoformat(timespec="seconds")
    return Alarm(row, bet.since, since, bet.audited, bet.differed, limit)


def _mean(total: float, n: float) -> float | None:
    return total / n if n else None


def new_monitor(model: Any, settings: MonitorConfig) -> Monitor:
    """A monitor of a model, for the promise that is given, or else for the one that the model was tuned for."""
    if model.monitored is not None and model.monitored.model is model:  # else it watches what this is a copy of
        raise PteeError("This model has a monitor already: model.monitored. Stop it first: model.monitored.stop().")
    made = Monitor(model, settings, _promise_of(model, settings))
    _warn_if_late(made)
    return made


def _warn_if_late(monitor: Monitor) -> None:
    """Say so where so few images are audited that even a bad fall is not found in reasonable time."""
    limit, audit = monitor.max_fidelity_drop, monitor.settings.audit
    if limit is None or (images := monitor.images_to_find(bad := WORSE * limit / (1 + (WORSE - 1) * limit))) <= LATE:
        return
    least = images * audit / LATE
    more = f"audit={math.ceil(least * 1e6) / 1e6:g} or more" if least <= 1 else "a larger max_fidelity_drop"
    about = f"{float(f'{images:.2g}'):,.0f}" if images < 1e12 else f"{images:.1e}"
    warn(
        f"With audit={audit:g} it takes about {about} images to find that {bad:.2g} of the answers differ instead of {limit:g}. "
        f"To find it within {LATE:,}, give {more}."
    )


def _promise_of(model: Any, settings: MonitorConfig) -> float | None:
    if settings.max_fidelity_drop is not None or settings.audit == 0:
        return settings.max_fidelity_drop
    return _promise_of_curve(model)


def _promise_of_curve(model: Any) -> float:
    """The largest fidelity drop that the thresholds in force were chosen for."""
    point = model.valid_curve().at(model.threshold) if model.curve is not None else None
    if point is not None and point.promised:
        return float(point.promised)
    lost = 0.0 if point is None else point.fidelity_drop
    like = f"{math.ceil(100 * lost) / 100:g}" if 0 < lost < 0.99 else "0.01"
    expected = f" About {lost:.4f} of them are expected to differ." if lost else ""
    raise PteeError(
        "A monitor has no labels, so it watches how many answers differ from the backbone's, and these thresholds were not chosen for that."
        f"{expected} Say how many may, such as ", Argument("max_fidelity_drop", like), ".", argument="max_fidelity_drop",
    )  # fmt: skip
