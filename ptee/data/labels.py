"""How the classes of a data set become the backbone's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ptee._common.errors import some
from ptee.data.batches import UNKNOWN_LABEL

Labelled = Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class LabelMap:
    """The backbone's class for each class of the data.

    Attributes:
        indices: one for each class of the data; None where the classes cannot be mapped.
        reason: a sentence for the user.
    """

    indices: tuple[int, ...] | None
    reason: str

    def __call__(self, label: int) -> int:
        """The backbone's number of a class; -1 if it is not known."""
        return UNKNOWN_LABEL if self.indices is None else self.indices[label]


def map_labels(class_names: Sequence[str], num_classes: int) -> LabelMap:
    """How the classes of the data become the backbone's.

    WordNet ids go to their places in ImageNet-1k if the backbone has 1000 classes. Else as many classes as the backbone
    has keep their order, which for folders is that of their names as text: 1, 10, 2. So torchvision's ImageFolder had
    numbered them when the backbone was trained on them. Fewer classes whose names are numbers go to these classes of the
    backbone; so do a thousand numbers, which are more often ImageNet's than ever ImageFolder's.
    """
    n, named = len(class_names), some(class_names)
    if num_classes == 1000 and all(re.fullmatch(r"n[0-9]{8}", name) for name in class_names):
        return _map_wordnet(class_names)
    numbers = tuple(int(name) for name in class_names if re.fullmatch("[0-9]+", name) and int(name) < num_classes)
    are_numbers = len(set(numbers)) == n  # '7' and '07' would be one class
    if are_numbers and (n < num_classes or num_classes == 1000):
        return LabelMap(numbers, f"The {n} class names are taken for numbers of the backbone's {num_classes} classes.")
    if n == num_classes:
        reason = f"The {n} classes are taken for the backbone's, in this order: {named}"
        if are_numbers and numbers != tuple(range(n)):
            reason += ", as torchvision's ImageFolder sorts them; if the names are the numbers, write 02 for 2"
        return LabelMap(tuple(range(n)), f"{reason}.")
    # One class, or more than the backbone has, are not to be called by its numbers: there are no labels, or other ones.
    mend = f": name their folders by its numbers, 0 to {num_classes - 1}" if 1 < n < num_classes else ""
    reason = f"The {n} class{'es' * (n != 1)} ({named}) cannot be mapped to the backbone's {num_classes}{mend}."
    return LabelMap(None, reason)


def _map_wordnet(class_names: Sequence[str]) -> LabelMap:
    from timm.data import ImageNetInfo

    place = {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    strange = [name for name in class_names if name not in place]
    if strange:
        return LabelMap(None, f"These WordNet ids are not among the classes of ImageNet-1k: {some(strange)}.")
    indices = tuple(place[name] for name in class_names)
    return LabelMap(indices, f"{len(indices)} WordNet ids are mapped to the backbone's ImageNet-1k classes.")


class _Relabelled(Labelled):
    def __init__(self, dataset: Any, label_map: LabelMap) -> None:
        self.dataset, self.label_map = dataset, label_map
        self.files_sha256: str | None = getattr(dataset, "files_sha256", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return image, self.label_map(int(label))


def with_labels(dataset: Labelled, label_map: LabelMap) -> Labelled:
    """The same images with the backbone's labels; all -1 where they cannot be mapped."""
    return _Relabelled(dataset, label_map)


def odd_labels(labels: Tensor, classes: int) -> str:
    """What is wrong with labels of which some are no class of the backbone; empty where nothing is."""
    if not len(labels) or 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return ""
    found = f"its labels are {int(labels.min())} to {int(labels.max())}"
    return f"{found}, the backbone's classes 0 to {classes - 1}"
