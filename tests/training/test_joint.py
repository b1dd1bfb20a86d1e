"""A backbone that learns with the heads: it changes, its weights are the run's, and a frozen one is as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from device import seeded
from learning import EXITS, SIZE, Interrupted, K, Net, data, fit, images, made, on, same, stopping
from tiny import one_line
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import BackboneError, DataError, PteeError, RunError
from ptee.model import saving
from ptee.model.run_config import fingerprint
from ptee.training.config import TrainingConfig

JOINT = {"backbone": "joint", "loss": "joint_each_exit"}
LOSSES = ["weighted", "joint", "joint_each_exit", "mc", "cost"]


def weights(model: ptee.EarlyExitModel) -> dict[str, Tensor]:
    """Copies of all weights and statistics, those of the backbone and of the heads."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def backbones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("backbone.")}


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_and_statistics_of_a_backbone_that_learns_change(loss):
    model = made()
    before = backbones(weights(model))
    fit(model, backbone="joint", loss=loss)
    after = backbones(weights(model))
    floating = [name for name, value in before.items() if value.is_floating_point()]
    last = ["backbone.fc.weight", "backbone.fc.bias"]  # have no part in the cost
    assert [n for n in floating if torch.equal(before[n], after[n])] == (last if loss == "cost" else [])


@pytest.mark.parametrize("loss", ["separate", *LOSSES])
def test_not_a_byte_of_a_frozen_backbone_changes(loss):
    model = made()
    before = backbones(weights(model))
    fit(model, loss=loss, targets="labels", backbone="frozen")
    assert same(before, backbones(weights(model)))
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())


def test_afterwards_the_backbone_is_frozen_in_eval_mode_and_given_back_as_it_was():
    net = Net().train()
    net.two.requires_grad_(False)
    model = on(net)
    before = weights(model)
    fit(model, **JOINT)
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert not any(part.training for part in net.modules())
    model.detach()
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["two.weight", "two.bias"]
    assert all(part.training for part in net.modules())
    assert torch.equal(net.two.weight, before["backbone.two.weight"])  # the user had frozen it
    assert not torch.equal(net.fc.weight, before["backbone.fc.weight"])


def test_the_backbone_is_in_training_mode_for_the_training_images_alone():
    modes = set()
    model = made()
    model.backbone.dropout.register_forward_hook(lambda module, *_: modes.add((module.training, model.training)))
    fit(model, None, data(), **JOINT, epochs=1)
    assert modes == {(True, True), (False, False)}


def test_the_backbone_has_a_learning_rate_of_its_own():
    slow, fast = made(), made()
    before = weights(slow)
    fit(slow, **JOINT, epochs=1, backbone_lr=1e-9)
    fit(fast, **JOINT, epochs=1)
    name = "backbone.fc.weight"
    moved = [(weights(model)[name] - before[name]).abs().max().item() for model in (slow, fast)]
    assert moved[0] < 1e-6 < 1e-3 < moved[1]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_both_learning_rates_fall_to_zero_by_the_cosine(optimizer):
    model = made()
    history = fit(model, **JOINT, optimizer=optimizer, schedule="cosine", lr=0.01, backbone_lr=0.001)
    assert len(history.epochs) == 3


def test_a_model_with_a_backbone_that_learnt_is_saved_loaded_and_answers_to_the_same_digit(tmp_path):
    model = made()
    fit(model, **JOINT)
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["backbone"]
    assert record["weights_file"] == "backbone.safetensors"
    again = ptee.load(tmp_path, backbone=copy.deepcopy(model).detach())
    assert same(weights(model), weights(again))
    assert torch.equal(model.all_exits(images()).logits, again.all_exits(images()).logits)


def test_other_weights_than_those_of_the_run_are_refused_in_one_line(tmp_path):
    model = made()
    fit(model, **JOINT)
    model.save_pretrained(tmp_path)
    with pytest.raises(RunError, match=r"weights in its backbone\.safetensors") as refusal:
        ptee.load(tmp_path, backbone=Net())
    one_line(refusal)


@pytest.fixture
def from_a_name(tmp_path):
    """A saved run whose backbone a library built, and the model."""
    model = ptee.augment(
        "cifar_resnet8", pretrained=False, exits=["layer1", "layer2"], head="pool", input_size=(3, 16, 16)
    )
    set_ = TensorDataset(torch.randn(16, 3, 16, 16, generator=seeded()), torch.arange(16) % 10)
    fit(model, set_, **JOINT, epochs=1)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_a_run_that_keeps_its_backbone_is_loaded_without_one(from_a_name, tmp_path):
    folder, model = from_a_name
    again = ptee.load(folder)
    assert same(weights(model), weights(again))
    again.save_pretrained(folder / "again")
    assert same(weights(model), weights(ptee.load(folder / "again")))


