from __future__ import annotations

import copy
import functools
import json
import math
import re

import pytest
import torch
from device import seeded
from small import blend_for
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.macs import count
from ptee.backbones.load import load_backbone
from ptee.evaluation.comparison import _interval, compare
from ptee.evaluation.comparison_table import Comparison, Entry, Line
from ptee.exits.front import named_front
from ptee.model.build import build
from ptee.tuning.targets import curves
from ptee.tuning.traces import record

SIZE, K, N = (3, 8, 8), 4, 80
DROPS = (0.0, 0.2)


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    stages = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(6, K))


def made(seed: int = 0) -> ptee.EarlyExitModel:
    """Exits on a copy of one backbone. The seed decides the heads."""
    backbone = copy.deepcopy(network())  # its first call sets a seed, too
    torch.manual_seed(seed)
    model = ptee.augment(backbone, exits=["0", "2"], input_size=SIZE)
    with torch.no_grad():
        for p in model.heads.parameters():
            p += torch.randn_like(p)
    return model


def small(classes: int = K, channels: int = 3) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(channels, 2, 3, 2), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, classes)
    )


def images(seed: int, labels: bool = True) -> TensorDataset:
    """Labels that are mostly the backbone's answers."""
    generator = seeded(seed)
    x = torch.randn(N, *SIZE, generator=generator) * torch.linspace(0.2, 2, N)[:, None, None, None]
    with torch.no_grad():
        y = network().eval()(x).argmax(1)
    noise = torch.rand(N, generator=generator) < 0.2
    y = torch.where(noise, torch.randint(K, (N,), generator=generator), y)
    return TensorDataset(x, y) if labels else TensorDataset(x)


OWN = {"lines": ["own"], "drops": [0.1], "progress": False}  # which takes a tenth of the time


def compared(**arguments) -> Comparison:
    arguments = {"static": {"small": small()}, "drops": DROPS, "progress": False} | arguments
    return compare({"one": made(1), "two": made(2)}, images(1), images(2), **arguments)


@functools.cache
def usual() -> Comparison:
    return compared()


def line(found: Comparison, name: str) -> Line:
    return next(each for each in found.lines if each.name == name)


# ---------------------------------------------------------------------------------------------------- the numbers


def test_there_is_a_line_for_each_confidence_and_each_alternative():
    found = usual()
    names = [each.name for each in found.lines]
    for run in ("one", "two"):
        ways = ("", ", blended", ", one T", ", max probability", ", entropy (BranchyNet)", ", patience", ", oracle")
        assert [name for name in names if name.startswith(run)][:7] == [f"{run}{way}" for way in ways]
        assert any(name.startswith(f"{run}, truncation at exit") for name in names)
    assert names[-3:] == ["small", "small, then Sequential", "small, then Sequential, blended"]
    several, alone = [("one", "one, blended", *names[-2:]), ("one, oracle", "small")]
    assert all(len(line(found, name).entries) == len(DROPS) for name in several)
    assert all(len(line(found, name).entries) == 1 for name in alone)


def answered(model: ptee.EarlyExitModel, entry: Entry, data: TensorDataset) -> tuple[float, float]:
    """Mean cost and drop when the model is run."""
    x, y = data.tensors
    model.threshold, model.off = entry.threshold, entry.off
    out = model.predict(x)
    bare = model.backbone(x).argmax(1)
    drop = (bare == y).double().mean() - (out.logits.argmax(1) == y).double().mean()
    return out.cost.mean().item(), drop.item()


def test_every_number_of_a_run_is_what_running_it_gives():
    found = usual()
    for name, seed in (("one", 1), ("one, one T", 1), ("two", 2)):
        for entry in line(found, name).entries:
            cost, drop = answered(made(seed), entry, images(2))
            assert cost == pytest.approx(entry.cost)
            assert drop == pytest.approx(entry.drop)
            assert answered(made(seed), entry, images(1))[1] == pytest.approx(entry.drop_in_calibration)


def test_a_static_network_that_knows_its_classes_in_another_order_is_named():
    def beside(order: list[int]) -> str:
        net = copy.deepcopy(network())
        with torch.no_grad():
            for values in net[-1].parameters():
                values.copy_(values[order])
        return compare({"one": made(1)}, images(1), images(2), static={"twin": net}, **OWN).seen

    used = network().eval()(images(2).tensors[0]).argmax(1).bincount(minlength=K).argsort(descending=True).tolist()
    order = [*range(K)]
    order[used[0]], order[used[1]] = used[1], used[0]
    assert "another order" not in beside([*range(K)])
    assert re.search(r"^twin .*: it may know its classes in another order\. Give one that knows", beside(order))


