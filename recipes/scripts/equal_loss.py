"""What runs cost where as much is really lost: python recipes/scripts/equal_loss.py RUN... [--base NAME]

Runs that are called the same but for the seed, the last digit of their names, are one line. Thresholds are chosen on the calibration images
of a run and reported on its validation images, then the other way round; both together make a curve. What costs more and loses more than
another point of it is left out. The cost where 0, half a point or one point is lost lies between neighbouring points, or is that of
the last one; a curve that loses more everywhere is left out there, and of how many seeds a mean is stands behind it. ± is the standard deviation over the seeds. The
last column is the difference from the line it is compared with, mean over those losses from 0 to 1.5 points that both curves reach, seed
by seed.

Thresholds and answers are those of `ptee tune`, and the line is compared with --base. More lines come from the same traces:

--agreement: a confidence fitted to the log-odds of the largest probability, and to how probable earlier exits hold the same answer; beside
the same without the second. Each exit answers by itself.

--classes: one exit with a threshold for each class that it answers; beside the same with one threshold. By itself, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import click
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.data.splits import parts_for_tuning
from ptee.exits.blend import OWN
from ptee.pipeline.saved_run import open_run
from ptee.tuning.config import Target, ThresholdsConfig
from ptee.tuning.targets import solve
from ptee.tuning.traces import Traces, record

DROPS = (-0.004, -0.002, 0.0, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02)
SHOWN = (0.0, 0.5, 1.0)  # points lost
COMPARED = np.arange(0, 1.51, 0.25)
PRICES = np.geomspace(0.02, 50, 60)  # of a lost answer, in costs of the backbone
Points = list[tuple[float, float]]  # cost, and points really lost
Way = Callable[[Traces, Traces], Points]  # from traces to choose on and to report on
Curves = dict[str, np.ndarray]  # (points, 2) cost and points lost, by seed


def traces_of(run: Path) -> tuple[Traces, Traces]:
    """The exits' own answers to the calibration and the validation images of a run."""
    opened = open_run(str(run))
    opened.model.answers = OWN
    parts = parts_for_tuning(opened.unseen)
    first, second = (record(opened.model, images, logits=True) for images in (parts.calibration, parts.report))
    return first, second


# ---------------------------------------------------------------------------------------------------- ways to choose


def by_tune(first: Traces, second: Traces, answers: str = "auto") -> Points:
    """As `ptee tune --max-drop` does, for each drop of `DROPS` that can be reached."""
    points = []
    for drop in DROPS:
        try:
            found = solve(first, Target.given(ThresholdsConfig(max_drop=drop)), answers=answers)
        except PteeError:
            continue
        seen = found.answering(second)
        points.append(reached(seen, seen.leaving(found.threshold), found.off))
    return points


def reached(traces: Traces, leaving: Tensor, off: Sequence[int] = ()) -> tuple[float, float]:
    """Mean cost, and points lost."""
    return traces.score(leaving, off).cost, 100 * traces.losses.gather(0, leaving[None]).mean().item()


def by_agreement(first: Traces, second: Traces) -> Points:
    """A fitted confidence that sees what earlier exits say of the answer."""
    return by_tune(*fitted(first, second, earlier=True), answers=OWN)


def by_fit(first: Traces, second: Traces) -> Points:
    """A fitted confidence that sees the exit's own answer alone."""
    return by_tune(*fitted(first, second, earlier=False), answers=OWN)


def fitted(first: Traces, second: Traces, *, earlier: bool) -> tuple[Traces, Traces]:
    """Both with the probability that an exit agrees with the backbone as its confidence; on the first crosswise, in five parts."""
    rows = ([torch.ones(len(t.bare), device=t.bare.device)] for t in (first, second))
    on_first, on_second = rows
    for n in reversed(range(first.exits)):
        seen, other = numbers_of(first, n, earlier), numbers_of(second, n, earlier)
        agrees, h = (first.answers[n] == first.bare).numpy(), np.zeros(len(seen))
        for some, rest in KFold(5, shuffle=True, random_state=0).split(seen):
            h[rest] = (
                LogisticRegression(C=100, max_iter=1000).fit(seen[some], agrees[some]).predict_proba(seen[rest])[:, 1]
            )
        whole = LogisticRegression(C=100, max_iter=1000).fit(seen, agrees).predict_proba(other)[:, 1]
        on_first.insert(0, torch.from_numpy(h).float())
        on_second.insert(0, torch.from_numpy(whole).float())
    return tuple(replace(t, confidence=torch.stack(h)) for t, h in ((first, on_first), (second, on_second)))  # type: ignore[return-value]


def numbers_of(traces: Traces, n: int, earlier: bool) -> np.ndarray:
    """(images, numbers) what the confidence of exit n is fitted to."""
    assert traces.logits is not None
    answer = traces.answers[n]
    columns = [traces.logits[n].double().softmax(-1).amax(-1).clamp(1e-12, 1 - 1e-12).logit()]
    for m in range(n if earlier else 0):
        columns.append((traces.answers[m] == answer).double())
        same = traces.logits[m].double().softmax(-1).gather(1, answer[:, None])[:, 0]
        columns.append(same.clamp(1e-6, 1 - 1e-6).logit())
    return torch.stack(columns, 1).numpy()


