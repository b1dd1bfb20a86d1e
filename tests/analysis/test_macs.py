"""Costs: the counts agree with torch's own counter and with arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import prod

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import zoo
from cases import slow
from device import here
from torch import Tensor, nn

from ptee._common.errors import BackboneError
from ptee.analysis.macs import count

NETS = {  # and the edge of their images
    "resnet50": (lambda: timm.create_model("resnet50", num_classes=10), 64),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4), 64),
    "densenet121": (lambda: timm.create_model("densenet121", num_classes=10), 64),
    "swin_tiny": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4), 64),
    "torchvision vit_b_16": (lambda: torchvision.models.vit_b_16(image_size=32), 32),
}


@pytest.mark.parametrize(
    "name", ["resnet50", "swin_tiny", *map(slow, ("vit_tiny", "densenet121", "torchvision vit_b_16"))]
)
def test_convolutions_and_products_until_every_module_agree_with_torchs_counter(name):
    make, edge = NETS[name]
    module, image = make().eval(), torch.randn(1, 3, edge, edge)
    counts, executed = count(module, image, products_only=True), zoo.executed_macs(module, image)
    assert counts.total == counts.until[""] == pytest.approx(executed[""], rel=0.01)
    for part, macs in counts.until.items():
        assert macs == pytest.approx(executed[part], rel=0.01), f"until the output of {part!r}"


def test_a_stage_costs_what_runs_between_the_outputs_of_two_stages():
    counts = count(timm.create_model("resnet18"), torch.randn(1, 3, 64, 64))
    assert counts.inside["layer2"] == counts.until["layer2"] - counts.until["layer1"]
    assert counts.inside["layer2"] == counts.inside["layer2.0"] + counts.inside["layer2.1"]


def test_fused_attention_costs_the_same_as_its_matrix_products():
    make, edge = NETS["vit_tiny"]
    module, image = make(), torch.randn(1, 3, edge, edge)
    fused = count(module, image)
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    unfused = count(module, image)
    assert all(unfused.until[name] == fused.until[name] for name in ("", "blocks.0.attn", "blocks.0", "blocks.3"))


# ---------------------------------------------------------------------------------------------------- by arithmetic


class Attention(nn.Module):
    """Queries of 7 positions and 4 channels, on keys of 5 positions and values of 6 channels, in 3 heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x[:, :, :7, :4], x[:, :, :5, :4], x[:, :, :5]
        return F.scaled_dot_product_attention(q, k, v)


def test_scaled_dot_product_attention_costs_its_two_matrix_products():
    counts = count(Attention(), torch.randn(1, 3, 8, 6))
    assert counts.total == 3 * (7 * 4 * 5 + 7 * 5 * 6)  # q k^T, and its product with v
    assert counts.products[""] == 1


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, num_heads=2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_costs_its_projections_and_its_two_matrix_products(need_weights):
    n, c = 5, 8
    counts = count(SelfAttention(need_weights), torch.randn(1, n, c))
    assert counts.total == counts.until["attention"] == 4 * n * c * c + 2 * n * n * c


