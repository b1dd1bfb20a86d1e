from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import small
import timm
import torch
from device import seeded
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import BackboneError, PteeError, RunError, UnknownName
from ptee._common.files import to_json
from ptee._common.text import printable
from ptee._common.writing import require_writable, write_json
from ptee.backbones.load import load_backbone, rebuild
from ptee.backbones.weights import difference, weights_hash
from ptee.exits.heads import HEADS
from ptee.model import run_files
from ptee.model import saving as runs
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.model.run_config import fingerprint
from ptee.model.run_files import require_shape

SIZE = (3, 16, 16)


class Net(nn.Module):
    """A user's network."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Conv2d(8, 16, 3, 2)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


def make(head: str | list[str] = "conv1", net: nn.Module | None = None) -> EarlyExitModel:
    """A model with exits behind both stages, its heads moved off their initial values and one threshold per exit."""
    backbone = load_backbone(net or Net(), input_size=SIZE)
    model = build(backbone, exits=["one", "two"], head=head)
    with torch.no_grad():
        for tensor in model.heads.state_dict().values():
            tensor += torch.rand(tensor.shape).to(tensor.dtype)
    model.threshold = [0.75, 0.625]
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[EarlyExitModel, Path]:
    """A model and the folder it was saved in, to be left as they are."""
    torch.manual_seed(0)
    model, folder = make(), tmp_path_factory.mktemp("runs") / "original"
    model.results = {"rows": [], "samples": 3}
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def net(original) -> nn.Module:
    """The backbone that the run was made for."""
    return copy.deepcopy(original[0].backbone)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A saved run, to be changed at will."""
    return shutil.copytree(original[1], tmp_path / "run")


def edit(folder: Path, key: str, value: Any, signed: bool = True) -> None:
    """Put a value at a dotted key of config.json; numbers index lists. `signed`: as somebody would who knows the fingerprint."""
    config = json.loads((folder / "config.json").read_text())
    *outer, last = (int(part) if part.isdigit() else part for part in key.split("."))
    place = config
    for part in outer:
        place = place[part]
    place[last] = value
    if signed:
        with suppress(AttributeError, KeyError, TypeError):  # there is none of what is no config
            config["fingerprint"] = fingerprint(config)
    (folder / "config.json").write_text(json.dumps(config))


def as_schema_1(folder: Path) -> None:
    """As ptee wrote runs before the heads' hashes were kept."""
    config = json.loads((folder / "config.json").read_text())
    del config["tensors"], config["fingerprint"]
    (folder / "config.json").write_text(json.dumps(config | {"schema_version": 1}))


def refused(folder: Path | str, net: nn.Module | None, kind: type[Exception] = RunError) -> str:
    """What loading says, in one line, when it refuses."""
    with pytest.raises(kind) as refusal:
        ptee.load(folder, backbone=net)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def answers(model: EarlyExitModel) -> tuple[Tensor, ...]:
    x = torch.randn(6, *SIZE, generator=seeded(1))
    with torch.no_grad():
        return (*model.predict(x), *model.all_exits(x))


def assert_same(one: EarlyExitModel, two: EarlyExitModel) -> None:
    for got, want in zip(answers(one), answers(two), strict=True):
        assert torch.equal(got, want)
    assert one.threshold == two.threshold
    assert one.exits == two.exits
    assert one.costs == two.costs


# there and back


@pytest.mark.parametrize("head", ["plain", "pool", "bnpool", "conv2"])
def test_a_model_saved_over_an_older_run_loads_bit_for_bit_and_can_be_saved_again(head, folder, tmp_path):
    model = make(head)
    model.heads[1].confidence.bias = model.heads[0].confidence.bias  # heads may share weights
    model.results = {"rows": [], "samples": 3}
    model.save_pretrained(folder)
    loaded = ptee.load(folder, backbone=copy.deepcopy(model.backbone))
    assert_same(loaded, model)
    assert (loaded.results, loaded.training) == (model.results, False)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(ptee.load(tmp_path / "again", backbone=copy.deepcopy(model.backbone)), model)
    written = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again")]
    assert written[0] == written[1]


