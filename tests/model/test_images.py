"""Images that a model cannot take are refused in the same words wherever they are given; those it can take are taken."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import here, seeded
from small import SIZE, K, Normalises, OwnLoader, labelled, made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

import ptee
from ptee._common.errors import PteeError
from ptee.backbones.load import load_backbone
from ptee.model.images import require_device
from ptee.tuning.traces import record


def data_of(x: Tensor) -> TensorDataset:
    return TensorDataset(x, torch.arange(len(x)) % K)


FROM_TENSORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "predict": lambda model, x: model.predict(x),
    "forward": lambda model, x: model(x),
    "all_exits": lambda model, x: model.all_exits(x),
    "read": lambda model, x: model.read(x),
}
FROM_DATA: dict[str, Callable[[Any, Tensor], Any]] = {
    "train": lambda model, x: ptee.train(model, data_of(x), epochs=1, cache=False),
    "train on a cache": lambda model, x: ptee.train(model, data_of(x), epochs=1, cache=True),
    "train on views": lambda model, x: ptee.train(model, data_of(x), epochs=1, views=2),
    "validation": lambda model, x: ptee.train(model, data_of(labelled(8)[0]), data_of(x), epochs=1),
    "record": lambda model, x: record(model, data_of(x)),
    "a loader": lambda model, x: record(model, DataLoader(data_of(x), 4)),
    "evaluate": lambda model, x: ptee.evaluate(model, data_of(x), speed=False),
    "tune": lambda model, x: ptee.tune(model, data_of(x), max_cost=1.5),
    "calibrate": lambda model, x: ptee.calibrate(model, data_of(x)),
    "compare": lambda model, x: ptee.compare({"mine": model}, data_of(x), data_of(x)),
}
ANYWHERE = FROM_TENSORS | FROM_DATA
x = torch.rand(8, *SIZE, generator=seeded(0))
REFUSED = {
    "bytes": ((255 * x).byte(), r"These images are uint8, .*Give \(x\.float\(\) / 255 - mean\) / std"),
    "whole numbers": ((255 * x).long(), r"These images are int64, .*Give \(x\.float\(\) - mean\) / std"),
    "truth values": (x > 0.5, "These images are bool, and the model takes floating-point numbers"),
    "complex numbers": (x.to(torch.complex64), "These images are complex64, and the model takes floating-point numbers"),
    "channels last": (x.permute(0, 2, 3, 1), r"these are \(\d+, 8, 8, 3\), with the channels last. Give x.permute\(0, 3, 1, 2\)"),
    "grey": (x[:, :1], r"These images have 1 channel, and the model takes 3. Give x.expand\(-1, 3, -1, -1\)"),
    "with opacity": (torch.cat([x, x[:, :1]], 1), r"have 4 channels, and the model takes 3. Give x\[:, :3\]"),
    "five channels": (torch.rand(8, 5, 8, 8), "have 5 channels, and the model takes 3. Give images with 3"),
}  # fmt: skip


@pytest.mark.parametrize("where", ANYWHERE)
@pytest.mark.parametrize("images", REFUSED)
def test_images_of_another_kind_are_refused_in_one_line_everywhere(where, images):
    given, words = REFUSED[images]
    with pytest.raises(PteeError, match=words) as refusal:
        ANYWHERE[where](made(), given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("where", FROM_TENSORS)
@pytest.mark.parametrize(
    ("images", "model", "words"),
    [
        (x.double(), torch.float32, r"These images are float64, and the model is float32 .*Give x.to\(torch.float32\)"),
        (x, torch.float64, r"These images are float32, and the model is float64 .*Give x.to\(torch.float64\)"),
        (x, torch.bfloat16, r"These images are float32, and the model is bfloat16 .*Give x.to\(torch.bfloat16\)"),
        (x.half(), torch.float32, "These images are float16, and the model is float32"),
        (
            x[0],
            torch.float32,
            r"Images come as \(b, c, h, w\), and these are \(3, 8, 8\)\. For one image give x\[None\]",
        ),
    ],
    ids=["float64", "a double model", "a bfloat16 model", "float16", "one image"],
)
def test_tensors_of_another_type_or_shape_are_refused(where, images, model, words):
    with torch.no_grad(), pytest.raises(PteeError, match=words):
        FROM_TENSORS[where](made().to(model), images)


def test_tensors_on_another_device_are_refused():
    with pytest.raises(PteeError, match=r"These images are on cpu, and the model is on cuda:1. Give x.to\('cuda:1'\)"):
        require_device(x.cpu(), torch.device("cuda", 1))


def quantised(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x.cpu(), 0.1, 0, torch.quint8)


ODD = {
    "sparse": (lambda x: x.to_sparse(), r"sparse \(sparse_coo\). Give x.to_dense\(\)\."),
    "compressed": (lambda x: x.to_sparse_csr(dense_dim=1), r"sparse \(sparse_csr\). Give x.to_dense\(\)\."),
    "quantised": (quantised, r"quantised \(quint8\). Give x.dequantize\(\)\."),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested.*Give torch.stack of images of one size"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested.*Give torch.stack"),
    "meta": (lambda x: x.to("meta"), "on the meta device, without numbers"),
}
ODD_TAKERS = FROM_TENSORS | {
    "optimized": lambda model, x: optimized().predict(x),
    "optimized forward": lambda model, x: optimized()(x),
}


@functools.cache
def optimized() -> Any:
    return ptee.optimize(made().eval(), mode="eager")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("where", ODD_TAKERS)
@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_plain_tensor_is_refused_in_the_same_words_everywhere(kind, where):
    make, words = ODD[kind]
    with torch.no_grad(), pytest.raises(PteeError, match=f"Images come as a plain tensor .*{words}") as refusal:
        ODD_TAKERS[where](made().eval(), make(x.to(here())))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("take", [ptee.train, ptee.evaluate, ptee.tune], ids=lambda take: take.__name__)
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_data_set_of_such_tensors_is_refused_in_the_same_words(kind, take):
    make, words = ODD[kind]
    with pytest.raises(PteeError, match=f"Images come as a plain tensor .*{words}"):
        take(made(), data_of(make(x)), **({"max_cost": 1.5} if take is ptee.tune else {}))


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float64])
def test_data_sets_may_give_another_floating_point_type(given):
    model, data = made(), data_of(x.to(given))
    for go in (lambda: ptee.evaluate(model, data, speed=False), lambda: ptee.tune(model, data, max_cost=1.5)):
        go()
    model.off = []  # whatever tune found
    for cache in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a collapse
            assert ptee.train(model, data, epochs=1, cache=cache).epochs


READ = {
    "train": lambda model, data: ptee.train(model, data, epochs=1),
    "calibrate": lambda model, data: ptee.calibrate(model, data),
    "tune": lambda model, data: ptee.tune(model, data, max_cost=1.5),
    "evaluate": lambda model, data: ptee.evaluate(model, data, speed=False),
    "compare": lambda model, data: ptee.compare(
        {"mine": model}, data, data, static={"small": load_backbone(Normalises(), input_size=SIZE)}
    ),
}


@pytest.mark.parametrize("how", READ)
def test_the_images_of_a_loader_stay_as_they_are_though_the_network_writes_into_them(how):
    (x, y), model = labelled(16), ptee.augment(Normalises(), exits=["a"], input_size=SIZE, head="pool")
    before = x.clone()
    READ[how](model, OwnLoader(x, y, 8))
    assert torch.equal(x, before)


def test_a_half_model_is_evaluated_on_a_data_set_of_single_precision():
    model = made().bfloat16()
    traces = record(model, data_of(x))
    assert torch.equal(traces.answers, model.all_exits(x.bfloat16()).logits.argmax(-1).cpu())
    assert traces.sample.dtype == torch.bfloat16


def test_under_autocast_images_of_single_precision_are_taken():
    model = made()
    with torch.no_grad(), torch.autocast(here().type, torch.bfloat16):
        out = model.predict(x, 2.0)
        assert torch.equal(out.logits, model.backbone(x))
        assert model.predict(x.bfloat16(), 2.0).logits.dtype == torch.bfloat16
        with pytest.raises(PteeError, match="These images are float64"):
            model.predict(x.double())


class Casting(nn.Module):
    """A network in half precision whose own code takes images of any."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K)
        ).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.bfloat16())


