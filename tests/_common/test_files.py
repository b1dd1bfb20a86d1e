"""Files that are written together: all are new afterwards, or all are old."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptee._common.errors import RunError
from ptee._common.files import replace_files


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


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_renamed_leaves_all_as_they_were(name, folder, monkeypatch):
    replace = Path.replace

    def fail(self: Path, to: Path) -> Any:
        if self.name == name and self.read_text() == "new":
            raise PermissionError(13, "Permission denied")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunError, match="Permission denied"):
        replace_files(folder, WRITERS)
    assert contents(folder) == {"first": "old", "last": "old"}


def test_a_file_that_cannot_be_written_is_named_and_leaves_all_as_they_were(folder):
    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"second: No space left"):
        replace_files(folder, WRITERS | {"second": fail})
    assert contents(folder) == {"first": "old", "last": "old"}


def test_files_are_kept_where_a_disk_knows_no_second_names(folder, monkeypatch):
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(1, "Operation not permitted")))
    test_a_file_that_cannot_be_renamed_leaves_all_as_they_were("last", folder, monkeypatch)
