"""Text for people: tables of aligned columns, thresholds, and text that is safe to print."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# advice to type, on the command line or in Python
ABOUT_RUN = re.compile(r"\b(ptee [a-z]+ )RUN\b|\b((?:load|save_pretrained)\()RUN\b")
NO_UTF8 = re.compile(r"[\ud800-\udfff]")  # how Python reads the bytes of a file's name that are not UTF-8


class Readable:
    """What prints as a text for people. As the last line of a notebook's cell it shows that text, too."""

    def __init_subclass__(cls, **how: Any) -> None:
        """IPython looks at one class after another, and a dataclass has a `__repr__` of its own. So each gets this, too."""
        super().__init_subclass__(**how)
        cls._repr_pretty_ = Readable._repr_pretty_  # type: ignore[method-assign]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython calls, with a printer that takes the text."""
        printer.text(str(self))


def table(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Align columns under the title in the first row: to the right, or to the left for the columns named in `left`.

    >>> print(table([("exit", "cost"), ("a", "0.2"), ("bcd", "1.0")], left={0}))
    exit  cost
    ----------
    a      0.2
    bcd    1.0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)))
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])


VERBS = {"": "", "is": " are", "does": " do"}  # as they follow several things


def number_of(n: int, what: str, verb: str = "", *, which: str = "") -> str:
    """So many things of a kind; `which` says more of them, and a verb may follow.

    >>> number_of(1, "image"), number_of(2000, "image"), number_of(3, "class")
    ('1 image', '2,000 images', '3 classes')
    >>> number_of(1, "image", "is"), number_of(5, "other image", "is", which=" with labels")
    ('1 image is', '5 other images with labels are')
    """
    several = what + ("es" if what.endswith("s") else "s")
    return f"{n:,} {what}{which} {verb}".rstrip() if n == 1 else f"{n:,} {several}{which}{VERBS[verb]}"


def or_dash(value: float | None, form: str, unit: str = "") -> str:
    """A number in a table; a dash where there is none.

    >>> or_dash(0.75, ".1%"), or_dash(1.5, ".2f", "x"), or_dash(None, ".4f")
    ('75.0%', '1.50x', '-')
    """
    return "-" if value is None else format(value, form) + unit


def percent(share: float, digits: int = 1) -> str:
    """A share in per cent. Only none and all are 0 and 100 %; what would be rounded to them is said to be less, or more.

    >>> percent(0.25), percent(0.9996), percent(0.9996, 2), percent(0.001, 0), percent(1)
    ('25.0%', '>99.9%', '99.96%', '<1%', '100.0%')
    """
    share = round(share, 9) + 0.0  # a difference may be none but for rounding; + 0.0 takes its minus off
    least = 10 ** -(digits + 2)
    text = f"{share:.{digits}%}"
    if 0 < share < 1 and float(text[:-1]) in (0, 100):
        return f"<{least:.{digits}%}" if share < least else f">{1 - least:.{digits}%}"
    return text


def beside(value: float, limit: float, digits: int = 4) -> str:
    """A number with so many digits that it is seen on which side of a limit it is.

    >>> beside(0.49, 0.5), beside(0.50002, 0.5)
    ('0.4900', '0.50002')
    """
    value = round(value, 9)  # as near as this it is the limit
    text = f"{value:.{digits}f}"
    hides = (float(text) > limit) != (value > limit)
    return beside(value, limit, digits + 1) if hides and digits < 16 else text


def threshold_words(threshold: Sequence[float], off: Sequence[int] = ()) -> list[str]:
    """T of each exit for a person to read. off: no image leaves there, and its head does not run; never: no image does, but it runs."""
    return ["off" if n in off else "never" if t > 1 else f"{t:.4g}" for n, t in enumerate(threshold)]


def describe_thresholds(threshold: Sequence[float], off: Sequence[int] = ()) -> str:
    """The same in one text; one word if all are the same.

    >>> describe_thresholds([0.9, 2.0, 0.8], off=[1]), describe_thresholds([0.9, 2.0, 0.8])
    ('0.9, off, 0.8', '0.9, never, 0.8')
    """
    words = threshold_words(threshold, off)
    return words[0] if len(set(words)) == 1 else ", ".join(words)


def as_shares(values: Sequence[object]) -> str:
    """Percentages as the shares that were meant, as they are typed; empty if these are none.

    >>> as_shares(["30%", "60%"]), as_shares([30, 60]), as_shares([0.3, 60])
    ('0.3,0.6', '0.3,0.6', '0.3,0.6')
    >>> as_shares(["layer1"]), as_shares([0.3]), as_shares([1000])
    ('', '', '')
    """
    shares = [_share(value) for value in values]
    if any(share is None for share in shares) or shares == [*values]:
        return ""
    return ",".join(f"{share:g}" for share in shares)


def _share(value: object) -> float | None:
    """What is meant by a share or a percentage; None by anything else."""
    percent = isinstance(value, str) and value.strip().endswith("%")
    try:
        number = float(str(value).strip().removesuffix("%")) if percent else value
    except ValueError:
        return None
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= 100:
        return None
    return number / 100 if percent or number >= 1 else number


def shown(value: object, most: int = 60) -> str:
    """A value in a message: its first letters, in one line; of what prints in several lines, as a module does, the type.

    >>> shown("resnet50"), shown([1, 2]), shown(type("Net", (), {"__repr__": lambda self: "Net(\\n)"})())
    ("'resnet50'", '[1, 2]', 'Net(...)')
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of thousands of digits"
    text = f"{type(value).__name__}(...)" if "\n" in text else text
    return text if len(text) <= most else f"{text[:most]}..."


def quoted(word: object) -> str:
    """A word as a shell takes it: in quotes if it has a blank in it, or anything else that a shell reads.

    >>> quoted("runs/r50"), quoted("my runs/r50")
    ('runs/r50', "'my runs/r50'")
    """
    return shlex.quote(str(word))


def with_run(text: str, run: object) -> str:
    """A text in which advice to type something about RUN has the name of the run that it is about.

    >>> with_run("Tune again: ptee tune RUN --max-drop 0.01", "my run")
    "Tune again: ptee tune 'my run' --max-drop 0.01"
    """
    return ABOUT_RUN.sub(lambda found: f"{found[1]}{quoted(run)}" if found[1] else f"{found[2]}{str(run)!r}", text)


def one_line(text: str) -> str:
    """A text without line breaks, tabs and what stands around them. Blanks, as in a path, stay.

    >>> one_line("a  b.pth is\\n   no file.\\n")
    'a  b.pth is no file.'
    """
    return re.sub(r"\s*[^\S ]\s*", " ", text.strip())


def printable(text: str) -> str:
    """A text without characters that steer a terminal: escapes and marks that turn the direction. Line breaks and tabs stay.

    >>> printable("a\\x1b[2Jb")
    'a[2Jb'
    """
    return STEERING.sub("", text)


def escaped(text: str) -> str:
    """A text with escapes for bytes that are not UTF-8, which names of files may have and JSON may not.

    >>> escaped("a\\udcff")
    'a\\\\xff'
    """
    return NO_UTF8.sub(lambda byte: f"\\x{ord(byte[0]) & 0xFF:02x}", text)


def spelt(name: str) -> str:
    """A name in one of the ways in which Unicode can write an accent: a file and a folder may differ in that."""
    return unicodedata.normalize("NFC", name)


def type_name(kind: object) -> str:
    """What torch's number types and layouts are called without torch.

    >>> type_name("torch.float32")
    'float32'
    """
    return str(kind).removeprefix("torch.")
