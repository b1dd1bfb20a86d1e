from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ptee._common.errors import BackboneError, UnknownName
from ptee.analysis.freezing import freeze
from ptee.backbones.load import InputConfig, find_model, load_backbone, rebuild
from ptee.backbones.weights import load_weights, weights_hash

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Tiny(nn.Module):
    """A user's own classifier, with parts that tell eval mode from training and one frozen layer."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)
        self.conv.weight.requires_grad_(False)
        self.bn.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class Gives(nn.Module):
    """A module that gives what it was built with, whatever its input."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> object:
        return self.output


def one_line(refusal: pytest.ExceptionInfo) -> str:
    text = str(refusal.value)
    assert "\n" not in text
    return text


def as_it_was(module: nn.Module) -> tuple:
    return (
        [p.requires_grad for p in module.parameters()],
        [m.training for m in module.modules()],
        weights_hash(module),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()],
    )


# names, and the weights of each


@pytest.mark.parametrize(
    ("file", "name", "classes", "size", "args"),
    [
        ("mobilenetv2_100", "mobilenetv2_100", 1000, 224, {"pad_type": "same"}),
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0", 1000, 224, {}),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224", 1000, 224, {}),
        ("squeezenet1_1", "squeezenet1_1", 1000, 224, {}),
        ("cifar_resnet20", "cifar_resnet20", 10, 32, {}),
        ("cifar_resnet32", "timm/cifar_resnet32", 10, 32, {}),
        ("cifar_resnet56", "cifar_resnet56", 10, 32, {}),
    ],
)
def test_real_weights_load_and_their_record_rebuilds_them(file, name, classes, size, args, weights):
    path = weights / f"{file}.safetensors"
    backbone = load_backbone(name, weights=path, model_args=args, mean=HALF, std=[0.5])
    assert (backbone.num_classes, backbone.name) == (classes, name)
    assert backbone.input.input_size == (3, size, size)
    assert (backbone.input.mean, backbone.input.std) == (HALF, HALF)
    assert backbone.label_space == ("imagenet-1k" if classes == 1000 else None)
    stored, loaded = load_file(path), backbone.module.state_dict()
    for key, value in stored.items():
        assert torch.equal(value.to(loaded[key].dtype), loaded[key]), key
    assert all(p.dtype == torch.float32 for p in backbone.module.parameters())
    assert not any(part.training for part in backbone.module.modules())

    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert weights_hash(again.module) == weights_hash(backbone.module)
    assert (again.input, again.num_classes, again.source) == (backbone.input, classes, backbone.source)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("resnet50", ("timm", "resnet50")),
        ("timm/resnet50", ("timm", "resnet50")),
        ("torchvision/resnet50", ("torchvision", "resnet50")),
        ("squeezenet1_1", ("torchvision", "squeezenet1_1")),
        ("resnet50.a1_in1k", ("timm", "resnet50.a1_in1k")),
        ("cifar_resnet110", ("timm", "cifar_resnet110")),
        ("hf-hub:timm/resnet50.a1_in1k", ("timm", "hf-hub:timm/resnet50.a1_in1k")),
    ],
)
def test_a_name_belongs_to_timm_before_torchvision_unless_it_says_otherwise(text, found):
    assert find_model(text) == found


