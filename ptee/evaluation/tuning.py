"""Tuning: choose a model's thresholds on some images, to report on others; and decide which images those are.

Thresholds need images that the heads were not trained on, and the backbone neither if possible. Where the data come with
calibration images, those are taken. Where they come with validation images only, one half of these is: the backbone was
trained on all training images, so a part of those would make it look too good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from ptee._common.devices import resolve_device
from ptee._common.errors import Argument, DataError
from ptee.data.sources import Data
from ptee.evaluation.config import ThresholdsConfig
from ptee.evaluation.targets import DEFAULTS, Margin, Solution, Target, below, solve_target
from ptee.evaluation.threshold_search import ROUNDING
from ptee.evaluation.traces import record
from ptee.model.early_exit import EarlyExitModel, require_early_exit

WITHIN = 1.96  # standard deviations to either side hold 95 % of a normal distribution


def tune(
    model: EarlyExitModel,
    data: Any,
    *,
    max_drop: float | None = None,
    max_fidelity_drop: float | None = None,
    max_cost: float | None = None,
    one_threshold: bool = DEFAULTS.one_threshold,
    margin: Margin = DEFAULTS.margin,
    batch_size: int = 128,
    num_workers: int = 0,
    device: str | torch.device | None = None,
) -> Solution:
    """Choose a model's thresholds for one target, and set them. Exits that do not pay are switched off.

    Report on other images than these.

    Args:
        model: any early-exit model with trained heads.
        data: a map-style data set of (image, label) or (image,), or a loader, of images that nothing was trained on.
        max_drop: the lowest cost at which accuracy is at most this much below the bare backbone's; 0.01 is one point. Needs
            labels.
        max_fidelity_drop: the lowest cost at which at most this share of the answers differs from the backbone's.
        max_cost: the best answers at this mean cost or less, as a fraction of the bare backbone's.
        one_threshold: the same threshold for all exits.
        margin: how much of the limit is kept in reserve, because new images lose more than those that T is chosen on. "auto":
            how much more is estimated by cross-validation.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the model is.

    Returns:
        The thresholds, the exits that are off, and accuracy, fidelity and cost on these data.

    Raises:
        PteeError: if there is not exactly one target, or it cannot be met; the message says what can be.
    """
    require_early_exit(model)
    config = ThresholdsConfig(
        max_drop=max_drop, max_fidelity_drop=max_fidelity_drop, max_cost=max_cost, one_threshold=one_threshold, margin=margin
    )  # fmt: skip
    target = Target.given(config)
    home, was_training = next(model.heads.parameters()).device, model.training
    try:
        model.to(home if device is None else resolve_device(device))
        traces = record(model, data, batch_size=batch_size, num_workers=num_workers, logits=False)
    finally:
        model.to(home).train(was_training)
    found = solve_target(traces, target, one_threshold=config.one_threshold, margin=config.margin)
    model.threshold, model.off = found.threshold, found.off
    return found


class Parts(NamedTuple):
    """Images to choose thresholds on, other images to report on, and words for both."""

    calibration: Any
    report: Any
    chosen_on: str
    reported_on: str

    @property
    def words(self) -> str:
        """A sentence for thresholds that are chosen on these images."""
        return f"Thresholds are chosen on {self.chosen_on} and reported on {self.reported_on}."

    @property
    def words_of_others(self) -> str:
        """A sentence for thresholds that are given, while the run's own were chosen on these images."""
        return (
            f"The run's own thresholds were chosen on {self.chosen_on}. Those given are measured on {self.reported_on}."
        )


