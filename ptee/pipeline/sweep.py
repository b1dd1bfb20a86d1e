"""A sweep: one model fitted many times, by a recipe with other settings each time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ptee._common.errors import Argument, Interrupted, PteeError, RunError, first_line
from ptee._common.files import replace_file, require_writable, write_text
from ptee._common.text import table
from ptee.backbones.load import Backbone
from ptee.backbones.weights import weights_hash
from ptee.data.labels import LabelMap
from ptee.data.splits import AS_DELIVERED, Data
from ptee.model import saving
from ptee.pipeline.fit import Job, Log, about, checked_model, fit_backbone, new_folder
from ptee.pipeline.images import recipe_for
from ptee.pipeline.recipe import Recipe, make_recipe, path_of, read_yaml
from ptee.training.training_data import shared_caches

FIGURES = ("cost", "accuracy", "fidelity")  # of each run
MOST_RUNS = 1000
OpenData = Callable[[int], tuple[Data, LabelMap]]


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep.

    Attributes:
        folder: name of the run's folder.
        settings: what was changed for it, by path.
        figures: cost, accuracy and fidelity on the report images; the backbone's accuracy, too.
    """

    folder: str
    settings: dict[str, Any]
    figures: dict[str, float | None]


@dataclass(frozen=True)
class Sweep:
    """What came of a sweep. Prints as a table."""

    rows: tuple[SweepRow, ...]
    folder: Path

    def __str__(self) -> str:
        return f"{table(self._cells(), left={0})}\n\nThe table is in {self.folder / 'sweep.csv'}, the figure in {self.folder / 'sweep.html'}."

    def _cells(self) -> list[tuple[str, ...]]:
        names = list(self.rows[0].settings)
        title = ("run", *names, *FIGURES, "backbone's accuracy")
        lines = [
            (
                row.folder,
                *(str(row.settings[name]) for name in names),
                *(_shown(row.figures[f]) for f in (*FIGURES, "backbone")),
            )
            for row in self.rows
        ]
        return [title, *lines]

    def to_csv(self) -> str:
        """The table as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self._cells())
        return text.getvalue()


def _shown(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.4f}"


def read_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Settings and their values, of texts such as `training.cost_weight=0.3,0.5,0.9`.

    Raises:
        UnknownName: if there is no such setting.
        PteeError: if a text is not of that form, or a setting is named twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise PteeError(
                f"{text!r} says no values. Write NAME=VALUE,VALUE, such as seed=0,1,2.", argument="over", value=text
            )
        path = path_of(name.strip())
        if path in axes:
            raise PteeError(
                f"The setting {path} is given twice. Give all its values at once.", argument="over", value=text
            )
        try:
            axes[path] = list(read_yaml(f"[{values}]"))
        except yaml.YAMLError as why:
            raise PteeError(
                f"The values of {text!r} cannot be read: {first_line(why)}", argument="over", value=text
            ) from why
    return axes


def run_sweep(
    open_data: OpenData,
    backbone: Backbone,
    base: Recipe,
    axes: Mapping[str, Sequence[Any]],
    out: Path,
    *,
    device: Any = None,
    num_workers: int = 0,
    log: Log,
) -> Sweep:
    """Fit every combination of settings; runs that are complete already are kept.

    Args:
        open_data: gives the images for a seed.
        backbone: the same for all.
        base: the recipe that is changed.
        axes: settings by path, with the values to try.
        out: folder of all runs.
        device: where the heads learn.
        num_workers: processes that load images.
        log: is told what happens.

    Raises:
        PteeError: if a combination cannot be; before anything is trained.
        Interrupted: on Ctrl-C.
    """
    combinations = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    if len(combinations) > MOST_RUNS:
        raise PteeError(
            f"These are {len(combinations):,} runs; a sweep has {MOST_RUNS:,} at most. Give fewer values.",
            argument="over",
        )
    names = [_name(settings) for settings in combinations]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PteeError(f"Two runs would be called {twice}. Give each value once.", argument="over")
    require_writable(out)
    recipes = [make_recipe(base, settings) for settings in combinations]
    data = _Images(open_data, log)
    for name, recipe in zip(names, recipes, strict=True):
        images, adapted = data.for_recipe(recipe)
        if not _is_complete(out / name, adapted, images, backbone):
            new_folder(out / name, overwrite=False, resume=_is_interrupted(out / name))
            checked_model(backbone, images, adapted)[0].detach()
    with shared_caches():
        return _run_all(backbone, data, combinations, recipes, out, device, num_workers, log)


class _Images:
    """The images of each seed, opened once."""

    def __init__(self, open_data: OpenData, log: Log) -> None:
        self.open_data, self.log = open_data, log
        self.of_seed: dict[int, tuple[Data, LabelMap]] = {}

    def for_recipe(self, recipe: Recipe) -> tuple[Data, Recipe]:
        """The images, and the recipe as their labels allow it."""
        data, labels = self._opened(recipe.seed)
        return data, recipe_for(labels, recipe)

    def _opened(self, seed: int) -> tuple[Data, LabelMap]:
        if seed in self.of_seed:
            return self.of_seed[seed]
        for data, labels in self.of_seed.values():
            if data.split["rule"] == AS_DELIVERED:  # no image is drawn, so these are the same ones
                return replace(data, split=data.split | {"seed": seed}), labels
        data, labels = self.of_seed[seed] = self.open_data(seed)
        self.log(f"{labels.reason} {labels.doubt}".rstrip())
        return data, labels


def _run_all(
    backbone: Backbone,
    data: _Images,
    combinations: Sequence[dict[str, Any]],
    recipes: Sequence[Recipe],
    out: Path,
    device: Any,
    num_workers: int,
    log: Log,
) -> Sweep:
    rows: list[SweepRow] = []
    for number, (settings, recipe) in enumerate(zip(combinations, recipes, strict=True), 1):
        folder = out / _name(settings)
        images, adapted = data.for_recipe(recipe)
        if _is_complete(folder, adapted, images, backbone):
            log(f"\nRun {number} of {len(recipes)}: {folder.name} is complete already.")
        else:
            log(f"\nRun {number} of {len(recipes)}: {folder.name}")
            _fit(backbone, images, adapted, Job(folder, device, num_workers, _is_interrupted(folder), log=log))
        rows.append(_row(folder, settings))
        sweep = Sweep(tuple(rows), out)
        write_text(out / "sweep.csv", sweep.to_csv())
    _draw(sweep, out / "sweep.html")
    return sweep


def _fit(backbone: Backbone, data: Data, recipe: Recipe, job: Job) -> None:
    try:
        fit_backbone(backbone, data, recipe, job).detach()
    except Interrupted as why:
        raise Interrupted(f"{why} The same command goes on.") from why


def _name(settings: Mapping[str, Any]) -> str:
    """Of a folder: the settings that were changed, in letters that any file system takes."""
    text = "_".join(f"{path.rpartition('.')[2]}={value}" for path, value in settings.items())
    return "".join(c if c.isalnum() or c in "=._-" else "-" for c in text)[:200]


def _is_complete(folder: Path, recipe: Recipe, data: Data, backbone: Backbone) -> bool:
    """Whether a folder holds a run that was measured.

    Raises:
        RunError: if that run was made by another recipe, of other images or of another backbone.
    """
    if not saving.is_run(folder) or _is_interrupted(folder):
        return False
    results = saving.read_metrics(folder).get("results") or {}
    same = {
        "recipe": make_recipe(folder).to_yaml() == recipe.to_yaml(),
        "images": results.get("data") == json.loads(json.dumps(about(data))),
        "backbone": saving.read(folder).config.backbone.hash == weights_hash(backbone.module),
    }
    if other := [name for name, is_same in same.items() if not is_same]:
        raise RunError(
            f"{folder} holds a run of another {' and another '.join(other)}. Give another folder with ",
            Argument("out"),
            ".",
            argument="out",
        )
    return "rows" in results


def _is_interrupted(folder: Path) -> bool:
    return (folder / saving.CHECKPOINT).is_file()


def _row(folder: Path, settings: Mapping[str, Any]) -> SweepRow:
    results = saving.read_metrics(folder)["results"]
    own, bare = results["rows"][-1], results["rows"][0]
    figures = {name: own[name] for name in FIGURES} | {"backbone": bare["accuracy"]}
    return SweepRow(folder.name, dict(settings), figures)


def _draw(sweep: Sweep, path: Path) -> None:
    """Accuracy (without labels: fidelity) against cost, a point for each run."""
    from plotly import graph_objects as go

    measure = "fidelity" if any(row.figures["accuracy"] is None for row in sweep.rows) else "accuracy"
    figure = go.Figure(
        go.Scatter(
            x=[row.figures["cost"] for row in sweep.rows],
            y=[row.figures[measure] for row in sweep.rows],
            text=[row.folder for row in sweep.rows],
            mode="markers+text" if len(sweep.rows) <= 20 else "markers",
            textposition="top center",
        )
    )
    bare = sweep.rows[0].figures["backbone"] if measure == "accuracy" else 1.0
    figure.add_hline(y=bare, line_dash="dot", annotation_text="backbone")
    figure.update_layout(
        xaxis_title="cost, as a fraction of the bare backbone's", yaxis_title=measure, template="plotly_white"
    )
    replace_file(path, lambda beside: figure.write_html(beside, include_plotlyjs=True))
