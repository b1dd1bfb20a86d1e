"""Mean and spread over seeds of tables that shares.py or thresholds.py wrote: python recipes/scripts/seeds.py SEED0.csv SEED1.csv SEED2.csv --csv OUT.csv

A row of one table belongs to the rows of the same name (or T) in the others. Each figure is a mean, with its sample standard deviation where there are
several seeds. The shares that leave are those of each seed, in the order of the tables.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean, stdev

import click

FIGURES = ("accuracy", "fidelity", "cost", "paper", "parameters")


def shown(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


@click.command(help=__doc__)
@click.argument("tables", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--least", type=click.IntRange(1), default=1, help="Leave out rows that fewer tables have.")
@click.option("--csv", "file", type=click.Path(dir_okay=False, path_type=Path))
def main(tables: tuple[Path, ...], least: int, file: Path | None) -> None:
    """Print the table."""
    runs: dict[str, list[dict[str, str]]] = {}
    columns = ["run"]
    if len(set(map(Path.resolve, tables))) < len(tables):
        raise click.ClickException("One table is named twice, and a seed counts once.")
    for path in tables:
        with path.open(encoding="utf-8", newline="") as opened:
            found = list(csv.DictReader(opened))
        if runs and found and list(found[0]) != columns:
            raise click.ClickException(f"{path} has other columns than the tables before it: {', '.join(found[0])}.")
        columns = list(found[0]) if found else columns
        names = [row[columns[0]] for row in found]
        if len(set(names)) < len(names):
            raise click.ClickException(f"{path} has two rows of one name, so they are not of several seeds.")
        for row in found:
            runs.setdefault(row[columns[0]], []).append(row)
    figures = [figure for figure in FIGURES if figure in columns]
    title = (columns[0], "seeds", *figures, "leave at, by seed")
    rows = [
        [name, str(len(found)), *(shown([float(row[figure]) for row in found]) for figure in figures),
         "; ".join(row["leave at"] for row in found)]
        for name, found in runs.items() if len(found) >= least
    ]  # fmt: skip
    if file is not None:
        with file.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows([title, *rows])
    click.echo("\n".join("| " + " | ".join(words) + " |" for words in [title, ["---"] * len(title), *rows]))


if __name__ == "__main__":
    main()