def test_a_network_that_casts_its_images_itself_takes_them():
    model = ptee.augment(Casting(), exits=["net.0"], input_size=SIZE)
    assert torch.equal(model.predict(x).logits, model.predict(x.bfloat16()).logits)


class Mixed(nn.Module):
    """A network some of whose parts compute in another number type."""

    def __init__(self, *types: torch.dtype) -> None:
        super().__init__()
        layers = (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, K))
        self.layers = nn.ModuleList(layer.to(dtype) for layer, dtype in zip(layers, types, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        one, two, last = self.layers
        x = two(one(x.to(one.weight.dtype)).relu().to(two.weight.dtype)).relu()
        return last(x.mean((2, 3)).to(last.weight.dtype))


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("types", "widest"),
    [((HALF, HALF, SINGLE), SINGLE), ((SINGLE, HALF, HALF), SINGLE), ((HALF, SINGLE, DOUBLE), DOUBLE)],
    ids=str,
)
@pytest.mark.parametrize("head", ["conv1", "auto+"])
def test_a_network_of_several_number_types_gets_heads_of_the_widest(types, widest, head, tmp_path):
    net = Mixed(*types)
    model = ptee.augment(net, exits=["layers.0", "layers.1"], head=head, input_size=SIZE)
    assert {p.dtype for p in model.heads.parameters()} == {widest}
    data = TensorDataset(x.to(here()), torch.zeros(len(x), dtype=torch.long))
    ptee.train(model, data, epochs=1, batch_size=4, device=here())
    bare = net(x.to(here()))
    for leaving in ([0.0, 0.0], [[0.0, 2.0], [2.0, 0.0], [2.0, 2.0], [2.0, 2.0]] * 2, [2.0, 2.0]):
        assert model.predict(x.to(here()), torch.tensor(leaving)).logits.dtype == bare.dtype
    assert torch.equal(model.predict(x.to(here()), 2.0).logits, bare)
    assert record(model, data).answers.shape == (3, len(x))
    model.save_pretrained(tmp_path)
    again = ptee.load(tmp_path, net)
    assert torch.equal(again.predict(x.to(here()), 0.0).logits, model.predict(x.to(here()), 0.0).logits)


def test_an_empty_batch_is_looked_at_like_any_other():
    assert made().predict(x[:0]).logits.shape == (0, K)
    with pytest.raises(PteeError, match="uint8"):
        made().predict(x[:0].byte())


@pytest.mark.parametrize("images", [x.cpu().numpy(), [1], None], ids=["numpy", "a list", "None"])
def test_images_that_are_no_tensor_are_refused_by_type(images):
    with pytest.raises(PteeError, match=f"a tensor .b, c, h, w., not as {type(images).__name__}"):
        made()(images)


def test_pooled_heads_take_other_sizes():
    larger = torch.rand(4, 3, 12, 10)
    model = made("conv1")
    assert torch.equal(model.predict(larger, 2.0).logits, model.backbone(larger))
    assert model.all_exits(larger).logits.shape == (3, 4, K)


def test_a_size_that_the_backbone_cannot_take_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 6 * 6, K))
    model = ptee.augment(net, exits=["0"], input_size=SIZE)
    with pytest.raises(PteeError, match=r"cannot take images of size \(3, 12, 10\) .*planned for \(3, 8, 8\)"):
        model.predict(torch.rand(4, 3, 12, 10), 2.0)


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


