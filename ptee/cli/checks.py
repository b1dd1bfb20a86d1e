"""What options alone tell, refused before torch is imported and before a model is loaded, which may take minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from ptee._common.errors import Argument, DataError, PteeError
from ptee._common.files import expanded, is_file
from ptee._common.listing import require_place
from ptee._common.writing import free_place

MOST_RECIPES = 1000  # of a sweep, which has no more runs


def require_recipe(recipe: Any) -> None:
    """Refuse unknown names of heads and confidences, thresholds in percent, and heads or thresholds that are not one for each named exit."""
    from ptee.exits.config import AUTO, require_confidence, require_no_percentage, wrong_number
    from ptee.exits.head_spec import as_list, one_each, parse_head

    exits, threshold = recipe.exits, recipe.thresholds.threshold
    require_confidence(recipe.confidence.name)
    require_no_percentage(threshold)
    for name in [] if exits.head is None else as_list(exits.head):
        parse_head(name)
    named = exits.front not in (None, AUTO)
    if named and exits.front_weights is not None and not is_file(expanded(exits.front_weights)):
        text = f"There is no weights file {exits.front_weights:.300}. Give a .safetensors or .pth file that exists."
        raise PteeError(text, argument="front_weights", value=exits.front_weights)
    if not isinstance(exits.places, tuple) or exits.front is not None:
        return
    number = len(exits.places)
    for what, given in {"head": exits.head, "head budget": exits.head_budget}.items():
        one_each(what, [None] if given is None else as_list(given), number)
    if isinstance(threshold, tuple) and len(threshold) not in (1, number):
        raise wrong_number(str(len(threshold)), number, threshold)


def require_recipes(base: Any, axes: Mapping[str, Sequence[Any]]) -> None:
    """The same of each recipe of a sweep."""
    from ptee.pipeline.recipe import make_recipe

    for values in islice(product(*axes.values()), MOST_RECIPES):
        made = make_recipe(base, dict(zip(axes, values, strict=True)))
        if "time" not in axes.get("thresholds.cost", ()):  # else some of the runs use them
            made.thresholds.require_used(axes)
        require_recipe(made)


def require_thresholds(threshold: Sequence[float] | None, exits: int) -> None:
    """Refuse another number of thresholds than of exits."""
    from ptee.exits.config import wrong_number

    if threshold is not None and len(threshold) not in (1, exits):
        raise wrong_number(str(len(threshold)), exits, threshold)


def require_times(runs: Sequence[str]) -> None:
    """Refuse runs that keep no times."""
    from ptee.timing.settings import require_kept_times

    for run in runs:
        require_kept_times(Path(run))


def require_timing(o: Mapping[str, Any]) -> None:
    """Refuse executors that there are not, and batches that cannot be timed."""
    from ptee.timing.settings import checked_executors, checked_sizes

    checked_sizes(o["batch_sizes"])
    checked_executors(o["executor"] or ())


def require_export(o: Mapping[str, Any]) -> None:
    """Refuse a folder that is not free, and options of whole numbers that do not go together."""
    if o["int8"] and o["format"] != "onnx":
        instead = Argument.text("format", "onnx")
        raise PteeError("Whole numbers are for ONNX Runtime. Give ", instead, ".", argument="format", value=o["format"])
    if o["int8"] and not o["calibrate"]:
        text = "What values can be is measured on images. Give some that the heads were not trained on: "
        raise DataError(text, Argument("calibrate", "FOLDER"), ".", argument="calibrate")
    if o["calibrate"] is not None and not o["int8"]:
        raise PteeError(Argument("calibrate"), " is for whole numbers. Give ", Argument("int8", "True"), ", too.")
    if o["calibrate"] is not None:
        require_place(o["calibrate"])
    free_place(o["out"])
