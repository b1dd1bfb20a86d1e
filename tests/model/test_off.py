"""Exits that are switched off: nobody leaves there, no head runs there for nothing, and nothing is charged for it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from device import seeded
from small import once
from torch import Tensor

import ptee
from ptee._common.errors import PteeError
from ptee.backbones.load import load_backbone
from ptee.exits.plan import heads_run
from ptee.model.build import build
from ptee.tuning.traces import record

SIZE = (3, 32, 32)
EXITS = ["layer1.0", "layer2.0", "layer3.0"]


@once
def early(head: str | tuple[str, ...] = "conv1") -> ptee.EarlyExitModel:
    return build(load_backbone("cifar_resnet8", pretrained=False), exits=EXITS, head=head)


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    return early()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, *SIZE, generator=seeded(1))


def heads_that_ran(model: ptee.EarlyExitModel, x: Tensor) -> set[int]:
    ran: set[int] = set()
    handles = [head.logits.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, head in enumerate(model.heads)]
    model.predict(x)
    for handle in handles:
        handle.remove()
    return ran


def test_nobody_leaves_there_whatever_the_threshold(model, x):
    model.threshold, model.off = 0, [0, 1]
    assert model.predict(x).exit_index.tolist() == [2] * len(x)
    assert torch.equal(model(x), model.all_exits(x).logits[2])
    assert model.predict(x, [[0, 0, 2]] * len(x)).exit_index.tolist() == [3] * len(x)


def test_its_head_does_not_run_and_is_not_charged(model, x):
    every, second = model.costs, model.exits[1].head_cost
    model.threshold, model.off = 2.0, [1]
    assert heads_that_ran(model, x) == {0, 2}
    assert model.costs == pytest.approx([every[0], *(c - second for c in every[1:])])
    assert model.predict(x).cost.tolist() == pytest.approx([every[-1] - second] * len(x))
    assert [e.cost for e in model.exits] == pytest.approx(model.costs[:-1])


def test_a_printed_model_says_off_in_place_of_its_threshold(model):
    model.threshold, model.off = [2.0, 0.75, 2.0], [0, 2]
    assert str(model).splitlines()[:2] == ["EarlyExitModel(", "  T = off, 0.75, off; confidence learned; answers own"]


def test_it_can_be_switched_on_again(model, x):
    every = model.costs
    model.off = [0, 1, 2]
    assert model.costs[-1] == 1
    model.off = []
    assert model.costs == every
    model.threshold = 2.0
    assert heads_that_ran(model, x) == {0, 1, 2}


def test_a_head_that_a_later_one_reads_runs_all_the_same(x):
    model = early(("res-8x1", "res-8x1+", "conv1"))
    every = model.costs
    model.threshold, model.off = 2.0, [0]
    assert heads_that_ran(model, x) == {0, 1, 2}
    assert model.costs == every
    model.off = [0, 1]
    assert heads_that_ran(model, x) == {2}
    model.off = [1]
    assert heads_that_ran(model, x) == {0, 2}


def test_the_answers_of_the_others_stay_the_same(x):
    model = early(("res-8x1", "res-8x1+", "conv1"))
    before = model.all_exits(x).logits
    model.off = [0]
    model.threshold = [0, 0, 2]
    torch.testing.assert_close(model(x), before[1])


def test_the_plan_says_so(model):
    assert "Off" not in str(model.plan)
    model.off = [0, 2]
    assert "Off: exit 0, 2. No row leaves there, and no head runs there." in str(model.plan)
    chained = early(("res-8x1", "res-8x1+", "conv1"))
    chained.off = [0]
    assert "except at 0, which later heads build on" in str(chained.plan)


def test_a_saved_run_remembers(model, x, tmp_path):
    model.off, model.threshold = [1], 0.4
    model.save_pretrained(tmp_path)
    back = ptee.load(tmp_path, copy.deepcopy(model).detach())
    assert back.off == (1,)
    assert back.costs == model.costs


@pytest.mark.parametrize("off", [[3], [-1], [0, 0], [True], [np.True_], [0.5]])
def test_what_is_no_exit_cannot_be_off(model, off):
    with pytest.raises(PteeError, match="0 to 2, each once"):
        model.off = off


@pytest.mark.parametrize("off", [None, 0.5, torch.tensor(0.5), True, "all", "1"], ids=str)
def test_exits_that_are_off_are_given_by_number(model, off):
    with pytest.raises(PteeError, match=r"Exits that are off are given by their numbers, such as .1., not as"):
        model.off = off


@pytest.mark.parametrize("off", [[1], [0, 2]])
def test_training_and_calibration_need_all_exits_on(model, x, off):
    model.off = off
    for learn in (ptee.train, ptee.calibrate):
        with pytest.raises(PteeError, match=rf"Exits are off \({', '.join(map(str, off))}\).*model\.off = \[\]"):
            learn(model, [(image, 1) for image in x])


def test_any_whole_numbers_will_do(model):
    model.off = torch.tensor([1, 2])
    assert model.off == (1, 2)
    model.off = [np.int64(2)]
    assert model.off == (2,)
    for one in (0, np.int64(0), torch.tensor(0)):
        model.off = one
        assert model.off == (0,)
        assert type(model.off[0]) is int


def test_traces_are_of_all_exits_and_the_table_of_those_that_are_on(model, x):
    data = [(image, 1) for image in x]
    every = record(model, data)
    model.off, model.threshold = [0, 1], 2.0
    assert torch.equal(record(model, data).costs, every.costs)
    results = ptee.evaluate(model, data, speed=True)
    assert results.early_exit.cost == pytest.approx(model.costs[-1])
    assert results.rows[1].cost == pytest.approx(every.costs[0].item())  # alone, it has its head
    assert [row.speedup is None for row in results.rows] == [False, True, True, False, False]
    assert str(results).count("x\n") == 3  # speeds at the ends of lines


@pytest.mark.parametrize(
    ("on", "builds_on_previous", "runs"),
    [
        ([1, 0, 1], [0, 0, 0], [1, 0, 1]),
        ([0, 0, 1], [0, 0, 1], [1, 1, 1]),
        ([0, 1, 0], [0, 1, 1], [1, 1, 0]),
        ([0, 0, 0], [1, 1, 1], [0, 0, 0]),
        ([1, 0, 1], [0, 1, 0], [1, 0, 1]),
    ],
)
def test_heads_run_that_are_on_or_read(on, builds_on_previous, runs):
    assert heads_run(torch.tensor(on).bool(), torch.tensor(builds_on_previous).bool()).int().tolist() == runs
