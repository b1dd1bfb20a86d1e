"""From a data source to data sets: image folders, tar files, and data sets that have a name.

    source --open_data--> Data(train, calibration, validation)

A part that the source does not deliver is drawn from its training images, and `Data.split` records how. Opening decodes
no picture: each is decoded when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ptee._common.errors import Argument, DataError
from ptee._common.files import expanded, require_utf8
from ptee._common.listing import require_place
from ptee._common.text import NO_UTF8, escaped
from ptee.data.demo_images import DEMO, fingerprint
from ptee.data.folders import Listing, list_files
from ptee.data.named import is_sided, list_named, require_name
from ptee.data.pictures import Key, Pictures, sample_of
from ptee.data.splits import FILES, PARTS, Data, complete

if TYPE_CHECKING:
    from PIL.Image import Image


def open_data(
    source: str | Path,
    *,
    transform: Callable[[Image], Tensor],
    root: Path | None = None,
    seed: int = 0,
    report_only: bool = False,
    removed: Sequence[Key] = (),
) -> Data:
    """Open a data source and split it. Nothing is written. Only a data set of the hub may be downloaded.

    Args:
        source: a folder (of `train/CLASS/*` and `val/CLASS/*`, of `CLASS/*`, or of train.tar, calibration.tar and
            validation.tar), or else a name: "digits", "demo", a classification data set of torchvision, or timm's
            "hfds/NAME" for one of the Hugging Face hub.
        transform: makes the tensor (c, h, w) of a picture; picklable if a loader has workers.
        root: the folder that holds torchvision's data set; by default the current one.
        seed: draws the images of parts that are not delivered, 10 % of the training images for each.
        report_only: accept validation images without training images, or a few images in all.
        removed: keys of pictures that could not be read (`UnreadablePicturesError.keys`). Where they are missing now, the
            others are split as if they were there.

    Raises:
        DataError: if the source cannot be read, has too few images, or its parts disagree on the classes.
        UnknownName: if it is neither a folder nor the name of a data set.
    """
    if require_place(source):
        path = expanded(source)
        listing = list_files(path, report_only=report_only, removed=removed)
        return _split(listing, source, transform, seed, report_only)
    return open_named(str(source), transform=transform, root=root, seed=seed)


def open_named(name: str, *, transform: Callable[[Image], Tensor], root: Path | None = None, seed: int = 0) -> Data:
    """The same for a name, even if there is a folder of that name."""
    return _split(list_named(name, root, seed), name, transform, seed)


def require_source(source: str) -> None:
    """Refuse what is neither a folder nor the name of a data set. Nothing is read."""
    if not require_place(source):
        require_name(source)


def _split(
    listing: Listing, source: str | Path, transform: Callable[[Image], Tensor], seed: int, report_only: bool = False
) -> Data:
    _require_recordable(listing)
    rows, rule = complete(listing.parts, source, seed, report_only)
    is_files = listing.kind in FILES
    files = _hash_of_names(listing) if is_files else None
    parts = {part: Pictures(rows[part], transform, files) for part in PARTS}
    split: dict[str, Any] = {"kind": listing.kind, "parts": listing.origin, "rule": rule, "seed": seed}
    if is_files:
        split["files_sha256"] = files
        split["train_sample"] = " ".join(sample_of(parts["train"].files))
    if listing.kind == DEMO:
        split["pictures_sha256"] = fingerprint(listing)
    split["sizes"] = {part: len(pictures) for part, pictures in parts.items()}
    if listing.not_read:
        split["not_read"] = [escaped(words) for words in listing.not_read]
    if listing.all_read:
        split["all_read"] = escaped(listing.all_read)
    if is_files and (gone := [list(f.key) for part in listing.parts.values() for f, _ in part if not f.path]):
        split["removed"] = gone
    mirror = is_files or not is_sided(str(source))
    return Data(**parts, class_names=listing.class_names, source=str(source), split=split, mirror=mirror)


def _require_recordable(listing: Listing) -> None:
    """Refuse names that a run is to record and cannot."""
    for name in listing.origin.values():
        require_utf8(name, "folder or tar file")
    for name in listing.class_names:
        require_utf8(name, "class folder")
    rows = listing.parts.values() if listing.kind in FILES else ()  # to go through others would decode their pictures
    gone = [file.name for part in rows for file, _ in part if not file.path]
    if odd := list(filter(NO_UTF8.search, gone)):
        text = f"The removed picture '{escaped(odd[0])}' had a name that is not UTF-8. Begin anew with "
        raise DataError(text, Argument("overwrite", "True"), ".")


def _hash_of_names(listing: Listing) -> str:
    """A hash of the part, name and class of every file. If it is the same, the same seed gives the same split."""
    lines = (f"{part}/{file.name}\t{label}\n" for part, files in listing.parts.items() for file, label in files)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
