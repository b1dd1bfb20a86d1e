"""How the classes of a data set become the backbone's.

A backbone knows its classes by number alone. timm numbers class folders in natural order without regard to case (class2,
class10), torchvision in the order of text (class10, class2). Where the two differ, the backbone itself is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ptee._common.errors import Advice, Argument, DataError, some
from ptee.data.batches import UNKNOWN_LABEL, batches
from ptee.data.pictures import File, Labelled
from ptee.data.splits import FILES, Data

IMAGENET_CLASSES = 1000
CHECKED, BATCH = 128, 32  # images that the backbone is asked about
BETTER_THAN_CHANCE = 0.05  # of the way from chance to being always right; below it nothing can be said of accuracy
DEVIATIONS = 2  # by which chance alone may be better on so few images


NAME_THEM: Advice = ("Give a file that names them in its order, one name a line (", Argument("classes", "FILE"), ").")


@dataclass(frozen=True)
class LabelMap:
    """The backbone's class for each class of the data.

    Attributes:
        indices: one for each class of the data; None where the classes cannot be mapped.
        reason: a sentence for the user.
        classes: names of all of the backbone's classes in its order, where the data tell them.
        doubt: a sentence, if the backbone is hardly better than chance under these labels; empty otherwise.
        remedy: what to do about missing or doubtful labels, as parts of an error's message.
    """

    indices: tuple[int, ...] | None
    reason: str
    classes: tuple[str, ...] | None = None
    doubt: str = ""
    remedy: Advice = ()

    def __call__(self, label: int) -> int:
        """The backbone's number of a class; -1 if it is not known."""
        return UNKNOWN_LABEL if self.indices is None else self.indices[label]

    def require_accuracy(self, wanted: Argument, instead: Argument) -> None:
        """Refuse what needs true labels while the backbone is near chance.

        Args:
            wanted: what needs them.
            instead: what can be asked for without them.

        Raises:
            DataError: if there is a doubt.
        """
        if self.doubt:
            raise DataError(
                wanted, f" needs labels under which the backbone is right. {self.doubt} ", *self.remedy, " Or give ", instead, ".",
                argument=wanted.name,
            )  # fmt: skip


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
    """How the classes of the data become the backbone's.

    WordNet ids go to their places in ImageNet-1k if the backbone has 1000 classes. Else as many classes as the backbone
    has keep their order. Fewer classes whose names are numbers go to these classes of the backbone; so do a thousand
    numbers, which are ImageNet's more often than names of folders.

    Args:
        class_names: of the data, in the order of the labels.
        num_classes: of the backbone.
        classes: names of the backbone's classes, in its order, or a text file with one name a line. They settle it.

    Raises:
        DataError: if `classes` are not the backbone's or lack some of the data's.
    """
    if classes is not None:
        return _map_by_names(class_names, num_classes, classes)
    n, named = len(class_names), some(class_names)
    if num_classes == IMAGENET_CLASSES and all(re.fullmatch(r"n[0-9]{8}", name) for name in class_names):
        return _map_wordnet(class_names)
    numbers = tuple(int(name) for name in class_names if re.fullmatch("[0-9]+", name) and int(name) < num_classes)
    are_numbers = len(set(numbers)) == n  # '7' and '07' would be one class
    if are_numbers and (n < num_classes or num_classes == IMAGENET_CLASSES):
        return LabelMap(numbers, f"The {n} class names are taken for numbers of the backbone's {num_classes} classes.")
    if n == num_classes:
        reason = f"The {n} classes are taken for the backbone's, in this order: {named}."
        return LabelMap(tuple(range(n)), reason, tuple(class_names))
    # A single class, or more than the backbone has, cannot be called by its numbers: there are no labels, or other ones.
    remedy: Advice = ()
    if 1 < n < num_classes:
        remedy = (
            f"Name their folders by its numbers, 0 to {num_classes - 1}, or name its classes in a file (", Argument("classes", "FILE"),
            ").",
        )  # fmt: skip
    reason = f"The {n} class{'es' * (n != 1)} ({named}) cannot be mapped to the backbone's {num_classes}."
    return LabelMap(None, reason, remedy=remedy)


