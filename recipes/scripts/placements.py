"""Where the exits of the thesis's EENets stand, in its unit and in operations: python recipes/scripts/placements.py [--csv FILE]

The per cent of the parameters are those of tables 4.5 and 4.8 and of figure 4.2; no network is trained.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import click
import timm

import ptee
import ptee.backbones.cifar_resnet
import ptee.backbones.small_networks  # both tell timm their networks
from ptee._common.progress import with_bar

TITLE = ("network", "rule", "thesis, % of the parameters", "% of the parameters", "% of the operations")
THESIS: dict[tuple[str, str], list[int]] = {
    ("cifar_resnet20", "quadratic"): [4, 11, 24],
    ("cifar_resnet32", "quadratic"): [3, 8, 20, 52],
    ("cifar_resnet44", "quadratic"): [2, 4, 10, 19, 33, 66],
    ("cifar_resnet110", "quadratic"): [2, 4, 11, 20, 40, 74],
    ("cifar_resnet20", "fine"): [5, 11, 18],
    ("cifar_resnet32", "fine"): [5, 12, 16, 20, 24],
    ("cifar_resnet44", "fine"): [5, 10, 16, 21, 24, 33],
    ("cifar_resnet110", "fine"): [6, 10, 14, 19, 23, 27, 32, 36, 40, 44],
    ("cifar_resnet20", "pareto"): [24, 45],
    ("cifar_resnet32", "pareto"): [20, 36, 52, 68, 84],
    ("cifar_resnet44", "pareto"): [21, 44, 55, 66, 78, 89],
    ("cifar_resnet110", "pareto"): [21, 40, 53, 62, 70, 74],
    ("cifar_resnet20", "golden"): [24, 45, 73],
    ("cifar_resnet32", "golden"): [12, 16, 24, 52, 68],
    ("cifar_resnet44", "golden"): [7, 10, 16, 24, 44, 66],
    ("cifar_resnet110", "golden"): [6, 10, 15, 24, 40, 66],
    ("cifar_resnet20", "linear"): [45, 73],
    ("cifar_resnet32", "linear"): [20, 36, 52, 68, 84],
    ("cifar_resnet44", "linear"): [16, 33, 44, 66, 78, 89],
    ("cifar_resnet110", "linear"): [10, 19, 27, 40, 49, 57, 66, 74, 83, 91],
    ("cifar_resnet18", "quadratic"): [1, 6, 25],
}


@click.command(help=__doc__)
@click.option("--csv", "out", type=click.Path(dir_okay=False, path_type=Path))
def main(out: Path | None) -> None:
    """Print a row for each network and rule."""
    rows = [TITLE, *(_row(*key, published) for key, published in with_bar(THESIS.items(), "networks"))]
    if out is not None:
        with out.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows(rows)
    click.echo("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(TITLE), *rows[1:]]))


def _row(network: str, rule: str, published: list[int]) -> tuple[str, ...]:
    arguments: dict[str, Any] = {} if network == "cifar_resnet18" else {"shortcut": "conv"}
    how = {"places_by": "parameters", "head": "pool", "input_size": (3, 32, 32)}
    plan = ptee.plan(timm.create_model(network, **arguments), exits=rule, num_exits=len(published), **how)
    operations = [e.backbone_cost for e in plan.exits]
    return network, rule, " ".join(map(str, published)), _percent(plan.parameter_shares), _percent(operations)


def _percent(shares: Any) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares)


if __name__ == "__main__":
    main()
