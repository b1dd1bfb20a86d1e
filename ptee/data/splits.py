"""Which images are for what. No image is for two of these:

    train        heads learn on these
    calibration  thresholds are chosen on these
    validation   results are reported on these

Thresholds should be chosen on images that neither the heads nor the backbone were trained on. So calibration images that the
data deliver are taken. If they deliver validation images alone, half of those are: images drawn from the training images are
known to the backbone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ptee._common.errors import Argument, DataError, some
from ptee._common.files import expanded
from ptee._common.listing import subfolders
from ptee._common.text import number_of, quoted
from ptee.data.batches import UNKNOWN_LABEL
from ptee.data.pictures import Labelled, Pictures, copies, number_in_sample

PARTS = ("train", "calibration", "validation")
# Names of parts, best first. Case does not matter, and "set" and other words may follow: test_set, val2017, "Training images".
NAMES = {
    "train": ("train", "training"),
    "calibration": ("calibration", "calib"),
    "validation": (
        *("val", "valid", "validation", "validate", "validating", "dev", "development"),
        *("eval", "evaluation", "evaluate", "test", "testing", "holdout"),
    ),
}
PART_OF = {word: part for part, words in NAMES.items() for word in words}
WORD = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # in a name, also where a capital begins it: segTrain
FILES = ("folder", "tar")  # kinds of sources that are found by a path
DRAWN_PERCENT = 10  # of the training images, for each part that is not delivered
AS_DELIVERED = "split as delivered"  # no image was drawn, so the seed does not matter
GIVE_DATA = (Argument("data", "FOLDER"), ".")
WATCHING = "to watch the training"  # not to choose thresholds on
CHOSEN_ON = "; thresholds are chosen on half of the validation images"
GIVE_DATA_SETS = (Argument("val_data", "DATASET"), ", or others: ", Argument("calibration_data", "DATASET"), ".")
DATA_SETS = "data sets"  # the kind of what a user gives from Python
TRACES = "traces"  # the kind of images whose answers were recorded before


def part_of(name: str) -> str | None:
    """The part that a folder or tar file of this name holds, or None. Only the first word counts."""
    return PART_OF.get(first_word(name))


def with_all_parts(folder: Path) -> Path:
    """The folder that holds this one and other parts, if it is a part: train/ and val/ lie in one. Else the folder itself."""
    try:
        beside = [path.name for path in subfolders(folder.parent) if path.name != folder.name]
    except DataError:  # it may not be read
        return folder
    return folder.parent if part_of(folder.name) and any(map(part_of, beside)) else folder


def first_word(name: str) -> str:
    """The word that a name begins with, in small letters."""
    return _small(re.match("[a-z]*", name.strip(), re.IGNORECASE)[0])  # type: ignore[index]


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """Those of some names in one place that say a part: with their first word, or, if none says training so, as siblings."""
    names = list(names)
    parts = {name: part for name in names if (part := part_of(name))}
    return parts if "train" in parts.values() else siblings(names) or parts


def siblings(names: Iterable[str]) -> dict[str, str]:
    """Those of some names that differ only in the word for the part, and of which one says training.

    These are seg_train and seg_test, but not steam_train and train_station, which are names of classes.
    """
    alike: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        word, rest = word_of(name)
        if word:
            alike[rest][name] = PART_OF[word]
    groups = [own for own in alike.values() if {"train"} < set(own.values())]
    return {name: part for own in groups for name, part in own.items()}


def word_of(name: str) -> tuple[str, str]:
    """The last word of a name that says a part, and the rest of the name, both in small letters; or nothing and all of it."""
    for match in reversed(list(WORD.finditer(name))):
        if (word := _small(match[0])) in PART_OF:
            return word, f"{name[: match.start()]}/{name[match.start() + len(word) :]}".strip().lower()
    return "", name.strip().lower()


def _small(word: str) -> str:
    return re.sub("(set|data|images)$", "", word.lower())


@dataclass(frozen=True)
class Data:
    """Three map-style data sets of `(image (c, h, w), label)`, and where they come from.

    `split` is a record for JSON: kind and parts of the source, rule, seed, sizes; for files a hash of their names, what was not
    read, and which pictures were removed; with labels of the backbone, the names of its classes.
    """

    train: Labelled  # empty if a source was opened for a report and has no training images; so is calibration
    calibration: Labelled
    validation: Labelled
    class_names: tuple[str, ...]  # in the order of the labels
    source: str  # the folder or name that was asked for
    split: dict[str, Any]
    mirror: bool = True  # whether a mirror image shows the same class; false for digits, letters and signs

    @property
    def summary(self) -> str:
        """One sentence: where the images come from, how many there are, how they were split, what was not read."""
        return self.described()

    def described(self, chosen: bool = True) -> str:
        """The same. `chosen`: thresholds are chosen on some of the images, not given."""
        parts, drawn = self.split["parts"], self.split["sizes"].get("calibration")
        is_watched = drawn and "calibration" not in parts and "validation" in parts
        use = {"calibration": WATCHING} if is_watched else {}
        sizes = ", ".join(
            f"{size:,} {use.get(part, f'for {part}')}" for part, size in self.split["sizes"].items() if size
        )
        n = len(self.class_names)
        classes = f" of {number_of(n, 'class')}" if n else ""  # data sets from Python need not name them
        plain = " (thresholds are chosen on the calibration images)" if drawn and chosen else ""
        on = CHOSEN_ON * chosen if is_watched else plain
        names, colon, how = self.split["rule"].partition(": ")
        rule = f"those {use.get(names, f'for {names}')} are {how}" if colon else names
        return f"{self.source}: images{classes}, {sizes}; {rule}{on}{self.unread}."

    @property
    def unread(self) -> str:
        """What is read though it may be no image of its class, and what is not read, as the end of a sentence, or nothing."""
        left, all_read = self.split.get("not_read", []), self.split.get("all_read", "")
        return f"; {all_read}" * bool(all_read) + (f"; not read: {some(left, len(left))}" if left else "")

    @property
    def place(self) -> str:
        """The absolute path of a folder; a name as it is."""
        return str(expanded(self.source).resolve()) if self.split["kind"] in FILES else self.source

    @property
    def record(self) -> dict[str, Any]:
        """What a run says of its images, by which they are found again."""
        return {"source": self.place, "root": self.split.get("root", ""), "split": self.split}


def copied(data: Data) -> str:
    """A sentence on files to report on that are also among those that heads learn on or thresholds are chosen on, or none."""
    train, calibration, report = (
        getattr(part, "files", []) for part in (data.train, data.calibration, data.validation)
    )
    if not (found := copies(report, [*train, *calibration])):
        return ""
    named = some([f"'{one.words}' is '{other.words}'" for one, other in found], 2)
    return (
        f"At least {len(found):,} of the {number_of(len(report), 'validation image')} {'is' if len(found) == 1 else 'are'} also among the training or "
        f"calibration images ({named}). Results on such images are better than on new ones. Take them out of one part."
    )


def without_images(data: Data, num_classes: int = 0) -> str:
    """A sentence on classes that no image to report on shows, or none. Where no label is the backbone's, classes do not matter.

    `num_classes` of the backbone, for data sets from Python. Only labels that can be read without their images count.
    """
    report = data.validation
    if data.split["kind"] == DATA_SETS:
        numbers = {int(label) for label in _labels_at_hand(report)}
        inside = numbers & {*range(num_classes)}
        return _not_shown([f"class {n}" for n in range(num_classes) if n not in numbers]) if inside else ""
    if data.split["kind"] not in FILES or not isinstance(report, Pictures):
        return ""
    shown = {label for _, label in report.rows if report.label_map(label) != UNKNOWN_LABEL}
    missing = [name for n, name in enumerate(data.class_names) if n not in shown]
    return _not_shown(missing) if shown else ""


def _labels_at_hand(part: Any) -> Any:
    """The labels of a data set that has them apart from its images, else none."""
    if isinstance(part, Subset):
        labels = _labels_at_hand(part.dataset)
        return [labels[i] for i in part.indices] if len(labels) else []
    if isinstance(part, TensorDataset):
        labels = part.tensors[1] if len(part.tensors) == 2 else []
    else:
        labels = getattr(part, "targets", [])  # what data sets of torchvision call them, and users' own after them
    plain = isinstance(labels, list | tuple | torch.Tensor) and len(labels) == len(part)
    labels = torch.as_tensor(labels, device="cpu").flatten().tolist() if plain and _are_numbers(labels) else []
    return labels if len(labels) == len(part) else []


def _are_numbers(labels: Any) -> bool:
    if isinstance(labels, torch.Tensor):
        return not labels.is_floating_point()
    return all(type(label) is int for label in labels)


def _not_shown(missing: Sequence[str]) -> str:
    if not missing:
        return ""
    return f"No validation image shows {some(missing)}: the results say nothing of {'it' if len(missing) == 1 else 'them'}."


# ------------------------------------------------------------------------------------------------ drawn


def draw(n: int, sizes: Sequence[int], seed: int) -> tuple[list[int], ...]:
    """The numbers 0..n-1, drawn into parts of these sizes; the rest is the last part. The same seed draws the same parts.

    Each part is sorted, so that pictures are read in the order in which they lie on the disk.
    """
    order = shuffled(n, seed).tolist()
    ends = [*accumulate(sizes, initial=0), n]
    return tuple(sorted(order[start:end]) for start, end in pairwise(ends))


def shuffled(n: int, seed: int = 0) -> torch.Tensor:
    """(n,) the numbers 0..n-1 in the random order of a seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")


