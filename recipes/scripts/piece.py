"""A smaller copy of a folder of tar files: python recipes/scripts/piece.py FOLDER OUT --every 10

Every so manieth picture of train.tar is kept, in its order, so that all classes keep their shares. The other tar files are linked.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import click


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--every", type=click.IntRange(1), default=10, show_default=True)
def main(folder: Path, out: Path, every: int) -> None:
    """Write the piece."""
    out.mkdir(parents=True, exist_ok=True)
    for other in folder.glob("*.tar"):
        if other.name != "train.tar" and not (out / other.name).exists():
            (out / other.name).symlink_to(other.resolve())
    if not (out / "train.tar").exists():
        click.echo(f"{_copy(folder / 'train.tar', out / 'train.tar', every):,} training images in {out}")


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
