"""`ptee augment` with nothing given: a small network learns the demo once, is kept, and gets exits."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow
from command import SHORT, assert_refused, evaluated, figures, read_json
from safetensors.torch import save_file

import ptee
from ptee._common.errors import PteeError
from ptee.data import demo_images
from ptee.data.splits import Data
from ptee.pipeline import demo, saved_run
from ptee.pipeline import fit as fitting

TINY = ("--epochs", 1, "--exits", "layer1", "--head", "pool", "--no-speed")


def make_hasty(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demo_images, "CANVASES", {"train": 72, "calibration": 20, "validation": 20})
    patch.setattr(demo, "EPOCHS", 1)


@pytest.fixture
def hasty(monkeypatch) -> None:
    """The demo has few canvases, and its network learns them for one epoch."""
    make_hasty(monkeypatch)


@pytest.fixture(scope="module")
def kept_once(tmp_path_factory) -> Path:
    """A cache that holds that network."""
    place = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        make_hasty(patch)
        patch.setenv("XDG_CACHE_HOME", str(place))
        demo.demo_network(demo._images(0), log=lambda _: None)
    return place


@pytest.fixture
def kept(hasty, kept_once, tmp_path) -> Path:
    """That network is in the cache: its file."""
    (file,) = Path(shutil.copytree(kept_once, tmp_path / "cache"), "ptee").iterdir()
    return file


def test_with_nothing_given_a_network_learns_the_demo_once_and_gets_exits(run, hasty, monkeypatch):
    done = run("augment", "--epochs", 1, "--no-speed")
    assert done.status == 0, done
    assert "is trained on the demo's images once and kept in" in done.out
    metrics = read_json("runs/demo", "metrics.json")
    assert len(metrics["results"]["leaving"]) == 3
    monkeypatch.setattr(demo, "train_demo_network", None)  # not called again
    measured = run("evaluate", "runs/demo", "--no-speed", "--json")
    assert "20 validation images" in measured.err
    assert figures(json.loads(measured.out)) == figures(metrics["results"])
    again = run("augment", *TINY, "--out", "again")
    assert ptee.load("again").plan.head == "pool"
    *_, what, needs, own, folder = again.out.strip().splitlines()
    assert re.match(r"What happened: of 20 images .* through the whole network\.$", what)
    assert re.match(r"With its exits the network needs \d\.\d\d of its multiply-accumulates; its accuracy is ", needs)
    assert "ptee augment --model resnet50 --data FOLDER" in own
    assert "train/CLASS/*.jpg" in folder


HAPPENED = [
    (1.42, [0.6, 0.0, 0.15, 0.25], "60% left at exit 0, 15% left at exit 2 and 25% went through the whole network."),
    (1.42, [0.0, 0.0, 0.0, 1.0], "seen, 100% went through the whole network."),
    (1.42, [1.0, 0.0], "needs 0.58 of its multiply-accumulates and is 1.4 times as fast on this cpu; its"),
    (None, [1.0, 0.0], "needs 0.58 of its multiply-accumulates; its accuracy is 0.982, without them 0.985."),
]


@pytest.mark.parametrize(("speedup", "leaving", "words"), HAPPENED)
def test_what_happened_is_told_in_plain_words(speedup, leaving, words):
    rows = [{"accuracy": 0.985}, {"accuracy": 0.982, "cost": 0.58, "speedup": speedup}]
    told = demo.what_happened({"rows": rows, "leaving": leaving, "samples": 1200, "device": "cpu"})
    assert words in told


# ---------------------------------------------------------------------------------------------------- the kept network


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def another_network(file: Path) -> None:
    save_file({"weight": torch.zeros(3)}, file)


def other_numbers(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes(4))


@pytest.mark.parametrize("damage", [cut_off, *map(slow, (another_network, other_numbers))])
def test_a_kept_network_that_is_damaged_is_trained_again(damage, run, kept):
    before = kept.read_bytes()
    damage(kept)
    done = run("augment", *TINY, "--out", "second")
    assert (done.status, kept.read_bytes() == before) == (0, True)
    assert "The network that was kept cannot be used, so it is trained again: " in done.out


def test_another_recipe_or_other_images_have_another_network(hasty, monkeypatch):
    def weights() -> Path:
        untrained = demo.load_backbone(demo.MODEL, pretrained=False, **demo.VIEW)
        return demo.demo_weights(demo.open_images("demo", untrained, seed=0, named=True)[0])

    first = weights()
    assert weights() == first
    monkeypatch.setattr(demo, "LR", 1e-3)
    second = weights()
    monkeypatch.setattr(demo_images, "HIGHEST", 15)
    assert len({first, second, weights()}) == 3


def test_the_seed_draws_the_images_that_are_reported_on_and_the_network_is_trained_once(run, hasty, monkeypatch):
    parts: list[Data] = []
    trained: list[Data] = []
    train = demo.train_demo_network

    def note(data: Data, *more: Any) -> None:
        trained.append(data)
        train(data, *more)

    def stop(model: ptee.EarlyExitModel, data: Data, *_: object) -> None:
        parts.append(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_demo_network", note)
    monkeypatch.setattr(fitting, "_train", stop)
    for seed in (0, 1):
        run("augment", "--seed", seed)
    (network,), (first, second) = trained, parts
    assert pixels(network.train) == pixels(first.train) == pixels(second.train)
    assert pixels(network.validation) == pixels(first.validation) != pixels(second.validation)
    assert (first.split["seed"], second.split["seed"]) == (0, 1)


def pixels(images: Any) -> list[list[float]]:
    return [image.flatten().tolist() for image, _ in images]


@pytest.mark.slow
def test_a_run_of_the_demo_with_another_seed_is_measured_again_on_its_own_images(run, hasty):
    assert run("augment", *TINY, "--seed", 1).status == 0
    assert figures(evaluated(run, "runs/demo")) == figures(read_json("runs/demo", "metrics.json")["results"])


def test_no_digit_is_mirrored(run, kept, monkeypatch):
    seen = {}

    def train(*_: object, config: Any, **__: object) -> None:
        seen.update(views=config.views, mirror=config.mirror)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "run_training", train)
    run("augment", "--set", "views=2")
    assert seen == {"views": 2, "mirror": False}


def test_folders_called_demo_are_no_data(run, kept, things):
    shutil.copytree(things / "ten", "demo")
    assert run("augment", *TINY).status == 0
    recorded = read_json("runs/demo", "metrics.json")["results"]
    assert (recorded["data"]["source"], recorded["data"]["split"]["kind"]) == ("demo", "demo")
    assert figures(evaluated(run, "runs/demo")) == figures(recorded)


def test_the_demo_takes_one_thread_and_other_networks_all(run, known, hasty, finished, monkeypatch):
    threads, seen = [2], []  # what torch was told last; it keeps to one, as two on busy cores take long
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def noting(what: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*words: object, **more: object) -> Any:
            seen.append(torch.get_num_threads())
            return what(*words, **more)

        return noted

    places = ((demo, "train_demo_network"), (fitting, "run_training"), (fitting, "evaluate"), (saved_run, "evaluate"))
    for place, name in places:
        monkeypatch.setattr(place, name, noting(getattr(place, name)))
    monkeypatch.setattr(saved_run, "FEW_MACS", 12_000_000)
    assert run("augment", *TINY, "--out", "tiny").status == 0
    assert run("augment", *known, *SHORT, "--out", "other").status == 0
    assert (seen, torch.get_num_threads()) == ([1, 1, 1, 2, 2], 2)


# ---------------------------------------------------------------------------------------------------- where it is kept


def test_without_a_place_to_keep_the_network_the_variable_to_set_is_named(run, hasty, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert_refused(run("augment", *TINY), "neither XDG_CACHE_HOME nor HOME is set.*XDG_CACHE_HOME=/tmp/cache")


def test_a_cache_that_cannot_be_written_is_refused_before_the_network_is_trained(run, hasty, monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))
    monkeypatch.setattr(demo, "train_demo_network", None)
    assert_refused(run("augment", *TINY), "Cannot write .*file.* is a file.*XDG_CACHE_HOME")


def test_imagenette_is_downloaded_once_and_whole(monkeypatch):
    class Fake:
        def __init__(self, root: str, **_: object) -> None:
            print("Downloading")
            Path(root, "imagenette2-320", "train").mkdir(parents=True)

    monkeypatch.setattr("torchvision.datasets.Imagenette", Fake)
    assert (demo.imagenette() / "train").is_dir()
    monkeypatch.setattr("torchvision.datasets.Imagenette", None)
    assert (demo.imagenette() / "train").is_dir()
    assert [p.name for p in demo.cache_folder().iterdir()] == ["imagenette2-320"]


def test_a_broken_download_of_imagenette_leaves_nothing(monkeypatch, capsys):
    class Fake:
        def __init__(self, root: str, **_: object) -> None:
            Path(root, "imagenette2-320").mkdir(parents=True)
            raise ConnectionError("cut off\nin the middle")

    monkeypatch.setattr("torchvision.datasets.Imagenette", Fake)
    with pytest.raises(PteeError, match=r"cut off.*data=FOLDER") as refusal:
        demo.imagenette()
    assert "\n" not in str(refusal.value)
    assert list(demo.cache_folder().iterdir()) == []
    assert capsys.readouterr().out == ""
