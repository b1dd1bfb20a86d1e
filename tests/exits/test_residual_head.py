"""Residual heads: as large as their budget, built on one another, and right in any batch."""

from __future__ import annotations

import re

import pytest
import torch
from small import HEADS, chained, leaving_everywhere
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.cut_points import Cut, random_images
from ptee.analysis.layout import Layout
from ptee.analysis.macs import count
from ptee.backbones.load import load_backbone
from ptee.exits.build import build_head, build_heads, head_specs
from ptee.exits.head_spec import HeadSpec, parse_head
from ptee.exits.residual_head import residual_macs, sized
from ptee.model.build import build

b, K = 5, 7
SIZE = (3, 32, 32)


def layout(channels: int, side: int) -> Layout:
    return Layout("bchw", channels, side, side, 0, side * side, ())


def size_for(shape: tuple[int, int, int], macs: float, classes: int = K) -> HeadSpec:
    return sized(HeadSpec("auto"), shape, macs, classes)


@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 15, 17), (64, 7, 7), (8, 1, 1), (192, 14, 14)])
@pytest.mark.parametrize("name", ["res-16x2-32x1", "res-24x1s1", "res-16x1s4"])
def test_the_formula_gives_the_operations_that_the_head_executes(shape, name):
    spec = parse_head(name)
    head = build_head(spec, Layout("bchw", *shape, 0, shape[1] * shape[2], ()), K).eval()
    executed = count(head, torch.zeros(1, *shape, device="cpu"), products_only=True).total
    assert residual_macs(spec.stages, shape, K) == pytest.approx(executed, rel=0.01)


@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 16, 16), (64, 8, 8), (192, 14, 14), (24, 56, 56), (3, 32, 32)])
@pytest.mark.parametrize("macs", [1.5e6, 6e6, 2.5e7, 1e8])
def test_a_head_fills_its_budget_and_keeps_within_it(shape, macs):
    assert 0.35 * macs <= residual_macs(size_for(shape, macs).stages, shape, K) <= macs


def test_a_larger_budget_never_buys_a_smaller_head():
    shape = (32, 16, 16)
    costs = [residual_macs(size_for(shape, m * 1e6).stages, shape, K) for m in (1, 2, 4, 8, 16, 32)]
    assert costs == sorted(costs)


def test_a_head_pools_where_no_residual_head_fits_the_budget():
    assert str(sized(parse_head("auto+"), (16, 32, 32), 1000, K)) == "pool+"


@pytest.mark.parametrize("side", [4, 7, 32, 112, 144, 160, 256, 512])
def test_a_head_that_was_sized_can_be_read_back_by_its_name(side):
    spec = size_for((24, side, side), 1e9, 1000)
    assert spec.kind == "res"
    assert parse_head(str(spec)) == spec


def cut(n: int, channels: int, side: int) -> Cut:
    return Cut(f"layer{n}", (channels, side, side), layout(channels, side), 0, (0,), overwritten=False)


CUTS = [cut(0, 16, 32), cut(1, 32, 16), cut(2, 64, 8)]


def test_only_the_heads_that_are_left_to_the_budget_are_sized():
    specs = head_specs(["auto", "pool", "auto+"], 0.1, CUTS, 5e7, K)
    assert [spec.kind for spec in specs] == ["res", "pool", "res"]
    assert [spec.builds_on_previous for spec in specs] == [False, False, True]


def test_the_first_head_has_none_to_build_on():
    for name in ("res-8x1+", "pool+"):
        with pytest.raises(PteeError, match=rf"{re.escape(name)}.*none before it"):
            build_heads([parse_head(name)], CUTS[:1], K)


# ---------------------------------------------------------------------------------------------------- in a model


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    return chained()


of_any_kind = pytest.mark.parametrize("head", [HEADS, "conv1+"], ids=["residual", "of the registry"])


@of_any_kind
def test_every_row_gets_the_answer_that_it_gets_alone(head):
    model = chained(head)
    x = random_images(model.backbone, 24, SIZE)
    every, together = leaving_everywhere(model, x)
    alone = [model.predict(image[None]) for image in x]
    assert torch.equal(together.exit_index, torch.cat([a.exit_index for a in alone]))
    torch.testing.assert_close(together.logits, torch.cat([a.logits for a in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.logits, every.logits[together.exit_index, range(24)], rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize(("name", "first"), [("pool+", "pool"), ("res-8x1+", "res-8x1")])
def test_of_one_name_for_all_the_first_head_builds_on_none(name, first):
    plan = chained(name).plan
    assert [e.head for e in plan.exits] == [first, name, name]
    assert [e.builds_on_previous for e in plan.exits] == [False, True, True]


def test_a_head_that_is_read_is_charged_also_where_nobody_leaves():
    plan = chained("conv1+").plan
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
        ({"head": []}, "0 values of head for 3 exits"),
        ({"head": "auto", "head_budget": [0.1, 0.1]}, "2 values of head budget for 3 exits"),
        ({"head": "pool", "head_budget": 0.1}, "heads are pool"),
        ({"head": "auto", "head_budget": -0.1}, "A head budget -0.1"),
        ({"head": "auto", "head_budget": "much"}, "head budget 'much'"),
    ],
)
def test_heads_that_cannot_be_met_are_refused(wish, said):
    with pytest.raises(PteeError, match=said):
        build(load_backbone("cifar_resnet8", pretrained=False), exits=["layer1.0", "layer2.0", "layer3.0"], **wish)


def test_auto_heads_cost_what_each_may(model):
    model.detach()
    backbone = load_backbone("cifar_resnet8", pretrained=False)
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


def test_tokens_get_residual_heads_on_their_grid():
    made = build(
        load_backbone(Tokens().eval(), input_size=SIZE), exits=["blocks.0", "blocks.1"], head="auto", head_budget=0.5
    )
    assert [cut.layout.order for cut in made.plan.cuts] == ["bnc", "bnc"]
    assert made(torch.randn(2, *SIZE)).shape == (2, K)
