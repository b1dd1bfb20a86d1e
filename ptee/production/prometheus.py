"""The counters of a monitor in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def prometheus_text(now: Mapping[str, Any]) -> str:
    """What `monitor.as_dict()` returned, as a page that Prometheus reads."""
    names = [f'{{exit="{n}",module="{_label(name)}"}}' for n, name in enumerate(now["exits"])]
    of_exits = {
        "rows": ("Images answered at each exit; the last is the end of the backbone.", now["rows"]),
        "cost": ("Their multiply-accumulates, in images of the bare backbone.", now["cost"]),
        "confidence": ("The sum of their confidence.", now["confidence_sum"]),
    }
    lines = []
    for name, (text, values) in of_exits.items():
        lines += _metric(f"{name}_total", "counter", text, zip(names, values, strict=True))
    single = {
        "audited_total": ("counter", "Images whose answer was compared with the backbone's.", now["audited"]),
        "audited_differed_total": ("counter", "Those of them that differed.", now["differed"]),
        "audits_failed_total": ("counter", "Batches whose audit ended in an error.", now["failed"]),
        "audit_seconds_total": ("counter", "Seconds of the backbone for these.", now["seconds"]),
        "promise_tested": ("gauge", "1 while audits test the promise.", int(now["tested"])),
        "alarm": ("gauge", "1 if the promise no longer holds.", int(now["alarm"] is not None)),
    }
    if now["max_fidelity_drop"] is not None:
        single["max_fidelity_drop"] = ("gauge", "Share of answers that may differ.", now["max_fidelity_drop"])
    for name, (kind, text, value) in single.items():
        lines += _metric(name, kind, text, [("", value)])
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, text: str, values: Any) -> list[str]:
    head = [f"# HELP ptee_{name} {text}", f"# TYPE ptee_{name} {kind}"]
    return head + [f"ptee_{name}{label} {value}" for label, value in values]


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
