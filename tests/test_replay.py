"""A forward pass begun anew with fewer rows: what was done is not done again, and what is remembered fits."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ptee
from ptee.replay import Again, Memory, Recallable, Step, make_plain, make_recallable, merged, run, take

SIZE = (3, 16, 16)


class Cell(nn.Module):
    """Reads the two before it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.one(x).relu() + self.two(before)


class Cells(nn.Module):
    """A chain of cells; between them a row count, a mask of all rows and the cell before the last are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.classifier = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.cells = nn.ModuleList(Cell() for _ in range(5))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        rows, mask = len(x), x.new_ones(len(x), 1, 1, 1)
        before = x = self.entry(x)
        for cell in self.cells:
            before, x = x, (cell(x, before) * mask).view(rows, 8, 16, 16)
        return self.classifier(x.mean((2, 3)))


@pytest.fixture
def net() -> Cells:
    torch.manual_seed(0)
    return Cells().eval()


def early(net: nn.Module, exits: list[str]) -> ptee.EarlyExitModel:
    return ptee.augment(net, exits=exits, input_size=SIZE)


EXITS = ["cells.0", "cells.1", "cells.3"]


def thresholds(model: ptee.EarlyExitModel, x: Tensor) -> list[float]:
    """At each exit some rows leave and some stay."""
    h = model.all_exits(x).confidence[:-1]
    return [row.sort().values[len(x) * 3 // 4].item() for row in h]


def test_every_row_gets_the_answer_that_it_gets_alone(net):
    model, x = early(net, EXITS), torch.randn(16, *SIZE)
    model.threshold = thresholds(model, x)
    together = model.predict(x)
    assert set(together.exit_index.tolist()) == {0, 1, 2, 3}
    for i in range(len(x)):
        alone = model.predict(x[i : i + 1])
        assert alone.exit_index.item() == together.exit_index[i].item()
        assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-5)


def test_where_nobody_leaves_the_answer_is_the_backbones(net):
    x = torch.randn(4, *SIZE)
    expected = net(x).detach()
    model = early(net, EXITS)
    model.threshold = 2.0
    assert torch.equal(model(x), expected)


def test_no_module_computes_anything_twice(net):
    model, x = early(net, EXITS), torch.randn(16, *SIZE)
    model.threshold = thresholds(model, x)
    rows: dict[str, list[int]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out, name=name: rows.setdefault(name, []).append(len(out)))
    exits = model.predict(x).exit_index
    behind = [int((exits >= n).sum()) for n in range(4)]
    left = {"entry": behind[0], "cells.0": behind[0], "cells.1": behind[1], "cells.2": behind[2], "cells.3": behind[2],
            "cells.4": behind[3]}  # fmt: skip
    cells = {f"{name}.{part}": [n] for name, n in left.items() if name != "entry" for part in ("one", "two")}
    inner = {name: calls for name, calls in rows.items() if name != "entry"}
    assert inner == cells
    assert rows["entry"][0] == 16


def test_detaching_leaves_no_trace(net):
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    one, two = early(net, EXITS), early(net, ["cells.2"])
    assert any(isinstance(vars(m).get("forward"), Recallable) for m in net.modules())
    one.detach()
    x = torch.randn(4, *SIZE)
    two.threshold = thresholds(two, x)
    two.predict(x)
    two.detach()
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before


def test_copies_and_pickles_answer_alike(net):
    model, x = early(net, EXITS), torch.randn(8, *SIZE)
    model.threshold = thresholds(model, x)
    expected = model.predict(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        got = other.predict(x)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.exit_index, expected.exit_index)
        assert all(
            vars(m)["forward"].module is m
            for m in other.backbone.modules()
            if isinstance(vars(m).get("forward"), Recallable)
        )


def test_two_threads_may_call_one_model_at_once(net):
    model = early(net, EXITS)
    batches = [torch.randn(8, *SIZE) for _ in range(2)]
    model.threshold = thresholds(model, torch.cat(batches))
    expected = [model.predict(x).logits for x in batches]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(20):
            got = model.predict(batches[i]).logits
            if not torch.equal(got, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_forward_that_somebody_else_put_in_place_still_runs_and_is_put_back(net):
    own = net.cells[0].forward
    calls = []

    def theirs(*args: Any) -> Any:
        calls.append(1)
        return own(*args)

    net.cells[0].forward = theirs
    model, x = early(net, EXITS), torch.randn(8, *SIZE)
    calls.clear()
    model.threshold = thresholds(model, x)
    calls.clear()
    model.predict(x)
    assert calls == [1]
    assert model.detach().cells[0].forward is theirs


# ---------------------------------------------------------------------------------------------------- the memory alone


def test_rows_that_share_an_axis_with_their_tokens_go_together():
    x = torch.arange(12).view(6, 2)  # three rows of two tokens each
    assert take(x, torch.tensor([2, 0]), 2).tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]


def test_the_steps_of_several_cuts_keep_what_any_of_them_needs():
    one, other = Step("a", (0,), (1,), False, True), Step("a", (0,), (1,), True, False)
    assert merged([[one], [other]]) == {"a": Step("a", (0,), (1,), True, True)}


@pytest.mark.parametrize("needed", [True, False])
def test_what_nobody_reads_again_keeps_its_shape_alone(needed):
    module = nn.Identity()
    make_recallable([module])
    memory = Memory({module: Step("m", (0,), (1,), needed, False)})
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(module(x))
            if len(seen) == 1:
                memory.keep_rows(torch.tensor([1]))
                raise Again
            return seen[-1]

    x = torch.tensor([[1.0], [2.0]])
    run(Net(), x, memory)
    assert seen[1].tolist() == ([[2.0]] if needed else [[0.0]])
    make_plain([module])
    assert "forward" not in vars(module)


def test_what_is_overwritten_later_is_kept_as_it_was():
    module = nn.Identity()
    make_recallable([module])
    memory = Memory({module: Step("m", (0,), (1,), True, True)})
    seen: list[Tensor] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(module(x.clone()).add_(1))
            if len(seen) == 1:
                memory.keep_rows(torch.tensor([0]))
                raise Again
            return seen[-1]

    assert run(Net(), torch.tensor([[1.0], [2.0]]), memory).tolist() == [[2.0]]
