"""One batch of a training: from images, or from what the heads read of them, to the loss; and the sums of an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptee.exits.confidence import first_exit
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Reading
from ptee.training.augmentation import draw_shifts, shift_maps
from ptee.training.config import TrainingConfig
from ptee.training.losses import SEPARATE, get_loss


@dataclass(frozen=True)
class BatchResult:
    """What one batch showed: the mean loss, and counts of its rows. Tensors on the device.

    Attributes:
        loss: the mean over the rows.
        right: (E+1,) answers that are the labels; None without labels.
        faithful: (E+1,) answers that are the backbone's.
        leaving: (E+1,) rows that would leave at each exit.
    """

    loss: Tensor
    right: Tensor | None
    faithful: Tensor
    leaving: Tensor


class EpochMeans(NamedTuple):
    """Means over the rows of an epoch."""

    loss: float
    accuracy: list[float] | None
    fidelity: list[float]
    leaving: list[float]


class Step(nn.Module):
    """From one batch to its loss, in one forward pass, so that DistributedDataParallel sees it.

    Args:
        model: whose heads are trained.
        config: resolved, with numbers in place of "auto".
    """

    def __init__(self, model: EarlyExitModel, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.loss = get_loss(config.loss)
        alone = config.loss == SEPARATE
        self.weights: dict[str, Any] = (
            {"temperature": config.temperature} if alone else {"cost_weight": config.cost_weight}
        )

    def forward(self, batch: Tensor | Reading, labels: Tensor | None) -> BatchResult:
        """Judge a batch.

        Args:
            batch: images (b, c, h, w), or what the heads read of them.
            labels: (b,) or None.
        """
        if self.config.shift and self.model.training:
            batch = self._shifted(batch if isinstance(batch, Reading) else self.model.read(batch))
        every = self.model.answer(batch) if isinstance(batch, Reading) else self.model.all_exits(batch)
        target = self._target(every.logits[-1].detach(), labels)
        costs = torch.tensor(self.model.costs, device=every.logits.device, dtype=torch.float32)
        loss = self.loss(every.logits, every.confidence_logits, costs, target, **self.weights)
        return self._result(loss, every.logits, every.confidence, labels)

    @torch.no_grad()
    def _result(self, loss: Tensor, logits: Tensor, confidence: Tensor, labels: Tensor | None) -> BatchResult:
        answers = logits.argmax(-1)
        first = first_exit(confidence[:-1], self.model.threshold)
        right = None if labels is None else (answers == labels).sum(1)
        return BatchResult(loss, right, (answers == answers[-1]).sum(1), torch.bincount(first, minlength=len(answers)))

    def _shifted(self, reading: Reading) -> Reading:
        """The maps shifted; the backbone's answer stays the one to the image as it was."""
        assert isinstance(self.config.shift, int)
        pixels = draw_shifts(len(reading.logits), self.config.shift)
        _, height, width = self.model.plan.input_size
        return reading._replace(inputs=tuple(shift_maps(x, pixels, (height, width)) for x in reading.inputs))

    def _target(self, final: Tensor, labels: Tensor | None) -> Tensor:
        """(b,) labels, or (b, K) probabilities, made of the backbone's logits (b, K) where labels are not the targets."""
        if self.config.targets == "soft":
            return (final.float() / (self.config.temperature or 1.0)).softmax(-1)
        if self.config.targets == "pseudo":
            return final.argmax(-1)
        assert labels is not None  # the trainer has refused data without them
        return labels


def rows_of(batch: Tensor | Reading) -> int:
    """b."""
    return len(batch.logits if isinstance(batch, Reading) else batch)


def moved(reading: Reading, device: torch.device, dtype: torch.dtype) -> Reading:
    """The same on another device, in another type."""
    return Reading(tuple(x.to(device, dtype) for x in reading.inputs), reading.logits.to(device, dtype))


class EpochSums:
    """Sums over the rows of an epoch."""

    def __init__(self) -> None:
        self.samples = 0
        self.labelled = True
        self.loss: Tensor | float = 0.0
        self.counts: Tensor | int = 0  # (3, E+1) right, faithful, leaving

    def add(self, result: BatchResult, rows: int) -> None:
        """Add a batch of so many rows."""
        self.samples += rows
        self.labelled &= result.right is not None
        self.loss = self.loss + result.loss.detach().float() * rows
        right = torch.zeros_like(result.faithful) if result.right is None else result.right
        self.counts = self.counts + torch.stack([right, result.faithful, result.leaving])

    def postfix(self) -> dict[str, str]:
        """For the progress bar: the loss, and fidelity and accuracy of each exit in per cent."""
        right, faithful, _ = (torch.as_tensor(self.counts, device="cpu") / self.samples).tolist()
        shown = {"loss": f"{float(self.loss) / self.samples:.3f}", "fidelity": _percent(faithful)}
        return shown | ({"accuracy": _percent(right)} if self.labelled else {})

    def tensor(self) -> Tensor:
        """All sums in one vector, to be added up over processes; on the CPU, as MPS has no float64."""
        head = torch.tensor(
            [self.samples, float(not self.labelled), float(self.loss)], dtype=torch.float64, device="cpu"
        )
        return torch.cat([head, torch.as_tensor(self.counts, device="cpu").double().flatten()])

    @staticmethod
    def means(sums: Tensor) -> EpochMeans:
        """The means, of the vector that `tensor` gives."""
        samples, unlabelled, loss, *counts = sums.tolist()
        right, faithful, leaving = torch.tensor(counts, device="cpu").view(3, -1).div(samples).tolist()
        return EpochMeans(loss / samples, None if unlabelled else right, faithful, leaving)


def _percent(shares: list[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)