def in_fake_mode(model, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.predict(x)


TRANSFORMED = {
    "torch.func.vmap": (lambda model, x: torch.func.vmap(model)(x[None]), r"torch\.func\.vmap.*whole batch"),
    "torch.func.grad": (lambda model, x: torch.func.grad(lambda x: model(x).sum())(x), r"torch\.func\.grad.*torch\.autograd\.grad"),
    "torch.func.grad of all exits": (
        lambda model, x: torch.func.grad(lambda x: model.all_exits(x).logits.sum())(x),
        r"torch\.func\.grad.*torch\.autograd\.grad",
    ),
    "fake images": (lambda model, x: model.predict(fake(x)), "FakeTensorMode.*no values"),
    "a FakeTensorMode": (in_fake_mode, "FakeTensorMode.*no values"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRANSFORMED)
def test_images_are_refused_in_one_line_by(case):
    call, said = TRANSFORMED[case]
    with pytest.raises(PteeError, match=said):
        call(made(), x.to(here()))


@pytest.fixture
def forward_derivatives():
    """At the first of them torch reads sources of its own; CPython 3.11 may fail there if garbage is collected meanwhile."""
    gc.disable()
    try:
        torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    finally:
        gc.enable()


@pytest.mark.usefixtures("forward_derivatives")
@pytest.mark.parametrize("head", ["pool", "res-8x1"])
def test_what_looks_at_no_values_runs_in_vmap_and_jvp(head):
    model, images = made(head), x.to(here())
    own = model.all_exits(images).logits
    together = torch.func.vmap(lambda part: model.all_exits(part).logits)(images.view(2, 4, *SIZE))
    torch.testing.assert_close(together.transpose(0, 1).flatten(1, 2), own)
    torch.testing.assert_close(torch.func.jvp(model, (images,), (images,))[0], model(images))
