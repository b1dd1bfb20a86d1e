"""Pictures that tests write, and the data sets that are made of them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from device import here
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ptee.data.pictures import image_transform
from ptee.data.sources import open_data
from ptee.data.splits import Data

TRANSFORM = image_transform((3, 8, 8), (0.0,), (1.0,))
PARTS = ("train", "calibration", "validation")


def picture(level: int = 0, mode: str = "L", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, level).convert(mode)


def encoded(level: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(level).save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, names: Iterable[str]) -> Path:
    """Pictures as `names` says, each of its own grey level; a name that ends with a slash is an empty folder."""
    for level, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).write_bytes(encoded(level))
    return folder


def write_tar(path: Path, names: Iterable[str]) -> Path:
    """The same as a tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for level, name in enumerate(names):
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            member.size = 0 if member.isdir() else len(encoded(level))
            tar.addfile(member, io.BytesIO(encoded(level)))
    return path


def numbered(n: int, classes: str = "ab") -> list[str]:
    return [f"{classes[i % len(classes)]}/{i:03}.png" for i in range(n)]


def levels(dataset: Dataset) -> list[int]:
    """Which pictures a data set holds, in its order."""
    return [round(float(dataset[i][0].max()) * 255) for i in range(len(dataset))]  # type: ignore[arg-type]


def rows(data: Data) -> dict[str, list[int]]:
    return {part: levels(getattr(data, part)) for part in PARTS}


def opened(source: Path | str, **more) -> Data:
    return open_data(source, transform=TRANSFORM, **more)


def first_images(file: tarfile.TarFile, count: int) -> tuple[Tensor, Tensor]:
    """So many pictures spread evenly over a tar of class/name.jpg, as (n, 3, 32, 32) in 0..1, and their labels."""
    members = sorted((m for m in file.getmembers() if m.isfile()), key=lambda m: m.name)
    classes = sorted({m.name.split("/")[-2] for m in members})
    members = members[:: len(members) // count][:count]
    read = [Image.open(io.BytesIO(file.extractfile(m).read())).convert("RGB") for m in members]
    x = torch.from_numpy(np.stack([np.asarray(image) for image in read])).permute(0, 3, 1, 2) / 255
    return x.to(here()), torch.tensor([classes.index(m.name.split("/")[-2]) for m in members])


class Oracle(nn.Module):
    """Knows the class from the grey level: images of class i of `order` have the level i."""

    def __init__(self, level_to_class: list[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(len(level_to_class))[level_to_class])

    def forward(self, x: Tensor) -> Tensor:
        return self.table[(x[:, 0, 0, 0] * 255).round().long()]
