"""Which images are for what: for the heads, for thresholds, for the report, and none for two of these.

    train        heads learn on these
    calibration  thresholds are chosen on these
    validation   results are reported on these

Thresholds want images that neither the heads nor, where that can be had, the backbone was trained on. Where the data
deliver calibration images, those are taken. Where they deliver validation images alone, half of these are: what was drawn
from the training images is known to the backbone too well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import ConcatDataset, Subset

from ptee._common.errors import Argument, DataError
from ptee.data.pictures import Labelled

FILES = ("folder", "tar")  # kinds of sources that are found by a path


@dataclass(frozen=True)
class Data:
    """Three map-style data sets of `(image (c, h, w), label)` and how they came about.

    Attributes:
        train: what heads learn on. Empty where a source was opened for a report and has no training images.
        calibration: what thresholds are chosen on. Empty likewise.
        validation: what results are reported on.
        class_names: in the order of the labels.
        source: what was asked for; `open_data` takes it again.
        split: for JSON: kind and parts of the source, rule, seed, sizes; for files a hash of their names, what was not read
            and what was removed as it could not be read; with labels of the backbone, the names of its classes.
        mirror: whether a mirror image shows the same class; false for data known to be of digits, letters or signs.
    """

    train: Labelled
    calibration: Labelled
    validation: Labelled
    class_names: tuple[str, ...]
    source: str
    split: dict[str, Any]
    mirror: bool = True

    @property
    def summary(self) -> str:
        """One sentence: where the images come from, how many there are, how they were split, what was not read."""
        sizes = ", ".join(f"{size:,} for {part}" for part, size in self.split["sizes"].items() if size)
        n, unread = len(self.class_names), self.split.get("not_read", [])
        told = f"; not read: {', '.join(unread)}" if unread else ""
        return f"{self.source}: images of {n} class{'es' * (n != 1)}, {sizes}; {self.split['rule']}{told}."

    @property
    def place(self) -> str:
        """A folder as it is found from anywhere; a name as it is."""
        return str(Path(self.source).expanduser().resolve()) if self.split["kind"] in FILES else self.source


def draw(n: int, sizes: Sequence[int], seed: int) -> tuple[list[int], ...]:
    """Numbers 0..n-1 drawn into parts of these sizes, and the rest as the last part. The same seed draws the same ones.

    Each part is sorted: pictures are read in the order in which they lie on the disk.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return tuple(sorted(order[start:end]) for start, end in zip(ends, [*ends[1:], n], strict=True))


def hold_out(data: Any, size: int, seed: int) -> tuple[Any, Any]:
    """All images of a map-style data set but a number of them, and these.

    Pictures that were removed as they could not be read count as if they were there, so that without them the others are
    drawn as before.
    """
    gaps = set(getattr(data, "gaps", ()))
    n = len(data) + len(gaps)
    place = {listed: row for row, listed in enumerate(i for i in range(n) if i not in gaps)}

    def part(drawn: list[int]) -> Any:
        found: Any = Subset(data, [place[i] for i in drawn if i in place])
        found.gaps = tuple(k for k, i in enumerate(drawn) if i not in place)
        found.files_sha256 = getattr(data, "files_sha256", None)  # for a training that is resumed
        return found

    held, rest = draw(n, [size], seed)
    return part(rest), part(held)


class Parts(NamedTuple):
    """Images to choose thresholds on, others to report on, and which those are, in words."""

    calibration: Any
    report: Any
    chosen_on: str
    reported_on: str

    @property
    def words(self) -> str:
        """A sentence, where thresholds are chosen on these images."""
        return f"Thresholds are chosen on {self.chosen_on} and reported on {self.reported_on}."

    @property
    def words_of_others(self) -> str:
        """A sentence, where other thresholds are given than those that were chosen on these images."""
        return f"The run's own thresholds were chosen on {self.chosen_on} and those given are measured on {self.reported_on}."


