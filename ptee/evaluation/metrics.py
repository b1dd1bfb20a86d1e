"""How good a confidence is: whether it can be read as a probability, and whether right answers have a higher one."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15  # Guo et al., On Calibration of Modern Neural Networks, 2017
DIGITS = 6  # the last digits of a confidence depend on the size of the batch


def calibration_error(h: Tensor, right: Tensor) -> float:
    """Expected calibration error: the sum over bins of (images in the bin / n) * |mean h - share of right answers|.

    scikit-learn's `calibration_curve` does not say how many images are in each bin. h (n,) and `right` (n,) bool; a
    confidence that is not finite is left out.
    """
    known = h.isfinite()
    h, right = h[known].double(), right[known].double()
    bins = (h.clamp(0, 1) * BINS).long().clamp(max=BINS - 1)  # of equal width
    gap = h.new_zeros(BINS).index_add(0, bins, h - right)
    return round(gap.abs().sum().item() / max(1, len(h)), DIGITS)


def failure_auroc(h: Tensor, right: Tensor) -> float | None:
    """Area under the ROC curve: the chance that a right answer has a higher confidence than a wrong one; ties count half.

    h (n,), where NaN is below every number, and `right` (n,) bool. None if all answers are right, or all are wrong.
    """
    from sklearn.metrics import roc_auc_score  # takes seconds to import

    if right.all() or not right.any():
        return None
    lowest = torch.finfo(torch.float32).min
    return float(roc_auc_score(right.cpu().numpy(), h.float().nan_to_num(nan=lowest).cpu().numpy()))
