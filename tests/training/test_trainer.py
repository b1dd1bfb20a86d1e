from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from cases import slow
from device import here
from learning import Interrupted, K, N, Net, data, fit, heads, images, labels, made, on, same, stopping
from small import OwnLoader, Stream
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ptee
from ptee._common import errors
from ptee._common.errors import DataError, DeviceError, PteeError, UnknownName
from ptee.backbones.weights import weights_hash
from ptee.training import trainer as training
from ptee.training.config import Targets, TrainingConfig
from ptee.training.history import MIN_DELTA, Epoch
from ptee.training.losses import joint_loss

# what changes, and what does not


@pytest.mark.parametrize("targets", get_args(Targets))
@pytest.mark.parametrize("head", ["pool", "bnpool", "conv1"])
def test_the_heads_learn_and_not_a_byte_of_the_backbone_changes(targets, head):
    model = made(head)
    backbone, before = weights_hash(model.backbone), heads(model)
    history = fit(model, targets=targets)
    assert weights_hash(model.backbone) == backbone
    assert not any(torch.equal(value, before[name]) for name, value in heads(model).items() if value.dim())
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())
    assert history.epochs[-1].loss < history.epochs[0].loss


@pytest.mark.parametrize("head", ["pool", slow("conv1")])
@pytest.mark.parametrize("settings", [{"targets": "labels"}, {}], ids=str)
def test_heads_that_learn_separately_come_nearer_to_their_targets_and_know_it(settings, head):
    model = made(head)
    history = fit(model, loss="separate", optimizer="adam", schedule="constant", epochs=40, **settings)
    assert history.epochs[-1].loss < history.epochs[0].loss
    with torch.no_grad():
        every = model.all_exits(images())
    best = labels() if settings.get("targets") else every.logits[-1].argmax(-1)
    right = (every.logits[:-1].argmax(-1) == best).double().mean(1)
    assert every.confidence[:-1].double().mean(1).tolist() == pytest.approx(right.tolist(), abs=0.25)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_in_eval_mode_on_its_device_with_its_thresholds_afterwards(training):
    model = made().train(training)
    model.threshold = [0.2, 0.8]
    fit(model, epochs=1)
    assert not any(part.training for part in model.modules())
    assert {p.device.type for p in model.parameters()} == {here().type}
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


@pytest.mark.parametrize("settings", [{}, {"backbone": "joint"}, {"order": "one by one"}], ids=str)
def test_gradients_that_were_there_before_have_no_part_in_the_first_update(settings):
    model, want = made(), made()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)
    for each in (model, want):
        fit(each, **settings, epochs=1)
    assert same(model.state_dict(), want.state_dict())


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
    some = TensorDataset(*(part[:17] for part in data().tensors))  # the last batch has one row, too few for batch norm
    fit(made(head="conv1"), some, epochs=2, lr=0.01, schedule="cosine", batch_size=16)
    assert rates == pytest.approx([0.01, 0.005])  # the first and third of four places


def test_each_epoch_begins_at_its_place_in_the_schedule_also_after_one_of_fewer_batches(rates, monkeypatch):
    loader = OwnLoader(images(), labels(), 12)
    loader.parts.pop()  # as several processes leave out a last batch with too few rows for each
    monkeypatch.setattr(OwnLoader, "__len__", lambda self: 4)
    fit(made(), loader, epochs=2, lr=0.01, schedule="cosine")
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * n / 8)) / 2 for n in (0, 1, 2, 4, 5, 6)])


def test_a_cosine_schedule_needs_a_loader_with_a_length():
    with pytest.raises(DataError, match=r"cosine.*schedule='constant'"):
        fit(made(), DataLoader(stream(), 16), schedule="cosine")


def test_batches_that_are_too_small_for_batch_norm_are_refused_with_what_to_do_and_nothing_else():
    loader = DataLoader(data(), 1)
    with (
        warnings.catch_warnings(),
        pytest.raises(DataError, match=r"no batch of 2 images or more\. Give .*batch_size=128"),
    ):
        warnings.simplefilter("error")  # torch warned of the schedule
        ptee.train(made("conv1"), loader, epochs=1, schedule="cosine", precision="no", device=here())


def test_the_callers_random_numbers_are_left_alone():
    model = made()
    torch.set_default_device(None)  # elsewhere such a loader needs a generator of its own
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    fit(model, DataLoader(data(), 16, shuffle=True))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_pseudo_labels_are_the_classes_that_the_backbone_predicts():
    model = made()
    want = model.backbone(images()).argmax(1)
    pseudo, labelled = made(), made()
    fit(pseudo, TensorDataset(images()), targets="pseudo")
    fit(labelled, TensorDataset(images(), want), targets="labels")
    assert same(heads(pseudo), heads(labelled))


