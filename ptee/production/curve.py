"""The curve that a run keeps: some thresholds, and what each costs and loses. Reading it needs no images and no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError
from ptee._common.text import Readable, number_of, table, threshold_words
from ptee._common.validation import LARGEST_LIMIT, FrozenConfig, Name, Number, ReadRecord, Whole
from ptee.production.few_images import hidden

MOST_POINTS = 1000
ROUNDING = 1e-9  # of means over the images
BARE_TIME = "the bare backbone's time "  # begins the name of a unit of time
ABOVE_ONE = (
    "A cost above 1 is more than the bare backbone's: model.off = range(len(model.exits)) costs 1 and loses nothing."
)
TUNE = "ptee tune RUN --max-drop 0.01 (in Python: ptee.tune(model, images, max_drop=0.01))"

Share = Annotated[Number, Field(ge=0, le=1)]
Drop = Annotated[Number, Field(ge=-1, le=1)]  # below 0 it is a gain
Positive = Annotated[Number, Field(ge=0, le=1e9)]


class Point(ReadRecord):
    """Thresholds, and what they cost and are expected to lose on other images than those that they were chosen on.

    Attributes:
        threshold: (E) T of each exit; above every confidence for exits that are off.
        cost: mean multiply-accumulates of an image, as a fraction of the bare backbone's.
        fidelity_drop: share of the answers that differ from the backbone's.
        drop: by how much accuracy is below the backbone's; None without labels.
        time_ms: expected milliseconds of a batch; None where nothing was measured.
        promised: the largest fidelity drop that was asked for when these thresholds were chosen; None if none was.
    """

    threshold: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MOST_POINTS)]
    cost: Positive
    fidelity_drop: Share
    drop: Drop | None = None
    time_ms: Positive | None = None
    promised: Annotated[Number, Field(ge=0, lt=1)] | None = None

    @property
    def lost(self) -> float:
        """Of accuracy; without labels, of fidelity."""
        return self.fidelity_drop if self.drop is None else self.drop

    @property
    def price(self) -> float:
        """The time if it is known, else the cost."""
        return self.cost if self.time_ms is None else self.time_ms


class Curve(Readable, ReadRecord):
    """The points of one model as it is set: with this confidence, this kind of answers and these exits off. Prints as a table.

    Attributes:
        confidence: a name of `CONFIDENCES`.
        answers: "own" or "blended".
        off: exits that are off.
        images: on which all was measured.
        time_of: the bare backbone's time and, in brackets, how times were measured; empty if they were not.
        points: the thresholds that were chosen, and others of which none is dearer than another and loses more.
    """

    confidence: Name
    answers: Literal["own", "blended"]
    off: Annotated[tuple[Annotated[Whole, Field(ge=0, lt=MOST_POINTS)], ...], Field(max_length=MOST_POINTS)] = ()
    images: Annotated[Whole, Field(ge=1)]
    time_of: Name = ""
    points: Annotated[tuple[Point, ...], Field(min_length=1, max_length=MOST_POINTS)]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        for what in ("drop", "time_ms"):
            if len({getattr(point, what) is None for point in self.points}) > 1:
                raise PteeError(f"curve.points: some have a {what} and others have none.")
        if len({len(point.threshold) for point in self.points}) > 1:
            raise PteeError("curve.points have different numbers of thresholds.")
        if len({*self.off}) < len(self.off) or max(self.off, default=0) >= self.exits:
            raise PteeError(
                f"curve.off={list(self.off)!r:.60} must be numbers of exits, 0 to {self.exits - 1}, each once."
            )
        return self

    @property
    def exits(self) -> int:
        """E."""
        return len(self.points[0].threshold)

    def at(self, threshold: Sequence[float]) -> Point | None:
        """The point of these thresholds, if there is one."""
        return next((point for point in self.points if list(point.threshold) == list(threshold)), None)

    def __str__(self) -> str:
        first = self.points[0]
        known = [name for name in ("cost", "time_ms", "drop", "fidelity_drop") if getattr(first, name) is not None]
        rows = [
            (*(f"{getattr(point, name):.4f}" for name in known), ", ".join(threshold_words(point.threshold, self.off)))
            for point in self.points
        ]
        shown = table([(*(name.replace("_", " ") for name in known), "T"), *rows], left={len(known)})
        drop = "drop: how far accuracy will be below the backbone's. " * (first.drop is not None)
        differ = "fidelity drop: the share of answers that will not be the backbone's. "
        time = f"time ms: of a batch {self.time_of.removeprefix(BARE_TIME)}. " * bool(self.time_of)
        return f"{shown}\nWhat is to be expected, from {number_of(self.images, 'image')}{hidden(self.images)}. {time}{drop}{differ}{self._legend_of_thresholds}"

    @property
    def _legend_of_thresholds(self) -> str:
        words = {word for point in self.points for word in threshold_words(point.threshold, self.off)}
        off = "; off: its head does not run" * ("off" in words)
        never = "; never: no image leaves there, but its head runs" * ("never" in words)
        dear = f" {ABOVE_ONE}" * any(point.cost > 1 for point in self.points)
        return f"T: of each exit{off}{never}.{dear}"


class Wish(FrozenConfig):
    """One limit, of which the others are None."""

    max_cost: Annotated[Number, Field(gt=0, lt=LARGEST_LIMIT)] | None = None
    max_drop: Annotated[Number, Field(gt=-1, lt=1)] | None = None
    max_fidelity_drop: Annotated[Number, Field(ge=0, lt=1)] | None = None
    max_time_ms: Annotated[Number, Field(gt=0)] | None = None

    def only(self) -> tuple[str, float]:
        """Its name and its number."""
        given = {name: limit for name, limit in self.model_dump().items() if limit is not None}
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise PteeError(
                f"Give one of max_cost, max_drop, max_fidelity_drop and max_time_ms: {names} {'is' if len(given) < 2 else 'are'} given."
            )
        return next(iter(given.items()))


def best_within(curve: Curve, wish: Wish) -> Point:
    """The point that loses least within a cost or time, or is cheapest within a drop.

    Of several that lose equally little, it is the one whose answers differ least from the backbone's.
    """
    name, limit = wish.only()
    limited = name.removeprefix("max_")
    values = {point: getattr(point, limited) for point in curve.points}
    if None in values.values():
        raise _not_there(name, limit)
    within = [point for point, value in values.items() if value <= limit + ROUNDING]
    if not within:
        least = min(values.values())
        enough = f"{math.ceil(least * 1e4) / 1e4:.4f}".rstrip("0").rstrip(".")  # a rounded one might be refused
        raise PteeError(
            Argument(name, f"{limit:g}"), f" is below everything on the curve of this run, which begins at {least:.4f}. Give ",
            Argument(name, enough), " or more.", value=limit,
        )  # fmt: skip
    if "drop" in name:
        return min(within, key=lambda point: (point.price, point.lost, point.fidelity_drop))
    return min(within, key=lambda point: (point.lost, point.fidelity_drop, point.price))


def _not_there(name: str, limit: float) -> PteeError:
    if name == "max_time_ms":
        text = (
            "The curve of this run has no times. Measure them and tune by them: ptee bench RUN --save, then ptee tune RUN --max-drop 0.01 "
            "--cost time. In Python: from ptee.timing.measure import measure; ptee.tune(model, data, max_drop=0.01, times=measure(model, "
            "[32]).at(32))"
        )
        return PteeError(text, argument=name, value=limit)
    text = "The images of this run's curve had no labels, so no drop of accuracy is known. Give "
    return PteeError(text, Argument("max_fidelity_drop", "0.01"), ".", argument=name, value=limit)
