from __future__ import annotations

import math

import pytest
import torch

from ptee._common.errors import UnknownName
from ptee.evaluation.traces import Traces
from ptee.exits.confidence import POLICIES

E, N, K = 3, 50, 5
each_policy = pytest.mark.parametrize("policy", POLICIES)


def said() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and confidences of three exits and the backbone."""
    h = torch.rand(E + 1, N)
    h[-1] = 1
    return 3 * torch.randn(E + 1, N, K), h


@each_policy
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_confidence_is_float32_in_0_to_1_and_the_backbone_is_sure(policy, dtype):
    logits, confidence = said()
    h = POLICIES[policy](logits.to(dtype), confidence)
    assert (h.shape, h.dtype) == ((E + 1, N), torch.float32)
    assert 0 <= h.min() <= h.max() <= 1
    assert h[-1].tolist() == [1] * N


@each_policy
def test_a_row_does_not_depend_on_the_others(policy):
    logits, confidence = said()
    h = POLICIES[policy](logits, confidence)
    torch.testing.assert_close(POLICIES[policy](logits[:, 7:9], confidence[:, 7:9]), h[:, 7:9])


@each_policy
def test_logits_shifted_row_by_row_say_the_same(policy):
    logits, confidence = said()
    h = POLICIES[policy](logits - logits.amax(-1, keepdim=True), confidence)
    torch.testing.assert_close(h, POLICIES[policy](logits, confidence))


# the first exit says (1/2, 1/4, 1/4), the second that all are alike
BY_HAND = {
    "learned": [0.3, 0.6],
    "max_prob": [1 / 2, 1 / 3],
    "margin": [1 / 4, 0],
    "entropy": [1 - 1.5 * math.log(2) / math.log(3), 0],
}


@pytest.mark.parametrize(("policy", "want"), BY_HAND.items(), ids=BY_HAND)
def test_policies_by_hand(policy, want):
    logits = torch.tensor([[2.0, 1, 1], [1, 1, 1], [1, 1, 1]]).log()[:, None]
    h = POLICIES[policy](logits, torch.tensor([[0.3], [0.6], [1]]))
    assert h[:-1, 0].tolist() == pytest.approx(want, abs=1e-6)


def test_patience_counts_how_many_exits_in_a_row_agree():
    answers = torch.tensor([[0, 1, 2], [0, 2, 2], [0, 2, 1], [0, 0, 0]])  # (E+1, n)
    h = POLICIES["patience"](torch.nn.functional.one_hot(answers).float(), torch.rand(4, 3))
    assert (4 * h[:-1]).tolist() == [[1, 1, 1], [2, 1, 2], [3, 2, 1]]


@each_policy
def test_one_class_is_no_error(policy):
    assert POLICIES[policy](torch.randn(E + 1, N, 1), torch.ones(E + 1, N)).isfinite().all()


def traces() -> Traces:
    logits, confidence = said()
    return Traces(logits.argmax(-1), confidence, None, torch.ones(E + 1), torch.empty(0), logits=logits)


@each_policy
def test_traces_under_a_policy_have_its_confidence_and_all_else_as_it_was(policy):
    found = traces()
    under = found.under(policy)
    assert torch.equal(under.confidence, POLICIES[policy](found.logits, found.confidence))
    assert under.answers is found.answers
    assert under.costs is found.costs


def test_a_policy_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'entropy'"):
        traces().under("entorpy")
