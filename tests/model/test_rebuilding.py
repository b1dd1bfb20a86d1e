"""A run is loaded with the backbone that its heads were made for, and with no other."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import suppress

import pytest
import safetensors.torch
import small
import torch
from safetensors.torch import save_file
from saved import SIZE, Net, assert_same, edit, make, refused
from torch import nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import BackboneError, PteeError, RunError, UnknownName
from ptee.backbones.load import load_backbone, rebuild
from ptee.backbones.weights import difference, weights_hash
from ptee.exits.heads import HEADS
from ptee.model.build import build


@pytest.mark.parametrize("backbone", ["torchvision/resnet18", 3], ids=str)
def test_a_backbone_that_is_no_module_is_refused(backbone, folder):
    with pytest.raises(BackboneError, match=f"{backbone}.*is no module.*timm.create_model"):
        ptee.load(folder, backbone=backbone)


@pytest.mark.parametrize(
    "made_of",
    [lambda model: model, lambda model: ptee.optimize(model, mode="eager")],
    ids=["a model", "an optimized one"],
)
def test_a_backbone_that_has_exits_already_is_to_be_detached(made_of, folder):
    with pytest.raises(BackboneError, match=r"^This model has exits already\..*backbone=model\.detach\(\)\)\.$"):
        ptee.load(folder, backbone=made_of(small.made()))


def test_other_weights_are_refused_with_both_hashes(folder, net):
    wanted = weights_hash(net)
    with torch.no_grad():
        net.fc.bias[0] += 1e-6
    assert {wanted[:16], weights_hash(net)[:16]} <= set(re.findall(r"[0-9a-f]{16}", refused(folder, net)))


def test_other_statistics_of_batch_norm_are_other_weights_and_are_named(folder, net):
    net.get_buffer("one.1.running_mean").add_(1)
    assert re.search(r"tensors that differ \(1 of \d+\): one\.1\.running_mean\. ", refused(folder, net))


def test_several_other_tensors_are_named_together(folder, net):
    for name in ("one.1.running_mean", "one.1.running_var"):
        net.get_buffer(name).add_(1)
    assert re.search(
        r"tensors that differ \(2 of \d+\): one\.1\.running_mean, one\.1\.running_var\. ", refused(folder, net)
    )


def test_another_count_of_batches_is_the_same_backbone(folder, net):
    net.get_buffer("one.1.num_batches_tracked").add_(1)
    assert ptee.load(folder, backbone=net).exits


def test_the_same_weights_in_a_module_around_them_are_told_apart_by_their_prefix(folder, net):
    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    net.get_buffer("one.1.num_batches_tracked").add_(1)
    assert "the weights are the same, but each name of this one begins with 'net.'" in refused(folder, Lightning())


def test_a_run_of_before_single_tensors_were_recorded_is_compared_as_a_whole(folder, net):
    edit(folder, "backbone_tensors", None)
    assert ptee.load(folder, backbone=net).exits
    net.get_buffer("one.1.num_batches_tracked").add_(1)
    assert "which differ was not recorded" in refused(folder, net)


@pytest.mark.parametrize(
    "other",
    [lambda: Net(5), lambda: Net().half().float(), lambda: Net().double(), lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))],
    ids=["other classes", "rounded", "other type", "other architecture"],
)  # fmt: skip
def test_another_backbone_is_refused(other, folder):
    refused(folder, other())


def test_a_refused_backbone_is_left_as_it_was(folder):
    other = Net(5).train()
    refused(folder, other)
    assert all(p.requires_grad for p in other.parameters())
    assert all(part.training and not part._forward_hooks for part in other.modules())


def test_a_python_module_cannot_be_rebuilt_and_is_asked_for(folder):
    said = refused(folder, None)
    assert "Net" in said
    assert "backbone=" in said


@pytest.fixture
def mine() -> Iterator[None]:
    HEADS["mine"] = lambda channels, height, width: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    yield
    HEADS.pop("mine", None)


def test_a_head_of_ones_own_is_asked_for_where_it_is_not_registered(mine, tmp_path):
    model = make("mine")
    model.save_pretrained(tmp_path)
    assert_same(ptee.load(tmp_path, backbone=copy.deepcopy(model.backbone)), model)
    del HEADS["mine"]
    assert "'mine'" in refused(tmp_path, copy.deepcopy(model.backbone), UnknownName)


def test_weights_that_changed_after_a_network_was_loaded_are_told_when_the_run_is_saved(tmp_path, recwarn):
    net = load_backbone("cifar_resnet8", pretrained=False).module
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    model = ptee.augment("cifar_resnet8", weights=tmp_path / "weights.safetensors", exits=["layer1"])
    model.save_pretrained(tmp_path / "run")
    again = ptee.load(tmp_path / "run")
    again.save_pretrained(tmp_path / "again")
    assert not [w for w in recwarn if "not those" in str(w.message)]
    for each in (model, again):
        each.backbone.fc.bias.data += 1
        with pytest.warns(
            UserWarning, match=r"of cifar_resnet8 are not .* \(1 of \d+\): fc.bias.*load\(FOLDER, backbone"
        ):
            each.save_pretrained(tmp_path / "changed")
        with pytest.raises(RunError, match=r"fc\.bias"):
            ptee.load(tmp_path / "changed")
        assert ptee.load(tmp_path / "changed", backbone=copy.deepcopy(each).detach()).exits
    half = ptee.load(tmp_path / "run").half()
    with pytest.warns(
        UserWarning, match=r"save before model\.to\(torch\.float16\), and call that again after loading\.$"
    ):
        half.save_pretrained(tmp_path / "half")


def test_a_named_backbone_is_built_again_from_its_file(named):
    folder, weights = named
    loaded = ptee.load(folder)
    assert type(loaded.backbone).__name__ == "CifarResNet"
    assert loaded.num_classes == loaded.origin.num_classes == 10
    state = safetensors.torch.load_file(weights)
    assert all(torch.equal(value.cpu(), state[name]) for name, value in loaded.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [0.5, 0.5]),
        ("std", [0, 0, 0]),
        ("std", [1, 1]),
    ],
)
def test_an_input_that_no_image_can_have_is_refused_for_a_named_backbone_too(key, value, named):
    edit(named[0], f"backbone.input.{key}", value)
    refused(named[0], None, PteeError)


def test_a_file_of_weights_that_has_changed_is_noticed(named):
    folder, weights = named
    state = safetensors.torch.load_file(weights)
    state["fc.bias"] += 1
    safetensors.torch.save_file(state, weights)
    assert re.search("[0-9a-f]{16}.*[0-9a-f]{16}", refused(folder, None))


@pytest.mark.parametrize("file", ["x" * 300, "/dev/zero", "\\/host\\share"])
def test_a_place_where_no_weights_can_be_is_refused(file, named):
    edit(named[0], "backbone.source.weights", {"file": file})
    assert len(refused(named[0], None, BackboneError)) < 600


@pytest.mark.parametrize("classes", [10**6, 11])
def test_a_network_of_other_classes_than_its_weights_is_refused_before_it_takes_memory(classes, named, monkeypatch):
    monkeypatch.setattr("ptee.backbones.load.count_classes", lambda *_: pytest.fail("the network was made"))
    source = json.loads((named[0] / "config.json").read_text())["backbone"]["source"]
    with pytest.raises(BackboneError, match=rf"10 classes \(fc\.weight, fc\.bias\), the model has {classes}"):
        rebuild(source | {"num_classes": classes})


def test_a_record_of_other_classes_than_the_run_is_refused(named):
    edit(named[0], "backbone.source.num_classes", 11)
    assert "is for 10 classes, its backbone has 11." in refused(named[0], None)


def test_heads_of_other_classes_than_the_run_are_refused_before_the_network_is_built(named, monkeypatch):
    monkeypatch.setattr("ptee.model.rebuilding.rebuild", lambda *_, **__: pytest.fail("it is built"))
    edit(named[0], "backbone.source.num_classes", 10**6)
    edit(named[0], "backbone.classes", 10**6)
    assert re.search(r"'0\.logits\.weight' has shape \(10, \d+\), the head \(1000000, \d+\)", refused(named[0], None))


def test_a_file_of_weights_that_has_gone_is_named(named):
    folder, weights = named
    weights.unlink()
    assert "weights.safetensors" in refused(folder, None, BackboneError)


def test_tensors_that_are_missing_are_counted_among_those_that_there_were():
    said = difference({"a": "1", "b": "2", "c": "3"}, {"a": "1", "d": "4"})
    assert said == "tensors that are missing (2 of 3): b, c; tensors that are new (1 of 2): d"


def test_a_run_on_this_disk_that_names_a_repository_does_not_go_online(named, monkeypatch):
    monkeypatch.setattr("ptee.model.rebuilding.rebuild", lambda *_, **__: pytest.fail("it is rebuilt"))
    origin = {"tag": None, "hub": "stranger/net", "revision": "0" * 40}
    edit(named[0], "backbone.source.name", "hf-hub:stranger/net")
    edit(named[0], "backbone.source.weights", {"pretrained": origin})
    assert "'hf-hub:stranger/net'" in refused(named[0], None)


def compared() -> list[TensorDataset]:
    """Images to choose thresholds on, and to report on."""
    return [TensorDataset(torch.randn(16, *SIZE)) for _ in range(2)]


ACTS = {
    "evaluate": lambda model, _: ptee.evaluate(model, TensorDataset(torch.randn(4, *SIZE)), speed=False),
    "compare": lambda model, _: ptee.compare({"one": model}, *compared(), lines=("own",), progress=False),
    "save": lambda model, folder: model.save_pretrained(folder),
    "export": lambda model, folder: ptee.export(model, folder, mean=[0.5], std=[0.5]),
}


FOR_THE_CPU = pytest.mark.cpu("files are made on the CPU")


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """What matters has happened."""


def enough(*_: object, **__: object) -> None:
    raise Enough


@pytest.mark.parametrize("act", ["evaluate", "compare", "save", pytest.param("export", marks=FOR_THE_CPU)])
def test_weights_that_changed_after_the_heads_learned_are_told_of(act, folder, net, tmp_path, recwarn, monkeypatch):
    model = ptee.load(folder, backbone=net)
    before = net.fc.bias.clone()
    with torch.no_grad():
        net.fc.bias += 5
    with pytest.warns(
        UserWarning, match=r"^The weights of Net are not those that its heads learned from: .*fc\.bias\."
    ):
        ACTS[act](model, tmp_path / "one")
    with torch.no_grad():
        net.fc.bias.copy_(before)
    monkeypatch.setattr("ptee.deploy.export.segments", enough)  # what follows takes long
    with suppress(Enough):
        ACTS[act](model, tmp_path / "two")
    assert not any("its heads learned from" in str(warning.message) for warning in recwarn)


def test_heads_that_were_trained_on_weights_that_changed_fit_them(folder, net, tmp_path, recwarn):
    model = ptee.load(folder, backbone=net)
    with torch.no_grad():
        net.fc.bias += 5
    ptee.train(model, TensorDataset(torch.randn(8, *SIZE), torch.arange(8) % 4), epochs=1, batch_size=4)
    model.save_pretrained(tmp_path / "again")
    model.half().save_pretrained(tmp_path / "half")
    assert not any("its heads learned from" in str(warning.message) for warning in recwarn)


def test_that_weights_changed_after_the_heads_learned_is_still_known_when_the_run_is_loaded(folder, net, tmp_path):
    model = ptee.load(folder, backbone=net)
    with torch.no_grad():
        net.fc.bias += 5
    said = r"not those that its heads learned from: .*fc\.bias\."
    with pytest.warns(UserWarning, match=said):
        model.save_pretrained(tmp_path / "changed")
    again = ptee.load(tmp_path / "changed", backbone=copy.deepcopy(net))
    with pytest.warns(UserWarning, match=said):
        ACTS["evaluate"](again, None)


def test_of_a_named_network_that_changed_it_is_said_that_the_heads_do_not_fit_either(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    model = build(load_backbone("cifar_resnet8", weights=weights), exits=["layer1"])
    ptee.train(model, TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), epochs=1, batch_size=4)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    with pytest.warns(UserWarning) as found:
        model.save_pretrained(tmp_path / "run")
    said = " ".join(str(warning.message) for warning in found)
    assert "not those that it was loaded with" in said
    assert "not those that its heads learned from" in said


def test_a_network_in_another_type_that_is_converted_has_the_same_weights(net, tmp_path, recwarn):
    model = make(net=net.double())
    data = TensorDataset(torch.randn(8, *SIZE, dtype=torch.float64), torch.arange(8) % 4)
    ptee.train(model, data, epochs=1, batch_size=4)
    model.float().save_pretrained(tmp_path / "single")
    assert not any("its heads learned from" in str(warning.message) for warning in recwarn)