def by_class(first: Traces, second: Traces) -> Points:
    """The first exit with a threshold for each class that it answers."""
    return at_prices(first, second, first.answers[0], second.answers[0])


def by_one(first: Traces, second: Traces) -> Points:
    """The first exit with one threshold, chosen in the same way."""
    return at_prices(first, second, torch.zeros_like(first.answers[0]), torch.zeros_like(second.answers[0]))


def at_prices(first: Traces, second: Traces, group: Tensor, other: Tensor) -> Points:
    """For each price of a lost answer: the threshold of each group with the lowest sum of cost and losses."""
    h, loss, saved = first.confidence[0], first.losses[0], float(first.costs[-1] - first.costs[0])
    points = []
    for price in PRICES:
        leaves = torch.zeros_like(other, dtype=torch.bool)
        for k in group.unique():
            here = (group == k).nonzero()[:, 0]
            here = here[h[here].argsort(descending=True)]
            each = saved - price * loss[here]
            gain = torch.cat([each.new_zeros(1), each.cumsum(0)])
            most = int(gain.argmax())
            lowest = h[here[most - 1]] if most else torch.inf
            leaves |= (other == k) & (second.confidence[0] >= lowest)
        points.append(reached(second, torch.where(leaves, 0, second.exits)))
    return points


# ---------------------------------------------------------------------------------------------------- the table


def curve(way: Way, traces: tuple[Traces, Traces]) -> np.ndarray:
    """(points, 2) cost and points lost, mean over both ways round."""
    first, second = traces
    there, back = way(first, second), way(second, first)
    if len(there) != len(back):  # some drop can be reached on one side alone: the largest ones always can
        fewer = min(len(there), len(back))
        there, back = there[-fewer:], back[-fewer:]
    return np.mean([there, back], axis=0)


def costs_at(points: np.ndarray, lost: Sequence[float] | np.ndarray) -> np.ndarray:
    """The cost where so many points are lost; NaN where that is less than any point loses. Beyond the last point its cost counts."""
    ordered = points[np.lexsort((points[:, 0], points[:, 1]))]
    cheapest = np.minimum.accumulate(ordered[:, 0])
    kept = ordered[ordered[:, 0] <= cheapest]
    return np.interp(lost, kept[:, 1], kept[:, 0], left=np.nan)


def line(name: str, curves: Curves, base: Curves | None = None) -> list[str]:
    """A row of the table."""
    cells = [name, str(len(curves))]
    for lost in SHOWN:
        found = [float(costs_at(points, [lost])[0]) for points in curves.values()]
        costs = [cost for cost in found if not np.isnan(cost)]
        partly = f" ({len(costs)} of {len(found)})" * (len(costs) < len(found))
        spread = f" ± {stdev(costs):.3f}" if len(costs) > 1 else ""
        cells.append(f"{mean(costs):.3f}{spread}{partly}" if costs else "-")
    gaps = []
    for seed in curves.keys() & (base or {}).keys():
        gap = costs_at(curves[seed], COMPARED) - costs_at((base or {})[seed], COMPARED)
        gaps.append((seed, f"{np.nanmean(gap):+.3f}" if not np.isnan(gap).all() else "-"))
    return [*cells, ", ".join(gap for _, gap in sorted(gaps))]


@click.command(help=__doc__)
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", help="Compare the lines with this one.  [default: the first]")
@click.option("--agreement", multiple=True, help="Of these runs, by name without the seed.")
@click.option("--classes", multiple=True, help="Likewise.")
def main(runs: tuple[Path, ...], base: str | None, agreement: tuple[str, ...], classes: tuple[str, ...]) -> None:
    """Print the table."""
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for run in runs:
        if not run.name[-1].isdigit():
            raise click.UsageError(f"{run.name} does not end with the digit of a seed.")
        found[run.name[:-1]][run.name[-1]] = run
    base = base or next(iter(found))
    for name in {base, *agreement, *classes} - {*found}:
        raise click.UsageError(f"No run is called {name}. There are {', '.join(found)}.")
    try:
        rows = table_of(found, base, agreement, classes)
    except PteeError as why:
        raise click.ClickException(str(why)) from why
    click.echo("\n".join("| " + " | ".join(row) + " |" for row in rows))


def table_of(
    found: dict[str, dict[str, Path]], base: str, agreement: Sequence[str], classes: Sequence[str]
) -> list[list[str]]:
    """The rows, of the runs by name and seed."""
    title = ["", "seeds", *(f"{lost:g} lost" for lost in SHOWN), "difference"]
    rows, base_curves = [title, ["---"] * len(title)], None
    for name in [base, *(name for name in found if name != base)]:
        traces = {seed: traces_of(run) for seed, run in found[name].items()}
        own = {seed: curve(by_tune, each) for seed, each in traces.items()}
        rows.append(line(name, own, base_curves))
        base_curves = base_curves or own
        for wanted, words, way, without in (
            (agreement, "agreement", by_agreement, by_fit),
            (classes, "a threshold for each class", by_class, by_one),
        ):
            if name in wanted:
                plain = {seed: curve(without, each) for seed, each in traces.items()}
                rows.append(line(f"{name}, without {words}", plain))
                rows.append(line(f"{name}, {words}", {s: curve(way, each) for s, each in traces.items()}, plain))
    return rows


if __name__ == "__main__":
    main()