@pytest.mark.parametrize("fault", ["missing", "cut off", "of another training", "renamed"])
def test_damaged_weights_of_the_backbone_are_refused_in_one_line(from_a_name, fault):
    from safetensors.torch import load_file, save_file

    folder, _ = from_a_name
    file = folder / "backbone.safetensors"
    state = load_file(file)
    if fault == "missing":
        file.unlink()
    elif fault == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "of another training":
        save_file(state | {"fc.bias": state["fc.bias"] + 1}, file)
    else:
        state["other"] = state.pop("fc.bias")
        save_file(state, file)
    with pytest.raises(RunError) as refusal:
        ptee.load(folder)
    assert "backbone" in one_line(refusal)


@pytest.mark.parametrize(
    ("file", "gib", "words"),
    [
        ("heads", 5, "heads.safetensors is larger than 4 GiB; no run holds so much"),
        ("backbone", 5, "cut off or damaged"),  # others are as large
        ("backbone", 65, "backbone.safetensors is larger than 64 GiB; no run holds so much"),
    ],
)
def test_files_larger_than_those_of_a_run_are_refused_in_one_line(from_a_name, file, gib, words):
    folder, _ = from_a_name
    with (folder / f"{file}.safetensors").open("r+b") as opened:
        opened.truncate(gib * 2**30)  # it takes no room on the disk
    with pytest.raises(RunError) as refusal:
        ptee.load(folder)
    assert words in one_line(refusal)


@pytest.mark.parametrize(("heads", "backbone"), [(2**30, 0), (0, 2**34)])
def test_weights_that_could_not_be_loaded_again_are_not_written(heads, backbone, tmp_path):
    tensors = [{"w": torch.empty(n, device="meta")} for n in (heads, backbone)]
    with pytest.raises(RunError, match=r"take (4|64)\.0 GiB.* less than (4|64) GiB") as refusal:
        saving.write(tmp_path / "run", {}, tensors[0], backbone=tensors[1])
    one_line(refusal)
    assert not (tmp_path / "run").exists()


def test_a_backbone_too_large_for_a_run_is_refused_before_it_learns(monkeypatch):
    monkeypatch.setitem(saving.LARGEST_BYTES, "backbone.safetensors", 2**22)
    model = made()
    before = weights(model)
    with pytest.raises(RunError, match=r"backbone\.safetensors"):
        fit(model, **JOINT)
    assert same(before, weights(model))
    fit(model, epochs=1)  # frozen, it is not saved


def test_a_backbone_that_cannot_be_built_again_is_called_that_and_no_front_network(from_a_name):
    folder, _ = from_a_name
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["source"]["name"] = "gone"
    (folder / "config.json").write_text(json.dumps(config | {"fingerprint": fingerprint(config)}))
    with pytest.raises(BackboneError, match=r"The backbone cannot be rebuilt: .*backbone=NETWORK") as refusal:
        ptee.load(folder)
    one_line(refusal)


def test_a_place_of_the_weights_outside_of_the_folder_is_not_read(from_a_name):
    folder, _ = from_a_name
    config = json.loads((folder / "config.json").read_text())
    config["backbone"]["weights_file"] = "../backbone.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="not in the folder itself"):
        ptee.load(folder)


@pytest.mark.parametrize("settings", [{}, {"patience": 2}, {"optimizer": "muon", "schedule": "cosine"}])
def test_an_interrupted_training_goes_on_and_ends_with_the_same_bits(tmp_path, settings):
    whole, resumed, file = made(), made(), tmp_path / "checkpoint"
    how = {**JOINT, "epochs": 4, **settings}
    fit(whole, **how)
    history = fit(resumed, Interrupted(100), checkpoint=file, **how)
    assert history.interrupted
    assert len(history.epochs) == 2
    fresh = made()
    fit(fresh, checkpoint=file, resume=True, **how)
    assert same(weights(whole), weights(fresh))


def test_it_goes_on_with_the_backbone_that_learned_until_then_or_that_it_began_with_and_with_no_other(tmp_path):
    whole, resumed, fresh, other, file = made(), made(), made(), made(), tmp_path / "checkpoint"
    fit(whole, **JOINT, epochs=6)
    fit(resumed, Interrupted(100), checkpoint=file, **JOINT, epochs=6)
    assert not same(weights(resumed), weights(made()))
    fit(resumed, Interrupted(100), checkpoint=file, resume=True, **JOINT, epochs=6)
    next(other.backbone.parameters()).data += 1
    with pytest.raises(RunError, match="belongs to a training with backbone"):
        fit(other, checkpoint=file, resume=True, **JOINT, epochs=6)
    copy = tmp_path / "copy"
    copy.write_bytes(file.read_bytes())
    fit(fresh, checkpoint=copy, resume=True, **JOINT, epochs=6)
    fit(resumed, checkpoint=file, resume=True, **JOINT, epochs=6)
    assert same(weights(whole), weights(resumed)) and same(weights(whole), weights(fresh))