def parts_for_tuning(data: Data, unseen: Any, seed: int) -> Parts:
    """Which images thresholds are chosen on, and which are left to report on. The same seed gives the same images.

    Args:
        data: as it was opened.
        unseen: images that no head was trained on: `data.validation`, or all of the data.
        seed: of the random halves.

    Raises:
        DataError: if there are too few images.
    """
    whole, delivered = unseen is data.validation, data.split["parts"]
    if whole and ("calibration" in delivered or "validation" not in delivered):
        n, m = _size(data.calibration), _size(unseen)
        return Parts(data.calibration, unseen, f"the {n:,} calibration images", f"the {m:,} validation images")
    n = _size(unseen)
    if n < 2:
        raise DataError(
            f"Thresholds are chosen on some images and reported on others, but {data.source} has {n}. Give more images: ",
            Argument("data", "FOLDER"), ".",
        )  # fmt: skip
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, left = sorted(order[: n // 2]), sorted(order[n // 2 :])
    kind = "validation images" if whole else "images"
    drawn = f"{len(chosen):,} of the {n:,} {kind}, drawn with seed {seed},"
    return Parts(Subset(unseen, chosen), Subset(unseen, left), drawn, f"the other {len(left):,}")


class Unseen(NamedTuple):
    """Images that the heads of a run were not trained on.

    Attributes:
        run: its name.
        data: as it was opened.
        images: that can be reported on: `data.validation`, or all of the data.
        seed: of everything that is drawn from the data.
    """

    run: str
    data: Data
    images: Any
    seed: int


def parts_for_all(runs: Sequence[Unseen]) -> Parts:
    """As `parts_for_tuning`, with images that the heads of none of several runs were trained on.

    Raises:
        DataError: if the runs were made with other data, or with other random parts of the same data.
    """
    strict = [own for own in runs if own.images is own.data.validation] or list(runs)
    first = strict[0]
    for own in runs:
        if own.data.source != first.data.source:
            raise DataError(
                f"{first.run} was measured on {first.data.source}, {own.run} on {own.data.source}. Give the same images to all "
                "runs: ", Argument("data", "FOLDER"), ".",
            )  # fmt: skip
    for own in strict:
        if "validation" not in own.data.split["parts"] and own.data.split["rule"] != first.data.split["rule"]:
            raise DataError(
                f"{own.data.source} has no validation images of its own, and {first.run} and {own.run} drew theirs with "
                f"different seeds ({first.seed}, {own.seed}), so each was trained on images of the other. Give other images: ",
                Argument("data", "FOLDER"), ".",
            )  # fmt: skip
    return parts_for_tuning(first.data, first.images, first.seed)


def describe_outcome(solution: Solution, results: Mapping[str, Any]) -> str:
    """Whether a target was kept or missed on the images that are reported on, by how much, and how certain that is.

    Args:
        solution: found on other images.
        results: JSON-able, of an evaluation on these.
    """
    target, backbone, own, n = solution.target, results["rows"][0], results["rows"][-1], results["samples"]
    if target.kind == "max_cost":
        found, words = own["cost"], f"{own['cost']:.4f}"
    elif target.kind == "max_fidelity_drop" or own["accuracy"] is None:
        found = 1 - own["fidelity"]
        words = f"{found:.4f} of the answers differ (uncertainty {_uncertainty(own['fidelity'], n):.4f})"
    else:
        found = backbone["accuracy"] - own["accuracy"]
        words = f"{below(found)} (uncertainty {_uncertainty(own['fidelity'], n):.4f})"
    outcome = f"{'Kept' if found <= target.limit + ROUNDING else 'Missed'} on {n:,} other images"
    if target.kind == "max_drop" and own["accuracy"] is None:
        outcome = f"Not known for {n:,} other images, which have no labels"
    return f"Target: {target}. {outcome}: {words}."


def _uncertainty(fidelity: float, n: int) -> float:
    """Half the width of a 95 % interval of what is lost, on n images.

        1.96 sqrt(p / (n + 4)),  p = (n (1 - fidelity) + 2) / (n + 4)

    Only answers that differ from the backbone's can lose anything, each of them one image at most, so p bounds the variance. Two
    images are added to either side (Agresti and Coull, 1998), because none in a few images does not mean never.
    """
    p = (n * (1 - fidelity) + 2) / (n + 4)
    return WITHIN * math.sqrt(p / (n + 4))


def _size(part: Any) -> int:
    return len(part)
