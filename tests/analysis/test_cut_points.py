"""Cut points: the survey finds them, and each module that is refused gets its reason."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from awkward import REAL_SIZE, SIZE, Applying, InPlace, Net, Skip, Two, conv, hooks, real
from cases import slow
from torch import Tensor, nn

from ptee._common.errors import BackboneError, CutError, UnknownName
from ptee.analysis.cut_points import random_images, survey
from ptee.analysis.verify import verify_cut_points

# ---------------------------------------------------------------------------------------------------- difficult outputs that are cut points


class Pair(Two):
    """(small map, [large map])"""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.one(x)[:, :, ::2, ::2], [self.two(x)]


class Named(NamedTuple):
    constant: Tensor
    z: Tensor
    text: str


class ManyThings(Two):
    """A named tuple of a tensor without the batch, a tensor with it, and a text."""

    def forward(self, x: Tensor) -> Named:
        return Named(torch.ones(8, 1, 1), self.one(x), "no tensor")


class Dictionary(Two):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": self.one(x), "two": self.two(x)}


class Dense(Two):
    """Returns its input beside its output."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, self.one(x)]


class Counted(Two):
    """Gives a number that was made of all images, such as a loss for the balance of its experts."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.one(x)
        return x, x.square().mean()


class WithMask(Two):
    """Gives a mask that is larger than its map."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.one(x)
        return x, x.repeat(1, 2, 1, 1) > 0


class Reading(nn.Module):
    """Makes one map of the output of a module."""

    def __init__(self, inner: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.read = inner, read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.inner(x))


def from_pair() -> Reading:
    return Reading(Pair(), lambda pair: pair[1][0] + nn.functional.interpolate(pair[0], scale_factor=2))


AWKWARD = {  # the part, the module in it, the tensors that carry the batch, the one that the head reads
    "overwritten in place": (InPlace, "part.one", (0,), 0),
    "a tuple with a list": (from_pair, "part.inner", (0, 1), 1),
    "a named tuple with other things": (
        lambda: Reading(ManyThings(), lambda t: t.constant * t.z),
        "part.inner",
        (1,),
        1,
    ),
    "a dictionary": (lambda: Reading(Dictionary(), lambda d: d["one"] + d["two"]), "part.inner", (0, 1), 1),
    "its input beside its output": (lambda: Reading(Dense(), sum), "part.inner", (0, 1), 1),
    "its input, which nobody reads, beside its output": (
        lambda: Reading(Dense(), lambda outputs: outputs[1]),
        "part.inner",
        (1,),
        1,
    ),
    "a larger mask beside its output": (
        lambda: Reading(WithMask(), lambda pair: pair[0] * pair[1].float().mean((1, 2, 3), keepdim=True)),
        "part.inner",
        (0, 1),
        0,
    ),
    "a number that nobody reads beside its output": (
        lambda: Reading(Counted(), lambda pair: pair[0]),
        "part.inner",
        (0,),
        0,
    ),
}


@pytest.mark.parametrize("case", AWKWARD)
def test_a_difficult_output_is_a_cut_point_and_loses_the_rows_of_every_tensor_with_the_batch(case):
    part, name, carried, main = AWKWARD[case]
    net, given = Net(part()), []
    cut = survey(net, SIZE).cuts[name]
    assert (cut.carried, cut.main, cut.shape) == (carried, main, (8, 8, 8))
    assert verify_cut_points(net, [cut], SIZE) == {}
    net.get_submodule(name).register_forward_hook(lambda _m, _i, output: given.append(output))
    net(torch.randn(3, *SIZE))
    rows = torch.tensor([2, 0])
    less = cut.select(given[0], rows)
    assert type(less) is type(given[0])
    assert torch.equal(cut.feature_map(less), cut.feature_map(given[0])[rows])


def test_only_an_output_that_is_written_into_later_is_marked_as_overwritten():
    cuts = survey(Net(InPlace()), SIZE).cuts
    assert {name for name, cut in cuts.items() if cut.overwritten} == {"part.one"}


# ---------------------------------------------------------------------------------------------------- modules that are no cut points


def twice() -> nn.Module:
    same = conv()
    return nn.Sequential(nn.Sequential(same), nn.Sequential(same))


class Stash(Two):
    """The skip connection goes through an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.stashed = x
        x = self.two(self.one(x)) + self.stashed
        del self.stashed
        return x


class Masked(Two):
    """A mask made from the input is read at the end."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        return self.two(self.one(x)) * mask


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.one = nn.Embedding(8, 1), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x + self.table(torch.arange(8)).view(1, 8, 1, 1))


