"""Tuning: thresholds are chosen on some images and reported on others. `data/splits.py` says which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ptee._common.errors import Argument, DataError, warn
from ptee._common.progress import Log
from ptee._common.text import beside, number_of
from ptee._common.validation import BATCH_SIZE, checked_with
from ptee.backbones.weights import weights_hash
from ptee.data.batches import CALIBRATED_ON, TRAINED_ON, WATCHED, number_of_images, sample_of_marks, share_known_again
from ptee.data.labels import FEWEST, much_less_right
from ptee.data.recorded import recorded
from ptee.data.splits import Unseen, parts_for_tuning
from ptee.exits.blend import BLENDED, OWN
from ptee.exits.confidence import CALIBRATED
from ptee.exits.times import BatchTimes
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.production.curve import ROUNDING
from ptee.tuning.config import EXAMPLES, Target, ThresholdsConfig, below
from ptee.tuning.guarantee import promised, require_different, require_images
from ptee.tuning.operating_points import operating_points
from ptee.tuning.reachable import Margin, require_reachable, require_right
from ptee.tuning.solution import Solution
from ptee.tuning.targets import DEFAULTS, WITHIN, solve
from ptee.tuning.traces import record

MANY = 0.1  # share of the images that is known only roughly; fewer may be copies
A_FEW = "a few of these images"


@checked_with(instead={"threshold": "It chooses thresholds; set one of your own by model.threshold = 0.7."})
def tune(
    model: EarlyExitModel,
    data: Any,
    *,
    max_drop: float | None = None,
    max_fidelity_drop: float | None = None,
    max_cost: float | None = None,
    one_threshold: bool = DEFAULTS.one_threshold,
    margin: Margin = DEFAULTS.margin,
    answers: Literal["auto", "own", "blended"] = DEFAULTS.answers,
    confidence: float | None = DEFAULTS.confidence,
    each_exit: bool = DEFAULTS.each_exit,
    times: BatchTimes | None = None,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: str | torch.device | None = None,
) -> Solution:
    """Choose a model's thresholds for one target, and set them. Exits that do not pay are switched off.

    The target is one of `max_drop`, `max_fidelity_drop` and `max_cost`. Report on other images than these. What other thresholds cost and lose is kept, too (`model.threshold_for`).

    Args:
        model: any early-exit model with trained heads.
        data: a map-style data set of (image, label) or (image,), a loader, or a folder of traces, of images that nothing was trained on.
        max_drop: the lowest cost at which accuracy is at most this much below the bare backbone's; 0.01 is one point. Needs
            labels.
        max_fidelity_drop: the lowest cost at which at most this share of the answers differs from the backbone's.
        max_cost: the best answers at this mean cost or less, as a fraction of the bare backbone's.
        one_threshold: the same threshold for all exits.
        margin: how much of the limit is kept in reserve, because new images lose more than those that T is chosen on. "auto":
            cross-validation estimates how much more.
        answers: "own", "blended" (weights are fitted to these images, too), or "auto": whichever meets the target better on
            images that the weights were not fitted to.
        confidence: guarantee the drop: with this confidence, such as 0.95, no more is lost on new images, however they are
            distributed. They must be drawn like these, and nothing may have been fitted to these, the confidence of the exits
            and the epoch that early stopping picked included. The answers are the exits' own. None: the drop is kept on average.
        each_exit: guarantee it among the images that leave at each exit, too.
        times: of the model's pieces in batches of one size, as `ptee.timing.measure.measure(model, [32]).at(32)` gives them: then
            costs are of seconds. None: of multiply-accumulates.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: None: where the model is.

    Returns:
        The thresholds, the exits that are off, and accuracy, fidelity and cost on these data.

    Raises:
        PteeError: if there is not exactly one target, if it cannot be met, or if there are too few images for a guarantee, or
            many of them more than once; the message says what can.
    """
    require_early_exit(model)
    config = ThresholdsConfig(
        max_drop=max_drop, max_fidelity_drop=max_fidelity_drop, max_cost=max_cost, one_threshold=one_threshold, margin=margin,
        answers=answers, confidence=confidence, each_exit=each_exit,
    )  # fmt: skip
    how: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    found, marks = _chosen(model, data, Target.given(config), config, times, trusted=False, **how)
    images = f"Thresholds are chosen on {number_of(found.samples, 'image')} that ptee.tune was given in Python."
    model.results = (model.results or {}) | {"tuning": {"images": images, "marks": marks} | found.to_dict()}
    return found


def _chosen(
    model: EarlyExitModel,
    data: Any,
    target: Target,
    config: ThresholdsConfig,
    times: BatchTimes | None,
    *,
    trusted: bool,
    **how: Any,
) -> tuple[Solution, str]:
    """`tune` for a target, and the marks of a few of the images.

    The labels are `trusted`, or they are refused where the backbone is near chance under them.
    """
    known, kinds = recorded(data), str(config.answers)
    # what is not possible is refused before the images are read
    if n := len(data) if known is not None else number_of_images(data):
        require_images(target, config.confidence, n, each_exit=config.each_exit)
    if times is None:
        require_reachable(target, model.plan.least_cost, config.margin)
    if kinds == "auto" and known is not None and not known[0].can_give_logits(model, known[1]):
        kinds = OWN
    traces = replace(record(model, data, logits=kinds != OWN, own=True, **how), times=times)
    require_images(target, config.confidence, traces.answers.shape[1], each_exit=config.each_exit)
    if config.confidence is not None:
        require_different(traces.marks)
        _require_new(model, traces.marks, config.confidence)
    if not trusted:
        require_right(target, traces, model.num_classes)
        if words := unlike_before(model, traces.score_at(traces.exits).accuracy, traces.answers.shape[1]):
            warn(words)
    if words := _not_trained(model):
        warn(words)
    elif trained := known_images(model, traces.marks, own=False):
        if config.confidence is not None and A_FEW not in trained:
            text = f"Nothing can be guaranteed here. {trained}"
            raise DataError(text, argument="data")
        warn(trained)
    found = solve(traces, target, one_threshold=config.one_threshold, margin=config.margin, answers=kinds)
    if config.confidence is not None:
        how_sure: dict[str, Any] = {"one_threshold": config.one_threshold, "each_exit": config.each_exit}
        found = promised(traces, found, config.confidence, **how_sure)
    model.choose(found.threshold, found.off, found.blend)
    model.curve = operating_points(traces, found)
    return found, "" if traces.marks is None else sample_of_marks(traces.marks)


def choose_thresholds(
    model: EarlyExitModel,
    unseen: Unseen,
    target: Target,
    config: ThresholdsConfig,
    *,
    log: Log,
    times: BatchTimes | None,
    **how: Any,
) -> tuple[Any, str, Solution]:
    """Set the thresholds of a trained model for a target, on some of the images that its heads have not seen, and record it in the results.

    Args:
        model: its results get the record.
        unseen: the images.
        target: of `config`.
        config: how the thresholds are chosen.
        log: gets what was found.
        times: costs are of these seconds. None: of multiply-accumulates.
        how: batch_size, num_workers and device.

    Returns:
        The images that are left to report on, a sentence about the split, and the solution.
    """
    parts = parts_for_tuning(unseen)
    found, marks = _chosen(model, parts.calibration, target, config, times, trusted=True, **how)
    about = {"source": unseen.data.place, "files_sha256": unseen.data.split.get("files_sha256"), "images": parts.words}
    model.results = (model.results or {}) | {"tuning": about | {"marks": marks} | found.to_dict()}
    log(f"\n{parts.words}\n{found}")
    return parts.report, parts.words, found


def target_in_force(tuning: Any, model: EarlyExitModel) -> dict[str, Any] | None:
    """Kind and limit that a model's thresholds were chosen for, and the unit of a time, from `results["tuning"]`.

    None if none are known, or other thresholds were set since.
    """
    tuning = tuning if isinstance(tuning, dict) else {}
    target, chosen, off = tuning.get("target"), tuning.get("threshold"), tuning.get("off", [])
    if not isinstance(target, dict) or target.get("kind") not in EXAMPLES:
        return None
    if isinstance(target.get("limit"), bool) or not isinstance(target.get("limit"), int | float):
        return None
    if not all(isinstance(each, list | tuple) for each in (chosen, off)) or tuple(off) != model.off:
        return None
    if len(chosen) != len(model.threshold):
        return None
    same = all(t == model.threshold[n] for n, t in enumerate(chosen) if n not in off)
    return {**target, "unit": str(tuning.get("unit") or "")} if same else None


def usual_right(model: EarlyExitModel) -> tuple[float, int] | None:
    """On which share of how many images the backbone is known to be right, from the model's results; None if they do not say."""
    results = model.results or {}
    try:
        if (kept := results.get("usual_right")) is None:  # of an older ptee
            kept = results["rows"][0]["accuracy"], results["samples"]
        share, n = float(kept[0]), int(kept[1])
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):  # a stranger may have written it
        return None
    return (share, n) if 0 <= share <= 1 <= n else None


