"""The run folder: config.json and heads.safetensors, written whole or not at all, and read with suspicion.

A run holds the heads and never the backbone; config.json says where the backbone came from, and the hash of its weights.
Nothing is unpickled, no path may lead out of the folder, and every field is checked before it is used (`run_config`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ptee import __version__
from ptee._common.errors import PteeError, RunError, first_line
from ptee._common.files import as_path, from_json, plain, replace_files, storable, to_json
from ptee._common.validation import from_pydantic
from ptee.backbones.load import Backbone
from ptee.backbones.weights import tensor_hash, tensor_hashes, weights_hash
from ptee.exits.blend import OWN, Blend
from ptee.exits.confidence import Calibrated
from ptee.exits.front import FrontHead
from ptee.exits.plan import Plan
from ptee.model.run_config import SCHEMA_VERSION, RunConfig, fingerprint, require_sane

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, HEADS, METRICS, CARD = "config.json", "heads.safetensors", "metrics.json", "README.md"
CHECKPOINT = "checkpoint.safetensors"  # of a training that is not over
LARGEST_CONFIG_BYTES = 4 * 2**20
LARGEST_HEADS_BYTES = 4 * 2**30
LARGEST_HEADER_BYTES = 4 * 2**20  # of heads.safetensors: names and shapes
MODEL_CARD = """---
{{ card_data }}
---

Early-exit heads made with ptee. Load them with `ptee.load("user/repo")`, or on your own copy of the backbone with
`ptee.load("user/repo", backbone=model)`. The backbone is not in this repository; config.json names it and the hash of
its weights. `model.threshold` trades accuracy for cost at any time.
"""


@dataclass(frozen=True)
class Run:
    """What a run folder holds, its fields checked. Whether it fits a backbone is open.

    Attributes:
        folder: as the user named it.
        config: what config.json says.
        tensors: the heads' parameters and buffers, by name.
        remote: it came from the hub, so its paths do not mean files on this machine.
    """

    folder: str
    config: RunConfig
    tensors: dict[str, Tensor]
    remote: bool


# ---------------------------------------------------------------------------------------------------- writing


def describe(
    network: Backbone,
    plan: Plan,
    heads: nn.Module,
    threshold: Sequence[float],
    *,
    calibrated: Calibrated | None,
    results: Mapping[str, Any] | None,
    blend: Blend | None = None,
    answers: str = OWN,
) -> dict[str, Any]:
    """What config.json says of a model. `calibrated` has the numbers of the calibrated confidence; `results` were measured."""
    front = next((head for head in heads.children() if isinstance(head, FrontHead)), None)
    return {
        "backbone": {
            "name": network.name,
            "source": network.source,
            "hash": weights_hash(network.module),
            "classes": plan.classes,
            "input": plain(network.input),
        },
        "front": front
        and {"name": front.origin.name, "source": front.origin.source, "input": plain(front.origin.input)},
        "placement": plan.placement,
        "exits": plan.to_dict()["exits"],
        "threshold": list(threshold),
        "confidence": {"name": plan.confidence} | plain(calibrated or Calibrated()),
        "answers": describe_answers(answers, blend),
        "off": list(plan.off),
        "results": results,
        "backbone_tensors": tensor_hashes(network.module),
    }


def describe_answers(answers: str, blend: Blend | None) -> dict[str, Any]:
    """What config.json says of own or blended answers."""
    return {"name": answers, "blend": blend and blend.to_dict()}


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a run: all of it, or on failure nothing, so that a run that was there stays as it was.

    `config` comes from `describe`; version, hashes and fingerprint are added. `card` is the text of README.md; None leaves
    it. `more` holds the texts of further files, by name.
    """
    from safetensors.torch import save_file

    stored = storable(tensors)
    known = {name: {"dtype": _dtype(tensor), "sha256": tensor_hash(tensor)} for name, tensor in stored.items()}
    whole = {"schema_version": SCHEMA_VERSION, "ptee_version": __version__, "heads_file": HEADS, **config}
    whole = json.loads(to_json(whole | {"tensors": known}))  # as it will be read
    whole["fingerprint"] = fingerprint(whole)
    writers: dict[str, Callable[[Path], Any]] = {HEADS: lambda path: save_file(stored, path)}
    if card is not None:
        writers[CARD] = _text(card)
    writers |= {name: _text(text) for name, text in (more or {}).items()}
    replace_files(folder, writers | {CONFIG: _text(to_json(whole) + "\n")})