@pytest.mark.parametrize("convention", ["full", "paper"])
def test_a_run_of_0_1_0_is_loaded_whatever_way_its_costs_were_shown(convention, original, folder, net):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"convention": convention}))
    assert ptee.load(folder, net).costs == original[0].costs


def rename_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the saved tensors of a run."""
    save_file(change(load_file(folder / "heads.safetensors")), folder / "heads.safetensors")
    as_schema_1(folder)


def test_a_head_of_0_1_0_that_builds_on_the_answer_before_is_loaded(tmp_path):
    model = make(["conv1", "res-8x1+"])
    model.save_pretrained(tmp_path)
    rename_tensors(tmp_path, lambda saved: {name.replace("previous_weight", "trust"): t for name, t in saved.items()})
    assert "1.trust" in load_file(tmp_path / "heads.safetensors")
    assert_same(ptee.load(tmp_path, backbone=copy.deepcopy(model.backbone)), model)


def test_a_head_of_0_1_0_that_reads_the_map_before_is_refused_with_what_to_do(tmp_path):
    model = make(["res-8x1", "res-8x1+"])
    model.save_pretrained(tmp_path)
    rename_tensors(tmp_path, lambda saved: saved | {"1.link.0.weight": torch.zeros(8, 8, 1, 1)})
    said = refused(tmp_path, copy.deepcopy(model.backbone))
    assert "saved by ptee 0.1.0: its head at exit 1 reads the feature map of the head before" in said
    assert said.endswith("Train it again, or load it with ptee 0.1.0.")


def strictly(text: str) -> Any:
    """What JSON holds, by the letter of its standard."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("wall", [math.inf, -math.inf])
def test_endless_thresholds_come_back_out_of_json_by_the_letter(wall, tmp_path):
    model = make()
    model.threshold = [0.5, wall]
    model.results = {"threshold": model.threshold}
    model.save_pretrained(tmp_path)
    assert strictly((tmp_path / "config.json").read_text())["threshold"][0] == 0.5
    assert ptee.load(tmp_path, backbone=copy.deepcopy(model.backbone)).threshold == [0.5, wall]


def test_endless_thresholds_that_were_written_as_numbers_are_read_too(folder, net):
    edit(folder, "threshold", [0.5, math.inf])
    assert ptee.load(folder, backbone=net).threshold == [0.5, math.inf]


def test_json_is_json_by_the_letter():
    values = {"a": [1, math.inf, (math.nan, {"b": -math.inf})], "c": None, "d": "Infinity", "e": True}
    want = {"a": [1, "Infinity", ["NaN", {"b": "-Infinity"}]], "c": None, "d": "Infinity", "e": True}
    assert strictly(to_json(values)) == want


def test_a_model_in_half_precision_comes_back_in_half_precision(tmp_path):
    model = make(net=Net().bfloat16())
    model.save_pretrained(tmp_path)
    loaded = ptee.load(tmp_path, backbone=copy.deepcopy(model.backbone))
    assert {t.dtype for t in loaded.heads.parameters()} == {torch.bfloat16}
    for got, want in zip(loaded.heads.state_dict().values(), model.heads.state_dict().values(), strict=True):
        assert torch.equal(got, want)


def test_a_model_that_was_detached_is_saved_with_its_exits(tmp_path):
    model, x = make(), torch.rand(2, *SIZE)
    expected = model.all_exits(x)
    backbone = model.detach()
    model.save_pretrained(tmp_path)
    assert torch.equal(ptee.load(tmp_path, backbone=backbone).all_exits(x).logits, expected.logits)


def test_from_pretrained_loads_a_folder(original, folder, net):
    assert_same(EarlyExitModel.from_pretrained(folder, backbone=net), original[0])


def test_the_folder_holds_the_heads_alone_and_tells_where_they_belong(original, folder):
    model = original[0]
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "heads.safetensors"]
    stored = safetensors.torch.load_file(folder / "heads.safetensors")
    assert stored.keys() == model.heads.state_dict().keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["schema_version"] == runs.SCHEMA_VERSION
    assert config["ptee_version"] == ptee.__version__
    assert config["backbone"]["hash"] == weights_hash(model.backbone)
    assert [row["name"] for row in config["exits"]] == ["one", "two"]
    assert config["threshold"] == [0.75, 0.625]
    assert "ptee.load(" in (folder / "README.md").read_text()


