"""What commands do with a trained model: set its thresholds as wished, and measure it."""

from __future__ import annotations

from typing import Any

from ptee.data.splits import Parts, Unseen, parts_for_tuning
from ptee.evaluation import results as evaluation
from ptee.evaluation.results import Results
from ptee.evaluation.targets import Solution, Wish
from ptee.evaluation.tuning import tune
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline.asked import Options, Say


def tuned(model: EarlyExitModel, unseen: Unseen, wish: Wish, o: Options, say: Say) -> tuple[Parts, Solution]:
    """Set the thresholds, and record that in the results; what they were chosen on, what is left, what was found.

    Args:
        model: trained.
        unseen: images that it has not seen.
        wish: what the thresholds are chosen by.
        o: options of the command.
        say: prints.
    """
    parts = parts_for_tuning(unseen.data, unseen.images, unseen.seed)
    found = tune(
        model, parts.calibration, **{wish.kind: wish.limit}, one=o["one_threshold"],
        margin=o["margin"], batch_size=o["batch_size"], num_workers=o["workers"], device=o["device"],
    )  # fmt: skip
    record = {"source": unseen.data.place, "files_sha256": unseen.data.split.get("files_sha256"), "images": parts.words}
    record |= found.to_dict()
    model.results = (model.results or {}) | {"tuning": record}
    say(f"\n{parts.words}\n{found}")
    return parts, found


def measured(model: EarlyExitModel, images: Any, o: Options, about: str) -> Results:
    """The results on these images.

    Args:
        model: with its thresholds.
        images: a data set.
        o: options of the command.
        about: the images, in a sentence.
    """
    return evaluation.evaluate(
        model,
        images,
        threshold=o["threshold"],
        batch_size=o["batch_size"],
        num_workers=o["workers"],
        device=o["device"],
        speed=o["speed"],
        about=about,
    )
