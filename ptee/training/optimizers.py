"""The optimisers that heads may learn with, by name; all of them timm's or torch's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ptee._common.devices import best_precision

OPTIMIZERS = {"adam": "adam", "adamw": "adamw", "muon": "nmuon"}  # names here and in timm


def make_optimizer(
    name: str, heads: nn.Module, *, lr: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """An optimiser of these heads' parameters.

    Args:
        name: of `OPTIMIZERS`. "muon" makes the updates of matrices and convolutions orthogonal, and takes AdamW for the rest
            (Jordan et al. 2024).
        heads: those of a model.
        lr: learning rate.
        weight_decay: of matrices and convolutions.
        device: that it computes on.
    """
    from timm.optim import create_optimizer_v2

    made: torch.optim.Optimizer = create_optimizer_v2(heads, OPTIMIZERS[name], lr=lr, weight_decay=weight_decay)
    if name == "muon" and best_precision(device) != "bf16":
        _iterate_in_float32(made)
    return made


def _iterate_in_float32(optimizer: torch.optim.Optimizer) -> None:
    """Let timm's Muon make matrices orthogonal in float32 while it steps.

    It does so in bfloat16, which takes ten times as long where a device has no instructions for it.
    """
    from timm.optim import muon

    in_bfloat16 = muon.zeropower_via_newtonschulz

    def put(function: Any) -> None:
        muon.zeropower_via_newtonschulz = function

    optimizer.register_step_pre_hook(lambda *_: put(partial(in_bfloat16, dtype=torch.float32)))
    optimizer.register_step_post_hook(lambda *_: put(in_bfloat16))
