from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from cases import slow
from device import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from ptee._common.errors import PteeError
from ptee.exits.config import NEVER, remark
from ptee.exits.times import BatchTimes
from ptee.tuning import targets as tuning_targets
from ptee.tuning import threshold_search
from ptee.tuning.config import Promise, Target, describe_thresholds
from ptee.tuning.reachable import Margin
from ptee.tuning.solution import Solution
from ptee.tuning.targets import curves, solve
from ptee.tuning.traces import Score, Traces, truncation

K = 3
TARGETS = [("max_drop", 0.0), ("max_drop", 0.1), ("max_fidelity_drop", 0.2), ("max_cost", 0.7)]
each_target = pytest.mark.parametrize("target", [Target(*t) for t in TARGETS], ids=str)
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def on_the_cpu(device: torch.device) -> None:
    """Traces lie there, wherever the network ran."""
    torch.set_default_device(None)


def random_traces(seed: int, exits: int, n: int, levels: int = 8) -> Traces:
    """Answers, confidences with ties, and costs that grow from exit to exit."""
    g = drawn(seed)
    heads = 0.2 * torch.rand(exits, generator=g, dtype=torch.float64)
    cuts = torch.rand(exits, generator=g, dtype=torch.float64).sort().values
    h = torch.randint(levels, (exits + 1, n), generator=g) / levels
    h[-1] = 1
    return Traces(
        answers=torch.randint(K, (exits + 1, n), generator=g),
        confidence=h,
        targets=torch.randint(K, (n,), generator=g),
        costs=torch.cat([cuts, torch.ones(1)]) + torch.cat([heads, torch.zeros(1)]).cumsum(0),
        sample=torch.empty(0),
        head_costs=heads,
    )


def easy_and_hard(seed: int, exits: int, n: int) -> Traces:
    """Later exits are better, and a confidence knows something of what is hard."""
    g = drawn(seed)
    hard, skill = torch.rand(n, generator=g), torch.linspace(0.7, 0.9, exits + 1)[:, None]
    right = hard + 0.15 * torch.randn(exits + 1, n, generator=g) < skill
    h = torch.sigmoid(6 * (skill - hard) + torch.randn(exits + 1, n, generator=g))
    h[-1] = 1
    heads = torch.full((exits,), 0.03, dtype=torch.float64)
    passed = torch.cat([heads.cumsum(0), heads.sum()[None]])
    costs = torch.linspace(0.15, 1, exits + 1, dtype=torch.float64) + passed
    return Traces(right.int(), h, torch.ones(n, dtype=torch.int32), costs, torch.empty(0), head_costs=heads)


def lost(traces: Traces, score: Score, fidelity: bool = False) -> float:
    """Share of the answers that differ from the backbone's, or accuracy below the backbone's."""
    return 1 - score.fidelity if fidelity else traces.score_at(traces.exits).accuracy - score.accuracy


def aim(traces: Traces, target: Target, score) -> tuple[float, float]:
    """What is minimised, and by how much the limit is exceeded."""
    loss = lost(traces, score, fidelity=target.kind == "max_fidelity_drop")
    least, bound = (loss, score.cost) if target.kind == "max_cost" else (score.cost, loss)
    return least, bound - target.limit


def by_hand(traces: Traces, target: Target, one_threshold: bool = False) -> float | None:
    """Every subset of exits with every threshold between two confidences."""
    exits = traces.exits
    found = []
    for on in itertools.product([True, False], repeat=exits):
        off = [n for n in range(exits) if not on[n]]
        every = [sorted({*traces.confidence[n].tolist(), NEVER}) if on[n] else [NEVER] for n in range(exits)]
        if one_threshold:
            values = sorted({v for each in every for v in each})
            tried = ([t if on[n] else NEVER for n in range(exits)] for t in values)
        else:
            tried = itertools.product(*every)
        scores = (aim(traces, target, traces.score(traces.leaving(thresholds), off)) for thresholds in tried)
        found += [least for least, over in scores if over <= TOLERANCE]
    return min(found, default=None)


def solved(traces: Traces, target: Target, one_threshold: bool = False) -> float | None:
    try:
        found = solve(traces, target, one_threshold=one_threshold, margin=0)
    except PteeError:
        return None
    least, over = aim(traces, target, found.score)
    assert over <= TOLERANCE, "the target is met on the traces"
    return least


