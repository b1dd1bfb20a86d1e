"""Thresholds for blended answers: what they promise is kept by other images, and they are taken only where they pay."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import slow
from device import drawn
from learning import data, made
from torch import Tensor

import ptee
from ptee._common.errors import PteeError
from ptee.exits.blend import Blend, fit_blend
from ptee.exits.times import BatchTimes
from ptee.tuning.config import Target
from ptee.tuning.targets import curves, solve
from ptee.tuning.traces import Traces

K = 5
COSTS_AND_SKILL = {
    2: ([0.2, 0.6, 1.1], [1.6, 1.9, 2.4]),
    3: ([0.2, 0.5, 0.8, 1.1], [1.6, 1.8, 2.0, 2.4]),
}  # by early exits
BATCH = 8
OPTIMISM = "ptee.tuning.targets._optimism"


def traces(seed: int, n: int = 600, *, exits: int = 2, labels: bool = True, same: bool = False) -> Traces:
    """Exits that err independently (or, `same`, all as the backbone does), the later the less. On the CPU, as traces are."""
    with torch.device("cpu"):
        return _traces(drawn(seed), n, exits, labels, same)


def _traces(generator: torch.Generator, n: int, exits: int, labels: bool, same: bool) -> Traces:
    costs, skill = COSTS_AND_SKILL[exits]
    y = torch.randint(K, (n,), generator=generator)
    noise = torch.randn(1 if same else exits + 1, n, K, generator=generator).expand(exits + 1, n, K)
    logits = 2 * (torch.tensor(skill)[:, None, None] * F.one_hot(y, K) + noise)
    return Traces(
        logits.argmax(-1),
        torch.ones(exits + 1, n),
        y if labels else None,
        torch.tensor(costs, dtype=torch.float64),
        torch.zeros(1, 3, 2, 2),
        logits=logits,
        head_costs=torch.full((exits,), 0.1 / exits, dtype=torch.float64),
        confidence_logits=torch.zeros(exits, n),
    ).under("max_prob")


def timed(found: Traces) -> Traces:
    """Times that grow a little slower than the rows of a batch; no head takes any."""
    rows = (torch.arange(BATCH + 1, dtype=torch.float64, device="cpu") / BATCH) ** 0.9
    before = torch.cat([found.head_costs.cumsum(0), found.head_costs.sum()[None]])
    pieces = torch.diff(found.costs - before, prepend=torch.zeros(1, dtype=torch.float64, device="cpu"))
    return replace(found, times=BatchTimes(pieces[:, None] * rows, 0 * found.head_costs[:, None] * rows, 0.0, "units"))


@pytest.mark.slow
def test_blended_answers_cost_less_for_the_same_loss_and_keep_it_on_other_images():
    target, lost = Target("max_drop", 0.01), []
    for seed in range(2):
        own, blended = (solve(traces(seed, 1000, exits=3), target, answers=kind) for kind in ("own", "blended"))
        assert blended.cost < own.cost - 0.03
        other = traces(100 + seed, 1000, exits=3)
        lost.append((other.bare == other.targets).double().mean().item() - blended.on(other).accuracy)
    assert sum(lost) / len(lost) < 0.01


def test_a_gain_over_the_backbone_can_be_asked_for():
    with pytest.raises(PteeError, match=r"max_drop=-0\.3 cannot be met"):
        solve(traces(1), Target("max_drop", -0.3), answers="blended")
    found, other = solve(traces(1), Target("max_drop", -0.02), answers="blended"), traces(2)
    assert found.on(other).accuracy > (other.bare == other.targets).double().mean()


def estimate(own: dict[bool, float], blended: dict[bool, float]) -> Callable[..., float]:
    """In place of cross-validation: what is lost more on other images with own or blended answers, one threshold or not."""
    return lambda candidates, _, one: (own if len(candidates) == 1 else blended)[one]


def test_a_gain_that_one_kind_of_answers_reaches_is_reached_by_the_better_kind(monkeypatch):
    """Own answers reach the gain, but not with the reserve of blended ones, which reach it with theirs."""
    images, target, reserve = traces(1, exits=3), Target("max_drop", -0.06), 0.05
    assert solve(images, target, answers="own", margin=0)
    with pytest.raises(PteeError, match="cannot be met"):
        solve(images, target, answers="own", margin=reserve)
    same = {False: reserve, True: reserve}
    monkeypatch.setattr(OPTIMISM, estimate({False: 0, True: 0}, same))
    found = solve(images, target, answers="auto")
    assert found.blend is not None and found.margin == reserve and found.drop <= -0.06 - reserve + 1e-9


def test_thresholds_that_lose_more_than_the_whole_limit_on_other_images_are_not_taken_with_the_reserve_of_the_other_kind(
    monkeypatch,
):
    unsafe, target = 0.5, Target("max_drop", 0.02)
    monkeypatch.setattr(OPTIMISM, estimate({True: 0.005, False: unsafe}, {True: 0.01, False: unsafe}))
    for seed in range(3):
        found = solve(traces(seed, 400), target, answers="auto")
        on = [t for n, t in enumerate(found.threshold) if n not in found.off]
        assert found.margin == 0.01 and len(set(on)) == 1, "several thresholds need more than the limit in reserve"


def test_no_way_gets_a_smaller_reserve_than_its_own(monkeypatch):
    own = {True: 0.002, False: 0.018}
    monkeypatch.setattr(OPTIMISM, estimate(own, {True: 0.01, False: 0.01}))
    for seed in range(3):
        found = solve(traces(seed, 400, same=True), Target("max_drop", 0.02), answers="auto")
        on = [t for n, t in enumerate(found.threshold) if n not in found.off]
        assert found.margin >= (0.018 if found.blend is None and len(set(on)) > 1 else 0.01)


def test_the_cheaper_kind_of_answers_is_taken():
    target = Target("max_drop", 0.01)
    own, blended, auto = (solve(traces(1), target, answers=kind) for kind in ("own", "blended", "auto"))
    assert auto.blend is not None and auto.cost < own.cost
    assert auto.margin == max(own.margin, blended.margin), "all kinds keep the largest reserve"
    alike = {kind: solve(traces(1, 300, same=True), target, answers=kind).cost for kind in ("own", "auto")}
    assert alike["auto"] <= alike["own"]


@pytest.mark.parametrize("labels", [True, False])
def test_for_fidelity_the_end_keeps_the_backbones_answer(labels):
    found = solve(traces(1, labels=labels), Target("max_fidelity_drop", 0.05), answers="blended")
    assert not found.blend.to_the_end
    assert found.fidelity_drop <= 0.05 + 1e-9
    assert torch.equal(found.answering(traces(2)).answers[-1], traces(2).bare)


def test_where_nothing_may_be_lost_all_exits_may_be_off():
    found = solve(traces(1), Target("max_fidelity_drop", 0), answers="blended", margin=0)
    assert found.fidelity_drop == 0


MISS = "with their final weights, blended answers miss the target here"


def make_final_weights_differ(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Let the weights that are fitted to all 600 images be larger than those of the folds."""

    def fit(logits: Tensor, *rest: Any) -> Blend:
        blend, by = fit_blend(logits, *rest), factor if logits.shape[1] == 600 else 1
        return replace(blend, weights={key: tuple(v * by for v in row) for key, row in blend.weights.items()})

    monkeypatch.setattr("ptee.tuning.candidates.fit_blend", fit)