class Unread(Two):
    """Runs one module without reading its output, and never runs the other."""

    def forward(self, x: Tensor) -> Tensor:
        self.one(x)
        return x * 2


class Windows(nn.Module):
    """The batch is folded into windows, and back again."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x.view(-1, 8, 2, 4, 8).transpose(1, 2).reshape(-1, 8, 4, 8))
        return x.view(-1, 2, 8, 4, 8).transpose(1, 2).flatten(2, 3)


class Mixed(nn.Module):
    """Rows and columns of the map are folded into its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.flatten(1)).view(-1, 8, 8, 8)


REFUSED = {
    "called twice": (twice, "part.0.0", "called 2 times"),
    "a skip connection around": (Skip, "part.one", "reads the output of 'entry', which passes around it"),
    "a skip connection through an attribute": (Stash, "part.one", "the output of 'entry'"),
    "a mask that passes around": (Masked, "part.two", "reads what was made inside of 'part', which passes around it"),
    "a branch of two": (from_pair, "part.inner.one", "the output of 'entry'"),
    "the image not in its output": (Constant, "part.table", "does not depend on the images"),
    "an output that nobody reads": (Unread, "part.one", "the output of 'entry'"),
    "never called": (Unread, "part.two", "not called"),
    "a number beside its output that is read": (
        lambda: Reading(Counted(), lambda pair: pair[0] * pair[1]),
        "part.inner",
        r"of shape \(\), is not the 3 images",
    ),
    "windows in place of rows": (Windows, "part.inside", r"cannot be told apart in its output of shape \(6, 8, 4, 8\)"),
    "axes that cannot be told apart": (Mixed, "part.inside", r"cannot be told apart in its output of shape \(3, 512\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_module_that_is_no_cut_point_is_refused_with_the_reason_and_another_module(case):
    part, name, reason = REFUSED[case]
    net = Net(part())
    with pytest.raises(CutError, match=reason) as refusal:
        survey(net, SIZE).cut(name, net)
    assert f"'{name}'" in str(refusal.value)
    assert "Use 'part" in str(refusal.value)


def test_for_a_refused_module_inside_no_cut_point_the_cut_points_are_named():
    same = nn.Conv2d(3, 3, 1)
    net = nn.Sequential(same, same, nn.Conv2d(3, 5, 16), nn.Flatten()).eval()
    with pytest.raises(CutError, match=r"'0'.*called 2 times.*Exits can stand at 2, 3\.$"):
        survey(net, SIZE).cut("0", net)


class Afterwards(Net):
    """Runs a module on its logits, and does not use the output."""

    def __init__(self) -> None:
        super().__init__(conv())
        self.later = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        answer = super().forward(x)
        self.later(answer)
        return answer


def test_a_module_that_runs_after_the_logits_is_no_cut_point():
    net = Afterwards()
    with pytest.raises(CutError, match=r"'later': the rest of the network also reads the output of 'classifier'"):
        survey(net, SIZE).cut("later", net)


@pytest.mark.parametrize("name", ["part.onne", "", "nothing.like.it"])
def test_an_unknown_name_is_refused_and_cut_points_are_offered(name):
    net = Net(Skip())
    with pytest.raises(UnknownName, match=rf"Unknown module '{name}'.*part") as refusal:
        survey(net, SIZE).cut(name, net)
    assert "part.one" not in str(refusal.value), "a module that is no cut must not be suggested"


@pytest.mark.parametrize("inside", ["denselayer2", "denselayer2.conv1"])
def test_a_dense_layer_and_its_parts_are_refused_and_their_block_is_offered(inside):
    net = timm.create_model("densenet121", num_classes=5).eval()
    with pytest.raises(CutError, match=rf"{inside}'.*passes around it.*Use 'features\.denseblock1', which"):
        survey(net, (3, 32, 32)).cut(f"features.denseblock1.{inside}", net)


# ---------------------------------------------------------------------------------------------------- real networks


def rows_can_leave(net: nn.Module, name: str) -> bool:
    """Whether the last rows keep their logits when the first two rows of this module's output are removed."""
    images = random_images(net, 4, REAL_SIZE)
    with torch.no_grad():
        answers = net(images)[2:]
        handle = net.get_submodule(name).register_forward_hook(lambda _m, _i, out: out[2:])
        try:
            less = net(images)
        except (RuntimeError, AssertionError):
            return False
        finally:
            handle.remove()
    return less.shape == answers.shape and torch.allclose(less, answers, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
def test_rows_cannot_leave_at_a_refused_module(name):
    net, found = real(name)
    refused = [part for part, reason in found.refused.items() if "passes around" in reason]
    assert len(refused) > 5
    assert [part for part in refused[::3] if rows_can_leave(net, part)] == []


def test_cut_points_are_in_the_order_of_execution_and_the_classes_are_counted():
    names = list(real("resnet18")[1].cuts)
    assert names.index("conv1") < names.index("layer1.1") < names.index("layer1") < names.index("layer2.0")
    assert real("resnet18")[1].classes == 5


# ---------------------------------------------------------------------------------------------------- no trace, no classifier


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("part", [Skip, Failing], ids=["forward succeeds", "forward raises"])
def test_a_survey_leaves_no_hook(part):
    net = Net(part())
    try:
        survey(net, SIZE)
    except BackboneError as error:
        assert "ZeroDivisionError: on purpose" in str(error)
    assert hooks(net) == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: (z, z), r"gives a tuple for 3 images.*self\.net\(x\)\[0\]"),
        (lambda z: z[:, :, None], r"gives a tensor \(3, 8, 1\) for 3 images"),
        (lambda z: z[:2], r"gives a tensor \(2, 8\) for 3 images"),
        (lambda z: z.sum(), r"gives a tensor \(\) for 3 images"),
    ],
    ids=["a tuple", "a map", "too few rows", "a number"],
)
def test_a_network_that_is_no_classifier_is_refused(function, message):
    pooled = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BackboneError, match=f"Reading {message}"):
        survey(Reading(pooled, function).eval(), SIZE)


