"""One run at several thresholds, each measured by ptee evaluate --json: python recipes/scripts/thresholds.py RUN FILE... [--csv FILE]

cost: of all operations, heads that images pass included. paper: without those, as EENet's and PTEENet's code count.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import click

import ptee


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--csv", "out", type=click.Path(dir_okay=False, path_type=Path))
def main(run: Path, files: tuple[Path, ...], out: Path | None) -> None:
    """Print a row for each threshold."""
    exits = ptee.load(run).exits
    of_paper = [*(e.backbone_cost + e.head_cost for e in exits), 1.0]
    rows = [("T", "accuracy", "fidelity", "cost", "paper", "leave at")]
    for file in sorted(files):
        found = json.loads(file.read_text(encoding="utf-8"))
        own, shares = found["rows"][-1], found["leaving"]
        paper = sum(share * cost for share, cost in zip(shares, of_paper, strict=True))
        numbers = [f"{value:.4f}" for value in (own["accuracy"], own["fidelity"], own["cost"], paper)]
        left = " ".join(str(round(share * found["samples"])) for share in shares)
        rows.append((file.stem.lstrip("t"), *numbers, left))
    if out is not None:
        with out.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows(rows)
    click.echo("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))


if __name__ == "__main__":
    main()
