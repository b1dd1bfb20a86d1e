"""Confidences: how sure an exit is of its answer. A row leaves at the first exit n whose confidence h_n reaches T_n.

A confidence is computed from the exit's logits, the logits of the exits before it, and the output of the head's confidence
layer. It knows no labels. `predict` and recorded traces use the same code.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ptee._common.devices import widest, without_autocast
from ptee._common.errors import PteeError, unknown
from ptee._common.validation import checked
from ptee.exits.config import CALIBRATED as CALIBRATED
from ptee.exits.config import CONFIDENCES as CONFIDENCES
from ptee.exits.config import LEARNED as LEARNED
from ptee.exits.config import MAX_PROB as MAX_PROB

LARGEST_LOG_ODDS = 50.0  # float32 cannot tell a probability with larger log-odds from 1
OfProbabilities = Callable[[Tensor], Tensor]


class Answer(NamedTuple):
    """What an exit answered for some rows.

    Attributes:
        exit: its number n.
        logits: (b, K), in float32 or float64.
        earlier: (b, K) logits of each exit before it; empty unless the confidence reads them.
        confidence_logit: (b,) of its head's confidence layer.
        num_exits: E.
    """

    exit: int
    logits: Tensor
    earlier: Sequence[Tensor]
    confidence_logit: Tensor
    num_exits: int


class Confidence(ABC):
    """Computes how sure an exit is of each row.

    Attributes:
        needs_answers_of_earlier_exits: it reads the logits of all exits before this one, so their heads must run.
    """

    needs_answers_of_earlier_exits: ClassVar[bool] = False

    def __call__(
        self, n: int, logits: Tensor, earlier: Sequence[Tensor], confidence_logit: Tensor, num_exits: int
    ) -> Tensor:
        """(b,) h of exit n in 0..1, float32; NaN where the confidence logit or the largest class logit is not finite.

        The arguments are those of `Answer`, the logits in any precision.
        """
        with without_autocast(logits.device.type):
            sure = _at_least_float32(confidence_logit)
            h = self._compute(Answer(n, _at_least_float32(logits), earlier, sure, num_exits))
            # A logit of -inf only rules out its class. The largest one is NaN where any is.
            finite = logits.amax(-1).isfinite() & confidence_logit.isfinite()
            return torch.where(finite, h, torch.nan).float()

    def at_all_exits(self, logits: Iterable[Tensor], confidence_logits: Iterable[Tensor]) -> Tensor:
        """(E+1, b) h of every exit, float32, from logits (E, b, K) and confidence logits (E, b); that of the backbone is 1."""
        own, sure = list(logits), list(confidence_logits)
        h = [self(n, own[n], own[:n], sure[n], len(own)) for n in range(len(own))]
        return torch.stack([*h, torch.ones_like(h[0])])

    @abstractmethod
    def _compute(self, answer: Answer) -> Tensor:
        """(b,) h in 0..1."""


class Learned(Confidence):
    """The sigmoid of the head's own confidence layer (EENet, PTEENet)."""

    def _compute(self, answer: Answer) -> Tensor:
        return answer.confidence_logit.sigmoid()


@dataclass(frozen=True)
class FromProbabilities(Confidence):
    """A function of the exit's own class probabilities.

    Attributes:
        function: (b, K) probabilities -> (b,) h.
    """

    function: OfProbabilities

    def _compute(self, answer: Answer) -> Tensor:
        return self.function(answer.logits.softmax(-1))


class Patience(Confidence):
    """How many exits in a row, up to this one, gave this answer, divided by E+1 (PABEE)."""

    needs_answers_of_earlier_exits = True

    def _compute(self, answer: Answer) -> Tensor:
        own = answer.logits.argmax(-1)
        agrees = torch.ones_like(own, dtype=torch.bool)
        streak = torch.ones_like(own)
        for logits in reversed(answer.earlier):
            finite = logits.amax(-1).isfinite()  # else argmax is an accident
            agrees = agrees & finite & (logits.argmax(-1) == own)
            streak = streak + agrees
        return streak.to(answer.logits.dtype) / (answer.num_exits + 1)


@dataclass(frozen=True)
class Calibrated(Confidence):
    """The largest probability p, calibrated by Platt's method: h = sigmoid(scale_n * log(p / (1 - p)) + shift_n).

    Attributes:
        scale: (E,) above 0, so that no two rows of an exit change places.
        shift: (E,)
    """

    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()

    def _compute(self, answer: Answer) -> Tensor:
        if len(self.scale) != answer.num_exits:
            raise _not_calibrated()
        return (log_odds(answer.logits) * self.scale[answer.exit] + self.shift[answer.exit]).sigmoid()


def max_prob(probabilities: Tensor) -> Tensor:
    """(b, K) -> (b,) the largest probability."""
    return probabilities.amax(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """(b, K) -> (b,) 1 - H / log K, where H is the entropy (BranchyNet); 1 if there is one class only."""
    largest = max(math.log(probabilities.shape[-1]), torch.finfo(probabilities.dtype).tiny)
    return (1 - torch.special.entr(probabilities).sum(-1) / largest).clamp(0, 1)


def margin(probabilities: Tensor) -> Tensor:
    """(b, K) -> (b,) the largest probability minus the second largest."""
    largest = probabilities.topk(min(2, probabilities.shape[-1]), -1).values
    return largest[..., 0] - largest[..., 1:].sum(-1)


def log_odds(logits: Tensor) -> Tensor:
    """(b, K) -> (b,) log(p / (1 - p)) of the largest probability p, also where p rounds to 1; within LARGEST_LOG_ODDS."""
    logits = _at_least_float32(logits)
    largest, answer = logits.max(-1)
    others = logits.scatter(-1, answer[..., None], -math.inf).logsumexp(-1)
    return (largest - others).clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)


