from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import os
import pickle
import random
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from small import once
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ptee
from ptee._common.errors import DataError, DeviceError, PteeError, RunError, UnknownName
from ptee.backbones.load import load_backbone
from ptee.backbones.weights import weights_hash
from ptee.exits.front import FrontHead
from ptee.model.build import build
from ptee.training import step as steps
from ptee.training import trainer as training
from ptee.training.config import TARGETS
from ptee.training.losses import v1_loss
from ptee.training.optimizers import OPTIMIZERS
from ptee.training.trainer import Epoch, History, train

SIZE, K, N = (3, 16, 16), 4, 48
EXITS = ["one", "two"]


class Net(nn.Module):
    """A user's network with what training could disturb: batch norm and dropout."""

    def __init__(self, num_classes: int = K) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Conv2d(6, 8, 3, 2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.two(self.one(x)).mean((2, 3))))


@once
def made(head: str = "conv1", seed: int = 0) -> ptee.EarlyExitModel:
    """The same backbone each time; the heads begin as `seed` says."""
    return on(Net(), head, seed)


def on(net: nn.Module, head: str = "conv1", seed: int = 0) -> ptee.EarlyExitModel:
    torch.manual_seed(seed)
    model = ptee.augment(net, exits=EXITS, head=head, input_size=SIZE)
    with torch.no_grad():
        for p in model.heads.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@functools.cache
def images() -> Tensor:
    noise = torch.randn(N, *SIZE, generator=torch.Generator().manual_seed(5))
    return noise * torch.linspace(0.3, 3, N)[:, None, None, None]


def labels() -> Tensor:
    return torch.arange(N) % K


def data() -> TensorDataset:
    return TensorDataset(images(), labels())


