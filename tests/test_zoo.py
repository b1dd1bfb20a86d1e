"""The zoo: every kind of architecture gets exits that work, and the checks find what does not work.

`pytest -m zoo` tries every family, most of an hour; without it a sample of them runs, with `-m slow` a larger one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
import zoo
import zoo_exported
from cases import slow
from torch import Tensor, nn

import ptee
from ptee._common.errors import UnknownName
from ptee.analysis.cut_points import Cut, random_images
from ptee.backbones.load import load_backbone
from ptee.model.build import build

# Of every kind: plain, residual and branched chains, tokens with and without class token, windows, (b, h, w, c), rows packed
# with tokens, networks that remember the batch.
SAMPLE = [
    *(
        "timm/byobnet",
        "timm/convnext",
        "timm/mambaout",
        "timm/maxxvit",
    ),
    *("timm/resnet", "timm/vision_transformer"),
    *("torchvision/shufflenetv2", "torchvision/squeezenet"),
]
MORE_OF_THESE_KINDS = [
    *(
        "timm/convit",
        "timm/cspnet",
        "timm/crossvit",
        "timm/deit",
        "timm/dla",
        "timm/efficientvim",
        "timm/ghostnet",
        "timm/hrnet",
        "timm/levit",
        "timm/tnt",
    ),
    *("timm/mobilenetv3", "timm/pit", "timm/regnet", "timm/repghost", "timm/starnet", "timm/twins"),
    *("timm/vision_transformer_relpos", "torchvision/mobilenetv3", "timm/nfnet", "timm/efficientnet"),
]
PIXELS = {"crossvit_tiny_240": 120, "tnt_s_legacy_patch16_224": 48}  # as their patches ask; the others take 96


@pytest.mark.parametrize("name", [*SAMPLE, *map(slow, MORE_OF_THESE_KINDS)])
def test_a_family_gets_three_exits_that_work(name, monkeypatch):
    (family,) = zoo.families([name])
    monkeypatch.setitem(zoo.SMALLER_IMAGE, family.model, PIXELS.get(family.model, 96))
    verdict = zoo.check(family)
    assert verdict.refusal == ""
    assert len(verdict.exits) == 3


@pytest.mark.zoo
@pytest.mark.parametrize("family", zoo.families(), ids=lambda f: f"{f.library}/{f.name}")
def test_every_family_gets_three_exits_that_work(family):
    verdict = zoo.check(family)
    assert verdict.refusal == ""
    assert len(verdict.exits) == 3


@pytest.mark.zoo
@pytest.mark.cpu("what is exported is the same on every device")
@pytest.mark.parametrize("family", zoo.families(), ids=lambda f: f"{f.library}/{f.name}")
def test_every_family_is_exported(family):
    assert zoo_exported.check(family).refusal == ""


@pytest.mark.cpu("what is exported is the same on every device")
@pytest.mark.slow
def test_the_table_of_exported_families_has_a_line_for_each_and_a_summary(capsys):
    zoo_exported.main(["timm/resnet"])
    title, row, _, summary = capsys.readouterr().out.splitlines()
    assert title.split()[:4] == ["library", "family", "model", "pixels"]
    assert (row.split()[:7], row.split()[-1]) == (["timm", "resnet", "test_resnet", "96", "1", "1", "1"], "ok")
    assert summary.startswith("Families that are exported as pt2: 1 of 1 of timm.")


def test_a_family_that_is_not_exported_says_why(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ptee.PteeError("torch.export cannot capture it.")

    monkeypatch.setattr(zoo_exported, "export", refuse)
    (family,) = zoo.families(["timm/resnet"])
    verdict = zoo_exported.check(family)
    assert "torch.export cannot capture it." in verdict.row[-1]
    assert "0 of 1 of timm" in zoo_exported.summary([verdict], "pt2")


# ---------------------------------------------------------------------------------------------------- the checks find faults


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = timm.create_model("test_resnet").eval()
    return build(load_backbone(net, input_size=(3, 64, 64)), exits="pareto", num_exits=3)


def images(model: ptee.EarlyExitModel) -> Tensor:
    return random_images(model.backbone, zoo.ROWS, model.plan.input_size)


def test_a_sound_model_has_no_fault(model):
    assert zoo.failure(model, images(model)) == ""


def test_answers_that_are_not_the_backbones_are_found(model):
    def overwrite(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> None:
        args[0].add_(1)

    model.heads[0].register_forward_hook(overwrite)
    assert "not the backbone's" in zoo.failure(model, images(model))


def test_other_rows_than_those_that_stayed_are_found(model, monkeypatch):
    select = Cut.select
    monkeypatch.setattr(Cut, "select", lambda cut, output, rows: select(cut, output, (rows + 1) % len(output)))
    assert zoo.failure(model, images(model)).startswith(("wrong", "not tried"))


def test_a_wrong_count_is_found(model, monkeypatch):
    def twice(module: nn.Module, example: Tensor, products_only: bool = False):
        counts = count(module, example, products_only)
        return replace(counts, until={name: 2 * macs for name, macs in counts.until.items()})

    count = zoo.count
    monkeypatch.setattr(zoo, "count", twice)
    assert "torch counts" in zoo.failure(model, images(model))


def test_a_family_that_is_refused_says_why():
    verdict = zoo.check(zoo.Family("timm", "resnet", "resnet18d_but_not_really"))
    assert "Unknown timm model" in verdict.refusal
    assert "Unknown timm model" in verdict.row[-1]
    assert "0 of 1 of timm" in zoo.summary([verdict])


# ---------------------------------------------------------------------------------------------------- which families


def test_every_module_of_models_is_a_family():
    found = zoo.families()
    own = {"cifar_resnet", "small_networks"}  # ptee's, registered where they have been imported
    assert [f.name for f in found if f.library == "timm"] == sorted(set(timm.list_modules()) - own)
    assert len({f.name for f in found if f.library == "torchvision"}) == len(zoo.TORCHVISION)


def test_an_unknown_family_is_refused_with_those_like_it():
    with pytest.raises(UnknownName, match="resnet"):
        zoo.families(["resnett"])


def test_the_table_has_a_line_for_each_family_and_a_summary(capsys, monkeypatch):
    monkeypatch.setitem(zoo.SMALLER_IMAGE, "test_resnet", 96)
    zoo.main(["timm/resnet"])
    title, row, _, summary = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["library", "family", "model"]
    assert row.split()[:3] == ["timm", "resnet", "test_resnet"]
    assert summary.startswith("Families with 3 working exits: 1 of 1 of timm.")


def test_a_family_may_be_written_in_capitals():
    assert zoo.families(["TIMM/ResNet"]) == zoo.families(["timm/resnet"])


def test_the_smallest_model_is_the_one_with_the_fewest_parameters():
    assert zoo.smallest(["resnet34", "resnet18", "resnet50"]) == "resnet18"


def test_the_gap_is_the_largest_stretch_without_an_exit():
    family = zoo.Family("timm", "resnet", "resnet18")
    assert zoo.Verdict(family, exits=[("a", 0.2), ("b", 0.3)]).gap == pytest.approx(0.7)
    assert zoo.Verdict(family, exits=[("a", 0.5), ("b", 0.9)]).gap == pytest.approx(0.5)
