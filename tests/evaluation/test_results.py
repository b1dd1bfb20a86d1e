from __future__ import annotations

import json
import math
import re
from functools import partial

import pytest
import small
import torch
from small import SIZE, K, made
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ptee
from ptee._common.errors import DataError, DeviceError, PteeError
from ptee.evaluation import results as evaluation
from ptee.evaluation.results import Results, Row, evaluate
from ptee.evaluation.traces import Score

N = 24
labelled = partial(small.labelled, N)
NEVER, ALWAYS = 2.0, 0.0


def middle(model: ptee.EarlyExitModel) -> list[float]:
    """Thresholds that about half of the images reach at each exit."""
    with torch.no_grad():
        return model.all_exits(labelled()[0]).confidence[:-1].median(1).values.tolist()


def test_there_is_a_row_for_the_backbone_each_exit_and_the_early_exit_model():
    results = evaluate(made(), TensorDataset(*labelled()), speed=False)
    assert [(row.name, row.module) for row in results.rows] == [
        ("backbone", ""), ("exit 0", "0"), ("exit 1", "2"), ("early exit", ""),
    ]  # fmt: skip
    assert results.early_exit is results.rows[-1]
    assert results.samples == N


def test_every_figure_is_what_running_the_model_gives():
    model, (x, y) = made(), labelled()
    threshold = middle(model)
    results = evaluate(model, TensorDataset(x, y), threshold=threshold, speed=False)
    with torch.no_grad():
        bare = model.backbone(x).argmax(1)
        runs = [NEVER, [ALWAYS, NEVER], [NEVER, ALWAYS], threshold]
        outs = [model.predict(x, t) for t in runs]
    costs = [1.0, *(out.cost.mean().item() for out in outs[1:])]  # the bare backbone has no heads to pay for
    for row, out, cost in zip(results.rows, outs, costs, strict=True):
        answers = out.logits.argmax(1)
        assert row.accuracy == pytest.approx((answers == y).double().mean().item())
        assert row.fidelity == pytest.approx((answers == bare).double().mean().item())
        assert row.cost == pytest.approx(cost)
    shares = torch.bincount(outs[-1].exit_index, minlength=3) / N
    assert results.leaving == pytest.approx(shares.tolist())
    assert min(results.leaving) > 0


def test_shares_sum_to_one():
    model = made()
    for threshold in (ALWAYS, middle(model), NEVER):
        results = evaluate(model, TensorDataset(*labelled()), threshold=threshold, speed=False)
        assert sum(results.leaving) == pytest.approx(1)


def test_without_labels_accuracy_is_none_and_all_else_is_the_same():
    model, (x, y) = made(), labelled()
    with_labels = evaluate(model, TensorDataset(x, y), speed=False)
    without = evaluate(model, TensorDataset(x), speed=False)
    assert [row.accuracy for row in without.rows] == [None] * 4
    assert [(r.fidelity, r.cost) for r in without.rows] == [(r.fidelity, r.cost) for r in with_labels.rows]
    assert without.leaving == with_labels.leaving
    assert " - " in str(without)


@pytest.mark.parametrize("batch_size", [5, N])
def test_labels_that_are_no_classes_are_none_and_the_results_say_so(batch_size):
    model, (x, y) = made(), labelled()
    results = evaluate(model, TensorDataset(x, y.where(y > 0, K)), batch_size=batch_size, speed=False)
    assert results.rows == evaluate(model, TensorDataset(x), speed=False).rows
    for said in (str(results), json.dumps(results.to_dict())):
        assert f"no accuracy for this data: its labels are 1 to {K}, the backbone's classes 0 to {K - 1}." in said


@pytest.mark.parametrize("batch_size", [1, 5, 128])
@pytest.mark.parametrize("loader", [False, True], ids=["a data set", "a loader"])
def test_batches_of_any_size_give_the_same_figures(batch_size, loader):
    model, data = made(), TensorDataset(*labelled())
    want = evaluate(model, data, speed=False)
    got = evaluate(model, DataLoader(data, batch_size) if loader else data, batch_size=batch_size, speed=False)
    assert got.rows == want.rows


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    ("threshold", "used"), [(None, [0.3, 0.6]), (0.9, [0.9, 0.9]), ([0.2, 0.8], [0.2, 0.8])], ids=str
)
def test_the_model_is_left_as_it_was(threshold, used, training):
    model = made("bnpool").train(training)
    model.threshold = [0.3, 0.6]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = evaluate(model, TensorDataset(*labelled()), threshold=threshold, device="cpu")
    assert results.threshold == used
    assert model.threshold == [0.3, 0.6]
    assert model.training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.results is None