def unlike_before(model: EarlyExitModel, right: float | None, n: int) -> str:
    """A sentence, if the backbone is right on a far smaller share of n images than usually; else none."""
    usual = usual_right(model)
    if right is None or usual is None or min(n, usual[1]) < FEWEST or not much_less_right(right, n, *usual):
        return ""
    return (
        f"The backbone is right on {right:.1%} of these images, and on {usual[0]:.1%} of those that the model was measured on before. See "
        "whether these are prepared alike (size, mean and std, channels), and whether their labels are its class numbers."
    )


def _not_trained(model: EarlyExitModel) -> str:
    """A sentence, if the heads are as `ptee.augment` made them; else none."""
    if not model.heads_as_drawn or weights_hash(model.heads) != model.heads_as_drawn:
        return ""
    return "The heads have learned nothing yet. Train them first: ptee.train(model, train_data)."


def known_images(model: EarlyExitModel, marks: Tensor | None, *, own: bool = True) -> str:
    """Sentences, if the heads were trained, or the thresholds chosen, on some of the images with these marks (n,), or the heads were
    never trained; else none.

    Without `own`, the thresholds are others than the model's, which were not chosen on any of these images.
    """
    if words := _not_trained(model):
        return words
    results = model.results or {}
    trained, chosen = results.get(TRAINED_ON), results.get("tuning")
    found = []
    if some := _some_of(trained if isinstance(trained, list) else [], marks):
        found.append(f"The heads were trained on {some}, so results may be better here than on new ones.")
    on_curve = model.curve is not None and model.curve.at(model.threshold) is not None
    chosen = chosen if isinstance(chosen, dict) else {}
    in_force = own and (on_curve or target_in_force(chosen, model) is not None)
    if in_force and (some := _some_of([{**chosen, "images": chosen.get("samples")}], marks)):
        found.append(f"The thresholds were chosen on {some}, so what is lost here may be less than on new ones.")
    if found and not all(A_FEW in words for words in found):
        found.append("Give images that nothing was trained or chosen on.")
    return " ".join(found)