@pytest.mark.parametrize(
    ("text", "suggested"),
    [
        ("resnet5O", "resnet50"),
        ("squeezenet1-1", "squeezenet1_1"),
        ("cifar_resnet57", "cifar_resnet56"),
        ("torchvision/resnt50", "resnet50"),
        ("timm/squeezenet1_1", "timm model"),
        ("evil/resnet50", "evil/resnet50"),
        ("ftp:resnet50", "ftp:resnet50"),
        ("fcn_resnet50", "resnet50"),  # torchvision has it, but it is no classifier
        ("", "model ''"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_of_both_libraries(text, suggested):
    with pytest.raises(UnknownName) as refusal:
        load_backbone(text, pretrained=False)
    assert suggested in one_line(refusal)


def test_an_unknown_tag_lists_the_tags_that_there_are():
    with pytest.raises(UnknownName, match=r"resnet18\.a1_in1k"):
        load_backbone("resnet18.a9_in1k")


@pytest.mark.parametrize(
    ("name", "size", "mean", "interpolation"),
    [
        ("resnet18", 224, MEAN, "bicubic"),
        ("mobilenetv2_100", 224, MEAN, "bicubic"),
        ("cifar_resnet20", 32, MEAN, "bicubic"),
        ("torchvision/resnet18", 224, MEAN, "bilinear"),
        ("torchvision/efficientnet_b1", 240, MEAN, "bilinear"),
    ],
)
def test_the_input_is_that_of_the_models_own_configuration(name, size, mean, interpolation):
    backbone = load_backbone(name, pretrained=False)
    assert backbone.input == InputConfig((3, size, size), mean, STD, interpolation)
    assert backbone.source is None  # random weights cannot be had again


def test_random_weights_follow_the_callers_seed():
    hashes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        hashes.append(weights_hash(load_backbone("cifar_resnet20", pretrained=False).module))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "cifar_resnet20"])
def test_a_network_of_other_classes_and_size_when_its_weights_are_random(name):
    backbone = load_backbone(name, pretrained=False, num_classes=7, input_size=(3, 48, 40))
    assert (backbone.num_classes, backbone.input.input_size, backbone.label_space) == (7, (3, 48, 40), None)


def test_a_model_of_fixed_size_and_three_channels_is_built_for_the_size_asked_for():
    backbone = load_backbone("vit_tiny_patch16_224", pretrained=False, input_size=(1, 64, 64), num_classes=5)
    assert backbone.module.pos_embed.shape[1] == 1 + 16
    assert backbone.input.input_size == (1, 64, 64)
    assert backbone.input.mean == (pytest.approx(0.5),)
    assert load_backbone("torchvision/vit_b_32", pretrained=False, input_size=(3, 64, 64)).num_classes == 1000


@pytest.mark.parametrize("size", [64, (64, 64), [64, 64]])
def test_the_size_follows_from_the_models_own_arguments(size):
    args = {"img_size": size, "in_chans": 1}
    by_name = load_backbone("vit_tiny_patch16_224", pretrained=False, num_classes=5, model_args=args)
    by_module = load_backbone(timm.create_model("vit_tiny_patch16_224", num_classes=5, **args))
    assert by_name.input == by_module.input
    assert by_name.input.input_size == (1, 64, 64)


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("resnet18", {"no_such": 1}, "no_such=1.*unexpected keyword argument 'no_such'"),
        ("torchvision/resnet18", {"no_such": 1}, "no_such=1.*unexpected keyword argument 'no_such'"),
        ("cifar_resnet20", {"depth": 21}, "depth=21"),
        ("resnet18", {"checkpoint_path": "x.pth"}, "checkpoint_path is not an argument"),
        ("resnet18", {"pretrained_cfg": "a1_in1k"}, "pretrained_cfg is not an argument"),
        ("resnet18", {"num_classes": 3}, "num_classes is not an argument.*Use weights=, num_classes="),
        ("resnet18", {"features_only": True}, "a list for 2 images, not logits"),
    ],
)
def test_an_argument_that_the_constructor_does_not_take_is_refused(name, args, said):
    with pytest.raises(BackboneError, match=said) as refusal:
        load_backbone(name, pretrained=False, model_args=args)
    one_line(refusal)


def test_a_wrong_argument_is_not_taken_for_a_failed_download():
    with pytest.raises(BackboneError, match=r"no_such.*model_args="):
        load_backbone("torchvision/resnet18", model_args={"no_such": 1})


# a user's own module