class Watched(TensorDataset):
    """Notes the model's thresholds whenever an image is read."""

    def __init__(self, model: ptee.EarlyExitModel) -> None:
        super().__init__(*labelled())
        self.model, self.seen = model, []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.seen.append(self.model.threshold)
        return super().__getitem__(index)


def test_other_threads_see_nothing_of_the_threshold_that_is_tried(monkeypatch):
    model, timed = made(), evaluation._timed
    model.threshold = [0.3, 0.6]
    data = Watched(model)

    def watch(*arguments):
        data.seen.append(model.threshold)
        return timed(*arguments)

    monkeypatch.setattr(evaluation, "_timed", watch)
    results = evaluate(model, data, threshold=0.9)
    assert results.threshold == [0.9, 0.9]
    assert data.seen == [[0.3, 0.6]] * (N + 1)


def test_many_thresholds_do_not_make_the_table_wide():
    model = made()
    text = str(evaluate(model, TensorDataset(*labelled()), threshold=[0.12345678, 0.87654321], speed=False))
    assert "\nearly exit  " in text
    assert "\nEarly exit at T = 0.1235, 0.8765.\n" in text


def test_each_exit_says_what_its_confidence_is_worth():
    model, (x, y) = made(), labelled()
    results = evaluate(model, TensorDataset(x, y), speed=False)
    with torch.no_grad():
        every = model.all_exits(x)
    for n, row in enumerate(results.rows[1:3]):
        holds = every.logits[n].argmax(1) == y
        pairs = (every.confidence[n][holds][:, None] > every.confidence[n][~holds]).double()
        assert row.failure_auroc == pytest.approx(pairs.mean().item())
        assert 0 <= row.calibration_error <= 1
    assert [results.rows[i].failure_auroc for i in (0, 3)] == [None, None]


def test_without_labels_an_answer_that_fails_is_one_that_is_not_the_backbones():
    model, (x, _) = made(), labelled()
    with torch.no_grad():
        bare = model.backbone(x).argmax(1)
    rows = evaluate(model, TensorDataset(x), speed=False).rows
    for row, same in zip(rows, evaluate(model, TensorDataset(x, bare), speed=False).rows, strict=True):
        assert (row.failure_auroc, row.calibration_error) == (same.failure_auroc, same.calibration_error)


def results_and_cut_off(cut_off: Score, own: Row) -> Results:
    """One exit, at which some leave."""
    backbone, exit_ = Row("backbone", "", 0.9, 1, 1), Row("exit 0", "layer1", 0.8, 0.8, 0.4)
    return Results("net", 100, [0.5], (backbone, exit_, own), [0.5, 0.5], "cpu", 1, truncation=(cut_off,))


@pytest.mark.parametrize(
    ("cut_off", "told"),
    [(Score(0.88, 0.96, 0.6), True), (Score(0.89, 0.96, 0.6), True), (Score(0.87, 1, 0.6), False), (Score(1, 1, 0.71), False)],
    ids=["as good for less", "better for less", "worse", "dearer"],
)  # fmt: skip
def test_where_a_cut_off_network_does_as_well_for_less_the_verdict_says_so(cut_off, told):
    verdict = " ".join(results_and_cut_off(cut_off, Row("early exit", "", 0.88, 0.97, 0.7)).verdict)
    assert ("Cutting the backbone off at exit 0 (layer1) does as well for less" in verdict) == told
    if told:
        assert f"accuracy {cut_off.accuracy:.4f}, fidelity {cut_off.fidelity:.4f} at cost 0.6000" in verdict


def test_where_everybody_leaves_at_one_exit_the_cut_off_network_is_not_said_to_cost_less():
    verdict = " ".join(results_and_cut_off(Score(0.88, 0.96, 0.6), Row("early exit", "", 0.88, 0.96, 0.6)).verdict)
    assert "exit 0 (layer1) does just as well: accuracy 0.8800, fidelity 0.9600 at cost 0.6000" in verdict