@pytest.mark.parametrize(
    "solved",
    [
        lambda *a: solve(*a, answers="auto"),
        slow(lambda t, target: curves(t, [target.limit], ["blended"])["blended"][0]),
    ],
)
def test_blended_answers_that_miss_the_target_with_their_final_weights_are_not_taken(monkeypatch, solved):
    images, target = traces(1), Target("max_drop", 0.02)
    blended = solved(images, target)
    assert blended.blend is not None and not blended.remark
    make_final_weights_differ(monkeypatch, 4)
    found = solved(images, target)
    assert found.blend is None and found.on(images).accuracy >= found.backbone.accuracy - 0.02
    assert found.margin >= blended.margin, "own answers keep the larger reserve in their place, too"
    assert str(found).splitlines()[-1].startswith(f"Each exit answers by itself: {MISS}")


@pytest.mark.parametrize(
    ("answers", "unit"), [("auto", "operations"), slow("auto", "time"), slow("blended", "operations")]
)
def test_blended_answers_that_save_nothing_with_their_final_weights_are_not_taken(monkeypatch, answers, unit):
    images, target = traces(1), Target("max_drop", 0.02)
    if unit == "time":
        images = timed(images)
    own, blended = (solve(images, target, answers=kind) for kind in ("own", answers))
    assert blended.blend is not None and blended.price < own.price < 1
    make_final_weights_differ(monkeypatch, 0.05)  # they are so unsure that nobody leaves
    found = solve(images, target, answers=answers)
    assert found.blend is None and found.on(images).price == pytest.approx(found.price)
    assert (found.price < 1) == (answers == "auto")
    why = "Each exit answers by itself: with their final weights, blended answers cost "
    assert found.remark.startswith(why) == (answers == "auto")


def test_within_a_cost_blended_answers_that_are_worse_with_their_final_weights_are_not_taken(monkeypatch):
    images, target = traces(1), Target("max_cost", 0.6)
    assert solve(images, target, answers="auto").blend is not None
    make_final_weights_differ(monkeypatch, 4)  # they are so sure that all leave at once
    found = solve(images, target, answers="auto")
    assert found.blend is None and found.on(images).accuracy == found.score.accuracy
    assert "with their final weights, blended answers have the accuracy 0." in found.remark


