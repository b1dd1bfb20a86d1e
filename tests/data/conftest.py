"""The same images in a folder and in tar files."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import numbered, write_folder, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty training and six validation images of two classes."""
    write_folder(tmp_path / "images" / "train", numbered(20))
    write_folder(tmp_path / "images" / "val", numbered(6))
    return tmp_path / "images"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """The same as tar files."""
    write_tar(tmp_path / "tars" / "train.tar", numbered(20))
    write_tar(tmp_path / "tars" / "validation.tar", numbered(6))
    return tmp_path / "tars"
