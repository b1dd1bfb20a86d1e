"""What every model library offers to `load_backbone`: the interface, the values that go through it, and what they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ptee._common.errors import Advice, Argument, BackboneError, PteeError, first_line, unknown
from ptee._common.process import float32_by_default, no_logs, no_pickles, no_stdout, no_warnings
from ptee._common.text import number_of
from ptee._common.validation import LARGEST_IMAGE, whole

if TYPE_CHECKING:
    from torch import nn

IMAGENET = "imagenet-1k"  # as timm.data.ImageNetInfo calls it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # as torchvision and Pillow call them
MOST_CLASSES = 1_000_000  # likewise
LEAST_STD = 1e-6  # of pixels between 0 and 1
OTHER_WEIGHTS: Advice = (
    *("Give a file with ", Argument("weights", "FILE"), ", or take random weights with "),
    *(Argument("pretrained", "False"), "."),
)
CHECK: Advice = ("Check ", Argument("model"), " and ", Argument("model_args"), ".")
OTHER_ARGUMENTS: Advice = ("Change ", Argument("model_args"), " or ", Argument("input_size"), ".")


@dataclass(frozen=True)
class ModelRequest:
    """What is asked of a model library. None stands for the model's own value."""

    name: str  # the library's name of the model
    label: str  # the user's name of it, for messages
    weights: str | None  # a file
    pretrained: bool  # take the library's published weights
    num_classes: int | None
    input_size: tuple[int, int, int] | None  # (c, h, w)
    mean: float | Sequence[float] | None  # per channel
    std: float | Sequence[float] | None
    args: dict[str, Any]  # further arguments of the library's constructor
    origin: Mapping[str, str | None]  # "tag", "hub" and "revision" of a record's published weights; or empty
    tensors: Sequence[str] = ()  # the names in the file of weights
    interpolation: str | None = None  # by which pictures are resized


