from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import replace
from functools import cache as once_for_all
from itertools import pairwise
from statistics import mean

import pytest
import torch
from device import here
from hypothesis import given, settings
from hypothesis import strategies as st
from populations import NEVER, POPULATIONS, draw, population
from small import labelled, made, once
from tiny import one_line
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError, RunError
from ptee.exits.times import BatchTimes
from ptee.production.curve import Curve, Point, Wish, best_within
from ptee.tuning.config import Target
from ptee.tuning.operating_points import _undominated, operating_points
from ptee.tuning.solution import Solution
from ptee.tuning.targets import solve
from ptee.tuning.traces import Traces


def curve(**changes: object) -> Curve:
    points = [
        Point(threshold=(t, t), cost=cost, fidelity_drop=differ, drop=drop, time_ms=ms)
        for t, cost, differ, drop, ms in [(0.1, 0.3, 0.2, 0.1, 7), (0.5, 0.5, 0.1, 0.02, 6), (2.0, 1.1, 0, 0, 9)]
    ]
    return Curve(**{"confidence": "learned", "answers": "own", "images": 1000, "points": points} | changes)


@pytest.mark.parametrize(
    ("wish", "threshold"),
    [
        ({"max_cost": 0.5}, 0.5),
        ({"max_cost": 0.49}, 0.1),
        ({"max_cost": 5}, 2.0),
        ({"max_drop": 0.05}, 0.5),
        ({"max_drop": 0}, 2.0),
        ({"max_fidelity_drop": 0.2}, 0.5),
        ({"max_time_ms": 7}, 0.5),
    ],
    ids=str,
)
def test_the_best_point_within_a_limit_is_found(wish, threshold):
    assert best_within(curve(), Wish(**wish)).threshold == (threshold, threshold)


def test_what_is_above_a_limit_by_rounding_alone_is_within_it():
    points = [Point(threshold=(t,), cost=t, fidelity_drop=d) for t, d in {0.5: 0.1 + 0.2, 0.9: 0.0}.items()]
    assert best_within(curve(points=points), Wish(max_fidelity_drop=0.3)).threshold == (0.5,)


def test_of_points_that_lose_as_much_the_one_with_more_of_the_backbones_answers_is_taken():
    differ = {0.1: 0.22, 0.5: 0.18, 0.9: 0.18, 2.0: 0.0}
    points = [
        Point(threshold=(t,), cost=t / 2, fidelity_drop=d, drop=0.02 if t < 1 else 0.0) for t, d in differ.items()
    ]
    assert best_within(curve(points=points), Wish(max_cost=0.5)).threshold == (0.5,)


def test_of_points_that_cost_as_much_the_one_that_loses_less_is_taken():
    points = [Point(threshold=(t,), cost=0.5, fidelity_drop=0.2, drop=d) for t, d in {0.1: 0.02, 0.5: 0.01}.items()]
    points.append(points[1].model_copy(update={"threshold": (0.6,), "fidelity_drop": 0.1}))
    assert best_within(curve(points=points), Wish(max_drop=0.05)).threshold == (0.6,)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (
            {"max_cost": 0.2},
            "max_cost=0.2 is below everything on the curve of this run, which begins at 0.3000. Give max_cost=0.3 or more",
        ),
        ({"max_drop": -0.1}, "max_drop=-0.1 is below everything"),
        ({"max_cost": 50}, r"max_cost=50 must be below 10\. Did you mean 0\.5\?"),
        ({"max_cost": float("nan")}, "max_cost=nan must be a finite number"),
        ({"max_drop": 1}, "max_drop=1 must be below 1"),
        ({"max_cost": 0.5, "max_drop": 0.1}, "Give one of .*: max_cost, max_drop are given"),
        ({}, "Give one of .*: none is given"),
    ],
    ids=str,
)
def test_a_wish_that_cannot_be_met_is_refused_in_one_line(wish, words):
    with pytest.raises(PteeError, match=words) as refusal:
        best_within(curve(), Wish(**wish))
    one_line(refusal)


