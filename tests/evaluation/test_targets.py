from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptee._common.errors import PteeError
from ptee.evaluation.targets import Wish, curve, lost, oracle, scored, solve, solve_wish, truncation
from ptee.evaluation.threshold_search import NEVER
from ptee.evaluation.traces import Traces

K = 3
WISHES = [("max_drop", 0.0), ("max_drop", 0.1), ("max_fidelity_drop", 0.2), ("max_cost", 0.7)]
each_wish = pytest.mark.parametrize("wish", [Wish(*w) for w in WISHES], ids=str)
TOLERANCE = 1e-9


def random_traces(seed: int, exits: int, n: int, levels: int = 8) -> Traces:
    """Answers, confidences with ties, and costs that grow from exit to exit."""
    g = torch.Generator().manual_seed(seed)
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
    g = torch.Generator().manual_seed(seed)
    hard, skill = torch.rand(n, generator=g), torch.linspace(0.7, 0.9, exits + 1)[:, None]
    right = hard + 0.15 * torch.randn(exits + 1, n, generator=g) < skill
    h = torch.sigmoid(6 * (skill - hard) + torch.randn(exits + 1, n, generator=g))
    h[-1] = 1
    heads = torch.full((exits,), 0.03, dtype=torch.float64)
    passed = torch.cat([heads.cumsum(0), heads.sum()[None]])
    costs = torch.linspace(0.15, 1, exits + 1, dtype=torch.float64) + passed
    return Traces(right.int(), h, torch.ones(n, dtype=torch.int32), costs, torch.empty(0), head_costs=heads)


def aim(traces: Traces, wish: Wish, score) -> tuple[float, float]:
    """What is minimised, and by how much the limit is exceeded."""
    bare = traces.score(traces.at(len(traces.costs) - 1))
    loss = 1 - score.fidelity if wish.kind == "max_fidelity_drop" else lost(score, bare)
    least, bound = (loss, score.cost) if wish.kind == "max_cost" else (score.cost, loss)
    return least, bound - wish.limit


def by_hand(traces: Traces, wish: Wish, one: bool = False) -> float | None:
    """Every subset of exits with every threshold between two confidences."""
    exits = len(traces.costs) - 1
    found = []
    for on in itertools.product([True, False], repeat=exits):
        off = [n for n in range(exits) if not on[n]]
        every = [sorted({*traces.confidence[n].tolist(), NEVER}) if on[n] else [NEVER] for n in range(exits)]
        if one:
            values = sorted({v for each in every for v in each})
            tried = ([t if on[n] else NEVER for n in range(exits)] for t in values)
        else:
            tried = itertools.product(*every)
        scores = (aim(traces, wish, scored(traces, walls, off)) for walls in tried)
        found += [least for least, over in scores if over <= TOLERANCE]
    return min(found, default=None)


def solved(traces: Traces, wish: Wish, one: bool = False) -> float | None:
    try:
        found = solve_wish(traces, wish, one=one)
    except PteeError:
        return None
    least, over = aim(traces, wish, found.score)
    assert over <= TOLERANCE, "the wish is met on the traces"
    return least


small = st.tuples(st.integers(0, 10**6), st.integers(1, 2), st.integers(1, 8))
wishes = st.sampled_from([Wish(*w) for w in WISHES])


@settings(deadline=None, max_examples=60)
@given(small, wishes)
def test_on_few_rows_and_two_exits_it_finds_the_optimum(shape, wish):
    traces = random_traces(*shape)
    assert solved(traces, wish) == pytest.approx(by_hand(traces, wish), abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 20)), wishes)
def test_one_threshold_is_the_best_one(shape, wish):
    traces = random_traces(*shape)
    assert solved(traces, wish, one=True) == pytest.approx(by_hand(traces, wish, one=True), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 60)), wishes)
def test_several_thresholds_are_never_worse_than_the_best_one(shape, wish):
    traces = random_traces(*shape)
    single, several = solved(traces, wish, one=True), solved(traces, wish)
    assert (single is None) == (several is None)
    assert single is None or several <= single + 1e-6


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 40)), wishes, st.sampled_from([0.5, 3, 5]))
def test_confidences_that_order_rows_alike_give_the_same_choice(shape, wish, power):
    traces = random_traces(*shape)
    other = replace(traces, confidence=traces.confidence**power)
    assert solved(traces, wish) == solved(other, wish)


