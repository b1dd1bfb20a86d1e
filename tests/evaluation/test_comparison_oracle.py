from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from device import drawn

from ptee.evaluation import comparison
from ptee.evaluation.comparison import Pair, _of_run
from ptee.evaluation.comparison_table import Entry
from ptee.exits.times import BatchTimes
from ptee.tuning.traces import Traces


@pytest.fixture(autouse=True)
def on_the_cpu(device: torch.device) -> None:
    """Traces lie there, wherever the network ran."""
    torch.set_default_device(None)


def traces(seed: int, agreeing: list[float], heads: list[float], n: int = 500) -> Traces:
    """Exits that agree with the backbone on such shares of the images, and are sure of just these, and what their heads cost."""
    g = drawn(seed)
    bare = torch.randint(5, (n,), generator=g)
    agrees = torch.rand(n, generator=g) < torch.tensor([*agreeing, 1])[:, None]
    costs = torch.tensor(heads, dtype=torch.float64)
    before = torch.cat([costs.cumsum(0), costs.sum()[None]])
    cuts = torch.linspace(0.1, 1, len(heads) + 1, dtype=torch.float64)
    answers = torch.where(agrees, bare, (bare + 1) % 5)
    return Traces(answers, agrees.float(), None, cuts + before, torch.empty(0), head_costs=costs)


def lines(pair: Pair) -> tuple[Entry, Entry]:
    """The run at no loss, and the oracle."""
    run, oracle = (line.entries[0] for line in _of_run("run", pair, [0.0], ("own", "oracle"), "own"))
    return run, oracle


def by_hand(pair: Pair) -> float:
    """The cost on the report images with the exits that cost least on the calibration images, of every subset of them."""

    def score(t: Traces, on: tuple[int, ...]) -> float:
        agrees = t.answers[:-1] == t.answers[-1]
        first = [next((n for n in on if agrees[n, i]), t.exits) for i in range(agrees.shape[1])]
        return t.score(torch.tensor(first), [n for n in range(t.exits) if n not in on]).price

    exits = range(pair.report.exits)
    every = [on for size in range(len(exits) + 1) for on in itertools.combinations(exits, size)]
    return score(pair.report, min(every, key=lambda on: score(pair.calibration, on)))


def timed(t: Traces) -> Traces:
    """In seconds, a head costs three times what it costs in operations."""
    rows = torch.arange(9, dtype=torch.float64) / 8
    before = torch.cat([t.head_costs.cumsum(0), t.head_costs.sum()[None]])
    segments = torch.diff(t.costs - before, prepend=torch.zeros(1, dtype=torch.float64))
    times = BatchTimes(segments[:, None] * rows, 3 * t.head_costs[:, None] * rows, 0.0, "units of a test")
    return replace(t, times=times)


DEAR = ([0.05, 0.8, 0.5], [0.05, 0.02, 0.1])  # exits 0 and 2 do not pay


@pytest.mark.parametrize("of", [lambda t: t, timed], ids=["operations", "seconds"])
def test_the_oracle_has_the_exits_on_with_which_it_costs_least_and_loses_nothing(of):
    pair = Pair(*(of(traces(seed, *DEAR)) for seed in (1, 2)))
    run, oracle = lines(pair)
    assert oracle.cost == pytest.approx(by_hand(pair))
    assert (oracle.drop, oracle.fidelity, oracle.off) == (0, 1, (0, 2))
    assert oracle.cost <= run.cost + 1e-9


def test_with_an_exit_whose_head_runs_for_a_later_one_anyway_the_oracle_leaves_there_too():
    needed = torch.tensor([False, True, False])
    pair = Pair(*(replace(traces(seed, *DEAR), builds_on_previous=needed) for seed in (1, 2)))
    _, oracle = lines(pair)
    assert oracle.cost == pytest.approx(by_hand(pair))
    assert oracle.off == (2,)


@pytest.mark.parametrize("found", [True, False], ids=["found", "not found by itself"])
def test_of_many_exits_the_oracle_costs_no_more_than_the_run_that_loses_nothing(found, monkeypatch):
    if not found:
        monkeypatch.setattr(comparison, "solve", lambda *_, **more: SimpleNamespace(off=()))
    shares, heads = [0.3, 0.02, 0.02, 0.7, 0.02, 0.9, 0.02], [0.02] * 7
    pair = Pair(*(traces(seed, shares, heads, n=200) for seed in (1, 2)))
    run, oracle = lines(pair)
    assert run.off
    assert (oracle.drop, oracle.fidelity) == (0, 1)
    assert oracle.cost <= run.cost + 1e-9


def test_where_no_exit_pays_the_oracle_is_the_bare_backbone():
    _, oracle = lines(Pair(*(traces(seed, [0.01, 0.02], [0.3, 0.3]) for seed in (1, 2))))
    assert (oracle.cost, oracle.off) == (1, (0, 1))
