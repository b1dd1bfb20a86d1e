"""What the heads read of very many images: in shards that are whole or not there, from which heads learn as from the images."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from device import here
from extras import needs_ray
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.data.parts import key_hashes
from ptee.data.pictures import decode_bytes, image_transform
from ptee.data.shards import find_source, samples
from ptee.scale.worker import half
from ptee.training.feature_cache import CacheFolder

SHORT = {"epochs": 2, "batch_size": 10, "views": 1, "shift": 0, "precision": "no"}


@pytest.fixture(scope="module")
def folder(a_run, shards, tmp_path_factory) -> CacheFolder:
    """A cache of thirty images, written by one process."""
    return ptee.cache(a_run, shards, tmp_path_factory.mktemp("cache") / "out", batch_size=7)


def pictures(run: Path, source: Path) -> TensorDataset:
    view, found = ptee.load(run).origin.input, find_source(source)
    transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
    rows = list(samples(found, found.files))
    return TensorDataset(
        torch.stack([transform(decode_bytes(row.image)) for row in rows]), torch.tensor([row.label for row in rows])
    )


def test_a_cache_holds_what_the_heads_read_in_the_order_of_the_keys_hashes(a_run, shards, folder):
    model, data = ptee.load(a_run), pictures(a_run, shards)
    kept = folder.opened(model)
    with torch.no_grad():
        reading = model.read(data.tensors[0].to(here()))
    order = torch.from_numpy(np.argsort(key_hashes(folder.folder, folder.manifest)))  # whoever wrote it
    ours, theirs = kept[range(30)].reading.inputs, reading.inputs
    for a, b in zip(ours, map(torch.Tensor.cpu, theirs), strict=True):
        assert (a - b[order]).abs().max() < 4e-3 * b.abs().max()
    assert torch.equal(kept[range(30)].labels, data.tensors[1].cpu()[order])
    kept.close()


@pytest.mark.parametrize("write", [ptee.record, ptee.cache])
def test_labels_under_which_the_backbone_is_near_chance_are_doubted_at_the_end(write, a_run, shards, tmp_path):
    said: list[str] = []
    write(a_run, shards, tmp_path / "out", log=said.append)
    assert "by chance: it may know its classes in another order" in said[-1]
    assert "by ptee trace or ptee cache with --overwrite and --classes FILE" in said[-1]


@pytest.mark.parametrize("write", [ptee.record, ptee.cache])
def test_tables_are_not_written_among_the_pictures_or_tables_that_are_read(write, a_run, tmp_path):
    (tmp_path / "images" / "1").mkdir(parents=True)
    shutil.copy(a_run.parent / "picture.png", tmp_path / "images" / "1")
    for out in (tmp_path / "images" / "out", tmp_path / "images" / "1" / ".." / "out"):
        with pytest.raises(DataError, match=r"out lies in .*images, where what is written would be read.*out=FOLDER"):
            write(a_run, tmp_path / "images", out)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["1"]


def test_heads_learn_from_a_cache_as_from_the_images(a_run, shards, folder):
    one, two = ptee.load(a_run), ptee.load(a_run)
    whole = SHORT | {"batch_size": 30}  # in one batch, the order of the images does not matter
    losses = [
        ptee.train(one, folder, **whole).epochs[-1].loss,
        ptee.train(two, pictures(a_run, shards), **whole).epochs[-1].loss,
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert one.plan == two.plan
    for model in (one, two):  # both know their images again
        with pytest.warns(UserWarning, match="^The heads were trained on these images"):
            ptee.tune(model, pictures(a_run, shards), max_fidelity_drop=0.5)


def test_a_training_from_a_cache_goes_on_where_it_was(a_run, folder, tmp_path):
    kept, long = tmp_path / "checkpoint.safetensors", SHORT | {"schedule": "constant"}
    one, two = ptee.load(a_run), ptee.load(a_run)
    ptee.train(one, folder, **long | {"epochs": 3})
    ptee.train(two, folder, **long, checkpoint=kept)
    two = ptee.load(a_run)
    ptee.train(two, folder, **long | {"epochs": 3}, checkpoint=kept, resume=True)
    for name, value in one.heads.state_dict().items():
        assert torch.equal(value, two.heads.state_dict()[name]), name


def test_a_cache_of_other_exits_is_refused(a_run, folder):
    model = ptee.load(a_run)
    other = ptee.augment(model.detach(), exits=["layer1", "layer3"], head="pool", input_size=(3, 16, 16))
    with pytest.raises(DataError, match=r"another exits.*ptee cache RUN"):
        ptee.train(other, folder, **SHORT)


def test_what_half_precision_cannot_hold_is_refused_also_beside_an_image_without_an_answer():
    with pytest.raises(DataError, match=r"as large as 1e\+06, which half precision cannot hold"):
        half(torch.tensor([[math.nan], [1e6]]))
    assert half(torch.tensor([[math.nan, math.inf, 1.0]])).dtype == torch.float16


def test_views_need_the_images(a_run, folder):
    with pytest.raises(DataError, match=r"one view of each.*views=1"):
        ptee.train(ptee.load(a_run), folder, **SHORT | {"views": 2})


def test_the_size_is_told_before_and_a_larger_one_than_the_limit_is_refused(a_run, shards, tmp_path):
    said: list[str] = []
    with pytest.raises(DataError, match=r"would take about 1 MiB, and 1 MiB are allowed.*--head pool.*limit="):
        ptee.cache(a_run, shards, tmp_path / "out", limit=100, log=said.append)
    assert said == ["What the heads read of about 30 images takes about 1 MiB."]
    with pytest.raises(DataError, match="0 of its 1 parts"):
        ptee.open_cache(tmp_path / "out")


def test_a_folder_that_is_there_is_learnt_from_however_large_it_is(a_run, folder, monkeypatch):
    monkeypatch.setattr("ptee.training.feature_cache.LIMIT", 100)
    assert len(ptee.train(ptee.load(a_run), folder, **SHORT).epochs) == 2


def test_a_disk_without_room_for_a_folder_is_named(a_run, folder, monkeypatch):
    monkeypatch.setattr("ptee.training.feature_cache.IN_MEMORY", 0)
    monkeypatch.setattr("ptee.training.feature_cache.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(DataError, match=r"To learn from .* which has no room for it\. Free some, or set TMPDIR") as why:
        ptee.train(ptee.load(a_run), folder, **SHORT)
    assert "cache=" not in str(why.value)


@pytest.mark.parametrize("about", [{"shapes": [[2**40, 1, 1]]}, {"shapes": "x"}, {"classes": -1}], ids=str)
def test_a_folder_whose_manifest_was_changed_is_refused(about, folder, tmp_path):
    manifest = json.loads((folder.folder / "manifest.json").read_text())
    manifest["about"] |= about
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="its manifest does not say what it holds"):
        ptee.open_cache(tmp_path)


def test_traces_are_no_cache_and_the_other_way_round(a_run, shards, folder, tmp_path):
    traces = ptee.record(a_run, shards, tmp_path / "traces")
    with pytest.raises(DataError, match="holds traces, and cache are wanted"):
        ptee.open_cache(traces.folders[0])
    with pytest.raises(PteeError, match="holds cache, and traces are wanted"):
        ptee.open_traces(folder.folder)


@pytest.mark.slow
@needs_ray
def test_ray_writes_the_same_cache(a_run, shards, folder, tmp_path, small_parts):
    other = ptee.cache(a_run, shards, tmp_path / "out", engine="ray", workers=2, batch_size=7)
    model = ptee.load(a_run)
    one, two = (each.opened(model)[range(30)] for each in (folder, other))
    assert torch.equal(one.labels, two.labels)
    for a, b in zip(one.reading.inputs, two.reading.inputs, strict=True):
        assert torch.allclose(a, b, atol=1e-2)
