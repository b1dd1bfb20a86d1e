"""Heads: their parameters by formula, any layout in, confidence in float32, and a registry that is open to users."""

from __future__ import annotations

import re

import pytest
import torch
from device import here
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError, UnknownName
from ptee.analysis.layout import Layout
from ptee.exits.build import build_head
from ptee.exits.confidence import CONFIDENCES
from ptee.exits.head_spec import parse_head
from ptee.exits.heads import HEADS, ExitHead, HeadOutput, register_head

b, K, C, H, W = 4, 5, 6, 4, 3
MAP = Layout("bchw", C, H, W)
LAYOUTS = {  # and the shape of a tensor that lies so
    "map": (MAP, (b, C, H, W)),
    "map, channels last": (Layout("bhwc", C, H, W), (b, H, W, C)),
    "tokens behind two others": (Layout("bnc", C, H, W, prefix=2, tokens=2 + H * W), (b, 2 + H * W, C)),
    "tokens, channels first": (Layout("bcn", C, H, W, tokens=H * W), (b, C, H * W)),
    "vector": (Layout("bc", C, 1, 1), (b, C)),
}
each_head = pytest.mark.parametrize("name", list(HEADS))  # a head that is added enters by itself
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def registry():
    """The registry, which is put back as it was after the test."""
    before = dict(HEADS)
    yield HEADS
    HEADS.clear()
    HEADS.update(before)


def make_head(name: str, layout: Layout, classes: int) -> ExitHead:
    return build_head(parse_head(name), layout, classes).to(here())


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------------------------------------- every head


@each_layout
@each_head
def test_every_head_gives_logits_and_a_confidence_logit_on_every_layout(name, layout):
    layout, shape = LAYOUTS[layout]
    logits, confidence = make_head(name, layout, K)(torch.randn(shape))
    assert (logits.shape, confidence.shape) == ((b, K), (b,))
    assert confidence.dtype == torch.float32


@each_head
def test_every_head_reads_the_same_map_alike_from_every_layout(name):
    z = torch.randn(b, C, H, W)
    tokens = torch.cat([torch.randn(b, 2, C), z.flatten(2).mT], 1)
    given = {"map": z, "map, channels last": z.permute(0, 2, 3, 1), "tokens behind two others": tokens}
    head = make_head(name, MAP, K).eval()
    answers = []
    for layout, tensor in given.items():
        head.layout = LAYOUTS[layout][0]
        answers.append(torch.cat([part.flatten() for part in head(tensor)]))
    torch.testing.assert_close(answers, [answers[0]] * 3)


@each_head
def test_every_head_answers_each_row_alone_in_eval_mode(name):
    head, z = make_head(name, MAP, K).eval(), torch.randn(b, C, H, W)
    together, alone = head(z), [head(row[None]) for row in z]
    for n, part in enumerate(together):
        torch.testing.assert_close(part, torch.cat([answer[n] for answer in alone]))


@each_head
def test_every_parameter_of_every_head_gets_a_gradient(name):
    head = make_head(name, MAP, K)
    logits, confidence = head(torch.randn(b, C, H, W))
    (logits.square().sum() + confidence.square().sum()).backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@each_head
def test_every_head_is_made_in_training_mode_with_statistics_as_new(name):
    head = make_head(name, MAP, K)
    assert all(part.training for part in head.modules())
    norms = [part for part in head.modules() if isinstance(part, nn.BatchNorm2d)]
    assert all(not norm.running_mean.any() and norm.num_batches_tracked == 0 for norm in norms)


# ---------------------------------------------------------------------------------------------------- one upon another


def building_head(name: str, previous_weight: float) -> ExitHead:
    """A head that builds on the answer before with this weight."""
    head = make_head(f"{name}+", MAP, K).eval()
    with torch.no_grad():
        head.previous_weight.fill_(previous_weight)
    return head


@each_head
def test_a_head_adds_the_log_probabilities_of_the_answer_before_times_its_weight(name):
    head, z, before = building_head(name, 0.5), torch.randn(b, C, H, W), torch.randn(b, K)
    alone, building = head(z, []), head(z, [torch.randn(b, K), before])
    torch.testing.assert_close(building.logits, alone.logits + 0.5 * before.log_softmax(-1))
    assert torch.equal(head.answer(head.read(z), [before]).logits, building.logits)


