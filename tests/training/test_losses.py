from __future__ import annotations

import math

import pytest
import torch
from device import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ptee
from ptee._common.errors import PteeError, UnknownName
from ptee.training.config import choices
from ptee.training.losses import ALIASES, LOSSES, blend_log_probs, get_loss

E, b, K = 3, 5, 6
COSTS = torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64)
each_loss = pytest.mark.parametrize("name", sorted(LOSSES.keys() - ALIASES.keys()))
each_target = pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft targets"])


def random_batch(soft: bool, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (E+1, b, K), confidence logits (E, b), and targets, in float64."""
    logits = scale * torch.randn(E + 1, b, K, dtype=torch.float64)
    confidence_logits = scale * torch.randn(E, b, dtype=torch.float64)
    target = torch.randn(b, K, dtype=torch.float64).softmax(-1) if soft else torch.randint(K, (b,))
    return logits.requires_grad_(), confidence_logits.requires_grad_(), target


def naive_terms(logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(E+1,) cross-entropies of Y_n and (E+1,) costs C_n, row by row from probabilities, with explicit weights.

    P(leave at m | still there at n) = h_m * prod_{n <= i < m} (1 - h_i), h_E = 1.
    """
    y, h = logits.double().softmax(-1), torch.cat([confidence_logits.double().sigmoid(), torch.ones(1, b)])
    q = target if target.dim() == 2 else torch.eye(K)[target]
    entropies, prices = torch.zeros(E + 1, dtype=torch.float64), torch.zeros(E + 1, dtype=torch.float64)
    for n in range(E + 1):
        for row in range(b):
            leave = [h[m, row] * math.prod(1 - h[i, row] for i in range(n, m)) for m in range(n, E + 1)]
            blended = sum(p * y[m, row] for p, m in zip(leave, range(n, E + 1), strict=True))
            entropies[n] -= (q[row].double() * blended.log()).sum() / b
            prices[n] += sum(p * costs[m] for p, m in zip(leave, range(n, E + 1), strict=True)) / b
    return entropies, prices


def naive_loss(name: str, *batch: Tensor, cost_weight: float) -> Tensor:
    entropies, prices = naive_terms(*batch)
    terms = entropies + cost_weight * prices
    naive = {"mc": entropies[0], "cost": prices[0], "joint": terms[0], "joint_each_exit": terms.sum() / (E + 1)}
    return naive[name] if name in naive else naive_separate(batch[0], batch[1], batch[3])


def naive_separate(logits: Tensor, confidence_logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Row by row from probabilities."""
    q = (target if target.dim() == 2 else torch.eye(K)[target]).double()
    h, total = confidence_logits.double().sigmoid(), torch.zeros((), dtype=torch.float64)
    for n in range(E):
        for row in range(b):
            y = (logits[n, row].double() / temperature).softmax(-1)
            divergence = sum(q[row, k] * (q[row, k] / y[k]).log() for k in range(K) if q[row, k] > 0)
            total = total + temperature**2 * divergence / (E * b)
            chance = h[n, row] if y.argmax() == q[row].argmax() else 1 - h[n, row]
            total = total - 0.01 * chance.log() / (E * b)
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_separate_loss_has_the_value_and_gradients_of_the_naive_formula(temperature):
    logits, confidence_logits, target = random_batch(soft=True, scale=2.0)
    got = LOSSES["separate"](logits, confidence_logits, COSTS, target, temperature=temperature)
    want = naive_separate(logits, confidence_logits, target, temperature)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    leaves = (logits, confidence_logits)
    of_got, of_want = (torch.autograd.grad(value, leaves) for value in (got, want))
    torch.testing.assert_close(of_got, of_want, rtol=1e-9, atol=1e-12)


def test_an_exit_alone_costs_nothing_where_it_answers_as_the_target_at_the_same_temperature():
    final = 3 * torch.randn(1, b, K, dtype=torch.float64)
    logits, confidence_logits = final.expand(E + 1, b, K), torch.full((E, b), 1e3, dtype=torch.float64)
    got = LOSSES["separate"](logits, confidence_logits, COSTS, (final[0] / 2).softmax(-1), temperature=2.0)
    assert got.item() == pytest.approx(0, abs=1e-12)


def test_the_confidence_has_no_part_in_the_answers_gradient():
    logits, confidence_logits, target = random_batch(soft=True)
    gradients = [
        torch.autograd.grad(LOSSES["separate"](logits, c, COSTS, target), logits)[0]
        for c in (confidence_logits, confidence_logits + 3)
    ]
    torch.testing.assert_close(*gradients)


@each_target
@each_loss
def test_value_and_gradients_equal_the_naive_recursion(name, soft):
    logits, confidence_logits, target = random_batch(soft, scale=2.0)
    got = LOSSES[name](logits, confidence_logits, COSTS, target, cost_weight=0.7)
    want = naive_loss(name, logits, confidence_logits, COSTS, target, cost_weight=0.7)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    leaves = (logits, confidence_logits)
    of_got = torch.autograd.grad(got, leaves, allow_unused=True, materialize_grads=True)
    of_want = torch.autograd.grad(want, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(of_got[0][:-1], of_want[0][:-1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_got[1], of_want[1], rtol=1e-9, atol=1e-12)


@each_target
@pytest.mark.parametrize("name", ["mc", "joint", "joint_each_exit", "separate"])
def test_no_gradient_reaches_the_frozen_backbones_logits(name, soft):
    logits, confidence_logits, target = random_batch(soft)
    LOSSES[name](logits, confidence_logits, COSTS, target).backward()
    assert not logits.grad[-1].any()
    assert logits.grad[:-1].any(-1).all()


@each_loss
def test_a_label_is_the_probability_one_of_its_class(name):
    logits, confidence_logits, target = random_batch(soft=False)
    one_hot = torch.eye(K, dtype=torch.float64)[target]
    values = [LOSSES[name](logits, confidence_logits, COSTS, t, 0.7) for t in (target, one_hot)]
    torch.testing.assert_close(*values)


@each_target
@each_loss
def test_finite_with_logits_of_ten_thousand(name, soft):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, confidence_logits, target = random_batch(soft, scale=1e4)
        logits, confidence_logits = (t.detach().to(dtype).requires_grad_() for t in (logits, confidence_logits))
        value = LOSSES[name](logits, confidence_logits, COSTS, target)
        value.backward()
        grads = [t.grad for t in (logits, confidence_logits) if t.grad is not None]
        assert value.isfinite() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("confidence", [-1e4, 1e4])
def test_a_class_with_target_zero_and_no_probability_adds_nothing(confidence):
    logits = torch.tensor([0.0, -1e4]).expand(E + 1, 1, 2).clone().requires_grad_()
    confidence_logits = torch.full((E, 1), confidence, requires_grad=True)
    value = LOSSES["mc"](logits, confidence_logits, COSTS, torch.tensor([[1.0, 0.0]]))
    value.backward()
    assert value == 0
    assert not logits.grad.any() and not confidence_logits.grad.any()


def test_an_answer_far_from_the_target_is_as_dear_as_its_logits_say():
    logits = torch.tensor([1e4, 0.0]).expand(2, 1, 2)  # both exits give class 1 the probability exp(-1e4)
    value = LOSSES["mc"](logits, torch.zeros(1, 1), COSTS[:2], torch.tensor([1]))
    assert value == pytest.approx(1e4)


@each_target
@each_loss
def test_half_types_are_computed_in_float32(name, soft):
    batch = [t.detach().bfloat16() if t.is_floating_point() else t for t in random_batch(soft)]
    logits, confidence_logits, target = batch
    got = LOSSES[name](logits, confidence_logits, COSTS, target)
    want = LOSSES[name](logits.float(), confidence_logits.float(), COSTS, target.float() if soft else target)
    assert got.dtype == torch.float32
    assert got == want


@each_loss
def test_float32_is_near_float64(name):
    logits, confidence_logits, target = random_batch(soft=False, scale=5.0)
    want = LOSSES[name](logits, confidence_logits, COSTS, target)
    got = LOSSES[name](logits.float(), confidence_logits.float(), COSTS.float(), target)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


anything = st.lists(st.floats(-30, 30), min_size=E * 2, max_size=E * 2)


@given(gates=anything, seed=st.integers(0, 99))
def test_blended_probabilities_sum_to_one(gates, seed):
    logits = 20 * torch.randn(E + 1, 2, K, dtype=torch.float64, generator=seeded(seed))
    confidence_logits = torch.tensor(gates, dtype=torch.float64).view(E, 2, 1)
    blended = blend_log_probs(logits.log_softmax(-1), confidence_logits).exp()
    torch.testing.assert_close(blended.sum(-1), torch.ones(E + 1, 2, dtype=torch.float64))


@given(gates=anything, costs=st.lists(st.floats(0, 5), min_size=E + 1, max_size=E + 1))
def test_expected_cost_lies_between_the_least_and_the_greatest(gates, costs):
    confidence_logits = torch.tensor(gates, dtype=torch.float64).view(E, 2)
    logits, target = torch.zeros(E + 1, 2, K, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    value = LOSSES["cost"](logits, confidence_logits, torch.tensor(costs, dtype=torch.float64), target).item()
    assert min(costs) - 1e-9 <= value <= max(costs) + 1e-9


@pytest.mark.parametrize("leave_at", range(E + 1))
def test_certain_confidences_give_the_loss_of_the_exit_where_all_leave(leave_at):
    logits, _, target = random_batch(soft=False)
    confidence_logits = torch.full((E, b), -1e3, dtype=torch.float64)
    confidence_logits[leave_at:] = 1e3
    alone = torch.nn.functional.cross_entropy(logits[leave_at], target)
    got = LOSSES["joint"](logits, confidence_logits, COSTS, target, cost_weight=2.0)
    torch.testing.assert_close(got, alone + 2 * COSTS[leave_at])


def test_v2_is_the_mean_over_the_exits_of_v1_without_those_before():
    logits, confidence_logits, target = random_batch(soft=False)
    terms = [LOSSES["joint"](logits[n:], confidence_logits[n:], COSTS[n:], target) for n in range(E + 1)]
    torch.testing.assert_close(
        LOSSES["joint_each_exit"](logits, confidence_logits, COSTS, target), sum(terms) / (E + 1)
    )


@each_loss
def test_costs_may_be_in_another_type_than_the_logits(name):
    logits, confidence_logits, target = (t.detach() for t in random_batch(soft=False))
    logits, confidence_logits = logits.float(), confidence_logits.float()
    values = [LOSSES[name](logits, confidence_logits, costs, target) for costs in (COSTS, COSTS.float())]
    torch.testing.assert_close(*values)


@each_loss
def test_a_confidence_of_the_backbone_itself_is_refused(name):
    logits, confidence_logits, target = random_batch(soft=False)
    with pytest.raises(PteeError, match=r"\(4, 5, 6\) and \(4, 5\)"):
        LOSSES[name](logits, torch.cat([confidence_logits, confidence_logits[:1]]), COSTS, target)


def test_unknown_loss_suggests_the_nearest():
    with pytest.raises(UnknownName, match=r"Unknown loss 'v3'\. Did you mean 'v2' or 'v1'"):
        get_loss("v3")


def test_the_losses_of_the_config_are_those_that_there_are():
    assert set(choices("loss")) == LOSSES.keys() - ALIASES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_found_by_its_name(name):
    assert get_loss(name) is LOSSES[ALIASES.get(name, name)]


def test_the_losses_of_the_thesis_have_its_names_too():
    assert (ptee.losses.v1_loss, ptee.losses.v2_loss) == (LOSSES["joint"], LOSSES["joint_each_exit"])
