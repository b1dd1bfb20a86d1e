"""From a name or a module to the classifier that will be frozen: its weights, its input, its number of classes.

Names are timm's or torchvision's; weights come from a file, from the hub, or are random when that is asked for.
What is read from a file or a record is data: nothing is unpickled, and no record can name more than a model can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptee._common.errors import BackboneError, PteeError, unknown
from ptee._common.process import alone
from ptee.analysis.classifier import TWO_LOGITS, count_classes, require_runnable
from ptee.backbones.quiet import building
from ptee.backbones.source import Wish, checked_record, checked_size, hub_revision, is_plain, plain, reach_hub
from ptee.backbones.weights import load_weights

IMAGENET = "imagenet-1k"  # as timm.data.ImageNetInfo calls it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HUB_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # timm's prefixes for names outside its registry
RESERVED_ARGS = {"num_classes", "weights", "progress", "checkpoint_path", "cache_dir"}  # the factories' own
OTHERWISE = "Give a file with weights=FILE, or take random weights with pretrained=False."
ON_THE_HUB = "Its configuration is on the hub: go online once, or name another model and give a file with weights=FILE."


@dataclass(frozen=True)
class InputConfig:
    """What a backbone expects to see.

    Attributes:
        input_size: (c, h, w) of one image.
        mean: (c,) subtracted from pixels in 0..1.
        std: (c,) by which the difference is divided.
        interpolation: how images are resized, "bilinear" or "bicubic" as a rule.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Backbone:
    """A classifier and what must be known to feed it.

    Attributes:
        module: gives logits (b, K) for images (b, c, h, w). A user's own module is the one he gave, in the mode and
            with the gradients he gave it; a module built here is in eval mode. `freeze` is the caller's to call.
        name: what to call it in messages: the name asked for, or the class of a user's module.
        num_classes: K.
        input: the images it expects.
        source: a record for `rebuild`, ready for JSON; None where that is impossible (a user's module, random weights).
        label_space: "imagenet-1k" where its classes are known to be those, in that order.
    """

    module: nn.Module
    name: str
    num_classes: int
    input: InputConfig
    source: dict[str, Any] | None = None
    label_space: str | None = None


@dataclass(frozen=True)
class _Built:
    """What a library gave, and under which name, arguments and origin it would give it again."""

    module: nn.Module
    name: str
    args: dict[str, Any]
    origin: dict[str, str | None]
    input: InputConfig
    classes: int | None  # of its configuration: 1000 for ImageNet-1k, and only for that


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
) -> Backbone:
    """The classifier of that name, or the one given, tried once on two black images.

    Args:
        model: `resnet50` (timm before torchvision), `timm/NAME`, `torchvision/NAME`, timm's `NAME.TAG` and
            `hf-hub:user/repo`, or a module of one's own.
        weights: a .safetensors file, or what `torch.save` wrote of a state_dict. Nothing is downloaded then.
        pretrained: take the library's own weights if no file is given; without them they are random. Ignored for a
            module.
        num_classes: K; by default the library's, or found by running a module.
        input_size: (c, h, w); by default from the model's configuration. A model of fixed size is built for it.
        mean: per channel, or one number for all; by default from the configuration.
        std: likewise.
        model_args: further arguments of the library's constructor.

    Raises:
        UnknownName: no library has a model of that name.
        BackboneError: it cannot be built, its weights cannot be had or do not fit, or it is no image classifier.
    """
    if num_classes is not None and num_classes < 2:
        one = f" {TWO_LOGITS}" if num_classes == 1 else ""
        raise BackboneError(f"A classifier has two classes or more, not {num_classes}. Give num_classes= again.{one}")
    size = None if input_size is None else checked_size(input_size)
    file = None if weights is None else str(weights)
    if not isinstance(model, str | nn.Module):
        raise BackboneError(f"A model is a name such as 'resnet50' or an nn.Module, not a {type(model).__name__}.")
    name = model if isinstance(model, str) else type(model).__name__
    wish = Wish(name, file, pretrained and not file, num_classes, size, mean, std, dict(model_args or {}))
    if isinstance(model, nn.Module):
        require_runnable(model)
        return _wrap(model, wish)
    library, name = find_model(model)
    return _load(library, replace(wish, name=name), label=model)


