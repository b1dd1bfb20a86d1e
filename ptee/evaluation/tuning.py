"""Tuning: thresholds of a model chosen on some images, to be reported on others. `data/splits.py` says which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ptee._common.devices import resolve_device
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
