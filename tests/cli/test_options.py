"""Options: a setting of the recipe is one option or one --set, and each value is read or refused with an example."""

from __future__ import annotations

import json
import re

import click
import pytest
import yaml
from command import RANDOM, assert_refused

from ptee._common.errors import Argument
from ptee.cli.commands import augment, plan
from ptee.cli.main import cli
from ptee.cli.options import SETTINGS, as_option
from ptee.cli.runs import bench
from ptee.pipeline.recipe import BUILT_IN, make_recipe

OPTIONS = [(name, option) for name, command in cli.commands.items() for option in command.params]
each_option = pytest.mark.parametrize(
    "option", [pytest.param(o, id=f"{name} {o.name}") for name, o in OPTIONS if isinstance(o, click.Option)]
)


@each_option
def test_every_option_has_a_help_text_that_is_a_sentence(option):
    assert option.help
    assert option.help.strip().endswith(".")


@pytest.mark.parametrize("command", [*cli.commands])
def test_no_default_is_broken_over_two_lines(command, run):
    assert "[default:\n" not in (text := run(command, "--help").out)
    assert not re.search(r"\[default: [^\]\n]*\n", text)


def test_the_cost_of_a_run_that_is_there_says_nothing_of_places(run):
    for command in ("tune", "compare", "report", "plot"):
        assert "places of exits" not in " ".join(run(command, "--help").out.split())
    assert "the places of exits" in " ".join(run("augment", "--help").out.split())


def test_the_list_of_commands_is_whole_on_a_narrow_terminal(run):
    text = run("--help").out
    assert "..." not in text.partition("Commands:")[2]
    assert all(f"\n  {name} " in text for name in cli.commands)


def test_the_help_of_augment_groups_its_options(run):
    text = run("augment", "--help").out
    places = [
        text.index(f"\n{name}:")
        for name in ("Model", "Data", "Exits", "Training", "Confidence and thresholds", "Output")
    ]
    assert places == sorted(places)


# ---------------------------------------------------------------------------------------------------- settings

OTHER = {
    "name": "mine", "about": "Why.", "seed": 3, "exits.places": "golden", "exits.number": 2, "exits.head": "pool",
    "exits.head_budget": 0.1, "exits.front": "auto", "exits.front_weights": "w.pth", "exits.front_mean": 0.5, "exits.front_std": 0.5,
    "training.loss": "joint", "training.targets": "pseudo", "training.temperature": 3.0, "training.cost_weight": 0.5,
    "training.epochs": 3, "training.batch_size": 16, "training.optimizer": "adam", "training.lr": 1e-4, "training.weight_decay": 0.1,
    "training.schedule": "constant", "training.views": 4, "training.mirror": False, "training.shift": 2, "training.patience": 2,
    "training.precision": "no", "training.cache": False, "confidence.name": "entropy", "confidence.question": "right",
    "confidence.calibration_share": 0.2, "thresholds.threshold": 0.5, "thresholds.max_loss": 0.02, "thresholds.max_drop": 0.02,
    "thresholds.max_fidelity_drop": 0.02, "thresholds.max_cost": 0.5, "thresholds.one_threshold": True, "thresholds.margin": 0.005, "thresholds.answers": "own",
    "thresholds.confidence": 0.9, "thresholds.each_exit": True,
    "thresholds.cost": "time", "thresholds.at_batch": 8, "thresholds.executor": "hooks",
    "backbone": "joint", "training.backbone_lr": 1e-3, "training.exit_weights": (1.0, 0.5),
    "training.cost_unit": "parameters", "exits.places_by": "parameters", "training.order": "one by one",
}  # fmt: skip
ALSO = {  # what a setting goes together with
    "training.cost_weight": ("training.loss=joint",),
    "backbone": ("training.loss=joint",),
    "training.backbone_lr": ("training.loss=joint", "backbone=joint"),
    "training.exit_weights": ("training.loss=weighted",),
    "training.cost_unit": ("training.loss=joint",),
    "thresholds.each_exit": ("thresholds.confidence=0.9",),
    "thresholds.at_batch": ("thresholds.cost=time",),
    "thresholds.executor": ("thresholds.cost=time",),
}


