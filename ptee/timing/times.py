"""What was measured of a model: the seconds of each piece at several numbers of rows. A run keeps it in times.json.

A run may come from a stranger, so the file is checked as it is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError, about_run, warn
from ptee._common.files import to_json
from ptee._common.text import number_of, type_name, with_run
from ptee._common.validation import FrozenConfig, Name, Number, Whole, read_record
from ptee._common.writing import write_text
from ptee.analysis.freezing import one_parameter
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel
from ptee.timing.settings import AUTO, EXECUTORS, FILE, GRAPHS, HOOKS, LARGEST_BATCH, require_kept_times

SCHEMA = 1
LARGEST_FILE = 2**20  # bytes
AGAIN = "Measure again: ptee bench RUN --save"  # RUN becomes the name of the run where it is known

Names = Annotated[tuple[Name, ...], Field(min_length=1, max_length=1000)]
Seconds = Annotated[Number, Field(ge=0, le=86_400)]
Row = Annotated[tuple[Seconds, ...], Field(min_length=1, max_length=1000)]
Rows = Annotated[tuple[Row, ...], Field(min_length=1, max_length=1001)]
Count = Annotated[Whole, Field(ge=1, le=LARGEST_BATCH)]


class Measured(FrozenConfig):
    """The seconds of one executor, for each number of rows.

    Attributes:
        executor: what ran the pieces: "hooks" is `model.predict`; "eager", "graphs" and "compile" are modes of `ptee.optimize`;
            "onnx" is ONNX Runtime, which runs what `ptee export --format onnx` writes.
        bare: of the bare backbone by the same executor.
        call: what a call takes beside its pieces.
        segments: (E+1) of the backbone from one exit to the next.
        heads: (E) of the head of each exit and its decision.
        moves: (E) of going on with fewer rows.
    """

    executor: Literal["hooks", "eager", "graphs", "compile", "onnx"]
    bare: Row
    call: Row
    segments: Rows
    heads: Rows
    moves: Rows


class Times(FrozenConfig):
    """All that was measured of a model on one device.

    Attributes:
        schema_version: of this form.
        device: "cpu" or "cuda".
        device_name: of the processor or the GPU.
        threads: of the CPU.
        torch_version: with which it was measured.
        ptee_version: likewise.
        dtype: of weights and images.
        backbone: its name.
        exits: modules behind which the exits stand.
        heads: their heads.
        rows: numbers of rows that were measured, ascending.
        eager: seconds of the bare backbone as it is, for each number of rows.
        executors: one or more.
    """

    schema_version: Annotated[Whole, Field(ge=1)] = SCHEMA
    device: Name
    device_name: Name
    threads: Annotated[Whole, Field(ge=1, le=10**5)]
    torch_version: Name
    ptee_version: Name
    dtype: Name
    backbone: Name
    exits: Names
    heads: Names
    rows: Annotated[tuple[Count, ...], Field(min_length=1, max_length=1000)]
    eager: Row
    executors: Annotated[tuple[Measured, ...], Field(min_length=1, max_length=len(EXECUTORS))]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        n, exits = len(self.rows), len(self.exits)
        if any(one >= two for one, two in pairwise(self.rows)) or len(self.heads) != exits or len(self.eager) != n:
            raise PteeError("rows, eager, exits and heads do not fit each other.")
        for m in self.executors:
            tables = (m.bare, m.call, *m.segments, *m.heads, *m.moves)
            sizes = (len(m.segments), len(m.heads), len(m.moves))
            if any(len(t) != n for t in tables) or sizes != (exits + 1, exits, exits):
                raise PteeError(f"the seconds of {m.executor} do not fit the rows and exits.")
            if min(m.bare) <= 0 or min(self.eager) <= 0:
                raise PteeError(f"the bare backbone took no time by {m.executor}.")
        return self

    def to_json(self) -> str:
        """The text of the file."""
        return f"{to_json(self.model_dump(mode='json'))}\n"

    def by(self, executor: str = AUTO, batch: int = 1) -> Measured:
        """What one executor took. auto: the fastest way that `ptee` has there, CUDA graphs on a GPU and hooks elsewhere."""
        there = {m.executor: m for m in self.executors}
        usual = next((name for name in (GRAPHS, HOOKS) if name in there), self.executors[0].executor)
        wanted = usual if executor == AUTO else executor
        if wanted not in there:
            raise PteeError(
                f"{wanted} was not measured, only {', '.join(there)}. Measure again: {self._measure(wanted, batch)}",
                argument="executor", value=executor,
            )  # fmt: skip
        return there[wanted]

    def at(self, batch: int, executor: str = AUTO) -> BatchTimes:
        """The times of a batch, as fractions of the bare backbone's by the same executor."""
        if not 1 <= batch <= self.rows[-1]:
            raise PteeError(
                Argument("at_batch", f"{batch}"), f" was not measured: the largest batch was {self.rows[-1]}. Give ",
                Argument("at_batch", f"{self.rows[-1]}"), f", or measure again: {self._measure(executor, batch)}", value=batch,
            )  # fmt: skip
        m = self.by(executor, batch)
        bare = between(self.rows, m.bare, batch)[-1].item()
        tables = (m.segments, m.heads, m.moves)
        segments, heads, moves = (torch.stack([between(self.rows, t, batch) for t in rows]) / bare for rows in tables)
        call = between(self.rows, m.call, batch)[-1].item() / bare
        return BatchTimes(segments, heads, call, unit_of(m.executor, batch, self.device), moves, 1e3 * bare)

    def _measure(self, executor: str, batch: int) -> str:
        """What to type for one that is lacking: all at once, because what is saved takes the place of what was kept."""
        executors = dict.fromkeys([*(m.executor for m in self.executors), *([] if executor == AUTO else [executor])])
        return f"ptee bench RUN --executor {','.join(executors)} --batch-sizes {max(batch, self.rows[-1])} --save"

    def require_of(self, model: EarlyExitModel, device: torch.device, where: str) -> None:
        """Refuse times of other exits, another number type or another kind of device than a model has now."""
        like = one_parameter(model.backbone)
        own = {
            "exits": tuple(e.name for e in model.exits),
            "heads": tuple(e.head for e in model.exits),
            "dtype": type_name(like.dtype),
            "device": device.type,
            "backbone": model.plan.backbone,
            "device_name": device_name(device),
        }
        for name, value in own.items():
            if (found := getattr(self, name)) != value:
                words = [", ".join(v) if isinstance(v, tuple) else v for v in (found, value)]
                raise PteeError(f"{where} was measured with {name} {words[0]}, and here it is {words[1]}. {AGAIN}")


