"""A backbone that is pruned or quantised first and then gets exits, both savings apart.

python recipes/scripts/smaller_first.py NETWORK WEIGHTS DATA [--how none|prune|int8] [--share 0.5] [--seed 0] [--csv FILE]

prune sets the smallest weights of each convolution and linear layer to zero (torch.nn.utils.prune). int8 keeps the weights of the linear
layers in eight bits (torchao). That saves memory; the operations that ptee counts stay the same. What exits save is in operations.
"""

from __future__ import annotations

import csv
from pathlib import Path

import click
from torch import nn
from torch.nn.utils import prune

from ptee.backbones.load import load_backbone
from ptee.pipeline.fit import Job, fit_backbone
from ptee.pipeline.images import open_images, recipe_for
from ptee.pipeline.recipe import make_recipe

TITLE = ("backbone", "KiB of weights that are not zero", "its accuracy", "with exits", "fidelity", "cost, operations")


@click.command(help=__doc__)
@click.argument("network")
@click.argument("weights", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--how", type=click.Choice(["none", "prune", "int8"]), multiple=True, default=("none", "prune"), show_default=True
)
@click.option(
    "--share", type=click.FloatRange(0, 0.99), default=0.5, show_default=True, help="Of the weights, to set to zero."
)
@click.option("--epochs", type=click.IntRange(1), default=5, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--csv", "out", type=click.Path(dir_okay=False, path_type=Path))
def main(
    network: str,
    weights: Path,
    data: Path,
    how: tuple[str, ...],
    share: float,
    epochs: int,
    seed: int,
    out: Path | None,
) -> None:
    """Fit each, and print both savings."""
    rows = [TITLE]
    for each in how:
        backbone = load_backbone(network, weights=weights)
        make_smaller(backbone.module, each, share)
        stored = f"{kept(backbone.module) / 2**10:,.0f}"
        images, labels = open_images(str(data), backbone, seed=seed)
        recipe = recipe_for(labels, make_recipe("ptee", {"epochs": epochs, "max_drop": 0.01, "seed": seed}))
        model = fit_backbone(backbone, images, recipe, Job(log=lambda text: click.echo(text, err=True)))
        bare, *_, own = (model.results or {})["rows"]
        numbers = (bare["accuracy"], own["accuracy"], own["fidelity"], own["cost"])
        rows.append((each, stored, *(f"{number:.4f}" for number in numbers)))
    if out is not None:
        with out.open("w", encoding="utf-8", newline="") as written:
            csv.writer(written, lineterminator="\n").writerows(rows)
    click.echo("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(TITLE), *rows[1:]]))


def make_smaller(module: nn.Module, how: str, share: float) -> None:
    """Prune or quantise a network in place."""
    if how == "int8":
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as why:
            raise click.ClickException("--how int8 needs torchao: pip install torchao") from why

        quantize_(module, Int8WeightOnlyConfig())
    if how == "prune":
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                prune.l1_unstructured(part, "weight", share)
                prune.remove(part, "weight")


def kept(module: nn.Module) -> int:
    """Bytes of the weights that are not zero; without what says where they stand."""
    parts = [getattr(p, name) for p in module.parameters() for name in getattr(p, "tensor_data_names", ())]
    plain = [p for p in module.parameters() if not hasattr(p, "tensor_data_names")]
    return sum(int(tensor.count_nonzero()) * tensor.element_size() for tensor in (*plain, *parts))


if __name__ == "__main__":
    main()
