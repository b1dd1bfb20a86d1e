"""Options that several commands share, in groups, and how their words are read.

A setting of the recipe is declared once, in the recipe: its option takes name, help text and default from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import cloup

from ptee._common.errors import Argument
from ptee.pipeline.recipe import OTHER_NAMES, path_of, settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SETTINGS = dict(settings())
OPTION_OF = {
    path: f"--{name.replace('_', '-')}" for name, path in OTHER_NAMES.items()
}  # others are called as their setting
WITH_OPTION: set[str] = set()  # settings that have an option of their own; all others are given by --set
PREFIX = "setting__"  # of the parameter of such an option; the dots of its path become two underscores


class SettingValue(click.ParamType):
    """A number, a word, or several between commas."""

    name = "value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """As click asks for it."""
        if not isinstance(value, str):
            return value
        parts = [_number_or_word(part.strip()) for part in value.split(",") if part.strip()]
        if not parts:
            self.fail(f"{value!r} names nothing.", param, ctx)
        return parts[0] if len(parts) == 1 else tuple(parts)


def _number_or_word(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def setting(path: str, *, metavar: str | None = None, **more: Any) -> Decorator:
    """The option of a setting of the recipe.

    Args:
        path: of the setting, such as "training.epochs".
        metavar: what to call its value in the help text.
        more: as of `click.option`.
    """
    field = SETTINGS[path]
    WITH_OPTION.add(path)
    name = OPTION_OF.setdefault(path, f"--{path.rpartition('.')[2].replace('_', '-')}")
    text = str(field.description)
    if "Default:" not in text and field.default not in (None, False, True):
        text = f"{text} Default: {field.default}."
    return cloup.option(name, PREFIX + path.replace(".", "__"), type=SettingValue(), metavar=metavar, help=text, **more)


def given_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The settings among a command's options, by path; those of --set, too. They are taken out of the options."""
    changes = dict(options.pop("set", ()))
    for key in [key for key in options if key.startswith(PREFIX)]:
        if (value := options.pop(key)) is not None:
            changes[key.removeprefix(PREFIX).replace("__", ".")] = value
    return changes


def as_option(argument: Argument, command: click.Command | None = None) -> str:
    """What the command calls an argument or setting: `num_classes=10` is `--num-classes 10`, `pretrained=False` `--no-pretrained`.

    Args:
        argument: in Python's words.
        command: that was typed, which may have an option for a setting or not.
    """
    own = {option for parameter in command.params for option in parameter.opts} if command else set()
    value = argument.value.strip("()[]").replace("'", "").replace(", ", ",")
    name, _, of = argument.name.partition("[")[0].partition("=")
    if of:  # of a list: static=resnet18
        return f"--{name} {of}={value}"
    name = {"model_args": "model_arg"}.get(name, name)  # which is repeated, one argument each time
    path = name if name in SETTINGS else _path(name)
    if path is not None:
        return _setting_as_option(path, value, own)
    name = OTHER_OPTIONS.get(name, name)
    if value in ("True", "False"):
        return f"--{'no-' * (value == 'False')}{name.replace('_', '-')}"
    return f"--{name.replace('_', '-')} {value}".strip()


def _setting_as_option(path: str, value: str, own: set[str]) -> str:
    option = OPTION_OF.get(path, f"--{path.rpartition('.')[2].replace('_', '-')}")
    if option in own or (path in WITH_OPTION and not own & {"--set", "--over"}):
        return option if value == "True" else f"{option} {value}".strip()
    return f"{'--over' if '--over' in own else '--set'} {path}={value}"


OTHER_OPTIONS = {"model_args": "model_arg", "num_workers": "workers", "root": "data_root"}  # options called otherwise
NO_SETTINGS = ("name", "about")  # arguments of Python that are called like a setting and are none


def _path(name: str) -> str | None:
    try:
        return None if name in NO_SETTINGS else path_of(name)
    except KeyError:
        return None


# ---------------------------------------------------------------------------------------------------- kinds of values


