"""The run folder: config.json and heads.safetensors, written whole or not at all, and read with suspicion.

A run holds the heads, and the backbone only if it learnt with them; config.json says where the backbone came from, and the
hash of its weights.
Nothing is unpickled, no path may lead out of the folder, and every field is checked before it is used (`run_config`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ptee import __version__
from ptee._common.errors import PteeError, RunError, some, warn
from ptee._common.files import as_path, is_file, plain, to_json
from ptee._common.text import type_name
from ptee._common.validation import from_pydantic
from ptee._common.writing import ANOTHER_FOLDER, clear_unfinished, locked, replace_files, settle, writer_of
from ptee.backbones.weights import changes, in_single_precision, storable, tensor_hash, tensor_hashes, weights_hash
from ptee.exits.confidence import Calibrated
from ptee.exits.front import FrontHead
from ptee.model.heads_file import LARGEST_HEADER_BYTES
from ptee.model.run_config import SCHEMA_VERSION, RunConfig, fingerprint, require_sane
from ptee.model.run_files import (
    BACKBONE,
    CARD,
    CONFIG,
    HEADS,
    LARGEST_BYTES,
    LARGEST_CONFIG_BYTES,
    METRICS,
    OTHER_FOLDER,
    metrics_of,
    read_run,
    read_values,
    require_names,
    require_shape,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ptee.backbones.load import Backbone

MOST_READINGS = 5  # of a run that others change meanwhile
Versions = dict[str, str | None]  # by whole path of a run that was read: the `version_of` it


@dataclass(frozen=True)
class Run:
    """What a run folder holds, its fields checked. Whether it fits a backbone is open.

    Attributes:
        folder: as the user named it.
        config: what config.json says.
        tensors: the heads' parameters and buffers, by name.
        backbone: the backbone's, likewise; None if the run does not keep them.
        remote: it came from the hub, so its paths do not mean files on this machine.
        versions: of the folder, as it was read.
    """

    folder: str
    config: RunConfig
    tensors: dict[str, Tensor]
    backbone: dict[str, Tensor] | None
    remote: bool
    versions: Versions


# ---------------------------------------------------------------------------------------------------- writing


def describe(model: Any) -> dict[str, Any]:
    """What config.json says of an early-exit model."""
    _require_as_built(model)
    network, plan, tensors = model.origin, model.plan, tensor_hashes(model.origin.module)
    if network.hashes not in (None, tensors) and network.source is not None and not network.learnt:
        _tell_changes(network)
    warn_of_changes(network)
    front = next((head.origin for head in model.heads if isinstance(head, FrontHead)), None)
    return {
        "backbone": {
            "name": network.name,
            "source": network.source,
            "weights_file": BACKBONE if network.learnt else None,
            "hash": weights_hash(network.module),
            "classes": plan.classes,
            "input": plain(network.input),
            "pixels_known": network.pixels_known,
        },
        "front": front and {"name": front.name, "source": front.source, "input": plain(front.input)},
        "placement": plan.placement,
        "exits": plan.to_dict()["exits"],
        "confidence": {"name": plan.confidence} | plain(model.calibrated or Calibrated()),
        **describe_tuning(model),
        "backbone_tensors": tensors,
        "learned_from": network.learned_from if network.learned_from != tensors else None,
    }


def tensors_of(model: Any) -> dict[str, Any]:
    """Shape and kind of numbers of each tensor of a model, and of its heads whether all are finite, by name."""
    found: dict[str, Any] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if getattr(tensor, "is_nested", True):  # or no tensor at all
            found[name] = (), False, True
            continue
        floats = tensor.is_floating_point()
        found[name] = tuple(tensor.shape), floats, not floats or not name.startswith("heads.") or _is_finite(tensor)
    return found


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.detach()
    return bool((values if values.element_size() > 1 else values.float()).isfinite().all())


def _require_as_built(model: Any) -> None:
    """Refuse weights of which a run could be written, and never be loaded."""
    parts = ("heads.", "backbone.") if model.origin.learnt else ("heads.",)
    now, built = (
        {name: kind for name, kind in found.items() if name.startswith(parts)}
        for found in (tensors_of(model), model.as_built)
    )
    if odd := [name for name in sorted({*now, *built}) if now.get(name, ())[:2] != built.get(name, ())[:2]]:
        raise RunError(
            f"These weights are not kept as they were built: {some(odd, 3)}. torch.nn.utils.prune, parametrizations, quantisation and "
            "torch.compile of a part do that. Save before that, or undo it first (prune.remove, parametrize.remove_parametrizations)."
        )
    if odd := [name for name in now if built[name][2] and not now[name][2]]:
        raise RunError(
            f"Values of the heads are not finite (inf or NaN), so no run is written: {some(odd, 3)}. Train them again."
        )
    if model.origin.learnt and (
        odd := [name for name, t in model.backbone.state_dict(keep_vars=True).items() if _has_nan(t)]
    ):
        raise RunError(f"Values of the backbone are NaN, so no run is written: {some(odd, 3)}. Train it again.")


def _has_nan(tensor: Any) -> bool:
    return not getattr(tensor, "is_nested", True) and tensor.is_floating_point() and bool(tensor.isnan().any())


def _tell_changes(network: Backbone) -> None:
    """Warn that the run will not load by itself: its record of the backbone leads to other weights than these."""
    assert network.hashes is not None
    if why := changes(network.hashes, network.module, network.input.input_size):
        types = {type_name(parameter.dtype) for parameter in network.module.parameters()} - {"float32"}
        of_type = (
            f" If only their type was changed: save before model.to(torch.{min(types)}), and call that again after loading."
            if types
            else ""
        )
        warn(
            f"The weights of {network.name} are not those that it was loaded with: {why}. A run holds no weights of the backbone, only where "
            "they were loaded from, so ptee.load(FOLDER) will refuse it. Keep them (torch.save(model.backbone.state_dict(), FILE)), and give "
            f"the network with them: ptee.load(FOLDER, backbone=...).{of_type}"
        )


def warn_of_changes(network: Backbone) -> None:
    """Warn if heads answer for other weights than they learned from."""
    if network.learned_from is None or not in_single_precision(network.module):
        return
    if why := changes(network.learned_from, network.module, network.input.input_size):
        warn(
            f"The weights of {network.name} are not those that its heads learned from: {why}. Heads, and all that was fitted and measured "
            "before the change, belong to those. Put them back, or make new exits: ptee.fit(model.detach(), ...)."
        )


def describe_tuning(model: Any) -> dict[str, Any]:
    """What of it `ptee.tune` sets, and what was measured with that."""
    return {
        "threshold": model.threshold,
        "answers": {"name": model.answers, "blend": model.blend and model.blend.to_dict()},
        "off": list(model.off),
        "curve": model.curve and model.curve.model_dump(mode="json"),
        "results": model.results,
    }


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: str | None = None,
    more: Mapping[str, str] | None = None,
    backbone: Mapping[str, Tensor] | None = None,
    versions: Versions | None = None,
) -> None:
    """Write a run: all of it, or on failure nothing, so that a run that was there stays as it was.

    `config` comes from `describe`; version, hashes and fingerprint are added. `card` is the text of README.md; None leaves
    it. `more` holds the texts of further files, by name. `backbone` are the weights of one that learnt. `versions`: as of
    `changing`.
    """
    from safetensors.torch import save_file

    require_saveable(tensors, backbone)
    stored = storable(tensors)
    known = {name: {"dtype": type_name(tensor.dtype), "sha256": tensor_hash(tensor)} for name, tensor in stored.items()}
    whole = {"schema_version": SCHEMA_VERSION, "ptee_version": __version__, "heads_file": HEADS, **config}
    whole = json.loads(to_json(whole | {"tensors": known}))  # as it will be read
    whole["fingerprint"] = fingerprint(whole)
    _require_loadable(folder, whole)
    writers: dict[str, Callable[[Path], Any]] = {HEADS: lambda path: save_file(stored, path)}
    if backbone is not None:
        writers[BACKBONE] = lambda path: save_file(storable(backbone), path)
    if card is not None:
        writers[CARD] = writer_of(card)
    writers |= {name: writer_of(text) for name, text in (more or {}).items()}
    with changing(folder, {} if versions is None else versions, ANOTHER_FOLDER, new=True):
        # That of the run that was there holds results of other settings.
        if METRICS not in writers and (folder / METRICS).is_file():
            with suppress(RunError):  # a damaged one is left
                writers[METRICS] = writer_of(to_json(metrics_of(folder) | {"results": whole["results"]}) + "\n")
        replace_files(folder, writers | {CONFIG: writer_of(to_json(whole) + "\n")})


def require_saveable(heads: Mapping[str, Tensor], backbone: Mapping[str, Tensor] | None) -> None:
    """Refuse weights that make larger files than a run is loaded from. `backbone`: of one that learns."""
    for name, tensors in {HEADS: heads, BACKBONE: backbone or {}}.items():
        # quantised layers keep what is no tensor, and are refused later
        size, largest = sum(getattr(tensor, "nbytes", 0) for tensor in tensors.values()), LARGEST_BYTES[name]
        if size + LARGEST_HEADER_BYTES > largest:
            sizes = f"take {size / 2**30:.1f} GiB, and those of a run take less than {largest / 2**30:g} GiB"
            raise RunError(f"The weights for {name} {sizes}. Take a smaller network.")


@contextmanager
def changing(folder: Path, versions: Versions, remedy: str = OTHER_FOLDER, new: bool = False) -> Iterator[None]:
    """Meanwhile no other process changes the run. Afterwards `versions` has its new version, if it had one.

    Args:
        folder: of the run.
        versions: of the runs that were read. Another run is changed as it is.
        remedy: what a user can do where the folder cannot be written.
        new: a whole run is written, so there may be none any more.

    Raises:
        RunError: if the run is not the one that was read.
    """
    place = _place_of(folder)
    with locked(folder, remedy=remedy):
        clear_unfinished(folder)
        found = version_of(folder)
        if found != versions.get(place, found) and not (new and found is None):
            then = "Load it again, or choose another folder." if new else "Give the same command again."
            raise RunError(f"{folder} was changed after it was read, so it is left as it is. {then}")
        yield
        if place in versions:  # what was only written was never read
            versions[place] = version_of(folder)


def _place_of(folder: str | Path) -> str:
    return str(as_path(folder, "folder").resolve())


def version_of(folder: str | Path) -> str | None:
    """The hash of a run's config.json, which has the hashes of its weights; None if there is none on this disk."""
    local = as_path(folder, "folder")
    settle(local)
    if not is_file(local / CONFIG):  # reading a pipe would not end
        return None
    try:
        with (local / CONFIG).open("rb") as file:
            return hashlib.sha256(file.read(LARGEST_CONFIG_BYTES + 1)).hexdigest()
    except OSError:
        return None