@pytest.mark.parametrize("name", ["cost", "drop", "fidelity_drop", "time_ms"])
@given(least=st.floats(1e-6, 0.9), scale=st.sampled_from([1, 1e3, 1e7]))
@settings(max_examples=60, deadline=None)
def test_the_least_value_that_a_refusal_prints_is_taken(name, least, scale):
    least *= scale if name == "time_ms" else 1
    point = {"threshold": (0.5,), "cost": 0.5, "fidelity_drop": 0.1, "drop": 0.1, "time_ms": 5} | {name: least}
    one = curve(points=[Point(**point)])
    with pytest.raises(PteeError) as refusal:
        best_within(one, Wish(**{f"max_{name}": least / 2}))
    printed = re.search(rf"Give max_{name}=(\S+) or more", str(refusal.value))
    assert printed
    assert best_within(one, Wish(**{f"max_{name}": float(printed[1])})) == one.points[0]


def above_one(model: ptee.EarlyExitModel) -> list[float]:
    """The thresholds that lose nothing, with a warning that the backbone without exits is cheaper."""
    with pytest.warns(UserWarning, match=r"cost 1\.\d+ times the bare backbone.*model\.off = range\(len\(model"):
        return model.threshold_for(max_fidelity_drop=0)


def test_a_curve_prints_as_a_table_that_says_which_exits_are_off():
    lines = str(curve(off=(1,))).splitlines()
    assert lines[0].split() == ["cost", "time", "ms", "drop", "fidelity", "drop", "T"]
    assert lines[2].split() == ["0.3000", "7.0000", "0.1000", "0.2000", "0.1,", "off"]
    assert lines[4].split()[-2:] == ["never,", "off"]
    assert len(lines) == 6
    assert lines[-1] == (
        f"What is to be expected, from {curve().images:,} images. drop: how far accuracy will be below the "
        "backbone's. fidelity drop: the share of answers that will not be the backbone's. T: of each exit; off: its head does not run; never: no image leaves there, but its head runs. A cost above 1 is more than "
        "the bare backbone's: model.off = range(len(model.exits)) costs 1 and loses nothing."
    )


def test_a_curve_of_few_images_says_which_loss_these_may_not_show():
    assert "from 5 images, on which a loss below 0.45 may not show. " in str(curve(images=5))
    assert "from 1 image, on which a loss below 0.95 may not show. " in str(curve(images=1))
    assert "may not show" not in str(curve(images=299))


def test_thresholds_from_a_curve_of_few_images_come_with_a_warning():
    model = made()
    point = Point(threshold=(0.5,) * len(model.exits), cost=0.6, fidelity_drop=0)
    model.curve = curve(points=[point], images=5).model_copy(update={"confidence": model.confidence})
    with pytest.warns(UserWarning, match=r"5 images are too few to show a loss of 0\.02 \(that takes 149\)"):
        model.threshold_for(max_fidelity_drop=0.02)
    model.threshold_for(max_cost=0.7)  # says nothing


def test_the_times_of_a_curve_are_called_those_of_a_batch():
    times = "the bare backbone's time (hooks, batch 1, cpu)"
    assert " images. time ms: of a batch (hooks, batch 1, cpu). drop: " in str(curve(time_of=times))


def test_thresholds_that_cost_more_than_the_bare_backbone_come_with_a_warning():
    model = made()
    model.curve = curve(points=[Point(threshold=(2.0,) * len(model.exits), cost=1.1, fidelity_drop=0)]).model_copy(
        update={"confidence": model.confidence}
    )
    assert above_one(model) == [2.0] * len(model.exits)


def test_what_a_curve_does_not_know_is_refused_by_what_to_type():
    bare = curve(points=[Point(threshold=(0.5,), cost=0.5, fidelity_drop=0.1)])
    with pytest.raises(PteeError, match=r"ptee bench RUN --save, then ptee tune RUN --max-drop 0.01 --cost time"):
        best_within(bare, Wish(max_time_ms=3))
    with pytest.raises(PteeError, match=r"had no labels.*Give max_fidelity_drop=0.01"):
        best_within(bare, Wish(max_drop=0.01))


# ---------------------------------------------------------------------------------------------------- made by tuning


