"""Building: networks as people wrap and change them get exits, or are refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import timm
import torch
import zoo
from cases import slow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ptee
from ptee._common.errors import BackboneError
from ptee.analysis.cut_points import random_images
from ptee.backbones.cifar_resnet import CifarResNet
from ptee.exits.config import DEFAULT_PLACES


class Normalize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5) / 0.25


class Lightning(nn.Module):
    """As a LightningModule: the network inside, the loss beside it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = net, nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Lora(nn.Module):
    """As PEFT puts it in the place of a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_b = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def with_lora(net: nn.Module) -> nn.Module:
    for block in net.blocks:
        block.attn.qkv = Lora(block.attn.qkv)
    return net


def resnet(**args) -> nn.Module:
    return timm.create_model("test_resnet", **args)


def vit(**args) -> nn.Module:
    return timm.create_model("test_vit", **args)


SMALL = (3, 64, 64)
WORKS = {
    "in a LightningModule, behind a normalisation": (lambda: Lightning(nn.Sequential(Normalize(), resnet())), SMALL),
    "with LoRA injected": (lambda: with_lora(vit(img_size=64)), SMALL),
    "of one channel and ten classes": (lambda: resnet(in_chans=1, num_classes=10), (1, 64, 64)),
    "on larger images, not square": (resnet, (3, 96, 64)),
    "of dynamic image size": (lambda: vit(dynamic_img_size=True), (3, 96, 64)),
    "with dropout and stochastic depth": (
        lambda: vit(img_size=64, drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5),
        SMALL,
    ),
    "in half precision": (lambda: resnet().bfloat16(), SMALL),
}


@pytest.mark.parametrize("case", WORKS)
def test_a_network_works(case):
    make, size = WORKS[case]
    model = ptee.augment(make(), input_size=size, num_exits=2)
    if model.heads[0].logits.weight.dtype == torch.float32:
        assert zoo.failure(model, random_images(model.backbone, 6, size)) == ""
    x = random_images(model.backbone, 4, size)
    with torch.no_grad():
        expected = model.backbone(x)
    model.threshold = 2.0
    assert torch.equal(model(x), expected)
    out = model.predict(x, torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 2.0], [2.0, 0.0]]))
    assert out.exit_index.tolist() == [0, 1, 2, 1]


@dataclass
class Output:
    """As of Hugging Face's ForImageClassification."""

    logits: Tensor


class Answering(nn.Module):
    def __init__(self, answer) -> None:
        super().__init__()
        self.net, self.answer = resnet(), answer

    def forward(self, pixel_values: Tensor):
        return self.answer(self.net(pixel_values))


