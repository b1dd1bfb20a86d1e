"""A recipe: every setting from exits to thresholds, in one value. It is the one place of defaults for Python and the command.

Recipes are YAML files; five are built in. `ptee recipe NAME` prints one, and every run keeps the recipe it was made with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError, first_line, unknown
from ptee._common.files import write_text
from ptee._common.validation import FrozenConfig, Whole
from ptee.evaluation.config import ThresholdsConfig
from ptee.exits.config import CALIBRATED, LEARNED, ConfidenceConfig, ExitsConfig
from ptee.training.config import SEPARATE, TrainingConfig

LARGEST_FILE = 2**18  # bytes; a recipe has about two thousand
DEFAULT = "ptee"
OTHER_NAMES = {
    "exits": "exits.places",
    "num_exits": "exits.number",
    "confidence": "confidence.name",
}  # of Python and the command


class Recipe(FrozenConfig):
    """How exits are added to a classifier: where they stand, how they learn, who leaves. Frozen; `changed` makes another."""

    name: str = Field(DEFAULT, description="What the recipe is called.")
    about: str = Field("", description="Where it comes from, in a sentence.")
    seed: Whole = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the heads, of the order of the images, and of the images that are drawn for each part.",
    )
    exits: ExitsConfig = ExitsConfig()
    training: TrainingConfig = TrainingConfig()
    confidence: ConfidenceConfig = ConfidenceConfig()
    thresholds: ThresholdsConfig = ThresholdsConfig()

    @model_validator(mode="after")
    def _one_seed(self) -> Self:
        own = self.training.seed
        if "seed" in self.training.model_fields_set and own != self.seed:
            raise PteeError(
                Argument("training.seed", str(own)), " is not the recipe's seed. Give one for all: ", Argument("seed", str(own)), ".",
                argument="training.seed", value=own,
            )  # fmt: skip
        return self

    def given(self) -> dict[str, Any]:
        """The settings that were set, nested by section; the others follow their defaults."""
        return self.model_dump(exclude_unset=True, exclude={"training": {"seed"}}, mode="json")

    def to_yaml(self) -> str:
        """The recipe as a file: every setting, defaults too."""
        values = self.resolved().model_dump(exclude={"training": {"seed"}}, mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)

    def resolved(self) -> Recipe:
        """The same recipe with a value in place of every None that depends on other settings."""
        training = self.training.changed(seed=self.seed).resolved()
        confidence = self.confidence.changed(name=self.confidence.name or self._usual_confidence)
        return self.model_copy(update={"exits": self.exits.resolved(), "training": training, "confidence": confidence})

    @property
    def _usual_confidence(self) -> str:
        return CALIBRATED if self.training.loss == SEPARATE else LEARNED

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with some settings changed.

        Args:
            settings: values by name: `training.epochs`, or the last word alone (`epochs`) where only one section has it.

        Raises:
            UnknownName: if there is no such setting; the nearest is named.
            PteeError: if a value cannot be, or does not go with the others.
        """
        changes = {path_of(name): value for name, value in settings.items()}
        values = self._without_what_follows("training.loss" in changes).given() if changes else self.given()
        for path, value in changes.items():
            _set(values, path, value)
        return Recipe(**values)

    def _without_what_follows(self, confidence: bool) -> Recipe:
        """The same recipe, in which settings that have the value that follows from the others are not set, so that they follow again.

        Args:
            confidence: let the confidence follow the loss again, too.
        """
        loose: dict[str, Any] = {"exits": _loosened(self.exits), "training": _loosened(self.training)}
        if confidence and self.confidence.name == self._usual_confidence:
            values = self.confidence.model_dump(exclude_unset=True, exclude={"name"})
            loose["confidence"] = ConfidenceConfig(**values)
        return self.model_copy(update={k: v for k, v in loose.items() if k in self.model_fields_set})


