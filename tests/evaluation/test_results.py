from __future__ import annotations

import json
import math
import re
from functools import partial

import pytest
import small
import torch
from device import here, seeded
from small import SIZE, K, made
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import ptee
from ptee._common.errors import DataError, DeviceError, PteeError
from ptee.evaluation import results as evaluation
from ptee.evaluation.results import evaluate
from ptee.exits.blend import Blend
from ptee.tuning.traces import record

N = 24
labelled = partial(small.labelled, N)
NEVER, ALWAYS = 2.0, 0.0


def middle(model: ptee.EarlyExitModel) -> list[float]:
    """Thresholds that about half of the images reach at each exit."""
    with torch.no_grad():
        return model.all_exits(labelled()[0]).confidence[:-1].median(1).values.tolist()


def test_every_number_is_what_running_the_model_gives():
    model, (x, y) = made(), labelled()
    threshold = middle(model)
    results = evaluate(model, TensorDataset(x, y), threshold=threshold, speed=False)
    with torch.no_grad():
        bare = model.backbone(x).argmax(1)
        runs = [NEVER, [ALWAYS, NEVER], [NEVER, ALWAYS], threshold]
        outs = [model.predict(x, t) for t in runs]
    costs = [1.0, *(out.cost.mean().item() for out in outs[1:])]  # the bare backbone has no heads
    assert [(row.name, row.module) for row in results.rows] == [
        ("backbone", ""), ("exit 0", "0"), ("exit 1", "2"), ("early exit", ""),
    ]  # fmt: skip
    for row, out, cost in zip(results.rows, outs, costs, strict=True):
        answers = out.logits.argmax(1)
        assert row.accuracy == pytest.approx((answers == y).double().mean().item())
        assert row.fidelity == pytest.approx((answers == bare).double().mean().item())
        assert row.cost == pytest.approx(cost)
    shares = torch.bincount(outs[-1].exit_index, minlength=3) / N
    assert results.leaving == pytest.approx(shares.tolist())
    assert min(results.leaving) > 0
    assert results.samples == N


@pytest.mark.parametrize("off", [(), (0,), (1,), (0, 1)], ids=str)
def test_with_exits_off_the_early_exit_row_is_still_what_running_the_model_gives(off):
    model, (x, y) = made(), labelled()
    model.threshold, model.off = middle(model), off
    results = evaluate(model, TensorDataset(x, y), speed=False)
    with torch.no_grad():
        out = model.predict(x)
    assert results.early_exit.cost == pytest.approx(out.cost.mean().item())
    assert results.early_exit.accuracy == pytest.approx((out.logits.argmax(1) == y).double().mean().item())
    assert all(results.leaving[n] == 0 for n in off)
    assert results.to_dict()["off"] == list(off)


def test_without_labels_accuracy_is_none_and_all_else_is_the_same():
    model, (x, y) = made(), labelled()
    with_labels = evaluate(model, TensorDataset(x, y), speed=False)
    without = evaluate(model, TensorDataset(x), speed=False)
    assert [row.accuracy for row in without.rows] == [None] * 4
    assert [(r.fidelity, r.cost) for r in without.rows] == [(r.fidelity, r.cost) for r in with_labels.rows]
    assert without.leaving == with_labels.leaving


@pytest.mark.parametrize("batch_size", [5, N])
def test_labels_that_are_not_classes_are_ignored_and_the_results_say_so(batch_size):
    model, (x, y) = made(), labelled()
    results = evaluate(model, TensorDataset(x, y + K), batch_size=batch_size, speed=False)
    assert results.rows == evaluate(model, TensorDataset(x), speed=False).rows
    for text in (str(results), json.dumps(results.to_dict())):
        assert (
            f"no accuracy for this data: the labels are {K} to {2 * K - 1}, the backbone's classes 0 to {K - 1}."
            in text
        )


