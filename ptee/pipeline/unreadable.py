"""Pictures that could not be read are recorded in the run's folder.

Who removes them goes on with the same training: the others are split, and known, as if these were still there.
"""

from __future__ import annotations

import json
from pathlib import Path

from ptee._common.files import write_json
from ptee.data.pictures import Key, UnreadablePicturesError, check_pictures
from ptee.data.splits import Data
from ptee.model.saving import CHECKPOINT, is_run

FILE = "unreadable.json"


def recorded(out: Path) -> list[Key]:
    """Keys of the pictures that could not be read; none where the record is missing or damaged."""
    try:
        part_name_class = json.loads((out / FILE).read_text("utf-8"))
        return [(str(part), str(name), str(class_name)) for part, name, class_name in part_name_class]
    except (OSError, ValueError, TypeError):
        return []


def require_readable(data: Data, out: Path) -> None:
    """Read every picture, and record those that cannot be read.

    Args:
        data: as it was opened.
        out: the run's folder. A complete run in it is left as it is.

    Raises:
        UnreadablePicturesError: naming all of them.
    """
    try:
        check_pictures([data.train, data.calibration, data.validation])
    except UnreadablePicturesError as why:
        if is_run(out) and not (out / CHECKPOINT).is_file():
            raise
        known = [tuple(key) for key in data.split.get("removed", [])]
        write_json(out / FILE, sorted({*known, *why.keys}))
        raise


def forget(out: Path) -> None:
    """Remove the record."""
    (out / FILE).unlink(missing_ok=True)