@once
def tuned() -> ptee.EarlyExitModel:
    model = made()
    ptee.tune(model, TensorDataset(*labelled(60)), max_fidelity_drop=0.25, answers="own")
    return model


def test_tuning_keeps_a_curve_from_which_thresholds_are_read_without_images():
    model = made()
    with pytest.raises(
        PteeError, match=r"no curve.*Type ptee tune RUN --max-drop 0.01 \(in Python: ptee.tune"
    ) as refusal:
        model.threshold_for(max_cost=0.6)
    one_line(refusal)
    model = tuned()
    assert model.curve is not None
    assert model.curve.at(model.threshold).promised == 0.25
    cheap, faithful = model.threshold_for(max_cost=1.0), above_one(model)
    model.threshold = cheap
    with torch.no_grad():
        assert model.predict(labelled(60)[0].to(here())).cost.mean() <= 1.0 + 1e-6
    assert min(faithful) >= max(0, min(cheap))


def test_a_curve_is_of_one_setting():
    model = tuned()
    model.confidence = "max_prob"
    with pytest.raises(
        PteeError, match=r"made with confidence='learned', and now it is 'max_prob'. Tune again"
    ) as refusal:
        model.threshold_for(max_cost=1.0)
    one_line(refusal)


def test_a_curve_is_saved_with_the_run_and_an_old_run_has_none(tmp_path):
    model = tuned()
    model.save_pretrained(tmp_path / "new")
    again = ptee.load(tmp_path / "new", backbone=made().backbone)
    assert again.curve == model.curve
    assert again.threshold_for(max_cost=1.0) == model.threshold_for(max_cost=1.0)
    file = tmp_path / "new" / "config.json"
    config = json.loads(file.read_text())
    del config["curve"]
    file.write_text(json.dumps(config))
    assert ptee.load(tmp_path / "new", backbone=made().backbone).curve is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["points"][0].update(cost="NaN"), "cost"),
        (lambda c: c["points"][0].update(cost=-1), "cost=-1 must be 0 or more"),
        (lambda c: c["points"][0].update(drop=None), "some have a drop and others have none"),
        (lambda c: c["points"][0].update(threshold=[0.5]), "different numbers of thresholds"),
        (lambda c: c.update(off=[], points=[c["points"][0] | {"threshold": [1]}]), "1 thresholds for 2 exits"),
        (lambda c: c.update(points=[]), "a list of 1 or more"),
        (lambda c: c.update(off=[-5] * 1000), r"off\[0\]=-5 must be 0 or more"),
        (lambda c: c.update(off=[0] * 1000), r"curve\.off=\[0, 0.* must be numbers of exits, 0 to 1, each once"),
        (lambda c: c.update(off=[999]), r"curve\.off=\[999\] must be numbers of exits, 0 to 1, each once"),
        (lambda c: c.update(answers="both"), r"answers='both' is unknown"),
        (lambda c: c.update(time_of="ms\x1b[2J"), "time_of.* must be text without control characters"),
        (lambda c: c.update(confidence="a\nb"), "confidence.* must be text without control characters"),
        (lambda c: c["points"][0].update(cost=1e308), "cost"),
        (lambda c: c["points"][0].update(promised=1.0), r"promised=1\.0 must be below 1"),
        (lambda c: c.update(images=0), "images=0 must be 1 or more"),
    ],
)
def test_a_damaged_curve_is_refused_by_its_field(change, words, tmp_path):
    tuned().save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    change(config["curve"])
    file.write_text(json.dumps(config))
    with pytest.raises(RunError, match=words) as refusal:
        ptee.load(tmp_path / "run", backbone=made().backbone)
    one_line(refusal)


