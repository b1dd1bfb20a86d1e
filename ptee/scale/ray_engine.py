"""The engine of many machines: Ray Data reads the files, actors that open the run once compute, and tasks write the tables.

`ray.init()` on one machine needs no cluster. On a cluster all machines must reach the run, the source and the output folder
under the same path, and have the same versions of Ray, Python and ptee. A task or a machine that is lost is run again by Ray.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptee._common.errors import Argument, DataError, PteeError
from ptee._common.listing import EXTENSIONS
from ptee._common.process import report_nothing
from ptee._common.writing import cannot_write
from ptee.data.batches import UNKNOWN_LABEL
from ptee.data.parts import PartsWriter, arrow
from ptee.data.shards import (
    LABEL_FILES,
    PARQUET,
    PICTURES,
    TAR,
    Sample,
    Source,
    class_of,
    columns_of,
    of_members,
    of_row,
    require_whole_shard,
    unreadable_file,
)
from ptee.scale.worker import Job, Worker

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what cannot be an error of reading
OF_ACTORS = 0.75  # share of the processors that decode beside GPUs; the others read and write
ROWS_IN_A_FILE = 50_000  # at least, unless a part has fewer
INSTALL = "The engine 'ray' needs Ray: pip install 'ptee-exits[ray]'. Or give another: "


def require_ray() -> Any:
    """Ray, or one line that says how to get it."""
    report_nothing()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as why:
        raise PteeError(INSTALL, Argument.text("engine", "local"), ".", argument="engine", value="ray") from why
    return ray


@contextmanager
def connected() -> Iterator[Any]:
    """Ray, connected to the cluster of RAY_ADDRESS, or started on this machine and stopped afterwards."""
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not address:
        how["include_dashboard"] = False
    try:
        ray.init(**how)
    except (RuntimeError, ConnectionError, ValueError, OSError) as why:
        words = " ".join(str(why).split())[:300]
        if "ersion mismatch" in words:
            raise PteeError(
                f"The cluster at {address} has other versions than this machine (Ray {ray.__version__}): {words} Install the same "
                "ones on all machines."
            ) from why
        where = f"the cluster at {address}" if address else "Ray on this machine"
        raise PteeError(
            f"No connection to {where}: {words} Set RAY_ADDRESS, or unset it to use this machine alone."
        ) from why
    try:
        yield ray
    finally:
        ray.shutdown()


def make_parts(
    source: Source,
    parts: Mapping[str, Sequence[str]],
    job: Job,
    writer: PartsWriter,
    *,
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Make the parts of a source, each of some of its files, one after another, by as many as `workers` actors."""
    with connected() as ray:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised, too
        there = ray.cluster_resources()
        gpus = 1 if there.get("GPU") and job.device != "cpu" else 0
        if gpus:
            job = replace(job, threads=max(1, int(there.get("CPU", 1) * OF_ACTORS / workers)))
        for name, files in parts.items():
            before = writer.manifest.rows + writer.manifest.unreadable
            with writer.part(name) as folder:
                _make(ray, source, files, job, folder, workers, gpus)
            done(writer.manifest.rows + writer.manifest.unreadable - before)


def _make(ray: Any, source: Source, files: Sequence[str], job: Job, folder: Path, workers: int, gpus: int) -> None:
    paths = [str(Path(source.place, file)) for file in files]
    try:
        if source.kind == TAR:  # Ray's reader would take a damaged header for the end
            ray.get([ray.remote(require_whole_shard).remote(Path(path)) for path in paths])
        data = READERS[source.kind](ray.data, paths)
        data.map_batches(
            Actor,
            fn_constructor_args=(source, job),
            batch_size=job.batch_size,
            batch_format="numpy",
            num_gpus=gpus or None,
            num_cpus=job.threads,
            concurrency=(1, workers),
        ).write_parquet(str(folder), min_rows_per_file=ROWS_IN_A_FILE)
    except (ray.exceptions.RayError, RuntimeError, ValueError, OSError) as why:
        raise _told(why, paths, folder) from why


def _told(why: BaseException, paths: Sequence[str], folder: Path) -> PteeError:
    """The error of a task, in one line. The first cause says most."""
    cause: BaseException = why
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None and inner is not cause:
        cause = inner
    if isinstance(cause, DataError):
        return cause
    if isinstance(cause, OSError) and cause.errno in FULL:
        return cannot_write(folder.parent, os.strerror(cause.errno))
    more = f" or one of the {len(paths) - 1} files after it" if len(paths) > 1 else ""
    named = next((path for path in paths if path in str(why)), paths[0] + more)
    return unreadable_file(named, cause)


def _webdataset(data: Any, paths: list[str]) -> Any:
    wanted = [*(f"*.{ending}" for ending in LABEL_FILES), *(f"*{ending}" for ending in EXTENSIONS)]
    # its decoder would unpickle
    return data.read_webdataset(paths, decoder=None, fileselect=wanted, include_paths=True)


def _parquet(data: Any, paths: list[str]) -> Any:
    names = arrow().parquet.read_schema(paths[0]).names
    wanted = [name for name in columns_of(paths[0], names) if name]
    return data.read_parquet(paths, include_paths=True).select_columns(list(dict.fromkeys([*wanted, "path"])))


def _pictures(data: Any, paths: list[str]) -> Any:
    """Not `read_images`: one picture that cannot be decoded would end it."""
    return data.read_binary_files(paths, include_paths=True)


READERS: dict[str, Callable[[Any, list[str]], Any]] = {TAR: _webdataset, PARQUET: _parquet, PICTURES: _pictures}


class Actor:
    """Opens the run once, and turns the batches that Ray reads into tables."""

    def __init__(self, source: Source, job: Job) -> None:
        self.samples = partial(samples_of, source)
        self.worker = Worker(job)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Any:
        """Called by Ray with columns."""
        return self.worker.table(self.samples(batch))


def samples_of(source: Source, batch: Mapping[str, Any]) -> list[Sample]:
    """The samples of a batch of rows, as Ray reads them: the same as `ptee.data.shards.samples` gives."""
    names = [Path(str(path)).relative_to(source.place).as_posix() for path in batch["path"]]
    if source.kind == PICTURES:
        pairs = zip(names, batch["bytes"], strict=True)
        return [Sample(name, content, UNKNOWN_LABEL, class_of(name), True) for name, content in pairs]
    if source.kind == PARQUET:
        image, label, key = columns_of(source.place, list(batch))
        wanted = (image, label, None if key == "path" else key)
        columns = [batch[c].tolist() if c else [None] * len(names) for c in wanted]
        rows = zip(names, *columns, strict=True)
        return [of_row(name, pixels, given, named, source.class_names) for name, pixels, given, named in rows]
    found: list[Sample] = []
    endings = [column for column in batch if column not in ("__key__", "path", "__url__")]
    for n, name in enumerate(names):
        members = {ending.lower(): batch[ending][n] for ending in endings if isinstance(batch[ending][n], bytes)}
        found += of_members(f"{name}/{batch['__key__'][n]}", members)
    return found
