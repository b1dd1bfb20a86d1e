"""What each process computes: from encoded pictures to a table of what a saved run answers, or of what its heads read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ptee._common.devices import resolve_device
from ptee._common.errors import Argument, DataError
from ptee._common.text import spelt
from ptee.data.batches import UNKNOWN_LABEL, marks_of
from ptee.data.parts import arrow
from ptee.data.pictures import decode_bytes, image_transform
from ptee.data.shards import Sample
from ptee.exits.confidence import first_exit
from ptee.exits.config import with_off
from ptee.model.build import load_moved
from ptee.model.early_exit import EarlyExitModel

NO_ANSWER = "the backbone's logits are NaN"


@dataclass(frozen=True)
class Job:
    """What a process needs to know. It travels between machines, so it holds names and numbers only.

    Attributes:
        run: a folder that every machine reaches, or user/repo on the hub.
        kind: "traces" (answers of all exits) or "cache" (what the heads read).
        weights: a file with the backbone's weights, if they are not where the run says.
        device: None: a GPU where there is one.
        batch_size: images at once.
        logits: of traces: how many of the largest are kept for each exit; None for all, 0 for none.
        classes: the backbone's class of each class name, `spelt` alike; None if names are not known.
        threads: that decode pictures: one GPU computes as fast as dozens of them decode.
    """

    run: str
    kind: Literal["traces", "cache"] = "traces"
    weights: str | None = None
    device: str | None = None
    batch_size: int = 128
    logits: int | None = None
    classes: Mapping[str, int] | None = None
    threads: int = 1


def open_model(job: Job) -> EarlyExitModel:
    """The saved run of a job, in eval mode on its device."""
    return load_moved(job.run, job.weights).to(resolve_device(job.device)).eval()


class Worker:
    """A saved run, opened once, that turns batches of samples into tables."""

    def __init__(self, job: Job, model: EarlyExitModel | None = None) -> None:
        self.job, self.model = job, open_model(job) if model is None else model
        view = self.model.origin.input
        self.transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)

    def table(self, samples: Sequence[Sample]) -> Any:
        """A row for each sample, with the columns of the job's kind and these:

        key, label, fault (why it cannot be read, or has no answer; else empty), and mark (by which the image is known again).
        """
        images, faults = self._decoded(samples)
        with torch.inference_mode():
            made, bare = self._answers(images) if self.job.kind == "traces" else self._inputs(images)
        unanswered = bare.isnan().any(-1).tolist()
        faults = [fault or NO_ANSWER * none for fault, none in zip(faults, unanswered, strict=True)]
        readable = np.array([not fault for fault in faults])
        pa = arrow()
        columns = {
            "key": pa.array([sample.key for sample in samples], pa.string()),
            "fault": pa.array(faults, pa.string()),
            "label": pa.array([self._label(sample) for sample in samples], pa.int32()),
            "mark": pa.array(marks_of(images).numpy()),
        }
        return pa.table(columns | {name: _column(values, readable) for name, values in made.items()})

    def _decoded(self, samples: Sequence[Sample]) -> tuple[Tensor, list[str]]:
        """Images (b, c, h, w), with zeros in place of those that cannot be decoded, and why these cannot."""
        if self.job.threads == 1:
            decoded = [self._image(sample) for sample in samples]
        else:  # Pillow decodes without holding Python's lock
            with ThreadPoolExecutor(self.job.threads) as pool:
                decoded = list(pool.map(self._image, samples))
        images, faults = zip(*decoded, strict=True)
        return torch.stack(images), list(faults)

    def _image(self, sample: Sample) -> tuple[Tensor, str]:
        try:
            return self.transform(decode_bytes(sample.image)), ""
        except DataError as why:
            return torch.zeros(self.model.plan.input_size, dtype=torch.float32, device="cpu"), str(why) or "damaged"

    def _label(self, sample: Sample) -> int:
        if sample.label != UNKNOWN_LABEL or not sample.class_name:
            return UNKNOWN_LABEL if sample.unsure and sample.label >= self.model.num_classes else sample.label
        number = (self.job.classes or {}).get(spelt(sample.class_name), UNKNOWN_LABEL)
        if number == UNKNOWN_LABEL and not sample.unsure:  # other folders and captions are no labels
            raise DataError(
                f"{sample.key}: '{sample.class_name}' is no class that the run knows. Use its names, or name the backbone's classes "
                "in its order in a file (", Argument("classes", "FILE"), ").",
            )  # fmt: skip
        return number

    def _answers(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(b, width) each, the exit axis first inside the width, and the backbone's logits (b, K). Answers are the exits' own, not blended."""
        every = self.model.all_exits(self.model.prepared(images))
        thresholds = with_off(self.model.threshold, self.model.off)
        leaving = first_exit(every.confidence[:-1], thresholds)
        found = {
            "exit": leaving.to(torch.int16)[:, None],
            "answers": every.logits.argmax(-1).int().T,
            "confidence": every.confidence[:-1].float().T,
            "confidence_logits": every.confidence_logits.float().T,
        }
        if self.job.logits == 0:
            return found, every.logits[-1]
        z = every.logits.float().log_softmax(-1).transpose(0, 1)  # (b, E+1, K)
        if self.job.logits is not None:
            z, classes = z.topk(min(self.job.logits, z.shape[-1]), dim=-1)
            found["classes"] = classes.int().flatten(1)
        return found | {"logits": z.half().flatten(1)}, every.logits[-1]

    def _inputs(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        reading = self.model.read(self.model.prepared(images))
        found = {f"input{n}": half(x.flatten(1)) for n, x in enumerate(reading.inputs)}
        return found | {"logits": reading.logits.float()}, reading.logits


def half(x: Tensor) -> Tensor:
    """In half precision, or a DataError where that cannot hold a number."""
    found = x.half()
    if len(lost := x[found.isinf() & x.isfinite()]):
        raise DataError(
            f"Some of what the heads read is as large as {lost.abs().max():g}, which half precision cannot hold."
        )
    return found


def _column(values: Tensor, readable: np.ndarray) -> Any:
    """Rows (b, width) as an Arrow column of lists, or of numbers if width is 1. Rows that cannot be used are zeros."""
    pa = arrow()
    rows = np.ascontiguousarray(values.cpu().numpy())
    rows[~readable] = 0
    flat = pa.array(rows.reshape(-1))
    is_number = rows.shape[1] == 1 and rows.dtype == np.int16
    return flat if is_number else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
