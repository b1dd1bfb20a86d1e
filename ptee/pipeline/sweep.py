"""A sweep: one model fitted many times, by a recipe with other settings each time."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ptee._common.devices import require_one_process
from ptee._common.errors import Argument, Interrupted, PteeError, RunError, first_line
from ptee._common.text import Readable, or_dash, table
from ptee._common.writing import clear_unfinished, write_text
from ptee.backbones.load import Backbone
from ptee.backbones.weights import weights_hash
from ptee.data.demo_images import DEMO
from ptee.data.labels import LabelMap
from ptee.data.splits import AS_DELIVERED, Data
from ptee.model import run_files, saving
from ptee.model.run_config import BackboneRecord
from ptee.pipeline.fit import Job, checked_model, fit_backbone
from ptee.pipeline.images import carried_out, recipe_for
from ptee.pipeline.recipe import Recipe, make_recipe
from ptee.pipeline.recorded import SWEEP_TABLE, is_interrupted, new_folder
from ptee.report import curves
from ptee.report.pictures import write_figure
from ptee.training.config import JOINT
from ptee.training.training_data import shared_caches
from ptee.tuning.config import Target
from ptee.tuning.tune import is_missed

FIGURES = ("cost", "accuracy", "fidelity")  # of each run
FIGURE = "sweep.html"
MOST_RUNS = 1000
LARGEST_TABLE = 4 * 2**20  # bytes
OF_ALL = (*FIGURES, "backbone's accuracy")  # the last columns of a table
OpenData = Callable[[int], tuple[Data, LabelMap]]  # gives the images for a seed


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep."""

    folder: str  # its name
    settings: dict[str, Any]  # those that were changed, by path
    figures: dict[str, float | None]  # on the report images: FIGURES, and the accuracy of the backbone
    target: str = "-"  # of the thresholds, on these images: kept, missed, or - if there is none or it is not known


