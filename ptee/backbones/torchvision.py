"""torchvision's classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptee._common.errors import unknown
from ptee.backbones.library import (
    IMAGENET,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OTHER_WEIGHTS,
    Built,
    InputConfig,
    Known,
    ModelRequest,
    building,
    label_space,
    require_trained,
)

if TYPE_CHECKING:
    from torch import nn


def list_names() -> list[str]:
    """All of torchvision's classifiers, by name."""
    from torchvision import models

    return models.list_models(module=models)


def has_model(name: str) -> bool:
    """Whether torchvision has a classifier of exactly that name. torchvision itself would ignore the case."""
    return name in list_names()


def build(request: ModelRequest) -> Built:
    """The model, with torchvision's own weights if they are asked for."""
    from torchvision import models

    published = _published(request)
    if request.pretrained:
        require_trained(request, len(published.meta["categories"]))
    args = dict(request.args)
    if request.input_size and request.name.startswith("vit_"):
        args.setdefault("image_size", request.input_size[1])
    classes = {} if request.pretrained or request.num_classes is None else {"num_classes": request.num_classes}
    with building(request.label, args, OTHER_WEIGHTS if request.pretrained else None):
        module = models.get_model(request.name, weights=published if request.pretrained else None, **args, **classes)
    origin = {"tag": published.name, "hub": None, "revision": None}
    return Built(module, request.name, args, origin, _known(module, published))


def _published(request: ModelRequest) -> Any:
    """The published weights of a record, or else the default ones."""
    from torchvision import models

    known, tag = models.get_model_weights(request.name), request.origin.get("tag")
    if tag and tag not in known.__members__:
        raise unknown(f"weights of {request.label}", tag, known.__members__)
    return known[tag] if tag else known.DEFAULT


def _known(module: nn.Module, published: Any) -> Known:
    preset, classes = published.transforms(), len(published.meta["categories"])
    edge = getattr(module, "image_size", preset.crop_size[0])  # ViTs have one, which their default weights may not have
    config = InputConfig((3, edge, edge), tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    return Known(config, classes, label_space(classes))


def recognise(module: nn.Module) -> Known | None:
    """What is assumed of a module of torchvision. Nothing is written on it, but nearly all take ImageNet's input."""
    if not type(module).__module__.startswith("torchvision.models."):
        return None
    config = InputConfig((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    return Known(config, 1000, IMAGENET, assumed=True)
