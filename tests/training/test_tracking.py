from __future__ import annotations

from pathlib import Path

import pytest

from ptee._common.errors import PteeError
from ptee.training import tracking
from ptee.training.history import Epoch

EPOCH = Epoch(3, 1.5, None, [0.5, 1.0], [0.25, 0.75], 1.25, 9.0)
NUMBERS = {
    "loss": 1.5, "val_loss": 1.25, "seconds": 9.0,
    "fidelity/exit 0": 0.5, "fidelity/end": 1.0, "leaving/exit 0": 0.25, "leaving/end": 0.75,
}  # fmt: skip


class Tracker:
    """What accelerate would start."""

    def __init__(self, *names: object, **more: object) -> None:
        self.said: list[object] = [(names, more)]
        last.append(self)

    def start(self) -> None:
        self.said.append("started")

    def store_init_configuration(self, values: dict) -> None:
        self.said.append(values)

    def log(self, values: dict, step: int) -> None:
        self.said.append((step, values))

    def finish(self) -> None:
        self.said.append("finished")


last: list[Tracker] = []


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("tensorboard", (("r50",), {"logging_dir": Path("runs/tensorboard")})),
        ("wandb", (("ptee",), {"name": "r50"})),
        ("mlflow", (("ptee",), {"run_name": "r50"})),
    ],
)
def test_each_epoch_is_noted_and_the_tracker_is_finished_whatever_happens(name, made, monkeypatch):
    monkeypatch.setitem(__import__("accelerate.tracking").tracking.LOGGER_TYPE_TO_CLASS, name, Tracker)
    with pytest.raises(KeyboardInterrupt), tracking.tracked(name, Path("runs/r50"), {"lr": 0.1, "x": None}) as note:
        note(EPOCH)
        raise KeyboardInterrupt
    assert last[-1].said == [made, "started", {"lr": 0.1, "x": "None"}, (3, NUMBERS), "finished"]


def test_without_a_tracker_nothing_is_noted():
    with tracking.tracked(None, None, {}) as note:
        note(EPOCH)


def test_a_tracker_that_does_not_start_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(Tracker, "start", lambda self: 1 / 0)
    monkeypatch.setitem(__import__("accelerate.tracking").tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    with pytest.raises(PteeError, match="wandb does not start: ZeroDivisionError"), tracking.tracked("wandb", None, {}):
        pass


@pytest.mark.parametrize(
    ("name", "said"), [("tensorbord", "Did you mean 'tensorboard'"), ("mlflow", "pip install mlflow")]
)
def test_a_tracker_that_cannot_be_used_is_refused(name, said, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(PteeError, match=said):
        tracking.require_tracker(name)
    tracking.require_tracker(None)
