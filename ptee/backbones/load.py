"""From a name or a module to the classifier that will be frozen: its weights, its input, its number of classes.

Weights come from a file or from the library that has the name, or are random if that is asked for. Files and records are
read as data: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ptee._common.devices import made_with_values
from ptee._common.errors import Argument, BackboneError, unknown
from ptee._common.files import as_path
from ptee._common.process import alone
from ptee._common.text import printable
from ptee._common.validation import LONGEST_PATH
from ptee.analysis.classifier import TWO_LOGITS, count_classes, require_runnable
from ptee.backbones.checkpoint import Checkpoint, read_checkpoint, refusal
from ptee.backbones.library import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOST_CLASSES,
    Built,
    InputConfig,
    ModelRequest,
    checked_size,
    per_channel,
    require_interpolation,
    require_pixels,
)
from ptee.backbones.matching import find_network
from ptee.backbones.record import LIBRARIES, WEIGHTS, checked_record, rebuilding
from ptee.backbones.weights import load_weights

RESERVED_ARGS = {"num_classes", "weights", "progress", "checkpoint_path", "cache_dir"}  # ptee gives these itself
GIVE_SIZE = ("Give ", Argument("input_size", "(c, h, w)"), ".")


@dataclass(frozen=True)
class Backbone:
    """A classifier and what must be known to feed it.

    Attributes:
        module: gives logits (b, K) for images (b, c, h, w). A user's own module is the one given, in the mode and with
            the gradients that it had; a module built here is in eval mode. The caller freezes it.
        name: the name that was asked for, or the class of a user's module.
        num_classes: K.
        input: the images it expects.
        source: a record for `rebuild`, ready for JSON; None where that is impossible (a user's module, random weights).
        label_space: "imagenet-1k" where its classes are known to be those, in that order.
        note: a sentence on which tensors of a file were taken, or None if there was nothing to choose.
        architecture: `source` without weights, also if these are random.
        learnt: its weights were trained together with the heads, so that a run must keep them.
        pixels_known: the mean and std of `input` were given, or its library knows them; else ImageNet's stand in for them.
        hashes: `tensor_hashes` of the weights as they were when the exits were added, or as the run has them; None before.
        learned_from: those that the heads learned from; None before, and of a network in another type than float32.
    """

    module: nn.Module
    name: str
    num_classes: int
    input: InputConfig
    source: dict[str, Any] | None = None
    label_space: str | None = None
    note: str | None = None
    architecture: dict[str, Any] | None = None
    learnt: bool = False
    pixels_known: bool = True
    hashes: Mapping[str, str] | None = None
    learned_from: Mapping[str, str] | None = None

    @property
    def is_random(self) -> bool:
        """Whether its weights are random, as far as that is known: those of a user's module may be anything."""
        return self.source is None and self.architecture is not None

    def trained(self) -> Backbone:
        """The same, of which a run must keep the weights."""
        return replace(self, source=self.source or self.architecture, learnt=True)


@alone()
@torch.inference_mode(False)
def load_backbone(
    model: str | nn.Module,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    input_size: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    interpolation: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Backbone:
    """The classifier of that name, or the one given, tried once on two black images.

    Args:
        model: `resnet50` (timm before torchvision), `timm/NAME`, `torchvision/NAME`, timm's `NAME.TAG` and
            `hf-hub:user/repo`, or a module of one's own.
        weights: a .safetensors file, the index of several (`model.safetensors.index.json`), or what `torch.save` wrote.
            Nothing is downloaded then. Of averaged (EMA) and raw weights in one file the averaged ones are taken.
        pretrained: without a file, take the library's own weights; if false, they are random. Ignored for a module.
        num_classes: K; by default the library's, or found by running a module.
        input_size: (c, h, w); by default from the model's configuration. A model of fixed size is built for it.
        mean: per channel, or one number for all; by default from the configuration.
        std: likewise.
        interpolation: by which pictures are resized, such as "bilinear"; by default from the configuration.
        model_args: further arguments of the library's constructor.

    Raises:
        UnknownName: no library has a model of that name.
        BackboneError: it cannot be built, its weights cannot be had or do not fit, or it is no image classifier.
    """
    classes = None if num_classes is None else _checked_classes(num_classes)
    size = None if input_size is None else checked_size(input_size)
    file = None if weights is None else _recordable(as_path(weights, "weights"))
    require_model(model)
    label = model if isinstance(model, str) else type(model).__name__
    if interpolation is not None:
        require_interpolation(interpolation)
    own, args = pretrained and not file, dict(model_args or {})
    request = ModelRequest(label, label, file, own, classes, size, mean, std, args, {}, interpolation=interpolation)
    if isinstance(model, nn.Module):
        require_runnable(model)
        return _wrap(model, request)
    library, name = find_model(model)
    return _load(library, replace(request, name=name))


def require_model(model: Any) -> None:
    """Refuse what is neither a name nor a module, as a class is."""
    if not isinstance(model, str | nn.Module):
        text = f"A model is a name such as 'resnet50' or an nn.Module, not {_other_than_a_model(model)}"
        raise BackboneError(text, argument="model", value=model)


def _other_than_a_model(given: Any) -> str:
    """What it is, and where that tells what was meant, what to give."""
    if isinstance(given, type) and issubclass(given, nn.Module):
        return f"a class. Give an instance: {given.__name__}()."
    if isinstance(given, Mapping) and any(isinstance(value, torch.Tensor | Mapping) for value in given.values()):
        return "its weights. Build the network, and load them: net.load_state_dict(...)."
    return f"a {type(given).__name__}."


def _recordable(weights: Path) -> str:
    """The path, if a run may record it."""
    text = str(weights.resolve())
    if len(text) > LONGEST_PATH or printable(text) != text:
        raise refusal(
            f"{text[:LONGEST_PATH]!a:.300}",
            "cannot be recorded in a run: its path has control characters, bytes that are not UTF-8, or more than "
            f"{LONGEST_PATH:,} letters. Rename it, or move it.",
        )
    return str(weights)


def _checked_classes(given: Any) -> int:
    whole = int(given) if isinstance(given, Integral) and not isinstance(given, bool) else 0
    if 2 <= whole <= MOST_CLASSES:
        return whole
    text = f"A classifier has 2 to {MOST_CLASSES:,} classes, not {given!r:.40}. "
    two = f" {TWO_LOGITS}" * (whole == 1)
    raise BackboneError(text, "Give another ", Argument("num_classes"), ".", two, argument="num_classes", value=given)


def find_model(text: str) -> tuple[str, str]:
    """The library and its name of what a user calls NAME or LIBRARY/NAME. An unknown name gets the nearest of all."""
    prefix, _, rest = text.partition("/")
    if prefix in LIBRARIES:
        if not LIBRARIES[prefix].has_model(rest):
            raise unknown(f"{prefix} model", rest, LIBRARIES[prefix].list_names(), argument="model")
        return prefix, rest
    for name, library in LIBRARIES.items():
        if library.has_model(text):
            return name, text
    if text.endswith(WEIGHTS):
        said = f"{text!r} is a file of weights, and no network. Give the name of a network, and this as the file of its weights; a network "
        raise BackboneError(f"{said}of your own is built in Python, and loads them.", argument="model", value=text)
    every = [name for library in LIBRARIES.values() for name in library.list_names()]
    raise unknown("model", text, every, argument="model")


def _load(library: str, request: ModelRequest, saved: Checkpoint | None = None) -> Backbone:
    """The model of a library. `saved` holds tensors that will overwrite its weights."""
    for key in request.args:
        if key in RESERVED_ARGS or key.startswith("pretrained"):
            advice = ("Use ", Argument("weights"), ", ", Argument("num_classes"), " and so on.")
            text = f"{key} is not an argument of {request.label} itself. "
            raise BackboneError(text, *advice, argument="model_args", value=key)
    checkpoint = read_checkpoint(request.weights) if request.weights else None
    if checkpoint is not None:
        request = replace(request, tensors=checkpoint.names)
    if expected := checkpoint or saved:
        _require_fit(library, request, expected)
    with made_with_values():
        built = LIBRARIES[library].build(request)
    built.module.eval()
    note = None if checkpoint is None else load_weights(built.module, checkpoint)
    config = _override(built.known.input, request)
    classes = _count_classes(built.module, config, request)
    architecture, known = _record(built, library, config, classes), built.known
    space = known.label_space if known.num_classes == classes else None
    source = architecture and _with_origin(architecture, request, built)
    return Backbone(built.module, request.label, classes, config, source, space, note, architecture)


def _wrap(module: nn.Module, request: ModelRequest) -> Backbone:
    """The user's own module."""
    if request.args:
        text = " is for models given by name. Build the module with these arguments."
        raise BackboneError(Argument("model_args"), text, value=request.args)
    known = next(filter(None, (library.recognise(module) for library in LIBRARIES.values())), None)
    if known is None and request.input_size is None:
        text = f"{request.label} does not say how large its images are. "
        raise BackboneError(text, *GIVE_SIZE, argument="input_size")
    config = _override(known.input if known else InputConfig((3, 1, 1), IMAGENET_MEAN, IMAGENET_STD), request)
    note = load_weights(module, read_checkpoint(request.weights)) if request.weights else None
    classes = _count_classes(module, config, request)
    if known and known.assumed and request.input_size is None and classes != known.num_classes:
        text = f"{request.label} of {classes} classes may take any input size. "
        raise BackboneError(text, *GIVE_SIZE, argument="input_size")
    space = known.label_space if known and known.num_classes == classes else None
    pixels = known is not None or None not in (request.mean, request.std)
    return Backbone(module, request.label, classes, config, None, space, note, pixels_known=pixels)


def _require_fit(library: str, request: ModelRequest, checkpoint: Checkpoint) -> None:
    """Compare names and shapes before the network takes memory: a record may ask for a network of any size."""
    try:
        with torch.device("meta"):
            module = LIBRARIES[library].build(request).module
    except BackboneError as why:  # some constructors compute with numbers, which tensors on the meta device do not have
        if (request.num_classes or 0) > checkpoint.numbers:
            text = f"{checkpoint.file} has fewer numbers than {request.label} has classes ({request.num_classes})."
            raise BackboneError(text, argument="num_classes", value=request.num_classes) from why
        return
    find_network(checkpoint, module)


def _count_classes(module: nn.Module, config: InputConfig, request: ModelRequest) -> int:
    """K, from one pass. Another number than was asked for is refused."""
    classes = count_classes(module, config.input_size, request.label)
    if request.num_classes not in (None, classes):
        text = f"{request.label} has {classes} classes, not {request.num_classes}. "
        advice = ("Leave ", Argument("num_classes"), " out.")
        raise BackboneError(text, *advice, argument="num_classes", value=request.num_classes)
    return classes


def rebuild(
    source: Mapping[str, Any],
    weights: bool = True,
    saved: Mapping[str, torch.Tensor] | None = None,
    network: Literal["backbone", "front"] = "backbone",
) -> Backbone:
    """The backbone of a `Backbone.source`. The record may come from a stranger: each field is checked.

    Args:
        source: the record.
        weights: load its weights. If false they are random, to be overwritten by those that the run holds, or to be trained.
        saved: the tensors that are to overwrite them. A network of other shapes is refused before it takes memory.
        network: which one of the run it is, for errors.
    """
    with rebuilding(network):
        library, request = checked_record(source)
        if not LIBRARIES[library].has_model(request.name):
            raise BackboneError(f"There is no {library} model {request.name!r} in the version installed here.")
        if weights and not (request.weights or request.pretrained):
            raise BackboneError("its record names no weights.")
        fits = None if saved is None else Checkpoint(Path("the run"), {"": OrderedDict(saved)})
        return _load(library, request if weights else replace(request, weights=None, pretrained=False), fits)


def _with_origin(architecture: dict[str, Any], request: ModelRequest, built: Built) -> dict[str, Any] | None:
    """The record with where the weights come from. None if they are random."""
    if not (request.weights or request.pretrained):
        return None
    file = {"file": str(Path(request.weights).resolve())} if request.weights else {"pretrained": built.origin}
    return architecture | {"weights": file}


def _record(built: Built, library: str, config: InputConfig, classes: int) -> dict[str, Any] | None:
    """What `rebuild` reads, without weights. None if JSON cannot hold an argument."""
    record: dict[str, Any] = {
        "library": library,
        "name": built.name,
        "args": built.args,
        "num_classes": classes,
        "weights": None,
        "input": asdict(config),
    }
    try:
        return json.loads(json.dumps(record))
    except TypeError:
        return None


def _override(config: InputConfig, request: ModelRequest) -> InputConfig:
    """The configuration with what the user gives in place of its own."""
    size = request.input_size or config.input_size
    mean = per_channel("mean", request.mean, config.mean, size[0])
    std = per_channel("std", request.std, config.std, size[0])
    require_pixels(mean, std)
    return InputConfig(size, mean, std, request.interpolation or config.interpolation)
