"""What happened in a training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ptee._common.text import table


@dataclass(frozen=True)
class Epoch:
    """Means over one epoch, each batch judged before its own update.

    Attributes:
        number: from 1.
        loss: what was minimised.
        accuracy: (E+1) of each exit against the labels; None without labels.
        fidelity: (E+1) share of each exit's answers that are the backbone's.
        leaving: (E+1) share of the samples that would leave at each exit at the model's threshold.
        val_loss: the loss on val_data after the epoch, or None.
        seconds: the epoch took.
    """

    number: int
    loss: float
    accuracy: list[float] | None
    fidelity: list[float]
    leaving: list[float]
    val_loss: float | None
    seconds: float

    @property
    def judged(self) -> float:
        """The loss that early stopping goes by."""
        return self.loss if self.val_loss is None else self.val_loss

    def line(self, epochs: int) -> str:
        """What to say of it while the training goes on.

        Args:
            epochs: how many there are to be.
        """
        fidelity = " ".join(f"{f:.3f}" for f in self.fidelity[:-1])
        val = "" if self.val_loss is None else f"  held-out loss {self.val_loss:.4f}"
        return f"epoch {self.number}/{epochs}  loss {self.loss:.4f}  fidelity in training {fidelity}{val}  {self.seconds:.0f} s"


@dataclass
class History:
    """What happened in training. Prints as a table.

    Attributes:
        epochs: the complete ones.
        interrupted: Ctrl-C ended it; the heads are those of the last complete epoch.
        stopped_early: the loss no longer fell; the heads are those of the best epoch.
        warning: a sentence about a collapse, or None.
    """

    epochs: list[Epoch] = field(default_factory=list)
    interrupted: bool = False
    stopped_early: bool = False
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        title = ("epoch", "loss", "accuracy", "fidelity", "leaving", "held-out loss", "seconds")
        lines = [
            (str(e.number), f"{e.loss:.4f}", _each(e.accuracy), _each(e.fidelity), _each(e.leaving),
             "-" if e.val_loss is None else f"{e.val_loss:.4f}", f"{e.seconds:.0f}")
            for e in self.epochs
        ]  # fmt: skip
        end = "Interrupted." if self.interrupted else "Stopped early." if self.stopped_early else None
        legend = (
            "accuracy, fidelity, leaving: of each exit, the backbone's own output last. All but the held-out loss are of the "
            "training images."
        )
        return "\n".join(filter(None, [table([title, *lines]), legend, end, self.warning]))


def _each(shares: Sequence[float] | None) -> str:
    return "-" if shares is None else " ".join(f"{share:.3f}" for share in shares)
