"""Do recorded pieces answer as the model does, wherever rows leave?"""

from __future__ import annotations

import torch
from torch import Tensor

from ptee._common.devices import widest
from ptee._common.errors import PteeError, ran_out_of_memory
from ptee.analysis.arithmetic import tolerance
from ptee.analysis.cut_points import random_images
from ptee.deploy.capture import example_images
from ptee.deploy.check import BATCHES, gap_between
from ptee.exits.confidence import leaves
from ptee.exits.config import NEVER
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import AllExits, ExitOutput
from ptee.recording.buckets import Buckets

COMPILED = 3.0  # times the tolerance: torch.compile keeps more digits between two operators than the model does


def check_recorded(pieces: Buckets) -> None:
    """Let rows leave at each exit, also where what stays moves to smaller buckets, and compare all that is answered with the model's."""
    model, largest = pieces.model, pieces.sizes[-1]
    ends = len(model.exits) + 1
    for b in (b for b in BATCHES if b <= largest):
        x = random_images(model.backbone, b, model.plan.input_size)
        for turn in range(ends):
            x = x.roll(1, 0)  # what lies in memory is of other images by then
            end = (torch.arange(b, device=x.device) + turn) % ends  # where each row is to leave
            limits = torch.full((b, ends), NEVER, dtype=widest(x.device), device=x.device)
            limits.scatter_(1, end[:, None], 0.0)
            limits[:, list(model.off)] = NEVER
            thresholds = limits[:, :-1]
            want = expected(model, own_answers(model, x), thresholds)
            got = ExitOutput(*pieces(x.clone(), list(thresholds.unbind(1))))
            if gap := _gap(want, got, tolerance(x.dtype, x.device)):
                text = f"Recorded through its hooks, {model.plan.backbone} gives other answers to a batch of {b} than as it is"
                raise PteeError(f"{text} ({gap}).")


def check_size(pieces: Buckets, size: int, allowed: float = 1.0) -> None:
    """Let all rows of a batch leave at each exit in turn, and compare all that is answered with the model's.

    `allowed`: so many times the tolerance of the number type.
    """
    model = pieces.model
    ends = len(model.exits) + 1
    x = example_images(model, size)
    try:
        own = own_answers(model, x)
    except (RuntimeError, MemoryError) as why:
        if ran_out_of_memory(why):  # beside the recordings; then there is nothing to compare with
            return
        raise
    for end in (n for n in range(ends) if n not in model.off):
        thresholds = [0.0 if n == end else NEVER for n in range(ends - 1)]
        want = expected(model, own, torch.tensor(thresholds, dtype=widest(x.device), device=x.device).expand(size, -1))
        got = ExitOutput(*pieces(x.clone(), thresholds))
        if gap := _gap(want, got, allowed * tolerance(x.dtype, x.device)):
            text = f"Recorded for batches of {size}, {model.plan.backbone} gives other answers than as it is ({gap})."
            raise PteeError(f"{text} Give ptee.optimize another mode, or use the model as it is.")


@torch.no_grad()
def own_answers(model: EarlyExitModel, x: Tensor) -> AllExits:
    """What each exit says to images (b, c, h, w), which stay as they are, though a network may write into those that it is given."""
    return model.all_exits(x.clone())


@torch.no_grad()
def expected(model: EarlyExitModel, own: AllExits, thresholds: Tensor) -> ExitOutput:
    """What `predict` answers with thresholds (b, E), from each exit's own answers to b images."""
    said = model.blended(own)
    h = said.confidence[:-1]
    leaving = leaves(h, thresholds.T)
    at = torch.cat([leaving, torch.ones_like(leaving[:1])]).int().argmax(0)  # the first of equals
    possible = (thresholds <= 1).any(1)[:, None]  # else the backbone's own answer stands
    last = torch.where(possible, said.logits[-1], own.logits[-1])
    place = at, torch.arange(len(at), device=at.device)
    logits = torch.cat([said.logits[:-1], last[None]])[place]
    costs = torch.tensor(model.costs, dtype=torch.float32, device=at.device)
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
