"""Draw a results.json as curve.svg beside it: python recipes/scripts/draw.py recipes/papers/results.json

Cost from left to right, what is lost from top to bottom; one line for each way to answer, one point for each allowed drop.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import click

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 860, 420, 70, 50, 60, 300
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#17becf",
           "#bcbd22", "#000000", "#aec7e8")  # fmt: skip


@click.command(help=__doc__)
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: Path) -> None:
    """Write the picture."""
    picture = results.with_name("curve.svg")
    picture.write_text(draw(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")
    click.echo(f"Drawn in {picture}")


def draw(found: dict[str, Any]) -> str:
    """The picture as SVG.

    Args:
        found: `title`, `loss` (what is lost, in words) and `lines`, each with a `name` and `entries` of `cost` and `lost`.
    """
    points = [entry for line in found["lines"] for entry in line["entries"]]
    low, high = min(0.0, *(p["lost"] for p in points)), max(p["lost"] for p in points)
    right, bottom = WIDTH - LEGEND, HEIGHT - BOTTOM

    def x(cost: float) -> float:
        return LEFT + cost * (right - LEFT)

    def y(lost: float) -> float:
        return TOP + (lost - low) / (high - low) * (bottom - TOP)

    parts = [
        _text(LEFT, 26, found["title"], 15),
        _text(LEFT, HEIGHT - 18, "cost, as a fraction of the bare backbone's"),
    ]
    parts.append(
        f'<text x="18" y="{bottom}" font-size="12" transform="rotate(-90 18 {bottom})">{escape(found["loss"])}</text>'
    )
    for cost in (0, 0.2, 0.4, 0.6, 0.8, 1):
        parts += [_rule(x(cost), TOP, x(cost), bottom), _text(x(cost) - 8, bottom + 18, f"{cost:g}")]
    for n in range(5):
        lost = low + n * (high - low) / 4
        parts += [_rule(LEFT, y(lost), right, y(lost)), _text(LEFT - 36, y(lost) + 4, f"{100 * lost:.1f}")]
    for n, line in enumerate(found["lines"]):
        colour = COLOURS[n % len(COLOURS)]
        at = [(x(entry["cost"]), y(entry["lost"])) for entry in line["entries"]]
        way = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>' for a, b in at]
        parts.append(f'<circle cx="{right + 20}" cy="{TOP + 22 * n}" r="5" fill="{colour}"/>')
        parts.append(_text(right + 32, TOP + 22 * n + 4, line["name"]))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(x: float, y: float, words: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(words)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


if __name__ == "__main__":
    main()
