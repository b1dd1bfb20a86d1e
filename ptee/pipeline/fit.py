"""From a backbone and images to a saved early-exit model: exits, training, calibration, thresholds, results.

`fit` does from Python what `ptee augment` does on the command line; both are `fit_backbone` with the same recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptee._common.devices import of_main_process, require_launch, resolve_device
from ptee._common.errors import Argument, Interrupted, PteeError, warn
from ptee._common.files import to_json
from ptee._common.process import own_random_numbers
from ptee._common.progress import Log, silent
from ptee._common.validation import checked_with
from ptee.analysis.freezing import device_of
from ptee.backbones.load import Backbone, load_backbone, rebuild, require_model
from ptee.data.labels import describe_labels
from ptee.data.splits import Data, Unseen, copied, parts_for_tuning, without_images
from ptee.evaluation.results import SPEED_SECONDS, about_speed, evaluate
from ptee.exits.config import LEARNED, require_confidence
from ptee.exits.front import named_front
from ptee.exits.plan import TimesOfModules
from ptee.model import run_files
from ptee.model.build import build, require_no_exits
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline.images import (
    carried_out,
    described_change,
    for_training,
    from_data_sets,
    hardly_learned,
    has_labels,
    image_size,
    images_of_each,
    labels_of,
    recipe_for,
    undoubted,
)
from ptee.pipeline.recipe import PATHS, RECIPE_FILE, Recipe, make_recipe
from ptee.pipeline.recorded import folder_of_fit, or_anew, require_same_training
from ptee.pipeline.run_folder import (
    NOTHING_KEPT,
    forget_training,
    interrupted,
    is_main_process,
    kept_times,
    or_nothing_kept,
    replaced,
    sole_writer,
    take_over,
    unreadable_named,
    with_checkpoint,
)
from ptee.timing.backbone import time_of_modules
from ptee.timing.measure import measure, require_executor
from ptee.timing.settings import AUTO, FILE
from ptee.timing.times import Times
from ptee.training.calibration import calibrate
from ptee.training.config import JOINT, passes
from ptee.training.history import Epoch, History
from ptee.training.tracking import tracked
from ptee.training.trainer import resolve_config, run_training
from ptee.tuning.config import TIME, Target
from ptee.tuning.guarantee import require_images, require_unwatched
from ptee.tuning.reachable import require_labels, require_reachable
from ptee.tuning.solution import Solution
from ptee.tuning.tune import choose_thresholds, describe_outcome


@dataclass(frozen=True)
class Job:
    """How a fit is run. Nothing here changes the model that comes out."""

    out: Path | None = None  # folder of the run; None to save nothing
    device: str | torch.device | None = None  # None: a GPU if there is one
    num_workers: int = 0  # processes that load images
    resume: bool = False  # go on with the interrupted training in `out`
    speed: bool = False  # measure images per second, too
    log: Log = silent  # gets every message to the user
    again: str = ""  # what to type after an interruption
    overwrite: bool = False  # replace the run in `out`
    speed_seconds: float = SPEED_SECONDS  # about how long measuring the speed may take
    explain: bool = False  # add the legend to the table of results
    tracker: str | None = None  # that notes each epoch, of `TRACKERS`


@checked_with(PATHS)
@own_random_numbers()
def fit(
    model: str | nn.Module,
    train_data: Any,
    val_data: Any = None,
    *,
    calibration_data: Any = None,
    recipe: Any = None,
    out: str | Path | None = None,
    num_classes: int | None = None,
    input_size: tuple[int, int, int] | None = None,
    pretrained: bool = True,
    weights: str | Path | None = None,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    speed: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    log: Log | None = None,
    **changes: Any,
) -> EarlyExitModel:
    """Add early exits to a classifier: place them, train their heads, choose thresholds, measure, save.

    The steps, the settings and the numbers are those of `ptee augment`, except that speed is measured only on request. The
    caller's random numbers of torch go on as if `fit` had not been called.

    Args:
        model: a name (`resnet50`, `timm/NAME`, `torchvision/NAME`) or any nn.Module from images (b, c, h, w) to logits (b, K).
            A module is used itself, not copied. It stays frozen, unless the recipe says `backbone="joint"`: then it learns with the
            heads, and the run keeps its weights.
        train_data: a map-style data set of (image (c, h, w), label) or (image,), for the heads. It gives the images as the backbone
            takes them: of its size, and normalised.
        val_data: other images, for the report. None: a tenth of the training images.
        calibration_data: other images, for the thresholds. None: one half of `val_data`, or a tenth of the training images.
        recipe: the name of a built-in recipe ("ptee", "pteenet", "eenet", "branchynet", "ztw"; with a backbone that learns, too,
            "eenet-joint", "branchynet-joint", "db-joint"), a YAML file, or a `Recipe`.
        out: a folder for the run. None: nothing is saved.
        num_classes: K, if the model does not say.
        input_size: (c, h, w). None: the model's own; for a module, that of the first training image.
        pretrained: for a name: load its published weights; if false, they are random, drawn by the recipe's seed where they learn.
        weights: for a name: a file of weights instead.
        device: None: a GPU if there is one.
        num_workers: processes that load images.
        speed: measure images per second beside the bare backbone.
        overwrite: replace the run in `out`.
        resume: go on with the interrupted training in `out`.
        log: a function that gets the messages, such as `print`.
        changes: settings of the recipe by name: `epochs=20`, `head="pool"`, `max_drop=0.01`, `seed=1`, or `cost="time",
            at_batch=32` for thresholds by measured seconds. `ptee recipe ptee` on the command line lists them all.

    Returns:
        The model in eval mode with its thresholds set. `model.results` holds the measurements; `log=print` shows them as tables.
            Without a log, a target that was missed and exits that do not pay are warnings.

    Raises:
        PteeError: naming the argument or setting that is not possible, and what is.
        Interrupted: on Ctrl-C (a KeyboardInterrupt), with a sentence about what was kept.
    """
    require_launch(device)
    require_no_exits(model)
    require_model(model)  # before a word about the data
    chosen = make_recipe(recipe, {name: value for name, value in changes.items() if value is not None})
    chosen.thresholds.require_used([name for name, value in changes.items() if value is not None])
    folder = folder_of_fit(out, overwrite=overwrite, resume=resume)
    if resume and folder is not None:
        require_same_training(folder, chosen)
    again = f"Call ptee.fit again with resume=True{' and without overwrite' * overwrite}."
    job = Job(folder, device, num_workers, resume, speed, log or silent, again, overwrite)
    with or_nothing_kept(folder, resume=resume, overwrite=overwrite, again=again):
        data = from_data_sets(train_data, val_data, calibration_data, seed=chosen.seed)
        found = image_size(train_data)
        if input_size is None and isinstance(model, nn.Module):
            input_size = found
        backbone = load_backbone(
            model, weights=weights, pretrained=pretrained, num_classes=num_classes, input_size=input_size
        )
        labels = undoubted(labels_of(data, backbone, resolve_device(device)), chosen)
        if input_size is not None and found != (size := tuple(backbone.input.input_size)):
            text = f", and the first image of train_data has the size {found}. Give that, or resize the images."
            raise PteeError(Argument("input_size", str(size)), text, value=input_size)
        adapted = for_training(recipe_for(labels, chosen), data)
        words = describe_labels(labels) + described_change(chosen, adapted)
        (log or (warn if labels.doubt or labels.gap else silent))(words)
        return fit_backbone(backbone, data, adapted, job)


def weights_taken(backbone: Backbone, model: EarlyExitModel) -> list[str]:
    """A sentence on each file of weights, of the backbone and of the front network, in which there was something to choose."""
    networks = (backbone, getattr(model.heads[0], "origin", None))
    return [network.note for network in networks if network is not None and network.note]


def fit_backbone(backbone: Backbone, data: Data, recipe: Recipe, job: Job) -> EarlyExitModel:
    """`fit` for a backbone and images that are loaded already."""
    recipe = recipe.resolved()
    backbone = _seeded(backbone, recipe)
    job = replace(job, device=resolve_device(job.device))
    times = _times_to_place_by(backbone, recipe, job)
    model, target = checked_model(backbone, data, recipe, times)
    for words in weights_taken(backbone, model):
        job.log(f"{words}\n")
    job.log(f"{data.described(target is not None)}\n\n{model.plan}\n" + f"{model.plan.legend}\n" * job.explain)
    for words in filter(None, (copied(data), without_images(data, backbone.num_classes))):
        warn(words) if job.log is silent else job.log(f"Warning: {words}\n")
    if words := replaced(job.out, job.overwrite):
        job.log(f"{words}\n")
    with (
        sole_writer(job.out, overwrite=job.overwrite, resume=job.resume),
        unreadable_named(data, job.out, job.overwrite),
    ):
        try:
            return _fit(model, data, target, recipe, job, times)
        except BaseException:
            model.detach()  # nobody gets the model, and who keeps the error would keep it
            raise


def _seeded(backbone: Backbone, recipe: Recipe) -> Backbone:
    """The backbone. Random weights that are to learn are drawn by the recipe's seed, so that the run can be repeated and resumed."""
    if recipe.backbone != JOINT or backbone.source is not None or backbone.architecture is None:
        return backbone
    with own_random_numbers(recipe.seed):
        return replace(backbone, module=rebuild(backbone.architecture, weights=False).module)


