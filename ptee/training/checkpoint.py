"""The checkpoint: what a training had reached after its last complete epoch, in one file that is whole or not there.

It is safetensors, as nothing in such a file is executed. It holds a hash of its own content, and describes the training that
it belongs to: settings, model and data. A file that was changed, or that belongs to another training, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import RunError
from ptee._common.files import plain, replace_file, storable
from ptee.backbones.weights import weights_hash
from ptee.exits.front import FrontHead
from ptee.model.early_exit import EarlyExitModel
from ptee.training.config import TrainingConfig

HEADS, BEST, OPTIMIZER = "heads.", "best.", "optimizer."


@dataclass(frozen=True)
class Checkpoint:
    """A training between two epochs.

    Attributes:
        heads: state of the heads.
        best_heads: their state after the best epoch; empty where none is kept.
        optimizer: state of the optimizer, by number of the parameter and by name.
        history: as JSON-able values.
    """

    heads: dict[str, Tensor]
    best_heads: dict[str, Tensor]
    optimizer: dict[int, dict[str, Any]]
    history: dict[str, Any]


def describe_training(
    config: TrainingConfig, model: EarlyExitModel, data: Any, samples: str | None, processes: int
) -> dict[str, Any]:
    """What must be the same for a training to go on: the settings, the model and the training data. JSON-able.

    Args:
        config: resolved.
        model: whose heads are trained.
        data: the training images.
        samples: hash of some of them, where it is known.
        processes: how many train together.
    """
    settings = config.model_dump(exclude={"cache"} | ({"epochs"} if config.schedule == "constant" else set()))
    files = getattr(data, "files_sha256", None)  # with one file more, others are drawn for training
    return settings | {
        "exits": [e.name for e in model.exits],
        "head": model.plan.head,
        "classes": model.num_classes,
        "backbone": weights_hash(model.backbone)[:16],
        "input": plain(model.origin.input),
        "front": _describe_front(model.heads[0]),
        "data": f"{length_hint(data, 0) + len(getattr(data, 'gaps', ()))} long"
        + (f" of files {files[:16]}" if files else ""),
        "samples": samples,
        "processes": processes,
    }


def _describe_front(head: nn.Module) -> dict[str, Any] | None:
    """The network of the exit at the input, whose weights lie among the heads' and would be taken for theirs."""
    if not isinstance(head, FrontHead):
        return None
    return {"weights": weights_hash(head.network)[:16], "input": plain(head.origin.input)}


def write(path: Path, reached: Checkpoint, training: Mapping[str, Any]) -> None:
    """Write a checkpoint in place of an earlier one.

    Args:
        path: the file.
        reached: what to keep.
        training: from `describe_training`.
    """
    from safetensors.torch import save_file

    tensors = {f"{HEADS}{k}": v for k, v in reached.heads.items()}
    tensors |= {f"{BEST}{k}": v for k, v in reached.best_heads.items()}
    for i, state in reached.optimizer.items():
        tensors |= {f"{OPTIMIZER}{i}.{k}": torch.as_tensor(v, device="cpu") for k, v in state.items()}
    tensors = storable(tensors)
    about = {"training": json.dumps(training), "history": json.dumps(reached.history)}
    about["sha256"] = _content_hash(tensors, about)
    replace_file(path, lambda beside: save_file(tensors, beside, about))


def read(path: Path, training: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint of this training.

    Args:
        path: the file.
        training: from `describe_training`.

    Raises:
        RunError: if the file is damaged, is no checkpoint or belongs to another training.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        written, history = dict(json.loads(about["training"])), dict(json.loads(about["history"]))
        if about.pop("sha256") != _content_hash(tensors, about):
            raise ValueError("its content was changed")
        optimizer = _optimizer_state(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as why:
        raise RunError(f"{path} is no checkpoint of ptee, or damaged ({why}). Delete it to start again.") from why
    _require_same(path, written, training)
    return Checkpoint(_under(HEADS, tensors), _under(BEST, tensors), optimizer, history)


def _require_same(path: Path, written: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    names = [name for name in {**training, **written} if written.get(name) != training.get(name)]
    if names:
        other = ", ".join(f"{name} {written.get(name)} (now {training.get(name)})" for name in names)
        raise RunError(f"{path} belongs to a training with {other}. Use the same settings and data, or delete it.")


def _content_hash(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([about["training"], about["history"]]).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _optimizer_state(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under(OPTIMIZER, tensors).items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    return state
