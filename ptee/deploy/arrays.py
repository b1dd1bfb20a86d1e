"""Arrays of numpy, or tensors of torch: what an exported model computes with, in the same words for both. torch is imported for tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # of numpy for ONNX, of torch for pt2


def as_numpy(t: Array) -> np.ndarray:
    """An array of either kind on the host; of numbers of less than 32 bits, in float32."""
    return t if isinstance(t, np.ndarray) else t.float().cpu().numpy()


def select_rows(t: Array, rows: np.ndarray, axis: int, each: int) -> Array:
    """The part of an array that belongs to these rows."""
    positions = (rows[:, None] * each + np.arange(each)).reshape(-1)
    if isinstance(t, np.ndarray):
        return np.take(t, positions, axis)
    import torch

    return t.index_select(axis, torch.from_numpy(positions).to(t.device))


def answers_at_end(possible: np.ndarray, own: Array, blended: Array) -> Array:
    """(b, K) the blended answers of rows that some exit could take (b,); the others get the backbone's own, bit for bit."""
    if possible.all() or not possible.any():
        return blended if possible.all() else own
    if isinstance(own, np.ndarray):
        return np.where(possible[:, None], blended, own)
    import torch

    return torch.where(torch.from_numpy(possible).to(own.device)[:, None], blended, own)


def join_rows(parts: Sequence[Array], axis: int = 0) -> Array:
    """Several arrays as one, along the axis that holds their rows."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(list(parts), axis)


def like(t: Array, values: np.ndarray) -> Array:
    """Values in an array of the same kind, where that one is."""
    if isinstance(t, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values).to(t.device)