def parts_for_tuning(data: Data, unseen: Any, seed: int) -> Parts:
    """Which images thresholds are chosen on, and which are left to report on. The same seed gives the same ones.

    Args:
        data: as it was opened.
        unseen: what can be reported on if nothing is tuned: `data.validation`, or all of it.
        seed: of the halves.

    Raises:
        DataError: if there are too few images.
    """
    whole, delivered, n = unseen is data.validation, data.split["parts"], len(unseen)
    if whole and ("calibration" in delivered or "validation" not in delivered):
        calibration: Any = data.calibration
        chosen = f"the {len(calibration):,} calibration images"
        return Parts(calibration, unseen, chosen, f"the {n:,} validation images")
    if n < 2:
        raise DataError(
            f"Thresholds are chosen on some images and reported on others, but {data.source} has {n}. Give more images: ",
            Argument("data", "FOLDER"),
            ".",
        )
    first, second = draw(n, [n // 2], seed)
    kind = "validation images" if whole else "images"
    drawn = f"{len(first):,} of the {n:,} {kind}, drawn with seed {seed},"
    return Parts(Subset(unseen, first), Subset(unseen, second), drawn, f"the other {len(second):,}")


class Unseen(NamedTuple):
    """What a run has not seen of its data.

    Attributes:
        run: its name.
        data: as it was opened.
        images: that can be reported on: `data.validation`, or all of it.
        seed: of the halves, and of what was drawn.
    """

    run: str
    data: Data
    images: Any
    seed: int


def parts_for_all(runs: Sequence[Unseen]) -> Parts:
    """As `parts_for_tuning`, of images that none of several runs has seen.

    Raises:
        DataError: if they were made with other data, or other images of theirs were drawn for each.
    """
    strict = [own for own in runs if own.images is own.data.validation] or list(runs)
    first = strict[0]
    for own in runs:
        if own.data.source != first.data.source:
            raise DataError(
                f"{first.run} was measured on {first.data.source}, {own.run} on {own.data.source}. Give the same images to "
                "all: ",
                Argument("data", "FOLDER"),
                ".",
            )
    for own in strict:
        if "validation" not in own.data.split["parts"] and own.data.split["rule"] != first.data.split["rule"]:
            raise DataError(
                f"{own.data.source} delivers no validation images, and {first.run} and {own.run} drew theirs with different "
                f"seeds ({first.seed}, {own.seed}), so each was trained on the other's. Give images of their own: ",
                Argument("data", "FOLDER"),
                ".",
            )
    return parts_for_tuning(first.data, first.images, first.seed)


def images_to_report_on(data: Data, recorded: Mapping[str, Any], run: str) -> tuple[Any, str]:
    """Images that a run's heads were not trained on, and a sentence about them.

    Args:
        data: the images that are there now.
        recorded: source and files_sha256 of those it was trained with, as far as they are known.
        run: its name.

    Raises:
        DataError: if the images are the run's own, but files were added or are missing, so that others would be drawn.
    """
    here, files = data.place == recorded.get("source"), recorded.get("files_sha256")
    same = here if files is None else files == data.split.get("files_sha256")
    if same or "validation" in data.split["parts"]:
        return data.validation, data.summary
    if here:
        raise DataError(
            f"{data.source} has other files than when {run} was trained, so those that it has not seen cannot be told. "
            "Put them back as they were, or give other images: ",
            Argument("data", "FOLDER"),
            ".",
        )
    every: Any = ConcatDataset([data.train, data.calibration, data.validation])
    return every, f"{data.source}: all {len(every):,} images."


def left_by_tuning(unseen: Unseen, tuned: Mapping[str, Any], given: bool) -> tuple[Any, str]:
    """Of images that thresholds were chosen on, only those that were left; and a sentence about them, or none.

    Args:
        unseen: the images that are there now.
        tuned: source and files_sha256 (or None) of those that the run's thresholds were chosen on; empty if not known.
        given: other thresholds are given, which nobody chose on these images.

    Raises:
        DataError: if the images are the same, but files were added or are missing.
    """
    _, data, images, seed = unseen
    if not tuned:
        return images, ""
    where, files = tuned["source"], data.split.get("files_sha256")
    shown = repr(f"{where:.200}")  # a stranger may have written it
    here = where.casefold() == data.place.casefold() if files is None else where == data.place
    same = here if None in (files, tuned["files_sha256"]) else files == tuned["files_sha256"]
    if not (here or same):
        elsewhere = (
            f"The run's thresholds were chosen on images of {shown}; whether some of them are among these is not known."
        )
        return images, "" if given else elsewhere
    parts = parts_for_tuning(data, images, seed)
    if not same and parts.report is not images:  # other halves are drawn
        if given:
            return images, ""
        raise DataError(
            f"{data.source} has other files than when the thresholds were chosen, so those that they were chosen on cannot be "
            "told. Choose them again (ptee tune), put the files back as they were, or give other images: ",
            Argument("data", "FOLDER"),
            ".",
        )
    words = parts.words_of_others if given else parts.words
    known = f" The files are called as those of {shown}, on which the thresholds were chosen, and are taken for them."
    return parts.report, words + ("" if here else known)
