"""Files of a run that are missing, damaged or a stranger's are refused by name; a run on the hub is read like one on the disk."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from saved import as_schema_1, assert_same, change_tensors, edit, make, refused
from torch import Tensor

import ptee
from ptee._common.errors import PteeError, RunError
from ptee._common.text import printable
from ptee._common.writing import write_json
from ptee.model import run_files
from ptee.model import saving as runs
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_files import require_shape

# what is missing or damaged


@pytest.mark.parametrize("missing", ["config.json", "heads.safetensors"])
def test_a_missing_file_is_named(missing, folder, net):
    (folder / missing).unlink()
    assert missing in refused(folder, net)


@pytest.mark.parametrize("bytes_kept", [0, 7, 8, 100, 1000, -1], ids=str)
def test_a_cut_off_heads_file_is_refused(bytes_kept, folder, net):
    file = folder / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_kept])
    assert "heads.safetensors is cut off or damaged" in refused(folder, net)


CONFIGS = {
    "nothing": b"",
    "half of it": b'{"schema_version": 1, "exits": [',
    "no text": b"\xff\xfe\x00\x01",
    "no JSON": b"schema_version: 1",
    "ten thousand brackets": b"[" * 10_000,
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "an object of another program": b'{"model_type": "bert"}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_is_none_is_refused(text, folder, net):
    (folder / "config.json").write_bytes(text)
    assert re.search("config.json (is no complete JSON|has no schema_version)", refused(folder, net))


def test_a_config_with_a_key_twice_is_refused(folder, net):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"threshold": [2, 2],', 1))
    assert "'threshold' is there twice" in refused(folder, net)


def test_a_config_of_absurd_size_is_refused_unread(folder, net, monkeypatch):
    monkeypatch.setattr(run_files, "LARGEST_CONFIG_BYTES", 100)
    assert "longer than 100 bytes" in refused(folder, net)


@pytest.mark.parametrize("place", ["nowhere", "a/b/c", "./nowhere/", "config.json"])
def test_a_folder_that_is_not_there_is_named(place, folder, net, monkeypatch):
    monkeypatch.chdir(folder)
    assert place.rstrip("/") in refused(place, net)


# what is not trusted


@pytest.mark.parametrize("version", [runs.SCHEMA_VERSION + 1, 999, 10**30])
def test_a_newer_schema_is_refused_and_an_upgrade_advised(version, folder, net):
    edit(folder, "schema_version", version)
    assert re.search(f"{version}.*Upgrade ptee", refused(folder, net))


@pytest.mark.parametrize("version", ["1", 1.0, None, True, [1], 0, -1], ids=repr)
def test_a_schema_that_is_no_version_is_refused(version, folder, net):
    edit(folder, "schema_version", version)
    assert "schema" in refused(folder, net)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../heads.safetensors", "sub/heads.safetensors", "..", ".", "", "C:\\heads", "C:heads", "\\\\host\\share\\heads",
     "..\\heads.safetensors", "//host/share/heads", "sub\\heads"],
)  # fmt: skip
def test_a_heads_file_outside_of_the_folder_is_not_read(name, folder, net, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(safetensors.torch, "load_file", fail)
    edit(folder, "heads_file", name)
    assert re.search(f"{re.escape(repr(name))}.*not in the folder", refused(folder, net))


@pytest.mark.parametrize(
    "name",
    ["config.json", "other.safetensors", "heads\0.safetensors",
     "x" * 5000],
    ids=["config.json", "not there", "with a null", "a very long name"],
)  # fmt: skip
def test_a_heads_file_that_is_none_is_refused(name, folder, net):
    edit(folder, "heads_file", name)
    refused(folder, net)


WRONG = [
    ("heads_file", [1, None, ["heads.safetensors"]]),
    ("backbone", [None, [], "Net"]),
    ("backbone.name", [None, 1, ["Net"]]),
    ("backbone.hash", [None, 1, {}]),
    ("backbone.source", [[], "timm", 1]),
    ("backbone.classes", [None, "4", 4.0, True, -1, 0, 3, 5]),
    ("backbone.input", [None, [], 16]),
    ("backbone.input.input_size", [None, 16, [16], [3, 16], [3, 16, 16, 16], [3, 16, 16.5], [3, "16", 16], [3, 0, 16], [3, -16, 16], [3, True, 16], [3, 2**20, 16]]),
    ("backbone.input.mean", [[10**400] * 3, None, 0.5, ["0.5"] * 3, [None] * 3, [True] * 3, [0.5, 0.5], ["Infinity"] * 3]),
    ("backbone.input.std", [None, {}, ["1"] * 3, [0, 1, 1], [-1, 1, 1], [1, 1], ["Infinity", 1, 1], [float("nan"), 1, 1]]),
    ("backbone.input.interpolation", [None, 1, []]),
    ("exits", [None, {}, "one", ["one", "two"], [1, 2], [], [[]], [{}]]),
    ("exits.0.name", [None, 1, "", "nowhere", "two", "one.0.weight"]),
    ("exits.0.head", [None, 1, "", "nothing", "pool", "auto", "auto+"]),
    ("threshold", [[10**400, 0.5], None, 0.5, "0.5", [], [0.5], [0.5, 0.5, 0.5], ["0.5", "0.5"], [True, False], [None, 0.5], [[0.5], [0.5]], [float("nan"), 0.5]]),
    ("results", [[], "none", 1]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [pytest.param(k, v, id=f"{k} {v!r}") for k, values in WRONG for v in values])
def test_a_field_of_another_type_or_without_meaning_is_refused(key, value, folder, net):
    edit(folder, key, value)
    assert len(refused(folder, net, PteeError)) < 400


@pytest.mark.parametrize("head", ["conv99", "res-1024x8-1024x8-1024x8-1024x8-1024x8", "res-8x1s16"])
def test_a_head_that_the_tensors_are_not_of_is_refused_before_it_is_made(head, folder, net, monkeypatch):
    monkeypatch.setattr("ptee.exits.build.build_head", lambda *_: pytest.fail("the head was made"))
    edit(folder, "exits.0.head", head)
    assert f"The head '{head}' of exit 0 wants a tensor" in refused(folder, net)


@pytest.mark.parametrize("key", ["heads_file", "backbone", "exits", "threshold"])
def test_a_field_that_is_missing_is_named(key, folder, net):
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert key in refused(folder, net)


def test_a_field_that_a_later_version_adds_does_no_harm(original, folder, net):
    edit(folder, "colour", "green")
    assert_same(ptee.load(folder, backbone=net), original[0])


def wider(tensors: dict[str, Tensor]) -> None:
    tensors["0.logits.weight"] = torch.zeros(4, 9)


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["1.confidence.bias"]


def extra(tensors: dict[str, Tensor]) -> None:
    tensors["2.logits.bias"] = torch.zeros(4)


def scalar(tensors: dict[str, Tensor]) -> None:
    tensors["0.confidence.bias"] = torch.tensor(0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [(wider, r"0\.logits\.weight.*\(4, 9\).*\(4, 8\)"), (missing, r"1\.confidence\.bias.*missing"), (extra, r"2\.logits\.bias"), (scalar, r"0\.confidence\.bias.*\(\).*\(1,\)")],
    ids=lambda v: getattr(v, "__name__", ""),
)  # fmt: skip
def test_tensors_that_are_not_the_heads_are_refused_by_name(change, said, folder, net):
    change_tensors(folder, lambda tensors: (change(tensors), tensors)[1])
    assert re.search(said, refused(folder, net))


def heads_of_another_training(folder: Path) -> None:
    torch.manual_seed(5)
    make().save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "heads.safetensors", folder)


def flipped_bit(folder: Path) -> None:
    file = folder / "heads.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def another_type(folder: Path) -> None:
    file = folder / "heads.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("change", [heads_of_another_training, flipped_bit, another_type])
def test_heads_that_were_not_saved_with_this_config_are_refused_by_the_tensors_name(change, folder, net):
    change(folder)
    assert re.search(r"tensor '\d\.\S+' is damaged, or of another training", refused(folder, net))


@pytest.mark.parametrize(
    ("key", "value"),
    [("exits.0.name", "one.0"), ("backbone.input.mean", [0.1, 0.2, 0.3]), ("backbone.input.input_size", [3, 32, 32])],
)
def test_a_config_that_was_changed_where_it_may_not_be_is_refused(key, value, folder, net):
    edit(folder, key, value, signed=False)
    assert "config.json was changed or damaged" in refused(folder, net)


@pytest.mark.parametrize(("key", "value"), [("threshold", [0.1, 0.2]), ("off", [1]), ("results", None)])
def test_thresholds_and_exits_that_are_off_may_be_changed_by_hand(key, value, folder, net):
    edit(folder, key, value, signed=False)
    assert ptee.load(folder, net).plan.exits


def test_a_run_of_schema_1_is_loaded_and_saved_with_hashes(original, folder, net):
    as_schema_1(folder)
    loaded = ptee.load(folder, net)
    assert_same(loaded, original[0])
    loaded.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tensors"].keys() == loaded.heads.state_dict().keys()


def nested(depth: int) -> list[Any]:
    inside: list[Any] = []
    for _ in range(depth):
        inside = [inside]
    return inside


HOSTILE = [
    ("backbone.name", "\x1b[2J\x1b[31mresnet50"), ("backbone.name", "\u202eresnet50"), ("backbone.name", "\x02out\x1f/\x03"),
    ("backbone.name", "x" * 5000), ("exits.0.name", "x" * 5000), ("exits.0.head", "pool" * 5000), ("confidence.name", "x" * 5000),
    ("heads_file", "\x1b[2J"), ("backbone.input.input_size", [3, 20000, 20000]), ("results", nested(500)), ("results", {"a": nested(500)}),
    ("results", {"seed": 2**65}), ("results", {"seed": -(2**65)}), ("backbone.name", "\ud800"), ("results", {"\ud800": 1}),
    ("backbone.source", {"name": "x" * 5000}), ("backbone.source", {"args": {"block": ["\x1b[2J"]}}), ("backbone.source", {"x" * 5000: 1}),
    ("exits", [{"name": "one", "head": "pool"}] * 100_000), ("off", [2**70]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [pytest.param(k, v, id=f"{k} {v!r:.20}") for k, v in HOSTILE])
def test_a_hostile_field_is_refused_in_one_short_line_that_steers_no_terminal(key, value, folder, net):
    edit(folder, key, value)
    said = refused(folder, net)
    assert said == printable(said)
    assert len(said) < 400


@pytest.mark.parametrize("name", ["config.json", "heads.safetensors", "metrics.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(name, folder, net):
    write_json(folder / "metrics.json", {"results": {}})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == "metrics.json":
        with pytest.raises(RunError, match=name):
            run_files.read_metrics(folder)
    else:
        assert name in refused(folder, net)
    assert run_files.is_run(folder) == (name != "config.json")


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize(
    "write", [lambda value, file: file.write_bytes(pickle.dumps(value)), torch.save], ids=["pickle", "torch.save"]
)
@pytest.mark.parametrize("name", ["heads.safetensors", "config.json"])
def test_nothing_is_unpickled(name, write, folder, net, tmp_path):
    write({"0.logits.bias": Harm(tmp_path / "harm")}, folder / name)
    assert name in refused(folder, net)
    assert not (tmp_path / "harm").exists()


def test_exits_in_another_order_than_the_backbone_has_them_are_refused(folder, net):
    exits = json.loads((folder / "config.json").read_text())["exits"]
    edit(folder, "exits", exits[::-1])
    assert "has its exits in another order than its backbone has them" in refused(folder, net)


def test_a_head_that_learned_to_read_another_tensor_of_a_module_is_refused(folder, net):
    exits = json.loads((folder / "config.json").read_text())["exits"]
    edit(folder, "exits", [exits[0], exits[1] | {"tensor": 1}])
    said = "the head of exit 1 learned to read tensor 1 of what two returns, and it would get tensor 0"
    assert said in refused(folder, net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_heads_with_values_that_are_not_finite_are_refused(value, folder, net):
    change_tensors(folder, lambda saved: saved | {"0.logits.bias": saved["0.logits.bias"] * value})
    assert "not finite (inf or NaN) in 0.logits.bias" in refused(folder, net)


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64], ids=str)
def test_heads_of_numbers_that_no_head_holds_are_refused(kind, folder, net):
    change_tensors(folder, lambda saved: saved | {"0.logits.bias": saved["0.logits.bias"].to(kind)})
    assert f"tensor '0.logits.bias' holds {str(kind)[6:]}, which its head does not" in refused(folder, net)


@pytest.mark.parametrize(("key", "value"), [("exits.0.name", "nope"), ("exits.0.head", "nope")])
def test_an_error_about_an_exit_names_the_run(key, value, folder, net):
    edit(folder, key, value)
    assert refused(folder, net, PteeError).startswith(f"{folder}: Unknown ")


# the hub


@pytest.fixture
def hub(monkeypatch) -> dict[str, Any]:
    """A hub that has the folders put into it, and notes what it was asked for."""
    import huggingface_hub

    has: dict[str, Any] = {"asked": []}

    def download(repo: str, name: str, **options: Any) -> str:
        has["asked"].append((repo, name, options))
        return str(has[repo] / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(run_files, "reach_hub", lambda: None)
    return has


@pytest.mark.parametrize("load", [ptee.load, EarlyExitModel.from_pretrained], ids=["load", "from_pretrained"])
def test_a_run_is_loaded_from_the_hub(load, hub, folder, net, original):
    hub["user/repo"] = folder
    assert_same(load("user/repo", backbone=net, revision="v1", token="secret"), original[0])
    options = {"revision": "v1", "token": "secret"}
    assert hub["asked"] == [("user/repo", name, options) for name in ("config.json", "heads.safetensors")]


@pytest.mark.parametrize("load", [ptee.load, EarlyExitModel.from_pretrained], ids=["load", "from_pretrained"])
def test_an_argument_that_there_is_not_is_refused_by_name(load, folder, net):
    with pytest.raises(PteeError, match=r"'weights'.*backbone, front, cache_dir, .*revision"):
        load(folder, backbone=net, weights="x")


def test_a_run_from_the_hub_reads_no_weights_of_this_machine(hub, named):
    folder, _ = named
    hub["user/repo"] = folder
    assert "backbone=" in refused("user/repo", None)


def test_offline_a_run_on_the_hub_is_refused_in_one_line(net, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = refused("user/repo", net)
    assert "user/repo" in said
    assert "config.json" in said


@pytest.mark.parametrize("is_cached", [False, True], ids=["not cached", "cached"])
def test_a_hub_that_nobody_answers_is_asked_once_and_only_for_what_is_not_cached(is_cached, hub, net, monkeypatch):
    """The hub's own client asks six times for a file that is not in its cache, which takes half a minute."""

    class Silent:
        def head(self, *_: Any, **__: Any) -> None:
            hub["asked"].append("hub")
            raise ConnectionError("Name or service not known")

    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", Silent)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "config.json" if is_cached else None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: hub["asked"].append("file"))
    said = refused("user/repo", net)
    assert hub["asked"] == (["file"] if is_cached else ["hub"])
    assert said.startswith("There is no folder user/repo, and config.json of the hub's user/repo cannot be had:")


@pytest.mark.parametrize("name", ["user/repo/more", "../repo", "user/", "/repo", "user/re po", "https://host/repo"])
def test_what_cannot_be_a_repository_is_not_looked_for_on_the_hub(name, hub, net, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(name, net)
    assert hub["asked"] == []


@pytest.mark.parametrize("given", ["", b"run", 3, None], ids=repr)
def test_what_is_no_path_is_no_run(given, net):
    with pytest.raises(PteeError, match=r"folder=.* is no path"):
        ptee.load(given, net)


def test_a_shape_of_thousands_of_sides_is_not_written_out():
    with pytest.raises(RunError, match="has shape") as refusal:
        require_shape("run", "0.weight", (1,), (1,) * 10_000)
    assert len(str(refusal.value)) < 300