def _map_wordnet(class_names: Sequence[str]) -> LabelMap:
    from timm.data import ImageNetInfo

    place = {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    strange = [name for name in class_names if name not in place]
    if strange:
        return LabelMap(None, f"These WordNet ids are not among the classes of ImageNet-1k: {some(strange)}.")
    indices = tuple(place[name] for name in class_names)
    return LabelMap(indices, f"{len(indices)} WordNet ids are mapped to the backbone's ImageNet-1k classes.")


# ------------------------------------------------------------------------------------------------ names that are given


def read_classes(file: str | Path) -> tuple[str, ...]:
    """Class names from a text file, one a line; empty lines at its end do not count.

    Raises:
        DataError: if it cannot be read or holds no names.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text("utf-8-sig").rstrip().splitlines() if path.is_file() or not path.exists() else []
    except (OSError, UnicodeDecodeError) as why:
        reason = getattr(why, "strerror", None) or "not a text file"
        raise DataError(
            f"The class names in '{file}' cannot be read ({reason}): give a text file, one name a line."
        ) from why
    if not lines or not all(map(str.strip, lines)):
        raise DataError(f"'{file}' holds {'an empty line' if lines else 'no class names'}: give one class name a line.")
    return tuple(map(str.strip, lines))


def _map_by_names(class_names: Sequence[str], num_classes: int, classes: Sequence[str] | str | Path) -> LabelMap:
    is_file = isinstance(classes, (str, Path))
    names = read_classes(classes) if isinstance(classes, (str, Path)) else tuple(classes)
    where = f"'{classes}'" if is_file else "The list of classes"
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{where} names {some(twice)} more than once: give each of the backbone's classes once.")
    if len(names) != num_classes:
        raise DataError(
            f"{where} names {len(names):,} classes, but the backbone has {num_classes:,}: name all of them."
        )
    if strange := [name for name in class_names if name not in set(names)]:
        near = get_close_matches(strange[0], names, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise DataError(f"{where} lacks classes of the data: {some(strange)}{hint}. Call both the same.")
    place = {name: index for index, name in enumerate(names)}
    n, numbers = len(class_names), f"the numbers that {where} gives them" if is_file else "the backbone's numbers"
    reason = f"The {n} classes of the data have {numbers}."
    return LabelMap(tuple(place[name] for name in class_names), reason, names)


# ------------------------------------------------------------------------------------------------ the backbone is asked


def choose_class_order(
    backbone: Any,
    data: Data,
    *,
    classes: Sequence[str] | str | Path | None = None,
    check: bool = True,
    device: str | torch.device | None = None,
) -> LabelMap:
    """How the classes of the data become the backbone's, and whether the backbone is right under these labels.

    Where timm and torchvision would number the folders differently, the order is taken under which the backbone is right
    on more of some images.

    Args:
        backbone: with `module` and `num_classes`.
        data: as `open_data` gives them.
        classes: as in `map_labels`.
        check: try the labels on some images, even where there is no choice.
        device: for these images; None: where the backbone is.

    Raises:
        DataError: as of `map_labels`, or if a picture cannot be decoded.
    """
    first = map_labels(data.class_names, backbone.num_classes, classes=classes)
    maps = {"": first} if classes is not None else _candidates(data, first)
    if first.indices is None or not (check or len(maps) > 1):
        return first
    answers, labels = _ask(backbone.module, _some_images(data, list(maps.values())), device)
    right = {name: _share_right(answers, labels, each) for name, each in maps.items()}
    best = max(right, key=lambda name: right[name])  # of equal ones the first
    found = maps[best]
    if len(maps) > 1:
        found = replace(found, reason=_words(maps, best, right, len(labels)))
    doubt = _doubt(right[best], len(labels), backbone.num_classes)
    return replace(found, doubt=doubt, remedy=NAME_THEM if doubt else found.remedy)


def labels_as_given(backbone: Any, data: Data, *, device: str | torch.device | None = None) -> LabelMap:
    """Labels that are the backbone's class numbers already, and whether the backbone is right under them.

    Args:
        backbone: with `module` and `num_classes`.
        data: with labels.
        device: for the images that are tried; None: where the backbone is.
    """
    found = LabelMap(tuple(range(backbone.num_classes)), "The labels are taken for the backbone's class numbers.")
    answers, labels = _ask(backbone.module, _some_images(data, [found]), device)
    doubt = _doubt((answers == labels).double().mean().item(), len(labels), backbone.num_classes)
    remedy = ("Check that the labels are the backbone's class numbers.",) if doubt else ()
    return replace(found, doubt=doubt, remedy=remedy)


def _candidates(data: Data, first: LabelMap) -> dict[str, LabelMap]:
    """The maps that come into question, by the library that numbers class folders so."""
    names = list(data.class_names)
    orders = class_orders(names)
    if data.split["kind"] not in FILES or len(names) < 2 or orders["timm"] == orders["torchvision"]:
        return {"": first}
    if first.classes is None and not _are_all_numbers(first, len(names)):
        return {"": first}
    place = {library: {name: i for i, name in enumerate(order)} for library, order in orders.items()}
    maps = {
        library: LabelMap(tuple(place[library][name] for name in names), "", tuple(orders[library]))
        for library in ("torchvision", "timm")
    }
    return maps if first.classes else dict(reversed(maps.items()))  # of a thousand numbers, first as they count


def _are_all_numbers(first: LabelMap, n: int) -> bool:
    return first.indices is not None and sorted(first.indices) == list(range(n)) and n == IMAGENET_CLASSES


def _some_images(data: Data, maps: Sequence[LabelMap]) -> Any:
    """Images from all over the data; of files, only those whose label is in question."""
    parts: list[Any] = [part for part in (data.train, data.calibration, data.validation) if len(part)]  # type: ignore[arg-type]
    every: Any = ConcatDataset(parts)
    places = list(range(len(every)))
    if len(maps) > 1:
        labels = [label for part in parts for _, label in part.rows]
        places = [i for i in places if len({each(labels[i]) for each in maps}) > 1] or places
    n = min(CHECKED, len(places))
    return Subset(every, [places[i * len(places) // n] for i in range(n)])


@torch.no_grad()
def _ask(module: torch.nn.Module, images: Any, device: str | torch.device | None) -> tuple[Tensor, Tensor]:
    """The backbone's answers (n,) and the labels of the data (n,)."""
    home, modes = next(module.parameters()).device, {each: each.training for each in module.modules()}
    answers, labels = [], []
    try:
        module.to(home if device is None else device).eval()
        like = next(module.parameters())
        for x, y in batches(images, batch_size=BATCH, shuffle=False):
            answers.append(module(x.to(like.device, like.dtype)).argmax(-1).cpu())
            labels.append(y)
    finally:
        module.to(home)
        for each, training in modes.items():
            each.training = training
    return torch.cat(answers), torch.cat(labels)


def _share_right(answers: Tensor, labels: Tensor, label_map: LabelMap) -> float:
    return (answers == labels.new_tensor([label_map(int(label)) for label in labels])).double().mean().item()


def _words(maps: dict[str, LabelMap], best: str, right: dict[str, float], n: int) -> str:
    (other,) = maps.keys() - {best}
    orders = {library: some(each.classes or ()) for library, each in maps.items()}
    return (
        f"The {len(maps[best].classes or ())} classes are taken in {best}'s order: {orders[best]}; {other} would have numbered "
        f"them in another: {orders[other]}. Of {n} images whose class is in question the backbone is right on "
        f"{right[best]:.0%} in the first order, and on {right[other]:.0%} in the second."
    )


def _doubt(right: float, n: int, num_classes: int) -> str:
    """A sentence, if a share of right answers is hardly better than by chance."""
    chance = 1 / num_classes
    least = chance + max(BETTER_THAN_CHANCE * (1 - chance), DEVIATIONS * (chance * (1 - chance) / n) ** 0.5)
    if right >= min(least, 1):
        return ""
    return (
        f"The backbone is right on {right:.1%} of {n} images, and would be on {chance:.1%} by chance: it may know its classes "
        "in another order."
    )


# ------------------------------------------------------------------------------------------------ labels put on images


class _Relabelled(Labelled):
    def __init__(self, dataset: Any, label_map: LabelMap) -> None:
        self.dataset, self.label_map = dataset, label_map
        self.files_sha256: str | None = getattr(dataset, "files_sha256", None)
        self.gaps: tuple[int, ...] = getattr(dataset, "gaps", ())

    @property
    def files(self) -> list[File]:
        return getattr(self.dataset, "files", [])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return image, self.label_map(int(label))


def with_labels(dataset: Labelled, label_map: LabelMap) -> Labelled:
    """The same images with the backbone's labels; all -1 where they cannot be mapped."""
    return _Relabelled(dataset, label_map)


def relabelled(data: Data, label_map: LabelMap) -> Data:
    """The same data with the backbone's labels. The split records the names of the backbone's classes."""
    parts: Any = {part: with_labels(getattr(data, part), label_map) for part in ("train", "calibration", "validation")}
    known = {"classes": list(label_map.classes)} if label_map.classes else {}
    return replace(data, split=data.split | known, **parts)


def odd_labels(labels: Tensor, classes: int) -> str:
    """What is wrong with labels of which some are no class of the backbone; empty where nothing is."""
    if not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return ""
    found = f"its labels are {int(labels.min())} to {int(labels.max())}"
    return f"{found}, the backbone's classes 0 to {classes - 1}"
