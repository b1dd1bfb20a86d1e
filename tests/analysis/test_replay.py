"""A forward pass starts again with fewer rows: no work is done twice, and every row gets its own logits."""

from __future__ import annotations

import copy
import functools
import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from awkward import SIZE, Cell, Cells
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.replay import (
    ActiveRows,
    CachedModule,
    ReplayCache,
    RestartForward,
    Step,
    make_cached,
    merged,
    run,
    take,
    undo_cached,
)
from ptee.backbones.load import load_backbone
from ptee.model.build import build


@pytest.fixture
def net() -> Cells:
    return Cells()


EXITS = ["cells.0", "cells.1", "cells.3"]


def early(net: nn.Module, exits: list[str] = EXITS) -> ptee.EarlyExitModel:
    return build(load_backbone(net.eval(), input_size=SIZE), exits=exits, placed=True)


def leaving(model: ptee.EarlyExitModel) -> tuple[ptee.EarlyExitModel, Tensor]:
    """The model and images of which some leave at each exit and some stay."""
    x = torch.randn(16, *SIZE)
    model.threshold = [h.sort().values[12].item() for h in model.all_exits(x).confidence[:-1]]
    assert set(model.predict(x).exit_index.tolist()) == {0, 1, 2, 3}
    return model, x


def test_every_row_gets_the_answer_that_it_gets_alone(net):
    model, x = leaving(early(net))
    together = model.predict(x)
    for i in range(len(x)):
        alone = model.predict(x[i : i + 1])
        assert alone.exit_index.item() == together.exit_index[i].item()
        assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-5)


def test_a_confidence_of_all_answers_so_far_follows_the_rows_through_passes_that_start_again(net):
    model, x = early(net), torch.randn(40, *SIZE)
    with torch.no_grad():
        for head, logits in zip(model.heads, model.all_exits(x).logits, strict=False):
            head.logits.bias -= logits.mean(0)  # so that answers differ
    model.confidence = "patience"
    per_row = torch.tensor([[0.25, 2, 2], *[[2, 0.5, 0.5]] * 4]).repeat(8, 1)
    h = model.all_exits(x).confidence[:-1].T
    want = torch.cat([h >= per_row, torch.ones(40, 1, dtype=torch.bool)], 1).int().argmax(1)
    assert set(want.tolist()) == {0, 1, 2, 3}
    assert torch.equal(model.predict(x, per_row).exit_index, want)


def test_if_no_row_leaves_the_logits_are_the_backbones(net):
    x = torch.randn(4, *SIZE)
    expected = net(x).detach()
    model = early(net)
    model.threshold = 2.0
    assert torch.equal(model(x), expected)


def test_no_convolution_runs_twice_for_a_row(net):
    model, x = leaving(early(net))
    rows: dict[str, list[int]] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out, name=name: rows.setdefault(name, []).append(len(out)))
    exits = model.predict(x).exit_index
    after = [int((exits >= n).sum()) for n in range(4)]
    left = {"entry": after[0], "cells.0": after[0], "cells.1": after[1], "cells.2": after[2], "cells.3": after[2],
            "cells.4": after[3]}  # fmt: skip
    cells = {f"{name}.{part}": [n] for name, n in left.items() if name != "entry" for part in ("one", "two")}
    inner = {name: calls for name, calls in rows.items() if name != "entry"}
    assert inner == cells
    assert rows["entry"][0] == 16


def test_detaching_leaves_no_trace(net):
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    one, two = early(net, ["cells.2"]), early(net)
    assert any(isinstance(vars(m).get("forward"), CachedModule) for m in net.modules())
    one.detach()
    leaving(two)
    two.detach()
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before


def test_copies_and_pickles_return_the_same_logits(net):
    model, x = leaving(early(net))
    expected = model.predict(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        got = other.predict(x)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.exit_index, expected.exit_index)
        cached = [m for m in other.backbone.modules() if isinstance(vars(m).get("forward"), CachedModule)]
        assert all(vars(m)["forward"].module is m for m in cached)


def test_two_threads_may_call_one_model_at_once(net):
    model, x = leaving(early(net))
    expected = [model.predict(part).logits for part in x.split(8)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: model.predict(x.split(8)[i % 2]).logits, range(40)))
    assert all(torch.equal(logits, expected[i % 2]) for i, logits in enumerate(found))


def test_another_forward_on_a_module_still_runs_and_is_restored(net):
    own, calls = net.cells[0].forward, []

    def theirs(*args: Any) -> Any:
        calls.append(1)
        return own(*args)

    net.cells[0].forward = theirs
    model, x = leaving(early(net))
    calls.clear()
    model.predict(x)
    assert calls == [1]
    assert model.detach().cells[0].forward is theirs


def test_a_users_hook_sees_the_modules_output_and_no_zeros(net):
    model, x = leaving(early(net))
    seen: list[float] = []
    net.entry.register_forward_hook(lambda _m, _i, out: seen.append(out.abs().min(0).values.max().item()))
    model.predict(x)
    assert len(seen) > 1
    assert min(seen) > 0


