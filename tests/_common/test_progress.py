from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator

import pytest

from ptee._common.progress import LogLines, with_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Log(io.StringIO):
    """Tells when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        done = super().write(text)
        self.written.set()
        return done


class Slow:
    """Four items, of which the second one takes until a line is written."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        yield 0
        self.log.written.clear()
        assert self.log.written.wait(60)
        yield from (1, 2, 3)


def test_a_log_gets_lines_even_while_one_item_takes_long(monkeypatch):
    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    assert list(LogLines(Slow(log), "reading images", seconds=0.05)) == [0, 1, 2, 3]
    lines = log.getvalue().splitlines()
    assert lines[-1].startswith("reading images: 1 of 4 done in ")
    assert lines[-1].endswith(" left")


def test_before_the_first_item_is_done_no_line_tells_of_time_that_is_left(monkeypatch):
    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    lines = LogLines(range(2), "measuring speed", seconds=0.05)
    with lines.written():
        assert log.written.wait(60)
    line = log.getvalue().splitlines()[0]
    assert line.startswith("measuring speed: 0 of 2 done in ")
    assert "left" not in line


def test_the_first_line_in_a_log_comes_sooner_than_the_next(monkeypatch):
    waited: list[float] = []

    class Over:
        def wait(self, seconds: float) -> bool:
            waited.append(seconds)
            return len(waited) > 2

    monkeypatch.setattr(sys, "stderr", Log())
    lines = LogLines(range(2), "reading images")
    lines.start = 0.0
    lines._write_lines(Over())
    assert waited == [10.0, 25.0, 25.0]


def test_no_line_is_written_after_the_end():
    before = threading.active_count()
    for _ in LogLines(range(2), "reading images", seconds=0.01):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


class Counting:
    """Counts how often somebody begins to iterate."""

    def __init__(self) -> None:
        self.begun = 0

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        return iter(range(3))


@pytest.mark.parametrize(("file", "written"), [(Terminal, "reading images: "), (Log, "")], ids=["terminal", "log"])
@pytest.mark.parametrize("shown", [True, False])
def test_only_a_terminal_shows_a_bar_and_a_loader_begins_once(file, written, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", file())
    items = Counting()
    assert list(with_bar(items, "reading images", shown)) == [0, 1, 2]
    assert items.begun == 1, "or it would draw another order"
    assert sys.stderr.getvalue().strip("\r").startswith(written if shown else "")
    assert shown or not sys.stderr.getvalue()


class Closed(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.close()


@pytest.mark.parametrize("stderr", [Closed(), None], ids=["closed", "none"])
def test_where_nobody_can_read_lines_the_work_goes_on(stderr, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(with_bar(range(3), "reading images")) == [0, 1, 2]
    over = threading.Event()
    lines = LogLines(range(2), "reading images", seconds=0.01)
    lines.start = 0.0
    monkeypatch.setattr(over, "wait", lambda _, seen=[]: seen.append(1) or len(seen) > 1)
    lines._write_lines(over)
    assert not capsys.readouterr().out


def test_no_thread_is_left_where_it_is_interrupted_as_it_begins(monkeypatch):
    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    monkeypatch.setattr(threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(LogLines(range(2), "reading images"))
    assert not any(isinstance(thread, Interrupted) for thread in threading.enumerate())
