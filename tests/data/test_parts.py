"""A folder of tables in parts: only what is whole counts, and one process at a time writes."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from ptee._common.errors import DataError, PteeError, RunError
from ptee.data.parts import parts_writer, read_manifest, read_whole, row_groups, write_tables

ABOUT = {"heads": "a", "source": {"kind": "tar", "bytes": 4}}


def table(keys: str, damaged: str = "") -> pa.Table:
    return pa.table(
        {"key": list(keys), "fault": ["damaged" if key in damaged else "" for key in keys], "x": [1] * len(keys)}
        | {"label": [-1 if key == "a" else 0 for key in keys]}
    )


def begun(folder: Path, about: dict = ABOUT, planned: int = 2, limit: float = 1.0, **how):
    return parts_writer(folder, "traces", about, planned, limit=limit, **how)


def add(writer, name: str, *tables: pa.Table) -> None:
    with writer.part(name) as place:
        write_tables(iter(tables), place / "rows.parquet")


@pytest.fixture
def whole(tmp_path) -> Path:
    with begun(tmp_path / "out") as writer:
        add(writer, "part-0", table("ab"), table("c"))
        add(writer, "part-1", table("def", damaged="e"))
    return tmp_path / "out"


def keys(folder: Path) -> str:
    return "".join(
        key
        for group in row_groups(folder, read_manifest(folder, "traces"), ["key"])
        for key in group["key"].to_pylist()
    )


def test_what_is_written_is_read_without_images_that_cannot_be_read(whole):
    manifest = read_whole(whole, "traces")
    assert (manifest.rows, manifest.labelled, manifest.unreadable, keys(whole)) == (5, 4, 1, "abcdf")
    assert json.loads((whole / "unreadable.json").read_text()) == {"images": [{"key": "e", "fault": "damaged"}]}
    assert sorted(path.name for path in whole.iterdir()) == ["manifest.json", "part-0", "part-1", "unreadable.json"]


def test_a_folder_of_another_version_is_refused_with_what_to_do(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    (whole / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    with pytest.raises(DataError, match=r"of another version: schema_version.*Make it again \(overwrite=True\)\."):
        read_whole(whole, "traces")
    with begun(whole, planned=1, overwrite=True) as writer:
        add(writer, "part-7", table("ab"))
    assert sorted(path.name for path in whole.iterdir()) == ["manifest.json", "part-7"]


def test_half_a_part_is_not_there_and_the_next_writer_goes_on(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), begun(out) as writer:
        add(writer, "part-0", table("ab"))
        with writer.part("part-1") as place:
            write_tables(iter([table("c")]), place / "rows.parquet")
            raise KeyboardInterrupt
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "part-0"]
    with pytest.raises(DataError, match=r"1 of its 2 parts.*goes on"):
        read_whole(out, "traces")
    with begun(out) as writer:
        assert writer.missing(["part-0", "part-1"]) == ["part-1"]
        add(writer, "part-1", table("c"))
    assert keys(out) == "abc"


def test_a_part_that_the_manifest_does_not_name_is_made_again(tmp_path):
    (tmp_path / "out").mkdir()
    with begun(tmp_path / "out") as writer:
        (tmp_path / "out" / "part-0").mkdir()
        (tmp_path / "out" / "part-0" / "old.parquet").write_bytes(b"half")
        add(writer, "part-0", table("ab"))
    assert keys(tmp_path / "out") == "ab"


@pytest.mark.parametrize(
    ("code", "said"),
    [(errno.ENOSPC, r"No space left on device\. Make room"), (errno.EFBIG, r"File too large\. Choose")],
)
def test_a_full_disk_is_named_and_the_part_is_not_there(code, said, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(code, "Error writing bytes to file. Detail: [errno 28]")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with (
        pytest.raises(RunError, match=rf"^Cannot write {tmp_path}/out/part-0: {said}"),
        begun(tmp_path / "out") as writer,
    ):
        add(writer, "part-0", table("ab"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_two_writers_into_one_folder_are_refused(tmp_path):
    with begun(tmp_path / "out"), pytest.raises(DataError, match="Another process writes"), begun(tmp_path / "out"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
def test_a_disk_that_knows_no_locks_is_written_without_one(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with begun(tmp_path / "out") as writer:
        add(writer, "part-0", table("ab"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "part-0"]


def test_a_lock_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / ".ptee.lock").mkdir()
    with pytest.raises(DataError, match=r"cannot be locked: .* Remove it, or give another folder"), begun(tmp_path):
        pass


@pytest.mark.parametrize(
    ("about", "planned", "said"),
    [
        ({**ABOUT, "heads": "b"}, 2, r"another heads \(a; now b\)"),
        ({**ABOUT, "source": {"kind": "tar", "bytes": 5}}, 2, r"another source \(bytes: 4; now 5\)"),
        (ABOUT, 3, r"another number of parts \(2; now 3\)"),
    ],
)
def test_rows_of_something_else_are_replaced_only_if_asked_for(about, planned, said, whole):
    with pytest.raises(DataError, match=said), begun(whole, about, planned):
        pass
    assert keys(whole) == "abcdf"
    with begun(whole, about, planned, overwrite=True) as writer:
        add(writer, "part-0", table("x"))
    assert keys(whole) == "x"


def test_a_folder_that_holds_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds something else \(thesis\.txt\)"), begun(tmp_path, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_many_images_that_cannot_be_read_end_it_and_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ptee.data.parts.FEW", 1)
    with (
        pytest.raises(PteeError, match=r"2 of 4 images cannot be used.*max_unreadable"),
        begun(tmp_path / "out", limit=0.1) as writer,
    ):
        add(writer, "part-0", table("abcd", damaged="bd"))
    assert "damaged" in (tmp_path / "out" / "unreadable.json").read_text()


def test_the_same_call_given_again_is_not_allowed_more(tmp_path, monkeypatch):
    monkeypatch.setattr("ptee.data.parts.FEW", 1)
    out = tmp_path / "out"
    with pytest.raises(PteeError), begun(out, planned=1, limit=0.1) as writer:
        add(writer, "part-0", table("abcd", damaged="bd"))
    with pytest.raises(PteeError, match="2 of 4 images cannot be used"), begun(out, planned=1, limit=0.1):
        pass
    with pytest.raises(PteeError, match=r"2 of 4 images cannot be used.*ptee trace"):
        read_whole(out, "traces")
    with begun(out, planned=1, limit=0.6) as writer:
        assert writer.missing(["part-0"]) == []
    read_whole(out, "traces")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


def of_another_part(file: Path) -> None:
    shutil.copy(file.parents[1] / "part-1" / file.name, file)


@pytest.mark.parametrize("damage", [cut_off, changed, of_another_part, Path.unlink])
def test_a_file_that_is_not_as_it_was_written_is_named(damage, whole):
    damage(whole / "part-0" / "rows.parquet")
    with pytest.raises(DataError, match=r"part-0.rows\.parquet (is cut off, changed|cannot be read)"):
        keys(whole)


@pytest.mark.parametrize(
    "damage", [cut_off, changed, of_another_part, Path.unlink, lambda file: shutil.rmtree(file.parent)]
)
def test_a_part_that_is_not_as_it_was_written_is_made_again_by_the_next_writer(damage, whole):
    damage(whole / "part-0" / "rows.parquet")
    with begun(whole) as writer:
        assert writer.missing(["part-0", "part-1"]) == ["part-0"]
        add(writer, "part-0", table("ab"), table("c"))
    assert (read_whole(whole, "traces").rows, keys(whole)) == (5, "abcdf")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "traces"}', "{" * 1000])
def test_a_damaged_manifest_is_refused_in_one_line(text, whole):
    (whole / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json") as why:
        read_manifest(whole, "traces")
    assert "\n" not in str(why.value)


@pytest.mark.parametrize("name", ["../other", "/etc", ".hidden", "a/b"])
def test_a_manifest_cannot_lead_out_of_its_folder(name, whole):
    values = json.loads((whole / "manifest.json").read_text())
    values["parts"][0]["name"] = name
    (whole / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="damaged"):
        read_manifest(whole, "traces")
