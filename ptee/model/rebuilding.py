"""What a saved run needs besides its heads: backbone, front network and confidence, built as config.json says."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from ptee._common.errors import BackboneError, RunError, first_line, possible
from ptee.analysis.classifier import require_runnable
from ptee.backbones.load import Backbone, InputConfig, load_backbone, rebuild
from ptee.backbones.weights import changes, in_single_precision, weights_hash
from ptee.exits.blend import Blend
from ptee.exits.confidence import CONFIDENCES, LEARNED, Calibrated
from ptee.exits.config import FRONT
from ptee.exits.front import FrontHead, require_small
from ptee.model.run_files import record_of
from ptee.model.saving import Run, require_finite

ITS_TENSORS = "0.network."  # begins the names of the front network's tensors among those of the heads


def upgraded(run: Run) -> Run:
    """A run with today's tensor names. Refuses heads of ptee 0.1.0 that this version does not have."""
    if run.config.schema_version > 1:
        return run
    linked = [int(name.partition(".")[0]) for name in run.tensors if re.fullmatch(r"\d+\.link\..+", name)]
    if linked:
        what = (
            f"its head at exit {min(linked)} reads the feature map of the head before, and heads of this version do not"
        )
        raise _of_an_older_version(run, what)
    layer = run.tensors.get("0.confidence.weight")
    if run.config.front is not None and layer is not None and layer.shape != (1, run.config.backbone.classes + 1):
        what = "the confidence of its front network reads that network's last features, and in this version it does not"
        raise _of_an_older_version(run, what)
    return replace(
        run, tensors={re.sub(r"^(\d+)\.trust$", r"\1.previous_weight", name): t for name, t in run.tensors.items()}
    )


def _of_an_older_version(run: Run, what: str) -> RunError:
    return RunError(f"{run.folder} was saved by ptee 0.1.0: {what}. Train it again, or load it with ptee 0.1.0.")


def check_weights(run: Run, module: nn.Module) -> None:
    """Refuse a backbone with other weights than the heads were trained on; names the tensors that differ, where recorded.

    Buffers that count and on which no answer depends may differ.
    """
    if not isinstance(module, nn.Module):
        raise BackboneError(
            f"The backbone {module!r} is no module. Give one with its weights, such as "
            "timm.create_model('resnet50', pretrained=True)."
        )
    require_runnable(module)
    found = weights_hash(module)
    if found == run.config.backbone.hash:
        return
    saved = run.config.backbone_tensors
    why = changes(saved, module, run.config.backbone.input.input_size) if saved else "which differ was not recorded"
    if why:
        raise RunError(
            f"{run.folder} was made for {run.config.backbone.name} with weights {run.config.backbone.hash[:16]}; this backbone's are "
            f"{found[:16]}: {why}. Give the backbone it was trained on{_its_weights(run)}, in the same number type."
        )


def front_of(run: Run, module: nn.Module | None, behind: Backbone) -> FrontHead:
    """The front network of a run that has one, with the weights that were saved; `module` is the user's own, if given."""
    about = run.config.front
    assert about is not None
    if run.config.exits[0].head != FRONT:
        raise RunError(f"{run.folder} has a front network, but no exit for it. Copy the run again.")
    if module is None:
        source = record_of(run.folder, run.config, run.remote, front=True)
        weights = {name.removeprefix(ITS_TENSORS): t for name, t in run.tensors.items() if name.startswith(ITS_TENSORS)}
        module = rebuild(source, weights=False, saved=weights, network="front").module
    require_small(about.name, about.input.input_size)
    images = about.input
    found = load_backbone(module, input_size=images.input_size, mean=images.mean, std=images.std)
    network = Backbone(found.module, about.name, found.num_classes, found.input, about.source)
    return FrontHead(network, behind.input, behind.num_classes)


def network_of(run: Run, backbone: nn.Module | None) -> Backbone:
    """The backbone of a run, its weights not yet checked: the user's own, or built as config.json says."""
    about = run.config.backbone
    module, label_space = backbone, None
    if module is None:
        rebuilt = rebuild(
            record_of(run.folder, run.config, run.remote), weights=run.backbone is None, saved=run.backbone
        )
        module, label_space = rebuilt.module, rebuilt.label_space
        if run.backbone is not None:
            _fill(module, run)
    images = InputConfig(**about.input.model_dump())
    checked = load_backbone(module, input_size=images.input_size, mean=images.mean, std=images.std)
    known = run.config.backbone_tensors
    return Backbone(
        module,
        about.name,
        checked.num_classes,
        images,
        about.source,
        label_space,
        learnt=run.backbone is not None,
        pixels_known=about.pixels_known,
        hashes=known,
        learned_from=(run.config.learned_from or known) if in_single_precision(module) else None,
    )


def _its_weights(run: Run) -> str:
    """Where the weights of a backbone are that the user must give, if the run keeps them."""
    return (
        f", with the weights in its {run.config.backbone.weights_file} (safetensors.torch.load_model)"
        if run.backbone
        else ""
    )


def _fill(module: nn.Module, run: Run) -> None:
    assert run.backbone is not None
    built = module.state_dict()
    require_finite(run.folder, {name: value for name, value in run.backbone.items() if name in built}, built)
    try:
        module.load_state_dict(run.backbone)
    except RuntimeError as why:
        raise RunError(
            f"{run.folder}: the weights in it do not fit {run.config.backbone.name}: {first_line(why)}"
        ) from why


def blend_of(run: Run) -> Blend | None:
    """The weights of a run's blended answers, if it has some."""
    found = run.config.answers.blend
    if found is None:
        return None
    return Blend({(row.exit, row.before): row.weights for row in found.weights}, found.to_the_end)


def confidence_of(run: Run) -> tuple[str, Calibrated | None]:
    """The name of a run's confidence, and the numbers of "calibrated" if it was calibrated."""
    found = run.config.confidence
    if found is None:
        return LEARNED, None
    if found.name not in CONFIDENCES:
        raise RunError(
            f"{run.folder}: its confidence {found.name!r:.60} is not known here. If it is your own, register it first "
            f"(ptee.register_confidence).{possible(found.name, CONFIDENCES)}"
        )
    return found.name, Calibrated(found.scale, found.shift) if found.scale else None
