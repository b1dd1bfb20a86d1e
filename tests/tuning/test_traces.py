from __future__ import annotations

import copy
import functools
import math
import re
from dataclasses import replace

import pytest
import torch
from device import seeded
from hypothesis import given
from hypothesis import strategies as st
from small import SIZE, K, Normalises, OwnLoader, Stream, blended, labelled, made
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError
from ptee.tuning.traces import SAMPLE, Traces, record

images = functools.partial(torch.randn, generator=seeded(3))


# arithmetic, by hand: two exits and the backbone, four images


def traces(targets: Tensor | None = None) -> Traces:
    return Traces(
        answers=torch.tensor([[0, 1, 1, 0], [0, 1, 2, 0], [0, 1, 2, 3]]),
        confidence=torch.tensor([[0.9, 0.2, 0.5, 0.1], [0.1, 0.8, 0.5, 0.4], [1.0, 1.0, 1.0, 1.0]]),
        targets=targets,
        costs=torch.tensor([0.25, 0.5, 1.25], dtype=torch.float64),
        sample=torch.empty(0),
    )


@pytest.mark.parametrize(
    ("threshold", "leaving"),
    [
        ([0, 0], [0, 0, 0, 0]),
        ([2, 0], [1, 1, 1, 1]),
        ([2, 2], [2, 2, 2, 2]),
        ([0.5, 0.5], [0, 1, 0, 2]),
        ([0.5001, 0.5], [0, 1, 1, 2]),
        ([0.15, 0.4], [0, 0, 0, 1]),
        ([math.inf, math.inf], [2, 2, 2, 2]),
    ],
    ids=str,
)
def test_an_image_leaves_at_the_first_exit_that_reaches_its_threshold(threshold, leaving):
    assert traces().leaving(threshold).tolist() == leaving
    assert traces().leaving(torch.tensor(threshold)).tolist() == leaving


@pytest.mark.parametrize("n", [0, 1])
def test_a_confidence_that_is_no_number_reaches_no_threshold(n):
    found = traces()
    found.confidence[n] = math.nan
    assert found.leaving([0, 0]).tolist() == [1 - n] * 4


@pytest.mark.parametrize(
    ("leaving", "accuracy", "fidelity", "cost"),
    [
        ([0, 0, 0, 0], 1 / 4, 2 / 4, 0.25),
        ([1, 1, 1, 1], 2 / 4, 3 / 4, 0.5),
        ([2, 2, 2, 2], 3 / 4, 1, 1.25),
        ([0, 1, 2, 0], 2 / 4, 3 / 4, (0.25 + 0.5 + 1.25 + 0.25) / 4),
    ],
    ids=str,
)
def test_scores_are_shares_of_right_and_faithful_answers_and_the_mean_cost(leaving, accuracy, fidelity, cost):
    score = traces(torch.tensor([0, 0, 2, 3])).score(torch.tensor(leaving))
    assert (score.accuracy, score.fidelity, score.cost) == (accuracy, fidelity, cost)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=50))
def test_shares_tell_where_images_leave(leaving):
    want = [leaving.count(n) / len(leaving) for n in range(3)]
    assert traces().shares(torch.tensor(leaving)) == pytest.approx(want)


def test_the_images_that_traces_keep_are_those_that_were_given_also_of_a_network_that_writes_into_them():
    model, images = ptee.augment(Normalises(), exits=["a"], input_size=SIZE, head="pool"), labelled(6)[0]
    assert torch.equal(record(model, [(image.clone(), 0) for image in images]).sample, images.cpu())


@given(st.tuples(*[st.floats(0, 1.5)] * 2), st.tuples(*[st.floats(0, 1)] * 2))
def test_a_higher_threshold_lets_nobody_leave_sooner(low, more):
    high = [one + two for one, two in zip(low, more, strict=True)]
    assert (traces().leaving(low) <= traces().leaving(high)).all()


def test_an_image_loses_where_only_the_backbone_is_right():
    labelled = traces(torch.tensor([0, 0, 2, 0]))
    assert labelled.losses.tolist() == [[0, 0, 1, -1], [0, 0, 0, -1], [0, 0, 0, 0]]
    assert traces().losses.tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert traces().score_at(0).accuracy is None


def test_blended_answers_are_compared_with_the_backbones_own():
    own = traces(torch.tensor([0, 0, 2, 3]))
    mixed = replace(own, answers=torch.tensor([[0, 1, 1, 0], [0, 1, 2, 0], [0, 0, 2, 0]]), own=own.answers)
    assert mixed.score_at(2).fidelity == 2 / 4
    assert mixed.losses[2].tolist() == [0, -1, 0, 1]