# writing


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_whoever_may_read_the_config_may_read_the_heads(tmp_path):
    make().save_pretrained(tmp_path)
    modes = [(tmp_path / name).stat().st_mode for name in ("config.json", "heads.safetensors")]
    assert modes[0] == modes[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize("name", ["heads.safetensors", "config.json"])
@pytest.mark.parametrize("step", ["written", "renamed"])
def test_a_run_that_cannot_be_replaced_stays_as_it_was(step, name, error, folder, net, original, monkeypatch):
    """A full disk, Ctrl-C: while a file is written, and while it is renamed over the old one."""
    before = contents(folder)

    def fail(*given: Any) -> Any:
        paths = [path for path in given if isinstance(path, Path)]
        if any(path.name == name for path in paths):
            raise error
        return real(*given)

    home, method = {
        ("written", "heads.safetensors"): (safetensors.torch, "save_file"),
        ("written", "config.json"): (Path, "write_text"),
    }.get((step, name), (Path, "replace"))
    real = getattr(home, method)
    monkeypatch.setattr(home, method, lambda *given, **_: fail(*given))
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        make("pool", copy.deepcopy(net)).save_pretrained(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert_same(ptee.load(folder, backbone=net), original[0])


def test_a_first_save_that_fails_leaves_nothing_that_looks_like_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        make("pool").save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize("method", ["write_text", "replace"])
def test_config_and_metrics_are_changed_both_or_neither(method, name, folder, monkeypatch):
    write_json(folder / "metrics.json", {"results": {"old": 1}, "plan": {}})
    before, real = contents(folder), getattr(Path, method)

    def fail(self: Path, *given: Any, **options: Any) -> Any:
        if self.name == name:
            raise OSError(28, "No space left on device")
        return real(self, *given, **options)

    monkeypatch.setattr(Path, method, fail)
    with pytest.raises(RunError, match="No space left"):
        runs.update(folder, results={"new": 2})
    monkeypatch.undo()
    assert contents(folder) == before
    runs.update(folder, results={"new": 2})
    assert runs.read(folder).config.results == run_files.read_metrics(folder)["results"] == {"new": 2}


def test_a_full_disk_is_refused_in_one_line(tmp_path, monkeypatch):
    def fail(*_: object) -> None:  # word for word what safetensors 0.8 raises
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(RunError, match=r"heads\.safetensors.*space"):
        make().save_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        make().save_pretrained(tmp_path / place)


def test_writing_json_makes_the_folders_it_needs(tmp_path):
    write_json(tmp_path / "a" / "b" / "metrics.json", {"share": 0.5})
    assert json.loads((tmp_path / "a" / "b" / "metrics.json").read_text()) == {"share": 0.5}


@pytest.mark.parametrize("place", [".", "new", "deep/er/new"])
def test_a_folder_that_can_be_written_is_known_and_left_as_it_was(place, tmp_path):
    require_writable(tmp_path / place)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run", "file/deep/run"])
def test_a_folder_that_cannot_be_written_is_refused_in_one_line(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=f"Cannot write .*{place}: .*Choose another folder") as refusal:
        require_writable(tmp_path / place)
    assert "\n" not in str(refusal.value)


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
    rename_tensors(folder, lambda tensors: (change(tensors), tensors)[1])
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_heads_with_values_that_are_not_finite_are_refused(value, folder, net):
    rename_tensors(folder, lambda saved: saved | {"0.logits.bias": saved["0.logits.bias"] * value})
    assert "not finite (inf or NaN) in 0.logits.bias" in refused(folder, net)


@pytest.mark.parametrize("kind", [torch.int32, torch.complex64], ids=str)
def test_heads_of_numbers_that_no_head_holds_are_refused(kind, folder, net):
    rename_tensors(folder, lambda saved: saved | {"0.logits.bias": saved["0.logits.bias"].to(kind)})
    assert f"tensor '0.logits.bias' holds {str(kind)[6:]}, which its head does not" in refused(folder, net)


@pytest.mark.parametrize(("key", "value"), [("exits.0.name", "nope"), ("exits.0.head", "nope")])
def test_an_error_about_an_exit_names_the_run(key, value, folder, net):
    edit(folder, key, value)
    assert refused(folder, net, PteeError).startswith(f"{folder}: Unknown ")


# the backbone


@pytest.mark.parametrize("backbone", ["torchvision/resnet18", 3], ids=str)
def test_a_backbone_that_is_no_module_is_refused(backbone, folder):
    with pytest.raises(BackboneError, match=f"{backbone}.*is no module.*timm.create_model"):
        ptee.load(folder, backbone=backbone)


@pytest.mark.parametrize(
    "made_of",
    [lambda model: model, lambda model: ptee.optimize(model, mode="eager")],
    ids=["a model", "an optimized one"],
)
def test_a_backbone_that_has_exits_already_is_to_be_detached(made_of, folder):
    with pytest.raises(BackboneError, match=r"^This model has exits already\..*backbone=model\.detach\(\)\)\.$"):
        ptee.load(folder, backbone=made_of(small.made()))


def test_other_weights_are_refused_with_both_hashes(folder, net):
    wanted = weights_hash(net)
    with torch.no_grad():
        net.fc.bias[0] += 1e-6
    assert {wanted[:16], weights_hash(net)[:16]} <= set(re.findall(r"[0-9a-f]{16}", refused(folder, net)))


def test_other_statistics_of_batch_norm_are_other_weights_and_are_named(folder, net):
    net.get_buffer("one.1.running_mean").add_(1)
    assert re.search(r"tensors that differ \(1 of \d+\): one\.1\.running_mean\. ", refused(folder, net))


def test_several_other_tensors_are_named_together(folder, net):
    for name in ("one.1.running_mean", "one.1.running_var"):
        net.get_buffer(name).add_(1)
    assert re.search(
        r"tensors that differ \(2 of \d+\): one\.1\.running_mean, one\.1\.running_var\. ", refused(folder, net)
    )


def test_another_count_of_batches_is_the_same_backbone(folder, net):
    net.get_buffer("one.1.num_batches_tracked").add_(1)
    assert ptee.load(folder, backbone=net).exits


def test_the_same_weights_in_a_module_around_them_are_told_apart_by_their_prefix(folder, net):
    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    net.get_buffer("one.1.num_batches_tracked").add_(1)
    assert "the weights are the same, but each name of this one begins with 'net.'" in refused(folder, Lightning())


def test_a_run_of_before_single_tensors_were_recorded_is_compared_as_a_whole(folder, net):
    edit(folder, "backbone_tensors", None)
    assert ptee.load(folder, backbone=net).exits
    net.get_buffer("one.1.num_batches_tracked").add_(1)
    assert "which differ was not recorded" in refused(folder, net)


@pytest.mark.parametrize(
    "other",
    [lambda: Net(5), lambda: Net().half().float(), lambda: Net().double(), lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))],
    ids=["other classes", "rounded", "other type", "other architecture"],
)  # fmt: skip
def test_another_backbone_is_refused(other, folder):
    refused(folder, other())