@each_wish
def test_the_score_is_that_of_the_thresholds_without_the_heads_that_are_off(wish):
    traces = easy_and_hard(0, 4, 300)
    found = solve_wish(traces, wish)
    heads = traces.head_costs.clone()
    heads[list(found.off)] = 0
    bare = traces.costs - torch.cat([traces.head_costs.cumsum(0), traces.head_costs.sum()[None]])
    cost = (bare + torch.cat([heads.cumsum(0), heads.sum()[None]]))[traces.leaving(found.threshold)].mean().item()
    assert found.cost == pytest.approx(cost)
    assert found.on(traces) == found.score
    assert all((found.threshold[n] == NEVER) == (n in found.off) for n in range(4))


@each_wish
@pytest.mark.parametrize("one", [False, True], ids=["several", "one"])
def test_the_same_traces_give_the_same_thresholds(wish, one):
    traces = easy_and_hard(1, 4, 200)
    assert solve_wish(traces, wish, one=one) == solve_wish(traces, wish, one=one)


@each_wish
def test_one_threshold_is_the_same_for_all_exits_that_are_on(wish):
    found = solve_wish(easy_and_hard(1, 4, 200), wish, one=True)
    assert len({t for t in found.threshold if t != NEVER}) <= 1


def test_an_exit_whose_head_costs_more_than_it_saves_is_off():
    traces = easy_and_hard(0, 3, 300)
    heads = torch.tensor([0.03, 0.5, 0.03], dtype=torch.float64)
    passed = torch.cat([heads.cumsum(0), heads.sum()[None]])
    dear = replace(traces, costs=torch.tensor([0.15, 0.43, 0.72, 1]) + passed, head_costs=heads)
    found = solve(dear, max_drop=0.02)
    assert 1 in found.off
    assert "exit 1" in str(found)


def test_where_no_exit_pays_all_are_off_and_the_backbone_is_left():
    traces = random_traces(0, 2, 30)
    wrong = replace(traces, answers=torch.stack([*(traces.answers[-1:] + 1).expand(2, -1), traces.answers[-1]]))
    found = solve(wrong, max_fidelity_drop=0)
    assert (found.off, found.threshold, found.cost) == ((0, 1), (NEVER, NEVER), 1.0)


def test_more_exits_than_can_be_tried_in_every_subset_lose_none_that_pay():
    traces = easy_and_hard(2, 8, 150)
    single, several = solve(traces, max_drop=0.02, one=True), solve(traces, max_drop=0.02)
    everything = scored(traces, [0.9] * 8)
    assert several.cost <= single.cost + 1e-6
    assert several.cost < everything.cost
    assert several.drop <= 0.02 + TOLERANCE


def test_a_confidence_that_is_no_number_never_leaves():
    traces = easy_and_hard(0, 2, 100)
    traces.confidence[:2, ::3] = math.nan
    found = solve(traces, max_cost=0.9)
    assert (traces.leaving(found.threshold)[::3] == 2).all()
    assert found.cost <= 0.9


def test_thresholds_lie_between_confidences():
    traces = easy_and_hard(0, 3, 100)
    found = solve(traces, max_drop=0.05)
    for n, t in enumerate(found.threshold):
        assert n in found.off or t == 0 or (traces.confidence[n].double() - t).abs().min() > 0


def test_a_margin_leaves_room():
    traces = easy_and_hard(0, 3, 500)
    wide, tight = solve(traces, max_drop=0.03), solve(traces, max_drop=0.03, margin=0.02)
    assert tight.drop <= 0.01 + TOLERANCE
    assert tight.cost > wide.cost


@pytest.mark.parametrize("kind", ["max_drop", "max_fidelity_drop"])
def test_a_margin_that_the_traces_say_keeps_the_wish_on_other_images_on_average(kind):
    wish = Wish(kind, 0.05)

    def mean_drop(margin):
        drops = []
        for seed in range(6):
            other = easy_and_hard(100 + seed, 3, 4000)
            score = solve_wish(easy_and_hard(seed, 3, 300), wish, margin=margin).on(other)
            drops.append(1 - score.fidelity if kind == "max_fidelity_drop" else lost(score, other.score(other.at(3))))
        return sum(drops) / len(drops)

    broken = mean_drop(0.0) - wish.limit
    assert broken > 0.01
    assert mean_drop("auto") - wish.limit < broken / 3