def test_auto_epochs_need_data_with_a_length():
    with pytest.raises(DataError, match=r"no length.*epochs=10"):
        fit(made(), DataLoader(stream(), 16), epochs="auto")


def test_auto_epochs_of_a_loader_count_its_batches():
    config = TrainingConfig(batch_size=7)
    assert training.resolve_config(config, made(), DataLoader([(0, 0)] * 40_000, 128)).epochs == 16


# what is reported


def test_an_epoch_reports_means_from_before_each_update():
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


def test_the_validation_loss_is_measured_in_eval_mode_after_the_epoch():
    model = made("bnpool")
    history = fit(model, None, data(), epochs=2)
    with torch.no_grad():
        every = model.all_exits(images())
    want = joint_loss(every.logits, every.confidence_logits, torch.tensor(model.costs), labels()).item()
    assert history.epochs[-1].val_loss == pytest.approx(want, rel=1e-5)


def test_each_epoch_is_reported_when_it_is_over():
    reported: list[Epoch] = []
    history = fit(made(), on_epoch=reported.append)
    assert reported == history.epochs
    assert [epoch["number"] for epoch in json.loads(json.dumps(history.to_dict()))["epochs"]] == [1, 2, 3]


@pytest.mark.parametrize(("loss", "where"), [("cost", r"exit 0 \(one\)"), ("mc", "backbone's own output")])
def test_a_collapse_is_warned_of_with_the_place_where_all_leave(loss, where):
    net = Net()
    with torch.no_grad():
        net.fc.weight *= 300  # so sure of its answers that no exit is as good
    settings = {"targets": "pseudo", "loss": loss, "epochs": 6, "batch_size": 16, "lr": 0.1, "precision": "no"}
    with pytest.warns(UserWarning, match=f"collapsed: .*{where}") as told:
        history = ptee.train(on(net, "pool"), data(), **settings)
    assert {warning.filename for warning in told if "collapsed" in str(warning.message)} == {__file__}
    assert "collapsed" in history.warning


def test_what_cannot_be_lowered_is_no_advice_after_a_collapse():
    model = made("pool")
    model.threshold = 0
    said = r"100% of the training images leave at exit 0 .* at threshold 0\. Train longer, or set"
    with pytest.warns(UserWarning, match=said):
        ptee.train(model, data(), loss="joint", cost_weight=0, epochs=1, precision="no", device=here())


def test_where_validation_images_leave_is_measured_in_eval_mode_after_the_epoch():
    model = made("pool")
    model.threshold = 0.6
    epoch = fit(model, None, data(), backbone="joint", epochs=1).epochs[-1]
    left = model.predict(images()).exit_index.cpu()
    assert epoch.val_leaving == pytest.approx((torch.bincount(left, minlength=3) / N).tolist())
    assert fit(made("pool"), epochs=1).epochs[-1].val_leaving is None


def test_no_collapse_is_seen_where_images_leave_in_several_places():
    model = made("pool")
    with torch.no_grad():
        model.threshold = model.all_exits(images()).confidence[:-1].median(1).values
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ptee.train(model, data(), loss="joint", epochs=1, lr=1e-6, precision="no").warning is None


# data


def stream(items: int = N) -> Stream:
    return Stream(images()[:items], labels()[:items])


IN_ORDER = {
    "a loader": lambda: DataLoader(data(), 16),
    "a loader of a stream": lambda: DataLoader(stream(), 16),
    "a loader of mappings": lambda: DataLoader([{"image": i, "label": y} for i, y in data()], 16),
    "a loader with a sampler of batches": lambda: DataLoader(data(), batch_sampler=[*torch.arange(N).split(16)]),
    "a loader of one's own": lambda: OwnLoader(images(), labels(), 16),
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


def with_odd_labels(label: int) -> TensorDataset:
    return TensorDataset(images(), labels().where(labels() > 0, label))


def test_missing_labels_are_refused_with_the_way_around():
    with pytest.raises(DataError, match="targets='pseudo'"):
        fit(made(), TensorDataset(images()))


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
    "a loader of a stream": lambda: DataLoader(stream(0)),
}


@pytest.mark.parametrize("source", EMPTY.values(), ids=EMPTY)
def test_data_without_images_are_refused(source):
    with pytest.raises(DataError):
        fit(made(), source())