def test_a_users_module_is_taken_as_it_is_and_left_as_it_was():
    module = Tiny().train()
    module.bn.eval()
    before = as_it_was(module)
    backbone = load_backbone(module, input_size=(3, 16, 16))
    assert backbone.module is module
    assert (backbone.name, backbone.num_classes, backbone.source, backbone.label_space) == ("Tiny", 4, None, None)
    assert as_it_was(module) == before


def test_a_users_module_needs_an_input_size():
    with pytest.raises(BackboneError, match=r"Tiny does not say .* input_size=\(c, h, w\)"):
        load_backbone(Tiny())


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((3, 32), "channels, height, width"),
        ((3, 0, 4), "channels, height, width"),
        ("3,8,8", "channels, height, width"),
    ],
)
def test_an_input_size_is_three_positive_numbers(size, said):
    with pytest.raises(BackboneError, match=said):
        load_backbone(Tiny(), input_size=size)


def test_a_pass_that_fails_is_told_in_one_line_and_leaves_the_module_as_it_was():
    module = Tiny()
    before = as_it_was(module)
    with pytest.raises(
        BackboneError, match=r"Tiny cannot take an image of size \(1, 16, 16\): RuntimeError"
    ) as refusal:
        load_backbone(module, input_size=(1, 16, 16))
    one_line(refusal)
    assert as_it_was(module) == before


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "gives a tuple for 2 images"),
        ({"logits": torch.zeros(2, 3)}, "gives a dict"),
        (torch.zeros(2, 3, 4), r"gives a tensor \(2, 3, 4\)"),
        (torch.zeros(1, 3), r"gives a tensor \(1, 3\)"),
        (torch.zeros(2, 1), r"gives a tensor \(2, 1\)"),
        (None, "gives a NoneType"),
    ],
)
def test_what_does_not_give_logits_is_no_classifier(output, said):
    with pytest.raises(BackboneError, match=said):
        load_backbone(Gives(output), input_size=(3, 8, 8))


@pytest.mark.parametrize("num_classes", [-1, 0, 1])
def test_fewer_than_two_classes_are_no_task(num_classes):
    with pytest.raises(BackboneError, match=f"two classes or more, not {num_classes}"):
        load_backbone("resnet18", pretrained=False, num_classes=num_classes)


def test_a_number_of_classes_that_a_module_does_not_have_is_refused():
    with pytest.raises(BackboneError, match="Tiny has 4 classes, not 5"):
        load_backbone(Tiny(), input_size=(3, 16, 16), num_classes=5)
    assert load_backbone(Tiny(), input_size=(3, 16, 16), num_classes=4).num_classes == 4


def test_arguments_for_a_module_that_is_built_already_are_refused():
    with pytest.raises(BackboneError, match="model_args"):
        load_backbone(Tiny(), input_size=(3, 16, 16), model_args={"num_classes": 3})


def test_a_timm_module_brings_its_own_input():
    import ptee.backbones.cifar_resnet  # noqa: F401 - registers them

    backbone = load_backbone(timm.create_model("cifar_resnet20"))
    assert (backbone.input.input_size, backbone.num_classes, backbone.label_space) == ((3, 32, 32), 10, None)
    assert load_backbone(timm.create_model("test_resnet")).label_space == "imagenet-1k"


def test_a_torchvision_module_is_believed_to_take_imagenets_input_only_with_its_classes():
    backbone = load_backbone(torchvision.models.squeezenet1_1())
    assert (backbone.input.input_size, backbone.label_space) == ((3, 224, 224), "imagenet-1k")
    with pytest.raises(BackboneError, match="10 classes may take any input size"):
        load_backbone(torchvision.models.squeezenet1_1(num_classes=10))


