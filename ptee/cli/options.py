"""Options that several commands share, in groups, and how their values are read.

A setting is declared once, in the recipe. Its option takes name, help text and default from there.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from cloup import option, option_group

from ptee._common.errors import Argument, PteeError
from ptee._common.files import as_path, expanded, from_json, is_file
from ptee._common.text import as_shares, quoted
from ptee._common.validation import LARGEST_LIMIT
from ptee.backbones.library import INTERPOLATIONS
from ptee.pipeline.recipe import OTHER_NAMES, path_of, settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
SETTINGS = dict(settings())
# Options by the path of their setting; others are called like the setting.
OPTION_OF = {path: f"--{name.replace('_', '-')}" for name, path in OTHER_NAMES.items()}
WITH_OPTION: set[str] = set()  # settings with an option of their own; all others are given by --set
ONLY_EXITS = ("plan", "bench")  # commands that train nothing, so that no other settings count
PREFIX = "setting__"  # of the parameter of such an option; the dots of its path become two underscores
OTHER_OPTIONS = {"model_args": "model_arg", "num_workers": "workers", "root": "data_root"}  # arguments of Python


def setting(path: str, **more: Any) -> Decorator:
    """The option of a setting, such as "training.epochs"; `more` as of `click.option`."""
    field = SETTINGS[path]
    WITH_OPTION.add(path)
    name = OPTION_OF.setdefault(path, f"--{path.rpartition('.')[2].replace('_', '-')}")
    text = str(field.description)
    if "Default:" not in text and not any(field.default is none for none in (None, False, True)):
        text = f"{text} Default: {field.default}."
    more = {"help": text} | more
    return option(name, PREFIX + path.replace(".", "__"), type=SettingValue(), **more)


def _one_confidence(ctx: click.Context, _: click.Parameter, values: tuple[Any, ...]) -> Any:
    """The value of --confidence, of which one may mean a guarantee and one a name; click by itself would take the last alone.

    Of other options the last one counts, as scripts expect that pass on "$@".
    """
    if len(values) > 1:
        text = (
            "--confidence is given twice. Give it once, and beside it a guarantee as --set thresholds.confidence=0.95."
        )
        raise click.UsageError(text, ctx)
    return values[0] if values else None


def given_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take the settings, also those of --set, out of a command's options. Gives them by path. One that is given twice is refused."""
    changes: dict[str, Any] = {}
    for path, value in options.pop("set", ()):
        if path in changes:
            raise PteeError(f"{path} is given twice by --set. Give it once.", argument=path, value=value)
        changes[path] = value
    for key in [key for key in options if key.startswith(PREFIX)]:
        if (value := options.pop(key)) is None:
            continue
        path = key.removeprefix(PREFIX).replace("__", ".")
        if path in changes:
            text = f"{path} is given twice, by --set and by {OPTION_OF[path]}. Give it once."
            raise PteeError(text, argument=path, value=value)
        changes[path] = value
    return changes


def as_option(argument: Argument, command: click.Command | None = None) -> str:
    """An argument of Python as it is typed: `num_classes=10` is `--num-classes 10`, `pretrained=False` is `--no-pretrained`.

    Settings are options of some commands; others take them by --set or --over.
    """
    own = {option for parameter in command.params for option in parameter.opts} if command else set()
    value = _typed(argument.value)
    name, _, of = argument.name.partition("[")[0].partition("=")
    if of:  # of a list: static=resnet18
        return f"--{name} {of}={value}"
    if (path := _path(name)) is not None:
        return _setting_as_option(path, value, own)
    if "." in name:  # of a file; no option is called so
        return str(argument)
    name = OTHER_OPTIONS.get(name, name).replace("_", "-")
    if value in ("True", "False"):
        return f"--{'no-' * (value == 'False')}{name}"
    return f"--{name} {value}".strip()


def _typed(value: str) -> str:
    """A value of Python as a shell takes it: what a list holds separated by commas, and in quotes what has a blank in it."""
    if value[:1] + value[-1:] in ("()", "[]"):
        value = value[1:-1].replace("'", "").replace(", ", ",")
    if value[:1] in ("'", '"') and value[:1] == value[-1:]:  # a text
        value = ast.literal_eval(value)
    return quoted(value) if value else ""


def _setting_as_option(path: str, value: str, own: set[str]) -> str:
    option = OPTION_OF.get(path, f"--{path.rpartition('.')[2].replace('_', '-')}")
    if value == "None":  # which no option can say
        return f"{'--over' if '--over' in own else '--set'} {path}=null"
    if option in own or (path in WITH_OPTION and not own & {"--set", "--over"}):
        return option if value == "True" else f"{option} {value}".strip()
    return f"{'--over' if '--over' in own else '--set'} {path}={value}"


def _path(name: str) -> str | None:
    try:
        return path_of(name)
    except KeyError:
        return None


# ---------------------------------------------------------------------------------------------------- kinds of values