def test_a_refused_backbone_is_left_as_it_was(folder):
    other = Net(5).train()
    refused(folder, other)
    assert all(p.requires_grad for p in other.parameters())
    assert all(part.training and not part._forward_hooks for part in other.modules())


def test_a_python_module_cannot_be_rebuilt_and_is_asked_for(folder):
    said = refused(folder, None)
    assert "Net" in said
    assert "backbone=" in said


@pytest.fixture
def mine() -> Iterator[None]:
    HEADS["mine"] = lambda channels, height, width: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    yield
    HEADS.pop("mine", None)


def test_a_head_of_ones_own_is_asked_for_where_it_is_not_registered(mine, tmp_path):
    model = make("mine")
    model.save_pretrained(tmp_path)
    assert_same(ptee.load(tmp_path, backbone=copy.deepcopy(model.backbone)), model)
    del HEADS["mine"]
    assert "'mine'" in refused(tmp_path, copy.deepcopy(model.backbone), UnknownName)


def test_weights_that_changed_after_a_network_was_loaded_are_told_when_the_run_is_saved(tmp_path, recwarn):
    net = load_backbone("cifar_resnet8", pretrained=False).module
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    model = ptee.augment("cifar_resnet8", weights=tmp_path / "weights.safetensors", exits=["layer1"])
    model.save_pretrained(tmp_path / "run")
    again = ptee.load(tmp_path / "run")
    again.save_pretrained(tmp_path / "again")
    assert not [w for w in recwarn if "not those" in str(w.message)]
    for each in (model, again):
        each.backbone.fc.bias.data += 1
        with pytest.warns(
            UserWarning, match=r"of cifar_resnet8 are not .* \(1 of \d+\): fc.bias.*load\(FOLDER, backbone"
        ):
            each.save_pretrained(tmp_path / "changed")
        with pytest.raises(RunError, match=r"fc\.bias"):
            ptee.load(tmp_path / "changed")
        assert ptee.load(tmp_path / "changed", backbone=copy.deepcopy(each).detach()).exits
    half = ptee.load(tmp_path / "run").half()
    with pytest.warns(
        UserWarning, match=r"save before model\.to\(torch\.float16\), and call that again after loading\.$"
    ):
        half.save_pretrained(tmp_path / "half")