def test_a_margin_that_the_traces_say_is_told_and_never_above_the_wish():
    found = solve(easy_and_hard(0, 4, 400), max_drop=0.02, margin="auto")
    assert 0 < found.margin <= 0.02
    assert found.drop <= 0.02 - found.margin + TOLERANCE
    assert f"less {found.margin:.4f} in reserve" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["margin"] == found.margin


def test_where_images_that_are_left_out_lose_nothing_none_of_a_drop_of_0_needs_be_in_reserve():
    h = torch.tensor([0.9, 0.5, 0.1]).repeat(2, 40)
    right = torch.stack([h[0] > 0.8, h[1] > 0.4])
    every = torch.ones(1, 120)
    costs = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    traces = Traces(torch.cat([right, every]).int(), torch.cat([h, every]), every[0].int(), costs, torch.empty(0))
    assert solve(traces, max_drop=0.0, margin="auto").threshold == pytest.approx((0.7, 0.3))


def test_logits_are_not_copied_to_choose_thresholds(monkeypatch):
    traces, seen = replace(easy_and_hard(0, 2, 40), logits=torch.zeros(3, 40, K)), []
    rows = Traces.rows
    monkeypatch.setattr(Traces, "rows", lambda self, which: seen.append(self.logits) or rows(self, which))
    solve(traces, max_drop=0.1, margin="auto")
    assert seen
    assert all(logits is None for logits in seen)


def test_a_margin_that_was_given_is_told_as_such():
    said = str(solve(easy_and_hard(0, 3, 200), max_cost=0.7, margin=0.1))
    assert "for a mean cost of at most 0.7 less 0.1000 in reserve: accuracy" in said


def test_nothing_is_kept_in_reserve_of_a_cost_or_of_a_handful_of_rows():
    traces = easy_and_hard(0, 3, 200)
    assert solve(traces, max_cost=0.6, margin="auto") == solve(traces, max_cost=0.6)
    assert solve(traces.rows(torch.arange(7)), max_drop=0.5, margin="auto").margin == 0


def test_what_is_chosen_on_some_images_nearly_holds_on_others():
    found = solve(easy_and_hard(0, 4, 2000), max_drop=0.02)
    other = easy_and_hard(1, 4, 2000)
    score = found.on(other)
    assert score.cost == pytest.approx(found.cost, abs=0.05)
    assert lost(score, other.score(other.at(4))) < 0.04


