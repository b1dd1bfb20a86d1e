"""The optimizers by name, all of them timm's or torch's, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ptee._common.devices import best_precision
from ptee.training.config import TrainingConfig

OPTIMIZERS = {"adam": "adam", "adamw": "adamw", "muon": "nmuon"}  # names here and in timm


def make_optimizer(
    name: str, parts: Sequence[tuple[nn.Module, float]], *, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of what learns, by a key of `OPTIMIZERS`. Weight decay is for matrices and convolutions.

    `parts` are modules, each with its learning rate.

    "muon" makes the updates of matrices and convolutions orthogonal, and uses AdamW for the rest (Jordan et al. 2024).
    """
    from timm.optim import create_optimizer_v2, param_groups_weight_decay

    groups = [
        group | {"lr": lr}
        for module, lr in parts
        for group in param_groups_weight_decay(
            module, weight_decay, no_weight_decay_list=getattr(module, "no_weight_decay", set)()
        )
    ]
    made: torch.optim.Optimizer = create_optimizer_v2(groups, OPTIMIZERS[name])
    if name == "muon" and best_precision(device) != "bf16":
        _iterate_in_float32(made)
    return made


def optimizer_of(config: TrainingConfig, heads: nn.Module, backbone: nn.Module, device: torch.device) -> Any:
    """The optimizer that a resolved config names, of heads and of the backbone, of which those parameters learn that have gradients."""
    assert config.optimizer and config.lr is not None and config.weight_decay is not None
    parts = [(heads, config.lr), (backbone, config.backbone_lr or config.lr)]
    return make_optimizer(config.optimizer, parts, weight_decay=config.weight_decay, device=device)


def set_cosine_rate(optimizer: torch.optim.Optimizer, done: int, steps: int) -> None:
    """Set each learning rate, which falls to 0 along half a cosine over so many batches, for the next one."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 + math.cos(math.pi * done / steps)) / 2


def _iterate_in_float32(optimizer: torch.optim.Optimizer) -> None:
    """Let timm's Muon compute in float32: without instructions for bfloat16, a device takes ten times as long."""
    from timm.optim import muon

    in_bfloat16 = muon.zeropower_via_newtonschulz

    def put(function: Any) -> None:
        muon.zeropower_via_newtonschulz = function

    optimizer.register_step_pre_hook(lambda *_: put(partial(in_bfloat16, dtype=torch.float32)))
    optimizer.register_step_post_hook(lambda *_: put(in_bfloat16))
