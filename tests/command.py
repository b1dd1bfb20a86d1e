"""The command as tests call it: in this process, on tiny pictures and a small network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from ptee.cli.main import main
from ptee.model.run_config import fingerprint

NETWORK = ("--model", "cifar_resnet8", "--input-size", "3,16,16")
MODEL = (*NETWORK, "--exits", "layer1,layer2")
RANDOM = (*MODEL, "--no-pretrained")
BRIEF = ("--epochs", 2, "--batch-size", 12, "--set", "training.precision=no")
SHORT = (*BRIEF, "--head", "pool", "--no-speed")  # where neither the recipe's heads nor their speed matter
TEN = [f"class{k}" for k in range(10)]


class Done(NamedTuple):
    """What came of a command."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


def quietly(*words: object) -> str:
    """A command that makes what several tests use, and what it said."""
    with pytest.raises(SystemExit) as end, redirect_stdout(StringIO()) as said:
        main([str(word) for word in words])
    assert end.value.code == 0
    return said.getvalue()


def assert_refused(done: Done, said: str) -> None:
    """One line on standard error that a user can act on, with status 2."""
    assert done.status == 2, done
    assert done.err.endswith("\n")
    assert len(done.err.splitlines()) == 1, done.err
    assert re.search(said, done.err), done.err


def pictures(folder: Path, classes: list[str], count: int) -> Path:
    """Pictures of noise, so many for each class."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for n in range(count):
            pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, device="cpu")
            Image.fromarray(pixels.numpy()).save(folder / name / f"{n}.png")
    return folder


def evaluated(run: Run, *words: object) -> dict:
    """What `ptee evaluate` finds, but for the speed."""
    return json.loads(run("evaluate", *words, "--json", "--no-speed").out)


def figures(results: dict) -> list[tuple]:
    """The numbers of a table of results."""
    return [(row["name"], row["accuracy"], row["fidelity"], row["cost"]) for row in results["rows"]]


def read_json(run: Path | str, name: str) -> dict:
    """A JSON file of a run."""
    return json.loads(Path(run, name).read_text())


def edited(run: Path | str, change: Callable[[dict], object], signed: bool = True) -> None:
    """Change config.json by hand. `signed`: as somebody would who knows the fingerprint."""
    config = read_json(run, "config.json")
    change(config)
    Path(run, "config.json").write_text(json.dumps(config | ({"fingerprint": fingerprint(config)} if signed else {})))


def files(folder: Path) -> dict[str, bytes]:
    """All that a folder holds."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
