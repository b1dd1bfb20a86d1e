"""One batch of a training, from images or from the heads' inputs to the loss; and the sums of an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptee._common.errors import PteeError
from ptee._common.shares import Share
from ptee.analysis.parameters import number_of_parameters, parameter_shares
from ptee.exits.confidence import first_exit
from ptee.exits.placement import INPUT
from ptee.model.early_exit import EarlyExitModel
from ptee.model.forward import Reading
from ptee.training.augmentation import draw_shifts, shift_maps
from ptee.training.config import JOINT, ONE_BY_ONE, OPERATIONS, SEPARATE, WEIGHTED, TrainingConfig
from ptee.training.losses import LOSSES


@dataclass(frozen=True)
class BatchResult:
    """The mean loss of a batch, and counts of its rows. Tensors on the device.

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
    """From one batch to its loss, in one forward pass, so that DistributedDataParallel sees it. The config is resolved.

    With `exits` the model ends behind its first so many exits, and the backbone's own answer comes next.
    """

    def __init__(self, model: EarlyExitModel, config: TrainingConfig, exits: int | None = None) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.exits = len(model.exits) if exits is None else exits
        self.share: Share | None = None  # of several processes
        self.loss = LOSSES[config.loss]
        own = {SEPARATE: "temperature", WEIGHTED: "exit_weights"}.get(config.loss, "cost_weight")
        self.weights: dict[str, Any] = {own: getattr(config, own)}
        by_parameters = config.cost_unit != OPERATIONS
        self.costs = (parameter_costs if by_parameters else operation_costs)(model, self.exits)

    def forward(self, batch: Tensor | Reading, labels: Tensor | None) -> BatchResult:
        """The result of a batch: images (b, c, h, w), or what the heads read of them, and labels (b,) or None."""
        if self.config.shift and self.model.training:
            batch = self._shifted(batch if isinstance(batch, Reading) else self.model.read(batch))
        every = self.model.answer(batch) if isinstance(batch, Reading) else self.model.all_exits(batch)
        target = self._target(every.logits[-1].detach(), labels)
        costs = torch.tensor(self.costs, device=every.logits.device, dtype=torch.float32)
        known = (*range(self.exits), len(every.logits) - 1)
        loss = self.loss(
            every.logits[known, :], every.confidence_logits[: self.exits], costs, target, **self._own_weights(known)
        )
        with torch.no_grad():
            answers = every.logits.argmax(-1)
            right = None if labels is None else (answers == labels).sum(1)
            first = first_exit(every.confidence[: self.exits], self.model.threshold[: self.exits])
            first = first.masked_fill(first >= self.exits, len(answers) - 1)
            leaving = torch.bincount(first, minlength=len(answers))
            return BatchResult(loss, right, (answers == answers[-1]).sum(1), leaving)

    def _own_weights(self, known: Sequence[int]) -> dict[str, Any]:
        """What the loss needs besides; of the weights of all answers, those that are known so far."""
        weights = self.weights.get("exit_weights")
        return self.weights if weights is None else {"exit_weights": [weights[n] for n in known]}

    def _shifted(self, reading: Reading) -> Reading:
        """The maps shifted; the backbone's answer stays that for the image itself."""
        assert isinstance(self.config.shift, int)
        if self.share is None:
            pixels = draw_shifts(len(reading.logits), self.config.shift)
        else:  # drawn as one process would
            pixels = self.share.of(draw_shifts(self.share.whole, self.config.shift))
        _, height, width = self.model.plan.input_size
        return reading._replace(inputs=tuple(shift_maps(x, pixels, (height, width)) for x in reading.inputs))

    def _target(self, final: Tensor, labels: Tensor | None) -> Tensor:
        """What the heads learn: (b,) classes or (b, K) probabilities, from the labels or the backbone's logits (b, K)."""
        if self.config.targets == "soft":
            return (final.float() / (self.config.temperature or 1.0)).softmax(-1)
        if self.config.targets == "pseudo":
            return final.argmax(-1)
        assert labels is not None  # the trainer has refused data without them
        return labels


