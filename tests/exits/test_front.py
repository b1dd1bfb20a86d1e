"""The exit at the input: a whole network in front of the backbone is one more exit."""

from __future__ import annotations

import copy
import gc
import json

import pytest
import torch
from device import seeded
from safetensors.torch import load_file, save_file
from small import leaving_everywhere, once
from tiny import as_it_was
from torch import Tensor, nn

import ptee
from ptee._common.errors import BackboneError, CutError, PteeError, RunError
from ptee.analysis.macs import count
from ptee.backbones import timm
from ptee.backbones.library import Built, ModelRequest
from ptee.backbones.load import load_backbone
from ptee.exits.front import FrontHead, named_front
from ptee.model.build import build
from ptee.model.run_config import fingerprint

K = 10
SIZE = (3, 32, 32)


class Small(nn.Module):
    """A classifier of its own."""

    def __init__(self, classes: int = K, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm, self.classifier = nn.Conv2d(channels, 6, 3, 2), nn.BatchNorm2d(6), nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.conv(x)).relu().mean((2, 3)))


@once
def early() -> ptee.EarlyExitModel:
    return behind(Small())


def behind(front: nn.Module, **wish) -> ptee.EarlyExitModel:
    wish = {"exits": ["layer1.0", "layer3.0"], "head": ["res-8x1-16x1+", "conv1"]} | wish
    backbone = load_backbone("cifar_resnet8", pretrained=False)
    model = build(backbone, front=named_front(front, backbone, mean=(0.5,), std=(0.5,)), **wish)
    with torch.no_grad():
        for head in model.heads:
            if head.previous_weight is not None:
                head.previous_weight.fill_(0.7)
    return model


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    return early()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, *SIZE, generator=seeded(1)) * torch.linspace(0.2, 2, 24)[:, None, None, None]


def test_the_front_network_is_the_first_exit_and_costs_what_it_costs(model):
    first, *others = model.exits
    assert (first.name, first.backbone_cost, first.head) == ("input", 0.0, "front")
    assert [e.name for e in others] == ["layer1.0", "layer3.0"]
    whole = count(Small().eval(), torch.zeros(1, *SIZE)).total / model.plan.macs
    assert first.head_cost == pytest.approx(whole, rel=0.01)
    assert "input" in str(model.plan)


def test_who_leaves_there_gets_the_answer_of_the_front_network(x):
    front = Small()
    model = behind(front)
    own = load_backbone("cifar_resnet8", pretrained=False).input
    mean, std = (torch.tensor(v)[:, None, None] for v in (own.mean, own.std))
    as_it_takes_them = ((x * std + mean) - 0.5) / 0.5
    out = model.predict(x, 0)
    assert out.exit_index.tolist() == [0] * len(x)
    torch.testing.assert_close(out.logits, front.eval()(as_it_takes_them))


def test_whoever_leaves_in_front_never_reaches_the_backbone(model, x):
    leaving_everywhere(model, x)
    seen = []
    handle = model.backbone.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    leaving = int((model.predict(x).exit_index == 0).sum())
    model.predict(x, 0)
    handle.remove()
    assert 0 < leaving < len(x)
    assert seen == [len(x) - leaving]


