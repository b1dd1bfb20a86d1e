"""Traces: every exit's answer and confidence on a data set, recorded once.

Thresholds only choose among answers that every exit could give. So run the model once with nobody leaving and keep
what each exit said; what any threshold would give is arithmetic from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint

import torch
from torch import Tensor

from ptee._common.errors import DataError, PteeError
from ptee._common.progress import with_bar
from ptee._common.validation import BATCH_SIZE
from ptee.data.batches import UNKNOWN_LABEL, batches, split_batch
from ptee.data.labels import odd_labels
from ptee.exits.confidence import CONFIDENCES, LEARNED, Calibrated, find_confidence, first_exit
from ptee.exits.plan import heads_run
from ptee.model.early_exit import EarlyExitModel, require_early_exit

SAMPLE = 128  # images kept to measure speed on
MANY_CLASSES = 100  # above which logits are kept in half precision
ROUGH = 0.05  # of the deviation of pixels: by no more do they differ in what passes for the same image


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
        logits: (E+1, n, K), float32; float16 for more than 100 classes, each row then shifted so that its largest is 0.
            None where they were not kept.
        head_costs: (E,) float64, what each exit's head adds to `costs` from there on; None is for heads that cost
            nothing.
        builds_on_previous: (E,) bool, heads that read what those before them answered; None is for none.
        confidence_logits: (E, n) of the heads' confidence layers, float32. None where they were not kept.
        confidence_name: what `confidence` was computed from, a name of `CONFIDENCES`.
        calibrated: the model's, or None.
    """

    answers: Tensor
    confidence: Tensor
    targets: Tensor | None
    costs: Tensor
    sample: Tensor
    note: str = ""
    logits: Tensor | None = None
    head_costs: Tensor | None = None
    builds_on_previous: Tensor | None = None
    confidence_logits: Tensor | None = None
    confidence_name: str = LEARNED
    calibrated: Calibrated | None = None

    @property
    def reading(self) -> Tensor:
        """(E,) bool, exits that read what those before them answered, for their own answer or for their confidence."""
        if CONFIDENCES[self.confidence_name].needs_answers_of_earlier_exits:
            return torch.ones(len(self.costs) - 1, dtype=torch.bool)
        return (
            torch.zeros(len(self.costs) - 1, dtype=torch.bool)
            if self.builds_on_previous is None
            else self.builds_on_previous
        )

    def rows(self, which: Tensor) -> Traces:
        """Of some of the images.

        Args:
            which: (n,) bool, or indices.
        """
        return replace(
            self,
            answers=self.answers[:, which],
            confidence=self.confidence[:, which],
            targets=None if self.targets is None else self.targets[which],
            logits=None if self.logits is None else self.logits[:, which],
            confidence_logits=None if self.confidence_logits is None else self.confidence_logits[:, which],
        )

    def under(self, name: str) -> Traces:
        """The same traces with another confidence.

        Args:
            name: a key of `CONFIDENCES`.

        Raises:
            UnknownName: if there is no such confidence.
            PteeError: if it is "calibrated" and the model was not, or no logits were kept.
        """
        confidence = find_confidence(name, self.calibrated)
        if name == self.confidence_name:
            return self
        if self.logits is None or self.confidence_logits is None:
            raise PteeError(
                "These traces hold no logits to compute another confidence from. Record them with logits=True."
            )
        return replace(
            self, confidence=confidence.at_all_exits(self.logits[:-1], self.confidence_logits), confidence_name=name
        )

    def costs_without(self, off: Sequence[int]) -> Tensor:
        """(E+1,) `costs` where some exits are off: their heads are run only if one behind them reads what they say."""
        if self.head_costs is None:
            return self.costs
        on = torch.tensor([n not in off for n in range(len(self.head_costs))])
        missing = (self.head_costs * ~heads_run(on, self.reading)).cumsum(0)
        return self.costs - torch.cat([missing, missing[-1:]])

    def leaving(self, threshold: Sequence[float] | Tensor) -> Tensor:
        """Where each image leaves: (n,) the first exit n with h_n >= T_n, E at the latest.

        Args:
            threshold: (E,) one for each exit.
        """
        return first_exit(self.confidence[:-1], threshold)

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
    model: EarlyExitModel,
    data: object,
    *,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    progress: bool = True,
    logits: bool = True,
) -> Traces:
    """Run a model once over data with nobody leaving. Labels that are no classes of the backbone are taken for none.

    Args:
        model: in eval mode, on the device it shall run on.
        data: a map-style data set of (image, label) or (image,), or a loader.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        progress: show a bar, where standard error is a terminal.
        logits: keep them; for E exits, n images and K classes they take (E+1) n K numbers.

    Raises:
        DataError: if some images have labels and others none.
    """
    require_early_exit(model)
    was_training = model.training
    model.eval()
    parts: list[Traces] = []
    loader = batches(data, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    kept = _kept_of_each_batch(loader)
    try:
        for batch in with_bar(loader, "recording exits", progress):
            images, labels = split_batch(batch)
            part = _record_batch(model, images, labels, kept)
            parts.append(part if logits else replace(part, logits=None, confidence_logits=None))
    finally:
        model.train(was_training)
    if not parts:
        raise DataError("The data gave no batch: it is empty.")
    return _join(parts, model.num_classes)


def repeated(
    data: object,
    traces: Traces,
    *,
    words: str,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    progress: bool = True,
) -> Iterator[Tensor]:
    """Images of data that were recorded before, batch by batch, so that others can answer them, too.

    Args:
        data: as of `record`.
        traces: what came of it.
        words: beside the bar.
        batch_size: as of `record`.
        num_workers: as of `record`.
        progress: as of `record`.

    Raises:
        PteeError: if they are other images now, or come in another order.
    """
    loader = batches(data, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    kept, seen = _kept_of_each_batch(loader), 0
    for images, _ in map(split_batch, with_bar(loader, words, progress)):
        if now := min(kept, len(images), SAMPLE - seen):
            require_same_images(traces.sample[seen : seen + now], images[:now].to(traces.sample.dtype))
        seen += now
        yield images
    require_same_images(traces.sample, traces.sample[:seen])  # no fewer than before


def require_same_images(sample: Tensor, again: Tensor) -> None:
    """Refuse data that shuffle, or give other images each time, in ways of their own; a decoder may round otherwise.

    Args:
        sample: (s, c, h, w) of the first time.
        again: the same of another time.

    Raises:
        PteeError: if they differ.
    """
    one, other = (x.float().nan_to_num(0, 0, 0) for x in (sample, again))
    if one.shape != other.shape or (one - other).abs().gt(ROUGH * one.std(correction=0)).any():
        raise PteeError(
            "The data give other images, or another order, each time they are gone through, and networks are compared image "
            "by image. Give them in order (shuffle=False, no sampler that draws), without random transforms."
        )


def _kept_of_each_batch(loader: object) -> int:
    """How many images of each batch, the first ones, go into a sample; a loader need not know its length."""
    return math.ceil(SAMPLE / max(1, length_hint(loader, 16)))


def _record_batch(model: EarlyExitModel, images: Tensor, labels: Tensor | None, kept: int) -> Traces:
    ready = model.prepared(images)
    with torch.inference_mode():
        every = model.all_exits(ready)
    costs = torch.tensor(model.plan.switched_off(()).costs, dtype=torch.float64)  # of all heads, whichever are off now
    return Traces(
        every.logits.argmax(-1).cpu(),
        every.confidence.cpu(),
        labels,
        costs,
        images[:kept].to(ready.dtype, copy=True),  # a slice alone would keep the whole batch
        logits=compact(every.logits).cpu(),
        head_costs=torch.tensor([e.head_cost for e in model.exits], dtype=torch.float64),
        builds_on_previous=torch.tensor([e.builds_on_previous for e in model.exits]),
        confidence_logits=every.confidence_logits.float().cpu(),
        confidence_name=model.confidence,
        calibrated=model.calibrated,
    )


def compact(logits: Tensor) -> Tensor:
    """Logits as traces keep them. Shifted before they are halved, which changes no softmax: so none overflows."""
    wide = logits.float()
    return wide if wide.shape[-1] <= MANY_CLASSES else (wide - wide.amax(-1, keepdim=True)).half()


def _join(parts: list[Traces], classes: int) -> Traces:
    labels = [p.targets for p in parts if p.targets is not None]
    logits = [p.logits for p in parts if p.logits is not None]
    confidence_logits = [p.confidence_logits for p in parts if p.confidence_logits is not None]
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
        logits=torch.cat(logits, 1) if logits else None,
        confidence_logits=torch.cat(confidence_logits, 1) if confidence_logits else None,
        note=fault and f"There is no accuracy for this data: {fault}.",
    )
