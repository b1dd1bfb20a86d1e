"""A recipe: every setting from exits to thresholds in one value, and the only place of their defaults.

Recipes are YAML files; some are built in. `ptee recipe NAME` prints one, and every run keeps the recipe it was made with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError, first_line, in_line, unknown
from ptee._common.files import as_path, is_file, is_folder
from ptee._common.validation import FrozenConfig, Whole
from ptee._common.writing import settle
from ptee._common.yaml_text import read_yaml
from ptee.exits.config import CALIBRATED, LEARNED, ConfidenceConfig, ExitsConfig
from ptee.training.config import ALONE, BACKBONE_WORDS, FROZEN, JOINT, TrainingConfig
from ptee.training.config import Backbone as BackboneKind
from ptee.tuning.config import HOW, TARGETS, ThresholdsConfig

RECIPE_FILE = "recipe.yaml"
OF_RECIPE = {"seed", "backbone"}  # settings of the training that are the recipe's
LARGEST_FILE = 2**16  # bytes; a recipe has about two thousand, and YAML is read slowly
DEFAULT = "ptee"
WRITTEN = str | int | float | list | tuple  # values that a message shows as they are written
# Shorter names of settings, in Python and on the command line.
OTHER_NAMES = {"exits": "exits.places", "num_exits": "exits.number", "confidence": "confidence.name"}
OF_PAPERS = dict.fromkeys(("lambda", "training.lambda"), "training.cost_weight")


class Recipe(FrozenConfig):
    """All settings of `ptee.fit`: where exits stand, how they learn, which images leave.

    A recipe cannot be changed; `recipe.with_settings({"epochs": 20})` makes another. `print(recipe.to_yaml())` shows every setting.
    """

    name: str = Field(DEFAULT, description="What the recipe is called.")
    about: str = Field("", description="Where it comes from, in a sentence.")
    seed: Whole = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the heads, of the order of the images, and of the images that are drawn for each part.",
    )
    backbone: BackboneKind = Field(FROZEN, description=f"What becomes of the backbone: {BACKBONE_WORDS}")
    exits: ExitsConfig = ExitsConfig()
    training: TrainingConfig = TrainingConfig()
    confidence: ConfidenceConfig = ConfidenceConfig()
    thresholds: ThresholdsConfig = ThresholdsConfig()

    @model_validator(mode="after")
    def _one_for_all(self) -> Self:
        for key in OF_RECIPE & self.training.model_fields_set:
            own = getattr(self.training, key)
            if own not in (None, getattr(self, key)):
                wrong, right = (Argument(name, str(own)) for name in (f"training.{key}", key))
                text = f" is not the recipe's {key}. Give one for all: "
                raise PteeError(wrong, text, right, ".", argument=f"training.{key}", value=own)
        self.own_training()  # refuses settings that do not go with the recipe's backbone
        return self

    def own_training(self) -> TrainingConfig:
        """The settings of the training, with those of the recipe that count there, too."""
        return self.training.changed(**{key: getattr(self, key) for key in OF_RECIPE})

    def given(self) -> dict[str, Any]:
        """The settings that were set, nested by section; the others have their defaults."""
        return self.model_dump(exclude_unset=True, exclude={"training": OF_RECIPE}, mode="json")

    def to_yaml(self) -> str:
        """The recipe as the text of a file, with every setting."""
        values = self.resolved().model_dump(exclude={"training": OF_RECIPE}, mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)

    def resolved(self) -> Recipe:
        """The same recipe with a value for every None that depends on other settings."""
        training = self.own_training().resolved()
        confidence = self.confidence.changed(name=self.confidence.name or self._usual_confidence)
        return self.model_copy(update={"exits": self.exits.resolved(), "training": training, "confidence": confidence})

    @property
    def _usual_confidence(self) -> str:
        return CALIBRATED if self.training.loss in ALONE else LEARNED

    def with_settings(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with some settings changed.

        Args:
            settings: values by name: `training.epochs`, or the last word alone (`epochs`) if only one section has it.

        Raises:
            UnknownName: if there is no such setting; the nearest is named.
            PteeError: if a value is not possible, or does not go with the others.
        """
        changes = {path_for(name, value): value for name, value in settings.items()}
        values = self._loosened("training.loss" in changes).given() if changes else self.given()
        for path, value in changes.items():
            _set(values, path, value)
        with _as_called(settings):
            return Recipe(**values)

    def _loosened(self, confidence: bool) -> Recipe:
        """The same recipe, in which values that follow from other settings are not set, so that they follow a change of these."""
        loose: dict[str, Any] = {"exits": _loosened(self.exits), "training": _loosened(self.own_training())}
        if confidence and self.confidence.name == self._usual_confidence:
            loose["confidence"] = ConfidenceConfig(**self.confidence.model_dump(exclude_unset=True, exclude={"name"}))
        return self.model_copy(update={name: value for name, value in loose.items() if name in self.model_fields_set})


