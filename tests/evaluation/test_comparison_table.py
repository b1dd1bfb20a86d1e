"""Runs of one backbone beside each other, beside smaller networks and the cut-off backbone."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptee.pipeline.asked import named_networks, names_of
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import ptee
from ptee._common.errors import PteeError, UnknownName
from ptee.analysis.macs import count
from ptee.backbones.load import load_backbone
from ptee.cli.main import cli
from ptee.evaluation.comparison import LINES, compare
from ptee.evaluation.comparison_table import Comparison, Entry, Line
from ptee.evaluation.targets import curve, lost
from ptee.evaluation.traces import record
from ptee.exits.confidence import CONFIDENCES
from ptee.exits.front import named_front
from ptee.model.build import build

SIZE, K, N = (3, 8, 8), 4, 80
DROPS = (0.0, 0.1, 0.3)


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    stages = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(6, K))


def made(seed: int = 0) -> ptee.EarlyExitModel:
    """Exits on a copy of one backbone, whose heads differ from row to row and from seed to seed."""
    backbone = copy.deepcopy(network())  # which sets a seed of its own, the first time
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
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, *SIZE, generator=generator) * torch.linspace(0.2, 2, N)[:, None, None, None]
    with torch.no_grad():
        y = network().eval()(x).argmax(1)
    noise = torch.rand(N, generator=generator) < 0.2
    y = torch.where(noise, torch.randint(K, (N,), generator=generator), y)
    return TensorDataset(x, y) if labels else TensorDataset(x)


@functools.cache
def usual() -> Comparison:
    return compared(drops=DROPS)


def compared(**wish) -> Comparison:
    if not wish:
        return usual()
    wish = {"static": {"small": small()}, "drops": DROPS, "progress": False} | wish
    return compare({"one": made(1), "two": made(2)}, images(1), images(2), **wish)


def line(found: Comparison, name: str) -> Line:
    return next(each for each in found.lines if each.name == name)


# ---------------------------------------------------------------------------------------------------- the figures


def test_there_is_a_line_for_each_way_to_decide_and_for_what_could_be_taken_instead():
    found = compared()
    names = [each.name for each in found.lines]
    for run in ("one", "two"):
        ways = ("", ", one T", ", max probability", ", entropy (BranchyNet)", ", patience", ", oracle")
        assert [name for name in names if name.startswith(run)][:6] == [f"{run}{way}" for way in ways]
        assert any(name.startswith(f"{run}, truncation at exit") for name in names)
    assert names[-2:] == ["small", "small, then Sequential"]
    assert [len(line(found, name).entries) for name in ("one", "one, oracle", "small", names[-1])] == [
        len(DROPS),
        1,
        1,
        len(DROPS),
    ]


def answered(model: ptee.EarlyExitModel, entry: Entry, data: TensorDataset) -> tuple[float, float]:
    """Mean cost and drop when the model is run."""
    x, y = data.tensors
    model.threshold, model.off = entry.threshold, entry.off
    out = model.predict(x)
    bare = model.backbone(x).argmax(1)
    drop = (bare == y).double().mean() - (out.logits.argmax(1) == y).double().mean()
    return out.cost.mean().item(), drop.item()


def test_every_figure_of_a_run_is_what_running_it_gives():
    found = compared()
    for name, seed in (("one", 1), ("one, one T", 1), ("two", 2)):
        for entry in line(found, name).entries:
            cost, drop = answered(made(seed), entry, images(2))
            assert cost == pytest.approx(entry.cost)
            assert drop == pytest.approx(entry.drop)
            assert answered(made(seed), entry, images(1))[1] == pytest.approx(entry.drop_in_calibration)


def calibrated() -> ptee.EarlyExitModel:
    model = made(1)
    ptee.calibrate(model, images(3))
    return model


@pytest.mark.parametrize("name", CONFIDENCES)
def test_the_line_of_a_confidence_is_what_running_the_model_with_it_gives(name):
    model = calibrated()
    model.confidence = "learned" if name != "learned" else "margin"
    found = compare({"one": model}, images(1), images(2), drops=DROPS, lines=[name])
    model.confidence = name
    for entry in found.lines[0].entries:
        cost, drop = answered(model, entry, images(2))
        assert (cost, drop) == (pytest.approx(entry.cost), pytest.approx(entry.drop))


def test_a_runs_own_confidence_is_its_first_line_and_is_not_shown_twice():
    model = made(1)
    model.confidence = "entropy"
    found = compare({"one": model}, images(1), images(2), drops=DROPS, lines=["own", "entropy", "max_prob"])
    assert [each.name for each in found.lines] == ["one", "one, max probability"]
    for entry in found.lines[0].entries:
        assert answered(model, entry, images(2)) == (pytest.approx(entry.cost), pytest.approx(entry.drop))


def test_calibrated_is_refused_for_runs_that_are_not_before_they_answer_anything(monkeypatch):
    monkeypatch.setattr("ptee.evaluation.comparison.record", None)
    with pytest.raises(PteeError, match="'calibrated' has not been fitted"):
        compared(lines=["own", "calibrated"])


def test_a_static_network_is_what_it_answers_and_costs_alone():
    (entry,) = line(compared(), "small").entries
    (x, y), net = images(2).tensors, small().eval()
    with torch.no_grad():
        own, bare = net(x).argmax(1), network().eval()(x).argmax(1)
    assert entry.drop == pytest.approx(((bare == y).double().mean() - (own == y).double().mean()).item())
    assert entry.cost == pytest.approx(count(net, x[:1]).total / count(network(), x[:1]).total)


def test_the_cascade_is_a_model_with_that_network_in_front_under_maximum_probability():
    backbone = load_backbone(copy.deepcopy(network()), input_size=SIZE)
    model = build(backbone, exits=["input"], head="front", front=named_front(small(), backbone))
    there, here = (record(model, images(seed), progress=False).under("max_prob") for seed in (1, 2))
    entries = line(compared(), "small, then Sequential").entries
    for entry, solution in zip(entries, curve(there, DROPS, margin="auto"), strict=True):
        score = solution.on(here)
        assert entry.threshold == pytest.approx(solution.threshold)
        assert entry.drop == pytest.approx(lost(score, here.score(here.at(1))))
        assert entry.cost == pytest.approx(score.cost, rel=0.02)  # a front network has a small layer for h besides

    own = compare({"it": model}, images(1), images(2), drops=DROPS, progress=False)
    figures = [(e.drop, pytest.approx(e.cost, rel=0.02)) for e in entries]
    assert [(e.drop, e.cost) for e in line(own, "it, max probability").entries] == figures


def test_the_oracle_loses_nothing_and_truncation_is_everybody_at_one_exit():
    found = compared()
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


def test_on_the_images_that_thresholds_are_chosen_on_more_drop_costs_less_and_none_is_exceeded():
    found = compare({"one": made(1)}, images(1), images(1), static={"small": small()}, drops=DROPS, progress=False)
    for each in found.lines:
        if len(each.entries) > 1:
            costs = [entry.cost for entry in each.entries]
            assert costs == sorted(costs, reverse=True)
            assert all(entry.drop <= drop + 1e-9 for entry, drop in zip(each.entries, DROPS, strict=True))


@pytest.mark.parametrize("parts", [(True, False), (False, True), (False, False)], ids=str)
def test_without_labels_in_both_parts_every_drop_is_one_of_fidelity(parts):
    found = compare({"one": made(1)}, *map(images, (1, 2), parts), drops=[0.1], progress=False)
    assert found.accuracy is None
    assert "drop of fidelity" in str(found)
    entry, (x, *_) = line(found, "one").entries[0], images(2).tensors
    model = made(1)
    model.threshold, model.off = entry.threshold, entry.off
    other = model.predict(x).logits.argmax(1) != model.backbone(x).argmax(1)
    assert entry.drop == pytest.approx(other.double().mean().item())


def test_labels_that_are_no_classes_are_none_and_it_says_so():
    x, y = images(2).tensors
    found = compare({"one": made(1)}, images(1), TensorDataset(x, y + K), drops=[0.1], progress=False)
    assert found.accuracy is None
    assert "There is no accuracy for this data: its labels are 4 to 7" in str(found)


def test_the_networks_are_left_as_they_were():
    net = small().train()
    before = copy.deepcopy(net.state_dict())
    compare({"one": made(1)}, images(1), images(2), static={"small": net}, drops=[0.1], progress=False)
    assert net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


# ---------------------------------------------------------------------------------------------------- how sure it is


def test_an_interval_holds_its_drop_and_is_the_same_each_time():
    found, again = compared(), compared()
    assert found == again
    for each in found.lines:
        for entry in each.entries:
            low, high = entry.interval
            assert low <= entry.drop + 1e-9
            assert entry.drop <= high + 1e-9


def test_an_interval_is_as_wide_as_the_drop_varies_from_sample_to_sample():
    from ptee.evaluation.comparison import _interval

    losses = torch.tensor([1.0] * 100 + [-1.0] * 60 + [0.0] * 840, dtype=torch.float64)
    low, high = _interval(losses, some_leave=True)
    error = 1.96 * losses.std(correction=0).item() / math.sqrt(1000)
    assert (low, high) == pytest.approx((0.04 - error, 0.04 + error), abs=error / 8)
    low, high = _interval(losses.clamp(min=0), some_leave=True)
    assert 0 < low < 0.1 < high


def test_that_nothing_was_lost_on_a_few_images_is_no_certainty_but_where_nobody_leaves():
    from ptee.evaluation.comparison import _interval

    few, many = torch.zeros(100, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)
    low, high = _interval(few, some_leave=True)
    assert -0.05 < low < -0.01 < 0.01 < high < 0.05
    assert _interval(many, some_leave=True)[1] < high / 10
    assert _interval(few, some_leave=False) == (0, 0)
    assert _interval(few + 1, some_leave=True)[0] < 1


# ---------------------------------------------------------------------------------------------------- in words


def entry(cost: float, drop: float, allowed: float | None = None, there: float = 0.0) -> Entry:
    return Entry(allowed, cost, drop, (drop - 0.01, drop + 0.01), there)


def said(*lines: Line) -> str:
    return Comparison("net", (0.01,), lines, 10, 10, 0.9).verdict[0]


OURS = Line("ours", "adaptive", (entry(0.5, 0.01, 0.01),))
ORACLE = Line("ours, oracle", "oracle", (entry(0.1, 0),))


def test_the_line_that_costs_least_within_a_drop_is_named_and_the_oracle_is_none():
    assert (
        said(OURS, ORACLE)
        == "At most 0.01 lost: ours costs least, 0.5000, losing 0.0100 (95 %: +0.0000 to +0.0200 lost)."
    )


@pytest.mark.parametrize(
    ("kind", "words"),
    [("static", "a smaller network alone"), ("cascade", "two networks"), ("truncation", "a backbone that is cut off")],
)
def test_what_beats_the_runs_is_said_in_words(kind, words):
    found = said(OURS, Line("other", kind, (entry(0.4, -0.002),)), Line("third", "static", (entry(0.45, 0),)))
    assert "other costs least, 0.4000, gaining 0.0020" in found
    assert f"That is {words}" in found
    assert "the best of which is ours (0.5000). Better than those, too: third (0.4500)." in found


@pytest.mark.parametrize("other", [entry(0.4, 0.011), entry(0.4, 0, there=0.011), entry(0.6, 0)], ids=str)
def test_what_loses_more_on_either_set_of_images_or_costs_more_beats_nothing(other):
    assert said(OURS, Line("other", "static", (other,))).startswith("At most 0.01 lost: ours costs least")


def test_where_no_run_saves_anything_it_is_said():
    nothing = Line("ours", "adaptive", (entry(1.0, 0, 0.01),))
    assert said(nothing) == "At most 0.01 lost: nothing that keeps to it costs less than the bare backbone."
    assert "none of which saves anything" in said(nothing, Line("other", "cascade", (entry(0.4, 0),)))


def test_what_costs_less_by_rounding_alone_costs_no_less():
    assert said(Line("ours", "adaptive", (entry(1 - 2**-52, 0, 0.01),))).endswith(
        "nothing that keeps to it costs less than the bare backbone."
    )


def test_it_prints_as_a_table_with_a_sentence_for_each_drop():
    found = compared()
    text = str(found).splitlines()
    assert text[0].startswith("Sequential, 80 images, accuracy ")
    assert text[1].split("  ")[-1] == "as it is"
    assert text[-len(DROPS) :] == found.verdict
    assert "chosen on 80 other images" in str(found)


def test_it_is_json_with_everything_in_it():
    found = compared(about="Random images.")
    back = json.loads(json.dumps(found.to_dict()))
    assert back["about"] == "Random images."
    assert [each["name"] for each in back["lines"]] == [each.name for each in found.lines]
    assert back["lines"][0]["entries"][0].keys() >= {"allowed", "cost", "drop", "interval", "threshold", "off"}
    assert back["verdict"] == found.verdict


def test_a_run_gets_the_lines_that_are_asked_for_and_they_are_as_before():
    every, some = compared(), compared(lines=["max_prob", "own"])
    names = [f"{run}{way}" for run in ("one", "two") for way in ("", ", max probability")]
    assert [each.name for each in some.lines] == [*names, "small", "small, then Sequential"]
    assert all(line(every, each.name) == each for each in some.lines)
    assert "Oracle" in str(every)
    assert "Oracle" not in str(some)


def test_the_command_has_every_line_where_none_is_asked_for():
    option = next(p for p in cli.commands["compare"].params if p.name == "lines")
    assert option.default.split(",") == list(LINES)


@pytest.mark.parametrize(
    ("lines", "error", "said"),
    [
        (["learnt"], UnknownName, "Unknown line 'learnt'. Did you mean 'learned'"),
        (
            ["oracle"],
            PteeError,
            r"No way to decide who leaves is among the lines \(oracle\). Add one or more of own, ",
        ),
        ([], PteeError, r"\(none\). Add"),
    ],
    ids=str,
)
def test_lines_that_say_nothing_of_a_run_are_refused(lines, error, said):
    with pytest.raises(error, match=said):
        compared(lines=lines)


def test_a_run_is_called_as_its_folder_is_also_from_within(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert names_of([".", "../other/"]) == ["mine", "other"]


def test_drops_are_sorted_and_each_is_there_once():
    assert compared(drops=[0.1, 0, 0.1]).drops == (0, 0.1)


@pytest.mark.parametrize(
    ("runs", "names"),
    [(["runs/a", "runs/b/"], ["a", "b"]), (["x/a", "y/a", "b"], ["x/a", "y/a", "b"]), (["user/run"], ["run"])],
    ids=str,
)
def test_runs_are_called_by_the_end_of_their_path_where_that_is_enough(runs, names):
    assert names_of(runs) == names


# ---------------------------------------------------------------------------------------------------- refused


def test_a_model_without_its_name_is_refused():
    with pytest.raises(PteeError, match=r"not as EarlyExitModel: give each with its name, such as \{'mine': model\}"):
        compare(made(), images(1), images(2))


def test_another_backbone_is_refused_with_both_weights():
    other = ptee.augment(small(), exits=["0"], input_size=SIZE)
    with pytest.raises(
        PteeError, match=r"two stands on another backbone \(Sequential, weights .* than one \(Sequential"
    ):
        compare({"one": made(), "two": other}, images(1), images(2))


def test_other_images_are_refused():
    other = ptee.augment(copy.deepcopy(network()), exits=["0"], input_size=(3, 10, 10))
    with pytest.raises(PteeError, match="another size, mean or deviation than one"):
        compare({"one": made(), "two": other}, images(1), images(2))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"drops": [0.1, 2]}, "A drop of 2 cannot be: give fractions"),
        ({"drops": [1]}, "A drop of 1 cannot be: give fractions of at least 0 and below 1"),
        ({"drops": [-0.1]}, "A drop of -0.1"),
        ({"drops": [math.nan]}, "A drop of nan"),
        ({"drops": []}, "No drop is given"),
        ({"drops": 0.01}, r"The drops are 0.01: give several, such as \[0, 0.01\]"),
        ({"drops": ["0.01"]}, "A drop of '0.01' cannot be"),
        ({"static": {"s": small(classes=7)}}, "The network s has 7 classes, the backbone 4"),
        ({"static": {"s": "resnet81"}}, "Unknown model 'resnet81'"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_in_one_line(wish, said):
    with pytest.raises(PteeError, match=said) as why:
        compared(**wish)
    assert "\n" not in str(why.value)


def test_a_loader_that_shuffles_is_refused():
    with pytest.raises(PteeError, match="shuffle=False"):
        compare({"one": made()}, DataLoader(images(1), shuffle=True), images(2))


@pytest.mark.parametrize("other", [{"models": {"two": made}}, {"static": {"small": small}}], ids=["a run", "a network"])
@pytest.mark.parametrize(
    "drawn",
    [
        lambda data: {"sampler": SubsetRandomSampler(range(len(data)))},
        lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 8, drop_last=False)},
    ],
    ids=["a sampler", "a sampler of batches"],
)
def test_data_that_come_in_another_order_each_time_are_refused(drawn, other):
    loader = DataLoader(images(1), **drawn(images(1)))
    models = {"one": made()} | {name: make() for name, make in other.get("models", {}).items()}
    static = {name: make() for name, make in other.get("static", {}).items()}
    with pytest.raises(PteeError, match="another order, each time"):
        compare(models, images(2), loader, static=static, drops=[0.1], progress=False)


class Passes(Dataset):
    """Images of which something is changed in each pass."""

    def __init__(self, data: TensorDataset, change) -> None:
        self.data, self.change, self.passes = data, change, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, n: int):
        self.passes += n == 0
        x, y = self.data[n]
        return self.change(x, self.passes), y


@pytest.mark.parametrize("static", [{}, {"small": small}], ids=["runs", "a network"])
def test_images_that_a_decoder_rounds_otherwise_each_time_will_do(static):
    models = {"one": made()} if static else {"one": made(), "two": made(1)}
    data = Passes(images(1), lambda x, passes: x + 0.001 * passes)
    networks = {name: make() for name, make in static.items()}
    assert compare(models, images(2), data, static=networks, drops=[0.1], progress=False).lines
    assert data.passes == 2


def test_images_that_are_changed_at_random_are_refused():
    data = Passes(images(1), lambda x, passes: x.flip(-1) if passes > 1 else x)
    with pytest.raises(PteeError, match="without random transforms"):
        compare({"one": made()}, images(2), data, static={"small": small()}, drops=[0.1], progress=False)


class Fewer(IterableDataset):
    """Images of which there are half as many the second time, in a set that does not know how many."""

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.number = data, 2 * len(data)

    def __iter__(self):
        self.number //= 2
        return (self.data[n] for n in range(self.number))


@pytest.mark.parametrize("batch", [4, 32])
def test_data_that_become_fewer_are_refused(batch):
    data = DataLoader(Fewer(images(1)), batch_size=batch)
    with pytest.raises(PteeError, match="other images"):
        compare({"one": made()}, images(2), data, static={"small": small()}, drops=[0.1], progress=False)


def test_a_loader_in_order_will_do():
    found = [compared(), compare({"one": made(1)}, DataLoader(images(1), 32), images(2), drops=DROPS, progress=False)]
    one, other = (line(each, "one").entries for each in found)
    assert [e.cost for e in one] == pytest.approx([e.cost for e in other])


def test_nothing_to_compare_is_refused():
    with pytest.raises(PteeError, match="no model"):
        compare({}, images(1), images(2))


@pytest.mark.parametrize(
    ("texts", "error", "said"),
    [
        (["cifar_resnet21"], UnknownName, "Unknown model 'cifar_resnet21'. Did you mean"),
        (["cifar_resnet20"], PteeError, "Give a file with static=cifar_resnet20=FILE."),
        (["cifar_resnet20=none.safetensors"], PteeError, "none.safetensors"),
    ],
    ids=str,
)
def test_a_network_that_the_command_cannot_have_is_refused(texts, error, said):
    with pytest.raises(error, match=said):
        named_networks(texts)


def test_weights_of_another_network_are_refused_by_the_option_that_gave_them(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(load_backbone("cifar_resnet20", pretrained=False).module.state_dict(), file)
    with pytest.raises(PteeError, match=r"is of another model.*Check static=cifar_resnet32=FILE\.$"):
        named_networks([f"cifar_resnet32={file}"])


def test_a_network_that_is_named_twice_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(load_backbone("cifar_resnet20", pretrained=False).module.state_dict(), file)
    with pytest.raises(PteeError, match="--static cifar_resnet20 is given twice"):
        named_networks([f"cifar_resnet20={file}", "cifar_resnet20=b.pth"])


def test_labels_stay_with_their_images():
    """The same in another order is the same."""
    x, y = images(2).tensors
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    mixed: tuple[Tensor, Tensor] = (x[order], y[order])
    found = [
        compare(
            {"one": made(1)}, images(1), data, static={"s": small()}, drops=[0.1], progress=False, batch_size=13
        ).lines
        for data in (images(2), TensorDataset(*mixed))
    ]
    for one, other in zip(*found, strict=True):
        assert one.entries[0].drop == pytest.approx(other.entries[0].drop)
        assert one.entries[0].cost == pytest.approx(other.entries[0].cost)


def test_the_recipes_give_mean_and_spread_of_comparisons_with_several_seeds(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "scripts" / "spread.py"
    files = [tmp_path / f"compare-{seed}.json" for seed in (0, 1)]
    for seed, file in enumerate(files):
        entries = [{"allowed": 0.01, "cost": 0.4 + 0.2 * seed, "drop": 0.01 * seed}]
        lines = [{"name": f"ours{seed}, one T", "kind": "adaptive", "entries": entries}]
        lines += [{"name": "resnet20", "kind": "static", "entries": [{"allowed": None, "cost": 0.3, "drop": 0.02}]}]
        file.write_text(json.dumps({"backbone": "b", "samples": 9, "drops": [0.01], "lines": lines}))
    done = subprocess.run([sys.executable, str(script), *map(str, files)], capture_output=True, text=True, check=True)
    assert "2 seeds" in done.stdout
    assert "ours, one T  0.5000 ± 0.1414 (+0.0050 ± 0.0071)" in done.stdout
    assert re.search(r"resnet20 +0.3000 ± 0.0000 \(\+0.0200 ± 0.0000\)", done.stdout)


def test_the_recipes_give_mean_and_spread_of_runs_with_several_seeds(tmp_path):
    script = Path(__file__).parents[2] / "recipes" / "scripts" / "means.py"
    for name, cost in {"lite0": 0.4, "lite1": 0.6, "vit0": 0.3}.items():
        (tmp_path / name).mkdir()
        rows = [{"accuracy": 0.8, "fidelity": 1.0, "cost": 1.0}, {"accuracy": 0.7, "fidelity": 0.9, "cost": cost}]
        (tmp_path / name / "metrics.json").write_text(json.dumps({"results": {"rows": rows}}))
    done = subprocess.run(
        [sys.executable, str(script), *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True, check=True
    )
    lite, vit = (line.split() for line in done.stdout.splitlines()[2:])
    assert lite[:5] == ["lite", "2", "0.5000", "±", "0.1414"]
    assert vit == ["vit", "1", "0.3000", "0.9000", "0.7000", "0.8000"]


def spread_of(folder, *comparisons):
    """What the recipe prints of comparisons with such lines: name to cost."""
    script = Path(__file__).parents[2] / "recipes" / "scripts" / "spread.py"
    for n, lines in enumerate(comparisons):
        lines = [
            {"name": name, "kind": "adaptive", "entries": [{"allowed": None, "cost": cost, "drop": 0}]}
            for name, cost in lines.items()
        ]
        (folder / f"{n}.json").write_text(json.dumps({"backbone": "b", "samples": 9, "drops": [], "lines": lines}))
    return subprocess.run(
        [sys.executable, str(script), *map(str, sorted(folder.iterdir()))], capture_output=True, text=True
    )


def test_runs_that_are_compared_twice_are_no_more_seeds(tmp_path):
    done = spread_of(tmp_path, {"ours0": 0.2, "ours1": 0.4}, {"ours0": 0.3, "ours1": 0.5, "front0": 0.1})
    assert done.stdout.startswith("b, 9 images, 2 seeds, 2 comparisons\n")
    assert re.search(r"^ours +0.3500 ± 0.1291", done.stdout, re.M)
    assert re.search(r"^front \(1 of 4\) +0.1000 \(", done.stdout, re.M)


def test_a_seed_may_have_two_digits_and_a_line_that_some_seeds_lack_says_so(tmp_path):
    done = spread_of(tmp_path, {"ours9": 0.2, "ours9, truncation at exit 1": 0.5}, {"ours10": 0.4})
    assert re.search(r"^ours +0.3000 ± 0.1414", done.stdout, re.M)
    assert re.search(r"^ours, truncation at exit 1 \(1 of 2\) +0.5000 \(", done.stdout, re.M)