small = st.tuples(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 8))
targets = st.sampled_from([Target(*t) for t in TARGETS])


@settings(deadline=None, max_examples=25)
@given(small, targets)
def test_with_few_images_and_two_exits_the_optimum_is_found(shape, target):
    traces = random_traces(*shape)
    assert solved(traces, target) == pytest.approx(by_hand(traces, target), abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 20)), targets)
def test_one_threshold_is_the_best_single_threshold(shape, target):
    traces = random_traces(*shape)
    assert solved(traces, target, one_threshold=True) == pytest.approx(
        by_hand(traces, target, one_threshold=True), abs=1e-6
    )


@settings(deadline=None, max_examples=15)
@given(st.tuples(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 60)), targets)
def test_several_thresholds_are_never_worse_than_the_best_one(shape, target):
    traces = random_traces(*shape)
    single, several = solved(traces, target, one_threshold=True), solved(traces, target)
    assert (single is None) == (several is None)
    assert single is None or several <= single + 1e-6


@settings(deadline=None, max_examples=12)
@given(st.tuples(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 40)), targets, st.sampled_from([0.5, 3, 5]))
def test_only_the_order_of_the_confidences_matters(shape, target, power):
    traces = random_traces(*shape)
    other = replace(traces, confidence=traces.confidence**power)
    assert solved(traces, target) == solved(other, target)


@each_target
def test_the_score_is_that_of_the_thresholds_without_the_heads_that_are_off(target):
    traces = easy_and_hard(0, 4, 300)
    found = solve(traces, target, margin=0)
    on = [t != NEVER for t in found.threshold]
    passed = [0.03 * sum(on[: n + 1]) for n in range(4)]  # each head costs .03
    costs = torch.linspace(0.15, 1, 5) + torch.tensor([*passed, passed[-1]])
    assert found.cost == pytest.approx(costs[traces.leaving(found.threshold)].mean().item())
    assert found.on(traces) == found.score
    assert found.off == tuple(n for n in range(4) if not on[n])


@each_target
def test_one_threshold_is_the_same_for_all_exits_that_are_on(target):
    found = solve(easy_and_hard(1, 4, 200), target, one_threshold=True)
    assert len({t for t in found.threshold if t != NEVER}) <= 1


def test_an_exit_whose_head_costs_more_than_it_saves_is_off():
    traces = easy_and_hard(0, 3, 300)
    more = torch.tensor([0, 0.47, 0])  # of the second head
    dear = replace(
        traces, costs=traces.costs + torch.tensor([0, 0.47, 0.47, 0.47]), head_costs=traces.head_costs + more
    )
    found = solve(dear, Target("max_drop", 0.02), margin=0)
    assert 1 in found.off
    assert "off" in str(found)


def test_where_no_exit_pays_all_are_off_and_only_the_backbone_runs():
    traces = random_traces(0, 2, 30)
    wrong = replace(traces, answers=torch.stack([*(traces.answers[-1:] + 1).expand(2, -1), traces.answers[-1]]))
    found = solve(wrong, Target("max_fidelity_drop", 0), margin=0)
    assert (found.off, found.threshold, found.cost) == ((0, 1), (NEVER, NEVER), 1.0)


def test_with_too_many_exits_to_try_every_subset_the_result_is_still_better_than_one_threshold():
    traces = easy_and_hard(2, 8, 150)
    single, several = (solve(traces, Target("max_drop", 0.02), one_threshold=one, margin=0) for one in (True, False))
    everything = traces.score(traces.leaving([0.9] * 8))
    assert several.cost <= single.cost + 1e-6
    assert several.cost < everything.cost
    assert several.drop <= 0.02 + TOLERANCE


def test_a_limit_that_is_less_than_its_reserve_names_the_reserve_and_what_is_possible():
    traces, said = (
        random_traces(1, exits=2, n=40),
        r"max_drop=0\.01 less margin=0\.05 cannot be met: .* do not gain so much\.",
    )
    with pytest.raises(PteeError, match=rf"{said} Give max_drop=0\.05 or more\.$"):
        solve(traces, Target("max_drop", 0.01), margin=0.05)
    assert solve(traces, Target("max_drop", 0.05), margin=0.05)


