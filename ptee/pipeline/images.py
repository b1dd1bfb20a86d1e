"""Images for a backbone: prepared as it takes them, with its labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate

from ptee._common.errors import Argument, DataError
from ptee.backbones.load import Backbone
from ptee.data.batches import UNKNOWN_LABEL, split_batch
from ptee.data.labels import LabelMap, choose_class_order, labels_as_given, relabelled
from ptee.data.pictures import Key, image_transform
from ptee.data.sources import open_data, open_named
from ptee.data.splits import Data, complete
from ptee.pipeline.recipe import Recipe

SOURCE = "your own data sets"  # what data sets from Python are called


def open_images(
    source: str,
    backbone: Backbone,
    *,
    seed: int,
    root: str | Path | None = None,
    named: bool = False,
    classes: Path | None = None,
    trained: Sequence[str] | None = None,
    check: bool = False,
    device: Any = None,
    report_only: bool = False,
    removed: Sequence[Key] = (),
    require: Callable[[Data], None] | None = None,
) -> tuple[Data, LabelMap]:
    """Open a data source for a backbone.

    Args:
        source: a folder, or the name of a data set.
        backbone: that takes the images.
        seed: which images are drawn for parts that the source does not have.
        root: where a data set of torchvision lies.
        named: the source is a name, even where a folder has the same name.
        classes: a file that names the backbone's classes in its order.
        trained: these names as a run recorded them; used if the data have no other classes.
        check: see whether the backbone is right under these labels.
        device: for that.
        report_only: images to report on are enough.
        removed: keys of files that could not be read.
        require: is called with the data before a picture of them is decoded, and may refuse them.

    Returns:
        The images in three parts, and how their classes became the backbone's.

    Raises:
        DataError: if the data cannot be read, or the class names do not fit.
    """
    view = backbone.input
    transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
    place = Path(root) if root else None
    if named:
        data = open_named(source, transform=transform, root=place, seed=seed)
    else:
        data = open_data(source, transform=transform, root=place, seed=seed, report_only=report_only, removed=removed)
    if data.split["kind"] == "torchvision":  # found by its name there, from wherever the run is opened again
        data = replace(data, split=data.split | {"root": str((place or Path()).resolve())})
    if require is not None:
        require(data)
    fits = trained and len(trained) == backbone.num_classes and {*data.class_names} <= {*trained}
    labels = choose_class_order(
        backbone, data, classes=classes or (trained if fits else None), check=check, device=device
    )
    return relabelled(data, labels), labels


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


def labels_of(data: Data, backbone: Backbone, device: Any = None) -> LabelMap:
    """What is known about the labels of data sets of the user's own.

    Args:
        data: as of `from_data_sets`.
        backbone: that takes the images.
        device: for the images that are tried on it.
    """
    if has_labels(data):
        return labels_as_given(backbone, data, device=device)
    return LabelMap(None, "The images have no labels.", remedy=("Give data sets of (image, label).",))


def recipe_for(labels: LabelMap, recipe: Recipe) -> Recipe:
    """The recipe as the labels allow it: without labels that can be trusted, the heads learn the backbone's answers.

    Args:
        labels: of the images.
        recipe: as it was asked for.

    Raises:
        DataError: if something was asked for that needs labels.
    """
    _require_labels(labels, recipe)
    if labels.indices is not None and not labels.doubt:
        return recipe
    changes: dict[str, Any] = {} if recipe.training.resolved_targets == "soft" else {"training.targets": "pseudo"}
    if recipe.thresholds.threshold is None:
        kind, limit = recipe.thresholds.target(labelled=False) or ("", None)
        changes |= {"thresholds.max_loss": None, f"thresholds.{kind}": limit}
    return recipe.with_settings(changes)


def _require_labels(labels: LabelMap, recipe: Recipe) -> None:
    """Refuse what needs labels where there are none, or where the backbone is hardly ever right under them."""
    limit, question = recipe.thresholds.max_drop, recipe.confidence.question
    needs = [
        (limit is not None, Argument("max_drop", str(limit)), Argument("max_fidelity_drop", str(limit))),
        (recipe.training.targets == "labels", Argument("targets", "'labels'"), Argument("targets", "'pseudo'")),
        (question != "agrees", Argument("question", repr(question)), Argument("question", "'agrees'")),
    ]
    for needed, wanted, instead in needs:
        if needed and labels.indices is None:
            raise DataError(
                f"{labels.reason} So there are no labels for ", wanted, ". ", *labels.remedy, " Or give ", instead, ".",
                argument=wanted.name,
            )  # fmt: skip
        if needed:
            labels.require_accuracy(wanted, instead)


def has_labels(data: Data) -> bool:
    """Whether the images have labels that are classes of the backbone."""
    _, labels = split_batch(default_collate([data.validation[0]]))
    return labels is not None and int(labels[0]) != UNKNOWN_LABEL


def image_size(train_data: Any) -> tuple[int, int, int] | None:
    """(c, h, w) of the first image of a data set, None where it is no tensor of that form."""
    try:
        image = train_data[0][0]
    except Exception:  # whatever a data set of somebody's own raises; it is refused by name later
        return None
    if not isinstance(image, Tensor) or image.dim() != 3:
        return None
    channels, height, width = image.shape
    return channels, height, width