def _fit(
    model: EarlyExitModel, data: Data, target: Target | None, recipe: Recipe, job: Job, placed_by: TimesOfModules | None
) -> EarlyExitModel:
    wanted, recipe = recipe, carried_out(recipe, data)
    for_heads, for_confidence = images_of_each(data, wanted, recipe, job.log)
    complete: list[Epoch] = []
    try:
        history = _train(model, for_heads, recipe, job, complete, placed_by)
        if not is_main_process():
            return model
        model.results = (model.results or {}) | {"data": data.record}
        _set_confidence(model, for_confidence, recipe, job)
        times = _measured_pieces(model, recipe, job)
        report, outcome = _set_thresholds(model, data, target, recipe, job, times)
        _save(model, history, recipe, job, times)  # before the measurement, which may take long
    except KeyboardInterrupt as why:
        raise interrupted(
            job.out, complete[-1].number if complete else 0, resume=job.resume, overwrite=job.overwrite, again=job.again
        ) from why
    try:
        doubts = _measure(model, report, outcome, recipe, job, without_images(data, model.num_classes))
        _save(model, history, recipe, job, times)
    except KeyboardInterrupt as why:
        words = f"The run in {job.out} is complete but for its results. {job.again}".rstrip()
        raise Interrupted(NOTHING_KEPT if job.out is None else words) from why
    if job.out is not None:
        forget_training(job.out)
        job.log(f"\nSaved in {job.out}")
    for sentence in doubts if job.log is silent else ():  # else it was said
        warn(sentence)  # at the end: where warnings are errors, the run is whole
    return model


