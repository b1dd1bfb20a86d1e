"""A saved run opened again, with images that its heads have not seen.

What a run says of its data is not trusted where a stranger may have written it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ptee._common.errors import Argument, BackboneError, DataError, PteeError, RunError
from ptee._common.text import printable
from ptee.backbones.load import rebuild
from ptee.data.named import HUB
from ptee.data.splits import Unseen, images_to_report_on, left_by_tuning, parts_for_all
from ptee.evaluation.comparison import compare
from ptee.evaluation.comparison_table import Comparison
from ptee.evaluation.config import TARGETS
from ptee.evaluation.results import Results, evaluate
from ptee.evaluation.targets import Target, require_labels
from ptee.evaluation.tuning import describe_outcome
from ptee.model import saving
from ptee.model.build import load
from ptee.model.early_exit import EarlyExitModel
from ptee.model.rebuilding import require_at_hand
from ptee.pipeline.fit import Job, Log, choose_thresholds
from ptee.pipeline.images import has_labels, open_images
from ptee.pipeline.recipe import RECIPE_FILE, Recipe, make_recipe, write_recipe

WHOLE_DISK = re.compile(r"([A-Za-z]:)?[./]*/[./]*|[A-Za-z]:")
LONGEST_PATH = 4096  # of a folder, in letters
FEW_MACS = 10_000_000  # multiply-accumulates of a network for which one CPU thread is faster than several


class OpenRun(NamedTuple):
    """A saved run and its data, or others.

    Attributes:
        model: with its heads and thresholds.
        unseen: what of the data its heads have not seen.
        words: which images those are, in a sentence.
        accuracy: what is known of their labels, in a sentence.
    """

    model: EarlyExitModel
    unseen: Unseen
    words: str
    accuracy: str

    @property
    def tiny(self) -> bool:
        """The images are so small that one CPU thread is faster than several."""
        return self.model.plan.macs < FEW_MACS

    def left_by_tuning(self, given: bool) -> tuple[Any, str]:
        """Of images that the thresholds were chosen on, only those that were left; and a sentence about them.

        Args:
            given: other thresholds are, which nobody chose on these images.
        """
        images, about = left_by_tuning(self.unseen, _tuned_on(self.model), given)
        return images, f"{self.words} {about}".rstrip()


def open_run(
    run: str,
    *,
    weights: Path | None = None,
    data: str | None = None,
    data_root: Path | None = None,
    classes: Path | None = None,
    max_drop: float | None = None,
) -> OpenRun:
    """Open a saved run, with images that its heads have not seen.

    Args:
        run: a folder, or user/repo on the hub.
        weights: a file with the backbone's weights, if they are not where the run says.
        data: other images than those that the run was made with: a folder, or the name of a data set.
        data_root: where a data set of torchvision lies.
        classes: a file that names the backbone's classes in its order.
        max_drop: of accuracy, which is to be asked for; so the labels must be those of the backbone.

    Raises:
        DataError: if the run does not say which images it was made with, or they have changed.
        PteeError: as of `load`.
    """
    try:
        model = load(run, _moved_backbone(run, weights))
    except BackboneError as why:
        if why.argument != "backbone":
            raise
        raise BackboneError(
            *why.parts, " Or say where a file of its weights is: ", Argument("weights", "FILE"), ".", argument="weights"
        ) from why
    recorded = _recorded_data(run, model)
    source = data or recorded.get("source")
    if not source:
        raise DataError(
            f"{run} does not say which images it was made with. Give some: ", Argument("data", "FOLDER"), "."
        )
    _require_plain(run, recorded if not data else {"seed": recorded.get("seed", 0)})
    root, seed = data_root or (None if data else recorded.get("root")), recorded.get("seed", 0)
    named = not data and not Path(source).is_absolute()  # of folders the whole path is recorded
    if named and source.startswith(f"{HUB}/"):
        raise DataError(
            f"{run} was made with {source}, which may have to be fetched. If you trust it, give it again: ",
            Argument("data", source),
            ".",
        )
    found, labels = open_images(
        source,
        model.origin,
        seed=seed,
        root=root,
        named=named,
        classes=classes,
        trained=recorded.get("classes"),
        check=max_drop is not None,
        report_only=True,
        removed=recorded.get("removed", ()),
    )
    if max_drop is not None:
        labels.require_accuracy(Argument("max_drop", str(max_drop)), Argument("max_fidelity_drop", str(max_drop)))
    images, words = images_to_report_on(found, recorded, run)
    accuracy = labels.reason if labels.indices is not None else f"{labels.reason} So there is no accuracy."
    return OpenRun(model, Unseen(run, found, images, seed), words, accuracy)


def measure(model: EarlyExitModel, images: Any, about: str, *, threshold: Any = None, **how: Any) -> Results:
    """The results of a model on images.

    Args:
        model: with its thresholds.
        images: a data set.
        about: the images, in a sentence.
        threshold: another T; None for the model's own.
        how: batch_size, num_workers, device and speed, as of `evaluate`.
    """
    return evaluate(model, images, threshold=threshold, about=about, **how)


def tuning_recipe(settings: Mapping[str, Any], batch_size: int) -> Recipe:
    """The recipe by which thresholds are chosen anew.

    Args:
        settings: of the thresholds, by path: a target, a margin.
        batch_size: images in each batch.

    Raises:
        PteeError: if there is no target, or it cannot be met.
    """
    given = {path: value for path, value in settings.items() if value is not None}
    recipe = make_recipe(None, {**given, "training.batch_size": batch_size})
    if all(settings.get(f"thresholds.{name}") is None for name in TARGETS):
        choices = [Argument(name) for name in TARGETS[1:]]
        raise PteeError(
            "What are the thresholds to meet? Give one of ", choices[0], ", ", choices[1], " and ", choices[2], "."
        )
    return recipe


def tune_run(
    opened: OpenRun, recipe: Recipe, *, log: Log, speed: bool, explain: bool = False, **how: Any
) -> dict[str, Any]:
    """Choose the thresholds of a saved run anew, measure them on other images, and keep both in the run.

    Args:
        opened: a run on this disk.
        recipe: as of `tuning_recipe`.
        log: is told what was found.
        speed: measure images per second, too.
        explain: say what the columns of the results mean.
        how: batch_size, num_workers and device.

    Raises:
        PteeError: if the target cannot be met.
    """
    labelled = has_labels(opened.unseen.data)
    model, folder = opened.model, Path(opened.unseen.run)
    target = Target.of(recipe.thresholds, labelled)
    assert target is not None
    require_labels(target, labelled)
    own = make_recipe(folder) if (folder / RECIPE_FILE).is_file() else None
    job = Job(device=how["device"], num_workers=how["num_workers"], log=log)
    report, found = choose_thresholds(model, opened.unseen, target, recipe, job)
    images = (model.results or {})["tuning"]["images"]
    results = measure(model, report, f"{opened.words} {images}", speed=speed, **how)
    log(f"\n{results}" + f"\n\n{results.legend}" * explain)
    model.results = (model.results or {}) | results.to_dict()
    saving.update(folder, threshold=model.threshold, off=list(model.off), results=model.results)
    if own is not None:  # so that the run's recipe gives these thresholds again
        write_recipe(own.model_copy(update={"thresholds": recipe.thresholds}), folder)
    log(describe_outcome(found, model.results))
    return model.results


def compare_runs(runs: Mapping[str, OpenRun], *, log: Log, **how: Any) -> Comparison:
    """Compare saved runs on images that none of them has seen.

    Args:
        runs: by what to call them.
        log: is told which images those are.
        how: as of `compare`.

    Raises:
        PteeError: as of `compare`, and if there are no such images.
    """
    first = next(iter(runs.values()))
    parts = parts_for_all([run.unseen for run in runs.values()])
    about = f"{first.unseen.data.source}. {parts.words}"
    log(f"{about} {first.accuracy}")
    models = {name: run.model for name, run in runs.items()}
    return compare(models, parts.calibration, parts.report, about=about, **how)


def _moved_backbone(run: str, weights: Path | None) -> Any:
    """The backbone of a run, with its weights from another place; None to look where the run says."""
    if weights is None:
        return None
    found = saving.read(run)
    source = found.config.backbone.source
    if source is None:
        raise RunError(f"{run} cannot be evaluated from the command: its backbone is a Python module. Use ptee.load.")
    require_at_hand(found, source)
    return rebuild(source | {"weights": {"file": str(weights)}}).module


def _recorded_data(run: str, model: EarlyExitModel) -> dict[str, Any]:
    """source, root, seed, files_sha256, classes and removed of what a run was measured on; nothing where a stranger recorded them."""
    found = (model.results or {}).get("data")
    if not Path(run).is_dir() or not isinstance(found, dict):
        return {}
    split: Any = found.get("split") if isinstance(found.get("split"), dict) else {}
    said = {key: found.get(key) for key in ("source", "root")}
    said |= {key: split.get(key) for key in ("seed", "files_sha256")}
    known: dict[str, Any] = {k: value for k, value in said.items() if type(value) is (int if k == "seed" else str)}
    if _is_text(classes := split.get("classes")):
        known["classes"] = classes
    if isinstance(removed := split.get("removed"), list) and all(_is_text(key) and len(key) == 3 for key in removed):
        known["removed"] = [tuple(key) for key in removed]
    return known


def _require_plain(run: str, recorded: Mapping[str, Any]) -> None:
    """Refuse to look for images where a run should not send anybody: over the whole disk, or on another machine.

    Raises:
        DataError: naming the place.
    """
    for place in (recorded[key] for key in ("source", "root") if key in recorded):
        path = place.replace("\\", "/")
        if (
            WHOLE_DISK.fullmatch(path)
            or path.startswith("//")
            or len(place) > LONGEST_PATH
            or printable(place) != place
        ):
            raise DataError(
                f"{run} says that its images are in {place!r:.80}, which is not read unasked. If you trust it, give the images: ",
                Argument("data", "FOLDER"),
                ".",
            )
    if not 0 <= recorded.get("seed", 0) < 2**63:
        raise RunError(f"{run}: results.data.split.seed={recorded['seed']!r:.40} is no seed. Copy the run again.")


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _tuned_on(model: EarlyExitModel) -> dict[str, Any]:
    """source and files_sha256 (or None) of the images that the thresholds were chosen on; nothing where that is not known."""
    tuning, trained = ((model.results or {}).get(key) for key in ("tuning", "data"))
    if not isinstance(tuning, dict) or not isinstance(tuning.get("source"), str):
        return {}
    files = tuning.get("files_sha256")
    split = trained.get("split") if isinstance(trained, dict) and trained.get("source") == tuning["source"] else None
    if "files_sha256" not in tuning and isinstance(split, dict):  # a run of an older ptee
        files = split.get("files_sha256")
    return {"source": tuning["source"], "files_sha256": files if isinstance(files, str) else None}
