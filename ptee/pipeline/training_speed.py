"""What training costs with and without the cache, in passes of the bare backbone over the same images."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ptee._common.errors import PteeError
from ptee._common.process import no_warnings, own_random_numbers
from ptee._common.text import table
from ptee.evaluation.benchmark import ratio, wait
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.training.feature_cache import fill
from ptee.training.trainer import train

WARM_EPOCHS = 2  # on the cache before the one that is timed


@dataclass(frozen=True)
class TrainingBench:
    """Times over one pass of the bare backbone over the images.

    Attributes:
        backbone: its name.
        head: of the exits.
        exits: E.
        device: its kind.
        threads: of the CPU.
        images: n.
        epochs: for which the sums are made.
        fill: making the cache.
        cached: an epoch on the cache.
        fresh: an epoch with the backbone in it.
    """

    backbone: str
    head: str
    exits: int
    device: str
    threads: int
    images: int
    epochs: int
    fill: float
    cached: float
    fresh: float

    @property
    def passes(self) -> float:
        """What all epochs cost with the cache."""
        return self.fill + self.epochs * self.cached

    @property
    def times_less(self) -> float:
        """Than with the backbone in each epoch."""
        return self.epochs * self.fresh / self.passes

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"passes": self.passes, "times_less": self.times_less}

    def __str__(self) -> str:
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        rows = [
            ("", "time"),
            ("the bare backbone, once over the images", f"{1:.3f}"),
            ("the cache", f"{self.fill:.3f}"),
            ("an epoch on the cache", f"{self.cached:.3f}"),
            ("an epoch with the backbone", f"{self.fresh:.3f}"),
        ]
        return (
            f"Training {self.exits} {self.head} heads of {self.backbone} on {self.images:,} images, {where}; time over one pass "
            f"of the bare backbone\n{table(rows, left={0})}\n"
            f"{self.epochs} epochs on the cache cost {self.passes:.2f} times one pass of the backbone, {self.times_less:.1f} "
            "times less than with the backbone in each."
        )


def bench_training(
    model: EarlyExitModel, *, images: int = 512, epochs: int = 20, batch_size: int = 128, rounds: int = 3
) -> TrainingBench:
    """Time training on random images: one pass of the backbone, the cache, an epoch on it, an epoch without it, in turns.

    Everything in single precision. The heads are put back as they were.

    Args:
        model: on the device to be timed.
        images: n.
        epochs: for which the sums are made; three are run.
        batch_size: images per batch.
        rounds: how often each is timed; medians of the ratios are given.
    """
    require_early_exit(model)
    if images < 2 or epochs < 1:
        raise PteeError(
            f"{images} images and {epochs} epochs are too few to be timed: give 2 images and 1 epoch at least."
        )
    like = next(model.heads.parameters())
    data = TensorDataset(torch.randn(images, *model.plan.input_size))
    heads = copy.deepcopy(model.heads.state_dict())

    def ready(x: Tensor) -> Tensor:
        return x.to(like.device, like.dtype)

    @torch.no_grad()
    def once() -> None:
        for x in data.tensors[0].split(batch_size):
            model.backbone(ready(x))

    def kept() -> None:
        fill(model, data, batch_size=batch_size, prepare=ready, around=nullcontext).close()

    def epoch(cache: bool) -> float:
        return _last_epoch(model, data, batch_size, like.device, cache)

    model.eval()
    once()
    times = [
        (_seconds(once, like.device), _seconds(kept, like.device), epoch(True), epoch(False)) for _ in range(rounds)
    ]
    model.heads.load_state_dict(heads)
    one, *others = zip(*times, strict=True)
    return TrainingBench(
        model.plan.backbone, model.plan.head, len(model.exits), like.device.type, torch.get_num_threads(), images, epochs,
        *(ratio(other, one) for other in others),
    )  # fmt: skip


def _last_epoch(model: EarlyExitModel, data: Any, batch_size: int, device: torch.device, cache: bool) -> float:
    """Seconds; on a cache, of one epoch after others."""
    with own_random_numbers(), no_warnings:  # of a collapse
        history = train(
            model, data, targets="pseudo", epochs=1 + WARM_EPOCHS * cache, batch_size=batch_size, device=device,
            precision="no", cache=cache,
        )  # fmt: skip
    return history.epochs[-1].seconds


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start
