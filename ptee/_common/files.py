"""Files that are written whole or not at all: beside their place first, then renamed. JSON for people and programs."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptee._common.errors import RunError, first_line

if TYPE_CHECKING:
    from torch import Tensor

WRITING = ".writing-"  # begins the name of a folder in which a file is written before it is renamed


def write_json(path: Path, values: Any) -> None:
    """Write JSON for people and programs, whole or not at all."""
    write_text(path, to_json(values) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all."""
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def to_json(values: Any) -> str:
    """JSON by the letter: it has no endless numbers and no NaN, so these become words ("Infinity")."""
    return json.dumps(_finite(values), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def require_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written; it is left as it was.

    Raises:
        RunError: saying why.
    """
    try:
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        reason = f"{place} is a file" if place.is_file() else ""
        if not reason:
            tempfile.TemporaryDirectory(dir=place, prefix=WRITING).cleanup()
    except OSError as why:
        reason = str(why.strerror)
    if reason:
        raise RunError(f"Cannot write {folder}: {reason}. Choose another folder.")


def replace_file(path: Path, write_to: Callable[[Path], Any]) -> None:
    """Write beside, then rename: whoever looks sees the old file or the new one.

    Raises:
        RunError: if the file cannot be written (disk full, no permission).
    """
    replace_files(path.parent, {path.name: write_to})


def replace_files(folder: Path, writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write several files of a folder beside it, then rename them in order: all are new, or, on failure, all are old.

    Args:
        folder: made where it does not exist.
        writers: writes a file to the path that it is given, by the file's name.

    Raises:
        RunError: if one of them cannot be written (disk full, no permission).
    """
    from safetensors import SafetensorError

    name = next(iter(writers))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=WRITING) as beside:
            usual = Path(beside) / "mode"
            usual.touch()
            for name, write_to in writers.items():
                part = Path(beside) / name
                write_to(part)
                part.chmod(usual.stat().st_mode)  # safetensors writes for its owner alone
            _swap(folder, Path(beside), list(writers))
    except (OSError, SafetensorError) as why:
        reason = getattr(why, "strerror", None) or first_line(why).rstrip(".")
        raise RunError(f"Cannot write {folder / name}: {reason}. Choose another folder.") from why


def _swap(folder: Path, beside: Path, names: Sequence[str]) -> None:
    """Rename the new files over the old ones; on failure put the old ones back."""
    kept = beside / "kept"
    kept.mkdir()
    if len(names) > 1:
        for name in names:
            _keep(folder / name, kept / name)
    done: list[str] = []
    try:
        for name in names:
            (beside / name).replace(folder / name)
            done.append(name)
    except BaseException:
        for name in done:
            if (kept / name).exists():
                (kept / name).replace(folder / name)
            else:
                (folder / name).unlink()
        raise


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file, or a copy of it where the disk knows no second names."""
    if not path.is_file():
        return
    try:
        copy.hardlink_to(path)
    except OSError:
        shutil.copy2(path, copy)


def clear_unfinished(folder: Path) -> None:
    """Delete what a process left half written that was killed meanwhile.

    Args:
        folder: in which this process alone writes.
    """
    for left in folder.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as JSON-able values: tuples become lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(value).items()}


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with memory of its own, as safetensors wants them."""
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
