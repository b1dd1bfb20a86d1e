"""Mean and spread over seeds of what was compared: python recipes/scripts/spread.py runs/compare.json.

The file is what `ptee compare RUN RUN ... --json` printed; there may be several. Runs that are called the same but for the
seed at the end of their names are one: ours0, ours1, ours2 become ours. In each cell: cost, and in parentheses the drop on
the images that are reported on; each with its standard deviation over the seeds, where there are several. The same runs may be
in several files, with other images: all are taken together then. Not every run has every seed and every line (a backbone is cut
off where that is worth it): of how many a mean is stands behind its name then.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from ptee._common.text import table


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    return f"{mean(values):{sign}.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def without_seed(name: str) -> str:
    """What a line is called in all files: "ours0, one T" becomes "ours, one T"."""
    run, comma, way = name.partition(",")
    return re.sub(r"(?<=[a-z])\d+$", "", run) + comma + way


@click.command(help=__doc__)
@click.argument("comparisons", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(comparisons: tuple[Path, ...]) -> None:
    """Print the table."""
    found = [json.loads(path.read_text()) for path in comparisons]
    cells: dict[tuple[str, Any], list[tuple[float, float]]] = defaultdict(list)
    lines = [line for each in found for line in each["lines"]]
    static = {line["name"] for line in lines if line["kind"] in ("static", "cascade")}
    for line in lines:
        name = line["name"] if line["name"] in static else without_seed(line["name"])
        for entry in line["entries"]:
            cells[name, entry["allowed"]].append((entry["cost"], entry["drop"]))
    drops = [*found[0]["drops"], None]
    rows = [("", *(f"<= {drop:g} lost" for drop in drops[:-1]), "as it is")]
    most = max(map(len, cells.values()))
    runs: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        runs[without_seed(line["name"])].add(line["name"])
    seeds = max(map(len, runs.values()))
    for name in dict.fromkeys(name for name, _ in cells):
        here = [list(zip(*cells[name, drop], strict=True)) for drop in drops]
        own = max(len(cells[name, drop]) for drop in drops)
        partly = f" ({own} of {most})" * (own < most and name not in static)
        rows.append((name + partly, *(f"{spread(list(c[0]))} ({spread(list(c[1]), '+')})" if c else "" for c in here)))
    several = f", {len(found)} comparisons" * (most > seeds)
    click.echo(f"{found[0]['backbone']}, {found[0]['samples']:,} images, {seeds} seed{'s' * (seeds > 1)}{several}")
    click.echo(table(rows, left={0}))


if __name__ == "__main__":
    main()
