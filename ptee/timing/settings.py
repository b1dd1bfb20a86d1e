"""What can be timed, and how: looked at before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ptee._common.errors import Argument, PteeError, RunError, unknown
from ptee._common.text import quoted
from ptee._common.validation import whole
from ptee._common.writing import settle

FILE = "times.json"
LARGEST_BATCH = 4096
HOOKS, EAGER, GRAPHS, COMPILE, ONNX = EXECUTORS = ("hooks", "eager", "graphs", "compile", "onnx")
AUTO = "auto"


def checked_executors(names: Iterable[str]) -> list[str]:
    """Each once, in order."""
    for name in names:
        if name not in EXECUTORS:
            raise unknown("executor", name, EXECUTORS, argument="executor")
    return list(dict.fromkeys(names))


def checked_sizes(batch_sizes: Sequence[int]) -> list[int]:
    """Sizes of batches that can be timed."""
    sizes = [whole(b) or 0 for b in batch_sizes]
    for b, size in zip(batch_sizes, sizes, strict=True):
        if not 1 <= size <= LARGEST_BATCH:
            raise PteeError(
                f"A batch of {b} images cannot be timed. Give sizes of 1 to {LARGEST_BATCH}, such as ",
                Argument("batch_sizes", "[1, 32]"), ".", argument="batch_sizes", value=batch_sizes,
            )  # fmt: skip
    return sizes


def leaving_at_first(b: int) -> dict[str, int]:
    """How many images of a batch leave at exit 0 in each line of a table."""
    some = {"half at exit 0": b // 2} if b > 1 else {}
    return {"nobody": 0, **some, "all at exit 0": b}


def require_kept_times(folder: Path) -> Path:
    """The file of the times that a run keeps."""
    settle(folder)
    if not (folder / FILE).is_file():
        raise RunError(f"{folder} keeps no times of its pieces. Measure them: ptee bench {quoted(folder)} --save")
    return folder / FILE