def test_a_cost_that_no_image_can_have_for_want_of_a_confidence_says_so():
    traces = random_traces(1, exits=2, n=40)
    traces.confidence[:2] = math.nan
    with pytest.raises(PteeError, match=r"max_cost=0\.99 cannot be met: too many confidences are NaN"):
        solve(
            replace(traces, costs=torch.tensor([0.2, 0.5, 1.1], dtype=torch.float64)),
            Target("max_cost", 0.99),
            margin=0,
        )


def test_an_image_whose_confidence_is_nan_never_leaves():
    traces = easy_and_hard(0, 2, 100)
    traces.confidence[:2, ::3] = math.nan
    found = solve(traces, Target("max_cost", 0.9))
    assert (traces.leaving(found.threshold)[::3] == 2).all()
    assert found.cost <= 0.9


def test_thresholds_lie_between_confidences():
    traces = easy_and_hard(0, 3, 100)
    found = solve(traces, Target("max_drop", 0.05), margin=0)
    for n, t in enumerate(found.threshold):
        assert n in found.off or t == 0 or (traces.confidence[n].double() - t).abs().min() > 0


def test_a_margin_is_kept_in_reserve():
    traces = easy_and_hard(0, 3, 500)
    wide, tight = (solve(traces, Target("max_drop", 0.03), margin=margin) for margin in (0, 0.02))
    assert tight.drop <= 0.01 + TOLERANCE
    assert tight.cost > wide.cost


@pytest.mark.parametrize("kind", ["max_drop", pytest.param("max_fidelity_drop", marks=pytest.mark.slow)])
def test_the_margin_auto_keeps_the_target_on_other_images_on_average(kind):
    target = Target(kind, 0.05)

    def mean_excess(margin: Margin) -> float:
        total = 0.0
        for seed in range(6):
            other = easy_and_hard(100 + seed, 3, 4000)
            score = solve(easy_and_hard(seed, 3, 300), target, margin=margin).on(other)
            total += lost(other, score, fidelity=kind == "max_fidelity_drop")
        return total / 6 - target.limit

    broken = mean_excess(0.0)
    assert broken > 0.01
    assert mean_excess("auto") < broken / 3


def test_the_margin_auto_is_the_default_and_never_larger_than_the_limit():
    found = solve(easy_and_hard(0, 4, 400), Target("max_drop", 0.02))
    assert 0 < found.margin <= 0.02
    assert found.drop <= 0.02 - found.margin + TOLERANCE
    assert f"below the backbone's, on average, with {found.margin:.4f} of that in reserve for new images." in str(found)
    assert json.loads(json.dumps(found.to_dict()))["margin"] == found.margin


def test_where_cheaper_thresholds_need_more_reserve_than_the_limit_it_says_so_and_what_takes_them():
    traces = easy_and_hard(0, 3, 300)
    found, risky = (solve(traces, Target("max_drop", 0.0), margin=margin) for margin in ("auto", 0))
    assert risky.cost < found.cost
    assert "Other thresholds would cost less here" in str(found)
    assert "ptee tune RUN --max-drop 0 --margin 0 (in Python: margin=0)" in str(found)
    promised = replace(found, promise=Promise(0.95, 300, False, found.threshold, found.off, found.price))
    others = risky, solve(traces, Target("max_drop", 0.0), one_threshold=True), solve(traces, Target("max_drop", 0.1))
    assert not any("Other thresholds" in str(each) for each in (promised, *others))


def test_a_margin_of_nothing_is_not_advised_where_it_was_seen_to_save_nothing(monkeypatch):
    traces, target = easy_and_hard(0, 3, 300), Target("max_drop", 0.0)
    found, kept = solve(traces, target), tuning_targets._kept

    def missing(ways: list[tuning_targets._Way], images: Traces, one: bool, margin: Margin) -> Solution:
        return found if margin == 0 else kept(ways, images, one, margin)  # as if final weights missed the target

    assert found.several_risky
    monkeypatch.setattr(tuning_targets, "_kept", missing)
    assert solve(traces, target) == replace(found, several_risky=False)


def test_nothing_is_kept_in_reserve_where_images_that_were_left_out_lose_nothing():
    h = torch.tensor([0.9, 0.5, 0.1]).repeat(2, 40)
    right = torch.stack([h[0] > 0.8, h[1] > 0.4])
    every = torch.ones(1, 120)
    costs = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    traces = Traces(torch.cat([right, every]).int(), torch.cat([h, every]), every[0].int(), costs, torch.empty(0))
    assert solve(traces, Target("max_drop", 0.0), margin="auto").threshold == pytest.approx((0.7, 0.3))