@pytest.mark.parametrize("unit", [slow("operations"), "time"])
@pytest.mark.parametrize("target", [Target("max_drop", 0.02), Target("max_cost", 0.6)], ids=str)
def test_the_cost_of_blended_answers_is_that_of_their_final_weights(target, unit):
    images = timed(traces(2)) if unit == "time" else traces(2)
    found = solve(images, target, answers="blended")
    of_model = found.on(images)
    assert found.blend is not None
    assert (found.score.cost, found.score.time) == (of_model.cost, of_model.time)
    assert f", cost {of_model.cost:.4f} of the multiply-accumulates" in str(found)


@pytest.mark.parametrize("unit", ["operations", slow("time")])
def test_blended_answers_that_cost_too_much_with_their_final_weights_are_not_taken(monkeypatch, unit):
    images, target = traces(1), Target("max_cost", 0.5)
    if unit == "time":
        images = timed(images)
    assert solve(images, target, answers="blended").blend is not None
    make_final_weights_differ(monkeypatch, 0.25)  # they are less sure, so fewer leave
    found = solve(images, target, answers="blended")
    assert found.blend is None and MISS in found.remark and found.on(images).price <= 0.5


def test_blended_answers_whose_time_differs_by_chance_are_taken(monkeypatch):
    images, target = timed(traces(1)), Target("max_cost", 0.5)
    make_final_weights_differ(monkeypatch, 0.99)
    found = solve(images, target, answers="blended")
    assert found.blend is not None and 0.5 < found.on(images).price < 0.51


def test_where_own_answers_do_not_meet_the_target_either_it_is_refused_with_the_reason(monkeypatch):
    images, target = traces(1, exits=3), Target("max_drop", -0.1)
    assert solve(images, target, answers="auto", margin=0).blend is not None
    make_final_weights_differ(monkeypatch, 4)
    with pytest.raises(PteeError, match=f"cannot be met: {MISS}.* by themselves the exits gain .* at most") as why:
        solve(images, target, answers="auto", margin=0)
    possible = float(re.search(r"Give max_drop=(\S+) or more\.$", str(why.value))[1])
    assert -0.1 < possible <= 0
    assert solve(images, Target("max_drop", possible), answers="auto", margin=0).drop <= possible + 1e-9


def test_of_blended_answers_it_says_with_which_weights_they_were_counted():
    blended, own = (solve(traces(1), Target("max_drop", 0.02), answers=kind) for kind in ("blended", "own"))
    said = "Accuracy and fidelity: no image is answered by a blend that was fitted to it."
    assert said in str(blended)
    assert said not in str(own)


@pytest.mark.parametrize("wrong", [15, 24])
def test_where_no_weights_were_fitted_it_says_so_of_all_the_images_and_speaks_of_no_fitted_weights(wrong):
    few = with_wrong(wrong)  # three quarters of 24 are too few as well
    said = str(found := solve(few, Target("max_drop", 0.02), answers="blended"))
    right = 200 - wrong
    assert (
        f"200 images, {right} of which the backbone answers right, are too few to fit weights to: all answers weigh the same.\n"
        "On the 200 images that this was chosen on: accuracy"
    ) in said
    assert "no image is answered" not in said and not found.weights_fitted


def test_blended_answers_whose_final_weights_miss_the_target_by_chance_are_taken():
    found = [
        (solve(t, Target("max_drop", 0.01), answers="blended", margin=0), t)
        for t in (traces(n, 400) for n in (0, 1, 3))
    ]
    missed = [f for f, t in found if f.backbone.accuracy - f.on(t).accuracy > 0.01 + 1e-9]
    assert missed, "some do, by a few images"
    assert all(f.blend is not None for f in missed)


def test_a_larger_drop_never_costs_more():
    costs = [found.cost for found in curves(traces(1), [0, 0.005, 0.01, 0.02], ["blended"])["blended"]]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("seed", [0, slow(1)])
def test_a_table_of_drops_chooses_as_tune_does(seed):
    images, target = traces(seed, 400), Target("max_drop", 0.02)
    auto = solve(images, target, answers="auto")
    (own,), (blended,) = curves(images, [0.02], ["own", "blended"]).values()
    assert auto == (own if auto.blend is None else blended)


def test_the_best_answers_within_a_cost_are_found():
    own, blended = (solve(traces(1), Target("max_cost", 0.6), answers=kind) for kind in ("own", "blended"))
    assert blended.cost <= 0.6
    assert blended.score.accuracy > own.score.accuracy


def test_an_answer_of_nan_changes_no_other_image():
    broken = traces(1)
    broken.logits[1, :40] = torch.nan
    found = solve(broken.under("entropy").under("max_prob"), Target("max_drop", 0.01), answers="blended")
    assert found.blend.weights and found.score.accuracy > 0


