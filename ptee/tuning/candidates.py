"""What thresholds may be chosen for: each exit's own answers or blended ones; and the best choice of thresholds for each.

Where times are known, the search is by seconds. It takes linear prices, and seconds are not linear in rows. So it is done for
several prices and for each subset of exits, and each choice gets the time that is to be expected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ptee._common.errors import Argument, PteeError
from ptee.exits.blend import MAX_EXITS, OWN, Blend, Exits, fit_blend, subsets
from ptee.exits.confidence import CONFIDENCES
from ptee.exits.config import AUTO
from ptee.exits.times import Prices
from ptee.production.curve import ROUNDING
from ptee.tuning.threshold_search import MAX_EXACT, Choice, Problem, few_on, search, search_each
from ptee.tuning.traces import Traces

FOLDS = 4  # of a cross-validation
TRIES = 6  # limits by which thresholds are searched whose time must stay within one


@dataclass(frozen=True)
class Candidate:
    """Traces to choose thresholds on, while these exits are on (None: any), of own answers or of a blend."""

    traces: Traces
    on: Exits | None = None
    blend: Blend | None = None
    counted: bool = False  # thresholds are searched by multiply-accumulates, also where times are known


def ways_to_answer(traces: Traces, kind: str, answers: str) -> list[list[Candidate]]:
    """Each kind of answers that may be chosen for a kind of target."""
    small = replace(traces, logits=None, confidence_logits=None)
    own = [Candidate(small)]
    if answers == OWN or (answers == AUTO and not can_blend(traces)):
        return [own]
    _require_blendable(traces)
    blended = _cross_fitted(traces, small, None if kind == "max_fidelity_drop" else traces.targets)
    return [own, blended] if answers == AUTO else [blended]


def can_blend(traces: Traces) -> bool:
    """Whether these traces hold what blended answers and their confidence are computed from."""
    reads_earlier = CONFIDENCES[traces.confidence_name].needs_answers_of_earlier_exits
    return traces.logits is not None and not reads_earlier and traces.answers.shape[1] >= 2 * FOLDS


def _require_blendable(traces: Traces) -> None:
    """Refuse traces that blended answers cannot be computed from."""
    images = traces.answers.shape[1]
    if images < 2 * FOLDS:
        text = f" need {2 * FOLDS} images at least to fit weights to, and there are {images}. Give more images, or "
    elif not can_blend(traces):
        text = f" cannot be given: the confidence {traces.confidence_name!r} needs the exits' own answers. Set another, or give "
    else:
        return
    raise PteeError(Argument.text("answers", "blended"), text, Argument.text("answers", "own"), ".")


def _cross_fitted(traces: Traces, small: Traces, targets: Tensor | None) -> list[Candidate]:
    """Blended answers of each choice of exits. The weights for an image are fitted to others, so they do not flatter."""
    logits, exits = traces.logits, traces.exits
    assert logits is not None
    fold = torch.arange(logits.shape[1], device=logits.device) % FOLDS
    parts = [(logits[:, fold != f], None if targets is None else targets[fold != f]) for f in range(FOLDS)]
    blends = [fit_blend(*part) for part in parts]
    # Equal weights have another scale than fitted ones, and thresholds of one do not fit the other: it is one or the other.
    if equal := any(blend.remark for blend in blends):
        blends = [fit_blend(*part, equal) for part in parts]
    whole = fit_blend(logits, targets, equal)
    found = [Candidate(small, ())]  # the bare backbone
    for on in subsets(exits)[1:] if exits <= MAX_EXITS else [tuple(range(exits))]:
        answers, h = traces.answers.clone(), traces.confidence.clone()
        for f, blend in enumerate(blends):
            part = traces.rows(fold == f).blended(blend, on)
            answers[:, fold == f], h[:, fold == f] = part.answers, part.confidence
        found.append(Candidate(replace(small, answers=answers, confidence=h, own=small.answers), on, whole))
    return found


def searched(candidate: Candidate, problem: Problem, one_threshold: bool) -> Iterator[Choice]:
    """The best choice by multiply-accumulates; or by each linear price of seconds and for each subset of exits, with its time."""
    times, by_time = candidate.traces.times, not candidate.counted or problem.limited == "cost"
    if times is None or not by_time:
        choices = [search(problem, one_threshold, candidate.on)]
        yield from (_timed(candidate, problem, choice) for choice in choices if choice is not None)
        return
    in_seconds = [partial(_price, candidate.traces, prices) for prices in times.prices()]
    prices: list[Callable[[Tensor], Tensor]] = [problem.price, *in_seconds]
    for price in prices:
        priced = copy.copy(problem)
        priced.price = price
        yield from _by_price(candidate, priced, one_threshold)


def _price(traces: Traces, prices: Prices, on: Tensor) -> Tensor:
    """The costs (S, E+1) of leaving in seconds, if these exits (S, E) are on. Without heads, the bare backbone's 1."""
    run = traces.heads_where(on)
    return torch.where(run.any(-1, keepdim=True), prices.where(run), 1.0)


def _by_price(candidate: Candidate, problem: Problem, one_threshold: bool) -> Iterator[Choice]:
    """The best choice of each subset of exits. Where it lets a batch take longer than the limit, it gets a lower one."""
    on = torch.tensor(_subsets(candidate, problem, one_threshold), device=problem.h.device)
    limit = problem.limit
    for _ in range(TRIES):
        found = [choice for choice in search_each(problem, on, one_threshold) if _is_meant(candidate, choice)]
        choices = [_timed(candidate, problem, choice) for choice in found]
        longest = max((choice.cost for choice in choices), default=0.0)
        if problem.limited == "loss" or longest <= limit + ROUNDING:
            yield from choices
            return
        yield from (choice for choice in choices if choice.cost <= limit + ROUNDING)
        problem.limit *= min(limit / longest, 0.99)


def _is_meant(candidate: Candidate, choice: Choice) -> bool:
    """Not that nobody leaves where exits are on by definition: their blend would answer at the end, and the model's backbone does."""
    return not candidate.on or bool(choice.taken.any())


def _subsets(candidate: Candidate, problem: Problem, one_threshold: bool) -> list[list[bool]]:
    """Which exits may be on together. Of many exits, those that multiply-accumulates leave on, none, and each alone."""
    if candidate.on is not None:
        return [[n in candidate.on for n in range(problem.exits)]]
    if problem.exits <= MAX_EXACT:
        return [[n in on for n in range(problem.exits)] for on in subsets(problem.exits)]
    best = search(problem, one_threshold)
    return [*few_on(problem.exits), *([] if best is None else [(best.taken > 0).tolist()])]


def _timed(candidate: Candidate, problem: Problem, choice: Choice) -> Choice:
    """The choice with the expected time as its cost, if times are known."""
    traces = candidate.traces
    if traces.times is None:
        return choice
    on = choice.taken > 0
    if candidate.on is not None:
        on = torch.tensor([n in candidate.on for n in range(traces.exits)], device=on.device)
    shares = traces.shares(problem.leaving(choice.taken[None])[0])
    return replace(choice, cost=traces.times.expected(traces.heads_where(on), shares))