@pytest.mark.parametrize("hooked", [True, False])
def test_an_output_of_which_only_the_shape_is_read_again_is_kept_for_a_users_hook_alone(hooked):
    layer, x = nn.Linear(3, 4), torch.randn(5, 3)
    if hooked:
        layer.register_forward_hook(lambda *_: None)
    cache = ReplayCache({layer: Step("layer", (0,), needed=False, overwritten=False)}, ActiveRows(5))
    first = cache.call(layer, layer.forward, (x,), {})
    cache.start(x)
    again = cache.call(layer, layer.forward, (x,), {})
    assert again.shape == first.shape
    assert torch.equal(again, first) is hooked


class Shared(Cells):
    """The same activation module is called inside of the cells and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()
        for cell in self.cells:
            cell.act = self.act
            cell.forward = functools.partial(self.inside, cell)

    @staticmethod
    def inside(cell: Cell, x: Tensor, before: Tensor) -> Tensor:
        return cell.act(cell.one(x)) + cell.two(before)

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        before = x = self.act(self.entry(x))
        for cell in self.cells:
            before, x = x, self.act(cell(x, before)).view(rows, 8, 16, 16)
        return self.classifier(x.mean((2, 3)))


def test_a_module_that_is_called_inside_and_outside_of_others_is_replayed_in_the_right_place():
    model, x = leaving(early(Shared()))
    expected, got = model.all_exits(x).logits, model.predict(x)
    assert torch.allclose(got.logits, expected[got.exit_index, range(16)], atol=1e-5)


def all_patterns(model: ptee.EarlyExitModel, x: Tensor) -> float:
    """The largest error over all sets of exits, if every second row leaves at exits of the set and the others stay."""
    every, worst = model.all_exits(x).logits.detach(), 0.0
    for leaves in itertools.product([False, True], repeat=len(model.exits)):
        open_to = [n for n, here in enumerate(leaves) if here]
        where = [open_to[i % len(open_to)] if open_to and i % 2 else len(model.exits) for i in range(len(x))]
        t = torch.full((len(x), len(model.exits)), 2.0)
        for i, n in enumerate(where):
            t[i, n : n + 1] = 0.0
        got = model.predict(x, t)
        assert got.exit_index.tolist() == where
        worst = max(worst, (got.logits - every[where, range(len(x))]).abs().max().item())
    return worst


def test_wherever_rows_leave_the_others_get_their_own_logits(net):
    assert all_patterns(early(net), torch.randn(12, *SIZE)) < 1e-5


def test_two_models_on_one_backbone_start_again_at_their_own_cut_points(net):
    one, two = early(net), early(net, ["cells.0", "cells.2"])
    x = torch.randn(12, *SIZE)
    assert max(all_patterns(one, x), all_patterns(two, x), all_patterns(one, x)) < 1e-5


class Pair(nn.Module):
    """Gives what it was given, too, as it was before rows left inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.two(self.one(x)), x


class Pairs(nn.Module):
    """Nobody reads what the first pair was given. The second remembers the number of rows across a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), Pair(), Pair()
        self.middle, self.classifier = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(self.entry(x))
        rows = len(x)
        x, _ = self.last(self.middle(x).view(rows, 8, 16, 16))
        return self.classifier(x.view(rows, 8, 16, 16).mean((2, 3)))


def test_a_module_may_return_what_it_was_given_before_rows_left_inside_of_it():
    model = early(Pairs(), ["first.one", "middle"])
    assert model.plan.cuts[1].steps
    assert all_patterns(model, torch.randn(12, *SIZE)) < 1e-5


# ---------------------------------------------------------------------------------------------------- what is refused


def leave(model: ptee.EarlyExitModel, x: Tensor) -> Tensor:
    """Predict with every second row leaving at the last exit."""
    t = torch.full((len(x), len(model.exits)), 2.0)
    t[::2, -1] = 0.0
    return model.predict(x, t).logits


def test_a_module_that_is_replaced_after_augment_is_noticed(net):
    model = early(net, ["cells.1", "cells.4"])
    net.cells[2] = Cell().eval()
    with pytest.raises(PteeError, match=r"cells\.2 ran 0 times before an exit, 1 times when"):
        leave(model, torch.randn(4, *SIZE))


class Either(Cells):
    """Large images go through another entry module."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows, entry = len(x), self.entry if x.shape[-1] <= 16 else self.large
        before = x = entry(x)
        for cell in self.cells:
            before, x = x, cell(x, before).view(rows, *x.shape[1:])
        return self.classifier(x.mean((2, 3)))


def test_another_way_through_the_backbone_is_noticed():
    model = early(Either())
    with pytest.raises(PteeError, match=r"entry ran 0 times.*another way"):
        leave(model, torch.randn(4, 3, 32, 32))


