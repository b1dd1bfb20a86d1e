"""Where the images of saved runs leave, what they cost in operations and in parameters, and how long the training took.

python recipes/scripts/shares.py RUN... prints a table; with --json, what it is made of.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ptee
from ptee.training.step import parameter_costs


def row_of(run: Path) -> dict[str, Any]:
    """What one run's metrics.json says, and its costs as shares of the parameters."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    results, epochs = metrics["results"], metrics["training"]["epochs"]
    bare, *_, own = results["rows"]
    shares = results["leaving"]
    parameters = sum(share * cost for share, cost in zip(shares, parameter_costs(ptee.load(run)), strict=True))
    return {
        "run": run.name,
        "leaving": [round(share * results["samples"]) for share in shares],
        "accuracy": own["accuracy"],
        "backbone": bare["accuracy"],
        "operations": own["cost"],
        "parameters": parameters,
        "epochs": len(epochs),
        "seconds": round(sum(epoch["seconds"] for epoch in epochs)),
    }


def main() -> None:
    """Print the runs that are named on the command line."""
    rows = [row_of(Path(name)) for name in sys.argv[1:] if name != "--json"]
    if "--json" in sys.argv:
        print(json.dumps(rows, indent=1))
        return
    print(
        "| run | leave at | accuracy | backbone alone | cost, operations | cost, parameters | epochs | s |\n"
        + "|---" * 8
        + "|"
    )
    for row in rows:
        left = " ".join(map(str, row["leaving"]))
        costs = f"{row['operations']:.3f} | {row['parameters']:.3f}"
        print(
            f"| {row['run']} | {left} | {row['accuracy']:.4f} | {row['backbone']:.4f} | {costs} | {row['epochs']} | {row['seconds']} |"
        )


if __name__ == "__main__":
    main()
