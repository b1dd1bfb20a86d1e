"""The soft answer Y_0 of saved runs, at full cost, beside the backbone's own: python recipes/scripts/soft.py RUN... [--csv FILE]"""

from __future__ import annotations

import csv
from pathlib import Path

import click
import torch

from ptee.data.batches import batches, split_batch
from ptee.pipeline.saved_run import open_run


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--csv", "out", type=click.Path(dir_okay=False, path_type=Path))
def main(runs: tuple[Path, ...], out: Path | None) -> None:
    """Print a row for each run."""
    rows = [("run", "soft answer", "cost", "end of the backbone"), *map(_row_of, runs)]
    if out is not None:
        with out.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows(rows)
    click.echo("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))


@torch.no_grad()
def _row_of(run: Path) -> tuple[str, ...]:
    opened = open_run(str(run))
    model, images = opened.model.eval(), opened.unseen.data.validation
    right, every = torch.zeros(2), 0
    for batch in batches(images, batch_size=128, shuffle=False):
        x, labels = split_batch(batch)
        answers = model.predict(x, soft=True).logits, model.all_exits(x).logits[-1]
        right += torch.tensor([float((answer.argmax(-1) == labels).sum()) for answer in answers])
        every += len(x)
    soft, end = (right / every).tolist()
    return run.name, f"{soft:.4f}", f"{model.costs[-1]:.3f}", f"{end:.4f}"


if __name__ == "__main__":
    main()
