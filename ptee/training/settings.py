"""What a training is asked for, checked before anything is read or written."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from ptee._common.errors import PteeError, unknown
from ptee.training.losses import ALONE, get_loss
from ptee.training.optimizers import OPTIMIZERS

TARGETS = ("labels", "pseudo", "soft")
PRECISIONS = ("auto", "no", "bf16", "fp16")
SCHEDULES = ("constant", "cosine")
LARGEST_SEED = 2**32
PLAIN = {"int": int, "float": float, "bool": bool, "str": str}


@dataclass(frozen=True)
class Settings:
    """Arguments of `train` that decide what the heads become, for given data and a given number of epochs."""

    targets: str = "labels"
    loss: str = "v1"
    cost_weight: float = 1.0
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    precision: str = "auto"
    patience: int | None = None
    temperature: float = 1.0
    reach: bool = False
    schedule: str = "constant"
    augment: int = 1
    mirror: bool = True
    shift: int = 0
    mixup: float = 0.0

    def checked(self) -> Settings:
        """These settings in Python's own numbers.

        Raises:
            PteeError: naming the argument that cannot be.
        """
        self._check_words()
        self._check_kinds()
        self._check_sizes()
        self._check_together()
        return replace(self, **{field.name: self._plain(field) for field in fields(self)})

    def _plain(self, field: Any) -> Any:
        """NumPy's numbers cannot be written as JSON."""
        value = getattr(self, field.name)
        return None if value is None else PLAIN[field.type.partition(" ")[0]](value)

    def _check_words(self) -> None:
        if self.targets not in TARGETS:
            raise unknown("targets", self.targets, TARGETS)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        get_loss(self.loss)

    def _check_kinds(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind, _, optional = field.type.partition(" ")
            if value is None and optional:
                continue
            if kind == "int":
                require_number(field.name, value, Integral, "a whole number")
            if kind == "float":
                require_number(field.name, value, Real, "a number")
            if kind == "bool" and not isinstance(value, bool):
                raise PteeError(f"The {field.name} {value!r} must be True or False.")

    def _check_sizes(self) -> None:
        for name, value, example in (
            ("batch_size", self.batch_size, 128),
            ("augment", self.augment, 2),
            ("lr", self.lr, 0.001),
            ("temperature", self.temperature, 2),
        ):
            if not 0 < value < math.inf:
                raise PteeError(f"The {name} {value} must be positive, such as {example}.")
        if self.patience is not None and self.patience < 1:
            raise PteeError(f"The patience {self.patience} must be one epoch at least, or None.")
        for name, value, example in (
            ("weight_decay", self.weight_decay, 0.05),
            ("cost_weight", self.cost_weight, 1),
            ("shift", self.shift, 4),
            ("mixup", self.mixup, 0.2),
        ):
            if not 0 <= value < math.inf:
                raise PteeError(f"The {name} {value} must be 0 or a positive number, such as {example}.")
        if not 0 <= self.seed < LARGEST_SEED:
            raise PteeError(f"The seed {self.seed} must lie between 0 and {LARGEST_SEED - 1}.")

    def _check_together(self) -> None:
        alone = {"temperature": self.temperature != 1, "reach": self.reach, "mixup": self.mixup != 0}
        for name, given in alone.items():
            if given and self.loss != ALONE:
                raise PteeError(
                    f"The {name} {getattr(self, name)} needs heads that learn each for itself: take the loss {ALONE!r} "
                    f"(it is {self.loss!r}), or leave it out."
                )
        if self.temperature != 1 and self.targets != "soft":
            raise PteeError(
                f"The temperature {self.temperature:g} needs probabilities: take the targets 'soft' (they are "
                f"{self.targets!r}), or leave it out."
            )


def check_epochs(epochs: int) -> None:
    """Refuse what is no number of epochs.

    Raises:
        PteeError: naming it.
    """
    require_number("epochs", epochs, Integral, "a whole number")
    if epochs < 1:
        raise PteeError(f"The epochs {epochs} must be positive.")


def require_number(name: str, value: Any, kind: type, words: str) -> None:
    """Refuse another kind of value.

    Raises:
        PteeError: naming the argument.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PteeError(f"The {name} {value!r} must be {words}.")