def test_a_timm_model_without_classifier_is_refused():
    with pytest.raises(BackboneError, match="ResNet has no classifier"):
        load_backbone(timm.create_model("resnet18", num_classes=0))
    with pytest.raises(BackboneError, match="vit_small_patch16_dinov3 has no classifier"):
        load_backbone("vit_small_patch16_dinov3", pretrained=False)
    with pytest.raises(BackboneError, match="no pretrained weights of a classifier for vit_small_patch16_dinov3"):
        load_backbone("vit_small_patch16_dinov3")


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5), None), (None, (1, 1)), ((0.5,) * 4, None)])
def test_means_of_another_number_than_channels_are_refused(mean, std):
    with pytest.raises(BackboneError, match="3 channels need 3 numbers"):
        load_backbone(Tiny(), input_size=(3, 16, 16), mean=mean, std=std)


@pytest.mark.parametrize("mean", [(124, 116, 104), (0.5, 0.5, -0.5)], ids=str)
def test_a_mean_that_no_pixel_has_is_refused(mean):
    with pytest.raises(BackboneError, match=r"between 0 and 1.*divide"):
        load_backbone(Tiny(), input_size=(3, 16, 16), mean=mean)


def test_a_std_of_zero_is_refused():
    with pytest.raises(BackboneError, match="must be positive"):
        load_backbone(Tiny(), input_size=(3, 16, 16), std=(0.5, 0.5, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_of_another_type_is_tried_in_its_own(dtype):
    assert load_backbone(Tiny().to(dtype), input_size=(3, 16, 16)).num_classes == 4


# weights files


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda s: s, ".pth"),
        (lambda s: s, ".safetensors"),
        (lambda s: {"state_dict": s, "epoch": 3}, ".pt"),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)}, ".th"),
        (lambda s: {"model_state_dict": s, "optimizer": {"lr": 0.1}}, ".bin"),
        (lambda s: {"state_dict": {k: 0 * v for k, v in s.items()}, "state_dict_ema": s}, ".pth"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, ".pth"),
        (lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}}, ".ckpt"),
        (lambda s: {f"model.{k}": v for k, v in s.items()}, ".safetensors"),
        (lambda s: {"state_dict": {f"net.encoder.{k}": v for k, v in s.items()}}, ".ckpt"),
        (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, ".safetensors"),
        (lambda s: {k: v.bfloat16() if v.is_floating_point() else v for k, v in s.items()}, ".pth"),
        (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, ".safetensors"),
        (lambda s: OrderedDict(s), ".SAFETENSORS"),
    ],
    ids=[
        *("plain pth", "safetensors", "state_dict", "model", "model_state_dict", "average first", "module."),
        *(
            "module._orig_mod.",
            "model.",
            "a prefix of one's own",
            "float16",
            "bfloat16",
            "no batch counters",
            "capitals",
        ),
    ],
)
def test_weights_as_they_are_found_in_the_wild_load(wrap, suffix, tmp_path):
    trained = Tiny()
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().half().float()  # so that rounding to either type changes nothing
    file = tmp_path / f"weights{suffix}"
    (save_file if suffix.lower() == ".safetensors" else torch.save)(wrap(trained.state_dict()), file)
    torch.manual_seed(1)
    fresh = Tiny()
    assert weights_hash(fresh) != weights_hash(trained)
    load_weights(fresh, file)
    assert weights_hash(fresh) == weights_hash(trained)


def test_a_prefix_that_the_model_itself_has_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Tiny()

    trained = Wrapped()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "w.pth")
    torch.manual_seed(1)
    fresh = Wrapped()
    load_weights(fresh, tmp_path / "w.pth")
    assert weights_hash(fresh) == weights_hash(trained)


def test_formats_that_depend_on_a_version_number_load_from_safetensors(tmp_path):
    trained = torchvision.models.mnasnet0_5()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("mnasnet0_5", weights=tmp_path / "w.safetensors")
    assert weights_hash(backbone.module) == weights_hash(trained)