def test_every_row_gets_the_answer_that_it_gets_alone(model, x):
    every, together = leaving_everywhere(model, x)
    alone = [model.predict(image[None]) for image in x]
    assert torch.equal(together.exit_index, torch.cat([a.exit_index for a in alone]))
    torch.testing.assert_close(together.logits, torch.cat([a.logits for a in alone]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.logits, every.logits[together.exit_index, range(len(x))], rtol=1e-4, atol=1e-4)


def test_it_may_be_the_only_exit(x):
    model = behind(Small(), exits=["input"], head="front")
    h = model.all_exits(x).confidence[0]
    model.threshold = h.median().item()
    assert sorted(set(model.predict(x).exit_index.tolist())) == [0, 1]
    assert len(model.costs) == 2


def test_the_head_behind_it_builds_on_its_answer(model, x):
    before = model.all_exits(x).logits
    with torch.no_grad():
        model.heads[0].network.norm.bias.add_(1.0)
    after = model.all_exits(x).logits
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(before[-1], after[-1])


def test_training_leaves_every_byte_of_it_as_it_was(x):
    model = early()
    before = copy.deepcopy(model.heads[0].network.state_dict())
    ptee.train(model, [(image, 1) for image in x], epochs=2, batch_size=8)
    after = model.heads[0].network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.train().heads[0].network.training


def test_a_head_that_learns_may_stand_at_the_input(x):
    backbone = load_backbone("cifar_resnet8", pretrained=False)
    model = build(backbone, exits=["input", "layer2.0"], head="auto", head_budget=[0.3, 0.1])
    assert [e.name for e in model.exits] == ["input", "layer2.0"]
    assert 0.1 < model.exits[0].head_cost <= 0.31
    leaving_everywhere(model, x)


def test_images_are_resized_for_a_network_of_another_size(x):
    torch.manual_seed(0)
    backbone = load_backbone("cifar_resnet8", pretrained=False)
    small = load_backbone("test_resnet", pretrained=False, num_classes=K, input_size=(3, 64, 64))
    model = build(backbone, exits=["layer1.0"], front=FrontHead(small, backbone.input, K))
    assert model.predict(x, 0).logits.shape == (len(x), K)


def test_its_confidence_reads_the_probabilities_and_the_log_odds_of_the_largest(model, x):
    head = model.heads[0]
    logits = head.read(x)
    p = logits.softmax(-1)
    largest = p.amax(-1)
    weight, bias = head.confidence.weight[0], head.confidence.bias[0]
    expected = p @ weight[:K] + weight[K] * (largest / (1 - largest)).log() + bias
    torch.testing.assert_close(model.all_exits(x).confidence_logits[0], expected)


def test_its_confidence_is_as_precise_for_logits_in_half_precision(model):
    head = model.heads[0]
    logits = torch.zeros(2, K)
    logits[:, 0] = torch.tensor([7.5, 8.375])  # probabilities .995 and .998, both .996 in bfloat16
    with torch.no_grad():
        head.confidence.weight.zero_()[0, 0] = 1000.0
        precise = head._confidence(logits)
        head.to(torch.bfloat16)
        torch.testing.assert_close(head._confidence(logits.bfloat16()), precise, rtol=0, atol=0.5)


def test_a_front_network_that_is_certain_gives_a_finite_confidence(model):
    logits = torch.zeros(2, K)
    logits[0, 3], logits[1] = 1e4, -torch.inf
    logits[1, 0] = 0.0
    assert model.heads[0]._confidence(logits).isfinite().all()


# ---------------------------------------------------------------------------------------------------- kept


def test_detach_gives_the_front_network_back_as_it_was(x):
    front = Small().train()
    front.conv.weight.requires_grad_(False)
    before = as_it_was(front)
    model = behind(front)
    model.all_exits(x)
    assert as_it_was(front) != before
    model.detach()
    assert as_it_was(front) == before


def test_the_models_end_gives_the_front_network_back_too():
    front = Small().train()
    before = as_it_was(front)
    behind(front)
    gc.collect()
    assert as_it_was(front) == before


def test_a_saved_run_brings_the_front_network_with_it(tmp_path, x):
    torch.manual_seed(0)
    weights = tmp_path / "front.safetensors"
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    backbone = load_backbone("cifar_resnet32", pretrained=False).module
    model = ptee.augment(backbone, front="cifar_resnet8", front_weights=weights, exits=["layer2.0"], input_size=SIZE)
    model.save_pretrained(tmp_path / "run")
    expected = model.all_exits(x).logits
    weights.unlink()
    back = ptee.load(tmp_path / "run", model.detach())
    assert torch.equal(back.all_exits(x).logits, expected)


@pytest.mark.parametrize("change", [{"num_classes": 10**7}, {"name": "wide_resnet101_2"}], ids=str)
def test_a_front_network_of_other_shapes_than_were_saved_is_refused_before_it_takes_memory(
    change, tmp_path, monkeypatch
):
    weights = tmp_path / "front.safetensors"
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    backbone = load_backbone("cifar_resnet32", pretrained=False).module
    model = ptee.augment(backbone, front="cifar_resnet8", front_weights=weights, exits=["layer2.0"], input_size=SIZE)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["front"]["source"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config | {"fingerprint": fingerprint(config)}))
    made = timm.build

    def on_meta(request: ModelRequest) -> Built:
        assert torch.empty(0).device.type == "meta", "the network took memory"
        return made(request)

    monkeypatch.setattr(timm, "build", on_meta)
    with pytest.raises(BackboneError, match="The front network cannot be rebuilt"):
        ptee.load(tmp_path, model.detach())


def test_a_front_network_of_ones_own_is_given_again(model, tmp_path, x):
    model.save_pretrained(tmp_path)
    expected = model.all_exits(x).logits
    backbone = model.detach()
    with pytest.raises(RunError, match=r"front network Small.*ptee\.load\(.*, front=\.\.\.\)"):
        ptee.load(tmp_path, backbone)
    torch.testing.assert_close(ptee.load(tmp_path, backbone, front=Small()).all_exits(x).logits, expected)