def test_nothing_is_kept_in_reserve_for_a_cost_or_with_a_handful_of_images():
    traces = easy_and_hard(0, 3, 200)
    assert solve(traces, Target("max_cost", 0.6), margin="auto") == solve(traces, Target("max_cost", 0.6), margin=0)
    assert solve(traces.rows(torch.arange(7)), Target("max_drop", 0.5), margin="auto").margin == 0


def test_where_every_exit_costs_more_than_the_backbone_all_are_off_for_a_cost_of_one():
    traces = easy_and_hard(0, 3, 50)
    first_is_dear = traces.head_costs + torch.tensor([2, 0, 0])
    all_read_it = torch.tensor([False, True, True])
    traces = replace(traces, costs=traces.costs + 2, head_costs=first_is_dear, builds_on_previous=all_read_it)
    found = solve(traces, Target("max_cost", 1.2))
    assert (found.off, found.cost) == ((0, 1, 2), pytest.approx(1))
    with pytest.raises(PteeError, match=r"max_cost=0.9 cannot be reached.*1\.0000.*Give max_cost=1 or more"):
        solve(traces, Target("max_cost", 0.9))


def test_a_cost_that_cannot_be_reached_is_refused_with_what_can():
    traces = easy_and_hard(0, 3, 50)
    assert traces.costs[0].item() == pytest.approx(0.18)
    with pytest.raises(PteeError, match=r"max_cost=0.1 cannot be reached.*0\.1800 of.*Give max_cost=0.18 or more"):
        solve(traces, Target("max_cost", 0.1))
    with pytest.raises(PteeError, match=r"max_cost=0.3 less margin=0.2 cannot be reached.*Give max_cost=0.38 or more"):
        solve(traces, Target("max_cost", 0.3), margin=0.2)
    assert solve(traces, Target("max_cost", 0.18)).cost == pytest.approx(0.18)


def test_without_labels_a_drop_of_accuracy_is_refused_and_a_cost_loses_fidelity():
    traces = replace(easy_and_hard(0, 3, 100), targets=None)
    with pytest.raises(PteeError, match=r"no labels.*Give max_fidelity_drop=0.1 or max_cost=0.6\."):
        solve(traces, Target("max_drop", 0.1))
    assert solve(traces, Target("max_cost", 0.6)).drop is None


# words


def test_a_solution_can_be_written_as_json_and_prints_as_text():
    found = Solution(
        Target("max_drop", 0.02), (0.5, NEVER, 0.75), (1,), Score(0.88, 0.95, 0.4), Score(0.9, 1.0, 1.0), 1200
    )
    assert json.loads(json.dumps(found.to_dict()))["threshold"] == [0.5, NEVER, 0.75]
    assert str(found) == (
        "Target: accuracy at most 0.02 below the backbone's, on average.\n"
        "Chosen: T = 0.5, off, 0.75. Exits that are off do not pay, and the cost is without their heads.\nOn the 1,200 images that "
        "this was chosen on: accuracy 0.8800 (0.0200 below the backbone's), fidelity 0.9500, cost 0.4000 of the "
        "multiply-accumulates."
    )
    every = replace(found, off=(0, 1, 2), threshold=(NEVER,) * 3)
    assert "Chosen: all exits off, because none of them pays; the backbone answers every image." in str(every)


def test_a_cost_that_is_limited_on_few_images_may_be_higher_on_new_ones():
    score = Score(0.9, 0.95, 0.5)
    few, enough = (
        str(Solution(Target("max_cost", 0.6), (0.5,), (), score, Score(0.9, 1.0, 1.0), n)) for n in (298, 299)
    )
    assert "298 images are few to know a mean cost: on new ones it may be up to 0.057 higher." in few
    assert "few" not in enough


def test_a_solution_of_few_images_says_how_many_show_such_a_loss():
    found = Solution(Target("max_drop", 0.01), (0.5,), (), Score(0.9, 0.95, 0.4), Score(0.9, 1.0, 1.0), 298)
    few = "298 images are too few to show a loss of 0.01 (that takes 299): expect to lose more on new ones."
    assert few in str(found)
    assert "On the 1 image that this" in str(one := replace(found, samples=1)) and "1 image is too few" in str(one)
    assert few in str(replace(found, target=Target("max_fidelity_drop", 0.01)))
    for other in (
        replace(found, samples=299),
        replace(found, target=Target("max_cost", 0.5)),
        replace(found, target=Target("max_drop", -0.01)),
        replace(found, target=Target("max_drop", 0.0)),
        replace(found, threshold=(NEVER,), off=(0,)),
    ):
        assert "too few" not in str(other)


