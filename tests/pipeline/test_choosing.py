"""Exits chosen with images: the place where the class is decided is found, and its cost is what the solver says."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ptee
from ptee._common.errors import CutError, DataError, PteeError
from ptee.evaluation.targets import solve
from ptee.evaluation.traces import Traces
from ptee.exits.placement import PLACEMENTS
from ptee.pipeline import choosing
from ptee.pipeline.choosing import choose_exits, exchanged, grown

SIZE, K, N = (1, 8, 8), 2, 800
DROP = 0.001  # none of the answers: where nothing is known, some are right by chance
LEVELS = 4 * torch.arange(1.0, K + 1)


def same(inputs: int, signs: Tensor) -> nn.Conv2d:
    """A convolution that gives each channel as it was, times a sign."""
    conv = nn.Conv2d(inputs, len(signs), 3, padding=1, bias=False)
    nn.init.zeros_(conv.weight)
    for channel, sign in enumerate(signs):
        conv.weight.data[channel, channel % inputs, 1, 1] = sign
    return conv


def deciding() -> nn.Module:
    """The class is the size of pixels of random signs: nothing tells it in the mean until one layer makes them positive."""
    one, turned = torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    layers = OrderedDict(stem=same(1, one), plain=same(4, one), decides=same(4, turned), relu=nn.ReLU())
    for name in ("rest1", "rest2", "rest3"):
        layers |= {name: same(4, one), f"{name}_relu": nn.ReLU()}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(4, K)}
    with torch.no_grad():  # the nearest level; each channel has half of the pixels
        layers["fc"].weight.copy_(LEVELS[:, None].expand(K, 4))
        layers["fc"].bias.copy_(-(LEVELS**2))
    return nn.Sequential(layers).eval()


def images(n: int = N) -> TensorDataset:
    lots = torch.Generator().manual_seed(1)
    level = LEVELS[torch.randint(K, (n,), generator=lots)] + 0.4 * torch.rand(n, generator=lots) - 0.2
    signs = torch.randint(2, (n, *SIZE), generator=lots) * 2 - 1
    return TensorDataset(signs * level[:, None, None, None])


def chosen(net: nn.Module | None = None, **wish) -> choosing.Choice:
    wish = {"head": "pool", "max_drop": DROP, "input_size": SIZE, "device": "cpu"} | wish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "UPDATES", 80)  # probes of four numbers need few
        return choose_exits(net or deciding(), images(), **wish)


@pytest.fixture(scope="module")
def found() -> choosing.Choice:
    return chosen()


def test_the_one_layer_that_decides_is_found_and_nothing_behind_it_is_taken(found):
    assert found.modules == ["relu"]
    assert found.rows[0].cost == pytest.approx(found.rows[0].backbone_costs[0], abs=0.01)
    assert all(found.rows[0].cost <= row.cost for row in found.rows)


def test_every_rule_stands_beside_it_with_as_many_exits(found):
    assert [row.rule for row in found.rows] == ["auto", *PLACEMENTS]
    assert {len(row.modules) for row in found.rows} == {len(found.modules)}
    text = str(found)
    assert "judged as linear ones" not in text
    assert all(rule in text for rule in ("auto", *PLACEMENTS))
    assert "600 images, held against 200 others" in text
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_the_same_seed_chooses_the_same_whatever_numbers_were_drawn_before(found):
    torch.manual_seed(99)
    assert chosen(seed=0) == found


@pytest.mark.parametrize("wish", [{"head": "pool"}, {"head": "auto", "head_budget": 0.5}], ids=lambda w: w["head"])
def test_its_costs_are_what_the_solver_says_of_the_probes_with_the_prices_of_a_plan(wish, monkeypatch):
    kept: list[Traces] = []
    probed = choosing._probed
    monkeypatch.setattr(choosing, "_probed", lambda *a: kept.append(probed(*a)) or kept[0])
    monkeypatch.setattr(choosing, "LEAST_GAIN", -1.0)  # several exits, pay or not
    found = chosen(num_exits=2, **wish)
    names = ["plain", "relu", "rest1_relu", "rest2_relu"]  # behind the last nothing is left to save
    for row in found.rows:
        plan = ptee.plan(deciding(), exits=row.modules, input_size=SIZE, **wish)
        assert tuple(e.head for e in plan.exits) == row.heads
        here = [*(names.index(name) for name in row.modules), len(names)]
        traces = Traces(
            kept[0].answers[here],
            kept[0].confidence[here],
            None,
            torch.tensor(plan.costs, dtype=torch.float64),
            kept[0].sample,
            head_costs=torch.tensor([e.head_cost for e in plan.exits], dtype=torch.float64),
            linked=torch.tensor(plan.looks_back),
        )
        assert row.cost == pytest.approx(solve(traces, max_fidelity_drop=DROP).cost)


def test_the_probes_answer_images_that_they_have_not_learnt(monkeypatch):
    drawn = {}
    monkeypatch.setattr(choosing, "_recorded", lambda model, held, *rest: drawn.update(held=held) or 1 / 0)
    monkeypatch.setattr(choosing, "train", lambda model, learnt, **wish: drawn.update(learnt=learnt))
    with pytest.raises(ZeroDivisionError):
        chosen(images=100)
    learnt, held = set(drawn["learnt"].indices), set(drawn["held"].indices)
    assert not learnt & held
    assert (len(learnt), len(held)) == (75, 25)


def test_the_network_comes_back_as_it_was():
    net = deciding().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    chosen(net)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_where_nothing_pays_that_is_said_and_that_such_heads_are_more_than_the_probes():
    found = chosen(head="conv9")
    assert "priced as they are and judged as linear ones" in str(found)
    assert found.rows[0].cost == pytest.approx(1)
    assert "no exit pays at a drop of 0.001" in str(found)


def test_its_exits_are_taken_by_augment(found):
    model = ptee.augment(deciding(), exits=found.modules, input_size=SIZE)
    assert [e.name for e in model.exits] == ["relu"]


# the search


def cost_of(table: dict[tuple[int, ...], float]):
    return lambda chosen: (table.get(chosen, 0.9), 0.0)


def test_an_exit_more_is_taken_while_it_spares_something():
    rank = cost_of({(1,): 0.6, (1, 3): 0.5, (0, 1, 3): 0.4999})
    assert grown(rank, 4, 4) == [(1,), (1, 3)]


def test_no_more_are_taken_than_are_allowed_or_there():
    rank = lambda chosen: (1 - 0.1 * len(chosen), 0.0)  # noqa: E731
    assert [len(s) for s in grown(rank, 4, 2)] == [1, 2]
    assert [len(s) for s in grown(rank, 3, 3)] == [1, 2, 3]


def test_the_best_single_place_makes_way_for_a_better_pair():
    rank = cost_of({(1,): 0.6, (1, 2): 0.55, (0, 2): 0.5})
    assert grown(rank, 3, 2) == [(1,), (0, 2)]


def test_an_exchange_goes_on_until_none_is_better():
    assert exchanged(lambda s: (float(abs(s[0] - 6) + abs(s[1] - 8)), 0.0), (0, 1), 10) == (6, 8)


# what is refused

MISTAKES = {
    "no exits": ({"num_exits": 0}, CutError, "Cannot choose 0 exits"),
    "half an exit": ({"num_exits": 2.5}, CutError, "2.5 exits"),
    "several heads": ({"head": ["pool", "conv1"]}, PteeError, "2 values of head.*Give one"),
    "several budgets": ({"head": "auto", "head_budget": [0.1, 0.2]}, PteeError, "2 values of head budget"),
    "an unknown head": ({"head": "poool"}, PteeError, "poool.*Did you mean 'pool'"),
    "a budget for a head of one size": ({"head_budget": 0.1}, PteeError, "heads are pool"),
    "a drop above all": ({"max_drop": 2}, PteeError, "is 2: give a fraction"),
    "too few images wished for": ({"images": 3}, PteeError, "3 images: give a whole number, 20 or more"),
    "a seed below 0": ({"seed": -1}, PteeError, "seed -1"),
}


@pytest.mark.parametrize(("wish", "kind", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_before_any_probe_learns(wish, kind, said, monkeypatch):
    monkeypatch.setattr(choosing, "train", None)
    with pytest.raises(kind, match=said) as error:
        chosen(**wish)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [(images(7), "7 images: 20"), (DataLoader(images(), 8), "DataLoader: pass its data set"), ("digits", "a str")],
    ids=["too few", "a loader", "a name"],
)
def test_data_that_nothing_can_be_drawn_from_is_refused(data, said):
    with pytest.raises(DataError, match=said):
        choose_exits(deciding(), data, input_size=SIZE)


@pytest.mark.parametrize("make", [ptee.plan, ptee.augment], ids=lambda f: f.__name__)
def test_without_images_nothing_can_be_chosen(make):
    with pytest.raises(
        CutError, match=r"chosen with images.*ptee augment --exits auto --data.*ptee.choose_exits.*pareto"
    ):
        make(deciding(), exits="auto", input_size=SIZE)