def _times_to_place_by(backbone: Backbone, recipe: Recipe, job: Job) -> TimesOfModules | None:
    """The times that the exits are placed by, if seconds count: of the first process, or those that an interrupted training began with."""
    if (how := recipe.thresholds).cost != TIME:
        return None
    require_executor(how.executor, resolve_device(job.device))

    def measured() -> TimesOfModules:
        if job.out is not None and job.resume and (kept := kept_times(job.out)) is not None:
            return kept
        job.log(f"The backbone is measured up to each module in batches of {how.at_batch} on {job.device}.\n")
        return time_of_modules(backbone, resolve_device(job.device), how.at_batch)

    return of_main_process(measured, job.device)


def checked_model(
    backbone: Backbone, data: Data, recipe: Recipe, times: TimesOfModules | None = None
) -> tuple[EarlyExitModel, Target | None]:
    """The model with untrained heads, and the target of its thresholds. Refuses whatever cannot work before any training.

    `times`: as of `build_model`.

    Raises:
        PteeError: naming the setting.
    """
    recipe, labelled = recipe.resolved(), has_labels(data)
    target = recipe.thresholds.target(labelled)
    require_confidence(recipe.confidence.name)
    model = build_model(backbone, recipe, times)
    try:
        if target is not None:
            parts = parts_for_tuning(Unseen(data.source, data, data.validation, recipe.seed))
            require_labels(target, labelled)
            how = recipe.thresholds
            if parts.calibration is data.calibration:  # which the training watches
                require_unwatched(target, how.confidence, recipe.training.patience)
            require_images(target, how.confidence, len(parts.calibration), each_exit=how.each_exit)
            require_reachable(target, model.plan.least_cost, recipe.thresholds.margin)
        elif recipe.thresholds.threshold is not None:
            model.threshold = recipe.thresholds.threshold
        resolve_config(recipe.training, model, data.train)
    except BaseException:
        model.detach()
        raise
    return model, target


def build_model(backbone: Backbone, recipe: Recipe, times: TimesOfModules | None = None) -> EarlyExitModel:
    """A backbone with the exits of a recipe. Their heads are not trained; the same seed gives the same heads.

    `times`: of the backbone, if fractions are of these.
    """
    exits = recipe.exits
    mean, std = ((v,) if isinstance(v, int | float) else v for v in (exits.front_mean, exits.front_std))
    front = named_front(exits.front, backbone, weights=exits.front_weights, mean=mean, std=std)
    options = {"exits": exits.places, "num_exits": exits.number, "head": exits.head, "head_budget": exits.head_budget}
    with own_random_numbers(recipe.seed):
        return build(backbone, front=front, times=times, places_by=exits.places_by, **options)


def _save(model: EarlyExitModel, history: History, recipe: Recipe, job: Job, times: Times | None) -> None:
    """Write all files of the run, or on failure none."""
    if job.out is None:
        return
    metrics = {"results": model.results, "plan": model.plan.to_dict(), "training": history.to_dict()}
    more = {run_files.METRICS: f"{to_json(metrics)}\n", RECIPE_FILE: recipe.to_yaml()}
    if times is not None:
        more[FILE] = times.to_json()
    model.save_pretrained(job.out, more_files=more)


