"""Files of weights, read as data and never run, and the hash by which weights are known."""

from __future__ import annotations

import argparse
import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import BackboneError, first_line, some

WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model", "net")  # timm, too, prefers the average
COUNTER = "num_batches_tracked"  # of batch norm; nothing in eval mode reads it


def load_weights(module: nn.Module, file: str | Path) -> None:
    """Copy a file of weights into a module, all of them or, if anything does not fit, none.

    Half-precision weights are widened to the module's type. A `state_dict` key around them and a prefix in front of
    every name (`module.`) are taken off.

    Raises:
        BackboneError: the file is missing, unreadable, would run code, or has other names or shapes.
    """
    state, own = read_weights(file), module.state_dict()
    bare = _without_prefix(state, own)
    for key in own.keys() - bare.keys():
        if key.endswith(COUNTER):  # older files lack it
            bare[key] = own[key]
    _require_fit(bare, own, file)
    # some modules, torchvision's MNASNet one, read old formats by a version number that safetensors cannot hold
    kept = getattr(state, "_metadata", None) if list(state) == list(bare) else None
    bare._metadata = kept or getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    try:
        module.load_state_dict(bare, strict=True)
    except Exception as error:
        raise BackboneError(f"{file} does not fit {type(module).__name__}: {first_line(error)}") from error


def read_weights(file: str | Path) -> OrderedDict[str, Tensor]:
    """The state_dict in a file, on the CPU; nothing in it is executed.

    Raises:
        BackboneError: the file is missing, unreadable, would run code, or holds no state_dict.
    """
    path = Path(file)
    if not path.is_file():
        raise BackboneError(f"There is no weights file {file}. Give a .safetensors or .pth file that exists.")
    try:
        found = _read(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(map(_is_named_tensor, found.items())):
        raise BackboneError(f"{file} holds no state_dict (names of tensors). Save model.state_dict() and nothing else.")
    state = OrderedDict(found)
    state._metadata = getattr(found, "_metadata", None)  # type: ignore[attr-defined]
    return state


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script keeps its arguments as one
        return torch.load(path, map_location="cpu", weights_only=True)


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _unreadable(path: Path, error: Exception) -> BackboneError:
    try:  # can list what a pickle would call without calling it, but not in a damaged file, nor in the oldest format
        code = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        code = []
    if code:
        return BackboneError(
            f"{path} holds more than weights ({some(code, 3)}), and reading that could run code. "
            f"Save the state_dict alone, best as .safetensors."
        )
    if isinstance(error, pickle.UnpicklingError):  # its own text is about versions of PyTorch
        return BackboneError(f"{path} cannot be read: it is damaged, no weights file, or could run code. Get it anew.")
    return BackboneError(f"{path} cannot be read: {first_line(error)} Get it anew.")


def _without_prefix(state: OrderedDict[str, Tensor], own: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """`state` without what stands before every name, where that makes names fit which did not.

    `module.` of DistributedDataParallel, `_orig_mod.` of torch.compile, a trainer's own name for its network.
    """
    bare = OrderedDict(state)
    while not bare.keys() & own.keys():
        first, dot, _ = next(iter(bare)).partition(".")
        prefix = first + dot
        if not dot or not all(key.startswith(prefix) for key in bare):
            return OrderedDict(state)
        bare = OrderedDict((key.removeprefix(prefix), value) for key, value in bare.items())
    return bare


def _require_fit(state: Mapping[str, Tensor], own: Mapping[str, Any], file: str | Path) -> None:
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or extra:
        extra.sort(key=lambda key: key.endswith(COUNTER))  # last: these say least
        faults = [f"{what} {some(keys, 3)}" for what, keys in (("lacks", missing), ("has unknown", extra)) if keys]
        raise BackboneError(f"{file} is of another model: it {' and '.join(faults)}. Check model= and model_args=.")
    wrong = [key for key in own if isinstance(own[key], Tensor) and own[key].shape != state[key].shape]
    if not wrong:
        return
    classes = {(len(state[key]), len(own[key])) for key in wrong if state[key].shape[1:] == own[key].shape[1:]}
    if len(classes) == 1 and all(state[key].shape[1:] == own[key].shape[1:] for key in wrong):
        there, here = classes.pop()
        raise BackboneError(
            f"{file} has {there} classes ({some(wrong)}), the model has {here}. Try num_classes={there}."
        )
    shapes = [f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}" for key in wrong]
    raise BackboneError(f"{file} has other shapes: {some(shapes)}. Check model=, model_args= and input_size=.")


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
    hashes = {}
    for name, value in module.state_dict().items():
        digest = hashlib.sha256()
        _add(digest, "", value)
        hashes[name] = digest.hexdigest()[:16]
    return hashes


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