class RunsCodeWhenUnpickled:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_would_run_code_are_refused_and_the_code_not_run(tmp_path, legacy):
    file = tmp_path / "hostile.pth"
    hostile = {"fc.bias": RunsCodeWhenUnpickled(tmp_path / "harm")}
    torch.save(hostile, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        BackboneError, match=r"hostile\.pth (holds more than weights .*mkdir|cannot be read).*run code"
    ) as refusal:
        load_backbone("cifar_resnet20", weights=file)
    one_line(refusal)
    assert not (tmp_path / "harm").exists()


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b"\x10\0\0\0\0\0\0\0not a checkpoint"),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\x80\x02garbage"),
        truncated,
    ],
    ids=["garbage", "empty", "a pickle of nothing", "cut off"],
)
def test_a_corrupt_file_is_refused_by_name(tmp_path, suffix, spoil):
    file = tmp_path / f"corrupt{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(Tiny().state_dict(), file)
    spoil(file)
    with pytest.raises(BackboneError, match=rf"corrupt\{suffix} cannot be read") as refusal:
        load_backbone("cifar_resnet20", weights=file)
    one_line(refusal)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"state_dict": {"a": 1}}, {1: torch.zeros(1)}])
def test_a_file_without_a_state_dict_is_refused_by_name(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BackboneError, match=r"other\.pth holds no state_dict"):
        load_backbone("cifar_resnet20", weights=tmp_path / "other.pth")


@pytest.mark.parametrize("file", ["missing.safetensors", "."])
def test_a_file_that_is_not_there_is_refused_by_name(tmp_path, file):
    with pytest.raises(BackboneError, match="There is no weights file"):
        load_backbone("cifar_resnet20", weights=tmp_path / file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("bn.weight"), r"lacks bn\.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "has unknown extra"),
        (lambda s: s.update({"fc.weight": torch.zeros(9, 8), "fc.bias": torch.zeros(9)}), "9 classes.*num_classes=9"),
        (
            lambda s: s.update({"conv.weight": torch.zeros(8, 1, 3, 3)}),
            r"conv\.weight \(8, 1, 3, 3\), not \(8, 3, 3, 3\)",
        ),
        (lambda s: s.update({k: torch.zeros(7, 7) for k in s}), r"conv\.weight \(7, 7\), not .* and 4 more"),
    ],
    ids=["missing", "unknown", "other classes", "other channels", "all other"],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, change, said):
    state = Tiny().state_dict()
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    torch.manual_seed(1)
    module = Tiny()
    before = weights_hash(module)
    with pytest.raises(BackboneError, match=said) as refusal:
        load_backbone(module, weights=tmp_path / "odd.pth", input_size=(3, 16, 16))
    assert "odd.pth" in one_line(refusal)
    assert weights_hash(module) == before