@pytest.mark.parametrize("path", SETTINGS)
def test_every_setting_of_the_recipe_can_be_given_by_set(path, monkeypatch):
    from ptee.cli import commands

    seen, read = {}, commands.recipe_of
    stop = lambda o, default: seen.update(recipe=read(o, default)) or click.get_current_context().exit()  # noqa: E731
    monkeypatch.setattr(commands, "recipe_of", stop)
    value = yaml.safe_dump(OTHER[path], default_flow_style=True).removesuffix("\n...\n").strip()
    words = [word for each in (*ALSO.get(path, ()), f"{path}={value}") for word in ("--set", each)]
    augment.main([*words], standalone_mode=False)
    section, _, name = path.rpartition(".")
    holder = getattr(seen["recipe"], section) if section else seen["recipe"]
    assert getattr(holder, name) == OTHER[path]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("epoch=3", r"Unknown setting 'epoch'\. Did you mean 'epochs'"),
        ("training.epoch=3", r"Unknown setting 'training\.epoch'\. Did you mean 'training\.epochs'"),
        ("epochs=", "^'epochs=' has no value. Write it as NAME=VALUE, such as training.epochs=20"),
        ("epochs", "'epochs' is no setting. Write it as NAME=VALUE, such as training.epochs=20"),
        ("training.lr=-1", "--set training.lr=-1 must be above 0"),
        ("epochs=0", "--epochs 0 must be 1 or more, or 'auto'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_as_it_was_typed(given, said, run):
    assert_refused(run("augment", *RANDOM, "--set", given), said)


@pytest.mark.parametrize("command", ["plan", "bench"])
def test_a_setting_that_changes_nothing_in_a_command_is_refused(command, run):
    said = "--set training.epochs=3 changes nothing here, where no head is trained. Only settings of exits do, such as exits.head=pool."
    assert_refused(run(command, *RANDOM, "--set", "epochs=3"), said)
    text = " ".join(run(command, "--help").out.split())
    assert "--mean" not in text
    assert "Any other setting of the exits, such as exits.places_by=parameters" in text
    assert not re.search(r"training\.lr|before a training|exits that are off", text)


def test_the_options_of_settings_take_help_and_default_from_the_recipe(run):
    text = " ".join(run("augment", "--help").out.split())
    assert SETTINGS["training.batch_size"].description in text
    assert "auto: enough for about 5,000 updates, between 12 and 40. Default: auto." in text


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_printed_recipe_is_a_file_that_the_option_recipe_takes(name, run, elsewhere):
    printed = run("recipe", name)
    assert (printed.status, printed.err) == (0, "")
    (elsewhere / "mine.yaml").write_text(printed.out)
    assert make_recipe("mine.yaml").resolved() == make_recipe(name).resolved()
    assert run("recipe", "mine.yaml") == printed


def test_without_a_name_the_default_recipe_is_printed(run):
    assert run("recipe") == run("recipe", "ptee")


def test_plan_takes_a_recipe_from_a_file_and_options_that_change_it(run, elsewhere):
    (elsewhere / "mine.yaml").write_text("exits: {places: [layer1, layer2], head: conv1}\n")
    words = ("plan", "--model", "cifar_resnet8", "--no-pretrained", "--recipe", "mine.yaml", "--json")
    assert [row["head"] for row in json.loads(run(*words).out)["exits"]] == ["conv1", "conv1"]
    assert [row["head"] for row in json.loads(run(*words, "--head", "pool").out)["exits"]] == ["pool", "pool"]


def test_a_recipe_is_printed_without_marks_that_turn_the_line(run, elsewhere):
    (elsewhere / "r.yaml").write_text("about: a\u202eb\u2066c\n")
    assert "about: abc\n" in run("recipe", "r.yaml").out


def test_an_unknown_recipe_names_the_nearest(run):
    for words in (("recipe", "eent"), ("plan", *RANDOM, "--recipe", "eent")):
        assert_refused(run(*words), "Unknown recipe 'eent'. Did you mean 'eenet'")


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threshold", "70,0.8"], "did you mean 0.7,0.8?"),
        (["--threshold", "70%"], "--threshold 70% must be a number, or a list. Did you mean 0.7?"),
        (["--input-size", "8x8"], "'8x8' is not a number or a list of numbers separated by commas, such as 3,224,224"),
        (["--input-size", "16,16"], "16,16.*3,224,224"),
        (
            ["--mean", "grey"],
            "'grey' is not a number or a list of numbers separated by commas, such as 0.5 or 0.485,0.456,0.406",
        ),
        (["--model-arg", "pad_type"], "'pad_type' is not KEY=VALUE"),
        (["--exits", ","], "'--exits': ',' names nothing"),
        (["--seed", "one"], "--seed one must be a whole number"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_value_that_cannot_be_read_is_refused_with_what_is_possible(words, said, run):
    assert_refused(run("augment", *words, "--out", "out"), said)


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        (Argument("num_classes", "10"), "--num-classes 10"),
        (Argument("input_size", "(c, h, w)"), "--input-size c,h,w"),
        (Argument("pretrained", "False"), "--no-pretrained"),
        (Argument("speed", "True"), "--speed"),
        (Argument("weights"), "--weights"),
        (Argument("training.epochs", "20"), "--epochs 20"),
        (Argument("epochs", "20"), "--epochs 20"),
        (Argument("targets", "'pseudo'"), "--targets pseudo"),
        (Argument("exits"), "--exits"),
        (Argument("num_exits", "2"), "--num-exits 2"),
        (Argument("cache", "False"), "--set training.cache=False"),
        (Argument("lr", "0.1"), "--set training.lr=0.1"),
        (Argument("confidence", "'entropy'"), "--confidence entropy"),
        (Argument("model_args", "x"), "--model-arg x"),
        (Argument("training.epochs", "None"), "--set training.epochs=null"),
        (Argument.text("data", "my pictures (2)"), "--data 'my pictures (2)'"),
        (Argument("data", "my pictures (2)"), "--data 'my pictures (2)'"),
        (Argument("input_size", "(3, 32, 32)"), "--input-size 3,32,32"),
        (Argument("exits", "['layer1', 'layer2']"), "--exits layer1,layer2"),
        (Argument("static=resnet18", "my weights.pth"), "--static resnet18='my weights.pth'"),
    ],
    ids=lambda value: str(value),
)
def test_an_argument_of_python_is_called_as_the_command_calls_it(argument, option):
    assert as_option(argument) == option