class SettingValue(click.ParamType):
    """A number, a word, or several separated by commas."""

    name = "value"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Called by click."""
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


class Numbers(click.ParamType):
    """Numbers separated by commas, such as 0.9,0.8."""

    name = "numbers"

    def __init__(self, kind: type = float, example: str = "0.7 or 0.9,0.8") -> None:
        self.kind, self.example = kind, example

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        """Called by click."""
        try:
            numbers = [self.kind(part) for part in str(value).split(",")]
            if any(number != number for number in numbers):  # NaN
                raise ValueError
            return numbers
        except ValueError:
            parts = [_number_or_word(part.strip()) for part in str(value).split(",")]
            shares = as_shares(parts) if self.kind is float else ""
            meant = f" Did you mean {shares}?" if shares else ""
            text = f"{value!r} is not a number or a list of numbers separated by commas, such as {self.example}.{meant}"
            self.fail(text, param, ctx)


class Real(click.FloatRange):
    """A finite number in a range. click's own takes NaN."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Called by click."""
        if isinstance(value, str) and (share := as_shares([value])):
            self.fail(f"{value!r} is no number. Did you mean {share}?", param, ctx)
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter as why:
            given, most = _number_or_word(str(value)), LARGEST_LIMIT
            percent = self.max is not None and self.max <= most and not isinstance(given, str) and given > most
            share = as_shares([given]) if percent else ""
            self.fail(why.message + (f" Did you mean {share}?" if share else ""), param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


class Words(click.ParamType):
    """Words separated by commas, such as eager,graphs."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        """Called by click."""
        return value if isinstance(value, list) else [word.strip() for word in value.split(",")]


class Size(Numbers):
    """Channels, height, width: 3,224,224; one number is the side of a colour image."""

    name = "c,h,w"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """Called by click."""
        numbers = super().convert(value, param, ctx)
        size = [3, numbers[0], numbers[0]] if len(numbers) == 1 else numbers
        if len(size) != 3 or min(size) < 1:
            self.fail(f"{value!r} is no image size. Give c,h,w, such as 3,224,224.", param, ctx)
        return size


class KeyValue(click.ParamType):
    """KEY=VALUE; the value is a number, true, false, null or a word."""

    name = "key=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """Called by click."""
        key, equals, text = value.partition("=")
        if not (key and equals):
            self.fail(f"{value!r} is not KEY=VALUE.", param, ctx)
        try:
            return key, from_json({"True": "true", "False": "false", "None": "null"}.get(text, text))
        except ValueError:
            return key, text


class Setting(click.ParamType):
    """A setting of the recipe and its value: training.lr=0.01."""

    name = "name=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """Called by click."""
        from ptee.pipeline.recipe import read_setting

        return read_setting(value)


class Place(click.ParamType):
    """A file or folder."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Called by click."""
        return as_path(value, param.name)


class RunName(click.ParamType):
    """A run: a folder, or user/repo on the hub."""

    name = "run"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Called by click."""
        return str(expanded(value)) if value.startswith("~") else str(value)


class File(Place):
    """A file that exists. It is looked for before anything else is done."""

    name = "file"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Called by click."""
        path = super().convert(value, param, ctx)
        if not is_file(path):
            if path.is_dir():
                self.fail(f"{value!s:.300} is a folder. Give a file, such as one in it.", param, ctx)
            self.fail(f"There is no file {value!s:.300}. Give one that exists.", param, ctx)
        return path


# ---------------------------------------------------------------------------------------------------- groups of options


def in_groups(*groups: Decorator) -> Decorator:
    """Several groups of options, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for group in reversed(groups):
            command = group(command)
        return command

    return add


PIXELS = Numbers(example="0.5 or 0.485,0.456,0.406")
NETWORK_OPTIONS = (
    option(
        "--model", metavar="NAME", help="A classifier of timm or torchvision: resnet50, timm/NAME, torchvision/NAME."
    ),
    option("--weights", type=File(), help="A file of weights (.safetensors, .pth, .pt, .th)."),
    option("--pretrained/--no-pretrained", default=True, help="Load the published weights, or take random ones."),
    option("--num-classes", type=int, help="Number of classes, if it is not the model's own."),
    option("--model-arg", "model_args", type=KeyValue(), multiple=True, help="An argument of the model. Repeatable."),
    option("--input-size", type=Size(int, "3,224,224"), help="Size of the images. Default: the model's own."),
)
NETWORK = option_group("Model", *NETWORK_OPTIONS)  # for commands that read no images
MODEL = option_group(
    "Model",
    *NETWORK_OPTIONS,
    option("--mean", type=PIXELS, help="Mean of the pixels, for each channel. Default: the model's own."),
    option("--std", type=PIXELS, help="Standard deviation of the pixels, for each channel. Default: the model's own."),
    option("--interpolation", help=f"How pictures are resized: {', '.join(INTERPOLATIONS)}. Default: the model's own."),
)
CLASSES = option("--classes", type=File(), help="A text file with the backbone's classes in its order, one a line.")
DATA_OPTIONS = (
    option(
        "--data",
        help="A folder of images (train/ and val/, class folders, or tar files), or the name of a data set of torchvision.",
    ),
    option("--data-root", type=Place(), help="The folder of that data set of torchvision."),
    CLASSES,
    option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that load images."),
)
DATA = option_group("Data", *DATA_OPTIONS)
IMAGES_OF_RUN = option_group("Data of a RUN", *DATA_OPTIONS[:3])
USUAL_BATCH = SETTINGS["training.batch_size"].default
BATCH_SIZE = option(
    "--batch-size", type=click.IntRange(min=1), default=USUAL_BATCH, show_default=True, help="Images in each batch."
)


def _set(help: str) -> Decorator:
    return option("--set", type=Setting(), multiple=True, help=help)


RECIPE_OPTIONS = (
    option(
        "--recipe",
        metavar="NAME|FILE",
        help="Where the settings come from that are not given here: ptee (the default), the papers' pteenet, eenet, branchynet and "
        "ztw; eenet-joint, branchynet-joint and db-joint, which train the backbone, too; a YAML file; or the folder of a run. "
        "`ptee recipe NAME` prints one.",
    ),
    _set("Any other setting of the recipe, such as training.lr=0.01. Repeatable. `ptee recipe ptee` lists them."),
)
EXIT_OPTIONS = (
    setting("exits.places"),
    setting("exits.number"),
    setting("exits.head"),
    setting("exits.head_budget"),
    setting("exits.front"),
    setting("exits.front_weights", metavar="FILE"),
)
EXITS = option_group("Exits", *RECIPE_OPTIONS, *EXIT_OPTIONS)
OTHER_OF_EXITS = "Any other setting of the exits, such as exits.places_by=parameters"


def untrained_exits(more: str = "") -> Decorator:
    """The same for a command that trains nothing. `more` settings that count there, in words."""
    help = f"{OTHER_OF_EXITS}{more}. Repeatable. `ptee recipe ptee` lists them."
    return option_group("Exits", RECIPE_OPTIONS[0], _set(help), *EXIT_OPTIONS)


TRAINING = option_group(
    "Training",
    setting("backbone"),
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
TIME_OPTIONS = (setting("thresholds.cost"), setting("thresholds.at_batch"), setting("thresholds.executor"))
COST_OF_PLAN = setting(
    "thresholds.cost",
    help="What costs, and the fractions in --exits, are of: operations (counted multiply-accumulates), or time (seconds, measured "
    "on --device). Default: operations.",
)
COST_OF_RUN = setting(
    "thresholds.cost",
    help="What costs are of: operations (counted multiply-accumulates), or time (the seconds that ptee bench RUN --save measured). "
    "Thresholds, and which exits are off, are chosen by it. Default: operations.",
)
TIME_OF_RUN = (COST_OF_RUN, *TIME_OPTIONS[1:])  # where exits stand is settled
THRESHOLDS = option_group(
    "Confidence and thresholds",
    setting("confidence.name", multiple=True, callback=_one_confidence),
    setting("confidence.question"),
    setting("thresholds.threshold"),
    *TARGET_OPTIONS,
    *TIME_OPTIONS,
)
TARGET = option_group(
    "Target (give one)",
    *TARGET_OPTIONS,
    setting("thresholds.one_threshold", is_flag=True, default=None),
    setting("thresholds.margin"),
    setting("thresholds.answers"),
    setting("thresholds.confidence"),
    setting("thresholds.each_exit", is_flag=True, default=None),
    *TIME_OF_RUN,
)
DEVICE = option("--device", help="cpu, cuda, cuda:1, mps. Default: a GPU if there is one.")
SPEED = option(
    "--speed/--no-speed", default=True, show_default=True, help="Measure images per second beside the bare backbone."
)
EXPLAIN = option("--explain", is_flag=True, help="Say below the tables what their columns mean.")
JSON = option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
OUTPUT = option_group(
    "Output",
    option("--out", type=Place(), help="Folder for the run. Default: runs/NAME."),
    option(
        "--resume",
        is_flag=True,
        help="Go on with the training in --out that was interrupted, or that did not begin because of pictures that you have removed since.",
    ),
    option("--overwrite", is_flag=True, help="Replace the run that --out holds, once the first epoch is complete."),
    DEVICE,
    SPEED,
    EXPLAIN,
    option("--log", help="A tracker that notes each epoch, too: tensorboard, wandb or mlflow. It must be installed."),
)
TRACES = option(
    "--traces",
    type=Place(),
    multiple=True,
    metavar="FOLDER",
    help="A folder that ptee trace wrote, in place of images; for several runs, one folder for each. Repeatable.",
)
WEIGHTS = option("--weights", type=File(), help="The backbone's weights, if they were moved.")
OF_IMAGES = in_groups(option_group("Data", *DATA_OPTIONS, BATCH_SIZE), WEIGHTS, DEVICE)
OF_RUN = in_groups(OF_IMAGES, EXPLAIN, JSON)
