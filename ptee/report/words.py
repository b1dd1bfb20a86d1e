"""What a page says in words and small tables."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from ptee import __version__
from ptee._common.text import beside, describe_thresholds, number_of, percent, printable, quoted, threshold_words
from ptee.evaluation.results import confidence_quality, doubted
from ptee.exits.blend import OWN
from ptee.exits.times import BatchTimes
from ptee.model.card import other_settings
from ptee.model.early_exit import EarlyExitModel
from ptee.production.curve import ROUNDING
from ptee.report import facts
from ptee.report.reported import Reported
from ptee.tuning.tune import interval_words, known_images

Rows = list[tuple[str, ...]]


class Number(NamedTuple):
    """A number that stands out: its name, value, and what it means."""

    name: str
    value: str
    words: str


def what_it_is(model: EarlyExitModel) -> Iterator[str]:
    """Two sentences for somebody who sees this for the first time."""
    kept = "learned together with them" if model.origin.learnt else "are as they were"
    yield (
        f"{model.plan.backbone} is an image classifier. This run gives it {number_of(len(model.exits), 'early exit')}: small classifiers inside of "
        f"it, each with a confidence h. An image that an exit is sure enough about gets its answer there and skips the rest. The "
        f"network's own weights {kept}."
    )


def numbers(of: Reported) -> list[Number]:
    """What it saves and what it loses."""
    own = of.own
    if own is None:
        return []
    bare = _bare(of)
    found = [Number("cost", f"{own.cost:.3f}", f"of the arithmetic: {_less(own.cost)}")]
    if own.time is not None and of.times is not None:
        found.append(Number("time", f"{own.time:.3f}", f"expected, of {of.times.unit}"))
    if own.accuracy is not None and bare is not None:
        found.append(
            Number("accuracy", f"{own.accuracy:.4f}", f"{bare:.4f} without exits: {_lost(bare - own.accuracy)}")
        )
    found.append(Number("fidelity", percent(own.fidelity), "of the answers are the backbone's"))
    early = 1 - own.right[-1] - own.wrong[-1]
    found.append(Number("leave early", percent(early), "of the images"))
    return found


def _less(cost: float) -> str:
    return f"{percent(1 - cost, 0)} saved" if cost < 1 else f"{percent(cost - 1, 0)} more"


def _lost(drop: float) -> str:
    points = f"{100 * abs(drop):.2f} points"
    return f"{points} {'lost' if drop > 0 else 'gained'}" if points != "0.00 points" else "none lost"


def _bare(of: Reported) -> float | None:
    """The backbone's own accuracy on the same images."""
    if of.traces is None:
        rows = of.results.get("rows")
        return rows[0]["accuracy"] if rows else None
    return of.traces.alone.score_at(of.traces.exits).accuracy


def what_it_gives(of: Reported) -> Iterator[str]:
    """Where images leave, and what that saves and loses."""
    own = of.own
    if own is None:
        return
    n = of.traces.answers.shape[1] if of.traces is not None else of.results.get("samples", 0)
    *early, end = (a + b for a, b in zip(own.right, own.wrong, strict=True))
    left = [f"{percent(share)} leave at exit {k}" for k, share in enumerate(early) if k not in of.model.off]
    seen = "" if of.traces is None else known_images(of.model, of.traces.marks)
    which = "" if seen else " that the exits had not seen"
    yield f"Of {number_of(n, 'image')}{which}, {', '.join([*left, f'{percent(end)} go through the whole network'])}."
    if (target := of.target) is not None:
        yield _kept(of, own, target, n)
    if of.traces is None:
        yield "No image was read for this page, so it says only what the run recorded."
        if others := other_settings(of.model, of.results):
            yield f"{printable(others)} Leave out --recorded to measure it as it is."
    elif seen:
        yield seen


WISHES = {  # by kind of target: what was asked for, and what was found
    "max_drop": ("to lose at most {:g} of accuracy", "lost"),
    "max_fidelity_drop": ("to change at most {:g} of the answers", "changed"),
    "max_cost": ("to cost at most {:g}", "spent"),
}


def cheapest(of: Reported) -> Iterator[str]:
    """What is cheapest within each allowed drop; first within the run's own target, or why that is not among them."""
    assert of.comparison is not None
    target, drop = of.target, of.target_drop(of.comparison.accuracy is not None)
    said = dict(zip(of.comparison.drops, of.comparison.verdict, strict=True))
    if drop in said:
        yield f"{said.pop(drop)} This drop is the run's own target."
    elif target is not None:
        yield f"{_asked(target)}, and no sentence here is about that."
    yield from said.values()


def _asked(target: Mapping[str, Any]) -> str:
    asked, limit = WISHES[target["kind"]][0], target["limit"]
    words = asked.format(limit) if limit >= 0 else f"to gain at least {-limit:g} of accuracy"
    return f"The thresholds were chosen {words}"


def _kept(of: Reported, own: facts.Step, target: Mapping[str, Any], n: int) -> str:
    """What was asked for, and whether it was kept on these n images."""
    done, words, bare, unit = WISHES[target["kind"]][1], _asked(target), _bare(of), target["unit"]
    if target["kind"] == "max_drop" and (bare is None or own.accuracy is None or doubted(of.model, bare, n)):
        return f"{words}."
    if target["kind"] == "max_cost" and unit:
        return f"{words} of {unit}. On these images {own.cost:.4f} of the operations was spent."
    drop = (bare or 0) - (own.accuracy or 0)
    found = {"max_drop": drop, "max_fidelity_drop": 1 - own.fidelity, "max_cost": own.cost}[target["kind"]]
    kept = "kept" if found <= target["limit"] + ROUNDING else "missed"
    some_leave = own.right[-1] + own.wrong[-1] < 1 - ROUNDING and target["kind"] != "max_cost"
    interval = f" {interval_words(own.fidelity, n)}" * some_leave
    told = beside(found, target["limit"]).removeprefix("-")
    return f"{words}. On these images {told} was {'gained' if found < 0 else done}{interval}: {kept}."


