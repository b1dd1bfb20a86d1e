"""What one threshold for all exits of a run gives, at several values: python recipes/scripts/thresholds.py RUN [--csv FILE]

cost: of all operations, heads that images pass included. paper: without those, as EENet's and PTEENet's code count.
"""

from __future__ import annotations

import csv
from pathlib import Path

import click

from ptee.pipeline.saved_run import open_run
from ptee.report.facts import Step, step
from ptee.tuning.traces import record

VALUES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TITLE = ("T", "accuracy", "fidelity", "cost", "paper", "leave at")


@click.command(help=__doc__)
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--csv", "out", type=click.Path(dir_okay=False, path_type=Path))
def main(run: Path, out: Path | None) -> None:
    """Print a row for each threshold; the images run through the model once."""
    opened = open_run(str(run))
    model = opened.model
    traces = record(model, opened.unseen.data.validation, logits=False)
    costs = [*(e.backbone_cost + e.head_cost for e in model.exits), 1.0]
    samples = traces.answers.shape[1]
    rows = [TITLE, *(_row(step(traces, [t] * traces.exits, (), t), costs, samples) for t in VALUES)]
    if out is not None:
        with out.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows(rows)
    click.echo("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(TITLE), *rows[1:]]))


def _row(found: Step, costs: list[float], samples: int) -> tuple[str, ...]:
    shares = [right + wrong for right, wrong in zip(found.right, found.wrong, strict=True)]
    paper = sum(share * cost for share, cost in zip(shares, costs, strict=True))
    accuracy = "-" if found.accuracy is None else f"{found.accuracy:.4f}"
    left = " ".join(str(round(share * samples)) for share in shares)
    return f"{found.t:g}", accuracy, f"{found.fidelity:.4f}", f"{found.cost:.4f}", f"{paper:.4f}", left


if __name__ == "__main__":
    main()