@pytest.fixture
def named(tmp_path) -> tuple[Path, Path]:
    """A run on a named backbone, and the file of that backbone's weights."""
    weights = tmp_path / "weights.safetensors"
    load_backbone("cifar_resnet8", pretrained=False)  # registers the name with timm
    safetensors.torch.save_file(timm.create_model("cifar_resnet8").state_dict(), weights)
    model = ptee.augment("cifar_resnet8", weights=str(weights), exits=["layer1"])
    model.save_pretrained(tmp_path / "named")
    return tmp_path / "named", weights


def test_a_named_backbone_is_built_again_from_its_file(named):
    folder, weights = named
    loaded = ptee.load(folder)
    assert type(loaded.backbone).__name__ == "CifarResNet"
    assert loaded.num_classes == loaded.origin.num_classes == 10
    state = safetensors.torch.load_file(weights)
    assert all(torch.equal(value.cpu(), state[name]) for name, value in loaded.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [0.5, 0.5]),
        ("std", [0, 0, 0]),
        ("std", [1, 1]),
    ],
)
def test_an_input_that_no_image_can_have_is_refused_for_a_named_backbone_too(key, value, named):
    edit(named[0], f"backbone.input.{key}", value)
    refused(named[0], None, PteeError)


def test_a_file_of_weights_that_has_changed_is_noticed(named):
    folder, weights = named
    state = safetensors.torch.load_file(weights)
    state["fc.bias"] += 1
    safetensors.torch.save_file(state, weights)
    assert re.search("[0-9a-f]{16}.*[0-9a-f]{16}", refused(folder, None))


@pytest.mark.parametrize("file", ["x" * 300, "/dev/zero", "\\/host\\share"])
def test_a_place_where_no_weights_can_be_is_refused(file, named):
    edit(named[0], "backbone.source.weights", {"file": file})
    assert len(refused(named[0], None, BackboneError)) < 600


@pytest.mark.parametrize("classes", [10**6, 11])
def test_a_network_of_other_classes_than_its_weights_is_refused_before_it_takes_memory(classes, named, monkeypatch):
    monkeypatch.setattr("ptee.backbones.load.count_classes", lambda *_: pytest.fail("the network was made"))
    source = json.loads((named[0] / "config.json").read_text())["backbone"]["source"]
    with pytest.raises(BackboneError, match=rf"10 classes \(fc\.weight, fc\.bias\), the model has {classes}"):
        rebuild(source | {"num_classes": classes})


def test_a_record_of_other_classes_than_the_run_is_refused(named):
    edit(named[0], "backbone.source.num_classes", 11)
    assert "is for 10 classes, its backbone has 11." in refused(named[0], None)


def test_heads_of_other_classes_than_the_run_are_refused_before_the_network_is_built(named, monkeypatch):
    monkeypatch.setattr("ptee.model.rebuilding.rebuild", lambda *_, **__: pytest.fail("it is built"))
    edit(named[0], "backbone.source.num_classes", 10**6)
    edit(named[0], "backbone.classes", 10**6)
    assert re.search(r"'0\.logits\.weight' has shape \(10, \d+\), the head \(1000000, \d+\)", refused(named[0], None))


