"""Gates: may a row leave here? Asked of what the exits have answered so far.

A head's own confidence learns together with its logits. A gate is fitted when the heads are done (`decision`); it reads a
few numbers on the answers, which do not say which class it is, and where wished the head's feature vector. Until it is fitted
its h is the answer's probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptee._common.errors import PteeError

READS = ("answers", "features")  # the second: the feature vector, too
HIDDEN, BOTTLENECK = 16, 16  # widths; saved runs have them
FARTHEST = 6.0  # standard deviations from the mean; what lies beyond was not seen in fitting
NARROWEST = 1e-3  # a standard deviation below says nothing, and half precision could not hold it
SUREST = 50.0  # log-odds; a row beyond would outweigh all others, and no h tells it from 1


class Gate(nn.Module):
    """From answers to a confidence logit: the log-odds of the max probability, scaled and shifted (Platt), plus a small network.

    The network reads standardised numbers, has one hidden layer, and gives 0 before it is fitted.

    Args:
        reads: one of `READS`.
        features: F, the length of the head's feature vector.
        follows: there are exits before this one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, reads: str, features: int, follows: bool) -> None:
        super().__init__()
        self.reads, self.follows = reads, follows
        self.numbers = len(OWN) + follows * len(COMPARED)
        width = self.numbers
        self.bottleneck: nn.Linear | None = None
        if reads == "features":
            width += features
            self.bottleneck = nn.Linear(features, BOTTLENECK)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.inner = nn.Linear(self.numbers + BOTTLENECK * (reads == "features"), HIDDEN)
        self.outer = nn.Linear(HIDDEN, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor, earlier: Sequence[Tensor], v: Tensor) -> Tensor:
        """How sure the exit may be, (b,), in float32 at least whatever the precision around; NaN on what is not finite.

        Args:
            logits: (b, K) of this exit.
            earlier: (b, K) of each exit before it.
            v: (b, F) the head's feature vector.
        """
        with torch.autocast(v.device.type, enabled=False):
            return self.judge(self.read(logits, earlier, v))

    def read(self, logits: Tensor, earlier: Sequence[Tensor], v: Tensor) -> Tensor:
        """The numbers that decide, (b, n), before they are standardised. Arguments are those of `forward`."""
        if self.follows and not earlier:
            raise PteeError("This head's gate reads what the exits before it said. Call the model, or head.follow.")
        found = [_own(_log_p(logits))]
        if self.follows:
            found.append(_compared(_log_p(logits), torch.stack([_log_p(y) for y in earlier])))
        if self.bottleneck is not None:
            found.append(_wide(v))
        return torch.cat(found, -1)

    def standardise(self, x: Tensor) -> None:
        """Take mean and standard deviation from what was read.

        Args:
            x: (n, ...) what `read` gave for many rows.
        """
        std = x.std(0)
        self.mean.copy_(x.mean(0))
        self.std.copy_(torch.where(std > NARROWEST, std, 1))

    def judge(self, x: Tensor) -> Tensor:
        """The confidence logit (b,) of what was read.

        Args:
            x: what `read` gave.
        """
        sure = self.scaled(x) + self.network(self.standard(x))
        return torch.where(x.isfinite().all(-1), sure, torch.nan)

    def scaled(self, x: Tensor) -> Tensor:
        """The log-odds (b,) of what was read, scaled and shifted."""
        return x[:, LOG_ODDS] * self.scale.to(x.dtype) + self.shift.to(x.dtype)

    def standard(self, x: Tensor) -> Tensor:
        """What was read, (b, n), in standard deviations from the mean."""
        return ((x - self.mean.to(x.dtype)) / self.std.to(x.dtype)).clamp(-FARTHEST, FARTHEST)

    def network(self, x: Tensor) -> Tensor:
        """What the network adds, (b,), to standardised numbers (b, n)."""
        if self.bottleneck is not None:
            x = torch.cat([x[:, : self.numbers], _linear(self.bottleneck, x[:, self.numbers :])], -1)
        return _linear(self.outer, F.silu(_linear(self.inner, x)))[:, 0]


OWN = ("max probability", "entropy", "margin", "log-odds of the max probability")
LOG_ODDS = 3
COMPARED = ("max probability before", "agrees with the one before", "share that agrees", "mean log-probability")


def _own(log_p: Tensor) -> Tensor:
    """(b, K) -> (b, 4): what one answer says of itself."""
    top, classes = log_p.topk(2)
    first, second = top.unbind(-1)
    p = first.exp()
    entropy = torch.special.entr(log_p.exp()).sum(-1) / math.log(log_p.shape[-1])
    others = log_p.scatter(-1, classes[:, :1], -math.inf).logsumexp(-1)  # log(1 - p), also where p rounds to 1
    return torch.stack([p, entropy, p - second.exp(), (first - others).clamp(-SUREST, SUREST)], -1)


def _compared(log_p: Tensor, before: Tensor) -> Tensor:
    """(b, K), (n, b, K) -> (b, 4): what the answers before say of this one."""
    chosen = log_p.argmax(-1)  # (b,)
    agree = (before.argmax(-1) == chosen).to(log_p.dtype)  # (n, b)
    support = before.gather(-1, chosen.expand(len(before), -1)[..., None])[..., 0].clamp(min=-SUREST)  # (n, b)
    return torch.stack([before[-1].amax(-1).exp(), agree[-1], agree.mean(0), support.mean(0)], -1)


def _log_p(logits: Tensor) -> Tensor:
    return _wide(logits).log_softmax(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
