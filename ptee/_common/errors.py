"""What a user can mend, and warnings.

    PteeError (ValueError)
     +-- UnknownName (KeyError)     a name that is not in a registry, a model or a folder
     +-- CutError                   an exit cannot stand where it was asked for
     +-- DataError                  a data source that cannot be read as asked
     +-- BackboneError              a model, its weights or its input that cannot be used
     +-- RunError                   a saved run that cannot be trusted or does not fit
     +-- DeviceError                a device that is not there

Every message is one line: what was wrong with the value, what is possible, what to type. An argument to type stands in the
message as an `Argument`, so that Python can say `num_classes=10` and the command `--num-classes 10`.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from itertools import count
from typing import Any

from ptee._common.text import printable, with_run

WITHIN = {"ptee", "torch", "accelerate", "contextlib", "functools"}  # no line of these is the caller's

FARTHER = 0.3  # of 1, less like the name than the nearest choice: then a choice is not suggested
NEAREST = 3  # choices that a message names in answer to a wrong one, at most
# What other libraries call settings of ptee, in small letters and without _.
ELSEWHERE = {
    "learningrate": "lr",
    "randomstate": "seed",
    "randomseed": "seed",
    "nepochs": "epochs",
    "maxepochs": "epochs",
}
ENDED_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is )?([^.]+)")  # what torch says of one
NO_ROOM = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class Argument:
    """An argument that a message asks the user to give, as Python writes it. Without a value it is named alone."""

    name: str
    value: str = ""

    @classmethod
    def text(cls, name: str, value: object) -> Argument:
        """An argument whose value is a text, such as a path. Python needs quotes around it."""
        return cls(name, repr(str(value)))

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


Advice = tuple[str | Argument, ...]  # some parts of a message


def _safe(part: str | Argument) -> str | Argument:
    """A part of a message without control characters: a stranger may have chosen the names in it."""
    return printable(part) if isinstance(part, str) else Argument(printable(part.name), printable(part.value))


class PteeError(ValueError):
    """Everything a user can mend. The command prints it as one line and ends with status 2.

    Args:
        parts: of the message, joined as they are: texts, and arguments that the user can give.
        argument: the name of the argument that is wrong, if one is. Default: the one that the message begins with.
        value: what was given for it, the object itself; of a list of names, the one that is wrong.
    """

    def __init__(self, *parts: str | Argument, argument: str | None = None, value: Any = None) -> None:
        self.parts = tuple(map(_safe, parts))
        super().__init__(*self.parts)
        first = self.parts[0] if self.parts else ""
        self.argument = first.name if argument is None and isinstance(first, Argument) else argument
        self.value = value

    def __str__(self) -> str:
        return self.worded(str)

    def worded(self, word: Callable[[Argument], str]) -> str:
        """The message, with `word` saying how each argument is called."""
        return "".join(part if isinstance(part, str) else word(part) for part in self.parts)


@contextmanager
def about(argument: str, value: Any, *kinds: type[PteeError]) -> Iterator[None]:
    """Errors of these kinds that name no argument are about this one, if it was given."""
    try:
        yield
    except kinds as why:
        if why.argument is None and value is not None:
            why.argument, why.value = argument, value if why.value is None else why.value
        raise


@contextmanager
def about_run(run: object) -> Iterator[None]:
    """Errors name this run where they say what to type about RUN."""
    try:
        yield
    except PteeError as why:
        why.parts = tuple(with_run(part, run) if isinstance(part, str) else part for part in why.parts)
        raise


class UnknownName(PteeError, KeyError):  # noqa: N818 - reads as the message does
    """A name that is not among the possible ones."""

    __str__ = PteeError.__str__  # KeyError would quote the text


class CutError(PteeError):
    """An exit cannot stand where it was asked for."""


class DataError(PteeError):
    """A data source that cannot be read as asked."""


class BackboneError(PteeError):
    """A model, its weights or its input that cannot be used."""


class RunError(PteeError):
    """A saved run that cannot be trusted, or does not fit the backbone."""


class DeviceError(PteeError):
    """A device that is not there."""


def ended_worker(error: BaseException, *more: str | Argument, given: Iterable[Any] = ()) -> DataError | None:
    """The error, with `more` at its end, in place of torch's that a process that loads images has ended; None for any other.

    torch raises its own in a signal handler, so it may come from any line while images are loaded. Among what was `given` to a function may be a loader
    of the user's own, which has its own number of processes.
    """
    found = ENDED_WORKER.match(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    why = "memory is short"
    if "signal" not in found[1]:
        why += ", or it cannot import your script (put its work under if __name__ == '__main__':) or a class of a notebook (put it into a .py file of its own)"
    fewer: Advice = (" Take fewer of them, or none (", Argument("num_workers", "0"), ").")
    if any(isinstance(n := getattr(data, "num_workers", 0), int) and n > 0 for data in given):
        fewer = (" Make the loader with fewer of them, or none: DataLoader(..., num_workers=0).",)
    return DataError(f"A process that loads images has ended ({found[1].strip()}): {why}.", *fewer, *more)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room. torch has a type of its own for NVIDIA's GPUs, and words for the CPU and Apple's GPUs."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_ROOM)


class Interrupted(KeyboardInterrupt):
    """The user ended a run. The message says what was saved until then.

    Attributes:
        history: of `ptee.train`, the epochs that are complete; else None.
    """

    def __init__(self, message: str, history: Any = None) -> None:
        super().__init__(message)
        self.history = history


def unknown(
    kind: str, name: str, choices: Iterable[str], *, first: Sequence[str] = (), argument: str | None = None
) -> UnknownName:
    """The error for a `kind` of thing that is not among `choices`; the rest is as in `possible`.

    >>> print(unknown("placement", "gold", ["fine", "golden", "linear"]))
    Unknown placement 'gold'. Did you mean 'golden'? Choices: fine, golden, linear.
    """
    text = f"Unknown {kind} {name!r:.200}.{possible(str(name), choices, first=first)}"
    return UnknownName(text, argument=argument, value=name)


def possible(name: str, choices: Iterable[str], *, first: Sequence[str] = (), most: int = 12) -> str:
    """Sentences that say what `name` could have been, each with a blank before it.

    If there are more than `most` choices, they are listed only if none is near. Those of `first` are always listed.
    """
    choices = [*first, *sorted(set(choices).difference(first))]
    if not choices:
        return ""
    near = _near(name, choices)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    if len(choices) <= most:
        return f"{hint} Choices: {', '.join(choices)}."
    if first or not near:
        hint += f" There are {len(choices)} choices, among them {', '.join(choices[: max(most, len(first))])}."
    return hint


def _near(name: str, choices: Sequence[str]) -> list[str]:
    """What is spelt like it but for case and _; else first the shortest choice that ends with _ or a point and the name, then those that begin with it, then those of similar spelling."""
    asked, spelt = _letters(name), {_letters(choice): choice for choice in reversed(choices)}
    for here in (called_here(name), ELSEWHERE.get(_letters(name.rpartition(".")[2]), "")):
        if here in choices:
            return [here]
    if asked in spelt:
        return [spelt[asked]]
    begin = sorted((c for c in spelt if asked and c.startswith(asked)), key=lambda c: (len(c), c))
    end = sorted(
        (_letters(c) for c in choices if c.lower().endswith(("_" + name.lower(), "." + name.lower()))), key=len
    )
    alike = get_close_matches(asked, spelt, n=NEAREST, cutoff=0.5)
    if alike:  # beside a slip of a letter, what is far from it is not meant
        alike = get_close_matches(asked, alike, n=NEAREST, cutoff=_likeness(asked, alike[0]) - FARTHER)
    return [spelt[c] for c in dict.fromkeys([*end[:1], *begin[:NEAREST], *alike])][:NEAREST]


def _likeness(asked: str, found: str) -> float:
    """As `get_close_matches` measures it: 1 for the same letters."""
    return SequenceMatcher(None, found, asked).ratio()


def called_here(name: str) -> str:
    """What ptee calls a setting that other libraries call so; the name itself where they agree.

    >>> called_here("learning_rate"), called_here("training.n_epochs"), called_here("lr")
    ('lr', 'training.epochs', 'lr')
    """
    section, point, setting = name.rpartition(".")
    return f"{section}{point}{ELSEWHERE.get(_letters(setting), setting)}"


def _letters(name: str) -> str:
    return name.lower().replace("_", "")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, with line breaks and the like as escapes, and how many more there are."""
    plain = [name if name.isprintable() else ascii(name)[1:-1] for name in names[:most]]
    return ", ".join(plain) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """The type of an exception and the first sentence of its message, with a full stop. Of a fault in YAML, what it is."""
    if problem := getattr(error, "problem", None):
        said = ", ".join(filter(None, (getattr(error, "context", None), problem)))
        return f"{said[:200].rstrip('.')}."
    lines = str(error).strip().splitlines()
    text = lines[0].split(". ")[0].strip()[:200].rstrip(".:!") if lines else ""
    return f"{type(error).__name__}: {text}." if text else f"{type(error).__name__}."


def in_line(error: BaseException) -> str:
    """Where in a YAML text an error is, with a blank before it; empty for other errors."""
    mark = getattr(error, "problem_mark", None)
    if "end of stream" in str(getattr(error, "problem", "")):
        mark = getattr(error, "context_mark", None) or mark  # where what has no end begins
    return "" if mark is None else f" in line {mark.line + 1}"


def warn(text: str) -> None:
    """Warn at the line of the caller's own code that called ptee, however deep in ptee it arises."""
    frame = sys._getframe()
    for level in count(1):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in WITHIN or frame.f_back is None:
            warnings.warn(text, stacklevel=level)
            return
        frame = frame.f_back
