"""Do thresholds from the curve of a run lose no more than was asked for? python recipes/scripts/check_curves.py

Calibration images are drawn again and again, with replacement, from populations whose losses are known. On each draw thresholds are
chosen for a drop of one point (ptee.tune) and a curve is kept. The table says what is lost of the population, and at which cost,
with these thresholds and with those that the curve gives for each drop (model.threshold_for), on average over the draws.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, stdev

import click
import torch
from populations import POPULATIONS, draw, population

from ptee._common.text import table
from ptee.production.curve import Wish, best_within
from ptee.tuning.config import Target
from ptee.tuning.operating_points import operating_points
from ptee.tuning.targets import solve
from ptee.tuning.traces import Traces

LIMIT = 0.01
KINDS = {"accuracy": "max_drop", "fidelity": "max_fidelity_drop"}
Found = dict[str, list[tuple[float, float]]]  # by what was asked for: what was lost, and the cost


def outcomes(whole: Traces, kind: str, images: int, draws: int, limits: list[float]) -> Found:
    """What is lost of a population, and the cost, in each draw."""
    found: Found = defaultdict(list)
    for seed in range(draws):
        sample = draw(whole, images, seed)
        chosen = solve(sample, Target(kind, LIMIT))
        curve = operating_points(sample, chosen)
        wishes = {f"{limit:g}": best_within(curve, Wish(**{kind: limit})).threshold for limit in limits}
        for name, threshold in ({f"{LIMIT:g} (tune)": chosen.threshold} | wishes).items():
            found[name].append(lost(whole, kind, threshold, chosen.off))
    return found


def lost(whole: Traces, kind: str, threshold: tuple[float, ...], off: tuple[int, ...]) -> tuple[float, float]:
    """What thresholds lose, and their cost."""
    score, bare = whole.score(whole.leaving(threshold), off), whole.score_at(whole.exits)
    drop = (bare.accuracy or 0) - (score.accuracy or 0)
    return drop if kind == "max_drop" else 1 - score.fidelity, score.cost


@click.command(help=__doc__)
@click.option("--draws", default=80, show_default=True)
@click.option("--images", default="500,2000", show_default=True)
@click.option("--limits", default="0.005,0.01,0.02,0.05", show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
def main(draws: int, images: str, limits: str, kinds: str) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    rows = []
    for name in POPULATIONS:
        whole = population(name)
        for kind in kinds.split(","):
            for n in (int(n) for n in images.split(",")):
                found = outcomes(whole, KINDS[kind], n, draws, [float(limit) for limit in limits.split(",")])
                for wish, pairs in found.items():
                    drops, costs = zip(*pairs, strict=True)
                    error = stdev(drops) / len(drops) ** 0.5
                    rows.append((name, kind, f"{n:,}", wish, f"{mean(drops):.4f} ± {error:.4f}", f"{mean(costs):.3f}"))
                    click.echo("  ".join(rows[-1]), err=True)
    click.echo(table([("population", "drop of", "images", "asked for", "lost", "cost"), *rows], left={0, 1, 3}))


if __name__ == "__main__":
    main()