CONFIDENCES.update(
    {
        LEARNED: Learned(),
        MAX_PROB: FromProbabilities(max_prob),
        "entropy": FromProbabilities(entropy),
        "margin": FromProbabilities(margin),
        "patience": Patience(),
        CALIBRATED: Calibrated(),  # the two numbers of each exit belong to a model
    }
)


def find_confidence(name: str, calibrated: Calibrated | None = None) -> Confidence:
    """The confidence of a name; "calibrated" is the model's own. Refuses unknown names, and "calibrated" before it is fitted."""
    if not isinstance(name, str) or name not in CONFIDENCES:
        raise unknown("confidence", name, CONFIDENCES, argument="confidence")
    if name != CALIBRATED:
        return CONFIDENCES[name]
    if calibrated is None:
        raise _not_calibrated()
    return calibrated


def _not_calibrated() -> PteeError:
    others = ", ".join(name for name in CONFIDENCES if name != CALIBRATED)
    return PteeError(
        f"The confidence {CALIBRATED!r} has not been fitted to this model. Call ptee.calibrate(model, data) first, or choose "
        f"another confidence: {others}.", argument="confidence", value=CALIBRATED,
    )  # fmt: skip


@checked
def register_confidence(name: str) -> Callable[[OfProbabilities], OfProbabilities]:
    """Add a confidence of your own, which can then be named wherever a confidence is named.

    Args:
        name: the new name.

    Returns:
        A decorator for a function of class probabilities (b, K) that returns h (b,) in 0..1, larger for surer rows. It gets
        float32 or float64.

    Raises:
        PteeError: if the name is taken, or the function does not return one number in 0..1 for each row on its own.

    >>> @register_confidence("gini")
    ... def gini(probabilities):
    ...     return probabilities.square().sum(-1)
    """

    def add(function: OfProbabilities) -> OfProbabilities:
        known = CONFIDENCES.get(name)
        same = isinstance(known, FromProbabilities) and same_definition(known.function, function)
        if known is not None and not same:
            raise PteeError(f"The confidence name {name!r} is taken. Register yours under another name.")
        _check_function(name, function)
        CONFIDENCES[name] = FromProbabilities(function)
        return function

    return add


def same_definition(one: Any, other: Any) -> bool:
    """Whether two functions or classes have one name in one module, as when a notebook cell runs twice."""
    return all(getattr(one, key, one) == getattr(other, key, other) for key in ("__module__", "__qualname__"))


def _check_function(name: str, function: OfProbabilities) -> None:
    seeded = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(4, 10, dtype=torch.float32, generator=seeded, device="cpu")).softmax(-1)
    h = function(p.clone())
    if not isinstance(h, Tensor) or h.shape != (4,):
        found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
        raise PteeError(f"The confidence {name!r} must turn (b, K) probabilities into (b,) numbers; it gave {found}.")
    if not ((h >= 0) & (h <= 1)).all():
        raise PteeError(f"The confidence {name!r} must lie in 0..1; it gave {h.min():g} to {h.max():g}.")
    alone = torch.cat([function(row.clone()) for row in p.split(1)])
    if not torch.allclose(alone, h, rtol=1e-4, atol=1e-6):
        raise PteeError(
            f"The confidence {name!r} of a row depends on the other rows of its batch. Compute each row on its own, over the "
            "last axis."
        )


# ---------------------------------------------------------------------------------------------------- who leaves


def leaves(confidence: Tensor, threshold: float | Tensor) -> Tensor:
    """Whether rows leave: h >= T, for any T that broadcasts to h. A confidence of NaN never leaves."""
    h = confidence.to(widest(confidence.device))  # float64: a threshold between two float32 numbers must not be rounded
    return h >= (threshold if h.dtype == torch.float64 else not_below(threshold, h.dtype, h.device))


def not_below(threshold: float | Sequence[float] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Thresholds in a number type of a device. They are rounded up: of the numbers of that type, the same ones reach them."""
    given = threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64, device="cpu")
    if given.dtype.itemsize > dtype.itemsize:
        near = given.to(dtype)
        given = torch.where(near < given, near.nextafter(torch.full_like(near, torch.inf)), near)
    return given.to(device, dtype)


def first_exit(confidence: Tensor, threshold: Sequence[float] | Tensor) -> Tensor:
    """(b,) where rows leave: the first exit n with h_n >= T_n, of h (E, b) and T (E,); E if there is none."""
    limits = not_below(threshold, widest(confidence.device), confidence.device)
    leaving = leaves(confidence, limits[:, None])
    at_the_end = torch.ones_like(leaving[:1])
    return torch.cat([leaving, at_the_end]).int().argmax(0)  # argmax gives the first of equals


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
