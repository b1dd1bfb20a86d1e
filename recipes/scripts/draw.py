"""Draw a results.json as curve.svg beside it: python recipes/scripts/draw.py recipes/papers/results.json

Cost from left to right, what is lost from top to bottom; one line for each way to answer, one point for each allowed drop.
"""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("svg")  # no window
matplotlib.rcParams |= {"svg.hashsalt": "ptee", "svg.fonttype": "none"}  # the same file each time, words as words

from matplotlib import pyplot as plt  # noqa: E402 - when it is known where to draw

MARKERS = "os^vD<>p*Xh8P"


@click.command(help=__doc__)
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: Path) -> None:
    """Write the picture."""
    picture = results.with_name("curve.svg")
    draw(json.loads(results.read_text(encoding="utf-8")), picture)
    click.echo(f"Drawn in {picture}")


def draw(found: dict[str, Any], picture: Path) -> None:
    """Write the picture.

    Args:
        found: `title`, `loss` (what is lost, in words) and `lines`, each with a `name` and `entries` of `cost` and `lost`.
        picture: the file.
    """
    figure, axes = plt.subplots(figsize=(9.5, 4.5), layout="constrained")
    for line, marker, colour in zip(found["lines"], cycle(MARKERS), cycle(plt.get_cmap("tab20").colors), strict=False):
        entries = line["entries"]
        costs, lost = [entry["cost"] for entry in entries], [100 * entry["lost"] for entry in entries]
        axes.plot(costs, lost, marker=marker, color=colour, label=line["name"])
    axes.set(
        title=found["title"], xlabel="cost, as a fraction of the bare backbone's", ylabel=found["loss"], xlim=(0, 1.05)
    )
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(picture, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
