"""Do the pieces answer as the model does, whichever rows go on?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptee._common.errors import PteeError, first_line, ran_out_of_memory
from ptee.analysis.arithmetic import MIN_SCALE, exact_arithmetic, tolerance
from ptee.analysis.cut_points import random_images
from ptee.deploy.segments import Segment
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import AllExits

BATCHES = (1, 2, 7)
OF_A_SIGMOID = 1.0  # confidence logits count by what they change of h; a single one may be 0 up to noise


def check_segments(model: EarlyExitModel, pieces: Sequence[Segment], batches: Sequence[int] = BATCHES) -> None:
    """Let a row leave at each exit, turn the others around, and compare all answers with the model's, for some numbers of rows."""
    for b in batches:
        x = random_images(model.backbone, b, model.plan.input_size)
        with torch.no_grad(), exact_arithmetic:
            want = model.all_exits(x.clone())  # a network may write into its images
            try:
                gaps, near = _gaps(want, pieces, x.clone()), tolerance(x.dtype, x.device)
            except Exception as why:  # whatever operators raise that torch.export has captured wrongly
                if ran_out_of_memory(why):
                    raise
                raise PteeError(
                    f"{model.plan.backbone} cannot be taken apart: the whole model answers a batch of {b}, and its pieces fail "
                    f"({first_line(why).rstrip('.')}). Use the model as it is."
                ) from why
        for name, gap in gaps.items():
            if not gap <= near:
                raise PteeError(
                    f"{model.plan.backbone} cannot be taken apart: in pieces, {name} gives other answers to a batch of {b} (off "
                    f"by {gap:.1e}) than the whole model. Use the model as it is."
                )


def _gaps(want: AllExits, pieces: Sequence[Segment], x: Tensor) -> dict[str, float]:
    """For each exit and the end, how far the answers of the rows that came there are from the model's."""
    alive: Sequence[Tensor] = (x,)
    rows = torch.arange(len(x), device=x.device)
    gaps = {}
    for piece in pieces[:-1]:
        alive, logits, sure = piece.module(*alive)
        of_sure = gap_between(want.confidence_logits[piece.exit][rows], sure, OF_A_SIGMOID)
        gaps[f"exit {piece.exit}"] = max(gap_between(want.logits[piece.exit][rows], logits), of_sure)
        alive = alive if piece.ahead is None else piece.ahead(*alive)
        staying = torch.arange(len(rows), device=x.device).flip(0)[: max(1, len(rows) - 1)]
        alive = [where.select(tensor, staying) for where, tensor in zip(piece.rows, alive, strict=True)]
        rows = rows[staying]
    gaps["the end"] = gap_between(want.logits[-1][rows], pieces[-1].module(*alive))
    return gaps


def gap_between(want: Tensor, got: Tensor, least_scale: float = MIN_SCALE) -> float:
    """The largest difference, as a share of the largest finite value, which counts as so large at least. Equal entries differ by 0."""
    want, got = want.float(), got.float()
    finite = want[want.isfinite()].abs()
    scale = max(finite.max().item() if len(finite) else 0.0, least_scale)
    same = (want == got) | (want.isnan() & got.isnan())
    return (torch.where(same, 0.0, (want - got).abs()).max() / scale).item()
