"""The cache: heads learn the same from it as when the backbone runs in every epoch."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from device import here, seeded
from small import once
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ptee
from ptee._common.errors import DataError
from ptee.exits.heads import HEADS
from ptee.model.forward import Reading
from ptee.training import feature_cache as cache
from ptee.training.augmentation import Views, draw_views
from ptee.training.feature_cache import Cache, Estimate, NotCached, fill
from ptee.training.history import History

SIZE = (3, 32, 32)


def images(n: int = 40, seed: int = 0) -> TensorDataset:
    order = seeded(seed)
    return TensorDataset(torch.randn(n, *SIZE, generator=order), torch.randint(0, 5, (n,), generator=order))


@once
def early(head: str = "pool") -> ptee.EarlyExitModel:
    net = timm.create_model("test_resnet", num_classes=5)
    return ptee.augment(net, head=head, input_size=SIZE, num_exits=2)


def losses(head: str, **settings: Any) -> tuple[list[float], list[float | None]]:
    # Small steps: large ones of a head with many inputs blow the last bit of a sum up to something one sees.
    history = short(early(head), images(), images(20, 1), epochs=2, lr=1e-4, seed=3, **settings)
    return [e.loss for e in history.epochs], [e.val_loss for e in history.epochs]


def short(model: ptee.EarlyExitModel, *data: Any, **settings: Any) -> History:
    plain = {
        "loss": "joint",
        "batch_size": 16,
        "views": 1,
        "shift": 0,
        "cache": False,
        "device": here(),
        "precision": "no",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a collapse
        return ptee.train(model, *data, **{**plain, **settings})


# ---------------------------------------------------------------------------------------------------- the same training


@pytest.mark.parametrize("head", ["pool", "plain", "bnpool", "conv1"])
@pytest.mark.parametrize("targets", ["labels", "soft"])
def test_heads_learn_the_same_from_a_cache(head, targets):
    expected = losses(head, targets=targets)
    assert losses(head, targets=targets, cache=True) == (
        pytest.approx(expected[0], rel=1e-5),
        pytest.approx(expected[1], rel=1e-5),
    )


def test_heads_learn_nearly_the_same_from_a_cache_in_files_and_half_precision(monkeypatch):
    expected = losses("conv1")
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    assert losses("conv1", cache=True)[0] == pytest.approx(expected[0], rel=2e-2)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.images = timm.create_model("test_resnet", num_classes=5), 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.net(x)


@pytest.mark.parametrize(
    ("data", "epochs", "count"),
    [((images(40), images(20)), 5, 60), ((DataLoader(images(40), 8),), 2, 80)],
    ids=["data sets", "a loader, which is not cached"],
)
def test_the_backbone_runs_once_over_a_data_set_however_many_epochs_there_are(data, epochs, count):
    net = Counting()
    model = ptee.augment(net, input_size=SIZE, num_exits=2)
    net.images = 0
    short(model, *data, epochs=epochs, cache=True)
    assert net.images == count


class Unlabelled(Dataset[Tensor]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Tensor:
        return images(20)[i][0]


def test_images_without_labels_can_be_cached_but_are_no_targets():
    assert short(early(), Unlabelled(), targets="pseudo", epochs=1, cache=True).epochs[0].accuracy is None
    with pytest.raises(DataError, match="no labels"):
        short(early(), Unlabelled(), targets="labels", epochs=1, cache=True)


# ---------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("head", ["pool", "plain", "bnpool", "conv1"])
def test_heads_answer_what_they_read_as_they_answer_the_images(head):
    model, x = early(head), images(6).tensors[0]
    with torch.no_grad():
        now, later = model.all_exits(x), model.answer(model.read(x))
    for one, other in zip(now, later, strict=True):
        assert torch.equal(one, other)


def test_a_pooled_head_keeps_a_vector_and_a_convolution_the_whole_map():
    x = images(2).tensors[0]
    assert [r.shape[1:] for r in early("pool").read(x).inputs] == [(e.shape[0],) for e in early("pool").exits]
    assert [r.shape[1:] for r in early("conv1").read(x).inputs] == [e.shape for e in early("conv1").exits]


def test_layers_that_are_random_or_learn_are_not_cached(monkeypatch):
    def dropped(channels: int, height: int, width: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(HEADS, "dropped first", dropped)
    model = early("dropped first")
    assert model.read(images(2).tensors[0]).inputs[0].shape[1:] == model.exits[0].shape


def test_a_small_cache_keeps_its_precision_and_a_large_one_half_of_it():
    shapes = (torch.Size([64]),)
    assert Estimate(1000, shapes, torch.float32).stored == torch.float32
    large = Estimate(10_000_000, shapes, torch.float32)
    assert large.stored == torch.float16
    assert large.size == 10_000_000 * 64 * 2


def test_the_size_is_known_after_one_batch():
    reading = Reading((torch.zeros(4, 8), torch.zeros(4, 2, 3, 3)), torch.zeros(4, 5))
    assert Estimate.of(reading, 10).size == 10 * (8 + 18 + 5) * 4


def test_all_views_are_kept_and_counted_and_an_epoch_reads_those_that_are_drawn():
    seen = Views(images(10), 3)
    kept = fill(early(), seen, batch_size=8, around=nullcontext)
    assert kept.estimate.size == 3 * Estimate.of(kept[[0]].reading, 10).size
    kept.begin(4)
    assert torch.equal(seen.drawn, draw_views(10, 3, 0, 4))
    assert len(kept) == 10
    rows = torch.stack([seen[i][0] for i in (7, 2)])
    with torch.no_grad():
        for got, want in zip(kept[[7, 2]].reading.inputs, early().read(rows).inputs, strict=True):
            torch.testing.assert_close(got, want.cpu())
    assert torch.equal(kept[[7, 2]].labels, images(10).tensors[1][[7, 2]].cpu())


# ---------------------------------------------------------------------------------------------------- its files


def filled(data: Any) -> Cache:
    return fill(early(), data, batch_size=8, around=nullcontext)


@pytest.fixture
def in_files(monkeypatch, tmp_path) -> Path:
    """The folder of the files."""
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_its_files_have_no_name_so_nothing_is_left_when_the_process_is_killed(in_files):
    kept = filled(images(20))
    assert list(in_files.iterdir()) == []
    assert not kept.estimate.in_memory
    assert torch.equal(kept[[3, 1]].labels, images(20).tensors[1][[3, 1]].cpu())
    kept.close()


def test_values_that_half_precision_cannot_hold_are_refused(in_files):
    x, y = images(20).tensors
    with pytest.raises(DataError, match=r"as large as .*half precision cannot hold.*cache=False"):
        filled(TensorDataset(x * 1e7, y))


class Interrupting(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> Any:
        if i > 10:
            raise KeyboardInterrupt
        return images(20)[i]


def test_an_interrupted_cache_leaves_nothing(in_files):
    with pytest.raises(KeyboardInterrupt):
        filled(Interrupting())
    assert list(in_files.iterdir()) == []


def test_a_cache_above_the_limit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 1000)
    with pytest.raises(DataError, match=r"20 images takes .* [GM]iB.*cache=False"):
        filled(images(20))


def test_a_training_whose_cache_cannot_be_kept_says_so_and_learns_the_same(monkeypatch):
    kept, said = early(), []
    learn = {"epochs": 2, "batch_size": 10, "precision": "no", "views": 1, "shift": 0}
    expected = ptee.train(kept, images(20), **learn).epochs[-1].loss
    monkeypatch.setattr(cache, "LIMIT", 1000)
    found = ptee.train(early(), images(20), **learn, on_cache=lambda what: said.append(str(what))).epochs[-1].loss
    assert found == pytest.approx(expected, rel=1e-4)
    assert said == [str(NotCached(said[0].partition(" So ")[0]))]
    assert said[0].endswith("So the backbone runs over the images in every epoch.")
    with pytest.raises(DataError, match=r"cache=False"):
        ptee.train(early(), images(20), **learn, cache=True)
    with pytest.warns(UserWarning, match="in every epoch"):
        ptee.train(early(), images(20), **learn)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "function", "result"),
    [("shutil", "disk_usage", lambda _: type("Usage", (), {"free": 10})), ("os", "posix_fallocate", full)],
    ids=["has no room", "fills up meanwhile"],
)
def test_a_full_disk_is_refused_in_one_line(module, function, result, in_files, monkeypatch):
    monkeypatch.setattr(getattr(cache, module), function, result, raising=False)
    with pytest.raises(DataError, match=r"no room for .*TMPDIR"):
        filled(images(20))
    assert list(in_files.iterdir()) == []


def test_the_size_of_the_training_images_cache_is_reported_before_it_is_filled(monkeypatch):
    events: list[str] = []
    put = Cache.put
    monkeypatch.setattr(Cache, "put", lambda *args: events.append("filled") or put(*args))
    short(early(), images(), images(20, 1), epochs=1, cache=True, on_cache=lambda size: events.append(str(size)))
    words = "The backbone runs once over 40 images. What the heads read of them takes 1 MiB in memory."
    assert events == [words] + ["filled"] * 5  # three batches of 40 images, two of the 20 held-out ones


def test_a_size_that_is_printed_does_not_end_up_behind_the_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    report = lambda size: terminal.write(f"{size}\n")  # noqa: E731
    fill(early().eval(), images(), batch_size=16, around=nullcontext, callback=report).close()
    first = terminal.getvalue().split("\n")[0]
    assert "cache:   0%" in first
    assert first.rpartition("\r")[2].startswith("The backbone runs once")  # what is left to be seen


@pytest.mark.parametrize(
    ("samples", "words"),
    [(1000, "takes 1 MiB in memory"), (4_000_000, "takes 1.9 GiB on disk until the training ends")],
)
def test_a_size_reads_well_whether_it_is_small_or_large(samples, words):
    assert words in str(Estimate(samples, (torch.Size([240]), torch.Size([10])), torch.float32))


@pytest.mark.parametrize(
    ("views", "mirror", "words"),
    [
        (1, True, "once over 9 images. What"),
        (2, True, "9 images in 2 views each (itself and its mirror image)"),
        (2, False, "9 images in 2 views each (itself and 1 crop)"),
        (6, True, "9 images in 6 views each (itself, its mirror image and 4 crops)"),
    ],
)
def test_what_the_views_of_an_image_are_is_said(views, mirror, words):
    said: list[Estimate] = []
    shown = Views(images(9), views, mirror=mirror)
    fill(early().eval(), shown, batch_size=16, around=nullcontext, callback=said.append).close()
    assert words in str(said[0])


def test_a_cache_has_the_widest_type_of_what_heads_read_and_what_the_backbone_answers():
    half, single = torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2, 4)
    for inputs, logits in (((half, half), single), ((half, single), half)):
        assert Estimate.of(Reading(inputs, logits), 10).dtype == torch.float32
