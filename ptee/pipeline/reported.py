"""A saved run as a page and as single figures: opened, compared where there are images, and drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ptee._common.errors import Argument, PteeError, RunError
from ptee._common.files import as_path, is_file
from ptee._common.progress import Log, silent
from ptee._common.text import number_of
from ptee._common.validation import BATCH_SIZE, checked
from ptee._common.writing import require_page, require_writable, settle
from ptee.analysis.freezing import device_of
from ptee.data.splits import Unseen, parts_for_all
from ptee.deploy.export import checked_names
from ptee.evaluation.comparison import DROPS, smaller_network
from ptee.evaluation.comparison_lines import LINES
from ptee.evaluation.comparison_table import Comparison
from ptee.exits.times import BatchTimes
from ptee.model.build import load
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.run_files import METRICS, metrics_of
from ptee.pipeline.images import from_data_sets, has_labels
from ptee.pipeline.recipe import RECIPE_FILE, make_recipe
from ptee.pipeline.recorded import FIGURES_OF_RUN, FIGURES_OF_SWEEP
from ptee.pipeline.saved_run import OpenRun, compare_runs, load_run
from ptee.pipeline.sweep import Sweep, read_sweep
from ptee.report import curves, exit_figures, facts
from ptee.report import parts as page_parts
from ptee.report.gallery import picture
from ptee.report.page import write_page
from ptee.report.pictures import require_kaleido, write_figures
from ptee.report.reported import Reported
from ptee.timing.settings import AUTO, FILE, require_kept_times
from ptee.timing.times import read_times
from ptee.tuning.config import AT_BATCH, OPERATIONS, TIME, ThresholdsConfig
from ptee.tuning.traces import Traces, record


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Row(_Checked):
    name: str
    accuracy: float | None
    fidelity: float
    cost: float
    right: float | None


class _Target(_Checked):
    kind: str
    limit: float


class _Tuning(_Checked):
    target: _Target | None = None
    images: str = ""
    source: str | None = None


class _Results(_Checked):
    rows: list[_Row] = []
    leaving: list[float] = []
    samples: int = 0
    verdict: list[str] = []
    tuning: _Tuning | None = None
    calibration: dict[str, Any] | None = None


class _Epoch(_Checked):
    number: int
    loss: float
    val_loss: float | None
    accuracy: list[float] | None
    fidelity: list[float] | None
    leaving: list[float] = []


class _Training(_Checked):
    epochs: list[_Epoch] = []
    warning: str | None = None


class _Recorded(_Checked):
    """What a page reads of metrics.json, which may come from elsewhere."""

    results: _Results | None = None
    training: _Training | None = None


def read_recorded(run: str) -> dict[str, Any]:
    """What a run's metrics.json says, in the form that a page needs; empty if there is none.

    Raises:
        RunError: if it is in another form.
    """
    folder = Path(run)
    settle(folder)
    metrics = metrics_of(folder)
    try:
        _Recorded.model_validate(metrics)
        facts.recorded(metrics.get("results") or {})
        if epochs := (metrics.get("training") or {}).get("epochs"):
            exit_figures.training(epochs)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as why:
        raise RunError(f"{run}: {METRICS} does not hold what a run records. Copy the run again.") from why
    return metrics


def reported(
    runs: Mapping[str, OpenRun],
    folders: Mapping[str, str],
    *,
    log: Log,
    pictures: bool = True,
    with_target: bool = True,
    **how: Any,
) -> tuple[Reported, Comparison]:
    """What the page of the first run says, beside the others; and the comparison. `how` as of `compare_runs`.

    A run that was not saved has an empty folder. `with_target`: where nobody said which drops are compared, the one that the first
    run's thresholds were chosen for is among them.

    Raises:
        PteeError: as of `compare_runs`.
    """
    name, first = next(iter(runs.items()))
    run = folders[name]
    metrics = read_recorded(run) if run else {"results": first.model.results}
    said = _of(run, first.model, metrics, how.get("at_batch", AT_BATCH), how.get("executor", AUTO))
    drops = tuple(how.pop("drops", DROPS))
    target = said.target_drop(has_labels(first.unseen.data))
    if with_target and drops == DROPS and target is not None and target >= 0:  # a gain is no drop
        drops = tuple(sorted({*drops, target}))
    kept: dict[str, Traces] = {}
    found = compare_runs(runs, log=log, keep=kept, drops=drops, **how)
    images = parts_for_all([run.unseen for run in runs.values()])
    traces = replace(kept[name], times=said.times)
    shown = images.report if pictures else None
    more: dict[str, Any] = {
        "names": class_names(first),
        "about": f"Images: {found.about} {first.accuracy}",
        "folders": folders,
    }
    return replace(said, traces=traces, comparison=found, images=shown, **more), found


@checked
def write_report(
    model: EarlyExitModel | str | Path,
    val_data: Any,
    *,
    calibration_data: Any = None,
    out: str | Path = "report.html",
    backbone: nn.Module | None = None,
    class_names: Sequence[str] = (),
    pictures: bool = True,
    figures: str | Path | None = None,
    static: Mapping[str, str | nn.Module] | None = None,
    drops: Sequence[float] = DROPS,
    lines: Sequence[str] = LINES,
    cost: str = OPERATIONS,
    at_batch: int = AT_BATCH,
    executor: str = AUTO,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: str | torch.device | None = None,
) -> Path:
    """Write the page that `ptee report` draws, of any model: what it saves and loses, and why. Replaces a page that is there, and no other file.

    Args:
        model: an early-exit model; or the folder of a saved run: then the page also shows the training and the recipe.
        val_data: images that neither the backbone nor the heads learned from: a map-style data set of (image, label) or (image,).
            All numbers are of these, or of half of them.
        calibration_data: images to choose the thresholds of the alternatives on. None: half of `val_data`, the half that `ptee.fit` takes.
        out: the page, a name that ends in .html.
        backbone: of a saved run whose network has no name.
        class_names: in the order of the backbone's classes.
        pictures: show some of the images.
        figures: a folder; each figure is written there as SVG and PNG, too.
        static: as of `ptee.compare`, like all that follow but for the next three after `lines`.
        drops: allowed drops.
        lines: lines of the model.
        cost: "operations", or "time": seconds, which the folder of a run keeps (`ptee.fit(cost="time")`, `ptee bench RUN --save`).
        at_batch: images in a batch, for the cost in time.
        executor: what runs the model, for the cost in time: "auto" or one that was measured.
        batch_size: of images.
        num_workers: processes that load images.
        device: None: where the model is.

    Returns:
        `out`.

    Raises:
        PteeError: if the images, the file or a setting cannot be used; as of `load` and `compare`.
    """
    place, folder = as_path(out, "out"), None if figures is None else as_path(figures, "figures")
    require_page(place)
    if folder is not None:
        require_writable(folder)
        require_kaleido()
    saved = str(model) if isinstance(model, str | Path) else ""
    _require_times(saved, cost, at_batch, executor, own=backbone is not None)
    opened = load(model, backbone=backbone) if isinstance(model, str | Path) else model
    require_early_exit(opened)
    checked_names(class_names, opened.num_classes)
    split = ((opened.results or {}).get("data") or {}).get("split") or {}
    data = from_data_sets(None, val_data, calibration_data, seed=split.get("seed", 0), report_only=True)
    data = replace(data, split=data.split | {"classes": list(class_names)})
    unseen = Unseen(saved, data, data.validation, data.split["seed"])
    how: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "device": device, "static": static}
    if cost == TIME:
        how |= {"cost": cost, "at_batch": at_batch, "executor": executor, "device": device_of(opened.heads, device)}
        how["static"] = {name: smaller_network(name, given, opened) for name, given in (static or {}).items()}
    how |= {"drops": drops, "lines": lines, "pictures": pictures}
    run = OpenRun(opened, unseen, "", "" if has_labels(data) else "The images have no labels, so there is no accuracy.")
    said, _ = reported({"model": run}, {"model": saved}, log=silent, **how)
    parts = write_page(replace(said, in_python=True), place)
    if folder is not None:
        write_figures(parts, folder)
    return place


def _require_times(saved: str, cost: str, at_batch: int, executor: str, own: bool) -> None:
    """Refuse costs that there are not, and costs in seconds where no folder keeps any."""
    how = {"at_batch": at_batch, "executor": executor}
    by = ThresholdsConfig(cost=cost, **how)
    by.require_used(name for name, value in how.items() if value != ThresholdsConfig.model_fields[name].default)
    if cost == TIME and not saved:
        text = " needs times, which the folder of a run keeps. Give the folder in place of the model."
        raise PteeError(Argument.text("cost", cost), text, value=cost)
    if cost == TIME and own and not is_file(Path(saved) / FILE):  # which no command can measure
        text = (
            f"{saved} keeps no times of its pieces. For a network of your own they are kept by ptee.fit(cost='time')."
        )
        raise PteeError(text, argument="cost", value=cost)
    if cost == TIME:
        require_kept_times(Path(saved))


def class_names(run: OpenRun) -> tuple[str, ...]:
    """The names of the backbone's classes, in its order; empty if the images do not say all of them."""
    names = run.unseen.data.split.get("classes", ())
    return tuple(map(str, names)) if len(names) == run.model.num_classes else ()