def update(folder: Path, more: Mapping[str, str] | None = None, **fields: Any) -> None:
    """Replace fields of a run's config.json, and in its metrics.json those that it has: in all files or in none.

    `more` holds the texts of further files, by name.
    """
    new = {CONFIG: _config(folder, folder / CONFIG) | fields}
    if "fingerprint" in new[CONFIG]:
        new[CONFIG]["fingerprint"] = fingerprint(new[CONFIG])
    if (folder / METRICS).is_file():
        metrics = _metrics(folder)
        new[METRICS] = metrics | {key: value for key, value in fields.items() if key in metrics}
    texts = {name: to_json(values) + "\n" for name, values in reversed(new.items())}
    writers = {name: _text(text) for name, text in {**(more or {}), **texts}.items()}
    replace_files(folder, writers, "Copy the run to a folder that you may write.")


def _text(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text, encoding="utf-8")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------- reading


def read(folder: str | Path, **hub: Any) -> Run:
    """Read and check a run from a folder, or from a repo "user/name" on the hub; `hub` are arguments of hf_hub_download."""
    local = as_path(folder, "folder")
    remote = not _is_folder(local)
    config_path = _download(str(folder), CONFIG, hub) if remote else local / CONFIG
    if not config_path.is_file():
        raise RunError(
            f"{folder} holds no {CONFIG}: no run was completed there. Give a folder that `ptee augment --out` wrote."
        )
    config = _checked(folder, _config(folder, config_path))
    path = _download(str(folder), config.heads_file, hub) if remote else local / config.heads_file
    tensors = _tensors(folder, path)
    if config.tensors is not None:
        _require_saved(folder, config, tensors)
    return Run(str(folder), config, tensors, remote)


def read_metrics(folder: Path) -> dict[str, Any]:
    """What was measured when a run was made, as its metrics.json says."""
    metrics = _metrics(folder) if (folder / METRICS).is_file() else {}
    if not isinstance(metrics.get("results"), dict):
        raise RunError(f"{folder} has no {METRICS} with results. Make the run again.")
    return metrics


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json, and not some other program's."""
    path = folder / CONFIG
    try:
        return path.is_file() and "schema_version" in _config(folder, path)
    except RunError:
        return False


def fill(heads: nn.Module, run: Run) -> None:
    """Load a run's tensors into heads built for it. Refuses tensors that are missing, of another shape, or not wanted."""
    wanted = heads.state_dict()
    _require_names(run.folder, wanted, run.tensors)
    for name, tensor in run.tensors.items():
        if tensor.shape != wanted[name].shape:
            raise RunError(
                f"{run.folder}: tensor {name!r} has shape {tuple(tensor.shape)}, the head {tuple(wanted[name].shape)}; "
                f"{_NOT_ONE}"
            )
    heads.load_state_dict(run.tensors)


def _require_names(folder: str | Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name in sorted(set(wanted) ^ set(found)):
        where = "is missing" if name in wanted else "belongs to no head"
        raise RunError(f"{folder}: tensor {name!r:.80} {where}; {_NOT_ONE}")


_NOT_ONE = f"{HEADS} and {CONFIG} do not belong together. Copy the run again."


def _json(folder: str | Path, path: Path) -> Any:
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_CONFIG_BYTES + 1)
    except OSError as why:
        raise RunError(f"{folder}: {path.name} cannot be read: {first_line(why)}") from why
    if len(text) > LARGEST_CONFIG_BYTES:
        raise RunError(f"{folder}: {path.name} is longer than {LARGEST_CONFIG_BYTES:,} bytes; no run writes so much.")
    try:
        return from_json(text.decode("utf-8"))
    except ValueError as why:
        raise RunError(f"{folder}: {path.name} is no complete JSON ({first_line(why)}) Copy the run again.") from why