def test_a_front_network_of_0_1_0_whose_confidence_reads_its_features_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "heads.safetensors")
    save_file(saved | {"0.confidence.weight": torch.zeros(1, K + 6)}, tmp_path / "heads.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tensors"], config["fingerprint"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"schema_version": 1}))
    with pytest.raises(RunError, match=r"0\.1\.0: the confidence of its front network.*Train it again") as refusal:
        ptee.load(tmp_path, model.detach(), front=Small())
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("front", "said"),
    [(Small(classes=7), "7 classes, the backbone 10"), (Small(channels=1), "images of 1 channels, the backbone 3")],
    ids=["other classes", "other channels"],
)
def test_a_network_that_answers_something_else_is_refused(front, said):
    channels = front.conv.in_channels
    network = load_backbone(front, input_size=(channels, 32, 32))
    with pytest.raises(PteeError, match=said):
        FrontHead(network, load_backbone("cifar_resnet8", pretrained=False).input, K)


def test_a_front_network_by_name_has_the_backbones_classes():
    backbone = load_backbone("cifar_resnet8", pretrained=False, num_classes=7)
    head = named_front("test_resnet", backbone, pretrained=False)
    assert isinstance(head, FrontHead)
    assert head.num_classes == 7


@pytest.mark.parametrize(
    "wish", [{"weights": "none.pth"}, {"mean": (0.5, 0.5)}, {"std": (0.0,)}], ids=["weights", "mean", "std"]
)
def test_what_is_wrong_with_its_options_is_said_of_its_own(wish):
    (option,) = wish
    backbone = load_backbone("cifar_resnet8", pretrained=False)
    with pytest.raises(PteeError, match=r"^The front network: ") as said:
        named_front("cifar_resnet8", backbone, pretrained=False, **wish)
    assert f" {option}=" not in str(said.value)


@pytest.mark.parametrize("front", [None, "auto"])
def test_weights_of_no_front_network_are_refused(front):
    with pytest.raises(PteeError, match="Weights, mean and std of a front network are given, but no such network"):
        ptee.augment("cifar_resnet8", pretrained=False, front=front, front_weights="w.safetensors")


def test_only_options_that_it_has_are_named(tmp_path):
    backbone = load_backbone("cifar_resnet8", pretrained=False)
    with pytest.raises(PteeError, match=r"no pretrained weights.*front_weights=FILE\.$"):
        named_front("cifar_resnet8", backbone)
    save_file(
        load_backbone("cifar_resnet8", pretrained=False, num_classes=7).module.state_dict(), tmp_path / "w.safetensors"
    )
    with pytest.raises(
        PteeError,
        match=r"has 7 classes .*the model has 10\. Give another front=, or a file of its weights: front_weights=FILE\.$",
    ) as said:
        named_front("cifar_resnet8", backbone, weights=tmp_path / "w.safetensors")
    assert "num_classes=" not in str(said.value)


def test_a_front_network_for_huge_images_is_refused():
    images = load_backbone("cifar_resnet8", pretrained=False).input
    with pytest.raises(PteeError, match="4096 x 32 pixels; the sides may have 2048 at most"):
        FrontHead(load_backbone(Small(), input_size=(3, 4096, 32)), images, K)


def test_a_run_that_has_none_takes_none(tmp_path):
    model = ptee.augment("cifar_resnet8", pretrained=False, exits=["layer1.0"])
    model.save_pretrained(tmp_path)
    with pytest.raises(RunError, match="has no front network, but one is given"):
        ptee.load(tmp_path, model.detach(), front=Small())


@pytest.mark.parametrize("head", ["pool", "conv1"])
def test_a_learned_front_is_learned_whatever_the_other_heads_are(head):
    plan = ptee.plan("cifar_resnet8", pretrained=False, exits=["layer1.0"], head=head, front="auto", head_budget=0.3)
    assert plan.exits[0].head.startswith("res-")
    assert plan.exits[1].head == head


def test_the_input_stands_before_what_a_rule_places():
    wish = {"pretrained": False, "head": "pool"}
    alone = ptee.plan("cifar_resnet20", exits="pareto", num_exits=2, **wish)
    plan = ptee.plan("cifar_resnet20", exits=["input", "pareto"], num_exits=3, **wish)
    assert [e.name for e in plan.exits] == ["input", *(e.name for e in alone.exits)]
    assert len(ptee.plan("cifar_resnet20", exits=["input", "pareto"], **wish).exits) > 3
    assert [e.name for e in ptee.plan("cifar_resnet20", exits="input", num_exits=1, **wish).exits] == ["input"]


