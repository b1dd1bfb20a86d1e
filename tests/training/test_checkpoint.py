from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learning import EXITS, SIZE, Interrupted, K, N, Net, data, fit, heads, images, labels, made, on, same, stopping
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Subset, TensorDataset

import ptee
from ptee._common.errors import RunError
from ptee.backbones.load import load_backbone
from ptee.exits.front import FrontHead
from ptee.model.build import build
from ptee.training.checkpoint import _content_hash
from ptee.training.history import Epoch, History
from ptee.training.optimizers import OPTIMIZERS


def on_time(history: History) -> list[Epoch]:
    """The epochs without the time they took."""
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in history.epochs]


SETTINGS = {
    "as it is": {}, "loss": {"loss": "joint_each_exit"}, "schedule": {"schedule": "cosine"},
    "separate": {"loss": "separate", "shift": 3, "views": 2}, "targets": {"targets": "soft"},
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


def test_gradients_of_an_update_that_ctrl_c_cut_short_are_not_learnt_from_on_resume(tmp_path):
    model, steps = made(), itertools.count()
    settings = {"checkpoint": tmp_path / "checkpoint.safetensors", "optimizer": "adam"}
    want, _ = never_interrupted("as it is")

    def interrupt(*_):
        if next(steps) == 4:  # in the second epoch
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(interrupt)
    try:
        assert fit(model, **settings).interrupted
    finally:
        hook.remove()
    fit(model, resume=True, **settings)
    assert same(heads(model), want)


STOPPED = {
    "before the best epoch": (4, 0),
    "after it": (2, 0),
    "when it is over": (0, 0),
    "and may go on for longer": (0, 5),
}


@pytest.mark.parametrize(("left", "more"), STOPPED.values(), ids=STOPPED)
def test_a_resumed_training_stops_early_where_one_that_was_never_interrupted_stops(left, more, tmp_path):
    whole, resumed, checkpoint = made(), made(seed=9), tmp_path / "checkpoint.safetensors"
    want = stopping(whole)
    stopping(made(), Interrupted((len(want.epochs) - left) * N + 20) if left else None, checkpoint=checkpoint)
    history = stopping(resumed, epochs=30 + more, checkpoint=checkpoint, resume=True)
    assert on_time(history) == on_time(want)
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
    settings = {
        "optimizer": optimizer,
        "weight_decay": 0.05,
        "loss": "separate",
        "targets": "labels",
        "schedule": "constant",
    }
    whole, model = made("conv1"), made("conv1")
    history = fit(whole, epochs=4, **settings)
    assert history.epochs[-1].loss < history.epochs[0].loss
    for epochs in (2, 4):
        fit(model, epochs=epochs, checkpoint=tmp_path / "c.safetensors", resume=True, **settings)
    assert same(heads(model), heads(whole))


def test_optimisers_differ():
    models = {optimizer: made("conv1") for optimizer in OPTIMIZERS}
    for optimizer, model in models.items():
        fit(model, optimizer=optimizer, weight_decay=0.05)
    adam, adamw, muon = (heads(models[name]) for name in ("adam", "adamw", "muon"))
    assert not same(adam, adamw)
    assert not same(adamw, muon)


@pytest.mark.parametrize("setting", [{"schedule": "cosine"}, {"schedule": "constant", "order": "one by one"}], ids=str)
def test_more_epochs_would_be_another_cosine_or_other_turns(setting, tmp_path):
    settings = setting | {"checkpoint": tmp_path / "c.safetensors"}
    fit(made(), epochs=2, **settings)
    with pytest.raises(RunError, match=r"epochs 2 \(now 4\)"):
        fit(made(), epochs=4, resume=True, **settings)


@pytest.mark.parametrize("resume", [True, False], ids=["resumed without a checkpoint", "not resumed"])
def test_a_training_that_does_not_go_on_begins_from_its_own_heads(resume, tmp_path):
    model, want = made(), made()
    if not resume:
        fit(made(seed=9), checkpoint=tmp_path / "c.safetensors")
    assert len(fit(model, checkpoint=tmp_path / "c.safetensors", resume=resume).epochs) == 3
    fit(want)
    assert same(heads(model), heads(want))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """What one epoch leaves behind."""
    fit(made(), epochs=1, checkpoint=tmp_path / "checkpoint.safetensors")
    return tmp_path / "checkpoint.safetensors"


OTHER = [
    ("targets", "soft"), ("loss", "mc"), ("cost_weight", 0.5), ("batch_size", 8), ("lr", 0.5), ("weight_decay", 0.5), ("seed", 3),
    ("precision", "bf16"), ("patience", 3), ("schedule", "cosine"), ("optimizer", "muon"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHER, ids=lambda v: str(v))
def test_another_setting_is_refused_with_both_values(name, value, checkpoint):
    model = made()
    before = heads(model)
    with pytest.raises(RunError, match=f"{name}.*now {value}"):
        fit(model, checkpoint=checkpoint, resume=True, **{name: value})
    assert same(heads(model), before)


def other_backbone() -> ptee.EarlyExitModel:
    net = Net()
    with torch.no_grad():
        net.fc.bias += 1
    return on(net)


OTHER_TRAININGS = {
    "heads": (lambda: made("pool"), data, "conv1.*now pool"),
    "exits": (lambda: ptee.augment(Net(), exits=["one"], head="conv1", input_size=SIZE), data, "exits"),
    "number of classes": (lambda: on(Net(K + 1)), data, "classes 4"),
    "backbone": (other_backbone, data, "backbone"),
    "input": (
        lambda: build(load_backbone(Net(), input_size=SIZE, mean=(0.4,)), exits=EXITS, head="conv1"),
        data,
        "input",
    ),
    "number of images": (
        made,
        lambda: TensorDataset(images()[:32], labels()[:32]),
        rf"on other data \(it was {N} long and is 32 long now\)",
    ),
    "images": (
        made,
        lambda: TensorDataset(images() + 1, labels()),
        r"on other data \(images or labels of other content now",
    ),
}


@pytest.mark.parametrize(("model", "train_data", "words"), OTHER_TRAININGS.values(), ids=OTHER_TRAININGS)
def test_the_checkpoint_of_another_training_is_refused(model, train_data, words, checkpoint):
    with pytest.raises(RunError, match=words):
        fit(model(), train_data(), checkpoint=checkpoint, resume=True)


class Files(TensorDataset):
    """A data set of files, as `open_data` makes them."""

    def __init__(self, files_sha256: str) -> None:
        super().__init__(images(), labels())
        self.files_sha256 = files_sha256


def test_the_checkpoint_of_other_files_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(made(), Files("1" * 64), epochs=1, checkpoint=checkpoint)
    fit(made(), Files("1" * 64), checkpoint=checkpoint, resume=True)
    with pytest.raises(
        RunError, match=r"a training on other data \(files with other names now, or others in their place\)\. Use"
    ):
        fit(made(), Files("2" * 64), checkpoint=checkpoint, resume=True)


class WithGaps(Subset):
    """The data without some images, which were removed because they cannot be read."""

    def __init__(self, *gaps: int) -> None:
        super().__init__(data(), [i for i in range(N) if i not in gaps])
        self.gaps = gaps


def interrupt(_: Epoch) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("gone", [(0,), (20,), (0, N - 1), (3, 4, 30)], ids=str)
def test_a_training_goes_on_without_images_that_were_removed(gone, tmp_path):
    how = {
        "checkpoint": tmp_path / "checkpoint.safetensors",
        "schedule": "cosine",
        "epochs": "auto",
        "on_epoch": interrupt,
    }
    assert fit(made(), data(), **how).interrupted
    with pytest.raises(RunError, match="images or labels of other content now"):
        fit(made(), TensorDataset(images() + 1, labels()), resume=True, **how)
    assert len(fit(made(), WithGaps(*gone), resume=True, **how).epochs) == 2


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


def rewritten(file: Path, about: dict[str, str] | None = None, drop: str = "-", **add: Tensor) -> None:
    """A file with other content and the right hash."""
    with safe_open(file, "pt") as old:
        tensors = {key: old.get_tensor(key) for key in old.keys() if not key.startswith(drop)}  # noqa: SIM118
        about = old.metadata() | (about or {})
    tensors |= {key.replace("__", "."): value for key, value in add.items()}
    save_file(tensors, file, about | {"sha256": _content_hash(tensors, about)})


def changed(file: Path, name: str) -> None:
    """A few bits of one tensor are not what they were."""
    with safe_open(file, "pt") as old:
        tensors, about = {key: old.get_tensor(key) for key in old.keys()}, old.metadata()  # noqa: SIM118
    tensors[next(key for key in tensors if key.startswith(name))] += 1
    save_file(tensors, file, about)


def with_header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


DAMAGE: dict[str, Callable[[Path], object]] = {
    "text": lambda file: file.write_text("hello"),
    "a pickle": lambda file: file.write_bytes(pickle.dumps({"a": 1})),
    "nothing": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "other tensors": lambda file: save_file({"a": torch.zeros(1)}, file),
    "changed heads": lambda file: changed(file, "heads."),
    "changed optimizer": lambda file: changed(file, "optimizer."),
    "another history": lambda file: file.write_bytes(file.read_bytes().replace(b"seconds", b"minutes")),
    "other settings": lambda file: file.write_bytes(file.read_bytes().replace(b'lr\\": 0.01', b'lr\\": 0.02')),
    "no history": lambda file: rewritten(file, {"history": "{}"}),
    "an epoch without figures": lambda file: rewritten(file, {"history": '{"epochs": [{"number": 1}]}'}),
    "settings that are a list": lambda file: rewritten(file, {"training": "[]"}),
    "no heads": lambda file: rewritten(file, drop="heads."),
    "heads of another shape": lambda file: rewritten(file, heads__0__logits__bias=torch.zeros(99)),
    "an optimizer of another shape": lambda file: rewritten(file, optimizer__0__exp_avg=torch.zeros(99)),
    "a header of a megabyte that says nothing": lambda file: file.write_bytes(
        with_header(b'{"a":"' + b"x" * 2**20 + b'"}')
    ),
    "a header that is too long": lambda file: file.write_bytes(with_header(b'{"a":{"b":"' + b"x" * 2**24 + b'"}}')),
    "an optimizer's state without number": lambda file: rewritten(file, optimizer__x=torch.zeros(1)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_heads_stay_as_they_are(damage, checkpoint):
    damage(checkpoint)
    model = made()
    before = heads(model)
    with pytest.raises(RunError, match=r"checkpoint\.safetensors.*[Dd]elete it") as why:
        fit(model, checkpoint=checkpoint, resume=True)
    assert len(str(why.value)) < 1000
    assert same(heads(model), before)


def test_a_checkpoint_with_more_epochs_than_are_wanted_is_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint.safetensors"
    fit(made(), epochs=2, checkpoint=checkpoint)
    with pytest.raises(RunError, match=r"2 complete epochs, more than epochs=1\. Give 2 or more"):
        fit(made(), epochs=1, checkpoint=checkpoint, resume=True)


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path):
    left = tmp_path / ".writing-abc" / "checkpoint.safetensors"
    left.parent.mkdir()
    left.write_bytes(b"half")
    fit(made(), epochs=1, checkpoint=tmp_path / "checkpoint.safetensors", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        fit(made(), checkpoint=tmp_path / "file" / "checkpoint.safetensors")

    def fail(*_: object) -> None:  # word for word what safetensors 0.8 raises
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(RunError, match="space"):
        fit(made(), checkpoint=tmp_path / "checkpoint.safetensors")


def test_heads_that_share_weights_are_kept_too(tmp_path):
    model = made("pool")
    model.heads[1].confidence.bias = model.heads[0].confidence.bias
    fit(model, checkpoint=tmp_path / "checkpoint.safetensors")
