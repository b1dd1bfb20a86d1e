"""Is what ptee.tune(..., confidence=0.95) guarantees kept? python recipes/scripts/check_guarantees.py

Calibration images are drawn again and again, with replacement, from populations whose losses are known, and thresholds are chosen
for a drop of one point on each draw. The table says in how many draws more is lost of the population than is allowed, and what
the thresholds cost there, with the guarantee and without it (fewer draws, because that search takes longer). With RUN, the
calibration and validation images of a saved run are one more population.

With --tests it compares ways to test a drop of accuracy: how often each shows a drop below one point, at true shares of answers
that are lost and won. At a drop of a point, no way may in more than 5 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import click
import numpy as np
import torch
from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value
from populations import NEVER, POPULATIONS, draw, population, truth

from ptee._common.text import table
from ptee.tuning.config import Target
from ptee.tuning.guarantee import promised
from ptee.tuning.p_values import p_value_of_drop, p_value_of_share
from ptee.tuning.targets import solve
from ptee.tuning.traces import Traces, record

CONFIDENCE, LIMIT = 0.95, 0.01
DELTA = 1 - CONFIDENCE
TARGETS = {"accuracy": Target("max_drop", LIMIT), "fidelity": Target("max_fidelity_drop", LIMIT)}


# ---------------------------------------------------------------------------------------------------- by repetition


def of_run(run: str) -> Traces:
    """The exits' own answers to the calibration and validation images of a run."""
    from ptee.pipeline.saved_run import open_run

    opened = open_run(run)
    every = torch.utils.data.ConcatDataset([opened.unseen.data.calibration, opened.unseen.data.validation])
    return record(opened.model, every, logits=False, own=True)


def line(name: str, traces: Traces, kind: str, images: int, draws: int, few: int) -> tuple[str, ...]:
    """Share of draws in which too much is lost, mean loss and cost, with and without a guarantee."""
    target = TARGETS[kind]
    never = replace(NEVER, target=target)
    sure = [truth(traces, promised(draw(traces, images, n), never, CONFIDENCE)) for n in range(draws)]
    average = [truth(traces, solve(draw(traces, images, n), target)) for n in range(few)]
    cells: list[str] = []
    for found in (sure, average):
        lost, cost = zip(*found, strict=True) if found else ((), ())
        over = mean(loss > LIMIT for loss in lost) if lost else 0
        cells += [f"{over:.1%}", f"{mean(lost):.4f}", f"{mean(cost):.3f}"] if lost else ["-"] * 3
    return name, kind, f"{images:,}", *cells


# ---------------------------------------------------------------------------------------------------- ways to test


def betting(losses: np.ndarray) -> float:
    """A p-value by betting (Waudby-Smith and Ramdas, 2024): 1 over the largest capital, of losses in -1, 0, 1."""
    x, m, n = (1 + losses) / 2, (1 + LIMIT) / 2, len(losses)
    seen = np.arange(1, n + 1)
    means = (0.5 + x.cumsum()) / (seen + 1)
    spread = (0.25 / 4 + ((x - means) ** 2).cumsum()) / (seen + 1)
    spread = np.concatenate([[0.25 / 4], spread[:-1]])
    bets = np.minimum(np.sqrt(2 * np.log(1 / DELTA) / (n * spread)), 0.9 / (1 - m))
    return float(np.exp(-max(np.log1p(bets * (m - x)).cumsum().max(), 0)))


def hoeffding_bentkus(losses: np.ndarray) -> float:
    """MAPIE's, of (1 + loss) / 2."""
    rate = np.array([(1 + losses.mean()) / 2])
    return float(compute_hoeffding_bentkus_p_value(rate, len(losses), (1 + LIMIT) / 2)[0, 0])


def lost_alone(losses: np.ndarray) -> float:
    """As if nothing were won."""
    return p_value_of_share(int((losses > 0).sum()), len(losses), LIMIT)


def exact(losses: np.ndarray) -> float:
    """ptee's."""
    return p_value_of_drop(int((losses > 0).sum()), int((losses < 0).sum()), len(losses), LIMIT, DELTA)


WAYS: dict[str, Callable[[np.ndarray], float]] = {
    "exact": exact, "betting": betting, "lost alone": lost_alone, "Hoeffding-Bentkus": hoeffding_bentkus,
}  # fmt: skip
SHARES = ((0.012, 0.002), (0.03, 0.02), (0.003, 0.001), (0.008, 0.004), (0.016, 0.012), (0.025, 0.02))


def power(images: int, lost: float, won: float, draws: int) -> tuple[str, ...]:
    """How often each way shows a drop below the limit."""
    random = np.random.default_rng(0)
    drawn = [random.choice([1.0, -1.0, 0.0], images, p=[lost, won, 1 - lost - won]) for _ in range(draws)]
    shown = [f"{mean(test(losses) <= DELTA for losses in drawn):.1%}" for test in WAYS.values()]
    return f"{images:,}", f"{lost:g}", f"{won:g}", f"{lost - won:.3f}", *shown


@click.command(help=__doc__)
@click.argument("run", required=False)
@click.option("--draws", default=1000, show_default=True)
@click.option("--few", default=20, show_default=True, help="Draws without a guarantee.")
@click.option("--images", default="500,2000,4000", show_default=True)
@click.option("--names", default=",".join(POPULATIONS), show_default=True, help="Populations.")
@click.option("--tests", is_flag=True, help="Compare ways to test a drop of accuracy.")
def main(run: str | None, draws: int, few: int, images: str, names: str, tests: bool) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    sizes = [int(n) for n in images.split(",")]
    if tests:
        rows = [power(n, *shares, draws) for n in sizes for shares in SHARES]
        click.echo(table([("images", "lost", "won", "drop", *WAYS), *rows]))
        return
    each = {name: population(name) for name in names.split(",") if name} | ({} if run is None else {"run": of_run(run)})
    rows = []
    for name, traces in each.items():
        for kind in TARGETS:
            for n in sizes:
                rows.append(line(name, traces, kind, n, draws, few))
                click.echo("  ".join(rows[-1]), err=True)
    head = ("population", "drop of", "images", "too much", "lost", "cost", "on average: too much", "lost", "cost")
    click.echo(table([head, *rows], left={0, 1}))


if __name__ == "__main__":
    main()
