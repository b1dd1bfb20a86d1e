"""What training minimises: the exits together, blended by their confidences, or each exit alone.

With y_n the softmax of exit n, h_n its confidence, c_n its cost and E the backbone's own output (h_E = 1):

    Y_E = y_E        Y_n = h_n y_n + (1 - h_n) Y_{n+1}
    C_E = c_E        C_n = h_n c_n + (1 - h_n) C_{n+1}

    separate        = mean over n < E of KL(target || y_n), and of how well h_n tells whether exit n is right
    weighted        = sum over n = 0..E of w_n KL(target || y_n), and of the same
    joint           = CE(target, Y_0) + cost_weight C_0
    joint_each_exit = mean over n = 0..E of CE(target, Y_n) + cost_weight C_n
    mc              = CE(target, Y_0)
    cost            = C_0

Cross-entropies are computed from logits in log space: Y itself underflows where a loss is most needed.

Every loss takes the same and gives a scalar, the mean over the batch, in float32 at least:

    logits             (E+1, b, K) of every exit; the last are the backbone's, which get a gradient if it learns
    confidence_logits  (E, b), h is their sigmoid
    costs              (E+1,) of leaving at each exit
    target             (b,) int64 labels, or (b, K) probabilities
    cost_weight        the thesis's lambda

For labels KL(target || y) is the cross-entropy CE(target, y) = -log y[target].

Sources: Demir, Early-exit Convolutional Neural Networks, MSc thesis, METU 2019, section 3.4, eqs. 6-12 (joint is its v1,
joint_each_exit its v2); Scardapane et al., Differentiable branching in deep networks for fast inference, ICASSP 2020 (joint);
Teerapittayanon et al., BranchyNet, ICPR 2016 (weighted); for `separate` Hinton, Vinyals & Dean, Distilling the knowledge in a
neural network, 2015, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.training.config import SEPARATE, WEIGHTED

Loss = Callable[..., Tensor]
CONFIDENCE_SHARE = 0.01  # of the answers' weight: see `separate_loss`


def mc_loss(
    logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor, cost_weight: float = 1.0
) -> Tensor:
    """CE(target, Y_0), the cross-entropy of the blended answer. Costs have no influence, so images come to leave at the end."""
    return _cross_entropies(logits, confidence_logits, target)[0]


def cost_loss(
    logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor, cost_weight: float = 1.0
) -> Tensor:
    """C_0, the expected cost. Answers have no influence, so all images come to leave at exit 0."""
    return _expected_costs(logits, confidence_logits, costs)[0]


def joint_loss(
    logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor, cost_weight: float = 1.0
) -> Tensor:
    """CE(target, Y_0) + cost_weight C_0. PTEENet trains with it at weight 1, and so does differentiable branching.

    Differentiable branching calls Y_0 the soft output of the first branch, and counts C_0 in operations.
    """
    cross_entropy = _cross_entropies(logits, confidence_logits, target)[0]
    return cross_entropy + cost_weight * _expected_costs(logits, confidence_logits, costs)[0]


def joint_each_exit_loss(
    logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor, cost_weight: float = 1.0
) -> Tensor:
    """(1 / (E+1)) sum over n = 0..E of CE(target, Y_n) + cost_weight C_n.

    The thesis sums these E+1 terms, and PTEENet's code divides the sum by E. With the mean, the size of the loss does not depend
    on the number of exits, so neither does what a learning rate means.
    """
    cross_entropies = _cross_entropies(logits, confidence_logits, target)
    return (cross_entropies + cost_weight * _expected_costs(logits, confidence_logits, costs)).mean()


def separate_loss(
    logits: Tensor,
    confidence_logits: Tensor,
    costs: Tensor,
    target: Tensor,
    cost_weight: float = 1.0,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Each exit alone: the divergence of its answer from the target, mean over the E exits, and what h learns.

    h learns by cross-entropy whether the exit's answer is the target's largest class. This term counts a hundredth: the features
    are for the answers. The confidence layer gets no other gradient, and Adam without weight decay undoes the factor there.

    The temperature divides the exits' logits; a target of probabilities has the same temperature already. The divergence is
    multiplied by its square, which keeps the size of gradients. Costs and the backbone's logits are not used.
    """
    _require_exits(logits, confidence_logits)
    wide = logits.to(_wide(logits))
    divergence = temperature**2 * _divergences((wide[:-1] / temperature).log_softmax(-1), target)
    return divergence.mean() + CONFIDENCE_SHARE * _knowing(wide, confidence_logits, target)


