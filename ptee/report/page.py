"""A page is one HTML file that needs nothing else: its figures are drawn by the plotly.js that it carries, compressed."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

from ptee import __version__
from ptee._common.writing import MADE_BY, write_text
from ptee.report.parts import Part, parts
from ptee.report.reported import Reported

BUNDLE = "plotly-basic.min.js.gz"  # plotly.js 4.1.1, bars and lines only: a third of the whole, and a third of a phone's time


def write_page(of: Reported, path: Path) -> list[Part]:
    """Write the page of a run. Gives its parts."""
    every = parts(of)
    write(f"{of.model.plan.backbone} with early exits" + f": {of.run}" * bool(of.run), every, path)
    return every


def write(title: str, every: Sequence[Part], path: Path) -> None:
    """Write a page of these parts, whole or not at all."""
    drawn = {key: json.loads(figure.to_json()) for part in every for key, figure in part.figures.items()}
    slider = next((asdict(part.slider) for part in every if part.slider), None)
    bundle = base64.b64encode((files("ptee.report") / BUNDLE).read_bytes()).decode() if drawn else ""
    made = f"{MADE_BY} {__version__} on {datetime.now(timezone.utc):%Y-%m-%d}. Everything is in this file; it asks for nothing from elsewhere."
    write_text(
        path, _template().render(title=title, parts=every, figures=drawn, slider=slider, plotly=bundle, made=made)
    )


def _template() -> Any:
    """The template of all pages. Whatever a run's names say is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("ptee", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return found.get_template("page.html")