def test_the_probabilities_are_the_weighted_geometric_mean_of_those_so_far():
    heads, z = (
        [make_head("pool", MAP, K), building_head("pool", 0.5), building_head("pool", 0.8)],
        torch.randn(b, C, H, W),
    )
    own = [head(z, []).logits.softmax(-1) for head in heads]
    answers: list[Tensor] = []
    for head in heads:
        answers.append(head(z, answers).logits)
    mean = own[2] * own[1] ** 0.8 * own[0] ** (0.8 * 0.5)
    torch.testing.assert_close(answers[-1].softmax(-1), mean / mean.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", [*HEADS, "res-8x1"])
def test_the_weight_starts_at_zero_and_learns_while_the_answer_before_gets_no_gradient(name):
    head, z, before = make_head(f"{name}+", MAP, K), torch.randn(b, C, H, W), torch.randn(b, K, requires_grad=True)
    assert count(head) == count(make_head(name, MAP, K)) + 1
    head(z, [before]).logits.square().sum().backward()
    assert before.grad is None
    assert head.previous_weight == 0
    assert head.previous_weight.grad != 0


# ---------------------------------------------------------------------------------------------------- the papers' heads

TWO_LAYERS = {"vector": C * K + K + C + 1, "map": C * H * W * K + K + C * H * W + 1}  # on v of C, and of C H W numbers
CONV = 9 * C * C + 2 * C  # without bias; weight and bias of the batch norm
PARAMETERS = {
    "plain": TWO_LAYERS["map"],
    "pool": TWO_LAYERS["vector"],
    "bnpool": 2 * C + TWO_LAYERS["vector"],
    **{f"conv{n}": n * CONV + TWO_LAYERS["vector"] for n in (1, 2, 3, 7)},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_head_has_the_layers_of_the_papers(name):
    assert count(make_head(name, MAP, K)) == PARAMETERS[name]


def test_pool_and_plain_read_the_mean_and_the_whole_map():
    z = torch.randn(b, C, H, W)
    assert torch.equal(make_head("pool", MAP, K).features(z), z.mean((2, 3)))
    assert torch.equal(make_head("plain", MAP, K).features(z), z.flatten(1))


def test_bnpool_is_batch_norm_relu_and_the_mean():
    z = torch.randn(b, C, H, W)
    expected = (
        ((z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), correction=0, keepdim=True)).relu().mean((2, 3))
    )
    torch.testing.assert_close(make_head("bnpool", MAP, K).features(z), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["conv0", "conv", "conv100", "convX", "conv-1", "pol", "", "pol+"])
def test_a_head_that_does_not_exist_is_unknown(name):
    with pytest.raises(
        UnknownName, match=f"Unknown head '{re.escape(name)}'.*convN with a number, such as conv4"
    ) as error:
        make_head(name, MAP, K)
    assert not re.search(f"Did you mean.*'{name}'", str(error.value))


# ---------------------------------------------------------------------------------------------------- confidence


def rounded_to_bfloat16(x: Tensor) -> bool:
    return bool((x.bfloat16().to(x.dtype) == x).all())


@each_head
def test_under_autocast_the_confidence_is_float32_and_not_a_rounded_number(name):
    head = make_head(name, MAP, K).eval()
    with torch.autocast(here().type, torch.bfloat16):
        logits, confidence = head(torch.randn(b, C, H, W))
    assert (logits.dtype, confidence.dtype) == (torch.bfloat16, torch.float32)
    assert not rounded_to_bfloat16(confidence)


@pytest.mark.parametrize("strict", [False, True])
def test_the_confidence_of_a_head_that_was_captured_is_not_rounded_by_an_autocast_either(strict):
    head, z = make_head("pool", MAP, K).eval(), torch.randn(b, C, H, W)
    captured = torch.export.export(head, (z,), strict=strict).module()
    with torch.autocast(here().type, torch.bfloat16):
        _, confidence = captured(z)
    assert confidence.dtype == torch.float32
    assert not rounded_to_bfloat16(confidence)


@each_head
def test_a_head_in_bfloat16_still_computes_its_confidence_in_float32(name):
    head, z = make_head(name, MAP, K).eval().bfloat16(), torch.randn(b, C, H, W).bfloat16()
    _, confidence = head(z)
    v = head.features(z).double()  # v itself is rounded; the product with it is not
    exact = v @ head.confidence.weight.double()[0] + head.confidence.bias.double()
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_head_in_float64_keeps_its_precision():
    assert make_head("pool", MAP, K).double()(torch.randn(b, C, H, W).double())[1].dtype == torch.float64


def learned(said: HeadOutput) -> Tensor:
    """(b,) h of the head's own confidence layer."""
    return CONFIDENCES["learned"](0, said.logits, (), said.confidence_logit, 1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@each_head
def test_nobody_is_sure_of_an_answer_that_builds_on_a_poisoned_one(name, poison):
    head, z, before = make_head(f"{name}+", MAP, K).eval(), torch.randn(b, C, H, W), torch.zeros(b, K)
    before[1, 2] = poison
    said = head(z, [before])
    assert not said.logits[1].isfinite().any()
    assert learned(said).isnan().tolist() == [False, True, False, False]


def test_an_answer_may_rule_a_class_out():
    head = make_head("pool", MAP, K).eval()
    with torch.no_grad():
        head.logits.bias[0] = -torch.inf
    assert learned(HeadOutput(*head(torch.randn(b, C, H, W)))).isfinite().all()


# ---------------------------------------------------------------------------------------------------- the registry


def add_maxpool() -> None:
    @register_head("maxpool")
    class MaxPool(nn.Module):
        def __init__(self, channels: int, height: int, width: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(channels))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.amax((2, 3))


def test_a_registered_head_works_end_to_end(registry):
    add_maxpool()
    net = nn.Sequential(nn.Conv2d(3, C, 3), nn.ReLU(), nn.Conv2d(C, C, 3), nn.Flatten(), nn.Linear(16 * C, K))
    model = ptee.augment(net, exits=["0"], head="maxpool", input_size=(3, 8, 8))
    assert (model.plan.head, model.exits[0].parameters) == ("maxpool", C + TWO_LAYERS["vector"])
    x = torch.randn(b, 3, 8, 8)
    z = net[0](x).amax((2, 3))
    torch.testing.assert_close(model.predict(x, threshold=0).logits, model.heads[0].logits(z))


def test_the_same_factory_may_be_registered_again_as_when_a_notebook_cell_runs_twice(registry):
    for _ in range(2):
        add_maxpool()
    assert count(make_head("maxpool", MAP, K)) == C + TWO_LAYERS["vector"]


def test_a_name_of_ones_own_does_not_end_in_plus(registry):
    with pytest.raises(PteeError, match=r"'mine\+' ends in \+.*Register it as 'mine'"):
        register_head("mine+")(lambda channels, height, width: nn.Flatten())
    add_maxpool()
    assert make_head("maxpool+", MAP, K).previous_weight is not None


@pytest.mark.parametrize("name", [*HEADS, "conv12", "auto", "front", "res-8x1"])
def test_a_name_that_is_taken_is_refused(registry, name):
    before = dict(registry)
    with pytest.raises(PteeError, match=rf"'{name}' is taken.*another name"):
        register_head(name)(lambda channels, height, width: nn.Flatten())
    assert registry == before


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


BAD = {
    "a map": (nn.Identity(), r"gave \(2, 6, 4, 3\)"),
    "rows mixed": (nn.Flatten(0, 2), r"gave \(48, 3\)"),
    "one number": (nn.Flatten(0), r"gave \(144,\)"),
    "two tensors": (Two(), "gave tuple"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_head_that_gives_no_vector_for_each_row_is_refused(registry, what):
    features, said = BAD[what]
    register_head("bad")(lambda channels, height, width: features)
    with pytest.raises(PteeError, match=rf"'bad' must map \(b, c, h, w\) to one vector for each row.*{said}"):
        make_head("bad", MAP, K)


def in_place(channels: int, height: int, width: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def in_place_in_training(channels: int, height: int, width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Flatten()).insert(0, nn.Dropout(0.5, inplace=True))


@pytest.mark.parametrize("factory", [in_place, in_place_in_training], ids=lambda f: f.__name__)
def test_a_head_that_overwrites_the_backbones_feature_map_is_refused(registry, factory):
    register_head("hasty")(factory)
    with pytest.raises(PteeError, match=r"'hasty' overwrites the feature map.*inplace=False.*clone\(\)"):
        make_head("hasty", MAP, K)


def test_a_head_may_work_in_place_behind_a_copy(registry):
    class Copies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().relu_().mean((2, 3))

    register_head("tidy")(lambda channels, height, width: Copies())
    assert count(make_head("tidy", MAP, K)) == TWO_LAYERS["vector"]


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)).flatten(1)


class Squeezed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).squeeze()


MIXING = {
    "batch norm without statistics": nn.Sequential(
        nn.BatchNorm2d(C, track_running_stats=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ),
    "batch mean": Centred(),
}


@pytest.mark.parametrize("what", MIXING)
def test_a_head_whose_rows_influence_one_another_is_refused(registry, what):
    register_head("mixing")(lambda channels, height, width: MIXING[what])
    with pytest.raises(PteeError, match="'mixing' answers a row differently when it is alone"):
        make_head("mixing", MAP, K)


def test_a_head_that_gives_no_row_for_one_row_alone_is_refused(registry):
    register_head("squeezed")(lambda channels, height, width: Squeezed())
    with pytest.raises(PteeError, match=r"'squeezed' must map.*gave \(6,\)"):
        make_head("squeezed", MAP, K)


def test_trying_a_head_draws_no_random_numbers(registry):
    register_head("drawing")(lambda channels, height, width: nn.Sequential(nn.Dropout(0.5), nn.Flatten()))
    first = []
    for name in ("drawing", "plain"):
        torch.manual_seed(1)
        first.append(make_head(name, MAP, K).logits.weight)
    assert torch.equal(*first)


@each_head
def test_heads_are_made_alike_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        assert count(make_head(name, MAP, K)) == PARAMETERS[name]