class Flickering(Dataset[Any]):
    """Images with a random transform."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return images()[index] + torch.rand(()), labels()[index]


def test_a_cache_of_images_that_change_is_refused():
    with pytest.raises(DataError, match=r"another image when it is read again.*cache=False.*views=4"):
        fit(made(), Flickering(), cache=True)
    assert len(fit(made(), Flickering(), epochs=1, cache=False).epochs) == 1


class SeldomFlickering(Dataset[Any]):
    """Images of which one in the middle is another each time it is read, in whatever process."""

    def __init__(self) -> None:
        self.reads = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self.images, self.labels = images().cpu(), labels().cpu()  # a process that was forked has no GPU

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += index == 23
        return self.images[index] + 0.1 * (index == 23) * int(self.reads), self.labels[index]


@pytest.mark.parametrize(
    "settings", [{"views": 1}, {"views": 2}, {"views": 2, "num_workers": 2}, {"views": 3, "mirror": False}], ids=str
)
def test_a_cache_of_images_that_seldom_change_is_refused_too(settings):
    with pytest.raises(DataError, match=r"another image when it is read again.*cache=False"):
        fit(made(), SeldomFlickering(), cache=True, **settings)


def test_an_image_with_nan_is_not_called_another_image():
    spoilt = images().clone()
    spoilt[0, 0, 0, 0] = torch.nan
    for views in (1, 2):
        with pytest.raises(PteeError, match=r"The loss is nan.*leave out images with values that are not finite"):
            fit(made(), TensorDataset(spoilt, labels()), cache=True, views=views)


# what is refused


REFUSED = [
    ({"loss": "v3"}, UnknownName, "loss='v3' is unknown"),
    ({"device": "cuda:99"}, DeviceError, "cuda:99"),
    ({"epochs": 0}, PteeError, "epochs=0 must be 1 or more"),
    ({"mixup": 0.2}, UnknownName, "train() has no argument 'mixup'"),
    ({"batchsize": 16}, UnknownName, "train() has no argument 'batchsize'. Did you mean 'batch_size'"),
    ({"num_workers": 1.5}, PteeError, "num_workers=1.5 must be a whole number"),
    ({"config": {"epochs": 3}}, PteeError, "config must be a TrainingConfig, not a dict"),
]


@pytest.mark.parametrize(("settings", "error", "words"), REFUSED, ids=[str(case[0]) for case in REFUSED])
def test_a_setting_that_cannot_be_is_refused_by_name_and_changes_nothing(settings, error, words):
    model = made()
    before = heads(model)
    with pytest.raises(error, match=re.escape(words)):
        fit(model, **settings)
    assert same(heads(model), before)


@pytest.mark.filterwarnings("ignore:Training collapsed")
def test_settings_by_name_take_the_place_of_those_in_the_config():
    config = TrainingConfig(loss="joint", epochs=1, batch_size=16, views=1, shift=0, cache=False, precision="no")
    history = ptee.train(made(), data(), config=config, epochs=2, device=here())
    assert len(history.epochs) == 2
    assert history.config == config.changed(epochs=2).resolved().model_dump()


def test_a_loss_that_is_no_number_is_refused_and_a_lower_learning_rate_helps():
    model = made()
    with pytest.raises(PteeError, match=r"nan.*1e\+29"):
        fit(model, lr=1e30)
    fit(model, lr=1e-3)


def test_an_error_in_the_data_reaches_the_caller_and_keeps_the_last_complete_epoch():
    model, want = made(), made()
    with pytest.raises(ZeroDivisionError):
        fit(model, Interrupted(N + 20, ZeroDivisionError))
    fit(want, epochs=1)
    assert same(heads(model), heads(want))
    assert not model.training


class Killing(Dataset[Any]):
    """The data. Where `at` holds the number of an image, torch's error comes that a process that loads them was killed.

    A real one comes from a signal handler, at any line: also of pytest's.
    """

    def __init__(self, *at: int) -> None:
        self.at = set(at)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self.at:
            raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. ")
        return images()[index], labels()[index]


@pytest.mark.parametrize("cache", [False, True])
def test_a_process_that_loads_images_and_is_killed_is_told_with_what_to_do(cache):
    said = (
        r"^A process that loads images has ended .* memory is short\. Take fewer of them, or none \(num_workers=0\)\.$"
    )
    with pytest.raises(DataError, match=said):
        fit(made(), Killing(20), cache=cache)


class EndedLoader:
    """A loader of a user's, whose processes are killed."""

    num_workers = 2

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        yield images()[:20], labels()[:20]
        raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")


@pytest.mark.parametrize("act", [fit, ptee.evaluate], ids=["training", "evaluation"])
def test_of_a_loader_of_the_user_s_own_it_is_said_to_make_it_with_fewer_processes(act):
    said = r"Make the loader with fewer of them, or none: DataLoader\(\.\.\., num_workers=0\)\.$"
    with pytest.raises(DataError, match=said):
        act(made(), EndedLoader())


