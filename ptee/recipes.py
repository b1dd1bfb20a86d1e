"""Recipes: ways of making exits, by name. A recipe says what is taken for each option of `ptee augment` that is not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptee.errors import PteeError, unknown

# Without a recipe. `targets` then depends on whether there are labels, `head` and `epochs` on the data.
PLAIN: dict[str, Any] = {"loss": "v1", "temperature": 1.0, "schedule": "constant", "exits": "pareto"}

RECIPES: dict[str, dict[str, Any]] = {
    # Heads sized by a budget, each taught by the backbone's probabilities alone; then gates decide who leaves.
    "ptee": {
        "head": "auto", "loss": "each", "targets": "soft", "temperature": 2.0, "schedule": "cosine", "gate": "agrees",
    },
    # Lahiany & Aperstein, IEEE Access 10, 2022: joint loss on the backbone's answers, threshold .5.
    "pteenet": {"exits": "fine", "head": "conv2", "loss": "v1", "targets": "pseudo"},
    # Demir & Akbas, thesis 2019 and arXiv 2409.05336: the smallest heads, every blended answer judged.
    "eenet": {"exits": "pareto", "head": "bnpool", "loss": "v2"},
}  # fmt: skip


def followed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what the recipe among them says in place of those that are None.

    Args:
        given: options of `ptee augment` by name, "recipe" among them, which may be None.

    Raises:
        UnknownName: if there is no such recipe.
        PteeError: if an option that was given stands against the recipe.
    """
    name = given["recipe"]
    if name is not None and name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    says = dict(RECIPES.get(name, {}))
    own = {key for key in says if given[key] is not None}
    if says.get("loss") == "each" and given["loss"] not in (None, "each"):
        raise PteeError(
            f"The recipe {name!r} is heads that learn each for itself, and --loss {given['loss']} has them learn together. "
            "Leave one of the two out."
        )
    if "targets" in own and given["targets"] != "soft":
        says.pop("temperature", None)  # it is of probabilities
    return {key: says.get(key, PLAIN.get(key)) if value is None else value for key, value in given.items()}
