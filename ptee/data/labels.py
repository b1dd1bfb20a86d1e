"""How the classes of a data set become the backbone's.

A backbone knows its classes by number alone. timm numbers class folders in natural order and ignores case (class2, class10);
torchvision sorts them as text (class10, class2). Where the two orders differ, the backbone is tried on images under both, in
`evaluation/class_order.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptee._common.errors import Advice, Argument, DataError, PteeError, some
from ptee._common.files import as_path, from_json
from ptee._common.text import number_of, spelt
from ptee._common.validation import LONGEST_NAME, is_name
from ptee.data.batches import UNKNOWN_LABEL, labels_of_other_classes
from ptee.data.splits import PARTS, Data

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_CLASSES = 1000
LIST = "The list of classes"
AROUND = " \t\"'0123456789,;:.()[]"  # may stand around a name in a file that is not made of bare names


BETTER_THAN_CHANCE = 0.05  # of the way from chance to always right: less says nothing about accuracy
FEWEST = 10  # images: of fewer, a good backbone may well be wrong on most
DEVIATIONS = 2  # standard deviations above chance that so few images can show by luck


def near_chance(right: float, n: int, num_classes: int) -> str:
    """The beginning of a sentence, if a share of right answers is hardly better than chance."""
    chance = 1 / num_classes
    least = chance + max(BETTER_THAN_CHANCE * (1 - chance), DEVIATIONS * (chance * (1 - chance) / n) ** 0.5)
    if n < FEWEST or right >= min(least, 1):
        return ""
    return f"The backbone is right on {right:.1%} of {n:,} images, and would be on {chance:.1%} by chance"


HALF_AS_RIGHT = 0.5  # more than the usual gap between training and validation images
SURE = 3.5  # standard deviations that are no luck


def much_less_right(new: float, m: int, seen: float, n: int) -> bool:
    """Whether a share of right answers on m images is far below that on n others, and not by luck."""
    mean = (seen * n + new * m) / (n + m)
    return new <= HALF_AS_RIGHT * seen and seen - new > SURE * (mean * (1 - mean) * (1 / n + 1 / m)) ** 0.5


@dataclass(frozen=True)
class LabelMap:
    """The backbone's class for each class of the data."""

    indices: tuple[int, ...] | None  # None if the classes cannot be mapped
    reason: str  # a sentence for the user
    classes: tuple[str, ...] | None = None  # names of all of the backbone's classes in its order, if the data tell them
    doubt: str = ""  # a sentence, if the backbone is hardly better than chance under these labels, or exchanges classes
    remedy: Advice = ()  # what to do about missing or doubtful labels
    # by part of the data: the share on which the backbone is right, and of how many images
    right: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def gap(self) -> str:
        """A sentence, if the backbone is much less often right on validation than on training images; else empty."""
        if self.doubt or not {"train", "validation"} <= self.right.keys():
            return ""
        (seen, n), (new, m) = self.right["train"], self.right["validation"]
        if not much_less_right(new, m, seen, n):
            return ""
        return (
            f"The backbone is right on {new:.0%} of {m} validation images that were tried, and on {seen:.0%} of {n} training images: see "
            "whether both have the same classes and are prepared alike."
        )

    def __call__(self, label: int) -> int:
        """The backbone's number of a class of the data, or -1 where the classes cannot be mapped."""
        return UNKNOWN_LABEL if self.indices is None else self.indices[label]

    def require_accuracy(self, wanted: Argument, instead: Argument) -> None:
        """Refuse `wanted`, which needs true labels, if the labels are in doubt; `instead` needs none."""
        if self.doubt:
            raise DataError(
                wanted, f" needs labels under which the backbone is right. {self.doubt} ", *self.remedy, " Or give ", instead, ".",
                argument=wanted.name,
            )  # fmt: skip


