"""Progress of long work: a bar on a terminal; in a log a line after ten seconds, and then one every half minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import length_hint
from typing import Any, Generic, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Log = Callable[[str], None]  # gets the messages to the user
SECONDS_TO_FIRST_LINE, SECONDS_BETWEEN_LINES = 10.0, 25.0
LINE = "{desc}: {n_fmt} of {total_fmt} done in {elapsed}, {remaining} left"
LINE_AT_FIRST = "{desc}: {n_fmt} of {total_fmt} done in {elapsed}"  # while it is not known how long one thing takes
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} done in {elapsed}"


def silent(text: str) -> None:
    """A log that nobody reads."""


def _on_a_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def with_bar(items: Iterable[Item], description: str, shown: bool = True) -> Any:
    """The items, with their progress shown meanwhile: as a bar on a terminal, as a line every half minute in a log."""
    if shown and not _on_a_terminal():
        return LogLines(items, description)
    total = length_hint(items, 0) or None
    return tqdm(items, total=total, desc=description, leave=False, disable=not shown)


@contextmanager
def counted(description: str) -> Iterator[Callable[[int], object]]:
    """Gives what is called with the number of things that are done by now: a bar on a terminal, a line every half minute in a log."""
    if _on_a_terminal():
        with tqdm(desc=description, unit="", leave=False) as bar:
            yield bar.update
        return
    lines: LogLines[object] = LogLines((), description)
    with lines.written():
        yield lines.add


class LogLines(Generic[Item]):
    """Iterates over items, and writes a line to standard error from time to time, even while one item takes long."""

    disable = True  # there is no bar to put figures on

    def __init__(self, items: Iterable[Item], description: str, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self.items, self.description, self.seconds = items, description, seconds
        self.done, self.total = 0, length_hint(items, 0)

    def __iter__(self) -> Iterator[Item]:
        iterator = iter(self.items)  # a loader starts its processes here, which is no place for a second thread
        with self.written():
            for item in iterator:
                yield item
                self.add(1)

    def add(self, number: int) -> None:
        """So many more are done."""
        self.done += number

    @contextmanager
    def written(self) -> Iterator[None]:
        """Meanwhile lines are written."""
        self.start, over = time.monotonic(), threading.Event()
        writer = threading.Thread(target=self._write_lines, args=(over,), daemon=True)
        try:
            writer.start()
            yield
        finally:
            over.set()
            if writer.ident is not None:  # else Ctrl-C came before it began
                writer.join()

    def _write_lines(self, over: threading.Event) -> None:
        total: Any = self.total or None
        wait = min(self.seconds, SECONDS_TO_FIRST_LINE)
        while not over.wait(wait):
            wait = self.seconds
            form = (LINE if self.done else LINE_AT_FIRST) if self.total else LINE_WITHOUT_TOTAL
            elapsed = time.monotonic() - self.start
            line = tqdm.format_meter(self.done, total, elapsed, prefix=self.description, bar_format=form)
            with suppress(ValueError, OSError):  # it may be closed
                if sys.stderr is not None:
                    tqdm.write(line, file=sys.stderr)
