"""The blend: its weights minimise the cross-entropy, its answers are weighted means, and bad input changes nothing in silence."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from device import drawn, here, seeded
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.exits.blend import MAX_EXITS, MIN_OF_EITHER, Blend, fit_blend

E, N, K = 3, 400, 5


def answers(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(E+1, n, K) logits of exits that err independently, the later the less, all of them far too sure; and labels (n,)."""
    generator = drawn(seed)
    labels = torch.randint(K, (n,), generator=generator, device="cpu").to(here())
    skill = torch.tensor([1.0, 1.2, 1.4, 1.8])[:, None, None]
    noise = torch.randn(E + 1, n, K, generator=generator, device="cpu").to(here())
    return 4 * (skill * F.one_hot(labels, K) + noise), labels


def accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    return logits.argmax(-1).eq(labels).double().mean(1).tolist()


def test_the_blend_is_the_weighted_sum_of_the_logits_so_far():
    blend = Blend({(0, ()): (0.5,), (2, (0,)): (0.25, 2.0), (3, (0, 2)): (0.1, 0.2, 0.3)})
    y, _ = answers(7)
    z = blend.at_all_exits(y, (0, 2))
    assert torch.allclose(z[0], 0.5 * y[0])
    assert torch.equal(z[1], y[1]), "an exit that is off keeps its own"
    assert torch.allclose(z[2], 0.25 * y[0] + 2 * y[2])
    assert torch.allclose(z[3], 0.1 * y[0] + 0.2 * y[2] + 0.3 * y[3])


def test_no_other_weights_have_a_lower_cross_entropy():
    y, labels = answers()
    v = torch.tensor(fit_blend(y, labels).weights[E, (0, 1, 2)], dtype=torch.float64)

    def loss(weights: Tensor) -> Tensor:
        return F.cross_entropy(torch.einsum("m,mnk->nk", weights, y.double()), labels)

    for step in (
        torch.randn(200, E + 1, dtype=torch.float64) * torch.tensor([1e-3, 1e-2]).repeat_interleave(100)[:, None]
    ):
        assert loss((v + step).clamp_min(0)) >= loss(v) - 1e-9


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("labelled", [True, False])
def test_where_gradients_are_off_the_same_weights_are_found(labelled, around):
    y, labels = answers()
    goal = labels if labelled else None
    with around():
        found = fit_blend(y.clone(), goal)
    assert found == fit_blend(y, goal)


def test_one_exit_alone_is_a_temperature():
    y, labels = answers()
    (v,) = fit_blend(y, labels).weights[0, ()]
    losses = {t: F.cross_entropy(y[0].double() / t, labels).item() for t in (0.5 / v, 0.9 / v, 1 / v, 1.1 / v, 2 / v)}
    assert min(losses, key=losses.__getitem__) == 1 / v


def test_exits_that_err_independently_are_more_accurate_together_on_other_images():
    blend = fit_blend(*answers(seed=1))
    y, labels = answers(seed=2)
    own, together = accuracy(y, labels), accuracy(blend.at_all_exits(y, (0, 1, 2)), labels)
    assert together[0] == own[0], "one exit alone answers as before"
    assert all(b > a + 0.02 for a, b in zip(own[1:], together[1:], strict=True))


@pytest.mark.parametrize("on", [on for size in range(E + 1) for on in combinations(range(E), size)])
def test_every_choice_of_exits_has_weights(on):
    blend = fit_blend(*answers())
    blend.require_weights(on, E)
    assert blend.at_all_exits(answers()[0], on).isfinite().all()


def test_without_labels_the_exits_learn_the_backbones_answer_and_the_end_keeps_it():
    y, _ = answers(seed=1)
    blend = fit_blend(y, None)
    other, _ = answers(seed=2)
    z = blend.at_all_exits(other, (0, 1, 2))
    assert torch.equal(z[-1], other[-1])
    assert not blend.to_the_end
    own, together = (x.argmax(-1).eq(other[-1].argmax(-1)).double().mean(1) for x in (other, z))
    assert together[2] >= own[2]


def test_an_answer_that_says_nothing_gets_no_weight():
    y, labels = answers()
    y[1] = torch.randn(N, K, generator=drawn(2), device="cpu")
    *_, v1, _ = fit_blend(y, labels).weights[2, (0, 1)]
    assert v1 < 0.05


def test_an_answer_that_says_the_contrary_gets_no_weight_below_0():
    y, labels = answers()
    assert min(min(v) for v in fit_blend(torch.stack([-y[0], y[-1]]), labels).weights.values()) == 0


def test_a_class_that_is_ruled_out_does_not_spoil_the_fit():
    y, labels = answers()
    y = y[-2:]
    ruled_out, blend = (fit_blend(F.pad(y, (0, more), value=-torch.inf), labels) for more in (1, 0))
    for key, weights in blend.weights.items():
        assert ruled_out.weights[key] == pytest.approx(weights, abs=1e-3)


def test_every_choice_of_as_many_exits_as_may_be_has_weights_and_of_more_only_all_together():
    y = torch.randn(MAX_EXITS + 2, 10, 2)
    fit_blend(y[1:], None).require_weights((1, 3), MAX_EXITS)
    with pytest.raises(PteeError, match="other exits than"):
        fit_blend(y, None).require_weights((1, 3), MAX_EXITS + 1)


def test_with_few_errors_all_answers_weigh_the_same_and_this_is_said():
    y, labels = answers(3 * MIN_OF_EITHER)
    y[-1] = 9.0 * F.one_hot(labels, K)
    blend = fit_blend(y, labels)
    assert "60 of which the backbone answers right" in blend.remark and "weigh the same" in blend.remark
    assert blend.weights[3, (0, 1, 2)] == (0.25,) * 4


def test_a_thousand_classes_and_a_hundred_images_are_no_problem():
    generator = seeded()
    labels = torch.randint(1000, (100,), generator=generator)
    y = torch.randn(3, 100, 1000, generator=generator) + 5 * F.one_hot(labels, 1000) * torch.rand(
        3, 100, 1, generator=generator
    )
    z = fit_blend(y, labels).at_all_exits(y, (0, 1))
    assert z.shape == y.shape and z.isfinite().all()


def test_images_without_finite_answers_are_left_out_of_the_fit():
    y, labels = answers()
    last = y[:, -3:].clone()
    last[1] = torch.nan  # of one exit alone
    broken = torch.cat([y, last], 1)
    assert (
        fit_blend(broken, torch.cat([labels, torch.zeros(3, dtype=torch.int64)])).weights
        == fit_blend(y, labels).weights
    )


def test_a_nan_among_the_answers_makes_the_blend_nan_in_that_row_alone():
    y, labels = answers()
    blend = fit_blend(y, labels)
    y[0, 5] = torch.nan
    z = blend.at_all_exits(y, (0, 1, 2))
    assert z[:, 5].isnan().all()
    assert z[:, torch.arange(N) != 5].isfinite().all()


def test_an_infinite_logit_rules_out_a_class_in_the_blend():
    y, labels = answers()
    blend = fit_blend(y, labels)
    y[0, :, 0] = -torch.inf
    z = blend.at_all_exits(y, (0, 1, 2))
    assert z[:, :, 0].isneginf().all() and z[:, :, 1:].isfinite().all()


def test_a_choice_of_exits_without_weights_is_refused_with_what_to_do():
    with pytest.raises(PteeError, match=r"blended for other exits than \[0\].*ptee\.tune.*model\.answers"):
        Blend({(0, ()): (1.0,)}).require_weights((0,), E)
