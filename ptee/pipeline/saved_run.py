"""A saved run opened again, with images that its heads have not seen.

What a run says of its data is not trusted where a stranger may have written it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset

from ptee._common.errors import BackboneError, DataError, RunError
from ptee.backbones.load import rebuild
from ptee.data.sources import Data
from ptee.evaluation.tuning import Unseen, parts_for_tuning
from ptee.model import saving as runs
from ptee.model.build import load
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline import asked
from ptee.pipeline.asked import Options
from ptee.pipeline.demo import INPUT_SIZE


class Reopened(NamedTuple):
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
        """The images are as small as the digits."""
        return self.model.origin.input.input_size == INPUT_SIZE

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


def reopened(run: str, o: Options) -> Reopened:
    """Open a run.

    Args:
        run: a folder, or user/repo on the hub.
        o: options of the command: where its weights and its data are, if not where it says.

    Raises:
        DataError: if it does not say which data it was measured on, or they have changed.
        PteeError: as of `load`.
    """
    try:
        model = load(run, _moved_backbone(run, o["weights"]))
    except BackboneError as why:
        if why.argument != "backbone":
            raise
        raise BackboneError(f"{why} Or say where a file of its weights is: weights=FILE.", "weights") from why
    recorded = _recorded_data(run, model)
    source = o["data"] or recorded.get("source")
    if not source:
        raise DataError(f"{run} does not say which data it was measured on. Give --data FOLDER.")
    root, seed = o["data_root"] or recorded.get("root"), recorded.get("seed", 0)
    named = not o["data"] and not Path(source).is_absolute()  # of folders the whole path is recorded
    data, labels = asked.images(source, model.origin, seed=seed, root=root, named=named)
    images, words = _unseen(data, recorded, run)
    accuracy = labels.reason if labels.indices is not None else f"{labels.reason} So there is no accuracy."
    return Reopened(model, Unseen(run, data, images, seed), words, accuracy)


def _moved_backbone(run: str, weights: Path | None) -> Any:
    """The backbone of a run, with its weights from another place; None to look where the run says."""
    if weights is None:
        return None
    source = runs.read(run).source
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
