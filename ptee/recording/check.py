"""Do recorded pieces answer as the model does, wherever rows leave?"""

from __future__ import annotations

import torch
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.analysis.arithmetic import tolerance
from ptee.analysis.cut_points import random_images
from ptee.deploy.check import BATCHES, gap_between
from ptee.exits.confidence import leaves
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import ExitOutput
from ptee.model.thresholds import NEVER
from ptee.recording.buckets import Buckets


def check_recorded(pieces: Buckets) -> None:
    """Let rows leave at each exit, also where what stays moves to smaller buckets, and compare all that is answered with the model's.

    Args:
        pieces: recorded, to be checked as they are.

    Raises:
        PteeError: if an answer is another one.
    """
    model, largest = pieces.model, pieces.sizes[-1]
    ends = len(model.exits) + 1
    for b in (b for b in BATCHES if b <= largest):
        x = random_images(model.backbone, b, model.plan.input_size)
        for turn in range(ends):
            x = x.roll(1, 0)  # what lies in memory is of other images by then
            end = (torch.arange(b, device=x.device) + turn) % ends  # where each row is to leave
            limits = torch.full((b, ends), NEVER, dtype=torch.float64, device=x.device)
            limits.scatter_(1, end[:, None], 0.0)
            limits[:, list(model.off)] = NEVER
            thresholds = limits[:, :-1]
            want = expected(model, x, thresholds)
            got = ExitOutput(*pieces(x.clone(), list(thresholds.unbind(1))))
            if gap := _gap(want, got, tolerance(x.dtype, x.device)):
                text = f"Recorded through its hooks, {model.plan.backbone} gives other answers to a batch of {b} than as it is"
                raise PteeError(f"{text} ({gap}).")


@torch.no_grad()
def expected(model: EarlyExitModel, x: Tensor, thresholds: Tensor) -> ExitOutput:
    """What `predict` answers to images (b, c, h, w) with thresholds (b, E), from a pass in which nobody leaves."""
    own = model.all_exits(x.clone())  # a network may write into its images
    said = model.blended(own)
    h = said.confidence[:-1]
    leaving = leaves(h, thresholds.T)
    at = torch.cat([leaving, torch.ones_like(leaving[:1])]).int().argmax(0)  # the first of equals
    possible = (thresholds <= 1).any(1)[:, None]  # else the backbone's own answer stands
    last = torch.where(possible, said.logits[-1], own.logits[-1])
    place = at, torch.arange(len(x), device=x.device)
    logits = torch.cat([said.logits[:-1], last[None]])[place]
    costs = torch.tensor(model.costs, dtype=torch.float32, device=x.device)
    return ExitOutput(logits, at, said.confidence[place], costs[at])


def _gap(want: ExitOutput, got: ExitOutput, near: float) -> str:
    """What differs, in words; empty if nothing does."""
    if not torch.equal(want.exit_index, got.exit_index):
        return "rows leave at other exits"
    for name, scale in {"logits": {}, "confidence": {"least_scale": 1.0}, "cost": {}}.items():
        gap = gap_between(getattr(want, name), getattr(got, name), **scale)
        if not gap <= near:
            return f"{name} off by {gap:.1e}"
    return ""
