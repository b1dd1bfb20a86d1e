"""The blend: what the exits that an image has passed say together.

The head of an exit sees less than the backbone, but it errs on other images. So exit n can answer with all that was said so far:

    z_n  =  v_n,n y_n  +  sum over m in S, m < n, of v_n,m y_m          its answer is softmax(z_n)

y_m are the logits of exit m, S the exits that are on, and n = E is the end of the backbone. This is a weighted geometric
mean of the exits' probabilities, in which each exit also has a temperature: temperature t and weight w together are v = w / t.

The weights v >= 0 have the lowest cross-entropy with the labels of images that were not trained on. Without labels, those of
the exits have the lowest cross-entropy with the backbone's probabilities, and the end keeps the backbone's answer. Both
problems are convex. Each choice of earlier exits has weights of its own, so exits can be switched off and on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import PteeError
from ptee._common.text import number_of
from ptee.exits.config import BLENDED as BLENDED
from ptee.exits.config import CALIBRATED, CONFIDENCES, MAX_PROB
from ptee.exits.config import OWN as OWN

MAX_EXITS = 4  # up to so many exits every subset gets weights; with more, only all exits together
MIN_OF_EITHER = 20  # images that the backbone answers right, and wrong; with fewer of either the weights are equal
MAX_NUMBERS = 2_000_000  # logits of an exit that weights are fitted to
LOWEST = -1e4  # logit in a fit: a class that is ruled out
ITERATIONS = 200

Exits = tuple[int, ...]


@dataclass(frozen=True)
class Blend:
    """The weights of the answers so far.

    Attributes:
        weights: for exit n and the exits before it that are on: the v of each of these in order, then that of exit n.
        to_the_end: the end of the backbone is blended, too. Otherwise it keeps the backbone's own answer.
        remark: what few images meant, in a sentence; else empty.
    """

    weights: Mapping[tuple[int, Exits], tuple[float, ...]]
    to_the_end: bool = True
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        rows = [{"exit": n, "with": list(before), "weights": list(v)} for (n, before), v in self.weights.items()]
        return {"to_the_end": self.to_the_end, "weights": rows, "remark": self.remark}

    def require_weights(self, on: Exits, exits: int) -> None:
        """Refuse a choice of exits, of E in all, that has no weights."""
        wanted = [(n, on[:k]) for k, n in enumerate(on)] + [(exits, on)] * self.to_the_end
        if any(key not in self.weights for key in wanted):
            raise PteeError(
                f"The answers of these {exits} exits were blended for other exits than {list(on)}. Choose the thresholds again "
                "(ptee.tune), or set model.answers = 'own'."
            )

    def logits(self, n: int, own: Tensor, earlier: Mapping[int, Tensor]) -> Tensor:
        """The blended logits of exit n.

        Args:
            n: the exit, 0..E.
            own: (..., K) logits of exit n.
            earlier: (..., K) logits of the exits before it that are on, by number, in order.

        Returns:
            (..., K) in float32 at least; NaN where one of them is NaN that has a weight above 0.
        """
        weights = self.weights[n, tuple(earlier)]
        return _weighted([*earlier.values(), own], weights)

    def at_all_exits(self, logits: Tensor, on: Exits) -> Tensor:
        """The answers of all exits that are on, and of the end.

        Args:
            logits: (E+1, b, K) each exit's own.
            on: the exits that are on.

        Returns:
            (E+1, b, K) in float32 at least; exits that are off keep their own.
        """
        blended = logits.to(torch.promote_types(logits.dtype, torch.float32)).clone()
        end = len(logits) - 1
        for k, n in enumerate((*on, end) if self.to_the_end else on):
            blended[n] = self.logits(n, logits[n], {m: logits[m] for m in on[:k]})
        return blended


def require_blend(blend: Blend | None, confidence: str, off: Sequence[int], exits: int) -> None:
    """Refuse blended answers of a model whose exits, E in number, are `off` in part, if they cannot be given."""
    if blend is None:
        raise PteeError("The answers of this model were not blended yet. Call ptee.tune(..., answers='blended').")
    if CONFIDENCES[confidence].needs_answers_of_earlier_exits:
        raise PteeError(
            f"The confidence {confidence!r} needs the exits' own answers. Set model.answers = 'own', or another confidence."
        )
    blend.require_weights(tuple(n for n in range(exits) if n not in off), exits)


def _weighted(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """A weight of 0 leaves an answer out, also where it is infinite."""
    dtype = reduce(torch.promote_types, (y.dtype for y in logits), torch.float32)
    wide = [y.to(dtype) for y in logits]
    parts = [v * y for v, y in zip(weights, wide, strict=True) if v]
    return torch.stack(parts).sum(0) if parts else torch.zeros_like(wide[-1])


def fit_blend(logits: Tensor, targets: Tensor | None, equal: bool = False) -> Blend:
    """The weights with the lowest cross-entropy.

    Args:
        logits: (E+1, n, K) of images that neither the backbone nor the heads were trained on.
        targets: (n,) their labels; None: the exits learn the backbone's probabilities, and the end is not blended.
        equal: all answers weigh the same, as they do where the images are too few. The remark says that these are.
    """
    end, most = len(logits) - 1, max(1, MAX_NUMBERS // logits.shape[-1])
    rows = logits.amax(-1).isfinite().all(0).nonzero()[:, 0]
    drawn = rows[:: math.ceil(max(1, len(rows)) / most)]
    logits = logits[:, drawn].double().clamp_min(LOWEST)
    to_the_end = targets is not None
    goal = logits[end].softmax(-1) if targets is None else targets[drawn]
    remark = _too_few(logits[end], None if targets is None else targets[drawn], equal)
    weights = {
        (n, before): (1 / (len(before) + 1),) * (len(before) + 1) if remark else _fitted(logits[[*before, n]], goal)
        for n in range(end + to_the_end)
        for before in _subsets(n, end)
    }
    return Blend(weights, to_the_end, remark)


def _subsets(n: int, exits: int) -> list[Exits]:
    """Which exits may be on before exit n."""
    return [before for before in subsets(n) if exits <= MAX_EXITS or len(before) == n]


def subsets(n: int) -> list[Exits]:
    """All choices among the exits 0..n-1, the smallest first."""
    return [chosen for size in range(n + 1) for chosen in combinations(range(n), size)]


def confidence_of_blend(name: str) -> str:
    """The confidence of blended answers for a model's own. The weights make their largest probability a calibrated one."""
    return MAX_PROB if name == CALIBRATED else name


