"""Data of which a run's answers were recorded before, so that no image is read and no network runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset


class RecordedTraces(ABC):
    """Answers of all exits for n images, which stand where a data set of images would. It is not read image by image."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def labelled(self) -> bool:
        """Whether the images have labels."""

    @abstractmethod
    def traces(self, model: Any, *, rows: Tensor | None, logits: bool, own: bool) -> Any:
        """The `Traces` of a model, as `record` gives them, of all images or of these rows (m,). Their sample is empty."""

    @abstractmethod
    def marks(self, rows: Tensor | None) -> Tensor:
        """(m,) int64, by which the images are known again."""

    @abstractmethod
    def for_calibration(self, model: Any, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, str]:
        """Log-odds (E, m) of each early exit's largest probability, answers (E+1, m), labels (m,) or None, and what is wrong with those that are there."""

    @abstractmethod
    def can_give_logits(self, model: Any, rows: Tensor | None) -> bool:
        """Whether the logits of these images were kept and fit into memory."""


def recorded(data: object) -> tuple[RecordedTraces, Tensor | None] | None:
    """Recorded traces and which rows of them, if data are such or a subset of them; else None."""
    if isinstance(data, RecordedTraces):
        return data, None
    if isinstance(data, Subset) and (inner := recorded(data.dataset)) is not None:
        rows = torch.as_tensor(data.indices, dtype=torch.int64, device="cpu")
        return inner[0], rows if inner[1] is None else inner[1][rows]
    return None