def test_the_monitor_takes_the_promise_of_the_curve():
    model = tuned()
    with model.monitor(confidence=0.9) as monitor:
        assert monitor.max_fidelity_drop == 0.25
    model.threshold = above_one(model)
    with pytest.raises(
        PteeError, match=r"were not chosen for that\. Say how many may, such as max_fidelity_drop=0\.01"
    ):
        model.monitor()  # what 60 images measured is no promise
    model.curve = model.curve.model_copy(
        update={"points": tuple(p.model_copy(update={"promised": None}) for p in model.curve.points)}
    )
    point = model.curve.points[0]  # as if it had been chosen for a drop of accuracy
    model.threshold = point.threshold
    with pytest.raises(
        PteeError, match=rf"About {point.fidelity_drop:.4f} of them are expected to differ\. Say how many may"
    ):
        model.monitor()
    model.confidence = "max_prob"
    with pytest.raises(PteeError, match="The curve was made with confidence="):
        model.monitor()


@pytest.mark.parametrize("change", [ptee.calibrate, lambda m, data: ptee.train(m, data, epochs=1)])
def test_a_curve_ends_where_the_confidence_is_fitted_or_the_heads_are_trained(change):
    model = tuned()
    model.confidence, model.off, curve = "learned", [], model.curve
    model.curve = curve  # as if it were of all exits
    change(model, torch.utils.data.TensorDataset(*labelled(60)))
    assert model.curve is None


@pytest.mark.parametrize("answers", ["own", "blended"])
def test_a_curve_ends_where_the_weights_of_the_blend_that_it_is_of_are_set_by_hand(answers, tmp_path):
    model, data = made(), TensorDataset(*labelled(60))
    ptee.tune(model, data, max_fidelity_drop=0.5, answers="blended")
    blend = model.blend
    ptee.tune(model, data, max_fidelity_drop=0.5, answers=answers)
    assert model.answers == answers
    kept = model.curve
    model.blend = replace(blend, weights={key: tuple(v + 1 for v in of) for key, of in blend.weights.items()})
    assert model.curve == (kept if answers == "own" else None)
    if answers == "blended":
        with pytest.raises(PteeError, match=r"no curve any more: .*have changed. Tune again: ptee tune RUN") as refusal:
            model.threshold_for(max_cost=1.0)
        one_line(refusal)
    model.save_pretrained(tmp_path / "run")
    assert ptee.load(tmp_path / "run", backbone=made().backbone).curve == model.curve


def test_a_curve_ends_where_the_calibration_is_set_by_hand_and_a_copy_keeps_it():
    model, data = made(), TensorDataset(*labelled(60))
    ptee.calibrate(model, data)
    ptee.tune(model, data, max_fidelity_drop=0.25, answers="own")
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.curve == model.curve is not None
    model.calibrated = replace(model.calibrated, shift=(1.0, 1.0))
    assert model.curve is None


# ---------------------------------------------------------------------------------------------------- what it says is true


@once_for_all
def sampled() -> tuple[Traces, Traces, Solution, tuple[Point, ...]]:
    """A population, images drawn from it, thresholds that were chosen on these, and the points of their curve."""
    whole = population("calibrated", 20_000)
    sample = draw(whole, 2000, 1)
    found = solve(sample, Target("max_drop", 0.01), one_threshold=True)
    return whole, sample, found, operating_points(sample, found).points


def test_what_a_point_says_holds_on_other_images():
    whole, sample, found, points = sampled()
    assert len(points) > 10
    for point in points:
        cost, drop = lost_of(whole, found, point)
        score = whole.score(whole.leaving(point.threshold), found.off)
        error = 3 * (point.fidelity_drop / len(sample.bare)) ** 0.5  # three standard errors of a drop on so many images
        assert cost == pytest.approx(point.cost, abs=0.02)
        assert drop <= point.drop + error
        assert 1 - score.fidelity <= point.fidelity_drop + error
        assert drop >= point.drop - 0.01, "and not only because it says too much"


def test_of_two_points_the_cheaper_one_never_says_that_it_loses_less():
    _, _, found, points = sampled()
    assert any(point.threshold == found.threshold for point in points)
    others = [point for point in points if min(point.threshold) <= 1]
    for cheap, dear in pairwise(others):
        assert cheap.cost <= dear.cost
        assert cheap.drop >= dear.drop
        assert cheap.fidelity_drop >= dear.fidelity_drop


