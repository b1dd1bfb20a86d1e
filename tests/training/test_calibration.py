"""Calibration: two numbers for each exit are fitted to a question; nothing but h changes."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from device import seeded
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ptee
from ptee._common.errors import DataError, PteeError, UnknownName
from ptee.backbones.load import load_backbone
from ptee.exits.confidence import log_odds
from ptee.model.build import build
from ptee.pipeline.recipe import ConfidenceConfig
from ptee.training import calibration
from ptee.training.calibration import QUESTIONS, Calibration, calibrate, fit_scale_and_shift, hold_out

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


def make() -> ptee.EarlyExitModel:
    made = build(load_backbone(Net(), input_size=SIZE), exits=["one", "two"], head="plain")
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


def max_prob(model: ptee.EarlyExitModel, images: Tensor) -> Tensor:
    """(E, n)."""
    return model.all_exits(images).logits[:-1].softmax(-1).amax(-1).detach()


def mostly_right_where_sure(model: ptee.EarlyExitModel, images: Tensor) -> Tensor:
    """Labels by which the answer of exit 0 is right with the probability sigmoid(.4 log-odds + .3)."""
    logits = model.all_exits(images).logits[0].detach()
    right = (0.4 * log_odds(logits) + 0.3).sigmoid() > torch.rand(len(images))
    return torch.where(right, logits.argmax(-1), (logits.argmax(-1) + 1) % K)


# ---------------------------------------------------------------------------------------------------- what h becomes


def test_h_is_the_probability_of_a_yes_and_orders_rows_as_the_largest_probability(model, images):
    labels = mostly_right_where_sure(model, images)
    found = calibrate(model, TensorDataset(images, labels), target="right")
    every = model.all_exits(images)
    right, h = every.logits[0].argmax(-1) == labels, every.confidence[0].detach()
    assert model.confidence == "calibrated"
    assert found.exits[0].loss < found.exits[0].max_prob_loss
    assert found.exits[0].loss < found.exits[0].base_rate_loss
    assert h.mean().item() == pytest.approx(right.double().mean().item(), abs=0.02)
    right, h, surest = right.cpu(), h.cpu(), max_prob(model, images)[0].cpu()
    assert roc_auc_score(right, h) >= roc_auc_score(right, surest) - 1e-9


def test_what_cannot_be_known_leaves_h_near_the_share_of_yes(model, images):
    found = calibrate(model, random_labels(images), target="right")
    for exit_, sure in zip(found.exits, model.all_exits(images).confidence, strict=False):
        assert exit_.loss < 1.02 * exit_.base_rate_loss
        assert sure.mean().item() == pytest.approx(exit_.yes, abs=0.05)


def test_the_losses_are_cross_entropies_on_these_images(model, images):
    labels = mostly_right_where_sure(model, images)
    top, right = max_prob(model, images)[0], model.all_exits(images).logits[0].argmax(-1) == labels
    found = calibrate(model, TensorDataset(images, labels), target="right").exits[0]
    h = model.all_exits(images).confidence[0].detach()
    assert found.loss == pytest.approx(F.binary_cross_entropy(h, right.float()).item(), abs=1e-4)
    assert found.max_prob_loss == pytest.approx(F.binary_cross_entropy(top, right.float()).item(), abs=1e-3)
    p = (right.sum().item() + 1) / (n + 2)
    assert found.base_rate_loss == pytest.approx(-(found.yes * math.log(p) + (1 - found.yes) * math.log(1 - p)))


@pytest.mark.parametrize("target", QUESTIONS)
def test_the_share_of_yes_is_that_of_the_question(target, model, images):
    labels = torch.randint(K, (n,))
    answers = model.all_exits(images).logits.argmax(-1).tolist()
    found = calibrate(model, TensorDataset(images, labels), target=target)
    for e in range(2):
        yes = 0
        for i, label in enumerate(labels.tolist()):
            right = [answers[later][i] == label for later in range(3)]
            yes += {
                "agrees": answers[e][i] == answers[2][i],
                "right": right[e],
                "best": right[e] or not any(right[e + 1 :]),
            }[target]
        assert found.exits[e].yes == pytest.approx(yes / n)


@pytest.mark.parametrize("right", [False, True])
def test_where_every_image_has_the_same_answer_h_says_so_and_still_tells_rows_apart(right, model, images):
    labels = model.all_exits(images).logits[0].argmax(-1) if right else torch.full((n,), K - 1)
    with torch.no_grad():
        model.heads[0].logits.bias[K - 1] -= 0 if right else 1000  # never its answer
    found = calibrate(model, TensorDataset(images, labels), target="right")
    assert found.exits[0].yes == right
    assert f"Exit 0: on {'every' if right else 'no'} image the answer is the label, so h is a rough guess." in str(
        found
    )
    h = model.all_exits(images).confidence[0].detach()
    assert h.mean().item() == pytest.approx(float(right), abs=0.1)
    assert (h[max_prob(model, images)[0].argsort()].diff() >= 0).all()
    assert len(h.unique()) > n / 2


# ---------------------------------------------------------------------------------------------------- the two numbers


def log_odds_and_answers(size: int, scale: float, shift: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-odds (size,), and whether the answer is yes (size,), by chance."""
    odds = log_odds(3 * torch.randn(size, 10, generator=seeded(seed))).double()
    drawn = torch.rand(size, dtype=torch.double, generator=seeded(seed + 1))
    return odds, ((scale * odds + shift).sigmoid() > drawn).double()


