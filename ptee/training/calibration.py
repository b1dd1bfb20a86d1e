"""Calibration: two numbers for each exit turn its largest probability into the probability of a yes to a question.

The heads run once over images that neither they nor the backbone were trained on. Then the scale and the shift of each exit are
fitted by maximum likelihood (J. Platt, Probabilistic outputs for support vector machines, 1999):

    h = sigmoid(scale * log(p / (1 - p)) + shift),   p the largest probability of the exit.

    minimise   - sum_i [ t_i log h_i + (1 - t_i) log(1 - h_i) ]  +  (log scale)^2 / 2

The last term is ptee's own: a weak prior that the scale is near 1, so that h is the largest probability as it is. It keeps the
scale above 0 where few images, or answers that are nearly all alike, do not say what it is.

If n1 images have the answer yes and n0 the answer no, the targets t_i are Platt's (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) instead of
1 and 0. So few images do not lead to certainty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptee._common.errors import Argument, DataError, unknown
from ptee._common.files import plain
from ptee._common.process import own_random_numbers
from ptee._common.progress import with_bar
from ptee._common.text import Readable, number_of, table
from ptee._common.validation import BATCH_SIZE, checked
from ptee.analysis.arithmetic import same_each_time
from ptee.analysis.freezing import device_of
from ptee.data import splits
from ptee.data.batches import (
    CALIBRATED_ON,
    UNKNOWN_LABEL,
    batches,
    known_by_marks,
    marks_of,
    numbered,
    odd_labels,
    split_batch,
)
from ptee.data.recorded import recorded
from ptee.exits.confidence import CALIBRATED, Calibrated, log_odds
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.images import require_answers
from ptee.training.config import TrainingConfig

QUESTIONS = {
    "agrees": "the answer is the backbone's",
    "right": "the answer is the label",
    "best": "the answer is the label, or no later answer is",
}
MIN_IMAGES = 20  # with fewer, h stays the largest probability
MIN_OF_EITHER = 20  # images with the answer yes, and with no; with fewer, the two numbers are rough
STEPS = 100  # of L-BFGS; it needs far fewer


@dataclass(frozen=True)
class ExitCalibration:
    """What was fitted for one exit, and cross-entropies on the same images.

    Attributes:
        exit: its module.
        images: number of those with finite answers.
        yes: share of them with the answer yes to the question.
        scale: of the log-odds of the largest probability.
        shift: added to them.
        loss: cross-entropy of the calibrated h.
        max_prob_loss: cross-entropy of the largest probability as it is.
        base_rate_loss: cross-entropy of an h that is the share of yes for every image.
    """

    exit: str
    images: int
    yes: float
    scale: float
    shift: float
    loss: float
    max_prob_loss: float
    base_rate_loss: float

    def remark(self, target: str) -> str:
        """A sentence if there were too few images; else empty. `target`: a key of `QUESTIONS`."""
        if self.images < MIN_IMAGES:
            few = number_of(self.images, "image", "is", which=" with finite answers")
            return f"{few} too few: h is the largest probability as it is."
        positives = round(self.yes * self.images)
        rarer = min(positives, self.images - positives)
        if rarer < MIN_OF_EITHER:
            share, none = ("only", "no image") if positives == rarer else ("all but", "every image")
            which = f"{share} {number_of(rarer, 'image')}" if rarer else none
            advice = "Train longer, or give more images." if positives == rarer else "Give more images."
            return f"on {which} {QUESTIONS[target]}, so h is a rough guess. {advice}"
        return ""


@dataclass(frozen=True)
class Calibration(Readable):
    """The result of a calibration. Prints as a table.

    Attributes:
        target: a key of `QUESTIONS`.
        images: their number.
        exits: one entry for each early exit.
    """

    target: str
    images: int
    exits: tuple[ExitCalibration, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return plain(self)

    def __str__(self) -> str:
        title = ("exit", "module", "yes", "scale", "shift", "calibrated", "max prob", "base rate")
        numbers = [(e.yes, e.scale, e.shift, e.loss, e.max_prob_loss, e.base_rate_loss) for e in self.exits]
        rows = [
            (str(n), e.exit, *(f"{value:.4f}" for value in values))
            for n, (e, values) in enumerate(zip(self.exits, numbers, strict=True))
        ]
        return f"{self.summary}\n{table([title, *rows], left={1})}"

    @property
    def summary(self) -> str:
        """A sentence, and a line for each exit whose fit is odd."""
        said = [(n, each.remark(self.target)) for n, each in enumerate(self.exits)]
        remarks = "".join(f"\nExit {n}: {remark}" for n, remark in said if remark)
        return f"The confidence h, the chance that {QUESTIONS[self.target]}, was fitted on {number_of(self.images, 'image')}.{remarks}"

    @property
    def legend(self) -> str:
        """What the columns mean."""
        return (
            "yes: share of the images for which that is so. calibrated, max prob, base rate: cross-entropy on these images of the "
            "calibrated h, of the\nlargest probability as it is, and of an h that is the share of yes for every image. Lower is better."
        )


def hold_out(data: Any, share: float, seed: int = 0) -> tuple[Any, Any]:
    """The training images for the heads, and a share of them to fit the confidence on. A DataError if that is too few."""
    n = len(data) + len(getattr(data, "gaps", ()))
    size = round(share * n)
    if size < MIN_IMAGES:
        raise DataError(
            f"{share:g} of {number_of(n, 'training image')} is {size}, and it takes {MIN_IMAGES} to fit the confidence. Give a larger share (",
            Argument("calibration_share", "0.3"), "), or another confidence.",
        )  # fmt: skip
    return splits.hold_out(data, size, seed)


@checked
def calibrate(
    model: EarlyExitModel,
    data: Any,
    *,
    target: str = "agrees",
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: str | torch.device | None = None,
) -> Calibration:
    """Calibrate each exit's confidence: it becomes a probability, by default that the exit's answer is the backbone's. No answer changes.

    Two numbers for each exit are fitted to images. Afterwards `model.confidence` is "calibrated" and thresholds have another
    meaning, so choose them again (`ptee.tune`). Calibrate again whenever the heads were trained further.

    Give images that neither the heads nor the backbone were trained on: on its training images the backbone is nearly always
    right, so h would be too high. With fewer than 20 images h stays the largest probability, and the result says so.

    Args:
        model: with trained heads. Afterwards it is in eval mode, on the device it was on.
        data: a map-style data set of (image (c, h, w), label) or (image,), a loader, or a folder of traces.
        target: the question: "agrees" (is this answer the backbone's?), "right" (is it the label?) or "best" (is it the
            label, or is no later answer the label either? Then leaving loses nothing).
        seed: of random numbers that the data draws, such as the order of a loader.
        batch_size: for a data set.
        num_workers: processes that load a data set.
        device: for the heads; None: where the model is.

    Returns:
        The numbers, and how well they fit. Prints as a table.

    Raises:
        UnknownName: if there is no such target.
        DataError: if there are no images, or no labels and the target needs them.
        PteeError: if exits are off.
    """
    require_early_exit(model)
    if target not in QUESTIONS:
        raise unknown("calibration target", target, QUESTIONS, argument="target")
    TrainingConfig(seed=seed)  # refuses a value that is no seed
    model.require_all_on()
    home = device_of(model.heads)
    if (known := recorded(data)) is not None:
        odds, answers, labels, fault = known[0].for_calibration(model, known[1])
        marks = known[0].marks(known[1])
        return _calibrated(model, _Outputs(odds.double(), answers, labels, fault, marks), target)
    loader = batches(data, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    with own_random_numbers(seed), same_each_time:
        model.to(device_of(model.heads, device)).eval()
        try:
            outputs = _run_heads(model, loader, data)
        finally:
            model.to(home)
    return _calibrated(model, outputs, target)


def _calibrated(model: EarlyExitModel, outputs: _Outputs, target: str) -> Calibration:
    """The model with the confidence that is fitted to these outputs."""
    exits = tuple(map(_fitted, (e.name for e in model.exits), outputs.log_odds, _positives(outputs, target)))
    model.calibrated = Calibrated(tuple(e.scale for e in exits), tuple(e.shift for e in exits))
    model.confidence, model.curve = CALIBRATED, None  # the curve was of another h
    model.results = (model.results or {}) | {CALIBRATED_ON: known_by_marks(outputs.marks, len(outputs.marks))}
    return Calibration(target, outputs.answers.shape[1], exits)


class _Outputs(NamedTuple):
    """What the exits answer for all images.

    Attributes:
        log_odds: (E, n) of the largest probability, float64; NaN if the answer is not finite.
        answers: (E+1, n) classes.
        labels: (n,) or None.
        fault: what is wrong with labels that are there.
        marks: (n,) by which the images are known again.
    """

    log_odds: Tensor
    answers: Tensor
    labels: Tensor | None
    fault: str
    marks: Tensor


def _positives(outputs: _Outputs, target: str) -> Tensor:
    """(E, n) whether the answer to the question is yes."""
    if target == "agrees":
        return outputs.answers[:-1] == outputs.answers[-1]
    if outputs.labels is None:
        text = f"The target {target!r} needs labels: {outputs.fault or 'the data has none'}. Without them give "
        raise DataError(text, Argument.text("target", "agrees"), ".")
    right = outputs.answers == outputs.labels
    if target == "right":
        return right[:-1]
    later = torch.stack([right[n + 1 :].any(0) for n in range(len(right) - 1)])
    return right[:-1] | ~later


@torch.inference_mode()
def _run_heads(model: EarlyExitModel, loader: Iterable[Any], data: object) -> _Outputs:
    odds, answers, labels, marks, unanswered = [], [], [], [], []
    for batch in with_bar(loader, "calibrating"):
        images, known = split_batch(batch)
        every = model.all_exits(model.prepared(images))
        own = every.logits[:-1]
        usable = own.amax(-1).isfinite() & every.confidence_logits.isfinite()  # elsewhere h is NaN
        odds.append(torch.where(usable, log_odds(own), torch.nan).cpu().double())
        answers.append(every.logits.argmax(-1).cpu())
        labels.append(numbered(known, images))
        marks.append(marks_of(images))
        unanswered.append(every.logits[-1].isnan().any(-1).cpu())
    if not answers:
        raise DataError("The data gave no batch: it is empty.")
    require_answers(torch.cat(unanswered), data)
    targets = torch.cat(labels)
    none = bool((targets == UNKNOWN_LABEL).all())
    fault = "" if none else odd_labels(targets, model.num_classes)
    known = None if none or fault else targets
    return _Outputs(torch.cat(odds, 1), torch.cat(answers, 1), known, fault, torch.cat(marks))


def _fitted(name: str, odds: Tensor, positives: Tensor) -> ExitCalibration:
    """Fit one exit in float64, to its log-odds (n,) and whether the answer is yes (n,)."""
    known = odds.isfinite()
    odds, yes = odds[known], positives[known].double()
    n = len(yes)
    scale, shift = fit_scale_and_shift(odds, yes) if n >= MIN_IMAGES else (1.0, 0.0)
    loss, max_prob_loss = (
        F.binary_cross_entropy_with_logits(logit, yes).item() if n else float("nan")
        for logit in (scale * odds + shift, odds)
    )
    share = yes.mean().item() if n else float("nan")
    base_rate = (yes.sum() + 1) / (n + 2)  # neither 0 nor 1
    base_rate_loss = F.binary_cross_entropy(base_rate.expand(n), yes).item() if n else float("nan")
    return ExitCalibration(name, n, share, scale, shift, loss, max_prob_loss, base_rate_loss)


def fit_scale_and_shift(odds: Tensor, yes: Tensor) -> tuple[float, float]:
    """Scale (positive) and shift by Platt's method, with a weak prior that the scale is near 1.

    `odds` (n,) are log-odds; `yes` (n,) is 1 if the answer to the question is yes, else 0. Both are float64.
    """
    positives = yes.sum()
    target = torch.where(yes > 0, (positives + 1) / (positives + 2), 1 / (len(yes) - positives + 2))
    with torch.inference_mode(False), torch.enable_grad():
        odds, target = odds.clone(), target.clone()  # tensors made in inference mode cannot be differentiated
        found = torch.zeros(2, dtype=odds.dtype, device=odds.device, requires_grad=True)  # log of the scale, shift
        optimizer = torch.optim.LBFGS([found], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            logit = odds * found[0].exp() + found[1]
            loss = F.binary_cross_entropy_with_logits(logit, target) + found[0].square() / (2 * len(yes))
            loss.backward()
            return loss

        optimizer.step(closure)
    return found[0].exp().item(), found[1].item()