REFUSED = {
    "a threshold too many": ({"threshold": [0.1] * 3}, 0, PteeError),
    "NaN": ({"threshold": math.nan}, 0, PteeError),
    "no such device": ({"device": "cuda:99"}, 0, DeviceError),
    "labels for some images only": ({"threshold": 0.1}, -1, DataError),
}


@pytest.mark.parametrize(("request_", "shift", "error"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(request_, shift, error):
    model, (x, y) = made(), labelled()
    model.threshold = [0.3, 0.6]
    with pytest.raises(error):
        evaluate(model, TensorDataset(x, y + shift), **request_)
    assert model.threshold == [0.3, 0.6]
    assert not model.training


def test_speed_stands_beside_the_bare_backbones_measured_in_turn(monkeypatch):
    seconds = {"backbone": [2.0, 4, 3], "exit 0": [1.0, 2, 1.5], "exit 1": [2.0, 4, 3], "early exit": [4.0, 8, 6]}

    def in_turns(calls, device, **_):
        for call in calls.values():
            call()
        return {name: seconds[name] for name in calls}

    monkeypatch.setattr(evaluation, "in_turns", in_turns)
    monkeypatch.setattr(evaluation, "_few_enough", lambda _, images, __: images)
    results = evaluate(made(), TensorDataset(*labelled()))
    assert [row.speedup for row in results.rows] == [1, 2, 1, 0.5]
    assert [row.images_per_s for row in results.rows] == [N / 3, N / 1.5, N / 3, N / 6]


def test_measured_speed_is_positive_and_of_the_whole_table():
    results = evaluate(made(), TensorDataset(*labelled()), batch_size=7)
    assert all(row.images_per_s > 0 and row.speedup > 0 for row in results.rows)
    assert results.rows[0].speedup == 1
    assert (results.device, results.batch_size) == ("cpu", 7)


def test_the_table_has_a_line_for_each_row_with_the_thresholds_in_it():
    model = made()
    text = str(evaluate(model, TensorDataset(*labelled()), threshold=[0.25, 0.5], speed=False))
    lines = [line for line in text.splitlines() if line.startswith(("backbone", "exit", "early exit"))]
    assert [line.split("  ")[0] for line in lines] == ["backbone", "exit 0", "exit 1", "early exit, T = 0.25, 0.5"]
    assert "T = 0.25 " in str(evaluate(model, TensorDataset(*labelled()), threshold=0.25, speed=False))


def test_the_table_says_at_each_exit_who_leaves_there_and_at_the_backbone_who_never_left():
    rows = tuple(evaluation.Row(name, "", None, 1.0, 1.0) for name in ("backbone", "exit 0", "exit 1", "early exit"))
    text = str(Results("net", 10, [0.5, 0.5], rows, [0.2, 0.3, 0.5], "cpu", 10))
    shown = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "50.0%" in shown["backbone"]
    assert "20.0%" in shown["exit 0"]
    assert "30.0%" in shown["exit 1"]
    assert "%" not in shown["early exit, T = 0.5"]


def test_results_are_ready_for_json():
    results = evaluate(made(), TensorDataset(*labelled()), speed=False, about="Noise.")
    values = json.loads(json.dumps(results.to_dict()))
    assert values["rows"][1]["module"] == "0"
    assert values["leaving"] == results.leaving
    assert values["about"] == "Noise."


def test_a_model_in_half_precision_is_evaluated():
    results = evaluate(made().bfloat16(), TensorDataset(*labelled()), speed=False)
    assert results.samples == N


# what is said of a bad model

GOOD = {"fidelity": 0.99, "cost": 0.7, "leaving": [0.5, 0.3, 0.2], "accuracy": (0.8, 0.79)}
SAID = {
    "a good one": ({}, []),
    "all at one exit": ({"leaving": [0.01, 0.98, 0.01]}, [r"98% of the images leave at exit 1 \(two\).*Raise T"]),
    "all at the end": ({"leaving": [0.0, 0.0, 1.0]}, []),
    "other answers": (
        {"fidelity": 0.9, "accuracy": (0.8, 0.75)},
        [r"10\.0% of the answers .*\(accuracy 0\.7500 instead of 0\.8000\)"],
    ),
    "other answers, and no labels": ({"fidelity": 0.9, "accuracy": (None, None)}, [r"10\.0% of the answers .*'s\. "]),
    "other answers, which are better": ({"fidelity": 0.9, "accuracy": (0.7, 0.75)}, []),
    "as dear as the backbone": ({"cost": 1.0}, ["does not pay: it costs 1.000"]),
    "slower than the backbone": (
        {"speedup": 0.8},
        [r"saves 30\.0%, but measured it takes 1\.25 times.*on cpu in batches of 10"],
    ),
    "as fast as the backbone, but for noise": ({"speedup": 0.97}, []),
    "dearer and slower": ({"cost": 1.1, "speedup": 0.8}, ["does not pay: it costs 1.100"]),
    "everything": (
        {"fidelity": 0.1, "cost": 1.2, "leaving": [1.0, 0.0, 0.0]},
        ["exit 0 .one", "90.0% of the answers", "not pay"],
    ),
    "T above 1": ({"cost": 1.2, "leaving": [0.0, 0.0, 1.0], "threshold": [1.5, 2.0]}, []),
}


def results_with(
    fidelity: float,
    cost: float,
    leaving: list[float],
    accuracy: tuple[float | None, float | None],
    threshold: tuple[float, ...] = (0.5, 0.5),
    speedup: float | None = None,
) -> Results:
    backbone, own = accuracy
    exits = [evaluation.Row(f"exit {n}", module, own, 0.5, 0.5) for n, module in enumerate(["one", "two"])]
    first = evaluation.Row("backbone", "", backbone, 1, 1)
    last = evaluation.Row("early exit", "", own, fidelity, cost, speedup=speedup)
    return Results("net", 100, list(threshold), (first, *exits, last), leaving, "cpu", 10)


@pytest.mark.parametrize(("change", "said"), SAID.values(), ids=SAID)
def test_what_is_wrong_with_an_early_exit_model_is_said_in_words(change, said):
    results = results_with(**(GOOD | change))
    assert len(results.verdict) == len(said)
    for sentence, want in zip(results.verdict, said, strict=True):
        assert re.search(want, sentence)
        assert sentence in str(results).splitlines()
    assert json.loads(json.dumps(results.to_dict()))["verdict"] == results.verdict


@pytest.mark.parametrize(
    ("off", "said", "verdict"),
    [
        ((1,), r"Off: exit 1\. Nobody leaves there, whatever T is\. ptee tune", []),
        ((0, 1), r"Every exit is off, so the backbone answers all images, whatever T is\. ptee tune", [0]),
    ],
    ids=["one of them", "all"],
)
def test_exits_that_are_off_are_told_of_and_how_they_come_back(off, said, verdict):
    model = made()
    model.off = off
    results = evaluate(model, TensorDataset(*labelled()), threshold=0, speed=False)
    assert re.search(said, str(results))
    assert [i for i, sentence in enumerate(results.verdict) if re.search(said, sentence)] == verdict
    assert results.to_dict()["off"] == list(off)
    model.off = ()
    assert "Off:" not in str(evaluate(model, TensorDataset(*labelled()), threshold=0, speed=False))


# the time that measuring takes


def test_where_speed_was_not_measured_nothing_is_said_of_it():
    text = str(evaluate(made(), TensorDataset(*labelled()), speed=False))
    assert "images/s" not in text
    assert "speed" not in text


@pytest.mark.parametrize(("seconds", "count"), [(0.001, 128), (0.1, 128), (8 * 8 / 4 / 64, 64), (100.0, 16)])
def test_speed_is_measured_on_so_few_images_that_a_round_is_short(seconds, count, monkeypatch):
    """With two exits four ways are timed in a round of eight seconds; eight images are tried."""
    monkeypatch.setattr(evaluation, "in_turns", lambda calls, *_, **__: {name: [seconds] for name in calls})
    images = torch.arange(128.0)[:, None, None, None].expand(128, *SIZE)
    chosen = evaluation._few_enough(made(), images, 8.0)
    assert chosen[:, 0, 0, 0].tolist() == list(range(0, 128, 128 // count))


def test_the_batch_at_which_speed_was_measured_is_reported(monkeypatch):
    monkeypatch.setattr(evaluation, "in_turns", lambda calls, *_, **__: {name: [100.0] for name in calls})
    images = torch.randn(100, *SIZE)
    assert evaluate(made(), TensorDataset(images)).batch_size == 15  # every seventh