class Passing(TorchDispatchMode):
    """Looks at each operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Calling(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.call = resnet(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.net, x)


class Sharded(nn.Sequential):
    """As FSDP wraps a network, which it does in a group of processes only."""

    __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"


class Named(Tensor):
    """A tensor that a user has a class for."""


class Masked(nn.Module):
    """Is never called with its images alone."""

    def forward(self, x: Tensor, mask: Tensor, scale: float, shift: float = 0.0) -> Tensor:
        return x * mask * scale + shift


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return resnet()


def quantised() -> nn.Module:
    with torch.device("cpu"):
        return nn.Sequential(nn.Flatten(), torch.ao.nn.quantized.dynamic.Linear(3 * 64 * 64, 5))


REFUSED = {
    "an output with logits in it": (lambda: Answering(Output), r"gives a Output.*return self\.net\(x\)\.logits"),
    "a dict with logits in it": (
        lambda: Answering(lambda y: {"logits": y}),
        r'gives a dict.*self\.net\(x\)\["logits"\]',
    ),
    "a tuple": (
        lambda: Answering(lambda y: (y,)),
        r"gives a tuple.*Wrap it in a module that gives those: .*self\.net\(x\)\[0\]\.",
    ),
    "features alone": (lambda: resnet(num_classes=0), r"has no classifier.*net\.reset_classifier\(10\)"),
    "feature maps": (
        lambda: resnet(features_only=True),
        r"gives a list for 2 images.*self\.fc\(self\.net\(x\)\[4\]\.mean\(\(2, 3\)\)\)",
    ),
    "one logit": (lambda: resnet(num_classes=1), r"gives a tensor \(2, 1\).*One logit z of a binary network is two"),
    "one number": (
        lambda: Answering(lambda y: y[:, 0]),
        r"gives a tensor \(2,\).*One logit z of a binary network is two",
    ),
    "logits without their batch for one image": (
        lambda: Answering(lambda y: y.squeeze()),
        r"gives a tensor \(\d+,\) for 1 images, .*as \.squeeze\(\) does.*return self\.net\(x\)\.reshape\(len\(x\), -1\)\.",
    ),
    "logits of the whole batch": (
        lambda: Answering(lambda y: y.mean(0)),
        r"gives a tensor \(\d+,\) for 2 images, .* K >= 2\. Wrap it in a module that gives its logits\.",
    ),
    "a forward of two arguments": (
        lambda: nn.Sequential(Normalize(), Masked()),
        r"called with images alone, and Masked.forward\(\) wants mask and scale too.*self\.net\(x, mask=\.\.\., scale=\.\.\.\)",
    ),
    "numbers that are not there": (on_meta, "is on the meta device .*to_empty"),
    "shapes that are not there": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "has lazy parameters .*Run it once"),
    "gradients that cannot be switched": (
        lambda: torch.inference_mode()(resnet)(),
        r"was built under torch\.inference_mode .*copy\.deepcopy\(net\)",
    ),
    "a quantised layer": (quantised, "is quantised .*as it was before"),
    "copies of a network": (lambda: nn.DataParallel(resnet()), r"DataParallel.*Give its \.module"),
    "copies of a part": (
        lambda: nn.Sequential(Normalize(), nn.DataParallel(resnet())),
        r"copies of 1, a DataParallel.*net\.set_submodule\('1', net\.get_submodule\('1'\)\.module\)",
    ),
    "weights in several processes": (lambda: Sharded(resnet()), "Sharded.*processes.*before FSDP"),
    "truth values": (lambda: Answering(lambda y: y > 0), r"gives bool, not floating-point logits.*gives its logits"),
    "class numbers": (lambda: Answering(lambda y: y.argsort()), "gives int64, not floating-point logits"),
    "complex numbers": (lambda: Answering(lambda y: torch.complex(y, y)), "gives complex64, not floating-point logits"),
    "probabilities": (lambda: Answering(lambda y: y.softmax(-1)), r"gives probabilities.*Leave out its softmax.*\.log\(\)"),
    "a sigmoid": (lambda: Answering(lambda y: y.sigmoid()), r"ends in a sigmoid.*Leave it out.*\.float\(\)\.logit\(eps=1e-6\)"),
    "a sigmoid in place": (lambda: Answering(lambda y: y.sigmoid_()), "ends in a sigmoid"),
    "a sigmoid behind which nothing changes": (lambda: Answering(lambda y: y.half().sigmoid().float()[..., None].squeeze(-1)), "ends in a sigmoid"),
    "sparse numbers": (lambda: Answering(lambda y: y.to_sparse()), "gives a sparse_coo tensor.*plain"),
    "a tensor of another class": (lambda: Answering(lambda y: y.as_subclass(Named)), r"gives a Named.*as_subclass\(torch\.Tensor\)"),
    "torch.func.functional_call": (
        lambda: Calling(lambda net, x: torch.func.functional_call(net, dict(net.named_parameters()), (x,))),
        "Calling.*cannot be counted.*functional_call.*call its modules itself",
    ),
    "a thread of its own": (
        lambda: Calling(lambda net, x: ThreadPoolExecutor(1).submit(torch.no_grad()(net), x).result()),
        "Calling.*cannot be counted.*thread of its own.*call its modules itself",
    ),
    "torch.func.vmap": (
        lambda: Calling(lambda net, x: torch.func.vmap(lambda row: net(row[None])[0])(x)),
        "Calling calls torch.func.vmap.*the batch as a whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_is_refused_with_what_to_do(case):
    make, said = REFUSED[case]
    for command in (ptee.augment, ptee.plan):
        with pytest.raises(BackboneError, match=said):
            command(make(), input_size=SMALL)


@pytest.mark.parametrize(
    "mode", [FlopCounterMode(display=False), Passing()], ids=["FlopCounterMode", "a mode of the user"]
)
def test_a_mode_of_torch_that_is_on_changes_no_exit(mode):
    plan = ptee.plan(resnet(), input_size=SMALL, num_exits=2)
    with mode:
        assert ptee.plan(resnet(), input_size=SMALL, num_exits=2) == plan


def test_a_network_wrapped_as_the_refusal_says_works():
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Answering(Output)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).logits

    assert len(ptee.augment(Logits(), input_size=SMALL, num_exits=2).exits) == 2


def test_the_plan_says_which_of_several_tensors_a_head_reads():
    plan = ptee.plan("hrnet_w18_small", pretrained=False, input_size=SMALL, num_exits=2)
    assert "(1 of 2)" in str(plan)
    assert [(row["tensor"], row["tensors"]) for row in plan.to_dict()["exits"]] == [(0, 2), (0, 4)]


class Beside(nn.Module):
    """A module gives its input, which nobody reads again, beside two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.fc = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), nn.Linear(3, 4)
        self.part.register_forward_hook(lambda _, given, out: (given[0], out, out.relu()))

    def forward(self, x: Tensor) -> Tensor:
        _, one, two = self.part(x)
        return self.fc((one + two).mean((2, 3)))


