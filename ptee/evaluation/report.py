"""The picture of a comparison: cost against what is left of the accuracy, in one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from ptee._common.errors import RunError
from ptee._common.files import replace_file, require_writable
from ptee.evaluation.comparison_table import Comparison, Entry, Line

SUFFIX = ".html"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")  # ways to use one run, in their order
SYMBOLS = {"adaptive": "circle", "cascade": "square", "static": "diamond", "truncation": "x", "oracle": "star"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 1em }} pre {{ overflow-x: auto; font-size: 80% }}</style></head>
<body>
{figure}
<pre>{table}</pre>
</body>
</html>
"""


def require_page(path: Path) -> None:
    """Refuse a file that could not be written, or would not be opened as a page.

    Raises:
        RunError: saying what to give instead.
    """
    if path.suffix.lower() != SUFFIX:
        raise RunError(f"The picture {path} is a page: give a name that ends in {SUFFIX}, such as {path.stem}{SUFFIX}.")
    if path.is_dir():
        raise RunError(f"{path} is a folder. Give a file, such as {path / 'curve.html'}.")
    require_writable(path.parent)


def write(found: Comparison, path: Path) -> None:
    """Write a comparison as a page: the picture, and the table with its words below.

    Args:
        found: what was compared.
        path: of the page.

    Raises:
        RunError: if it cannot be written.
    """
    figure = picture(found).to_html(full_html=False, include_plotlyjs=True)
    page = PAGE.format(
        title=html.escape(f"{found.backbone}: early exits"), figure=figure, table=html.escape(str(found))
    )
    replace_file(path, lambda beside: beside.write_text(page, encoding="utf-8"))


def picture(found: Comparison) -> Any:
    """A plotly figure: each way to answer by what it costs and how often it is right on the report images.

    Args:
        found: what was compared.
    """
    from plotly import graph_objects
    from plotly.colors import qualitative

    of = dict.fromkeys(line.of for line in found.lines)
    colours = dict(zip(of, cycle(qualitative.T10), strict=False))
    bare = 1.0 if found.accuracy is None else found.accuracy
    figure = graph_objects.Figure()
    figure.add_hline(bare, line={"dash": "dot", "color": "black", "width": 1})
    figure.add_scatter(
        x=[1.0],
        y=[bare],
        name=_text(found.backbone),
        mode="markers",
        marker={"symbol": "cross", "size": 11, "color": "black"},
    )
    for lines, dash in _traces(found.lines):
        _add(figure, lines, bare, colours[lines[0].of], dash)
    measure = "fidelity" if found.accuracy is None else "accuracy"
    figure.update_layout(
        title={
            "text": f"{_text(found.backbone)}, {found.samples:,} images: {measure} and cost",
            "subtitle": {"text": "with 95 % intervals; a double click shows all, a click in the legend hides a line"},
        },
        template="plotly_white", height=640,
        xaxis={"title": "cost: multiply-accumulates over the bare backbone's, heads included", "rangemode": "tozero"},
        yaxis={"title": measure, "range": _range(found, bare)}, hovermode="closest",
    )  # fmt: skip
    return figure


def _range(found: Comparison, bare: float) -> list[float]:
    """Of what is asked about; a place to cut off may lie far below, and there the page is zoomed out by a double click."""
    aside = [entry for line in found.lines if line.kind != "truncation" for entry in line.entries]
    ends = [bare - loss for entry in aside for loss in (entry.drop, *entry.interval)] + [bare]
    room = 0.1 * (max(ends) - min(ends)) + 0.002
    return [min(ends) - room, max(ends) + room]


def _traces(lines: tuple[Line, ...]) -> Iterator[tuple[list[Line], str]]:
    """Lines that are drawn as one, and how: all places to cut a run off are one; each other way has a dash of its own."""
    for of in dict.fromkeys(line.of for line in lines):
        own = [line for line in lines if line.of == of]
        ways = [line for line in own if line.kind != "truncation"]
        yield from (([line], dash) for line, dash in zip(ways, cycle(DASHES), strict=False))
        if places := [line for line in own if line.kind == "truncation"]:
            yield places, "dot"


def _add(figure: Any, lines: list[Line], bare: float, colour: str, dash: str) -> None:
    points = [(line, entry) for line in lines for entry in line.entries]
    kind = lines[0].kind
    name = f"{lines[0].of}, truncation" if kind == "truncation" else lines[0].name
    figure.add_scatter(
        x=[entry.cost for _, entry in points], y=[bare - entry.drop for _, entry in points],
        error_y={
            "array": [entry.drop - entry.interval[0] for _, entry in points],
            "arrayminus": [entry.interval[1] - entry.drop for _, entry in points],
            "symmetric": False, "thickness": 0.6, "width": 2,
        },
        mode="lines+markers" if len(points) > 1 else "markers", line={"color": colour, "dash": dash},
        marker={"symbol": SYMBOLS[kind], "size": 9}, name=_text(name), hoverinfo="text",
        hovertext=[_words(line, entry) for line, entry in points],
    )  # fmt: skip


def _words(line: Line, entry: Entry) -> str:
    asked = "" if entry.allowed is None else f"allowed to lose {entry.allowed:g}<br>"
    walls = "" if entry.threshold is None else f"<br>T = {', '.join(f'{t:.4g}' for t in entry.threshold)}"
    off = f"<br>off: exit {', '.join(map(str, entry.off))}" if entry.off and entry.threshold else ""
    return f"{_text(line.name)}<br>{asked}cost {entry.words}{walls}{off}"


def _text(words: str) -> str:
    """For plotly, which reads tags in what it draws, but would show &quot; as it is."""
    return html.escape(words, quote=False)
