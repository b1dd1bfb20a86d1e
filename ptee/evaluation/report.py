"""The page of a comparison: accuracy against cost as a picture, and the table; one HTML file that needs no network."""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from ptee._common.errors import Argument, RunError
from ptee._common.files import replace_file, require_writable
from ptee.evaluation.comparison_table import Comparison, Entry, Line
from ptee.tuning.config import describe_thresholds

SUFFIX = ".html"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")  # of the lines of one run, in their order
SYMBOLS = {"adaptive": "circle", "cascade": "square", "static": "diamond", "truncation": "x", "oracle": "star"}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 1em }} pre {{ overflow-x: auto; font-size: 80% }}</style></head>
<body>
{figure}
<pre>{table}

{legend}</pre>
</body>
</html>
"""


def require_page(path: Path) -> None:
    """Refuse a file that cannot be written, or that a browser would not open as a page."""
    if path.suffix.lower() != SUFFIX:
        raise RunError(
            f"{path} is not the name of a page. Give a name that ends in {SUFFIX}, such as ", Argument("html", f"{path.stem}{SUFFIX}"), ".",
            argument="html", value=path,
        )  # fmt: skip
    if path.is_dir():
        raise RunError(
            f"{path} is a folder. Give a file, such as ", Argument("html", str(path / "curve.html")), ".", argument="html", value=path
        )  # fmt: skip
    require_writable(path.parent)


def write(comparison: Comparison, path: Path) -> None:
    """Write a comparison as a page: the picture, the table and its legend."""
    page = PAGE.format(
        title=html.escape(f"{comparison.backbone}: early exits"),
        figure=picture(comparison).to_html(full_html=False, include_plotlyjs=True),
        table=html.escape(str(comparison)),
        legend=html.escape(comparison.legend),
    )
    replace_file(path, lambda beside: beside.write_text(page, encoding="utf-8"))


def picture(comparison: Comparison) -> Any:
    """A plotly figure: cost and accuracy (without labels: fidelity) on the report images, a curve for each line."""
    from plotly import graph_objects
    from plotly.colors import qualitative

    runs = dict.fromkeys(line.of for line in comparison.lines)
    colours = dict(zip(runs, cycle(qualitative.T10), strict=False))
    bare = 1.0 if comparison.accuracy is None else comparison.accuracy
    figure = graph_objects.Figure()
    figure.add_hline(bare, line={"dash": "dot", "color": "black", "width": 1})
    figure.add_scatter(
        x=[1.0], y=[bare], name=_text(comparison.backbone), mode="markers",
        marker={"symbol": "cross", "size": 11, "color": "black"},
    )  # fmt: skip
    for lines, dash in _curves(comparison.lines):
        _add(figure, lines, bare, colours[lines[0].of], dash)
    measure = "fidelity" if comparison.accuracy is None else "accuracy"
    figure.update_layout(
        title={
            "text": f"{_text(comparison.backbone)}, {comparison.samples:,} images: {measure} and cost",
            "subtitle": {"text": "with 95 % intervals; click a line's name to hide it, double-click the picture to see all"},
        },
        template="plotly_white", height=640,
        xaxis={"title": f"cost: share of {_text(comparison.unit)}, heads included", "rangemode": "tozero"},
        yaxis={"title": measure, "range": _range(comparison, bare)}, hovermode="closest",
    )  # fmt: skip
    return figure


def _range(comparison: Comparison, bare: float) -> list[float]:
    """Of all lines but the cut-off backbones, which may lie so far below that everything else would be flat."""
    shown = [entry for line in comparison.lines if line.kind != "truncation" for entry in line.entries]
    ends = [bare - drop for entry in shown for drop in (entry.drop, *entry.interval)] + [bare]
    room = 0.1 * (max(ends) - min(ends)) + 0.002
    return [min(ends) - room, max(ends) + room]


def _curves(lines: tuple[Line, ...]) -> Iterator[tuple[list[Line], str]]:
    """Lines that are drawn as one curve, and its dash. The exits at which one run is cut off are one curve."""
    for of in dict.fromkeys(line.of for line in lines):
        own = [line for line in lines if line.of == of]
        others = [line for line in own if line.kind != "truncation"]
        yield from (([line], dash) for line, dash in zip(others, cycle(DASHES), strict=False))
        if cut_off := [line for line in own if line.kind == "truncation"]:
            yield cut_off, "dot"


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
    allowed = [] if entry.allowed is None else [f"allowed drop: {entry.allowed:g}" + ", missed" * entry.missed]
    thresholds = [] if entry.threshold is None else [f"T = {describe_thresholds(entry.threshold, entry.off)}"]
    return "<br>".join([_text(line.name), *allowed, entry.words, *thresholds])


def _text(words: str) -> str:
    """For plotly, which reads tags in its texts, but shows &quot; as it is."""
    return html.escape(words, quote=False)