def test_a_point_that_costs_more_and_takes_less_time_is_kept():
    first = Point(threshold=(0.5,), cost=0.5, fidelity_drop=0.1, time_ms=8)
    points = [first, Point(threshold=(0.6,), cost=0.6, fidelity_drop=0.1, time_ms=6)]
    assert _undominated(points, keep=()) == points[::-1]
    assert _undominated([*points, first.model_copy(update={"cost": 0.7, "threshold": (0.7,)})], keep=()) == points[::-1]


def test_never_leaving_is_a_point_so_that_every_drop_can_be_met():
    whole, sample, found, points = sampled()
    never = points[-1]
    assert (never.threshold, never.drop, never.fidelity_drop) == ((2.0,) * 3, 0, 0)
    assert never.cost == pytest.approx(whole.costs_without(found.off)[-1].item())
    curve = operating_points(sample, replace(NEVER, threshold=(0.0,) * 3, off=()))
    assert best_within(curve, Wish(max_drop=1e-5)).drop <= 1e-5
    assert best_within(curve, Wish(max_fidelity_drop=0)).fidelity_drop == 0


@pytest.mark.parametrize(("kind", "promised"), [("max_drop", None), ("max_fidelity_drop", 0.2)])
def test_thresholds_that_were_chosen_are_a_point_whatever_they_lose_and_promise_what_was_asked_for(kind, promised):
    sample = draw(population("calibrated", 2000), 100, 1)
    sample = replace(sample, targets=None if kind == "max_fidelity_drop" else sample.targets)
    found = replace(NEVER, target=Target(kind, 0.2), threshold=(0.99,) * 3, off=(), margin=0.9)
    point = operating_points(sample, found).at(found.threshold)
    assert point is not None
    assert point.promised == promised


def test_who_never_leaves_needs_no_reserve():
    sample = draw(population("calibrated", 2000), 100, 1)
    found = replace(NEVER, target=Target("max_fidelity_drop", 0.01), margin=0.01)
    [point] = operating_points(sample, found).points
    assert (point.fidelity_drop, point.drop, point.cost, point.promised) == (0, 0, 1, 0.01)


@pytest.mark.parametrize("n", range(9, 30))
def test_no_more_answers_differ_than_there_are_whatever_the_number_of_images(n):
    answers = torch.tensor([[1], [0]], device="cpu").expand(2, n)
    h, none = torch.ones(2, n, device="cpu"), torch.zeros(0, device="cpu")
    sample = Traces(answers, h, None, torch.tensor([0.5, 1.0], dtype=torch.float64, device="cpu"), none)
    found = replace(NEVER, threshold=(2.0,), off=(), target=Target("max_fidelity_drop", 0.5))
    points = operating_points(sample, found).points
    assert max(point.fidelity_drop for point in points) == 1


@pytest.mark.parametrize("name", POPULATIONS)
def test_thresholds_for_a_drop_lose_no_more_on_average_over_draws_of_few_images(name):
    whole, lost = population(name, 20_000), []
    for seed in range(8):
        sample = draw(whole, 500, seed)
        found = solve(sample, Target("max_drop", 0.01), one_threshold=True)
        point = best_within(operating_points(sample, found), Wish(max_drop=0.01))
        lost.append(lost_of(whole, found, point)[1])
    assert mean(lost) <= 0.01


def lost_of(whole: Traces, found: Solution, point: Point) -> tuple[float, float]:
    """What a point costs, and loses of accuracy, in a population."""
    bare = whole.score_at(whole.exits)
    score = whole.score(whole.leaving(point.threshold), found.off)
    return score.cost, bare.accuracy - score.accuracy


def test_a_curve_has_milliseconds_where_the_run_has_times():
    sample = draw(population("calibrated", 2000), 400, 1)
    rows = torch.arange(5.0, dtype=torch.float64) / 4
    times = BatchTimes(0.25 * rows.expand(4, -1), 0.01 * rows.expand(3, -1), 0.0, "units", bare_ms=40.0)
    timed = replace(sample, times=times)
    for point in operating_points(timed, replace(NEVER, threshold=(0.9,) * 3, off=())).points:
        expected = timed.score(timed.leaving(point.threshold)).time
        assert expected is not None
        assert point.time_ms == pytest.approx(40 * expected)