def test_a_transformer_layer_that_is_fused_in_eval_mode_is_counted_inside():
    n, c, hidden = 5, 8, 16
    layer = nn.TransformerEncoderLayer(c, 2, hidden, batch_first=True)
    counts = count(layer, torch.randn(1, n, c))
    attention, mlp, norm = 4 * n * c * c + 2 * n * n * c, 2 * n * c * hidden, 5 * n * c
    assert counts.total == attention + mlp + 2 * norm
    assert counts.until["norm1"] == attention + norm
    assert counts.inside["linear1"] == mlp / 2


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 8, 8), 9 * 3 * 8 * 4 * 4),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (8, 4, 4), 9 * 8 * 4 * 4),
        (nn.Linear(6, 5), (7, 6), 7 * 6 * 5),
        (nn.Conv2d(4, 8, 3, padding="same", groups=2), (4, 5, 5), 9 * 2 * 8 * 5 * 5),
        (nn.LayerNorm(6), (7, 6), 5 * 7 * 6),  # fvcore's number
        (nn.BatchNorm2d(3).train(), (3, 8, 8), 3 * 8 * 8),  # counted in eval mode
        (nn.ReLU(), (3, 8, 8), 0),
        (nn.MaxPool2d(2), (3, 8, 8), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_costs_one_multiply_accumulate_per_multiplication(layer, shape, macs):
    assert count(layer, torch.randn(1, *shape)).total == macs


class Call(nn.Module):
    """A network that calls one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


PRODUCTS = {  # of x (3, 5, 7)
    "a batch of products and an addition": (lambda x: torch.baddbmm(x[:, :1, :5], x, x.mT), 3 * 5 * 7 * 5),
    "their sum and an addition": (lambda x: torch.addbmm(x[0, :1, :5], x, x.mT), 3 * 5 * 7 * 5),
    "one matrix for all": (lambda x: x @ x[0].T, 3 * 5 * 7 * 5),
    "one matrix in front of all": (lambda x: x[0] @ x.mT, 3 * 5 * 7 * 5),
    "one set of queries for all heads": (lambda x: x[:1, None] @ x[None].mT, 3 * 5 * 7 * 5),
    "tokens by a vector": (lambda x: x @ x[0, 0], 3 * 5 * 7),
    "a vector by matrices": (lambda x: x[0, 0] @ x.mT, 3 * 7 * 5),
    "two vectors": (lambda x: x[0, 0] @ x[1, 1], 7),
    "their dot product": (lambda x: torch.dot(x[0, 0], x[1, 1]), 7),
    "a matrix by a vector": (lambda x: torch.mv(x[0], x[1, 1]), 5 * 7),
    "a matrix by a vector and an addition": (lambda x: torch.addmv(x[0, :, 0], x[0], x[1, 1]), 5 * 7),
    "a linear layer to one number": (lambda x: F.linear(x, x[0, 0]), 3 * 5 * 7),
    "a product added in place": (lambda x: torch.zeros_like(x[:, :, :5]).baddbmm_(x, x.mT), 3 * 5 * 7 * 5),
    "one set of queries for all rows": (lambda x: F.scaled_dot_product_attention(x[:1, :2], x, x), 3 * 2 * 5 * (7 + 7)),
    "inner products": (lambda x: torch.inner(x, x[0]), 3 * 5 * 7 * 5),
    "a sum over two axes": (lambda x: torch.tensordot(x, x[0], dims=([1, 2], [0, 1])), 3 * 5 * 7),
    "a convolution over time": (
        lambda x: torch.conv_tbc(x, x.new_zeros(3, 7, 2), x.new_zeros(2), 1),
        3 * 5 * 2 * 3 * 7,
    ),
}


@pytest.mark.parametrize(("function", "macs"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_costs_each_number_of_its_output_times_what_is_summed_for_it(function, macs):
    counts = count(Call(function), torch.randn(3, 5, 7))
    assert (counts.total, counts.products[""]) == (macs, 1)


@pytest.fixture
def recurrent() -> None:
    if here().type not in ("cpu", "cuda"):
        pytest.skip("torch has no recurrent layers for the stand-in device")


RECURRENT = {
    "lstm": (nn.LSTM(7, 4, batch_first=True), 4 * 4 * (7 + 4)),
    "in two layers and both directions": (
        nn.LSTM(7, 4, num_layers=2, bidirectional=True),
        2 * 4 * 4 * (7 + 4) + 2 * 4 * 4 * (8 + 4),
    ),
    "with projections": (nn.LSTM(7, 4, proj_size=2), 4 * 4 * (7 + 2) + 4 * 2),
    "gru": (nn.GRU(7, 4), 3 * 4 * (7 + 4)),
    "rnn": (nn.RNN(7, 4), 4 * (7 + 4)),
    "rnn of relu": (nn.RNN(7, 4, nonlinearity="relu"), 4 * (7 + 4)),
}


@pytest.mark.parametrize(("layer", "each"), RECURRENT.values(), ids=RECURRENT)
@pytest.mark.usefixtures("recurrent")
def test_a_recurrent_layer_costs_its_matrices_at_each_step(layer, each):
    assert count(layer, torch.randn(3, 5, 7)).total == 3 * 5 * each


@pytest.mark.parametrize(
    ("cell", "each"),
    [(nn.LSTMCell(7, 4), 4 * 4 * (7 + 4)), (nn.GRUCell(7, 4), 3 * 4 * (7 + 4)), (nn.RNNCell(7, 4), 4 * (7 + 4))],
    ids=["lstm", "gru", "rnn"],
)
@pytest.mark.usefixtures("recurrent")
def test_a_recurrent_cell_costs_its_matrices_once(cell, each):
    assert count(cell, torch.randn(3, 7)).total == 3 * each


@torch.jit.script
def unseen(x: Tensor) -> Tensor:
    """Two products of which a trace tells nothing."""
    return x @ x.mT @ x


@torch.jit.script
def doubled(x: Tensor) -> Tensor:
    return x + x


class Before(nn.Module):
    """A layer, and then products that cannot be looked into."""

    def __init__(self, layer: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.then = layer, then

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return self.then(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize(
    "then", [unseen, lambda x: torch.linalg.multi_dot([x[0], x[0].T, x[0]])], ids=["a script", "multi_dot"]
)
@pytest.mark.parametrize("layer", [nn.Identity(), nn.LSTM(7, 7), nn.GRU(7, 7)], ids=["nothing", "lstm", "gru"])
@pytest.mark.usefixtures("recurrent")
def test_products_that_cannot_be_looked_into_are_refused_whatever_else_torch_does_not_count(layer, then):
    with pytest.raises(BackboneError, match="cannot be counted"):
        count(Before(layer, then), torch.randn(3, 5, 7))


@pytest.mark.parametrize("layer", [nn.LSTM(7, 7), nn.GRUCell(7, 7)], ids=["lstm", "a cell"])
@pytest.mark.usefixtures("recurrent")
def test_a_recurrent_layer_beside_code_without_products_is_counted(layer):
    x = torch.randn(3, 5, 7) if isinstance(layer, nn.LSTM) else torch.randn(3, 7)
    assert count(Before(layer, doubled), x).total == count(layer, x).total


@pytest.mark.parametrize("backend", [torch.backends.cudnn, torch.backends.mkldnn], ids=["cudnn", "mkldnn"])
def test_code_that_is_not_traced_is_looked_into_whatever_is_said_of_tf32(backend):
    before = backend.conv.fp32_precision
    other = backend.conv.fp32_precision = "tf32" if before == "ieee" else "ieee"
    try:
        assert count(Before(nn.Linear(7, 2), doubled), torch.randn(3, 7)).total == 3 * 7 * 2
        assert (backend.enabled, backend.conv.fp32_precision) == (True, other)
    finally:
        backend.conv.fp32_precision = before


SIX, SEVEN = (1, 4, 2, 2, 2, 7), (1, 4, 2, 2, 2, 2, 7)


@pytest.mark.parametrize(
    ("norm", "shape", "each"),
    [
        *((nn.LayerNorm(7), shape, 5) for shape in ((1, 7), SIX, SEVEN)),
        (nn.LayerNorm(7, elementwise_affine=False), SIX, 4),
        *((nn.GroupNorm(2, 4), shape, 5) for shape in ((1, 4), SIX)),
        (nn.InstanceNorm2d(4), (1, 4, 2, 2), 4),
        (nn.InstanceNorm2d(4, affine=True), (1, 4, 2, 2), 5),
    ],
    ids=str,
)
def test_a_norm_costs_the_same_for_each_number_in_any_number_of_axes(norm, shape, each):
    assert count(norm, torch.randn(shape)).total == each * prod(shape)


def test_a_device_without_room_is_no_network_that_cannot_be_counted():
    def full(x: Tensor) -> Tensor:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB).")

    with pytest.raises(RuntimeError, match=r"^MPS backend out of memory"):
        count(Before(nn.Linear(7, 2), full), torch.randn(3, 7))


class Square(nn.Bilinear):
    """x A x."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x)


def test_a_bilinear_layer_costs_its_weight_for_each_position():
    assert count(Square(7, 7, 2), torch.randn(3, 5, 7)).total == 3 * 5 * 7 * 7 * 2


def test_products_that_one_operator_hides_are_refused_by_its_name():
    chained = Call(lambda x: torch.linalg.multi_dot([x[0], x[0].T, x[0]]))
    with pytest.raises(BackboneError, match=r"linalg_multi_dot.*two matrices at a time"):
        count(chained, torch.randn(3, 5, 7))


class Awkward(nn.Module):
    """A layer under two names, a ReLU that runs twice, an identity, a function, a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.alias = self.shared
        self.relu, self.identity, self.negate = nn.ReLU(), nn.Identity(), Negate()
        self.last, self.unused = nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.negate(self.relu(self.shared(x)))
        return self.last(self.identity(self.relu(self.alias(x))))


class Negate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x


class RepeatedForEachWindow(nn.Module):
    """One query for each image, to all of its windows, as in GCViT: a number that a trace of a GPU has on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        windows, q = x.flatten(0, 1), self.query(x.mean(1))
        by_keyword = q.repeat_interleave(repeats=windows.shape[0] // q.shape[0], dim=0)
        return torch.repeat_interleave(q, windows.shape[0] // q.shape[0], dim=0) + by_keyword


def test_what_repeats_rows_is_counted_and_left_as_it_is():
    module, x = RepeatedForEachWindow(), torch.randn(1, 5, 4)
    counts = count(module, x)
    assert counts.total == 4 * 6
    assert module(x.expand(3, 5, 4)).shape == (15, 6)
    assert torch.equal(x.repeat_interleave(torch.tensor([2] * 5), 1), x.repeat_interleave(2, 1))


def test_a_module_that_runs_twice_is_counted_twice_and_up_to_its_last_output():
    counts = count(Awkward(), torch.randn(1, 4))
    assert (counts.inside["shared"], counts.until["shared"], counts.products["shared"]) == (32, 32, 2)
    assert (counts.inside["relu"], counts.until["relu"], counts.products_until["relu"]) == (0, 32, 2)
    assert counts.total == 16 + 16 + 8


def test_a_module_without_multiplications_has_the_cost_of_what_ran_before_it():
    counts = count(Awkward(), torch.randn(1, 4))
    assert (counts.until["negate"], counts.inside["negate"], counts.products["negate"]) == (16, 0, 0)


@pytest.mark.parametrize("name", ["unused", "identity", "alias"])
def test_a_module_that_runs_no_operator_is_absent(name):
    counts = count(Awkward(), torch.randn(1, 4))
    assert not any(name in table for table in (counts.until, counts.inside, counts.products_until, counts.products))


def test_a_network_without_any_layer_costs_nothing():
    counts = count(nn.Sequential(Negate(), nn.Identity()), torch.randn(1, 4))
    assert (counts.total, counts.until["0"], counts.products[""]) == (0, 0, 0)


# ---------------------------------------------------------------------------------------------------- left as it was


class Touchy(nn.Module):
    """Counts its calls in a buffer, has one part in eval mode and one in training mode, and may fail at the end."""

    def __init__(self, fails: bool, in_place: bool) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.fails, self.in_place = fails, in_place
        self.train()
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        x = self.drop(self.norm(x))
        if self.fails:
            raise ZeroDivisionError("on purpose")
        return x


def state(module: nn.Module) -> tuple[object, ...]:
    """What counting must leave as it was."""
    hooks = [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in module.modules()]
    buffers = {name: value.tolist() for name, value in module.named_buffers()}
    return [m.training for m in module.modules()], hooks, buffers, torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("fails", [False, True], ids=["forward succeeds", "forward raises"])
@pytest.mark.parametrize("in_place", [True, False], ids=["buffers written in place", "buffers replaced"])
@pytest.mark.parametrize("fused", [True, False])
def test_counting_leaves_modes_buffers_hooks_and_switches_as_they_were(fails, in_place, fused):
    module = Touchy(fails, in_place)
    module.norm.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    enabled = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fused)
        before = state(module)
        with pytest.raises(ZeroDivisionError, match="on purpose") if fails else nullcontext():
            count(module, torch.randn(1, 4))
        assert state(module) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def test_counting_twice_gives_the_same_counts():
    module, image = timm.create_model("resnet18"), torch.randn(1, 3, 32, 32)
    assert count(module, image) == count(module, image)


class Unregistered(nn.Module):
    """Keeps a layer in a plain list, where torch does not find it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.classifier = [nn.Conv2d(3, 8, 3)], nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers[0](x).mean((2, 3)))


def test_weights_that_are_no_parameters_are_refused_with_what_to_do():
    with pytest.raises(BackboneError, match=r"modules in a plain list\. Register them: nn\.ModuleList"):
        count(Unregistered().eval(), torch.randn(2, 3, 8, 8))