def test_what_the_command_says_to_type_can_be_typed():
    """Each option that stands for an argument of Python exists."""
    names = {name for option in augment.params for name in (*option.opts, *option.secondary_opts)}
    arguments = ("model", "weights", "pretrained", "num_classes", "model_args", "input_size", "mean", "std", "data", "data_root",
                 "classes", "out", "resume", "overwrite", "device", *SETTINGS)  # fmt: skip
    said = {as_option(Argument(name, "x"), augment).split()[0] for name in arguments}
    assert said <= names


@pytest.mark.parametrize("command", [plan, bench], ids=lambda command: command.name)
def test_plan_and_bench_take_every_option_that_they_have(command, run, elsewhere):
    (elsewhere / "mine.yaml").write_text("exits: {head: pool}\n")
    values = {
        "--model": "cifar_resnet8", "--weights": None, "--num-classes": 4, "--model-arg": "in_chans=1", "--input-size": "1,16,16",
        "--recipe": "mine.yaml", "--set": "exits.places_by=operations", "--exits": "linear", "--num-exits": 2,
        "--head": "auto", "--head-budget": 0.1, "--front": None, "--front-weights": None, "--batch-sizes": 1, "--rounds": 3,
        "--threads": 1, "--device": "cpu", "--cost": "time", "--at-batch": 1, "--images": None,
    }  # fmt: skip
    flags = ("--no-pretrained", "--json", "--explain")
    of_runs = ("--executor", "--save", "--data", "--data-root", "--classes")
    names = [option.opts[0] for option in command.params if isinstance(option, click.Option)]
    assert {*names} - {"--pretrained", *flags, *of_runs} <= {*values}
    words = [word for name in names if values.get(name) is not None for word in (name, values[name])]
    done = run(command.name, *words, "--no-pretrained", "--json")
    assert (done.status, done.err) == (0, "")


# ---------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("command", [*cli.commands])
def test_every_option_that_takes_a_path_knows_the_home_folder(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    for parameter in cli.commands[command].params:
        if {"path", "file", "run"} & {parameter.type.name}:
            assert str(parameter.type.convert("~/file", parameter, None)) == str(tmp_path / "file")


def test_no_option_takes_a_path_in_another_way():
    plain = (click.Path, click.File)
    assert not [o for _, o in OPTIONS if isinstance(o.type, plain)]


def test_the_run_can_be_below_the_home_folder(run, finished, elsewhere, monkeypatch):
    monkeypatch.setenv("HOME", str(elsewhere))
    for word in ("~/out", "~/out/"):
        assert run("evaluate", word, "--no-speed").status == 0
    assert run("recipe", "~/out").status == 0


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["augment", "--one-threshold"], r"Give --set thresholds\.one_threshold=true\.$"),
        (["augment", "--margin", "0.1"], r"Give --set thresholds\.margin=VALUE\.$"),
        (["augment", "--answers=own"], r"Give --set thresholds\.answers=VALUE\.$"),
        (["augment", "--lr", "0.1"], r"Give --set training\.lr=VALUE\.$"),
        (["sweep", "--margin", "0.1"], r"Give --over thresholds\.margin=VALUE\.$"),
        (["evaluate", "--margin", "0.1"], "No such option:? '?--margin"),
        (["augment", "--margn"], "No such option:? '?--margn"),
    ],
)
def test_of_a_setting_without_an_option_it_is_said_how_it_is_given(run, words, advice):
    assert_refused(run(*words), advice)