def unit_of(executor: str, batch: int, device: str) -> str:
    """What a time is a fraction of, in words."""
    return f"the bare backbone's time ({executor}, batch {batch}, {device})"


def between(rows: Sequence[int], seconds: Sequence[float], batch: int) -> Tensor:
    """(b+1,) the seconds for 0 to b rows: none for 0, and straight lines between those that were measured."""
    return torch.from_numpy(np.interp(np.arange(batch + 1), [0, *rows], [0, *seconds]))


def device_name(device: torch.device) -> str:
    """What the processor or the GPU is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return "".join(c for c in name if c.isprintable())[:200] or "cpu"


def in_threads(device: str, number: int) -> str:
    """The end of the name of a place to compute: of a CPU, in how many threads."""
    return f", {number_of(number, 'thread')}" if device == "cpu" else ""


def save_times(times: Times, folder: Path) -> None:
    """Write them into a run, in place of those that it keeps: the whole file or nothing. Says which executors it kept besides."""
    try:
        kept = [m.executor for m in read_times(folder).executors]
    except PteeError:  # there were none, or none that can be read
        kept = []
    write_text(folder / FILE, times.to_json())
    now = [m.executor for m in times.executors]
    if gone := [name for name in kept if name not in now]:
        together = ",".join([*gone, *now])
        warn(
            f"Times of {' and '.join(gone)} that {folder} kept are replaced. To keep all, measure them together: --executor {together}"
        )


def read_times(folder: Path) -> Times:
    """The times that a run keeps."""
    return read_record(Times, require_kept_times(folder), LARGEST_FILE, SCHEMA, with_run(AGAIN, folder))[0]


def times_for(folder: Path, model: EarlyExitModel, device: torch.device, batch: int, executor: str) -> BatchTimes:
    """The times that a run keeps, for batches of one size."""
    times = read_times(folder)
    with about_run(folder):
        times.require_of(model, device, f"{folder / FILE}")
        return times.at(batch, executor)


def sizes_to_measure(batch_sizes: list[int]) -> list[int]:
    """Numbers of rows up to the largest batch: two for each doubling, and the batches themselves."""
    most = max(batch_sizes)
    doubled = [2**n for n in range(math.ceil(math.log2(most)) + 1)]
    return sorted({n for n in [*doubled, *(3 * n // 2 for n in doubled if n > 1)] if n < most} | {*batch_sizes})
