"""The folder of a run that is being made: one process writes it, and nothing in it is lost without the user's word.

Pictures that cannot be read are recorded there. After the user has removed them, --resume goes on with the same training: the
other pictures are split, and known, as if these were still there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ptee._common.devices import process_state
from ptee._common.errors import Argument, DataError, Interrupted, PteeError, RunError, first_line
from ptee._common.files import from_json, is_file, to_json
from ptee._common.text import number_of
from ptee._common.validation import FrozenConfig, Name, Number
from ptee._common.writing import clear_unfinished, locked, write_json
from ptee.data.pictures import Key, UnreadablePicturesError, check_pictures
from ptee.data.splits import FILES, Data
from ptee.exits.plan import TimesOfModules
from ptee.model import card, run_files
from ptee.pipeline.recipe import RECIPE_FILE
from ptee.pipeline.recorded import OUT, PLACED_BY, UNREADABLE, is_interrupted, new_folder
from ptee.timing.settings import FILE as TIMES_FILE

NOTHING_KEPT = "Nothing was kept, because no folder was given for the run."


@contextmanager
def sole_writer(out: Path | None, *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Meanwhile no other process changes the folder.

    Raises:
        RunError: if one does, or has made a run there since `new_folder` looked.
    """
    if out is None or not is_main_process():
        yield
        return
    was_there = out.exists()
    try:
        with locked(out, wait=0, instead=("give another folder with ", OUT)):
            new_folder(out, overwrite=overwrite, resume=resume)
            clear_unfinished(out)
            yield
    finally:
        if not was_there:
            with suppress(OSError):
                out.rmdir()  # if nothing was written


def is_main_process() -> bool:
    """Of several processes that train together, the first goes on alone."""
    return bool(process_state().is_main_process)


def with_checkpoint(times: TimesOfModules | None) -> dict[str, str]:
    """What is written together with each checkpoint, by file: the times that the exits were placed by, if seconds count.

    Measured again they would differ, and a training goes on with the same exits only.
    """
    return {} if times is None else {PLACED_BY: to_json(times._asdict())}


def take_over(out: Path, beside: Collection[str]) -> None:
    """Remove an earlier run, so that it is not taken for this one, of which an epoch is kept from now on.

    What somebody wrote into its README.md stays. `beside`: files that were written with this one's checkpoint.
    """
    files = [
        run_files.CONFIG,
        run_files.HEADS,
        run_files.BACKBONE,
        run_files.METRICS,
        RECIPE_FILE,
        TIMES_FILE,
        PLACED_BY,
    ]
    if is_file(readme := out / run_files.CARD) and card.is_own(readme):
        files.append(readme.name)
    for name in files:
        if name not in beside:
            (out / name).unlink(missing_ok=True)


def replaced(out: Path | None, overwrite: bool) -> str:
    """A sentence about the run in a folder that a new one is to replace, or none."""
    if out is None or not overwrite or not run_files.is_run(out):
        return ""
    return f"The run in {out} is deleted as soon as the first epoch of the new one is complete."


def interrupted(out: Path | None, complete: int, *, resume: bool, overwrite: bool, again: str) -> Interrupted:
    """What Ctrl-C in a training left, and what to type.

    Args:
        out: the folder of the run.
        complete: the number of the last complete epoch, 0 if this training had none.
        resume: it went on with an earlier one.
        overwrite: it was to replace a run.
        again: what to type, in a sentence.
    """
    if out is None:
        return Interrupted(NOTHING_KEPT)
    if not (complete or resume):
        as_it_was = f" What was in {out} is as it was." if overwrite else ""
        return Interrupted(f"No epoch of the exits was complete, so nothing was kept.{as_it_was}")
    kept = number_of(complete, "complete epoch", "is") if complete else "What was trained before is"
    return Interrupted(f"{kept} kept in {out}. {again}".strip())


@contextmanager
def or_nothing_kept(out: Path | None, *, resume: bool, overwrite: bool, again: str) -> Iterator[None]:
    """Ctrl-C in what comes before a training says what was left, too; the arguments are those of `interrupted`."""
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as why:
        raise interrupted(out, 0, resume=resume, overwrite=overwrite, again=again) from why


def forget_training(out: Path) -> None:
    """Remove what only --resume needs."""
    for name in (run_files.CHECKPOINT, UNREADABLE, PLACED_BY):
        (out / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- exits placed by time


class _PlacedBy(FrozenConfig):
    shares: dict[Name, Annotated[Number, Field(ge=0, le=1.01)]]
    seconds: Annotated[Number, Field(gt=0)]
    unit: Name


def kept_times(out: Path) -> TimesOfModules | None:
    """The times that an interrupted training was placed by; None if there are none.

    Raises:
        RunError: if the file is damaged.
    """
    file = out / PLACED_BY
    if not is_file(file):
        return None
    try:
        return TimesOfModules(**_PlacedBy(**from_json(file.read_text("utf-8"))).model_dump())
    except (OSError, ValueError, TypeError, PteeError) as why:
        raise RunError(f"{file} is damaged: {first_line(why)} Delete {out}, and begin again.") from why


# ---------------------------------------------------------------------------------------------------- unreadable pictures


def removed_pictures(out: Path) -> list[Key]:
    """Keys of the pictures that could not be read; none if the record is missing or damaged."""
    if not (out / UNREADABLE).is_file():  # reading a pipe would not end
        return []
    try:
        rows = from_json((out / UNREADABLE).read_text("utf-8"))
        return [(str(part), str(name), str(class_name)) for part, name, class_name in rows]
    except (OSError, ValueError, TypeError):
        return []


@contextmanager
def unreadable_named(data: Data, out: Path | None, overwrite: bool) -> Iterator[None]:
    """If a picture can no longer be read meanwhile, name all such pictures, and record them for --resume."""
    try:
        yield
    except DataError:
        if out is not None and data.split["kind"] in FILES:
            require_readable(data, out, overwrite)
        raise


def require_readable(data: Data, out: Path, overwrite: bool = False) -> None:
    """Read every picture, and record those that cannot be read. A complete run in the folder is left as it is.

    Raises:
        UnreadablePicturesError: naming all of them.
    """
    try:
        check_pictures([data.train, data.calibration, data.validation])
    except UnreadablePicturesError as why:
        goes_on = not overwrite if is_interrupted(out) else not run_files.is_run(out)
        if goes_on:
            known = [tuple(key) for key in data.split.get("removed", [])]
            write_json(out / UNREADABLE, sorted({*known, *why.keys}))
            them = "it" if len(why.keys) == 1 else "them"
            why.parts += (
                f" If you remove {them}, add ",
                Argument("resume", "True"),
                *((" in place of ", Argument("overwrite", "True")) if overwrite else ()),
                ": the other pictures stay in their parts.",
            )
        raise
