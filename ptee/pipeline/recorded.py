"""What the folder of a run says, checked before anything heavy is imported.

A run may come from a stranger. So what it says of its data is checked before anything is looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptee._common.errors import Argument, BackboneError, DataError, PteeError, RunError, unknown
from ptee._common.files import as_path, from_json, is_file, is_folder
from ptee._common.text import printable, quoted
from ptee._common.writing import is_left_over, require_writable, settle
from ptee.backbones.library import require_alike
from ptee.backbones.record import are_about_weights
from ptee.model.heads_file import read_notes
from ptee.model.run_files import (
    CHECKPOINT,
    OTHER_FOLDER,
    is_run,
    meant,
    metrics_of,
    read_config,
    read_run,
    record_of,
    require_heads,
)
from ptee.pipeline.recipe import RECIPE_FILE, Recipe, make_recipe
from ptee.training.config import SETTLED, of_another_training, other_settings
from ptee.tuning.config import TARGETS, no_target

WHOLE_DISK = re.compile(r"([A-Za-z]:)?[./]*/[./]*|[A-Za-z]:")
LONGEST_PATH = 4096  # of a folder, in letters
FOLDER = Argument("data", "FOLDER")
SWEEP_TABLE = "sweep.csv"  # in the folder of a sweep
FIGURES_OF_RUN = ("curve", "threshold", "exits", "network", "epochs", "confidence", "gallery")
NAMES_OF_REPORT = {
    "accuracy": "curve",
    "sweep": "threshold",
    "shares": "exits",
}  # what ptee report --figures calls some of them
FIGURES_OF_SWEEP = ("curve", "lambda")
UNREADABLE = "unreadable.json"  # keys of pictures that could not be read
PLACED_BY = "placed_by.json"  # the times that the exits of a training were placed by
OUT, RESUME = Argument("out"), Argument("resume")
TUNE_IN_PYTHON = "ptee.tune(ptee.load(...), images, max_drop=0.01)"
WITHOUT_IMAGES = ("network", "epochs")  # figures that need none


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the table of a sweep."""
    return is_file(folder / SWEEP_TABLE)


def require_kind(kind: str, of_sweep: bool) -> None:
    """Refuse a kind of figure that there is not, or not of a run, or not of a sweep."""
    every = tuple(dict.fromkeys([*FIGURES_OF_SWEEP, *FIGURES_OF_RUN]))
    if kind not in every:
        raise unknown("kind of figure", kind, every, argument="kind")
    known, what, other = (FIGURES_OF_SWEEP, "a sweep", "a run") if of_sweep else (FIGURES_OF_RUN, "a run", "a sweep")
    if kind not in known:
        text = f"'{kind}' is a figure of {other}, and this is {what}. Choices: {', '.join(known)}."
        raise PteeError(text, argument="kind")


def require_openable(run: str, *, weights: Path | None, images: bool) -> int:
    """Refuse a run of which the files tell that it cannot be opened. Gives the number of its exits.

    Args:
        run: a folder, or user/repo on the hub.
        weights: the user's file with the backbone's weights.
        images: those that it was made with are wanted, too.
    """
    config, _, _, remote = read_run(run)
    require_heads(run, config)
    with or_weights(weights is not None):
        for front in (False, True)[: 1 + (config.front is not None)]:
            record_of(run, config, remote, front=front, weights=None if front else weights)
    if images:
        recorded_images(run, config.results)
    return len(config.exits)


def require_same_input(runs: Sequence[str]) -> None:
    """Refuse to compare runs that take other images than the first: they would be opened first, which takes minutes."""
    inputs = {run: read_config(run)[0].backbone.input for run in runs}
    for run in runs[1:]:
        require_alike(run, inputs[run], runs[0], inputs[runs[0]])
        if (own := inputs[run].interpolation) != (first := inputs[runs[0]].interpolation):
            text = f"{run} takes pictures that are resized by {own}, and {runs[0]} by {first}. Compare runs that take the same images."
            raise PteeError(text)


