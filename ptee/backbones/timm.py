"""timm's models, those of `cifar_resnet` and `small_networks` among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptee._common.errors import Advice, Argument, BackboneError, unknown
from ptee.backbones.library import (
    OTHER_WEIGHTS,
    Built,
    InputConfig,
    Known,
    ModelRequest,
    building,
    checked_size,
    label_space,
    per_channel,
    require_trained,
)
from ptee.backbones.source import HUB_SOURCES, hub_revision, reach_hub

if TYPE_CHECKING:
    from torch import nn

ON_THE_HUB: Advice = (
    "Its configuration is on the hub: go online once, or name another model and give a file with ",
    Argument("weights", "FILE"),
    ".",
)


def _timm() -> Any:
    """timm, with the CIFAR networks registered."""
    import timm

    import ptee.backbones.cifar_resnet
    import ptee.backbones.small_networks  # noqa: F401 - both register them

    return timm


def list_names() -> list[str]:
    """All of timm's models, by name."""
    return _timm().list_models()


def has_model(name: str) -> bool:
    """Whether timm has a model of exactly that name. timm itself would take the last part of a path."""
    source, colon, rest = name.partition(":")
    if colon:
        return source in HUB_SOURCES and bool(rest)
    return "/" not in name and "\\" not in name and _timm().is_model(name)


def build(request: ModelRequest) -> Built:
    """The model, with timm's own weights if they are asked for."""
    cfg = None if ":" in request.name else _config(request.name)
    _require_classifier(request, cfg)
    args = _form_args(request) | _size_args(cfg, request.input_size) | request.args
    _image_size((3, 1, 1) if cfg is None else cfg.input_size, args)  # before anything large is built
    name, hub, pin = _origin(request, cfg)
    classes = {} if request.pretrained or request.num_classes is None else {"num_classes": request.num_classes}
    remedy = OTHER_WEIGHTS if request.pretrained else None
    with building(request.label, args, ON_THE_HUB if hub and cfg is None else remedy):
        if hub and hub_revision(hub) is None:
            reach_hub()
        module = _timm().create_model(name, pretrained=request.pretrained, **pin, **args, **classes)
    note = module.pretrained_cfg
    if request.pretrained and cfg is not None and note.get("tag"):
        name = f"{note['architecture']}.{note['tag']}"  # the default tag may differ in another version of timm
    origin = {"tag": note.get("tag"), "hub": hub, "revision": hub_revision(hub) if hub else None}
    return Built(module, name, args, origin, _known(module, args))


def _config(name: str) -> Any:
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    _timm()
    try:
        return get_pretrained_cfg(name)  # None for a name that timm only forwards
    except RuntimeError:
        raise unknown("pretrained timm model", name, get_arch_pretrained_cfgs(name)) from None


def _require_classifier(request: ModelRequest, cfg: Any) -> None:
    """Refuse a model that would have no classifier, before anything large is built."""
    if cfg is None:
        return
    if request.pretrained:
        require_trained(request, cfg.num_classes if cfg.has_weights else None)
    if cfg.num_classes == 0 and request.num_classes is None:
        advice = ("Give it one: ", Argument("num_classes", "K"), " and ", Argument("weights", "FILE"), ".")
        text = f"{request.label} has no classifier. "
        raise BackboneError(text, *advice, argument="model", value=request.label)


def _origin(request: ModelRequest, cfg: Any) -> tuple[str, str | None, dict[str, Any]]:
    """timm's name of the model, the hub repository of its weights, and the argument that keeps it to a record's commit."""
    (source, colon, hub), commit = request.name.partition(":"), request.origin.get("revision")
    if colon and source != "local-dir":
        hub = f"{hub.partition('@')[0]}@{commit}" if commit else hub
        return f"hf-hub:{hub}", hub, {}
    if cfg is None or not request.pretrained or not cfg.hf_hub_id:
        return request.name, None, {}
    if not commit:
        return request.name, cfg.hf_hub_id, {}
    hub = f"{cfg.hf_hub_id}@{commit}"
    # with another place of the weights, timm would forget that their format is special
    return request.name, hub, {"pretrained_cfg_overlay": {"hf_hub_id": hub, "custom_load": cfg.custom_load}}


def _form_args(request: ModelRequest) -> dict[str, Any]:
    """Some CIFAR networks have two forms. The file of weights tells which."""
    from ptee.backbones import cifar_resnet, small_networks

    if request.name in cifar_resnet.default_cfgs and cifar_resnet.shortcut_of(request.tensors) == "conv":
        return {"shortcut": "conv"}
    hidden = small_networks.hidden_of(request.tensors) if request.name.startswith("cifar_vgg") else 0
    return {"hidden": hidden} if hidden else {}


def _size_args(cfg: Any, size: tuple[int, int, int] | None) -> dict[str, Any]:
    """The arguments that build a model for images of another size than in its configuration."""
    if size is None or cfg is None:
        return {}
    args: dict[str, Any] = {} if size[0] == cfg.input_size[0] else {"in_chans": size[0]}
    if cfg.fixed_input_size and size[1:] != tuple(cfg.input_size[1:]):
        args["img_size"] = size[1:]
    return args


def _image_size(usual: Sequence[int], args: Mapping[str, Any]) -> tuple[int, int, int]:
    """(c, h, w) of the images that a model with these arguments takes; `usual` is its configuration's."""
    sides = args.get("img_size") or usual[1:]
    height_width = sides if isinstance(sides, tuple | list) else (sides, sides)
    return checked_size((args.get("in_chans") or usual[0], *height_width), "model_args")


def _known(module: nn.Module, args: Mapping[str, Any]) -> Known:
    """timm's note on the module, with the sizes that it was really built for: the note has those of the weights."""
    from timm.data import resolve_model_data_config

    note = resolve_model_data_config(module)
    size = _image_size(note["input_size"], args)
    mean, std = (per_channel(key, None, note[key], size[0]) for key in ("mean", "std"))
    classes = module.pretrained_cfg.get("num_classes")  # type: ignore[union-attr,operator]
    return Known(InputConfig(size, mean, std, note["interpolation"]), classes, label_space(classes))


def recognise(module: nn.Module) -> Known | None:
    """timm's note on a module that it built."""
    if not isinstance(getattr(module, "pretrained_cfg", None), dict):
        return None
    return _known(module, getattr(module, "_model_args", {}))
