"""Images for a backbone, prepared as it takes them and with its labels, and the recipe that these labels allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ptee._common.errors import Argument, DataError, PteeError, first_line, ran_out_of_memory, warn
from ptee._common.files import as_path
from ptee._common.progress import Log
from ptee._common.text import number_of
from ptee.backbones.load import Backbone
from ptee.data.batches import UNKNOWN_LABEL, batch_of, described, same_images
from ptee.data.labels import LabelMap, names_differ, near_chance, recorded_classes, relabelled
from ptee.data.named import holds_sided
from ptee.data.pictures import Key, all_broken_named, image_transform
from ptee.data.recorded import recorded
from ptee.data.sources import open_data, open_named
from ptee.data.splits import DATA_SETS, Data, complete
from ptee.evaluation.class_order import choose_class_order, each_part_alone, labels_as_given
from ptee.evaluation.results_table import Results
from ptee.exits.config import CALIBRATED, MAX_PROB
from ptee.model.images import require_images, wrong_size
from ptee.pipeline.recipe import Recipe
from ptee.training.calibration import MIN_IMAGES, hold_out
from ptee.training.config import JOINT
from ptee.tuning.config import Target

SOURCE = "your own data sets"  # what data sets from Python are called
ARGUMENTS = {"train": "train_data", "calibration": "calibration_data", "validation": "val_data"}  # of `ptee.fit`


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
    """Open a data source for a backbone: its images in three parts, and how their classes became the backbone's.

    Args:
        source: a folder, or the name of a data set.
        backbone: reads the images.
        seed: draws the images of parts that the source does not deliver.
        root: the folder of a data set of torchvision.
        named: the source is a name, even if there is a folder of that name.
        classes: a file that names the backbone's classes in its order.
        trained: these names as a run or an exported model recorded them; used if the data have some of them, and refused if they have others beside.
        check: see whether the backbone is right under these labels.
        device: for this check.
        report_only: images to report on are enough.
        removed: keys of files that could not be read.
        require: may refuse the data before any picture is decoded.

    Raises:
        DataError: if the data cannot be read, or the class names do not fit.
    """
    view = backbone.input
    transform = image_transform(view.input_size, view.mean, view.std, view.interpolation)
    place = as_path(root, "data_root") if root else None
    if named:
        data = open_named(source, transform=transform, root=place, seed=seed)
    else:
        data = open_data(source, transform=transform, root=place, seed=seed, report_only=report_only, removed=removed)
    if data.split["kind"] == "torchvision":  # a saved run finds it by its name in this folder
        data = replace(data, split=data.split | {"root": str((place or Path()).resolve())})
    if require is not None:
        require(data)
    recorded = None if classes is not None else recorded_classes(data.class_names, trained or (), backbone.num_classes)
    with all_broken_named([data.train, data.calibration, data.validation]):
        labels = choose_class_order(backbone, data, classes=classes, recorded=recorded, check=check, device=device)
    if classes is None:
        labels = names_differ(labels, data.class_names, trained or ())
    return relabelled(data, labels), labels


def from_data_sets(train: Any, validation: Any, calibration: Any, *, seed: int, report_only: bool = False) -> Data:
    """The user's own data sets as the three parts; a part that is None is drawn from the training images.

    `report_only`: there are no training images, and validation images alone will do.

    Raises:
        DataError: if one is no map-style data set, or there are too few training images.
    """
    given = {"train": train, "calibration": calibration, "validation": validation}
    needed = "validation" if report_only else "train"
    delivered = {part: data_set for part, data_set in given.items() if data_set is not None or part == needed}
    for part, data_set in delivered.items():
        _require_map_style(data_set, ARGUMENTS[part])
    for one, other in combinations(delivered, 2):
        if same_images(delivered[one], delivered[other]):
            both = f"{ARGUMENTS[one]} and {ARGUMENTS[other]} are the same images"
            warn(f"{both}, so results are better than on new ones. Give other images, or leave {ARGUMENTS[other]} out.")
    parts, rule = complete(delivered, ARGUMENTS["train"], seed)
    sizes = {part: len(images) for part, images in parts.items()}
    split = {"kind": DATA_SETS, "parts": dict.fromkeys(delivered, SOURCE), "rule": rule, "seed": seed, "sizes": sizes}
    return Data(**parts, class_names=(), source=SOURCE, split=split, mirror=not holds_sided(train))


def _require_map_style(data: Any, argument: str) -> None:
    what = described(argument, data)
    if isinstance(data, Tensor):
        text = f"{what}. Give a data set of it: torch.utils.data.TensorDataset({argument})."
    elif isinstance(data, tuple) or (isinstance(data, list) and data and isinstance(data[0], Tensor)):
        of = "tensors" if all(isinstance(each, Tensor) for each in data) else "values"
        text = f"{what} of {of}. Give a data set of tensors: torch.utils.data.TensorDataset(X, y)."
    elif isinstance(data, str | bytes | Mapping | type) or not (
        hasattr(data, "__getitem__") and hasattr(data, "__len__")
    ):
        each = "of which each item is (image, label) or (image,): a loader's .dataset, a folder's ImageFolder"
        text = f"{what}. Give a map-style data set, {each}."
    elif not len(data):
        text = f"{argument} is empty. Give a data set with images."
    else:
        return
    raise DataError(text, argument=argument, value=data)


def labels_of(data: Data, backbone: Backbone, device: Any) -> LabelMap:
    """The labels of the user's own data sets. The backbone is tried on some of the images, on `device`.

    Raises:
        PteeError: if the images are not such as the backbone takes, in the words of `predict`; or as of `labels_as_given`.
    """
    size = backbone.input.input_size
    parts = {name: getattr(data, name) for name in ARGUMENTS}
    firsts = [_first_image(part, size[0]) for part in parts.values()]
    _require_one_size(dict(zip(parts, firsts, strict=True)), data)
    if not has_labels(data):
        return LabelMap(None, "The images have no labels.", remedy=("Give data sets of (image, label).",))
    try:
        labelled = {
            name: part if any(_is_labelled(part, place) for place in (0, len(part) - 1)) else []
            for name, part in parts.items()
        }
        data, judge = replace(data, **labelled), partial(labels_as_given, backbone, device=device)
        found = judge(data)
        return found if found.doubt else each_part_alone(found, data, judge, ARGUMENTS)
    except PteeError:
        raise
    except Exception as why:  # the backbone's own
        if ran_out_of_memory(why):
            raise
        for image in firsts:
            if image.shape[1:] != size:
                raise wrong_size(image, size, first_line(why)) from why
        raise


def _require_one_size(firsts: Mapping[str, Tensor], data: Data) -> None:
    """Refuse data sets of the user whose first images (1, c, h, w) differ in size."""
    wanted = tuple(firsts["train"].shape[1:])
    for part in data.split["parts"]:
        argument = ARGUMENTS[part]
        if (found := tuple(firsts[part].shape[1:])) != wanted:
            text = f"The first image of {argument} has the size {found}, and that of train_data {wanted}. Resize the images to one size."
            raise DataError(text, argument=argument)


def _first_image(part: Any, channels: int) -> Tensor:
    """(1, c, h, w)"""
    images, _ = batch_of([part[0]])
    require_images(images, channels)
    return images


def recipe_for(labels: LabelMap, recipe: Recipe) -> Recipe:
    """The recipe that the labels allow: without labels that can be trusted, the heads learn the backbone's answers.

    Raises:
        DataError: if the recipe asks for something that needs labels, as a backbone that learns does.
    """
    labels = undoubted(labels, recipe)
    _require_labels(labels, recipe)
    if labels.indices is not None and not labels.doubt:
        return recipe
    changes: dict[str, Any] = {} if recipe.training.resolved_targets == "soft" else {"training.targets": "pseudo"}
    if (target := recipe.thresholds.target(labelled=False)) is not None:
        changes |= {"thresholds.max_loss": None, f"thresholds.{target.kind}": target.limit}
    return recipe.with_settings(changes)


def described_change(recipe: Recipe, adapted: Recipe) -> str:
    """What `recipe_for` changed, in sentences with a blank before each; empty if nothing."""
    pseudo = adapted.training.targets == "pseudo" != recipe.training.targets
    limit = adapted.thresholds.max_fidelity_drop if recipe.thresholds.max_fidelity_drop is None else None
    target = "" if limit is None else f" Thresholds are chosen for fidelity: {Target('max_fidelity_drop', limit)}."
    return " The heads learn the backbone's own answers." * pseudo + target


def _require_labels(labels: LabelMap, recipe: Recipe) -> None:
    limit, question = recipe.thresholds.max_drop, recipe.confidence.question
    give = ("Give images with labels, or ", Argument.text("backbone", "frozen"), ".")
    if recipe.backbone == JOINT and labels.indices is None:
        raise DataError(f"{labels.reason} A backbone that learns needs labels. ", *give, argument="backbone")
    needs = [
        (limit is not None, Argument("max_drop", str(limit)), Argument("max_fidelity_drop", str(limit))),
        (recipe.training.targets == "labels", Argument.text("targets", "labels"), Argument.text("targets", "pseudo")),
        (question != "agrees", Argument.text("question", question), Argument.text("question", "agrees")),
    ]
    for needed, wanted, instead in needs:
        if needed and labels.indices is None:
            text = (f"{labels.reason} So there are no labels for ", wanted, ". ", *labels.remedy)
            raise DataError(*text, " Or give ", instead, ".", argument=wanted.name)
        if needed:
            labels.require_accuracy(wanted, instead)


def undoubted(labels: LabelMap, recipe: Recipe) -> LabelMap:
    """The labels. What a backbone does not know yet, but learns, is no reason to doubt them."""
    return (
        replace(labels, doubt="", remedy=(), right={})
        if recipe.backbone == JOINT and labels.indices is not None
        else labels
    )


def carried_out(recipe: Recipe, data: Data) -> Recipe:
    """The recipe as these images allow it: no mirror images of digits; calibrated only if there are enough images for it."""
    changes: dict[str, Any] = {}
    if not data.mirror:
        changes["training.mirror"] = False
    confidence, every = recipe.resolved().confidence, cast(Sized, data.train)
    usual = type(confidence).model_fields["calibration_share"].default  # another share that is too small is refused
    too_few = len(every) * confidence.calibration_share < MIN_IMAGES and confidence.calibration_share == usual
    if confidence.name == CALIBRATED and too_few:
        changes["confidence.name"] = MAX_PROB
    return recipe.with_settings(changes).resolved()


def images_of_each(data: Data, wanted: Recipe, recipe: Recipe, log: Log) -> tuple[Data, Any]:
    """The data with the training images of the heads, and the images to calibrate the confidence on, or None."""
    every: Any = data.train
    if wanted.confidence.name != CALIBRATED:
        return data, None
    if recipe.confidence.name != CALIBRATED:
        log(
            f"{number_of(len(every), 'training image', 'is')} too few to fit the confidence h on some of them: "
            "the heads learn from all of them, "
            "and h is the largest probability.\n"
        )
        return data, None
    for_heads, rest = hold_out(every, recipe.confidence.calibration_share, recipe.seed)
    log(
        f"The heads learn from {len(for_heads):,} of the {number_of(len(every), 'training image')}. The confidence h is fitted on the "
        f"other {len(rest):,}, drawn with seed {recipe.seed}.\n"
    )
    return replace(data, train=for_heads), rest


def hardly_learned(results: Results, num_classes: int, recipe: Recipe) -> list[str]:
    """A sentence, if a backbone that learned is hardly better than chance, else none."""
    right = results.rows[0].accuracy
    if recipe.backbone != JOINT or right is None:
        return []
    words = near_chance(right, results.samples, num_classes)
    return [f"{words}: it has hardly learned. Train longer, or with another backbone_lr."] if words else []


def has_labels(data: Data) -> bool:
    """Whether the images have labels that are classes of the backbone."""
    if (known := recorded(data.validation)) is not None:
        return known[0].labelled
    return _is_labelled(data.validation)


def for_training(recipe: Recipe, data: Data) -> Recipe:
    """The recipe: of images without labels the heads learn the backbone's answers, whatever the images to report on have."""
    if _is_labelled(data.train) or recipe.training.resolved_targets != "labels":
        return recipe
    if recipe.training.targets == "labels":
        asked, instead = Argument.text("targets", "labels"), Argument.text("targets", "pseudo")
        raise DataError(
            "The images of train_data have no labels for ", asked, ". Give ", instead, ".", argument="targets"
        )
    return recipe.with_settings({"training.targets": "pseudo"})


def _is_labelled(part: Any, place: int = 0) -> bool:
    """Whether the image at this place has a label."""
    _, labels = batch_of([part[place]])
    return labels is not None and int(labels[0]) != UNKNOWN_LABEL


def image_size(train_data: Any) -> tuple[int, int, int]:
    """(c, h, w) of the first image of a data set.

    Raises:
        DataError: if it is no image of a batch.
    """
    images, _ = batch_of([train_data[0]])
    _, channels, height, width = images.shape
    return channels, height, width