def test_where_no_image_can_leave_the_backbones_own_answer_stands_in_place_of_the_blend():
    own = traces()
    mixed = replace(own, answers=own.answers.flip(1), own=own.answers)
    assert torch.equal(mixed.by([2, 1.01]).answers, own.answers)
    assert mixed.by([2, 1]) is mixed


# recording


@pytest.mark.parametrize("own", [True, False])
def test_the_traces_of_some_images_are_those_that_are_recorded_of_them_alone(own):
    model, some = blended(), [0, 2, 5]
    data = TensorDataset(images(6, *SIZE), torch.arange(6) % K)
    found, alone = (record(model, part, own=own) for part in (data, Subset(data, some)))
    for rows in ([0, 2, 5], [True, False, True, False, False, True]):
        part = found.rows(torch.tensor(rows, device="cpu"))
        for name in ("answers", "confidence", "targets", "logits", "confidence_logits", "own", "marks"):
            torch.testing.assert_close(getattr(part, name), getattr(alone, name))


def test_traces_hold_what_every_exit_says_to_every_image():
    model, x, y = made(), images(11, *SIZE), torch.arange(11) % K
    found = record(model, TensorDataset(x, y), batch_size=4)
    with torch.no_grad():
        every = model.all_exits(x)
    assert torch.equal(found.answers, every.logits.argmax(-1).cpu())
    torch.testing.assert_close(found.confidence, every.confidence.cpu())
    assert torch.equal(found.targets, y.cpu())
    assert found.costs.tolist() == list(model.costs)
    assert found.confidence.dtype == torch.float32


@pytest.mark.parametrize(("classes", "dtype"), [(100, torch.float32), (101, torch.float16)])
def test_traces_keep_logits_from_which_the_same_probabilities_follow(classes, dtype):
    model, x = made(), images(11, *SIZE)
    wide = nn.Sequential(*model.detach()[:-1], nn.Linear(6, classes))
    model = ptee.augment(wide, exits=["0", "2"], input_size=SIZE)
    with torch.no_grad():
        model.backbone[-1].weight *= 1e6  # beyond half precision
        want = model.all_exits(x).logits.softmax(-1).cpu()
    found = record(model, TensorDataset(x), batch_size=4)
    assert (found.logits.dtype, found.logits.shape) == (dtype, (3, 11, classes))
    torch.testing.assert_close(found.logits.float().softmax(-1), want, atol=1e-3, rtol=0)


def test_another_confidence_is_refused_where_logits_were_not_kept():
    found = record(made(), TensorDataset(images(4, *SIZE)), logits=False)
    assert found.logits is None
    with pytest.raises(PteeError, match="needs logits"):
        found.under("margin")


@pytest.mark.parametrize("off", [[], [0], [1], [0, 1]], ids=str)
def test_costs_without_some_heads_are_the_backbones_and_those_of_the_others(off):
    model = made("conv1")
    model.off = off  # traces are of all heads, whichever are off
    found = record(model, TensorDataset(images(4, *SIZE)))
    on = [0 if n in off else e.head_cost for n, e in enumerate(model.exits)]
    cuts = [e.backbone_cost for e in model.exits]
    want = [cuts[0] + on[0], cuts[1] + on[0] + on[1], 1 + on[0] + on[1]]
    assert found.costs_without(off).tolist() == pytest.approx(want)


SOURCES = {
    "a data set": lambda x, y: TensorDataset(x, y),
    "a list": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "a loader": lambda x, y: DataLoader(TensorDataset(x, y), 3),
    "a loader of a stream": lambda x, y: DataLoader(Stream(x, y), 5),
    "a loader of one's own": lambda x, y: OwnLoader(x, y, 4),
    "mappings": lambda x, y: [{"image": image, "label": label} for image, label in zip(x, y, strict=True)],
}


@pytest.mark.parametrize("source", SOURCES)
def test_data_sets_and_loaders_give_the_same_traces(source):
    model, x, y = made(), images(11, *SIZE), torch.arange(11) % K
    want = record(model, TensorDataset(x, y))
    got = record(model, SOURCES[source](x, y), batch_size=2)
    assert torch.equal(got.answers, want.answers)
    assert torch.equal(got.targets, want.targets)
    torch.testing.assert_close(got.confidence, want.confidence)


UNLABELLED = {
    "images in tuples": lambda x: [(image,) for image in x],
    "images alone": list,
    "labels of -1": lambda x: TensorDataset(x, torch.full((len(x),), -1)),
}


@pytest.mark.parametrize("make", UNLABELLED.values(), ids=UNLABELLED)
def test_data_without_labels_have_no_targets(make):
    assert record(made(), make(images(3, *SIZE))).targets is None