def test_after_a_stop_the_weights_of_heads_and_backbone_are_those_of_the_best_epoch():
    stopped, short = made(), made()
    history = stopping(stopped, **JOINT)
    assert history.stopped_early
    stopping(short, **JOINT, epochs=history.best.number, patience=None)
    assert same(weights(short), weights(stopped))


class _OnceNaN(TensorDataset):
    """Images that are not finite from the second epoch on."""

    reads = 0

    def __getitem__(self, index: int):
        self.reads += 1
        image, label = super().__getitem__(index)
        return (image * float("nan") if self.reads > 2 * len(self) + 20 else image), label


def test_a_training_that_diverges_says_so_in_one_line_and_keeps_the_last_good_epoch():
    model, good = made(), made()
    fit(good, **JOINT, epochs=1)
    with pytest.raises(PteeError, match=r"loss is nan in epoch 2.*those of epoch 1\.") as refusal:
        fit(model, _OnceNaN(*data().tensors), **JOINT)
    one_line(refusal)
    assert same(weights(good), weights(model))


def test_weights_that_are_not_finite_after_the_last_update_of_an_epoch_are_not_kept():
    model = made()
    before = weights(model)
    next(model.heads.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(PteeError, match="weights are no longer finite in epoch 1"):
        fit(model, **JOINT, epochs=1, batch_size=48)
    assert same(before, weights(model))


REFUSED = {
    "a learning rate of a frozen backbone": (
        {"backbone": "frozen", "backbone_lr": 0.1},
        "backbone_lr=0.1 needs backbone='joint'",
    ),
    "a learning rate of a backbone": ({"backbone_lr": 0.1}, "backbone_lr=0.1 needs backbone='joint'"),
    "a loss of the heads alone": (
        {"backbone": "joint", "loss": "separate"},
        "Give loss='joint_each_exit' or loss='weighted'",
    ),
    "its own answers": ({**JOINT, "targets": "pseudo"}, "needs targets='labels'"),
    "its own probabilities": ({**JOINT, "targets": "soft"}, "needs targets='labels'"),
    "weights of another loss": ({"exit_weights": (1.0, 1.0)}, "needs loss='weighted'"),
    "weights of nothing": ({"loss": "weighted", "exit_weights": (0, 0, 0)}, "is 0 for every answer"),
    "weights of what is frozen": (
        {"loss": "weighted", "exit_weights": (0, 0, 1)},
        "for every answer that can be learnt",
    ),
    "weights of other exits": ({"loss": "weighted", "exit_weights": (1.0, 1.0)}, "2 numbers, and these are 3 answers"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_settings_that_do_not_go_together_are_refused_in_one_line(fault):
    settings, words = REFUSED[fault]
    with pytest.raises(PteeError, match=words) as refusal:
        fit(made(), **settings)
    one_line(refusal)


def test_weights_of_other_exits_are_refused_before_the_cache_is_filled():
    estimates = []
    with pytest.raises(PteeError, match="2 numbers, and these are 3 answers"):
        fit(made("pool"), loss="weighted", exit_weights=(1.0, 1.0), cache=True, on_cache=estimates.append)
    assert estimates == []


def test_a_backbone_cannot_learn_without_labels():
    with pytest.raises(DataError, match="backbone that learns needs labels"):
        fit(made(), TensorDataset(images()), **JOINT)


def test_a_backbone_without_anything_to_learn_is_refused():
    model = on(Net().requires_grad_(False))
    with pytest.raises(PteeError, match="requires gradients"):
        fit(model, **JOINT)
    assert not model.origin.learnt


def test_a_backbone_that_carries_other_exits_cannot_learn():
    net = Net()
    one, other = on(net), on(net)
    with pytest.raises(PteeError, match="exits of another model"):
        fit(one, **JOINT)
    other.detach()
    fit(one, **JOINT, epochs=1)


def test_a_backbone_that_learns_is_not_cached():
    model, estimates = made("pool"), []
    fit(model, **JOINT, epochs=1, cache=True, on_cache=estimates.append)
    assert estimates == []


def test_heads_that_read_the_exit_before_and_fronts_learn_with_the_backbone_too():
    front = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, K))
    torch.manual_seed(0)
    model = ptee.augment(Net(), exits=EXITS, head=["front", "conv1", "conv1+"][1:], front=front, input_size=SIZE)
    before = weights(model)
    fit(model, **JOINT, epochs=1)
    after = weights(model)
    assert torch.equal(before["heads.0.network.1.weight"], after["heads.0.network.1.weight"])  # a front stays frozen
    assert not torch.equal(before["backbone.fc.weight"], after["backbone.fc.weight"])


def test_the_rate_of_the_backbone_is_that_of_the_heads_where_none_is_given():
    config = TrainingConfig(backbone="joint", loss="joint", lr=0.3).resolved()
    assert config.backbone_lr == 0.3
    assert TrainingConfig(loss="joint").resolved().backbone_lr is None