def _loosened(config: Any) -> Any:
    kind = type(config)
    following = {name for name, field in kind.model_fields.items() if field.default is None}
    values = {name: getattr(config, name) for name in config.model_fields_set}
    usual = kind(**{name: value for name, value in values.items() if name not in following}).resolved()
    kept = {name: value for name, value in values.items() if name not in following or value != getattr(usual, name)}
    loose = kind(**kept)
    return loose if loose.resolved() == config.resolved() else config


def _of_paper(about: str, exits: Any, training: Any, confidence: str = "learned", **more: Any) -> dict[str, Any]:
    """A paper's recipe. All learn with Adam, on the images themselves; a frozen backbone's heads for five epochs."""
    common = {
        "epochs": 5, "optimizer": "adam", "lr": 0.001, "weight_decay": 0.0, "schedule": "constant", "views": 1, "shift": 0
    }  # fmt: skip
    more |= {"confidence": {"name": confidence}, "thresholds": {"threshold": 0.5}}
    return {"about": about, "exits": exits, "training": {**common, **training}, **more}


THESIS = {"epochs": 200, "batch_size": 32, "patience": 20}  # of all its trainings, unless it says otherwise
BUILT_IN: dict[str, dict[str, Any]] = {
    "ptee": {
        "about": "The default: three heads that learn the backbone's probabilities, the first one large and early."
    },
    "pteenet": _of_paper(
        "Lahiany and Aperstein, IEEE Access 10, 2022: a joint loss on the backbone's own answers, threshold 0.5.",
        {"places": "fine", "head": "conv2"},
        {"loss": "joint", "targets": "pseudo"},
    ),
    "eenet": _of_paper(
        "Demir and Akbas, thesis 2019 and arXiv 2409.05336: the smallest heads; the answer blended from each exit on is judged.",
        {"places": "pareto", "head": "bnpool"},
        {"loss": "joint_each_exit"},
    ),
    "branchynet": _of_paper(
        "Teerapittayanon et al., ICPR 2016, with a frozen backbone: heads learn the labels, rows leave by entropy.",
        {"places": "pareto", "head": "conv2"},
        {"loss": "separate", "targets": "labels"},
        "entropy",
    ),
    "ztw": _of_paper(
        "Wolczyk et al., NeurIPS 2021 (Zero Time Waste): each head also reads the answer of the exit before it.",
        {"places": "pareto", "head": "conv2+"},
        {"loss": "separate", "targets": "labels"},
        "max_prob",
    ),
    "eenet-joint": _of_paper(
        "Demir and Akbas, thesis 2019 and arXiv 2409.05336: backbone and exits learn together; the cost counts .95.",
        {"places": "pareto", "head": "bnpool"},
        {"loss": "joint_each_exit", "cost_weight": 0.95, **THESIS},
        backbone=JOINT,
    ),
    "branchynet-joint": _of_paper(
        "Teerapittayanon et al., ICPR 2016: backbone and heads learn a weighted sum of cross-entropies, rows leave by entropy.",
        {"places": "pareto", "head": "conv2"},
        {"loss": "weighted", **THESIS},
        "entropy",
        backbone=JOINT,
    ),
    "db-joint": _of_paper(
        "Scardapane et al., ICASSP 2020 (differentiable branching): backbone and heads learn the soft answer and its cost.",
        {"places": "linear", "head": "conv1"},
        {"loss": "joint", **THESIS},
        backbone=JOINT,
    ),
}
# The demo's heads are so small that they read easy canvases only. Larger ones would read nearly all, and nobody would need the
# rest of the network.
DEMO_RECIPE: dict[str, Any] = {
    "name": "demo",
    "about": "Small heads at two exits of a small network that reads digits.",
    "exits": {"places": ("layer1.0", "layer2.0"), "head": "res-16x1s4"},
    "training": {"epochs": 6},
}


# ---------------------------------------------------------------------------------------------------- from names, files and values


