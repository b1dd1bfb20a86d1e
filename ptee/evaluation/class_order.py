"""Which order of its classes a backbone is right under, tried on images; and whether that is to be doubted.

Labels under which it is near chance, or takes classes for each other, are doubted: its weights may be random, or it may know its
classes in another order.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ptee._common.errors import Advice, Argument, DataError, some
from ptee.analysis.freezing import one_parameter, running_on
from ptee.data.batches import UNKNOWN_LABEL, batches, labels_of_other_classes, numbered, split_batch
from ptee.data.labels import IMAGENET_CLASSES, SURE, LabelMap, class_orders, map_labels, near_chance
from ptee.data.pictures import folders_within
from ptee.data.splits import FILES, PARTS, Data

CHECKED, BATCH = 128, 32  # images that the backbone is tried on
OF_A_CLASS = 3  # images of a class that say what it is taken for
CLEAR = 8  # times as many in the wrong class as in the right one; classes that cannot be told apart show about 3
OTHERS = "takes most images of some classes for others: "
NAME_THEM: Advice = ("Give a file that names them in its order, one name a line (", Argument("classes", "FILE"), ").")
RECORD_AGAIN: Advice = (
    "Names get other numbers by ptee trace or ptee cache with --overwrite and --classes FILE, which names the backbone's classes in its "
    "order. Labels that are numbers must be mended where they stand.",
)
SORT_ALIKE: Advice = ("Sort the images of all parts into class folders alike.",)
WORDS = {
    "train": "Training images alone",
    "calibration": "Calibration images alone",
    "validation": "Validation images alone",
}
TRAIN_IT: Advice = ("Give trained weights (", Argument("weights", "FILE"), ").")


def choose_class_order(
    backbone: Any,
    data: Data,
    *,
    classes: Sequence[str] | str | Path | None = None,
    recorded: Sequence[str] | None = None,
    check: bool = True,
    device: str | torch.device | None = None,
) -> LabelMap:
    """How the classes of the data become the backbone's. Of timm's and torchvision's order it takes the more accurate one.

    With `check`, the backbone is tried on some images even if there is one order only, so that labels under which it is near
    chance, or takes classes for each other, are doubted. The backbone (with `module` and `num_classes`) computes on `device`, by
    default where it is.

    `recorded` are the backbone's classes as a run says. They are taken, unless the backbone is near chance under them and is
    not in the order of their names.

    Raises:
        DataError: as of `map_labels`, if a picture cannot be decoded, or if the recorded classes are not the backbone's.
    """
    first = map_labels(data.class_names, backbone.num_classes, classes=recorded if classes is None else classes)
    maps = {"": first} if classes is not None else _candidates(data, first)
    if classes is None and recorded is not None:
        maps = {"": first} | _rivals(data, first, backbone.num_classes)
    if first.indices is None:
        return _one_level_up(first, data, backbone.num_classes)
    if not (check or len(maps) > 1):
        return first
    tried = _try(backbone.module, data, list(maps.values()), device)
    _, answers, labels = tried
    right = {name: _share_right(answers, labels, each) for name, each in maps.items()}
    best = max(right, key=lambda name: right[name])  # of equal ones the first
    if classes is None and recorded is not None:
        best = ""
        _require_recorded(recorded, maps, answers, labels, backbone.num_classes)
    found = maps[best]
    if best:
        found = replace(found, reason=_reason(maps, best, right, len(labels)))
    judged = _judged(found, backbone, data, NAME_THEM, device, tried)
    if len(maps) > 1 and not judged.doubt:
        judged = _judged(found, backbone, data, NAME_THEM, device)
    if judged.doubt:
        return judged
    return each_part_alone(judged, data, lambda only: _judged(found, backbone, only, SORT_ALIKE, device), WORDS)


def each_part_alone(
    found: LabelMap, data: Data, judge: Callable[[Data], LabelMap], words: Mapping[str, str]
) -> LabelMap:
    """The labels, which are doubted where those of one part are that the data deliver: the many images of another may hide them.

    `judge` gives the labels of data that have one part only, and `words` how each part is called.
    """
    given = [part for part in data.split.get("parts", ()) if len(getattr(data, part))]
    for part in given if len(given) > 1 else ():
        alone = judge(replace(data, **{name: getattr(data, name) if name == part else [] for name in PARTS}))
        if alone.doubt:
            return replace(alone, doubt=f"{words[part]}: {alone.doubt}")
        found = replace(found, right={**found.right, **alone.right})
    return found


def labels_as_given(backbone: Any, data: Data, *, device: str | torch.device | None = None) -> LabelMap:
    """For labels that are already the backbone's class numbers. They are doubted as those of folders are.

    Raises:
        DataError: if only some of them are class numbers, or the data cannot form batches of images.
    """
    found = LabelMap(tuple(range(backbone.num_classes)), "The labels are taken for the backbone's class numbers.")
    tried = _try(backbone.module, data, [found], device)
    labels = tried[2]
    fault = labels_of_other_classes(labels, backbone.num_classes)
    remedy = ("Check that the labels are the backbone's class numbers.",)
    if fault:
        if ((labels >= 0) & (labels < backbone.num_classes)).any():
            remedy = ("Leave such images out, or number them as the backbone's classes.",)
        return replace(found, reason="", doubt=f"{fault[0].upper()}{fault[1:]}.", remedy=remedy)
    return _judged(found, backbone, data, remedy, device, tried)


def labels_as_recorded(backbone: Any, answers: Tensor, labels: Tensor) -> LabelMap:
    """For labels (n,) that were recorded with the backbone's answers (n,). They are doubted as those of folders are."""
    found = LabelMap(tuple(range(backbone.num_classes)), "")
    known = labels != UNKNOWN_LABEL
    answers, labels = answers[known], labels[known]
    if not len(labels) or labels_of_other_classes(labels, backbone.num_classes):  # then there is no accuracy at all
        return found
    return _doubted(found, backbone, answers, labels, RECORD_AGAIN)


