"""The checkpoint: what a training had reached after its last complete epoch, in one file that is whole or absent.

It holds a hash of its own content and describes its training: settings, model and data. A file that was changed, or that belongs
to another training, is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import eq, length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptee._common.errors import RunError, first_line
from ptee._common.files import from_json, plain
from ptee._common.writing import replace_files, writer_of
from ptee.backbones.weights import recorded_hash, storable, weights_hash
from ptee.exits.front import FrontHead
from ptee.model.early_exit import EarlyExitModel
from ptee.model.heads_file import read_notes
from ptee.training.config import TOGETHER, TrainingConfig, of_another_training, other_settings
from ptee.training.history import Epoch
from ptee.training.training_data import content_hash, same_samples

# Why not accelerate's save_state: it pickles the optimizer and the random states, and ptee unpickles nothing that lies on a disk.
# How what `describe_training` says of the data is compared.
DATA = {"data": eq, "samples": same_samples, "pictures": same_samples}


@dataclass(frozen=True)
class Checkpoint:
    """A training between two epochs.

    Attributes:
        weights: state of what learns: of the heads, or of heads and backbone.
        best: the same after the best epoch; empty if none is kept.
        optimizer: state of the optimizer, by number of the parameter and by name.
        epochs: the complete ones.
    """

    weights: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Any]]
    epochs: Sequence[Epoch]


def describe_training(
    config: TrainingConfig, model: EarlyExitModel, data: Any, samples: str | None, processes: int
) -> dict[str, Any]:
    """What must stay the same for a training to go on, JSON-able. `samples` is of `sample_hash`.

    All files are read for it, once for each data set.
    """
    files = getattr(data, "files_sha256", None)  # with one file more, others would be drawn for training
    front = model.heads[0]  # its weights are among the heads' and would be taken for theirs
    may_go_on = config.schedule == "constant" and config.order == TOGETHER  # with more epochs than before
    return config.model_dump(exclude={"cache"} | ({"epochs"} if may_go_on else set())) | {
        "exits": [e.name for e in model.exits],
        "head": model.plan.head,
        "classes": model.num_classes,
        "backbone": recorded_hash(model.backbone, model.plan.input_size),
        "input": plain(model.origin.input),
        "front": {"weights": weights_hash(front.network)[:16], "input": plain(front.origin.input)}
        if isinstance(front, FrontHead)
        else None,
        "data": f"{length_hint(data, 0) + len(getattr(data, 'gaps', ()))} long"
        + (f" of files {files[:16]}" if files else ""),
        "samples": samples,
        "pictures": content_hash(data),
        "processes": processes,
    }


def write(path: Path, reached: Checkpoint, training: Mapping[str, Any], beside: Mapping[str, str]) -> None:
    """Write a checkpoint of the training that `describe_training` describes, in place of an earlier one.

    `beside`: texts of files in the same folder, by name. These and the checkpoint are all new, or none is.
    """
    from safetensors.torch import save_file

    groups: dict[str, Mapping[str, Any]] = {"heads": reached.weights, "best": reached.best}
    groups |= {f"optimizer.{i}": state for i, state in reached.optimizer.items()}
    tensors = storable(
        {f"{group}.{k}": torch.as_tensor(v, device="cpu") for group, state in groups.items() for k, v in state.items()}
    )
    history = {"epochs": [asdict(epoch) for epoch in reached.epochs]}
    about = {"training": json.dumps(training), "history": json.dumps(history)}
    about["sha256"] = _content_hash(tensors, about)
    texts = {name: writer_of(text) for name, text in beside.items()}
    replace_files(path.parent, {**texts, path.name: lambda beside: save_file(tensors, beside, about)})


def found(path: Path | None, training: dict[str, Any], learnt: Mapping[str, Tensor]) -> Checkpoint | None:
    """The checkpoint of this training; None if there is none. `training` and `learnt`: as of `read`.

    Raises:
        RunError: as of `read`; or, of several processes, if they find different ones: some would wait for the others for ever.
    """
    from accelerate.utils import gather_object

    reached = None if path is None or not path.is_file() else read(path, training, learnt)
    done = gather_object([0 if reached is None else len(reached.epochs)])
    if min(done) != max(done):
        text = f"The processes find other checkpoints in {path}: of {min(done)} to {max(done)} epochs. Keep it on a disk that "
        raise RunError(f"{text}all of them share, or copy it from the first process's machine to the others.")
    return reached


def read(path: Path, training: dict[str, Any], learnt: Mapping[str, Tensor]) -> Checkpoint:
    """Read a checkpoint of this training. A RunError if it is damaged, is no checkpoint, or belongs to another training.

    `learnt`: the tensors of a backbone that learns, by their names in the checkpoint. They may be those that the training began with, or
    those that it had reached, as after Ctrl-C; then `training` gets the hash of the first.
    """
    from safetensors import SafetensorError, safe_open

    try:
        about = read_notes(path)
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        written = dict(from_json(about["training"]))
        if about["sha256"] != _content_hash(tensors, about):
            raise ValueError("its content was changed")
        reached = _from_tensors(tensors, [Epoch(**epoch) for epoch in from_json(about["history"])["epochs"]])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as why:
        raise RunError(
            f"{path} is no checkpoint of ptee, or damaged: {first_line(why)} Delete it to start again."
        ) from why
    if learnt and all(
        torch.equal(value.cpu(), reached.weights.get(name, torch.empty(0, device="cpu")))
        for name, value in learnt.items()
    ):
        training["backbone"] = written.get("backbone")
    differing = [
        name for name in {**training, **written} if not DATA.get(name, eq)(written.get(name), training.get(name))
    ]
    if differing:
        words = other_settings(written, training, [name for name in differing if name not in DATA])
        words += [f"on other data ({_other_data(written, training)})"] * any(name in DATA for name in differing)
        raise of_another_training(path, words)
    return reached


def _other_data(written: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """In what the data differ from those that a training began with; their hashes would tell nobody."""
    then, now = (str(of.get("data")).partition(" long") for of in (written, training))
    if then[0] != now[0]:
        return f"it was {then[0]} long and is {now[0]} long now"
    if then == now:
        return "images or labels of other content now, or in another order"
    return "files with other names now, or others in their place"


def _from_tensors(tensors: Mapping[str, Tensor], epochs: list[Epoch]) -> Checkpoint:
    if [epoch.number for epoch in epochs] != [*range(1, len(epochs) + 1)]:
        raise ValueError("its epochs are not numbered one after another")
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    optimizer: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        group, name = key.split(".", 1)
        groups[group][name] = value
    for key, value in groups["optimizer"].items():
        number, name = key.split(".")
        optimizer[int(number)][name] = value
    return Checkpoint(groups["heads"], groups["best"], optimizer, epochs)


def _content_hash(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([about["training"], about["history"]]).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
