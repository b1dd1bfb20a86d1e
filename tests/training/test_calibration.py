"""Fitting gates: the question is answered, by the images alone and the seed, and nothing but h changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError, UnknownName
from ptee.backbones.load import load_backbone
from ptee.exits.gates import LOG_ODDS, READS, Gate
from ptee.model.build import build
from ptee.training import calibration as decision
from ptee.training.calibration import QUESTIONS, GateFits, _Descent, fit_gates, hold_out

n, K, SIZE = 400, 5, (3, 8, 8)


class Net(nn.Module):
    """Three convolutions whose answers differ from image to image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8 * 2 * 2, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.three(self.two(self.one(x).relu()).relu()).relu()
        return 20 * self.fc(x.flatten(1))


def make(exits: tuple[str, ...] = ("one", "two")) -> ptee.EarlyExitModel:
    made = build(load_backbone(Net(), input_size=SIZE), exits=list(exits), head="plain")
    with torch.no_grad():
        for head in made.heads:
            head.logits.weight.mul_(5)
    return made


@pytest.fixture
def model() -> ptee.EarlyExitModel:
    return make()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(n, *SIZE)


def unlabelled(images: Tensor) -> TensorDataset:
    return TensorDataset(images)


def random_labels(images: Tensor) -> TensorDataset:
    return TensorDataset(images, torch.randint(K, (len(images),)))


def right_where_the_margin_is_large(model: ptee.EarlyExitModel, images: Tensor) -> Tensor:
    """Labels by which exit 0 is right on one half of the images."""
    logits = model.all_exits(images).logits[0].detach()
    top = logits.softmax(-1).topk(2)
    margin, answer = top.values[:, 0] - top.values[:, 1], top.indices[:, 0]
    return torch.where(margin > margin.median(), answer, (answer + 1) % K)


@pytest.mark.parametrize("reads", READS)
def test_a_gate_finds_out_that_answers_of_large_margin_are_right(reads, images):
    model = make(("one",))
    labels = right_where_the_margin_is_large(model, torch.cat([images, torch.randn(n, *SIZE)]))
    seen, other = labels[:n], torch.randn(n, *SIZE)
    fits = fit_gates(model, TensorDataset(images, seen), target="right", reads=reads)
    wanted = right_where_the_margin_is_large(model, other)
    every = model.all_exits(other)
    right = every.logits[0].argmax(-1) == wanted
    assert roc_auc_score(right, every.confidence[0].detach()) > 0.95
    assert fits.exits[0].loss < fits.exits[0].blind / 2
    assert every.confidence[0].mean().item() == pytest.approx(right.double().mean().item(), abs=0.1)


def test_what_cannot_be_known_leaves_h_at_the_share_of_yes(model, images):
    fits = fit_gates(model, random_labels(images), target="right")
    h = model.all_exits(images).confidence
    for exit_, sure in zip(fits.exits, h, strict=False):
        assert exit_.loss < 1.05 * exit_.blind
        assert sure.mean().item() == pytest.approx(exit_.yes, abs=0.08)


def max_prob(model: ptee.EarlyExitModel, images: Tensor) -> Tensor:
    """(E, n)."""
    return model.all_exits(images).logits[:-1].softmax(-1).amax(-1).detach()


def test_where_rounds_bring_nothing_h_is_the_max_probability_scaled(model, images, monkeypatch):
    monkeypatch.setattr(decision._Descent, "step", lambda descent: None)
    fits = fit_gates(model, random_labels(images), target="right")
    assert [e.loss == e.max_prob for e in fits.exits] == [True, True]
    h = model.all_exits(images).confidence[:-1]
    for own, top, head in zip(h, max_prob(model, images), model.heads, strict=True):
        torch.testing.assert_close(own.logit(), head.gate.scale * top.logit() + head.gate.shift, rtol=1e-3, atol=1e-3)