def find_model(text: str) -> tuple[str, str]:
    """(library, name in it) for what a user calls a model.

    Raises:
        UnknownName: if neither library has it; the message suggests the nearest of both.
    """
    from torchvision import models

    timm = _timm()
    names = {"timm": timm.list_models(), "torchvision": models.list_models(module=models)}
    prefix, _, rest = text.partition("/")
    if prefix in names:
        if not _has_model(prefix, rest):
            raise unknown(f"{prefix} model", rest, names[prefix])
        return prefix, rest
    for library in names:
        if _has_model(library, text):
            return library, text
    raise unknown("model", text, [*names["timm"], *names["torchvision"]])


def _timm() -> Any:
    """timm, knowing the CIFAR networks."""
    import timm

    import ptee.backbones.cifar_resnet  # noqa: F401 - registers them

    return timm


def _has_model(library: str, name: str) -> bool:
    """Exactly that name: timm itself would take the last part of a path, and torchvision any case of letters."""
    if library == "torchvision":
        from torchvision import models

        return name in models.list_models(module=models)
    source, colon, rest = name.partition(":")
    if colon:
        return source in HUB_SOURCES and bool(rest)
    return "/" not in name and "\\" not in name and _timm().is_model(name)


def _load(library: str, wish: Wish, label: str) -> Backbone:
    for key in wish.args:
        if key in RESERVED_ARGS or key.startswith("pretrained"):
            raise BackboneError(f"{key} is not an argument of {label} itself. Use weights=, num_classes= and so on.")
    built = (_build_timm if library == "timm" else _build_torchvision)(wish, label)
    built.module.eval()
    if wish.weights:
        load_weights(built.module, wish.weights)
    config = _override(built.input, wish)
    classes = count_classes(built.module, config.input_size, label)
    if wish.num_classes not in (None, classes):
        raise BackboneError(f"{label} has {classes} classes, not {wish.num_classes}. Leave num_classes= out.")
    source = _record(library, wish, built, config, classes)
    return Backbone(built.module, label, classes, config, source, _label_space(built.classes, classes))


def _wrap(module: nn.Module, wish: Wish) -> Backbone:
    if wish.args:
        raise BackboneError("Arguments (model_args) are for models given by name. Build the module with them.")
    known, promised = _known_input(module)
    if known is None and wish.input_size is None:
        raise BackboneError(f"{wish.name} does not say how large its images are. Give input_size=(c, h, w).")
    config = _override(known or InputConfig((3, 1, 1), IMAGENET_MEAN, IMAGENET_STD), wish)
    if wish.weights:
        load_weights(module, wish.weights)
    classes = count_classes(module, config.input_size, wish.name)
    if wish.input_size is None and _is_torchvisions(module) and classes != promised:
        raise BackboneError(f"{wish.name} of {classes} classes may take any input size. Give input_size=(c, h, w).")
    if wish.num_classes not in (None, classes):
        raise BackboneError(f"{wish.name} has {classes} classes, not {wish.num_classes}. Leave num_classes= out.")
    return Backbone(module, wish.name, classes, config, None, _label_space(promised, classes))


