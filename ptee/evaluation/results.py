"""Evaluation: accuracy, fidelity, cost and speed of the backbone, of each exit alone, and of the early-exit model."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptee._common.clock import in_turns, ratio, spread
from ptee._common.errors import Argument, PteeError
from ptee._common.validation import BATCH_SIZE, checked
from ptee.analysis.freezing import device_of, running_on, sparing
from ptee.data.labels import near_chance
from ptee.data.recorded import recorded
from ptee.evaluation.metrics import calibration_error, failure_auroc
from ptee.evaluation.results_table import BLENDED_END, Results, Row
from ptee.exits.blend import BLENDED
from ptee.exits.config import ALWAYS, CALIBRATED, NEVER, with_off
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.saving import warn_of_changes
from ptee.model.settings import Thresholds
from ptee.tuning.traces import Traces, record, truncation
from ptee.tuning.tune import known_images, outcome_in_force, unlike_before, usual_right

__all__ = ["Results", "Row", "evaluate"]

PROBE = 8  # images that are timed first, to find out how many can be
MIN_TIMED = 16  # images that are timed at least
SPEED_SECONDS = 20.0  # after which no further round of timing begins
ROUND_SHARE = 0.4  # of these seconds that one round may take, unless MIN_TIMED images take longer


@checked
def evaluate(
    model: EarlyExitModel,
    data: Any,
    *,
    threshold: Thresholds | None = None,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    speed: bool | None = None,
    speed_seconds: float = SPEED_SECONDS,
    about: str = "",
    keep: bool = False,
) -> Results:
    """Measure a model on data: accuracy, fidelity, cost, where images leave, and speed beside the bare backbone.

    Every exit answers every image once; accuracy, fidelity and cost at the thresholds are computed from these answers. Speed is
    measured by running the model.

    Args:
        model: any early-exit model.
        data: a map-style data set of (image, label) or (image,), a loader, or a folder of traces. If no label is a class of the backbone, there
            is no accuracy, and the results say so.
        threshold: one number, or one for each exit; None: the model's own. The model keeps its own in any case.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the model is.
        speed: measure images per second, if an exit is on. None: unless the data are recorded traces.
        speed_seconds: about how long that may take; four rounds are timed in any case.
        about: a sentence about the data, kept with the results.
        keep: put them into `model.results`, which `save_pretrained` saves and puts on the model card. Else the model is left as it was.

    Raises:
        PteeError: if the threshold, the data or the device cannot be used.
    """
    require_early_exit(model)
    if speed and recorded(data) is not None:
        text = "A folder of traces has no images to time. Give "
        raise PteeError(text, Argument("speed", "False"), ", or measure it apart (ptee bench).", argument="speed")
    warn_of_changes(model.origin)
    place = device_of(model.heads, device)
    view = copy.copy(model)  # the same modules with thresholds of its own: other threads see the model unchanged
    if threshold is not None:
        view.threshold = threshold
    with running_on(place, view):
        traces = record(view, data, batch_size=batch_size, num_workers=num_workers, logits=False)
        rows, leaving = _rows(view, traces)
        images, differ = traces.sample.to(place), 0.0
        if len(view.off) < len(view.exits) and (speed or (speed is None and recorded(data) is None)):
            with sparing(view.backbone, images):
                images = _few_enough(view, images, ROUND_SHARE * speed_seconds)
                rows, differ = _timed(view, images, rows, batch_size, speed_seconds)
        found = Results(
            model.plan.backbone, traces.answers.shape[1], view.threshold, tuple(rows), leaving, place.type,
            min(batch_size, len(images)), about, traces.note, truncation(traces.alone), view.off,
            asked="the backbone's answer" if foretells_agreement(view) else "", for_fidelity=view.for_fidelity, by_time=_by_time(view), spread=differ,
            confidence=view.confidence, answers=view.answers, doubt=doubted(model, rows[0].accuracy, traces.answers.shape[1]),
        )  # fmt: skip
        usual = usual_right(model) if found.doubt or rows[0].accuracy is None else (rows[0].accuracy, found.samples)
        found = replace(found, usual_right=usual)
        outcome, loses_too_much = outcome_in_force(view, found.to_dict())
        seen = known_images(view, traces.marks, own=threshold is None)
        found = replace(found, seen=seen, outcome=outcome, loses_too_much=loses_too_much)
        if keep:
            model.results = (model.results or {}) | found.to_dict()
        return found


def about_speed(model: EarlyExitModel, seconds: float = SPEED_SECONDS) -> str:
    """What to say before the speed of a model is measured, in a sentence."""
    if len(model.off) == len(model.exits):
        return "Speed is not measured: no exit is on, so it is that of the bare backbone."
    return (
        f"Speed is measured for about {seconds:g} seconds, on a slow machine for minutes. --no-speed (in Python: speed=False) "
        "leaves it out."
    )


def doubted(model: EarlyExitModel, right: float | None, n: int) -> str:
    """A sentence, if a trained backbone that did not learn here is near chance under the labels of n images, or right on far fewer of
    them than before.
    """
    if right is None:
        return ""
    learns_here = model.origin.learnt or model.origin.is_random
    if not learns_here and (words := near_chance(right, n, model.num_classes)):
        return f"{words}: check that the labels are its class numbers. No accuracy here says anything until they are."
    return unlike_before(model, right, n)


def _rows(model: EarlyExitModel, traces: Traces) -> tuple[list[Row], list[float]]:
    """A row for each scenario, and the share of the images that leaves at each exit at the model's thresholds."""
    thresholds = with_off(model.threshold, model.off)
    traces = traces.by(thresholds)
    leaving = traces.leaving(thresholds)
    backbone = replace(
        _row(model, traces.alone, len(model.exits), leaving, "backbone"), cost=1.0
    )  # bare: without heads
    exits = [
        replace(_row(model, traces, n, leaving, f"exit {n}", exit_.name), **confidence_quality(model, traces, n))
        for n, exit_ in enumerate(model.exits)
    ]
    end = [_row(model, traces, len(model.exits), leaving, BLENDED_END)] if traces.own is not None else []
    score = traces.score(leaving, model.off)
    own = Row("early exit", "", score.accuracy, score.fidelity, score.cost)
    return [backbone, *exits, *end, own], traces.shares(leaving)


