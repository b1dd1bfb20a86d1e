"""The settings of the thresholds: given as numbers, or chosen for a target."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import PteeError
from ptee._common.validation import FrozenConfig, Number, YesNo

DEFAULT_LOSS = 0.01
TARGETS = ("max_loss", "max_drop", "max_fidelity_drop", "max_cost")


class ThresholdsConfig(FrozenConfig):
    """Which thresholds a model gets: those that are given, or those that meet one target best."""

    threshold: Number | tuple[Number, ...] | None = Field(
        None, description="T, as it is: one number for all exits, or one for each."
    )
    max_loss: Number | None = Field(
        None,
        ge=0,
        lt=1,
        description="Choose T: the lowest mean cost at which no more is lost than this share, of accuracy where there are labels, "
        f"else of fidelity. Default: {DEFAULT_LOSS}, where nothing else is given.",
    )
    max_drop: Number | None = Field(
        None,
        ge=0,
        lt=1,
        description="Choose T: the lowest mean cost at which accuracy is at most this much below the backbone's. 0.01 is one "
        "percentage point. Needs labels.",
    )
    max_fidelity_drop: Number | None = Field(
        None,
        ge=0,
        lt=1,
        description="Choose T: the lowest mean cost at which at most this share of the answers differs from the backbone's.",
    )
    max_cost: Number | None = Field(
        None,
        gt=0,
        description="Choose T: the best answers at this mean cost or less, as a fraction of the bare backbone's cost.",
    )
    one_threshold: YesNo = Field(False, description="Choose one T for all exits, not one for each.")
    margin: Number | Literal["auto"] = Field(
        "auto",
        description="How much of the allowed loss is kept in reserve, because new images lose more than those that T is chosen "
        "on. auto: as much more as images lose that are left out while T is chosen, a quarter of them at a time.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("threshold", *TARGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise PteeError(
                f"{' and '.join(given)} are given, and each of them decides the thresholds. Give one of them.",
                argument=given[0],
                value=getattr(self, given[0]),
            )
        return self

    def target(self, labelled: bool) -> tuple[str, float] | None:
        """What thresholds are chosen for: its name and its limit; None where they are given.

        Args:
            labelled: the images have labels that are classes of the backbone.
        """
        if self.threshold is not None:
            return None
        for name in TARGETS[1:]:
            if (limit := getattr(self, name)) is not None:
                return name, limit
        loss = DEFAULT_LOSS if self.max_loss is None else self.max_loss
        return ("max_drop" if labelled else "max_fidelity_drop"), loss
