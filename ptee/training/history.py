"""What happened in a training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ptee._common.errors import Interrupted
from ptee._common.text import Readable, number_of, or_dash, percent, table
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import COLLAPSED
from ptee.training.config import ALONE, TrainingConfig

MIN_DELTA = 0.001  # by which the loss must fall to count as better (Demir, thesis 4.2)


@dataclass(frozen=True)
class Epoch:
    """Means over one epoch, each batch measured before its own update.

    Attributes:
        number: from 1.
        loss: what was minimised.
        accuracy: (E+1) share of right answers of each exit; None without labels.
        fidelity: (E+1) share of each exit's answers that are the backbone's.
        leaving: (E+1) share of the images that would leave at each exit at the model's thresholds.
        val_loss: the loss on val_data after the epoch, or None.
        seconds: how long the epoch took.
        val_leaving: likewise `leaving` on val_data, or None.
    """

    number: int
    loss: float
    accuracy: list[float] | None
    fidelity: list[float]
    leaving: list[float]
    val_loss: float | None
    seconds: float
    val_leaving: list[float] | None = None

    @property
    def judged(self) -> float:
        """The loss that early stopping goes by."""
        return self.loss if self.val_loss is None else self.val_loss

    def line(self, epochs: int) -> str:
        """The epoch in one line, of so many epochs."""
        fidelity = " ".join(f"{f:.3f}" for f in self.fidelity[:-1])
        val = "" if self.val_loss is None else f"  validation loss {self.val_loss:.4f}"
        head = f"epoch {self.number}/{epochs}  loss {self.loss:.4f}"
        return f"{head}  fidelity on training images {fidelity}{val}  {self.seconds:.0f} s"


@dataclass
class History(Readable):
    """What happened in a training. Prints as a table.

    Attributes:
        epochs: the complete ones.
        interrupted: Ctrl-C ended it; the heads are those of the last complete epoch.
        stopped_early: the loss no longer fell; the heads are those of the best epoch.
        warning: a sentence about a collapse, or None.
        config: the settings, with a value for every None and "auto"; JSON-able.
    """

    epochs: list[Epoch] = field(default_factory=list)
    interrupted: bool = False
    stopped_early: bool = False
    warning: str | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Epoch:
        """The first epoch whose loss no later one beat by `MIN_DELTA`."""
        best = self.epochs[0]
        for epoch in self.epochs[1:]:
            if epoch.judged < best.judged - MIN_DELTA:
                best = epoch
        return best

    def has_stalled(self, patience: int | None) -> bool:
        """Whether the loss has not fallen for so many epochs; None for no limit."""
        return patience is not None and bool(self.epochs) and len(self.epochs) - self.best.number >= patience

    def interruption(self, checkpoint: Path | None) -> Interrupted:
        """What Ctrl-C left, to be raised."""
        words = f"The weights are those after {number_of(len(self.epochs), 'complete epoch')}."
        if not self.epochs:
            words = "No epoch was complete, and the weights are as they were."
        elif checkpoint is not None and checkpoint.is_file():
            words += " Go on with resume=True."
        return Interrupted(words, self)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        title = ("epoch", "loss", "accuracy", "fidelity", "leaving", "validation loss", "seconds")
        end = ["Interrupted."] * self.interrupted or ["Stopped early: the loss no longer fell."] * self.stopped_early
        warning = [self.warning] if self.warning else []
        return "\n".join([table([title, *map(_row, self.epochs)]), LEGEND, *end, *warning])


LEGEND = """Several numbers stand for the exits in order, the last one for the backbone's own output.
accuracy: share of right answers. fidelity: share of answers that are the backbone's. leaving: share of images that leave.
All but the validation loss were measured on the training images."""


def _row(e: Epoch) -> tuple[str, ...]:
    shares = (_joined(e.accuracy), _joined(e.fidelity), _joined(e.leaving))
    return (str(e.number), f"{e.loss:.4f}", *shares, or_dash(e.val_loss, ".4f"), f"{e.seconds:.0f}")


def _joined(shares: Sequence[float] | None) -> str:
    return "-" if shares is None else " ".join(f"{share:.3f}" for share in shares)


def collapse_of(history: History, model: EarlyExitModel, config: TrainingConfig) -> str | None:
    """What is to be said if nearly all images leave at one place after a training with a joint loss; else None.

    A backbone that learns answers otherwise in training mode, so validation images say more, if there are some.
    """
    if not history.epochs or config.loss in ALONE:  # there h means that the answer is right
        return None
    last = history.best if history.stopped_early else history.epochs[-1]
    images, leaving = ("training", last.leaving) if last.val_leaving is None else ("validation", last.val_leaving)
    share, n = max((share, n) for n, share in enumerate(leaving))
    if share <= COLLAPSED:
        return None
    early = n < len(model.exits)
    where = f"exit {n} ({model.exits[n].name})" if early else "the backbone's own output"
    advice = [f"{'lower' if early else 'raise'} the cost weight (it is {config.cost_weight:g})", "train longer"]
    if config.loss in ("cost", "mc"):
        advice[0] = f"the loss {config.loss!r} does that by itself: use 'joint' or 'joint_each_exit'"
    elif early and not config.cost_weight:
        del advice[0]  # it cannot be lower
    return (
        f"Training collapsed: {percent(share, 0)} of the {images} images leave at {where} at threshold {model.threshold[0]:g}. "
        f"{', '.join(advice).capitalize()}, or set other thresholds."
    )
