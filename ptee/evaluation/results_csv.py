"""results.csv: one row for each run, with the columns of timm's results and those of early exits."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from ptee.analysis.parameters import number_of_parameters
from ptee.model.early_exit import EarlyExitModel

COLUMNS = (
    *("model", "img_size", "top1", "top1_err", "param_count", "interpolation"),  # timm's: percent, and millions
    *("run", "backbone_top1", "fidelity", "cost", "threshold", "off", "samples"),
    *("infer_samples_per_sec", "speedup", "device", "batch_size"),
)


def results_csv(models: Mapping[str, EarlyExitModel]) -> str:
    """What was measured of each run when its thresholds were set, as CSV; empty cells where nothing was.

    Args:
        models: by the name of their run.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"run": name} | _row(model) for name, model in models.items())
    return text.getvalue()


def _row(model: EarlyExitModel) -> dict[str, Any]:
    results = model.results or {}
    rows = results.get("rows")
    whole = isinstance(rows, list) and len(rows) > 1 and all(isinstance(row, dict) for row in rows)
    bare, own = (rows[0], rows[-1]) if whole and rows is not None else ({}, {})
    top1 = _percent(own.get("accuracy"))
    return {
        "model": model.plan.backbone,
        "img_size": model.plan.input_size[-1],
        "top1": top1,
        "top1_err": "" if top1 == "" else round(100 - top1, 3),
        "param_count": round(number_of_parameters(model) / 1e6, 2),
        "interpolation": model.origin.input.interpolation,
        "backbone_top1": _percent(bare.get("accuracy")),
        "fidelity": own.get("fidelity", ""),
        "cost": own.get("cost", ""),
        "threshold": " ".join(f"{t:.6g}" for t in model.threshold),
        "off": " ".join(map(str, model.off)),
        "samples": results.get("samples", "") if own else "",
        "infer_samples_per_sec": own.get("images_per_s") or "",
        "speedup": own.get("speedup") or "",
        "device": results.get("device", "") if own.get("speedup") else "",
        "batch_size": results.get("batch_size", "") if own.get("speedup") else "",
    }


def _percent(share: Any) -> Any:
    return round(100 * share, 3) if isinstance(share, int | float) else ""
