"""How early-exit models are made: `augment` adds untrained exits, `plan` only counts them, `load` reads a saved run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptee._common.errors import BackboneError, PteeError, RunError, UnknownName, unknown
from ptee._common.process import alone, own_random_numbers
from ptee._common.validation import checked, require_arguments
from ptee.analysis.freezing import freeze
from ptee.analysis.verify import buffers_put_back, require_no_drift
from ptee.backbones.load import Backbone, load_backbone, rebuild
from ptee.backbones.weights import tensor_hashes, weights_hash
from ptee.exits.build import build_exits
from ptee.exits.front import named_front
from ptee.exits.plan import Plan
from ptee.model import saving as runs
from ptee.model.early_exit import EarlyExitModel
from ptee.model.rebuilding import blend_of, check_weights, confidence_of, front_of, network_of, upgraded
from ptee.model.run_files import read_run, record_of


def require_no_exits(model: Any) -> None:
    """Refuse an early-exit model, or what ptee.optimize made of one, where a classifier is asked for."""
    if isinstance(getattr(model, "model", model), EarlyExitModel):
        raise PteeError(
            "This model has exits already. To make others, give its backbone: ptee.augment(model.detach(), ...)."
        )


@checked
@alone()
@torch.inference_mode(False)
def augment(
    model: str | nn.Module,
    *,
    exits: str | float | Sequence[float] | Sequence[str] | None = None,
    num_exits: int | None = None,
    places_by: str = "operations",
    head: str | Sequence[str] | None = None,
    head_budget: float | Sequence[float] | None = None,
    front: str | nn.Module | None = None,
    front_weights: str | Path | None = None,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
) -> EarlyExitModel:
    """Add early exits to a trained classifier. Their heads are not trained yet: call `ptee.train` next.

    Args:
        model: a name (`resnet50`, `timm/NAME`, `torchvision/NAME`) or any nn.Module (b, c, h, w) -> (b, K).
        exits: where they stand: a rule ("pareto", "fine", "golden", "linear", "quadratic"), a list of fractions of the backbone's
            cost, or a list of module names. None: 0.03, 0.4 and 0.7 of the cost, or pareto where `num_exits` is given or
            the backbone has no room for these.
        num_exits: how many; None for as many as the rule can place, at most five.
        places_by: what a rule and fractions are shares of: "operations", or "parameters" as in EENet's thesis.
        head: "auto" for residual heads as large as their budget allows, "pool", "bnpool", "plain", "conv1", "conv2", ..., one
            of yours (`register_head`), or a residual one by name (`res-32x2-64x2`); one for all exits or one for each. With a
            + at the end (`auto+`, `conv2+`) a head builds on the logits of the exit before; if one name is given for all,
            the first head is made without the +. None: "auto".
        head_budget: what each "auto" head may cost, as a share of the backbone: one for all exits or one for each. None:
            0.15, 0.03 and 0.03 at the default places, else 0.05.
        front: a small classifier, by name or as a module, as the head of an exit at the input, before all others. Rows
            that leave there never reach the backbone. "auto": a residual head there.
        front_weights: for a front by name: a file of its weights.
        input_size: (c, h, w); None: the model's own, where it says so.
        num_classes: how many; None: found by running the model.
        pretrained: for a model by name: load its published weights.
        weights: for a model by name: a file of weights to load instead.

    Returns:
        The model in eval mode, on the backbone's device. The backbone itself is used, not a copy.

    Raises:
        PteeError: saying what is not possible, why, and what is.
    """
    require_no_exits(model)
    backbone = load_backbone(
        model, weights=weights, pretrained=pretrained, num_classes=num_classes, input_size=input_size
    )
    first = named_front(front, backbone, weights=front_weights, pretrained=pretrained)
    where = {"exits": exits, "num_exits": num_exits, "places_by": places_by}
    made = build(backbone, **where, head=head, head_budget=head_budget, front=first)
    made.heads_as_drawn = weights_hash(made.heads)
    return made


def plan(model: str | nn.Module, **options: Any) -> Plan:
    """Where exits would stand on a model and what they would cost. The model is left as it was.

    Args:
        model: as of `augment`.
        options: as of `augment`: exits, num_exits, places_by, head, head_budget, front, input_size and so on.

    Raises:
        PteeError: saying what is not possible, why, and what is.
    """
    require_arguments(augment, options, called="plan")
    with own_random_numbers(wait=False):  # a plan changes no head that is built after it
        augmented = augment(model, **options)
    augmented.detach()
    return augmented.plan


@alone()
@torch.inference_mode(False)
def build(backbone: Backbone, **options: Any) -> EarlyExitModel:
    """`augment` for a backbone that is loaded already; on failure it is left as it was. Options as of `build_exits`."""
    module, size = backbone.module, backbone.input.input_size
    if backbone.source is not None and backbone.hashes is None:
        backbone = replace(backbone, hashes=tensor_hashes(module))
    state = freeze(module)
    try:
        with buffers_put_back(module, size) as buffers:
            made, heads = build_exits(backbone, **options)
            require_no_drift(module, buffers, size)
            return EarlyExitModel(backbone, made, heads)
    finally:
        state.restore(module)


@alone()
@own_random_numbers(wait=False)  # those that heads begin with are read afterwards
@torch.inference_mode(False)
def load(
    folder: str | Path, backbone: nn.Module | None = None, front: nn.Module | None = None, **hub: Any
) -> EarlyExitModel:
    """Load a saved early-exit model.

    The exits are placed on the backbone, checked and counted again. Of the folder, only the numbers in the heads are trusted.

    Args:
        folder: what `save_pretrained` or `ptee augment --out` wrote, or "user/repo" on the hub.
        backbone: the module that gets the exits; None: built as config.json says.
        front: the front network, which gets the weights that were saved; None: built as config.json says.
        hub: for a repo: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        RunError: if a file is missing, damaged, changed, of a newer schema or outside of the folder; if the backbone's
            weights are not those that the heads were trained on; if a front network is given and the run has none.
        BackboneError: if the backbone is no module, or cannot be built as config.json says.
        UnknownName: if an argument does not exist.
    """
    known = ("revision", "token", "cache_dir", "force_download", "local_files_only")
    for name in hub.keys() - known:
        raise unknown("argument of ptee.load", name, known, first=["backbone", "front"])
    run = upgraded(runs.read(folder, **hub))
    (confidence, calibrated), blend = confidence_of(run), blend_of(run)
    if isinstance(getattr(backbone, "model", backbone), EarlyExitModel):
        text = "This model has exits already. Give its backbone: ptee.load(..., backbone=model.detach())."
        raise BackboneError(text, argument="backbone")
    if backbone is not None:
        check_weights(run, backbone)
    if front is not None and run.config.front is None:
        raise RunError(f"{folder} has no front network, but one is given. Leave out front=.")
    network = network_of(run, backbone)
    check_weights(run, network.module)
    first, rows = front_of(run, front, network) if run.config.front is not None else None, run.config.exits
    names, heads = [row.name for row in rows], [row.head for row in rows]
    with _of_run(folder):
        model = build(network, exits=names, head=heads, placed=True, saved=run.tensors, front=first)
    if [found.name for found in model.exits] != names:
        raise RunError(f"{folder} has its exits in another order than its backbone has them. Copy the run again.")
    for n, (cut, row) in enumerate(zip(model.plan.cuts, rows, strict=True)):
        if row.tensor not in (None, cut.main):
            raise RunError(
                f"{folder}: the head of exit {n} learned to read tensor {row.tensor} of what {row.name} returns, and it would get "
                f"tensor {cut.main}. Load the run with the version of ptee that made it, or train the heads again."
            )
    if model.num_classes != run.config.backbone.classes:
        raise RunError(
            f"{folder} is for {run.config.backbone.classes} classes, its backbone has {model.num_classes}. Copy the run again."
        )
    runs.fill(model.heads, run)
    torch.clear_autocast_cache()  # of an autocast around all of this: it may hold copies of the weights before
    model.calibrated, model.confidence = calibrated, confidence
    model.threshold = run.config.threshold
    model.off, model.blend = run.config.off, blend
    with _of_run(folder):
        model.answers = run.config.answers.name  # its weights may be those of other exits
    model.results, model.curve = run.config.results, run.config.curve
    model.versions = run.versions
    return model.eval()


def load_moved(run: str, weights: str | Path | None) -> EarlyExitModel:
    """`load`, with the backbone's weights from a file that is not where the run says; None: they are there."""
    if weights is None:
        return load(run)
    config, _, _, remote = read_run(run)
    return load(run, rebuild(record_of(run, config, remote, weights=Path(weights))).module)


@contextmanager
def _of_run(folder: str | Path) -> Iterator[None]:
    """Errors name the run."""
    try:
        yield
    except RunError:
        raise
    except PteeError as why:
        kind = type(why) if isinstance(why, UnknownName) else RunError
        raise kind(f"{folder}: ", *why.parts, argument=why.argument, value=why.value) from why
