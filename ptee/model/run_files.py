"""The JSON files of a run folder, read with suspicion. Nothing here needs torch, so what is no run is refused at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from ptee import __version__
from ptee._common.errors import PteeError, RunError, first_line
from ptee._common.files import as_path, from_json
from ptee._common.validation import from_pydantic
from ptee.model.run_config import SCHEMA_VERSION, RunConfig, fingerprint, require_sane

CONFIG, HEADS, METRICS, CARD = "config.json", "heads.safetensors", "metrics.json", "README.md"
BACKBONE = "backbone.safetensors"  # of a run whose backbone learnt, too
LARGEST_CONFIG_BYTES = 4 * 2**20
LARGEST_HEADS_BYTES = 4 * 2**30
LARGEST_HEADER_BYTES = 4 * 2**20  # of heads.safetensors: names and shapes


def read_config(folder: str | Path, **hub: Any) -> tuple[RunConfig, bool]:
    """The checked config.json of a run, and whether it came from the hub. `hub` are arguments of hf_hub_download."""
    local = as_path(folder, "folder")
    remote = not _is_folder(local)
    path = download(str(folder), CONFIG, hub) if remote else local / CONFIG
    if not path.is_file():
        raise RunError(
            f"{folder} holds no {CONFIG}: no run was completed there. Give a folder that `ptee augment --out` wrote."
        )
    return _checked(folder, read_values(folder, path)), remote


def require_run(folder: str | Path) -> None:
    """Refuse what is no run on this disk, or has files that are not to be trusted, unless it may be one on the hub."""
    if _is_folder(local := as_path(folder, "folder")) or not _may_be_repo(str(folder)):
        for name in weights_files(read_config(folder)[0]):
            require_weights(folder, local / name)


def read_metrics(folder: Path) -> dict[str, Any]:
    """What was measured when a run was made, as its metrics.json says."""
    metrics = metrics_of(folder) if (folder / METRICS).is_file() else {}
    if not isinstance(metrics.get("results"), dict):
        raise RunError(f"{folder} has no {METRICS} with results. Make the run again.")
    return metrics


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json, and not some other program's."""
    path = folder / CONFIG
    try:
        return path.is_file() and "schema_version" in read_values(folder, path)
    except RunError:
        return False


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


def metrics_of(folder: Path) -> dict[str, Any]:
    """All that the metrics.json of a run says."""
    metrics = _json(folder, folder / METRICS)
    if not isinstance(metrics, dict):
        raise RunError(f"{folder}: {METRICS} is no JSON object. Copy the run again.")
    _sane(folder, METRICS, metrics)
    return metrics


def read_values(folder: str | Path, path: Path) -> dict[str, Any]:
    """What a run's config.json says, its fields not yet checked."""
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
    for name in weights_files(config):
        _refuse_outside(folder, name)
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


def weights_files(config: RunConfig) -> list[str]:
    """The file of the heads, and that of the backbone if the run keeps its weights."""
    return [name for name in (config.heads_file, config.backbone.weights_file) if name is not None]


def require_weights(folder: str | Path, path: Path) -> None:
    """Refuse a file of weights that is missing, or larger than a run's can be."""
    if not path.is_file():
        raise RunError(f"{folder} holds no {path.name}; the run is not complete. Copy it again.")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
    except OSError as why:
        raise RunError(f"{folder}: {path.name} cannot be read: {first_line(why)}") from why
    if size > LARGEST_HEADS_BYTES or LARGEST_HEADER_BYTES < header < size:
        raise RunError(f"{folder}: {path.name} is larger than a run's weights can be. It is not read.")


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


def _may_be_repo(name: str) -> bool:
    """Whether a name may be that of a repo on the hub: user/repo, where no folder "user" is."""
    fits = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) and not name.startswith(".")
    return bool(fits) and not Path(name).parent.is_dir()


def download(repo: str, name: str, hub: Mapping[str, Any]) -> Path:
    """A file of a repo on the hub."""
    if not _may_be_repo(repo):
        raise RunError(
            f"There is no folder {repo:.200}. Give a folder that `ptee augment --out` wrote, or user/repo on the hub."
        )
    from huggingface_hub import hf_hub_download

    from ptee._common.process import no_logs

    try:
        with no_logs:  # of retries
            return Path(hf_hub_download(repo, name, **hub))
    except Exception as why:  # whatever the network and the hub can raise
        raise RunError(
            f"There is no folder {repo}, and {name} of the hub's {repo} cannot be had: {first_line(why)}"
        ) from why
