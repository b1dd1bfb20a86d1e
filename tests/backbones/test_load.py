"""A name or a module becomes a classifier that is checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from tiny import Tiny, as_it_was, one_line
from torch import nn

import ptee
from ptee._common.errors import BackboneError, PteeError, UnknownName
from ptee.backbones import load
from ptee.backbones.library import Built, Known, other_words
from ptee.backbones.load import LIBRARIES, InputConfig, find_model, load_backbone, rebuild
from ptee.backbones.weights import weights_hash

HALF = (0.5, 0.5, 0.5)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", ["w\x1b[2J", "w\u202e", "/".join(["w" * 200] * 6)], ids=["escape", "turned", "long"])
def test_a_file_of_weights_that_a_run_could_not_record_is_refused(name, tmp_path):
    path = tmp_path / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(Tiny().state_dict(), path)
    with pytest.raises(BackboneError, match=r"cannot be recorded in a run: .* Rename it, or move it\.$"):
        load_backbone(Tiny(), weights=path, input_size=(3, 16, 16))


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_a_library_has_the_models_that_it_lists_and_no_others(library):
    names = library.list_names()
    assert all(library.has_model(name) for name in names[:: max(1, len(names) // 20)])
    assert not library.has_model("no_such_model")


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
        assert torch.equal(value.to(loaded[key]), loaded[key]), key
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
        ("cifar_resnet8", 32, MEAN, "bicubic"),
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
        hashes.append(weights_hash(load_backbone("cifar_resnet8", pretrained=False).module))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "cifar_resnet8"])
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
        ("cifar_resnet8", {"depth": 21}, "depth=21"),
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


def test_an_argument_that_the_constructor_does_not_take_is_no_failed_download():
    with pytest.raises(BackboneError, match=r"no_such.*model_args="):
        load_backbone("torchvision/resnet18", model_args={"no_such": 1})


@pytest.mark.parametrize(
    ("name", "num_classes", "said"),
    [
        ("cifar_resnet56", None, r"no pretrained weights of a classifier for cifar_resnet56.*weights=FILE"),
        ("resnet10t.untrained", None, "resnet10t.untrained"),
        ("resnet18", 10, r"resnet18 has 1000 classes, not 10.*weights=FILE"),
        ("torchvision/resnet18", 10, r"resnet18 has 1000 classes, not 10.*weights=FILE"),
        ("vit_base_patch14_dinov2", 10, r"no pretrained weights of a classifier for vit_base.*weights=FILE"),
        ("vit_small_patch16_dinov3", None, "no pretrained weights of a classifier for vit_small_patch16_dinov3"),
    ],
)
def test_without_published_weights_of_these_classes_it_is_said_what_to_give(name, num_classes, said):
    with pytest.raises((BackboneError, UnknownName), match=said) as refusal:
        load_backbone(name, num_classes=num_classes)
    one_line(refusal)


@pytest.mark.parametrize(
    "num_classes",
    [20_000_000, 10**10, 1, 0, -3, True, 10.0, "10", [10], np.array([1, 2]), torch.ones(2), np.float32(1)],
    ids=repr,
)
def test_a_number_of_classes_that_no_classifier_has_is_refused_before_any_work(num_classes, monkeypatch):
    monkeypatch.setattr(load, "_load", lambda *_: pytest.fail("the model was built"))
    said = r"^A classifier has 2 to 1,000,000 classes, not .*\. Give another num_classes="
    with pytest.raises(BackboneError, match=said) as refusal:
        load_backbone("cifar_resnet8", pretrained=False, num_classes=num_classes)
    assert refusal.value.argument == "num_classes"
    assert refusal.value.value is num_classes


@pytest.mark.parametrize("how", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_weights_with_which_a_network_fails_are_named(how):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    network[2].weight = nn.Parameter(getattr(network[2].weight.data.cpu(), how)(), requires_grad=False)
    with pytest.raises(BackboneError, match=r"stored in a sparse or packed way \(2\.weight\).*weight\.to_dense\(\)\.$"):
        ptee.augment(network, exits=["0"], input_size=(3, 8, 8))


def test_a_users_module_is_taken_as_it_is_and_left_as_it_was():
    module = Tiny().train()
    module.bn.eval()
    before = as_it_was(module)
    backbone = load_backbone(module, input_size=(3, 16, 16))
    assert backbone.module is module
    assert (backbone.name, backbone.num_classes, backbone.source, backbone.label_space) == ("Tiny", 4, None, None)
    assert as_it_was(module) == before


def test_a_pass_that_fails_is_told_in_one_line_and_leaves_the_module_as_it_was():
    module = Tiny()
    before = as_it_was(module)
    said = r"Tiny cannot take an image of size \(1, 16, 16\): RuntimeError"
    with pytest.raises(BackboneError, match=said) as refusal:
        load_backbone(module, input_size=(1, 16, 16))
    one_line(refusal)
    assert as_it_was(module) == before


def test_a_timm_module_brings_its_own_input():
    import ptee.backbones.cifar_resnet  # noqa: F401 - registers them

    backbone = load_backbone(timm.create_model("cifar_resnet8"))
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"input_size": None}, r"Tiny does not say .* input_size=\(c, h, w\)"),
        ({"input_size": (3, 32)}, "channels, height, width"),
        ({"input_size": (3, 0, 4)}, "channels, height, width"),
        ({"input_size": (3, 8, True)}, "channels, height, width"),
        ({"input_size": (3, 8.0, 8)}, "channels, height, width"),
        ({"input_size": "3,8,8"}, "channels, height, width"),
        ({"num_classes": -1}, "2 to 1,000,000 classes, not -1"),
        ({"num_classes": 0}, "2 to 1,000,000 classes, not 0"),
        ({"num_classes": 1}, "2 to 1,000,000 classes, not 1.*One logit"),
        ({"num_classes": 5}, "Tiny has 4 classes, not 5"),
        ({"model_args": {"num_classes": 3}}, "model_args= is for models given by name"),
        ({"mean": (0.5, 0.5)}, r"3 channels need 3 numbers for mean=, or one, not \(0\.5, 0\.5\)\."),
        ({"std": (1, 1)}, "3 channels need 3 numbers for std="),
        ({"mean": (124, 116, 104)}, "between 0 and 1.*divide by 255"),
        ({"mean": (0.5, 0.5, -0.5)}, "between 0 and 1"),
        ({"mean": float("nan")}, "between 0 and 1"),
        ({"std": (0.5, 0.5, 0)}, "must be positive"),
        ({"std": 0}, "must be positive"),
        ({"input_size": (1, 16, 16), "mean": (0.5, 0.5)}, r"1 channel need 1 number for mean=, not \(0\.5, 0\.5\)\."),
        ({"mean": "grey"}, r"^mean= takes a number, or one for each channel, not 'grey'\.$"),
        ({"mean": torch.tensor(0.5)}, r"^mean= takes a number, or one for each channel, not tensor"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_users_module_is_refused(given, said):
    with pytest.raises(BackboneError, match=said) as refusal:
        load_backbone(Tiny(), **{"input_size": (3, 16, 16)} | given)
    one_line(refusal)
    (argument,) = set(given) - {"input_size"} or {"input_size"}
    assert refusal.value.argument == argument


def test_an_input_size_of_numpy_s_numbers_is_one_of_whole_numbers():
    size = load_backbone(Tiny(), input_size=tuple(np.array([3, 16, 16]))).input.input_size
    assert size == (3, 16, 16)
    assert [type(side) for side in size] == [int] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_of_another_type_is_tried_in_its_own(dtype):
    assert load_backbone(Tiny().to(dtype), input_size=(3, 16, 16)).num_classes == 4


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Tiny, r"not a class\. Give an instance: Tiny\(\)\.$"),
        (Tiny().state_dict(), r"load them: net\.load_state_dict\(\.\.\.\)\.$"),
    ],
    ids=["class", "weights"],
)
def test_where_it_is_clear_what_was_meant_the_refusal_says_what_to_give(model, said):
    with pytest.raises(BackboneError, match=said):
        ptee.augment(model)


@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Linear(2, 2)], len], ids=["None", "class", "list", "function"])
def test_what_is_neither_a_name_nor_a_module_is_refused(model):
    with pytest.raises(BackboneError, match=r"a name such as 'resnet50' or an nn\.Module, not a"):
        load_backbone(model)


class ThirdLibrary:
    """A library of one network, `tiny`."""

    def list_names(self):
        return ["tiny"]

    def has_model(self, name):
        return name == "tiny"

    def build(self, request):
        known = Known(InputConfig((3, 16, 16), HALF, HALF), 4, "four things")
        return Built(Tiny(request.num_classes or 4), "tiny", {}, {"tag": None, "hub": None, "revision": None}, known)

    def recognise(self, module):
        return None


def test_a_third_library_is_one_entry_in_the_list(monkeypatch, tmp_path):
    monkeypatch.setitem(LIBRARIES, "third", ThirdLibrary())
    torch.save(Tiny().state_dict(), tmp_path / "w.pth")
    backbone = load_backbone("third/tiny", weights=tmp_path / "w.pth")
    assert (backbone.num_classes, backbone.input.input_size, backbone.label_space) == (4, (3, 16, 16), "four things")
    assert weights_hash(rebuild(backbone.source).module) == weights_hash(backbone.module)
    with pytest.raises(UnknownName, match="Did you mean 'tiny'"):
        load_backbone("third/tini")


@pytest.mark.parametrize("name", ["net.pth", "/tmp/some where/net.safetensors"])
def test_a_file_of_weights_in_place_of_a_network_is_called_what_it_is(name):
    said = rf"^'{name}' is a file of weights, and no network\. Give the name of a network, and this as .* Python"
    with pytest.raises(BackboneError, match=said):
        load_backbone(name)
    with pytest.raises(BackboneError, match=said), other_words({"weights": f"static={name}"}):
        load_backbone(name)


@pytest.mark.parametrize(
    ("wish", "argument", "value"),
    [
        ({"num_classes": 7, "pretrained": True}, "num_classes", 7),
        ({"mean": (124, 116, 104)}, "mean", (124.0, 116.0, 104.0)),
        ({"weights": "none.pth"}, "weights", "none.pth"),
        ({"model": "resnet5O"}, "model", "resnet5O"),
        ({"model_args": {"checkpoint_path": "x"}}, "model_args", "checkpoint_path"),
    ],
    ids=str,
)
def test_an_error_carries_the_argument_and_its_value(wish, argument, value):
    with pytest.raises(PteeError) as refusal:
        load_backbone(**{"model": "resnet18", "pretrained": False} | wish)
    assert (refusal.value.argument, refusal.value.value) == (argument, value)


FRONT = {"model": "front", "weights": "w", "input_size": "size"}


def test_pictures_are_resized_as_it_is_asked_for_also_when_the_record_is_rebuilt(tmp_path):
    network = load_backbone("cifar_resnet8", pretrained=False)
    torch.save(network.module.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone("cifar_resnet8", weights=tmp_path / "w.pth", interpolation="nearest")
    assert (network.input.interpolation, backbone.input.interpolation) == ("bicubic", "nearest")
    assert rebuild(backbone.source).input == backbone.input
    with pytest.raises(PteeError, match=r"Unknown interpolation 'bilinar'\. Did you mean 'bilinear'"):
        load_backbone("cifar_resnet8", pretrained=False, interpolation="bilinar")


@pytest.mark.parametrize(
    ("names", "given", "said", "argument"),
    [
        (FRONT, {"model": "cifar_resnet8", "weights": "x.pth"}, r"no weights file x\.pth", "w"),
        (FRONT, {"model": "cifar_resnet8"}, r"Give another front=, or a file of its weights: w=FILE\.$", "front"),
        (FRONT, {"model": Tiny(), "input_size": (4, 32, 32)}, r"Give the size .*, size=\(c, h, w\)", None),
        (
            {"weights": "static=tiny"},
            {"model": "cifar_resnet8"},
            r"Give a file of its weights: static=tiny=FILE\.$",
            None,
        ),
    ],
    ids=["another name", "advice that the caller cannot follow", "advice that it can follow", "weights alone"],
)
def test_an_error_names_what_its_caller_can_type(names, given, said, argument):
    with pytest.raises(BackboneError, match=said) as refusal, other_words(names):
        load_backbone(**given)
    assert refusal.value.argument == argument