def make_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None, settings: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe with some settings changed.

    Args:
        recipe: the name of a built-in recipe, a YAML file, the folder of a run, a mapping, or a recipe. None: "ptee".
        settings: changes, as of `Recipe.with_settings`. None as a value unsets what the recipe says.

    Raises:
        UnknownName: if there is no such recipe or setting.
        PteeError: if a value is not possible.
    """
    changes = {path_for(name, value): value for name, value in (settings or {}).items()}
    values, file = _values(DEFAULT if recipe is None else recipe)
    with _of_file(file):
        values = _in_sections(values)
        made = Recipe(**values)
    with _as_called(settings or {}):
        return made.with_settings(_without_rivals(values, changes))


@contextmanager
def _of_file(file: Path | None) -> Iterator[None]:
    """Errors name the file and its own keys, which are no arguments of anything."""
    try:
        yield
    except PteeError as why:
        if file is None:
            raise
        where = f"In the recipe {file}{_line_of(file, why.argument or '')}"
        raise type(why)(f"{where}: {why}", argument="recipe", value=why.value) from why


def _line_of(file: Path, path: str) -> str:
    """The line in which a setting is given, after a comma; empty if none, or more than one, begins with its name as deep as it stands."""
    section, _, key = path.partition("[")[0].rpartition(".")
    depth = (r"\s+" if key in Recipe.model_fields else r"\s*") if section else ""  # it may stand beside its section
    begin = re.compile(rf"{depth}{re.escape(key)}\s*:")
    lines = [n for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if begin.match(line)]
    return f", line {lines[0]}" if len(lines) == 1 else ""


@contextmanager
def _as_called(settings: Mapping[str, Any]) -> Iterator[None]:
    """Errors name a setting as the caller did: max_drop=2 and not thresholds.max_drop=2."""
    names = {path_for(name, value): name for name, value in settings.items()}

    def called(path: str) -> str:
        setting, bracket, place = path.partition("[")  # of a list
        return names.get(setting, setting) + bracket + place

    try:
        yield
    except PteeError as why:
        parts = [Argument(called(part.name), part.value) if isinstance(part, Argument) else part for part in why.parts]
        raise type(why)(*parts, argument=why.argument and called(why.argument), value=why.value) from why.__cause__


def _without_rivals(values: Mapping[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The changes. A threshold or target among them replaces the one of the recipe."""
    own = values.get("thresholds")
    given = {path.removeprefix("thresholds.") for path, value in changes.items() if value is not None}
    if not isinstance(own, Mapping) or not given & {"threshold", *TARGETS}:
        return changes
    rivals = {name: None for name in ("threshold", *TARGETS) if name in own}
    if "threshold" in given:  # nothing is chosen, so nothing says how
        rivals |= {name: ThresholdsConfig.model_fields[name].default for name in HOW if name in own}
    return {**{f"thresholds.{name}": value for name, value in rivals.items()}, **changes}


def _no_recipe(text: str) -> PteeError:
    return PteeError(text, argument="recipe")


def _values(recipe: str | Path | Mapping[str, Any] | Recipe) -> tuple[dict[str, Any], Path | None]:
    """The settings, not yet checked, and the file that they were read from."""
    if isinstance(recipe, Recipe):
        return recipe.given(), None
    if isinstance(recipe, Mapping):
        return _with_names(recipe, "recipe"), None
    if isinstance(recipe, str) and recipe in BUILT_IN:
        return {"name": recipe, **BUILT_IN[recipe]}, None
    if not isinstance(recipe, str | Path):
        raise _no_recipe(
            f"recipe is {recipe!r:.60}. Give a name ({', '.join(BUILT_IN)}), a file, a mapping or a Recipe."
        )
    if not str(recipe).strip():
        raise _no_recipe(f"The recipe is an empty text. Give a name ({', '.join(BUILT_IN)}) or a file.")
    path = as_path(recipe, "recipe")
    settle(path)
    if is_file(path / RECIPE_FILE):
        path = path / RECIPE_FILE
    if path.suffix in (".yaml", ".yml") or is_file(path):
        return _read(path), path
    if is_folder(path):
        raise _no_recipe(f"{path} is a folder without {RECIPE_FILE}. Give the folder of a run, or a file.")
    raise unknown("recipe", str(recipe), BUILT_IN, argument="recipe")


