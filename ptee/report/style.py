"""How every figure looks: colours that the colour-blind tell apart, marks that are told apart in grey, room for a phone."""

from __future__ import annotations

import html
from typing import Any

COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C6BB1",
    "#999933",
)  # Okabe and Ito; two more
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star")
RIGHT, WRONG = (
    {"color": COLOURS[0]},
    {"color": COLOURS[1], "pattern": {"shape": "/", "bgcolor": COLOURS[1], "fgcolor": "#4d3000", "size": 6}},
)
NEUTRAL = "#808080"  # seen on white and on black
GRID = "rgba(128,128,128,0.25)"
HEIGHT = 440


def figure(x: str, y: str, **layout: Any) -> Any:
    """An empty Plotly figure with titles of its axes; `layout` as of `update_layout`."""
    from plotly import graph_objects

    made = graph_objects.Figure()
    finish(made, **{"height": HEIGHT} | layout)
    made.update_xaxes(title=x)
    made.update_yaxes(title=y)
    return made


def finish(made: Any, **layout: Any) -> None:
    """Give a figure the look of all figures."""
    made.update_layout(
        template="none", font={"family": "system-ui, sans-serif", "size": 13}, hovermode="closest",
        margin={"l": 60, "r": 12, "t": 24, "b": 56}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"}, legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
    )  # fmt: skip
    made.update_layout(**layout)
    made.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    made.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True, ticklabelstandoff=4)


def text(words: str) -> str:
    """For Plotly, which reads tags in its texts, but shows &quot; as it is."""
    return html.escape(words, quote=False)


def short(name: str, most: int = 28) -> str:
    """A name that fits beside an axis."""
    return text(name if len(name) <= most else f"{name[: most - 1]}…")


def mark(n: int) -> dict[str, Any]:
    """Colour, dash and symbol of the n-th line of a figure."""
    return {
        "line": {"color": COLOURS[n % len(COLOURS)], "dash": DASHES[n % len(DASHES)], "width": 2},
        "marker": {"symbol": MARKERS[n % len(MARKERS)], "size": 8, "color": COLOURS[n % len(COLOURS)]},
    }
