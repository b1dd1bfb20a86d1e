"""Who leaves at an exit, decided on the device: nothing but one number travels to the host.

The rows of a call keep their places. Each place of a piece's tensors says which row of the call it holds. A row that leaves gives
its answer away, and its place holds nothing any more. So do the places that fill a batch up to the size for which a piece was
recorded. Only where a smaller size takes the rows that stay do they move, and `order` says from which places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptee._common.devices import widest
from ptee.exits.confidence import leaves


class Answers:
    """What is known so far of the rows of a call. All tensors have one entry more than there are rows: for places without a row.

    Attributes:
        nobody: the number of that entry.
        logits: (rows + 1, K) of the exit at which each row left.
        exit: (rows + 1,) that exit.
        confidence: (rows + 1,) h there, float32.
        cost: (rows + 1,) of that exit, float32.
        thresholds: (rows + 1, E) T of each row at each exit, float64 where the device has it.
        costs: (E + 1,) what a row costs that leaves at each exit.
    """

    def __init__(
        self, rows: int, classes: int, costs: Sequence[float], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.nobody = rows
        self.logits = torch.zeros(rows + 1, classes, dtype=dtype, device=device)
        self.exit = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(rows + 1, dtype=torch.float32, device=device)
        self.cost = torch.zeros(rows + 1, dtype=torch.float32, device=device)
        self.thresholds = torch.zeros(rows + 1, len(costs) - 1, dtype=widest(device), device=device)
        self.costs = torch.tensor(costs, dtype=torch.float32, device=device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a call writes into."""
        return self.logits, self.exit, self.confidence, self.cost, self.thresholds

    def of_rows(self, rows: int) -> tuple[Tensor, ...]:
        """(logits, exit, confidence, cost) of the first rows, as they are now."""
        return tuple(t[:rows].clone() for t in (self.logits, self.exit, self.confidence, self.cost))


class Staying(NamedTuple):
    """The rows that go on behind an exit, b places in all.

    Attributes:
        rows: (b,) the row that each place holds, or nobody.
        order: (b,) the places of those that stay, one behind the other; then zeros.
        packed: (b,) the rows in that order; then nobody.
        number: () their number.
    """

    rows: Tensor
    order: Tensor
    packed: Tensor
    number: Tensor


def decide(answers: Answers, n: int, rows: Tensor, logits: Tensor, h: Tensor) -> Staying:
    """Take the answers of the rows that leave at exit n.

    Args:
        answers: of the call; changed.
        n: the exit.
        rows: (b,) the row that each place holds, or nobody.
        logits: (b, K) what the exit answers.
        h: (b,) how sure it is.
    """
    here = rows < answers.nobody
    left = leaves(h, answers.thresholds[:, n].index_select(0, rows)) & here
    stay = here & ~left
    to = torch.where(left, rows, answers.nobody)
    answers.logits.index_copy_(0, to, logits.to(answers.logits.dtype))
    answers.confidence.index_copy_(0, to, h)
    answers.exit.index_fill_(0, to, n)
    answers.cost.index_copy_(0, to, answers.costs[n].expand(len(to)))
    b = len(rows)
    place = torch.where(stay, stay.cumsum(0) - 1, b)  # b: thrown away
    order = rows.new_zeros(b + 1).scatter_(0, place, torch.arange(b, device=rows.device))
    packed = rows.new_full((b + 1,), answers.nobody).scatter_(0, place, rows)
    return Staying(torch.where(stay, rows, answers.nobody), order[:b], packed[:b], stay.sum())


def end(answers: Answers, rows: Tensor, logits: Tensor) -> None:
    """Take the backbone's answers (b, K) of the rows that are left."""
    answers.logits.index_copy_(0, rows, logits.to(answers.logits.dtype))
    answers.confidence.index_fill_(0, rows, 1.0)
    answers.exit.index_fill_(0, rows, len(answers.costs) - 1)
    answers.cost.index_copy_(0, rows, answers.costs[-1].expand(len(rows)))
