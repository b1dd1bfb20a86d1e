"""Mean and spread of comparisons that differ in their seed: python recipes/spread.py runs/compare-*.json.

Each file is what `ptee compare ... --json` printed, of runs that are called the same but for the seed at the end of their
names: ours0, ours1, ours2 become ours. In each cell: cost, and in parentheses the drop on the images that are reported on;
each with its standard deviation over the files, where there are several. Not every seed need have every line (a backbone is
cut off where that is worth it): of how many a mean is stands behind its name.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from ptee.tables import table


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    return f"{mean(values):{sign}.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def without_seed(name: str) -> str:
    """What a line is called in all files: "ours0, one T" becomes "ours, one T"."""
    run, comma, way = name.partition(",")
    return re.sub(r"(?<=[a-z])\d+$", "", run) + comma + way


def shared_names(lines: list[dict[str, Any]]) -> dict[str, str]:
    """What each line of a file is called in all of them; networks have no seed.

    Raises:
        click.UsageError: if two are called alike then.
    """
    found: dict[str, str] = {}
    for line in lines:
        own = line["name"]
        name = own if line["kind"] in ("static", "cascade") else without_seed(own)
        if name in found:
            raise click.UsageError(f"{found[name]} and {own} are both {name} without a seed. Call them otherwise.")
        found[name] = own
    return {own: name for name, own in found.items()}


@click.command(help=__doc__)
@click.argument("comparisons", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(comparisons: tuple[Path, ...]) -> None:
    """Print the table."""
    found = [json.loads(path.read_text()) for path in comparisons]
    cells: dict[tuple[str, Any], list[tuple[float, float]]] = defaultdict(list)
    for each in found:
        names = shared_names(each["lines"])
        for line in each["lines"]:
            for entry in line["entries"]:
                cells[names[line["name"]], entry["allowed"]].append((entry["cost"], entry["drop"]))
    drops = [*found[0]["drops"], None]
    rows = [("", *(f"<= {drop:g} lost" for drop in drops[:-1]), "as it is")]
    for name in dict.fromkeys(name for name, _ in cells):
        here = [list(zip(*cells[name, drop], strict=True)) for drop in drops]
        files = max(len(cells[name, drop]) for drop in drops)
        partly = f" ({files} of {len(found)})" * (files < len(found))
        rows.append((name + partly, *(f"{spread(list(c[0]))} ({spread(list(c[1]), '+')})" if c else "" for c in here)))
    click.echo(f"{found[0]['backbone']}, {found[0]['samples']:,} images, {len(found)} seed{'s' * (len(found) > 1)}")
    click.echo(table(rows, left={0}))


if __name__ == "__main__":
    main()