@pytest.mark.parametrize(("labels", "words"), [([7, 9, K], "4 to 9.*0 to 3"), ([-3, -2, 9], "-3 to 9")], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_label_is_used_if_none_is_a_class_of_the_backbone_and_a_note_says_why(labels, words, batch_size):
    found = record(made(), TensorDataset(images(3, *SIZE), torch.tensor(labels)), batch_size=batch_size)
    assert found.targets is None
    assert re.search(words, found.note)


@pytest.mark.parametrize(
    ("labels", "words"), [([0, 255, 255], r"255 \(2 of 3"), ([K, -2, 1], r"-2 \(1 .*, 4 \(1 ")], ids=str
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_labels_that_are_no_classes_among_others_are_refused_by_name(labels, words, batch_size):
    with pytest.raises(DataError, match=words):
        record(made(), TensorDataset(images(3, *SIZE), torch.tensor(labels)), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [2, 4], ids=["between batches", "in one batch"])
def test_labels_for_some_images_only_are_refused(batch_size):
    data = TensorDataset(images(4, *SIZE), torch.tensor([0, 1, -1, -1]))
    with pytest.raises(DataError, match="Some images have labels"):
        record(made(), data, batch_size=batch_size)


def test_a_loader_that_turns_out_to_be_empty_is_refused():
    with pytest.raises(DataError):
        record(made(), DataLoader(Stream(images(0, *SIZE), torch.empty(0))))


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_the_mode_and_the_statistics_as_they_were_even_if_it_fails(training):
    model = made("bnpool").train(training)
    before = copy.deepcopy(model.state_dict())
    record(model, TensorDataset(images(6, *SIZE)))
    with pytest.raises(DataError):
        record(model, TensorDataset(images(2, *SIZE).flatten(1)))
    assert model.training is training
    assert model.heads[0].training is training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_for_which_the_backbone_has_no_answer_are_refused_with_their_number():
    x = images(8, *SIZE)
    x[3] = x[6] = math.nan
    labelled = TensorDataset(x, torch.zeros(8, dtype=torch.long))
    said = (
        r"^The backbone's logits are NaN for 2 of 8 images \(the first has the index 3\), .* Leave such images out\.$"
    )
    for measure in (record, ptee.evaluate):
        with pytest.raises(DataError, match=said):
            measure(made(), labelled, batch_size=4)


def test_an_image_without_an_answer_is_named_by_its_place_in_the_whole_data_set():
    x = images(12, *SIZE)
    x[7] = math.nan
    half = Subset(Subset(TensorDataset(x), range(1, 12, 2)), [5, 3, 1])
    with pytest.raises(
        DataError, match=r"NaN for 1 of 3 images \(the first has the index 7 in the TensorDataset of 12\)"
    ):
        record(made(), half)
    with pytest.raises(
        DataError, match=r"NaN for 1 of 3 images \(the first has the index 1 in the order of the loader\)"
    ):
        record(made(), DataLoader(half, batch_size=2))


def test_an_exit_without_an_answer_and_classes_that_cannot_be_are_measured():
    model = made()
    with torch.no_grad():
        model.heads[0].logits.bias[0] = math.nan
        model.backbone[-1].bias[0] = -math.inf
    found = record(model, TensorDataset(images(8, *SIZE)))
    assert not (found.bare == 0).any()


@pytest.mark.parametrize(
    ("n", "batch_size"), [(1, 1), (7, 1), (SAMPLE, 1), (SAMPLE - 1, 16), (3 * SAMPLE, 16), (300, 500)]
)
def test_the_sample_is_of_the_data_and_nearly_as_large_as_it_may_be(n, batch_size):
    x = torch.arange(float(n))[:, None, None, None].expand(n, *SIZE)
    sample = record(made(), TensorDataset(x), batch_size=batch_size).sample
    assert sample.shape[1:] == SIZE
    assert min(n, SAMPLE) / 2 <= len(sample) <= SAMPLE
    assert len(set(sample[:, 0, 0, 0].tolist()) & set(range(n))) == len(sample)


@pytest.mark.parametrize(("name", "cost"), [("max_prob", 0.4), ("patience", 0.5)])
def test_a_confidence_that_needs_the_answers_of_earlier_exits_pays_for_their_heads(name, cost):
    logits = {"logits": torch.rand(3, 4, K), "confidence_logits": torch.zeros(2, 4)}
    found = replace(traces(), **logits, head_costs=torch.tensor([0.1, 0.1], dtype=torch.float64))
    assert found.under(name).costs_without([0])[1].item() == pytest.approx(cost)
