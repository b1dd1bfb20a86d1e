"""A saved run opened again, with images that its heads have not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptee._common.devices import resolve_device, threads
from ptee._common.errors import Argument, DataError, Interrupted
from ptee._common.listing import HUB
from ptee._common.progress import Log
from ptee.backbones.load import Backbone, InputConfig
from ptee.data.batches import marks_in
from ptee.data.labels import describe_labels
from ptee.data.pictures import all_broken_named
from ptee.data.sources import require_source
from ptee.data.splits import (
    AS_DELIVERED,
    GIVE_DATA,
    TRACES,
    Data,
    Unseen,
    images_to_report_on,
    left_by_tuning,
    parts_for_all,
    parts_for_tuning,
    without_images,
)
from ptee.evaluation.class_order import labels_as_recorded
from ptee.evaluation.comparison import compare
from ptee.evaluation.comparison_table import Comparison
from ptee.evaluation.results import about_speed, evaluate
from ptee.exits.blend import BLENDED, Blend
from ptee.exits.times import BatchTimes
from ptee.model import card, saving
from ptee.model.build import load_moved
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_files import CARD
from ptee.pipeline.images import has_labels, open_images
from ptee.pipeline.recipe import RECIPE_FILE, Recipe, make_recipe
from ptee.pipeline.recorded import or_weights, recorded_images
from ptee.timing.measure import measure_static
from ptee.timing.settings import AUTO
from ptee.timing.times import times_for
from ptee.tuning.config import AT_BATCH, OPERATIONS, TIME
from ptee.tuning.reachable import require_labels
from ptee.tuning.trace_folder import TraceFolder
from ptee.tuning.tune import choose_thresholds, describe_outcome

FEW_MACS = 10_000_000  # multiply-accumulates of a network for which one CPU thread is faster than several


def usual_threads(model: EarlyExitModel) -> int | None:
    """One CPU thread for a tiny network; None for as many as torch takes."""
    return 1 if model.plan.macs < FEW_MACS else None


class OpenRun(NamedTuple):
    """A saved run and images."""

    model: EarlyExitModel  # with its heads and thresholds
    unseen: Unseen  # the images that its heads have not seen
    words: str  # which images those are, in a sentence
    accuracy: str  # what is known of their labels, in a sentence

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """One CPU thread for a tiny network, else as many as torch takes. If a picture cannot be read, all such are named."""
        with threads(usual_threads(self.model)), all_broken_named([self.unseen.images, self.unseen.data.calibration]):
            yield

    @property
    def decided(self) -> tuple[dict[int, float], Blend | None]:
        """T of each exit that is on, by its number, and the weights of blended answers: what decides where images leave."""
        model = self.model
        on = {n: t for n, t in enumerate(model.threshold) if n not in model.off}
        return on, model.blend if model.answers == BLENDED else None

    def left_by_tuning(self, given: bool) -> tuple[Any, str]:
        """The images that the thresholds were not chosen on, and a sentence about them. `given`: the user gives others."""
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
    device: Any = None,
    word: Callable[[Argument], str] = str,
) -> OpenRun:
    """Open a saved run, with images that its heads have not seen.

    Args:
        run: a folder, or user/repo on the hub.
        weights: a file with the backbone's weights, if they are not where the run says.
        data: other images than those of the run: a folder, or the name of a data set.
        data_root: the folder of a data set of torchvision.
        classes: a file that names the backbone's classes in its order.
        max_drop: of accuracy, if the user asks for one; then the backbone must be right under the labels.
        device: where the backbone is tried on some images; None: the CPU.
        word: says how to call an argument.

    Raises:
        DataError: if the run does not say which images it was made with, they have changed, or its classes are not the
            backbone's.
        PteeError: as of `load`.
    """
    if data:
        require_source(data)  # before the model is loaded
    model = load_run(run, weights)
    recorded = recorded_images(run, model.results, data)
    source, seed = data or recorded["source"], recorded.get("seed", 0)
    named = not data and not Path(source).is_absolute()  # the whole path of a folder is recorded
    if named and source.startswith(f"{HUB}/"):
        text = f"{run} was made with {source}, which may have to be fetched. If you trust it, give it again: "
        raise DataError(text, Argument.text("data", source), ".")
    found, labels = open_images(
        source,
        model.origin,
        seed=seed,
        root=data_root or (None if data else recorded.get("root")),
        named=named,
        classes=classes,
        trained=recorded.get("classes"),
        check=True,
        device=device,
        report_only=True,
        removed=recorded.get("removed", ()),
    )
    if max_drop is not None:
        labels.require_accuracy(Argument("max_drop", str(max_drop)), Argument("max_fidelity_drop", str(max_drop)))
    images, words = images_to_report_on(found, recorded, run)
    known = labels.indices is not None
    # of a source without parts all images may count, not those alone that were drawn for validation
    lacking = without_images(found, model.num_classes) if images is found.validation else ""
    accuracy = (
        f"{describe_labels(labels, word)} {lacking}".rstrip() if known else f"{labels.reason} So there is no accuracy."
    )
    return OpenRun(model, Unseen(run, found, images, seed), words, accuracy)


def open_traced(
    run: str,
    traces: TraceFolder,
    *,
    weights: Path | None = None,
    max_drop: float | None = None,
    word: Callable[[Argument], str] = str,
) -> OpenRun:
    """Open a saved run with what `ptee trace` recorded of it, in place of images; `traces` as of `open_traces`.

    Raises:
        DataError: if an accuracy is asked for and there are no labels, or none under which the backbone is right.
        PteeError: as of `load`.
    """
    place, size = str(traces.folders[0].resolve()), len(traces)
    split = {
        "kind": TRACES,
        "parts": {"validation": place},
        "rule": AS_DELIVERED,
        "seed": 0,
        "sizes": {"validation": size},
    }
    split["files_sha256"] = traces.images_sha256
    empty: Any = []
    data = Data(empty, empty, traces, (), place, split)  # type: ignore[arg-type]
    accuracy = "" if traces.labelled else "They have no labels, so there is no accuracy."
    instead = Argument("max_fidelity_drop", str(max_drop))
    if max_drop is not None and not traces.labelled:
        raise DataError(f"{traces.words} {accuracy} Give ", instead, ".", argument="max_drop")
    model = load_run(run, weights)
    if traces.labelled:
        labels = labels_as_recorded(model.origin, *traces.backbone_answers(model))
        if max_drop is not None:
            labels.require_accuracy(Argument("max_drop", str(max_drop)), instead)
        accuracy = describe_labels(labels, word)
    return OpenRun(model, Unseen(run, data, traces, 0), traces.words, accuracy)


def tune_run(
    opened: OpenRun, recipe: Recipe, *, log: Log, speed: bool, explain: bool = False, keep: bool = True, **how: Any
) -> dict[str, Any]:
    """Choose the thresholds of a saved run again, measure them on other images, and write both into the run, unless `keep` is False.

    Args:
        opened: a run on this disk.
        recipe: as of `recorded.tuning_recipe`.
        log: gets the messages to the user.
        speed: measure images per second, too.
        explain: add the legend to the table.
        keep: write them. If not, nothing on the disk changes.
        how: batch_size, num_workers and device.

    Raises:
        PteeError: if the target cannot be met.
        Interrupted: on Ctrl-C before anything is written.
    """
    model, folder, labelled = opened.model, Path(opened.unseen.run), has_labels(opened.unseen.data)
    target = recipe.thresholds.target(labelled)
    assert target is not None
    require_labels(target, labelled)
    own = make_recipe(folder) if (folder / RECIPE_FILE).is_file() else None
    wanted, times = recipe.thresholds, None
    if wanted.confidence is not None and own is not None and own.training.patience is not None and _watched(opened):
        why = f"{folder} was trained with patience={own.training.patience}, which picked the epoch by its loss on these images, so they cannot show what "
        raise DataError(why, Argument("confidence", f"{wanted.confidence:g}"), " guarantees. Give others: ", *GIVE_DATA)
    if wanted.cost == TIME:
        times = times_for(folder, model, resolve_device(how["device"]), wanted.at_batch, wanted.executor)
    try:
        report, words, found = choose_thresholds(model, opened.unseen, target, wanted, log=log, times=times, **how)
        if speed:
            log(f"\n{about_speed(model)}")
        results = evaluate(model, report, about=f"{opened.words} {words}", speed=speed, **how)
    except KeyboardInterrupt as why:
        raise Interrupted(f"The run in {folder} is as it was, with the thresholds that it had.") from why
    outcome, missed = describe_outcome(found, results.to_dict())
    results = replace(results, outcome=outcome, loses_too_much=None if target.kind == "max_cost" else missed)
    log(f"\n{results}" + f"\n\n{results.legend}" * explain)
    model.results = (model.results or {}) | results.to_dict()
    if not keep:
        return model.results
    more = {}
    if own is not None:  # so that the run's recipe gives these thresholds again
        more[RECIPE_FILE] = own.model_copy(update={"thresholds": recipe.thresholds}).to_yaml()
    if (text := card.text_for(model, folder)) is not None:
        more[CARD] = text
    saving.update(folder, more, model.versions, **saving.describe_tuning(model))
    return model.results


def _watched(opened: OpenRun) -> bool:
    """Whether thresholds are chosen on the images that the run's training watched."""
    unseen, data = opened.unseen, opened.unseen.data
    known = recorded_images(unseen.run, opened.model.results, data.source)
    files = known.get("files_sha256")
    same = data.place == known.get("source") or (files is not None and files == data.split.get("files_sha256"))
    return same and parts_for_tuning(unseen).calibration is data.calibration


