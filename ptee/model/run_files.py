"""The files of a run folder, read with suspicion. Nothing here needs torch, so what is no run is refused at once."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pydantic import ValidationError

from ptee import __version__
from ptee._common.errors import NEAREST, Argument, PteeError, RunError, first_line
from ptee._common.files import MOST_NAMES, as_path, folders_like, from_json, is_file, is_folder
from ptee._common.process import no_logs
from ptee._common.text import shown
from ptee._common.validation import from_pydantic
from ptee._common.writing import settle
from ptee.backbones.record import checked_record, rebuilding, require_weights
from ptee.backbones.source import HUB_SOURCES, is_cached, reach_hub
from ptee.exits.config import FRONT
from ptee.exits.head_spec import parse_head
from ptee.model.heads_file import Stored, read_header, stored_hash
from ptee.model.run_config import SCHEMA_VERSION, RunConfig, fingerprint, require_sane

CONFIG, HEADS, METRICS, CARD = "config.json", "heads.safetensors", "metrics.json", "README.md"
BACKBONE = "backbone.safetensors"  # of a run whose backbone learnt, too
CHECKPOINT = "checkpoint.safetensors"  # of a training that is not over
LARGEST_CONFIG_BYTES = 4 * 2**20
LARGEST_BYTES = {HEADS: 4 * 2**30, BACKBONE: 64 * 2**30}
OTHER_FOLDER = "Copy the run to a folder that you may write."
WROTE = " Give a folder that `ptee augment --out` wrote."
_AGAIN = f"{HEADS} and {CONFIG} do not belong together. Copy the run again."


def read_config(folder: str | Path, **hub: Any) -> tuple[RunConfig, bool]:
    """The checked config.json of a run, and whether it came from the hub. `hub` are arguments of hf_hub_download."""
    local = as_path(folder, "folder")
    settle(local)
    remote = not is_folder(local)
    path = download(str(folder), CONFIG, hub) if remote else local / CONFIG
    if not path.is_file() and (local / "manifest.json").is_file():
        raise RunError(
            f"{folder} is no run, but an exported model or recorded traces. Give the run that it was made from."
        )
    if not path.is_file() and (local / CHECKPOINT).is_file():
        resume = Argument("resume", "True")
        raise RunError(
            f"{folder} holds an interrupted training and no run yet. What began it goes on with ", resume, "."
        )
    if not path.is_file():
        raise RunError(f"{folder} holds no {CONFIG}: no run was completed there.{meant(local) or WROTE}")
    return _checked(folder, read_values(folder, path)), remote


def read_run(folder: str | Path, **hub: Any) -> tuple[RunConfig, Path, Path | None, bool]:
    """The checked config.json of a run, its files of heads and backbone (or None), which belong to it, and whether it is remote.

    Remote is what came from the hub.
    """
    config, remote = read_config(folder, **hub)

    def place(name: str) -> Path:
        return download(str(folder), name, hub) if remote else as_path(folder, "folder") / name

    heads, own = place(config.heads_file), config.backbone.weights_file
    _require_heads(folder, heads, config)
    backbone = None if own is None else place(own)
    if backbone is not None:
        _require_backbone(folder, backbone, config)
    return config, heads, backbone, remote


def read_metrics(folder: Path) -> dict[str, Any]:
    """What was measured when a run was made, as its metrics.json says."""
    settle(folder)
    metrics = metrics_of(folder)
    if not isinstance(metrics.get("results"), dict):
        raise RunError(f"{folder} has no {METRICS} with results. Make the run again.")
    return metrics


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json, and not some other program's."""
    path = folder / CONFIG
    settle(folder)
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
    """All that the metrics.json of a run says; empty if there is none."""
    if not is_file(folder / METRICS):  # reading a pipe would not end
        return {}
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
    for name in (config.heads_file, config.backbone.weights_file):
        if name is not None:
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


# ---------------------------------------------------------------------------------------------------- the heads


def _require_heads(folder: str | Path, path: Path, config: RunConfig) -> None:
    """Refuse a file of heads that is missing, damaged, larger than heads can be, or not of this config.json."""
    found = _header(folder, path, LARGEST_BYTES[HEADS])
    _require_layers(folder, config, found)
    _require_saved(folder, path, config, found)