# ---------------------------------------------------------------------------------------------------- the steps


def _train(
    model: EarlyExitModel, data: Data, recipe: Recipe, job: Job, complete: list[Epoch], placed_by: TimesOfModules | None
) -> History:
    """Train the heads. Each epoch is added to `complete` once it is saved in the folder, which is the training's from the first on."""
    config = resolve_config(recipe.training, model, data.train)
    checkpoint = None if job.out is None else job.out / run_files.CHECKPOINT
    beside = with_checkpoint(placed_by)

    def on_epoch(epoch: Epoch) -> None:
        complete.append(epoch)
        if job.out is not None and len(complete) == 1:
            take_over(job.out, beside)
        job.log(epoch.line(passes(config, len(model.exits))))
        note(epoch)

    tracker = job.tracker if is_main_process() else None
    with or_anew(), tracked(tracker, job.out, config.model_dump()) as note:
        history = run_training(
            model,
            data.train,
            data.calibration,
            config=config,
            device=job.device,
            num_workers=job.num_workers,
            checkpoint=checkpoint,
            beside=beside,
            resume=job.resume and checkpoint is not None and checkpoint.is_file(),
            on_epoch=on_epoch,
            on_cache=lambda estimate: job.log(str(estimate)),
        )
    if history.interrupted:
        raise KeyboardInterrupt
    if job.resume and not complete and is_main_process():
        job.log(f"{len(history.epochs)} of {passes(config, len(model.exits))} epochs are there.")
    if history.warning and recipe.confidence.name == LEARNED:
        job.log(f"Warning: {history.warning}")
    return history


def _batches(recipe: Recipe, job: Job) -> dict[str, Any]:
    return {"batch_size": recipe.training.batch_size, "num_workers": job.num_workers, "device": job.device}


def _set_confidence(model: EarlyExitModel, images: Any, recipe: Recipe, job: Job) -> None:
    if images is None:
        model.confidence = str(recipe.confidence.name)
        return
    fits = calibrate(model, images, target=recipe.confidence.question, **_batches(recipe, job))
    job.log(f"\n{fits}\n{fits.legend}" if job.explain else f"\n{fits.summary}")
    model.results = (model.results or {}) | {"calibration": fits.to_dict()}


def _measured_pieces(model: EarlyExitModel, recipe: Recipe, job: Job) -> Times | None:
    """The seconds of each piece on the device of the run, if thresholds are to be chosen by them."""
    how, home = recipe.thresholds, device_of(model.heads)
    if how.cost != TIME:
        return None
    job.log(f"\nThe pieces are measured in batches of up to {how.at_batch} on {job.device}.")
    try:
        executors = None if how.executor == AUTO else [how.executor]
        return measure(model.to(resolve_device(job.device)), [how.at_batch], executors)
    finally:
        model.to(home)


def _set_thresholds(
    model: EarlyExitModel, data: Data, target: Target | None, recipe: Recipe, job: Job, times: Times | None
) -> tuple[tuple[Any, str], Solution | None]:
    """Set the thresholds. Returns the images to report on with a sentence about them, and the solution for the target."""
    if target is None:  # `checked_model` has set those that were given
        return (data.validation, data.described(chosen=False)), None
    unseen = Unseen(str(job.out or data.source), data, data.validation, recipe.seed)
    how = recipe.thresholds
    at_batch = None if times is None else times.at(how.at_batch, how.executor)
    images, words, found = choose_thresholds(
        model, unseen, target, how, log=job.log, times=at_batch, **_batches(recipe, job)
    )
    return (images, f"{data.summary} {words}"), found


def _measure(
    model: EarlyExitModel, report: tuple[Any, str], found: Solution | None, recipe: Recipe, job: Job, lacking: str
) -> list[str]:
    """Measure the model. Returns what is to be doubted."""
    images, words = report
    if job.speed:
        job.log(f"\n{about_speed(model, job.speed_seconds)}")
    how: dict[str, Any] = {"speed": job.speed, "speed_seconds": job.speed_seconds, "about": words}
    results = evaluate(model, images, **how, **_batches(recipe, job))
    doubts = hardly_learned(results, model.num_classes, recipe)
    odd = [*results.verdict, *doubts, *filter(None, [results.seen])]
    if found is not None:
        outcome, missed = describe_outcome(found, results.to_dict())
        results = replace(results, outcome=outcome, loses_too_much=None if found.target.kind == "max_cost" else missed)
        odd += [outcome] * bool(missed)
    job.log("\n".join(["", *filter(None, [lacking]), *doubts, str(results)]) + f"\n\n{results.legend}" * job.explain)
    model.results = (model.results or {}) | results.to_dict()
    return odd
