"""Times as they are measured, made up."""

from __future__ import annotations


def values(**changes: object) -> dict:
    """What was measured of the small model: two exits, 1 and 4 rows."""
    pair = [[0.1, 0.4], [0.1, 0.1]]
    by = {"bare": [1.0, 2.0], "call": [0.2, 0.2], "segments": [*pair, [0.5, 1.0]], "heads": pair, "moves": pair}
    known = {
        "device": "cpu", "device_name": "box", "threads": 1, "torch_version": "2", "ptee_version": "0", "dtype": "float32",
        "backbone": "Sequential", "exits": ["0", "2"], "heads": ["pool", "pool"], "rows": [1, 4], "eager": [1.0, 2.0],
        "executors": [{"executor": "hooks"} | by],
    }  # fmt: skip
    return known | changes