class Chunks(Cells):
    """Splits a large batch into parts."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(Chunks, self).forward(part) for part in x.split(8)])


def test_a_backbone_that_splits_its_batch_is_noticed():
    model = early(Chunks())
    leave(model, torch.randn(8, *SIZE))
    with pytest.raises(PteeError, match=r"smaller batches|another way"):
        leave(model, torch.randn(12, *SIZE))


def test_a_cell_that_fails_its_check_gets_no_exit(net, monkeypatch):
    monkeypatch.setattr(
        "ptee.exits.placement.verify_cut_points", lambda _module, cuts, _size: {cut.name: "off" for cut in cuts}
    )
    with pytest.raises(PteeError, match=r"cells\.1.*fails its check: off"):
        early(net, ["cells.1"])


class Positions(nn.Module):
    """Returns tokens, and the positions of the tokens, which are the same for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return tokens, torch.arange(tokens.shape[1]).expand(len(x), -1)


class Turned(nn.Module):
    """Every block reads an embedding of the positions that was computed once."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.classifier = Positions(), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, positions = self.patches(x)
        turn = (positions[..., None] * torch.arange(1, 9)).cos()
        for block in self.blocks:
            x = x + block(x * turn)
        return self.classifier(x.mean(1))


def test_tensors_that_are_the_same_for_every_row_get_fewer_rows_too():
    model, x = leaving(early(Turned(), ["patches", "blocks.0", "blocks.2"]))
    assert [cut.steps[0].repeated for cut in model.plan.cuts] == [(1,)] * 3
    assert torch.allclose(model(x), torch.cat([model(image[None]) for image in x]), atol=1e-5)


class Outside(Cells):
    """Computes outside of modules, where no output can be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        before = x = torch.nn.functional.conv2d(self.entry(x), self.weight, padding=1)
        for cell in self.cells:
            before, x = x, cell(x, before)
        return self.classifier(x.mean((2, 3)))


def test_an_exit_is_refused_if_much_work_would_be_done_twice():
    with pytest.raises(PteeError, match=r"of its work lies outside of modules and would be done twice"):
        early(Outside(), ["cells.1"])


# ---------------------------------------------------------------------------------------------------- the cache alone


def test_rows_are_taken_with_all_of_their_folded_tokens():
    x = torch.arange(12).view(6, 2)  # three rows of two tokens each
    assert take(x, torch.tensor([2, 0]), 3).tolist() == [[8, 9], [10, 11], [0, 1], [2, 3]]


def test_merged_steps_keep_what_any_cut_needs():
    one, other = Step("a", (0,), False, True, (1, 2)), Step("a", (0, 1), True, False, (2,))
    assert merged([[one], [other]]) == {"a": Step("a", (0, 1), True, True, (2,))}


def test_a_tensor_that_does_not_carry_the_rows_is_refused():
    with pytest.raises(PteeError, match=r"shape \(5, 2\) does not carry the 3 rows"):
        take(torch.zeros(5, 2), torch.tensor([0]), 3)


def seen_in_two_passes(step: Step, staying: int, add: float = 0.0) -> list[Tensor]:
    """What a cached module returns in a pass over rows 1 and 2, and in the next pass, in which one row stays."""
    module, rows, seen = nn.Identity(), ActiveRows(2), []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(module(x.clone()).add_(add))
            if len(seen) == 1:
                rows.keep(torch.tensor([staying]))
                raise RestartForward
            return seen[-1]

    make_cached([module])
    run(Net(), torch.tensor([[1.0], [2.0]]), ReplayCache({module: step}, rows))
    undo_cached([module])
    assert "forward" not in vars(module)
    return [z.tolist() for z in seen]


@pytest.mark.parametrize("needed", [True, False])
def test_only_the_shape_of_an_output_that_is_not_read_again_is_kept(needed):
    assert seen_in_two_passes(Step("m", (0,), needed, False), 1)[1] == ([[2.0]] if needed else [[0.0]])


def test_an_output_that_is_overwritten_later_is_kept_as_it_was():
    assert seen_in_two_passes(Step("m", (0,), True, True), 0, add=1) == [[[2.0], [3.0]], [[2.0]]]


def test_the_plan_says_at_which_exits_a_pass_starts_again(net):
    plan = early(net).plan
    assert "When rows leave at exit 0, 1, 2, the forward pass starts again" in str(plan)
    assert [row["restarts"] for row in plan.to_dict()["exits"]] == [True] * 3


# ---------------------------------------------------------------------------------------------------- the rows that are left


def test_at_the_start_all_rows_are_left_and_nothing_is_copied():
    rows, x = ActiveRows(3), torch.randn(3, 2)
    assert (rows.count, rows.moment, rows.since()) == (3, 0, None)
    assert rows.select(x) is x


@given(st.integers(1, 12), st.lists(st.integers(0, 2**12), max_size=4))
def test_the_rows_that_are_left_are_taken_from_a_tensor_of_any_earlier_moment(batch, departures):
    rows, left = ActiveRows(batch), torch.arange(batch)
    moments = [(rows.moment, left)]
    for bits in departures:
        staying = torch.tensor([i for i in range(len(left)) if bits >> i & 1], dtype=torch.long)
        rows.keep(staying)
        left = left[staying]
        moments.append((rows.moment, left))
    assert rows.count == len(left)
    for moment, then in moments:
        assert rows.select(then, moment).tolist() == left.tolist()
        assert rows.since(moment) is None or then[rows.since(moment)].tolist() == left.tolist()