def _sane(folder: str | Path, name: str, value: Any) -> None:
    try:
        require_sane(value)
    except PteeError as why:
        raise RunError(f"{folder}: in {name} {why} Copy the run again.") from why


def _metrics(folder: Path) -> dict[str, Any]:
    metrics = _json(folder, folder / METRICS)
    if not isinstance(metrics, dict):
        raise RunError(f"{folder}: {METRICS} is no JSON object. Copy the run again.")
    _sane(folder, METRICS, metrics)
    return metrics


def _config(folder: str | Path, path: Path) -> dict[str, Any]:
    config = _json(folder, path)
    version = config.get("schema_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise RunError(f"{folder}: {CONFIG} has no schema_version; it was not written by ptee.")
    if version < 1:
        raise RunError(f"{folder} has schema version {version!s:.40}, which no ptee ever wrote.")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{folder} has schema version {version!s:.40}, this ptee {__version__} reads up to {SCHEMA_VERSION}. Upgrade ptee."
        )
    _sane(folder, CONFIG, config)
    return config


def _checked(folder: str | Path, values: Mapping[str, Any]) -> RunConfig:
    """config.json with every field checked; refused where a field was changed that may not be."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise RunError(f"{folder}: {CONFIG}: {from_pydantic(error)} Copy the run again.") from error
    _refuse_outside(folder, config.heads_file)
    if any(row.gate for row in config.exits):
        raise RunError(
            f"{folder}: its confidence comes from gates, which this version does not have. Train it again, or load it with "
            "ptee 0.1.0."
        )
    if config.fingerprint is not None and config.fingerprint != fingerprint(values):
        raise RunError(
            f"{folder}: {CONFIG} was changed or damaged: its exits, its input, its backbone, its blend or its images are not those "
            "that were saved. Only threshold, off, confidence and the place of the images may be changed by hand. Copy the run again."
        )
    return config


def _tensors(folder: str | Path, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{folder} holds no {path.name}; the run is not complete. Copy it again.")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if size > LARGEST_HEADS_BYTES or LARGEST_HEADER_BYTES < header < size:
            raise RunError(f"{folder}: {path.name} is larger than heads can be. It is not read.")
        return load_file(path)
    except RunError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, OverflowError) as why:
        raise RunError(f"{folder}: {path.name} is cut off or damaged ({first_line(why)}) Copy it again.") from why


def _require_saved(folder: str | Path, config: RunConfig, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that were not saved with this config.json."""
    wanted = config.tensors or {}
    _require_names(folder, wanted, tensors)
    for name, tensor in tensors.items():
        if _dtype(tensor) != wanted[name].dtype or tensor_hash(tensor) != wanted[name].sha256:
            raise RunError(f"{folder}: tensor {name!r} is damaged, or of another training; {_NOT_ONE}")


def _refuse_outside(folder: str | Path, name: str) -> None:
    """A file of the run is a plain name in its folder, on any system."""
    for kind in (PurePosixPath, PureWindowsPath):
        if len(name) > 255 or kind(name).is_absolute() or len(kind(name).parts) != 1 or ".." in kind(name).parts:
            raise RunError(
                f"{folder}: {CONFIG} names the file {name!r:.80}, which is not in the folder itself. It is not read."
            )


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long to be one
        return False


def _download(repo: str, name: str, hub: Mapping[str, Any]) -> Path:
    import re

    from huggingface_hub import hf_hub_download

    is_repo = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo) and not repo.startswith(".")
    if not is_repo or Path(repo).parent.is_dir():
        raise RunError(
            f"There is no folder {repo:.200}. Give a folder that `ptee augment --out` wrote, or user/repo on the hub."
        )
    try:
        return Path(hf_hub_download(repo, name, **hub))
    except Exception as why:  # whatever the network and the hub can raise
        raise RunError(
            f"There is no folder {repo}, and {name} of the hub's {repo} cannot be had: {first_line(why)}"
        ) from why
