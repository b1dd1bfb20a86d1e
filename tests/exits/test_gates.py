"""Gates: what they read, that it says nothing of which class it is, and that they work wherever heads do."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from small import EXITS, HEADS, chained, leaving_everywhere
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError, RunError
from ptee.analysis.cut_points import random_images
from ptee.backbones.load import load_backbone
from ptee.evaluation.targets import solve, truncation
from ptee.evaluation.traces import record
from ptee.exits.gates import BOTTLENECK, HIDDEN, LOG_ODDS, READS, SUREST, Gate
from ptee.exits.heads import confidence_of
from ptee.exits.plan import head_macs
from ptee.model.build import build
from ptee.model.saving import CONFIG

b, K, F = 6, 7, 5
SIZE = (3, 32, 32)
each_kind = pytest.mark.parametrize("reads", READS)


def answers(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, K)


def gate(reads: str = "features", follows: bool = True) -> Gate:
    """One that says something."""
    made = Gate(reads, F, follows)
    nn.init.normal_(made.outer.weight)
    return made.eval()


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    """The middle exit has none."""
    made = chained()
    made.put_gates([made.new_gate(0, "features"), None, made.new_gate(2, "answers")])
    x = random_images(made.backbone, 24, SIZE)
    with torch.no_grad():
        said = made.said(made.read(x))
        for n in (0, 2):
            g = made.heads[n].gate
            g.standardise(g.read(said[n].logits, [s.logits for s in said[:n]], said[n].features))
            nn.init.normal_(g.outer.weight)
    return made


# ---------------------------------------------------------------------------------------------------- what is read


def test_what_an_answer_says_of_itself_and_the_answers_before_of_it():
    p = torch.tensor([[0.7, 0.2, 0.1]])
    first, second = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.3, 0.6, 0.1]])
    read = Gate("answers", F, follows=True).read(p.log(), [first.log(), second.log()], torch.zeros(1, F))
    entropy = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    support = (math.log(0.5) + math.log(0.3)) / 2
    torch.testing.assert_close(read, torch.tensor([[0.7, entropy, 0.5, math.log(0.7 / 0.3), 0.6, 0.0, 0.5, support]]))


def test_the_first_exit_reads_its_own_answer_and_the_features_as_they_are():
    v = torch.randn(b, F)
    read = gate(follows=False).read(answers(b), [], v)
    assert read.shape == (b, 4 + F)
    assert torch.equal(read[:, 4:], v)


def test_the_log_odds_tell_rows_apart_whose_probability_rounds_to_one():
    logits = torch.tensor([[30.0, 0, 0], [40, 0, 0], [0, 300, -100], [0, -math.inf, -math.inf]])
    assert logits.softmax(-1).amax(-1).tolist() == [1, 1, 1, 1]
    read = Gate("answers", F, follows=False).read(logits, [], torch.zeros(4, F))
    torch.testing.assert_close(read[:, LOG_ODDS], torch.tensor([30 - math.log(2), 40 - math.log(2), SUREST, SUREST]))


@each_kind
@pytest.mark.parametrize("follows", [False, True])
def test_before_it_is_fitted_its_h_is_the_max_probability(reads, follows):
    logits, before = answers(b), list(answers(2, b))
    h = confidence_of(Gate(reads, F, follows)(logits, before, torch.randn(b, F)))
    torch.testing.assert_close(h, logits.softmax(-1).amax(-1))


@each_kind
@pytest.mark.parametrize("follows", [False, True])
def test_which_class_it_is_does_not_matter(reads, follows):
    order, logits, before, v = torch.randperm(K), answers(b), answers(2, b), torch.randn(b, F)
    decide = gate(reads, follows)
    one, other = decide(logits, list(before), v), decide(logits[:, order], list(before[..., order]), v)
    torch.testing.assert_close(one, other)
    assert one.unique().numel() == b


@each_kind
def test_a_row_alone_is_judged_as_in_a_batch(reads):
    logits, before, v = answers(b), answers(2, b), torch.randn(b, F)
    decide = gate(reads)
    alone = [decide(logits[i, None], list(before[:, i, None]), v[i, None]) for i in range(b)]
    torch.testing.assert_close(decide(logits, list(before), v), torch.cat(alone))


def test_a_gate_behind_other_exits_is_not_asked_without_them():
    with pytest.raises(PteeError, match="exits before"):
        gate()(answers(b), [], torch.zeros(b, F))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logits", "before", "features"])
def test_nobody_is_sure_where_something_is_not_finite(where, value):
    given = {"logits": answers(b), "before": answers(b), "features": torch.randn(b, F)}
    given[where][2] = value
    sure = confidence_of(gate()(given["logits"], [given["before"]], given["features"]))
    assert sure.isnan().tolist() == [i == 2 for i in range(b)]


def test_what_was_never_seen_counts_as_the_farthest_that_may_be_seen():
    far, farther = (torch.full((1, F), value) for value in (100.0, 10000.0))
    logits = answers(1)
    decide = gate(follows=False)
    assert torch.equal(decide(logits, [], far), decide(logits, [], farther))


def test_a_number_that_never_varied_is_left_as_it_is():
    decide = gate("answers", follows=False)
    decide.standardise(torch.ones(b, 4))
    assert torch.equal(decide.std, torch.ones(4))
    assert torch.equal(decide.mean, torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each_kind
def test_the_confidence_is_computed_in_single_precision_at_least(dtype, reads):
    logits, before, v = answers(b).to(dtype), answers(b).to(dtype), torch.randn(b, F).to(dtype)
    decide = gate(reads)
    low = copy.deepcopy(decide).to(dtype)(logits, [before], v)
    assert low.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(low.float(), decide(logits.float(), [before.float()], v.float()), rtol=0.05, atol=0.05)


@each_kind
def test_autocast_around_changes_nothing(reads):
    logits, v = answers(b), torch.randn(b, F)
    decide = gate(reads, follows=False)
    with torch.autocast("cpu", torch.bfloat16):
        within = decide(logits, [], v)
    assert torch.equal(within, decide(logits, [], v))


# ---------------------------------------------------------------------------------------------------- in a model


def test_a_gate_changes_confidence_and_no_answer(model):
    x = random_images(model.backbone, b, SIZE)
    gated = model.all_exits(x)
    for n in (0, 2):
        model.heads[n].gate = None
    plain = model.all_exits(x)
    assert torch.equal(gated.logits, plain.logits)
    assert [torch.equal(one, other) for one, other in zip(gated.confidence, plain.confidence, strict=True)] == [
        False, True, False, True,
    ]  # fmt: skip


def test_every_row_leaves_in_a_batch_as_it_leaves_alone(model):
    x = random_images(model.backbone, 24, SIZE)
    every, together = leaving_everywhere(model, x)
    alone = [model.predict(image[None]) for image in x]
    assert torch.equal(together.exit_index, torch.cat([a.exit_index for a in alone]))
    torch.testing.assert_close(together.confidence, torch.cat([a.confidence for a in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        together.confidence, every.confidence[together.exit_index, range(24)], rtol=1e-4, atol=1e-4
    )


def test_what_was_read_is_answered_as_the_images(model):
    x = random_images(model.backbone, b, SIZE)
    torch.testing.assert_close(model.answer(model.read(x)), model.all_exits(x), rtol=1e-4, atol=1e-4)


def test_a_model_in_half_precision_takes_its_gates_along(model):
    x = random_images(model.backbone, b, SIZE)
    single = model.all_exits(x).confidence
    half = model.bfloat16().all_exits(x.bfloat16()).confidence
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert half.shape == single.shape


def test_the_plan_counts_gates_in_place_of_the_confidence_layers(model):
    first = (4 + BOTTLENECK) * HIDDEN + HIDDEN + 16 * BOTTLENECK - 16  # this head's vector has 16 numbers
    third = 8 * HIDDEN + HIDDEN - 16
    bare = build(load_backbone("cifar_resnet20", pretrained=False), exits=EXITS, head=HEADS).plan
    more = [(e.head_cost - o.head_cost) * bare.macs for e, o in zip(model.exits, bare.exits, strict=True)]
    assert more == pytest.approx([first, 0, third], abs=0.1)
    assert model.costs[-1] - bare.costs[-1] == pytest.approx((first + third) / bare.macs)
    assert model.plan.final_cost == pytest.approx(model.costs[-1])
    assert [e.gate for e in model.exits] == ["features", None, "answers"]
    assert "Gates decide" in str(model.plan)
    assert "Gates" not in str(bare)


def test_a_gate_is_counted_behind_as_many_exits_as_there_are(model):
    macs = head_macs(model.heads[2], model.plan.cuts[2], first=False)
    assert macs / model.plan.macs == pytest.approx(model.exits[2].head_cost)


# ---------------------------------------------------------------------------------------------------- saved


def bare_backbone(model: ptee.EarlyExitModel) -> torch.nn.Module:
    return copy.deepcopy(model).detach()


def test_a_saved_run_comes_back_with_its_gates(model, tmp_path):
    model.save_pretrained(tmp_path)
    back = ptee.load(tmp_path, bare_backbone(model))
    x = random_images(model.backbone, b, SIZE)
    assert torch.equal(back.all_exits(x).confidence, model.all_exits(x).confidence)
    assert back.costs == model.costs
    assert [e.gate for e in back.exits] == [e.gate for e in model.exits]


def edit(folder, change) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config["exits"])
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_run_of_before_there_were_gates_is_loaded_without(tmp_path):
    made = build(load_backbone("cifar_resnet20", pretrained=False), exits=EXITS, head="pool")
    made.save_pretrained(tmp_path)
    edit(tmp_path, lambda exits: [row.pop("gate") for row in exits])
    assert all(head.gate is None for head in ptee.load(tmp_path, bare_backbone(made)).heads)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (["features", None, "tea leaves"], r"exits\[2\].gate 'tea leaves'.*answers or features"),
        (["features", None, True], r"should have a str at exits\[2\].gate"),
        (["features", None, None], "'2.gate.*belongs to no head"),
        (["features", "answers", "answers"], "'1.gate.*is missing"),
        (["answers", None, "answers"], "'0.gate.*(belongs to no head|has shape)"),
    ],
)
def test_a_run_whose_gates_do_not_fit_is_refused(gates, said, model, tmp_path):
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda exits: [row.update(gate=g) for row, g in zip(exits, gates, strict=True)])
    with pytest.raises(RunError, match=said):
        ptee.load(tmp_path, bare_backbone(model))


def test_a_network_that_is_cut_off_asks_no_gate_and_runs_no_head_but_its_own():
    model = build(load_backbone("cifar_resnet20", pretrained=False), exits=EXITS, head="conv1")
    images = [(image, 1) for image in torch.randn(4, *SIZE)]
    model.put_gates([model.new_gate(n, "answers") for n in range(3)])
    traces = record(model, images)
    alone = [e.backbone_cost + e.head_cost for e in model.exits]
    assert [score.cost for score in truncation(traces)] == pytest.approx(alone)
    assert traces.under("max_prob").costs_without([0, 1])[2] == pytest.approx(alone[2])
    assert traces.under("learned").costs_without([0, 1])[2] == pytest.approx(alone[2], rel=1e-3)
    with pytest.raises(PteeError, match="cannot be reached"):
        solve(traces, max_cost=alone[0] - 0.01)
