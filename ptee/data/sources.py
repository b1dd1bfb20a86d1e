"""From a data source to data sets: image folders, tar files, and data sets that have a name.

    source --open_data--> Data(train, calibration, validation)    heads learn on the first, thresholds are chosen on
                                                                  the second, results are reported on the third

A part that the source does not deliver is drawn from its training images, and `Data.split` records how. Opening decodes
no picture: each is read and decoded when it is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Subset

from ptee._common.errors import DataError
from ptee.data.demo_images import DEMO, fingerprint
from ptee.data.folders import LAYOUTS, PARTS, Listing, list_files
from ptee.data.named import is_prefixed, is_sided, list_named
from ptee.data.pictures import Pictures
from ptee.data.splits import FILES, Data, draw

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWN_PERCENT = 10  # of the training images, for each part that is not delivered
GIVE = "give a folder, 'digits' or the name of a data set of torchvision"
ALL = "all of them to report on"
AS_DELIVERED = "split as delivered"  # no image was drawn, whatever the seed
Key = tuple[str, str, str]


def open_data(
    source: str | Path,
    *,
    transform: Callable[[Image], Tensor],
    root: Path | None = None,
    seed: int = 0,
    report_only: bool = False,
    removed: Sequence[Key] = (),
) -> Data:
    """Open a data source and split it. Nothing is written; only a data set of the hub may be downloaded.

    Args:
        source: a folder (of `train/CLASS/*` and `val/CLASS/*`, of `CLASS/*`, or of train.tar, calibration.tar and
            validation.tar), "digits", a classification data set of torchvision, or timm's "hfds/NAME" for one of the Hugging
            Face hub. A folder goes before a name.
        transform: makes the tensor (c, h, w) of a picture; must be picklable where a loader has workers.
        root: the folder that holds torchvision's data set; the current one if not given.
        seed: which images are drawn for the parts that are not delivered: 10 % of the training images for each.
        report_only: images to report on are enough: validation images without training images, or a few in all.
        removed: keys of files that could not be read (`UnreadablePicturesError.keys`). Where they are missing now, the
            others are split, and the files are called the same, as if they were there.

    Raises:
        DataError: if the source cannot be read, has too few images, or its parts disagree on the classes.
        UnknownName: if it is neither a folder nor the name of a data set.
    """
    path = Path(source).expanduser()
    if str(source).strip() and path.is_dir():
        listing = list_files(path, report_only=report_only, removed=removed)
        return _split(listing, source, transform, seed, report_only)
    _refuse_path(source, path)
    return open_named(str(source), transform=transform, root=root, seed=seed)


def open_named(name: str, *, transform: Callable[[Image], Tensor], root: Path | None = None, seed: int = 0) -> Data:
    """Open a data set by its name as `open_data` does, whatever folders of that name there are.

    Raises:
        DataError: if it cannot be read.
        UnknownName: if there is no data set of that name.
    """
    return _split(list_named(name, root), name, transform, seed)


def _refuse_path(source: str | Path, path: Path) -> None:
    """What is no folder, and cannot be a name."""
    name = str(source)
    if not name.strip():
        raise DataError(f"The name of the data source is empty: {GIVE}.")
    if path.exists():
        raise DataError(f"'{name}' is a file, not a folder: give the folder around it, which should hold {LAYOUTS}.")
    if isinstance(source, Path) or name.startswith((".", "~")) or (os.sep in name and not is_prefixed(name)):
        raise DataError(f"Data folder '{name}' does not exist: {GIVE}.")


def _split(
    listing: Listing,
    source: str | Path,
    transform: Callable[[Image], Tensor],
    seed: int,
    report_only: bool = False,
) -> Data:
    pictures, rule = complete(dict(listing.parts), source, seed, report_only)
    split: dict[str, Any] = {"kind": listing.kind, "parts": listing.origin, "rule": rule, "seed": seed}
    is_files = listing.kind in FILES
    if is_files:
        split["files_sha256"] = _hash_of_names(listing)
    parts = {part: Pictures(pictures[part], transform, split.get("files_sha256")) for part in PARTS}
    if listing.kind == DEMO:
        split["pictures_sha256"] = fingerprint(listing)
    split["sizes"] = {part: len(parts[part]) for part in PARTS}
    if listing.not_read:
        split["not_read"] = list(listing.not_read)
    if is_files and (
        removed := [list(file.key) for rows in listing.parts.values() for file, _ in rows if not file.path]
    ):
        split["removed"] = removed
    mirror = is_files or not is_sided(str(source))
    return Data(**parts, class_names=listing.class_names, source=str(source), split=split, mirror=mirror)


def complete(
    delivered: dict[str, Any], source: str | Path, seed: int, report_only: bool = False
) -> tuple[dict[str, Any], str]:
    """All parts, missing ones drawn from the training images; and in words how.

    Args:
        delivered: the parts that there are, by name.
        source: what to call them in messages.
        seed: which images are drawn.
        report_only: images to report on are enough.

    Raises:
        DataError: if there are too few training images.
    """
    delivered = dict(delivered)
    missing = [part for part in PARTS if part not in delivered]
    if "train" in missing:
        return {part: delivered.get(part, []) for part in PARTS}, AS_DELIVERED
    if not missing:
        return delivered, AS_DELIVERED
    n, names = len(delivered["train"]), " and ".join(missing)
    if n <= len(missing):
        if report_only:
            return _without_draw(delivered)
        needed = f"at least {1 + len(missing)} are needed, as those for {names} are drawn from them"
        raise DataError(f"'{source}' has too few training images: it has {n}, and {needed}.")
    size = max(1, round(n * DRAWN_PERCENT / 100))
    drawn = dict(zip([*missing, "train"], draw(n, [size] * len(missing), seed), strict=True))
    parts = delivered | {part: _take(delivered["train"], places) for part, places in drawn.items()}
    each = "each " if len(missing) > 1 else ""
    return parts, f"{names}: {each}{DRAWN_PERCENT} % of the training images, drawn with seed {seed}"


def _without_draw(delivered: dict[str, Any]) -> tuple[dict[str, Any], str]:
    if "validation" in delivered:
        return delivered | {"calibration": []}, AS_DELIVERED
    return {"train": [], "calibration": delivered.get("calibration", []), "validation": delivered["train"]}, ALL


def _take(pictures: Any, places: list[int]) -> Any:
    return [pictures[i] for i in places] if isinstance(pictures, list) else Subset(pictures, places)


def _hash_of_names(listing: Listing) -> str:
    """Of part, name and class of every file: where it agrees, the same seed gives the same split."""
    lines = (f"{part}/{file.name}\t{label}\n" for part, files in listing.parts.items() for file, label in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
