"""Traces: the answer and the confidence of every exit for every image, recorded in one pass.

Thresholds only choose among answers that every exit could give. So the model runs once while no image leaves, and what any
thresholds would give is arithmetic from then on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import DataError, PteeError
from ptee._common.progress import with_bar
from ptee._common.validation import BATCH_SIZE, checked
from ptee.analysis.freezing import device_of, running_on
from ptee.data.batches import batches, marks_of, numbered, own_generator, split_batch
from ptee.data.labels import no_accuracy, usable_labels
from ptee.data.recorded import recorded
from ptee.exits.blend import BLENDED, Blend, Exits, confidence_of_blend
from ptee.exits.confidence import CONFIDENCES, LEARNED, Calibrated, find_confidence, first_exit
from ptee.exits.plan import heads_run
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.images import require_answers

SAMPLE = 128  # images that are kept
MANY_CLASSES = 100  # above which logits are kept in half precision
TOLERANCE = 0.05  # of the pixels' standard deviation: a larger difference is another image, a smaller one rounding


@dataclass(frozen=True)
class Traces:
    """What every exit answered for every image. The exit axis comes first and ends with the backbone.

    Attributes:
        answers: (E+1, n) classes.
        confidence: (E+1, n) h, float32; 1 in the last row.
        targets: (n,) labels; None if there are none, or if none is a class of the backbone.
        costs: (E+1,) float64, the cost of leaving at each exit, as a fraction of the bare backbone.
        sample: (s, c, h, w) some of the images, spread over the data set.
        note: why labels that are there are not used, in a sentence; else empty.
        logits: (E+1, n, K), float32; with more than 100 classes float16, each row shifted so that its largest is 0. None if
            they were not kept.
        head_costs: (E,) float64, what the head of each exit adds to `costs` from there on; None if heads cost nothing.
        builds_on_previous: (E,) bool, heads that read the answers of the exits before; None if none does.
        confidence_logits: (E, n) of the heads' confidence layers, float32. None if they were not kept.
        confidence_name: the key of `CONFIDENCES` that `confidence` was computed with.
        calibrated: the model's, or None.
        own: (E+1, n) classes that each exit answers by itself, if `answers` are blended; else None.
        times: of the pieces, if thresholds are to be chosen by seconds; else None.
        marks: (n,) int64, by which images are known again. None: nothing is known of them.
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
    own: Tensor | None = None
    times: BatchTimes | None = None
    marks: Tensor | None = None

    @property
    def exits(self) -> int:
        """E."""
        return len(self.costs) - 1

    @property
    def bare(self) -> Tensor:
        """(n,) the backbone's own answers."""
        return (self.answers if self.own is None else self.own)[-1]

    @property
    def alone(self) -> Traces:
        """The same with each exit's own answers; the confidence stays that of blended ones."""
        return self if self.own is None else replace(self, answers=self.own, own=None)

    @property
    def truth(self) -> Tensor:
        """(n,) the labels; without labels, the backbone's own answers."""
        return self.bare if self.targets is None else self.targets

    @property
    def right(self) -> Tensor:
        """(E+1, n) bool, whether the answer is the `truth`."""
        return self.answers == self.truth

    @property
    def losses(self) -> Tensor:
        """(E+1, n) what leaving there loses: 1 if only the backbone is right, -1 if only the exit is, else 0; float64."""
        return self.alone.right[-1].double() - self.right.double()

    def by(self, threshold: Sequence[float]) -> Traces:
        """The same at thresholds (E,). Where no image can leave, the backbone's own answer stands at the end."""
        return self if min(threshold) <= 1 else self.alone

    def rows(self, which: Tensor) -> Traces:
        """The traces of some images: `which` is (n,) bool, or indices."""
        return replace(
            self,
            answers=self.answers[:, which],
            own=None if self.own is None else self.own[:, which],
            confidence=self.confidence[:, which],
            targets=None if self.targets is None else self.targets[which],
            logits=None if self.logits is None else self.logits[:, which],
            confidence_logits=None if self.confidence_logits is None else self.confidence_logits[:, which],
            marks=None if self.marks is None else self.marks[which],
        )

    def under(self, name: str) -> Traces:
        """The same traces with another confidence, a key of `CONFIDENCES`.

        Raises:
            UnknownName: if there is no such confidence.
            PteeError: if it is "calibrated" and the model is not, or if no logits were kept.
        """
        confidence = find_confidence(name, self.calibrated)
        if name == self.confidence_name:
            return self
        if self.logits is None or self.confidence_logits is None:
            raise PteeError(
                "Another confidence needs logits, and these traces have none. Record them with logits=True."
            )
        h = confidence.at_all_exits(self.logits[:-1], self.confidence_logits)
        return replace(self, confidence=h, confidence_name=name)

    def blended(self, blend: Blend, on: Exits) -> Traces:
        """The same if the exits that are on answer with a blend, from own answers with their logits."""
        assert self.logits is not None and self.confidence_logits is not None
        z = blend.at_all_exits(self.logits, on)
        confidence = find_confidence(confidence_of_blend(self.confidence_name), self.calibrated)
        answers = torch.where(z.isnan().any(-1), self.answers, z.argmax(-1))
        h = confidence.at_all_exits(z[:-1], self.confidence_logits)
        return replace(self, answers=answers, confidence=h, own=self.answers)

    def costs_where(self, on: Tensor) -> Tensor:
        """(..., E+1) costs if only these exits (..., E) are on. A head that is off still runs for exits that read its answer."""
        if self.head_costs is None:
            return self.costs.expand(*on.shape[:-1], -1)
        saved = (self.head_costs * ~self.heads_where(on)).cumsum(-1)
        return self.costs - torch.cat([saved, saved[..., -1:]], -1)

    def heads_where(self, on: Tensor) -> Tensor:
        """(..., E) which heads run if only these exits (..., E) are on."""
        reads_earlier = torch.zeros_like(self.costs[1:], dtype=torch.bool)
        if CONFIDENCES[self.confidence_name].needs_answers_of_earlier_exits:
            reads_earlier = ~reads_earlier
        elif self.builds_on_previous is not None:
            reads_earlier = self.builds_on_previous
        return heads_run(on, reads_earlier)

    def costs_without(self, off: Sequence[int]) -> Tensor:
        """(E+1,) costs if these exits are off."""
        return self.costs_where(self._all_but(off))

    def _all_but(self, off: Sequence[int]) -> Tensor:
        return torch.tensor([n not in off for n in range(self.exits)], device=self.costs.device)

    def time(self, leaving: Tensor, off: Sequence[int] = ()) -> float | None:
        """The expected time if each image leaves where `leaving` (n,) says, and these exits are off. None if it is not known."""
        if self.times is None:
            return None
        return self.times.expected(self.heads_where(self._all_but(off)), self.shares(leaving))

    @property
    def costs_alone(self) -> list[float]:
        """(E) the cost of leaving at each exit while all others are off."""
        only = torch.eye(self.exits, dtype=torch.bool, device=self.costs.device)
        return self.costs_where(only)[:, :-1].diag().tolist()

    @property
    def times_alone(self) -> list[float]:
        """(E) the expected time of leaving at each exit while all others are off, where times are known."""
        return [self.time(self.at(n), [m for m in range(self.exits) if m != n]) or 0.0 for n in range(self.exits)]

    @property
    def prices_alone(self) -> list[float]:
        """(E) the time of leaving at each exit alone if times are known, else the cost."""
        return self.costs_alone if self.times is None else self.times_alone

    def leaving(self, threshold: Sequence[float] | Tensor) -> Tensor:
        """(n,) the exit at which each image leaves: the first n with h_n >= T_n, or E. `threshold` is (E,)."""
        return first_exit(self.confidence[:-1], threshold)

    def shares(self, leaving: Tensor) -> list[float]:
        """(E+1) the share of the images that leaves at each exit."""
        return [count / len(leaving) for count in torch.bincount(leaving, minlength=len(self.costs)).tolist()]

    def score(self, leaving: Tensor, off: Sequence[int] = ()) -> Score:
        """The score if each image leaves where `leaving` (n,) says, and these exits are off."""
        answers = at_exits(self.answers, leaving)
        accuracy = None if self.targets is None else (answers == self.targets).double().mean().item()
        fidelity = (answers == self.bare).double().mean().item()
        return Score(accuracy, fidelity, self.costs_without(off)[leaving].mean().item(), self.time(leaving, off))

    def at(self, exit_index: int) -> Tensor:
        """(n,) every image leaves at this exit."""
        return torch.full_like(self.answers[0], exit_index)

    def score_at(self, exit_index: int, off: Sequence[int] = ()) -> Score:
        """The score if every image leaves at one exit, and these exits are off."""
        return replace(self.score(self.at(exit_index)), cost=self.costs_without(off)[exit_index].item())