def describe_labels(labels: LabelMap, word: Callable[[Argument], str] = str) -> str:
    """How the labels were mapped, why they are in doubt, and what to do about it. `word` says how to call an argument."""
    return PteeError(f"{labels.reason} {labels.doubt or labels.gap}".strip(), " ", *labels.remedy).worded(word).strip()


def class_orders(names: Sequence[str]) -> dict[str, list[str]]:
    """The order in which each library numbers class folders of these names.

    >>> class_orders(["a10", "a2", "B"])
    {'timm': ['a2', 'a10', 'B'], 'torchvision': ['B', 'a10', 'a2']}
    """
    from timm.utils.misc import natural_key

    return {"timm": sorted(sorted(names), key=natural_key), "torchvision": sorted(names)}


def map_labels(
    class_names: Sequence[str], num_classes: int, *, classes: Sequence[str] | str | Path | None = None
) -> LabelMap:
    """How the classes of the data become the backbone's. The first rule that applies is taken:

    1. `classes` names the backbone's classes in its order, as a list or as a text file with one name a line.
    2. WordNet ids are ImageNet-1k's classes, if the backbone has 1000.
    3. Names that are numbers are the backbone's, if there are fewer of them than it has classes, or if it has 1000.
    4. As many classes as the backbone has keep their order.

    Raises:
        DataError: if `classes` are not the backbone's, or lack a class of the data.
    """
    if classes is not None:
        return _map_by_names(class_names, num_classes, classes)
    n, named = len(class_names), some(class_names)
    if num_classes == IMAGENET_CLASSES and all(re.fullmatch(r"n[0-9]{8}", name) for name in class_names):
        return _map_wordnet(class_names)
    numbers = tuple(int(name) for name in class_names if re.fullmatch("[0-9]+", name) and int(name) < num_classes)
    are_numbers = len(set(numbers)) == n  # '7' and '07' would be one class
    if are_numbers and (n < num_classes or num_classes == IMAGENET_CLASSES):
        are = "name is taken for a number" if n == 1 else "names are taken for numbers"
        return LabelMap(numbers, f"The {n} class {are} of the backbone's {num_classes} classes.")
    if n == num_classes:
        reason = f"The {n} classes are taken for the backbone's, in this order: {named}."
        return LabelMap(tuple(range(n)), reason, tuple(class_names))
    remedy: Advice = ()
    if 1 < n < num_classes:  # one class alone mostly means that there are no labels
        remedy = (f"Name their folders by its numbers, 0 to {num_classes - 1}, or name its classes in a file (",
                  Argument("classes", "FILE"), ").")  # fmt: skip
    elif n > num_classes:
        remedy = (
            f"Leave out the folders that are none of its classes. If these are {num_classes}, they count as its own.",
        )
    reason = f"The {number_of(n, 'class')} ({named}) cannot be mapped to the backbone's {num_classes}, so the images count as unlabelled."
    return LabelMap(None, reason, remedy=remedy)


def _map_wordnet(class_names: Sequence[str]) -> LabelMap:
    from timm.data import ImageNetInfo

    every = tuple(ImageNetInfo("imagenet-1k").label_names())
    place = {name: index for index, name in enumerate(every)}
    strange = [name for name in class_names if name not in place]
    if strange:
        return LabelMap(None, f"These WordNet ids are not among the classes of ImageNet-1k: {some(strange)}.")
    indices, ids = tuple(place[name] for name in class_names), "id is" if len(class_names) == 1 else "ids are"
    return LabelMap(indices, f"{len(indices)} WordNet {ids} mapped to the backbone's ImageNet-1k classes.", every)


