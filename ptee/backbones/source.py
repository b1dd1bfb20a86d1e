"""The hub, where a backbone may come from, and the cache of what was fetched there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

HUB_SOURCES = ("hf-hub", "hf_hub", "local-dir")  # timm's prefixes for names outside its registry
HUB_FILES = (  # timm's names for the weights in a hub repository, and for its configuration
    *("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "config.json",
)
HUB_TIMEOUT_S = 5
COMMIT = re.compile(r"[0-9a-f]{40}")


def reach_hub() -> None:
    """Ask the hub once for anything. Where nobody answers, its client would go on trying for most of a minute.

    Its settings do not change that: they are about one request, and it makes six for a file that is not in its cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if not constants.HF_HUB_OFFLINE:
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