def test_a_label_that_is_no_class_among_others_is_refused_by_name():
    model, (x, y) = made(), labelled()
    y[3] = 255
    with pytest.raises(DataError, match=rf"0 to {K - 1}: 255 \(1 of {N} images\)\. Correct them"):
        evaluate(model, TensorDataset(x, y), batch_size=5, speed=False)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("loader", [False, True], ids=["a data set", "a loader"])
def test_batches_of_any_size_give_the_same_numbers(batch_size, loader):
    model, data = made(), TensorDataset(*labelled())
    got = evaluate(model, DataLoader(data, batch_size) if loader else data, batch_size=batch_size, speed=False)
    assert got.rows == evaluate(model, data, speed=False).rows


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(
    ("threshold", "used"), [(None, [0.3, 0.6]), (0.9, [0.9, 0.9]), ([0.2, 0.8], [0.2, 0.8])], ids=str
)
def test_the_model_is_left_as_it_was(threshold, used, training):
    model = made("bnpool").train(training)
    model.threshold = [0.3, 0.6]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = evaluate(model, TensorDataset(*labelled()), threshold=threshold, device=here())
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


def test_other_threads_do_not_see_the_threshold_that_is_tried(monkeypatch):
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


def test_each_exit_has_the_auroc_of_its_confidence():
    model, (x, y) = made(), labelled()
    results = evaluate(model, TensorDataset(x, y), speed=False)
    with torch.no_grad():
        every = model.all_exits(x)
    for n, row in enumerate(results.exits):
        right = every.logits[n].argmax(1) == y
        pairs = (every.confidence[n][right][:, None] > every.confidence[n][~right]).double()
        assert row.failure_auroc == pytest.approx(pairs.mean().item())
        assert 0 <= row.calibration_error <= 1
    assert [results.rows[i].failure_auroc for i in (0, 3)] == [None, None]


def test_without_labels_a_right_answer_is_the_backbones():
    model, (x, _) = made(), labelled()
    with torch.no_grad():
        bare = model.backbone(x).argmax(1)
    own, same = (evaluate(model, TensorDataset(x, *more), speed=False).rows for more in ([], [bare]))
    for key in ("failure_auroc", "calibration_error", "right"):
        assert [getattr(row, key) for row in own] == [getattr(row, key) for row in same]


@pytest.mark.parametrize(
    ("answers", "fitted_to_labels", "agrees"), [("own", True, True), ("blended", True, False), ("blended", False, True)]
)
def test_a_confidence_is_measured_by_what_it_was_fitted_to(answers, fitted_to_labels, agrees):
    model, (x, y) = made(), labelled()
    ptee.calibrate(model, TensorDataset(x, y))
    model.confidence = "calibrated"
    model.results = {"calibration": {"target": "agrees", "images": N}}
    ends = range(3) if fitted_to_labels else range(2)
    weights = {(n, tuple(range(n))): (1.0,) * (n + 1) for n in ends}
    model.blend = Blend(weights, fitted_to_labels)
    model.answers = answers
    assert evaluation.foretells_agreement(model) == agrees
    traces = record(model, TensorDataset(x, y))
    came_true = traces.answers[0] == traces.bare if agrees else traces.right[0]
    assert torch.equal(evaluation.foretold(model, traces, 0), came_true)


REFUSED = {
    "a threshold too many": ({"threshold": [0.1] * 3}, 0, PteeError),
    "NaN": ({"threshold": math.nan}, 0, PteeError),
    "no such device": ({"device": "cuda:99"}, 0, DeviceError),
    "labels for some images only": ({"threshold": 0.1}, -1, DataError),
}


