"""What stands in the way where a model cannot be captured or written: the operator, and the line of the model's code."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx

from ptee._common.errors import PteeError, first_line
from ptee._common.text import printable

OWN = Path(torch.__file__).resolve().parent, Path(__file__).resolve().parents[1]  # torch and ptee
IN_STACK = re.compile(r'File "([^"]+)", line (\d+)')
OPERATOR = re.compile(r"op='\w+\.(\w+)'")
LONGEST = 100  # letters of a line
OF_VALUES = "What is computed must not depend on the values in the images."
OF_ROWS = "turns the number of rows into a fixed number. Use x.shape[0], and do not compare it with a number."
AS_IT_IS = "model.predict works all the same."


def not_captured(name: str, why: Exception) -> PteeError:
    """What to say of a backbone of this name, which torch.export cannot capture."""
    reason = OF_VALUES if type(why).__name__ == "GuardOnDataDependentSymNode" else first_line(why)
    if place := _raised_at(why):
        text = f"{place} stands in the way. {reason}"
    elif place := _rows_fixed_at(why):
        text = f"{place} {OF_ROWS}"
    else:
        text = reason
    return PteeError(f"torch.export cannot capture {name}: {text} {AS_IT_IS}")


def not_written(name: str, format: str, why: BaseException, nodes: Iterable[fx.Node]) -> PteeError:
    """What to say of a piece of a backbone, of these steps, that an exporter cannot write."""
    while why.__cause__ is not None:
        why = why.__cause__
    named = OPERATOR.search(str(why))
    step = next((n for n in nodes if named and named[1] in str(n.target)), None)
    place = f"{at(step)} stands in the way. " if step else ""
    return PteeError(f"{name} cannot be written as {format}: {place}{first_line(why)} Use another format.")


def at(node: fx.Node) -> str:
    """The operator of a step, and the line of the model that asks for it."""
    found = [_line(file, int(number)) for file, number in IN_STACK.findall(node.meta.get("stack_trace") or "")]
    lines = [line for line in found if line]
    return f"{node.target}{f' in {lines[-1]}' if lines else ''}"


def _raised_at(why: BaseException) -> str:
    """The last line of the model's own code that was running, and what it called."""
    frames = [*traceback.walk_tb(why.__traceback__)]
    for i in range(len(frames) - 2, -1, -1):
        if line := _line(frames[i][0].f_code.co_filename, frames[i][1]):
            return f"{_operator([frame for frame, _ in frames[i + 1 :]])} in {line}"
    return ""


def _operator(called: Sequence[FrameType]) -> str:
    """What a line called: a function of torch, or a method of a number that stands for a value or a size."""
    functions = [getattr(frame.f_locals.get("func"), "__name__", "") for frame in called]
    return ([name for name in functions if name] or [called[0].f_code.co_name])[-1].strip("_")


def _rows_fixed_at(why: BaseException) -> str:
    """The line that makes a plain number of the number of rows, such as len(x)."""
    for shapes in _shape_environments(why):
        for place in getattr(shapes, "replacements_slocs", {}).values():
            where = getattr(place, "framework_loc", None)
            if isinstance(where, traceback.FrameSummary) and (line := _line(where.filename, where.lineno or 0)):
                return line
    return ""


def _shape_environments(why: BaseException | None) -> Iterator[Any]:
    """What torch.export knew of sizes, where it has raised."""
    while why is not None:
        for frame, _ in traceback.walk_tb(why.__traceback__):
            if hasattr(own := frame.f_locals.get("self"), "replacements_slocs"):
                yield own
        why = why.__context__


def _line(file: str, number: int) -> str:
    """A line of code with its place; empty for torch's code and ptee's, and for what is no file."""
    if file.startswith("<") or any(Path(file).resolve().is_relative_to(folder) for folder in OWN):
        return ""
    code = printable(linecache.getline(file, number).strip())
    return f"{Path(file).name}, line {number} ({code[:LONGEST]})" if code else ""
