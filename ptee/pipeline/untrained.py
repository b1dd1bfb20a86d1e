"""A backbone with the exits of a recipe, whose heads have not learned yet."""

from __future__ import annotations

from typing import Any

from ptee._common.errors import CutError
from ptee._common.process import own_random_numbers
from ptee.backbones.load import Backbone
from ptee.exits.config import DEFAULT_PLACES, ExitsConfig
from ptee.exits.front import FrontHead, named_front
from ptee.exits.places import read_places
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline.recipe import Recipe


def build_model(backbone: Backbone, recipe: Recipe) -> EarlyExitModel:
    """The model with untrained heads; the same seed gives the same heads.

    A backbone that has no room for exits at the default places gets as many by the rule pareto as it has room for.
    """
    config = recipe.exits.resolved()
    front = front_of(backbone, config)
    try:
        return _build(backbone, config, front, recipe.seed)
    except CutError:
        if config.places != DEFAULT_PLACES:
            raise
        return _build(backbone, config.changed(places="pareto", head_budget=None), front, recipe.seed)


def _build(backbone: Backbone, config: ExitsConfig, front: FrontHead | str | None, seed: int) -> EarlyExitModel:
    places: Any = read_places(config.places, backbone)
    with own_random_numbers(seed):
        return build(
            backbone,
            exits=places,
            num_exits=config.number,
            head=config.head or "auto",
            head_budget=config.head_budget,
            front=front,
        )


def front_of(backbone: Backbone, config: ExitsConfig) -> FrontHead | str | None:
    """The network in front of the backbone, "auto" for a learned head there, or None."""
    return named_front(
        config.front,
        backbone,
        weights=config.front_weights,
        mean=_each(config.front_mean),
        std=_each(config.front_std),
    )


def _each(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value
