"""Everything from a backbone and images to a saved early-exit model: exits, training, calibration, thresholds, results.

`fit` does from Python what `ptee augment` does on the command line; both are `fit_backbone` with the same recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptee._common.devices import resolve_device
from ptee._common.errors import Argument, DataError, Interrupted, PteeError, unknown
from ptee._common.files import write_json
from ptee._common.process import own_random_numbers
from ptee.backbones.load import Backbone, load_backbone
from ptee.data.splits import FILES, Data, Unseen, parts_for_tuning
from ptee.evaluation.results import SPEED_SECONDS, evaluate
from ptee.evaluation.targets import Solution, Target, require_labels, require_reachable
from ptee.evaluation.tuning import describe_outcome, tune
from ptee.exits.confidence import CONFIDENCES
from ptee.exits.config import CALIBRATED, LEARNED, MAX_PROB
from ptee.exits.front import named_front
from ptee.model import saving
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline import unreadable
from ptee.pipeline.images import from_data_sets, has_labels, image_size, labels_of, recipe_for
from ptee.pipeline.recipe import Recipe, make_recipe, write_recipe
from ptee.pipeline.run_folder import clear, new_folder, sole_writer, speaks_for_all
from ptee.training.calibration import MIN_IMAGES, calibrate, hold_out
from ptee.training.history import Epoch, History
from ptee.training.trainer import resolve_config, train

Log = Callable[[str], None]


def silent(text: str) -> None:
    """A log that nobody reads."""


@dataclass(frozen=True)
class Job:
    """How a fit is run; nothing here changes what comes out of it.

    Attributes:
        out: folder of the run; None to save nothing.
        device: where the heads learn; None for a GPU where there is one.
        num_workers: processes that load images.
        resume: go on with the training that was interrupted in `out`.
        speed: measure images per second, too.
        log: is told what happens, in lines for a person.
        again: what to type to go on after an interruption; empty where nothing helps.
        overwrite: replace the run that `out` holds.
        speed_seconds: how long measuring speed may take, in about.
        explain: say what the columns of the results mean.
    """

    out: Path | None = None
    device: str | torch.device | None = None
    num_workers: int = 0
    resume: bool = False
    speed: bool = False
    log: Log = silent
    again: str = ""
    overwrite: bool = False
    speed_seconds: float = SPEED_SECONDS
    explain: bool = False


def fit(
    model: str | nn.Module,
    train_data: Any,
    *,
    val_data: Any = None,
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
    """Add early exits to a trained classifier: place them, train their heads, choose thresholds, measure, save.

    The steps, the settings and the numbers are those of `ptee augment`. Speed is measured only when it is asked for.

    Args:
        model: a name (`resnet50`, `timm/NAME`, `torchvision/NAME`) or any nn.Module from images (b, c, h, w) to logits (b, K).
            It stays frozen, and is used as it is, not copied.
        train_data: a map-style data set of (image (c, h, w), label) or (image,), for the heads. The images come as the backbone
            takes them: resized and normalised.
        val_data: other images, for the report. None: a tenth of the training images.
        calibration_data: other images, for the thresholds. None: one half of `val_data`, or a tenth of the training images.
        recipe: the name of a built-in recipe ("ptee", "pteenet", "eenet", "branchynet", "ztw"), a YAML file, or a `Recipe`.
        out: a folder for the run. None: nothing is saved.
        num_classes: K, where the model does not say.
        input_size: (c, h, w). None: the model's own, for a module that of the first training image.
        pretrained: for a name: load its published weights.
        weights: for a name: a file of weights instead.
        device: None: a GPU where there is one.
        num_workers: processes that load images.
        speed: measure images per second beside the bare backbone.
        overwrite: replace the run that `out` holds.
        resume: go on with the training that was interrupted in `out`.
        log: is told what happens, such as `print`.
        changes: settings of the recipe by name: `epochs=20`, `head="pool"`, `max_drop=0.01`, `seed=1`. `ptee recipe ptee` on the
            command line lists them all.

    Returns:
        The model in eval mode with its thresholds set. `model.results` has what was measured; `log=print` shows it in tables.

    Raises:
        PteeError: naming the argument or setting that cannot be, and what is possible.
        Interrupted: on Ctrl-C, with a sentence about what was kept.
    """
    chosen = make_recipe(recipe, {name: value for name, value in changes.items() if value is not None})
    if out is not None and not str(out):
        raise PteeError("out is an empty text. Give a folder, or None to save nothing.", argument="out", value=out)
    folder = None if out is None else new_folder(Path(out), overwrite=overwrite, resume=resume)
    if resume and folder is None:
        raise PteeError(
            "There is nothing to resume without a folder. Give ", Argument("out", "FOLDER"), ".", argument="resume"
        )
    data = from_data_sets(train_data, val_data, calibration_data, seed=chosen.seed)
    if input_size is None and isinstance(model, nn.Module):
        input_size = image_size(train_data)
    backbone = load_backbone(
        model, weights=weights, pretrained=pretrained, num_classes=num_classes, input_size=input_size
    )
    labels = labels_of(data, backbone, resolve_device(device))
    adapted = recipe_for(labels, chosen)
    if log is not None:
        log(str(PteeError(f"{labels.reason} {labels.doubt}".rstrip(), " ", *labels.remedy)).rstrip())
    again = "Call ptee.fit again with resume=True."
    job = Job(folder, device, num_workers, resume, speed, log or silent, again, overwrite)
    return fit_backbone(backbone, data, adapted, job)


def fit_backbone(backbone: Backbone, data: Data, recipe: Recipe, job: Job) -> EarlyExitModel:
    """`fit` for a backbone and images that are there already.

    Args:
        backbone: to be frozen.
        data: images as it takes them, with its labels or none.
        recipe: every setting.
        job: where, and how it is told.
    """
    recipe = recipe.resolved()
    job = replace(job, device=resolve_device(job.device))
    model, target = checked_model(backbone, data, recipe)
    for network in (backbone, getattr(model.heads[0], "origin", None)):
        if network is not None and network.note:
            job.log(f"{network.note}\n")
    job.log(f"{data.summary}\n\n{model.plan}\n")
    with sole_writer(job.out, overwrite=job.overwrite, resume=job.resume):
        return _fit(model, data, target, recipe, job)


def _fit(model: EarlyExitModel, data: Data, target: Target | None, recipe: Recipe, job: Job) -> EarlyExitModel:
    for_heads, for_confidence = _images_of_each(data, recipe, job.log)
    recipe = _adapted(recipe, data, for_confidence is not None)
    complete: list[Epoch] = []
    try:
        history = _train_on_files(model, for_heads, recipe, job, complete)
        if not speaks_for_all():
            return model
        model.results = {"data": about(data)}
        _set_confidence(model, for_confidence, recipe, job)
        report, outcome = _set_thresholds(model, data, target, recipe, job)
    except KeyboardInterrupt as why:
        raise _interrupted(complete, job) from why
    _save(model, history, recipe, job)  # before the measurement, which may take long
    try:
        _measure(model, report, outcome, recipe, job)
    except KeyboardInterrupt as why:
        if job.out is None:
            raise Interrupted("Interrupted.") from why
        words = f"Interrupted: the run in {job.out} is complete but for its results. {job.again}"
        raise Interrupted(words.strip()) from why
    _save(model, history, recipe, job)
    if job.out is not None:
        (job.out / saving.CHECKPOINT).unlink(missing_ok=True)
    return model


def checked_model(backbone: Backbone, data: Data, recipe: Recipe) -> tuple[EarlyExitModel, Target | None]:
    """The model with untrained heads, and what its thresholds are to meet. Refuses before anything is trained what cannot be.

    Args:
        backbone: to be frozen.
        data: images as it takes them.
        recipe: every setting.

    Raises:
        PteeError: naming the setting.
    """
    recipe, labelled = recipe.resolved(), has_labels(data)
    target = Target.of(recipe.thresholds, labelled)
    if recipe.confidence.name not in CONFIDENCES:
        raise unknown("confidence", str(recipe.confidence.name), CONFIDENCES, argument="confidence")
    if not labelled and recipe.confidence.question != "agrees":
        raise DataError(
            "The images have no labels for ", Argument("question", repr(recipe.confidence.question)), ". Give ",
            Argument("question", "'agrees'"), ".", argument="question", value=recipe.confidence.question,
        )  # fmt: skip
    model = build_model(backbone, recipe)
    try:
        if target is not None:
            require_labels(target, labelled)
            require_reachable(target, model.plan.least_cost, recipe.thresholds.margin)
        elif recipe.thresholds.threshold is not None:
            model.threshold = recipe.thresholds.threshold
        resolve_config(recipe.training, model, data.train)
    except BaseException:
        model.detach()
        raise
    return model, target


def build_model(backbone: Backbone, recipe: Recipe) -> EarlyExitModel:
    """A backbone with the exits of a recipe. Their heads have not learned yet; the same seed gives the same heads."""
    exits = recipe.exits
    front = named_front(
        exits.front, backbone, weights=exits.front_weights, mean=_each(exits.front_mean), std=_each(exits.front_std)
    )
    with own_random_numbers(recipe.seed):
        return build(
            backbone, exits=exits.places, num_exits=exits.number, head=exits.head, head_budget=exits.head_budget, front=front
        )  # fmt: skip


def _each(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


def _save(model: EarlyExitModel, history: History, recipe: Recipe, job: Job) -> None:
    if job.out is None:
        return
    model.save_pretrained(job.out)
    write_recipe(recipe, job.out)
    unreadable.forget(job.out)
    metrics = {"results": model.results, "plan": model.plan.to_dict(), "training": history.to_dict()}
    write_json(job.out / saving.METRICS, metrics)


# ---------------------------------------------------------------------------------------------------- the steps


def _images_of_each(data: Data, recipe: Recipe, log: Log) -> tuple[Data, Any]:
    """The data whose training images are for the heads, and the images to calibrate the confidence on, if there are any."""
    every: Any = data.train
    share = recipe.confidence.calibration_share
    if recipe.confidence.name != CALIBRATED:
        return data, None
    usual = type(recipe.confidence).model_fields["calibration_share"].default
    if (
        len(every) * share < MIN_IMAGES and share == usual
    ):  # whoever asks for another share is told that it is too small
        log(
            f"{len(every):,} training images are too few to calibrate the confidence as well: the heads learn from all of them, "
            "and the confidence is the largest probability.\n"
        )
        return data, None
    for_heads, rest = hold_out(every, share, recipe.seed)
    log(
        f"The heads learn from {len(for_heads):,} of the {len(every):,} training images. The confidence is calibrated on the other "
        f"{len(rest):,}, drawn with seed {recipe.seed}.\n"
    )
    return replace(data, train=for_heads), rest


def _adapted(recipe: Recipe, data: Data, calibrates: bool) -> Recipe:
    """The recipe that is carried out and saved: without mirror images of digits, calibrated only where there are images for it."""
    changes: dict[str, Any] = {}
    if not data.mirror:
        changes["training.mirror"] = False
    if recipe.confidence.name == CALIBRATED and not calibrates:
        changes["confidence.name"] = MAX_PROB
    return recipe.with_settings(changes).resolved()


def _train_on_files(model: EarlyExitModel, data: Data, recipe: Recipe, job: Job, complete: list[Epoch]) -> History:
    """Train. If a picture cannot be read any more, all such pictures are named, and recorded for a resumption."""
    try:
        return _train(model, data, recipe, job, complete)
    except DataError:
        if job.out is not None and data.split["kind"] in FILES:
            unreadable.require_readable(data, job.out)
        raise


def _train(model: EarlyExitModel, data: Data, recipe: Recipe, job: Job, complete: list[Epoch]) -> History:
    """Train the heads. Epochs are added to `complete` once they are kept in the folder."""
    config = resolve_config(recipe.training, model, data.train)
    epochs = int(config.epochs)

    def on_epoch(epoch: Epoch) -> None:
        complete.append(epoch)
        if job.out is not None:
            clear(job.out)
        job.log(epoch.line(epochs))

    history = train(
        model,
        data.train,
        data.calibration,
        config=config,
        device=job.device,
        num_workers=job.num_workers,
        checkpoint=None if job.out is None else job.out / saving.CHECKPOINT,
        resume=job.resume and (job.out or Path()).joinpath(saving.CHECKPOINT).is_file(),
        on_epoch=on_epoch,
        on_cache=lambda estimate: job.log(str(estimate)),
    )
    if history.interrupted:
        raise KeyboardInterrupt
    if history.warning and recipe.confidence.name == LEARNED:
        job.log(f"Warning: {history.warning}")
    return history


def _set_confidence(model: EarlyExitModel, images: Any, recipe: Recipe, job: Job) -> None:
    if images is None:
        model.confidence = str(recipe.confidence.name)
        return
    fits = calibrate(
        model,
        images,
        target=recipe.confidence.question,
        batch_size=recipe.training.batch_size,
        num_workers=job.num_workers,
        device=job.device,
    )
    job.log(f"\n{fits}")
    model.results = (model.results or {}) | {"calibration": fits.to_dict()}


def _set_thresholds(
    model: EarlyExitModel, data: Data, target: Target | None, recipe: Recipe, job: Job
) -> tuple[tuple[Any, str], Solution | None]:
    """Give the model its thresholds. Returns images to report on, a sentence about them, and what was found for the target."""
    if target is None:
        assert recipe.thresholds.threshold is not None  # else there is a target
        model.threshold = recipe.thresholds.threshold
        return (data.validation, data.summary), None
    unseen = Unseen(str(job.out or data.source), data, data.validation, recipe.seed)
    images, found = choose_thresholds(model, unseen, target, recipe, job)
    return (images, f"{data.summary} {(model.results or {})['tuning']['images']}"), found


def _measure(model: EarlyExitModel, report: tuple[Any, str], found: Solution | None, recipe: Recipe, job: Job) -> None:
    """Measure on images that the thresholds were not chosen on."""
    images, about = report
    results = evaluate(
        model, images, batch_size=recipe.training.batch_size, num_workers=job.num_workers, device=job.device, speed=job.speed,
        speed_seconds=job.speed_seconds, about=about,
    )  # fmt: skip
    job.log(f"\n{results}" + f"\n\n{results.legend}" * job.explain)
    model.results = (model.results or {}) | results.to_dict()
    if found is not None:
        job.log(describe_outcome(found, model.results))


def choose_thresholds(
    model: EarlyExitModel, unseen: Unseen, target: Target, recipe: Recipe, job: Job
) -> tuple[Any, Any]:
    """Set the thresholds for a target, and record in the model's results how.

    Args:
        model: trained.
        unseen: images that its heads have not seen.
        target: what the thresholds are to meet.
        recipe: its batch size, margin, and whether all exits get one threshold.
        job: where, and how it is told.

    Returns:
        The images that are left to report on, and the thresholds that were found.
    """
    parts = parts_for_tuning(unseen)
    found = tune(
        model, parts.calibration, **{target.kind: target.limit}, one_threshold=recipe.thresholds.one_threshold, margin=recipe.thresholds.margin,
        batch_size=recipe.training.batch_size, num_workers=job.num_workers, device=job.device,
    )  # fmt: skip
    record = {"source": unseen.data.place, "files_sha256": unseen.data.split.get("files_sha256"), "images": parts.words}
    model.results = (model.results or {}) | {"tuning": record | found.to_dict()}
    job.log(f"\n{parts.words}\n{found}")
    return parts.report, found


def about(data: Data) -> dict[str, Any]:
    """Where the images are found again."""
    return {"source": data.place, "root": data.split.get("root", ""), "split": data.split}


def _interrupted(complete: list[Epoch], job: Job) -> Interrupted:
    """What is kept of a training, in epochs that were completed now or before."""
    if job.out is None or not (complete or job.resume):
        return Interrupted("Interrupted.")
    kept = f"{complete[-1].number} complete epochs are" if complete else "what was trained before is"
    return Interrupted(f"Interrupted: {kept} kept in {job.out}. {job.again}".strip())
