"""An empty folder, no network, small pictures, and a run to work on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command import MODEL, SHORT, TEN, Done, Run, pictures, quietly
from safetensors.torch import save_file

from ptee.backbones.load import load_backbone
from ptee.cli.main import main
from ptee.evaluation import results
from ptee.timing import laps
from ptee.training import trainer


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, empty caches, and no way to the network."""
    from huggingface_hub import constants

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "work"


@pytest.fixture(autouse=True, scope="session")
def once() -> Iterator[None]:
    """What is measured is not repeated to be long enough for a clock: no test here is about how many seconds it takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laps, "LONG_ENOUGH", 0.0)
        yield


@pytest.fixture
def run(capsys) -> Run:
    """The command, in this process."""

    def run(*words: object) -> Done:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        return Done(end.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Path:
    """Weights of a network, images of ten classes in one folder (few, and many), of two in train/ and val/, an empty folder."""
    place = tmp_path_factory.mktemp("things")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), place / "weights.safetensors")
        pictures(place / "ten", TEN, 3)
        pictures(place / "many", TEN, 10)
        for part in ("train", "val"):
            pictures(place / "two" / part, ["cat", "dog"], 6)
    (place / "empty").mkdir()
    return place


@pytest.fixture
def known(things) -> tuple[object, ...]:
    """Options for a network with weights, and data whose labels are the network's."""
    return (*MODEL, "--weights", things / "weights.safetensors", "--data", things / "ten")


@pytest.fixture
def foreign(things) -> tuple[object, ...]:
    """Options for that network, and data with labels of other classes, delivered in two parts."""
    return (*MODEL, "--weights", things / "weights.safetensors", "--data", things / "two")


@pytest.fixture(scope="session")
def original_and_said(things, tmp_path_factory) -> tuple[Path, str]:
    """A run whose validation images were drawn with a seed of its own, and what was said as it was made."""
    out = tmp_path_factory.mktemp("runs") / "out"
    source = ("--weights", things / "weights.safetensors", "--data", things / "ten")
    target = ("--max-fidelity-drop", 0.99, "--set", "thresholds.margin=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "in_turns", None)  # no speed is measured: SHORT has --no-speed
        said = quietly("augment", *MODEL, *source, *SHORT, *target, "--seed", 3, "--out", out)
    return out, said


@pytest.fixture(scope="session")
def original(original_and_said) -> Path:
    """That run, to be left as it is."""
    return original_and_said[0]


@pytest.fixture
def said(original_and_said) -> str:
    """What was said as that run was made."""
    return original_and_said[1]


@pytest.fixture(scope="session")
def second(things, tmp_path_factory) -> Path:
    """A run of the same network and images with another seed, to be left as it is."""
    out = tmp_path_factory.mktemp("second") / "second"
    source = ("--weights", things / "weights.safetensors", "--data", things / "ten")
    quietly("augment", *MODEL, *source, *SHORT, "--seed", 4, "--threshold", 0.5, "--out", out)
    return out


@pytest.fixture
def finished(original) -> Path:
    """That run, to be changed at will."""
    return Path(shutil.copytree(original, "out"))


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """Presses Ctrl-C in that epoch of the next training."""

    def interrupt(number: int) -> None:
        undisturbed = trainer._Training._epoch

        def epoch(self, n: int, *more: object) -> trainer.Epoch:
            if n == number:
                monkeypatch.setattr(trainer._Training, "_epoch", undisturbed)
                raise KeyboardInterrupt
            return undisturbed(self, n, *more)

        monkeypatch.setattr(trainer._Training, "_epoch", epoch)

    return interrupt