@dataclass(frozen=True)
class Score:
    """Means over a data set.

    Attributes:
        accuracy: share of answers that are the label; None without labels.
        fidelity: share of answers that are the backbone's.
        cost: multiply-accumulates, as a fraction of the bare backbone's.
        time: that is to be expected, as a fraction of the bare backbone's; None where nothing was measured.
    """

    accuracy: float | None
    fidelity: float
    cost: float
    time: float | None = None

    @property
    def price(self) -> float:
        """The time if it is known, else the cost."""
        return self.cost if self.time is None else self.time

    @property
    def merit(self) -> float:
        """Accuracy; without labels, fidelity."""
        return self.fidelity if self.accuracy is None else self.accuracy


def at_exits(values: Tensor, leaving: Tensor) -> Tensor:
    """(n,) of values (E+1, n) that of the exit at which each image leaves, as `leaving` (n,) says."""
    return values.gather(0, leaving[None])[0]


def truncation(traces: Traces) -> tuple[Score, ...]:
    """For each exit, the score of the network cut off there: the only heads are its own and those that it reads."""
    alone = replace(traces, confidence_name=LEARNED)  # no confidence is needed
    scores = [traces.score_at(n) for n in range(traces.exits)]
    times = [None] * traces.exits if traces.times is None else alone.times_alone
    return tuple(replace(s, cost=c, time=t) for s, c, t in zip(scores, alone.costs_alone, times, strict=True))