class Numbers(click.ParamType):
    """Numbers between commas, such as 0.9,0.8."""

    name = "numbers"

    def __init__(self, kind: type = float, example: str = "0.7 or 0.9,0.8") -> None:
        self.kind, self.example = kind, example

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        """As click asks for it."""
        if isinstance(value, list):
            return value
        try:
            return [self.kind(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(
                f"{value!r} is not a number or a list of numbers separated by commas, such as {self.example}.",
                param,
                ctx,
            )


class Size(Numbers):
    """Channels, height, width: 3,224,224; one number is the side of a colour image."""

    name = "c,h,w"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """As click asks for it."""
        numbers = [int(n) for n in super().convert(value, param, ctx)]
        size = [3, numbers[0], numbers[0]] if len(numbers) == 1 else numbers
        if len(size) != 3 or min(size) < 1:
            self.fail(f"{value!r} is no image size. Give c,h,w, such as 3,224,224.", param, ctx)
        return size


class KeyValue(click.ParamType):
    """KEY=VALUE; the value is a number, true, false, null or a word."""

    name = "key=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """As click asks for it."""
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not (key and equals):
            self.fail(f"{value!r} is not KEY=VALUE.", param, ctx)
        try:
            return key, json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            return key, text


class Setting(click.ParamType):
    """A setting of the recipe and its value: training.lr=0.01."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """As click asks for it."""
        from ptee.pipeline.recipe import read_setting

        return value if isinstance(value, tuple) else read_setting(value)


# ---------------------------------------------------------------------------------------------------- groups of options


def in_groups(*groups: Decorator) -> Decorator:
    """Several groups of options, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for group in reversed(groups):
            command = group(command)
        return command

    return add


PIXELS = Numbers(example="0.5 or 0.485,0.456,0.406")
MODEL = cloup.option_group(
    "Model",
    cloup.option(
        "--model", metavar="NAME", help="A classifier of timm or torchvision: resnet50, timm/NAME, torchvision/NAME."
    ),
    cloup.option(
        "--weights", type=click.Path(path_type=Path), help="A file of weights (.safetensors, .pth, .pt, .th)."
    ),
    cloup.option("--pretrained/--no-pretrained", default=True, help="Load the published weights, or take random ones."),
    cloup.option("--num-classes", type=int, help="Number of classes, where it is not the model's own."),
    cloup.option(
        "--model-arg",
        "model_args",
        type=KeyValue(),
        multiple=True,
        help="An argument for building the model. Repeatable.",
    ),
    cloup.option("--input-size", type=Size(int, "3,224,224"), help="Size of the images. Default: the model's own."),
    cloup.option("--mean", type=PIXELS, help="Mean of the pixels, for each channel. Default: the model's own."),
    cloup.option(
        "--std", type=PIXELS, help="Standard deviation of the pixels, for each channel. Default: the model's own."
    ),
)
WEIGHTS = cloup.option("--weights", type=click.Path(path_type=Path), help="The backbone's weights, if they were moved.")
DATA_OPTIONS = (
    cloup.option(
        "--data",
        help="A folder of images (train/ and val/, class folders, or tar files), or the name of a data set of torchvision.",
    ),
    cloup.option("--data-root", type=click.Path(path_type=Path), help="Where that data set of torchvision lies."),
    cloup.option(
        "--classes",
        type=click.Path(path_type=Path),
        help="A text file with the backbone's classes in its order, one a line.",
    ),
    cloup.option(
        "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that load images."
    ),
)
DATA = cloup.option_group("Data", *DATA_OPTIONS)
BATCH_SIZE = cloup.option(
    "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Images in each batch."
)
DATA_AND_BATCH_SIZE = cloup.option_group("Data", *DATA_OPTIONS, BATCH_SIZE)
RECIPE_OPTIONS = (
    cloup.option(
        "--recipe",
        metavar="NAME|FILE",
        help="Where all settings come from that are not given here: ptee (the default), the papers' pteenet, eenet, branchynet and "
        "ztw, a YAML file, or the folder of a run. `ptee recipe NAME` prints one.",
    ),
    cloup.option(
        "--set",
        type=Setting(),
        multiple=True,
        help="Any other setting of the recipe, such as training.lr=0.01. Repeatable. `ptee recipe ptee` lists them.",
    ),
)
EXITS = cloup.option_group(
    "Exits",
    *RECIPE_OPTIONS,
    setting("exits.places"),
    setting("exits.number"),
    setting("exits.head"),
    setting("exits.head_budget"),
    setting("exits.front"),
    setting("exits.front_weights", metavar="FILE"),
)
TRAINING = cloup.option_group(
    "Training",
    setting("training.loss"),
    setting("training.targets"),
    setting("training.cost_weight"),
    setting("training.epochs"),
    setting("training.batch_size"),
    setting("seed"),
)
TARGET_OPTIONS = (
    setting("thresholds.max_drop"),
    setting("thresholds.max_fidelity_drop"),
    setting("thresholds.max_cost"),
)
THRESHOLDS = cloup.option_group(
    "Confidence and thresholds",
    setting("confidence.name"),
    setting("confidence.question"),
    setting("thresholds.threshold"),
    *TARGET_OPTIONS,
)
TARGET = cloup.option_group(
    "Target (give one)",
    *TARGET_OPTIONS,
    cloup.option("--one-threshold", is_flag=True, help=str(SETTINGS["thresholds.one_threshold"].description)),
    cloup.option(
        "--margin",
        type=SettingValue(),
        default="auto",
        show_default=True,
        help=str(SETTINGS["thresholds.margin"].description),
    ),
)
DEVICE = cloup.option("--device", help="cpu, cuda, cuda:1, mps. Default: a GPU where there is one.")
SPEED = cloup.option(
    "--speed/--no-speed", default=True, show_default=True, help="Measure images per second beside the bare backbone."
)
THRESHOLD = cloup.option(
    "--threshold", type=Numbers(), help="T: one number, or one for each exit, separated by commas."
)
EXPLAIN = cloup.option("--explain", is_flag=True, help="Say below the tables what their columns mean.")
JSON = cloup.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
OUTPUT = cloup.option_group(
    "Output",
    cloup.option("--out", type=click.Path(path_type=Path), help="Folder for the run. Default: runs/NAME."),
    cloup.option("--resume", is_flag=True, help="Go on with the training that was interrupted in --out."),
    cloup.option("--overwrite", is_flag=True, help="Replace the run that --out holds."),
    DEVICE,
    SPEED,
    EXPLAIN,
)