def another_order(name: str, answers: Tensor, known: Tensor, num_classes: int) -> str:
    """A sentence, if a network of this name seems to know its classes in another order than the backbone: by the answers (n,) of both."""
    same, n = (answers == known).double().mean().item(), len(answers)
    pairs = _exchanged(LabelMap(tuple(range(num_classes)), ""), answers, known)
    if near_chance(same, n, num_classes):
        why = f"{name} agrees with the backbone on {same:.1%} of {n:,} images, and would on {1 / num_classes:.1%} by chance"
    elif pairs:
        why = f"{name} {OTHERS}{pairs}"
    else:
        return ""
    return f"{why}: it may know its classes in another order. Give one that knows them as the backbone does."


def _candidates(data: Data, first: LabelMap) -> dict[str, LabelMap]:
    """The possible maps, by the library that numbers class folders so; of equally good ones, the first is taken."""
    names = list(data.class_names)
    orders = _orders(names)
    all_numbers = len(names) == IMAGENET_CLASSES and sorted(first.indices or ()) == list(range(IMAGENET_CLASSES))
    is_open = data.split["kind"] in FILES and len({tuple(order) for order in orders.values()}) > 1
    if not is_open or not (first.classes or all_numbers):
        return {"": first}
    first_library = "timm" if all_numbers else "torchvision"  # timm's order counts as numbers do
    preferred = sorted(orders, key=lambda order: not order.startswith(first_library))  # of equally good ones
    places = {order: {name: i for i, name in enumerate(orders[order])} for order in preferred}
    return {
        order: LabelMap(tuple(place[name] for name in names), "", tuple(orders[order]))
        for order, place in places.items()
    }


def _orders(names: Sequence[str]) -> dict[str, list[str]]:
    """The order of each library; as "timm NFC" also that of the names with accents written so, where it is another."""
    found = class_orders(names)
    for form in ("NFC", "NFD"):
        here = {unicodedata.normalize(form, name): name for name in names}
        if len(here) < len(names):  # two names that look alike would be one
            continue
        for library, order in class_orders(list(here)).items():
            own = [here[name] for name in order]
            if own != found[library]:
                found[f"{library} {form}"] = own
    return found


def _one_level_up(found: LabelMap, data: Data, num_classes: int) -> LabelMap:
    """Another remedy for folders in class folders that are as many as the backbone's classes: animals/cat, animals/dog, things/car."""
    inner = folders_within(file for part in PARTS for file in getattr(getattr(data, part), "files", []))
    if len(inner) != num_classes:
        return found
    text = f"Their folders hold {num_classes} others ({some(inner)}), as many as it has classes: if these are the classes, move them up."
    return replace(found, remedy=(text,))


def _rivals(data: Data, recorded: LabelMap, num_classes: int) -> dict[str, LabelMap]:
    """What would be taken if the run had recorded no classes, where that is something else."""
    own = map_labels(data.class_names, num_classes)
    found = {} if own.indices is None else _candidates(data, own)
    return {name or "names": each for name, each in found.items() if each.indices != recorded.indices}