@pytest.mark.parametrize(
    ("exits", "num_exits", "said"),
    [
        ("input", 5, r"1 exit is named \(input\), 5 are asked for"),
        (["input", "pareto"], 1, "'input' is one exit, and 1 is asked for. Ask for 2 or more"),
        (["input", "layer1.0"], 1, r"2 exits are named \(input, layer1.0\), 1 is asked for"),
        (["input", "layer1.0"], 3, r"2 exits are named \(input, layer1.0\), 3 are asked for"),
        (["layer1.0", "input"], None, r"'input' is the first of all\. Name it in front of 'layer1\.0'"),
    ],
)
def test_numbers_and_words_that_do_not_go_with_the_input_are_refused(exits, num_exits, said):
    with pytest.raises(CutError, match=said):
        ptee.plan("cifar_resnet8", pretrained=False, exits=exits, num_exits=num_exits)


@pytest.mark.parametrize(("second", "cheapest"), [("pool", 1), ("res-8x1s4+", 0)], ids=["alone", "reads the first"])
def test_the_least_cost_is_that_of_one_exit_and_of_the_heads_that_it_needs(second, cheapest):
    plan = ptee.plan("cifar_resnet8", pretrained=False, exits=["input", "layer1.0"], head=["res-64x2", second])
    first, later = plan.exits
    own = [first.head_cost, later.backbone_cost + later.head_cost]
    assert own[1] < own[0]
    assert plan.least_cost == pytest.approx(own[cheapest])


# ---------------------------------------------------------------------------------------------------- in every setting


def test_the_backbone_at_another_size_may_stand_in_front_of_itself(x):
    net = load_backbone("cifar_resnet8", pretrained=False).module
    behind = load_backbone(net, input_size=SIZE)
    front = FrontHead(load_backbone(net, input_size=(3, 16, 16)), behind.input, K)
    model = build(behind, exits=["layer1.0", "layer3.0"], head="pool", front=front)
    torch.testing.assert_close(model.answer(model.read(x)), model.all_exits(x))
    assert torch.equal(model.predict(x, 2.0).logits, net(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_works_in_the_backbones_number_type(dtype, x):
    backbone = load_backbone("cifar_resnet8", pretrained=False)
    small = load_backbone(Small(), input_size=(3, 16, 16))
    model = build(backbone, exits=["layer1.0"], front=FrontHead(small, backbone.input, K)).to(dtype)
    assert model.predict(x.to(dtype), 0.0).logits.dtype == dtype


def test_a_network_in_float64_is_counted_in_float64(x):
    backbone = load_backbone(load_backbone("cifar_resnet8", pretrained=False).module.double(), input_size=SIZE)
    model = build(
        backbone,
        exits=["layer1.0"],
        front=FrontHead(load_backbone(Small().double(), input_size=SIZE), backbone.input, K),
    )
    assert model.predict(x.double(), 0.0).exit_index.tolist() == [0] * len(x)


def test_gradients_that_are_asked_of_all_heads_do_not_reach_it(model, x):
    before = copy.deepcopy(model.heads[0].network.state_dict())
    model.heads.requires_grad_(True)
    model.heads[0].network.train()
    ptee.train(model, [(image, 1) for image in x], epochs=1, batch_size=8)
    after = model.heads[0].network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


class Mixing(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True))


class Overwriting(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(1.0))


@pytest.mark.parametrize(
    ("network", "said"), [(Mixing, "influence one another"), (Overwriting, "overwrites the images")]
)
def test_a_network_that_could_change_other_answers_is_refused(network, said):
    backbone, front = load_backbone("cifar_resnet8", pretrained=False), network()
    before = as_it_was(front)
    with pytest.raises(PteeError, match=said):
        named_front(front, backbone)
    assert as_it_was(front) == before


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.one(x))


class Named(nn.Module):
    """Blocks called as an exit and a rule are."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.body, self.linear, self.rest, self.classifier = *(Block() for _ in range(4)), nn.Linear(3, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.rest(self.linear(self.body(self.input(x)))).mean((2, 3)))


def test_a_module_of_the_backbone_that_is_called_input_is_no_exit():
    network = load_backbone(Named().eval(), input_size=SIZE)
    with pytest.raises(CutError, match="a module called 'input'"):
        build(network, exits=[0.05])
    assert [e.name for e in build(network, exits=["body"]).exits] == ["body"]


def test_a_module_called_like_a_rule_is_meant_behind_the_input_too(tmp_path):
    model = ptee.augment(Named(), exits=["input", "linear"], head="pool", input_size=SIZE)
    assert [e.name for e in model.exits] == ["input", "linear"]
    model.save_pretrained(tmp_path)
    assert [e.name for e in ptee.load(tmp_path, model.detach()).exits] == ["input", "linear"]


def test_the_benchmark_takes_it(model):
    from ptee.pipeline.timed_run import bench_untrained

    assert "exit 0" in str(bench_untrained(model, batch_sizes=[2], rounds=3, threads=None))