def test_a_file_of_weights_that_has_gone_is_named(named):
    folder, weights = named
    weights.unlink()
    assert "weights.safetensors" in refused(folder, None, BackboneError)


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


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("name", "a\x1bb", "backbone.name"),
        ("source", {"args": {"a": "\x1b"}}, "backbone.source"),
        ("note", "\udcff", "half a character"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(field, value, said, original, folder):
    before = (folder / "config.json").read_text()
    model = original[0]
    config = runs.describe(model)
    config["backbone"][field] = value
    with pytest.raises(RunError, match=f"could not be loaded again: .*{said}") as caught:
        runs.write(folder, config, model.heads.state_dict())
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="could not be loaded again"):
        runs.update(folder, backbone=config["backbone"])
    assert (folder / "config.json").read_text() == before


def test_tensors_that_are_missing_are_counted_among_those_that_there_were():
    said = difference({"a": "1", "b": "2", "c": "3"}, {"a": "1", "d": "4"})
    assert said == "tensors that are missing (2 of 3): b, c; tensors that are new (1 of 2): d"


def test_a_run_on_this_disk_that_names_a_repository_does_not_go_online(named, monkeypatch):
    monkeypatch.setattr("ptee.model.rebuilding.rebuild", lambda *_, **__: pytest.fail("it is rebuilt"))
    origin = {"tag": None, "hub": "stranger/net", "revision": "0" * 40}
    edit(named[0], "backbone.source.name", "hf-hub:stranger/net")
    edit(named[0], "backbone.source.weights", {"pretrained": origin})
    assert "'hf-hub:stranger/net'" in refused(named[0], None)


def compared() -> list[TensorDataset]:
    """Images to choose thresholds on, and to report on."""
    return [TensorDataset(torch.randn(16, *SIZE)) for _ in range(2)]


ACTS = {
    "evaluate": lambda model, _: ptee.evaluate(model, TensorDataset(torch.randn(4, *SIZE)), speed=False),
    "compare": lambda model, _: ptee.compare({"one": model}, *compared(), lines=("own",), progress=False),
    "save": lambda model, folder: model.save_pretrained(folder),
    "export": lambda model, folder: ptee.export(model, folder, mean=[0.5], std=[0.5]),
}


FOR_THE_CPU = pytest.mark.cpu("files are made on the CPU")


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """What matters has happened."""


def enough(*_: object, **__: object) -> None:
    raise Enough


@pytest.mark.parametrize("act", ["evaluate", "compare", "save", pytest.param("export", marks=FOR_THE_CPU)])
def test_weights_that_changed_after_the_heads_learned_are_told_of(act, folder, net, tmp_path, recwarn, monkeypatch):
    model = ptee.load(folder, backbone=net)
    before = net.fc.bias.clone()
    with torch.no_grad():
        net.fc.bias += 5
    with pytest.warns(
        UserWarning, match=r"^The weights of Net are not those that its heads learned from: .*fc\.bias\."
    ):
        ACTS[act](model, tmp_path / "one")
    with torch.no_grad():
        net.fc.bias.copy_(before)
    monkeypatch.setattr("ptee.deploy.export.segments", enough)  # what follows takes long
    with suppress(Enough):
        ACTS[act](model, tmp_path / "two")
    assert not any("its heads learned from" in str(warning.message) for warning in recwarn)


def test_heads_that_were_trained_on_weights_that_changed_fit_them(folder, net, tmp_path, recwarn):
    model = ptee.load(folder, backbone=net)
    with torch.no_grad():
        net.fc.bias += 5
    ptee.train(model, TensorDataset(torch.randn(8, *SIZE), torch.arange(8) % 4), epochs=1, batch_size=4)
    model.save_pretrained(tmp_path / "again")
    model.half().save_pretrained(tmp_path / "half")
    assert not any("its heads learned from" in str(warning.message) for warning in recwarn)