def require_heads(folder: str | Path, config: RunConfig) -> None:
    """Refuse names of heads that there are not."""
    for row in config.exits:
        try:
            if row.head != FRONT:
                parse_head(row.head)
        except PteeError as why:
            raise RunError(f"{folder}: ", *why.parts) from why


def _header(folder: str | Path, path: Path, largest: int) -> dict[str, Stored]:
    if not path.is_file():
        raise RunError(f"{folder} holds no {path.name}; the run is not complete. Copy it again.")
    if path.stat().st_size > largest:
        raise RunError(f"{folder}: {path.name} is larger than {largest / 2**30:g} GiB; no run holds so much.")
    try:
        return read_header(path)
    except (OSError, ValueError) as why:
        raise RunError(f"{folder}: {path.name} is cut off or damaged ({first_line(why)}) Copy it again.") from why


def _require_backbone(folder: str | Path, path: Path, config: RunConfig) -> None:
    """Refuse a file of the backbone's weights that is missing, damaged, too large, or not of this config.json."""
    found, wanted = _header(folder, path, LARGEST_BYTES[BACKBONE]), config.backbone_tensors or {}
    for name in sorted({*wanted, *found}):
        if name not in found or stored_hash(path, found[name]) != wanted.get(name):
            raise RunError(
                f"{folder}: tensor {name!r:.80} of the backbone is missing, damaged, or of another training; {path.name} and "
                f"{CONFIG} do not belong together. Copy the run again."
            )


def _require_layers(folder: str | Path, config: RunConfig, found: Mapping[str, Stored]) -> None:
    """Refuse tensors of no exit, and heads for another number of classes. Their other layers depend on the backbone."""
    numbers = {str(n) for n in range(len(config.exits))}
    require_names(folder, [name for name in found if name.partition(".")[0] in numbers], found)
    for n, row in enumerate(config.exits):
        if row.head == FRONT:  # its answers are those of its network
            continue
        width = found[f"{n}.confidence.weight"].shape[1:] if f"{n}.confidence.weight" in found else ()
        for layer, rows in {"logits": config.backbone.classes, "confidence": 1}.items():
            for name, shape in {f"{n}.{layer}.weight": (rows, *width), f"{n}.{layer}.bias": (rows,)}.items():
                require_shape(folder, name, shape, found[name].shape if name in found else None)


def _require_saved(folder: str | Path, path: Path, config: RunConfig, found: Mapping[str, Stored]) -> None:
    """Refuse tensors that were not saved with this config.json."""
    if config.tensors is None:  # of ptee 0.1.0
        return
    require_names(folder, config.tensors, found)
    for name, tensor in found.items():
        saved = config.tensors[name]
        if tensor.dtype != saved.dtype or stored_hash(path, tensor) != saved.sha256:
            raise RunError(f"{folder}: tensor {name!r:.80} is damaged, or of another training; {_AGAIN}")


def require_names(folder: str | Path, wanted: Collection[str], found: Collection[str]) -> None:
    """Refuse tensors that are missing, or not wanted."""
    for name in sorted({*wanted} ^ {*found}):
        where = "is missing" if name in wanted else "belongs to no head"
        raise RunError(f"{folder}: tensor {name!r:.80} {where}; {_AGAIN}")


def require_shape(folder: str | Path, name: str, wanted: Sequence[int], found: Sequence[int] | None) -> None:
    """Refuse a tensor that is missing (None) or has another shape than its head."""
    if found is None:
        require_names(folder, [name], [])
    elif tuple(found) != tuple(wanted):
        text = f"tensor {name!r:.80} has shape {shown(tuple(found))}, the head {tuple(wanted)}"
        raise RunError(f"{folder}: {text}; {_AGAIN}")


# ---------------------------------------------------------------------------------------------------- the networks