def _require_recorded(
    recorded: Sequence[str], maps: dict[str, LabelMap], answers: Tensor, labels: Tensor, num_classes: int
) -> None:
    """Refuse a run's classes if the backbone is near chance where they differ from a rival, and right under the rival."""
    first, *rivals = maps.values()
    for rival in rivals:
        rows = torch.tensor([first(label) != rival(label) for label in labels.tolist()], device="cpu")
        right, other = (_share_right(answers[rows], labels[rows], each) for each in (first, rival))
        n = int(rows.sum())
        if n and _doubt(right, n, num_classes) and not _doubt(other, n, num_classes):
            raise DataError(
                f"The run says that the backbone's classes are {some(recorded)}. Of {n} images whose class is in question the "
                f"backbone is right on {right:.0%} so, and on {other:.0%} in the order of their names: the run was changed. Copy it "
                "again, or say which is right. ", *NAME_THEM,
            )  # fmt: skip


def _parts_of(data: Data) -> list[str]:
    """The parts that hold images."""
    return [name for name in PARTS if len(getattr(data, name))]


def _some_images(data: Data, maps: Sequence[LabelMap]) -> Any:
    """Images from all over the data. If there are several maps, only images on whose label they differ."""
    parts: list[Any] = [getattr(data, name) for name in _parts_of(data)]
    places: Sequence[int] = range(sum(map(len, parts)))
    if len(maps) > 1:
        labels = [label for part in parts for _, label in part.rows]
        places = [i for i in places if len({each(labels[i]) for each in maps}) > 1] or places
    n = min(CHECKED, len(places))
    return Subset(ConcatDataset(parts), [places[i * len(places) // n] for i in range(n)])


@torch.no_grad()
def _try(
    module: torch.nn.Module, data: Data, maps: Sequence[LabelMap], device: str | torch.device | None
) -> tuple[Any, Tensor, Tensor]:
    """Some images, the backbone's answers (n,) and the labels (n,). The backbone is left as it was."""
    images, like = _some_images(data, maps), one_parameter(module)
    place = like.device if device is None else torch.device(device)
    answers, labels = [], []
    with running_on(place, module):
        for batch in batches(images, batch_size=BATCH, shuffle=False):
            x, y = split_batch(batch)
            answers.append(module(x.to(place, like.dtype, copy=True)).argmax(-1).cpu())
            labels.append(numbered(y, x))
    return images, torch.cat(answers), torch.cat(labels)


def _share_right(answers: Tensor, labels: Tensor, label_map: Callable[[int], int]) -> float:
    return (answers == labels.new_tensor([label_map(label) for label in labels.tolist()])).double().mean().item()


def _by_part(
    data: Data, images: Any, answers: Tensor, labels: Tensor, label_map: LabelMap
) -> dict[str, tuple[float, int]]:
    """For each part of the data that some of these images are of: the share that is right, and of how many."""
    part = torch.tensor(
        [bisect_right(images.dataset.cumulative_sizes, place) for place in images.indices], device="cpu"
    )
    rows = {name: part == k for k, name in enumerate(_parts_of(data))}
    return {
        name: (_share_right(answers[own], labels[own], label_map), int(own.sum()))
        for name, own in rows.items()
        if own.any()
    }


def _reason(maps: dict[str, LabelMap], best: str, right: dict[str, float], n: int) -> str:
    other = max(maps.keys() - {best}, key=lambda order: (right[order], order))
    orders = {order: some(each.classes or ()) for order, each in maps.items()}
    (library, _, form), (another, _, _) = best.partition(" "), other.partition(" ")
    accents = f" of names with accents as {form}" if form else ""
    return (
        f"The {len(maps[best].classes or ())} classes are taken in {library}'s order{accents}: {orders[best]}; {another} would "
        f"number them in another: {orders[other]}. Of {n} images whose class is in question the backbone is right on "
        f"{right[best]:.0%} in the first order, and on {right[other]:.0%} in the second."
    )


# ------------------------------------------------------------------------------------------------ doubts


def _judged(found: LabelMap, backbone: Any, data: Data, remedy: Advice, device: Any, tried: Any = None) -> LabelMap:
    """The labels, in doubt as of `_doubted`, and on which share of each part the backbone is right. `tried`: as of `_try`."""
    images, answers, labels = tried or _try(backbone.module, data, [found], device)
    doubted = _doubted(found, backbone, answers, labels, remedy)
    return replace(doubted, right=_by_part(data, images, answers, labels, found))


def _doubted(found: LabelMap, backbone: Any, answers: Tensor, labels: Tensor, remedy: Advice) -> LabelMap:
    """The labels, in doubt if the backbone is near chance under them, or takes classes for each other. Random weights say nothing
    about an order of classes."""
    right, n = _share_right(answers, labels, found), len(labels)
    if getattr(backbone, "is_random", False):
        words = near_chance(right, n, backbone.num_classes)
        return replace(found, doubt=f"{words}: its weights are random.", remedy=TRAIN_IT) if words else found
    doubt = _doubt(right, n, backbone.num_classes)
    if not doubt and (pairs := _exchanged(found, answers, labels)):
        doubt = f"The backbone {OTHERS}{pairs}. It may know its classes in another order."
    return replace(found, doubt=doubt, remedy=remedy if doubt else found.remedy)


def _exchanged(found: LabelMap, answers: Tensor, labels: Tensor) -> str:
    """Which classes the backbone takes for which others, if others fit most images of some far better, one to one; else empty.

    In a ring, a for b, b for c and c for a, classes have another order. In a chain that ends in a class without images, a for b and
    b for c, one class is missing, so that the next ones were given lower numbers. Where most classes are taken for others, they have
    numbers of their own.

    No backbone that knows its classes does so, however often it is wrong. A few images can show it by luck, and of classes that
    a backbone cannot tell apart some do: over all of these together, those in the wrong class must be many times those in the right
    one, and more by several standard deviations; without a ring, they must be most of its mistakes, too.
    """
    truth = torch.tensor([found(label) for label in labels.tolist()], device="cpu")
    for moves in (_better(answers, truth), _shift(answers, truth)):
        moved = sum(int((answers[truth == one] == other).sum()) for one, other in moves.items())
        right = sum(int((answers[truth == one] == one).sum()) for one in {*moves, *moves.values()})
        is_most = 2 * moved > int((answers != truth).sum()) or any(_returns(one, moves) for one in moves)
        if is_most and moved > CLEAR * right and moved - right > SURE * (moved + right) ** 0.5:
            name = found.classes or range(1 + max(*moves, *moves.values()))
            return some([f"{name[one]} for {name[other]}" for one, other in moves.items()])
    return ""


def _better(answers: Tensor, truth: Tensor) -> dict[int, int]:
    """The classes that others fit better, one to one, so that the most answers are right in all; those with most images of a class.

    A single class that is taken for one without images says nothing, unless these are most of the classes.
    """
    from scipy.optimize import linear_sum_assignment

    width = 1 + int(max(answers.max(), truth.max()))
    total = truth.bincount(minlength=width)
    pairs, times = (truth * width + answers).unique(return_counts=True)
    one, other = pairs // width, pairs % width
    enough = total[one] >= OF_A_CLASS
    moved = enough & (2 * times > total[one]) & (one != other)
    # An assignment of many thousand classes would take gigabytes: the others stay what they are.
    numbers = torch.cat((one[moved], other[moved])).unique()
    here = enough & torch.isin(one, numbers) & torch.isin(other, numbers)
    fits = (
        torch.eye(len(numbers), dtype=torch.float64, device="cpu") / 2
    )  # where both fit alike, a class stays what it is
    fits[torch.searchsorted(numbers, one[here]), torch.searchsorted(numbers, other[here])] += times[here]
    better = {
        int(numbers[at]): int(numbers[to])
        for at, to in zip(*linear_sum_assignment(fits, maximize=True), strict=True)
        if at != to and 2 * fits[at, to] > total[numbers[at]]
    }
    if len(better) > 1 and 2 * len(better) > int((total > 0).sum()):
        return better
    return {one: other for one, other in better.items() if other in better or one in better.values()}


def _shift(answers: Tensor, truth: Tensor) -> dict[int, int]:
    """Of many classes there are few images each: neighbours that are taken for the class so many places on, if nearly all such
    mistakes are among the neighbours, and hardly any image of theirs is known."""
    away = answers - truth
    wrong = away[away != 0]
    if not len(wrong):
        return {}
    places = int(wrong.mode().values)
    shifted = away == places
    times, known = (truth[rows].bincount(minlength=int(truth.max()) + 1).tolist() for rows in (shifted, away == 0))
    # The neighbours with the most such mistakes, where an image that is known counts against CLEAR of them.
    best, start, total = (0, 0, 0), 0, 0
    for number, n in enumerate(times):
        total += n - CLEAR * known[number]
        if total <= 0:
            start, total = number + 1, 0
        best = max(best, (total, start, number))
    inside = shifted & (truth >= best[1]) & (truth <= best[2])
    found = truth[inside].unique().tolist()
    is_shift = CLEAR * int(inside.sum()) > (CLEAR - 1) * int(shifted.sum())
    return {number: number + places for number in found} if is_shift and len(found) >= OF_A_CLASS else {}


def _returns(start: int, step: Mapping[int, int]) -> bool:
    """Whether the steps from here lead back to it."""
    place: int | None = step[start]
    for _ in step:
        if place is None or place == start:
            break
        place = step.get(place)
    return place == start


def _doubt(right: float, n: int, num_classes: int) -> str:
    words = near_chance(right, n, num_classes)
    return f"{words}: it may know its classes in another order." if words else ""
