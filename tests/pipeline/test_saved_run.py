"""A saved run opened again: what it says of its data sends nobody where no run should."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cases import slow
from safetensors.torch import save_file

import ptee
from ptee._common.errors import DataError, PteeError
from ptee._common.text import printable
from ptee.backbones.load import load_backbone
from ptee.pipeline.recorded import require_openable
from ptee.pipeline.saved_run import open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that says nothing of its data yet."""
    folder = tmp_path_factory.mktemp("run")
    save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), folder / "weights.safetensors")
    ptee.augment("cifar_resnet8", weights=folder / "weights.safetensors", exits=["layer1"]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(run) -> ptee.EarlyExitModel:
    """What that run holds."""
    return ptee.load(run)


@pytest.mark.parametrize(
    "data",
    [
        *({"source": place} for place in ("/", "/./..", "C:\\")),
        *(slow({"source": place}) for place in ("//", "/.", "c:/")),
        *({"source": place} for place in ("//host/share", "\\\\host\\share", "\\/host\\share", "/\\host/share")),
        *({"source": place} for place in ("x" * 5000, "\x1b[2J", "digits\x9b31m")),
        {"source": "CIFAR10", "root": "\\/host\\share"},
        {"source": "digits", "split": {"seed": -1}},
        slow({"source": "digits", "split": {"seed": 2**63}}),
        {"source": "digits", "split": {"seed": 2**65}},
    ],
    ids=lambda data: f"{data!r:.60}",
)
def test_images_in_no_place_for_images_are_not_looked_for(data: dict[str, Any], run, model, monkeypatch):
    model.results = {"data": data}
    monkeypatch.setattr("ptee.pipeline.saved_run.load_run", lambda *_: model)  # once for all cases
    monkeypatch.setattr("ptee.pipeline.saved_run.open_images", lambda *_, **__: pytest.fail("they are looked for"))
    with pytest.raises(PteeError) as refusal:
        open_run(str(run))
    assert printable(str(refusal.value)) == str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_where_the_folder_of_a_runs_images_is_gone_the_run_is_named_and_how_to_say_where_they_are(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    gone = tmp_path / "gone"
    (run / "config.json").write_text(json.dumps(config | {"results": {"data": {"source": str(gone)}}}))
    said = (
        rf"^{run} was made with the images of {gone}, which is no folder here\. .* where they are now: data=FOLDER\.$"
    )
    for opening in (open_run, partial(require_openable, weights=None, images=True)):
        with pytest.raises(DataError, match=said):
            opening(str(run))