def recorded_only(run: str, weights: Path | None) -> Reported:
    """What a run says by itself: no image is read.

    Raises:
        RunError: if it recorded nothing.
    """
    metrics = read_recorded(run)
    if not metrics:
        raise RunError(
            f"{run} has no {METRICS}, so there is nothing to report without images. Give some: ",
            Argument("data", "FOLDER"),
            ".",
        )
    said = _of(run, load_run(run, weights), metrics)
    if (leaving := (metrics.get("results") or {}).get("leaving")) and len(leaving) != len(said.model.exits) + 1:
        raise RunError(
            f"{run}: {METRICS} is of a run with {number_of(len(leaving) - 1, 'exit')}, and this one has {len(said.model.exits)}. Copy the run again."
        )
    return said


def _of(
    run: str, model: EarlyExitModel, metrics: Mapping[str, Any], batch: int = AT_BATCH, executor: str = AUTO
) -> Reported:
    """What a run says by itself. Its times are for batches of this size."""
    folder = Path(run)
    recipe = make_recipe(folder).to_yaml() if run and (folder / RECIPE_FILE).is_file() else ""
    return Reported(run, model, metrics, recipe=recipe, times=_times(run, batch, executor))


def _times(run: str, batch: int, executor: str) -> BatchTimes | None:
    """The times that a run keeps, for batches of this size or of the largest that was measured; None if it keeps none."""
    if not run or not (Path(run) / FILE).is_file():
        return None
    times = read_times(Path(run))
    return times.at(min(batch, times.rows[-1]), executor)


