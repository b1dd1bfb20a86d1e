"""Recipes: one place of defaults, read from names, files and values, changed by setting, refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ptee._common.errors import PteeError, UnknownName
from ptee.pipeline.recipe import BUILT_IN, RECIPE_FILE, Recipe, make_recipe, path_of, read_setting, settings
from ptee.tuning.config import Target

each_built_in = pytest.mark.parametrize("name", list(BUILT_IN))


def in_run(recipe: Recipe, folder: Path) -> Path:
    """The folder of a run that was made by a recipe."""
    (folder / RECIPE_FILE).write_text(recipe.to_yaml())
    return folder


@each_built_in
def test_a_built_in_recipe_is_found_by_its_name_and_says_where_it_comes_from(name):
    recipe = make_recipe(name)
    assert recipe.name == name
    assert recipe.about.endswith(".")


@each_built_in
def test_a_recipe_survives_its_file(name, tmp_path):
    recipe = make_recipe(name).resolved()
    in_run(recipe, tmp_path)
    for source in (tmp_path / RECIPE_FILE, str(tmp_path / RECIPE_FILE), tmp_path):
        assert make_recipe(source).resolved() == recipe


@each_built_in
def test_a_recipes_file_names_every_setting_but_the_seed_twice(name):
    values = yaml.safe_load(make_recipe(name).to_yaml())
    named = {f"{section}.{key}" for section, inner in values.items() if isinstance(inner, dict) for key in inner}
    named |= {key for key, inner in values.items() if not isinstance(inner, dict)}
    assert named == {path for path, _ in settings()}


def test_every_setting_is_described():
    assert [path for path, field in settings() if not field.description] == []


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        make_recipe().seed = 3


def test_the_default_recipe_places_three_auto_heads_and_calibrates_their_confidence():
    recipe = make_recipe().resolved()
    assert (recipe.exits.places, recipe.exits.head) == ((0.03, 0.4, 0.7), "auto")
    assert recipe.exits.head_budget == (0.15, 0.03, 0.03)
    assert (recipe.training.loss, recipe.training.targets, recipe.training.temperature) == ("separate", "soft", 2.0)
    assert recipe.confidence.name == "calibrated"
    assert recipe.thresholds.target(labelled=True) == Target("max_drop", 0.01)
    assert recipe.thresholds.target(labelled=False) == Target("max_fidelity_drop", 0.01)


# ---------------------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize("name", ["training.epochs", "epochs"])
def test_a_setting_is_changed_by_its_path_or_by_its_last_word(name):
    assert make_recipe("ptee", {name: 7}).training.epochs == 7


def test_python_and_the_command_call_some_settings_by_shorter_names():
    shorter = {"exits": "exits.places", "num_exits": "exits.number", "confidence": "confidence.name"}
    assert {name: path_of(name) for name in shorter} == shorter


def test_a_confidence_that_is_a_number_is_that_of_a_guarantee():
    made = make_recipe(None, {"confidence": 0.95, "max_drop": 0.01})
    assert (made.thresholds.confidence, made.resolved().confidence.name) == (0.95, "calibrated")
    both = make_recipe(made, {"confidence": "entropy"})
    assert (both.thresholds.confidence, both.confidence.name) == (0.95, "entropy")
    assert make_recipe("pteenet", {"confidence": 0.9, "max_drop": 0.01}).thresholds.threshold is None
    with pytest.raises(PteeError, match=r"^confidence=1\.5 must be below 1\."):
        make_recipe(None, {"confidence": 1.5})


def test_the_seed_is_also_that_of_the_training():
    assert make_recipe(None, {"seed": 5}).resolved().training.seed == 5


def test_other_places_leave_the_budgets_of_the_default_places_out():
    exits = make_recipe(None, {"exits": "golden"}).resolved().exits
    assert (exits.places, exits.head, exits.head_budget) == ("golden", "auto", None)


def test_a_number_of_exits_is_placed_by_pareto():
    assert make_recipe(None, {"num_exits": 4}).resolved().exits.places == "pareto"


@pytest.mark.parametrize("name", ["lambda", "training.lambda"])
def test_the_weight_of_the_cost_goes_by_the_papers_name_too(name):
    assert make_recipe("eenet", {name: 1.7, "loss": "V1"}).training.cost_weight == 1.7


def test_a_front_takes_the_place_of_the_first_exit():
    exits = make_recipe(None, {"front": "resnet18"}).resolved().exits
    assert (exits.places, exits.head, exits.head_budget) == ((0.4, 0.7), "auto+", None)


@pytest.mark.parametrize("recipe", [None, "ptee"])
@pytest.mark.parametrize("loss", ["v1", "joint", "v2", "mc", "cost"])
def test_a_joint_loss_changes_what_depends_on_the_loss_and_nothing_else(recipe, loss):
    made, usual = make_recipe(recipe, {"loss": loss}).resolved(), make_recipe("ptee").resolved()
    assert made.exits == usual.exits
    assert made.thresholds == usual.thresholds
    assert (made.training.optimizer, made.training.lr, made.training.targets) == ("adam", 0.001, "labels")
    assert (made.confidence.name, usual.confidence.name) == ("learned", "calibrated")


def test_the_resolved_recipe_of_a_run_gets_another_confidence_with_another_loss():
    saved = make_recipe("ptee").resolved()
    assert saved.with_settings({"loss": "joint"}).resolved().confidence.name == "learned"
    assert saved.with_settings({"loss": "joint", "confidence": "margin"}).resolved().confidence.name == "margin"


@pytest.mark.parametrize(
    "way", [{"threshold": 0.7}, {"max_drop": 0.02}, {"max_fidelity_drop": 0.02}, {"max_cost": 0.5}]
)
@each_built_in
def test_a_way_to_get_thresholds_that_is_given_takes_the_place_of_the_recipes_own(name, way):
    thresholds = make_recipe(name, way).thresholds
    ((key, value),) = way.items()
    assert getattr(thresholds, key) == value
    assert thresholds.target(labelled=True) == (None if key == "threshold" else Target(key, value))


def test_with_thresholds_that_are_given_those_of_the_recipe_are_no_longer_chosen(tmp_path):
    recipe = make_recipe(None, {"max_drop": 0.02, "margin": 0.01, "one_threshold": True})
    thresholds = make_recipe(recipe, {"threshold": 0.7}).thresholds
    assert (thresholds.threshold, thresholds.margin, thresholds.one_threshold) == (0.7, "auto", False)


@pytest.mark.parametrize(
    "setting",
    [
        "epochs=3",
        "training.epochs=3",
        "exits=[layer1, layer2]",
        "confidence=entropy",
        "confidence=0.9",
        "cache=true",
        "seed=3",
        "views=2",
    ],
)
def test_a_setting_has_the_same_names_in_a_file_as_on_the_command_line(setting, tmp_path):
    name, _, value = setting.partition("=")
    (tmp_path / "recipe.yaml").write_text(f"training: {{lr: 0.1}}\n{name}: {value}\n")
    typed = make_recipe({"training": {"lr": 0.1}}, dict([read_setting(setting)]))
    assert make_recipe(tmp_path / "recipe.yaml") == typed


# ---------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "an unknown recipe": ("pteenett", {}, "Unknown recipe 'pteenett'. Did you mean 'pteenet'"),
    "an empty text": ("", {}, r"The recipe is an empty text\. Give a name \(ptee"),
    "what can be no recipe": (5, {}, "recipe is 5. Give a name"),
    "an unknown setting": (None, {"epoch": 3}, "Unknown setting 'epoch'. Did you mean 'epochs'"),
    "an unknown setting of a section": ({"training": {"epoch": 3}}, {}, "training.epoch=3 is unknown. Did you mean 'epochs'"),
    "an unknown section": ({"train": {"epochs": 3}}, {}, "train=.* is unknown. Did you mean 'training'"),
    "a setting in its section and beside it": ({"epochs": 2, "training": {"epochs": 3}}, {}, r"^training\.epochs is given twice, in its section and beside it\. Give it once\.$"),
    "one setting beside its section by two names": ({"lambda": 0.5, "cost_weight": 0.5}, {}, r"^training\.cost_weight is given twice"),
    "a section that is no mapping, and a setting of it": ({"training": 3, "epochs": 3}, {}, "training=3 must be a mapping of settings"),
    "no value": (None, dict([read_setting("epochs=null")]), r"^training\.epochs=None must be a whole number, or 'auto'\. Leave it out for the default\.$"),
    "a section that is no mapping": ({"training": 3}, {"epochs": 3}, "training=3 must be a mapping of settings"),
    "a value below the least": (None, {"epochs": 0}, "^epochs=0 must be 1 or more, or 'auto'"),
    "a number that may be octal": (None, dict([read_setting("seed=010")]), "seed='010' must be a whole number"),
    "a value of another kind": (None, {"seed": "one"}, "seed='one' must be a whole number"),
    "a seed of the training alone": ({"training": {"seed": 7}}, {}, "training.seed=7 is not the recipe's seed.*seed=7"),
    "two ways to get thresholds": (None, {"max_drop": 0.01, "max_cost": 0.5}, "^max_drop=0.01 and max_cost=0.5 are given"),
    "a setting that does not go with the others": (None, {"loss": "v1", "temperature": 3}, "^temperature=3"),
    "a question about another confidence": (None, {"confidence": "entropy", "question": "right"}, "question='right' is about the calibrated"),
    "a share for another confidence": ("eenet", {"calibration_share": 0.2}, "calibration_share=0.2 is about the calibrated"),
    "a margin of thresholds that are given": ("eenet", {"margin": 0.1}, "margin=0.1 is about thresholds that are chosen"),
    "a number for a name": ({1: 2}, {}, "The recipe has a setting called 1. Name each by text"),
    "a number for a name in a section": ({"exits": {1: 2}}, {}, "The recipe has a setting called 1. Name each by text"),
    "a name that no file can have": ("a" * 5000, {}, "Unknown recipe 'aaa"),
    "a path that no file can have": ("a/" * 3000 + "r.yaml", {}, "There is no recipe file a/a"),
    "a share above a half": (None, {"calibration_share": 0.6}, "^calibration_share=0.6 must be 0.5 or less"),
}  # fmt: skip


@pytest.mark.parametrize("recipe, changes, said", REFUSED.values(), ids=REFUSED)
def test_what_is_not_possible_is_refused_in_one_line_with_its_name_and_value(recipe, changes, said):
    with pytest.raises(PteeError, match=said) as refusal:
        make_recipe(recipe, changes)
    assert "\n" not in str(refusal.value)


NO_RECIPES = {
    "broken": ("training: [", "cannot be read"),
    "a quote without an end": ("about: 'all of it\nseed: 3\n", "cannot be read in line 1: while scanning a quoted scalar, found unexp"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "line 2: expected a single document in the stream, but found another document"),
    "a list": ("- 1\n- 2\n", "is no YAML mapping"),
    "a key twice": ("training: {lr: 0.1}\ntraining: {epochs: 3}\n", "cannot be read in line 2: .*'training' stands there twice"),
    "a tab": ("training:\n\tepochs: 1\n", r"cannot be read in line 2: while scanning for the next token, found character '\\t' that cannot start any token"),
    "an alias": ("about: a\nname: *b\n", r"cannot be read in line 2: .*aliases \(\*name\) are not read here"),
    "a key twice in a section": ("training: {lr: 0.1, epochs: 2, lr: 0.2}\n", "'lr' stands there twice"),
    "numbers for names": ("1: 2\n", r"The recipe .* has a setting called 1\. Name each by text"),
    "numbers for names in a section": ("exits: {1: 2}\n", r"has a setting called 1\. Name each by text"),
    "code": ("training: !!python/object/apply:os.system ['true']\n", "cannot be read"),
    "too large": ("a" * 300_000, "no recipe has more than"),
    "nested deep": ("[" * 1_100, "cannot be read"),
    "a merge": ("training: {<<: {epochs: 1}, epochs: 3}\n", r"In the recipe .*recipe\.yaml: training\.<<=.* is unknown"),
    "a key that is no option": ("base: {a: 1}\n", r"In the recipe .*recipe\.yaml, line 1: base=.* is unknown\. Did you mean"),
    "a section without values": ("training:\n", r"In the recipe .*recipe\.yaml, line 1: training=None must be a mapping"),
    "an unknown setting": ("seed: 1\ntraining:\n  lr: 0.1\n  epoch: 3\n", r"^In the recipe .*recipe\.yaml, line 4: training\.epoch=3 is unknown"),
    "a wrong value without its section": ("seed: 1\nepochs: many\n", r"recipe\.yaml, line 2: training\.epochs='many' must be a whole number"),
    "a setting in another section": ("training: {head: pool}\n", r"training\.head='pool' stands at the wrong place\. Write exits: \{head: pool\}\.$"),
    "a number of exits in another section": ("training: {exits: 3}\n", r"training\.exits=3 stands at the wrong place\. Write exits: \{number: 3\}\.$"),
    "no value beside the sections": ("epochs: null\n", r"epochs=None must be a whole number, or 'auto'\. Leave it out for the default\.$"),
    "a setting of all in a section": ("exits: {seed: 3}\n", r"exits\.seed=3 stands at the wrong place\. Write seed: 3\.$"),
    "a truth value": ("training: true\n", r"recipe\.yaml, line 1: training=True must be a mapping"),
    "a setting whose name begins another line, too": (
        "confidence:\n  name: learned\nthresholds: {confidence: 2}\n", r"In the recipe \S*recipe\.yaml: thresholds\.confidence=2"),
    "a tag of a number": ("seed: !!int '0x10'\n", r"tags \(tag:yaml\.org,2002:int\) are not read here"),
    "a tag of a list": ("exits: !!set {layer1, layer2}\n", r"tags \(tag:yaml\.org,2002:set\) are not read here"),
    "another type": ("training: !!int x\n", "cannot be read"),
    "aliases, which can stand for more than a machine can hold": ("a: &a [x]\nb: [*a, *a]", r"aliases \(\*name\) are not read here"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "said"), NO_RECIPES.values(), ids=NO_RECIPES)
def test_a_file_that_is_no_recipe_is_refused_in_one_line(text, said, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(PteeError, match=said) as refusal:
        make_recipe(path)
    assert "\n" not in str(refusal.value)


def test_a_recipe_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(PteeError, match=r"There is no recipe file .*missing\.yaml"):
        make_recipe(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("training.epochs=20", ("training.epochs", 20)),
        ("lr=1e-2", ("training.lr", 0.01)),
        ("weight_decay=-.5", ("training.weight_decay", -0.5)),
        ("precision=no", ("training.precision", "no")),
        ("epochs=null", ("training.epochs", None)),
        ("cache=false", ("training.cache", False)),
        ("seed=010", ("seed", "010")),  # 8 or 10
        ("seed=1:30", ("seed", "1:30")),  # 90
        ("seed=1_000", ("seed", "1_000")),
        ("seed=+3", ("seed", 3)),
        ("exits=[0.2, 0.5]", ("exits.places", [0.2, 0.5])),
        ("head=auto+", ("exits.head", "auto+")),
    ],
)
def test_a_setting_is_read_from_text(text, read):
    assert read_setting(text) == read


def test_a_text_without_a_value_is_no_setting():
    with pytest.raises(PteeError, match="NAME=VALUE"):
        read_setting("training.epochs")
    with pytest.raises(UnknownName, match="'epochs'"):
        read_setting("epoch=3")


def test_a_recipe_may_be_given_as_a_value():
    recipe = Recipe(exits={"places": "linear"}, training={"epochs": 3})
    given = {"seed": 2, "exits": {"places": "linear"}, "training": {"epochs": 3}}
    assert make_recipe(recipe, {"seed": 2}).given() == given


NO_VALUES = ["2001-99-99", "!!int x", "!!timestamp x", "9" * 5000, "[" * 500, "0x" + "f" * 5000]


@pytest.mark.parametrize("value", NO_VALUES, ids=lambda value: value[:20])
def test_a_value_that_yaml_itself_cannot_make_is_refused_in_one_line(value, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"seed: {value}")
    for read in (lambda: make_recipe(tmp_path), lambda: make_recipe(None, dict([read_setting(f"seed={value}")]))):
        with pytest.raises(PteeError) as refusal:
            read()
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 400


# ---------------------------------------------------------------------------------------------------- changing a recipe


def test_a_setting_of_a_recipe_can_be_unset():
    assert make_recipe({"training": {"patience": 3}}, {"training.patience": None}).training.patience is None


@pytest.mark.parametrize(
    ("change", "follows"),
    [
        ({"targets": "labels"}, {"training.temperature": 1.0}),
        ({"optimizer": "adam"}, {"training.lr": 0.001, "training.weight_decay": 0.0}),
        ({"loss": "joint"}, {"training.optimizer": "adam", "training.schedule": "constant"}),
        ({"head": "pool"}, {"exits.head_budget": None}),
        ({"exits": "pareto"}, {"exits.head_budget": None}),
        ({"front": "auto"}, {"exits.places": (0.4, 0.7), "exits.head": "auto+"}),
    ],
    ids=lambda change: ", ".join(change),
)
def test_in_a_run_s_recipe_that_is_changed_what_depends_on_the_change_follows_it(change, follows, tmp_path):
    resolved = make_recipe(in_run(make_recipe(), tmp_path), change).resolved()
    for path, value in follows.items():
        section, name = path.split(".")
        assert getattr(getattr(resolved, section), name) == value, path


def test_a_value_of_its_own_stays_when_something_else_is_changed(tmp_path):
    run = in_run(make_recipe(None, {"lr": 0.5}), tmp_path)
    assert make_recipe(run, {"optimizer": "adam"}).training.lr == 0.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_drop": 2}, "max_drop=2 must be below 1."),
        ({"thresholds.max_drop": 2}, "thresholds.max_drop=2 must be below 1."),
        ({"max_drop": 0.1, "thresholds.max_cost": 0.2}, "max_drop=0.1 and thresholds.max_cost=0.2 are given"),
        ({"lr": -1}, "lr=-1 must be above 0."),
        ({"num_exits": "x"}, "num_exits='x' must be a whole number"),
    ],
)
@pytest.mark.parametrize("make", [lambda given: make_recipe(None, given), make_recipe().with_settings])
def test_an_error_names_a_setting_as_the_caller_did(given, said, make):
    with pytest.raises(PteeError) as why:
        make(given)
    assert str(why.value).startswith(said)
    assert why.value.argument == next(iter(given))


def test_what_a_file_says_is_named_by_its_path_though_the_caller_gives_another_setting(tmp_path):
    (tmp_path / "r.yaml").write_text("thresholds: {max_drop: 2}")
    with pytest.raises(PteeError, match=r"^In the recipe .*r\.yaml: thresholds\.max_drop=2 must"):
        make_recipe(tmp_path / "r.yaml", {"epochs": 3})