@pytest.mark.parametrize(("arguments", "shift", "error"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(arguments, shift, error):
    model, (x, y) = made(), labelled()
    model.threshold = [0.3, 0.6]
    with pytest.raises(error):
        evaluate(model, TensorDataset(x, y + shift), **arguments)
    assert model.threshold == [0.3, 0.6]
    assert not model.training


def test_a_model_in_half_precision_is_evaluated():
    assert evaluate(made().bfloat16(), TensorDataset(*labelled()), speed=False).samples == N


def test_results_can_be_written_as_json():
    results = evaluate(made(), TensorDataset(*labelled()), speed=False, about="Noise.")
    values = json.loads(json.dumps(results.to_dict()))
    assert results.to_dict() == values
    assert values["rows"][1]["module"] == "0"
    assert values["leaving"] == results.leaving
    assert values["about"] == "Noise."
    assert values["verdict"] == results.verdict


# speed


def test_speed_is_a_ratio_to_the_bare_backbone_measured_in_turns(monkeypatch):
    seconds = {"backbone": [2.0, 4, 3], "exit 0": [1.0, 2, 1.5], "exit 1": [2.0, 4, 3], "early exit": [4.0, 8, 6]}

    def in_turns(calls, device, **_):
        for call in calls.values():
            call()
        return {name: seconds[name] for name in calls}

    monkeypatch.setattr(evaluation, "in_turns", in_turns)
    monkeypatch.setattr(evaluation, "_few_enough", lambda _, images, __: images)
    model = made()
    results = evaluate(model, TensorDataset(*labelled()))
    assert [row.speedup for row in results.rows] == [1, 2, 1, 0.5]
    assert [row.images_per_s for row in results.rows] == [N / 3, N / 1.5, N / 3, N / 6]
    model.off = [0]
    assert [row.speedup for row in evaluate(model, TensorDataset(*labelled())).rows] == [1, None, 1, 0.5]


def test_measured_speed_is_positive():
    results = evaluate(made(), TensorDataset(*labelled()), batch_size=7)
    assert all(row.images_per_s > 0 and row.speedup > 0 for row in results.rows)
    assert (results.device, results.batch_size, results.rows[0].speedup) == (here().type, 7, 1)


@pytest.mark.parametrize(("seconds", "count"), [(0.001, 128), (0.1, 128), (8 * 8 / 4 / 64, 64), (100.0, 16)])
def test_speed_is_measured_on_few_enough_images_for_a_short_round(seconds, count, monkeypatch):
    """With two exits, four scenarios are timed in a round of eight seconds; eight images are timed first."""
    monkeypatch.setattr(evaluation, "in_turns", lambda calls, *_, **__: {name: [seconds] for name in calls})
    images = torch.arange(128.0)[:, None, None, None].expand(128, *SIZE)
    chosen = evaluation._few_enough(made(), images, 8.0)
    assert chosen[:, 0, 0, 0].tolist() == list(range(0, 128, 128 // count))


def test_the_batch_size_that_speed_was_measured_with_is_reported(monkeypatch):
    monkeypatch.setattr(evaluation, "in_turns", lambda calls, *_, **__: {name: [100.0] for name in calls})
    images = torch.randn(100, *SIZE)
    assert evaluate(made(), TensorDataset(images)).batch_size == 15  # every seventh image


@pytest.mark.parametrize(("wish", "for_fidelity"), [("max_fidelity_drop", True), ("max_drop", False)])
def test_the_results_know_whether_the_thresholds_were_chosen_for_fidelity(wish, for_fidelity):
    model, (x, _) = made(), labelled()
    data = TensorDataset(x, model.bare(x).argmax(-1))
    ptee.tune(model, data, **{wish: 0.25}, answers="own")
    assert evaluate(model, data, speed=False).for_fidelity is for_fidelity
    assert not evaluate(model, data, threshold=0.123, speed=False).for_fidelity


@pytest.mark.parametrize("missed", [False, True], ids=["kept", "missed"])
def test_it_says_whether_the_target_of_the_thresholds_is_kept(missed):
    model, images = made(), 3 * torch.randn(300, *SIZE, generator=seeded(4))
    ptee.tune(model, TensorDataset(images), max_fidelity_drop=0.99, margin=0, answers="own")  # so all leave at exit 0
    differ = model(images).argmax(-1) != model.bare(images).argmax(-1)
    found = evaluate(model, TensorDataset(images[differ] if missed else images), speed=False)
    word = "Missed" if missed else "Kept"
    said = f"Target: at most 0.99 of the answers differ from the backbone's. {word} on {found.samples} report images: "
    assert said in str(found)
    assert found.loses_too_much is missed
    assert "Target:" not in str(evaluate(model, TensorDataset(images), threshold=0.123, speed=False))


def test_labels_under_which_the_backbone_is_near_chance_are_doubted_in_place_of_advice():
    model, (x, _) = made(), labelled()
    answers = model.bare(x).argmax(-1)
    model.threshold = 0.0
    results = evaluate(model, TensorDataset(x, (answers + 1) % K), speed=False)
    said = "The backbone is right on 0.0% of .* check that the labels are its class numbers"
    assert re.search(said, str(results).splitlines()[-1])
    assert re.search(said, results.verdict[-1]) and "differ" not in str(results.verdict)
    assert evaluate(model, TensorDataset(x, answers), speed=False).doubt == ""
    assert evaluate(model, TensorDataset(x), speed=False).doubt == ""


def test_images_on_which_the_backbone_is_right_far_less_often_than_before_are_doubted(tmp_path):
    model, x = made(), torch.randn(200, *SIZE, generator=seeded())
    answers = model.bare(x).argmax(-1)
    wrong = (answers + torch.arange(len(x), device=answers.device) % 2) % K
    ptee.tune(model, TensorDataset(x, answers), max_drop=0.5)
    assert "Target:" in str(evaluate(model, TensorDataset(x, wrong), speed=False))  # nothing is known yet
    evaluate(model, TensorDataset(x, answers), speed=False, keep=True)
    said = r"right on 50\.0% of these images, and on 100\.0% of those .* measured on before\. See whether these are prepared alike"
    model.save_pretrained(tmp_path)
    results = evaluate(ptee.load(tmp_path, backbone=made().detach()), TensorDataset(x, wrong), speed=False)
    assert re.search(said, results.doubt) and results.doubt in str(results) and "Target:" not in str(results)
    with pytest.warns(UserWarning, match=said):
        ptee.tune(model, TensorDataset(x, wrong), max_fidelity_drop=0.5)
    model.results = {"rows": [{"accuracy": "x"}]}
    assert not evaluate(model, TensorDataset(x, wrong), speed=False).doubt


def test_what_was_measured_on_doubtful_images_is_no_record_that_others_are_compared_with():
    model, x = made(), torch.randn(200, *SIZE, generator=seeded())
    answers = model.bare(x).argmax(-1)
    good, bad = (TensorDataset(x, (answers + n * torch.arange(len(x), device=answers.device) % 2) % K) for n in (0, 1))
    model.origin = model.origin.trained()  # it is asked of one that learnt, too
    doubts = [
        bool(evaluate(model, data, speed=False, keep=True).doubt)
        for data in (good, bad, bad, TensorDataset(x), bad, good)
    ]
    assert doubts == [False, True, True, False, True, False]


@pytest.mark.parametrize("threshold", [1.5, 0.0])
def test_a_doubt_is_told_whether_or_not_images_leave(threshold):
    model, x = made(), torch.randn(200, *SIZE, generator=seeded())
    model.results = {"usual_right": [1.0, 200]}
    half = TensorDataset(x, (model.bare(x).argmax(-1) + torch.arange(len(x), device=here()) % 2) % K)
    for off in ([], [0, 1]):
        model.off = off
        results = evaluate(model, half, threshold=threshold, speed=False)
        assert results.doubt and str(results).endswith(results.doubt) and results.verdict[-1] == results.doubt


@pytest.mark.parametrize("n", [1, 9])
def test_a_handful_of_images_is_not_doubted(n):
    model, x = made(), torch.randn(n, *SIZE)
    model.results = {"usual_right": [1.0, 1000]}
    assert not evaluate(model, TensorDataset(x, (model.bare(x).argmax(-1) + 1) % K), speed=False).doubt
