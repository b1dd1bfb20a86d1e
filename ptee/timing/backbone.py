"""The time of a backbone up to the end of each of its modules, all in one pass."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ptee.analysis.cut_points import random_images
from ptee.analysis.freezing import hooked, running_on, sparing
from ptee.backbones.load import Backbone
from ptee.exits.plan import TimesOfModules
from ptee.timing.laps import MAX_SECONDS, Mark, in_turns
from ptee.timing.settings import HOOKS
from ptee.timing.times import unit_of


def time_of_modules(backbone: Backbone, device: torch.device, batch: int, *, rounds: int = 7) -> TimesOfModules:
    """Measure a backbone up to the end of each module, the first time that it runs. Its device and mode are restored."""
    module, names = backbone.module, dict[str, None]()
    with running_on(device, module):
        x = random_images(module, batch, backbone.input.input_size)
        with sparing(module, x):
            found = in_turns({"": [partial(_marked, module, x, names)]}, device, rounds, MAX_SECONDS)[""][0]
    total = sum(found)
    shares = dict(zip(names, (s / total for s in accumulate(found)), strict=False))
    return TimesOfModules(shares, total, unit_of(HOOKS, batch, device.type).replace(HOOKS, "as it is"))


def _marked(module: nn.Module, x: Tensor, names: dict[str, None], mark: Mark) -> None:
    """Run a module with a mark behind each module inside of it. Their names are written down."""
    names.clear()

    def ended(name: str, _: Any) -> None:
        if name not in names:
            names[name] = None
            mark()

    with hooked({part: partial(ended, name) for name, part in module.named_modules() if name}):
        mark()
        module(x)
        mark()