def test_weights_of_another_number_of_classes_say_what_to_type(tmp_path):
    save_file(timm.create_model("cifar_resnet20", num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    with pytest.raises(BackboneError, match=r"seven\.safetensors has 7 classes.*num_classes=7"):
        load_backbone("cifar_resnet20", weights=tmp_path / "seven.safetensors")
    backbone = load_backbone("cifar_resnet20", weights=tmp_path / "seven.safetensors", num_classes=7)
    assert backbone.num_classes == 7
    assert rebuild(backbone.source).num_classes == 7


# pretrained weights, from caches that look as if they had been downloaded


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub cache; gives a function that puts files into it as a repository's only commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, state: dict[str, Tensor], config: dict | None = None) -> None:
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        save_file(state, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps(config))

    return put


def test_timms_weights_come_from_the_hub_and_the_record_names_tag_and_commit(hub):
    trained = timm.create_model("test_resnet")
    hub("timm/test_resnet.r160_in1k", trained.state_dict())
    backbone = load_backbone("test_resnet")
    assert weights_hash(backbone.module) == weights_hash(trained)
    assert backbone.source["name"] == "test_resnet.r160_in1k"
    origin = {"tag": "r160_in1k", "hub": "timm/test_resnet.r160_in1k", "revision": COMMIT}
    assert backbone.source["weights"] == {"pretrained": origin}
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert weights_hash(again.module) == weights_hash(trained)
    assert again.source["weights"]["pretrained"]["revision"] == COMMIT


def test_a_hub_repository_brings_its_architecture_classes_and_input(hub):
    trained = timm.create_model("cifar_resnet20", num_classes=6)
    cfg = {"input_size": [3, 32, 32], "mean": HALF, "std": HALF, "num_classes": 6, "classifier": "fc"}
    cfg |= {"first_conv": "conv1", "interpolation": "bilinear"}
    hub(
        "someone/six", trained.state_dict(), {"architecture": "cifar_resnet20", "num_classes": 6, "pretrained_cfg": cfg}
    )
    backbone = load_backbone("hf-hub:someone/six")
    assert weights_hash(backbone.module) == weights_hash(trained)
    assert (backbone.num_classes, backbone.input) == (6, InputConfig((3, 32, 32), HALF, HALF, "bilinear"))
    assert backbone.source["weights"]["pretrained"]["revision"] == COMMIT
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert weights_hash(again.module) == weights_hash(trained)
    with pytest.raises(BackboneError, match="6 classes, not 10"):
        load_backbone("hf-hub:someone/six", num_classes=10)


def test_torchvisions_weights_come_from_its_cache_and_the_record_names_their_tag(tmp_path, monkeypatch):
    trained = torchvision.models.squeezenet1_1()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(trained.state_dict(), tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = load_backbone("squeezenet1_1")
    assert weights_hash(backbone.module) == weights_hash(trained)
    assert backbone.source["weights"]["pretrained"]["tag"] == "IMAGENET1K_V1"
    assert weights_hash(rebuild(backbone.source).module) == weights_hash(trained)


@pytest.fixture(params=["as it is", "told to unpickle"])
def environment(request, monkeypatch) -> None:
    """torch as it is, and where its user has told it to unpickle whatever it reads."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    if request.param == "told to unpickle":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def test_torchvisions_weights_that_would_run_code_are_refused_and_the_code_not_run(tmp_path, monkeypatch, environment):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    torch.save({"fc.bias": RunsCodeWhenUnpickled(tmp_path / "harm")}, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = dict(os.environ)
    with pytest.raises(BackboneError, match="squeezenet1_1 cannot be downloaded or loaded") as refusal:
        load_backbone("squeezenet1_1")
    one_line(refusal)
    assert not (tmp_path / "harm").exists()
    assert dict(os.environ) == before


def test_weights_on_the_hub_that_would_run_code_are_refused_and_the_code_not_run(
    hub, tmp_path, monkeypatch, environment
):
    cfg = {"num_classes": 6, "classifier": "fc", "first_conv": "conv1", "hf_hub_filename": "hostile.bin"}
    hub("someone/six", {}, {"architecture": "cifar_resnet20", "num_classes": 6, "pretrained_cfg": cfg})
    file = tmp_path / "hub" / "models--someone--six" / "snapshots" / COMMIT / "hostile.bin"
    torch.save({"fc.bias": RunsCodeWhenUnpickled(tmp_path / "harm")}, file)
    # as timm did before 1.0.26
    monkeypatch.setattr("timm.models._hub._torch_load", lambda file, **_: torch.load(file, weights_only=False))
    with pytest.raises(BackboneError, match="someone/six cannot be downloaded or loaded") as refusal:
        load_backbone("hf-hub:someone/six")
    one_line(refusal)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["cifar_resnet56", "resnet10t.untrained"])
def test_a_model_without_pretrained_weights_says_so(name):
    with pytest.raises((BackboneError, UnknownName)) as refusal:
        load_backbone(name)
    assert name in one_line(refusal)


@pytest.mark.parametrize(
    ("name", "num_classes"), [("resnet18", 10), ("torchvision/resnet18", 10), ("vit_base_patch14_dinov2", 10)]
)
def test_pretrained_weights_with_a_random_classifier_are_refused(name, num_classes):
    with pytest.raises(
        BackboneError, match=r"(has 1000 classes, not 10|no pretrained weights of a class).*weights=FILE"
    ):
        load_backbone(name, num_classes=num_classes)


@pytest.fixture
def deaf_proxy() -> Iterator[tuple[str, list[object]]]:
    """The address of a proxy that hangs up on everybody, and who has called."""
    calls: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):  # the server is closed
                while True:
                    connection, caller = server.accept()
                    calls.append(caller)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls


def test_the_hub_out_of_reach_is_told_in_one_line_without_many_attempts(tmp_path, deaf_proxy):
    source = """
import sys
import torch, timm, torchvision
from huggingface_hub import constants
from ptee.backbones.load import load_backbone
from ptee._common.errors import BackboneError
for offline in (False, True):
    constants.HF_HUB_OFFLINE = offline
    for name in ("resnet18", "torchvision/resnet18", "hf-hub:someone/model"):
        try:
            load_backbone(name)
        except BackboneError as error:
            print(error)
"""
    address, calls = deaf_proxy
    closed = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), address
    )
    environment = os.environ | closed | {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    names = ["resnet18", "torchvision/resnet18", "hf-hub:someone/model"] * 2
    assert len(lines) == 6
    assert (
        len(calls) <= 4
    )  # online one for each name, offline one for torchvision's; the hub's client alone tries again
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{name} cannot be downloaded")
        assert "weights=FILE" in line and ("pretrained=False" in line) == ("hub" not in name)


# freezing and hashing


def test_freezing_takes_gradients_and_train_mode_away_and_restoring_gives_them_back():
    module = Tiny().train()
    module.bn.eval()
    before = as_it_was(module)
    state = freeze(module)
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(part.training for part in module.modules())
    state.restore(module)
    assert as_it_was(module) == before


def test_a_frozen_state_survives_copies_of_itself_and_of_the_module():
    module = Tiny().train()
    before = as_it_was(module)
    state = pickle.loads(pickle.dumps(freeze(module)))
    twin = copy.deepcopy(module)
    state.restore(twin)
    assert as_it_was(twin) == before
    assert not any(p.requires_grad for p in module.parameters())


def test_the_hash_tells_any_change_of_name_type_shape_or_number():
    module = nn.Linear(2, 3)
    hashes = {weights_hash(module), weights_hash(copy.deepcopy(module).half()), weights_hash(nn.Sequential(module))}
    changed = copy.deepcopy(module)
    changed.bias.data[0] = torch.nextafter(changed.bias.data[0], torch.tensor(9.0))
    reshaped = copy.deepcopy(module)
    reshaped.weight = nn.Parameter(module.weight.data.reshape(3, 2).reshape(1, 6).reshape(2, 3))
    assert len(hashes | {weights_hash(changed), weights_hash(reshaped)}) == 5


def test_the_hash_is_the_same_for_a_copy_another_memory_format_and_other_modes():
    module = Tiny()
    want = weights_hash(module)
    assert want == weights_hash(copy.deepcopy(module))
    assert want == weights_hash(copy.deepcopy(module).to(memory_format=torch.channels_last).eval())
    assert len(want) == 64
    freeze(module)
    assert weights_hash(module) == want


def test_bfloat16_scalars_and_empty_tensors_have_a_hash():
    module = nn.BatchNorm2d(3).bfloat16()
    module.register_buffer("empty", torch.empty(0, 3))
    module.register_buffer("truth", torch.tensor(True))
    want = weights_hash(module)
    module.truth.fill_(False)
    assert weights_hash(module) != want


# records from a stranger


@pytest.fixture
def record(tmp_path) -> dict:
    """The record of a network whose weights are in a file."""
    save_file(timm.create_model("cifar_resnet20").state_dict(), tmp_path / "w.safetensors")
    return load_backbone("cifar_resnet20", weights=tmp_path / "w.safetensors").source


PRETRAINED = {"tag": None, "hub": None, "revision": None}


@pytest.mark.parametrize(
    "change",
    [
        {"library": "os"},
        {"library": ["timm"]},
        {"library": "torchvision"},  # which has no cifar_resnet20
        {"name": 3},
        {"name": "no_such_network"},
        {"name": "../resnet18"},
        {"name": "file:resnet18"},
        {"library": "torchvision", "name": "hf-hub:someone/model"},
        {"args": []},
        {"args": {"checkpoint_path": "x.pth"}},
        {"args": {"cache_dir": "x"}},
        {"args": {"pretrained_cfg": "x"}},
        {"args": {"pretrained_cfg_overlay": {"url": "http://x"}}},
        {"args": {"in_chans": {"a": 1}}},
        {"num_classes": True},
        {"num_classes": 0},
        {"num_classes": "10"},
        {"num_classes": 11},
        {"weights": None},
        {"weights": {}},
        {"weights": {"file": 3}},
        {"weights": {"file": ""}},
        {"weights": {"file": "//machine/share/w.safetensors"}},
        {"weights": {"file": "\\\\machine\\share\\w.safetensors"}},
        {"weights": {"url": "http://x"}},
        {"weights": {"pretrained": "latest"}},
        {"weights": {"pretrained": PRETRAINED | {"revision": "main"}}},
        {"weights": {"pretrained": PRETRAINED | {"tag": 1}}},
        {"weights": {"pretrained": PRETRAINED}},  # there are none
        {"input": None},
        {"input": {"input_size": [3, 32, 32]}},
        {"input": {"input_size": [3, 32], "mean": [0.5], "std": [0.5], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": ["a"], "std": [0.5], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": [], "std": [0.5], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.0], "interpolation": "bicubic"}},
        {"input": {"input_size": [3, 32, 32], "mean": [0.5], "std": [0.5], "interpolation": 2}},
        {"another": 1},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_record_that_is_not_as_it_was_written_is_refused(record, change):
    with pytest.raises(BackboneError, match="backbone=") as refusal:
        rebuild(record | change)
    one_line(refusal)


@pytest.mark.parametrize("source", [None, [], "timm", {}])
def test_what_is_no_record_is_refused(source):
    with pytest.raises(BackboneError, match="backbone="):
        rebuild(source)


def test_a_record_whose_file_is_gone_names_it_and_asks_for_the_backbone(record):
    Path(record["weights"]["file"]).unlink()
    with pytest.raises(BackboneError, match=r"no weights file .*w\.safetensors.*backbone="):
        rebuild(record)


def test_a_record_keeps_arguments_and_input(tmp_path):
    save_file(timm.create_model("test_vit", img_size=32, in_chans=1).state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(
        "test_vit", weights=tmp_path / "w.safetensors", input_size=(1, 32, 32), mean=[0.1], std=[0.2]
    )
    again = rebuild(json.loads(json.dumps(backbone.source)))
    assert again.input == backbone.input
    assert (again.input.input_size, again.input.mean, again.input.std) == ((1, 32, 32), (0.1,), (0.2,))


def test_an_argument_that_json_cannot_say_leaves_no_record(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone(
        "test_resnet", weights=tmp_path / "w.safetensors", model_args={"norm_layer": nn.BatchNorm2d}
    )
    assert backbone.source is None


@pytest.mark.parametrize(
    "model", [None, nn.Linear, [nn.Linear(2, 2)], len], ids=["None", "a class", "a list", "a function"]
)
def test_what_is_neither_a_name_nor_a_module_is_refused(model):
    with pytest.raises(BackboneError, match=r"a name such as 'resnet50' or an nn\.Module, not a"):
        load_backbone(model)