@pytest.mark.parametrize(("scale", "shift"), [(0.4, 0.5), (1.0, 0.0), (2.0, -1.0), (0.1, 2.0)])
def test_scale_and_shift_are_found_again(scale, shift):
    found = fit_scale_and_shift(*log_odds_and_answers(20_000, scale, shift))
    assert found == pytest.approx((scale, shift), abs=0.1)


GUIDE = Path(__file__).parents[2] / "recipes" / "guide" / "heads_and_confidences.md"


@pytest.mark.parametrize(("size", "scale"), [(30, 0.2), (200, -0.5), (500, 1.0)])
def test_scale_and_shift_minimise_what_the_guide_and_the_module_print(size, scale):
    assert "[ t_i log h_i + (1 - t_i) log(1 - h_i) ]  +  (log a)^2 / 2" in GUIDE.read_text()
    assert "[ t_i log h_i + (1 - t_i) log(1 - h_i) ]  +  (log scale)^2 / 2" in calibration.__doc__
    odds, yes = log_odds_and_answers(size, scale, 1.0)
    t = torch.where(yes > 0, (yes.sum() + 1) / (yes.sum() + 2), 1 / ((1 - yes).sum() + 2))

    def printed(log_a: float, b: float) -> float:
        h = (math.exp(log_a) * odds + b).sigmoid()
        return -(t * h.log() + (1 - t) * (1 - h).log()).sum().item() + log_a**2 / 2

    a, b = fit_scale_and_shift(odds, yes)
    least = printed(math.log(a), b)
    assert all(printed(math.log(a) + x, b + y) >= least - 1e-6 for x in (-0.05, 0, 0.05) for y in (-0.05, 0, 0.05))


@pytest.mark.parametrize("size", [20, 400])
def test_answers_that_are_separated_perfectly_do_not_lead_to_certainty(size):
    odds, _ = log_odds_and_answers(size, 1, 0)
    scale, shift = fit_scale_and_shift(odds, (odds > odds.median()).double())
    assert 0 < scale < 20
    assert (odds * scale + shift).sigmoid().median() < 0.9


