"""Weights from a file into a module, and the hash by which weights are known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import BackboneError, first_line, some
from ptee.backbones.checkpoint import read_checkpoint
from ptee.backbones.library import ArgumentNames
from ptee.backbones.matching import COUNTER, Convert, Match, find_network

YOURS = ArgumentNames()


def load_weights(
    module: nn.Module, file: str | Path, names: ArgumentNames = YOURS, convert: Convert | None = None
) -> str | None:
    """Copy a file of weights into a module, all of them or, if anything does not fit, none.

    Half-precision weights are widened to the module's type. What trainers put around a network, in front of its names and
    beside it is taken off.

    Args:
        module: the network.
        file: of its weights.
        names: what the caller calls the arguments, for messages.
        convert: gives tensors under earlier names the names that they have now.

    Returns:
        Which tensors were taken and which were left out, in a sentence; None where there was nothing to choose.

    Raises:
        BackboneError: the file is missing, unreadable, would run code, or has other names or shapes.
    """
    checkpoint = read_checkpoint(file, names.weights_argument)
    match = find_network(checkpoint, module.state_dict(), type(module).__name__, names, convert)
    fill(module, match, file, names)
    return match.note


def fill(module: nn.Module, match: Match, file: str | Path, names: ArgumentNames = YOURS) -> None:
    """Copy the tensors that were found for a module into it.

    Raises:
        BackboneError: if the module does not take them.
    """
    # some modules, torchvision's MNASNet one, read old formats by a version number that safetensors cannot hold
    if getattr(match.tensors, "_metadata", None) is None:
        match.tensors._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    try:
        module.load_state_dict(match.tensors, strict=True)
    except Exception as error:
        text = f"{file} does not fit {type(module).__name__}: {first_line(error)}"
        raise BackboneError(text, argument=names.weights_argument, value=str(file)) from error


def weights_hash(module: nn.Module) -> str:
    """sha256, in hexadecimal, of the state_dict: sorted names with types, shapes and bytes.

    Device and memory format do not matter; the type does: a model in half precision is another model.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        _add(digest, name, value)
    return digest.hexdigest()


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """The same of each tensor of the state_dict alone, shortened, by name: to say which differ."""
    return {name: tensor_hash(value) for name, value in module.state_dict().items()}


def tensor_hash(value: Any) -> str:
    """The same of one tensor, whatever its name."""
    digest = hashlib.sha256()
    _add(digest, "", value)
    return digest.hexdigest()[:16]


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """In words, how the weights of a backbone differ from those recorded; empty where nothing does that is ever read.

    Args:
        theirs: `tensor_hashes` of the backbone that was recorded.
        ours: of this one.
    """
    for longer, shorter, place in ((ours, theirs, "of this one"), (theirs, ours, "of that one")):
        name = next(iter(shorter), "")
        prefix = next((n.removesuffix(name) for n in longer if n.endswith(f".{name}")), "")
        if prefix and _relevant({n.removeprefix(prefix): h for n, h in longer.items()}) == _relevant(shorter):
            return f"the weights are the same, but each name {place} begins with {prefix!r}"
    theirs, ours = _relevant(theirs), _relevant(ours)
    names = theirs.keys() & ours.keys()
    kinds = {
        ("differs", "differ"): (ours, [n for n in ours if n in names and ours[n] != theirs[n]]),
        ("is missing", "are missing"): (theirs, [n for n in theirs if n not in names]),
        ("is new", "are new"): (ours, [n for n in ours if n not in names]),
    }
    return "; ".join(
        f"of {len(every)} tensors {len(found)} {one if len(found) == 1 else many}: {some(found, 3)}"
        for (one, many), (every, found) in kinds.items()
        if found
    )


def _relevant(hashes: Mapping[str, str]) -> dict[str, str]:
    """Without counters, which nothing in eval mode reads."""
    return {name: found for name, found in hashes.items() if not name.endswith(COUNTER)}


def _add(digest: hashlib._Hash, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):  # what a part's get_extra_state gave
        digest.update(f"{name}\0{value!r}\0".encode())
        return
    digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
    # as bytes: NumPy has no bfloat16. No copy is made of what lies in the CPU's memory already
    flat = value.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)
