"""Where a backbone comes from: its place on the hub, and the record that a run keeps of it.

A record may come from a stranger, so every field of it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from ptee._common.errors import BackboneError, PteeError
from ptee._common.validation import FrozenConfig, Number, Whole
from ptee.backbones.library import MOST_CLASSES, ModelRequest, checked_size

HUB_FILES = (  # timm's names for the weights in a hub repository, and for its configuration
    *("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "config.json",
)
HUB_TIMEOUT_S = 10
COMMIT = re.compile(r"[0-9a-f]{40}")


def _local(file: str) -> str:
    # for Windows, two slashes at the start name another machine, and looking there means logging in
    if not file or "\0" in file or file.replace("\\", "/").startswith("//"):
        raise PydanticCustomError("local", "Input should be a file of this machine")
    return file


def _not_a_folder(name: str) -> str:
    if name.startswith("local-dir:"):  # would open a folder of this machine that a stranger names
        raise PydanticCustomError("name", "Input should be the name of a model")
    return name


class _Origin(FrozenConfig):
    tag: str | None
    hub: str | None
    revision: Annotated[str, Field(pattern=f"^{COMMIT.pattern}$")] | None


class _File(FrozenConfig):
    file: Annotated[str, AfterValidator(_local)]


class _Published(FrozenConfig):
    pretrained: _Origin


class _Images(FrozenConfig):
    input_size: Annotated[list[int], AfterValidator(checked_size)]
    mean: Annotated[list[Number], Field(min_length=1)]
    std: Annotated[list[Number], Field(min_length=1)]
    interpolation: str


class _Record(FrozenConfig):
    """`Backbone.source`."""

    library: str
    name: Annotated[str, AfterValidator(_not_a_folder)]
    args: dict[str, JsonValue]
    num_classes: Annotated[Whole, Field(gt=0, le=MOST_CLASSES)]
    weights: _File | _Published | None  # None: random, or a run keeps them
    input: _Images


def checked_record(source: Any, libraries: Collection[str]) -> tuple[str, ModelRequest]:
    """The library and what to ask of it. A field of another form than in `Backbone.source` is refused by name."""
    if not isinstance(source, Mapping) or str(source.get("library")) not in libraries:
        raise BackboneError("its record names no library of models.")
    try:
        record = _Record(**source)
    except PteeError as why:
        raise BackboneError(f"its record is wrong: {why}") from why
    own, images = record.weights, record.input
    file = own.file if isinstance(own, _File) else None
    origin = own.pretrained.model_dump() if isinstance(own, _Published) else {}
    label = record.name if record.library == "timm" else f"{record.library}/{record.name}"
    size: Any = images.input_size
    request = ModelRequest(
        *(record.name, label, file, isinstance(own, _Published), record.num_classes),
        *(size, images.mean, images.std, record.args, origin),
    )
    return record.library, request


def reach_hub(hub: str) -> None:
    """Ask the hub once, unless its cache has the weights. The client itself would go on trying for most of a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE and hub_revision(hub) is None:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)


def hub_revision(hub: str) -> str | None:
    """The commit of a repository (user/name or user/name@revision) whose weights are in the cache."""
    repo, _, revision = hub.partition("@")
    for path in _cached(repo, revision or None):
        if path and COMMIT.fullmatch(path.parent.name):
            return path.parent.name
    return None


def is_cached(repo: str, commit: Any) -> bool:
    """Whether the cache has the configuration and the weights of a repository (user/name) at a commit of a record."""
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return False
    *weights, config = _cached(repo, commit)
    return bool(config and any(weights))


def _cached(repo: str, revision: str | None) -> list[Path | None]:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repo, file, revision=revision) for file in HUB_FILES)
    return [Path(path) if isinstance(path, str) else None for path in found]