def _require_new(model: EarlyExitModel, marks: Tensor | None, confidence: float) -> None:
    """Refuse a guarantee by images with these marks (n,) if an epoch was picked, or h was calibrated, on more than a few of them."""
    results = model.results or {}
    watched = results.get(WATCHED)
    for records, words in (
        (watched if isinstance(watched, list) else [], "A training with patience picked its epoch by its loss on"),
        ([results.get(CALIBRATED_ON)] * (model.confidence == CALIBRATED), "The confidence was calibrated on"),
    ):
        if (some := _some_of(records, marks)) not in ("", A_FEW):
            why, guarantees = f"{words} {some}, so they cannot show what ", Argument("confidence", f"{confidence:g}")
            text = " guarantees. Give images that nothing was trained or chosen on."
            raise DataError(why, guarantees, text, argument="data")


def _some_of(records: Sequence[Any], marks: Tensor | None) -> str:
    """Which part of the images with these marks is among those that were recorded, in words; empty if none is."""
    found = [] if marks is None else [share_known_again(record, marks) for record in records]
    share = min(1.0, sum(share for share, _ in found))
    if not share:
        return ""
    if share <= MANY:
        return A_FEW
    if not any(known_well for share, known_well in found if share):
        return "some of these images"
    return "these images" if share > 1 - MANY else f"about {share:.0%} of these images"


