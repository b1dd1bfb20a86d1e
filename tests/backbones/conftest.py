"""Places that look as if weights had been downloaded, for tests without a network."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file
from torch import Tensor

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub cache; gives a function that puts files into it as a repository's only commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repo: str, state: dict[str, Tensor], config: dict | None = None) -> None:
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        save_file(state, snapshot / "model.safetensors")
        (snapshot / "config.json").write_text(json.dumps(config))

    return put


@pytest.fixture(params=["as it is", "told to unpickle"])
def environment(request, monkeypatch) -> None:
    """torch as it is, and where its user has told it to unpickle whatever it reads."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    if request.param == "told to unpickle":
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
