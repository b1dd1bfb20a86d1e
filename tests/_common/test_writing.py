"""Files that are written together: all are new afterwards, or all are old."""

from __future__ import annotations

import errno
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from killed import killed_at

from ptee._common.errors import RunError
from ptee._common.writing import (
    LOCK,
    NO_LOCKS,
    RENAMING,
    clear_unfinished,
    fill_place,
    free_place,
    locked,
    replace_files,
    require_writable,
    settle,
)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


WRITERS = {name: lambda path: path.write_text("new") for name in ("first", "second", "last")}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two of three files."""
    for name in ("first", "last"):
        (tmp_path / name).write_text("old")
    return tmp_path


def test_all_files_are_replaced_in_order_and_nothing_else_is_left(folder):
    replace_files(folder, WRITERS)
    assert contents(folder) == {"first": "new", "second": "new", "last": "new"}


def failing_at(name: str, error: BaseException, renamed: bool) -> Callable[[Path, Path], Any]:
    """`Path.replace` that fails with the new file of this name, before or after renaming it."""
    replace = Path.replace

    def fail(self: Path, to: Path) -> Any:
        fails = self.name == name and self.parent.name == RENAMING
        if not fails or renamed:
            replace(self, to)
        if fails:
            raise error

    return fail


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_renamed_leaves_all_as_they_were(name, folder, monkeypatch):
    monkeypatch.setattr(Path, "replace", failing_at(name, PermissionError(13, "Permission denied"), renamed=False))
    with pytest.raises(RunError, match="Permission denied"):
        replace_files(folder, WRITERS)
    assert contents(folder) == {"first": "old", "last": "old"}


@pytest.mark.parametrize("name", WRITERS)
def test_an_interruption_after_any_rename_leaves_all_as_they_were(name, folder, monkeypatch):
    monkeypatch.setattr(Path, "replace", failing_at(name, KeyboardInterrupt(), renamed=True))
    with pytest.raises(KeyboardInterrupt):
        replace_files(folder, WRITERS)
    assert contents(folder) == {"first": "old", "last": "old"}


STEPS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir")  # of the system, that change what a folder holds


@contextmanager
def interrupted_at(n: int, done: bool) -> Iterator[None]:
    """Ctrl-C comes at the n-th of these steps, counted from 0: before it is done, or when it is done."""
    left = [n]

    def counted(step: Callable[..., Any], *given: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] != -1:
            return step(*given, **more)
        with suppress(OSError):
            step(*given, **more) if done else None
        raise KeyboardInterrupt

    places = [os, *filter(None, [getattr(pathlib, "_NormalAccessor", None)])]  # pathlib of Python 3.10 keeps its own
    with pytest.MonkeyPatch.context() as patch:
        for place, name in product(places, STEPS):
            patch.setattr(place, name, partial(counted, getattr(place, name)))
        yield
    assert left[0] < 0, "it is over before"


@pytest.mark.parametrize("done", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("n", range(20))
def test_an_interruption_at_any_step_leaves_all_old_or_all_new_and_nothing_half_written(n, done, folder):
    with interrupted_at(n, done), pytest.raises(KeyboardInterrupt):
        replace_files(folder, WRITERS)
    assert {name: text for name, text in contents(folder).items() if name != LOCK} in (OLD, NEW)


def test_a_file_that_cannot_be_written_is_named_and_leaves_all_as_they_were(folder):
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"second: No space left"):
        replace_files(folder, WRITERS | {"second": fail})
    assert contents(folder) == {"first": "old", "last": "old"}


def test_files_are_kept_where_a_disk_has_no_hard_links(folder, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    test_a_file_that_cannot_be_renamed_leaves_all_as_they_were("last", folder, monkeypatch)


# ---------------------------------------------------------------------------------------------------- killed processes

NEW, OLD = {"first": "new", "second": "new", "last": "new"}, {"first": "old", "last": "old"}


@pytest.mark.parametrize("n", range(6))
def test_after_a_kill_at_any_rename_all_files_are_old_or_all_are_new(n, folder):
    with killed_at(n) as killed:
        replace_files(folder, WRITERS)
    assert killed == [n < 5]
    settle(folder)
    assert contents(folder) == (NEW if n else OLD)


@pytest.mark.parametrize("n", range(6))
def test_a_kill_while_old_files_are_put_back_leaves_all_old_or_all_new(n, folder, monkeypatch):
    monkeypatch.setattr(Path, "replace", failing_at("last", PermissionError(13, "Permission denied"), renamed=False))
    with killed_at(4 + n), suppress(RunError):
        replace_files(folder, WRITERS)
    monkeypatch.undo()
    settle(folder)
    assert contents(folder) == (NEW if n < 4 else OLD)


def test_what_a_killed_process_has_left_is_cleared_by_the_next_that_writes(folder):
    lines = "import os, pathlib, ptee._common.writing as writing", "pathlib.Path.replace = lambda *_: os._exit(9)"
    call = "writing.replace_files(pathlib.Path('.'), {n: lambda p: p.write_text('new') for n in ('first', 'last')})"
    assert subprocess.run([sys.executable, "-c", "\n".join([*lines, call])], cwd=folder, check=False).returncode == 9
    assert len(list(folder.glob(".writing-*"))) == 1
    with locked(folder):
        clear_unfinished(folder)
    assert contents(folder) == OLD


def killed_while_it_writes(folder: Path) -> None:
    """A real process, so that nothing of it is cleared."""
    lines = "import os, pathlib, ptee._common.writing as writing", "end = lambda path: path.touch() or os._exit(9)"
    call = "writing.replace_files(pathlib.Path('.'), {'first': end, 'last': end})"
    assert subprocess.run([sys.executable, "-c", "\n".join([*lines, call])], cwd=folder, check=False).returncode == 9
    assert (folder / LOCK).exists()


def test_a_folder_in_which_a_process_was_killed_is_free_and_left_empty(tmp_path):
    killed_while_it_writes(tmp_path)
    assert free_place(tmp_path) == tmp_path
    assert not list(tmp_path.iterdir())


def two_models(new: Path) -> None:
    for name in ("a", "b"):
        (new / name / "1").mkdir(parents=True)
        (new / name / "1" / "model").write_text(name)


@pytest.mark.parametrize("n", range(4))
def test_after_a_kill_at_any_rename_a_place_is_free_again_or_whole(n, tmp_path):
    place = free_place(tmp_path / "repository")
    with killed_at(n) as killed:
        fill_place(place, two_models)
    assert killed == [n < 3]
    with suppress(RunError):  # it is whole
        free_place(place)
        fill_place(place, two_models)
    assert sorted(str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()) == ["a/1/model", "b/1/model"]
    assert sorted(p.name for p in place.iterdir()) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["repository"], "nothing is left beside it"


def test_where_filling_a_place_fails_nothing_is_left(tmp_path):
    def fail(new: Path) -> None:
        two_models(new)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill_place(tmp_path / "repository", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_another_process_has_filled_meanwhile_stays_as_it_is(tmp_path):
    def beaten(new: Path) -> None:
        two_models(new)
        (tmp_path / "other").touch()

    with pytest.raises(RunError, match="exists"):
        fill_place(tmp_path, beaten)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_folder_that_is_not_free_or_that_another_process_writes_stays_as_it_is(folder, tmp_path_factory):
    killed_while_it_writes(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(RunError, match="exists"):
        free_place(folder)
    assert sorted(folder.iterdir()) == before
    other = tmp_path_factory.mktemp("other")
    lock = FileLock(other / LOCK)
    (other / ".writing-x").mkdir()
    with lock, pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="Another process writes"):
        patch.setattr("ptee._common.writing.locked", partial(locked, wait=0))
        free_place(other)
    assert (other / ".writing-x").is_dir()


def test_files_of_a_killed_process_are_in_place_before_another_writes(folder):
    with killed_at(2):
        replace_files(folder, WRITERS)
    replace_files(folder, {name: lambda path: path.write_text("newer") for name in ("first", "second")})
    assert contents(folder) == {"first": "newer", "second": "newer", "last": "new"}


@pytest.mark.parametrize("place", ["run", "no such run", "x" * 5000, "a\0b", "user/repo"])
def test_where_nothing_is_being_renamed_nothing_changes(place, tmp_path):
    (tmp_path / "run").mkdir()
    settle(tmp_path / place)
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]


def test_no_files_are_taken_from_another_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "first").write_text("secret")
    (folder / RENAMING).symlink_to(other)
    settle(folder)
    assert (folder / "first").read_text() == "old"
    assert (other / "first").is_file()


def test_where_files_cannot_be_put_right_the_user_learns_what_to_type(folder, monkeypatch):
    with killed_at(2):
        replace_files(folder, WRITERS)

    def read_only(*_: object, **__: object) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    said = rf"left half changed by a process that was killed\. Cannot write .*: Read-only.* cp -r {folder} NEW$"
    with pytest.raises(RunError, match=said):
        settle(folder)
    monkeypatch.undo()
    copy = shutil.copytree(folder, folder / "copy")
    settle(copy)
    assert contents(copy) == NEW


# ---------------------------------------------------------------------------------------------------- one at a time


needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="has no flock")


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """As on a disk that says so."""
    import fcntl

    def flock(_: int, operation: int) -> None:
        if not operation & fcntl.LOCK_UN:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)


@needs_flock
@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [*sorted(set(NO_LOCKS)), errno.ENOSYS])
def test_a_disk_that_knows_no_locks_is_written_without_one_and_none_is_left(code, folder, monkeypatch):
    without_locks(monkeypatch, code)
    replace_files(folder, WRITERS)
    assert contents(folder) == NEW
    assert free_place(folder / "new") == folder / "new"
    assert not list(folder.glob("**/.*"))


def test_a_disk_whose_locks_another_release_of_filelock_does_not_know_is_written_without_one(folder, monkeypatch):
    def unknown(*_: object, **__: object) -> Any:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unknown)
    replace_files(folder, WRITERS)
    assert contents(folder) == NEW


@needs_flock
def test_a_lock_whose_file_another_process_removes_meanwhile_is_taken_again(folder, monkeypatch):
    import fcntl

    flock, removed = fcntl.flock, []

    def late(file: int, operation: int) -> None:
        if not removed:
            removed.append((folder / LOCK).unlink())
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with locked(folder):
        assert removed
        assert (folder / LOCK).exists()


def test_two_threads_do_not_change_a_folder_at_once_and_one_may_lock_it_twice(folder, monkeypatch):
    def lock() -> str:
        try:
            with locked(folder, wait=0):
                return "locked"
        except RunError as why:
            return str(why)

    with ThreadPoolExecutor(1) as other:
        with locked(folder), locked(folder):
            replace_files(folder, WRITERS)
            assert other.submit(lock).result() == (
                f"Another process writes into {folder}. Wait for it, or choose another folder."
            )
        assert other.submit(lock).result() == "locked"
    assert contents(folder) == NEW


@pytest.mark.parametrize("place", ["link", "link/run", "circle"])
def test_a_link_that_leads_nowhere_is_no_place_to_write(place, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(RunError, match=r"is a link that leads nowhere\. Choose another folder"):
        require_writable(tmp_path / place)


# ---------------------------------------------------------------------------------------------------- a full disk


def test_on_a_full_disk_the_advice_is_to_make_room(folder):
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"No space left on device\. Make room on that disk\."):
        replace_files(folder, {"first": fail})