def _loosened(config: Any) -> Any:
    """A section without settings that have the value which follows from the others."""
    kind, follow = type(config), [name for name, field in type(config).model_fields.items() if field.default is None]
    values = {name: getattr(config, name) for name in config.model_fields_set}
    without = kind(**{name: value for name, value in values.items() if name not in follow}).resolved()
    kept = {name: value for name, value in values.items() if name not in follow or value != getattr(without, name)}
    loose = kind(**kept)
    return loose if loose.resolved() == config.resolved() else config


BUILT_IN: dict[str, dict[str, Any]] = {
    "ptee": {
        "about": "The default: three heads that learn the backbone's probabilities, the first one large and early."
    },
    "pteenet": {
        "about": "Lahiany and Aperstein, IEEE Access 10, 2022: a joint loss on the backbone's own answers, threshold 0.5.",
        "exits": {"places": "fine", "head": "conv2"},
        "training": {"loss": "joint", "targets": "pseudo"},
    },
    "eenet": {
        "about": "Demir and Akbas, thesis 2019 and arXiv 2409.05336: the smallest heads; the answer blended from each exit on is judged.",
        "exits": {"places": "pareto", "head": "bnpool"},
        "training": {"loss": "joint_each_exit"},
    },
    "branchynet": {
        "about": "Teerapittayanon et al., ICPR 2016, with a frozen backbone: heads learn the labels, rows leave by entropy.",
        "exits": {"places": "pareto", "head": "conv2"},
        "training": {"loss": "separate", "targets": "labels"},
        "confidence": {"name": "entropy"},
    },
    "ztw": {
        "about": "Wolczyk et al., NeurIPS 2021 (Zero Time Waste): each head also reads the answer of the exit before it.",
        "exits": {"places": "pareto", "head": "conv2+"},
        "training": {"loss": "separate", "targets": "labels"},
        "confidence": {"name": "max_prob"},
    },
}
# What the papers' recipes have in common. They learn for five epochs, on the images as they are, with Adam.
_OF_PAPERS: dict[str, Any] = {
    "training": {
        "epochs": 5, "optimizer": "adam", "lr": 0.001, "weight_decay": 0.0, "schedule": "constant", "views": 1, "shift": 0,
    },
    "confidence": {"name": "learned"},
    "thresholds": {"threshold": 0.5},
}  # fmt: skip
for _name in set(BUILT_IN) - {DEFAULT}:
    BUILT_IN[_name] = {
        key: {**_OF_PAPERS.get(key, {}), **BUILT_IN[_name].get(key, {})} if key != "about" else BUILT_IN[_name]["about"]
        for key in ("about", "exits", "training", "confidence", "thresholds")
    }


def make_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None, settings: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe by name, from a file or from values, with some settings changed.

    Args:
        recipe: the name of a built-in recipe, a YAML file, a mapping like that file, or a recipe. None: "ptee".
        settings: changes, as of `Recipe.with_settings`. None unsets what the recipe says.

    Raises:
        UnknownName: if there is no such recipe or setting.
        PteeError: if a value cannot be.
    """
    changes = {path_of(name): value for name, value in (settings or {}).items()}
    values = _values(DEFAULT if recipe is None else recipe)
    return Recipe(**values).with_settings(_without_rivals(values, changes))


def _without_rivals(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes; a way to get thresholds that is given takes the place of the recipe's own."""
    own, given = values.get("thresholds", {}), {path for path, value in changes.items() if value is not None}
    ways = [f"thresholds.{name}" for name in ("threshold", "max_loss", "max_drop", "max_fidelity_drop", "max_cost")]
    rivals: dict[str, Any] = {}
    if set(ways) & given and isinstance(own, Mapping):
        rivals = {way: None for way in ways if way.partition(".")[2] in own}
        if changes.get("thresholds.threshold") is not None:  # and nothing is chosen
            how = {"thresholds.one_threshold": False, "thresholds.margin": "auto"}
            rivals |= {path: value for path, value in how.items() if path.partition(".")[2] in own}
    return {**rivals, **changes}