def recorded_verdict(of: Reported) -> Iterator[str]:
    """What was wrong with the run when it was made, if no image was read since."""
    if of.traces is None:
        yield from map(str, of.results.get("verdict") or [])


# ---------------------------------------------------------------------------------------------------- the slider


def of_step(of: Reported, step: facts.Step) -> str:
    """What the slider shows beside T."""
    t = describe_thresholds(of.model.threshold, of.model.off) if step.t is None else f"{step.t:.2f}"
    accuracy = "" if step.accuracy is None else f"accuracy {step.accuracy:.4f}, "
    time = "" if step.time is None else f", time {step.time:.3f}"
    return f"T = {t}: cost {step.cost:.3f}{time}, {accuracy}fidelity {step.fidelity:.4f}"


def command(of: Reported, step: facts.Step) -> str:
    """What measures these thresholds."""
    if of.in_python:
        return "ptee.evaluate(model, val_data)" if step.t is None else f"model.threshold = {step.t:g}"
    if step.t is None:
        return f"ptee evaluate {quoted(of.run)}"
    return f"ptee evaluate {quoted(of.run)} --threshold {step.t:g}"


# ---------------------------------------------------------------------------------------------------- tables


def times_until(times: BatchTimes | None) -> list[float]:
    """(E+1,) share of the backbone's time up to each exit, in whole batches; empty if it is not known."""
    return [] if times is None else list(accumulate(times.segments[:, -1].tolist()))


def exits_table(of: Reported) -> Rows:
    """A row for each exit."""
    plan, times, own = of.model.plan, times_until(of.times), of.own
    rows: Rows = [
        ("exit", "behind", "head", "backbone so far", *["its time"] * bool(times), "head's cost", "T", "leave here")
    ]
    thresholds = threshold_words(of.model.threshold, plan.off)
    for n, (e, t) in enumerate(zip(plan.exits, thresholds, strict=True)):
        leave = "-" if own is None or n in plan.off else percent(own.right[n] + own.wrong[n])
        time = [percent(times[n])] if times else []
        rows.append((str(n), e.name, e.head, percent(e.backbone_cost), *time, percent(e.head_cost), t, leave))
    return rows


def calibration_table(of: Reported) -> Rows:
    """How good each confidence is."""
    assert of.traces is not None
    own = of.model.answers == OWN  # of blended answers it is the weights that were fitted
    fitted = (of.results.get("calibration") or {}).get("images") if own else None
    images = [number_of(fitted, "image")] if isinstance(fitted, int) else []
    rows: Rows = [("exit", "calibration error", "AUROC", *["fitted on"] * len(images))]
    for n in range(of.traces.exits):
        error, auroc = confidence_quality(of.model, of.traces, n).values()
        shown = "-" if auroc is None else f"{auroc:.3f}"
        rows.append((str(n), f"{error:.3f}", shown, *images))
    return rows


def confusion(of: Reported, shown: int) -> Iterator[str]:
    """What the bars are."""
    assert of.traces is not None
    new, old = facts.mixed_up(of.traces, of.leaving, most=10**6), facts.put_right(of.traces, of.leaving)
    every, truth = (
        sum(count for *_, count in new),
        "what it is" if of.traces.targets is not None else "the backbone's answer",
    )
    yield (
        f"{number_of(every, 'image', 'is')} answered wrongly by an early exit and rightly by the backbone"
        + (f"; {old:,} the other way round." if of.traces.targets is not None else ".")
        + f" The bars show {shown:,} of them: {truth} → what the exit said."
    )
    lost, gained = facts.changed_at_the_end(of.traces, of.leaving)
    if lost or gained:
        yield f"At the end of the backbone, blended answers get {number_of(lost, 'image')} wrong that the backbone alone gets right, and {gained:,} the other way round."


def made(of: Reported) -> Rows:
    """With what the run and the page were made."""
    plan, record = of.model.plan, of.model.origin.input
    rows: Rows = [("", "")]
    rows += [("run", of.run)] * bool(of.run)
    rows.append(
        (
            "backbone",
            f"{plan.backbone}, {plan.macs:,} multiply-accumulates, {plan.parameters:,} parameters, {plan.classes:,} classes",
        )
    )
    pixels = (
        f"mean {_list(record.mean)}, std {_list(record.std)}"
        if of.model.origin.pixels_known
        else "mean and std not known"
    )
    rows.append(("images", f"{' × '.join(map(str, plan.input_size))}, {pixels}"))
    rows.append(("confidence", f"{of.model.confidence}; answers: {of.model.answers}"))
    if isinstance(data := of.results.get("data"), dict):
        rows.append(("made from", str(data.get("source"))))
    if of.target is not None and isinstance(tuning := of.results.get("tuning"), dict):
        where = f" ({tuning['source']})" if isinstance(tuning.get("source"), str) else ""
        rows.append(("thresholds", f"{tuning.get('images', '')}{where}"))
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    rows.append(("this page", f"ptee {__version__}, torch {torch.__version__}, {machine}"))
    return rows


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