# ---------------------------------------------------------------------------------------------------- single figures


class Kind(NamedTuple):
    """A kind of figure: its title, and what draws it."""

    title: str
    draw: Callable[[Any], Any]


OF_RUN = {
    "curve": Kind("Accuracy against cost", lambda of: page_parts.curve(of, curves.ACCURACY)),
    "threshold": Kind("What a threshold gives", lambda of: curves.threshold(facts.steps(of.traces, of.model.off))),
    "exits": Kind("Where images leave", lambda of: exit_figures.shares(of.own, of.traces.targets is not None)),
    "network": Kind("Where the exits stand", page_parts.network),
    "epochs": Kind("The training, epoch by epoch", lambda of: exit_figures.epochs(_epochs(of), of.model.costs)),
    "confidence": Kind("How sure each exit is", page_parts.confidence),
    "gallery": Kind("Which images leave where", lambda of: picture(page_parts.pictures(of))),
}
OF_SWEEP = {
    "curve": Kind("The runs of a sweep", lambda sweep: curves.runs(sweep.numbers)),
    "lambda": Kind("Over a setting", lambda sweep: curves.over_setting(sweep.numbers, _varied(sweep))),
}
assert (*OF_RUN,) == FIGURES_OF_RUN and (*OF_SWEEP,) == FIGURES_OF_SWEEP


def sweep_figure(folder: Path, kind: str) -> tuple[Any, str]:
    """A figure of a sweep, and its title."""
    title, draw = OF_SWEEP[kind]
    return draw(read_sweep(folder)), title


def recorded_figure(run: str, kind: str, weights: Path | None) -> tuple[Any, str]:
    """A figure of `WITHOUT_IMAGES`, and its title: no image is read."""
    title, draw = OF_RUN[kind]
    return draw(_of(run, load_run(run, weights), read_recorded(run))), title


def run_figure(opened: OpenRun, run: str, kind: str, *, log: Log, **how: Any) -> tuple[Any, str]:
    """A figure that is made of images, and its title. Only the curve is a comparison; all others need one pass over the report
    images.

    Raises:
        PteeError: if there are no images for it.
    """
    title, draw = OF_RUN[kind]
    if kind == "curve":
        name = Path(run).absolute().name
        return draw(reported({name: opened}, {name: run}, log=log, pictures=False, **how)[0]), title
    said = _of(run, opened.model, read_recorded(run))
    images, words = opened.left_by_tuning(given=False)
    log(f"{words} {opened.accuracy}")
    traces = record(opened.model, images, logits=False, **how)
    return draw(replace(said, traces=traces, images=images, names=class_names(opened))), title


def _epochs(of: Reported) -> list[dict[str, Any]]:
    """The epochs of a run's training."""
    found: list[dict[str, Any]] = (of.metrics.get("training") or {}).get("epochs") or []
    if not found or any(len(epoch["leaving"]) != len(of.model.costs) for epoch in found):
        raise RunError(f"{of.run}: {METRICS} holds no epochs of this run's training. Train it again.")
    return found


def _varied(sweep: Sweep) -> str:
    """The setting that has the most values. That of a seed is no axis."""
    values = {name: {str(row.settings[name]) for row in sweep.rows} for name in sweep.rows[0].settings}
    return max(values, key=lambda name: (name != "seed", len(values[name])))