def weighted_loss(
    logits: Tensor,
    confidence_logits: Tensor,
    costs: Tensor,
    target: Tensor,
    cost_weight: float = 1.0,
    *,
    exit_weights: Sequence[float] | None = None,
) -> Tensor:
    """BranchyNet's: the sum over n = 0..E of w_n CE(target, y_n), the backbone's own answer being number E; w_n = 1 if None.

    BranchyNet leaves by entropy. So that there is a learned confidence as well, h learns as in `separate_loss`. Costs are not
    used.
    """
    _require_exits(logits, confidence_logits)
    weights = (1.0,) * len(logits) if exit_weights is None else tuple(exit_weights)
    wide = logits.to(_wide(logits))
    divergences = _divergences(wide.log_softmax(-1), target).mean(-1)
    return divergences @ divergences.new_tensor(weights) + CONFIDENCE_SHARE * _knowing(wide, confidence_logits, target)


def _knowing(wide: Tensor, confidence_logits: Tensor, target: Tensor) -> Tensor:
    """How well h tells whether the answers of the early exits are the target's largest class: cross-entropy."""
    best = target if target.dim() == 1 else target.argmax(-1)
    right = (wide[:-1].argmax(-1) == best).to(wide.dtype)
    return F.binary_cross_entropy_with_logits(confidence_logits.to(wide.dtype), right)


def _divergences(log_y: Tensor, target: Tensor) -> Tensor:
    """(E, b) KL divergence of each exit's answer from the target; for labels this is the cross-entropy."""
    if target.dim() == 1:
        return -_of_class(log_y, target)
    target = target.to(log_y.dtype)
    return (torch.special.xlogy(target, target) - target * log_y).sum(-1)


LOSSES: dict[str, Loss] = {
    SEPARATE: separate_loss,
    WEIGHTED: weighted_loss,
    "joint": joint_loss,
    "joint_each_exit": joint_each_exit_loss,
    "mc": mc_loss,
    "cost": cost_loss,
}
v1_loss, v2_loss = joint_loss, joint_each_exit_loss  # the thesis's names


def blend_log_probs(log_y: Tensor, confidence_logits: Tensor) -> Tensor:
    """log Y_0 .. log Y_E (E+1, b, K), from log y_n of the same shape and confidence logits (E, b, 1).

    Classes are blended each on its own, so (E+1, b) and (E, b) of one class give (E+1, b).
    """
    leave, stay = F.logsigmoid(confidence_logits), F.logsigmoid(-confidence_logits)  # log h, log (1 - h)
    blended = [log_y[-1]]
    for n in reversed(range(len(confidence_logits))):
        blended.append(torch.logaddexp(leave[n] + log_y[n], stay[n] + blended[-1]))
    return torch.stack(blended[::-1])


def _of_class(log_y: Tensor, target: Tensor) -> Tensor:
    """(E+1, b) of log y_n (E+1, b, K) that of the class (b,) of each row."""
    index = target.expand(len(log_y), -1).unsqueeze(-1)  # (b,) -> (E+1, b, 1)
    return log_y.gather(-1, index).squeeze(-1)


def _cross_entropies(logits: Tensor, confidence_logits: Tensor, target: Tensor) -> Tensor:
    """(E+1,) cross-entropy of the target with each Y_n, mean over the batch."""
    _require_exits(logits, confidence_logits)
    log_y = logits.to(_wide(logits)).log_softmax(-1)
    confidence_logits = confidence_logits.to(log_y.dtype)
    if target.dim() == 2:
        blended = blend_log_probs(log_y, confidence_logits.unsqueeze(-1))  # (E+1, b, K)
        return -(target.to(log_y.dtype) * blended).sum(-1).mean(-1)
    return -blend_log_probs(_of_class(log_y, target), confidence_logits).mean(-1)


def _expected_costs(logits: Tensor, confidence_logits: Tensor, costs: Tensor) -> Tensor:
    """(E+1,) expected costs C_0 .. C_E, mean over the batch."""
    _require_exits(logits, confidence_logits)
    confidence_logits = confidence_logits.to(_wide(logits))
    costs = costs.to(confidence_logits)
    h, not_h = confidence_logits.sigmoid(), (-confidence_logits).sigmoid()  # 1 - h would round to 0 long before
    expected = [costs[-1].expand(confidence_logits.shape[1:])]
    for n in reversed(range(len(h))):
        expected.append(h[n] * costs[n] + not_h[n] * expected[-1])
    return torch.stack(expected[::-1]).mean(-1)


def _wide(logits: Tensor) -> torch.dtype:
    """The type to compute in: half precision is too coarse for sums over many classes."""
    return torch.promote_types(logits.dtype, torch.float32)


def _require_exits(logits: Tensor, confidence_logits: Tensor) -> None:
    """Broadcasting would hide a confidence too many, such as the backbone's own h_E = 1."""
    if confidence_logits.shape != (len(logits) - 1, *logits.shape[1:2]):
        raise PteeError(
            f"Losses need logits (E+1, b, K) and confidence logits (E, b), got {tuple(logits.shape)} and "
            f"{tuple(confidence_logits.shape)}. Leave out the confidence of the backbone's own output."
        )
