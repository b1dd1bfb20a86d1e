"""The engine of one machine: one process, or several that each make whole parts."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ptee._common.errors import DataError
from ptee.data.parts import PartsWriter, write_tables
from ptee.data.shards import Source, samples
from ptee.scale.worker import Job, Worker

FILE = "rows.parquet"
_WORKER: list[Worker] = []  # of this process


def make_parts(
    source: Source,
    parts: Mapping[str, Sequence[str]],
    job: Job,
    writer: PartsWriter,
    *,
    workers: int,
    done: Callable[[int], None],
) -> None:
    """Make the parts of a source, each of some of its files. `done` gets the number of images, as they are done."""
    if workers == 1:
        own = Worker(replace(job, threads=os.cpu_count() or 1))
        for name, files in parts.items():
            with writer.part(name) as folder:
                write_tables(_tables(own, source, files), folder / FILE, done)
        return
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, _open, (job,)) as pool, ThreadPoolExecutor(workers) as threads:

        def make(name: str) -> None:
            with writer.part(name) as folder:
                done(pool.submit(_make, source, parts[name], folder).result())

        _all_of(threads, make, list(parts))


def _all_of(threads: ThreadPoolExecutor, make: Callable[[str], None], names: Sequence[str]) -> None:
    futures = [threads.submit(make, name) for name in names]
    try:
        for future in futures:
            future.result()
    except BrokenProcessPool as why:
        text = "A process ended before its part was whole, perhaps for want of memory. Whole parts are kept: the same command goes on."
        raise DataError(text) from why
    finally:
        for future in futures:
            future.cancel()


def _open(job: Job) -> None:
    import torch

    torch.set_num_threads(1)  # of several processes each has a core of its own
    _WORKER.append(Worker(job))


def _make(source: Source, files: Sequence[str], folder: Path) -> int:
    rows: list[int] = []
    write_tables(_tables(_WORKER[0], source, files), folder / FILE, rows.append)
    return sum(rows)


def _tables(worker: Worker, source: Source, files: Sequence[str]) -> Iterator[Any]:
    left = samples(source, files)
    while batch := list(islice(left, worker.job.batch_size)):
        yield worker.table(batch)