def _known_input(module: nn.Module) -> tuple[InputConfig | None, int | None]:
    """The input that a library promises for its module, and the classes that it promises with it."""
    note = getattr(module, "pretrained_cfg", None)
    if isinstance(note, dict):
        return _timm_input(module, getattr(module, "_model_args", {})), note.get("num_classes")
    if _is_torchvisions(module):  # nothing is noted on these, but nearly all of 1000 classes take this input
        return InputConfig((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD, "bilinear"), 1000
    return None, None


def _is_torchvisions(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torchvision.models.")


def _label_space(promised: int | None, classes: int) -> str | None:
    return IMAGENET if promised == classes == 1000 else None


def _build_timm(wish: Wish, label: str) -> _Built:
    timm = _timm()
    cfg = None if ":" in wish.name else _timm_config(wish.name)
    if wish.pretrained and cfg is not None:
        _require_trained(label, cfg.num_classes if cfg.has_weights else None, wish.num_classes)
    if cfg is not None and cfg.num_classes == 0 and wish.num_classes is None:  # before building what may be large
        raise BackboneError(f"{label} has no classifier. Give it one: num_classes=K and weights=FILE.")
    args = _timm_size(cfg, wish.input_size) | wish.args
    name, hub, pin = _timm_origin(wish, cfg)
    remedy = OTHERWISE if wish.pretrained else None
    with building(label, args, ON_THE_HUB if hub and cfg is None else remedy):
        if hub:
            reach_hub(hub)
        module = timm.create_model(name, pretrained=wish.pretrained, **pin, **args, **_random_classes(wish))
    note = module.pretrained_cfg
    if wish.pretrained and cfg is not None and note.get("tag"):
        name = f"{note['architecture']}.{note['tag']}"  # in another version of timm, the default may be another tag
    origin = {"tag": note.get("tag"), "hub": hub, "revision": hub_revision(hub) if hub else None}
    return _Built(module, name, args, origin, _timm_input(module, args), note.get("num_classes"))


def _timm_origin(wish: Wish, cfg: Any) -> tuple[str, str | None, dict[str, Any]]:
    """timm's name for the model, the hub repository where it will look, and what keeps it to the commit wished for."""
    source, colon, hub = wish.name.partition(":")
    if colon and source != "local-dir":
        hub = f"{hub.partition('@')[0]}@{wish.version}" if wish.version else hub
        return f"hf-hub:{hub}", hub, {}
    if cfg is None or not wish.pretrained or not cfg.hf_hub_id:
        return wish.name, None, {}
    if not wish.version:
        return wish.name, cfg.hf_hub_id, {}
    hub = f"{cfg.hf_hub_id}@{wish.version}"
    # another place of the weights would make timm forget that their format is special
    return wish.name, hub, {"pretrained_cfg_overlay": {"hf_hub_id": hub, "custom_load": cfg.custom_load}}


def _random_classes(wish: Wish) -> dict[str, int]:
    return {} if wish.num_classes is None or wish.pretrained else {"num_classes": wish.num_classes}


def _timm_config(name: str) -> Any:
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    try:
        return get_pretrained_cfg(name)  # None for a name that timm keeps only to forward it
    except RuntimeError:
        raise unknown("pretrained timm model", name, get_arch_pretrained_cfgs(name)) from None


def _timm_size(cfg: Any, size: tuple[int, int, int] | None) -> dict[str, Any]:
    """The arguments that build a timm model for images of another size than its configuration's."""
    if size is None or cfg is None:
        return {}
    args: dict[str, Any] = {} if size[0] == cfg.input_size[0] else {"in_chans": size[0]}
    if cfg.fixed_input_size and size[1:] != tuple(cfg.input_size[1:]):
        args["img_size"] = size[1:]
    return args


def _timm_input(module: nn.Module, args: Mapping[str, Any]) -> InputConfig:
    """timm's note on the module, with the sizes that it was really built for: the note tells of the weights' own."""
    from timm.data import resolve_model_data_config

    note = resolve_model_data_config(module)
    height, width = note["input_size"][1:]
    if args.get("img_size"):
        height, width = args["img_size"] if isinstance(args["img_size"], tuple | list) else [args["img_size"]] * 2
    size = (args.get("in_chans") or note["input_size"][0], height, width)
    mean, std = (_per_channel(key, None, note[key], size[0]) for key in ("mean", "std"))
    return InputConfig(size, mean, std, note["interpolation"])


def _build_torchvision(wish: Wish, label: str) -> _Built:
    from torchvision import models

    known = models.get_model_weights(wish.name)
    if wish.version and wish.version not in known.__members__:
        raise unknown(f"weights of {label}", wish.version, known.__members__)
    usual = known[wish.version] if wish.version else known.DEFAULT
    if wish.pretrained:
        _require_trained(label, len(usual.meta["categories"]), wish.num_classes)
    args = dict(wish.args)
    if wish.input_size and wish.name.startswith("vit_"):
        args.setdefault("image_size", wish.input_size[1])
    weights = usual if wish.pretrained else None
    with building(label, args, OTHERWISE if wish.pretrained else None):
        module = models.get_model(wish.name, weights=weights, **args, **_random_classes(wish))
    preset = usual.transforms()
    edge = getattr(module, "image_size", preset.crop_size[0])  # only ViTs have one; their default weights may differ
    config = InputConfig((3, edge, edge), tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    origin = {"tag": usual.name, "hub": None, "revision": None}
    return _Built(module, wish.name, args, origin, config, len(usual.meta["categories"]))


def _require_trained(label: str, trained: int | None, num_classes: int | None) -> None:
    """Libraries would put a random classifier in place of one of another size; exits would learn its noise."""
    if not trained:
        raise BackboneError(f"There are no pretrained weights of a classifier for {label}. {OTHERWISE}")
    if num_classes not in (None, trained):
        raise BackboneError(
            f"The pretrained classifier of {label} has {trained} classes, not {num_classes}; another would be random. "
            f"{OTHERWISE}"
        )


def rebuild(source: Mapping[str, Any], weights: bool = True) -> Backbone:
    """The backbone that a `Backbone.source` tells of. The record may come from a stranger: each field is checked.

    Args:
        source: the record.
        weights: load its weights; else they are random, to be overwritten, as those of a front network are.

    Raises:
        BackboneError: the record is not of that form, names a model or file that is not there, or cannot be followed.
    """
    try:
        library, wish = checked_record(source)
        label = wish.name if library == "timm" else f"{library}/{wish.name}"
        if not _has_model(library, wish.name):
            raise BackboneError(f"There is no {library} model {wish.name!r} in the version installed here.")
        return _load(library, wish if weights else replace(wish, weights=None, pretrained=False), label)
    except PteeError as error:
        at_command = "tell the command where its weights are (--weights FILE)"
        mend = f"Give it (backbone=), or {at_command}." if weights else "Give it from Python, to ptee.load."
        what = "backbone" if weights else "front network"
        raise BackboneError(f"The {what} cannot be rebuilt: {error} {mend}") from error


def _record(library: str, wish: Wish, built: _Built, config: InputConfig, classes: int) -> dict[str, Any] | None:
    """What `rebuild` reads; None if the weights are random, or an argument is something that JSON cannot say."""
    args = {key: plain(value) for key, value in built.args.items()}
    if not (wish.weights or wish.pretrained) or not all(map(is_plain, args.values())):
        return None
    return {
        "library": library,
        "name": built.name,
        "args": args,
        "num_classes": classes,
        "weights": {"file": str(Path(wish.weights).resolve())} if wish.weights else {"pretrained": built.origin},
        "input": {key: plain(value) for key, value in asdict(config).items()},
    }


def _override(config: InputConfig, wish: Wish) -> InputConfig:
    """`config` with what is wished for in place of its own, and as many means as there are channels."""
    size = wish.input_size or config.input_size
    mean = _per_channel("mean", wish.mean, config.mean, size[0])
    std = _per_channel("std", wish.std, config.std, size[0])
    if not all(math.isfinite(s) and s > 0 for s in std):
        raise BackboneError(f"Pixels are divided by std, so it must be positive, not {std}. Give std= again.")
    if not all(map(math.isfinite, mean)):
        raise BackboneError(f"The mean of pixels must be numbers, not {mean}. Give mean= again.")
    if not all(0 <= m <= 1 for m in mean):
        raise BackboneError(
            f"Pixels lie between 0 and 1, and so does their mean, not {mean}. Numbers of 0 to 255 divide by 255, in std= as "
            "well as in mean=."
        )
    return InputConfig(size, mean, std, config.interpolation)


def _per_channel(
    what: str, given: Sequence[float] | None, usual: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    values = tuple(float(v) for v in (usual if given is None else given))
    if len(values) == channels:
        return values
    if given is None:  # three colours' numbers for another number of channels: their average is as good as any
        return (sum(values) / len(values),) * channels
    if len(values) == 1:
        return values * channels
    raise BackboneError(f"Images of {channels} channels need {channels} numbers for {what}=, or one, not {values}.")
