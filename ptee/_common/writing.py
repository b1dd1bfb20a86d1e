"""Files that are written whole or not at all: first under another name, then renamed; one process at a time in a folder."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptee._common.errors import Advice, Argument, RunError, first_line
from ptee._common.files import as_path, to_json

if TYPE_CHECKING:
    from filelock import FileLock

FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))  # what a full disk says
ANOTHER_FOLDER = "Choose another folder."
MADE_BY = "Made by ptee"  # stands on every page
PAGE, STILL = ".html", (".png", ".svg")  # end the names of a page and of a picture
PICTURES = (*STILL, PAGE)  # of a figure
WRITING = ".writing-"  # begins the name of a folder in which a file is written before it is renamed
RENAMING = ".renaming"  # a folder of new files that are being renamed; from when it is there, they are in force
LOCK = ".ptee.lock"  # held by the process that changes several files of a folder
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what some network disks say
LONGEST_WAIT = 10.0  # seconds for another process to be done with a folder
_own = threading.local()  # its `places` are the folders that this thread has locked


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, to_json(values) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all."""
    replace_file(path, writer_of(text))


def writer_of(text: str) -> Callable[[Path], Any]:
    """What writes this text into a file, as `replace_files` takes it."""
    return lambda path: path.write_text(text, encoding="utf-8")


def require_writable(folder: Path, remedy: str = ANOTHER_FOLDER) -> None:
    """Refuse a folder that cannot be made or written, with this remedy. It is left as it was."""
    try:
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_symlink() or p.exists())
        reason = "" if place.exists() else f"{place} is a link that leads nowhere"
        reason = f"{place} is a file" if place.is_file() else reason
        if not reason:
            with writing_in(place):
                pass
    except OSError as why:
        reason = str(why.strerror)
    if reason:
        raise cannot_write(folder, reason, remedy)


def cannot_write(path: Path, reason: str, remedy: str = ANOTHER_FOLDER) -> RunError:
    """The error for a file or folder that cannot be written."""
    is_full = any(words in reason for words in FULL)
    return RunError(f"Cannot write {path}: {reason}. {'Make room on that disk.' if is_full else remedy}")


def require_name(path: Path, suffixes: Sequence[str], argument: str, what: str) -> None:
    """Refuse a file that cannot be written, or whose name does not say what it is."""
    if path.is_dir():
        example = Argument.text(argument, path / f"report{suffixes[0]}")
        raise RunError(f"{path} is a folder. Give a file, such as ", example, ".", argument=argument, value=path)
    if path.suffix.lower() not in suffixes:
        ends = " or ".join(suffixes)
        raise RunError(
            f"{path} is not the name of {what}. Give a name that ends in {ends}, such as ",
            Argument.text(argument, f"{path.stem}{suffixes[0]}"), ".", argument=argument, value=path,
        )  # fmt: skip
    require_writable(path.parent)


def require_page(path: Path, argument: str = "out") -> str:
    """Refuse a file that cannot be written, that a browser would not open as a page, or in which there is something else than a page of ptee.

    Gives the end of a sentence that says what was replaced, or nothing.
    """
    require_name(path, (PAGE,), argument, "a page")
    if not path.is_file() or not path.stat().st_size:
        return ""
    try:
        is_ours = MADE_BY in path.read_text("utf-8", errors="replace")
    except OSError:  # nobody knows what is in it
        is_ours = False
    if not is_ours:
        text = f"{path} is there, and no page of ptee. Remove it, or give another name, such as "
        other = Argument.text(argument, path.with_name(f"{path.stem}-ptee{PAGE}"))
        raise RunError(text, other, ".", argument=argument, value=path)
    return ", in place of the page that was there"


def free_place(folder: str | Path) -> Path:
    """A folder in which there is nothing and that can be written; any other is refused."""
    target = as_path(folder, "folder")
    settle(target)
    _require_free(target)
    require_writable(target)
    if target.is_dir():
        with locked(target):
            clear_unfinished(target)
            _require_free(target)  # another process may have been writing
    return target