@pytest.mark.parametrize(
    ("accuracy", "words"), [(0.9, "0.0000 below"), (0.9 + 1e-12, "0.0000 below"), (0.88, "0.0200 below"), (0.905, "0.0050 above")]
)  # fmt: skip
def test_a_solution_says_how_far_its_accuracy_is_from_the_backbones(accuracy, words):
    found = Solution(Target("max_drop", 0.02), (0.5,), (), Score(accuracy, 1.0, 0.5), Score(0.9, 1.0, 1.0), 100)
    assert f"accuracy {accuracy:.4f} ({words} the backbone's), " in str(found)


@pytest.mark.parametrize(
    ("threshold", "off", "words"),
    [([0.5, 0.5], [], "0.5"), ([0.12345678, 0.5], [], "0.1235, 0.5"), ([0.9, NEVER], [1], "0.9, off"), ([NEVER] * 2, [0, 1], "off")],
    ids=str,
)  # fmt: skip
def test_thresholds_are_described_with_off_where_an_exit_is_off(threshold, off, words):
    assert describe_thresholds(threshold, off) == words


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        ([0.7], None), (None, None), ([2.0], "T above 1: nobody leaves."),
        ([70, 85], "T above 1: nobody leaves. A confidence lies between 0 and 1: did you mean 0.7,0.85?"),
        ([0.7, 85], "T above 1: nobody leaves at exit 1. A confidence lies between 0 and 1: did you mean 0.7,0.85?"),
        ([0.7, 2], None), ([0.7, float("inf")], None), ([70, 1.01], "T above 1: nobody leaves. A confidence lies between 0 and 1: did you mean 0.7,1.01?"),
        ([0.0, 0.5], "T at or below 0: everybody leaves at exit 0."),
    ],
    ids=str,
)  # fmt: skip
def test_thresholds_that_no_confidence_decides_are_remarked_on(threshold, words):
    assert remark(threshold) == words


@pytest.mark.parametrize("confidence", ["learned", "patience"])
def test_a_backbone_that_is_cut_off_runs_one_head_only(confidence):
    traces = Traces(
        answers=torch.tensor([[0, 1, 1, 0], [0, 1, 2, 0], [0, 1, 2, 2]]),
        confidence=torch.ones(3, 4),
        targets=torch.tensor([0, 1, 2, 0]),
        costs=torch.tensor([0.25, 0.75, 1.5], dtype=torch.float64),
        sample=torch.empty(0),
        head_costs=torch.tensor([0.125, 0.375], dtype=torch.float64),
        confidence_name=confidence,
    )
    found = [(s.accuracy, s.fidelity, s.cost) for s in truncation(traces)]
    assert found == [(3 / 4, 2 / 4, 0.25), (4 / 4, 3 / 4, 0.75 - 0.125)]


@pytest.mark.parametrize("seed", [0, slow(1)])
def test_a_larger_drop_never_costs_more_whatever_the_reserve(seed):
    traces, drops = easy_and_hard(seed, 3, 200), (0.05, 0.0, 0.005, 0.01, 0.02)
    found = curves(traces, drops)["own"]
    assert [s.target.limit for s in found] == list(drops)
    costs = [s.cost for s in sorted(found, key=lambda s: s.target.limit)]
    assert costs == sorted(costs, reverse=True)
    assert all(s.drop <= s.target.limit - s.margin + TOLERANCE for s in found)


# ---------------------------------------------------------------------------------------------------- by seconds


def timed(traces: Traces, batch: int = 8, heads: float = 1.0, first: float = 1.0, call: float = 0.0) -> Traces:
    """Times in proportion to the counted costs; the heads take some times as long, and so does the piece before exit 0."""
    rows = torch.arange(batch + 1, dtype=torch.float64) / batch
    head_costs = traces.head_costs
    before = torch.cat([head_costs.cumsum(0), head_costs.sum()[None]])
    segments = torch.diff(traces.costs - before, prepend=torch.zeros(1, dtype=torch.float64))
    segments[0] *= first
    return replace(
        traces, times=BatchTimes(segments[:, None] * rows, heads * head_costs[:, None] * rows, call, "units of a test")
    )


