"""A backbone that somebody else put into training mode: whatever works with the model puts it back first, and no statistics move."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow
from learning import SIZE, data, made

import ptee
from ptee._common.errors import PteeError
from ptee.model.early_exit import EarlyExitModel
from ptee.serving.pieces import pieces_of_model
from ptee.timing.measure import measure
from ptee.tuning.traces import record

EAGER = {"mode": "eager"}


def taken_apart_again(model: EarlyExitModel) -> None:
    """By a model that was optimized before, after a change of its settings."""
    model.backbone.eval()
    fast = ptee.optimize(model, **EAGER)
    model.backbone.train()
    model.off = [0]
    fast.predict(torch.randn(2, *SIZE))


WORK: dict[str, Callable[[EarlyExitModel, Path], Any]] = {
    "predict": lambda model, _: model.predict(torch.randn(3, *SIZE)),
    "optimize": lambda model, _: ptee.optimize(model, **EAGER),
    "what was optimized": lambda model, _: taken_apart_again(model),
    "serve": lambda model, _: pieces_of_model(model),
    "measure": lambda model, _: measure(model, [2], rounds=1),
    "evaluate": lambda model, _: ptee.evaluate(model, data()),
    "tune": lambda model, _: ptee.tune(model, data(), max_fidelity_drop=0.5),
    "record": lambda model, _: record(model, data()),
    "the page": lambda model, folder: ptee.write_report(model, data(), out=folder / "page.html"),
}
EXPORT = pytest.param(
    lambda model, folder: ptee.export(model, folder / "onnx", format="onnx"),
    marks=[pytest.mark.cpu("exports are made on the CPU"), pytest.mark.slow],
    id="export",
)


@pytest.mark.filterwarnings("ignore:These images are", "ignore:Of these images")
@pytest.mark.parametrize(
    "work", [*((slow if name == "the page" else pytest.param)(work, id=name) for name, work in WORK.items()), EXPORT]
)
def test_no_statistics_of_the_backbone_move(work, tmp_path):
    model = made()
    net = model.backbone
    before = copy.deepcopy(net.state_dict())
    net.train()
    work(model, tmp_path)
    assert not any(part.training for part in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_pieces_of_a_model_in_training_mode_are_not_measured():
    model = made("bnpool")
    before = copy.deepcopy(model.heads.state_dict())
    with pytest.raises(PteeError, match=r"eval mode.*Call model\.eval\(\)"):
        measure(model.train(), [2], rounds=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.heads.state_dict().items())