def as_answered(model: EarlyExitModel, own: Traces) -> Traces:
    """Traces of the exits' own answers, with the answers that the model gives."""
    if model.answers == BLENDED and model.blend is not None:
        return own.blended(model.blend, model.plan.on)
    return own


@checked
def record(
    model: EarlyExitModel,
    data: object,
    *,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    logits: bool = True,
    own: bool = False,
) -> Traces:
    """Run a model once over data while no image leaves. If no label is a class of the backbone, no label is used.

    Args:
        model: any early-exit model. Afterwards it is in the mode and on the device that it was.
        data: a map-style data set of (image, label) or (image,), a loader, or a folder of traces (`ptee.open_traces`).
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: where it runs; None: where the model is.
        progress: show a bar if standard error is a terminal.
        logits: keep them: (E+1) n K numbers.
        own: record each exit's own answers, also if the model blends them.

    Raises:
        DataError: if some images have labels that are classes, and others have other labels or none; or if the backbone
            answers some with NaN.
    """
    require_early_exit(model)
    if (known := recorded(data)) is not None:
        data_of, rows = known
        found: Traces = data_of.traces(model, rows=rows, logits=logits, own=own)
        return found
    parts: list[Traces] = []
    unanswered: list[Tensor] = []
    random = own_generator()
    loader = batches(data, batch_size=batch_size, shuffle=False, generator=random, num_workers=num_workers)
    kept = _kept_of_each_batch(loader)
    place = device_of(model.heads, device)
    with running_on(place, model):
        for batch in with_bar(loader, "recording exits", progress):
            images, labels = split_batch(batch)
            part, unanswered_here = _record_batch(model, images, labels, kept, own)
            unanswered.append(unanswered_here)
            parts.append(part if logits else replace(part, logits=None, confidence_logits=None))
    if not parts:
        raise DataError("The data gave no batch: it is empty.")
    require_answers(torch.cat(unanswered), data)
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
    """The images of data that `record` made these traces of, batch by batch. Other images or another order are refused."""
    random = own_generator()
    loader = batches(data, batch_size=batch_size, shuffle=False, generator=random, num_workers=num_workers)
    kept, seen = _kept_of_each_batch(loader), 0
    for images, _ in map(split_batch, with_bar(loader, words, progress)):
        if now := min(kept, len(images), SAMPLE - seen):
            require_same_images(traces.sample[seen : seen + now], images[:now].to(traces.sample))
        seen += now
        yield images
    require_same_images(traces.sample, traces.sample[:seen])  # no fewer than before


