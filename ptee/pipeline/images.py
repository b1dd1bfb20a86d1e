"""Images for a backbone: prepared as it takes them, with its labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import default_collate

from ptee._common.errors import DataError
from ptee.backbones.load import Backbone
from ptee.data.batches import UNKNOWN_LABEL, split_batch
from ptee.data.labels import LabelMap, map_labels, with_labels
from ptee.data.sources import Data, complete, image_transform, open_data, open_named

SOURCE = "your own data sets"  # what data sets from Python are called


def open_images(
    source: str, backbone: Backbone, *, seed: int, root: str | Path | None = None, named: bool = False
) -> tuple[Data, LabelMap]:
    """Open a data source for a backbone.

    Args:
        source: a folder, or the name of a data set.
        backbone: that takes the images.
        seed: which images are drawn for parts that the source does not have.
        root: where a data set of torchvision lies.
        named: the source is a name, even where a folder has the same name.

    Returns:
        The images in three parts, and how their classes became the backbone's.
    """
    view = backbone.input
    transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
    find = open_named if named else open_data
    data = find(source, transform=transform, root=Path(root) if root else None, seed=seed)
    labels = map_labels(data.class_names, backbone.num_classes)
    parts: dict[str, Any] = {n: with_labels(getattr(data, n), labels) for n in ("train", "calibration", "validation")}
    return replace(data, **parts), labels


def from_data_sets(train: Any, validation: Any, calibration: Any, *, seed: int) -> Data:
    """Data sets of the user's own as the three parts; a part that is missing is drawn from the training images.

    Args:
        train: a map-style data set of (image, label) or (image,), the images as the backbone takes them.
        validation: likewise, or None.
        calibration: likewise, or None.
        seed: which images are drawn.

    Raises:
        DataError: if one is no map-style data set, or there are too few training images.
    """
    given = {"train": train, "calibration": calibration, "validation": validation}
    for name, data_set in given.items():
        if data_set is not None and not (hasattr(data_set, "__getitem__") and hasattr(data_set, "__len__")):
            argument = "train_data" if name == "train" else "val_data" if name == "validation" else "calibration_data"
            raise DataError(
                f"{argument} is a {type(data_set).__name__}. Give a map-style data set, of which each item is (image, label) or "
                "(image,); of a loader, its .dataset.",
                argument=argument,
                value=data_set,
            )
    delivered = {name: data_set for name, data_set in given.items() if data_set is not None}
    parts, rule = complete(delivered, SOURCE, seed)
    split = {
        "kind": "data sets",
        "parts": dict.fromkeys(delivered, SOURCE),
        "rule": rule,
        "seed": seed,
        "sizes": {part: len(images) for part, images in parts.items()},
    }
    return Data(**parts, class_names=(), source=SOURCE, split=split)


def has_labels(data: Data) -> bool:
    """Whether the images have labels that are classes of the backbone."""
    _, labels = split_batch(default_collate([data.validation[0]]))
    return labels is not None and int(labels[0]) != UNKNOWN_LABEL