def _row(model: EarlyExitModel, traces: Traces, n: int, leaving: Tensor, name: str, module: str = "") -> Row:
    """Every image leaves at exit n, whose head runs even if the exit is off."""
    score = traces.score_at(n, [m for m in model.off if m != n])
    here = leaving == n
    right = traces.right[n][here].double().mean().item() if here.any() else None
    return Row(name, module, score.accuracy, score.fidelity, score.cost, right)


def confidence_quality(model: EarlyExitModel, traces: Traces, n: int) -> dict[str, Any]:
    """`calibration_error` and `failure_auroc` of exit n's confidence, on all images of the traces."""
    h = traces.confidence[n]
    return {
        "calibration_error": calibration_error(h, foretold(model, traces, n)),
        "failure_auroc": failure_auroc(h, traces.right[n]),
    }


def foretold(model: EarlyExitModel, traces: Traces, n: int) -> Tensor:
    """(n,) bool, whether what exit n's confidence is the probability of came true: a right answer, or the backbone's."""
    return traces.answers[n] == traces.bare if foretells_agreement(model) else traces.right[n]


def _by_time(model: EarlyExitModel) -> bool:
    """Whether the record of the thresholds says that they were chosen by seconds."""
    tuning = (model.results or {}).get("tuning")
    return isinstance(tuning, dict) and bool(tuning.get("unit"))


def foretells_agreement(model: EarlyExitModel) -> bool:
    """Whether the confidence is the probability that an exit agrees with the backbone, not that it is right."""
    if model.confidence != CALIBRATED:
        return False
    if (
        model.answers == BLENDED and model.blend is not None
    ):  # its own weights make it a probability, not the calibration
        return not model.blend.to_the_end
    fitted = (model.results or {}).get("calibration")
    return isinstance(fitted, dict) and fitted.get("target") == "agrees"


def _few_enough(model: EarlyExitModel, images: Tensor, seconds: float) -> Tensor:
    """Some of the images, spread over all of them, so many that one round of timing takes about so many seconds."""
    if len(images) <= MIN_TIMED:
        return images
    calls = {"backbone": lambda: model.backbone(images[:PROBE])}
    each = in_turns(calls, images.device, rounds=1)["backbone"][0] / PROBE
    affordable = seconds / (each * (len(model.exits) + 2))
    return images[:: math.ceil(len(images) / max(affordable, MIN_TIMED))]


def _timed(
    model: EarlyExitModel, images: Tensor, rows: list[Row], batch_size: int, seconds: float
) -> tuple[list[Row], float]:
    """The rows with their speed, timed in turns with the bare backbone, and how much the rounds differ. Exits that are off are not timed."""
    batches, exits = images.split(batch_size), len(model.exits)
    scenarios: list[Any] = [[NEVER] * n + [ALWAYS] + [NEVER] * (exits - n - 1) for n in range(exits)]
    calls: dict[str, Any] = {"backbone": lambda: [model.backbone(x) for x in batches]}
    for n, threshold in enumerate(scenarios):
        if n not in model.off:
            calls[rows[1 + n].name] = partial(_predict_all, model, batches, threshold)
    if len(model.off) < exits:  # else it is the bare backbone
        calls[rows[-1].name] = partial(_predict_all, model, batches, None)
    times = in_turns(calls, images.device, seconds=seconds)
    base = times["backbone"]
    rate = len(images) / sorted(base)[len(base) // 2]
    relative = {name: ratio(own, base) for name, own in times.items()}
    rows = [
        replace(row, images_per_s=rate / relative[row.name], speedup=1 / relative[row.name])
        if row.name in relative
        else row
        for row in rows
    ]
    return rows, max(map(spread, times.values()))


def _predict_all(model: EarlyExitModel, batches: tuple[Tensor, ...], threshold: Any) -> None:
    for x in batches:
        model.predict(x, threshold)
