"""Tables for people: aligned columns of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str]], left: Collection[int] = ()) -> str:
    """Align columns; the first row is the title.

    Args:
        rows: cells, as many in each row.
        left: columns to align to the left; numbers go to the right.

    >>> print(table([("exit", "cost"), ("a", "0.2"), ("bcd", "1.0")], left={0}))
    exit  cost
    ----------
    a      0.2
    bcd    1.0
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)))
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])
