"""A saved run opened again, with images that its heads have not seen.

What a run says of its data is not trusted where a stranger may have written it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset

from ptee._common.errors import Argument, DataError, PteeError, RunError
from ptee.backbones.load import rebuild
from ptee.data.sources import Data
from ptee.evaluation.comparison import compare
from ptee.evaluation.comparison_table import Comparison
from ptee.evaluation.config import TARGETS
from ptee.evaluation.results import Results, evaluate
from ptee.evaluation.targets import Target, require_labels
from ptee.evaluation.tuning import Unseen, describe_outcome, parts_for_all, parts_for_tuning
from ptee.model import saving
from ptee.model.build import load
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline.fit import Job, Log, choose_thresholds
from ptee.pipeline.images import has_labels, open_images
from ptee.pipeline.recipe import make_recipe

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
        _, data, images, seed = self.unseen
        tuned = _tuned_on(self.model)
        if not tuned:
            return images, self.words
        where, files = tuned["source"], data.split.get("files_sha256")
        shown = repr(f"{where:.200}")  # a stranger may have written it
        here = where.casefold() == data.place.casefold() if files is None else where == data.place
        same = here if None in (files, tuned["files_sha256"]) else files == tuned["files_sha256"]
        if not (here or same):
            elsewhere = f" The run's thresholds were chosen on images of {shown}; whether some of them are among these is not known."
            return images, self.words + ("" if given else elsewhere)
        parts = parts_for_tuning(data, images, seed)
        if not same and parts.report is not images:  # other halves are drawn
            if given:
                return images, self.words
            raise DataError(
                f"{data.source} has other files than when the thresholds were chosen, so those that they were chosen on cannot be "
                "told. Choose them anew (ptee tune), put the files back as they were, or give other images: --data FOLDER."
            )
        words = f"{self.words} {parts.words_of_others if given else parts.words}"
        known = (
            f" The files are called as those of {shown}, on which the thresholds were chosen, and are taken for them."
        )
        return parts.report, words + ("" if here else known)


def open_run(
    run: str, *, weights: Path | None = None, data: str | None = None, data_root: Path | None = None
) -> OpenRun:
    """Open a saved run, with images that its heads have not seen.

    Args:
        run: a folder, or user/repo on the hub.
        weights: a file with the backbone's weights, if they are not where the run says.
        data: other images than those that the run was made with: a folder, or the name of a data set.
        data_root: where a data set of torchvision lies.

    Raises:
        DataError: if the run does not say which images it was made with, or they have changed.
        PteeError: as of `load`.
    """
    model = load(run, _moved_backbone(run, weights))
    recorded = _recorded_data(run, model)
    source = data or recorded.get("source")
    if not source:
        raise DataError(
            f"{run} does not say which images it was made with. Give some: ", Argument("data", "FOLDER"), "."
        )
    root, seed = data_root or recorded.get("root"), recorded.get("seed", 0)
    named = not data and not Path(source).is_absolute()  # of folders the whole path is recorded
    found, labels = open_images(source, model.origin, seed=seed, root=root, named=named)
    images, words = _unseen(found, recorded, run)
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


def tune_run(opened: OpenRun, settings: Mapping[str, Any], *, log: Log, speed: bool, **how: Any) -> dict[str, Any]:
    """Choose the thresholds of a saved run anew, measure them on other images, and keep both in the run.

    Args:
        opened: a run on this disk.
        settings: of the thresholds, by path: a target, a margin.
        log: is told what was found.
        speed: measure images per second, too.
        how: batch_size, num_workers and device.

    Raises:
        PteeError: if there is no target, or it cannot be met.
    """
    recipe = make_recipe(None, {**settings, "training.batch_size": how["batch_size"]})
    labelled = has_labels(opened.unseen.data)
    model, folder = opened.model, Path(opened.unseen.run)
    if all(settings.get(f"thresholds.{name}") is None for name in TARGETS):
        choices = [Argument(name) for name in TARGETS[1:]]
        raise PteeError(
            "What are the thresholds to meet? Give one of ", choices[0], ", ", choices[1], " and ", choices[2], "."
        )
    target = Target.of(recipe.thresholds, labelled)
    assert target is not None
    require_labels(target, labelled)
    job = Job(device=how["device"], num_workers=how["num_workers"], log=log)
    report, found = choose_thresholds(model, opened.unseen, target, recipe, job)
    images = (model.results or {})["tuning"]["images"]
    results = measure(model, report, f"{opened.words} {images}", speed=speed, **how)
    log(f"\n{results}")
    model.results = (model.results or {}) | results.to_dict()
    saving.update(folder, threshold=model.threshold, off=list(model.off), results=model.results)
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
    source = saving.read(run).source
    if source is None:
        raise RunError(f"{run} cannot be evaluated from the command: its backbone is a Python module. Use ptee.load.")
    return rebuild(source | {"weights": {"file": str(weights)}}).module


def _recorded_data(run: str, model: EarlyExitModel) -> dict[str, Any]:
    """source, root, seed and files_sha256 of what a run was measured on; nothing where a stranger recorded them."""
    found = (model.results or {}).get("data")
    if not Path(run).is_dir() or not isinstance(found, dict):
        return {}
    split: Any = found.get("split") if isinstance(found.get("split"), dict) else {}
    said = {key: found.get(key) for key in ("source", "root")}
    said |= {key: split.get(key) for key in ("seed", "files_sha256")}
    return {key: value for key, value in said.items() if isinstance(value, int if key == "seed" else str)}


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


def _unseen(data: Data, recorded: dict[str, Any], run: str) -> tuple[Any, str]:
    """The images to measure a run on, none of which its heads were trained on; and what they are, in a sentence."""
    here, files = data.place == recorded.get("source"), recorded.get("files_sha256")
    same = here if files is None else files == data.split.get("files_sha256")
    if same or "validation" in data.split["parts"]:
        return data.validation, data.summary
    if here:  # with other files, others are drawn
        raise DataError(
            f"{data.source} has other files than when {run} was trained, so those that it has not seen cannot be told. "
            "Put them back as they were, or give other images: --data FOLDER."
        )
    every: Any = ConcatDataset([data.train, data.calibration, data.validation])
    return every, f"{data.source}: all {len(every):,} images."
