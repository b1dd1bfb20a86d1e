"""Thresholds with a guarantee: with some confidence, no more is lost on new images than the target allows.

Learn then Test (Angelopoulos et al., 2021). A path of thresholds, from never leaving on, is fixed before an image is seen. Its steps
are tested one after another, each on all images, until one cannot be shown to keep the target. With that confidence all before it
keep it, however the images are distributed, if new ones are drawn like them. The cheapest of them is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, Context, Decimal
from operator import itemgetter

import torch
from torch import Tensor

from ptee._common.errors import Argument, DataError, PteeError
from ptee._common.text import number_of
from ptee.data.batches import number_of_repeats
from ptee.data.splits import shuffled
from ptee.exits.blend import MAX_EXITS, Exits, subsets
from ptee.exits.confidence import leaves
from ptee.exits.config import NEVER
from ptee.production.few_images import images_needed, least_limit
from ptee.tuning.config import EXAMPLES, Promise, Target
from ptee.tuning.p_values import images_needed_for_drop, least_limit_of_drop, p_value_of_drop, p_value_of_share
from ptee.tuning.reachable import losses_of
from ptee.tuning.solution import Solution
from ptee.tuning.traces import Traces

Threshold = tuple[float, ...]
ODDS = (1e-6, 1e2)  # of a loss, in costs of the backbone: the first and the last step of a path
STEPS, FEW_STEPS = 200, 25  # of a path; of each of several paths
ORDER_SHARE = 4  # one image of so many says in which order the others test several paths
LARGER, TRIES = 1.25, 12  # by how much larger limits are tried where nothing could be shown
MOST_REPEATS = 0.01  # of the rows; data sets hold a few copies
UP = Context(prec=2, rounding=ROUND_CEILING)  # to two digits


def require_images(target: Target, confidence: float | None, images: int, *, each_exit: bool = False) -> None:
    """Refuse a guarantee that so many images could not give even if none of them lost anything.

    With `each_exit`, some of them only say in which order the others test.

    Raises:
        PteeError: with the number that is needed, and with what so few could show.
    """
    if confidence is None:
        return
    if target.limit <= 0:
        text = " cannot be guaranteed: no number of images shows that nothing is ever lost. Give more, such as "
        raise PteeError(target.argument, text, Argument(target.kind, EXAMPLES[target.kind]), ".")
    of_drop = target.kind == "max_drop"
    needed = (images_needed_for_drop if of_drop else images_needed)(target.limit, 1 - confidence)
    tested = images - images // ORDER_SHARE * each_exit
    if tested >= needed:
        return
    in_all = needed + (needed - 1) // (ORDER_SHARE - 1) * each_exit
    least = (least_limit_of_drop if of_drop else least_limit)(tested, 1 - confidence) if tested else 1.0
    possible = math.ceil(least * 1e4 - 1e-9) / 1e4
    instead: tuple[Argument | str, ...] = (Argument(target.kind, f"{possible:g}"), " or more, ") if possible < 1 else ()
    too: tuple[Argument | str, ...] = (" and ", Argument("each_exit", "True")) if each_exit else ()
    raise PteeError(
        target.argument, " at ", Argument("confidence", f"{confidence}"), *too, f" needs at least {number_of(in_all, 'image')}, and {number_of(images, 'image', 'is')} there. "
        "Give more images, ", *instead, "or no ", Argument("each_exit" if images >= needed else "confidence"), ".", value=target.limit,
    )  # fmt: skip


def require_unwatched(target: Target, confidence: float | None, patience: int | None) -> None:
    """Refuse a guarantee by images that early stopping goes by: it picks the epoch with the lowest loss on them.

    Raises:
        PteeError: naming both settings, and what to do instead.
    """
    if confidence is None or patience is None:
        return
    later = (
        f"ptee tune RUN --data FOLDER --{target.kind.replace('_', '-')} {target.limit:g} --confidence {confidence:g}"
    )
    raise PteeError(
        Argument("patience", f"{patience}"), " picks the epoch by the calibration images, so these cannot show what ",
        Argument("confidence", f"{confidence:g}"), f" guarantees. Leave one of the two out. With patience, other images can show it afterwards: {later}, or ptee.tune in Python.", value=patience,
    )  # fmt: skip


def require_different(marks: Tensor | None) -> None:
    """Refuse a guarantee by images with these marks (n,) if many of them are there more than once. None: nothing is known of them.

    The tests count each row as another image that was drawn.
    """
    repeats = 0 if marks is None else number_of_repeats(marks)
    if marks is None or repeats <= MOST_REPEATS * len(marks):
        return
    n = len(marks)
    raise DataError(
        f"A guarantee counts each image once, and these {n:,} rows show {number_of(n - repeats, 'different image')}. Give a data set that has "
        "each image once, or a loader without a sampler that draws an image twice.",
        argument="data",
    )


def promised(
    traces: Traces, without: Solution, confidence: float, *, one_threshold: bool = False, each_exit: bool = False
) -> Solution:
    """The cheapest thresholds that are shown to keep a target; all exits are off if none are.

    Args:
        traces: of the own answers to images that neither the backbone, the heads nor the confidence were fitted to.
        without: the solution without a guarantee, for the same target.
        confidence: with which the target is kept: in at most 1 - confidence of all draws of such images it is not.
        one_threshold: the same T for all exits.
        each_exit: the target is kept among the images that leave at each exit, too. So at every exit enough must leave; a
            quarter of the images says in which order thresholds are tested.

    Raises:
        PteeError: if there are too few images.
    """
    target = without.target
    require_images(target, confidence, images := traces.answers.shape[1], each_exit=each_exit)
    order, tested = _split(traces) if each_exit else (None, traces)
    path = _path(traces, range(traces.exits), STEPS, one_threshold)
    steps = list(path) if order is None else _paths(traces, one_threshold)

    def cheapest(target: Target) -> Threshold:
        ordered = steps if order is None else _ordered(steps, order, tested, target, 1 - confidence)
        return _cheapest(traces, _kept(ordered, tested, target, 1 - confidence, each_exit))

    off = _off(best := cheapest(target))
    remark = "" if len(off) < traces.exits else _instead(cheapest, target, tested.answers.shape[1])
    promise = Promise(confidence, tested.answers.shape[1], each_exit, without.threshold, without.off, without.price)
    score = traces.score(traces.leaving(best), off) if len(off) < traces.exits else without.backbone
    return replace(
        without, threshold=best, off=off, score=score, samples=images, margin=0.0, blend=None, remark=remark, promise=promise
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the path


def _path(traces: Traces, on: Sequence[int], steps: int, one_threshold: bool) -> Iterator[Threshold]:
    """Thresholds of these exits, each step lower than the one before.

        (1 - T_n) / T_n = s_n / w,  s_n = 1 - cost of leaving at exit n

    If h_n were the probability that nothing is lost, each step would take what saves most for its loss: leaving at exit n saves
    s_n and loses w (1 - h_n), with w what a loss weighs. Where it is not, a step is dearer than need be, and as safe.
    """
    saved = [1 - price for price in traces.prices_alone]
    for odds in torch.logspace(
        math.log10(ODDS[0]), math.log10(ODDS[1]), steps, dtype=torch.float64, device="cpu"
    ).tolist():
        yield tuple(
            1 / (1 + odds * (1.0 if one_threshold else s)) if n in on and s > 0 else NEVER for n, s in enumerate(saved)
        )


def _paths(traces: Traces, one_threshold: bool) -> list[Threshold]:
    """The steps of a path for each choice of the exits that can pay."""
    pay = [n for n, price in enumerate(traces.prices_alone) if price < 1]
    some: list[Exits] = subsets(len(pay))[1:] if len(pay) <= MAX_EXITS else [tuple(range(len(pay)))]
    every = [tuple(pay[i] for i in chosen) for chosen in some]
    return [step for on in every for step in _path(traces, on, FEW_STEPS, one_threshold)]


def _split(traces: Traces) -> tuple[Traces, Traces]:
    """One image of four, drawn, and the others."""
    order = shuffled(traces.answers.shape[1])
    first = len(order) // ORDER_SHARE
    return traces.rows(order[:first]), traces.rows(order[first:])


def _ordered(steps: list[Threshold], order: Traces, tested: Traces, target: Target, delta: float) -> list[Threshold]:
    """The steps that some images let expect to be shown by the others, the surest first."""
    times = tested.answers.shape[1] / max(1, order.answers.shape[1])
    expected = list(_p_values(order, steps, target, delta, each_exit=True, times=times))
    surest = sorted(zip(expected, steps, strict=True), key=itemgetter(0))
    return [step for p, step in surest if p < 1]


# ---------------------------------------------------------------------------------------------------- the test


def _kept(steps: list[Threshold], traces: Traces, target: Target, delta: float, each_exit: bool) -> list[Threshold]:
    """The steps up to the first one that is not shown to keep the target."""
    from mapie.risk_control.fwer_control import control_fwer  # takes a second to import

    p_values: list[float] = []
    for p in _p_values(traces, steps, target, delta, each_exit):
        p_values.append(p)
        if p > delta:
            break
    return [steps[i] for i in control_fwer(p_values, delta, "fixed_sequence")] if p_values else []


def _p_values(
    traces: Traces, steps: list[Threshold], target: Target, delta: float, each_exit: bool, times: float = 1.0
) -> Iterator[float]:
    """For each step, that it loses more than is allowed, all in all, or at one at least of the exits that are on.

    `times`: as if there were so many times as many images.
    """
    if not steps:
        return
    leaving = _leaving(traces, steps)
    loss = losses_of(traces, target).gather(0, leaving)
    every = [leaving == n for n in range(traces.exits)] if each_exit else [leaving >= 0]
    counts = [[((loss > 0) & part).sum(1), ((loss < 0) & part).sum(1), part.sum(1)] for part in every]
    numbers = (times * torch.stack([torch.stack(each) for each in counts])).round().long().permute(2, 0, 1).tolist()
    for step, parts in zip(steps, numbers, strict=True):
        tested = [part for n, part in enumerate(parts) if not each_exit or step[n] < NEVER]
        yield max(_p_value(lost, won, images, target, delta) for lost, won, images in tested)


def _p_value(lost: int, won: int, images: int, target: Target, delta: float) -> float:
    if not images:
        return 1.0
    if target.kind == "max_fidelity_drop":
        return p_value_of_share(lost, images, target.limit)
    return p_value_of_drop(lost, won, images, target.limit, delta)


def _leaving(traces: Traces, steps: list[Threshold]) -> Tensor:
    """(S, n) the exit at which each image leaves at each step."""
    limits = torch.tensor(steps, dtype=torch.float64, device=traces.confidence.device)
    leaving = traces.answers.new_full((len(steps), traces.answers.shape[1]), traces.exits, dtype=torch.long)
    for n in reversed(range(traces.exits)):
        leaving = torch.where(leaves(traces.confidence[n], limits[:, n, None]), n, leaving)
    return leaving


def _cheapest(traces: Traces, steps: list[Threshold]) -> Threshold:
    """The step with the lowest cost, or time if that is known; all exits off if none is cheaper than the backbone."""
    price, best = min(zip(_prices(traces, steps), steps, strict=True), default=(1.0, ()))
    return best if price < 1 else (NEVER,) * traces.exits


def _prices(traces: Traces, steps: list[Threshold]) -> list[float]:
    if not steps or traces.times is not None:
        return [traces.score(traces.leaving(step), _off(step)).price for step in steps]
    on = torch.tensor(steps, dtype=torch.float64, device=traces.costs.device) < NEVER
    return traces.costs_where(on).gather(1, _leaving(traces, steps)).mean(1).tolist()


def _off(threshold: Threshold) -> tuple[int, ...]:
    return tuple(n for n, t in enumerate(threshold) if t >= NEVER)


def _instead(cheapest: Callable[[Target], Threshold], target: Target, images: int) -> str:
    """That nothing could be shown, and which limit could, with what to type: the least of two digits, shown as it is named."""
    shown = number_of(images, "image", "does")

    def shows(limit: Decimal) -> bool:
        return min(cheapest(replace(target, limit=float(limit)))) < NEVER

    smaller = Decimal(f"{target.limit:.9g}")
    for power in range(1, TRIES):
        limit = UP.create_decimal(f"{target.limit * LARGER**power:.9g}")
        if limit >= 1:
            break
        if shows(limit):
            least = f"{float(_least(shows, smaller, limit)):g}"
            typed = f"--{target.kind.replace('_', '-')} {least}, in Python {target.kind}={least}"
            return f"{shown} not show that anything cheaper keeps this; {'it does' if images == 1 else 'they do'} for {least} ({typed})."
        smaller = limit
    return f"{shown} not show that anything cheaper than the backbone keeps this."


def _least(shows: Callable[[Decimal], bool], low: Decimal, high: Decimal) -> Decimal:
    """The least limit of two digits that can be shown, between one that cannot and one that can."""
    while (middle := UP.create_decimal((low + high) / 2)) not in (low, high):
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high
