"""Draw some canvases of the demo, a row for each level of hardness: python recipes/scripts/canvases.py recipes/digits/canvases.png"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image

from ptee.data.demo_images import LEVELS, SIDE, demo_listing, hardness_of

EACH, SCALE, GAP = 10, 2, 4


@click.command(help=__doc__)
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
def main(picture: Path) -> None:
    """Write the picture."""
    canvases = demo_listing().parts["validation"]
    step = SIDE * SCALE + GAP
    sheet = Image.new("L", (EACH * step + GAP, len(LEVELS) * step + GAP), 255)
    for row, level in enumerate(LEVELS):
        of_level = [canvas for n, (canvas, _) in enumerate(canvases) if hardness_of(n) is level]
        for column, canvas in enumerate(of_level[:EACH]):
            sheet.paste(canvas.resize((SIDE * SCALE,) * 2), (GAP + column * step, GAP + row * step))
    sheet.save(picture, optimize=True)
    click.echo(f"Drawn in {picture}: {', '.join(f'{level.name} ({level.share:.0%})' for level in LEVELS)}.")


if __name__ == "__main__":
    main()
