"""What every model library offers to `load_backbone`: the interface, and the values that go through it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from string import Formatter
from typing import Any, Protocol

from torch import Tensor, nn

from ptee._common.errors import Advice, Argument

IMAGENET = "imagenet-1k"  # as timm.data.ImageNetInfo calls it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESERVED_ARGS = {"num_classes", "weights", "progress", "checkpoint_path", "cache_dir"}  # the factories' own


@dataclass(frozen=True)
class ArgumentNames:
    """What the caller calls the arguments of `load_backbone`, so that a message names what can be typed.

    None means that the caller has no such argument: a network in front of the backbone has no `num_classes` of its own.
    """

    model: str | None = "model"
    weights: str = "weights"
    pretrained: str | None = "pretrained"
    num_classes: str | None = "num_classes"
    input_size: str | None = "input_size"
    mean: str | None = "mean"
    std: str | None = "std"
    model_args: str | None = "model_args"

    def advice(self, sentence: str) -> Advice:
        """The sentence with the arguments in it, or, where the caller lacks one of them, what else can be done.

        >>> "".join(map(str, ArgumentNames(weights="front_weights").advice("Give a file with {weights:FILE}.")))
        'Give a file with front_weights=FILE.'
        >>> "".join(map(str, ArgumentNames(num_classes=None).advice("Try {num_classes:10}.")))
        'Give another model=, or another file with weights=FILE.'
        """
        known = asdict(self)
        wanted = [name for _, name, *_ in Formatter().parse(sentence) if name]
        if any(known[name] is None for name in wanted):
            sentence = "Give another {model}, or another file with {weights:FILE}."
            sentence = sentence if self.model else "Give another file with {weights:FILE}."
        return tuple(
            part
            for text, name, value, _ in Formatter().parse(sentence)
            for part in (text, Argument(known[name], value or "") if name else "")
            if part
        )

    @property
    def weights_argument(self) -> str:
        """The argument alone where the name says more: `static` of `static=resnet18`."""
        return self.weights.partition("=")[0]

    def check(self, *arguments: str) -> Advice:
        """The sentence that asks to check these arguments, or those of them that the caller has."""
        given = [name for name in map(asdict(self).get, arguments) if name] or [self.weights]
        parts: list[str | Argument] = ["Check "]
        for n, name in enumerate(given):
            between = "" if n == 0 else " and " if n == len(given) - 1 else ", "
            parts += [between, Argument(name, "FILE" if "=" in name else "")]
        return (*parts, ".")

    def other_weights(self) -> Advice:
        """What to do where there are no published weights, or none that can be had."""
        if self.pretrained is None:
            return self.advice("Give a file with {weights:FILE}.")
        return self.advice("Give a file with {weights:FILE}, or take random weights with {pretrained:False}.")


WEIGHTS_ALONE = ArgumentNames(None, "weights", None, None, None, None, None, None)  # of a network in a list of them


@dataclass(frozen=True)
class ModelRequest:
    """What is asked of a model library.

    Attributes:
        name: as the library calls the model.
        label: as the user calls it, for messages.
        weights: a file of weights, or None.
        pretrained: take the library's published weights.
        num_classes: K, or None for the library's own number.
        input_size: (c, h, w), or None for the model's own.
        mean: per channel, or None for the model's own.
        std: likewise.
        args: further arguments of the library's constructor.
        origin: which published weights a record names: the values under "tag", "hub" and "revision".
        names: what the caller calls these arguments.
    """

    name: str
    label: str
    weights: str | None
    pretrained: bool
    num_classes: int | None
    input_size: tuple[int, int, int] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    args: dict[str, Any]
    origin: Mapping[str, str | None] = field(default_factory=dict)
    names: ArgumentNames = ArgumentNames()


@dataclass(frozen=True)
class InputConfig:
    """What a backbone expects to see.

    Attributes:
        input_size: (c, h, w) of one image.
        mean: (c,) subtracted from pixels in 0..1.
        std: (c,) by which the difference is divided.
        interpolation: how images are resized, "bilinear" or "bicubic" as a rule.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class Known:
    """What a library knows of one of its modules.

    Attributes:
        input: the images that it takes.
        num_classes: how many classes its published weights have; None where there are none.
        label_space: which classes these are, in which order, where that is known.
        assumed: nothing is written on the module; this holds only if it has as many classes.
    """

    input: InputConfig
    num_classes: int | None
    label_space: str | None
    assumed: bool = False


@dataclass(frozen=True)
class Built:
    """A module that a library built, and how it would build it again.

    Attributes:
        module: the network.
        name: the library's name for it, with the tag of its published weights where these were loaded.
        args: the arguments that it was built with.
        origin: its published weights: "tag", "hub" (a repository) and "revision" (a commit).
        known: what the library knows of it.
    """

    module: nn.Module
    name: str
    args: dict[str, Any]
    origin: dict[str, str | None]
    known: Known


class Library(Protocol):
    """A model library. One module of this folder is one library: these functions, and a line in `load.LIBRARIES`."""

    def list_names(self) -> list[str]:
        """All models that it can build, by name."""

    def has_model(self, name: str) -> bool:
        """Whether it has a model of exactly that name."""

    def build(self, request: ModelRequest) -> Built:
        """Build the model, with its published weights if they are asked for; files of weights are not its task."""

    def args_from(self, name: str, tensors: Collection[str]) -> dict[str, Any]:
        """Arguments of the constructor that the names of the tensors in a file ask for."""

    def recognise(self, module: nn.Module) -> Known | None:
        """What it knows of a module; None where the module is not its own."""

    def convert(self, module: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors under names of earlier versions of a model, under the names that its module has now."""


def label_space(num_classes: int | None) -> str | None:
    """The classes of published weights: both libraries publish 1000 classes for ImageNet-1k alone."""
    return IMAGENET if num_classes == 1000 else None


def per_channel(given: Sequence[float] | None, usual: Sequence[float], channels: int) -> tuple[float, ...] | None:
    """One number for each channel; None if another number of them was given.

    Args:
        given: for each channel, or one for all; None for the usual ones.
        usual: those of the model's configuration, perhaps for another number of channels.
        channels: c.
    """
    values = tuple(float(v) for v in (usual if given is None else given))
    if len(values) == channels:
        return values
    if given is None:  # for another number of channels: their average is as good as any
        return (sum(values) / len(values),) * channels
    return values * channels if len(values) == 1 else None
