"""Buffers that change in eval mode: they are as they were afterwards, and no answer may depend on them."""

from __future__ import annotations

import copy
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from device import seeded
from tiny import as_it_was
from torch import Tensor, nn

import ptee
from ptee._common.errors import BackboneError, DataError, PteeError, RunError
from ptee.backbones.load import load_backbone
from ptee.backbones.weights import answering_hash, weights_hash
from ptee.data.parts import Manifest
from ptee.evaluation.comparison import _of_one_backbone
from ptee.scale import trace
from ptee.training import feature_cache
from ptee.tuning.trace_folder import TraceFolder

SIZE = (3, 16, 16)


class Blocks(nn.Module):
    """A classifier with two blocks; `note` gets their vectors and returns what the last layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 8, 3, 2, 1), nn.ReLU()) for c in (3, 8)))
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, 4)
        self.register_buffer("kept", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def note(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.note(self.rest(self.blocks(x)).mean((2, 3))))


class Rolling(Blocks):
    """Subtracts a running mean, which every batch changes a little."""

    momentum = 1e-5

    def note(self, x: Tensor) -> Tensor:
        self.kept = (1 - self.momentum) * self.kept + self.momentum * x.mean(0)
        return x - self.kept


class RollingInPlace(Rolling):
    def note(self, x: Tensor) -> Tensor:
        self.kept.data.lerp_(x.mean(0), self.momentum)
        return x - self.kept


class RollingFast(Rolling):
    momentum = 0.5


class AlwaysTraining(Blocks):
    """Its batch norm stays in training mode, whatever is asked for."""

    def train(self, mode: bool = True) -> AlwaysTraining:
        super().train(mode)
        self.rest[1].train()
        return self


class Output(Blocks):
    """Answers in memory that it has once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("answer", torch.zeros(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.answer[: len(x)] = super().forward(x)
        return self.answer[: len(x)]


@pytest.mark.parametrize("network", [Rolling, RollingInPlace])
def test_a_network_whose_answers_depend_on_a_slowly_changing_buffer_is_refused_by_its_name(network):
    with pytest.raises(BackboneError, match=r"changes its buffer kept .*they would drift.*self\.training"):
        ptee.augment(network(), input_size=SIZE, num_exits=1)


def test_a_front_network_whose_answers_depend_on_such_a_buffer_is_refused_too():
    front = Rolling()
    before = as_it_was(front)
    with pytest.raises(PteeError, match="changes its buffer kept"):
        ptee.augment(Blocks(), input_size=SIZE, num_exits=2, front=front)
    assert as_it_was(front) == before


@pytest.mark.parametrize("network", [Rolling, RollingInPlace, RollingFast, AlwaysTraining, Output])
@pytest.mark.parametrize("training", [False, True])
def test_a_refused_network_keeps_its_buffers(network, training):
    net = network().train(training)
    before = as_it_was(net)
    for request in (ptee.augment, ptee.plan):
        with pytest.raises(BackboneError):
            request(net, input_size=SIZE, num_exits=1)
        assert as_it_was(net) == before


class Counting(Blocks):
    """Counts its calls, and keeps a mean that it never reads for an answer."""

    def note(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept = 0.9 * self.kept + 0.1 * x.mean(0)
        return x


@pytest.mark.parametrize("request_", [load_backbone, ptee.plan, ptee.augment])
def test_counts_and_means_that_no_answer_depends_on_do_no_harm_and_are_as_they_were(request_):
    net = Counting().eval()
    with torch.no_grad():
        net(torch.ones(2, *SIZE))
    before = {name: b.clone() for name, b in net.named_buffers()}
    request_(net, input_size=SIZE)
    assert int(net.calls) == 1
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())


def counted(net: Blocks, passes: int) -> Blocks:
    with torch.no_grad():
        for _ in range(passes):
            net.eval()(torch.ones(2, *SIZE))
    return net


def test_a_saved_run_loads_whatever_its_backbone_has_counted_meanwhile(tmp_path):
    net = counted(Counting(), 1)
    model = ptee.augment(net, input_size=SIZE, num_exits=1)
    model.save_pretrained(tmp_path)
    model.detach()
    calls = int(counted(net, 3).train().calls)
    assert ptee.load(tmp_path, net).exits
    assert int(net.calls) == calls
    assert net.training


@pytest.mark.parametrize(
    "known_by", [trace.describe, feature_cache.what_heads_read], ids=["traces", "cached inputs of heads"]
)
def test_what_was_recorded_stays_of_a_backbone_that_counts(known_by):
    net = Counting().eval()
    model = ptee.augment(net, input_size=SIZE, num_exits=1)
    before = known_by(model)
    calls = int(counted(net, 3).calls)
    assert known_by(model) == before
    assert int(net.calls) == calls
    with torch.no_grad():
        next(net.parameters()).add_(1)
    assert known_by(model) != before


def test_what_was_recorded_by_all_buffers_stays_of_a_backbone_with_the_same(monkeypatch):
    monkeypatch.setattr(TraceFolder, "images_sha256", "")
    model = ptee.augment(Counting().eval(), input_size=SIZE, num_exits=1)
    old = {"backbone": weights_hash(model.backbone)[:16]}
    about = {"kind": "traces", "ptee_version": "0.2", "planned": 1, "parts": []}
    traces = TraceFolder((Path("old"),), (Manifest(about=trace.describe(model) | old, **about),))
    cache = feature_cache.CacheFolder(Path("old"), Manifest(about=feature_cache.what_heads_read(model) | old, **about))
    assert traces._folder_of(model) == 0
    cache.require(model)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    with pytest.raises(DataError, match=r"another backbone, not of this run\. Record this run: ptee trace RUN"):
        traces._folder_of(model)
    with pytest.raises(DataError, match=r"a cache of another backbone .*ptee cache RUN"):
        cache.require(model)


def test_models_whose_backbones_have_counted_differently_are_of_one_backbone():
    net = Counting().eval()
    models = {name: ptee.augment(copy.deepcopy(net), input_size=SIZE, num_exits=1) for name in ("one", "two")}
    counted(models["two"].backbone, 3)
    assert _of_one_backbone(models) is models["one"]
    late = {name: ptee.augment(Late().eval(), input_size=SIZE, num_exits=1) for name in ("one", "two")}
    late["two"].backbone.load_state_dict(late["one"].backbone.state_dict())
    counted(late["two"].backbone, 3)
    with pytest.raises(PteeError, match="two has another backbone"):
        _of_one_backbone(late)


def test_a_network_of_ordinary_batch_norms_is_not_run_for_its_hash(monkeypatch):
    monkeypatch.setattr("ptee.backbones.weights.counting_buffers", None)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert answering_hash(net, SIZE) == weights_hash(net)


class Late(Counting):
    """Answers otherwise from the tenth call on."""

    def note(self, x: Tensor) -> Tensor:
        return -super().note(x) if self.calls >= 10 else super().note(x)


class Cycling(Counting):
    """Answers otherwise at each third call that it notes."""

    def note(self, x: Tensor) -> Tensor:
        return super().note(x) + 1e-30 * (self.calls % 3)


@pytest.mark.parametrize("network", [Late, Cycling])
def test_a_count_on_which_answers_depend_is_part_of_the_weights(network, tmp_path):
    net = network()
    model = ptee.augment(net, input_size=SIZE, num_exits=1)
    model.save_pretrained(tmp_path)
    model.detach()
    with pytest.raises(RunError, match=r"tensors that differ \(1 of \d+\): calls\. Give the backbone"):
        ptee.load(tmp_path, counted(net, 1))


def test_buffers_that_change_and_matter_are_named_beside_those_that_do_not(tmp_path):
    net = counted(Counting(), 1)
    model = ptee.augment(net, input_size=SIZE, num_exits=1)
    model.save_pretrained(tmp_path)
    model.detach()
    net.rest[1].running_mean.add_(1)
    with pytest.raises(RunError, match=r"tensors that differ \(1 of \d+\): rest\.1\.running_mean\."):
        ptee.load(tmp_path, counted(net, 1))


class Filled(Blocks):
    """Fills a buffer at its first call, and remembers outside of it that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False

    def note(self, x: Tensor) -> Tensor:
        if not self.full:
            self.kept.fill_(3.0)
            self.full = True
        return x * self.kept


def test_what_is_filled_once_stays_filled():
    net = Filled()
    model = ptee.augment(net, input_size=SIZE, num_exits=1)
    x = torch.randn(4, *SIZE)
    with torch.no_grad():
        answers = model.predict(x, 2.0).logits
        net.full = False
        assert torch.equal(net.eval()(x), answers)


class Positions(Blocks):
    """Fits its positions to the size of the images, and forgets those of the size before."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        positions = torch.randn(1, 3, 16, 16, generator=seeded())
        if kind == "buffer":
            self.register_buffer("positions", positions)
        else:
            self.positions = positions if kind == "attribute" else nn.Parameter(positions)

    def forward(self, x: Tensor) -> Tensor:
        if self.positions.shape[2:] != x.shape[2:]:
            self._fit(nn.functional.interpolate(self.positions.detach(), x.shape[2:]))
        return super().forward(x + self.positions)

    def _fit(self, positions: Tensor) -> None:
        if self.kind == "data of a parameter":
            self.positions.data = positions
        else:
            self.positions = nn.Parameter(positions) if self.kind == "parameter" else positions


class Nested(Blocks):
    """Keeps one fitted thing in a part that is no module, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = {"cache": {"side": 16, "scale": torch.ones(3, 1, 1)}}

    def forward(self, x: Tensor) -> Tensor:
        if (cache := self.kind["cache"])["side"] != x.shape[-1]:
            cache["side"] = x.shape[-1]
            cache["scale"].fill_(0.5 if cache["side"] < 16 else 0.7)
        return super().forward(x * cache["scale"])


class WrittenInto(Blocks):
    """Writes into a parameter of its own if the images are small."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 16:
            self.scale.data.fill_(0.5)
        return super().forward(x * self.scale)


KINDS = ["buffer", "parameter", "data of a parameter", "attribute"]


@pytest.mark.parametrize("request_", [ptee.plan, ptee.augment])
@pytest.mark.parametrize("network", [*(partial(Positions, kind) for kind in KINDS), Nested, WrittenInto])
def test_whatever_is_fitted_to_smaller_images_is_as_it_was(network, request_):
    net, x = network().eval(), torch.randn(4, *SIZE)
    with torch.no_grad():
        before = net(x)
        request_(net, input_size=SIZE, num_exits=1)
        assert torch.equal(net(x), before)


def test_a_network_that_cannot_be_copied_is_not_tried_on_smaller_images():
    net, x = Positions("parameter").eval(), torch.randn(4, *SIZE)
    net.lock = threading.Lock()
    with torch.no_grad():
        before = net(x)
        assert torch.equal(ptee.augment(net, input_size=SIZE, num_exits=1).predict(x, 2.0).logits, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_buffer_does_no_harm():
    net = Blocks()
    net.register_buffer("ragged", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    assert ptee.augment(net, input_size=SIZE, num_exits=1).exits


def test_a_buffer_of_nan_is_no_changing_buffer():
    net = Blocks()
    net.register_buffer("unset", torch.full((3,), torch.nan))
    assert ptee.augment(net, input_size=SIZE, num_exits=1).exits
