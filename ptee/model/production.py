"""What an early-exit model offers once it is in use: other thresholds without images, and a monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptee._common.errors import PteeError, warn
from ptee._common.text import describe_thresholds
from ptee._common.validation import checked
from ptee.model.forward import ExitOutput, running
from ptee.model.images import detached
from ptee.production.curve import ABOVE_ONE, ROUNDING, TUNE, Curve, Wish, best_within
from ptee.production.few_images import too_few
from ptee.production.monitor import AT_ONCE, AUDIT, CONFIDENCE, Monitor, MonitorConfig, new_monitor
from ptee.production.settings import fitted

SLIPS = {  # names that would be taken without a word, and change nothing
    **dict.fromkeys(("thresholds", "treshold", "tresholds", "thresold", "threshhold"), "threshold"),
    **dict.fromkeys(("confidences", "confidence_name"), "confidence"),
    **dict.fromkeys(("offs", "exits_off", "off_exits"), "off"),
    **{name.capitalize(): name for name in ("threshold", "confidence", "answers", "off")},
}


class InProduction:
    """Part of `EarlyExitModel`.

    Attributes:
        monitored: the monitor that watches this model, or None.
    """

    monitored: Monitor | None = None
    _curve: tuple[Curve | None, Any] = (None, None)  # the curve, and what was fitted when it was made

    if TYPE_CHECKING:
        threshold: Any
        confidence: Any
        answers: Any
        off: Any
        backbone: Any
        _hold: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SLIPS:
            raise PteeError(
                f"An early-exit model has no {name}. Did you mean model.{SLIPS[name]}?", argument=name, value=value
            )
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)  # torch would keep a parameter of a user's as the model's own
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The first line of `print(model)`: what is decided now, before the modules."""
        return (
            f"T = {describe_thresholds(self.threshold, self.off)}; confidence {self.confidence}; answers {self.answers}"
        )

    @property
    def curve(self) -> Curve | None:
        """What some thresholds cost and lose, as `ptee.tune` measured it.

        None for a model that was never tuned, and as soon as the weights of its blended answers, or the numbers of its calibrated
        confidence, are others than those that the curve was made with.
        """
        curve, made_with = self._curve
        return curve if curve is not None and made_with == fitted(self, curve.answers, curve.confidence) else None

    @curve.setter
    def curve(self, value: Curve | None) -> None:
        self._curve = value, None if value is None else fitted(self, value.answers, value.confidence)

    @property
    def for_fidelity(self) -> bool:
        """Whether the thresholds in force were chosen for fidelity. False if that is not known."""
        point = None if self.curve is None else self.curve.at(self.threshold)
        return point is not None and point.promised is not None

    @checked
    def threshold_for(
        self,
        *,
        max_cost: float | None = None,
        max_drop: float | None = None,
        max_fidelity_drop: float | None = None,
        max_time_ms: float | None = None,
    ) -> list[float]:
        """Thresholds from the curve that `ptee.tune`, `ptee.fit` and `ptee augment` keep: no images are needed.

        They are those that lose least at this cost or time, or the cheapest that lose no more. Drops are those on other images, by
        cross-validation: on average over many runs, no more is lost than is asked for, save some hundredths of a point where next to
        nothing may be. One run may lose more. For a guarantee, and to switch exits on and off, tune again. `tune` is less careful, so
        for the same drop its thresholds may be cheaper.

        Args:
            max_cost: the mean cost, as a fraction of the bare backbone's.
            max_drop: of accuracy; 0.01 is one point.
            max_fidelity_drop: share of the answers that differ from the backbone's.
            max_time_ms: milliseconds of a batch, where thresholds were chosen by times (`model.curve.time_of` says of which batch).

        Returns:
            One threshold for each exit, for `model.threshold = ...`; above every confidence where no image leaves. A warning says so if the
                curve was measured on too few images for such a drop, and if they cost more than the bare backbone, counted.

        Raises:
            PteeError: if there is no curve, it was made for other settings, or nothing on it is within the limit.
        """
        wish = Wish(max_cost=max_cost, max_drop=max_drop, max_fidelity_drop=max_fidelity_drop, max_time_ms=max_time_ms)
        name, limit = wish.only()
        point = best_within(curve := self.valid_curve(), wish)
        if name.endswith("drop") and (few := too_few(curve.images, limit)):
            warn(few)
        if point.cost > 1 + ROUNDING:
            cheaper = ": on this curve nothing cheaper is within the limit" if name.endswith("drop") else ""
            warn(f"These thresholds cost {point.cost:.4f} times the bare backbone, counted{cheaper}. {ABOVE_ONE}")
        return list(point.threshold)

    def valid_curve(self) -> Curve:
        """The curve, if it is of this model as it is set now; else a PteeError."""
        curve = self.curve
        if curve is None:
            words = "no curve: no thresholds were chosen on images since its heads were trained or calibrated. Type"
            if self._curve[0] is not None:
                words = "no curve any more: the weights of blended answers or the calibration that it was made with have changed. Tune again:"
            raise PteeError(f"This model has {words} {TUNE}.")
        made_for = {name: getattr(curve, name) for name in ("confidence", "answers", "off")}
        for name, value in made_for.items():
            if value != (now := getattr(self, name)):
                raise PteeError(f"The curve was made with {name}={value!r}, and now it is {now!r}. Tune again: {TUNE}.")
        return curve

    @checked
    def monitor(
        self,
        *,
        audit: float = AUDIT,
        confidence: float = CONFIDENCE,
        max_fidelity_drop: float | None = None,
        on_alarm: str | Callable[[Monitor], Any] | None = None,
        seed: int | None = None,
    ) -> Monitor:
        """Watch this model from now on: count what leaves where, and test whether its promise is still kept.

        A random share of the images goes through the backbone, too, and their answers are compared; no answer changes. The monitor
        ends with `stop()`, or at the end of a `with` block. It sees `model(x)`, `model.predict(x)`, and those of `ptee.optimize(model)`;
        not soft answers, and no model that was exported. An audit that fails never costs an answer: it is counted as failed.

        The promise is of the model as it is now. Calls with a threshold of their own are counted, not audited; so is every call after
        a change of `threshold`, `off`, `answers` or `confidence`, which a warning tells, until that is changed back.
        `monitor.renew(...)` promises for the model as it is then. After training, stop the monitor and begin another.

        Args:
            audit: the share. 0: only count. `monitor.images_to_find(0.05)` says how soon so many differing answers would be found.
            confidence: an alarm is false with probability 1 - confidence at most, however long the model is watched.
            max_fidelity_drop: the promise: no more of the answers than this differ from the backbone's. None: what the thresholds
                in force were chosen for; if they were chosen for something else, the promise must be given.
            on_alarm: "never_leave" sets all thresholds above 1, so that the backbone answers every image; or a function, called once
                with the monitor. None: nothing, look at `alarm`.
            seed: of the drawing. None: another each time.

        Raises:
            PteeError: for values that are not possible, where nothing is promised, or if there is a monitor already.
        """
        if self._hold.released:
            raise detached()
        settings = MonitorConfig(
            audit=audit, confidence=confidence, max_fidelity_drop=max_fidelity_drop, on_alarm=on_alarm, seed=seed
        )  # fmt: skip
        self.monitored = new_monitor(self, settings)
        return self.monitored

    def bare(self, x: Tensor) -> Tensor:
        """The backbone's own answer to images, outside of any call of this model. It stays frozen; an autocast that is on holds."""
        self._hold.keep()
        with running(None), torch.no_grad():
            answer: Tensor = self.backbone(x)
            return answer

    def watching(self, x: Tensor, *, audited: bool, at_once: int = AT_ONCE) -> Callable[[ExitOutput], ExitOutput]:
        """Called with images before they are answered; what it returns is called with the answers, and gives them back.

        It must be called in the number types of the answers, that is in the same autocast. Arguments as of `Monitor.watch`.
        """
        watch = self.monitored
        if watch is None or watch.model is not self:  # a copy of a model is not watched
            return unseen
        return watch.watch(x, audited=audited, at_once=at_once)


def unseen(out: ExitOutput) -> ExitOutput:
    """The answers, with nobody watching."""
    return out
