"""Traces of very many images: every exit of a saved run answers each of them, on one process or on many machines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ptee._common.errors import Argument, DataError, PteeError, some, unknown, warn
from ptee._common.files import as_path, plain
from ptee._common.progress import Log, counted, silent
from ptee._common.text import number_of, spelt
from ptee._common.validation import BATCH_SIZE, checked
from ptee.backbones.weights import recorded_hash, weights_hash
from ptee.data.labels import (
    LabelMap,
    classes_of_run,
    describe_labels,
    map_labels,
    names_differ,
    numbers_of_names,
    recorded_classes,
)
from ptee.data.parts import FEW, Manifest, PartsWriter, arrow, parts_writer
from ptee.data.pictures import File, Pictures, image_transform
from ptee.data.shards import LABELS, PARQUET, PICTURES, TAR, Source, class_of, find_source, require_apart
from ptee.data.splits import Data
from ptee.evaluation.class_order import choose_class_order, labels_as_recorded
from ptee.model.early_exit import EarlyExitModel
from ptee.scale import local, ray_engine
from ptee.scale.worker import Job, open_model
from ptee.tuning.trace_folder import TraceFolder, open_traces, recorded_confidence
from ptee.tuning.tune import known_images

ENGINES: dict[str, Any] = {"local": local.make_parts, "ray": ray_engine.make_parts}
LABELS_STAND = {
    TAR: f" In shards a label is the number or the name of a class in KEY.cls, in KEY.json ({', '.join(LABELS[:-1])} or {LABELS[-1]}), as the "
    "folder CLASS/KEY, or, where there is no folder, in KEY.txt. What is no class there is passed over, as a caption is.",
    PARQUET: f" In tables a label is the number or the name of a class in a column {', '.join(LABELS[:-1])} or {LABELS[-1]}.",
}
MAX_UNREADABLE = 0.001  # share of the images


@checked
def record(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    engine: str = "local",
    workers: int = 1,
    logits: int | None = None,
    classes: str | Path | None = None,
    weights: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
    max_unreadable: float = MAX_UNREADABLE,
    overwrite: bool = False,
    log: Any = None,
    word: Any = str,
) -> TraceFolder:
    """Let every exit of a saved run answer each image of a source, and write the answers into a folder, part by part.

    `ptee.tune`, `evaluate`, `compare` and `calibrate` take what this returns as their data. Whole parts are kept if it is
    interrupted: the same call goes on.

    Args:
        run: a folder, or user/repo on the hub.
        data: a folder of webdataset shards (*.tar), of *.parquet, or of pictures (CLASS/*.jpg); or one shard or table.
        out: a new folder, or one that this call began.
        engine: "local" (this machine), or "ray" (the cluster of RAY_ADDRESS, or this machine).
        workers: processes or actors.
        logits: how many of the largest log-probabilities are kept for each exit, in half precision. None: all; 0: none,
            which is enough for `evaluate` and for own answers.
        classes: a file that names the backbone's classes in its order. None: as the run recorded them.
        weights: a file with the backbone's weights, if they are not where the run says.
        batch_size: images at once.
        device: of each worker; None: a GPU where there is one.
        max_unreadable: the share of images that may be unreadable. They are named in unreadable.json.
        overwrite: replace traces of another run or source.
        log: gets the messages to the user.
        word: says how a message calls an argument.

    Raises:
        PteeError: if the run, the source, the engine or the folder cannot be used, or too many images are unreadable.
    """
    make = engine_of(engine, workers)
    folder, source = as_path(out, "out"), find_source(data)
    require_apart(folder, data, source)
    job = Job(str(as_path(run, "run")), "traces", None if weights is None else str(weights), device, batch_size, logits)
    model = open_model(job)
    job, labels = with_classes(job, model, source, classes)
    tell_labels(labels, log, word)
    about = describe(model) | {"logits": "all" if logits is None else logits, "source": source.describe()}
    thresholds = ["off" if n in model.off else f"{t:.9g}" for n, t in enumerate(model.threshold)]
    about |= {"class_order": class_order(job), "threshold": ", ".join(thresholds)}
    with parts_writer(
        folder, "traces", about, len(source.parts()), limit=max_unreadable, overwrite=overwrite
    ) as writer:
        fill(make, source, job, writer, workers=workers, log=log or silent)
    found = open_traces(folder)
    if labels is None or not labels.doubt:  # now all images can tell
        tell_labels(labels_as_recorded(model.origin, *found.backbone_answers(model)), log, word)
    if seen := known_images(model, found.marks(None), own=False):
        (warn if log is None else log)(seen)
    return found


def tell_labels(labels: LabelMap | None, log: Log | None, word: Callable[[Argument], str]) -> None:
    """Say how labels were found, if anything is to be said. A doubt is a warning where nothing is logged."""
    words = "" if labels is None else describe_labels(labels, word)
    if words and log is not None:
        log(words)
    elif labels is not None and labels.doubt:
        warn(words)


def engine_of(engine: str, workers: int) -> Any:
    """What makes parts, if it can be used here."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES, argument="engine")
    if workers < 1:
        raise PteeError(Argument("workers", str(workers)), " is too few. Give 1 or more.", value=workers)
    arrow()
    if engine == "ray":
        ray_engine.require_ray()
    return ENGINES[engine]


def fill(make: Any, source: Source, job: Job, writer: PartsWriter, *, workers: int, log: Log) -> None:
    """Make the parts that are missing."""
    names = {f"part-{n:05d}": files for n, files in enumerate(source.parts())}
    missing = {name: names[name] for name in writer.missing(list(names))}
    if len(missing) < len(names):
        log(f"{len(names) - len(missing)} of {len(names)} parts are there already.")
    if missing and log is not silent:  # to count the images takes time
        rest = f"; not read: {some(source.not_read, len(source.not_read))}" if source.not_read else ""
        log(f"{source.place}: about {source.count():,} images in {number_of(len(source.files), 'file')}{rest}.")
    with counted("images") as done:
        if missing:
            make(source, missing, job, writer, workers=workers, done=done)
    manifest = writer.manifest
    bad = f"; {manifest.unreadable:,} cannot be used and are named in unreadable.json" if manifest.unreadable else ""
    parts = number_of(len(manifest.parts), "part")
    log(f"{manifest.rows:,} images in {parts} in {writer.folder}{bad}.{_labelled(manifest, source)}")


def _labelled(manifest: Manifest, source: Source) -> str:
    """How many images have labels, in a sentence; and where labels are looked for, if none has one."""
    if manifest.labelled == manifest.rows:
        return " All of them have labels."
    if manifest.labelled:
        return f" {manifest.labelled:,} of them {'has a label' if manifest.labelled == 1 else 'have labels'}, and the others none: give labels to all of them, or to none."
    return f" None of them has a label.{LABELS_STAND.get(source.kind, '')}"


def describe(model: EarlyExitModel) -> dict[str, Any]:
    """What identifies a model: its heads, its backbone and how it takes images; and the confidence that is recorded."""
    return {
        "heads": weights_hash(model.heads)[:16],
        "backbone": recorded_hash(model.backbone, model.plan.input_size),
        "exits": [e.name for e in model.exits],
        "classes": model.num_classes,
        "input": plain(model.origin.input),
        "confidence": recorded_confidence(model),
    }


def with_classes(
    job: Job, model: EarlyExitModel, source: Source, classes: str | Path | None
) -> tuple[Job, LabelMap | None]:
    """The job, knowing the backbone's number of each class name; and how these were found, if the source names its classes."""
    names, found = classes_of_run(model.results, model.num_classes), source.class_names
    if not found:
        return replace(job, classes=numbers_of_names(names, model.num_classes, classes) or None), None
    known = None if classes is not None else recorded_classes(found, names, model.num_classes)
    if source.kind == PICTURES:
        labels = choose_class_order(model.origin, _as_data(source, model), classes=classes, recorded=known)
    elif classes is None and known is None:
        labels = LabelMap(tuple(range(len(found))), "The labels are taken for the backbone's class numbers.")
    else:
        labels = map_labels(found, model.num_classes, classes=known if classes is None else classes)
    if classes is None:
        labels = names_differ(labels, found, names)
    numbers = None if labels.indices is None else dict(zip(map(spelt, found), labels.indices, strict=True))
    return replace(job, classes=numbers), labels


def _as_data(source: Source, model: EarlyExitModel) -> Data:
    """The pictures of class folders, on some of which the backbone is tried."""
    view, number = model.origin.input, {name: n for n, name in enumerate(source.class_names)}
    rows = [(File(str(Path(source.place, file)), file), number[class_of(file)]) for file in source.files]
    pictures = _Readable(rows, image_transform(view.input_size, view.mean, view.std, view.interpolation))
    empty: Any = []
    return Data(empty, empty, pictures, source.class_names, source.place, {"kind": "folder"})


class _Readable(Pictures):
    """In the place of a picture that cannot be decoded stands the next one that can be: it will be left out, and named."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for place in range(index, index + FEW):
            with suppress(DataError):
                return super().__getitem__(place % len(self))
        return super().__getitem__(index)


def class_order(job: Job) -> str:
    """A hash of the number of each class name, which give the labels; empty without names."""
    pairs = "".join(f"{number}\t{name}\n" for name, number in sorted((job.classes or {}).items()))
    return hashlib.sha256(pairs.encode()).hexdigest()[:16] if pairs else ""
