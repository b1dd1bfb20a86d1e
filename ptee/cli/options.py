"""Options that several commands share, and how their words are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

ARGUMENT = re.compile(
    r"(?<![\w./-])([a-z]\w*)=(?!\.{3})(\(.*?\)|\w*(?:[./-]\w+)*)"
)  # name=, name=value, name=(a, b); not code


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def in_options(message: str, commands: Iterable[click.Command]) -> str:
    """A message that speaks of Python's arguments, with the options that they are on the command line.

    `num_classes=10` becomes `--num-classes 10`, `pretrained=False` `--no-pretrained`, and a bare `weights=` `--weights`.

    Args:
        message: of a `PteeError`.
        commands: whose options these may be.
    """
    options = {p.name: p for command in commands for p in command.params if isinstance(p, click.Option)}

    def typed(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in options:
            return found[0]
        option = options[name]
        if option.is_flag:
            return (option.secondary_opts if value == "False" and option.secondary_opts else option.opts)[0]
        return f"{option.opts[0]} {value.strip('()').replace(', ', ',')}".strip()

    return ARGUMENT.sub(typed, message)


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
            self.fail(f"{value!r} is no list of numbers between commas, such as {self.example}.", param, ctx)


class NumberOrAuto(click.ParamType):
    """A number, or the word auto."""

    name = "number|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """As click asks for it."""
        if value == "auto":
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'auto'.", param, ctx)


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
    """KEY=VALUE; the value is read as YAML would read a number, true or null, or else as a word."""

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


MEAN, STD = Numbers(example="0.5 or 0.485,0.456,0.406"), Numbers(example="0.5 or 0.229,0.224,0.225")
BACKBONE = _options(
    click.option(
        "--model", metavar="NAME", help="timm or torchvision classifier: resnet50, timm/NAME, torchvision/NAME."
    ),
    click.option(
        "--weights", type=click.Path(path_type=Path), help="A file of weights (.safetensors, .pth, .pt, .th)."
    ),
    click.option("--pretrained/--no-pretrained", default=True, help="Load the published weights, or take random ones."),
    click.option("--num-classes", type=int, help="Number of classes, where it is not the model's own."),
    click.option(
        "--model-arg", "model_args", type=KeyValue(), multiple=True, help="An argument of the model. Repeatable."
    ),
    click.option("--input-size", type=Size(int, "3,224,224"), help="Size of the images. Default: the model's own."),
    click.option(
        "--mean",
        type=MEAN,
        help="Mean of the pixels, per channel. Default: the model's own.",
    ),
    click.option(
        "--std",
        type=STD,
        help="Deviation of the pixels, per channel. Default: the model's own.",
    ),
)
PLACE = _options(
    click.option(
        "--recipe",
        help="What is taken for exits, heads and training where the options below are not given: ptee (three learned heads, each "
        "for itself, and gates; the default), or the papers' pteenet, eenet, ztw or branchynet. With --loss v1, v2, mc or cost: "
        "none.",
    ),
    click.option(
        "--exits",
        help="pareto, fine, golden, linear or quadratic; or auto, chosen with the training images (augment only); or fractions "
        "0.2,0.5 (the first block that ends there or behind); or modules layer1,layer2.",
    ),
    click.option(
        "--num-exits",
        type=int,
        help="How many. Default: the recipe's; by a rule without one as many as can be placed, at most 5.",
    ),
    click.option(
        "--head",
        help="auto (learned, as large as --head-budget allows), pool, bnpool, plain, convN with a number, or a learned one by "
        "name (res-32x2-64x2); one, or one for each exit with commas between. With a + behind it (auto+, conv2+) a head builds on the "
        "one before it. Default: the recipe's; without one pool.",
    ),
    click.option(
        "--head-budget",
        type=Numbers(example="0.05 or 0.15,0.03,0.03"),
        help="Share of the backbone that each auto head may cost; one, or one for each exit. Default: 0.05.",
    ),
    click.option(
        "--front",
        help="A small classifier before the backbone, as the first exit: a name like --model's, or auto for a learned head "
        "at the input.",
    ),
    click.option("--front-weights", help="A file of its weights."),
    click.option(
        "--front-mean",
        type=MEAN,
        help="Of its images, where its configuration says otherwise.",
    ),
    click.option("--front-std", type=STD, help="Likewise."),
    click.option(
        "--cost-convention", default="full", show_default=True, help="full, or paper: heads passed on the way are free."
    ),
)
DATA = _options(
    click.option(
        "--data",
        help="Folder of images (train/, val/, class folders or tar files), or the name of a data set: of torchvision, or hfds/NAME.",
    ),
    click.option("--data-root", type=click.Path(path_type=Path), help="Where that torchvision data set lies."),
    click.option(
        "--classes",
        type=click.Path(path_type=Path),
        help="A text file: the backbone's classes in its order, one a line.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Images per batch."),
    click.option(
        "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that load images."
    ),
)
MOVED_WEIGHTS = click.option(
    "--weights", type=click.Path(path_type=Path), help="The backbone's weights, if they were moved."
)
DEVICE = click.option("--device", help="cpu, cuda, cuda:1, mps. Default: a GPU where there is one.")
THRESHOLD = click.option("--threshold", type=Numbers(), help="T: one number, or one per exit between commas.")
WISH = _options(
    click.option(
        "--max-drop", type=float, help="Choose T: the least cost that loses so much accuracy, such as 0.01, or less."
    ),
    click.option("--max-fidelity-drop", type=float, help="The same for answers that are not the backbone's."),
    click.option(
        "--max-cost", type=float, help="Choose T: the best answers at such a mean cost, such as 0.6, or less."
    ),
    click.option("--one-threshold", is_flag=True, help="Choose one T for all exits, not one for each."),
    click.option(
        "--margin",
        type=NumberOrAuto(),
        default="auto",
        show_default=True,
        help="How much of the limit to keep in reserve, as other images lose more than those that T is chosen on; auto: as "
        "much more as images lose that are left out, and nothing of a cost.",
    ),
)
SPEED = click.option(
    "--speed/--no-speed", default=True, show_default=True, help="Measure images per second beside the bare backbone."
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
