"""Weights from a file into a module, and the hash by which weights are known."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ptee._common.errors import first_line, some
from ptee.analysis.verify import counting_buffers
from ptee.backbones.checkpoint import Checkpoint, refusal, shown
from ptee.backbones.matching import COUNTER, find_network

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # in eval mode they change no buffer


def load_weights(module: nn.Module, checkpoint: Checkpoint) -> str | None:
    """Copy the network in a file into a module: all of its weights, or none if anything does not fit.

    Half-precision weights are widened to the module's type. Returns a sentence on which tensors were taken and which were left
    out, or None if there was nothing to choose.
    """
    match = find_network(checkpoint, module)
    _require_finite(checkpoint, match.tensors, module.state_dict())
    # some modules, such as torchvision's MNASNet, read old formats by a version number that safetensors cannot hold
    if getattr(match.tensors, "_metadata", None) is None:
        match.tensors._metadata = getattr(module.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    try:
        module.load_state_dict(match.tensors, strict=True)
    except Exception as error:
        raise refusal(checkpoint.file, f"does not fit {type(module).__name__}: {first_line(error)}") from error
    return match.note


def _require_finite(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Refuse inf and NaN in the module's type, except in what has them when it is built, such as a mask."""
    odd = [name for name, value in tensors.items() if not value.to(own[name].dtype).isfinite().all()]
    if broken := [name for name in odd if own[name].isfinite().all()]:
        text = f"has values that are not finite (inf or NaN) in {shown(broken, 3)}. Give weights from before that happened."
        raise refusal(checkpoint.file, text)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with its own memory, as safetensors wants them."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def weights_hash(module: nn.Module, without: Collection[str] = ()) -> str:
    """sha256, in hexadecimal, of the state_dict: names, types, shapes and bytes, sorted by name. Those of `without` are left out.

    Device and memory format do not matter. The type does: a model in half precision is another model.
    """
    digest = hashlib.sha256()
    for name, value in sorted((name, value) for name, value in module.state_dict().items() if name not in without):
        _add(digest, name, value)
    return digest.hexdigest()


def answering_hash(module: nn.Module, input_size: tuple[int, int, int]) -> str:
    """`weights_hash` without `counting_buffers`: networks that differ in these alone answer alike.

    Networks whose buffers are all of ordinary batch norms are not run for it.
    """
    names = [
        f"{name}.{key}".lstrip(".")
        for name, part in module.named_modules()
        for key, buffer in part._buffers.items()
        if type(part) not in BATCH_NORMS and buffer is not None
    ]
    return weights_hash(module, counting_buffers(module, names, input_size) if names else ())


def recorded_hash(module: nn.Module, input_size: tuple[int, int, int]) -> str:
    """The start of `answering_hash`, by which records know a network."""
    return answering_hash(module, input_size)[:16]


def recorded_hashes(module: nn.Module, input_size: tuple[int, int, int]) -> Iterator[str]:
    """The hashes by which records may know a network: `recorded_hash`, and what ptee recorded before."""
    yield recorded_hash(module, input_size)
    yield weights_hash(module)[:16]


def in_single_precision(module: nn.Module) -> bool:
    """Whether all parameters are float32. In another type the same weights have other hashes."""
    return all(parameter.dtype is torch.float32 for parameter in module.parameters())


def learnable_hashes(module: nn.Module) -> dict[str, str] | None:
    """`tensor_hashes` of a network that heads learn from; None in another type than float32, in which it may be converted later."""
    return tensor_hashes(module) if in_single_precision(module) else None


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """A hash of each value of the state_dict, by name."""
    return {name: tensor_hash(value) for name, value in module.state_dict().items()}


def tensor_hash(value: Any) -> str:
    """The start of the sha256 of a tensor's type, shape and bytes."""
    digest = hashlib.sha256()
    _add(digest, "", value)
    return digest.hexdigest()[:16]


def changes(known: Mapping[str, str], module: nn.Module, input_size: tuple[int, int, int]) -> str:
    """How a network's weights differ from those whose `tensor_hashes` are known, in words; empty if only in `counting_buffers`."""
    ours = tensor_hashes(module)
    differ = [name for name in known if name in ours and ours[name] != known[name]]
    counting = dict.fromkeys(counting_buffers(module, differ, input_size), "") if differ else {}
    return difference({**known, **counting}, ours | counting)


def difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """How the `tensor_hashes` of a recorded backbone and of this one differ, in words. Empty if nothing that counts differs."""
    for longer, shorter, place in ((ours, theirs, "of this one"), (theirs, ours, "of that one")):
        name = next(iter(shorter), "")
        prefix = next((n.removesuffix(name) for n in longer if n.endswith(f".{name}")), "")
        if prefix and _relevant({n.removeprefix(prefix): h for n, h in longer.items()}) == _relevant(shorter):
            return f"the weights are the same, but each name {place} begins with {prefix!r}"
    theirs, ours = _relevant(theirs), _relevant(ours)
    kinds = (
        ("differ", ours, [n for n in ours if n in theirs and ours[n] != theirs[n]]),
        ("are missing", theirs, [n for n in theirs if n not in ours]),
        ("are new", ours, [n for n in ours if n not in theirs]),
    )
    return "; ".join(
        f"tensors that {what} ({len(found)} of {len(every)}): {some(found, 3)}" for what, every, found in kinds if found
    )


def _relevant(hashes: Mapping[str, str]) -> dict[str, str]:
    """Without the counters of batch norm, which nothing in eval mode reads."""
    return {name: found for name, found in hashes.items() if not name.endswith(COUNTER)}


def _add(digest: hashlib._Hash, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):  # the result of a part's get_extra_state
        digest.update(f"{name}\0{value!r}\0".encode())
        return
    digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
    if is_traceable_wrapper_subclass(value):  # torchao's quantised weights: only their parts have bytes
        for part in value.__tensor_flatten__()[0]:
            _add(digest, part, getattr(value, part))
        return
    # as bytes, because NumPy has no bfloat16; a tensor in the CPU's memory is not copied
    flat = value.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)
