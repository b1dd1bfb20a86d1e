"""A saved run in seconds: measured, kept in the run, and taken from it where thresholds are chosen by time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptee._common import devices
from ptee._common.errors import Argument, DataError, RunError
from ptee.data.batches import batches, split_batch
from ptee.data.pictures import all_broken_named
from ptee.deploy.runner import load_exported
from ptee.model import saving
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_files import meant
from ptee.pipeline.exported import images_for
from ptee.pipeline.saved_run import load_run, open_run, usual_threads
from ptee.timing.exported_bench import ExportedBench, bench_exported
from ptee.timing.measure import measure
from ptee.timing.run_bench import MOST_IMAGES, RunBench, bench_run
from ptee.timing.settings import HOOKS
from ptee.timing.times import save_times


def bench_untrained(model: EarlyExitModel, *, batch_sizes: Sequence[int], rounds: int, threads: int | None) -> RunBench:
    """Time a model with untrained exits beside its bare backbone. Who would leave at its thresholds says nothing yet."""
    with devices.threads(threads):
        times = measure(model, batch_sizes, [HOOKS], rounds=rounds)
        return bench_run(model, times, batch_sizes, rounds=rounds)


def bench_saved(
    run: str,
    batch_sizes: Sequence[int],
    *,
    device: Any,
    executors: Sequence[str] | None,
    rounds: int,
    save: bool,
    show: Callable[[RunBench], None],
    threads: int | None,
    weights: Path | None = None,
    **where: Any,
) -> RunBench:
    """Measure the pieces of a saved run, and time it beside its bare backbone.

    Args:
        run: a folder, or user/repo on the hub.
        batch_sizes: of the lines of the table; pieces are measured up to the largest.
        device: where.
        executors: as of `measure`.
        rounds: how often each is measured.
        save: keep the times of the pieces in the run.
        show: called with what is returned, before anything is kept.
        threads: of the CPU. None: one for a tiny network, else torch's own choice.
        weights: a file of the backbone's weights.
        where: the images are, as of `open_run`.

    Raises:
        RunError: if the run cannot be opened, or times cannot be kept in it.
    """
    if save and not Path(run).is_dir():
        advice = meant(Path(run)) or " Times are written into a run, so give one on this disk."
        raise RunError(f"There is no folder {run}.{advice}")
    model, images, note = _with_images(run, batch_sizes, weights, device, where)
    model.to(device)
    with devices.threads(threads or usual_threads(model)):
        times = measure(model, batch_sizes, executors, rounds=rounds)
        found = bench_run(model, times, batch_sizes, images, rounds=rounds, note=note)
        show(found)
        if save:
            with saving.changing(Path(run), model.versions):
                save_times(times, Path(run))
        return found


def bench_exported_folder(
    folder: str,
    batch_sizes: Sequence[int],
    *,
    device: Any,
    rounds: int,
    threads: int | None,
    data: str | None = None,
    data_root: Path | None = None,
    classes: Path | None = None,
) -> ExportedBench:
    """Time an exported model, by its files alone.

    Args:
        folder: what `ptee export` wrote.
        batch_sizes: of the lines of the table.
        device: where.
        rounds: how often each is measured.
        threads: of the CPU. None: torch's own choice.
        data: images for its own thresholds. None: they are left out.
        data_root: the folder of a data set of torchvision.
        classes: a file that names the classes in the order of the backbone.

    Raises:
        PteeError: if the folder or the images cannot be used.
    """
    for name, value in {"data_root": data_root, "classes": classes}.items():
        if value is not None and data is None:
            raise DataError(
                Argument(name, str(value)), " is about images. Give some: ", Argument("data", "FOLDER"), "."
            )
    with devices.threads(threads):
        runner = load_exported(folder, str(device), threads=torch.get_num_threads())
        if data is None:
            note = "Left out: the model's own thresholds, for which real images are needed (--data)."
            return bench_exported(runner, batch_sizes, rounds=rounds, note=note)
        images, _, _ = images_for(runner, folder, data, data_root, classes)
        return bench_exported(runner, batch_sizes, some_images(images, batch_sizes), rounds=rounds)


def _with_images(
    run: str, batch_sizes: Sequence[int], weights: Path | None, device: Any, where: dict[str, Any]
) -> tuple[EarlyExitModel, Tensor | None, str]:
    """The model, and some of the images to report on; or why there are none."""
    try:
        opened = open_run(run, weights=weights, device=device, **where)
        images, _ = opened.left_by_tuning(given=False)
        return opened.model, some_images(images, batch_sizes), ""
    except DataError as why:
        if where.get("data"):
            raise
        note = f"Left out: the run's own thresholds on real images. {why.worded(where.get('word', str))}"
        return load_run(run, weights), None, note


def some_images(data: Any, batch_sizes: Sequence[int]) -> Tensor:
    """(n, c, h, w) images of a data set, spread over all of it: enough for the largest batch."""
    most = max(MOST_IMAGES, *batch_sizes)
    chosen = torch.utils.data.Subset(data, range(0, len(data), max(1, len(data) // most))[:most])
    loader: Any = batches(chosen, batch_size=128, shuffle=False, num_workers=0)
    with all_broken_named([data]):
        return torch.cat([split_batch(batch)[0] for batch in loader])
