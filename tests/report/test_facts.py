from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ptee.evaluation.results import confidence_quality
from ptee.report import facts, words
from ptee.tuning.traces import Traces


def test_a_threshold_gives_what_the_images_say_one_by_one(evil):
    traces = evil.traces
    found = facts.step(traces, [0.9, 0.6], ())
    right, wrong, cost = [0.0] * 3, [0.0] * 3, 0.0
    for i in range(60):
        n = next(n for n, t in enumerate([0.9, 0.6, 0.0]) if traces.confidence[n, i] >= t)
        (right if traces.answers[n, i] == traces.targets[i] else wrong)[n] += 1 / 60
        cost += traces.costs[n].item() / 60
    assert found.right == pytest.approx(right, abs=1e-6)
    assert found.wrong == pytest.approx(wrong, abs=1e-6)
    assert found.cost == pytest.approx(cost)
    assert found.accuracy == found.fidelity == pytest.approx(sum(right))


def test_the_slider_goes_from_all_leaving_first_to_none_leaving(evil):
    first, *_, last = facts.steps(evil.traces, ())
    assert (first.t, first.cost) == (0, pytest.approx(0.3))
    assert (last.cost, last.fidelity) == (pytest.approx(1.1), 1)


def test_an_exit_that_is_off_keeps_its_images(evil):
    assert facts.step(evil.traces, [0.0, 0.0], (0,)).right[0] == 0


def test_columns_of_h_hold_all_images():
    h, right = torch.tensor([0.0, 0.51, 0.52, 1.0]), torch.tensor([True, True, False, True])
    found = facts.histogram(h, right)
    assert sum(found.right) == pytest.approx(0.75)
    assert (found.right[10], found.wrong[10], found.right[-1]) == pytest.approx((0.25, 0.25, 0.25))


def test_a_bin_of_h_has_its_mean_and_its_share_of_yes_if_it_holds_ten_images():
    h = torch.tensor([0.41, 0.45] * 6 + [0.95] * 9 + [float("nan")] * 20)
    found = facts.reliability(h, torch.tensor([True, False] * 6 + [True] * 29))
    assert found.said == pytest.approx([0.43])
    assert (found.true, found.images) == ([0.5], [12])


def test_classes_that_early_exits_mix_up_are_counted_by_pair(evil):
    leaving = evil.traces.at(0)
    pairs = facts.mixed_up(evil.traces, leaving, most=100)
    assert sum(count for *_, count in pairs) == 30  # every second answer of exit 0 is wrong
    assert {(said - truth) % 4 for truth, said, _ in pairs} == {1}
    assert facts.put_right(evil.traces, leaving) == 0


def test_images_that_only_the_blend_at_the_end_puts_right_are_no_work_of_an_early_exit():
    answers, bare = torch.tensor([[1, 1], [1, 1]]), torch.tensor([[1, 1], [0, 0]])
    traces = Traces(answers, torch.ones(2, 2), torch.ones(2).long(), torch.ones(2), torch.zeros(1), own=bare)
    assert facts.put_right(traces, torch.tensor([0, 1])) == 1
    assert facts.changed_at_the_end(traces, torch.tensor([0, 1])) == (0, 1)


def test_the_page_shows_the_calibration_error_and_auroc_of_the_results_table(evil):
    results = {"calibration": {"target": "agrees", "images": 50}}  # the heads' own confidence is not fitted to that
    model, traces = evil.model, evil.traces
    shown = words.calibration_table(replace(evil, metrics={"results": results}))[1:]
    table = [confidence_quality(model, traces, n) for n in range(traces.exits)]
    assert [row[1:3] for row in shown] == [(f"{e:.3f}", f"{a:.3f}") for e, a in (row.values() for row in table)]


def test_indices_are_spread_over_all():
    assert facts.spread_over(torch.arange(100), 4) == [0, 25, 50, 75]
    assert facts.spread_over(torch.arange(3), 4) == [0, 1, 2]


def test_what_a_run_recorded_gives_the_same_shares():
    rows = [
        {"name": name, "accuracy": 0.9, "fidelity": 1.0, "cost": 0.5, "right": right}
        for name, right in (("backbone", 0.5), ("exit 0", 0.75), ("early exit", None))
    ]
    found = facts.recorded({"rows": rows, "leaving": [0.8, 0.2]})
    assert found.right == pytest.approx([0.6, 0.1])
    assert found.wrong == pytest.approx([0.2, 0.1])
    assert facts.recorded({}) is None
