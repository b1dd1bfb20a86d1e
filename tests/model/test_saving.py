"""A model that is saved comes back as it was; what cannot be saved leaves the older run as it is."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from saved import SIZE, Net, assert_same, change_tensors, edit, make, refused
from torch import nn
from torch.nn.utils import prune

import ptee
from ptee._common.errors import RunError
from ptee._common.files import to_json
from ptee._common.writing import require_writable, write_json
from ptee.backbones.weights import weights_hash
from ptee.model import run_files
from ptee.model import saving as runs
from ptee.model.early_exit import EarlyExitModel

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


def test_a_head_of_0_1_0_that_builds_on_the_answer_before_is_loaded(tmp_path):
    model = make(["conv1", "res-8x1+"])
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda saved: {name.replace("previous_weight", "trust"): t for name, t in saved.items()})
    assert "1.trust" in load_file(tmp_path / "heads.safetensors")
    assert_same(ptee.load(tmp_path, backbone=copy.deepcopy(model.backbone)), model)


def test_a_head_of_0_1_0_that_reads_the_map_before_is_refused_with_what_to_do(tmp_path):
    model = make(["res-8x1", "res-8x1+"])
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda saved: saved | {"1.link.0.weight": torch.zeros(8, 8, 1, 1)})
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


def test_whole_numbers_in_place_of_weights_are_refused(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "run")
    run = runs.read(tmp_path / "run")
    for name, tensor in run.tensors.items():
        changed = replace(
            run, tensors=run.tensors | {name: tensor.double() if not tensor.is_floating_point() else tensor.long()}
        )
        with pytest.raises(
            RunError, match=rf"tensor '{re.escape(name)}' holds (int64|float64), which its head does not"
        ):
            runs.fill(model.heads, changed)


def test_a_run_that_is_saved_again_has_the_same_results_in_its_metrics(tmp_path):
    model, folder = make(), tmp_path / "run"
    model.save_pretrained(folder)
    write_json(folder / "metrics.json", {"results": {"old": 1}, "plan": {}})
    model.results = {"new": 2}
    model.save_pretrained(folder)
    assert run_files.read_metrics(folder) == {"results": {"new": 2}, "plan": {}}