def require_same_images(sample: Tensor, again: Tensor) -> None:
    """Refuse data that gave one sample (s, c, h, w) the first time and another the next time. Rounding may differ."""
    if not sample.numel() and not again.numel():  # of recorded traces, which compare the keys of their images
        return
    one, other = (x.float().nan_to_num(0, 0, 0) for x in (sample, again))
    if one.shape != other.shape or (one - other).abs().gt(TOLERANCE * one.std(correction=0)).any():
        raise PteeError(
            "The data gives other images, or another order, each time it is read, and networks are compared image by image. "
            "Give it in order (shuffle=False, no sampler that draws), without random transforms."
        )


def _kept_of_each_batch(loader: object) -> int:
    """How many images of each batch go into the sample. A loader need not know its length."""
    return math.ceil(SAMPLE / max(1, length_hint(loader, 16)))


def _record_batch(
    model: EarlyExitModel, images: Tensor, labels: Tensor | None, kept: int, alone: bool
) -> tuple[Traces, Tensor]:
    """The traces of a batch, and (b,) bool for which images the backbone has no answer."""
    ready = model.prepared(images)
    sample = images[:kept].to("cpu", ready.dtype, copy=True)  # a slice alone would keep the whole batch
    with torch.inference_mode():
        own = model.all_exits(ready)
        every = own if alone else model.blended(own)
    found = Traces(
        every.logits.argmax(-1).cpu(),
        every.confidence.cpu(),
        numbered(labels, images),
        sample=sample,
        logits=compact(own.logits).cpu(),
        confidence_logits=every.confidence_logits.float().cpu(),
        confidence_name=model.confidence,
        calibrated=model.calibrated,
        own=None if every is own else own.logits.argmax(-1).cpu(),
        marks=marks_of(images),
        **costs_of(model),
    )
    return found, own.logits[-1].isnan().any(-1).cpu()


def costs_of(model: EarlyExitModel) -> dict[str, Any]:
    """The fields of `Traces` that say what a model costs: of all heads, whichever are off now."""
    return {
        "costs": torch.tensor(model.plan.switched_off(()).costs, dtype=torch.float64, device="cpu"),
        "head_costs": torch.tensor([e.head_cost for e in model.exits], dtype=torch.float64, device="cpu"),
        "builds_on_previous": torch.tensor([e.builds_on_previous for e in model.exits], device="cpu"),
    }


def compact(logits: Tensor) -> Tensor:
    """Logits as traces keep them. The shift before half precision changes no softmax, and none overflows."""
    wide = logits.float()
    return wide if wide.shape[-1] <= MANY_CLASSES else (wide - wide.amax(-1, keepdim=True)).half()


def _join(parts: list[Traces], classes: int) -> Traces:
    logits = [p.logits for p in parts if p.logits is not None]
    confidence_logits = [p.confidence_logits for p in parts if p.confidence_logits is not None]
    targets, fault = usable_labels(torch.cat([p.targets for p in parts if p.targets is not None]), classes)
    return replace(
        parts[0],
        answers=torch.cat([p.answers for p in parts], 1),
        confidence=torch.cat([p.confidence for p in parts], 1),
        own=None if parts[0].own is None else torch.cat([p.own for p in parts if p.own is not None], 1),
        targets=targets,
        sample=torch.cat([p.sample for p in parts])[:SAMPLE],
        logits=torch.cat(logits, 1) if logits else None,
        confidence_logits=torch.cat(confidence_logits, 1) if confidence_logits else None,
        marks=torch.cat([p.marks for p in parts if p.marks is not None]),
        note=no_accuracy(fault),
    )