@pytest.mark.parametrize("kind", ["no", "yes", "against the largest probability"])
def test_scale_and_shift_stay_finite_and_keep_the_order(kind):
    odds, _ = log_odds_and_answers(400, 1, 0)
    yes = {"no": torch.zeros_like(odds), "yes": torch.ones_like(odds)}.get(kind, (odds < odds.median()).double())
    scale, shift = fit_scale_and_shift(odds, yes)
    assert scale > 0
    assert math.isfinite(scale) and math.isfinite(shift)


@pytest.mark.parametrize(("size", "shift"), [(30, 0.5), (60, 0.5), (300, 2.5)])
def test_few_images_cost_little_truth_over_ten_draws(size, shift):
    fresh, wanted = log_odds_and_answers(5000, 0.4, shift, 1000)
    share = wanted.mean()
    base_rate = F.binary_cross_entropy(share.expand(len(wanted)), wanted)
    for seed in range(10):
        scale, more = fit_scale_and_shift(*log_odds_and_answers(size, 0.4, shift, 2 * seed))
        assert F.binary_cross_entropy_with_logits(scale * fresh + more, wanted) < 1.2 * base_rate


# ---------------------------------------------------------------------------------------------------- few images


@pytest.mark.parametrize("few", [1, 19])
def test_with_fewer_than_20_images_h_is_the_largest_probability_and_the_table_says_so(few, model, images):
    found = calibrate(model, unlabelled(images[:few]))
    assert [(e.scale, e.shift) for e in found.exits] == [(1, 0), (1, 0)]
    many = "1 image with finite answers is" if few == 1 else f"{few} images with finite answers are"
    assert f"Exit 1: {many} too few: h is the largest probability as it is." in str(found)
    torch.testing.assert_close(model.all_exits(images).confidence[:-1], max_prob(model, images), rtol=1e-4, atol=1e-5)


def test_with_few_images_of_one_answer_the_table_says_that_the_numbers_are_rough(model, images):
    labels = model.all_exits(images).logits[0].argmax(-1)
    labels[:7] = (labels[:7] + 1) % K
    found = calibrate(model, TensorDataset(images, labels), target="right")
    assert "Exit 0: on all but 7 images the answer is the label, so h is a rough guess. Give more images." in str(found)
    assert "Exit 1" not in str(found)


# ---------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("labels", [None, 0, K, -1], ids=str)
def test_the_question_is_the_recipes_with_labels_and_without(labels, model, images):
    assert ConfidenceConfig().question == "agrees"
    data = TensorDataset(images, *([] if labels is None else [torch.full((n,), labels)]))
    assert calibrate(model, data).target == "agrees"


def test_no_answer_changes_and_neither_does_the_backbone_or_a_cost(model, images):
    before, costs, weights = model.all_exits(images), model.costs, copy.deepcopy(model.state_dict())
    calibrate(model, unlabelled(images))
    after = model.all_exits(images)
    assert torch.equal(before.logits, after.logits)
    assert not torch.equal(before.confidence, after.confidence)
    assert model.costs == costs
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_batches_of_any_size_a_loader_and_inference_mode_give_the_same(images):
    found = []
    for data, size in ((unlabelled(images), 128), (unlabelled(images), 37), (DataLoader(unlabelled(images), 64), 1)):
        torch.manual_seed(0)
        model = make()
        state = torch.get_rng_state()
        with torch.inference_mode():
            calibrate(model, data, batch_size=size)
        assert torch.equal(torch.get_rng_state(), state)
        found.append([*model.calibrated.scale, *model.calibrated.shift])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] == pytest.approx(found[2], rel=1e-3)


def test_the_seed_draws_the_order_of_a_loader_and_a_second_calibration_replaces_the_first(model, images):
    data = DataLoader(unlabelled(images), 64, shuffle=True)
    torch.set_default_device(None)  # elsewhere such a loader needs a generator of its own
    calibrate(model, data, seed=3)
    first = model.calibrated
    calibrate(model, data, seed=3)
    assert model.calibrated == first
    calibrate(model, random_labels(images), target="right")
    assert model.calibrated != first


