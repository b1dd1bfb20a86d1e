"""The run folder: config.json and heads.safetensors, written whole or not at all, read with suspicion.

A run holds the heads, never the backbone; config.json says where that came from and the hash of its weights. Nothing is
unpickled, no path may lead out of the folder, and every field is checked before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar

from ptee import __version__
from ptee._common.errors import RunError, first_line
from ptee._common.files import replace_file, storable, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMA_VERSION = 1
CONFIG, HEADS, METRICS = "config.json", "heads.safetensors", "metrics.json"
CHECKPOINT = "checkpoint.safetensors"  # of a training that is not over
LARGEST_CONFIG_BYTES = 16 * 2**20
ENDLESS = {"Infinity": math.inf, "-Infinity": -math.inf}  # numbers that JSON has no other way to say
MODEL_CARD = """---
{{ card_data }}
---

Early-exit heads made with ptee. Load them with `ptee.load("user/repo")`, or on your own copy of the backbone with
`ptee.load("user/repo", backbone=model)`. The backbone is not in this repository; config.json names it and the hash of
its weights. `model.threshold` trades accuracy for cost at any time.
"""


@dataclass(frozen=True)
class FrontRecord:
    """What a run says of the network of its exit at the input.

    Attributes:
        name: for messages.
        source: how to rebuild it, or None.
        input: input_size, mean, std, interpolation.
    """

    name: str
    source: dict[str, Any] | None
    input: dict[str, Any]


@dataclass(frozen=True)
class ConfidenceRecord:
    """What a run says of its confidence.

    Attributes:
        name: of `CONFIDENCES`.
        scale: of each exit, if the model was calibrated; else empty.
        shift: likewise.
    """

    name: str
    scale: tuple[float, ...]
    shift: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """What a run folder says, checked for type and size but for nothing else.

    Attributes:
        folder: where it was read, as the user named it.
        backbone_name: for messages.
        backbone_hash: sha256 of the backbone's weights.
        source: how to rebuild the backbone, or None.
        input: input_size, mean, std, interpolation.
        classes: K.
        exits: names of the modules behind which the exits stand.
        heads: name of the head at each.
        threshold: one for each exit.
        results: what was measured, or None.
        tensors: the heads' parameters and buffers, by name.
        remote: it came from the hub, so no file it names on this machine is meant.
        front: the network of the exit at the input, or None.
        off: exits that are switched off.
        confidence: by which rows leave; None in runs of ptee 0.1.0, whose heads' own confidence decided.
        backbone_tensors: short hashes of the backbone's weights, each, by name; to say which differ. Older runs have none.
    """

    folder: str
    backbone_name: str
    backbone_hash: str
    source: dict[str, Any] | None
    input: dict[str, Any]
    classes: int
    exits: tuple[str, ...]
    heads: tuple[str, ...]
    threshold: list[float]
    results: dict[str, Any] | None
    tensors: dict[str, Tensor]
    remote: bool
    front: FrontRecord | None = None
    off: tuple[int, ...] = ()
    confidence: ConfidenceRecord | None = None
    backbone_tensors: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- writing


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a run; config.json comes last, so a folder that has one is complete.

    Args:
        folder: exists.
        config: JSON-able; schema and version are added.
        tensors: the heads' state.
    """
    from safetensors.torch import save_file

    whole = {"schema_version": SCHEMA_VERSION, "ptee_version": __version__, "heads_file": HEADS, **config}
    replace_file(folder / HEADS, lambda path: save_file(storable(tensors), path))
    write_json(folder / CONFIG, whole)


def read_metrics(folder: Path) -> dict[str, Any]:
    """What was measured when a run was made, as its metrics.json says.

    Raises:
        RunError: if there is none, or it holds something else.
    """
    metrics = _json(folder, folder / METRICS) if (folder / METRICS).is_file() else None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("results"), dict):
        raise RunError(f"{folder} has no {METRICS} with results. Make the run anew.")
    return metrics


def update(folder: Path, **fields: Any) -> None:
    """Replace fields of a run's config.json, and of its metrics.json those that it has; the heads stay as they are.

    Args:
        folder: of a complete run.
        fields: JSON-able; those that a run has.
    """
    config = _config(folder, folder / CONFIG)
    measured = (folder / METRICS).is_file()
    metrics = _json(folder, folder / METRICS) if measured else {}
    if not isinstance(metrics, dict):
        raise RunError(f"{folder}: {METRICS} is no JSON object. Copy the run anew.")
    write_json(folder / CONFIG, config | fields)
    if measured:
        write_json(folder / METRICS, metrics | {key: value for key, value in fields.items() if key in metrics})


