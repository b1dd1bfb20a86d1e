"""The schema of a run's config.json: every field with its type and its bounds. A run may come from a stranger.

Keys that are not listed here are ignored, so that a later version can add some.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from ptee._common.errors import Argument, PteeError
from ptee._common.text import printable
from ptee._common.validation import LARGEST_IMAGE, LONGEST_PATH, Name, Number, ReadRecord, Text, Whole
from ptee.backbones.library import MOST_CLASSES, per_channel, require_pixels
from ptee.exits.config import AUTO, CALIBRATED, PLUS
from ptee.production.curve import Curve

SCHEMA_VERSION = 3  # 1: of ptee 0.1.0, without hashes of tensors and without a fingerprint
MOST_EXITS = 1000
DEEPEST = 32  # lists and objects inside each other
INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}  # numbers that JSON has no other way to say


def _no_size_to_choose(name: str) -> str:
    """Only a head that is still to be sized is called so, and no run has one."""
    if name.removesuffix(PLUS) == AUTO:
        raise PydanticCustomError("no_size", "Input should be the name of a head with its size")
    return name


def _not_empty(name: str) -> str:
    """No name is that of the whole network, behind which no exit stands."""
    if not name:
        raise PydanticCustomError("empty", "Input should be the name of a module")
    return name


def _number(value: Any) -> Any:
    return INFINITE.get(value, value) if isinstance(value, str) else value


def _not_nan(value: float) -> float:
    if math.isnan(value):
        raise PydanticCustomError("nan", "Input should be a number, not NaN")
    return value


def _or_nothing(value: Any) -> Any:
    return () if value is None else value


def _short(source: dict[str, Any] | None) -> dict[str, Any] | None:
    waiting: list[Any] = [source]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list):
            waiting += [*part, *part.values()] if isinstance(part, dict) else part
        elif isinstance(part, str) and (len(part) > LONGEST_PATH or printable(part) != part):
            raise PydanticCustomError("long", "Input should be a record of short texts without control characters")
    return source


Source = Annotated[dict[str, Any] | None, AfterValidator(_short)]
HeadName = Annotated[Name, AfterValidator(_no_size_to_choose)]
ModuleName = Annotated[Name, AfterValidator(_not_empty)]
Positive = Annotated[Number, Field(gt=0)]
Weight = Annotated[Number, Field(ge=0)]
Count = Annotated[Whole, Field(gt=0, le=MOST_CLASSES)]
Side = Annotated[Whole, Field(gt=0, lt=2**16)]  # of an image
Threshold = Annotated[float, Field(strict=True, allow_inf_nan=True), BeforeValidator(_number), AfterValidator(_not_nan)]


class InputRecord(ReadRecord):
    """The images that a network takes: (c, h, w), their mean and std for each channel, and how they are resized."""

    input_size: tuple[Side, Side, Side]
    mean: tuple[Number, ...]
    std: tuple[Positive, ...]
    interpolation: Name

    @model_validator(mode="after")
    def _of_some_image(self) -> Self:
        if math.prod(self.input_size) > LARGEST_IMAGE:
            size = Argument("input_size", str(list(self.input_size)))
            raise PteeError(size, f" is larger than any image: {LARGEST_IMAGE:,} numbers at most.")
        for name in ("mean", "std"):
            per_channel(name, getattr(self, name), (), self.input_size[0])
        require_pixels(self.mean, self.std)
        return self


class BackboneRecord(ReadRecord):
    """The backbone that the heads were trained on. `hash` is the sha256 of its weights; `source` says how to rebuild it.

    `weights_file` holds its weights if it was trained together with the heads: a name in the same folder. `pixels_known`: as of
    `Backbone`; older runs do not say.
    """

    name: Name
    hash: Name
    source: Source = None
    weights_file: Text | None = None
    classes: Count
    input: InputRecord
    pixels_known: Annotated[bool, Field(strict=True)] = True


class FrontRecord(ReadRecord):
    """The network of the exit at the input."""

    name: Name
    source: Source = None
    input: InputRecord


class ExitRecord(ReadRecord):
    """One exit: the module behind which it stands, its head, and which of the tensors there this reads."""

    name: ModuleName
    head: HeadName
    tensor: Annotated[Whole, Field(ge=0)] | None = None
    gate: Name | None = None  # of runs of ptee 0.1.0: a small network that this version does not build


class ConfidenceRecord(ReadRecord):
    """What the confidence is computed from; a scale and a shift for each exit if the model was calibrated."""

    name: Name
    scale: tuple[Positive, ...]
    shift: tuple[Number, ...]


class WeightsRecord(ReadRecord):
    """The weights of the answers so far at one exit: of the exits before it that are on, then its own."""

    exit: Whole
    before: tuple[Whole, ...] = Field(alias="with")
    weights: tuple[Weight, ...]

    @model_validator(mode="after")
    def _one_for_each(self) -> Self:
        numbers = (*self.before, self.exit)
        if list(numbers) != sorted({*numbers}) or numbers[0] < 0 or len(self.weights) != len(numbers):
            raise PteeError(f"answers.blend has no weight for each of the exits {list(numbers)!r:.60}.")
        return self


class BlendRecord(ReadRecord):
    """The weights of blended answers."""

    to_the_end: Annotated[bool, Field(strict=True)]
    weights: Annotated[tuple[WeightsRecord, ...], Field(max_length=MOST_EXITS)]


class AnswersRecord(ReadRecord):
    """Whether an exit answers by itself ("own") or with those before it ("blended")."""

    name: Literal["own", "blended"] = "own"
    blend: BlendRecord | None = None


class TensorRecord(ReadRecord):
    """One tensor of the heads. The hash is of its type, shape and bytes, shortened."""

    dtype: Name
    sha256: Name


class RunConfig(ReadRecord):
    """What config.json says."""

    schema_version: Whole
    heads_file: Text  # a name in the same folder
    backbone: BackboneRecord
    front: FrontRecord | None = None
    exits: Annotated[tuple[ExitRecord, ...], Field(max_length=MOST_EXITS)]
    threshold: tuple[Threshold, ...]
    confidence: ConfidenceRecord | None = None  # runs of ptee 0.1.0 have none: the heads' own confidence decided
    answers: AnswersRecord = AnswersRecord()
    off: Annotated[tuple[Whole, ...], BeforeValidator(_or_nothing)] = ()
    curve: Curve | None = None  # runs that were never tuned have none
    results: dict[str, Any] | None = None
    backbone_tensors: dict[Text, Text] | None = None  # short hashes, to say which differ; old runs have none
    learned_from: dict[Text, Text] | None = None  # those that the heads learned from, if they are others
    tensors: dict[Text, TensorRecord] | None = None  # schema 1 has neither these
    fingerprint: Name | None = None  # nor this

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        number = len(self.exits)
        if not number:
            raise PteeError("exits=[] must be a list of 1 or more.")
        if len(self.threshold) != number:
            raise PteeError(f"threshold has {len(self.threshold)} numbers for {number} exits.")
        if len(set(self.off)) < len(self.off) or not all(0 <= n < number for n in self.off):
            raise PteeError(f"off={list(self.off)!r:.60} must be numbers of exits, 0 to {number - 1}, each once.")
        scales = self.confidence or ConfidenceRecord(name="", scale=(), shift=())
        if len(scales.scale) != len(scales.shift) or len(scales.scale) not in (0, number):
            raise PteeError(f"confidence.scale and confidence.shift must have {number} numbers each, or none.")
        if scales.name == CALIBRATED and not scales.scale:
            raise PteeError(f"confidence has no numbers for the confidence {CALIBRATED!r}.")
        if self.answers.name == "blended" and self.answers.blend is None:
            raise PteeError("answers has no weights for the blended answers.")
        if self.curve is not None and self.curve.exits != number:
            raise PteeError(f"curve.points have {self.curve.exits} thresholds for {number} exits.")
        if self.schema_version > 1 and (self.tensors is None or self.fingerprint is None):
            raise PteeError("tensors and fingerprint are missing.")
        return self


def require_sane(value: Any) -> None:
    """Refuse JSON that is nested too deeply, has a whole number beyond 64 bits, or text that is none."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                inner += [*part, *part.values()]
            elif isinstance(part, list):
                inner += part
            elif isinstance(part, int) and abs(part) >= 2**64:
                raise PteeError(f"a number is beyond 64 bits: {str(part)[:30]}...")
            elif isinstance(part, str) and any("\ud800" <= letter <= "\udfff" for letter in part):
                raise PteeError(f"a text has half a character: {part!r:.60}.")
        level = inner
    if level:
        raise PteeError(f"lists and objects lie more than {DEEPEST} deep in each other.")


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of what may not be changed by hand: what the model computes, and which images it has not seen.

    Thresholds may be changed, and where the images are.
    """
    backbone, front = config["backbone"], config.get("front")
    source = {key: value for key, value in (backbone.get("source") or {}).items() if key != "weights"}
    results = config.get("results") or {}
    data, tuning = (part if isinstance(part := results.get(key), dict) else {} for key in ("data", "tuning"))
    kept = {
        "backbone": {key: backbone[key] for key in ("hash", "classes", "input")},
        "source": source,
        "front": front and {key: front.get(key) for key in ("source", "input")},
        "exits": [[row["name"], row["head"]] for row in config["exits"]],
        "tensors": config.get("tensors"),
        "images": [data.get("split"), tuning.get("source"), tuning.get("files_sha256")],
        "blend": (config.get("answers") or {}).get("blend"),
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:32]