def test_twenty_images_do_not_make_a_gate_worse_than_the_max_probability_by_much(images):
    model = make(("one",))
    labels = right_where_the_margin_is_large(model, images)
    fit_gates(model, TensorDataset(images[:20], labels[:20]), target="right")
    every = model.all_exits(images[20:])
    right = every.logits[0].argmax(-1) == labels[20:]
    aurocs = [roc_auc_score(right, h.detach()) for h in (every.confidence[0], max_prob(model, images[20:])[0])]
    assert aurocs[0] > aurocs[1] - 0.05


def test_gates_of_heads_that_stand_alone_need_no_earlier_head(images):
    model = make()
    fit_gates(model, TensorDataset(images, right_where_the_margin_is_large(model, images)), target="right")
    assert [head.looks_back for head in model.heads] == [False, False]
    costs = model.costs
    model.off = [0]
    assert model.predict(images, 0).cost[0] < costs[1]


@pytest.mark.parametrize("target", QUESTIONS)
def test_the_share_of_yes_is_that_of_the_question(target, model, images):
    labels = torch.randint(K, (n,))
    answers = model.all_exits(images).logits.argmax(-1).tolist()
    fits = fit_gates(model, TensorDataset(images, labels), target=target)
    for e in range(2):
        yes = 0
        for i, label in enumerate(labels.tolist()):
            right = [answers[later][i] == label for later in range(3)]
            yes += {
                "agrees": answers[e][i] == answers[2][i],
                "right": right[e],
                "best": right[e] or not any(right[e + 1 :]),
            }[target]
        assert fits.exits[e].yes == pytest.approx(yes / n)


@pytest.mark.parametrize("right", [False, True])
def test_where_every_image_has_the_same_answer_h_says_so_and_still_tells_rows_apart(right, model, images):
    labels = model.all_exits(images).logits[0].argmax(-1) if right else torch.full((n,), K - 1)
    with torch.no_grad():
        model.heads[0].logits.bias[K - 1] -= 0 if right else 1000  # never its answer
    fits = fit_gates(model, TensorDataset(images, labels), target="right")
    assert fits.exits[0].yes == right
    assert fits.exits[0].loss == fits.exits[0].max_prob
    h = model.all_exits(images).confidence[0].detach()
    assert h.mean().item() == pytest.approx(float(right), abs=0.1)
    assert (h[max_prob(model, images)[0].argsort()].diff() >= 0).all()
    assert len(h.unique()) > n / 2


