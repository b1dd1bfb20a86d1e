"""What is asked of a model library, where on the hub it lies, and the record of it that a run keeps.

The record may come from a stranger, so it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptee._common.errors import BackboneError

HUB_FILES = (  # where timm finds weights in a hub repository, and its configuration
    *("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "config.json",
)
HUB_TIMEOUT_S = 10
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Wish:
    """What a caller wants; `pretrained` means the library's own weights, of this hub commit or torchvision tag."""

    name: str
    weights: str | None
    pretrained: bool
    num_classes: int | None
    input_size: tuple[int, int, int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    args: dict[str, Any]
    version: str | None = None


def checked_record(source: Mapping[str, Any]) -> tuple[str, Wish]:
    """(library, what to ask of it), every field of the type and form that `_record` gives it."""
    _require_keys(source, "library name args num_classes weights input", "source")
    library, name, args, classes = (source[key] for key in ("library", "name", "args", "num_classes"))
    _require(library in ("timm", "torchvision"), "library", library)
    # `local-dir:` would open a folder of this machine that a stranger names
    _require(isinstance(name, str) and not name.startswith("local-dir:"), "name", name)
    _require(isinstance(args, dict) and all(isinstance(k, str) and is_plain(v) for k, v in args.items()), "args", args)
    _require(_is_count(classes), "num_classes", classes)
    file, version = _checked_weights(source["weights"], library)
    shown = source["input"]
    _require_keys(shown, "input_size mean std interpolation", "input")
    _require(isinstance(shown["interpolation"], str), "interpolation", shown["interpolation"])
    for key in ("mean", "std"):
        _require(isinstance(shown[key], list) and shown[key] and all(map(_is_number, shown[key])), key, shown[key])
    size = shown["input_size"]
    _require(isinstance(size, list) and len(size) == 3 and all(map(_is_count, size)), "input_size", size)
    return library, Wish(name, file, file is None, classes, tuple(size), shown["mean"], shown["std"], args, version)


def _checked_weights(weights: Any, library: str) -> tuple[str | None, str | None]:
    """(file, None), or (None, hub commit or torchvision tag or None)."""
    _require(isinstance(weights, dict) and set(weights) in ({"file"}, {"pretrained"}), "weights", weights)
    if "file" in weights:
        file = weights["file"]
        # to Windows, two slashes in front name another machine, and looking there means logging in
        _require(isinstance(file, str) and file and not file.startswith(("//", "\\\\")), "file", file)
        return file, None
    origin = weights["pretrained"]
    _require_keys(origin, "tag hub revision", "pretrained")
    for key, value in origin.items():
        _require(value is None or isinstance(value, str), key, value)
    commit = origin["revision"]
    _require(commit is None or COMMIT.fullmatch(commit), "revision", commit)
    return None, commit if library == "timm" else origin["tag"]


def _require_keys(record: Any, keys: str, what: str) -> None:
    _require(isinstance(record, Mapping) and set(record) == set(keys.split()), what, record)


def _require(holds: object, what: str, value: Any) -> None:
    if not holds:
        raise BackboneError(f"its record has a wrong {what}, {str(value)[:80]!r}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """Whether JSON gives it back as it is: a number, a word, true, false, null, or lists of these."""
    if isinstance(value, list):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def plain(value: Any) -> Any:
    """Tuples as the lists that JSON would make of them."""
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def checked_size(size: Sequence[int]) -> tuple[int, int, int]:
    """(c, h, w) of positive whole numbers, or a BackboneError."""
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 3 or not all(map(_is_count, size)):
        raise BackboneError(f"An input size is (channels, height, width), such as (3, 224, 224), not {size!r}.")
    return (size[0], size[1], size[2])


def reach_hub(hub: str) -> None:
    """One request, unless the cache has the weights: the client itself would go on trying for most of a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE and hub_revision(hub) is None:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)


def hub_revision(hub: str) -> str | None:
    """The commit of a repository whose weights are in the cache; a repository is user/name or user/name@revision."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = hub.partition("@")
    for file in HUB_FILES:
        path = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(path, str) and COMMIT.fullmatch(Path(path).parent.name):
            return Path(path).parent.name
    return None