def require_tunable(run: str, *, keep: bool) -> None:
    """Refuse a run whose files cannot be changed, before thresholds are chosen for it. Without `keep` they need only be read."""
    folder = Path(run)
    settle(folder)
    if not is_folder(folder):
        advice = meant(folder) or " Thresholds are written into a run, so give one on this disk."
        raise RunError(f"There is no folder {run:.200}.{advice}")
    if keep:
        require_writable(folder, OTHER_FOLDER)
    metrics_of(folder)  # refuses what cannot be read
    if is_file(folder / RECIPE_FILE):
        make_recipe(folder)


def tuning_recipe(thresholds: Mapping[str, Any], batch_size: int) -> Recipe:
    """The recipe by which the thresholds of a run are chosen again, from its settings by path.

    Raises:
        PteeError: if there is no target, or a setting is not possible.
    """
    given = {path: value for path, value in thresholds.items() if value is not None}
    recipe = make_recipe(None, {**given, "training.batch_size": batch_size})
    recipe.thresholds.require_used(given)
    if not any(f"thresholds.{name}" in given for name in TARGETS):
        raise no_target()
    return recipe


@contextmanager
def or_weights(given: bool) -> Iterator[None]:
    """Where a backbone cannot be built again, the user can say where its weights are, or give others than those `given`."""
    try:
        yield
    except BackboneError as why:
        if why.argument != "backbone":
            raise
        alone = are_about_weights(why.__cause__)  # so that nothing else mends it on the command line
        parts = why.parts[:-1] if alone else why.parts
        text = "give the weights that the run was made with: " if given else "say where a file of its weights is: "
        text = f" {text.capitalize()}" if alone else f" Or {text}"
        raise BackboneError(*parts, text, Argument("weights", "FILE"), ".", argument="weights") from why


def recorded_images(run: str, results: Any, data: str | None = None) -> dict[str, Any]:
    """What is known of a run's images, as far as it is recorded on this disk.

    That is source, train, train_sample, root, seed, files_sha256, classes and removed. `train` is the folder or file in the source
    that holds the training images.

    `data` are others, which the user gives.

    Raises:
        DataError: if there is no source, it is one that is not read unasked, or its folder is gone.
    """
    recorded = _recorded(run, results)
    if not (data or recorded.get("source")):
        raise DataError(f"{run} does not say which images it was made with. Give some: ", FOLDER, ".")
    _require_plain(run, {"seed": recorded.get("seed", 0)} if data else recorded)
    if not data and Path(place := recorded["source"]).is_absolute() and not is_folder(Path(place)):
        text = f"{run} was made with the images of {place:.300}, which is no folder here. Put it back, or say where they are now: "
        raise DataError(text, FOLDER, ".")
    return recorded


def _recorded(run: str, results: Any) -> dict[str, Any]:
    found = (results or {}).get("data")
    if not Path(run).is_dir() or not isinstance(found, dict):
        return {}
    split: Any = found.get("split") if isinstance(found.get("split"), dict) else {}
    values = {**{key: found.get(key) for key in ("source", "root")}, "files_sha256": split.get("files_sha256")}
    known: dict[str, Any] = {key: value for key, value in values.items() if isinstance(value, str)}
    if isinstance(parts := split.get("parts"), dict) and isinstance(parts.get("train"), str):
        known["train"] = parts["train"]
    if type(seed := split.get("seed")) is int:
        known["seed"] = seed
    if _is_text(classes := split.get("classes")):
        known["classes"] = classes
    if isinstance(sample := split.get("train_sample"), str):
        known["train_sample"] = sample.split()
    if isinstance(removed := split.get("removed"), list) and all(_is_text(key) and len(key) == 3 for key in removed):
        known["removed"] = [tuple(key) for key in removed]
    return known


def _require_plain(run: str, recorded: Mapping[str, Any]) -> None:
    """Refuse to look for images over the whole disk, or on another machine, because a run says so.

    Raises:
        DataError: naming the place.
    """
    for place in (recorded[key] for key in ("source", "root") if key in recorded):
        path = place.replace("\\", "/")
        wide = WHOLE_DISK.fullmatch(path) or path.startswith("//")
        if wide or len(place) > LONGEST_PATH or printable(place) != place:
            text = f"{run} says that its images are in {place!r:.80}, which is not read unasked. If you trust it, give the images: "
            raise DataError(text, FOLDER, ".")
    if not 0 <= recorded.get("seed", 0) < 2**63:
        raise RunError(f"{run}: results.data.split.seed={recorded['seed']!r:.40} is no seed. Copy the run again.")


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