def update(
    folder: Path, more: Mapping[str, str] | None = None, versions: Versions | None = None, **fields: Any
) -> None:
    """Replace fields of a run's config.json, and in its metrics.json those that it has: in all files or in none.

    `more` holds the texts of further files, by name. `versions`: as of `changing`.
    """
    with changing(folder, {} if versions is None else versions):
        new = {CONFIG: read_values(folder, folder / CONFIG) | fields}
        if "fingerprint" in new[CONFIG]:
            new[CONFIG]["fingerprint"] = fingerprint(new[CONFIG])
        _require_loadable(folder, json.loads(to_json(new[CONFIG])))
        if metrics := metrics_of(folder):
            new[METRICS] = metrics | {key: value for key, value in fields.items() if key in metrics}
        texts = {name: to_json(values) + "\n" for name, values in reversed(new.items())}
        writers = {name: writer_of(text) for name, text in {**(more or {}), **texts}.items()}
        replace_files(folder, writers, OTHER_FOLDER)


def _require_loadable(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to write a config.json that would be refused when it is read."""
    try:
        require_sane(config)
        RunConfig.model_validate(config)
    except (PteeError, ValidationError) as why:
        text = from_pydantic(why) if isinstance(why, ValidationError) else why
        raise RunError(f"Cannot write {folder}, because it could not be loaded again: {text}") from why


# ---------------------------------------------------------------------------------------------------- reading


def read(folder: str | Path, **hub: Any) -> Run:
    """Read and check a run from a folder, or from a repo "user/name" on the hub; `hub` are arguments of hf_hub_download."""
    for _ in range(MOST_READINGS):
        version = version_of(folder)
        try:
            run = _read(folder, **hub)
        except RunError:
            if version_of(folder) == version:
                raise
            continue
        if version_of(folder) == version:  # else another process has changed it meanwhile
            return replace(run, versions={} if run.remote else {_place_of(folder): version})
    raise RunError(f"{folder} is being changed by another process. Wait for it.")


def _read(folder: str | Path, **hub: Any) -> Run:
    from safetensors.torch import load_file

    config, path, own, remote = read_run(folder, **hub)  # which has looked at all of both files
    backbone = None if own is None else load_file(own)
    return Run(str(folder), config, load_file(path), backbone, remote, {})


def fill(heads: nn.Module, run: Run) -> None:
    """Load a run's tensors into heads built for it. Refuses tensors that are missing, of another shape, or not wanted."""
    wanted = heads.state_dict()
    require_names(run.folder, wanted, run.tensors)
    for name, tensor in run.tensors.items():
        require_shape(run.folder, name, wanted[name].shape, tensor.shape)
        if tensor.is_floating_point() != wanted[name].is_floating_point():
            raise RunError(
                f"{run.folder}: tensor {name!r:.80} holds {type_name(tensor.dtype)}, which its head does not. Copy the run again."
            )
    require_finite(run.folder, run.tensors, wanted)
    heads.load_state_dict(run.tensors)


def require_finite(folder: str, tensors: Mapping[str, Tensor], built: Mapping[str, Any]) -> None:
    """Refuse inf and NaN, except in what has them when it is built, such as a mask."""
    odd = [name for name, tensor in tensors.items() if not tensor.isfinite().all() and built[name].isfinite().all()]
    if odd:
        raise RunError(f"{folder}: values that are not finite (inf or NaN) in {some(odd, 3)}. Train it again.")