def _map_by_names(class_names: Sequence[str], num_classes: int, classes: Sequence[str] | str | Path) -> LabelMap:
    if isinstance(classes, (str, Path)):
        names, where, whose = read_names(classes), f"'{classes}'", f"the numbers that '{classes}' gives them"
    else:
        names, where, whose = tuple(_listed(classes)), LIST, "the backbone's numbers"
    place = {spelt(name): index for index, name in enumerate(names)}
    if len(names) != num_classes:
        raise DataError(
            f"{where} names {number_of(len(names), 'class')}, but the backbone has {num_classes:,}: name all of them."
        )
    if strange := [name for name in class_names if spelt(name) not in place]:
        if _are_adorned(class_names, place):
            raise DataError(
                f"{where} has lines such as {names[0]:.60}: give one bare name a line, without numbers or quotes."
            )
        near = get_close_matches(strange[0], names, 1)
        hint = f" (did you mean '{some(near)}'?)" if near else ""
        raise DataError(f"{where} lacks classes of the data: {some(strange)}{hint}. Use the same names in both.")
    shared = _shared(names)
    if twice := sorted({name for name in class_names if spelt(name) in shared}):
        raise DataError(
            f"{where} names {some(twice)} more than once: give each of these classes of the backbone one name."
        )
    _require_names(names, where)
    indices = tuple(place[spelt(name)] for name in class_names)
    have = "class of the data has" if len(class_names) == 1 else "classes of the data have"
    return LabelMap(indices, f"The {len(class_names)} {have} {whose}.", names)


def _shared(names: Sequence[str]) -> set[str]:
    """Names, `spelt` alike, that several classes have."""
    times = Counter(map(spelt, names))
    return {name for name, n in times.items() if n > 1}


def numbers_of_names(recorded: Sequence[str], num_classes: int, classes: str | Path | None = None) -> dict[str, int]:
    """The backbone's number of each of its classes by name, `spelt` alike, for images of which the classes are not known before.

    `recorded` are their names as a run says; those that several classes have are left out. `classes` is a file that names them instead.

    Raises:
        DataError: if the file does not give each class a name of its own.
    """
    if classes is not None:
        recorded = map_labels(read_names(classes), num_classes, classes=classes).classes or ()
    shared = _shared(recorded)
    return {spelt(name): n for n, name in enumerate(recorded) if spelt(name) not in shared}


def _listed(classes: Any) -> list[str]:
    """The names in a list of the user's."""
    unordered = isinstance(classes, Mapping | Set | bytes | bytearray)  # or not of names
    if unordered or not isinstance(classes, Iterable):
        text = f"classes={classes!r:.60} must be a list of the backbone's class names in its order, or a file of them."
        raise DataError(text, argument="classes", value=classes)
    _require_names(names := list(classes), LIST)
    return names


def _require_names(names: Sequence[Any], where: str) -> None:
    """Refuse what a run cannot record as the name of a class."""
    for n, name in enumerate(names, 1):
        if fault := _fault(name):
            text = f"{where}: name {n} {fault}. A class has a name in one line, of {LONGEST_NAME} letters at most."
            raise DataError(text, argument="classes", value=name)


def _fault(name: Any) -> str:
    """Why a run cannot record this as the name of a class; empty if it can."""
    if not isinstance(name, str):
        return f"is {name!r:.60} of type {type(name).__name__}, and no text"
    if not name.strip():
        return "is empty"
    if len(name) > LONGEST_NAME:
        return f"has {len(name):,} letters ({name!a:.40}...)"
    odd = next((c for c in name if not is_name(c)), None)
    return "" if odd is None else f"has a character that no name may have, U+{ord(odd):04X}: {name!a:.80}"


def _are_adorned(names: Sequence[str], lines: Collection[str]) -> bool:
    """Whether the lines have all of these names with numbers, quotes or separators around them, such as `0: 'cat',`."""
    found = {line.strip(AROUND): line for line in lines}
    return all(spelt(name) in found.get(spelt(name).strip(AROUND), "") for name in names)


