"""What the heads read of very many images, kept in shards: the backbone runs once, on one process or on many machines."""

from __future__ import annotations

import math
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ptee._common.errors import Argument, DataError
from ptee._common.files import as_path
from ptee._common.progress import silent
from ptee._common.validation import BATCH_SIZE, checked
from ptee.data.parts import parts_writer
from ptee.data.shards import Source, find_source, require_apart, samples
from ptee.evaluation.class_order import labels_as_recorded
from ptee.scale.trace import MAX_UNREADABLE, class_order, engine_of, fill, tell_labels, with_classes
from ptee.scale.worker import Job, Worker, open_model
from ptee.training.feature_cache import LIMIT, CacheFolder, amount, open_cache, what_heads_read


@checked
def cache(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    engine: str = "local",
    workers: int = 1,
    limit: int = LIMIT,
    classes: str | Path | None = None,
    weights: str | Path | None = None,
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
    max_unreadable: float = MAX_UNREADABLE,
    overwrite: bool = False,
    log: Any = None,
    word: Any = str,
) -> CacheFolder:
    """Run the backbone once over a source, and keep what the heads read and what it answers, in half precision, part by part.

    `ptee.train` takes what this returns as training data. Whole parts are kept if it is interrupted: the same call goes on.

    Args:
        run: with the exits whose heads are to be trained; a folder, or user/repo on the hub.
        data: as of `ptee.record`.
        out: a new folder, or one that this call began.
        engine: "local" or "ray".
        workers: processes or actors.
        limit: bytes that the folder may take.
        classes, weights, batch_size, device, max_unreadable, overwrite, log, word: as of `ptee.record`.

    Raises:
        PteeError: if it would be larger than the limit or the room on the disk, and as of `ptee.record`.
    """
    make = engine_of(engine, workers)
    folder, source = as_path(out, "out"), find_source(data)
    require_apart(folder, data, source)
    job = Job(str(as_path(run, "run")), "cache", None if weights is None else str(weights), device, batch_size)
    model = open_model(job)
    job, labels = with_classes(job, model, source, classes)
    tell_labels(labels, log, word)
    worker = Worker(job, model)
    about = what_heads_read(model) | {"source": source.describe(), "shapes": _shapes(worker, source)}
    about |= {"class_order": class_order(job)}
    size = _size(about["shapes"], model.num_classes, source)
    if log is not None:
        log(f"What the heads read of about {source.count():,} images takes about {amount(size)}.")
    with parts_writer(folder, "cache", about, len(source.parts()), limit=max_unreadable, overwrite=overwrite) as writer:
        missing = 1 - len(writer.manifest.parts) / writer.manifest.planned
        _require_room(folder, size, round(missing * size), limit)
        fill(make, source, job, writer, workers=workers, log=log or silent)
    found = open_cache(folder)
    if labels is None or not labels.doubt:  # now all images can tell
        tell_labels(labels_as_recorded(model.origin, *found.backbone_answers()), log, word)
    return found


def _shapes(worker: Worker, source: Source) -> list[list[int]]:
    """Of each head's input for one image."""
    _ = list(islice(samples(source, source.files), 1))  # a source that cannot be read is refused here
    with torch.no_grad():
        reading = worker.model.read(worker.model.prepared(torch.zeros(1, *worker.model.plan.input_size, device="cpu")))
    return [list(x.shape[1:]) for x in reading.inputs]


def _size(shapes: list[list[int]], num_classes: int, source: Source) -> int:
    """Bytes: two for each number of an input, and four for each logit."""
    return source.count() * (2 * sum(map(math.prod, shapes)) + 4 * num_classes)


def _require_room(folder: Path, size: int, missing: int, limit: int) -> None:
    instead = "Take heads that pool first (--head pool), or train on the images, where the backbone runs in every epoch"
    if size > limit:
        allow = Argument("limit", str(size))
        text = f"The cache would take about {amount(size)}, and {amount(limit)} are allowed. {instead}, or allow more: "
        raise DataError(text, allow, ".", argument="limit", value=limit)
    if (free := shutil.disk_usage(folder).free) < missing:
        raise DataError(
            f"{folder} has room for {amount(free)}, and the cache takes about {amount(missing)} more. {instead}."
        )