def _require_free(target: Path) -> None:
    if not is_free(target):
        raise RunError(f"{target} exists. Name a folder that does not.")


def is_free(target: Path) -> bool:
    """Whether nothing is there but what a killed process may have left."""
    return not target.exists() or (target.is_dir() and all(is_left_over(path.name) for path in target.iterdir()))


@contextmanager
def working_in(place: Path) -> Iterator[Path]:
    """A folder inside of a `free_place` to work in, which is gone afterwards.

    What a killed process leaves there is cleared by the next `free_place`. In a folder for temporary files it would stay.
    """
    was_there = place.exists()
    try:
        with locked(place), writing_in(place) as beside:
            yield beside
    except OSError as why:
        if why.errno is None:
            raise
        raise cannot_write(place, str(why.strerror), ANOTHER_FOLDER) from why
    finally:
        if not was_there:
            with suppress(OSError):
                place.rmdir()  # if nothing was written


def fill_place(folder: Path, write_to: Callable[[Path], Any]) -> None:
    """Fill a `free_place` with files and folders, all or none: they are written inside of it, and then renamed.

    If the process is killed meanwhile, the next `free_place` clears what it left, or makes the rest new. `write_to` writes all into the folder that it is given.
    """
    with working_in(folder) as beside:
        new = Path(beside, "new")
        new.mkdir()
        write_to(new)
        _require_free(folder)
        new.replace(folder / RENAMING)
        _rename_the_rest(folder, ANOTHER_FOLDER)


