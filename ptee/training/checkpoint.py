"""The checkpoint: what a training had reached after its last complete epoch, in one file that is whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import RunError
from ptee._common.files import replace_file, storable


@dataclass(frozen=True)
class Reached:
    """A training between two epochs.

    Attributes:
        heads: state of the heads.
        best_heads: their state after the best epoch; empty where none is kept.
        optimizer: state of the optimiser, by number of the parameter and by name.
        history: as JSON-able values.
    """

    heads: dict[str, Tensor]
    best_heads: dict[str, Tensor]
    optimizer: dict[int, dict[str, Any]]
    history: dict[str, Any]


def write(path: Path, reached: Reached, settings: Mapping[str, Any]) -> None:
    """Put it in place of an earlier one.

    Args:
        path: the file.
        reached: what to keep.
        settings: what must be the same for the training to be continued, JSON-able.
    """
    from safetensors.torch import save_file

    tensors = {f"heads.{k}": v for k, v in reached.heads.items()}
    tensors |= {f"best.{k}": v for k, v in reached.best_heads.items()}
    for i, state in reached.optimizer.items():
        tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    about = {"settings": json.dumps(settings), "history": json.dumps(reached.history)}
    replace_file(path, lambda beside: save_file(storable(tensors), beside, about))


def read(path: Path, settings: Mapping[str, Any]) -> Reached:
    """What was reached, if the settings are still the same.

    Raises:
        RunError: if the file is damaged or no checkpoint, or belongs to another training.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        written, history = dict(json.loads(about["settings"])), dict(json.loads(about["history"]))
        optimizer = _optimizer(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as why:
        raise RunError(f"{path} is no checkpoint of ptee, or damaged ({why}). Delete it to begin anew.") from why
    if other := [f"{k} {written.get(k)} (now {v})" for k, v in settings.items() if written.get(k) != v]:
        raise RunError(f"{path} belongs to a training with {', '.join(other)}. Use the same settings, or delete it.")
    return Reached(_under("heads.", tensors), _under("best.", tensors), optimizer, history)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _optimizer(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under("optimizer.", tensors).items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    return state
