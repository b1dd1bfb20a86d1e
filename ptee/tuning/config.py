"""The settings of thresholds: numbers, or a target that they are chosen for. The drops of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError
from ptee._common.text import as_shares, beside, describe_thresholds, number_of
from ptee._common.validation import FrozenConfig, Number, Whole, YesNo
from ptee.exits.config import require_no_percentage

DEFAULT_LOSS = 0.01
TARGETS = ("max_loss", "max_drop", "max_fidelity_drop", "max_cost")
OPERATIONS, TIME = "operations", "time"  # what a cost is counted or measured in
AT_BATCH = 32
MEASURE_AT = "ptee evaluate RUN --threshold 0.7"
SET_THRESHOLD = "model = ptee.load(RUN); model.threshold = 0.7; model.save_pretrained(RUN)"
SET_CONFIDENCE = "model = ptee.load(RUN); model.confidence = NAME; model.save_pretrained(RUN)"
HOW = (
    "one_threshold",
    "margin",
    "answers",
    "confidence",
    "each_exit",
    "cost",
    "at_batch",
    "executor",
)  # settings of a choice, not of given thresholds
EXAMPLES = {"max_drop": "0.01", "max_fidelity_drop": "0.01", "max_cost": "0.6"}  # kinds of targets, and a limit to type
WORDS = {
    "max_drop": "accuracy at most {:g} below the backbone's",
    "max_fidelity_drop": "at most {:g} of the answers differ from the backbone's",
    "max_cost": "a mean cost of at most {:g}",
}
HIGHEST_CONFIDENCE = 0.99999999  # p-values of a drop may be too large by 2e-9
LARGEST_COST = 10  # times the backbone; more was meant as a percentage

Share = Annotated[Number, Field(ge=0, lt=1)]
Drop = Annotated[Number, Field(gt=-1, lt=1)]  # below 0 it is a gain


class ThresholdsConfig(FrozenConfig):
    """Which thresholds a model gets: those that are given, or those that meet one target best."""

    threshold: Number | tuple[Number, ...] | None = Field(
        None, description="T itself, in place of a target: one number for all exits, or one for each."
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

    confidence: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Guarantee the drop: with this confidence, such as 0.95, no more is lost on new images, however they are "
        "distributed. Needs enough images: 299 for 0.01 at 0.95. Default: kept on average.",
    )
    each_exit: YesNo = Field(
        False, description="Guarantee the drop among the images that leave at each exit, too, not only among all."
    )
    cost: Literal["operations", "time"] = Field(
        "operations",
        description="The cost that is to be low: operations (counted multiply-accumulates), or time (seconds, measured on the device "
        "of the run). By it are chosen the thresholds, the exits that are off and, before a training, the places of exits.",
    )
    at_batch: Whole = Field(AT_BATCH, ge=1, le=4096, description="Images in a batch, for the cost in time.")
    executor: Literal["auto", "hooks", "eager", "graphs", "compile", "onnx"] = Field(
        "auto",
        description="What runs the model, for the cost in time. auto: graphs where they were measured, else hooks.",
    )

    def require_used(self, given: Iterable[str]) -> None:
        """Refuse settings that were given, by name or path, and change nothing where no seconds count.

        Raises:
            PteeError: naming the setting.
        """
        names = {name.rpartition(".")[2] for name in given}
        for name in ("at_batch", "executor") if self.cost != TIME else ():
            if name in names:
                wrong, instead = Argument(name, f"{getattr(self, name)!r}"), Argument.text("cost", TIME)
                text = " is about costs in seconds, which do not count here. Give "
                raise PteeError(wrong, text, instead, ", too, or leave it out.", value=getattr(self, name))

    @model_validator(mode="before")
    @classmethod
    def _guarantee_is_no_name(cls, values: Any) -> Any:
        """The confidence of exits has a name, and that of a guarantee is a number."""
        if isinstance(values, Mapping) and isinstance(name := values.get("confidence"), str) and not as_shares([name]):
            text = f" must be a number, that of a guarantee, such as 0.95. That of the exits is set in Python: {SET_CONFIDENCE}."
            raise PteeError(Argument("confidence", f"{name!r:.60}"), text, value=name)
        return values

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
            require_no_percentage(self.threshold)
            for name in HOW:
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise PteeError(
                        Argument(name, f"{value}"), " is about thresholds that are chosen, and ", Argument("threshold", f"{self.threshold}"),
                        " is given. Give one of them.", value=value,
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
                Argument("margin", f"{limit:g}"), " or less.", value=self.margin,
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _can_be_promised(self) -> Self:
        level = Argument("confidence", "0.95" if self.confidence is None else f"{self.confidence}")
        if self.each_exit and self.confidence is None and self.threshold is None:
            text = " is about a guarantee. Give its confidence, too: "
            raise PteeError(Argument("each_exit", "True"), text, level, ".", value=True)
        if self.confidence is None or self.threshold is not None:
            return self
        if self.confidence > HIGHEST_CONFIDENCE:
            text = " is higher than what can be computed. Give "
            highest = Argument("confidence", f"{HIGHEST_CONFIDENCE}")
            raise PteeError(level, text, highest, " or less.", value=self.confidence)
        against = {
            "max_cost": (self.max_cost is not None, "a cost is counted, not lost"),
            "margin": (self.margin != "auto", "a guarantee needs no other reserve"),
            "answers": (self.answers == "blended", "the weights of blended answers are fitted to the same images"),
        }
        for name, (given, why) in against.items():
            if given:
                value = getattr(self, name)
                parts = (level, " does not go with ", Argument(name, f"{value}"), f": {why}. Leave one of them out.")
                raise PteeError(*parts, argument=name, value=value)
        return self

    def target(self, labelled: bool) -> Target | None:
        """What thresholds are chosen for; None where they are given.

        Args:
            labelled: the images have labels that are classes of the backbone.
        """
        if self.threshold is not None:
            return None
        for name in TARGETS[1:]:
            if (limit := getattr(self, name)) is not None:
                return Target(name, limit)
        loss = DEFAULT_LOSS if self.max_loss is None else self.max_loss
        return Target("max_drop" if labelled else "max_fidelity_drop", loss)


class DropsConfig(FrozenConfig):
    """The drops of accuracy (without labels: of fidelity) that a comparison chooses thresholds for."""

    drops: tuple[Share, ...] = Field((0.0, 0.005, 0.01, 0.02), min_length=1)


@dataclass(frozen=True)
class Target:
    """What thresholds are chosen for.

    Attributes:
        kind: "max_drop" and "max_fidelity_drop" limit how much accuracy or fidelity is lost against the bare backbone,
            "max_cost" limits the mean cost.
        limit: a fraction: .01 is one point of accuracy, .6 is 60 % of the bare backbone's cost.
    """

    kind: str
    limit: float

    @classmethod
    def given(cls, config: ThresholdsConfig) -> Target:
        """The target that was given; a PteeError if there is none."""
        for kind in EXAMPLES:
            if (limit := getattr(config, kind)) is not None:
                return cls(kind, limit)
        raise no_target()

    @property
    def argument(self) -> Argument:
        """As a person types it."""
        return Argument(self.kind, f"{self.limit:g}")

    def __str__(self) -> str:
        if self.limit < 0:  # a gain
            return f"accuracy at least {-self.limit:g} above the backbone's"
        return WORDS[self.kind].format(self.limit)


def no_target() -> PteeError:
    """The error where thresholds are to be chosen, and it is not said for what."""
    drop, fidelity_drop, cost = (Argument(kind, example) for kind, example in EXAMPLES.items())
    return PteeError("There is no target for the thresholds. Give one: ", drop, ", ", fidelity_drop, " or ", cost, ".")


@dataclass(frozen=True)
class Promise:
    """That a target is kept on new images, and what that costs.

    Attributes:
        confidence: in at most 1 - confidence of all draws of images to choose on, the target is not kept.
        images: number of images that it was tested on.
        each_exit: it is kept among the images that leave at each exit, too.
        threshold: (E) T without the guarantee.
        off: exits that are off without it.
        price: the time if it was measured, else the cost, without it.
    """

    confidence: float
    images: int
    each_exit: bool
    threshold: tuple[float, ...]
    off: tuple[int, ...]
    price: float

    def __str__(self) -> str:
        among = " among those that leave at each exit, too" if self.each_exit else ""
        return f"{among}, guaranteed at {100 * self.confidence:.10g} % by {number_of(self.images, 'image')}"

    def without(self, price: float, unit: str) -> str:
        """What the guarantee costs where thresholds with it have this price, in a sentence."""
        what, thresholds = "expected time" if unit else "cost", describe_thresholds(self.threshold, self.off)
        more = round(price - self.price, 4)
        costs = f"{more:.4f}" if more > 0 else "nothing"
        if more < 0:
            costs += ": the thresholds without it keep more of the limit in reserve for new images"
        return f"Without the guarantee, on average: {what} {self.price:.4f} at T = {thresholds}. The guarantee costs {costs}."


def below(drop: float, limit: float | None = None) -> str:
    """A drop in words, before "the backbone's"; it is seen whether it is within the limit."""
    text = f"{drop:.4f}" if limit is None else beside(drop, limit)
    return f"{text.removeprefix('-')} {'above' if float(text) < 0 else 'below'}"