def test_tensors_that_are_read_no_more_are_not_counted_among_those_that_a_head_could_read():
    assert "(2 of 2)" in str(ptee.plan(Beside(), exits=["part"], input_size=(3, 8, 8)))


@pytest.mark.parametrize(("name", "pixels"), [slow("crossvit_tiny_240", 120), ("pit_ti_224", 64)])
def test_a_saved_run_of_a_network_that_starts_again_is_loaded(name, pixels, tmp_path):
    net = timm.create_model(name, num_classes=5, img_size=pixels).eval()
    model = ptee.augment(net, num_exits=3)
    x = random_images(net, 4, model.plan.input_size)
    here = torch.tensor([[0.0, 2.0, 2.0], [2.0, 0.0, 2.0], [2.0, 2.0, 0.0], [2.0, 2.0, 2.0]])
    expected = model.predict(x, here)
    model.save_pretrained(tmp_path)
    again = ptee.load(tmp_path, backbone=model.detach())
    assert [e.name for e in again.exits] == [e.name for e in model.exits]
    assert torch.equal(again.predict(x, here).logits, expected.logits)


def test_without_a_wish_exits_and_heads_are_those_of_the_recipe():
    net = CifarResNet(20)
    model = ptee.augment(net, input_size=(3, 32, 32))
    recipe = ptee.Recipe().resolved().exits
    assert recipe.places == DEFAULT_PLACES
    assert model.plan == ptee.plan(model.detach(), input_size=(3, 32, 32))
    for exit_, place, budget in zip(model.exits, recipe.places, recipe.head_budget, strict=True):
        assert exit_.backbone_cost >= place
        assert exit_.head.startswith("res-") and exit_.head_cost <= budget


def test_without_room_at_the_usual_places_exits_stand_where_there_is_room():
    blocks = [nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.ReLU()) for c in (3, 6, 6)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    plan = ptee.plan(net, input_size=(3, 8, 8))
    assert plan.placement == "pareto"
    assert [e.name for e in plan.exits] == [e.name for e in ptee.plan(net, exits="pareto", input_size=(3, 8, 8)).exits]


def test_exits_may_be_named_as_on_the_command_line():
    plans = [ptee.plan(resnet(), exits=exits, head="pool", input_size=SMALL) for exits in ("0.3,0.6", [0.3, 0.6])]
    assert [e.name for e in plans[0].exits] == [e.name for e in plans[1].exits]
    assert plans[0].placement == plans[1].placement == "exits at or behind 0.3, 0.6 of the cost"
