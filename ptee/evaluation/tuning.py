"""Tuning: thresholds of a model chosen on some images, to be reported on others.

Thresholds want images that neither the heads nor, where that can be had, the backbone were trained on. Where the data
deliver calibration images, those are taken. Where they deliver validation images alone, half of these are: what was drawn
from the training images is known to the backbone too well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from ptee._common.devices import resolve_device
from ptee._common.errors import DataError
from ptee.data.sources import Data
from ptee.evaluation.targets import Solution, Target, solve_target
from ptee.evaluation.traces import record
from ptee.model.early_exit import EarlyExitModel, require_early_exit

BOTH_SIDES = 1.96  # standard deviations, between which are 95 %


def tune(
    model: EarlyExitModel,
    data: Any,
    *,
    max_drop: float | None = None,
    max_fidelity_drop: float | None = None,
    max_cost: float | None = None,
    one: bool = False,
    margin: float | str = 0.0,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str | torch.device | None = None,
) -> Solution:
    """Choose a model's thresholds on data, by one target, and set them; exits that do not pay are switched off.

    Report on other images than these.

    Args:
        model: any early-exit model; its heads are trained.
        data: a map-style data set of (image, label) or (image,), or a loader, of images that nothing was trained on.
        max_drop: largest loss of accuracy against the bare backbone: 0.01 is one point. Needs labels.
        max_fidelity_drop: largest share of answers that are not the backbone's.
        max_cost: largest mean cost, as a fraction of the bare backbone's; what loses least within it is chosen.
        one: the same threshold for all exits.
        margin: how much of that limit is kept in reserve, as other images lose more than those it was chosen on; "auto" as
            in `solve`.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the model is.

    Returns:
        The thresholds, the exits that do not pay, and what they come to on these data.

    Raises:
        PteeError: if there is not exactly one target, or it cannot be met; then what can be is said.
    """
    require_early_exit(model)
    target = Target.only({"max_drop": max_drop, "max_fidelity_drop": max_fidelity_drop, "max_cost": max_cost})
    home, was_training = next(model.heads.parameters()).device, model.training
    try:
        model.to(home if device is None else resolve_device(device))
        traces = record(model, data, batch_size=batch_size, num_workers=num_workers, logits=False)
    finally:
        model.to(home).train(was_training)
    found = solve_target(traces, target, one=one, margin=margin)
    model.threshold, model.off = found.threshold, found.off
    return found


class Parts(NamedTuple):
    """Images to choose thresholds on, others to report on, and which those are, in words."""

    calibration: Any
    report: Any
    chosen_on: str
    reported_on: str

    @property
    def words(self) -> str:
        """A sentence, where thresholds are chosen on these images."""
        return f"Thresholds are chosen on {self.chosen_on} and reported on {self.reported_on}."

    @property
    def words_of_others(self) -> str:
        """A sentence, where others are given than those that were chosen on these images."""
        return f"The run's own thresholds were chosen on {self.chosen_on} and those given are measured on {self.reported_on}."


def parts_for_tuning(data: Data, unseen: Any, seed: int) -> Parts:
    """Which images thresholds are chosen on, and which are left to report on. The same seed gives the same ones.

    Args:
        data: as it was opened.
        unseen: what can be reported on if nothing is tuned: `data.validation`, or all of it.
        seed: of the halves.

    Raises:
        DataError: if there are too few images.
    """
    whole, delivered = unseen is data.validation, data.split["parts"]
    if whole and ("calibration" in delivered or "validation" not in delivered):
        n, m = _size(data.calibration), _size(unseen)
        return Parts(data.calibration, unseen, f"the {n:,} calibration images", f"the {m:,} validation images")
    n = _size(unseen)
    if n < 2:
        raise DataError(f"Thresholds are chosen on some images and reported on others, but {data.source} has {n}.")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, left = sorted(order[: n // 2]), sorted(order[n // 2 :])
    kind = "validation images" if whole else "images"
    drawn = f"{len(chosen):,} of the {n:,} {kind}, drawn with seed {seed},"
    return Parts(Subset(unseen, chosen), Subset(unseen, left), drawn, f"the other {len(left):,}")


class Unseen(NamedTuple):
    """What a run has not seen of its data.

    Attributes:
        run: its name.
        data: as it was opened.
        images: that can be reported on: `data.validation`, or all of it.
        seed: of the halves, and of what was drawn.
    """

    run: str
    data: Data
    images: Any
    seed: int


def parts_for_all(runs: Sequence[Unseen]) -> Parts:
    """As `parts_for_tuning`, of images that none of several runs has seen.

    Raises:
        DataError: if they were made with other data, or other images of theirs were drawn for each.
    """
    strict = [own for own in runs if own.images is own.data.validation] or list(runs)
    first = strict[0]
    for own in runs:
        if own.data.source != first.data.source:
            raise DataError(
                f"{first.run} was measured on {first.data.source}, {own.run} on {own.data.source}. Give the same images "
                "to all: --data FOLDER."
            )
    for own in strict:
        if "validation" not in own.data.split["parts"] and own.data.split["rule"] != first.data.split["rule"]:
            raise DataError(
                f"{own.data.source} delivers no validation images, and {first.run} and {own.run} drew theirs with other "
                f"seeds ({first.seed}, {own.seed}), so each was trained on the other's. Give images of their own: --data FOLDER."
            )
    return parts_for_tuning(first.data, first.images, first.seed)


def describe_outcome(solution: Solution, results: Mapping[str, Any]) -> str:
    """How a target fares on the images that are reported on, and how well that is known, in a sentence.

    Args:
        solution: found on other images.
        results: JSON-able, of an evaluation on these.
    """
    target, backbone, own = solution.target, results["rows"][0], results["rows"][-1]
    found, n = f"a cost of {own['cost']:.4f}", results["samples"]
    if target.kind == "max_drop" and own["accuracy"] is not None:
        drop = backbone["accuracy"] - own["accuracy"]
        found = f"{abs(drop):.4f} of accuracy {'gained' if drop < 0 else 'lost'}"
    elif target.kind != "max_cost":
        found = f"{1 - own['fidelity']:.4f} of fidelity lost"
    if target.kind != "max_cost":
        # Other answers lose one each at most. Agresti and Coull: with two more of either kind, none is not taken for never.
        others = ((1 - own["fidelity"]) * n + 2) / (n + 4)
        found += f", give or take {BOTH_SIDES * math.sqrt(others / (n + 4)):.4f} on {n:,} images"
    return f"Asked for {target}; on images that the thresholds were not chosen on: {found}."


def _size(part: Any) -> int:
    return len(part)