def test_a_static_network_has_the_drop_and_the_cost_of_running_it_alone():
    (entry,) = line(usual(), "small").entries
    (x, y), net = images(2).tensors, small().eval()
    with torch.no_grad():
        own, bare = net(x).argmax(1), network().eval()(x).argmax(1)
    assert entry.drop == pytest.approx(((bare == y).double().mean() - (own == y).double().mean()).item())
    assert entry.cost == pytest.approx(count(net, x[:1]).total / count(network(), x[:1]).total)


def test_a_cascade_is_a_model_with_that_network_in_front_and_maximum_probability_as_confidence():
    backbone = load_backbone(copy.deepcopy(network()), input_size=SIZE)
    model = build(backbone, exits=["input"], head="front", front=named_front(small(), backbone))
    there, here = (record(model, images(seed), progress=False).under("max_prob") for seed in (1, 2))
    entries = line(usual(), "small, then Sequential").entries
    for entry, solution in zip(entries, curves(there, DROPS)["own"], strict=True):
        score = solution.on(here)
        assert entry.threshold == pytest.approx(solution.threshold)
        assert entry.drop == pytest.approx(here.score_at(1).accuracy - score.accuracy)
        assert entry.cost == pytest.approx(score.cost, rel=0.02)  # a front network also has a small layer for h

    own = compare({"it": model}, images(1), images(2), drops=DROPS, progress=False)
    numbers = [(e.drop, pytest.approx(e.cost, rel=0.02)) for e in entries]
    assert [(e.drop, e.cost) for e in line(own, "it, max probability").entries] == numbers


def test_the_oracle_loses_nothing_and_with_truncation_every_image_leaves_at_one_exit():
    found = usual()
    assert line(found, "one, oracle").entries[0].drop == 0
    model, (x, y) = made(1), images(2).tensors
    for each in found.lines:
        if each.kind == "truncation" and each.name.startswith("one"):
            n = int(each.name[-1])
            model.off = [m for m in range(2) if m != n]
            out = model.predict(x, 0)
            right = (out.logits.argmax(1) == y).double().mean()
            drop = (model.backbone(x).argmax(1) == y).double().mean() - right
            assert (each.entries[0].cost, each.entries[0].drop) == pytest.approx((out.cost.mean().item(), drop.item()))


def test_on_the_images_that_thresholds_are_chosen_on_a_larger_drop_costs_less_and_no_drop_is_exceeded():
    found = compare({"one": made(1)}, images(1), images(1), static={"small": small()}, drops=DROPS, progress=False)
    for each in found.lines:
        if len(each.entries) > 1:
            costs = [entry.cost for entry in each.entries]
            assert costs == sorted(costs, reverse=True)
            assert all(entry.drop <= drop + 1e-9 for entry, drop in zip(each.entries, DROPS, strict=True))


@pytest.mark.parametrize("parts", [(True, False), (False, True), (False, False)], ids=str)
def test_unless_both_parts_have_labels_every_drop_is_one_of_fidelity(parts):
    found = compare({"one": made(1)}, *map(images, (1, 2), parts), **OWN)
    assert found.accuracy is None
    assert "drop of fidelity" in found.legend
    entry, (x, *_) = line(found, "one").entries[0], images(2).tensors
    model = made(1)
    model.threshold, model.off = entry.threshold, entry.off
    other = model.predict(x).logits.argmax(1) != model.backbone(x).argmax(1)
    assert entry.drop == pytest.approx(other.double().mean().item())


@pytest.mark.parametrize("wrong", [0, 1], ids=["calibration", "report"])
def test_labels_that_are_numbered_otherwise_are_doubted_above_the_table(wrong):
    parts = [images(1), images(2)]
    x = parts[wrong].tensors[0]
    parts[wrong] = TensorDataset(x, (network()(x).argmax(1) + 1) % K)
    note = compare({"one": made()}, *parts, **OWN).note
    assert re.match(
        r"The backbone is right on 0\.0% of 80 images, .* No accuracy here says anything until they are\.$", note
    )
    assert compare({"one": made()}, images(1), images(2), **OWN).note == ""


def test_labels_that_are_not_classes_are_ignored_and_the_table_says_so():
    x, y = images(2).tensors
    found = compare({"one": made(1)}, images(1), TensorDataset(x, y + K), **OWN)
    assert found.accuracy is None
    assert "There is no accuracy for this data: the labels are 4 to 7" in str(found)


def test_the_networks_are_left_as_they_were():
    net = small().train()
    before = copy.deepcopy(net.state_dict())
    compare({"one": made(1)}, images(1), images(2), static={"small": net}, **OWN)
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


# ---------------------------------------------------------------------------------------------------- intervals


