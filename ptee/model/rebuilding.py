"""A saved run's networks: the backbone and the one in front of it, built as config.json says, or checked where given."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from ptee._common.errors import BackboneError, RunError
from ptee.analysis.classifier import require_runnable
from ptee.backbones.load import Backbone, InputConfig, load_backbone, rebuild
from ptee.backbones.weights import difference, tensor_hashes, weights_hash
from ptee.exits.front import FrontHead, require_small
from ptee.exits.heads import FRONT
from ptee.model.saving import Run


def upgraded(run: Run) -> Run:
    """A run with the tensor names of today.

    Raises:
        RunError: if ptee 0.1.0 saved heads in it that this version does not have.
    """
    linked = [int(name.partition(".")[0]) for name in run.tensors if re.fullmatch(r"\d+\.link\..+", name)]
    if linked:
        what = (
            f"its head at exit {min(linked)} reads the feature map of the head before, and heads of this version do not"
        )
        raise _of_an_older_version(run, what)
    layer = run.tensors.get("0.confidence.weight")
    if run.front is not None and layer is not None and layer.shape != (1, run.classes + 1):
        what = "the confidence of its front network reads that network's last features, and in this version it does not"
        raise _of_an_older_version(run, what)
    return replace(
        run, tensors={re.sub(r"^(\d+)\.trust$", r"\1.previous_weight", name): t for name, t in run.tensors.items()}
    )


def _of_an_older_version(run: Run, what: str) -> RunError:
    return RunError(f"{run.folder} was saved by ptee 0.1.0: {what}. Train it again, or load it with ptee 0.1.0.")


def check_weights(run: Run, module: nn.Module) -> None:
    """Refuse a backbone with other weights than the heads were trained on.

    Raises:
        RunError: with both hashes, and which tensors differ where that was recorded.
        BackboneError: if it is no module.
    """
    if not isinstance(module, nn.Module):
        raise BackboneError(
            f"The backbone {module!r} is no module. Give one with its weights, such as "
            "timm.create_model('resnet50', pretrained=True)."
        )
    require_runnable(module)
    found = weights_hash(module)
    if found == run.backbone_hash:
        return
    why = (
        difference(run.backbone_tensors, tensor_hashes(module))
        if run.backbone_tensors
        else "which differ was not recorded"
    )
    if why:
        raise RunError(
            f"{run.folder} was made for {run.backbone_name} with weights {run.backbone_hash[:16]}; this backbone's are "
            f"{found[:16]}: {why}. Give the backbone it was trained on, in the same number type."
        )


def front_of(run: Run, module: nn.Module | None, behind: Backbone) -> FrontHead:
    """The network of the exit at the input, of a run that has one; its weights come with the heads'.

    Args:
        run: what was read from the folder.
        module: the user's, which gets those weights; None: built as config.json says.
        behind: the backbone.

    Raises:
        RunError: if config.json tells of no exit for it, or cannot rebuild it.
        BackboneError: if it cannot be built from what config.json says.
    """
    about = run.front
    assert about is not None
    if run.heads[:1] != (FRONT,):
        raise RunError(f"{run.folder} tells of a front network, but has no exit for it. Copy the run anew.")
    if module is None:
        if about.source is None:
            raise RunError(
                f"{run.folder} has the front network {about.name}, which config.json cannot rebuild (a Python module, or "
                "random weights). Load it from Python: ptee.load(folder, front=...)."
            )
        module = rebuild(about.source, weights=False).module
    require_small(about.name, about.input["input_size"])
    found = load_backbone(module, **{key: about.input[key] for key in ("input_size", "mean", "std")})
    network = Backbone(found.module, about.name, found.num_classes, found.input, about.source)
    return FrontHead(network, behind.input, behind.num_classes)


def network_of(run: Run, backbone: nn.Module | None) -> Backbone:
    """The backbone of a run, its weights not yet checked.

    Args:
        run: what was read from the folder.
        backbone: the user's; None: built as config.json says.

    Raises:
        RunError: if config.json cannot rebuild it.
        BackboneError: if it cannot be built from what config.json says.
    """
    module, label_space = backbone, None
    if module is None:
        if run.source is None:
            raise RunError(
                f"{run.folder} was made for {run.backbone_name}, which config.json cannot rebuild (a Python module, or "
                "random weights). Load it from Python: ptee.load(folder, backbone=...)."
            )
        if run.remote and "file" in (run.source.get("weights") or {}):
            raise RunError(
                f"{run.folder} was made with a weights file on somebody's disk, which is not looked for here. "
                "Load it from Python: ptee.load(folder, backbone=...)."
            )
        rebuilt = rebuild(run.source)
        module, label_space = rebuilt.module, rebuilt.label_space
    size, mean, std = (run.input[key] for key in ("input_size", "mean", "std"))
    checked = load_backbone(module, input_size=size, mean=mean, std=std)
    return Backbone(module, run.backbone_name, checked.num_classes, InputConfig(**run.input), run.source, label_space)
