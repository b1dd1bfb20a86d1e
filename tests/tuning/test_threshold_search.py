from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptee.exits.times import BatchTimes
from ptee.tuning.config import Target
from ptee.tuning.targets import solve
from ptee.tuning.threshold_search import MAX_EXACT, Choice, Problem, objective
from ptee.tuning.traces import Traces


@pytest.fixture(autouse=True)
def on_the_cpu(device: torch.device) -> None:
    """Traces lie there, wherever the network ran."""
    torch.set_default_device(None)


def last_exit_pays(exits: int) -> Traces:
    """The last exit alone saves a little. Exits 0 and 1 have dear heads, and look good beside each other: exit 0 wins what exit 1 loses."""
    n, last = 20, exits - 1
    answers = torch.full((exits + 1, n), 2)  # wrong, but where it is said
    h = torch.zeros(exits + 1, n)
    h[-1] = 1
    answers[-1] = 0
    answers[-1, 0], answers[0, 0], h[0, 0] = 1, 0, 0.9  # image 0: exit 0 is right, the backbone is not
    answers[1, 1:10], h[1, 1:11] = 0, 0.9  # images 1 to 10 leave at exit 1, one of them wrongly
    answers[last, 11:16], h[last, 11:16] = 0, 0.9  # images 11 to 15 leave at the last exit, rightly
    heads = torch.full((exits,), 0.001, dtype=torch.float64)
    heads[:2], heads[last] = 0.3, 0.01
    cuts = torch.tensor([0.05, 0.1, *(0.2 + 0.05 * k for k in range(exits - 3)), 0.8, 1], dtype=torch.float64)
    costs = cuts + torch.cat([heads.cumsum(0), heads.sum()[None]])
    return Traces(answers, h, torch.zeros(n, dtype=torch.long), costs, torch.empty(0), head_costs=heads)


def timed(traces: Traces, batch: int = 8) -> Traces:
    """Times in proportion to the counted costs, but that what is no exit takes a little longer."""
    rows = torch.arange(batch + 1, dtype=torch.float64) / batch
    heads = traces.head_costs
    before = torch.cat([heads.cumsum(0), heads.sum()[None]])
    segments = torch.diff(traces.costs - before, prepend=torch.zeros(1, dtype=torch.float64))
    return replace(traces, times=BatchTimes(segments[:, None] * rows, heads[:, None] * rows, 0.0, "units of a test"))


@pytest.mark.parametrize("one_threshold", [False, True])
@pytest.mark.parametrize("exits", [MAX_EXACT, MAX_EXACT + 1])
@pytest.mark.parametrize("of", [lambda traces: traces, timed], ids=["operations", "seconds"])
def test_the_result_is_never_worse_than_one_exit_alone_however_many_there_are(of, exits, one_threshold):
    traces = of(last_exit_pays(exits))
    alone = traces.score(traces.leaving([2.0] * (exits - 1) + [0.5]), range(exits - 1))
    found = solve(traces, Target("max_drop", 0), margin=0, one_threshold=one_threshold)
    assert alone.price == pytest.approx(0.96)
    assert found.price <= alone.price + 1e-9


@pytest.mark.parametrize("exits", [MAX_EXACT, MAX_EXACT + 1])
def test_the_result_never_costs_more_than_the_bare_backbone_however_many_exits_there_are(exits):
    traces = last_exit_pays(exits)
    h = traces.confidence.clone()
    h[-2] = 0  # the last exit is sure of nothing
    found = solve(replace(traces, confidence=h), Target("max_drop", 0), margin=0)
    assert (found.cost, found.off) == (pytest.approx(1), tuple(range(exits)))


def problem() -> Problem:
    h, loss = torch.tensor([[0.9, 0.2], [0.8, 0.7]]), torch.zeros(3, 2)
    return Problem(h, loss, lambda on: on.new_ones(len(on), 3, dtype=torch.float64), limited="loss", limit=0)


def test_an_exit_that_takes_all_images_has_the_threshold_0_so_that_new_ones_leave_too():
    assert problem().thresholds(torch.tensor([2, 0]), one_threshold=False)[0] == 0


def test_of_equal_choices_the_one_with_fewer_exits_is_the_better_one():
    one, two = (Choice(torch.tensor(taken), 0.5, 0.1) for taken in ([2, 0], [1, 1]))
    assert objective(problem(), one) < objective(problem(), two)
