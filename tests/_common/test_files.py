"""Files that are written together: all are new afterwards, or all are old."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ptee._common.errors import PteeError, RunError
from ptee._common.files import DEEPEST, as_path, from_json, replace_files, require_writable


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
        fails = self.name == name and self.read_text() == "new"
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


def test_a_file_that_cannot_be_written_is_named_and_leaves_all_as_they_were(folder):
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"second: No space left"):
        replace_files(folder, WRITERS | {"second": fail})
    assert contents(folder) == {"first": "old", "last": "old"}


def test_files_are_kept_where_a_disk_has_no_hard_links(folder, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    test_a_file_that_cannot_be_renamed_leaves_all_as_they_were("last", folder, monkeypatch)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
        ('[{"a": {"b": 1, "b": 1}}]', "'b' is there twice"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested too deeply"),
        ('["' + "\\" * 5000, "Unterminated string"),
    ],
    ids=["twice", "twice inside", "deep objects", "deep lists", "one too deep", "no end"],
)
def test_json_that_could_be_read_in_two_ways_or_not_at_all_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        from_json(text)


@pytest.mark.parametrize(
    "inside", ["0", '"' + "[{" * 200 + '"', r'"\"' + "[" * 200 + r'\\"'], ids=["deep", "text", "quotes"]
)
def test_other_json_is_read(inside):
    value = from_json("[" * DEEPEST + inside + "]" * DEEPEST + " ")
    for _ in range(DEEPEST):
        (value,) = value
    assert value == json.loads(inside)


def test_lists_beside_one_another_are_not_deep():
    assert from_json("[" + ",".join(["[[]]"] * 1000) + "]") == [[[]]] * 1000


# ---------------------------------------------------------------------------------------------------- paths that a user gives


@pytest.mark.parametrize("given", ["~/run", Path("~/run")], ids=repr)
def test_a_path_may_begin_with_the_home_folder(given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path(given, "out") == tmp_path / "run"


@pytest.mark.parametrize("given", ["run", "~nobody-of-this-name/run", "a~b", " "], ids=repr)
def test_any_other_path_stays_as_it_is(given):
    assert as_path(given, "out") == Path(given)


@pytest.mark.parametrize("given", ["", b"", b"run", 3, True, ["run"], {}, "a\0b", object], ids=repr)
def test_what_is_no_path_is_refused_by_the_name_of_its_argument(given):
    with pytest.raises(PteeError, match=r"^out=.* is no path\. Give the name of a file or folder"):
        as_path(given, "out")


def test_a_path_that_is_not_utf8_is_refused_by_its_argument_and_shown():
    with pytest.raises(PteeError, match=r"^out=o\\xffut has a name that is not UTF-8\. Rename it\.$"):
        as_path("o\udcffut", "out")


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