class Turns:
    """Lets one head after another learn. What was frozen before stays frozen.

    Raises:
        PteeError: if nothing of a head that must learn requires gradients.
    """

    def __init__(self, heads: nn.ModuleList, config: TrainingConfig) -> None:
        self.heads = heads
        self.free = [[p for p in head.parameters() if p.requires_grad] for head in heads]
        frozen = [n for n, free in enumerate(self.free) if not free]
        if config.order == ONE_BY_ONE and frozen:
            raise _nothing_learns(f"head {frozen[0]}", f"heads[{frozen[0]}]")
        if config.backbone != JOINT and len(frozen) == len(self.free):
            raise _nothing_learns("the heads", "heads")

    def only(self, number: int) -> None:
        """Let the head of this number learn, and keep the others as they are."""
        for n, (head, free) in enumerate(zip(self.heads, self.free, strict=True)):
            head.train(n == number)
            for p in free:
                p.requires_grad_(n == number)


def _nothing_learns(what: str, place: str) -> PteeError:
    return PteeError(f"No parameter of {what} requires gradients. Call model.{place}.requires_grad_() first.")


@contextmanager
def flags_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards each parameter requires gradients if it did before. Refuses those whose gradients torch can never switch on."""
    if any(p.is_inference() for p in module.parameters()):
        text = "The model was moved or copied under torch.inference_mode, so its heads cannot learn. Give copy.deepcopy(model), made outside of it."
        raise PteeError(text)
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def operation_costs(model: EarlyExitModel, exits: int) -> tuple[float, ...]:
    """What leaving costs at each of the first `exits` exits, and at the end, with the heads of these: shares of the backbone's operations."""
    costs = model.plan.switched_off(range(exits, len(model.exits))).costs
    return (*costs[:exits], costs[-1])


def parameter_costs(model: EarlyExitModel, exits: int) -> tuple[float, ...]:
    """The same as shares of the backbone's parameters. The model is in eval mode."""
    shares = parameter_shares(model.backbone, model.plan.input_size) | {INPUT: 0.0}
    total = number_of_parameters(model.backbone)
    heads = list(accumulate(number_of_parameters(head) / total for head in model.heads[:exits]))
    reached = [shares[e.name] for e in model.exits[:exits]]
    return tuple(share + passed for share, passed in zip([*reached, 1.0], [*heads, heads[-1]], strict=True))


def rows_of(batch: Tensor | Reading) -> int:
    """b."""
    return len(batch.logits if isinstance(batch, Reading) else batch)


def moved(reading: Reading, device: torch.device, dtype: torch.dtype) -> Reading:
    """The same on another device, in another type."""
    return Reading(tuple(x.to(device, dtype) for x in reading.inputs), reading.logits.to(device, dtype))


class EpochSums:
    """Sums over the rows of an epoch, for so many answers: those of the exits and the backbone's own."""

    def __init__(self, answers: int) -> None:
        self.samples = 0
        self.labelled = True
        self.loss: Tensor | float = 0.0
        self.counts = torch.zeros((3, answers), dtype=torch.int64, device="cpu")  # right, faithful, leaving

    def add(self, result: BatchResult, rows: int) -> None:
        """Add a batch of so many rows."""
        self.samples += rows
        self.labelled &= result.right is not None
        self.loss = self.loss + result.loss.detach().float() * rows
        right = torch.zeros_like(result.faithful) if result.right is None else result.right
        counts = torch.stack([right, result.faithful, result.leaving])
        self.counts = self.counts.to(counts.device) + counts

    def postfix(self) -> dict[str, str]:
        """For the progress bar: the loss, and fidelity and accuracy of each exit in per cent."""
        right, faithful, _ = (self.counts.cpu() / self.samples).tolist()
        shown = {"loss": f"{float(self.loss) / self.samples:.3f}", "fidelity": _percent(faithful)}
        return shown | ({"accuracy": _percent(right)} if self.labelled else {})

    def tensor(self) -> Tensor:
        """All sums in one vector, to add up over processes; on the CPU, as MPS has no float64."""
        head = torch.tensor(
            [self.samples, float(not self.labelled), float(self.loss)], dtype=torch.float64, device="cpu"
        )
        return torch.cat([head, self.counts.cpu().double().flatten()])

    @staticmethod
    def means(sums: Tensor) -> EpochMeans:
        """The means, of the vector that `tensor` gives."""
        samples, unlabelled, loss, *counts = sums.tolist()
        right, faithful, leaving = torch.tensor(counts, device="cpu").view(3, -1).div(samples).tolist()
        return EpochMeans(loss / samples, None if unlabelled else right, faithful, leaving)


def _percent(shares: list[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares)