def complete(
    delivered: Mapping[str, Any], source: str | Path, seed: int, report_only: bool = False
) -> tuple[dict[str, Any], str]:
    """All three parts, and the rule in words. Parts that are not delivered are drawn from the training images.

    With `report_only`, validation images alone will do, or a few images in all.
    """
    missing = [part for part in PARTS if part not in delivered]
    if not missing or "train" in missing:
        return {part: delivered.get(part, []) for part in PARTS}, AS_DELIVERED
    train, names = delivered["train"], " and ".join(missing)
    n = len(train)
    if n <= len(missing):
        if report_only and "validation" in missing:
            return {"calibration": [], **delivered, "train": [], "validation": train}, "all of them to report on"
        if report_only:
            return {"calibration": [], **delivered}, AS_DELIVERED
        needed = f"at least {1 + len(missing)} are needed, because those for {names} are drawn from them"
        raise DataError(f"'{source}' has too few training images: it has {n}, and {needed}.")
    size = max(1, round(n * DRAWN_PERCENT / 100))
    drawn = dict(zip([*missing, "train"], draw(n, [size] * len(missing), seed), strict=True))
    parts = {**delivered, **{part: _take(train, places) for part, places in drawn.items()}}
    each = "each " if len(missing) > 1 else ""
    return parts, f"{names}: {each}{DRAWN_PERCENT} % of the {number_of(n, 'training image')}, drawn with seed {seed}"