def compare_runs(
    runs: Mapping[str, OpenRun],
    *,
    log: Log,
    cost: str = OPERATIONS,
    at_batch: int = AT_BATCH,
    executor: str = AUTO,
    **how: Any,
) -> Comparison:
    """Compare saved runs, by name, on images that none of them has seen; `how` as of `compare`.

    By `cost` "time" all is in seconds, in batches of one size: of the runs as they keep them, of smaller networks measured now.

    Raises:
        PteeError: as of `compare`, and if there are no such images or times.
    """
    if cost == TIME:
        how["times"] = _times(runs, how.get("static") or {}, resolve_device(how["device"]), at_batch, executor)
    first = next(iter(runs.values()))
    parts = parts_for_all([run.unseen for run in runs.values()])
    data = first.unseen.data
    others = _prepared_otherwise(how.get("static") or {}, first.model.origin.input)
    about = " ".join([f"{data.source}{data.unread}. {parts.words_of_lines}", *others])
    log(f"{about} {first.accuracy}")
    return compare({name: run.model for name, run in runs.items()}, parts.calibration, parts.report, about=about, **how)


def _prepared_otherwise(static: Mapping[str, Any], images: InputConfig) -> Iterator[str]:
    """For each smaller network with weights from a file: that it takes other images than these. The file may not want that."""
    for name, network in static.items():
        source = network.source if isinstance(network, Backbone) else None
        if source is None or "file" not in (source["weights"] or {}):
            continue
        (_, height, width), own = network.input.input_size, network.input
        resized = f" of {height} x {width} pixels" if own.input_size != images.input_size else ""
        alike = (own.mean, own.std) == (images.mean, images.std)
        normalised = "" if alike else f" {own.normalised}"
        if words := ",".join(filter(None, (resized, normalised))):
            yield (
                f"{name} takes images{words}, as {source['library']} has it for that name. If its weights were trained with others, it is "
                "better than this table says; ptee.compare in Python takes the network itself, and gives it the run's images."
            )