def test_where_epochs_are_kept_a_killed_process_is_told_with_how_to_go_on(tmp_path):
    data = Killing()
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(
        DataError, match=r"none \(num_workers=0\)\. 1 complete epoch is kept: go on with resume=True\.$"
    ):
        fit(made(), data, checkpoint=checkpoint, on_epoch=lambda _: data.at.add(20))


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


def test_mixed_precision_is_used_and_does_not_reach_into_the_next_training():
    first, rough, second = made(), made(), made()
    fit(first)
    fit(rough, precision="bf16")
    fit(second)
    assert not same(heads(first), heads(rough))
    assert same(heads(first), heads(second))


@pytest.fixture
def accelerator() -> Iterator[Callable[[], Any]]:
    """Makes an Accelerator for bfloat16, as a caller's own program may; accelerate allows one precision per process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield functools.partial(Accelerator, mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("before", [True, False], ids=["made before", "made afterwards"])
def test_an_accelerator_of_the_callers_has_its_own_precision(before, accelerator):
    mine = accelerator() if before else None
    fit(made(), epochs=1)
    assert (mine or accelerator()).mixed_precision == "bf16"


# early stopping


def test_training_stops_when_nothing_gets_better_and_goes_back_to_the_best():
    seen: list[dict[str, Tensor]] = []
    model = made()
    history = stopping(model, on_epoch=lambda _: seen.append(heads(model)))
    assert history.stopped_early
    assert len(history.epochs) < 30
    best = len(seen) - 1 - 3
    losses = [epoch.val_loss for epoch in history.epochs]
    assert min(losses[best + 1 :]) > losses[best] - MIN_DELTA
    assert same(heads(model), seen[best])


# Ctrl-C


@pytest.mark.parametrize("head", ["pool", "conv1"])
def test_ctrl_c_keeps_the_heads_of_the_last_complete_epoch(head):
    model, want = made(head), made(head)
    history = fit(model, Interrupted(N + 20))
    fit(want, epochs=1)
    assert history.interrupted
    assert len(history.epochs) == 1
    assert same(heads(model), heads(want))
    assert not model.training


@pytest.mark.parametrize(
    ("items", "kept", "said"),
    [
        (20, False, "No epoch was complete, and the weights are as they were."),
        (N + 20, False, "The weights are those after 1 complete epoch."),
        (2 * N + 20, True, "The weights are those after 2 complete epochs. Go on with resume=True."),
    ],
)
def test_ctrl_c_ends_the_cell_and_says_which_epochs_are_complete(items, kept, said, tmp_path):
    checkpoint = {"checkpoint": tmp_path / "checkpoint.safetensors"} if kept else {}
    with pytest.raises(KeyboardInterrupt) as stopped:
        ptee.train(made(), Interrupted(items), epochs=3, batch_size=16, views=1, shift=0, cache=False, **checkpoint)
    assert isinstance(stopped.value, errors.Interrupted) and str(stopped.value) == said
    assert len(stopped.value.history.epochs) == items // N


@pytest.mark.parametrize(("place", "complete"), [("deepcopy", 1), ("_save", 2), ("on_epoch", 2)])
def test_ctrl_c_between_two_epochs_ends_the_training_as_within_one(place, complete, monkeypatch):
    model, want, calls, callback = made(), made(), itertools.count(), {}
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
        callback = {"on_epoch": second_call(lambda epoch: None)}
    history = fit(model, epochs=3, **callback)
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


# several processes


ONE_OF_TWO = """
import json
import sys
import torch
from learning import N, data, fit, heads, images, labels, made
from torch.utils.data import TensorDataset
from ptee.training.losses import joint_loss

for val_data in (TensorDataset(*data()[:20]), None):
    model = made(seed=int(sys.argv[1]))  # the heads begin differently: the first process's are everybody's
    history = fit(model, TensorDataset(*data()[: N - 3]), val_data, epochs=2, batch_size=8)
    state = {name: value.tolist() for name, value in heads(model).items()}
    with torch.no_grad():
        logits, _, confidence = model.all_exits(images()[:20])
        in_one = joint_loss(logits, confidence, torch.tensor(model.costs), labels()[:20]).item()
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
def test_two_processes_count_each_validation_image_once(two_processes):
    found = json.loads(two_processes[0][0].removeprefix("FOUND"))
    assert found["epochs"][-1][1] == pytest.approx(found["loss in one"], rel=1e-5)
