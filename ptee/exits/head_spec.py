"""What a head is made of, read once from the name that a user gives.

name     pool, bnpool, plain, conv2, a registered name, res-32x2-64x2, or auto; each with or without a + at the end
spec     HeadSpec(kind, stages, builds_on_previous); str(spec) is the name again
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ptee._common.errors import PteeError, unknown
from ptee._common.text import number_of
from ptee.exits.config import AUTO, FRONT, HEADS, PLUS

RESIDUAL = "res"
RESIDUAL_NAME = r"res(-\d{1,5}x\d{1,3}(s\d{1,2})?){1,8}"
LARGEST = {"channels": 1024, "blocks": 8, "stride": 16}  # of a stage; a saved run may come from a stranger


@dataclass(frozen=True)
class Stage:
    """Residual blocks of one width. `stride` is that of the first block."""

    channels: int
    blocks: int
    stride: int = 2

    def __str__(self) -> str:
        return f"{self.channels}x{self.blocks}" + ("" if self.stride == 2 else f"s{self.stride}")


@dataclass(frozen=True)
class HeadSpec:
    """What a head is made of. `str` gives the name that a saved run has.

    Attributes:
        kind: a name of `HEADS`, convN with a number, "res" for a residual network, "auto" for one that is still to be
            sized, or "front" for a network of its own.
        stages: of a residual network.
        builds_on_previous: it reads the logits of the exit before.
    """

    kind: str
    stages: tuple[Stage, ...] = ()
    builds_on_previous: bool = False

    def __str__(self) -> str:
        return "-".join((self.kind, *map(str, self.stages))) + (PLUS if self.builds_on_previous else "")


FRONT_SPEC = HeadSpec(FRONT)


def is_conv(kind: str) -> bool:
    """Whether a head is convN, with N blocks."""
    return re.fullmatch(r"conv([1-9]\d?)", kind) is not None


def parse_head(name: Any) -> HeadSpec:
    """The spec of a head's name, given by a user or a saved run. Refuses unknown names, and residual heads that are too large."""
    if not isinstance(name, str):
        raise PteeError(
            f"The head {name!r} is no name. Give a name such as 'pool', or a list of names.",
            argument="head",
            value=name,
        )
    kind, builds_on_previous = name.removesuffix(PLUS), name.endswith(PLUS)
    if kind == AUTO or kind in HEADS or is_conv(kind):
        return HeadSpec(kind, (), builds_on_previous)
    if re.fullmatch(RESIDUAL_NAME, kind):
        return HeadSpec(RESIDUAL, _stages(name, kind), builds_on_previous)
    others = ["convN with a number, such as conv4", AUTO, "res-32x2-64x2 with any stages of channels x blocks"]
    raise unknown("head", name, [*HEADS, *others], argument="head")


def _stages(name: str, kind: str) -> tuple[Stage, ...]:
    """The stages of res-32x2-64x3s1: 2 blocks of 32 channels and stride 2, then 3 blocks of 64 channels and stride 1."""
    parts = re.findall(r"-(\d+)x(\d+)(?:s(\d+))?", kind)
    stages = tuple(Stage(int(channels), int(blocks), int(stride or 2)) for channels, blocks, stride in parts)
    for stage in stages:
        if not all(1 <= getattr(stage, what) <= most for what, most in LARGEST.items()):
            possible = ", ".join(f"1 to {most} {what}" for what, most in LARGEST.items())
            text = f"A stage of the head {name!r} is too large or empty. A stage may have {possible}."
            raise PteeError(text, argument="head", value=name)
    return stages


def as_list(given: Any) -> list[Any]:
    """One value, or several; "pool,conv1" is a list, too."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",")]
    return list(given) if isinstance(given, Sequence) else [given]


def one_each(what: str, given: list[Any], exits: int) -> list[Any]:
    """A value for each exit, from one or from as many. Refuses another number."""
    if len(given) not in (1, exits):
        text = f"{len(given)} values of {what} for {number_of(exits, 'exit')}. Give one, or one for each exit."
        raise PteeError(text, argument=what.replace(" ", "_"), value=given)
    return given * exits if len(given) == 1 else given