def _take(pictures: Any, places: list[int]) -> Any:
    return [pictures[i] for i in places] if isinstance(pictures, list) else Subset(pictures, places)


def hold_out(data: Any, size: int, seed: int) -> tuple[Any, Any]:
    """The rest of a map-style data set, and `size` images of it that are held out.

    Pictures that were removed because they could not be read are drawn as if they were there. So the others are drawn as
    before.
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


# ------------------------------------------------------------------------------------------------ unseen by a run


class Unseen(NamedTuple):
    """What a run has not seen of its data."""

    run: str  # its name
    data: Data
    images: Any  # that can be reported on: `data.validation`, or all of the data
    seed: int  # of all draws


class Parts(NamedTuple):
    """Images to choose thresholds on, images to report on, and which those are, in words."""

    calibration: Any
    report: Any
    chosen_on: str
    reported_on: str

    @property
    def words(self) -> str:
        """The sentence for thresholds that are chosen on these images."""
        return f"Thresholds are chosen on {self.chosen_on} and reported on {self.reported_on}."

    @property
    def words_of_lines(self) -> str:
        """The sentence for a table in which each line has thresholds that are chosen on these images."""
        return f"The thresholds of each line are chosen on {self.chosen_on} and reported on {self.reported_on}."

    @property
    def words_of_others(self) -> str:
        """The sentence for thresholds that the user gives."""
        return f"The run's own thresholds were chosen on {self.chosen_on} and those given are measured on {self.reported_on}."


def parts_for_tuning(unseen: Unseen) -> Parts:
    """Images to choose thresholds on, and the others to report on. The same seed gives the same ones."""
    data, images, n = unseen.data, unseen.images, len(unseen.images)
    own, delivered = images is data.validation, data.split["parts"]
    if own and ("calibration" in delivered or "validation" not in delivered):
        chosen = f"the {number_of(len(data.calibration), 'calibration image')}"  # type: ignore[arg-type]
        return Parts(data.calibration, images, chosen, f"the {number_of(n, 'validation image')}")
    if n < 2:
        found = "one" if n else "none"
        text = (
            f"Thresholds are chosen on some images and reported on others: two images at least, and there is {found}. "
        )
        raise DataError(text, "Give more: ", *(GIVE_DATA_SETS if data.split.get("kind") == DATA_SETS else GIVE_DATA))
    first, second = draw(n, [n // 2], unseen.seed)
    kind = "traced " if data.split.get("kind") == TRACES else "validation " * own
    chosen = f"{len(first):,} of the {n:,} {kind}images, drawn with seed {unseen.seed},"
    return Parts(Subset(images, first), Subset(images, second), chosen, f"the other {len(second):,}")


def parts_for_all(runs: Sequence[Unseen]) -> Parts:
    """The same, of images that none of several runs has seen."""
    strict = [own for own in runs if own.images is own.data.validation] or list(runs)
    first = strict[0]
    for own in runs:
        if own.data.source != first.data.source:
            raise DataError(
                f"{first.run} was measured on {first.data.source}, {own.run} on {own.data.source}. Give the same images to "
                "all: ",
                *GIVE_DATA,
            )
    for own in strict:
        if "validation" not in own.data.split["parts"] and own.data.split["rule"] != first.data.split["rule"]:
            raise DataError(
                f"{own.data.source} delivers no validation images, and {first.run} and {own.run} drew theirs with different "
                f"seeds ({first.seed}, {own.seed}), so each was trained on the other's. Give images of their own: ",
                *GIVE_DATA,
            )
    return parts_for_tuning(first)


def images_to_report_on(data: Data, recorded: Mapping[str, Any], run: str) -> tuple[Any, str]:
    """Images that a run's heads were not trained on, and a sentence about them.

    `recorded` holds the source, the folder of the training images in it (`train`), a sample of these (`train_sample`) and the
    files_sha256 of the data that the run was trained with, as far as they are known.

    Raises:
        DataError: if they are the run's own data, but with other files: so others would be drawn; or most of its training images.
    """
    if {"source", "train"} <= recorded.keys() and Path(data.place).is_relative_to(
        Path(recorded["source"], recorded["train"])
    ):
        raise DataError(
            f"{data.source} holds images that {run} was trained on. Leave ",
            Argument("data"),
            " out for those that it has not seen, or give others: ",
            *GIVE_DATA,
        )
    here, files = data.place == recorded.get("source"), recorded.get("files_sha256")
    same = here if files is None else files == data.split.get("files_sha256")
    if same:
        return data.validation, data.summary
    delivered = "validation" in data.split["parts"]
    if here and not delivered:
        raise DataError(
            f"{data.source} has other files than when {run} was trained, so nobody knows which of them it has not seen. "
            "Put them back as they were, or give other images: ",
            *GIVE_DATA,
        )
    parts: list[Any] = [data.validation] if delivered else [data.train, data.calibration, data.validation]
    images: Any = parts[0] if delivered else ConcatDataset(parts)
    words = data.summary if delivered else f"{data.source}: all {number_of(len(images), 'image')}{data.unread}."
    sample = recorded.get("train_sample", ())
    seen = number_in_sample((file for part in parts for file in part.files), sample) if sample else 0
    if seen > len(sample) / 2:
        raise DataError(
            f"{data.source} holds images that {run} was trained on: of {len(sample)} of these, {seen} are here. Nobody knows which of the "
            "others it has not seen. Put the files back as they were, or give other images: ",
            *GIVE_DATA,
        )
    if seen:
        words += f" {run} was trained on some of these, so results may be better than on new ones: of {len(sample)} of its training images, {seen} {'is' if seen == 1 else 'are'} here."
    return images, words


def left_by_tuning(unseen: Unseen, tuned: Mapping[str, Any], given: bool) -> tuple[Any, str]:
    """The images that the run's thresholds were not chosen on, and a sentence about them, or none.

    `tuned` holds the source and the files_sha256 of the images that they were chosen on, None where not known, and whether these are
    known again (`marks`), so that nothing need be said here; it is empty if none were chosen. With `given`, the user gives other thresholds, which were not chosen on these images.

    Raises:
        DataError: if the images are the same ones, but files were added or are missing.
    """
    data, images = unseen.data, unseen.images
    if not tuned:
        return images, ""
    if tuned["source"] is None:
        unknown = "" if tuned["marks"] else " Whether on some of these images is not known."
        return images, "" if given else f"The run's thresholds were chosen in Python.{unknown}"
    where, files = tuned["source"], data.split.get("files_sha256")
    shown = repr(f"{where:.200}")  # a stranger may have written it
    here = where.casefold() == data.place.casefold() if files is None else where == data.place
    same = here if None in (files, tuned["files_sha256"]) else files == tuned["files_sha256"]
    if not (here or same):
        unknown = "" if tuned["marks"] else "; whether some of its images are among these is not known"
        elsewhere = f"The run's thresholds were chosen on {shown}{unknown}."
        if Path(data.place).is_relative_to(where):
            elsewhere = f"The run's thresholds were chosen on some images of {shown}, and these lie there, too. Without --data the others are taken."
        return images, "" if given else elsewhere
    parts = parts_for_tuning(unseen)
    if not same and parts.report is not images:  # so other halves would be drawn
        if given:
            return images, ""
        raise DataError(
            f"{data.source} has other files than when the thresholds were chosen, so nobody knows which they were chosen on. "
            f"Choose them again (ptee tune {quoted(unseen.run)} --max-drop 0.01), put the files back as they were, or give other images: ",
            *GIVE_DATA,
        )
    words = parts.words_of_others if given else parts.words
    moved = (
        f" The files have the names of those in {shown}, on which the thresholds were chosen, and are taken for them."
    )
    return parts.report, words + ("" if here else moved)
