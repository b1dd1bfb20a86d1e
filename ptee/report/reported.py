"""All that a page says about a run, as it is handed to what draws and words it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptee.evaluation.comparison_table import Comparison
from ptee.exits.config import with_off
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel
from ptee.report import facts
from ptee.tuning.traces import Traces
from ptee.tuning.tune import target_in_force


@dataclass(frozen=True)
class Reported:
    """A run, and all that a page says about it.

    Attributes:
        run: how its folder is typed; empty if there is none.
        model: opened.
        metrics: what the run recorded: `results`, `training`.
        traces: of the report images, with the answers that the model gives; None if no image was read.
        comparison: with the alternatives, on the same images.
        images: these, as a map-style data set; None for no pictures.
        names: of the classes.
        about: which images these are, in sentences.
        recipe: as YAML, or empty.
        times: of the pieces, if the run keeps them.
        folders: of the runs that are compared, by name.
        in_python: what to type is Python, as the commands cannot open this network.
    """

    run: str
    model: EarlyExitModel
    metrics: Mapping[str, Any]
    traces: Traces | None = None
    comparison: Comparison | None = None
    images: Any = None
    names: Sequence[str] = ()
    about: str = ""
    recipe: str = ""
    times: BatchTimes | None = None
    folders: Mapping[str, str] = field(default_factory=dict)
    in_python: bool = False

    @property
    def results(self) -> Mapping[str, Any]:
        """What was measured when the run was made."""
        return self.metrics.get("results") or {}

    @property
    def target(self) -> Mapping[str, Any] | None:
        """Kind and limit that the thresholds were chosen for, and the unit of a time; None if none, or if others were set since."""
        return target_in_force(self.results.get("tuning"), self.model)

    def target_drop(self, labelled: bool) -> float | None:
        """The drop that the thresholds were chosen for: of accuracy on images with labels, of fidelity on others."""
        target, kind = self.target, "max_drop" if labelled else "max_fidelity_drop"
        return float(target["limit"]) if target is not None and target["kind"] == kind else None

    @property
    def own(self) -> facts.Step | None:
        """What the run's own thresholds give, on the report images or as it was recorded."""
        if self.traces is None:
            return facts.recorded(self.results)
        return facts.step(self.traces, self.model.threshold, self.model.off)

    @property
    def leaving(self) -> Any:
        """(n,) the exit at which each image leaves at the run's own thresholds."""
        assert self.traces is not None
        return self.traces.leaving(with_off(self.model.threshold, self.model.off))