def test_images_of_a_wrong_size_are_refused_with_what_to_do():
    with pytest.raises(
        BackboneError, match=r"Net cannot take an image of size \(4, 16, 16\): .*input_size=\(c, h, w\)"
    ):
        survey(Net(Skip()), (4, 16, 16))


def raising(error: Exception) -> nn.Module:
    def fail(z: Tensor) -> Tensor:
        raise error

    return Reading(nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()), fail).eval()


def test_an_operator_that_the_device_lacks_is_named_with_what_to_do():
    error = NotImplementedError(
        "The operator 'aten::_foo' is not currently implemented for the MPS device. If you want"
    )
    said = "calls aten::_foo, which torch does not have on MPS. Set PYTORCH_ENABLE_MPS_FALLBACK=1, .* or move the network to the CPU"
    with pytest.raises(BackboneError, match=said):
        survey(raising(error), SIZE)


def test_a_device_without_room_is_not_taken_for_an_image_of_a_wrong_size():
    with pytest.raises(RuntimeError, match=r"^MPS backend out of memory"):
        survey(raising(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")), SIZE)


def test_weights_of_two_types_are_named_with_what_to_do():
    net = Net(Skip())
    net.classifier.double()
    message = r"Net takes float32 images and has weights of other types \(classifier\.weight: float64, classifier\.bias: float64\): .* net\.float\(\)"
    with pytest.raises(BackboneError, match=message):
        survey(net, SIZE)


# ---------------------------------------------------------------------------------------------------- random numbers


def forked(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        return x + torch.randn_like(x)


RANDOM = {
    "dropout that is always on": lambda x: nn.functional.dropout(x, 0.01),
    "stochastic depth that is always on": lambda x: torchvision.ops.stochastic_depth(x, 0.01, "row", True),
    "very small noise": lambda x: x + 1e-9 * torch.randn_like(x),
    "noise outside of the values": lambda x: x if torch.rand(()) > 1e-6 else -x,
    "rrelu that is always on": lambda x: nn.functional.rrelu(x, training=True),
    "stochastic depth that hardly ever drops": lambda x: x * torch.floor(0.9999 + torch.rand(len(x), 1, 1, 1)),
    "noise without its mean": lambda x: x + (noise := torch.randn_like(x)) - noise.mean(),
    "the largest of random numbers": lambda x: x * (torch.rand(8).argmax() + 1),
    "noise that leaves the random numbers as they were": forked,
    "random numbers that make it fail": lambda x: x if torch.rand(()) > 1e-6 else x.view(7),
    "channels that are drawn": lambda x: x[:, torch.randint(0, 8, (1,))].expand(-1, 8, -1, -1),
    "channels in a random order": lambda x: x[:, torch.randperm(8)],
}


@pytest.mark.parametrize("case", RANDOM)
def test_a_network_that_draws_random_numbers_in_eval_mode_is_refused_with_the_module_that_does(case):
    with pytest.raises(BackboneError, match=r"Net is random in eval mode: 'part' draws .*aten.*self\.training"):
        survey(Net(Applying(RANDOM[case])), SIZE)


def with_own_generator(x: Tensor) -> Tensor:
    return x + torch.randn(8, 1, 1, generator=torch.Generator(x.device).manual_seed(0), device=x.device)


def with_a_seed(x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.einsum("bchw,cd->bdhw", x, torch.randn(8, 8)) * torch.rand(8, 1, 1).bernoulli()


class Logging(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.sample = x.flatten()[torch.randint(0, x.numel(), (5,))]
        return x


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).view_as(x)


CERTAIN = {
    "dropout of nothing": nn.Sequential(nn.Dropout(0.5), Applying(lambda x: nn.functional.dropout(x, 0.0))),
    "a mask that keeps all": Applying(lambda x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1.0)),
    "attention without dropout": Applying(attention),
    "rrelu": nn.RReLU(),
    "numbers of its own seed": Applying(with_own_generator),
    "numbers of torch's seed": Applying(with_a_seed),
    "noise times 0": Applying(lambda x: x + 0.0 * torch.randn_like(x)),
    "stochastic depth that keeps all": Applying(lambda x: x * torch.floor(1.0 + torch.rand(len(x), 1, 1, 1))),
    "the same in float64": Applying(
        lambda x: x * torch.floor(1.0 + torch.rand(len(x), 1, 1, 1, dtype=torch.float64)).float()
    ),
    "large whole numbers times 0": Applying(lambda x: x + 0 * torch.randint(-(2**62), 2**62, (1, 8, 1, 1))),
    "noise of no elements": Applying(lambda x: x + torch.randn(0, 8).sum()),
    "a sample for a log": Logging(),
}


@pytest.mark.parametrize("case", CERTAIN)
def test_operators_that_could_be_random_and_are_not_are_accepted(case):
    assert "part" in survey(Net(CERTAIN[case]), SIZE).cuts


def test_a_survey_of_a_network_that_draws_random_numbers_draws_none_of_the_users_that_one_pass_does_not():
    net = Net(CERTAIN["noise times 0"])
    torch.manual_seed(0)
    with torch.no_grad():
        net(torch.zeros(3, *SIZE))
    after_a_pass = torch.get_rng_state()
    torch.manual_seed(0)
    survey(net, SIZE)
    assert torch.equal(torch.get_rng_state(), after_a_pass)


# ---------------------------------------------------------------------------------------------------- memory that is used again


NETWORKS = ["test_resnet", "test_vit", "torchvision/swin_t", "torchvision/shufflenet_v2_x0_5"]
MORE = [
    *("test_convnext", "test_efficientnet", "levit_128s", "gcvit_xxtiny", "test_mambaout", "torchvision/swin_v2_t"),
    *("torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1", "torchvision/densenet121"),
]
SIZES = {"gcvit_xxtiny": 224, "levit_128s": 224, "test_vit": 160}


def churn(rng: random.Random) -> list[Tensor]:
    """Allocate tensors of many sizes, so that memory that was freed is used again."""
    if rng.random() < 0.3:
        gc.collect()
    return [torch.randn(rng.randint(1, 400_000)) for _ in range(rng.randint(0, 60))]


@pytest.mark.parametrize("name", [*NETWORKS, *map(slow, MORE)])
def test_a_survey_finds_the_same_every_time(name: str) -> None:
    model = name.removeprefix("torchvision/")
    net = (timm.create_model(name) if model == name else torchvision.models.get_model(model)).eval()
    size, rng, found = SIZES.get(model, 64), random.Random(0), []
    for _ in range(6 if "swin" in model else 3):  # its masks are made in the pass; there, addresses were used again
        kept = churn(rng)
        found.append(survey(net, (3, size, size)))
        del kept
    assert all(again == found[0] for again in found)


class SharesMemory(nn.Module):
    """A part that gives a map and a view of it, as two entries; `writes` changes the view later, and the map with it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.one, self.two, self.writes = conv(3), conv(), writes
        self.pair = nn.Module()
        self.pair.forward = lambda x: {"map": x, "view": x.flatten(2)}  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        found = self.pair(self.one(x))
        if self.writes:
            found["view"].clamp_(-0.1, 0.1)
        return self.two(found["map"]).mean((2, 3)) + found["view"].mean(2)


def test_no_rows_leave_where_tensors_share_memory_that_is_written_into_later():
    assert "pair" in survey(SharesMemory(False).eval(), SIZE).cuts
    assert "share memory" in survey(SharesMemory(True).eval(), SIZE).refused["pair"]


def test_a_step_of_a_starting_again_stands_once_however_many_modules_follow():
    net = nn.Sequential(*(nn.Sequential(conv(3, 3)) for _ in range(12)), nn.Flatten(), nn.Linear(3 * 64, 10)).eval()
    steps = [step for each in survey(net, (3, 8, 8)).steps.values() for step in each]
    assert len(steps) > 12 * 12 / 2
    assert len({id(step) for step in steps}) == len({*steps})