@dataclass(frozen=True)
class Sweep(Readable):
    """The runs of a sweep. Prints as a table."""

    rows: tuple[SweepRow, ...]
    folder: Path

    def __str__(self) -> str:
        files = f"The table is in {self.folder / SWEEP_TABLE}, the figure in {self.folder / FIGURE}."
        title, *cells = self._cells()
        shown = [(*title, "target"), *((*line, row.target) for line, row in zip(cells, self.rows, strict=True))]
        return f"{table(shown, left={0, len(title)})}\n\n{files}"

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """Name, settings and figures of each run, for a figure. The name says the settings in which the runs differ."""
        return [{"name": self._short_name(row)} | row.settings | row.figures for row in self.rows]

    def _short_name(self, row: SweepRow) -> str:
        varied = [key for key in row.settings if len({str(other.settings[key]) for other in self.rows}) > 1]
        said = [(key.rpartition(".")[2], row.settings[key]) for key in varied]
        words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in said]
        return ", ".join(words) or row.folder

    def _cells(self) -> list[tuple[str, ...]]:
        cells = [("run", *self.rows[0].settings, *OF_ALL)]
        for row in self.rows:
            numbers = [row.figures[name] for name in (*FIGURES, "backbone")]
            shown = [or_dash(number, ".4f") for number in numbers]
            cells.append((row.folder, *map(str, row.settings.values()), *shown))
        return cells

    def to_csv(self) -> str:
        """The table as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self._cells())
        return text.getvalue()


def _fault(text: str) -> PteeError:
    return PteeError(text, argument="over")


def run_sweep(
    open_data: OpenData, backbone: Backbone, base: Recipe, axes: Mapping[str, Sequence[Any]], job: Job
) -> Sweep:
    """Fit every combination of the values of some settings. Runs that are complete are kept.

    Args:
        open_data: gives the images for a seed.
        backbone: the same for all runs.
        base: the recipe that is changed.
        axes: the values to try, by the path of their setting.
        job: how each run is fitted; `out` is the folder of all of them.

    Raises:
        PteeError: before any training, if a combination is not possible.
        Interrupted: on Ctrl-C.
    """
    assert job.out is not None
    require_one_process()
    clear_unfinished(job.out)
    data, runs = _Images(open_data), _runs(base, axes, job.out)
    for folder, _, recipe in runs:
        images, adapted = data.for_recipe(recipe)
        if not _is_complete(folder, adapted, images, backbone):
            new_folder(folder, overwrite=False, resume=is_interrupted(folder))
            checked_model(backbone, images, adapted)[0].detach()
    with shared_caches():
        return _fit_all(backbone, data, runs, job)


def _runs(base: Recipe, axes: Mapping[str, Sequence[Any]], out: Path) -> list[tuple[Path, dict[str, Any], Recipe]]:
    """Folder, changed settings and recipe of each run."""
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(combinations) > MOST_RUNS:
        raise _fault(f"These are {len(combinations):,} runs; a sweep has {MOST_RUNS:,} at most. Give fewer values.")
    names = [_name(settings) for settings in combinations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _fault(f"Two runs would be called {twice}. Give each value once.")
    return [(out / name, each, make_recipe(base, each)) for name, each in zip(names, combinations, strict=True)]


def _name(settings: Mapping[str, Any]) -> str:
    """The changed settings, in letters that any file system takes."""
    text = "_".join(f"{path.rpartition('.')[2]}={value}" for path, value in settings.items())
    return "".join(c if c.isalnum() or c in "=._-" else "-" for c in text)[:200]


class _Images:
    """The images of each seed, opened once."""

    def __init__(self, open_data: OpenData) -> None:
        self.open_data = open_data
        self.of_seed: dict[int, tuple[Data, LabelMap]] = {}

    def for_recipe(self, recipe: Recipe) -> tuple[Data, Recipe]:
        """The images, and the recipe that their labels allow."""
        data, labels = self._opened(recipe.seed)
        return data, recipe_for(labels, recipe)

    def _opened(self, seed: int) -> tuple[Data, LabelMap]:
        if seed not in self.of_seed:
            self.of_seed[seed] = self._delivered(seed) or self.open_data(seed)
        return self.of_seed[seed]

    def _delivered(self, seed: int) -> tuple[Data, LabelMap] | None:
        """The images of another seed, if no seed draws any."""
        for data, labels in self.of_seed.values():
            if data.split["rule"] == AS_DELIVERED and data.split["kind"] != DEMO:
                return replace(data, split=data.split | {"seed": seed}), labels
        return None


def _fit_all(backbone: Backbone, data: _Images, runs: Sequence[tuple[Path, dict[str, Any], Recipe]], job: Job) -> Sweep:
    rows: list[SweepRow] = []
    assert job.out is not None
    for number, (folder, settings, recipe) in enumerate(runs, 1):
        images, adapted = data.for_recipe(recipe)
        complete = _is_complete(folder, adapted, images, backbone)
        job.log(f"\nRun {number} of {len(runs)}: {folder.name}{' is complete already.' * complete}")
        if not complete:
            _fit(backbone, images, adapted, replace(job, out=folder, resume=is_interrupted(folder)))
        rows.append(_row(folder, settings))
        sweep = Sweep(tuple(rows), job.out)
        write_text(job.out / SWEEP_TABLE, sweep.to_csv())
    title = f"{len(rows)} runs: {job.out.name}"
    write_figure(curves.runs(sweep.numbers), job.out / FIGURE, title)  # the merit against cost: a point for each run
    return sweep


def _fit(backbone: Backbone, data: Data, recipe: Recipe, job: Job) -> None:
    try:
        own = replace(backbone, module=deepcopy(backbone.module)) if recipe.backbone == JOINT else backbone
        fit_backbone(own, data, recipe, job).detach()
    except Interrupted as why:
        raise Interrupted(f"{why} The same command goes on.") from why


def _is_complete(folder: Path, recipe: Recipe, data: Data, backbone: Backbone) -> bool:
    """Whether a folder holds a run that was measured.

    Raises:
        RunError: if that run was made by another recipe, of other images or of another backbone.
    """
    if not run_files.is_run(folder) or is_interrupted(folder):
        return False
    results = run_files.read_metrics(folder).get("results") or {}
    same = {
        "another recipe": make_recipe(folder).to_yaml() == carried_out(recipe, data).to_yaml(),
        "other images": results.get("data") == json.loads(json.dumps(data.record)),
        "another backbone": _is_of(saving.read(folder).config.backbone, backbone, recipe),
    }
    if other := [name for name, is_same in same.items() if not is_same]:
        text = f"{folder} holds a run of {' and '.join(other)}. Give another folder with "
        raise RunError(text, Argument("out"), ".", argument="out")
    if "rows" not in results:
        return False
    _row(folder, {})
    return True


def _is_of(record: BackboneRecord, backbone: Backbone, recipe: Recipe) -> bool:
    """Whether a run's backbone is this one; if it learnt, whether it began as this one, for its weights are others now."""
    if recipe.backbone != JOINT:
        return record.hash == weights_hash(backbone.module)
    source = json.loads(json.dumps(backbone.trained().source))
    return (record.name, record.source) == (backbone.name, source)


