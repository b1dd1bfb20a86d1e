"""Progress of long work: a bar on a terminal, and a line every half minute in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 25.0
LINE = "{desc}: {n_fmt} of {total_fmt} done in {elapsed}, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} done in {elapsed}"


def with_bar(items: Iterable[Item], description: str, shown: bool = True) -> Any:
    """The items; how far one is with them can be seen meanwhile.

    On a terminal this is a bar, which goes away at the end. In a log it is a line every half minute, with an estimate of the
    time left; what takes less than that writes nothing.

    Args:
        items: what takes long.
        description: what is being done.
        shown: whether to show it.
    """
    if shown and not getattr(sys.stderr, "isatty", lambda: False)():
        return LogLines(items, description)
    total = length_hint(items, 0) or None
    return tqdm(_begun_once(items), total=total, desc=description, leave=False, disable=not shown)


def _begun_once(items: Iterable[Item]) -> Iterator[Item]:
    """tqdm.auto begins to iterate twice; a loader would draw another order, and start its processes, each time."""
    yield from items


class LogLines(Generic[Item]):
    """Iterates over items, and writes a line to standard error from time to time, also while one item takes long.

    Args:
        items: what takes long.
        description: what is being done.
        seconds: between two lines.
    """

    disable = True  # there is no bar to put figures on

    def __init__(self, items: Iterable[Item], description: str, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        self.items, self.description, self.seconds = items, description, seconds
        self.done, self.total = 0, length_hint(items, 0)

    def __iter__(self) -> Iterator[Item]:
        self.start, over = time.monotonic(), threading.Event()
        iterator = iter(self.items)  # a loader starts its processes here, which is no place for a second thread
        writer = threading.Thread(target=self._write_lines, args=(over,), daemon=True)
        writer.start()
        try:
            for item in iterator:
                yield item
                self.done += 1
        finally:
            over.set()
            writer.join()

    def line(self) -> str:
        """What there is to say now."""
        form = LINE if self.total else LINE_WITHOUT_TOTAL
        total: Any = self.total or None
        elapsed = time.monotonic() - self.start
        text: str = tqdm.format_meter(self.done, total, elapsed, prefix=self.description, bar_format=form)
        return text

    def _write_lines(self, over: threading.Event) -> None:
        while not over.wait(self.seconds):
            tqdm.write(self.line(), file=sys.stderr)
