"""Where the images of saved runs leave, and what they cost in each of the three counts.

python recipes/scripts/shares.py RUN... prints a table; with --json, what it is made of. --csv FILE writes it as CSV. --sweep FOLDER writes
the runs as a sweep's table, which ptee plot draws.

cost: of all operations, heads that images pass included. paper: of the operations, with the head at which an image leaves and no other, as
EENet's and PTEENet's code count. parameters: the share of the parameters, all heads included, the thesis's unit.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import click

import ptee
from ptee.pipeline.recorded import SWEEP_TABLE
from ptee.pipeline.sweep import Sweep, SweepRow
from ptee.training.step import parameter_costs

TITLE = ("run", "leave at", "accuracy", "fidelity", "backbone alone", "cost", "paper", "parameters", "epochs", "s")


def row_of(run: Path) -> dict[str, Any]:
    """What one run's metrics.json says, and its costs in other counts."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    results, epochs = metrics["results"], metrics["training"]["epochs"]
    bare, *_, own = results["rows"]
    model, shares = ptee.load(run), results["leaving"]
    of_paper = [e.backbone_cost + e.head_cost for e in model.exits] + [1.0]
    return {
        "run": run.name,
        "leaving": [round(share * results["samples"]) for share in shares],
        "accuracy": own["accuracy"],
        "fidelity": own["fidelity"],
        "backbone": bare["accuracy"],
        "operations": own["cost"],
        "paper": sum(share * cost for share, cost in zip(shares, of_paper, strict=True)),
        "parameters": sum(
            share * cost for share, cost in zip(shares, parameter_costs(model, len(model.exits)), strict=True)
        ),
        "epochs": len(epochs),
        "seconds": round(sum(epoch["seconds"] for epoch in epochs)),
    }


def without_common_end(names: list[str]) -> list[str]:
    """The names without the settings at their ends that are the same in all."""
    parts = [name.split("_") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return ["_".join(each) for each in parts]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as words."""
    left = " ".join(map(str, row["leaving"]))
    numbers = [f"{row[name]:.4f}" for name in ("accuracy", "fidelity", "backbone")]
    costs = [f"{row[name]:.3f}" for name in ("operations", "paper", "parameters")]
    return [row["run"], left, *numbers, *costs, str(row["epochs"]), str(row["seconds"])]


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True)
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--sweep", "folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(runs: tuple[Path, ...], as_json: bool, file: Path | None, folder: Path | None) -> None:
    """Print the runs that are named on the command line."""
    rows = [row_of(run) for run in runs if (run / "metrics.json").is_file()]
    for row, name in zip(rows, without_common_end([row["run"] for row in rows]), strict=True):
        row["run"] = name
    if file is not None:
        with file.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows([TITLE, *map(cells, rows)])
    if folder is not None:
        named = {"accuracy": "accuracy", "fidelity": "fidelity", "cost": "operations", "backbone": "backbone"}
        found = [SweepRow(row["run"], {}, {name: row[key] for name, key in named.items()}) for row in rows]
        (folder / SWEEP_TABLE).write_text(Sweep(tuple(found), folder).to_csv(), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    click.echo("\n".join("| " + " | ".join(words) + " |" for words in [TITLE, ["---"] * len(TITLE), *map(cells, rows)]))


if __name__ == "__main__":
    main()
