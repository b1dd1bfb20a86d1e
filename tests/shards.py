"""Webdataset shards of small pictures of noise, and what reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int) -> bytes:
    """An encoded picture of noise."""
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def shard(path: Path, numbers: range, damaged: tuple[int, ...] = (), labelled: int = 10**9) -> Path:
    """A webdataset shard of pictures with these numbers, each of class number % 10; from `labelled` on of none."""
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            for ending, content in (
                ("png", b"no picture" if n in damaged else picture(n)),
                ("cls", str(n % 10).encode() if n < labelled else b""),
            ):
                member = tarfile.TarInfo(f"{n:05d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
