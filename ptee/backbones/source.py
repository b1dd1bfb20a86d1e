"""Where a backbone comes from: its published weights, its place on the hub, and the record that a run keeps of it.

A record may come from a stranger, so every field of it is checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptee._common.errors import BackboneError
from ptee.backbones.library import ModelRequest

HUB_FILES = (  # where timm finds weights in a hub repository, and its configuration
    *("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "config.json",
)
HUB_TIMEOUT_S = 10
COMMIT = re.compile(r"[0-9a-f]{40}")
MOST_NUMBERS = 3 * 4096**2  # in one image; a record that asks for more would take gigabytes


def checked_record(source: Mapping[str, Any], libraries: Collection[str]) -> tuple[str, ModelRequest]:
    """(library, what to ask of it), every field of the type and form that `Backbone.source` gives it.

    Raises:
        BackboneError: naming the first field that is not.
    """
    _require_keys(source, "library name args num_classes weights input", "source")
    library, name, args, classes = (source[key] for key in ("library", "name", "args", "num_classes"))
    _require(isinstance(library, str) and library in libraries, "library", library)
    # `local-dir:` would open a folder of this machine that a stranger names
    _require(isinstance(name, str) and not name.startswith("local-dir:"), "name", name)
    _require(isinstance(args, dict) and all(isinstance(k, str) and is_plain(v) for k, v in args.items()), "args", args)
    _require(_is_count(classes), "num_classes", classes)
    file, origin = _checked_weights(source["weights"])
    shown = source["input"]
    _require_keys(shown, "input_size mean std interpolation", "input")
    _require(isinstance(shown["interpolation"], str), "interpolation", shown["interpolation"])
    for key in ("mean", "std"):
        _require(isinstance(shown[key], list) and shown[key] and all(map(_is_number, shown[key])), key, shown[key])
    size = shown["input_size"]
    _require(isinstance(size, list) and _is_size(size), "input_size", size)
    label = name if library == "timm" else f"{library}/{name}"
    images = (tuple(size), shown["mean"], shown["std"])
    return library, ModelRequest(name, label, file, file is None, classes, *images, args, origin)


def _checked_weights(weights: Any) -> tuple[str | None, dict[str, str | None]]:
    """(file, nothing), or (None, the origin of published weights)."""
    _require(isinstance(weights, dict) and set(weights) in ({"file"}, {"pretrained"}), "weights", weights)
    if "file" in weights:
        file = weights["file"]
        # to Windows, two slashes in front name another machine, and looking there means logging in
        remote = isinstance(file, str) and file.replace("\\", "/").startswith("//")
        _require(isinstance(file, str) and file and "\0" not in file and not remote, "file", file)
        return file, {}
    origin = weights["pretrained"]
    _require_keys(origin, "tag hub revision", "pretrained")
    for key, value in origin.items():
        _require(value is None or isinstance(value, str), key, value)
    commit = origin["revision"]
    _require(commit is None or COMMIT.fullmatch(commit), "revision", commit)
    return None, dict(origin)


def _require_keys(record: Any, keys: str, what: str) -> None:
    _require(isinstance(record, Mapping) and set(record) == set(keys.split()), what, record)


def _require(holds: object, what: str, value: Any) -> None:
    if not holds:
        raise BackboneError(f"its record has a wrong {what}, {str(value)[:80]!r}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(size: Any) -> bool:
    return len(size) == 3 and all(map(_is_count, size)) and math.prod(size) <= MOST_NUMBERS


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


def checked_size(size: Sequence[int], argument: str | None = "input_size") -> tuple[int, int, int]:
    """(c, h, w) of positive whole numbers, and not of more than an image has; or a BackboneError about the argument."""
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 3 or not all(map(_is_count, size)):
        text = f"An input size is (channels, height, width), such as (3, 224, 224), not {size!r}."
        raise BackboneError(text, argument=argument, value=size)
    if not _is_size(size):
        text = f"Images of {' x '.join(map(str, size))} numbers are too large: {MOST_NUMBERS:,} at most. Give a smaller size."
        raise BackboneError(text, argument=argument, value=size)
    return (size[0], size[1], size[2])


def require_trained(request: ModelRequest, published: int | None) -> None:
    """Refuse published weights of other classes than are asked for.

    Libraries would put a random classifier in place of theirs, and exits would learn its noise.

    Args:
        request: what is asked for.
        published: how many classes the published weights have; None or 0 where there are no weights of a classifier.

    Raises:
        BackboneError: if these are not the classes that are asked for.
    """
    names, otherwise = request.names, request.names.other_weights()
    if not published:
        text = f"There are no pretrained weights of a classifier for {request.label}. "
        raise BackboneError(text, *otherwise, argument=names.model, value=request.label)
    if request.num_classes not in (None, published):
        raise BackboneError(
            f"The pretrained classifier of {request.label} has {published} classes, not {request.num_classes}; another "
            "would be random. ",
            *otherwise,
            argument=names.num_classes,
            value=request.num_classes,
        )


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


def is_cached(repo: str, commit: Any) -> bool:
    """Whether the hub's cache has the configuration and the weights of a repository at a commit, so that nothing is fetched.

    Args:
        repo: user/name.
        commit: as a record has it.
    """
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return False
    *weights, config = (try_to_load_from_cache(repo, file, revision=commit) for file in HUB_FILES)
    return isinstance(config, str) and any(isinstance(path, str) for path in weights)
