"""A solution: the thresholds that were chosen for a target, what they give, and how that is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ptee._common.text import Readable, describe_thresholds, number_of
from ptee.exits.blend import Blend, Exits
from ptee.production.curve import BARE_TIME
from ptee.production.few_images import too_few, too_few_for_cost
from ptee.tuning.config import Promise, Target, below
from ptee.tuning.traces import Score, Traces

RISKY = (
    "Other thresholds would cost less here, but would probably lose more than the limit on new images. "
    "ptee tune RUN --{} {:g} --margin 0 (in Python: margin=0) takes them nevertheless."
)


@dataclass(frozen=True)
class Solution(Readable):
    """Thresholds that were chosen, and what they give on the images that they were chosen on. Prints as text.

    Attributes:
        target: what they were chosen for.
        threshold: (E) T of each exit; above every confidence for exits that are off.
        off: exits that do not pay: no image leaves there, and their heads do not run.
        score: accuracy, fidelity and cost on those images. For blended answers, accuracy and fidelity are those of weights that
            were fitted to other images, and the cost is that of the final ones.
        backbone: the same of the bare backbone.
        samples: number of images.
        margin: how much of the target's limit was kept in reserve for other images.
        blend: the weights of blended answers; None if each exit answers by itself.
        remark: why answers are not blended although they were to be, in a sentence; else empty.
        unit: what the time is a fraction of, in words; empty if the cost was counted.
        promise: the guarantee that the target is kept; None if it is kept on average.
        several_risky: several thresholds would cost less, but need more reserve than the whole limit, so there is one for all.
    """

    target: Target
    threshold: tuple[float, ...]
    off: tuple[int, ...]
    score: Score
    backbone: Score
    samples: int
    margin: float = 0.0
    blend: Blend | None = None
    remark: str = ""
    unit: str = ""
    promise: Promise | None = None
    several_risky: bool = False

    @property
    def cost(self) -> float:
        """Mean cost, counted."""
        return self.score.cost

    @property
    def price(self) -> float:
        """What is to be as low as possible: the time if it was measured, else the cost."""
        return self.score.price

    @property
    def drop(self) -> float | None:
        """By how much the accuracy is below the bare backbone's; negative where it is above. None without labels."""
        if self.score.accuracy is None or self.backbone.accuracy is None:
            return None
        return self.backbone.accuracy - self.score.accuracy

    @property
    def fidelity_drop(self) -> float:
        """Share of the answers that differ from the backbone's."""
        return 1 - self.score.fidelity

    @property
    def on_exits(self) -> Exits:
        """The exits that are on."""
        return tuple(n for n in range(len(self.threshold)) if n not in self.off)

    @property
    def weights_fitted(self) -> bool:
        """Answers are blended with weights that were fitted to the images. Of too few, all answers weigh the same."""
        return self.blend is not None and not self.blend.remark

    def on(self, traces: Traces) -> Score:
        """Accuracy, fidelity and cost of these thresholds on other traces of the same model."""
        traces = self.answering(traces)
        return traces.score(traces.leaving(self.threshold), self.off)

    def answering(self, traces: Traces) -> Traces:
        """Traces of own answers, with the answers that these thresholds were chosen for."""
        return traces.blended(self.blend, self.on_exits) if self.blend is not None else traces

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        values = asdict(replace(self, blend=None)) | {"blend": self.blend and self.blend.to_dict()}
        return values | {"threshold": list(self.threshold), "off": list(self.off), "drop": self.drop}

    def __str__(self) -> str:
        drop, s = self.drop, self.score
        accuracy = "" if drop is None else f"accuracy {s.accuracy:.4f} ({below(drop)} the backbone's), "
        on_these = (
            f"On the {number_of(self.samples, 'image')} that this was chosen on: {accuracy}fidelity {s.fidelity:.4f}, "
        )
        lines = [
            f"Target: {self.target}{self._how_sure}.",
            f"Chosen: {self._chosen}",
            f"{on_these}cost {s.cost:.4f} of the multiply-accumulates{self._time}.{self._with_weights}",
            self._too_few,
            self._few_images,
            self.remark,
            self.promise.without(self.price, self.unit) if self.promise else "",
        ]
        return "\n".join(filter(None, lines))

    @property
    def _how_sure(self) -> str:
        if self.promise is not None:
            return str(self.promise)
        reserve = f", with {self.margin:.4f} of that in reserve for new images" if self.margin else ""
        return reserve if self.target.kind == "max_cost" else f", on average{reserve}"

    @property
    def _with_weights(self) -> str:
        """Which of the two losses of blended answers this is; `ptee compare` names that of the final weights, as the cost is here."""
        what = "Fidelity" if self.drop is None else "Accuracy and fidelity"
        return f" {what}: no image is answered by a blend that was fitted to it." if self.weights_fitted else ""

    @property
    def _or_unsafe(self) -> str:
        return " or are not shown to be good enough" if self.promise and self.promise.each_exit else ""

    @property
    def _too_few(self) -> str:
        """The whole limit is in reserve, or it is less than several thresholds need."""
        if self.promise is not None:
            return ""
        if self.several_risky:
            return RISKY.format(self.target.kind.replace("_", "-"), self.target.limit)
        if not 0 < self.target.limit <= self.margin:
            return ""
        return "All that may be lost is in reserve: with more images to choose on, less reserve is needed, and more is saved."

    @property
    def _few_images(self) -> str:
        """Where a loss as large as the limit may well not show on the images at all, or their mean cost is not that of others."""
        on_average = self.promise is None and bool(self.on_exits)
        of_cost = self.target.kind == "max_cost"
        few = too_few_for_cost(self.samples) if of_cost else too_few(self.samples, self.target.limit)
        return few if on_average else ""

    @property
    def _time(self) -> str:
        return "" if self.score.time is None else f", expected time {self.score.time:.4f} of {self.unit}"

    @property
    def _chosen(self) -> str:
        if len(self.off) == len(self.threshold):
            if self.promise:
                return "all exits off; the backbone answers every image."
            if self.unit:
                how = self.unit.removeprefix(BARE_TIME)
                return f"all exits off: nothing within the target is faster than the bare backbone {how}."
            return "all exits off, because none of them pays; the backbone answers every image."
        off = (
            f" Exits that are off do not pay{self._or_unsafe}, and the cost is without their heads." if self.off else ""
        )
        blended = " Answers are blended." if self.blend else ""
        remark = f" {self.blend.remark}" if self.blend and self.blend.remark else ""
        return f"T = {describe_thresholds(self.threshold, self.off)}.{off}{blended}{remark}"