def log_odds_and_answers(n: int, scale: float, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """What a gate without features or earlier exits reads (n, 4), and whether the answer is yes (n,), by chance."""
    logits = 3 * torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    read = Gate("answers", 1, follows=False).read(logits, [], torch.zeros(n, 1)).double()
    chance = (scale * read[:, LOG_ODDS] + shift).sigmoid()
    return read, chance > torch.rand(n, dtype=torch.double, generator=torch.Generator().manual_seed(seed + 1))


def test_scale_and_shift_are_found_and_stay_as_they_are_while_the_network_learns():
    x, yes = log_odds_and_answers(5000, 0.4, 0.5, 0)
    descent = _Descent(Gate("answers", 1, follows=False).double(), x, yes.double())
    found = (descent.gate.scale.item(), descent.gate.shift.item())
    assert found == pytest.approx((0.4, 0.5), abs=0.08)
    before = descent.gate.judge(x).detach()
    descent.step()
    assert (descent.gate.scale.item(), descent.gate.shift.item()) == found
    assert not torch.equal(descent.gate.judge(x), before)


@pytest.mark.parametrize("size", [20, 400])
def test_answers_that_can_be_told_apart_entirely_make_nobody_entirely_sure(size):
    x, _ = log_odds_and_answers(size, 1, 0, 0)
    gate = Gate("answers", 1, follows=False).double()
    _Descent(gate, x, (x[:, LOG_ODDS] > x[:, LOG_ODDS].median()).double())
    assert 0 < gate.scale < 20
    assert (x[:, LOG_ODDS] * gate.scale + gate.shift).sigmoid().median() < 0.9


@pytest.mark.parametrize(("size", "shift"), [(30, 0.5), (60, 0.5), (300, 2.5)])
def test_few_images_of_the_rarer_answer_cost_little_order_and_no_truth(size, shift):
    """The answers come from the max probability alone, so any more that a gate believes is wrong. Over ten draws."""
    fresh, wanted = log_odds_and_answers(5000, 0.4, shift, 1000)
    for seed in range(10):
        x, yes = log_odds_and_answers(size, 0.4, shift, 2 * seed)
        gate = Gate("answers", 1, follows=False)
        decision._fit(gate, x, yes, seed)
        with torch.no_grad():
            h = gate.judge(fresh).sigmoid()
        best = roc_auc_score(wanted, fresh[:, LOG_ODDS])
        assert roc_auc_score(wanted, h) > best - 0.05
        share = wanted.double().mean()
        blind = F.binary_cross_entropy(share.expand(len(h)), wanted.double())
        assert F.binary_cross_entropy(h, wanted.double()) < 1.2 * blind


@pytest.mark.parametrize("wrong", [1, 19])
def test_a_few_answers_of_one_kind_change_no_order_even_if_they_were_the_surest(wrong, model, images):
    answers, sure = model.all_exits(images).logits[0].argmax(-1), max_prob(model, images)[0]
    labels = answers.clone()
    worst = sure.topk(wrong).indices
    labels[worst] = (answers[worst] + 1) % K
    fit_gates(model, TensorDataset(images, labels), target="right")
    h = model.all_exits(images).confidence[0].detach()
    assert (h[sure.argsort()].diff() >= 0).all()


def test_labels_make_the_question_and_without_them_the_backbone_does(model, images):
    assert fit_gates(model, random_labels(images)).target == "best"
    assert fit_gates(model, unlabelled(images)).target == "agrees"
    assert fit_gates(model, TensorDataset(images, torch.full((n,), K))).target == "agrees"
    assert fit_gates(model, TensorDataset(images, torch.full((n,), -1))).target == "agrees"


def test_no_answer_changes_and_neither_does_the_backbone(model, images):
    before, weights = model.all_exits(images), copy.deepcopy(model.backbone.state_dict())
    fit_gates(model, unlabelled(images))
    after = model.all_exits(images)
    assert torch.equal(before.logits, after.logits)
    assert not torch.equal(before.confidence, after.confidence)
    assert all(torch.equal(value, weights[name]) for name, value in model.backbone.state_dict().items())
    assert not model.training


def test_one_seed_gives_the_same_gates_in_any_batches_and_another_seed_others(images):
    found = []
    for seed, size in ((0, 128), (0, 37), (1, 128)):
        torch.manual_seed(0)
        model = make()
        labels = right_where_the_margin_is_large(model, images)
        before = torch.get_rng_state()
        fit_gates(model, TensorDataset(images, labels), target="right", seed=seed, batch_size=size)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.all_exits(images).confidence)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found[0], found[2], rtol=1e-3, atol=1e-3)


def test_a_loader_and_gradients_switched_off_are_as_good(images):
    found = []
    for data in (unlabelled(images), DataLoader(unlabelled(images), 128)):
        torch.manual_seed(0)
        model = make()
        with torch.inference_mode():
            fit_gates(model, data)
            found.append(model.all_exits(images).confidence)
        model.all_exits(images).confidence.sum().backward()  # of no use, but nothing is left that forbids it
    assert torch.equal(*found)


def test_gates_that_are_there_make_way_for_new_ones(model, images):
    fit_gates(model, unlabelled(images))
    first, costs = model.all_exits(images).confidence, model.costs
    fit_gates(model, random_labels(images), target="right")
    assert not torch.equal(model.all_exits(images).confidence, first)
    assert model.costs == costs


def test_gates_are_counted_and_read_features_or_not(model, images):
    bare = model.costs
    fit_gates(model, unlabelled(images))
    assert [e.gate for e in model.exits] == ["answers"] * 2
    little = model.costs
    fit_gates(model, unlabelled(images), reads="features")
    assert bare != little
    assert little[-1] < model.costs[-1]


