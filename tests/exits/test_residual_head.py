"""Learned heads: as large as their budget, built on one another, and right in any batch."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small import HEADS, leaving_everywhere, linked
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError, UnknownName
from ptee.analysis.cut_points import random_images
from ptee.analysis.layout import Layout
from ptee.analysis.macs import count
from ptee.backbones.load import load_backbone
from ptee.exits.heads import PreviousExits
from ptee.exits.residual_head import AfterOthers, Blueprint, LearnedHead, blueprint_for, make_heads, sized_names
from ptee.model.build import build

b, K = 5, 7
SIZE = (3, 32, 32)


def layout(channels: int, side: int) -> Layout:
    return Layout("bchw", channels, side, side, 0, side * side, ())


@pytest.mark.parametrize("name", ["res-32x2-64x2", "res-16x3s1-32x3-64x3", "res-64x1+", "res-8x1s4+"])
def test_a_name_says_what_a_head_is_made_of_and_back(name):
    assert str(Blueprint.of(name)) == name


@pytest.mark.parametrize(
    "name", ["pool", "res", "res-", "res-32", "res-32x", "res-x2", "res-32x2s", "res-32x2++", "res-32x2-"]
)
def test_other_names_are_no_learned_heads(name):
    assert Blueprint.of(name) is None


@pytest.mark.parametrize("name", ["res-2048x1", "res-0x1", "res-8x0", "res-8x9", "res-8x1s17", "res-8x1s0"])
def test_a_head_larger_than_heads_are_is_refused(name):
    with pytest.raises(PteeError, match=f"{name}.*1 to 1024 channels"):
        Blueprint.of(name)


@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 15, 17), (64, 7, 7), (8, 1, 1), (192, 14, 14)])
@pytest.mark.parametrize("name", ["res-16x2-32x1", "res-24x1s1", "res-16x1s4+"])
def test_what_a_blueprint_costs_and_gives_is_what_its_head_costs_and_gives(shape, name):
    blueprint, before = Blueprint.of(name), (12, 4, 4)
    assert blueprint is not None
    first = LearnedHead(Blueprint.of("res-12x1"), layout(16, 8), K, None)
    head = LearnedHead(
        blueprint, Layout("bchw", *shape, 0, shape[1] * shape[2], ()), K, before if blueprint.linked else None
    )
    behind = AfterOthers(head, first if blueprint.linked else None).eval()
    said = head.eval().follow(torch.randn(2, *shape), PreviousExits((torch.zeros(2, K),), torch.randn(2, *before)))
    assert said.map is not None
    assert tuple(said.map.shape[1:]) == blueprint.map_of(shape) == head.passes_on
    products = count(behind, torch.zeros(1, *shape), products_only=True).total
    assert blueprint.macs(shape, K, before if blueprint.linked else None) == pytest.approx(products, rel=0.01)


@pytest.mark.parametrize("before", [None, (64, 8, 8)])
@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 16, 16), (64, 8, 8), (192, 14, 14), (24, 56, 56), (3, 32, 32)])
@pytest.mark.parametrize("macs", [1.5e6, 6e6, 2.5e7, 1e8])
def test_a_head_fills_its_budget_and_keeps_within_it(shape, before, macs):
    cost = blueprint_for(shape, macs, K, before).macs(shape, K, before)
    assert 0.35 * macs <= cost <= macs


def test_a_larger_budget_never_buys_a_smaller_head():
    costs = [blueprint_for((32, 16, 16), m * 1e6, K, None).macs((32, 16, 16), K, None) for m in (1, 2, 4, 8, 16, 32)]
    assert costs == sorted(costs)


def test_where_no_learned_head_fits_the_budget_the_head_pools():
    assert sized_names(["auto"], [layout(16, 32)], [1000], K) == ["pool"]


def test_only_the_heads_that_are_left_to_the_budget_are_sized():
    layouts = [layout(16, 32), layout(32, 16), layout(64, 8)]
    names = sized_names(["auto", "pool", "auto"], layouts, [5e6] * 3, K)
    assert names[1] == "pool"
    assert [Blueprint.of(name) is not None for name in names] == [True, False, True]
    assert not names[2].endswith("+")  # a pooled head passes nothing on


def test_sized_heads_build_on_one_another_where_the_name_says_so():
    layouts = [layout(16, 32), layout(32, 16), layout(64, 8)]
    alone, linked = (sized_names([name] * 3, layouts, [5e6] * 3, K) for name in ("auto", "auto+"))
    assert [name.endswith("+") for name in alone] == [False, False, False]
    assert [name.endswith("+") for name in linked] == [False, True, True]


def test_the_first_head_has_none_to_build_on():
    for name in ("res-8x1+", "pool+"):
        with pytest.raises(PteeError, match=rf"{re.escape(name)}.*none before it"):
            make_heads([name], [layout(8, 8)], K)
    with pytest.raises(UnknownName, match="learned"):
        make_heads(["learned"], [layout(8, 8)], K)


# ---------------------------------------------------------------------------------------------------- in a model


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    return linked()


of_any_kind = pytest.mark.parametrize("head", [HEADS, "conv1+"], ids=["learned", "of the registry"])


def test_a_linked_head_reads_the_map_before_and_its_answer_begins_at_the_answer_before():
    heads = [h.eval() for h in make_heads(["res-8x1", "res-8x1s1+"], [layout(4, 8), layout(6, 4)], K)]
    z, none = torch.randn(b, 6, 4, 4), PreviousExits()
    previous = none.then(heads[0].follow(torch.randn(b, 4, 8, 8), none))
    said = heads[1].follow(z, previous)
    other_map = heads[1].follow(z, previous._replace(map=torch.randn_like(previous.map)))
    assert not torch.allclose(said.logits, other_map.logits)
    with torch.no_grad():
        heads[1].trust.fill_(0.5)
    trusting = heads[1].follow(z, previous)
    torch.testing.assert_close(trusting.logits - said.logits, 0.5 * previous.answers[0].log_softmax(-1))


@of_any_kind
def test_every_row_gets_the_answer_that_it_gets_alone(head):
    model = linked(head)
    x = random_images(model.backbone, 24, SIZE)
    every, together = leaving_everywhere(model, x)
    alone = [model.predict(image[None]) for image in x]
    assert torch.equal(together.exit_index, torch.cat([a.exit_index for a in alone]))
    torch.testing.assert_close(together.logits, torch.cat([a.logits for a in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.logits, every.logits[together.exit_index, range(24)], rtol=1e-4, atol=1e-4)


@of_any_kind
def test_what_was_read_is_answered_as_the_images(head):
    model = linked(head)
    x = torch.randn(b, *SIZE)
    torch.testing.assert_close(model.answer(model.read(x)), model.all_exits(x), rtol=1e-4, atol=1e-4)


def test_the_plan_counts_what_the_heads_execute(model):
    from torch.utils.flop_counter import FlopCounterMode

    def executed(call) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(torch.zeros(1, *SIZE))
        return counter.get_total_flops()

    whole = executed(model.backbone)
    assert model.costs[-1] - 1 == pytest.approx(executed(model.all_exits) / whole - 1, rel=0.05)


def test_the_plan_names_each_head_where_they_differ(model):
    assert [e.head for e in model.exits] == ["res-8x1-16x1", "conv1", "res-16x1s1+"]
    assert "res-8x1-16x1" in str(model.plan)
    assert [row["head"] for row in model.plan.to_dict()["exits"]] == [e.head for e in model.exits]


@of_any_kind
def test_a_saved_run_comes_back_with_its_heads(head, tmp_path):
    model = linked(head)
    model.save_pretrained(tmp_path)
    back = ptee.load(tmp_path, copy.deepcopy(model).detach())
    x = torch.randn(b, *SIZE)
    assert torch.equal(back.all_exits(x).logits, model.all_exits(x).logits)


@pytest.mark.parametrize(("name", "first"), [("pool+", "pool"), ("res-8x1+", "res-8x1")])
def test_of_one_name_for_all_the_first_head_builds_on_none(name, first):
    plan = linked(name).plan
    assert [e.head for e in plan.exits] == [first, name, name]
    assert plan.looks_back == [False, True, True]


def test_a_head_that_is_read_is_charged_also_where_nobody_leaves():
    plan = linked("conv1+").plan
    costs = [e.head_cost for e in plan.exits]
    assert plan.switched_off([0, 1]).costs[-1] == pytest.approx(1 + sum(costs))
    assert plan.switched_off([1, 2]).costs[-1] == pytest.approx(1 + costs[0])


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (
            {"head": ["conv1+", "conv1+", "conv1+"]},
            r"first head 'conv1\+' has none before it to build on. Leave out the \+",
        ),
        ({"head": ["auto", "auto"]}, "2 values of head for 3 exits"),
        ({"head": "auto", "head_budget": [0.1, 0.1]}, "2 values of head budget for 3 exits"),
        ({"head": "pool", "head_budget": 0.1}, "heads are pool"),
        ({"head": "auto", "head_budget": -0.1}, "A head budget -0.1"),
        ({"head": "auto", "head_budget": "much"}, "head budget 'much'"),
    ],
)
def test_heads_that_cannot_be_met_are_refused(wish, said):
    with pytest.raises(PteeError, match=said):
        build(load_backbone("cifar_resnet20", pretrained=False), exits=["layer1.0", "layer2.0", "layer3.0"], **wish)


def test_auto_heads_cost_what_each_may(model):
    model.detach()
    backbone = load_backbone("cifar_resnet20", pretrained=False)
    made = build(backbone, exits=["layer1.0", "layer2.0"], head="auto+", head_budget=[0.3, 0.1])
    first, second = made.exits
    assert 0.15 < first.head_cost <= 0.31
    assert 0.04 < second.head_cost <= 0.105
    assert second.head.endswith("+")


class Tokens(nn.Module):
    """Patches, a class token in front, and layers on them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.classifier = nn.Conv2d(3, 12, 4, 4), nn.Linear(12, K)
        self.prefix = nn.Parameter(torch.randn(1, 1, 12))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 24, 0.0, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x[:, 0])


def test_tokens_get_learned_heads_on_their_grid():
    made = build(
        load_backbone(Tokens().eval(), input_size=SIZE), exits=["blocks.0", "blocks.1"], head="auto", head_budget=0.5
    )
    assert [cut.layout.order for cut in made.plan.cuts] == ["bnc", "bnc"]
    assert made(torch.randn(2, *SIZE)).shape == (2, K)


@pytest.mark.parametrize("side", [4, 7, 32, 112, 144, 160, 256, 512])
def test_a_head_that_was_sized_can_be_read_back_by_its_name(side):
    found = blueprint_for((24, side, side), 1e9, 1000, None)
    assert found is not None
    assert Blueprint.of(str(found)) == found
