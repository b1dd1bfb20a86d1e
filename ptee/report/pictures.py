"""A figure as a file: a still picture (PNG, SVG), which kaleido lets a Chrome draw, or a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ptee._common.errors import Argument, PteeError, first_line
from ptee._common.writing import PAGE, PICTURES, STILL, replace_files, require_name
from ptee.report.page import write
from ptee.report.parts import Part

WIDTH, SCALE = 900, 2  # pixels, and how many of a PNG's make one
INSTALL = "Install both: pip install 'kaleido>=1' && plotly_get_chrome"


def require_picture(path: Path) -> None:
    """Refuse a name that no figure can have, or a still picture where nothing can draw it."""
    require_name(path, PICTURES, "out", "a picture")
    if path.suffix.lower() in STILL:
        require_kaleido(Argument.text("out", f"{path.stem}{PAGE}"))


def require_kaleido(instead: Argument | None = None) -> None:
    """Refuse still pictures where nothing can draw them."""
    try:
        import kaleido  # noqa: F401 - Plotly imports it late, when everything was computed
    except ImportError as why:
        other = (" Or draw a page: ", instead, ".") if instead else (".",)
        raise PteeError(
            f"PNG and SVG are drawn by kaleido and Chrome, and kaleido is not installed. {INSTALL}", *other
        ) from why


def write_figure(figure: Any, path: Path, title: str) -> None:
    """Write one figure, whole or not at all."""
    if path.suffix.lower() == PAGE:
        write(title, [Part("figure", title, figures={"figure": figure})], path)
        return
    write_still(path.parent, {path.name: figure})


def write_figures(every: Iterable[Part], folder: Path) -> None:
    """Write the figures of a page's parts into a folder, each as SVG and as PNG."""
    drawn = {key: figure for part in every for key, figure in part.figures.items()}
    write_still(folder, {f"{key}{suffix}": figure for key, figure in drawn.items() for suffix in STILL})


def write_still(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write still pictures by file name: all of them, or on failure none."""
    from plotly.io import write_images

    named = {name: _on_white(figure) for name, figure in figures.items()}

    def draw(beside: Path) -> None:  # the first draws all: starting Chrome takes seconds
        where = [str(beside.parent / name) for name in named]
        layouts = [figure.layout for figure in named.values()]
        sizes = {"width": [own.width or WIDTH for own in layouts], "height": [own.height for own in layouts]}
        write_images(
            list(named.values()), where, **sizes, scale=[SCALE if n.lower().endswith(".png") else 1 for n in named]
        )

    first, *others = named
    try:
        replace_files(folder, {first: draw} | dict.fromkeys(others, _is_drawn))
    except (RuntimeError, ValueError) as why:  # of kaleido, where there is no Chrome, or it does not start
        if isinstance(why, PteeError):
            raise
        raise PteeError(f"Chrome, which draws PNG and SVG, does not run: {first_line(why)} {INSTALL}") from why


def _is_drawn(path: Path) -> None:
    if not path.is_file():
        raise RuntimeError(f"{path.name} was not written.")


def _on_white(figure: Any) -> Any:
    from plotly.graph_objects import Figure

    made = Figure(figure)
    made.update_layout(paper_bgcolor="white", plot_bgcolor="white", font_color="black")
    return made