@dataclass(frozen=True)
class InputConfig:
    """The images that a backbone takes.

    Attributes:
        input_size: (c, h, w) of one image.
        mean: (c,) subtracted from pixels in 0..1.
        std: (c,) by which the difference is divided.
        interpolation: how images are resized, mostly "bilinear" or "bicubic".
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"

    @property
    def normalised(self) -> str:
        """How, in words."""
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"normalised by mean {mean} and std {std}"


def require_alike(name: str, other: Any, first: str, one: Any) -> None:
    """Refuse to compare networks by name that take images of another size, mean or std. `other` and `one` say which they take."""
    fields = {"size": "input_size", "mean": "mean", "std": "std"}
    pairs = {what: [tuple(getattr(images, field)) for images in (other, one)] for what, field in fields.items()}
    if not (unlike := {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}):
        return
    values = "; ".join(f"{what} {own}, not {wanted}" for what, (own, wanted) in unlike.items())
    raise PteeError(
        f"{name} takes images of another {' and '.join(unlike)} than {first}: {values}. Compare models that take the same images."
    )


@dataclass(frozen=True)
class Known:
    """What a library knows of one of its modules."""

    input: InputConfig
    num_classes: int | None  # of its published weights
    label_space: str | None  # which classes these are and in which order, if that is known
    assumed: bool = False  # nothing is written on the module: this holds only if it has as many classes


@dataclass(frozen=True)
class Built:
    """A module that a library built, and how it can be built again."""

    module: nn.Module
    name: str  # the library's name, with the tag of its published weights if these were loaded
    args: dict[str, Any]
    origin: dict[str, str | None]  # its published weights: "tag", "hub" (a repository) and "revision" (a commit)
    known: Known


class Library(Protocol):
    """A model library. It is one module of this folder with these functions, and a line in `record.LIBRARIES`."""

    def list_names(self) -> list[str]:
        """The names of all models that it can build."""

    def has_model(self, name: str) -> bool:
        """Whether it has a model of exactly that name."""

    def build(self, request: ModelRequest) -> Built:
        """Build the model, with its published weights if they are asked for. A file of weights is loaded later."""

    def recognise(self, module: nn.Module) -> Known | None:
        """What it knows of a module, or None for a module of others."""


@contextmanager
def building(label: str, args: Mapping[str, Any], remedy: Advice | None) -> Iterator[None]:
    """While a library builds a network or fetches its weights: it prints nothing, unpickles nothing, and errors are one line.

    `label` and `args` are for the error; `remedy` says what to do if a download failed. torch.hub prints to standard output,
    timm and huggingface_hub log their retries. torchvision asks torch to unpickle files, and so did timm before 1.0.26 if a
    repository names its file: only the environment overrules them.
    """
    try:
        with no_logs, no_warnings, no_stdout, no_pickles, float32_by_default:
            yield
    except Exception as error:
        if remedy and not isinstance(error, TypeError):  # TypeError: an argument that the constructor does not take
            raise BackboneError(f"{label} cannot be downloaded or loaded: {first_line(error)} ", *remedy) from error
        given = " with " + ", ".join(f"{k}={v!r}" for k, v in args.items()) if args else ""
        change = OTHER_ARGUMENTS if args else ("Choose another model.",)
        raise BackboneError(f"{label} cannot be built{given}: {first_line(error)} ", *change) from error


@contextmanager
def other_words(names: Mapping[str, str]) -> Iterator[None]:
    """Errors in the words of a caller that has only some arguments of `load_backbone`, such as {"weights": "front_weights"}."""
    try:
        yield
    except PteeError as why:
        parts = why.parts
        if any(isinstance(part, Argument) and part.name not in names for part in parts):
            another = ("another ", Argument("model"), ", or ") if "model" in names else ()
            parts = (parts[0], "Give ", *another, "a file of its weights: ", Argument("weights", "FILE"), ".")
        parts = tuple(Argument(names[p.name], p.value) if isinstance(p, Argument) else p for p in parts)
        raise type(why)(*parts, argument=names.get(why.argument or ""), value=why.value) from why


def require_trained(request: ModelRequest, published: int | None) -> None:
    """Refuse published weights (of `published` classes, or of no classifier) if other classes are asked for.

    The library would put in a random classifier, and exits would learn its noise.
    """
    if not published:
        text = f"There are no pretrained weights of a classifier for {request.label}. "
        raise BackboneError(text, *OTHER_WEIGHTS, argument="model", value=request.label)
    if request.num_classes not in (None, published):
        text = (
            f"The pretrained classifier of {request.label} has {published} classes, not {request.num_classes}; another would "
            "be random. "
        )
        raise BackboneError(text, *OTHER_WEIGHTS, argument="num_classes", value=request.num_classes)


def label_space(num_classes: int | None) -> str | None:
    """The classes of published weights. timm and torchvision publish 1000 classes for ImageNet-1k alone."""
    return IMAGENET if num_classes == 1000 else None


def per_channel(
    argument: str, given: float | Sequence[float] | None, usual: Sequence[float], channels: int
) -> tuple[float, ...]:
    """One number for each channel: those that are given (one for each channel or one for all), or else the usual ones."""
    given = (given,) if isinstance(given, int | float) else given
    try:
        values = tuple(float(v) for v in (usual if given is None else given))
    except (TypeError, ValueError) as why:
        text = f" takes a number, or one for each channel, not {given!r:.80}."
        raise BackboneError(Argument(argument), text, value=given) from why
    if len(values) == channels:
        return values
    if given is None:  # the model's own configuration has another number of channels
        return (sum(values) / len(values),) * channels
    if len(values) == 1:
        return values * channels
    many = number_of(channels, "channel")
    text = f"Images of {many} need {number_of(channels, 'number')} for "
    found = f"{', or one' * (channels > 1)}, not {values}."
    raise BackboneError(text, Argument(argument), found, argument=argument, value=given)


def require_interpolation(name: str) -> None:
    """Refuse a way to resize pictures that there is not."""
    if name not in INTERPOLATIONS:
        raise unknown("interpolation", name, INTERPOLATIONS, argument="interpolation")


def require_pixels(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a mean or std that no pixels between 0 and 1 have, or by which none can be divided."""
    if not all(LEAST_STD <= s < math.inf for s in std):
        text = f"Pixels are divided by std, so it must be positive ({LEAST_STD} or more), not {std}. "
        raise BackboneError(text, "Give another ", Argument("std"), ".", argument="std", value=std)
    if not all(0 <= m <= 1 for m in mean):
        text = f"Pixels lie between 0 and 1, and so does their mean, not {mean}. "
        advice = ("Numbers of 0 to 255 divide by 255, in ", Argument("std"), " as well as in ", Argument("mean"), ".")
        raise BackboneError(text, *advice, argument="mean", value=mean)


def checked_size(size: Any, argument: str = "input_size") -> tuple[int, int, int]:
    """(c, h, w): three positive whole numbers, of an image that is not too large."""
    is_size = isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 3
    c, h, w = (whole(side) or 0 for side in size) if is_size else (0, 0, 0)
    if min(c, h, w) < 1:
        text = f"An input size is (channels, height, width), such as (3, 224, 224), not {size!r}."
        raise BackboneError(text, argument=argument, value=size)
    if c * h * w > LARGEST_IMAGE:
        text = f"Images of {' x '.join(map(str, size))} numbers are too large: {LARGEST_IMAGE:,} at most. Give a smaller size."
        raise BackboneError(text, argument=argument, value=size)
    return c, h, w