# ---------------------------------------------------------------------------------------------------- reading


def read(folder: str | Path, **hub: Any) -> Run:
    """Read a run from a folder, or from a repo "user/name" on the hub.

    Args:
        folder: where it lies.
        hub: for a repo: revision, token, cache_dir, force_download, local_files_only.

    Raises:
        RunError: if a file is missing, cut off or of a newer schema, a field is missing or of another type, or a path
            leads out of the folder.
    """
    local = Path(folder)
    config_path = local / CONFIG if local.is_dir() else _download(str(folder), CONFIG, hub)
    if not config_path.is_file():
        raise RunError(
            f"{folder} holds no {CONFIG}: no run was completed there. Give a folder that `ptee augment --out` wrote."
        )
    fields = _Fields(str(folder), _config(folder, config_path))
    name = fields.get("heads_file", str)
    _refuse_outside(folder, name)
    path = local / name if local.is_dir() else _download(str(folder), name, hub)
    exits = fields.get("exits", list)
    rows = [_Fields(str(folder), row, f"exits[{i}].") for i, row in enumerate(exits)]
    _refuse_gates(rows)
    return Run(
        folder=str(folder),
        backbone_name=fields.get("backbone.name", str),
        backbone_hash=fields.get("backbone.hash", str),
        source=fields.get("backbone.source", dict, optional=True),
        input=_input(fields, "backbone"),
        classes=fields.get("backbone.classes", int),
        exits=tuple(row.get("name", str) for row in rows),
        heads=tuple(_head(row) for row in rows),
        threshold=[float(t) for t in fields.numbers("threshold", len(rows))],
        results=fields.get("results", dict, optional=True),
        tensors=_tensors(folder, path),
        remote=not local.is_dir(),
        front=_front(fields),
        off=_off(fields, len(rows)),
        confidence=_confidence(fields, len(rows)),
        backbone_tensors=fields.get("backbone_tensors", dict, optional=True) or {},
    )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json, and not some other program's."""
    try:
        return "schema_version" in _config(folder, folder / CONFIG)
    except (RunError, OSError):
        return False


def fill(heads: nn.Module, run: Run) -> None:
    """Load a run's tensors into heads built for it.

    Raises:
        RunError: if a tensor is missing, of another shape, or not wanted.
    """
    wanted = heads.state_dict()
    for name in sorted(set(wanted) ^ set(run.tensors)):
        where = "is missing" if name in wanted else "belongs to no head"
        raise RunError(f"{run.folder}: tensor {name!r} {where}; {HEADS} and {CONFIG} do not belong together.")
    for name, tensor in run.tensors.items():
        if tensor.shape != wanted[name].shape:
            raise RunError(
                f"{run.folder}: tensor {name!r} has shape {tuple(tensor.shape)}, the head {tuple(wanted[name].shape)}; "
                f"{HEADS} and {CONFIG} do not belong together."
            )
    heads.load_state_dict(run.tensors)


def _json(folder: str | Path, path: Path) -> Any:
    if path.stat().st_size > LARGEST_CONFIG_BYTES:
        raise RunError(
            f"{folder}: {path.name} is {path.stat().st_size} bytes long; no run writes more than {LARGEST_CONFIG_BYTES}."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as why:
        raise RunError(f"{folder}: {path.name} is no complete JSON ({why}). Copy the run anew.") from why


def _config(folder: str | Path, path: Path) -> dict[str, Any]:
    config = _json(folder, path)
    version = config.get("schema_version") if isinstance(config, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise RunError(f"{folder}: {CONFIG} has no schema_version; it was not written by ptee.")
    if version < 1:
        raise RunError(f"{folder} has schema version {version}, which no ptee ever wrote.")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{folder} has schema version {version}, this ptee {__version__} reads up to {SCHEMA_VERSION}. Upgrade ptee."
        )
    return config


def _off(fields: _Fields, exits: int) -> tuple[int, ...]:
    """Runs of before exits could be off have none."""
    off: list[Any] = fields.get("off", list, optional=True) or []
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < exits for n in off) or len({*off}) < len(
        off
    ):
        raise RunError(f"{fields.folder}: {CONFIG} has exits {off!r:.60} off, of {exits}. Copy the run anew.")
    return tuple(off)


def _front(fields: _Fields) -> FrontRecord | None:
    if fields.get("front", dict, optional=True) is None:
        return None
    source = fields.get("front.source", dict, optional=True)
    return FrontRecord(fields.get("front.name", str), source, _input(fields, "front"))


