"""A training as one of several processes that do not know each other, and one whose output nobody reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cases import slow
from command import RANDOM, SHORT, Done, assert_refused, read_json
from small import made

import ptee
from ptee._common.devices import LAUNCH, MPI
from ptee._common.errors import PteeError

PTEE = (sys.executable, "-m", "ptee")
CLEAN = {name: value for name, value in os.environ.items() if name not in (*LAUNCH, *MPI)}
LAUNCHES = {
    "a scheduler": {"RANK": "1", "WORLD_SIZE": "2"},
    "MPICH": {"PMI_RANK": "0", "PMI_SIZE": "2"},
    "Open MPI": {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"))},
}  # fmt: skip


@pytest.mark.parametrize("launch", map(slow, LAUNCHES))
def test_a_training_that_was_launched_by_halves_says_what_to_unset(launch, things, elsewhere):
    given = LAUNCHES[launch]
    words = [*PTEE, "augment", *map(str, (*RANDOM, "--data", things / "ten", *SHORT, "--out", "out"))]
    done = subprocess.run(words, env=CLEAN | given, capture_output=True, text=True, timeout=240)
    assert_refused(Done(done.returncode, done.stdout, done.stderr), f"MASTER_ADDR.*unset {' '.join(given)}$")
    assert done.stdout == ""
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def half_launched(monkeypatch) -> None:
    """One of two processes that cannot be reached; no model and no data may be opened."""

    class Unreachable:
        _shared_state: ClassVar[dict[str, Any]] = {}

        def __init__(self, **_: Any) -> None:
            raise ValueError("no one is there")

        @staticmethod
        def _reset_state() -> None: ...

    monkeypatch.setattr("accelerate.state.PartialState", Unreachable)
    monkeypatch.setenv("PMI_SIZE", "2")
    for place in ("ptee.backbones.load.load_backbone", "ptee.pipeline.fit.load_backbone", "ptee.pipeline.demo.demo"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("it is opened"))


class Untouched:
    """Data that nobody may look at."""

    def __getattribute__(self, name: str) -> Any:
        pytest.fail(f"{name} is asked for")


COMMANDS = {
    "demo": ("augment",),
    "augment": ("augment", "--model", "resnet18", "--data", "."),
    "sweep": ("sweep", "--over", "seed=0,1", "--model", "resnet18", "--data", ".", "--out", "out"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_was_launched_by_halves_opens_nothing(command, run, half_launched, elsewhere):
    assert_refused(run(*COMMANDS[command]), "PMI_SIZE=2.*torchrun")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("rank", ["1", "x"])
def test_a_command_that_runs_in_one_process_prints_whatever_a_launcher_left_in_the_environment(rank, run, monkeypatch):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = run("recipe", "ptee")
    assert (done.status, done.err) == (0, "")
    assert "training:" in done.out


@pytest.mark.parametrize("function", ["fit", "train"])
def test_a_function_that_was_launched_by_halves_opens_nothing(function, half_launched):
    with pytest.raises(PteeError, match=r"PMI_SIZE=2.*torchrun"):
        if function == "fit":
            ptee.fit("resnet18", Untouched())
        else:
            ptee.train(made(), Untouched())


@pytest.mark.slow
def test_a_training_whose_output_nobody_reads_any_more_ends_in_words_and_goes_on_with_resume(things, known, run):
    words = [str(word) for word in ("augment", *known, *SHORT, "--out", "out")]
    with subprocess.Popen(
        [*PTEE, *words], env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as training:
        for line in training.stdout:
            if line.startswith("epoch 1"):
                break
        training.stdout.close()
        said = training.stderr.read()
    assert (training.returncode, len(said.splitlines())) == (141, 1), said
    assert re.match("Nobody reads the output any more", said)
    assert Path("out", "checkpoint.safetensors").is_file()
    assert run(*words, "--resume").status == 0
    assert read_json("out", "metrics.json")["training"]["epochs"][-1]["number"] == 2