def test_that_weights_changed_after_the_heads_learned_is_still_known_when_the_run_is_loaded(folder, net, tmp_path):
    model = ptee.load(folder, backbone=net)
    with torch.no_grad():
        net.fc.bias += 5
    said = r"not those that its heads learned from: .*fc\.bias\."
    with pytest.warns(UserWarning, match=said):
        model.save_pretrained(tmp_path / "changed")
    again = ptee.load(tmp_path / "changed", backbone=copy.deepcopy(net))
    with pytest.warns(UserWarning, match=said):
        ACTS["evaluate"](again, None)


def test_of_a_named_network_that_changed_it_is_said_that_the_heads_do_not_fit_either(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    model = build(load_backbone("cifar_resnet8", weights=weights), exits=["layer1"])
    ptee.train(model, TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), epochs=1, batch_size=4)
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1)
    with pytest.warns(UserWarning) as found:
        model.save_pretrained(tmp_path / "run")
    said = " ".join(str(warning.message) for warning in found)
    assert "not those that it was loaded with" in said
    assert "not those that its heads learned from" in said


def test_a_network_in_another_type_that_is_converted_has_the_same_weights(net, tmp_path, recwarn):
    model = make(net=net.double())
    data = TensorDataset(torch.randn(8, *SIZE, dtype=torch.float64), torch.arange(8) % 4)
    ptee.train(model, data, epochs=1, batch_size=4)
    model.float().save_pretrained(tmp_path / "single")
    assert not any("its heads learned from" in str(warning.message) for warning in recwarn)


def pruned(model: EarlyExitModel) -> None:
    prune.l1_unstructured(model.heads[0].logits, "weight", 0.5)


def normed(model: EarlyExitModel) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.heads[0].logits)


def replaced(model: EarlyExitModel) -> None:
    model.heads[0].logits = nn.Linear(2, 4)


def whole_numbers(model: EarlyExitModel) -> None:
    model.heads[0].logits.weight = nn.Parameter(model.heads[0].logits.weight.to(torch.int8), requires_grad=False)


def not_a_number(model: EarlyExitModel) -> None:
    with torch.no_grad():
        model.heads[1].logits.bias[0] = math.nan


def no_variance(model: EarlyExitModel) -> None:
    next(m for m in model.heads[0].modules() if isinstance(m, nn.BatchNorm2d)).running_var[0] = math.inf


NAMES = r"not kept as they were built: heads\.0\.logits\..*prune\.remove"
NOT_SAVED = {
    pruned: NAMES,
    normed: NAMES,
    replaced: NAMES,
    whole_numbers: NAMES,
    not_a_number: r"not finite .* heads\.1\.logits\.bias\. Train them again\.$",
    no_variance: r"not finite .* heads\.0\..*running_var\. Train them again\.$",
}


@pytest.mark.parametrize("change", NOT_SAVED, ids=lambda change: change.__name__)
def test_heads_that_could_not_be_loaded_again_are_not_saved_over_a_run(change, original, folder, net):
    before = (folder / "config.json").read_bytes()
    model = ptee.load(folder, backbone=net)
    change(model)
    with pytest.raises(RunError, match=NOT_SAVED[change]):
        model.save_pretrained(folder)
    assert (folder / "config.json").read_bytes() == before


def test_a_backbone_that_learnt_and_could_not_be_loaded_again_is_not_saved(tmp_path):
    for change, said in (
        (normed, "heads"),
        (lambda part: nn.utils.parametrizations.weight_norm(part.backbone.two), "backbone"),
    ):
        model = make()
        model.origin = model.origin.trained()
        change(model)
        with pytest.raises(RunError, match=rf"not kept as they were built: {said}\."):
            model.save_pretrained(tmp_path / "run")
    model = make()
    model.origin = model.origin.trained()
    with torch.no_grad():
        model.backbone.two.bias[0] = math.nan
    with pytest.raises(RunError, match=r"^Values of the backbone are NaN, so no run is written: two\.bias\."):
        model.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_shape_of_thousands_of_sides_is_not_written_out():
    with pytest.raises(RunError, match="has shape") as refusal:
        require_shape("run", "0.weight", (1,), (1,) * 10_000)
    assert len(str(refusal.value)) < 300