def test_every_interval_holds_its_drop():
    for each in usual().lines:
        for entry in each.entries:
            low, high = entry.interval
            assert low <= entry.drop + 1e-9
            assert entry.drop <= high + 1e-9


def test_an_interval_is_as_wide_as_the_drop_varies_from_sample_to_sample():
    losses = torch.tensor([1.0] * 100 + [-1.0] * 60 + [0.0] * 840, dtype=torch.float64)
    low, high = _interval(losses, some_leave=True)
    error = 1.96 * losses.std(correction=0).item() / math.sqrt(1000)
    assert (low, high) == pytest.approx((0.04 - error, 0.04 + error), abs=error / 8)
    low, high = _interval(losses.clamp(min=0), some_leave=True)
    assert 0 < low < 0.1 < high


@pytest.mark.parametrize("expected", [3.5, 4, 5, 7.3, 10, 20])
def test_an_interval_holds_the_truth_as_often_as_it_says_where_little_is_lost(expected):
    n, shown = 2000, 60
    truth = expected / n
    lost = [torch.cat([torch.ones(k), torch.zeros(n - k)]).double() for k in range(shown)]
    chance = torch.distributions.Binomial(n, torch.tensor(truth)).log_prob(torch.arange(shown).float()).exp()
    held = [low <= truth <= high for low, high in (_interval(each, some_leave=True) for each in lost)]
    assert chance[torch.tensor(held)].sum() > 0.95 * chance.sum()


def test_an_interval_of_fidelity_does_not_reach_below_nothing_lost():
    found = compare({"it": made()}, images(1, labels=False), images(2, labels=False), drops=[0.02])
    lows = [entry.interval[0] for line in found.lines for entry in line.entries]
    assert min(lows) == 0


def test_no_loss_on_a_few_images_is_uncertain_unless_no_image_leaves():
    few, many = torch.zeros(100, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)
    low, high = _interval(few, some_leave=True)
    assert -0.05 < low < -0.01 < 0.01 < high < 0.05
    assert _interval(many, some_leave=True)[1] < high / 10
    assert _interval(few, some_leave=False) == (0, 0)
    assert _interval(few + 1, some_leave=True)[0] < 1


# ---------------------------------------------------------------------------------------------------- lines


def test_a_comparison_can_be_written_as_json():
    back = json.loads(json.dumps(usual().to_dict()))
    assert usual().to_dict() == back, "lists, which other libraries read, and no tuples"
    assert [each["name"] for each in back["lines"]] == [each.name for each in usual().lines]
    assert back["lines"][0]["entries"][0].keys() >= {"allowed", "cost", "drop", "interval", "threshold", "off"}
    assert back["verdict"] == usual().verdict


def test_a_run_gets_only_the_lines_that_are_asked_for_with_the_same_numbers():
    some = compared(lines=["max_prob", "own"], static={})
    wanted = [f"{run}{way}" for run in ("one", "two") for way in ("", ", max probability")]
    assert [each.name for each in some.lines] == wanted
    assert all(line(usual(), each.name) == each for each in some.lines)


def test_a_run_that_blends_has_the_lines_of_one_whose_exits_answer_by_themselves():
    blends, alone = made(1), made(1)
    blends.confidence = alone.confidence = "max_prob"
    blends.blend, blends.answers = blend_for(2), "blended"
    how = OWN | {"lines": ["blended", "max_prob", "entropy"]}
    own, other = (compare({"one": m}, images(1), images(2), **how) for m in (alone, blends))
    assert str(own) == str(other)


def test_drops_are_sorted_and_repeated_ones_are_dropped():
    assert compared(drops=[0.1, 0, 0.1], lines=["own"], static={}).drops == (0, 0.1)


# ---------------------------------------------------------------------------------------------------- refused


MODELS = {
    "not by name": (lambda: None, r"Give the models by name, such as \{'mine': model\}, not as NoneType"),
    "none": (dict, "There is no model to compare"),
    "another backbone": (
        lambda: {"one": made(), "two": ptee.augment(small(), exits=["0"], input_size=SIZE)},
        r"two has another backbone \(Sequential, weights .* than one \(Sequential",
    ),
    "images of another size": (
        lambda: {"one": made(), "two": ptee.augment(copy.deepcopy(network()), exits=["0"], input_size=(3, 10, 10))},
        r"^two takes images of another size than one: size \(3, 10, 10\), not \(3, 8, 8\)\. Compare",
    ),
}


@pytest.mark.parametrize(("models", "words"), MODELS.values(), ids=MODELS)
def test_models_that_cannot_be_compared_are_refused(models, words):
    with pytest.raises(PteeError, match=words):
        compare(models(), images(1), images(2))


