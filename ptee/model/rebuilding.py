"""What a saved run consists of besides its heads: the backbone, the network in front of it, and the confidence."""

from __future__ import annotations

import math

from torch import nn

from ptee._common.errors import BackboneError, RunError, possible
from ptee.analysis.classifier import require_runnable
from ptee.backbones.load import Backbone, InputConfig, load_backbone, rebuild
from ptee.backbones.weights import difference, tensor_hashes, weights_hash
from ptee.exits.confidence import CALIBRATED, CONFIDENCES, LEARNED, Calibrated
from ptee.exits.front import FRONT, FrontHead, require_small
from ptee.model.saving import CONFIG, Run


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


def confidence_of(run: Run) -> tuple[str, Calibrated | None]:
    """The name of a run's confidence, and the numbers of "calibrated" if it was calibrated.

    Args:
        run: what was read from the folder.

    Raises:
        RunError: if there is no such confidence here, or its numbers cannot be.
    """
    found = run.confidence
    if found is None:
        return LEARNED, None
    if found.name not in CONFIDENCES:
        raise RunError(
            f"{run.folder}: its rows leave by the confidence {found.name!r:.60}, which is not known here. If it is one of your "
            f"own, register it first (ptee.register_confidence).{possible(found.name, CONFIDENCES)}"
        )
    if not all(map(math.isfinite, (*found.scale, *found.shift))) or not all(scale > 0 for scale in found.scale):
        raise RunError(
            f"{run.folder}: {CONFIG} has confidence.scale {list(found.scale)!r:.60} and shift {list(found.shift)!r:.60}; finite "
            "numbers belong there, with scale above 0. Copy the run anew."
        )
    if found.name == CALIBRATED and not found.scale:
        raise RunError(f"{run.folder}: {CONFIG} has no numbers for the confidence {CALIBRATED!r}. Copy the run anew.")
    return found.name, Calibrated(found.scale, found.shift) if found.scale else None