def fit(model: ptee.EarlyExitModel, train_data: Any = None, *more: Any, **settings: Any) -> History:
    """A short training in float32, without the warning of a collapse."""
    settings = {"epochs": 3, "batch_size": 16, "lr": 1e-2, "precision": "no", "device": "cpu"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return train(model, data() if train_data is None else train_data, *more, **settings)


def heads(model: ptee.EarlyExitModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.heads.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


class Interrupted(Dataset):
    """The data, until somebody presses Ctrl-C after so many items."""

    def __init__(self, items: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = items, error

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return images()[index], labels()[index]


# what changes, and what does not


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("head", ["pool", "bnpool", "conv1"])
def test_the_heads_learn_and_not_a_byte_of_the_backbone_changes(targets, head):
    model = made(head)
    backbone, before = weights_hash(model.backbone), heads(model)
    history = fit(model, targets=targets)
    assert weights_hash(model.backbone) == backbone
    assert not any(torch.equal(value, before[name]) for name, value in heads(model).items() if value.dim())
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())
    assert history.epochs[-1].loss < history.epochs[0].loss


@pytest.mark.parametrize("head", ["pool", "conv1"])
@pytest.mark.parametrize("settings", [{}, {"targets": "soft", "temperature": 2.0}, {"reach": True}], ids=str)
def test_heads_that_learn_each_for_itself_come_nearer_to_their_targets_and_know_it(settings, head):
    model = made(head)
    history = fit(model, loss="each", epochs=40, **settings)
    assert history.epochs[-1].loss < history.epochs[0].loss
    with torch.no_grad():
        every = model.all_exits(images())
    best = every.logits[-1].argmax(-1) if settings.get("targets") else labels()
    right = (every.logits[:-1].argmax(-1) == best).double().mean(1)
    assert every.confidence[:-1].double().mean(1).tolist() == pytest.approx(right.tolist(), abs=0.25)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_eval_mode_afterwards(training):
    model = made().train(training)
    fit(model, epochs=1)
    assert not any(part.training for part in model.modules())


def test_the_model_stays_on_its_device_with_its_thresholds():
    model = made()
    model.threshold = [0.2, 0.8]
    fit(model, epochs=1)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.threshold == [0.2, 0.8]


def test_one_seed_gives_one_result_and_another_seed_another():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(random.randrange(1000))  # what was drawn before does not matter
        model = made()
        torch.manual_seed(random.randrange(1000))
        fit(model, seed=seed)
        runs.append(heads(model))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.fixture
def rates() -> Iterator[list[float]]:
    """The learning rate of each step that the optimiser takes."""
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    yield rates
    hook.remove()


@pytest.mark.parametrize(
    ("schedule", "want"), [("constant", [1.0] * 6), ("cosine", [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)])]
)
def test_the_learning_rate_follows_its_schedule_with_each_batch(schedule, want, rates):
    fit(made(), epochs=2, lr=0.01, schedule=schedule)  # three batches each
    assert rates == pytest.approx([0.01 * rate for rate in want])


def test_a_batch_that_is_too_small_counts_in_the_schedule(rates):
    some = TensorDataset(*(part[:17] for part in data().tensors))  # of which one row is left over for batch norm
    fit(made(head="conv1"), some, epochs=2, lr=0.01, schedule="cosine", batch_size=16)
    assert rates == pytest.approx([0.01, 0.005])  # the first and third of four places


def test_a_cosine_over_batches_without_number_is_refused():
    with pytest.raises(DataError, match=r"'cosine'.*'constant'"):
        fit(made(), DataLoader(Stream(), 16), schedule="cosine")


def test_the_callers_random_numbers_are_left_alone():
    model = made()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fit(model, DataLoader(data(), 16, shuffle=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_a_resting_backbone_gives_the_pseudo_labels():
    model = made()
    want = model.backbone(images()).argmax(1)
    pseudo, told = made(), made()
    fit(pseudo, TensorDataset(images()), targets="pseudo")
    fit(told, TensorDataset(images(), want), targets="labels")
    assert same(heads(pseudo), heads(told))


# what is reported


class OnMps(Tensor):
    """A tensor on a device without float64."""

    def double(self) -> Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_an_epoch_is_added_up_without_float64_on_the_device():
    sums = steps.Sums()
    counts = [torch.tensor(n).as_subclass(OnMps) for n in ([1, 2], [3, 4], [0, 4])]
    sums.add(steps.Found(torch.tensor(0.5).as_subclass(OnMps), *counts), rows=4)
    assert sums.tensor().tolist() == [4, 0, 2, 1, 2, 3, 4, 0, 4]


def test_each_epoch_tells_its_means_before_each_update():
    model = made()
    model.threshold = 0.5
    with torch.no_grad():
        every = copy.deepcopy(model).train().all_exits(images())  # one batch: judged before the only update
    epoch = fit(model, batch_size=N, epochs=1).epochs[0]
    answers = every.logits.argmax(-1)
    assert epoch.accuracy == pytest.approx((answers == labels()).double().mean(1).tolist())
    assert epoch.fidelity == pytest.approx((answers == answers[-1]).double().mean(1).tolist())
    first = torch.cat([every.confidence[:-1] >= 0.5, torch.ones(1, N, dtype=torch.bool)]).int().argmax(0)
    assert epoch.leaving == pytest.approx((torch.bincount(first, minlength=3) / N).tolist())
    assert sum(epoch.leaving) == pytest.approx(1)
    assert (epoch.number, epoch.val_loss) == (1, None)
    assert epoch.seconds > 0


def test_without_labels_there_is_no_accuracy():
    assert fit(made(), TensorDataset(images()), targets="soft").epochs[0].accuracy is None


def test_the_loss_on_other_data_is_taken_in_eval_mode_after_the_epoch():
    model = made("bnpool")
    history = fit(model, None, data(), epochs=2)
    with torch.no_grad():
        every = model.all_exits(images())
    want = v1_loss(every.logits, every.confidence_logits, torch.tensor(model.costs), labels()).item()
    assert history.epochs[-1].val_loss == pytest.approx(want, rel=1e-5)


def test_each_epoch_is_told_when_it_is_over():
    told: list[Epoch] = []
    history = fit(made(), on_epoch=told.append)
    assert told == history.epochs
    assert [epoch.number for epoch in told] == [1, 2, 3]
    assert json.loads(json.dumps(history.to_dict()))["epochs"][2]["number"] == 3


def test_a_history_prints_as_a_table_of_epochs():
    told = [
        Epoch(1, 1.5, [0.25, 0.5], [0.5, 1.0], [0.75, 0.25], None, 3.2),
        Epoch(2, 1.25, None, [1, 1], [0, 1], 2.0, 3),
    ]
    lines = str(History(told, stopped_early=True, warning="It collapsed.")).splitlines()
    assert lines[2].split() == ["1", "1.5000", "0.250", "0.500", "0.500", "1.000", "0.750", "0.250", "-", "3"]
    assert lines[3].split() == ["2", "1.2500", "-", "1.000", "1.000", "0.000", "1.000", "2.0000", "3"]
    assert lines[-3].endswith("All but the held-out loss are of the training images.")
    assert lines[-2:] == ["Stopped early.", "It collapsed."]


def test_the_line_of_an_epoch_does_not_pass_off_what_the_training_images_say_as_held_out():
    said = Epoch(1, 1.5, None, [0.5, 0.25, 1.0], [1, 0, 0], 2.0, 3).line(5)
    assert said == "epoch 1/5  loss 1.5000  fidelity in training 0.500 0.250  held-out loss 2.0000  3 s"


@pytest.mark.parametrize(("loss", "where"), [("cost", r"exit 0 \(one\)"), ("mc", "backbone's own output")])
def test_a_collapse_is_warned_of_with_the_place_where_all_leave(loss, where):
    net = Net()
    with torch.no_grad():
        net.fc.weight *= 300  # so sure of its answers that no exit is as good
    model = on(net, "pool")
    with pytest.warns(UserWarning, match=f"collapsed: .*{where}"):
        history = train(model, data(), targets="pseudo", loss=loss, epochs=6, batch_size=16, lr=0.1, precision="no")
    assert "collapsed" in history.warning


def test_no_collapse_is_seen_where_images_leave_in_several_places():
    model = made("pool")
    with torch.no_grad():
        model.threshold = model.all_exits(images()).confidence[:-1].median(1).values
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert train(model, data(), epochs=1, lr=1e-6, precision="no").warning is None


# data


class Own:
    """A loader that is not torch's."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(images().split(16), labels().split(16), strict=True))


class Stream(IterableDataset):
    def __init__(self, items: int = N) -> None:
        self.items = items

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(images(), labels(), strict=True))[: self.items])


IN_ORDER = {
    "a loader": lambda: DataLoader(data(), 16),
    "a loader of a stream": lambda: DataLoader(Stream(), 16),
    "a loader of mappings": lambda: DataLoader([{"image": i, "label": y} for i, y in data()], 16),
    "a loader with a sampler of batches": lambda: DataLoader(data(), batch_sampler=[*torch.arange(N).split(16)]),
    "a loader of one's own": Own,
}


@pytest.mark.parametrize("source", IN_ORDER)
def test_a_loaders_own_batches_and_order_are_used(source):
    got, want = made(), made()
    fit(got, IN_ORDER[source](), batch_size=5)
    fit(want, DataLoader(data(), 16))
    assert same(heads(got), heads(want))


SHUFFLED = {
    "a list of pairs": lambda: [(i, int(y)) for i, y in data()],
    "a list of mappings": lambda: [{"pixel_values": i, "labels": y} for i, y in data()],
    "another data set": lambda: Interrupted(10**6),
}


@pytest.mark.parametrize("source", SHUFFLED.values(), ids=SHUFFLED)
def test_every_kind_of_data_set_is_shuffled_alike(source):
    got, want, straight = made(), made(), made()
    fit(got, source())
    fit(want, data())
    fit(straight, DataLoader(data(), 16))
    assert same(heads(got), heads(want))
    assert not same(heads(want), heads(straight))


@pytest.mark.parametrize(
    "source", [lambda: [(i,) for i in images()], lambda: list(images())], ids=["(image,)", "image"]
)
@pytest.mark.parametrize("targets", ["pseudo", "soft"])
def test_images_without_labels_are_enough_for_the_backbones_own_answers(source, targets):
    got, want = made(), made()
    fit(got, source(), targets=targets)
    fit(want, TensorDataset(images()), targets=targets)
    assert same(heads(got), heads(want))


def test_labels_that_are_missing_are_asked_for_with_the_way_around():
    with pytest.raises(DataError, match="targets='pseudo'"):
        fit(made(), TensorDataset(images()))


def with_odd_labels(label: int) -> TensorDataset:
    return TensorDataset(images(), labels().where(labels() > 0, label))


@pytest.mark.parametrize("label", [K, -2, 1000])
def test_a_label_that_is_no_class_is_refused_as_a_target(label):
    with pytest.raises(DataError, match=f"{label}.*targets='pseudo'"):
        fit(made(), with_odd_labels(label))


@pytest.mark.parametrize("label", [K, -1, 1000])
@pytest.mark.parametrize("targets", ["pseudo", "soft"])
def test_labels_that_are_no_classes_are_none_where_the_backbones_answers_are_the_target(label, targets):
    got, want = made(), made()
    history = fit(got, with_odd_labels(label), with_odd_labels(label), targets=targets)
    fit(want, TensorDataset(images()), targets=targets)
    assert same(heads(got), heads(want))
    assert [epoch.accuracy for epoch in history.epochs] == [None] * 3


@pytest.mark.parametrize("head", ["bnpool", "conv1"])
def test_a_last_batch_of_one_row_is_left_out(head):
    got, want = made(head), made(head)
    history = fit(got, DataLoader(TensorDataset(images()[:33], labels()[:33]), 16))
    fit(want, DataLoader(TensorDataset(images()[:32], labels()[:32]), 16))
    assert same(heads(got), heads(want))
    assert all(math.isfinite(epoch.loss) for epoch in history.epochs)


EMPTY = {
    "a data set": lambda: TensorDataset(images()[:0], labels()[:0]),
    "a list": list,
    "a loader of a stream": lambda: DataLoader(Stream(0)),
}


@pytest.mark.parametrize("source", EMPTY.values(), ids=EMPTY)
def test_data_without_images_are_refused(source):
    with pytest.raises(DataError):
        fit(made(), source())


# what is refused


REFUSED = {
    "targets": ({"targets": "pseudos"}, UnknownName, "pseudos.*Did you mean 'pseudo'"),
    "a loss": ({"loss": "v3"}, UnknownName, "v3.*Did you mean 'v2'"),
    "a precision": ({"precision": "bf61"}, UnknownName, "bf61.*Did you mean 'bf16'"),
    "a device": ({"device": "cuda:99"}, DeviceError, "cuda:99"),
    "no epochs": ({"epochs": 0}, PteeError, "epochs 0"),
    "no batch": ({"batch_size": 0}, PteeError, "batch_size 0"),
    "no learning rate": ({"lr": 0.0}, PteeError, "lr 0"),
    "NaN for a learning rate": ({"lr": math.nan}, PteeError, "lr nan"),
    "no patience at all": ({"patience": 0}, PteeError, "patience 0"),
    "a negative weight decay": ({"weight_decay": -1.0}, PteeError, "weight_decay"),
    "a cost weight that is no number": ({"cost_weight": float("nan")}, PteeError, "cost_weight nan"),
    "an endless learning rate": ({"lr": float("inf")}, PteeError, "lr inf"),
    "a seed that no generator takes": ({"seed": 10**18}, PteeError, "seed 1000000000000000000"),
    "a negative seed": ({"seed": -1}, PteeError, "seed -1"),
    "half an epoch": ({"epochs": 1.5}, PteeError, "epochs 1.5.*whole number"),
    "epochs in words": ({"epochs": "3"}, PteeError, "epochs '3'.*whole number"),
    "half an image": ({"batch_size": 2.5}, PteeError, "batch_size 2.5.*whole number"),
    "half a seed": ({"seed": 1.5}, PteeError, "seed 1.5.*whole number"),
    "half a patience": ({"patience": 1.5}, PteeError, "patience 1.5.*whole number"),
    "true for a number": ({"epochs": True}, PteeError, "epochs True.*whole number"),
    "a learning rate in words": ({"lr": "0.1"}, PteeError, "lr '0.1'.*number"),
    "no view": ({"augment": 0}, PteeError, "augment 0"),
    "an optimiser": ({"optimizer": "muonn"}, UnknownName, "muonn.*Did you mean 'muon'"),
    "a schedule": ({"schedule": "cosin"}, UnknownName, "cosin.*Did you mean 'cosine'"),
    "no temperature": ({"loss": "each", "targets": "soft", "temperature": 0.0}, PteeError, "temperature 0.0"),
    "a temperature for exits that learn together": (
        {"targets": "soft", "temperature": 2},
        PteeError,
        "temperature 2.*'each'.*'v1'",
    ),
    "a temperature for labels": ({"loss": "each", "temperature": 2}, PteeError, "temperature 2.*'soft'.*'labels'"),
    "weights for exits that learn together": ({"reach": True}, PteeError, "reach True.*'each'.*'v1'"),
    "a mixture for exits that learn together": ({"mixup": 0.2}, PteeError, "mixup 0.2.*'each'.*'v1'"),
    "a negative shift": ({"shift": -1}, PteeError, "shift -1"),
    "half a pixel": ({"shift": 0.5}, PteeError, "shift 0.5.*whole number"),
    "weights in words": ({"loss": "each", "reach": "yes"}, PteeError, "reach 'yes'.*True or False"),
    "no weight decay at all": ({"weight_decay": None}, PteeError, "weight_decay None.*number"),
}


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [pytest.param(*case, id=name) for name, case in REFUSED.items()],
)
def test_a_setting_that_cannot_be_is_refused_by_name_and_changes_nothing(settings, error, said):
    model = made()
    before = heads(model)
    with pytest.raises(error, match=said) as refusal:
        fit(model, **settings)
    assert isinstance(refusal.value, PteeError)
    assert same(heads(model), before)


def test_numbers_of_numpy_are_numbers(tmp_path):
    got, want = made(), made()
    settings = {"epochs": np.int64(2), "batch_size": np.int32(16), "seed": np.uint8(3), "lr": np.float32(0.5)}
    fit(got, checkpoint=tmp_path / "checkpoint.safetensors", **settings)
    fit(want, epochs=2, batch_size=16, seed=3, lr=0.5)
    assert same(heads(got), heads(want))


def test_a_loss_that_is_no_number_is_refused_with_a_lower_learning_rate():
    with pytest.raises(PteeError, match=r"nan.*1e\+29"):
        fit(made(), lr=1e30)


def test_after_a_loss_that_is_no_number_a_lower_learning_rate_helps():
    model = made()
    with pytest.raises(PteeError):
        fit(model, lr=1e30)
    fit(model, lr=1e-3)


def test_an_error_in_the_data_reaches_the_caller_and_keeps_the_last_complete_epoch():
    model, want = made(), made()
    with pytest.raises(ZeroDivisionError):
        fit(model, Interrupted(N + 20, ZeroDivisionError))
    fit(want, epochs=1)
    assert same(heads(model), heads(want))
    assert not model.training


def test_heads_in_half_precision_are_refused_with_the_way_around():
    with pytest.raises(PteeError, match=r"bfloat16.*model\.float\(\)"):
        fit(made().bfloat16())


def test_a_model_in_double_precision_learns_from_images_in_single_precision():
    model = made().double()
    history = fit(model)
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_training_switches_gradients_on(mode):
    model = made()
    with mode():
        fit(model, epochs=1)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_training_in_mixed_precision_lowers_the_loss_and_keeps_float32_heads(precision):
    model = made()
    history = fit(model, precision=precision)
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert {value.dtype for value in model.heads.parameters()} == {torch.float32}


def test_mixed_precision_is_really_used():
    rough, fine = made(), made()
    fit(rough, precision="bf16")
    fit(fine, precision="no")
    assert not same(heads(rough), heads(fine))


def test_settings_of_one_training_do_not_reach_into_the_next():
    first, second = made(), made()
    fit(first)
    fit(made(), precision="bf16")
    fit(second)
    assert same(heads(first), heads(second))


@pytest.fixture
def accelerator() -> Iterator[Callable[[], Any]]:
    """Makes an Accelerator for bfloat16, as a caller's own program may; accelerate allows one precision per process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield functools.partial(Accelerator, mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_an_accelerator_of_the_callers_keeps_its_precision(accelerator):
    mine = accelerator()
    fit(made(), epochs=1)
    assert mine.mixed_precision == "bf16"


def test_after_training_the_caller_can_make_an_accelerator(accelerator):
    fit(made(), epochs=1)
    assert accelerator().mixed_precision == "bf16"


# early stopping


def stubborn() -> TensorDataset:
    """Images on which training makes the loss rise sooner or later."""
    generator = torch.Generator().manual_seed(6)
    return TensorDataset(torch.randn(32, *SIZE, generator=generator), torch.randint(K, (32,), generator=generator))


def stopping(model: ptee.EarlyExitModel, train_data: Any = None, **settings: Any) -> History:
    return fit(model, train_data, stubborn(), **{"epochs": 30, "lr": 0.1, "patience": 3} | settings)


def test_training_stops_when_nothing_gets_better_and_goes_back_to_the_best():
    seen: list[dict[str, Tensor]] = []
    model = made()
    history = stopping(model, on_epoch=lambda _: seen.append(heads(model)))
    assert history.stopped_early
    assert len(history.epochs) < 30
    best = len(seen) - 1 - 3
    losses = [epoch.val_loss for epoch in history.epochs]
    assert min(losses[best + 1 :]) > losses[best] - training.MIN_DELTA
    assert same(heads(model), seen[best])


def test_without_patience_all_epochs_are_done_and_the_last_one_counts():
    seen: list[dict[str, Tensor]] = []
    model = made()
    history = stopping(model, epochs=12, patience=None, on_epoch=lambda _: seen.append(heads(model)))
    assert len(history.epochs) == 12
    assert not history.stopped_early
    assert same(heads(model), seen[-1])


# Ctrl-C, and going on


@pytest.mark.parametrize("head", ["pool", "conv1"])
def test_ctrl_c_keeps_the_heads_of_the_last_complete_epoch(head):
    model, want = made(head), made(head)
    history = fit(model, Interrupted(N + 20))
    fit(want, epochs=1)
    assert history.interrupted
    assert len(history.epochs) == 1
    assert same(heads(model), heads(want))
    assert not model.training


@pytest.mark.parametrize(("place", "complete"), [("deepcopy", 1), ("_save", 2), ("on_epoch", 2)])
def test_ctrl_c_between_two_epochs_ends_it_as_within_one(place, complete, monkeypatch):
    model, want, calls, told = made(), made(), itertools.count(), {}
    fit(want, epochs=complete)

    def second_call(real):
        def call(*words, **more):
            if next(calls) == 1:
                raise KeyboardInterrupt
            return real(*words, **more)

        return call

    if place == "deepcopy":
        monkeypatch.setattr(training, "copy", SimpleNamespace(deepcopy=second_call(copy.deepcopy)))
    elif place == "_save":
        monkeypatch.setattr(training._Training, "_save", second_call(training._Training._save))
    else:
        told = {"on_epoch": second_call(lambda epoch: None)}
    try:
        history = fit(model, epochs=3, **told)
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("It escaped.")
    monkeypatch.undo()
    assert history.interrupted
    assert len(history.epochs) == complete
    assert same(heads(model), heads(want))


def test_ctrl_c_in_the_first_epoch_keeps_the_heads_as_they_came(tmp_path):
    model = made()
    before = heads(model)
    history = fit(model, Interrupted(20), checkpoint=tmp_path / "kept" / "checkpoint.safetensors")
    assert (history.interrupted, history.epochs) == (True, [])
    assert same(heads(model), before)
    assert not (tmp_path / "kept").exists()


def on_time(history: History) -> list[Epoch]:
    """The epochs without the time they took."""
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in history.epochs]


SETTINGS = {
    "as it is": {}, "loss": {"loss": "v2"}, "reach": {"loss": "each", "reach": True}, "schedule": {"schedule": "cosine"},
    "shift and mixup": {"loss": "each", "shift": 3, "mixup": 0.5}, "targets": {"targets": "soft"},
    "weight_decay": {"weight_decay": 0.1}, "precision": {"precision": "bf16"}, "seed": {"seed": 7}, "val_data": {"val_data": data()},
}  # fmt: skip


@functools.cache
def never_interrupted(name: str) -> tuple[dict[str, Tensor], History]:
    model = made()
    history = fit(model, **SETTINGS[name])
    return heads(model), history


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_training_ends_with_exactly_the_heads_of_one_that_was_never_interrupted(epoch, name, tmp_path):
    broken, resumed, settings = made(), made(seed=9), SETTINGS[name]
    whole, want = never_interrupted(name)
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert fit(broken, Interrupted(epoch * N + 20), checkpoint=checkpoint, **settings).interrupted
    history = fit(resumed, checkpoint=checkpoint, resume=True, **settings)
    assert same(heads(resumed), whole)
    assert on_time(history) == on_time(want)
    assert not history.interrupted


@pytest.mark.parametrize("when", ["before the best epoch", "after it"])
def test_a_resumed_training_stops_where_one_that_was_never_interrupted_stops(when, tmp_path):
    whole, resumed = made(), made(seed=9)
    want = stopping(whole)
    done = len(want.epochs) - (4 if when == "before the best epoch" else 2)
    checkpoint = tmp_path / "checkpoint.safetensors"
    stopping(made(), Interrupted(done * N + 20), checkpoint=checkpoint)
    history = stopping(resumed, checkpoint=checkpoint, resume=True)
    assert len(history.epochs) == len(want.epochs)
    assert same(heads(resumed), heads(whole))


@pytest.mark.parametrize("more", [0, 5], ids=["the same epochs", "more epochs"])
def test_a_training_that_stopped_early_is_over_when_it_is_resumed(more, tmp_path):
    whole, resumed, checkpoint = made(), made(seed=9), tmp_path / "checkpoint.safetensors"
    want = stopping(whole, checkpoint=checkpoint)
    history = stopping(resumed, epochs=len(want.epochs) + more, checkpoint=checkpoint, resume=True)
    assert history.epochs == want.epochs
    assert history.stopped_early
    assert same(heads(resumed), heads(whole))


def test_nothing_is_cached_for_a_training_that_is_over(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    stopping(made(), cache=True, checkpoint=checkpoint)
    filled: list[object] = []
    stopping(made(seed=9), cache=True, checkpoint=checkpoint, resume=True, on_cache=filled.append)
    assert filled == []


def test_more_epochs_can_be_added_later(tmp_path):
    whole, model = made(), made()
    fit(whole, epochs=4)
    for epochs in (2, 4):
        fit(model, epochs=epochs, checkpoint=tmp_path / "c.safetensors", resume=True)
    assert same(heads(model), heads(whole))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_learns_and_goes_on_where_it_was_interrupted(optimizer, tmp_path):
    settings = {"optimizer": optimizer, "weight_decay": 0.05, "loss": "each"}
    whole, model = made("conv1"), made("conv1")
    history = fit(whole, epochs=4, **settings)
    assert history.epochs[-1].loss < history.epochs[0].loss
    for epochs in (2, 4):
        fit(model, epochs=epochs, checkpoint=tmp_path / "c.safetensors", resume=True, **settings)
    assert same(heads(model), heads(whole))


def test_optimisers_differ():
    made_by = {}
    for optimizer in OPTIMIZERS:
        model = made("conv1")
        fit(model, optimizer=optimizer, weight_decay=0.05)
        made_by[optimizer] = heads(model)
    assert not same(made_by["adam"], made_by["adamw"])
    assert not same(made_by["adamw"], made_by["muon"])


def test_more_epochs_would_be_another_cosine(tmp_path):
    settings = {"schedule": "cosine", "checkpoint": tmp_path / "c.safetensors"}
    fit(made(), epochs=2, **settings)
    with pytest.raises(RunError, match=r"epochs 2 \(now 4\)"):
        fit(made(), epochs=4, resume=True, **settings)


def test_where_nothing_was_kept_resuming_begins_anew(tmp_path):
    begun, want = made(), made()
    fit(begun, checkpoint=tmp_path / "none.safetensors", resume=True)
    fit(want)
    assert same(heads(begun), heads(want))


def test_without_resume_an_old_checkpoint_is_written_over(tmp_path):
    checkpoint = tmp_path / "c.safetensors"
    fit(made(seed=9), checkpoint=checkpoint)
    model, want = made(), made()
    history = fit(model, checkpoint=checkpoint)
    fit(want)
    assert same(heads(model), heads(want))
    assert len(history.epochs) == 3


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What one epoch leaves behind."""
    fit(made(), epochs=1, checkpoint=tmp_path / "checkpoint.safetensors")
    return tmp_path / "checkpoint.safetensors"


OTHER = [
    ("targets", "soft"), ("loss", "v2"), ("cost_weight", 0.5), ("batch_size", 8), ("lr", 0.5), ("weight_decay", 0.5), ("seed", 3),
    ("precision", "bf16"), ("patience", 3), ("schedule", "cosine"), ("optimizer", "muon"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHER, ids=lambda v: str(v))
def test_another_setting_is_refused_with_both_values(name, value, checkpoint):
    model = made()
    before = heads(model)
    with pytest.raises(RunError, match=f"{name}.*now {value}"):
        fit(model, checkpoint=checkpoint, resume=True, **{name: value})
    assert same(heads(model), before)


def test_the_checkpoint_of_other_heads_is_refused(checkpoint):
    with pytest.raises(RunError, match=r"conv1.*now pool"):
        fit(made("pool"), checkpoint=checkpoint, resume=True)


def test_the_checkpoint_of_data_of_another_length_is_refused(checkpoint):
    with pytest.raises(RunError, match=f"{N}.*now 32"):
        fit(made(), TensorDataset(images()[:32], labels()[:32]), checkpoint=checkpoint, resume=True)


class Files(TensorDataset):
    """A data set of files, as `open_data` makes them."""

    def __init__(self, files_sha256: str) -> None:
        super().__init__(images(), labels())
        self.files_sha256 = files_sha256


def test_the_checkpoint_of_other_files_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(made(), Files("1" * 64), epochs=1, checkpoint=checkpoint)
    fit(made(), Files("1" * 64), checkpoint=checkpoint, resume=True)
    with pytest.raises(RunError, match=r"data 48 long.*1111 \(now 48 long.*2222\)"):
        fit(made(), Files("2" * 64), checkpoint=checkpoint, resume=True)


def test_the_checkpoint_of_other_exits_is_refused(checkpoint):
    model = ptee.augment(Net(), exits=["one"], head="conv1", input_size=SIZE)
    with pytest.raises(RunError, match="exits"):
        fit(model, checkpoint=checkpoint, resume=True)


def test_the_checkpoint_of_another_number_of_classes_is_refused(checkpoint):
    with pytest.raises(RunError):
        fit(on(Net(K + 1)), checkpoint=checkpoint, resume=True)


def with_front(seed: int, size: tuple[int, int, int] = SIZE) -> ptee.EarlyExitModel:
    """With a network in front, whose weights lie among the heads'."""
    torch.manual_seed(seed)
    front = load_backbone(Net(), input_size=size)
    torch.manual_seed(0)
    backbone = load_backbone(Net(), input_size=SIZE)
    return build(backbone, exits=EXITS, front=FrontHead(front, backbone.input, K))


@pytest.mark.parametrize(("seed", "size"), [(2, SIZE), (1, (3, 24, 24))], ids=["other weights", "another size"])
def test_the_checkpoint_of_another_front_network_is_refused_and_leaves_it_as_it_is(seed, size, tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(with_front(1), epochs=1, checkpoint=checkpoint)
    fit(with_front(1), checkpoint=checkpoint, resume=True)
    model = with_front(seed, size)
    before = heads(model)
    with pytest.raises(RunError, match="front"):
        fit(model, checkpoint=checkpoint, resume=True)
    assert same(heads(model), before)


def test_the_checkpoint_of_other_images_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    models = [
        build(load_backbone(made().detach(), input_size=SIZE, mean=(mean,)), exits=EXITS, head="conv1")
        for mean in (0.4, 0.5)
    ]
    fit(models[0], epochs=1, checkpoint=checkpoint)
    with pytest.raises(RunError, match="input"):
        fit(models[1], checkpoint=checkpoint, resume=True)


def test_a_calibrated_model_is_trained_only_once_rows_leave_by_another_confidence():
    model = made()
    ptee.calibrate(model, data())
    with pytest.raises(PteeError, match=r"calibrated.*model\.confidence = 'learned'.*ptee\.calibrate again"):
        fit(model)
    model.confidence = "learned"
    assert len(fit(model).epochs) == 3
    with pytest.raises(PteeError, match="has not been fitted"):  # to the heads as they are now
        model.confidence = "calibrated"


def test_the_checkpoint_of_another_backbone_is_refused(checkpoint):
    net = Net()
    with torch.no_grad():
        net.fc.bias += 1
    with pytest.raises(RunError, match="backbone"):
        fit(on(net), checkpoint=checkpoint, resume=True)


def text(file: Path) -> None:
    file.write_text("hello")


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps({"a": 1}))


def nothing(file: Path) -> None:
    file.write_bytes(b"")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def plain_tensors(file: Path) -> None:
    save_file({"a": torch.zeros(1)}, file)


def rewritten(file: Path, about: dict[str, str] | None = None, drop: str = "-", **add: Tensor) -> None:
    with safe_open(file, "pt") as old:
        tensors = {key: old.get_tensor(key) for key in old.keys() if not key.startswith(drop)}  # noqa: SIM118
        about = old.metadata() | (about or {})
    save_file(tensors | {key.replace("__", "."): value for key, value in add.items()}, file, about)


def no_history(file: Path) -> None:
    rewritten(file, {"history": "{}"})


def odd_epochs(file: Path) -> None:
    rewritten(file, {"history": '{"epochs": [{"number": 1}]}'})


def odd_settings(file: Path) -> None:
    rewritten(file, {"settings": "[]"})


def no_heads(file: Path) -> None:
    rewritten(file, drop="heads.")


def odd_heads(file: Path) -> None:
    rewritten(file, **{"heads__0__logits__bias": torch.zeros(99)})


def odd_optimiser(file: Path) -> None:
    rewritten(file, optimizer__x=torch.zeros(1))


@pytest.mark.parametrize(
    "damage",
    [text, pickled, nothing, cut_off, plain_tensors, no_history, odd_epochs, odd_settings, no_heads, odd_heads, odd_optimiser],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused_by_name(damage, checkpoint):
    damage(checkpoint)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors.*[Dd]elete it"):
        fit(made(), checkpoint=checkpoint, resume=True)


def test_a_checkpoint_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        fit(made(), checkpoint=tmp_path / "file" / "checkpoint.safetensors")


def test_a_full_disk_is_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_: object) -> None:  # word for word what safetensors 0.8 raises
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(RunError, match="space"):
        fit(made(), checkpoint=tmp_path / "checkpoint.safetensors")


def test_heads_that_share_weights_are_kept_too(tmp_path):
    model = made("pool")
    model.heads[1].confidence.bias = model.heads[0].confidence.bias
    fit(model, checkpoint=tmp_path / "checkpoint.safetensors")


# several processes


ONE_OF_TWO = """
import json
import sys
import torch
from test_trainer import N, data, fit, heads, images, labels, made
from torch.utils.data import TensorDataset
from ptee.training.losses import v1_loss

for val_data in (TensorDataset(*data()[:20]), None):
    model = made(seed=int(sys.argv[1]))  # the heads begin differently: the first process's are everybody's
    history = fit(model, TensorDataset(*data()[: N - 3]), val_data, epochs=2, batch_size=8)
    state = {name: value.tolist() for name, value in heads(model).items()}
    with torch.no_grad():
        logits, _, confidence = model.all_exits(images()[:20])
        in_one = v1_loss(logits, confidence, torch.tensor(model.costs), labels()[:20]).item()
    found = {"heads": state, "epochs": [[e.loss, e.val_loss, e.leaving] for e in history.epochs], "loss in one": in_one}
    print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_processes() -> list[list[str]]:
    """What each of two processes that train together printed: with validation data, and without."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO, rank], cwd=Path(__file__).parent, text=True,
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]  # fmt: skip
    found = []
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        found.append([line for line in out.splitlines() if line.startswith("FOUND")])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("val_data", [True, False], ids=["with validation data", "without"])
def test_two_processes_end_with_the_same_heads_and_figures(val_data, two_processes):
    one, two = (found[0 if val_data else 1] for found in two_processes)
    assert one == two


@pytest.mark.slow
def test_two_processes_count_each_held_out_image_once(two_processes):
    found = json.loads(two_processes[0][0].removeprefix("FOUND"))
    assert found["epochs"][-1][1] == pytest.approx(found["loss in one"], rel=1e-5)