def test_an_image_whose_answers_are_not_finite_teaches_nothing(model, images):
    images[3] = math.nan
    fit_gates(model, unlabelled(images))
    confidence = model.all_exits(images).confidence[:-1]
    assert confidence[:, 3].isnan().all()
    assert confidence.isnan().sum() == len(confidence)


def test_half_precision_models_get_gates_that_decide_alike(images):
    torch.manual_seed(0)
    model = make()
    half = copy.deepcopy(model).bfloat16()
    data = TensorDataset(images, right_where_the_margin_is_large(model, images))
    fit_gates(model, data, target="right")
    fit_gates(half, data, target="right")
    assert next(half.heads[0].gate.parameters()).dtype == torch.bfloat16
    agree = (
        half.all_exits(images.bfloat16()).confidence[:-1] >= 0.5
    ) == (model.all_exits(images).confidence[:-1] >= 0.5)  # fmt: skip
    assert agree.double().mean().item() > 0.8


def test_the_table_says_how_many_images_and_which_question(model, images):
    fits = fit_gates(model, unlabelled(images))
    assert isinstance(fits, GateFits)
    assert "400 images. Is the answer the backbone's?" in str(fits)
    assert [row.split()[:2] for row in str(fits).splitlines()[3:5]] == [["0", "one"], ["1", "two"]]
    assert fits.to_dict()["exits"][1]["exit"] == "two"


@pytest.mark.parametrize(
    ("more", "kind", "said"),
    [
        ({"target": "agree"}, UnknownName, "'agree'.*Did you mean 'agrees'"),
        ({"reads": "feature"}, UnknownName, "'feature'.*Did you mean 'features'"),
        ({"target": "right"}, DataError, "'right' needs labels: the data has none"),
        ({"device": "cuda:99"}, PteeError, "cuda:99"),
        ({"seed": "a"}, PteeError, "seed='a' must be a whole number"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_no_gate_is_hung(more, kind, said, model, images):
    with pytest.raises(kind, match=said):
        fit_gates(model, unlabelled(images), **more)
    assert all(head.gate is None for head in model.heads)


def test_labels_that_are_no_classes_cannot_be_asked_for(model, images):
    with pytest.raises(DataError, match=f"its labels are {K} to {K}"):
        fit_gates(model, TensorDataset(images, torch.full((n,), K)), target="best")


def test_too_few_images_are_refused(model, images):
    with pytest.raises(DataError, match=r"needs 20 images.*there are 19"):
        fit_gates(model, unlabelled(images[:19]))


# ---------------------------------------------------------------------------------------------------- images of their own


def test_images_for_gates_are_drawn_by_the_seed_and_kept_from_the_heads():
    data = TensorDataset(torch.arange(1000))
    heads, gates = hold_out(data, 0.1, seed=3)
    rows = [{int(part[i][0]) for i in range(len(part))} for part in (heads, gates)]
    assert [len(r) for r in rows] == [900, 100]
    assert rows[0] | rows[1] == set(range(1000))
    assert hold_out(data, 0.1, seed=3)[1].indices == gates.indices
    assert hold_out(data, 0.1, seed=4)[1].indices != gates.indices


def test_a_part_still_says_of_which_files_it_is():
    data = TensorDataset(torch.arange(100))
    data.files_sha256 = "abc"
    assert [part.files_sha256 for part in hold_out(data, 0.3)] == ["abc", "abc"]


@pytest.mark.parametrize("share", [0, -0.1, 0.6, math.nan])
def test_a_share_that_leaves_one_side_nothing_is_refused(share):
    with pytest.raises(PteeError, match=r"share.*above 0, up to 0\.5"):
        hold_out(TensorDataset(torch.arange(1000)), share)


def test_a_share_too_small_for_gates_is_refused():
    with pytest.raises(DataError, match=r"0.1 of 100 training images are 10.*--gate-share"):
        hold_out(TensorDataset(torch.arange(100)), 0.1)
