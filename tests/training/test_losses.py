from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from device import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ptee
from ptee._common.errors import PteeError
from ptee.training.config import ALIASES, Loss
from ptee.training.losses import LOSSES, blend_log_probs

E, b, K = 3, 5, 6
COSTS = torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64)
each_loss = pytest.mark.parametrize("name", sorted(LOSSES))
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
    if name == "weighted":
        return naive_weighted(batch[0], batch[1], batch[3], [1.0] * (E + 1))
    return naive[name] if name in naive else naive_separate(batch[0], batch[1], batch[3])


def naive_weighted(logits: Tensor, confidence_logits: Tensor, target: Tensor, weights: list[float]) -> Tensor:
    """From the naive losses of the exits alone: the divergences, and what h learns."""
    q = (target if target.dim() == 2 else torch.eye(K)[target]).double()
    y = logits.double().softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(E + 1):
        for row in range(b):
            total = (
                total
                + weights[n] * sum(q[row, k] * (q[row, k] / y[n, row, k]).log() for k in range(K) if q[row, k]) / b
            )
    h, best = confidence_logits.double().sigmoid(), q.argmax(-1)
    chance = torch.where(logits[:-1].argmax(-1) == best, h, 1 - h)
    return total - 0.01 * chance.log().mean()


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
    torch.testing.assert_close(of_got, of_want, rtol=1e-9, atol=1e-12)


@each_target
def test_a_weighted_sum_has_the_value_and_gradients_of_the_naive_formula(soft):
    logits, confidence_logits, target = random_batch(soft)
    weights = [1.0, 0.5, 0.0, 0.3]
    got = LOSSES["weighted"](logits, confidence_logits, COSTS, target, exit_weights=weights)
    want = naive_weighted(logits, confidence_logits, target, weights)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    of_got, of_want = (torch.autograd.grad(value, (logits, confidence_logits)) for value in (got, want))
    torch.testing.assert_close(of_got, of_want, rtol=1e-9, atol=1e-12)


@each_target
@pytest.mark.parametrize("name", ["mc", "joint", "joint_each_exit", "weighted"])
def test_a_backbone_that_learns_gets_a_gradient_and_separate_heads_leave_it_alone(name, soft):
    logits, confidence_logits, target = random_batch(soft)
    LOSSES[name](logits, confidence_logits, COSTS, target).backward()
    assert logits.grad.any(-1).all()
    (of_separate,) = torch.autograd.grad(LOSSES["separate"](logits, confidence_logits, COSTS, target), logits)
    assert not of_separate[-1].any()
    assert of_separate[:-1].any(-1).all()


@each_loss
def test_a_label_is_the_probability_one_of_its_class(name):
    logits, confidence_logits, target = random_batch(soft=False)
    one_hot = torch.eye(K, dtype=torch.float64)[target]
    values = [LOSSES[name](logits, confidence_logits, COSTS, t, 0.7) for t in (target, one_hot)]
    torch.testing.assert_close(*values)


@each_target
@each_loss
def test_losses_are_finite_with_logits_of_ten_thousand(name, soft):
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
def test_a_confidence_of_the_backbone_itself_is_refused(name):
    logits, confidence_logits, target = random_batch(soft=False)
    with pytest.raises(PteeError, match=r"\(4, 5, 6\) and \(4, 5\)"):
        LOSSES[name](logits, torch.cat([confidence_logits, confidence_logits[:1]]), COSTS, target)


def test_the_losses_of_the_config_are_those_that_there_are():
    assert set(get_args(Loss)) == {*LOSSES, *ALIASES} and {*ALIASES.values()} <= LOSSES.keys()


def test_the_losses_of_the_thesis_have_its_names_too():
    assert (ptee.losses.v1_loss, ptee.losses.v2_loss) == (LOSSES["joint"], LOSSES["joint_each_exit"])
