"""A smaller copy of a folder of tar files: python recipes/scripts/piece.py FOLDER OUT --every 10 --report 4

By name, every tenth picture of train.tar is kept and every fourth of the other tar files, so that all classes keep their shares.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import click


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--every", type=click.IntRange(1), default=10, show_default=True)
@click.option("--report", type=click.IntRange(1), default=1, show_default=True)
def main(folder: Path, out: Path, every: int, report: int) -> None:
    """Write the piece. Files that are there already are kept."""
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(folder.glob("*.tar")):
        if not (out / source.name).exists():
            kept = _copy(source, out / source.name, every if source.name == "train.tar" else report)
            click.echo(f"{kept:,} images in {out / source.name}")


def _copy(source: Path, target: Path, every: int) -> int:
    """The number of pictures copied."""
    unfinished = target.with_suffix(".part")
    with tarfile.open(source) as read, tarfile.open(unfinished, "w") as write:
        pictures = sorted((member for member in read if member.isfile()), key=lambda member: member.name)[::every]
        for member in pictures:
            write.addfile(member, read.extractfile(member))
    unfinished.rename(target)
    return len(pictures)


if __name__ == "__main__":
    main()
