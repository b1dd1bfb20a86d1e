"""What a batch costs in seconds: the sum of its pieces, each at the number of rows that are still there.

    t(batch)  =  call  +  sum_n s_n(N_n)  +  sum_n h_n(N_n) + m_n(N_n) P_n over the heads that run,    N_n ~ Binomial(b, r_n)

s_n is the backbone from one exit to the next, h_n a head with the decision who leaves, r_n the share of the images that come
that far, m_n what it takes to go on with fewer rows, and P_n the chance that some rows leave and others stay. Seconds are not linear in rows: on a GPU, 16 rows take as long as 32. So thresholds are searched with some linear
prices, and what was found is compared by the expected time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Prices(NamedTuple):
    """What a row adds: (E+1,) in each piece of the backbone, and (E,) in each head."""

    segments: Tensor
    heads: Tensor

    def where(self, run: Tensor) -> Tensor:
        """(..., E+1) what a row costs that leaves at each exit, if these heads (..., E) run."""
        heads = (self.heads * run).cumsum(-1)
        return self.segments.cumsum(-1) + torch.cat([heads, heads[..., -1:]], -1)


@dataclass(frozen=True)
class BatchTimes:
    """Times of the pieces of a model in batches of one size. All are fractions of the bare backbone's time for a whole batch.

    Attributes:
        segments: (E+1, b+1) float64, the backbone from one exit to the next, with 0 to b rows.
        heads: (E, b+1) the head of each exit and its decision.
        call: what a call costs beside its pieces.
        unit: what they are fractions of, in words: "the bare backbone's time (hooks, batch 32, cpu)".
        moves: (E, b+1) what it takes to go on with fewer rows; None for nothing.
        bare_ms: milliseconds of the bare backbone for a whole batch; None where they are not known.
    """

    segments: Tensor
    heads: Tensor
    call: float
    unit: str
    moves: Tensor | None = None
    bare_ms: float | None = None

    @property
    def batch(self) -> int:
        """b."""
        return self.segments.shape[1] - 1

    def expected(self, run: Tensor, shares: Sequence[float] | Tensor) -> float:
        """The expected time of a batch; 1 for the bare backbone, which runs where no head does.

        Args:
            run: (E,) bool, the heads that run.
            shares: (E+1,) of the images, that leave at each exit.
        """
        if not run.any():
            return 1.0
        left = torch.as_tensor(shares, dtype=torch.float64, device=self.segments.device)
        come = (1 - torch.cat([left.new_zeros(1), left[:-1].cumsum(0)])).clamp(0, 1)
        rows = torch.arange(self.batch + 1, dtype=torch.float64, device=come.device)
        binomial = torch.distributions.Binomial(self.batch, come[:, None], validate_args=False)
        chance = binomial.log_prob(rows).exp()  # (E+1, b+1)
        chance = torch.where(come[:, None] >= 1, (rows == self.batch).double(), chance)
        segments, heads = (chance * self.segments).sum(1), (chance[:-1] * self.heads).sum(1)
        if self.moves is not None:
            stay = (come[1:] / come[:-1]).nan_to_num(1)[:, None]
            some_leave = (1 - stay**rows - (1 - stay) ** rows).clamp(min=0)  # and others stay
            heads = heads + (chance[:-1] * some_leave * self.moves).sum(1)
        return self.call + segments.sum().item() + heads[run].sum().item()

    def at_rows(self, run: Tensor, rows: Sequence[int]) -> float:
        """The time of a batch of which so many rows (E+1,) come to each piece: the limit of what leaving can reach."""
        pieces = sum(self.segments[n, r].item() for n, r in enumerate(rows))
        return pieces + sum(self.heads[n, r].item() for n, r in enumerate(rows[:-1]) if run[n])

    def prices(self) -> list[Prices]:
        """Linear prices of a row: the mean over a whole batch, and what the upper and the lower half of its rows add."""
        b, half = self.batch, self.batch // 2
        spans = [(0, b)] + [(half, b), (0, half)] * (half > 0)
        tables = self.segments, self.heads
        return [Prices(*((b / (to - at) * (t[:, to] - t[:, at])).clamp(min=0) for t in tables)) for at, to in spans]
