"""Samples of webdataset shards, parquet tables and folders of pictures, in the same form."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from shards import picture, shard

from ptee._common.errors import DataError
from ptee.data.folders import list_files
from ptee.data.shards import Sample, find_source, of_row, require_whole_shard, samples


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def read(folder: Path) -> list[Sample]:
    source = find_source(folder)
    return list(samples(source, source.files))


def test_a_shard_gives_each_picture_with_its_label(tmp_path):
    tar(tmp_path / "a.tar", {"1.png": b"one", "1.cls": b"7\n", "2.cls": b"3", "2.jpg": b"two", "2.json": b"{}"})
    assert read(tmp_path) == [Sample("a.tar/1", b"one", 7, ""), Sample("a.tar/2", b"two", 3, "")]


def test_a_file_whose_name_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "t\udcff").mkdir()
    (tmp_path / "t\udcff" / "1.png").write_bytes(b"one")
    with pytest.raises(DataError, match=r"'t\\xff/1.png' has a name that is not UTF-8. Rename it."):
        find_source(tmp_path)


@pytest.mark.parametrize(
    ("names", "key", "ending"),
    [
        (["img.001.png", "img.002.png"], "img", "001.png"),
        (["cat/a.png", "cat/Dr. Who.JPG"], "cat/Dr", " who.jpg"),
        (["7.input.png", "7.target.cls"], "7", "input.png"),
    ],
    ids=["numbered", "a name", "two kinds"],
)
def test_a_picture_that_its_name_hides_is_named_and_not_left_out(names, key, ending, tmp_path):
    tar(tmp_path / "a.tar", {"0.png": b"one", "0.seg.png": b"a mask"} | dict.fromkeys(names, b"two"))
    said = rf"a\.tar/{key} has the picture '{ending}', and none called \.png, \.jpg .* for its kind: rename the pictures, without"
    with pytest.raises(DataError, match=said):
        read(tmp_path)


@pytest.mark.parametrize("order", [("0.cls", "1.png", "0.png", "1.cls"), ("0.png", "1.png", "0.cls", "1.cls")])
def test_a_label_that_stands_apart_from_its_picture_is_not_passed_over(order, tmp_path):
    tar(tmp_path / "a.tar", dict.fromkeys(order, b"1"))
    with pytest.raises(
        DataError,
        match=r"a\.tar/0\.cls has no picture called \.png, \.jpg or the like beside it\. .* one after another: .* tar --sort=name does\.",
    ):
        read(tmp_path)


def test_a_shard_without_labels_gives_the_folder_as_the_name_of_the_class(tmp_path):
    tar(tmp_path / "a.tar", {"cat/1.png": b"one", "2.png": b"two", "note.txt": b"no picture"})
    assert read(tmp_path) == [Sample("a.tar/cat/1", b"one", -1, "cat", True), Sample("a.tar/2", b"two", -1, "")]


@pytest.mark.parametrize(
    ("text", "label", "name"),
    [(b" 7 ", 7, ""), (b"tabby cat\n", -1, "tabby cat"), (b"", -1, ""), (b"-1", -1, "")],
)
def test_a_label_in_a_shard_is_a_number_or_a_name_or_none(text, label, name, tmp_path):
    tar(tmp_path / "a.tar", {"dog/1.png": b"one", "dog/1.cls": text})
    (found,) = read(tmp_path)
    assert (found.label, found.class_name) == (label, name or ("dog" if label < 0 else ""))
    assert found.unsure is (found.class_name == "dog")


@pytest.mark.parametrize(
    ("members", "label", "name", "unsure"),
    [
        ({"1.json": b'{"label": 7, "caption": "a cat"}'}, 7, "", True),
        ({"1.json": b'{"label": null, "class": "3"}'}, 3, "", True),
        ({"1.json": b'{"cls": "cat"}', "1.txt": b"8"}, -1, "cat", True),
        ({"1.json": b'{"label": "cat"}', "1.cls": b"3"}, 3, "", False),
        ({"1.json": b'{"label": 7}', "1.cls": b""}, 7, "", True),
        ({"1.txt": b"7\n"}, 7, "", True),
        ({"1.txt": b"tabby cat\n"}, -1, "tabby cat", True),
        ({"1.txt": b"caf\xe9"}, -1, "caf\ufffd", True),
        ({"1.txt": b"20231104123456"}, -1, "", False),
        ({"1.json": b'{"caption": "a cat"}', "1.seg.json": b'{"label": 7}', "1.index": b"7"}, -1, "", False),
        ({"1.json": b'["cat"]'}, -1, "", False),
        ({"1.json": b'{"label": [7]}'}, -1, "", False),
        ({"1.json": b'{"label": ' + 400 * b"7" + b"}"}, -1, "", False),
        ({"1.json": b"{"}, -1, "", False),
    ],
)
def test_a_label_in_a_shard_may_stand_in_json_or_in_a_text_which_may_also_be_a_caption(
    members, label, name, unsure, tmp_path
):
    tar(tmp_path / "a.tar", {"1.png": b"one"} | members)
    assert read(tmp_path) == [Sample("a.tar/1", b"one", label, name, unsure)]


def test_a_caption_beside_a_picture_in_a_class_folder_is_not_its_label(tmp_path):
    tar(tmp_path / "a.tar", {"cat/1.png": b"one", "cat/1.txt": b"7"})
    assert read(tmp_path) == [Sample("a.tar/cat/1", b"one", -1, "cat", True)]


@pytest.mark.parametrize("label", [b"9" * 30, b"\xff"])
def test_a_label_that_cannot_be_read_is_refused_with_the_name_of_its_picture(label, tmp_path):
    tar(tmp_path / "a.tar", {"1.png": b"one", "1.cls": label})
    with pytest.raises(DataError, match=r"a\.tar/1 has the label '?.*the number or the name of its class"):
        read(tmp_path)


@pytest.mark.parametrize("image", [b"one", {"bytes": b"one", "path": "x.png"}], ids=["bytes", "as Hugging Face has it"])
def test_a_table_gives_each_picture_with_its_label(image, tmp_path):
    pa.parquet.write_table(pa.table({"image": [image], "label": [4]}), tmp_path / "a.parquet")
    (found,) = read(tmp_path)
    assert (found.image, found.label) == (b"one", 4)
    assert found.key == ("a.parquet/x.png" if isinstance(image, dict) else "a.parquet/7a6c86f1")


@pytest.mark.parametrize("label", [2**40, 2**31, -2, 1.5, True, [1]])
def test_a_value_in_a_table_that_cannot_be_a_class_is_refused(label):
    with pytest.raises(DataError, match=r"a\.parquet/x has the label"):
        of_row("a.parquet", b"one", label, "x")


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([3.0, 0.0, None], [(3, ""), (0, ""), (-1, "")]),
        ([3, -1], [(3, ""), (-1, "")]),
        (["cat", "4"], [(-1, "cat"), (4, "")]),
        (pa.array(["cat", "dog"]).dictionary_encode(), [(-1, "cat"), (-1, "dog")]),
    ],
    ids=["whole numbers as floats", "-1 for none", "names", "a dictionary of names"],
)
def test_labels_of_a_table_are_numbers_or_names(column, found, tmp_path):
    pa.parquet.write_table(pa.table({"image": [b"one"] * len(column), "label": column}), tmp_path / "a.parquet")
    assert [(sample.label, sample.class_name) for sample in read(tmp_path)] == found


def named_table(path: Path, names: list[str], label: int) -> None:
    feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": [b"one"], "label": [label]})
    pa.parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), path)


def test_numbers_that_hugging_faces_schema_names_are_given_as_names(tmp_path):
    for label in (1, 2):
        named_table(tmp_path / "a.parquet", ["dog", "cat"], label)
        assert find_source(tmp_path).class_names == ("dog", "cat")
        if label == 1:
            assert [(sample.label, sample.class_name) for sample in read(tmp_path)] == [(-1, "cat")]
    with pytest.raises(DataError, match="has the label 2, and its table names 2 classes"):
        read(tmp_path)


def test_tables_that_name_their_numbers_differently_are_refused(tmp_path):
    for file, names in (("a", ["cat", "dog"]), ("b", ["cat", "dog"]), ("c", ["dog", "cat"])):
        named_table(tmp_path / f"{file}.parquet", names, 1)
    with pytest.raises(
        DataError, match=r"a\.parquet and c\.parquet of .* name the numbers of their classes differently"
    ):
        find_source(tmp_path)


def test_pictures_and_tables_beside_shards_are_not_read_and_named(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("b.parquet", "1.png", "cat/2.jpg"):
        (tmp_path / name).write_bytes(b"one")
    assert find_source(tmp_path / "b.parquet").not_read == ()
    for shards, rest in (
        (False, ("2 pictures beside the tables",)),
        (True, ("1 table beside the shards", "2 pictures beside the shards")),
    ):
        if shards:
            shard(tmp_path / "a.tar", range(1))
        assert find_source(tmp_path).not_read == rest


@pytest.mark.parametrize("what", ["pipe", "link"])
def test_what_is_named_like_a_picture_and_is_no_file_is_refused_by_name(what, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"one")
    path = tmp_path / "cat" / "2.png"
    os.mkfifo(path) if what == "pipe" else path.symlink_to("nowhere")
    with pytest.raises(DataError, match=r"cat/2\.png (is not a regular file|cannot be read \(No such file)"):
        find_source(tmp_path)


@pytest.mark.parametrize("kind", ["pictures", "shards"])
def test_linked_folders_are_read(kind, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "far" / name).mkdir(parents=True)
        if kind == "pictures":
            (tmp_path / "far" / name / "1.png").write_bytes(b"one")
        else:
            shard(tmp_path / "far" / name / "1.tar", range(2))
    (tmp_path / "here").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "here" / name).symlink_to(tmp_path / "far" / name)
    assert len(find_source(tmp_path / "here").files) == 2


def test_folders_give_each_picture_with_the_name_of_its_class(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"one")
    (tmp_path / ".hidden.png").write_bytes(b"no")
    assert read(tmp_path) == [Sample("cat/1.png", b"one", -1, "cat", True)]
    assert find_source(tmp_path).class_names == ("cat",)


def test_the_class_of_a_picture_is_the_folder_at_the_top_also_where_others_lie_in_it(tmp_path):
    for name in ("cat/old/1.png", "dog/new/2.png", "dog/3.gif", "4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"one")
    assert [sample.class_name for sample in read(tmp_path)] == ["cat", "dog"]
    assert find_source(tmp_path).not_read == ("1 .gif file", "1 picture outside of class folders")


def test_pictures_of_one_part_have_the_classes_in_it_and_two_parts_are_refused(tmp_path):
    for part in ("val", "test", "calibration"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "1.png").write_bytes(b"one")
        if part != "calibration":
            assert find_source(tmp_path).class_names == ("cat",)
    with pytest.raises(DataError, match=r"holds calibration, val\. Give one of them.*calibration"):
        find_source(tmp_path)


def test_parts_are_the_same_each_time_and_hold_every_file_once(tmp_path, monkeypatch):
    monkeypatch.setattr("ptee.data.shards.PART_BYTES", 1)
    for n in range(40):
        tar(tmp_path / f"{n:02d}.tar", {"1.png": bytes(n)})
    source = find_source(tmp_path)
    assert source.parts() == find_source(tmp_path).parts()
    assert [file for part in source.parts() for file in part] == list(source.files)
    assert 1 < len(source.parts()) <= 16


@pytest.mark.parametrize("name", ["nowhere", "empty", " "])
def test_a_source_that_lists_no_images_says_what_to_give(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"webdataset shards \(\*\.tar\)"):
        find_source(tmp_path / name if name.strip() else name)


def test_a_shard_that_is_cut_off_is_named(tmp_path):
    path = tar(tmp_path / "a.tar", {"1.png": bytes(5000), "1.cls": b"1"})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.tar cannot be read to its end.*Replace it"):
        read(tmp_path)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {
    "a bit of a header": lambda content, second: flipped(content, second + 3),
    "cut off between two pictures": lambda content, second: content[:second],
    "cut off in a header": lambda content, second: content[: second + 300],
    "a shard behind it": lambda content, second: content + content,
    "a shard behind its first pictures": lambda content, second: content[:second] + bytes(1024) + content[second:],
    "a bit of a compressed one": lambda content, second: flipped(gzip.compress(content), 1000),
    "a compressed one, cut off": lambda content, second: gzip.compress(content)[:-100],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_no_picture_of_a_damaged_shard_is_passed_over_in_silence(damage, tmp_path):
    path = shard(tmp_path / "a.tar", range(4))
    assert len(read(tmp_path)) == 4
    with tarfile.open(path) as file:
        second = file.getmembers()[2].offset  # behind a picture and its label
    path.write_bytes(damage(path.read_bytes(), second))
    with pytest.raises(DataError, match=r"a\.tar cannot be read to its end|a\.tar' is several tar files"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"a\.tar"):
        require_whole_shard(path)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_shard_is_read(pack, tmp_path):
    path = shard(tmp_path / "a.tar", range(4))
    expected = read(tmp_path)
    path.write_bytes(pack(path.read_bytes()))
    assert read(tmp_path) == expected
    require_whole_shard(path)


def sparse(name: str, size: int) -> tarfile.TarInfo:
    """A member of zeros of which none is stored."""
    member = tarfile.TarInfo(name)
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(size)}
    member.pax_headers["GNU.sparse.map"] = "0,0"
    return member


def of_header(path: Path, member: tarfile.TarInfo) -> Path:
    """A shard of one picture, and of a member without its content."""
    tar(path, {"0.png": b"one"})
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as file:
        file.addfile(member)
    return path


def test_a_member_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    of_header(tmp_path / "a.tar", sparse("1.png", 10**12))
    with pytest.raises(DataError, match=r"its member '1\.png' would take 1,000,000,000,000 bytes of memory.*Remove it"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["0.mp4", "film/1.npy"])
def test_a_large_member_that_is_not_read_does_no_harm(name, tmp_path):
    of_header(tmp_path / "a.tar", sparse(name, 10**12))
    assert read(tmp_path) == [Sample("a.tar/0", b"one", -1, "")]
    require_whole_shard(tmp_path / "a.tar")


def test_a_picture_that_is_stored_without_its_zeros_is_read(tmp_path):
    of_header(tmp_path / "a.tar", sparse("1.png", 5))
    assert read(tmp_path)[1] == Sample("a.tar/1", bytes(5), -1, "")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_picture_in_a_shard_that_is_a_link_is_named_and_not_left_out(kind, tmp_path):
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = kind, "0.png"
    of_header(tmp_path / "a.tar", link)
    with pytest.raises(DataError, match=r"a\.tar: its member '1\.png' is a link.* --dereference --hard-dereference"):
        read(tmp_path)


def test_a_shard_in_a_compression_that_is_not_read_is_called_so(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(DataError, match=r"a\.tar is compressed \(zstd\): unpack it once, zstd -dc OLD > NEW\.$"):
        read(tmp_path)


def test_a_table_without_images_says_which_columns_it_has(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column of images.*It has text"):
        read(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("train.tar", "validation.tar"),
        ("train-000.tar", "val-000.tar"),
        ("seg-train-0.tar", "seg-val-0.tar"),
    ],
)
def test_a_folder_of_training_images_and_others_is_refused_with_one_of_its_parts(names, tmp_path):
    for name in names:
        path = tmp_path / name
        path.mkdir() if "." not in name else shard(path, range(2))
    with pytest.raises(DataError, match=rf"holds {', '.join(sorted(names))}\. Heads learn from one part.*val"):
        find_source(tmp_path)
    if "." not in names[0]:
        (tmp_path / "val" / "cat").mkdir()
        (tmp_path / "val" / "cat" / "a.png").write_bytes(picture(0))
        assert find_source(tmp_path / "val").files == ("cat/a.png",)


def test_the_folder_of_class_folders_is_found_where_paths_have_backslashes(tmp_path, monkeypatch):
    names = [f"{c}/{n}.png" for c in ("cat", "dog") for n in range(2)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def as_on_windows(*args: Any, **how: Any) -> Any:
        found = list_files(*args, **how)
        rows = {
            part: [
                (file._replace(path=f"{tmp_path}/{file.name.replace('/', chr(92))}"), label) for file, label in files
            ]
            for part, files in found.parts.items()
        }
        return replace(found, parts=rows)

    monkeypatch.setattr("ptee.data.shards.list_files", as_on_windows)
    source = find_source(tmp_path)
    assert (source.place, list(source.files)) == (str(tmp_path), names)