REFUSED = {
    "no wish": ({}, "No wish is given: give one of max_drop=, max_fidelity_drop=, max_cost="),
    "two": ({"max_drop": 0.1, "max_cost": 0.5}, "max_drop and max_cost are both given"),
    "three": ({"max_drop": 0.1, "max_cost": 0.5, "max_fidelity_drop": 0.1}, "are all given"),
    "a percentage": (
        {"max_drop": 2},
        "max_drop is 2: give a fraction of at least 0 and below 1, such as 0.01 for one point",
    ),
    "one for a point": (
        {"max_drop": 1},
        "max_drop is 1: give a fraction of at least 0 and below 1, such as 0.01 for one point",
    ),
    "a negative drop": ({"max_fidelity_drop": -0.1}, "fraction of at least 0 and below 1"),
    "NaN": ({"max_drop": math.nan}, "max_drop is nan"),
    "words": ({"max_drop": "0.1"}, "max_drop is '0.1': give a number, such as 0.01"),
    "yes": ({"max_cost": True}, "max_cost is True: give a number, such as 0.6"),
    "no cost": ({"max_cost": 0}, "max_cost is 0"),
    "a cost in percent": ({"max_cost": 60}, "max_cost is 60: give a fraction of the bare backbone's cost, such as 0.6"),
    "an endless cost": ({"max_cost": math.inf}, "max_cost is inf"),
    "a negative margin": ({"max_drop": 0.1, "margin": -1}, "margin is -1"),
    "a margin of words": (
        {"max_drop": 0.1, "margin": "much"},
        "margin is much: give what to keep in reserve.*or 'auto'",
    ),
    "no margin at all": ({"max_drop": 0.1, "margin": None}, "margin is None: give what to keep in reserve"),
    "a margin larger than the drop": ({"max_fidelity_drop": 0.1, "margin": 0.2}, "margin of 0.1 or less"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_a_wish_that_is_none_is_refused_in_one_line(words, said):
    with pytest.raises(PteeError, match=said) as refused:
        solve(random_traces(0, 2, 10), **words)
    assert "\n" not in str(refused.value)


def test_where_every_exit_costs_more_than_the_backbone_all_are_off_for_a_cost_of_one():
    traces = easy_and_hard(0, 3, 50)
    first_is_dear = traces.head_costs + torch.tensor([2, 0, 0])
    all_read_it = torch.tensor([False, True, True])
    traces = replace(traces, costs=traces.costs + 2, head_costs=first_is_dear, linked=all_read_it)
    found = solve(traces, max_cost=1.2)
    assert (found.off, found.cost) == ((0, 1, 2), pytest.approx(1))
    with pytest.raises(PteeError, match=r"A mean cost of at most 0.9 cannot be reached.*Give 1 or more"):
        solve(traces, max_cost=0.9)


def test_a_cost_below_all_is_refused_with_what_is_possible():
    traces = easy_and_hard(0, 3, 50)
    assert traces.costs[0] == pytest.approx(0.18)
    with pytest.raises(PteeError, match=r"A mean cost of at most 0.1 cannot be reached.*0.1800.*Give 0.18 or more"):
        solve(traces, max_cost=0.1)
    assert solve(traces, max_cost=0.18).cost == pytest.approx(0.18)


def test_without_labels_a_drop_of_accuracy_is_refused_and_a_cost_loses_fidelity():
    traces = replace(easy_and_hard(0, 3, 100), targets=None)
    with pytest.raises(PteeError, match=r"no labels.*max_fidelity_drop"):
        solve(traces, max_drop=0.1)
    assert solve(traces, max_cost=0.6).drop is None


def test_a_solution_is_values_for_json_and_a_sentence():
    found = solve(easy_and_hard(0, 3, 100), max_drop=0.05)
    assert json.loads(json.dumps(found.to_dict()))["threshold"] == list(found.threshold)
    assert "a drop of accuracy of at most 0.05" in str(found)
    assert "100 images" in str(found)


def test_thresholds_are_found_for_many_rows():
    assert solve(easy_and_hard(0, 5, 4000), max_drop=0.01).drop <= 0.01


# baselines, by hand: two exits and the backbone, four images


def four() -> Traces:
    return Traces(
        answers=torch.tensor([[0, 1, 1, 0], [0, 1, 2, 0], [0, 1, 2, 2]]),
        confidence=torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.1, 0.8, 0.5, 0.4], [1.0, 1.0, 1.0, 1.0]]),
        targets=torch.tensor([0, 1, 2, 0]),
        costs=torch.tensor([0.25, 0.75, 1.5], dtype=torch.float64),
        sample=torch.empty(0),
        head_costs=torch.tensor([0.125, 0.375], dtype=torch.float64),
    )


def test_truncation_pays_for_one_head_only():
    assert [(s.accuracy, s.fidelity, s.cost) for s in truncation(four())] == [
        (3 / 4, 2 / 4, 0.25),
        (4 / 4, 3 / 4, 0.75 - 0.125),
    ]


def test_the_oracle_leaves_at_the_first_exit_that_agrees_and_goes_to_the_end_where_none_does():
    traces = four()
    assert oracle(traces).cost == (0.25 + 0.25 + 0.75 + 1.5) / 4
    assert oracle(traces).fidelity == 1
    right = oracle(traces, traces.targets)
    assert (right.cost, right.accuracy) == ((0.25 + 0.25 + 0.75 + 0.25) / 4, 1)


@pytest.mark.parametrize("seed", range(6))
def test_a_larger_drop_never_costs_more_whatever_is_kept_in_reserve(seed):
    traces, drops = easy_and_hard(seed, 3, 200), (0.05, 0.0, 0.005, 0.01, 0.02)
    found = curve(traces, drops, margin="auto")
    assert [s.wish.limit for s in found] == list(drops)
    costs = [s.cost for s in sorted(found, key=lambda s: s.wish.limit)]
    assert costs == sorted(costs, reverse=True)
    assert all(s.drop <= s.wish.limit - s.margin + TOLERANCE for s in found)


def test_a_curve_costs_less_where_more_may_be_lost():
    drops = [0, 0.01, 0.02, 0.05]
    found = curve(easy_and_hard(0, 3, 300), drops)
    costs = [each.cost for each in found]
    assert [each.wish.limit for each in found] == drops
    assert costs == sorted(costs, reverse=True)
