"""What decides which answers a model gives: what its curve and the promise of a monitor are of."""

from __future__ import annotations

from typing import Any

from ptee.exits.blend import BLENDED
from ptee.exits.config import CALIBRATED

LOWEST, HIGHEST = -1.0, 2.0  # thresholds beyond these do the same


def in_force(model: Any) -> dict[str, Any]:
    """The settings of a model by name; what was fitted to images is called by the setting that uses it."""
    fitted_to = fitted(model, model.answers, model.confidence)
    return {
        "threshold": [min(max(t, LOWEST), HIGHEST) for t in model.threshold],
        "off": list(model.off),
        "answers": model.answers,
        "confidence": model.confidence,
        "blend" if model.answers == BLENDED else "calibrated": fitted_to,
    }


def fitted(model: Any, answers: str, confidence: str) -> Any:
    """What a model has fitted to images for such answers and this confidence: the weights of a blend, a calibration, or nothing."""
    if answers == BLENDED:
        return model.blend
    return model.calibrated if confidence == CALIBRATED else None
