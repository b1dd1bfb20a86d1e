"""Traces: every exit's answer and confidence on a data set, recorded once.

Thresholds only choose among answers that every exit could give. So run the model once with nobody leaving and keep
what each exit said; what any threshold would give is arithmetic from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import length_hint

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ptee.batches import UNKNOWN_LABEL, batches, split_batch
from ptee.errors import DataError
from ptee.model import EarlyExitModel

SAMPLE = 128  # images kept to measure speed on
COLLAPSED = 0.95  # share of the samples at one exit above which there is nothing adaptive left


@dataclass(frozen=True)
class Traces:
    """What every exit said to every image; the exit axis comes first and ends with the backbone.

    Attributes:
        answers: (E+1, n) the class each exit chose.
        confidence: (E+1, n) h, float32; the last are 1.
        targets: (n,) labels, or None where there are none, or none that could be answers.
        costs: (E+1,) float64, what leaving there costs, as a fraction of the bare backbone.
        sample: (s, c, h, w) some of the images, spread over the data set.
        note: why labels that are there are no targets, in a sentence; else empty.
    """

    answers: Tensor
    confidence: Tensor
    targets: Tensor | None
    costs: Tensor
    sample: Tensor
    note: str = ""

    def leaving(self, threshold: Sequence[float] | Tensor) -> Tensor:
        """Where each image leaves: (n,) the first exit n with h_n >= T_n, E at the latest.

        Args:
            threshold: (E,) one for each exit.
        """
        wall = torch.as_tensor(threshold, dtype=torch.float64)[:, None]
        sure = torch.cat(
            [self.confidence[:-1].double() >= wall, torch.ones_like(self.confidence[:1], dtype=torch.bool)]
        )
        return sure.int().argmax(0)  # the first of equals

    def shares(self, leaving: Tensor) -> list[float]:
        """The share of the images that leaves at each of the E+1 exits."""
        return (torch.bincount(leaving, minlength=len(self.costs)) / len(leaving)).tolist()

    def score(self, leaving: Tensor) -> Score:
        """Accuracy, fidelity and cost when each image leaves where `leaving` (n,) says."""
        answers = self.answers.gather(0, leaving[None])[0]
        accuracy = None if self.targets is None else (answers == self.targets).double().mean().item()
        fidelity = (answers == self.answers[-1]).double().mean().item()
        return Score(accuracy, fidelity, self.costs[leaving].mean().item())

    def right(self, leaving: Tensor, exit_index: int) -> float | None:
        """Of those who leave at an exit, the share that is right there (without labels: that agrees with the backbone)."""
        here = leaving == exit_index
        wanted = self.answers[-1] if self.targets is None else self.targets
        return (self.answers[exit_index] == wanted)[here].double().mean().item() if here.any() else None

    def at(self, exit_index: int) -> Tensor:
        """(n,) everybody leaves at one exit."""
        return torch.full((self.answers.shape[1],), exit_index)


@dataclass(frozen=True)
class Score:
    """Means over a data set.

    Attributes:
        accuracy: share of answers equal to the label; None without labels.
        fidelity: share of answers equal to the backbone's.
        cost: multiply-accumulates spent, as a fraction of the bare backbone's.
    """

    accuracy: float | None
    fidelity: float
    cost: float


def record(
    model: EarlyExitModel, data: object, *, batch_size: int = 128, num_workers: int = 0, progress: bool = True
) -> Traces:
    """Run a model once over data with nobody leaving. Labels that are no classes of the backbone are taken for none.

    Args:
        model: in eval mode, on the device it shall run on.
        data: a map-style data set of (image, label) or (image,), or a loader.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        progress: show a bar, where standard error is a terminal.

    Raises:
        DataError: if some images have labels and others none.
    """
    like = next(model.heads.parameters())
    was_training = model.training
    model.eval()
    parts: list[Traces] = []
    loader = batches(data, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    kept = math.ceil(SAMPLE / max(1, length_hint(loader, 16)))  # a loader need not know its length
    try:
        for batch in _bar(loader, "recording exits", progress):
            images, labels = split_batch(batch)
            parts.append(_record_batch(model, images.to(like.dtype), labels, like.device, kept))
    finally:
        model.train(was_training)
    if not parts:
        raise DataError("The data gave no batch: it is empty.")
    return _join(parts, model.num_classes)


def _record_batch(
    model: EarlyExitModel, images: Tensor, labels: Tensor | None, device: torch.device, kept: int
) -> Traces:
    with torch.inference_mode():
        every = model.all_exits(images.to(device))
    costs = torch.tensor(model.costs, dtype=torch.float64)
    return Traces(
        every.logits.argmax(-1).cpu(), every.confidence.cpu(), labels, costs, images[:kept].clone()
    )  # a slice alone would keep the whole batch


def odd_labels(labels: Tensor, classes: int) -> str:
    """What is wrong with labels of which some are no class of the backbone; empty where nothing is."""
    if not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return ""
    found = f"its labels are {int(labels.min())} to {int(labels.max())}"
    return f"{found}, the backbone's classes 0 to {classes - 1}"


def _join(parts: list[Traces], classes: int) -> Traces:
    labels = [p.targets for p in parts if p.targets is not None]
    targets = torch.cat(labels) if labels else None
    if targets is not None and (len(labels) < len(parts) or (targets == UNKNOWN_LABEL).any()):
        raise DataError("Some images have labels and others have none. Give labels to all of them, or to none.")
    fault = "" if targets is None else odd_labels(targets, classes)
    return replace(
        parts[0],
        answers=torch.cat([p.answers for p in parts], 1),
        confidence=torch.cat([p.confidence for p in parts], 1),
        targets=None if fault else targets,
        sample=torch.cat([p.sample for p in parts])[:SAMPLE],
        note=fault and f"There is no accuracy for this data: {fault}.",
    )


def _bar(loader: Iterable[object], words: str, progress: bool) -> Iterable[object]:
    return tqdm(loader, desc=words, leave=False, disable=None if progress else True)
