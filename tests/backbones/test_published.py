"""What is known of other networks before exits are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ptee._common.errors import BackboneError, PteeError, UnknownName
from ptee.backbones.library import InputConfig
from ptee.backbones.load import Backbone, load_backbone
from ptee.backbones.published import DROPS, MEASURES, advise, best_front, find_published, front_of, in_short, results

RESNET50 = "resnet50.a1_in1k"


def backbone(name: str, side: int = 224, label_space: str | None = "imagenet-1k", source=None) -> Backbone:
    images = InputConfig((3, side, side), (0.5,) * 3, (0.5,) * 3, "bicubic")
    return Backbone(nn.Identity(), name, 1000, images, source, label_space)


def test_the_table_is_whole():
    assert len(results()) == 1556
    assert len({(row.name, row.side) for row in results()}) == 1556
    for row in results():
        assert 0.3 < row.top1 < 0.92 and row.operations > 0 and row.gpu > 0
        assert row.cpu is None or row.cpu > 0


def test_a_network_without_a_tag_is_the_one_that_timm_would_load():
    assert find_published("resnet50").name == find_published("timm/resnet50").name == RESNET50
    assert find_published("resnet50.tv_in1k").top1 == 0.76156


def test_of_several_image_sizes_the_nearest_is_taken():
    assert [find_published(RESNET50, side).side for side in (None, 160, 230, 300)] == [224, 224, 224, 288]


@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("name", [RESNET50, "mobilenetv2_100", "vit_base_patch16_224"])
def test_no_other_network_is_as_good_and_costs_less_than_the_one_that_is_advised(name, by):
    advice = advise(name, by=[by])
    for drop, _, row in advice.instead:
        good = [other for other in results() if other.top1 >= advice.own.top1 - drop]
        assert row.top1 >= advice.own.top1 - drop - 1e-9
        assert MEASURES[by].cost(row) == min(map(MEASURES[by].cost, good))


def test_who_may_lose_more_saves_no_less():
    costs = [row.operations for _, _, row in advise("resnet50", drops=[0, 0.01, 0.05, 0.1], by=["operations"]).instead]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_the_front_is_the_most_accurate_within_its_share():
    own = find_published(RESNET50)
    for share in (0.05, 0.2):
        row = best_front(own, share)
        assert row.operations <= share * own.operations
        assert row.top1 == max(other.top1 for other in results() if other.operations <= share * own.operations)
    assert best_front(own, 0.0001) is None


def test_a_gain_that_no_network_has_gets_no_row():
    assert advise("resnet50", drops=[-0.2], by=["operations"]).instead == ()
    assert (
        advise("resnet50", drops=[-0.05], by=["operations"]).instead[0][2].top1 >= find_published(RESNET50).top1 + 0.05
    )


def test_a_network_is_never_named_as_the_other_one():
    for row in results()[::20]:
        assert f" {row.name} at " not in in_short(backbone(row.name, row.side))


def test_the_best_of_all_is_told_that_it_is():
    best = results()[0]
    assert "(itself)" in str(advise(best.name, drops=[0], by=["operations"]))
    assert in_short(backbone(best.name, best.side)).count("\n") <= 1


def test_a_network_that_timm_did_not_measure_is_refused_by_name():
    with pytest.raises(BackboneError, match=r"Nothing is known of 'renset50'.*resnet50"):
        advise("renset50")
    with pytest.raises(BackboneError, match="ptee compare RUN --static NAME"):
        advise("my_own_network")


def test_an_unknown_measure_and_an_impossible_drop_are_refused():
    with pytest.raises(UnknownName, match=r"Unknown measure 'memory'.*operations"):
        advise(RESNET50, by=["memory"])
    with pytest.raises(PteeError, match=r"Give 0\.01 for one point"):
        advise(RESNET50, drops=[1.0])


def test_the_short_advice_names_each_pair_of_networks_once():
    text = in_short(backbone("resnet50"))
    lines = text.splitlines()
    assert "ptee advise resnet50.a1_in1k" in lines[0]
    assert 1 <= len(lines[1:]) <= len(DROPS) and len({line.partition(": ")[2] for line in lines[1:]}) == len(lines[1:])


@pytest.mark.parametrize(
    "other",
    [
        backbone("my_own_network"),
        backbone("torchvision/resnet50"),
        backbone("resnet50", label_space=None),
        backbone("resnet50", source={"weights": {"file": "/mine.safetensors"}}),
        replace(backbone("resnet50", source={"weights": None}), learnt=True),
    ],
    ids=["own network", "torchvision's weights", "other classes", "weights of a file", "trained further"],
)
def test_nothing_is_said_and_no_front_is_taken_where_nothing_is_known(other):
    assert in_short(other) == ""
    with pytest.raises(BackboneError, match="Nothing is known"):
        front_of(other)


def test_the_front_of_a_published_network_is_small():
    front = find_published(front_of(backbone("resnet50")))
    assert front.operations <= 0.2 * find_published(RESNET50).operations


def test_auto_timm_puts_that_network_in_front(monkeypatch):
    import ptee.exits.front as front

    asked = []

    def load(name, **options):
        asked.append((name, options["weights"]))
        return replace(load_backbone("mobilenetv2_035", pretrained=False), name=name)

    monkeypatch.setattr(front, "load_backbone", load)
    with torch.random.fork_rng(devices=[]):
        head = front.named_front("auto-timm", backbone("resnet50"))
    assert asked == [(front_of(backbone("resnet50")), None)]
    assert isinstance(head, front.FrontHead)


def test_a_network_for_small_images_is_said_to_be_none_of_imagenet_and_no_other_is_suggested():
    with pytest.raises(PteeError, match="networks for ImageNet, and this one is for small images") as refusal:
        advise("cifar_resnet8")
    assert "Did you mean" not in str(refusal.value)
