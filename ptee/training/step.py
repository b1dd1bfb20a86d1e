"""One batch of a training: from images, or what was read of them, to the loss; and the sums of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ptee.exits.confidence import first_exit
from ptee.model.early_exit import EarlyExitModel, Reading
from ptee.training.config import Settings
from ptee.training.losses import ALONE, each_loss, get_loss
from ptee.training.mixing import Mixture, as_probabilities, displacements, mix, mixture, shift


@dataclass(frozen=True)
class Found:
    """What one batch showed, as sums over its rows; tensors on the device.

    Attributes:
        loss: the mean.
        right: (E+1,) answers that are the labels; None without labels.
        faithful: (E+1,) answers that are the backbone's.
        leaving: (E+1,) rows that would leave at each exit.
    """

    loss: Tensor
    right: Tensor | None
    faithful: Tensor
    leaving: Tensor


class Means(NamedTuple):
    """What an epoch showed, as means over its rows; fields as those of `Found`, `accuracy` for right."""

    loss: float
    accuracy: list[float] | None
    fidelity: list[float]
    leaving: list[float]


class Step(nn.Module):
    """One batch to its loss, in one forward pass, so that DistributedDataParallel sees it."""

    def __init__(self, model: EarlyExitModel, settings: Settings) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.loss = get_loss(settings.loss)
        if settings.loss == ALONE:
            self.loss = partial(each_loss, temperature=settings.temperature, reach=settings.reach)

    def forward(self, seen: Tensor | Reading, labels: Tensor | None) -> Found:
        """Judge a batch.

        Args:
            seen: images (b, c, h, w), or what was read of them.
            labels: (b,) or None.
        """
        mixed: Mixture | None = None
        if self.model.training and (self.settings.shift or self.settings.mixup):
            seen, mixed = self._changed(seen if isinstance(seen, Reading) else self.model.read(seen))
        every = self.model.answer(seen) if isinstance(seen, Reading) else self.model.all_exits(seen)
        device = every.logits.device
        costs = torch.tensor(self.model.costs, device=device, dtype=torch.float32)
        target = self._target(every.logits[-1].detach(), labels)
        if mixed is not None:
            target = mix(as_probabilities(target, self.model.num_classes), mixed)
        loss = self.loss(every.logits, every.confidence_logits, costs, target, self.settings.cost_weight)
        with torch.no_grad():
            answers = every.logits.argmax(-1)
            leaving = first_exit(every.confidence[:-1], self.model.threshold)
            right = None if labels is None else (answers == labels).sum(1)
            return Found(loss, right, (answers == answers[-1]).sum(1), torch.bincount(leaving, minlength=len(answers)))

    def _changed(self, reading: Reading) -> tuple[Reading, Mixture | None]:
        """What the heads read, shifted and mixed; the backbone's answer stays that to the image as it was."""
        inputs, b = reading.inputs, len(reading.logits)
        if self.settings.shift:
            by, (_, height, width) = displacements(b, self.settings.shift), self.model.plan.input_size
            inputs = tuple(shift(x, by, (height, width)) for x in inputs)
        if not self.settings.mixup:
            return reading._replace(inputs=inputs), None
        mixed = mixture(b, self.settings.mixup)
        return reading._replace(inputs=tuple(mix(x, mixed) for x in inputs)), mixed

    def _target(self, final: Tensor, labels: Tensor | None) -> Tensor:
        """(b,) labels or (b, K) probabilities, of the backbone's answer (b, K) where no labels are to be learnt."""
        if self.settings.targets == "soft":
            return (final.float() / self.settings.temperature).softmax(-1)
        if self.settings.targets == "pseudo":
            return final.argmax(-1)
        assert labels is not None  # the training has asked for them
        return labels


def rows_of(seen: Tensor | Reading) -> int:
    """b."""
    return len(seen.logits if isinstance(seen, Reading) else seen)


def moved(reading: Reading, device: torch.device, dtype: torch.dtype) -> Reading:
    """The same on another device, in another type."""
    return Reading(tuple(x.to(device, dtype) for x in reading.inputs), reading.logits.to(device, dtype))


class Sums:
    """Sums over the rows of an epoch."""

    def __init__(self) -> None:
        self.samples = 0
        self.labelled = True
        self.loss: Tensor | float = 0.0
        self.counts: Tensor | int = 0  # (3, E+1) right, faithful, leaving

    def add(self, found: Found, rows: int) -> None:
        """One more batch of so many rows."""
        self.samples += rows
        self.labelled &= found.right is not None
        self.loss = self.loss + found.loss.detach().float() * rows
        right = torch.zeros_like(found.faithful) if found.right is None else found.right
        self.counts = self.counts + torch.stack([right, found.faithful, found.leaving])

    def postfix(self) -> dict[str, str]:
        """For the progress bar: loss, and accuracy (or fidelity) of each exit."""
        right, faithful, _ = (torch.as_tensor(self.counts) / self.samples).tolist()
        percent = lambda shares: "/".join(f"{100 * s:.0f}" for s in shares)  # noqa: E731
        shown = {"loss": f"{float(self.loss) / self.samples:.3f}", "fid%": percent(faithful)}
        return shown | ({"acc%": percent(right)} if self.labelled else {})

    def tensor(self) -> Tensor:
        """All sums in one vector, to be added up over processes; on the CPU, as MPS has no float64."""
        head = torch.tensor([self.samples, float(not self.labelled), float(self.loss)], dtype=torch.float64)
        return torch.cat([head, torch.as_tensor(self.counts).cpu().double().flatten()])

    @staticmethod
    def mean(sums: Tensor) -> Means:
        """The means out of the added-up vector."""
        samples, unlabelled, loss, *counts = sums.tolist()
        right, faithful, leaving = torch.tensor(counts).view(3, -1).div(samples).tolist()
        return Means(loss / samples, None if unlabelled else right, faithful, leaving)
