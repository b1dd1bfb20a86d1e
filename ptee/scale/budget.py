"""What a training on very many images takes before it begins: passes, hours and bytes of a cache, for each choice."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptee._common.devices import best_precision, wait
from ptee._common.process import own_random_numbers
from ptee._common.text import Readable, table
from ptee.analysis.freezing import device_of
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Reading
from ptee.training.config import TrainingConfig, epochs_for
from ptee.training.feature_cache import LIMIT, Estimate, amount
from ptee.training.step import Step

SECONDS = 1.0  # that each rate is measured for
ON_CPU = 16  # images at once are as fast as more there, and take less long
HEADS, POOLED, NONE = "what the heads read", "means of the channels", "nothing"


@dataclass(frozen=True)
class Choice:
    """One way to train.

    Attributes:
        keeps: what the cache holds.
        passes: how often the backbone runs over the images.
        hours: on the device that was measured, without reading and decoding the images.
        size: of the cache, in bytes.
        fits: whether that is no more than the limit.
        how: what to give for it.
    """

    keeps: str
    passes: int
    hours: float
    size: int
    fits: bool
    how: str


@dataclass(frozen=True)
class Budget(Readable):
    """What a training takes. Prints as a table.

    Attributes:
        images: their number.
        epochs: of the heads.
        views: of each image.
        device: where the rates were measured.
        backbone_rate: images that the backbone and the heads' first layers read in a second.
        heads_rate: images that the heads learn from in a second.
        limit: bytes that a cache may take.
        choices: the ways to train.
    """

    images: int
    epochs: int
    views: int
    device: str
    backbone_rate: float
    heads_rate: float
    limit: int
    choices: tuple[Choice, ...]
    legend: ClassVar[str] = (
        "passes: of the backbone over the images. hours: on one device such as this one, if images are read and decoded fast "
        "enough;\non several, divide the backbone's part by their number. For heads that pool first they are the backbone's alone; those of the heads come on top."
        "\ncache: in memory, or on a disk above 1 GiB."
    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @property
    def taken(self) -> Choice:
        """What the recipe does with these heads: it keeps what they read if that fits, else it keeps nothing."""
        return next(choice for choice in self.choices if choice.fits and choice.keeps != POOLED)

    @property
    def words(self) -> str:
        """What will be done, in a sentence."""
        pooled = next((choice for choice in self.choices if choice.keeps == POOLED), None)
        if self.taken.keeps == HEADS:
            return f"What the heads read fits into {amount(self.limit)}: the backbone runs {_times(self.taken.passes)} over the images."
        words = f"What the heads read does not fit into {amount(self.limit)}: the backbone runs in every epoch."
        if pooled is not None and pooled.fits:
            words += f" Heads that pool first need {amount(pooled.size)}: {pooled.how}."
        return words

    def __str__(self) -> str:
        title = ("kept", "passes", "hours", "cache", "fits", "how")
        rows = []
        for c in self.choices:
            hours = f"{c.hours:,.{0 if c.hours >= 100 else 2}f}{' or more' * (c.keeps == POOLED)}"
            size = amount(c.size) if c.size else "-"
            rows.append((c.keeps, str(c.passes), hours, size, "yes" if c.fits else "no", c.how))
        rates = f"{self.backbone_rate:,.0f} images a second through the backbone and {self.heads_rate:,.0f} through the heads"
        head = f"{self.images:,} images, {self.epochs} epochs, {self.views} views; measured on {self.device}: {rates}."
        return f"{head}\n{table([title, *rows], left={0, 5})}\n{self.words}"


def budget(
    model: EarlyExitModel, images: int, config: TrainingConfig, device: torch.device, limit: int = LIMIT
) -> Budget:
    """What a training of a model's untrained heads takes. A few batches run on the device; then the model is as it was, in eval mode."""
    config = config.resolved()
    epochs = epochs_for(images, config.batch_size) if config.epochs == "auto" else int(config.epochs)
    views = 2 if config.views == "auto" else int(config.views)
    home, before = device_of(model.heads), copy.deepcopy(model.heads.state_dict())
    try:
        reading, backbone, heads = _rates(model.to(device), config, device)
    finally:
        model.to(home).eval()
        model.heads.load_state_dict(before)  # batch norm has counted what it saw
    pooled = Reading(tuple(x.mean((2, 3)) if x.dim() == 4 else x for x in reading.inputs), reading.logits)
    seconds = {
        HEADS: views / backbone + epochs / heads,
        POOLED: views / backbone,  # at least: heads that pool are not measured
        NONE: epochs / backbone + epochs / heads,
    }
    sizes = {HEADS: Estimate.of(reading, images, views).size, POOLED: Estimate.of(pooled, images, views).size, NONE: 0}
    hows = {HEADS: "", POOLED: "--head pool", NONE: "--set training.cache=false"}
    kept = [HEADS, POOLED, NONE] if any(x.dim() == 4 for x in reading.inputs) else [HEADS, NONE]
    choices = [
        Choice(
            name, epochs if name == NONE else views, images * seconds[name] / 3600, sizes[name],
            sizes[name] <= limit, hows[name],
        )
        for name in kept
    ]  # fmt: skip
    return Budget(images, epochs, views, str(device), backbone, heads, limit, tuple(choices))


def _rates(model: EarlyExitModel, config: TrainingConfig, device: torch.device) -> tuple[Reading, float, float]:
    """What the heads read of a batch, and images a second through the backbone and through the heads that learn."""
    precision = best_precision(device) if config.precision == "auto" else config.precision
    wide = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    around = torch.autocast(device.type, wide, enabled=wide is not None)
    with own_random_numbers(config.seed):
        rows = min(config.batch_size, ON_CPU) if device.type == "cpu" else config.batch_size
        x = torch.randn(rows, *model.plan.input_size, dtype=torch.float32, device="cpu")
    x = model.prepared(x)
    labels = torch.zeros(len(x), dtype=torch.int64, device=device)

    def read() -> Reading:
        with torch.no_grad(), around:
            return model.read(x)

    model.eval()
    reading = read()
    dtype = next(model.heads.parameters()).dtype
    inputs = Reading(tuple(i.to(dtype) for i in reading.inputs), reading.logits.to(dtype))
    step = Step(model, config.changed(shift=0))
    model.heads.train()

    def learn() -> None:
        with torch.inference_mode(False), torch.enable_grad(), around:
            loss: Tensor = step(inputs, labels).loss
            loss.backward()
        model.heads.zero_grad(set_to_none=True)

    backbone = _rate(read, len(x), device)
    heads = _rate(learn, len(x), device)
    return reading, backbone, heads


def _rate(call: Callable[[], Any], images: int, device: torch.device) -> float:
    """Images a second: of a call that is repeated for about a second, after one that does not count."""
    call()
    wait(device)
    start = time.perf_counter()
    done, passed = 0, 0.0
    while passed < SECONDS:
        call()
        wait(device)
        done, passed = done + images, time.perf_counter() - start
    return done / passed


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")
