"""Mean and spread over seeds of what runs came to: python recipes/scripts/means.py RUN RUN ...

A run is a folder that `ptee augment` wrote. Runs that are called the same but for the seed at the end of their names are one:
lite0, lite1, lite2 become lite. Each figure is a mean, with its standard deviation where there are several seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
from spread import spread, without_seed

from ptee._common.text import table

COLUMNS = ("cost", "fidelity", "accuracy")


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(runs: tuple[Path, ...]) -> None:
    """Print the table."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        found[without_seed(run.name)].append(json.loads((run / "metrics.json").read_text())["results"])
    rows = []
    for name, results in found.items():
        cells = [spread([each["rows"][-1][column] for each in results]) for column in COLUMNS]
        rows.append((name, str(len(results)), *cells, spread([each["rows"][0]["accuracy"] for each in results])))
    click.echo(table([("", "seeds", *COLUMNS, "backbone's accuracy"), *rows], left={0}))


if __name__ == "__main__":
    main()