def read_names(file: str | Path) -> tuple[str, ...]:
    """Class names from a text file, one a line. Empty lines at its end do not count."""
    path = as_path(file, "classes")
    try:  # a pipe or a folder holds no names
        lines = path.read_text("utf-8-sig").rstrip().splitlines() if path.is_file() or not path.exists() else []
    except (OSError, UnicodeDecodeError) as why:
        reason = getattr(why, "strerror", None) or "it is not in UTF-8"
        give = "save it as UTF-8" if isinstance(why, UnicodeDecodeError) else "give a text file"
        raise DataError(f"The class names in '{file}' cannot be read ({reason}): {give}, one name a line.") from why
    if _is_json("\n".join(lines)):
        raise DataError(f"'{file}' is JSON: give a text file with one class name a line, in the backbone's order.")
    if not lines or not all(map(str.strip, lines)):
        raise DataError(f"'{file}' holds {'an empty line' if lines else 'no class names'}: give one class name a line.")
    return tuple(map(str.strip, lines))


def _is_json(text: str) -> bool:
    """Whether this is a list or an object of JSON."""
    try:
        return isinstance(from_json(text), list | dict)
    except (ValueError, RecursionError):
        return False


# ------------------------------------------------------------------------------------------------ names in a run, labels on images


def usable_labels(labels: Tensor, classes: int) -> tuple[Tensor | None, str]:
    """The labels (n,), -1 where there is none; or None, and what is wrong with them, or nothing if there are none.

    Raises:
        DataError: if only some of the images have labels that are classes.
    """
    unknown = labels == UNKNOWN_LABEL
    if unknown.all():
        return None, ""
    if unknown.any():
        raise DataError("Some images have labels and others have none. Give labels to all of them, or to none.")
    fault = labels_of_other_classes(labels, classes)
    return None if fault else labels, fault


def no_accuracy(fault: str) -> str:
    """The sentence on labels with this fault, or none."""
    return fault and f"There is no accuracy for this data: {fault}."


def classes_of_run(metrics: Any, num_classes: int) -> list[str]:
    """The names of all classes in the backbone's order, as a run's metrics have them; empty if they do not."""
    data = (metrics or {}).get("data")
    split = data.get("split") if isinstance(data, dict) else None
    names = split.get("classes") if isinstance(split, dict) else None
    usable = isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    return list(names) if names and usable else []


def recorded_classes(found: Sequence[str], recorded: Sequence[str], num_classes: int) -> Sequence[str] | None:
    """The classes that a run or an exported model recorded, if the data have some of them; None if the data call theirs otherwise.

    Data that have some of the names and others beside them are refused: numbered anew, all labels could be others.
    """
    known = {spelt(name) for name in recorded}
    strange = [name for name in found if spelt(name) not in known]
    if len(recorded) != num_classes or len(strange) == len(found):
        return None
    if strange:
        absent = sorted(known - {spelt(name) for name in found})
        lost = f" Classes of the model that the data do not have: {some(absent)}." if absent else ""
        text = f"Classes of the data that the model does not know: {some(strange)}.{lost} "
        if not absent:
            raise DataError(text, "The model has all others: leave these out.")
        file = Argument("classes", "FILE")
        raise DataError(
            text, "Give the folders the names that they had, or name the backbone's classes in a file (", file, ")."
        )
    return recorded


def names_differ(label_map: LabelMap, found: Sequence[str], recorded: Sequence[str]) -> LabelMap:
    """The labels. If they are in doubt, and none of the class names is one that the run recorded, the doubt says so, too."""
    known = {spelt(name) for name in recorded}
    if not (label_map.doubt and known) or any(spelt(name) in known for name in found):
        return label_map
    words = f"The run's own classes are {some(recorded)}: none of these has such a name."
    return replace(label_map, doubt=f"{label_map.doubt} {words}")


def relabelled(data: Data, label_map: LabelMap) -> Data:
    """The same data with the backbone's labels; all -1 where they cannot be mapped. The split records the classes' names."""
    parts: Any = {part: getattr(data, part).relabelled(label_map) for part in PARTS}
    known = {"classes": list(label_map.classes)} if label_map.classes else {}
    return replace(data, split=data.split | known, **parts)