def is_missed(target: Target, results: Mapping[str, Any]) -> bool | None:
    """Whether a target is missed in JSON-able results on other images; None if a drop of accuracy is not known there."""
    backbone, own = results["rows"][0], results["rows"][-1]
    if target.kind == "max_cost":
        return bool(own["cost"] > target.limit + ROUNDING)
    if target.kind == "max_fidelity_drop":
        return bool(1 - own["fidelity"] > target.limit + ROUNDING)
    if own["accuracy"] is None:
        return None
    return bool(backbone["accuracy"] - own["accuracy"] > target.limit + ROUNDING)


def describe_outcome(solution: Solution, results: Mapping[str, Any]) -> tuple[str, bool | None]:
    """How a target fares in JSON-able results on other images, and how certain that is, in a sentence; and whether it is missed.

    None if that is not known.
    """
    if solution.target.kind == "max_cost" and solution.score.time is not None:
        return f"Target: {solution.target} of {solution.unit}. {solution.score.time:.4f} is to be expected.", False
    on_others = f" (on the other images, which the thresholds were chosen on: {solution.cost:.4f})"
    return _outcome(solution.target, results, blended=solution.blend is not None, on_others=on_others)


def outcome_in_force(model: EarlyExitModel, results: Mapping[str, Any]) -> tuple[str, bool | None]:
    """The same sentence for the target that a model's thresholds were chosen for before; and whether more is lost than it allows.

    Nothing, if other thresholds are in force, or seconds are limited. None, if it limits no loss.
    """
    known = target_in_force((model.results or {}).get("tuning"), model)
    if known is None or (known["kind"] == "max_cost" and known["unit"]):
        return "", None
    target = Target(known["kind"], known["limit"])
    outcome, missed = _outcome(target, results, blended=model.answers == BLENDED)
    return outcome, None if target.kind == "max_cost" else missed


def _outcome(
    target: Target, results: Mapping[str, Any], *, blended: bool, on_others: str = ""
) -> tuple[str, bool | None]:
    if target.kind == "max_drop" and results.get("doubt"):  # whether it is kept says nothing
        return "", None
    backbone, own, n = results["rows"][0], results["rows"][-1], results["samples"]
    interval = interval_words(own["fidelity"], n)
    if results["leaving"][-1] == 1 and not blended:  # the answers are the backbone's
        interval = "(no image left early)"
    missed = is_missed(target, results)
    if target.kind == "max_cost":
        words = f"{beside(own['cost'], target.limit)}{on_others * bool(missed)}"
    elif target.kind == "max_fidelity_drop" or own["accuracy"] is None:
        words = f"{beside(1 - own['fidelity'], target.limit)} of the answers differ {interval}"
    else:
        words = f"{below(backbone['accuracy'] - own['accuracy'], target.limit)} {interval}"
    images = number_of(n, "report image")
    outcome = f"{'Missed' if missed else 'Kept'} on {images}"
    if missed is None:
        outcome = f"Not known for {images}, which have no labels"
    return f"Target: {target}. {outcome}: {words}.", missed


def interval_words(fidelity: float, n: int) -> str:
    """How certain a loss on n images is."""
    return f"(95 % interval ± {uncertainty(fidelity, n):.4f})"


def uncertainty(fidelity: float, n: int) -> float:
    """Half the width of a 95 % interval of what is lost, on n images.

        1.96 sqrt(p / (n + 4)),  p = (n (1 - fidelity) + 2) / (n + 4)

    Only answers that differ from the backbone's can lose anything, at most one image each, so p bounds the variance. Two images
    are added on either side (Agresti and Coull, 1998), because no loss on a few images does not mean that there never is one.
    """
    p = (n * (1 - fidelity) + 2) / (n + 4)
    return WITHIN * math.sqrt(p / (n + 4))