def test_a_model_without_a_name_is_refused_in_one_line_that_says_what_to_type():
    with pytest.raises(PteeError) as refused:
        compare(made(), images(1), images(2))
    assert re.fullmatch(r"models=EarlyExitModel\(.* must be a mapping, such as \{'mine': model\}\.", str(refused.value))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"drops": [0.1, 2]}, r"drops\[1\]=2 must be below 1"),
        ({"drops": [-0.1]}, r"drops\[0\]=-0.1 must be 0 or more"),
        ({"drops": [math.nan]}, r"drops\[0\]=nan must be a finite number"),
        ({"drops": []}, r"drops=\[\] must be a list of 1 or more"),
        ({"drops": 0.01}, "drops=0.01 must be a list"),
        ({"drops": ["0.01"]}, r"drops\[0\]='0.01' must be a number"),
        ({"drops": "0.01"}, "drops='0.01' must be a list"),
        ({"static": {"s": small(classes=7)}}, "The network s has 7 classes, the backbone 4"),
        ({"static": {"s": "resnet81"}}, "Unknown model 'resnet81'"),
        ({"lines": ["learnt"]}, "Unknown line 'learnt'. Did you mean 'learned'"),
        ({"lines": ["oracle"]}, r"None of the lines \(oracle\) has thresholds to choose. Add one or more of own, "),
        ({"lines": []}, r"\(none\) has"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_in_one_line(arguments, words):
    with pytest.raises(PteeError, match=words) as refused:
        compared(**arguments)
    assert "\n" not in str(refused.value)


def test_a_loader_that_shuffles_is_refused():
    with pytest.raises(PteeError, match="shuffle=False"):
        compare({"one": made()}, DataLoader(images(1), shuffle=True), images(2))


OTHERS = {
    "a run": lambda **data: compare({"one": made(), "two": made(1)}, **OWN | data),
    "a network": lambda **data: compare({"one": made()}, static={"s": small()}, **OWN | data),
}
each_other = pytest.mark.parametrize("compare_with", OTHERS.values(), ids=OTHERS)


@each_other
def test_data_in_another_order_each_time_is_refused(compare_with):
    sampler = BatchSampler(RandomSampler(images(1), generator=seeded()), 8, drop_last=False)
    with pytest.raises(PteeError, match="another order, each time"):
        compare_with(calibration=images(2), report=DataLoader(images(1), batch_sampler=sampler))


class Passes(Dataset):
    """Images that are changed in each pass."""

    def __init__(self, data: TensorDataset, change) -> None:
        self.data, self.change, self.passes = data, change, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, n: int):
        self.passes += n == 0
        x, y = self.data[n]
        return self.change(x, self.passes), y


@each_other
def test_images_that_a_decoder_rounds_differently_each_time_are_accepted(compare_with):
    data = Passes(images(1), lambda x, passes: x + 0.001 * passes)
    assert compare_with(calibration=images(2), report=data).lines
    assert data.passes == 2


@each_other
def test_images_that_are_changed_at_random_are_refused(compare_with):
    data = Passes(images(1), lambda x, passes: x.flip(-1) if passes > 1 else x)
    with pytest.raises(PteeError, match="without random transforms"):
        compare_with(calibration=images(2), report=data)


class Fewer(IterableDataset):
    """A set of unknown size that gives half as many images the second time."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.number = data, 2 * len(data)

    def __iter__(self):
        self.number //= 2
        return (self.data[n] for n in range(self.number))


@pytest.mark.parametrize("batch", [4, 32])
@each_other
def test_data_that_gives_fewer_images_the_second_time_is_refused(compare_with, batch):
    with pytest.raises(PteeError, match="other images"):
        compare_with(calibration=images(2), report=DataLoader(Fewer(images(1)), batch_size=batch))


def test_neither_a_loader_nor_the_order_of_the_images_matters():
    mixed = [part[torch.randperm(N, generator=seeded(0))] for part in images(2).tensors]
    found = [
        OTHERS["a network"](calibration=images(1), report=data, batch_size=size).lines
        for data, size in ((images(2), 128), (TensorDataset(*mixed), 13), (DataLoader(images(2), 32), 1))
    ]
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert one.entries[0].drop == pytest.approx(other.entries[0].drop)
            assert one.entries[0].cost == pytest.approx(other.entries[0].cost)


def test_report_images_that_are_calibration_images_too_are_told_of(recwarn):
    both = ConcatDataset([Subset(images(1), range(30)), images(2)])
    with pytest.warns(
        UserWarning, match=r"^30 of the 110 report images are calibration images, too, so numbers may be better"
    ):
        compare({"one": made(1)}, images(1), both, **OWN)
    compare({"one": made(1)}, images(1), images(2), **OWN)
    assert not any("calibration images, too" in str(warning.message) for warning in recwarn)