@each_target
def test_times_in_proportion_to_operations_choose_what_operations_choose(target):
    traces = easy_and_hard(0, 3, 200)
    by_count, by_time = solve(traces, target, margin=0), solve(timed(traces), target, margin=0)
    assert by_time.score.time == pytest.approx(by_time.cost)
    if target.kind == "max_cost":
        assert by_time.score.merit >= by_count.score.merit - TOLERANCE
    else:
        assert by_time.cost <= by_count.cost + TOLERANCE
    assert (by_count.score.time, by_count.unit, by_time.unit) == (None, "", "units of a test")


@pytest.mark.parametrize("margin", [0, slow("auto")])
def test_an_exit_whose_head_takes_long_is_switched_off(margin):
    traces, target = easy_and_hard(0, 3, 400), Target("max_drop", 0.02)
    slow = timed(traces)
    slow.times.heads[0] *= 30
    assert 0 not in solve(traces, target, margin=margin).off
    assert 0 in solve(slow, target, margin=margin).off


def test_if_nothing_is_faster_than_the_bare_backbone_all_exits_are_off_and_it_says_so():
    found = solve(timed(easy_and_hard(0, 3, 200), call=2.0), Target("max_drop", 0.02), margin=0)
    assert found.off == (0, 1, 2)
    assert found.score.time == 1
    assert "all exits off: nothing within the target is faster than the bare backbone units of a test." in str(found)


@pytest.mark.parametrize("seed", [0, *map(slow, (1, 2))])
def test_what_is_chosen_by_seconds_is_never_slower_than_what_is_chosen_by_operations(seed):
    traces, target = easy_and_hard(seed, 2, 200), Target("max_fidelity_drop", 0.05)
    g = drawn(seed)
    some = timed(traces)
    steps = torch.rand(some.times.segments.shape, generator=g, dtype=torch.float64).sort(1).values
    steps[:, 0] = 0
    some = replace(some, times=replace(some.times, segments=steps))
    by_count, by_time = solve(traces, target), solve(some, target)
    assert by_time.score.time <= by_count.on(some).time + TOLERANCE
    assert by_time.score.time == by_time.on(some).time


@pytest.mark.slow
def test_a_larger_drop_never_takes_longer():
    traces = timed(easy_and_hard(1, 2, 100), first=2.0, call=0.1)
    found = [s.score.time for s in curves(traces, (0.0, 0.01, 0.05))["own"]]
    assert found == sorted(found, reverse=True)


def test_a_largest_cost_is_one_of_seconds():
    traces = timed(easy_and_hard(2, 3, 300), first=2.0)
    found = solve(traces, Target("max_cost", 0.9))
    assert found.score.time <= 0.9 + TOLERANCE
    with pytest.raises(PteeError, match="cannot be reached"):
        solve(traces, Target("max_cost", 0.2))


# ---------------------------------------------------------------------------------------------------- how much is computed


def test_no_move_of_two_exits_is_tried_again_from_the_same_numbers(monkeypatch):
    tried, moved = [], threshold_search._moved

    def note(problem, price, taken, i, numbers, j):
        tried.append((id(problem), tuple(price.tolist()), tuple(taken.tolist()), i, j))
        return moved(problem, price, taken, i, numbers, j)

    monkeypatch.setattr(threshold_search, "_moved", note)
    solve(easy_and_hard(0, 3, 400), Target("max_drop", 0.02), margin=0.0)
    assert tried
    assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("seed", range(6))
def test_at_the_end_no_move_of_two_exits_betters_the_thresholds(seed, monkeypatch):
    improved, moved = threshold_search._improved, threshold_search._moved

    def checked(problem, on, price, taken):
        end = improved(problem, on, price, taken)
        exits = on.nonzero()[:, 0].tolist()
        for i, j in itertools.permutations(exits, 2):
            others = threshold_search._steps(problem.ends[i], int(end[i]))
            reached = moved(problem, price, end, i, end[i][None], j)[1]
            assert moved(problem, price, end, i, others, j)[1] >= reached - TOLERANCE
        return end

    monkeypatch.setattr(threshold_search, "_improved", checked)
    solve(easy_and_hard(seed, 4, 150), Target("max_fidelity_drop", 0.1), margin=0.0)
