"""Make a large set of 32x32 images from CIFAR-10 by crops, mirrors and colours, in webdataset shards; the same seed, the same bytes.

python recipes/scripts/make_million.py ../shared/data/cifar10/train.tar OUT --images 1000000
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PAD = 4  # pixels by which a crop can move


def read_tar(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures (n, 32, 32, 3) uint8, labels (n,), and the names of the classes."""
    pictures, names = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                pictures.append(np.asarray(Image.open(tar.extractfile(member)).convert("RGB")))
                names.append(member.name.split("/")[-2])
    classes = sorted(set(names))
    return np.stack(pictures), np.array([classes.index(name) for name in names]), classes


def changed(picture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A crop of a picture (32, 32, 3), perhaps mirrored, in other colours."""
    top, left = random.integers(0, 2 * PAD + 1, 2)
    wide = np.pad(picture, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")[top : top + 32, left : left + 32]
    wide = wide[:, ::-1] if random.random() < 0.5 else wide
    gain, shift = random.uniform(0.85, 1.15, 3), random.uniform(-15, 15, 3)
    return (wide * gain + shift).clip(0, 255).astype(np.uint8)


def write_shard(path: Path, rows: np.ndarray, labels: np.ndarray, first: int, random: np.random.Generator) -> None:
    """Write pictures, each changed in its own way, and their labels as one shard, whole or not at all."""
    beside = path.with_suffix(".writing")
    with tarfile.open(beside, "w") as tar:
        for n, (picture, label) in enumerate(zip(rows, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(changed(picture, random)).save(png, "png", compress_level=1)
            for ending, content in (("png", png.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{first + n:08d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    beside.rename(path)


def main() -> None:
    """Read the arguments and write the shards that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tar", type=Path, help="CLASS/*.png of CIFAR-10 in one tar file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--per-shard", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    pictures, labels, _ = read_tar(o.tar)
    o.out.mkdir(parents=True, exist_ok=True)
    for first in range(0, o.images, o.per_shard):
        shard = first // o.per_shard
        path, random = o.out / f"shard-{shard:05d}.tar", np.random.default_rng([o.seed, shard])
        if not path.exists():
            drawn = random.integers(0, len(pictures), min(o.per_shard, o.images - first))
            write_shard(path, pictures[drawn], labels[drawn], first, random)


if __name__ == "__main__":
    main()
