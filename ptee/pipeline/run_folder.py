"""The folder of a run that is about to be made: nobody else's, and nothing in it is lost unasked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ptee._common.errors import Argument, RunError
from ptee._common.files import WRITING, clear_unfinished, require_writable
from ptee.model import saving
from ptee.pipeline import unreadable
from ptee.pipeline.recipe import RECIPE_FILE

LOCK = ".ptee.lock"  # held by the process that trains into a folder


def new_folder(out: Path, *, overwrite: bool, resume: bool) -> Path:
    """The folder of a run that is about to be made: new, empty, or one that may be written over.

    Raises:
        RunError: if it holds something else, or there is nothing to resume.
    """
    require_writable(out)
    run, unfinished = saving.is_run(out), (out / saving.CHECKPOINT).is_file()
    stopped = (out / unreadable.FILE).is_file()  # before the training, by pictures that could not be read
    if resume and not (unfinished or stopped):
        raise RunError(
            f"There is no interrupted training in {out}. Give its folder with ", Argument("out"), ", or leave out ", Argument("resume"),
            ".", argument="resume",
        )  # fmt: skip
    if resume or not out.is_dir() or all(_is_left_over(path.name) for path in out.iterdir()):
        return out
    if not (run or unfinished):
        raise RunError(
            f"{out} holds something else than a run. Give a new folder with ", Argument("out"), ".", argument="out"
        )
    if not overwrite:
        found = (
            ("an interrupted training; ", Argument("resume", "True"), " goes on with it") if unfinished else ("a run",)
        )
        raise RunError(
            f"{out} holds ", *found, ". Give another folder with ", Argument("out"), ", or replace it with ",
            Argument("overwrite", "True"), ".", argument="out", value=out,
        )  # fmt: skip
    return out


def _is_left_over(name: str) -> bool:
    """Whether a file is all that a process left that ended before its first epoch."""
    return name in (unreadable.FILE, LOCK) or name.startswith(WRITING)


@contextmanager
def sole_writer(out: Path | None, *, overwrite: bool, resume: bool) -> Iterator[None]:
    """No other process trains into the folder meanwhile.

    Args:
        out: the folder; None where nothing is saved.
        overwrite: as of `new_folder`, which looks once more.
        resume: likewise.

    Raises:
        RunError: if one does, or has made a run there since the folder was looked at.
    """
    if out is None or not speaks_for_all():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunError(
            f"Another process trains into {out}. Wait for it, or give another folder with ",
            Argument("out"),
            ".",
            argument="out",
        ) from None
    try:
        new_folder(out, overwrite=overwrite, resume=resume)
        clear_unfinished(out)
        yield
    finally:
        with suppress(OSError):  # where open files cannot be removed
            (out / LOCK).unlink()  # while it is held: a file removed later could be another process's
        lock.release()
        with suppress(OSError):
            out.rmdir()  # where nothing was written


def clear(out: Path) -> None:
    """Remove what an earlier run left, so that it is not taken for this one's."""
    for name in (saving.CONFIG, saving.HEADS, saving.METRICS, RECIPE_FILE):
        (out / name).unlink(missing_ok=True)


def speaks_for_all() -> bool:
    """Of several processes that train together, the first goes on alone."""
    from accelerate.state import PartialState

    return bool(PartialState().is_main_process)