# ---------------------------------------------------------------------------------------------------- the folder of a new run


def new_folder(out: Path, *, overwrite: bool, resume: bool, tune: str = "ptee tune {out} --max-drop 0.01") -> Path:
    """`out`, if a run may be written there: it is new, empty, to be resumed, or may be overwritten. `tune`: what to type to tune it.

    Raises:
        RunError: if it holds something else, there is nothing to resume, or it is to be resumed and overwritten.
    """
    if resume and overwrite:
        anew, text = Argument("overwrite", "True"), " goes on with a training, and "
        raise RunError(Argument("resume", "True"), text, anew, " begins it anew. Give one of them.")
    require_writable(out)
    settle(out)
    unfinished = is_interrupted(out)
    lacking = resume and not (unfinished or (out / UNREADABLE).is_file())
    if lacking and is_run(out):
        anew, text = Argument("overwrite", "True"), f", or choose its thresholds again: {tune.format(out=quoted(out))}"
        begin = (f"The training in {out} is complete. Begin it anew with ", anew, " in place of ", RESUME, text)
        raise RunError(*begin, argument="resume")
    if lacking:
        text = f"There is no interrupted training in {out}. Give its folder with "
        raise RunError(text, OUT, ", or leave out ", RESUME, ".", argument="resume")
    if resume or not out.is_dir() or all(_is_of_no_run(path.name) for path in out.iterdir()):
        return out
    if not (unfinished or is_run(out)):
        raise RunError(f"{out} holds something else than a run. Give a new folder with ", OUT, ".", argument="out")
    if overwrite:
        return out
    what = "a run that lacks its results" if is_run(out) else "an interrupted training"
    goes_on = (f"{what}; the same settings with ", Argument("resume", "True"), " go on with it")
    found = (f"{out} holds ", *(goes_on if unfinished else ("a run",)), ". Give another folder with ", OUT)
    raise RunError(*found, ", or replace it with ", Argument("overwrite", "True"), ".", argument="out", value=out)


def folder_of_fit(out: str | Path | None, *, overwrite: bool, resume: bool) -> Path | None:
    """The same, where nothing need be saved.

    Raises:
        PteeError: as of `new_folder`, and if there is no folder to resume in.
    """
    if out is not None:
        return new_folder(as_path(out, "out"), overwrite=overwrite, resume=resume, tune=TUNE_IN_PYTHON)
    if resume:
        give = Argument("out", "FOLDER")
        raise PteeError("There is nothing to resume without a folder. Give ", give, ".", argument="resume")
    return None


@contextmanager
def or_anew() -> Iterator[None]:
    """Where a checkpoint belongs to another training, the user can say that it is begun anew, or elsewhere."""
    try:
        yield
    except RunError as why:
        if why.argument != "checkpoint":
            raise
        anew = (" Or begin anew: ", Argument("overwrite", "True"), " in place of ", RESUME, ", or another ", OUT, ".")
        raise RunError(*why.parts, *anew, argument="resume") from why


def require_same_training(out: Path, recipe: Recipe) -> None:
    """Refuse to go on with a training that was begun with other settings.

    Only the recipe is compared here; the data are compared when the training begins.

    Raises:
        RunError: naming them.
    """
    try:
        then = from_json(read_notes(out / CHECKPOINT)["training"])
        now = recipe.resolved().training.model_dump(mode="json")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # a file that is damaged is refused when it is read
    known = [name for name in SETTLED if isinstance(then, dict) and name in then and now[name] != "auto"]
    if words := other_settings(then, now, [name for name in known if then[name] != now[name]]):
        with or_anew():
            raise of_another_training(out / CHECKPOINT, words)


def is_interrupted(out: Path) -> bool:
    """Whether a folder holds the checkpoint of a training that is not over."""
    return (out / CHECKPOINT).is_file()


def _is_of_no_run(name: str) -> bool:
    """Whether a process that ended before its first epoch may have left this file."""
    return name in (UNREADABLE, PLACED_BY) or is_left_over(name)