@pytest.mark.parametrize("by_time", [False, True], ids=["operations", "time"])
@pytest.mark.parametrize("answers", ["blended", "auto"])
def test_a_gain_that_only_a_blend_of_images_that_never_left_would_bring_is_not_promised(answers, by_time):
    # A row whose thresholds are all above 1 gets the backbone's own answer. Here h is the same everywhere: all leave, or none.
    every = replace(traces(0), confidence=torch.full((3, 600), 0.5, device="cpu"), confidence_name="learned")
    every = timed(every) if by_time else every
    bare = every.right[-1].double().mean().item()
    try:
        found = solve(every, Target("max_drop", -0.05), answers=answers, margin=0.0)
    except PteeError as error:
        assert "gain" in str(error)
        return
    own = found.answering(every)
    leaving = own.leaving(found.threshold)
    answer = torch.where(leaving < own.exits, own.answers.gather(0, leaving[None])[0], own.bare)
    assert found.drop == pytest.approx(bare - (answer == own.targets).double().mean().item())


def with_answers(kind: str, **target: float) -> tuple[ptee.EarlyExitModel, Tensor]:
    model = made()
    ptee.tune(model, data(), answers=kind, **target)
    return model, model.predict(data().tensors[0]).logits


def test_tune_sets_weights_thresholds_and_exits_together():
    model, _ = with_answers("blended", max_cost=1.5)
    assert (model.answers == "blended") == (
        model.blend is not None and bool(set(range(len(model.exits))) - set(model.off))
    )
    before = model.blend
    ptee.tune(model, data(), answers="own", max_cost=1.5)
    assert (model.answers, model.blend) == ("own", before)


@pytest.mark.parametrize("answers", ["own", "blended"])
def test_a_model_that_blends_is_tuned_as_one_whose_exits_answer_by_themselves(answers):
    blends, alone = made(), made()
    blends.confidence = alone.confidence = "max_prob"
    with torch.no_grad():
        blends.blend = fit_blend(blends.all_exits(data().tensors[0]).logits.cpu(), data().tensors[1].cpu())
    blends.answers = "blended"
    found, expected = (ptee.tune(m, data(), answers=answers, max_cost=1.5) for m in (blends, alone))
    assert (found.threshold, found.score) == (expected.threshold, expected.score)


def test_a_confidence_that_needs_own_answers_is_tuned_with_own_answers():
    model = made()
    model.confidence = "patience"
    assert ptee.tune(model, data(), max_cost=1.5).blend is None
    with pytest.raises(PteeError, match="'patience' needs the exits' own answers"):
        ptee.tune(model, data(), max_cost=1.5, answers="blended")


@pytest.mark.parametrize("wrong", [15, 20, 24, 26, 40])
def test_thresholds_fit_the_weights_that_they_are_used_with_however_few_images_are_wrong(wrong):
    few = with_wrong(wrong)
    found = solve(few, Target("max_drop", 0.02), answers="blended")
    assert found.on(few).accuracy >= (few.bare == few.targets).double().mean() - 0.04


def with_wrong(wrong: int, n: int = 200) -> Traces:
    """Answers that are far less sure than they could be, where the backbone errs on exactly so many images."""
    many = traces(5, 2000)
    errs = many.bare != many.targets
    rows = torch.cat([errs.nonzero()[:wrong, 0], (~errs).nonzero()[: n - wrong, 0]])
    few = many.rows(rows[torch.randperm(n, generator=drawn(1), device="cpu")])
    assert few.logits is not None
    return replace(few, logits=few.logits * 0.15).under("max_prob")


@pytest.mark.parametrize("answers", ["own", "blended", "auto"])
@pytest.mark.parametrize("one_threshold", [False, True])
@pytest.mark.parametrize("margin", [slow(0.01), "auto"])
@pytest.mark.parametrize("seed", [0, *map(slow, (1, 2))])
def test_the_refusal_of_a_gain_that_is_out_of_reach_names_one_that_is_not(answers, one_threshold, margin, seed):
    how = {"answers": answers, "one_threshold": one_threshold}
    with pytest.raises(PteeError) as refusal:
        solve(traces(seed), Target("max_drop", -0.3), margin=margin, **how)
    said = re.search(
        r"the exits gain ([\d.]+) at most.*Give max_drop=(-?[\d.]+) or more(, with margin=0)?\.$",
        str(refusal.value),
    )
    gain, limit = map(float, said.groups()[:2])
    reserve = 0.0 if margin == "auto" else margin
    assert limit == pytest.approx(reserve - gain, abs=2e-4)
    assert bool(said[3]) == (margin == "auto" and limit < 0)
    solve(traces(seed), Target("max_drop", limit), margin=0.0 if said[3] else margin, **how)
