"""Policies: how sure an exit is, made of what the exits said. Each gives h; larger is surer, and the backbone is sure.

A policy is a function of logits (E+1, n, K) and the heads' own confidences (E+1, n) that gives h (E+1, n), float32, in
0..1, the last row 1. It knows no labels, so it can be used where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Policy = Callable[[Tensor, Tensor], Tensor]


def learned(logits: Tensor, confidence: Tensor) -> Tensor:
    """What the heads' own confidence says (EENet, PTEENet)."""
    return _sure_at_last(confidence.float())


def max_prob(logits: Tensor, confidence: Tensor) -> Tensor:
    """The largest probability."""
    return _sure_at_last(_probabilities(logits).amax(-1))


def entropy(logits: Tensor, confidence: Tensor) -> Tensor:
    """1 - H / log K: BranchyNet's entropy turned round; with one class, 1."""
    p = _probabilities(logits)
    unsure = torch.special.entr(p).sum(-1) / max(math.log(p.shape[-1]), torch.finfo(p.dtype).tiny)
    return _sure_at_last((1 - unsure).clamp(0, 1))


def margin(logits: Tensor, confidence: Tensor) -> Tensor:
    """The largest probability less the second."""
    p = _probabilities(logits)
    first = p.topk(min(2, p.shape[-1]), -1).values
    return _sure_at_last(first[..., 0] - first[..., 1:].sum(-1))


def patience(logits: Tensor, confidence: Tensor) -> Tensor:
    """How many exits in a row, this one included, gave this answer, over E+1 (PABEE)."""
    answers = logits.argmax(-1)
    row = torch.ones_like(answers)
    for n in range(1, len(answers)):
        row[n] = torch.where(answers[n] == answers[n - 1], row[n - 1] + 1, 1)
    return _sure_at_last(row.float() / len(answers))


POLICIES: dict[str, Policy] = {
    "learned": learned,
    "max_prob": max_prob,
    "entropy": entropy,
    "margin": margin,
    "patience": patience,
}
LEARNED = "learned"  # h as the model's own heads or gates give it
LOOKING_BACK = ("patience",)  # their h is made of what the exits before said, too


def _probabilities(logits: Tensor) -> Tensor:
    """In float32: in half precision the largest of 1000 is soon 1."""
    return logits.float().softmax(-1)


def _sure_at_last(h: Tensor) -> Tensor:
    return torch.cat([h[:-1], torch.ones_like(h[:1])])
