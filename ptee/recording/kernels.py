"""`decide` of `ptee.recording.decision` in two kernels, for NVIDIA GPUs: below a batch of about 64, launches are what is paid for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ptee.exits.config import LEARNED, MAX_PROB
from ptee.recording.decision import Answers, Staying

GIVEN = 0
KINDS = {LEARNED: 1, MAX_PROB: 2}  # the confidences that a kernel computes; any other h is given


@triton.jit
def _leave(  # type: ignore[no-untyped-def]
    logits, sure, rows, thresholds, costs, out, exits, confidence, cost, stay, n, num_exits, classes, nobody, stride,
    kind: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program for each place: h, whether its row leaves, and its answer if so."""
    i = tl.program_id(0)
    r = tl.load(rows + i)
    columns = tl.arange(0, block)
    inside = columns < classes
    answer = tl.load(logits + i * stride + columns, mask=inside, other=-float("inf"))
    y = answer.to(tl.float32)
    given = tl.load(sure + i).to(tl.float32)
    wrong = tl.sum((y != y).to(tl.int32), 0) > 0
    largest = tl.max(y, 0)
    if kind == 1:
        h = 1.0 / (1.0 + tl.exp(-given))
    elif kind == 2:
        h = 1.0 / tl.sum(tl.exp(y - largest), 0)
    else:
        h = given
    finite = (tl.abs(largest) < float("inf")) & (tl.abs(given) < float("inf")) & (wrong == 0)
    t = tl.load(thresholds + r * num_exits + n)
    here = r < nobody
    left = here & finite & (h.to(tl.float64) >= t)
    to = tl.where(left, r, nobody)
    tl.store(out + to * classes + columns, answer.to(out.dtype.element_ty), mask=inside)
    tl.store(exits + to, tl.zeros_like(r) + n)
    tl.store(confidence + to, h)
    tl.store(cost + to, tl.load(costs + n))
    tl.store(stay + i, (here & (left == 0)).to(tl.int32))


@triton.jit
def _pack(stay, rows, next_rows, order, packed, count, nobody, b, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: where the rows that stay go, and their number."""
    i = tl.arange(0, block)
    inside = i < b
    s = tl.load(stay + i, mask=inside, other=0)
    r = tl.load(rows + i, mask=inside, other=nobody)
    place = tl.cumsum(s, 0) - 1
    number = tl.sum(s, 0)
    kept = inside & (s > 0)
    tl.store(next_rows + i, tl.where(kept, r, nobody), mask=inside)
    tl.store(order + place, i.to(tl.int64), mask=kept)
    tl.store(packed + place, r, mask=kept)
    free = inside & (i >= number)
    tl.store(order + i, tl.zeros_like(r), mask=free)
    tl.store(packed + i, tl.zeros_like(r) + nobody, mask=free)
    tl.atomic_xchg(count, number.to(tl.int64), sem="release", scope="sys")  # the host reads it while other work goes on


def decide(answers: Answers, n: int, rows: Tensor, logits: Tensor, h: Tensor, kind: int, count: Tensor) -> Staying:
    """As `ptee.recording.decision.decide`. `h` is what `kind` computes it from; the number of those that stay goes to `count`."""
    b, classes = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    h = h.contiguous()
    stay = torch.empty(b, dtype=torch.int32, device=rows.device)
    next_rows, order, packed = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(rows)
    _leave[(b,)](
        logits, h, rows, answers.thresholds, answers.costs, answers.logits, answers.exit, answers.confidence,
        answers.cost, stay, n,
        answers.thresholds.shape[1], classes, answers.nobody, logits.stride(0), kind=kind,
        block=triton.next_power_of_2(classes), num_warps=4 if classes < 4096 else 8,
    )  # fmt: skip
    _pack[(1,)](
        stay, rows, next_rows, order, packed, count, answers.nobody, b, block=max(16, triton.next_power_of_2(b))
    )
    return Staying(next_rows, order, packed, count)
