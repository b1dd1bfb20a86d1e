"""Is a confidence worth its name? Calibration error, and how well it tells failing answers from the others."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15  # Guo et al., On Calibration of Modern Neural Networks, 2017
DIGITS = 6  # a confidence differs beyond them between a large batch and a small one


def calibration_error(h: Tensor, holds: Tensor) -> float:
    """Expected calibration error: over bins of h of equal width, the mean distance of h from the share that holds.

    Args:
        h: (n,) confidence; values that are no numbers are left out.
        holds: (n,) bool, whether the answer is what it should be.
    """
    known = h.isfinite()
    h, holds = h[known].double(), holds[known].double()
    bins = (h.clamp(0, 1) * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, h - holds)
    return round(gap.abs().sum().item() / max(1, len(h)), DIGITS)


def failure_auroc(h: Tensor, holds: Tensor) -> float | None:
    """The chance that an answer that fails is less sure than one that holds, half for equals; None if all are alike.

    Args:
        h: (n,) confidence; values that are no numbers count as least sure.
        holds: (n,) bool, whether the answer is what it should be.
    """
    sure, unsure = (h.nan_to_num(nan=-torch.inf, neginf=-torch.inf)[rows].sort().values for rows in (holds, ~holds))
    if not len(sure) or not len(unsure):
        return None
    below = torch.searchsorted(unsure, sure) + torch.searchsorted(unsure, sure, right=True)
    return (below.double().sum() / (2 * len(sure) * len(unsure))).item()