def _values(recipe: str | Path | Mapping[str, Any] | Recipe) -> dict[str, Any]:
    if isinstance(recipe, Recipe):
        return recipe.given()
    if isinstance(recipe, Mapping):
        return dict(recipe)
    if isinstance(recipe, str) and recipe in BUILT_IN:
        return {"name": recipe, **BUILT_IN[recipe]}
    if not isinstance(recipe, str | Path):
        raise PteeError(
            f"recipe is {recipe!r:.60}. Give a name ({', '.join(BUILT_IN)}), a YAML file, a mapping or a Recipe.",
            argument="recipe",
        )
    path = Path(recipe)
    if path.is_dir() and (path / RECIPE_FILE).is_file():
        path = path / RECIPE_FILE
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_recipe(path)
    raise unknown("recipe", str(recipe), BUILT_IN)


RECIPE_FILE = "recipe.yaml"


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked.

    Raises:
        PteeError: if it cannot be read, or is no YAML mapping.
    """
    try:
        if not path.is_file():
            raise PteeError(
                f"There is no recipe file {path}. Give a file, or one of {', '.join(BUILT_IN)}.", argument="recipe"
            )
        if path.stat().st_size > LARGEST_FILE:
            raise PteeError(
                f"The recipe {path} has {path.stat().st_size:,} bytes; no recipe has more than {LARGEST_FILE:,}."
            )
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as why:
        raise PteeError(f"The recipe {path} cannot be read: {first_line(why)}") from why
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise PteeError(f"The recipe {path} is no YAML mapping such as 'training: {{epochs: 20}}'.")
    return values


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Keep a recipe in a run's folder.

    Raises:
        RunError: if it cannot be written.
    """
    write_text(folder / RECIPE_FILE, recipe.to_yaml())


class _Loader(yaml.SafeLoader):
    """YAML 1.2's truth values and numbers: `no` is a word, as in precision: no, and 1e-2 is a number.

    A few lines of aliases can stand for more values than a machine can hold, so there are none.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node; PyYAML asks for it."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read here. Write the value again.")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|false|False"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(inf|nan)$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The value that a YAML text stands for.

    Args:
        text: of a file, or a single value.

    Raises:
        yaml.YAMLError: if it is none. The library itself lets other errors pass, as for `!!int x`.
    """
    try:
        return yaml.load(text, _Loader)
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as why:
        raise yaml.YAMLError(first_line(why)) from why


# ---------------------------------------------------------------------------------------------------- names of settings


def settings() -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted path, with its field (default, description)."""
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, FrozenConfig):
            yield from (
                (f"{name}.{key}", inner)
                for key, inner in section.model_fields.items()
                if (name, key) != ("training", "seed")
            )
        else:
            yield name, field


def path_of(name: str) -> str:
    """The dotted path of a setting.

    Args:
        name: the path, or its last word where only one section has it, or a name of `OTHER_NAMES`.

    Raises:
        UnknownName: if there is no such setting.
    """
    paths = [path for path, _ in settings()]
    if name in paths:
        return name
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    found = [path for path in paths if path.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    short = [path.rpartition(".")[2] for path in paths]
    raise unknown("setting", name, paths if "." in name else [*OTHER_NAMES, *short])


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    if not section:
        values[key] = value
        return
    inner = values.get(section)
    if inner is not None and not isinstance(inner, Mapping):
        raise PteeError(
            f"The section {section} of a recipe holds settings, not {inner!r:.60}.", argument=section, value=inner
        )
    values[section] = {**(inner or {}), key: value}


def read_setting(text: str) -> tuple[str, Any]:
    """`training.epochs=20` as a path and a value, which is read as YAML.

    Raises:
        PteeError: if it is not of that form.
        UnknownName: if there is no such setting.
    """
    name, equals, value = text.partition("=")
    try:
        if equals:
            return path_of(name.strip()), read_yaml(value)
    except yaml.YAMLError as why:
        raise PteeError(f"The value of {text!r:.60} cannot be read: {first_line(why)}") from why
    raise PteeError(f"{text!r:.60} is no setting. Write it as NAME=VALUE, such as training.epochs=20.")
