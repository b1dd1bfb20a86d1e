"""The settings of thresholds: numbers, or a target that they are chosen for. The drops of a comparison."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError
from ptee._common.validation import FrozenConfig, Number, Whole, YesNo

DEFAULT_LOSS = 0.01
TARGETS = ("max_loss", "max_drop", "max_fidelity_drop", "max_cost")
OPERATIONS, TIME = "operations", "time"  # what a cost is counted or measured in
AT_BATCH = 32
HOW = ("one_threshold", "margin", "answers", "cost", "at_batch")  # settings of a choice, not of given thresholds
LARGEST_COST = 10  # times the backbone; more was meant as a percentage

Share = Annotated[Number, Field(ge=0, lt=1)]
Drop = Annotated[Number, Field(gt=-1, lt=1)]  # below 0 it is a gain


class ThresholdsConfig(FrozenConfig):
    """Which thresholds a model gets: those that are given, or those that meet one target best."""

    threshold: Number | tuple[Number, ...] | None = Field(
        None, description="T, as it is: one number for all exits, or one for each."
    )
    max_loss: Share | None = Field(
        None,
        description="Choose T: the lowest mean cost at which no more is lost than this share, of accuracy where there are labels, "
        f"else of fidelity. Default: {DEFAULT_LOSS}, where nothing else is given.",
    )
    max_drop: Drop | None = Field(
        None,
        description="Choose T: the lowest mean cost at which accuracy is at most this much below the backbone's. 0.01 is one "
        "percentage point; -0.002 is a gain of a fifth of a point. Needs labels.",
    )
    max_fidelity_drop: Share | None = Field(
        None,
        description="Choose T: the lowest mean cost at which at most this share of the answers differs from the backbone's.",
    )
    max_cost: Number | None = Field(
        None,
        gt=0,
        lt=LARGEST_COST,
        description="Choose T: the best answers at this mean cost or less, as a fraction of the bare backbone's cost.",
    )
    one_threshold: YesNo = Field(False, description="Choose one T for all exits, not one for each.")
    margin: Annotated[Number, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="How much of the limit is kept in reserve, because new images lose more than those that T is chosen on. "
        "auto: how much more they lose is estimated by cross-validation.",
    )

    answers: Literal["auto", "own", "blended"] = Field(
        "auto",
        description="own: an exit answers by itself. blended: it adds up what the exits so far have said, with fitted weights, and "
        "so does the end. auto: blended where that meets the target better on images that the weights were not fitted to.",
    )

    cost: Literal["operations", "time"] = Field(
        "operations",
        description="What thresholds and exits that are off are chosen by: operations (counted multiply-accumulates), or time (seconds "
        "of each piece, measured on the device of the run).",
    )
    at_batch: Whole = Field(AT_BATCH, ge=1, le=4096, description="Images in a batch, for the cost in time.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [name for name in ("threshold", *TARGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            both = [Argument(name, f"{getattr(self, name)}") for name in given[:2]]
            raise PteeError(
                both[0], " and ", both[1], " are given, and each of them decides the thresholds. Give one of them.",
                argument=given[0], value=getattr(self, given[0]),
            )  # fmt: skip
        if self.threshold is not None:
            for name in HOW:
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise PteeError(
                        Argument(name, f"{value}"), " is about thresholds that are chosen, and ", Argument("threshold", f"{self.threshold}"),
                        " is given. Give one of them.", argument=name, value=value,
                    )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _margin_leaves_something(self) -> Self:
        if self.margin == "auto" or self.threshold is not None or self.max_cost is not None:
            return self
        name = next((name for name in TARGETS if getattr(self, name) is not None), TARGETS[0])
        limit = getattr(self, name) if getattr(self, name) is not None else DEFAULT_LOSS
        if self.margin > limit >= 0:
            raise PteeError(
                Argument("margin", f"{self.margin:g}"), " leaves nothing of ", Argument(name, f"{limit:g}"), ". Give ",
                Argument("margin", f"{limit:g}"), " or less.", argument="margin", value=self.margin,
            )  # fmt: skip
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


class DropsConfig(FrozenConfig):
    """The drops of accuracy (without labels: of fidelity) that a comparison chooses thresholds for."""

    drops: tuple[Share, ...] = Field((0.0, 0.005, 0.01, 0.02), min_length=1)