def _row(folder: Path, settings: Mapping[str, Any]) -> SweepRow:
    try:
        results = run_files.read_metrics(folder)["results"]
        bare, *_, own = results["rows"]
        target = _target(results)
        figures = {name: own[name] for name in FIGURES} | {"backbone": bare["accuracy"]}
        sound = all(value is None or isinstance(value, int | float) for value in figures.values())
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        text = f"{folder}: {run_files.METRICS} does not hold what was measured. Delete the folder, and the run is made again."
        raise RunError(text)
    return SweepRow(folder.name, dict(settings), figures, target)


def _target(results: Mapping[str, Any]) -> str:
    """How the target of a run fares on the report images, in a word."""
    tuning = results.get("tuning") or {}
    if "target" not in tuning or (tuning["target"]["kind"] == "max_cost" and tuning["score"]["time"] is not None):
        return "-"
    missed = is_missed(Target(**tuning["target"]), results)
    return "-" if missed is None else "missed" if missed else "kept"


def read_sweep(folder: Path) -> Sweep:
    """The runs of a sweep, read from its table.

    Raises:
        RunError: if there is no complete table.
    """
    try:
        if (size := (folder / SWEEP_TABLE).stat().st_size) > LARGEST_TABLE:
            raise ValueError(f"it has {size:,} bytes, and no table has more than {LARGEST_TABLE:,}")
        with (folder / SWEEP_TABLE).open(encoding="utf-8", newline="") as file:
            title, *lines = csv.reader(file)
        if len(lines) > MOST_RUNS or len(set(title)) < len(title):
            raise ValueError(f"it has a column twice, or more than {MOST_RUNS:,} runs")
        first, *names = title[: -len(OF_ALL)]  # a table of single runs has no settings
        if first != "run" or tuple(title[-len(OF_ALL) :]) != OF_ALL:
            raise ValueError("its columns are not those of a sweep.")
        rows = [_read_row(names, line) for line in lines]
    except (OSError, ValueError, csv.Error) as why:
        raise RunError(
            f"{folder} holds no sweep: {SWEEP_TABLE} cannot be read ({first_line(why)}) Make it with ptee sweep."
        ) from why
    if not rows:
        raise RunError(f"{folder}: {SWEEP_TABLE} holds no run. The same ptee sweep goes on.")
    return Sweep(tuple(rows), folder)


def _read_row(names: Sequence[str], line: Sequence[str]) -> SweepRow:
    name, *cells = line
    settings = {key: _number_or_text(cell) for key, cell in zip(names, cells[: len(names)], strict=True)}
    numbers = [None if cell == "-" else float(cell) for cell in cells[len(names) :]]
    if not all(number is None or 0 <= number < math.inf for number in numbers):
        raise ValueError("a figure of a run is no number from 0 on")
    return SweepRow(name, settings, dict(zip((*FIGURES, "backbone"), numbers, strict=True)))


def _number_or_text(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