@contextmanager
def writing_in(folder: Path) -> Iterator[Path]:
    """A folder inside of this one to write in, which is gone afterwards, even if Ctrl-C comes while it is removed."""
    beside = folder / f"{WRITING}{secrets.token_hex(8)}"
    try:
        beside.mkdir(0o700)
        yield beside
    finally:
        try:
            shutil.rmtree(beside, ignore_errors=True)
        except KeyboardInterrupt:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def replace_file(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all. A reader sees the old file or the new one."""
    replace_files(path.parent, {path.name: write_to})


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], Any]], remedy: str = ANOTHER_FOLDER) -> None:
    """Write several files of a folder: afterwards all are new, or all are old and a RunError says why.

    If the process is killed meanwhile, all are old, or `settle` makes all new.

    Args:
        folder: made where it does not exist.
        writers: by file name, what writes that file to the path that it is given. Files are renamed in this order.
        remedy: what a user can do where the folder cannot be written, unless its disk is full.
    """
    from safetensors import SafetensorError

    name = next(iter(writers))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder, remedy=remedy) if len(writers) > 1 else nullcontext()
        with lock, writing_in(folder) as beside:
            new, usual = Path(beside, "new"), Path(beside, "mode")
            new.mkdir()
            usual.touch()
            for name, write_to in writers.items():
                part = new / name
                write_to(part)
                part.chmod(usual.stat().st_mode)  # safetensors writes for its owner alone
            if len(writers) > 1:
                _swap(folder, new, Path(beside, "kept"), list(writers))
            else:
                (new / name).replace(folder / name)
    except (OSError, SafetensorError) as why:
        reason = getattr(why, "strerror", None) or first_line(why).rstrip(".")
        raise cannot_write(folder / name, reason, remedy) from why


def _swap(folder: Path, new: Path, kept: Path, names: Sequence[str]) -> None:
    """Rename the new files over the old ones; on failure put the old ones back."""
    kept.mkdir()
    for name in names:
        link_or_copy(folder / name, kept / name)
    renaming = folder / RENAMING
    try:
        new.replace(renaming)  # from here on the new files are in force, until they are no longer there
        for name in names:
            (renaming / name).replace(folder / name)
        renaming.replace(new)
    except BaseException:
        if renaming.exists() and not new.exists():
            _put_back(folder, renaming, kept, names)
            renaming.replace(new)
        raise


def _put_back(folder: Path, renaming: Path, kept: Path, names: Sequence[str]) -> None:
    for name in names:
        if (renaming / name).exists():  # the old one is still there
            continue
        (folder / name).replace(renaming / name)
        if (kept / name).exists():
            (kept / name).replace(folder / name)


def link_or_copy(path: Path, copy: Path) -> None:
    """A hard link to a file, or a copy of it where the disk has no hard links."""
    if not path.is_file():
        return
    try:
        copy.hardlink_to(path)
    except OSError:
        shutil.copy2(path, copy)


# ---------------------------------------------------------------------------------------------------- one at a time


@contextmanager
def locked(
    folder: Path, wait: float = LONGEST_WAIT, instead: Advice = ("choose another folder",), remedy: str = ANOTHER_FOLDER
) -> Iterator[None]:
    """Meanwhile no other process or thread changes several files of the folder. It is `settle`d first.

    Args:
        folder: made where it does not exist.
        wait: so many seconds for others.
        instead: what a user can do but wait.
        remedy: as of `replace_files`.
    """
    places = _own.__dict__.setdefault("places", set())
    if (place := str(folder.resolve())) in places:
        yield
        return
    with alone(folder, wait, instead, remedy):
        places.add(place)
        try:
            _rename_the_rest(folder, remedy)
            yield
        finally:
            places.remove(place)


@contextmanager
def alone(folder: Path, wait: float, instead: Advice, remedy: str = ANOTHER_FOLDER) -> Iterator[None]:
    """Meanwhile nobody else writes into the folder, this thread included. Arguments and errors as of `locked`."""
    lock = _lock_of(folder, wait, instead, remedy)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # some systems do not remove open files
                (folder / LOCK).unlink()  # before the release: afterwards it could be another process's
            lock.release()


def _lock_of(folder: Path, wait: float, instead: Advice, remedy: str) -> FileLock | None:
    """A folder's lock, held; None on a disk that knows no locks. Arguments as of `locked`."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=wait)
        return lock
    except Timeout:
        text, argument = f"Another process writes into {folder}. Wait for it, or ", _argument_of(instead)
        raise RunError(text, *instead, ".", argument=argument) from None
    except (OSError, NotImplementedError) as why:
        if isinstance(why, NotImplementedError) or why.errno in NO_LOCKS:
            with suppress(OSError):
                (folder / LOCK).unlink()  # it was made, and locks nothing
            return None
        if not (folder / LOCK).exists() or (folder / LOCK).is_file():
            raise cannot_write(folder, str(why.strerror), remedy) from why
        text = f"{folder / LOCK} cannot be locked: {first_line(why)} Remove it, or "
        raise RunError(text, *instead, ".", argument=_argument_of(instead)) from why


def settle(folder: Path) -> None:
    """Rename what a killed process was renaming into a folder, so that all its files are of one version. Call it before reading."""
    if not _is_being_renamed(folder):
        return
    try:
        with locked(folder, remedy=f"Copy all of it to where you may write: cp -r {folder} NEW"):
            pass
    except RunError as why:
        if _is_being_renamed(folder):  # no other process has done it by now
            raise RunError(f"{folder} was left half changed by a process that was killed. ", *why.parts) from why


def _argument_of(advice: Advice) -> str | None:
    return next((part.name for part in advice if isinstance(part, Argument)), None)


def _is_being_renamed(folder: Path) -> bool:
    """A link would lead out of the folder."""
    return os.path.isdir(folder / RENAMING) and not os.path.islink(folder / RENAMING)  # noqa: PTH112, PTH114 - take any name


def _rename_the_rest(folder: Path, remedy: str) -> None:
    if not _is_being_renamed(folder):
        return
    try:
        for new in sorted((folder / RENAMING).iterdir()):
            new.replace(folder / new.name)
        (folder / RENAMING).rmdir()
    except OSError as why:
        raise cannot_write(folder, str(why.strerror), remedy) from why


def is_left_over(name: str) -> bool:
    """Whether a killed process may have left a file or folder of this name where nothing was written yet."""
    return name == LOCK or name.startswith(WRITING)


def clear_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written in a folder in which only this process writes."""
    for left in folder.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)
