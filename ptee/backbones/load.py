"""From a name or a module to the classifier that will be frozen: its weights, its input, its number of classes.

Names are those of a model library; weights come from a file, from the hub, or are random when that is asked for.
What is read from a file or a record is data: nothing is unpickled, and no record can name more than a model can.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptee._common.errors import BackboneError, PteeError, unknown
from ptee._common.process import alone
from ptee.analysis.classifier import TWO_LOGITS, count_classes, require_runnable
from ptee.backbones import timm, torchvision
from ptee.backbones.checkpoint import Checkpoint, read_checkpoint
from ptee.backbones.library import (
    IMAGENET,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESERVED_ARGS,
    WEIGHTS_ALONE,
    ArgumentNames,
    Built,
    InputConfig,
    Known,
    Library,
    ModelRequest,
    per_channel,
)
from ptee.backbones.matching import find_network
from ptee.backbones.source import checked_record, checked_size, is_plain, plain
from ptee.backbones.weights import YOURS, fill

__all__ = [
    "IMAGENET",
    "LIBRARIES",
    "WEIGHTS_ALONE",
    "ArgumentNames",
    "Backbone",
    "InputConfig",
    "find_model",
    "load_backbone",
    "rebuild",
]

LIBRARIES: dict[str, Library] = {"timm": timm, "torchvision": torchvision}  # a name belongs to the first that has it


@dataclass(frozen=True)
class Backbone:
    """A classifier and what must be known to feed it.

    Attributes:
        module: gives logits (b, K) for images (b, c, h, w). A user's own module is the one given, in the mode and with
            the gradients that it had; a module built here is in eval mode. The caller freezes it.
        name: what to call it in messages: the name asked for, or the class of a user's module.
        num_classes: K.
        input: the images it expects.
        source: a record for `rebuild`, ready for JSON; None where that is impossible (a user's module, random weights).
        label_space: "imagenet-1k" where its classes are known to be those, in that order.
        note: which tensors of a file of weights were taken where there was a choice, in a sentence.
    """

    module: nn.Module
    name: str
    num_classes: int
    input: InputConfig
    source: dict[str, Any] | None = None
    label_space: str | None = None
    note: str | None = None


@alone()
@torch.inference_mode(False)
def load_backbone(
    model: str | nn.Module,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    model_args: Mapping[str, Any] | None = None,
    names: ArgumentNames = YOURS,
) -> Backbone:
    """The classifier of that name, or the one given, tried once on two black images.

    Args:
        model: `resnet50` (timm before torchvision), `timm/NAME`, `torchvision/NAME`, timm's `NAME.TAG` and
            `hf-hub:user/repo`, or a module of one's own.
        weights: a .safetensors file, the index of several (`model.safetensors.index.json`), or what `torch.save` wrote.
            Nothing is downloaded then. Of averaged (EMA) and raw weights in one file the averaged ones are taken.
        pretrained: take the library's own weights if no file is given; without them they are random. Ignored for a
            module.
        num_classes: K; by default the library's, or found by running a module.
        input_size: (c, h, w); by default from the model's configuration. A model of fixed size is built for it.
        mean: per channel, or one number for all; by default from the configuration.
        std: likewise.
        model_args: further arguments of the library's constructor.
        names: what the caller calls these arguments, for messages.

    Raises:
        UnknownName: no library has a model of that name.
        BackboneError: it cannot be built, its weights cannot be had or do not fit, or it is no image classifier.
    """
    if num_classes is not None and num_classes < 2:
        one = f" {TWO_LOGITS}" if num_classes == 1 else ""
        text = f"A classifier has two classes or more, not {num_classes}. "
        raise BackboneError(
            text, *names.advice("Give another {num_classes}."), one, argument=names.num_classes, value=num_classes
        )
    size = None if input_size is None else checked_size(input_size, names.input_size)
    file = None if weights is None else str(weights)
    if not isinstance(model, str | nn.Module):
        text = f"A model is a name such as 'resnet50' or an nn.Module, not a {type(model).__name__}."
        raise BackboneError(text, argument=names.model, value=model)
    label = model if isinstance(model, str) else type(model).__name__
    own, args = pretrained and not file, dict(model_args or {})
    request = ModelRequest(label, label, file, own, num_classes, size, mean, std, args, names=names)
    if isinstance(model, nn.Module):
        require_runnable(model)
        return _wrap(model, request)
    library, name = find_model(model, names.model)
    return _load(library, replace(request, name=name))


def find_model(text: str, argument: str | None = "model") -> tuple[str, str]:
    """(library, name in it) for what a user calls a model.

    Args:
        text: a name, or LIBRARY/NAME.
        argument: what the caller calls it, for messages.

    Raises:
        UnknownName: if no library has it; the message suggests the nearest of all.
    """
    prefix, _, rest = text.partition("/")
    if prefix in LIBRARIES:
        if not LIBRARIES[prefix].has_model(rest):
            raise unknown(f"{prefix} model", rest, LIBRARIES[prefix].list_names(), argument=argument)
        return prefix, rest
    for name, library in LIBRARIES.items():
        if library.has_model(text):
            return name, text
    every = [name for library in LIBRARIES.values() for name in library.list_names()]
    raise unknown("model", text, every, argument=argument)


def _load(library: str, request: ModelRequest, saved: Checkpoint | None = None) -> Backbone:
    label, names = request.label, request.names
    for key in request.args:
        if key in RESERVED_ARGS or key.startswith("pretrained"):
            advice = names.advice("Use {weights}, {num_classes} and so on.")
            raise BackboneError(
                f"{key} is not an argument of {label} itself. ", *advice, argument=names.model_args, value=key
            )
    checkpoint = read_checkpoint(request.weights, names.weights_argument) if request.weights else None
    if checkpoint is not None:
        args = LIBRARIES[library].args_from(request.name, checkpoint.names)
        request = replace(request, args=args | request.args)
        _require_fit(library, request, checkpoint)
    elif saved is not None:
        _require_fit(library, request, saved)
    built = LIBRARIES[library].build(request)
    built.module.eval()
    note = None if checkpoint is None else _fill(built.module, request, checkpoint)
    config = _override(built.known.input, request)
    classes = _count_classes(built.module, config, request)
    source = _record(library, request, built, config, classes)
    return Backbone(built.module, label, classes, config, source, _label_space(built.known, classes), note)


def _wrap(module: nn.Module, request: ModelRequest) -> Backbone:
    names = request.names
    if request.args:
        text = " is for models given by name. Build the module with these arguments."
        raise BackboneError(*names.advice("{model_args}"), text, argument=names.model_args, value=request.args)
    known = next(filter(None, (library.recognise(module) for library in LIBRARIES.values())), None)
    if known is None and request.input_size is None:
        advice = names.advice("Give {input_size:(c, h, w)}.")
        raise BackboneError(
            f"{request.label} does not say how large its images are. ", *advice, argument=names.input_size
        )
    config = _override(known.input if known else InputConfig((3, 1, 1), IMAGENET_MEAN, IMAGENET_STD), request)
    note = None
    if request.weights:
        note = _fill(module, request, read_checkpoint(request.weights, names.weights_argument))
    classes = _count_classes(module, config, request)
    if known and known.assumed and request.input_size is None and classes != known.num_classes:
        advice = names.advice("Give {input_size:(c, h, w)}.")
        text = f"{request.label} of {classes} classes may take any input size. "
        raise BackboneError(text, *advice, argument=names.input_size)
    space = _label_space(known, classes) if known else None
    return Backbone(module, request.label, classes, config, None, space, note)


def _fill(module: nn.Module, request: ModelRequest, checkpoint: Checkpoint) -> str | None:
    """Copy the network that a file holds into the module; what there was to choose, in a sentence."""
    match = find_network(
        checkpoint, module.state_dict(), type(module).__name__, request.names, partial(_convert, module)
    )
    fill(module, match, checkpoint.file, request.names)
    return match.note


def _convert(module: nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    for library in LIBRARIES.values():
        if library.recognise(module):
            return library.convert(module, state)
    return state


def _require_fit(library: str, request: ModelRequest, checkpoint: Checkpoint) -> None:
    """Compare names and shapes before the network takes memory: a record may ask for one of any size."""
    try:
        with torch.device("meta"):
            module = LIBRARIES[library].build(request).module
    except BackboneError as why:  # some constructors compute with numbers, which nothing on the meta device has
        if (request.num_classes or 0) > checkpoint.numbers:
            text = f"{checkpoint.file} has fewer numbers than {request.label} has classes ({request.num_classes})."
            raise BackboneError(text, argument=request.names.num_classes, value=request.num_classes) from why
        return
    find_network(checkpoint, module.state_dict(), type(module).__name__, request.names, partial(_convert, module))


def _count_classes(module: nn.Module, config: InputConfig, request: ModelRequest) -> int:
    """K, from one pass; refused if another number was asked for."""
    other_size = request.names.advice("Give the size that it takes, {input_size:(c, h, w)}, or build it for this one.")
    classes = count_classes(module, config.input_size, request.label, other_size)
    if request.num_classes not in (None, classes):
        advice = request.names.advice("Leave {num_classes} out.")
        text = f"{request.label} has {classes} classes, not {request.num_classes}. "
        raise BackboneError(text, *advice, argument=request.names.num_classes, value=request.num_classes)
    return classes


def _label_space(known: Known, classes: int) -> str | None:
    return known.label_space if known.num_classes == classes else None


def rebuild(
    source: Mapping[str, Any], weights: bool = True, saved: Mapping[str, torch.Tensor] | None = None
) -> Backbone:
    """The backbone that a `Backbone.source` tells of. The record may come from a stranger: each field is checked.

    Args:
        source: the record.
        weights: load its weights; else they are random, to be overwritten, as those of a front network are.
        saved: the tensors that are to overwrite them. A network of other shapes is refused before it takes memory.

    Raises:
        BackboneError: the record is not of that form, names a model or file that is not there, or cannot be followed.
    """
    try:
        library, request = checked_record(source, LIBRARIES)
        if not LIBRARIES[library].has_model(request.name):
            raise BackboneError(f"There is no {library} model {request.name!r} in the version installed here.")
        fits = None if saved is None else Checkpoint(Path("the run"), {"": OrderedDict(saved)})
        return _load(library, request if weights else replace(request, weights=None, pretrained=False), fits)
    except PteeError as error:
        argument, what = ("backbone", "backbone") if weights else ("front", "front network")
        raise BackboneError(
            f"The {what} cannot be rebuilt: ",
            *error.parts,
            f" Give the network itself from Python, {argument}=NETWORK.",
            argument=argument,
        ) from error


def _record(
    library: str, request: ModelRequest, built: Built, config: InputConfig, classes: int
) -> dict[str, Any] | None:
    """What `rebuild` reads; None if the weights are random, or an argument is something that JSON cannot say."""
    args = {key: plain(value) for key, value in built.args.items()}
    if not (request.weights or request.pretrained) or not all(map(is_plain, args.values())):
        return None
    file = {"file": str(Path(request.weights).resolve())} if request.weights else None
    return {
        "library": library,
        "name": built.name,
        "args": args,
        "num_classes": classes,
        "weights": file or {"pretrained": built.origin},
        "input": {key: plain(value) for key, value in asdict(config).items()},
    }


def _override(config: InputConfig, request: ModelRequest) -> InputConfig:
    """`config` with what is asked for in place of its own, and as many means as there are channels."""
    names, size = request.names, request.input_size or config.input_size
    mean = _per_channel(names.mean, request.mean, config.mean, size[0])
    std = _per_channel(names.std, request.std, config.std, size[0])
    if not all(math.isfinite(s) and s > 0 for s in std):
        text = f"Pixels are divided by std, so it must be positive, not {std}. "
        raise BackboneError(text, *names.advice("Give another {std}."), argument=names.std, value=std)
    if not all(map(math.isfinite, mean)):
        text = f"The mean of pixels must be numbers, not {mean}. "
        raise BackboneError(text, *names.advice("Give another {mean}."), argument=names.mean, value=mean)
    if not all(0 <= m <= 1 for m in mean):
        advice = names.advice("Numbers of 0 to 255 divide by 255, in {std} as well as in {mean}.")
        text = f"Pixels lie between 0 and 1, and so does their mean, not {mean}. "
        raise BackboneError(text, *advice, argument=names.mean, value=mean)
    return InputConfig(size, mean, std, config.interpolation)


def _per_channel(
    argument: str | None, given: Sequence[float] | None, usual: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    values = per_channel(given, usual, channels)
    if values is None:
        text = (
            f"Images of {channels} channels need {channels} numbers for {argument}=, or one, not {tuple(given or ())}."
        )
        raise BackboneError(text, argument=argument, value=given)
    return values
