"""The settings of the exits: where they stand, what heads stand there, and what says how sure they are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from numbers import Real
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError, unknown
from ptee._common.text import number_of, shown
from ptee._common.validation import FrozenConfig, Number, Whole

AUTO = "auto"  # the name of a head that is as large as its budget allows
FRONT = "front"  # the name of a head that is a network of its own, at the input
PLUS = "+"  # behind the name of a head that builds on the exit before
LEARNED, MAX_PROB, CALIBRATED = "learned", "max_prob", "calibrated"  # names of confidences
OWN, BLENDED = "own", "blended"  # kinds of answers
NEVER, ALWAYS = 2.0, 0.0  # thresholds that no confidence reaches, and that every finite one does
PERCENTAGE = 10  # a threshold above it was meant as a percentage
# What there is by name. Their modules, which need torch, put in what each name stands for, and what a user registers.
HEADS: dict[str, Any] = dict.fromkeys(("plain", "pool", "bnpool", "conv1", "conv2", "conv3"))
CONFIDENCES: dict[str, Any] = dict.fromkeys((LEARNED, MAX_PROB, "entropy", "margin", "patience", CALIBRATED))
OPERATIONS: Literal["operations"] = "operations"
PARAMETERS: Literal["parameters"] = "parameters"
DEFAULT_PLACES = (0.03, 0.4, 0.7)
DEFAULT_BUDGETS = (0.15, 0.03, 0.03)  # of the heads there; the first head is large, so that many images leave at it
PLACES_BEHIND_FRONT = (0.4, 0.7)  # the front takes the place of the first exit

Places = tuple[float | str, ...]
Names = tuple[str, ...]
Shares = tuple[Number, ...]
Budget = Annotated[Number, Field(gt=0)]


class ExitsConfig(FrozenConfig):
    """Where the exits stand and which heads they get. A setting that is None depends on the others."""

    places: str | Number | Places | None = Field(
        None,
        description="Where the exits stand: a rule (pareto, fine, golden, linear or quadratic); fractions of the backbone's cost "
        "such as 0.2,0.5, each for the first block that ends there or later; or names of modules such as layer1,layer2. "
        f"Default: {','.join(map(str, DEFAULT_PLACES))}; pareto where a number of exits is given.",
    )
    number: Whole | None = Field(
        None, ge=1, description="How many exits a rule places. Default: as many as there is room for, at most 5."
    )
    places_by: Literal["operations", "parameters"] = Field(
        OPERATIONS,
        description="What a rule and fractions are shares of: operations, which take the time, or parameters, as in the tables of "
        "EENet's thesis. Its exits stand far later in operations, which every plan shows beside them.",
    )
    head: str | Names | None = Field(
        None,
        description="The heads: auto (a small residual network as large as the head budget allows), pool, bnpool, plain, convN "
        "with a number such as conv2, or a residual network by name such as res-32x2-64x2. One for all exits, or one for each. "
        "With a + behind its name (auto+, conv2+) a head also reads the answer of the exit before it. Default: auto.",
    )
    head_budget: Budget | tuple[Budget, ...] | None = Field(
        None,
        description="What an auto head may cost, as a share of the backbone's cost. One for all exits, or one for each. Default: "
        f"{','.join(map(str, DEFAULT_BUDGETS))} at the default places, else 0.05.",
    )
    front: str | None = Field(
        None,
        description="A small classifier that answers before the backbone, as the first exit: a name as for the backbone, auto-timm "
        "for the one that timm's published results advise, or auto for a head that learns from the images.",
    )
    front_weights: str | None = Field(None, description="A file with the weights of the front network.")
    front_mean: Number | Shares | None = Field(
        None, description="Mean of the pixels that the front network expects, where its own configuration is wrong."
    )
    front_std: Number | Shares | None = Field(None, description="Standard deviation of those pixels, likewise.")

    def resolved(self) -> ExitsConfig:
        """This config with a value in place of every None that depends on another setting."""
        places, head, budget = with_defaults(self.places, self.number, self.head, self.head_budget, self.front)
        return self.changed(places=places, head=head, head_budget=budget)


class ConfidenceConfig(FrozenConfig):
    """What decides how sure an exit is of its answer."""

    name: str | None = Field(
        None,
        description="What says how sure an exit is: calibrated (the largest probability, corrected after the training), learned (the "
        "head's own output), max_prob, entropy, margin or patience. Default: calibrated; learned for the joint losses, which train "
        "it. A number, such as 0.95, guarantees the drop instead (thresholds.confidence).",
    )
    question: Literal["agrees", "right", "best"] = Field(
        "agrees",
        description="What the calibrated confidence is the probability of: agrees (the answer is the backbone's), right (it is "
        "the label) or best (it is the label, or no later exit would give the label).",
    )
    calibration_share: Annotated[Number, Field(gt=0, le=0.5)] = Field(
        0.1, description="Share of the training images that the confidence is calibrated on; no head learns from them."
    )

    @model_validator(mode="after")
    def _only_for_calibrated(self) -> Self:
        for name in ("question", "calibration_share"):
            value = getattr(self, name)
            if self.name not in (None, CALIBRATED) and value != type(self).model_fields[name].default:
                raise PteeError(
                    Argument(name, repr(value)), " is about the calibrated confidence, and this one is ", Argument.text("name", self.name),
                    ". Leave it out.", value=value,
                )  # fmt: skip
        return self


def with_defaults(places: Any, number: int | None, head: Any, budget: Any, front: Any) -> tuple[Any, Any, Any]:
    """Places, head and head budget, with the default in place of each None."""
    given_places = places is not None or number is not None
    head_in_front = front is None or (isinstance(front, str) and front == AUTO)
    if head is None:
        head = f"{AUTO}+" if front is not None and not given_places else AUTO
    if budget is None and not given_places and head_in_front and head in (AUTO, f"{AUTO}+"):
        budget = DEFAULT_BUDGETS
    if places is None:
        places = "pareto" if number is not None else DEFAULT_PLACES if front is None else PLACES_BEHIND_FRONT
    return places, head, budget


def require_confidence(name: str | None) -> None:
    """Refuse a confidence that there is not."""
    if name is not None and name not in CONFIDENCES:
        raise unknown("confidence", str(name), CONFIDENCES, argument="confidence")


def threshold_numbers(value: Any) -> Any:
    """Thresholds as numpy's array of float64: a number, or lists, arrays or tensors of them. Any number is a threshold but NaN.

    Above 1 nobody leaves, and below 0 is as 0. Texts, truth values and what else is no number are refused.
    """
    import numpy as np

    try:
        if type(value) is float and value == value:  # as in most calls
            return np.array(value)
        found = value if isinstance(value, np.ndarray) else np.array(_of_torch(value), dtype=object)
        of_numbers = found.dtype.kind in "iuf"  # else look at each
        if not of_numbers and not all(isinstance(v, Real | Decimal) and not isinstance(v, bool) for v in found.flat):
            raise TypeError("not only numbers")
        found = found.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as why:
        text = f"A threshold is a number or numbers, such as 0.7 or [0.9, 0.8], not {shown(value)}."
        raise PteeError(text, argument="threshold", value=value) from why
    if np.isnan(found).any():
        raise not_a_number(value)
    return found


def _of_torch(value: Any) -> Any:
    """Tensors, also in lists, as numbers of Python; there one number is a number, whatever its shape."""
    if hasattr(value, "detach"):
        return value.detach().cpu().tolist()
    if isinstance(value, list | tuple):
        return [v.item() if getattr(v, "numel", lambda: 0)() == 1 else _of_torch(v) for v in value]
    return value


def with_off(thresholds: Iterable[Any], off: Collection[int]) -> list[Any]:
    """The thresholds of the exits, `NEVER` where an exit is off."""
    return [NEVER if n in off else t for n, t in enumerate(thresholds)]


def not_a_number(value: Any) -> PteeError:
    """The error of thresholds among which there is NaN."""
    text = "A threshold is NaN: no confidence can be compared with it. Give numbers, such as 0.7."
    return PteeError(text, argument="threshold", value=value)


def doubt(threshold: Sequence[float] | None) -> str | None:
    """A sentence about thresholds that were meant as percentages: h lies between 0 and 1. Others above 1 are a way to say never."""
    percent = [n for n, t in enumerate(threshold or ()) if PERCENTAGE < t <= 100]
    if not threshold or not percent:
        return None
    meant = ",".join(f"{t / 100 if n in percent else t:g}" for n, t in enumerate(threshold))
    at = f" at exit {' and '.join(map(str, percent))}" if min(threshold) <= 1 else ""
    return f"T above 1: nobody leaves{at}. A confidence lies between 0 and 1: did you mean {meant}?"


def require_no_percentage(threshold: float | Sequence[float] | None) -> None:
    """Refuse thresholds that were meant as percentages, before a training after which nobody would leave."""
    if words := doubt([threshold] if isinstance(threshold, int | float) else threshold):
        raise PteeError(words, argument="threshold", value=threshold)


def remark(threshold: Sequence[float] | None) -> str | None:
    """The same, or a sentence about thresholds at which every image leaves at exit 0, or none leaves."""
    if threshold and min(threshold) > 1:
        return doubt(threshold) or "T above 1: nobody leaves."
    if threshold and threshold[0] <= 0:
        return doubt(threshold) or "T at or below 0: everybody leaves at exit 0."
    return doubt(threshold)


def wrong_number(thresholds: str, exits: int, value: Any) -> PteeError:
    """The error of so many thresholds, in words, of which `value` was given."""
    return PteeError(
        f"There are {thresholds} thresholds for {number_of(exits, 'exit')}. Give one number, or one for each exit.",
        argument="threshold",
        value=value,
    )