def test_an_image_whose_exits_answer_nan_teaches_nothing(model, images):
    calibrate(model, unlabelled(images[torch.arange(n) != 3]))
    without, fourth = model.calibrated, torch.arange(n)[:, None] == 3
    for head in model.heads:
        head.logits.register_forward_hook(lambda _, given, out: out.masked_fill(fourth, math.nan))
    found = calibrate(model, unlabelled(images), batch_size=n)
    assert [e.images for e in found.exits] == [n - 1, n - 1]
    assert [*model.calibrated.scale, *model.calibrated.shift] == pytest.approx(
        [*without.scale, *without.shift], rel=1e-4
    )
    confidence = model.all_exits(images).confidence[:-1]
    assert confidence[:, 3].isnan().all()
    assert confidence.isnan().sum() == len(confidence)


def test_an_exit_whose_confidence_layer_gives_nan_is_fitted_to_no_image(model, images):
    with torch.no_grad():
        model.heads[0].confidence.bias.fill_(math.nan)
    assert [e.images for e in calibrate(model, unlabelled(images)).exits] == [0, n]


def test_an_image_that_the_backbone_does_not_answer_is_refused_with_its_place(model, images):
    images[3] = math.nan
    with pytest.raises(DataError, match=rf"logits are NaN for 1 of {n} images \(the first has the index 3\)"):
        calibrate(model, unlabelled(images))
    assert model.calibrated is None


def test_a_model_in_half_precision_decides_alike(images):
    torch.manual_seed(0)
    model = make()
    half = copy.deepcopy(model).bfloat16()
    data = TensorDataset(images, mostly_right_where_sure(model, images))
    calibrate(model, data, target="right")
    calibrate(half, data, target="right")
    one, other = (m.all_exits(x).confidence[:-1] for m, x in ((model, images), (half, images.bfloat16())))
    assert (one - other).abs().mean() < 0.02


def test_the_table_says_how_many_images_and_which_question(model, images):
    found = calibrate(model, unlabelled(images))
    assert isinstance(found, Calibration)
    assert "The confidence h, the chance that the answer is the backbone's, was fitted on 400 images." in str(found)
    rows = [row.split()[:2] for row in str(found).splitlines()]
    assert [row for row in rows if row[:1] in (["0"], ["1"])] == [["0", "one"], ["1", "two"]]
    assert found.to_dict()["exits"][1]["exit"] == "two"


@pytest.mark.parametrize(
    ("more", "kind", "words"),
    [
        ({"target": "agree"}, UnknownName, "'agree'.*Did you mean 'agrees'"),
        ({"target": "right"}, DataError, "'right' needs labels: the data has none. Without them give target='agrees'"),
        ({"device": "cuda:99"}, PteeError, "cuda:99"),
        ({"seed": "a"}, PteeError, "seed='a' must be a whole number"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(more, kind, words, model, images):
    with pytest.raises(kind, match=words):
        calibrate(model, unlabelled(images), **more)
    assert (model.confidence, model.calibrated) == ("learned", None)


def test_labels_that_are_no_classes_are_refused_where_the_question_needs_labels(model, images):
    with pytest.raises(DataError, match=f"the labels are {K} to {K}"):
        calibrate(model, TensorDataset(images, torch.full((n,), K)), target="best")


# ---------------------------------------------------------------------------------------------------- images of their own


def test_a_share_of_the_images_is_drawn_for_calibration_and_kept_from_the_heads():
    heads, held = hold_out(TensorDataset(torch.arange(1000)), 0.1, seed=3)
    rows = [{int(part[i][0]) for i in range(len(part))} for part in (heads, held)]
    assert [len(r) for r in rows] == [900, 100]
    assert rows[0] | rows[1] == set(range(1000))


def test_a_share_too_small_to_calibrate_on_is_refused():
    with pytest.raises(DataError, match=r"0.1 of 100 training images is 10.*calibration_share"):
        hold_out(TensorDataset(torch.arange(100)), 0.1)
