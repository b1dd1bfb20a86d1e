"""torchvision's classifiers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ptee._common.errors import unknown
from ptee.backbones.library import (
    IMAGENET,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Built,
    InputConfig,
    Known,
    ModelRequest,
    label_space,
)
from ptee.backbones.quiet import building
from ptee.backbones.source import require_trained


def list_names() -> list[str]:
    """All of torchvision's classifiers, by name."""
    from torchvision import models

    return models.list_models(module=models)


def has_model(name: str) -> bool:
    """Whether torchvision has a classifier of exactly that name: torchvision itself would take any case of letters."""
    return name in list_names()


def build(request: ModelRequest) -> Built:
    """The model, with torchvision's own weights if they are asked for.

    Raises:
        UnknownName: if a record names published weights that this version of torchvision does not have.
        BackboneError: if it cannot be built, or has no published weights of so many classes.
    """
    from torchvision import models

    usual = _published(request)
    if request.pretrained:
        require_trained(request, len(usual.meta["categories"]))
    args = dict(request.args)
    if request.input_size and request.name.startswith("vit_"):
        args.setdefault("image_size", request.input_size[1])
    random = not request.pretrained and request.num_classes is not None
    classes = {"num_classes": request.num_classes} if random else {}
    remedy = request.names.other_weights() if request.pretrained else None
    with building(request.label, args, remedy):
        module = models.get_model(request.name, weights=usual if request.pretrained else None, **args, **classes)
    origin = {"tag": usual.name, "hub": None, "revision": None}
    return Built(module, request.name, args, origin, _known(module, usual))


def _published(request: ModelRequest) -> Any:
    """The published weights that are meant: those of a record, or the default ones."""
    from torchvision import models

    known, tag = models.get_model_weights(request.name), request.origin.get("tag")
    if tag and tag not in known.__members__:
        raise unknown(f"weights of {request.label}", tag, known.__members__)
    return known[tag] if tag else known.DEFAULT


def _known(module: nn.Module, published: Any) -> Known:
    preset, classes = published.transforms(), len(published.meta["categories"])
    edge = getattr(module, "image_size", preset.crop_size[0])  # only ViTs have one; their default weights may differ
    config = InputConfig((3, edge, edge), tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    return Known(config, classes, label_space(classes))


def args_from(name: str, tensors: Collection[str]) -> dict[str, Any]:
    """Nothing: torchvision's models have one form each."""
    return {}


def recognise(module: nn.Module) -> Known | None:
    """What is assumed of a module of torchvision: nothing is written on it, but nearly all take ImageNet's input."""
    if not type(module).__module__.startswith("torchvision.models."):
        return None
    config = InputConfig((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return Known(config, 1000, IMAGENET, assumed=True)


def convert(module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same tensors: torchvision's modules read their own earlier versions."""
    return state