def _too_few(logits: Tensor, targets: Tensor | None, certainly: bool) -> str:
    images = len(logits)
    right = images if targets is None else int(logits.argmax(-1).eq(targets).sum())
    rarer = images if targets is None else min(right, images - right)
    if rarer >= MIN_OF_EITHER and not certainly:
        return ""
    of_either = "" if targets is None else f", {right:,} of which the backbone answers right,"
    return f"{number_of(images, 'image', 'is', which=of_either)} too few to fit weights to: all answers weigh the same."


def _fitted(logits: Tensor, goal: Tensor) -> tuple[float, ...]:
    """(m, n, K) logits, and classes (n,) or probabilities (n, K) -> (m) weights, by L-BFGS-B."""
    from scipy.optimize import minimize

    def loss(weights: object) -> tuple[float, object]:
        v = torch.as_tensor(weights, dtype=logits.dtype, device=logits.device).requires_grad_()
        value = torch.nn.functional.cross_entropy(torch.einsum("m,mnk->nk", v, logits), goal)
        (gradient,) = torch.autograd.grad(value, v)
        return value.item(), gradient.cpu().numpy()

    start, bounds, options = [1 / len(logits)] * len(logits), [(0, None)] * len(logits), {"maxiter": ITERATIONS}
    with torch.inference_mode(False), torch.enable_grad():
        logits, goal = logits.clone(), goal.clone()  # tensors made in inference mode cannot be differentiated
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return tuple(float(v) for v in found.x)
