"""What a target can ask of some images: labels for an accuracy, a cost that is possible, a gain that there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from ptee._common.errors import Argument, DataError, PteeError
from ptee.data.labels import near_chance
from ptee.production.curve import ROUNDING
from ptee.tuning.candidates import Candidate, searched
from ptee.tuning.config import EXAMPLES, Target
from ptee.tuning.threshold_search import Problem
from ptee.tuning.traces import Traces

Margin = float | Literal["auto"]


def losses_of(traces: Traces, target: Target) -> Tensor:
    """(E+1, n) what leaving at each exit loses, of fidelity where that is limited."""
    require_labels(target, labelled=traces.targets is not None, why=traces.note)
    return (replace(traces, targets=None) if target.kind == "max_fidelity_drop" else traces).losses


def require_labels(target: Target, labelled: bool, why: str = "") -> None:
    """Refuse a limit on the drop of accuracy if there is no accuracy.

    Args:
        target: of any kind.
        labelled: the images have labels that are classes of the backbone.
        why: they have none, in a sentence.
    """
    if target.kind == "max_drop" and not labelled:
        raise PteeError(
            why or "These images have no labels that are classes of the backbone.", " So a drop of accuracy cannot be limited. Give ",
            Argument("max_fidelity_drop", f"{target.limit:g}"), " or ", Argument("max_cost", EXAMPLES["max_cost"]), ".",
            argument="max_drop", value=target.limit,
        )  # fmt: skip


def require_right(target: Target, traces: Traces, num_classes: int) -> None:
    """Refuse a limit on the drop of accuracy where the labels show no accuracy: any wrong answer would count as a gain."""
    if target.kind != "max_drop" or traces.targets is None:
        return
    right = (traces.bare == traces.targets).double().mean().item()
    if words := near_chance(right, len(traces.targets), num_classes):
        raise DataError(
            target.argument, f" needs labels under which the backbone is right. {words}. Check that the labels are its class numbers, or "
            "give ", Argument("max_fidelity_drop", f"{target.limit:g}"), ".", value=target.limit,
        )  # fmt: skip


def require_reachable(target: Target, least: float, margin: Margin) -> None:
    """Refuse a limit on the cost that is lower than the least cost, which is that of leaving at the cheapest exit alone."""
    reserve = 0.0 if isinstance(margin, str) else margin
    possible = min(least, 1.0)  # with all exits off
    if target.kind != "max_cost" or target.limit - reserve >= possible - ROUNDING:
        return
    without_margin = (" less ", Argument("margin", f"{reserve:g}")) if reserve else ()
    enough = math.ceil((possible + reserve - ROUNDING) * 100) / 100
    raise PteeError(
        target.argument, *without_margin, f" cannot be reached: the lowest possible cost is {possible:.4f} of the bare backbone's. "
        "Give ", Argument("max_cost", f"{enough:g}"), " or more.", value=target.limit,
    )  # fmt: skip


def unreachable(
    target: Target,
    candidates: Sequence[Candidate] = (),
    one_threshold: bool = False,
    margin: Margin = 0.0,
    who: str = "on these images the exits",
) -> PteeError:
    """The error of a target that no thresholds meet. With candidates it says what can be had of a gain, and `who` gains that."""
    if target.kind == "max_cost":  # the cheapest exit alone would meet it
        text = " cannot be met: too many confidences are NaN. Train the heads again."
        return PteeError(target.argument, text, value=target.limit)
    reserve = 0.0 if isinstance(margin, str) else margin
    if not candidates:
        less = (" less ", Argument("margin", f"{reserve:g}")) if reserve else ()
        text = f" cannot be met: {who} do not gain so much. Give "
        parts = (target.argument, *less, text, Argument(target.kind, f"{reserve:g}"), " or more.")
        return PteeError(*parts, value=target.limit)
    gain = max(0.0, -_least_loss(candidates, target, one_threshold))
    possible = math.ceil((reserve - gain - ROUNDING) * 1e4) / 1e4 + 0.0  # no -0.0
    text = f" cannot be met: {who} gain {gain:.4f} at most, with nothing in reserve. Give "
    no_reserve = (", with ", Argument("margin", "0")) if isinstance(margin, str) and possible < 0 else ()
    parts = (target.argument, text, Argument(target.kind, f"{possible:g}"), " or more", *no_reserve, ".")
    return PteeError(*parts, value=target.limit)


def _least_loss(candidates: Sequence[Candidate], target: Target, one_threshold: bool) -> float:
    """The lowest mean loss that was found, at any cost."""
    found = [0.0]  # with all exits off
    for candidate in candidates:
        traces = candidate.traces
        losses = losses_of(traces, target)
        problem = Problem(traces.confidence[:-1], losses, traces.costs_where, limited="cost", limit=math.inf)
        found += [choice.loss for choice in searched(candidate, problem, one_threshold)]
    return min(found)