def _input(fields: _Fields, of: str) -> dict[str, Any]:
    sizes = fields.numbers(f"{of}.input.input_size", 3)
    if not all(isinstance(n, int) and 0 < n < 2**16 for n in sizes):
        raise RunError(
            f"{fields.folder}: {CONFIG} has {of}.input.input_size {sizes}; three positive whole numbers belong there."
        )
    places = [f"{of}.input.{key}" for key in ("mean", "std")]
    mean, std = (tuple(fields.numbers(place, len(fields.get(place, list)))) for place in places)
    if not all(map(math.isfinite, (*mean, *std))) or not all(s > 0 for s in std):
        raise RunError(
            f"{fields.folder}: {CONFIG} has {places[0]} {mean} and std {std}; finite numbers belong there, std above 0."
        )
    interpolation = fields.get(f"{of}.input.interpolation", str)
    return {"input_size": tuple(sizes), "mean": mean, "std": std, "interpolation": interpolation}


def _head(row: _Fields) -> str:
    """A name; not the word for heads that are still to be sized, which no run has."""
    from ptee.exits.heads import AUTO, PLUS

    name: str = row.get("head", str)
    if name.removesuffix(PLUS) == AUTO:
        raise RunError(f"{row.folder}: {CONFIG} has {row.prefix}head {name!r}, which says no size. Copy the run anew.")
    return name


def _refuse_gates(rows: Sequence[_Fields]) -> None:
    """Runs of ptee 0.1.0 may have them: small networks that this version does not build."""
    if any(row.get("gate", str, optional=True) for row in rows):
        raise RunError(
            f"{rows[0].folder}: its confidence comes from gates, which this version does not have. Train it again, or load it "
            "with ptee 0.1.0."
        )


def _confidence(fields: _Fields, exits: int) -> ConfidenceRecord | None:
    if fields.get("confidence", dict, optional=True) is None:
        return None
    fitted = bool(fields.get("confidence.scale", list))
    scale, shift = (fields.numbers(f"confidence.{key}", exits if fitted else 0) for key in ("scale", "shift"))
    return ConfidenceRecord(fields.get("confidence.name", str), tuple(map(float, scale)), tuple(map(float, shift)))


def _tensors(folder: str | Path, path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RunError(f"{folder} holds no {path.name}; the run is not complete. Copy it anew.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as why:
        raise RunError(f"{folder}: {path.name} is cut off or damaged ({why}). Copy it anew.") from why


def _refuse_outside(folder: str | Path, name: str) -> None:
    """A file of the run is a plain name in its folder, on any system."""
    for kind in (PurePosixPath, PureWindowsPath):
        if len(name) > 255 or kind(name).is_absolute() or len(kind(name).parts) != 1 or ".." in kind(name).parts:
            raise RunError(
                f"{folder}: {CONFIG} names the file {name!r:.80}, which is not in the folder itself. It is not read."
            )


def _download(repo: str, name: str, hub: Mapping[str, Any]) -> Path:
    import re

    from huggingface_hub import hf_hub_download

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith(".") or Path(repo).parent.is_dir():
        raise RunError(
            f"There is no folder {repo}. Give a folder that `ptee augment --out` wrote, or user/repo on the hub."
        )
    try:
        return Path(hf_hub_download(repo, name, **hub))
    except Exception as why:  # whatever the network and the hub can raise
        raise RunError(
            f"There is no folder {repo}, and {name} of the hub's {repo} cannot be had: {first_line(why)}"
        ) from why


T = TypeVar("T")


@dataclass(frozen=True)
class _Fields:
    """Fields of config.json by dotted name, with their type checked."""

    folder: str
    values: Any
    prefix: str = ""

    def get(self, key: str, kind: type[T], optional: bool = False) -> Any:
        value = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and optional:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise RunError(
                f"{self.folder}: {CONFIG} should have a {kind.__name__} at {self.prefix}{key}, it has {value!r:.60}."
            )
        return value

    def numbers(self, key: str, length: int) -> list[Any]:
        values = [ENDLESS.get(v, v) if isinstance(v, str) else v for v in self.get(key, list)]
        odd = [
            v
            for v in values
            if isinstance(v, bool) or not isinstance(v, int | float) or (isinstance(v, int) and abs(v) > 2**64)
        ]
        if len(values) != length or odd:
            raise RunError(
                f"{self.folder}: {CONFIG} should have {length} numbers at {self.prefix}{key}, it has {values!r:.60}."
            )
        return values
