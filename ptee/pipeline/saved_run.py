"""A saved run opened again, with images that its heads have not seen.

What a run says of its data is not trusted where a stranger may have written it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ptee._common.errors import DataError, RunError
from ptee.backbones.load import rebuild
from ptee.data.named import HUB
from ptee.data.splits import Unseen, images_to_report_on, left_by_tuning
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
        images, about = left_by_tuning(self.unseen, _tuned_on(self.model), given)
        return images, f"{self.words} {about}".rstrip()


def reopened(run: str, o: Options) -> Reopened:
    """Open a run.

    Args:
        run: a folder, or user/repo on the hub.
        o: options of the command: where its weights and its data are, if not where it says.

    Raises:
        DataError: if it does not say which data it was measured on, or they have changed.
        PteeError: as of `load`.
    """
    model = load(run, _moved_backbone(run, o["weights"]))
    recorded = _recorded_data(run, model)
    source = o["data"] or recorded.get("source")
    if not source:
        raise DataError(f"{run} does not say which data it was measured on. Give --data FOLDER.")
    root, seed = o["data_root"] or recorded.get("root"), recorded.get("seed", 0)
    named = not o["data"] and not Path(source).is_absolute()  # of folders the whole path is recorded
    if named and source.startswith(f"{HUB}/"):
        raise DataError(
            f"{run} was measured on {source}, which may have to be fetched. If you trust it, give it again: data={source}."
        )
    data, labels = asked.images(
        source,
        model.origin,
        seed=seed,
        root=root,
        named=named,
        classes=o.get("classes"),
        trained=recorded.get("classes"),
        check=bool(o.get("max_drop")),
        device=o.get("device"),
        report_only=True,
        removed=recorded.get("removed", ()),
    )
    if o.get("max_drop"):
        labels.require_accuracy(f"max_drop={o['max_drop']}", f"max_fidelity_drop={o['max_drop']}")
    images, words = images_to_report_on(data, recorded, run)
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
    """source, root, seed, files_sha256, classes and removed of what a run was measured on; nothing where a stranger recorded them."""
    found = (model.results or {}).get("data")
    if not Path(run).is_dir() or not isinstance(found, dict):
        return {}
    split: Any = found.get("split") if isinstance(found.get("split"), dict) else {}
    said = {key: found.get(key) for key in ("source", "root")}
    said |= {key: split.get(key) for key in ("seed", "files_sha256")}
    known: dict[str, Any] = {k: value for k, value in said.items() if isinstance(value, int if k == "seed" else str)}
    if _is_text(classes := split.get("classes")):
        known["classes"] = classes
    if isinstance(removed := split.get("removed"), list) and all(_is_text(key) and len(key) == 3 for key in removed):
        known["removed"] = [tuple(key) for key in removed]
    return known


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