def _times(
    runs: Mapping[str, OpenRun], static: Mapping[str, Any], device: torch.device, batch: int, executor: str
) -> dict[str, BatchTimes]:
    found = {name: times_for(Path(run.unseen.run), run.model, device, batch, executor) for name, run in runs.items()}
    model = next(iter(runs.values())).model
    return found | {name: measure_static(network, model, device, batch) for name, network in static.items()}


def load_run(run: str, weights: Path | None) -> EarlyExitModel:
    """A saved run, with its weights from another place if they are given; errors name the option."""
    with or_weights(weights is not None):
        return load_moved(run, weights)


def _tuned_on(model: EarlyExitModel) -> dict[str, Any]:
    """What is known of the images that the thresholds were chosen on, as `left_by_tuning` takes it; empty if none were chosen."""
    tuning, trained = ((model.results or {}).get(key) for key in ("tuning", "data"))
    if not isinstance(tuning, dict) or not tuning:
        return {}
    marks = len(marks_in(tuning.get("marks"))) > 0
    if not isinstance(tuning.get("source"), str):  # in Python
        return {"source": None, "files_sha256": None, "marks": marks}
    files = tuning.get("files_sha256")
    split = trained.get("split") if isinstance(trained, dict) and trained.get("source") == tuning["source"] else None
    if "files_sha256" not in tuning and isinstance(split, dict):  # a run of an older ptee
        files = split.get("files_sha256")
    return {"source": tuning["source"], "files_sha256": files if isinstance(files, str) else None, "marks": marks}
