"""Recipes: ways of making exits, by name. A recipe says what is taken for each option of `ptee augment` that is not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptee._common.errors import PteeError, unknown
from ptee.exits.heads import AUTO, BUILDS_ON, SIZED

RECIPE = "ptee"  # where none is named
NO_GATE = "none"  # the word of who wants none though a recipe has them
MAY_LOSE = 0.01  # of accuracy, or of the answers where there are no labels, by the thresholds that RECIPE is given
# Without a recipe. `targets` then depends on whether there are labels, `head` and `epochs` on the data.
PLAIN: dict[str, Any] = {
    "loss": "v1", "temperature": 1.0, "cost_weight": 1.0, "exits": "pareto", "augment": 1, "shift": 0,
    "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant",
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    # Heads sized by a budget, the first early and large, each taught by the backbone's probabilities alone; then gates
    # decide who leaves. What the first cannot learn from few images, the later ones can; thresholds switch it off then,
    # and as none builds on another, what is off costs nothing.
    "ptee": {
        "exits": "0.03,0.4,0.7", "head": AUTO, "head_budget": (0.15, 0.03, 0.03),
        "loss": "each", "targets": "soft", "temperature": 2.0, "gate": "agrees", "augment": 2, "shift": AUTO, "epochs": AUTO,
        "optimizer": "muon", "lr": 1e-2, "weight_decay": 0.05, "schedule": "cosine",
    },
    # Lahiany & Aperstein, IEEE Access 10, 2022: joint loss on the backbone's answers, threshold .5.
    "pteenet": {"exits": "fine", "head": "conv2", "loss": "v1", "targets": "pseudo"},
    # Demir & Akbas, thesis 2019 and arXiv 2409.05336: the smallest heads, every blended answer judged.
    "eenet": {"exits": "pareto", "head": "bnpool", "loss": "v2"},
    # Wołczyk et al., NeurIPS 2021: each answer builds on the one before; `heads` says what is done of it and what is not.
    "ztw": {"exits": "pareto", "head": "conv2+", "loss": "each", "targets": "labels"},
    # Teerapittayanon et al., ICPR 2016: the exits' cross-entropies together, here of heads on a frozen backbone. Rows leave
    # by entropy there: a policy for each run in `ptee compare`.
    "branchynet": {"exits": "pareto", "head": "conv2", "loss": "each", "targets": "labels"},
}  # fmt: skip


def _make_room(says: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Places and budgets of `RECIPE` go where others are given."""
    if given["num_exits"] is not None:
        says["exits"] = PLAIN["exits"]
    elif given["front"] is not None:
        says["exits"] = "0.4,0.7"  # the front stands for the first
        says["head"] = AUTO + BUILDS_ON  # what it computed is there to be read
    if given["exits"] == AUTO:
        says["head"] = "pool"  # for which the choice is sound
    others = given["exits"] not in (None, says["exits"]) or given["head"] not in (None, *SIZED)
    if others or given["num_exits"] is not None or given["front"] not in (None, AUTO):
        says.pop("head_budget")


def followed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what the recipe among them says in place of those that are None.

    Args:
        given: options of `ptee augment` or `ptee plan` by name, "recipe" among them. None there is `RECIPE`, but for a loss
            that all heads have together, which is another way altogether: nothing is then taken of any recipe.

    Raises:
        UnknownName: if there is no such recipe.
        PteeError: if an option that was given stands against the recipe.
    """
    name = given["recipe"] or (RECIPE if given.get("loss") in (None, "each") else None)
    if name is not None and name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    says = {**(RECIPES[name] if name else {}), "recipe": name}
    own = {key for key in says if given.get(key) not in (None, says[key])}
    if name == RECIPE:
        _make_room(says, given)
    if says.get("loss") == "each" and given.get("loss") not in (None, "each"):
        raise PteeError(
            f"The recipe {name!r} is heads that learn each for itself, and --loss {given['loss']} has them learn together. "
            "Leave one of the two out."
        )
    if says.get("loss") == "each" and given.get("cost_weight") is not None:
        raise PteeError(
            f"A cost weight is of heads that learn together, and those of the recipe {name!r} learn each for itself: thresholds "
            "set the price. Leave --cost-weight out, or give --loss v1."
        )
    if "targets" in own:
        says.pop("temperature", None)  # it is of probabilities
    if "optimizer" in own:
        says = {key: value for key, value in says.items() if key not in ("lr", "weight_decay")}  # they are Muon's
    if given.get("gate") == NO_GATE:
        given, says = {**given, "gate": None}, {key: value for key, value in says.items() if key != "gate"}
    return {key: says.get(key, PLAIN.get(key)) if value is None else value for key, value in given.items()}