def record_of(
    folder: str | Path, config: RunConfig, remote: bool, *, front: bool = False, weights: Path | None = None
) -> dict[str, Any]:
    """The record by which the backbone of a run, or its front network, is built again. `weights`: the user's file for it."""
    about, argument = (config.front, "front") if front else (config.backbone, "backbone")
    assert about is not None
    if about.source is None:
        has = f"has the front network {about.name}" if front else f"was made for {about.name}"
        raise RunError(
            f"{folder} {has}, which config.json cannot rebuild (a Python module, or random weights). Give it as {argument}=... in "
            f"Python: model = ptee.load({str(folder)!r}, {argument}=...), then ptee.evaluate, tune, write_report or export. "
            "The commands serve, bench and evaluate take what ptee.export wrote.",
            argument=argument,
        )
    keeps = not front and config.backbone.weights_file is not None
    if keeps and weights is not None:
        text = f" is of no use here: {folder} keeps the weights of its backbone, which learnt with the heads. Leave it out."
        raise RunError(Argument("weights"), text)
    source = about.source if weights is None else about.source | {"weights": {"file": str(weights)}}
    with rebuilding(argument):
        request = checked_record(source)[1]
    if not front and request.num_classes != config.backbone.classes:
        raise RunError(
            f"{folder} is for {config.backbone.classes} classes, its backbone has {request.num_classes}. Copy the run again."
        )
    if not front and not keeps and remote and weights is None and request.weights:
        raise RunError(
            f"{folder} was made with a weights file on another machine, which is not looked for here. Load it from Python: "
            "ptee.load(folder, backbone=...)."
        )
    if not remote:
        _require_at_hand(folder, about.source)
    if not front and not keeps and request.weights:
        with rebuilding(argument):
            require_weights(request.weights)
    return source


def _require_at_hand(folder: str | Path, source: Mapping[str, Any]) -> None:
    """Refuse a local run whose network would have to be fetched from a repository that nobody asked for."""
    name = str(source.get("name"))
    kind, _, repo = name.partition(":")
    weights = source.get("weights")
    origin = weights.get("pretrained") if isinstance(weights, dict) else None
    commit = origin.get("revision") if isinstance(origin, dict) else None
    if kind in HUB_SOURCES and repo and not is_cached(repo.partition("@")[0], commit):
        raise RunError(
            f"{folder} needs {name:.100}, which is not on this machine and would be fetched from the hub. If you trust it, fetch "
            f"it yourself: ptee.load(folder, backbone=timm.create_model({name!r:.100}, pretrained=True)).",
            argument="backbone",
        )


# ---------------------------------------------------------------------------------------------------- places


def _refuse_outside(folder: str | Path, name: str) -> None:
    """A file of the run is a plain name in its folder, on any system."""
    for kind in (PurePosixPath, PureWindowsPath):
        if len(name) > 255 or kind(name).is_absolute() or len(kind(name).parts) != 1 or ".." in kind(name).parts:
            raise RunError(
                f"{folder}: {CONFIG} names the file {name!r:.80}, which is not in the folder itself. It is not read."
            )


def _may_be_repo(name: str) -> bool:
    """Whether a name may be that of a repo on the hub: user/repo, where no folder "user" is."""
    fits = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) and not name.startswith(".")
    return bool(fits) and not Path(name).parent.is_dir()


def meant(folder: Path) -> str:
    """The runs that may be meant by what is none: those in it, in runs/, or of nearly its name. A question after a blank; empty if none is."""
    try:
        near = (
            sorted(islice(folder.iterdir(), MOST_NAMES))
            if is_folder(folder)
            else [Path("runs") / folder, *folders_like(folder)]
        )
    except OSError:
        near = []
    runs = [str(path) for path in near if is_file(path / CONFIG) and is_file(path / HEADS)]
    return f" Did you mean {' or '.join(runs[:NEAREST])}?" if runs else ""


def download(repo: str, name: str, hub: Mapping[str, Any]) -> Path:
    """A file of a repo on the hub."""
    if not _may_be_repo(repo):
        raise RunError(
            f"There is no folder {repo:.200}.{meant(Path(repo)) or f'{WROTE[:-1]}, or user/repo on the hub.'}"
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cache = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
    try:
        with no_logs:  # of retries
            if not (hub.get("local_files_only") or isinstance(try_to_load_from_cache(repo, name, **cache), str)):
                reach_hub()
            return Path(hf_hub_download(repo, name, **hub))
    except Exception as why:  # whatever the network and the hub can raise
        raise RunError(
            f"There is no folder {repo}, and {name} of the hub's {repo} cannot be had: {first_line(why)}"
        ) from why