def _read(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked."""
    try:
        if not is_file(path):
            raise _no_recipe(f"There is no recipe file {path!s:.300}. Give a file, or one of {', '.join(BUILT_IN)}.")
        if (size := path.stat().st_size) > LARGEST_FILE:
            raise _no_recipe(f"The recipe {path} has {size:,} bytes; no recipe has more than {LARGEST_FILE:,}.")
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as why:
        raise _no_recipe(f"The recipe {path} cannot be read{in_line(why)}: {first_line(why)}") from why
    if not isinstance(values, dict):
        raise _no_recipe(f"The recipe {path} is no YAML mapping such as 'training: {{epochs: 20}}'.")
    return _with_names(values, f"recipe {path}")


def _with_names(values: Mapping[Any, Any], what: str) -> dict[str, Any]:
    """The values, if each has a name. YAML and Python know other keys, too."""
    sections = [section for section in values.values() if isinstance(section, Mapping)]
    if odd := [key for each in (values, *sections) for key in each if not isinstance(key, str)]:
        raise _no_recipe(f"The {what} has a setting called {odd[0]!r:.60}. Name each by text, such as epochs: 20.")
    return dict(values)


def _in_sections(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with those that stand beside the sections in their own, as --set epochs=3 does it. In a wrong section one is refused."""
    inner = {name: getattr(field.annotation, "model_fields", None) for name, field in Recipe.model_fields.items()}
    made, beside = dict[str, Any](), dict[str, Any]()
    for name, value in values.items():
        is_no_section = name not in inner if value is None else inner.get(name, True)
        is_beside = name in PATHS and not isinstance(value, Mapping) and is_no_section
        (beside if is_beside else made)[name] = value
        for key, v in value.items() if isinstance(value, Mapping) else ():
            if key in PATHS and key not in (inner.get(name) or value) and isinstance(v, WRITTEN):
                _refuse_outside(key, v, f"{name}.{key}")
    for name, value in beside.items():
        section, _, key = (path := path_for(name, value)).rpartition(".")
        if isinstance(there := made.setdefault(section, {}), Mapping) and key in there:
            raise PteeError(f"{path} is given twice, in its section and beside it. Give it once.", argument=path)
        made[section] = {**there, key: value} if isinstance(there, Mapping) else there
    return made


def _refuse_outside(name: str, value: Any, path: str) -> None:
    """Refuse a setting that stands at this path and has another one."""
    section, _, key = path_for(name, value).rpartition(".")
    key = "number" if path_for(name, value) == "exits.places" and isinstance(value, int) else key
    right = f"{key}: {str(value).replace(chr(39), ''):.60}"
    text = f" stands at the wrong place. Write {f'{section}: {{{right}}}' if section else right}."
    raise PteeError(Argument(path, f"{value!r:.60}"), text, value=value)


# ---------------------------------------------------------------------------------------------------- names of settings


def settings() -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted path, with its field (default, description)."""
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, FrozenConfig)):
            yield name, field
            continue
        for key, inner in section.model_fields.items():
            if name != "training" or key not in OF_RECIPE:
                yield f"{name}.{key}", inner


def _paths() -> dict[str, str]:
    """The path of every setting by each of its names: the path, its last word if only one setting has it, or another."""
    paths = [path for path, _ in settings()]
    words = Counter(map(_last_word, paths))
    short = {word: path for path in paths if words[word := _last_word(path)] == 1}
    return {**short, **OTHER_NAMES, **OF_PAPERS, **{path: path for path in paths}}


def _last_word(path: str) -> str:
    return path.rpartition(".")[2]


PATHS = _paths()


def path_of(name: str) -> str:
    """The dotted path of a setting, from any name in `PATHS`.

    Raises:
        UnknownName: if there is no such setting; it names what is near.
    """
    if name in PATHS:
        return PATHS[name]
    raise unknown("setting", name, [each for each in PATHS if ("." in each) == ("." in name)], argument=name)


def path_for(name: str, value: Any) -> str:
    """The path of a setting that gets this value. A confidence that is a number is that of a guarantee; others have names.

    Raises:
        UnknownName: if there is no such setting.
    """
    path = path_of(name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "thresholds.confidence" if path == OTHER_NAMES["confidence"] and number else path


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    if section:
        key, value = section, {**values.get(section, {}), key: value}
    values[key] = value


def read_setting(text: str) -> tuple[str, Any]:
    """`training.epochs=20` as a path and a value, which is read as YAML.

    Raises:
        PteeError: if it has another form.
        UnknownName: if there is no such setting.
    """
    name, equals, value = text.partition("=")
    if equals and not value.strip():
        raise PteeError(f"{text!r:.60} has no value. Write it as NAME=VALUE, such as training.epochs=20.")
    try:
        if equals:
            return path_of(name.strip()), read_yaml(value)
    except yaml.YAMLError as why:
        raise PteeError(f"The value of {text!r:.60} cannot be read: {first_line(why)}") from why
    raise PteeError(f"{text!r:.60} is no setting. Write it as NAME=VALUE, such as training.epochs=20.")


def read_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Settings and their values, from texts such as `training.cost_weight=0.3,0.5,0.9`.

    Raises:
        UnknownName: if there is no such setting.
        PteeError: if a text has another form, or a setting is named twice.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        words = [word.strip() for word in values.split(",") if word.strip()]
        if not equals or not words:
            why = f"{text!r} has no values. Write NAME=VALUE,VALUE, such as seed=0,1,2."
            raise PteeError(why, argument="over", value=text)
        path = path_of(name.strip())
        if path in axes:
            why = f"The setting {path} is given twice. Give all its values at once."
            raise PteeError(why, argument="over", value=text)
        try:
            axes[path] = list(read_yaml(f"[{values}]"))
        except yaml.YAMLError as fault:
            nothing = re.search(r"^\s*,|,\s*,", values)
            instead = f"beside a comma there is nothing. Write {name}={','.join(words)}."
            why = f"The values of {text!r} cannot be read: {instead if nothing else first_line(fault)}"
            raise PteeError(why, argument="over", value=text) from fault
    return axes
