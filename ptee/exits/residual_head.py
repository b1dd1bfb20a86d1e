"""Learned heads: small residual networks, as large as a budget allows, which build on the exit before them.

A head's name says what it is: `res-32x2-64x2+` has two stages, of two residual blocks each with 32 and 64 channels, and each
stage halves the sides of the map; `16x3s1` would leave them. `+`: its answer begins at the answer before, as with every
head (`heads`), and it also reads the map that the head before it made on its way, so what an earlier exit computed is not
thrown away by a later one. Such heads are one network along the backbone, and learn as one: gradients flow back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptee._common.errors import PteeError, RunError
from ptee.analysis.layout import Layout
from ptee.exits.heads import BUILDS_ON, SIZED, ExitHead, HeadOutput, PreviousExits, conv_features, make_head

Shape = tuple[int, int, int]  # (c, h, w) of a map

SMALLEST = 4  # positions a side below which a map is not halved again
DEEPEST = 4  # blocks a stage
MOST_CHANNELS, FEWEST_CHANNELS, USUAL_CHANNELS = 256, 8, 128


@dataclass(frozen=True)
class Stage:
    """Some residual blocks of one width.

    Attributes:
        channels: of each.
        blocks: how many.
        stride: of the first.
    """

    channels: int
    blocks: int
    stride: int = 2

    def __str__(self) -> str:
        return f"{self.channels}x{self.blocks}" + ("" if self.stride == 2 else f"s{self.stride}")


@dataclass(frozen=True)
class Blueprint:
    """What a learned head is made of.

    Attributes:
        stages: one after another.
        linked: it reads what the head before it made.
    """

    stages: tuple[Stage, ...]
    linked: bool = False

    def __str__(self) -> str:
        return "-".join(("res", *map(str, self.stages))) + ("+" if self.linked else "")

    @classmethod
    def of(cls, name: str) -> Blueprint | None:
        """What a name says; None if it is no learned head's.

        Raises:
            PteeError: if it is one that is larger than any head should be.
        """
        match = re.fullmatch(r"res((?:-\d{1,5}x\d{1,3}(?:s\d{1,2})?){1,8})(\+?)", name)
        if match is None:
            return None
        parts = re.findall(r"-(\d+)x(\d+)(?:s(\d+))?", match[1])
        stages = tuple(Stage(int(c), int(b), int(s or 2)) for c, b, s in parts)
        if not all(1 <= s.channels <= 1024 and 1 <= s.blocks <= 8 and 1 <= s.stride <= 16 for s in stages):
            raise PteeError(
                f"The head {name!r} must have stages of 1 to 1024 channels, 1 to 8 blocks and a stride of 1 to 16."
            )
        return cls(stages, bool(match[2]))

    def map_of(self, shape: Shape) -> Shape:
        """(c, h, w) of the map that it makes out of one (c, h, w)."""
        _, height, width = shape
        for stage in self.stages:
            height, width = -(-height // stage.stride), -(-width // stage.stride)
        return self.stages[-1].channels, height, width

    def macs(self, shape: Shape, classes: int, before: Shape | None) -> int:
        """Multiply-accumulates of its convolutions and linear layers for one map.

        Args:
            shape: (c, h, w) of the map.
            classes: K.
            before: of the map that the head before made; None where there is none or it is not read.
        """
        channels, height, width = shape
        total = 0
        for i, stage in enumerate(self.stages):
            height, width = -(-height // stage.stride), -(-width // stage.stride)
            wide, positions = stage.channels, height * width
            total += positions * wide * (channels * _side(stage.stride) ** 2 + 9 * wide * (2 * stage.blocks - 1))
            total += positions * wide * channels * (stage.stride > 1 or channels != wide)
            if i == 0 and self.linked and before is not None:
                total += min(positions, before[1] * before[2]) * wide * before[0]
            channels = wide
        return total + channels * (classes + 1)


def _side(stride: int) -> int:
    """Of a kernel: odd, and large enough that no position is left out."""
    return max(3, stride + 1 - stride % 2)


class _Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        size = _side(stride)
        self.conv1 = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            mean = nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            self.around = nn.Sequential(mean, nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.around(x)).relu()


class LearnedHead(ExitHead):
    """A residual network on one cut, which may build on the exit before it.

    Args:
        blueprint: what it is made of.
        layout: of the cut.
        num_classes: K.
        before: (c, h, w) of the map that the head before makes; None where there is none.
    """

    teaches_back = True  # as its link does

    def __init__(self, blueprint: Blueprint, layout: Layout, num_classes: int, before: Shape | None) -> None:
        widths = [layout.channels, *(s.channels for s in blueprint.stages)]
        blocks: list[list[nn.Module]] = [
            [_Block(before_, s.channels, s.stride), *(_Block(s.channels, s.channels, 1) for _ in range(s.blocks - 1))]
            for before_, s in zip(widths, blueprint.stages, strict=False)
        ]
        first, rest = blocks[0][0], [block for stage in blocks for block in stage][1:]
        entry = nn.Sequential(nn.BatchNorm2d(layout.channels), first)
        super().__init__(layout, nn.ModuleDict({"entry": entry, "rest": nn.Sequential(*rest)}), widths[-1], num_classes)
        self.passes_on = blueprint.map_of((layout.channels, layout.height, layout.width))
        self.link: nn.Module | None = None
        if blueprint.linked and before is not None:
            self.link = nn.Sequential(nn.Conv2d(before[0], widths[1], 1, bias=False), nn.BatchNorm2d(widths[1]))
        if blueprint.linked:
            self.build_on_answers()

    def read(self, z: Tensor) -> Tensor:
        """The map itself: every part of the head learns."""
        return self.layout.to_map(z)

    def follow(self, z: Tensor, previous: PreviousExits) -> HeadOutput:
        """Answer from a feature map, after other exits."""
        return self.answer(self.layout.to_map(z), previous)

    def answer(self, x: Tensor, previous: PreviousExits) -> HeadOutput:
        """Answer from a map (b, c, h, w), after other exits."""
        features = self.features
        assert isinstance(features, nn.ModuleDict)
        y = features["entry"](x.contiguous(memory_format=torch.channels_last))  # in which convolutions are fastest
        if self.link is not None and previous.map is not None:
            y = y + _linked(self.link, previous.map, y.shape[-2:])
        y = features["rest"](y)
        return self._output(y.mean((2, 3)), previous, y)


def _linked(link: nn.Module, made: Tensor, size: torch.Size) -> Tensor:
    """What another head made, for a map of another size; the smaller of the two is the one that is computed on."""
    smaller = made.shape[-2:].numel() <= size.numel()
    return _resized(link(made), size) if smaller else link(_resized(made, size))


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[-2:] == size:
        return x
    if x.shape[-2] >= size[0] and x.shape[-1] >= size[1]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    return F.interpolate(x, size=(size[0], size[1]))


# ---------------------------------------------------------------------------------------------------- any heads


def make_heads(
    names: Sequence[str], layouts: Sequence[Layout], num_classes: int, first: ExitHead | None = None
) -> list[ExitHead]:
    """Heads by name, learned or of the registry, each built on the one before where it says so.

    Args:
        names: one for each exit.
        layouts: of the cuts they will read.
        num_classes: K.
        first: the first of them, where it is made already.

    Raises:
        UnknownName: if there is no such head.
        PteeError: as of `make_head`, or if the first head builds on another.
    """
    heads = [] if first is None else [first]
    for name, layout in list(zip(names, layouts, strict=True))[len(heads) :]:
        blueprint, before = Blueprint.of(name), heads[-1].passes_on if heads else None
        head = (
            make_head(name, layout, num_classes)
            if blueprint is None
            else LearnedHead(blueprint, layout, num_classes, before)
        )
        if head.trust is not None and not heads:
            raise PteeError(f"The first head {name!r} has none before it to build on. Leave out the +.")
        heads.append(head)
    return heads


def require_tensors(
    names: Sequence[str],
    layouts: Sequence[Layout],
    num_classes: int,
    first: ExitHead | None,
    saved: Mapping[str, Tensor],
) -> None:
    """Refuse heads whose name says that they have other tensors than were saved, before any memory is taken for them.

    Args:
        names: one for each exit.
        layouts: of the cuts they will read.
        num_classes: K.
        first: the first of them, where it is made already.
        saved: each with the number of its head in front of its name.

    Raises:
        RunError: naming the head; a stranger may have written its name.
    """
    before = first.passes_on if first else None
    for n, (name, layout) in list(enumerate(zip(names, layouts, strict=True)))[first is not None :]:
        with torch.device("meta"):  # shapes alone
            blueprint, head = Blueprint.of(name), conv_features(name, layout.channels)
            if blueprint is not None:
                head = LearnedHead(blueprint, layout, num_classes, before)
        before = getattr(head, "passes_on", None)
        for key, tensor in ({} if head is None else head.state_dict(prefix=f"{n}.")).items():
            found = saved.get(key)
            if found is None or found.shape != tensor.shape:
                has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
                raise RunError(
                    f"The head {name!r} of exit {n} wants a tensor {key!r} of shape {tuple(tensor.shape)}, and in the run it {has}. "
                    "Copy the run anew."
                )


class AfterOthers(nn.Module):
    """A head in its place behind another, as a module of one input, to be counted.

    Args:
        head: the head.
        before: the one before it, or None.
    """

    def __init__(self, head: ExitHead, before: ExitHead | None) -> None:
        super().__init__()
        self.head = head
        self._map = None if before is None else before.passes_on
        self._first = before is None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the head says after answers of zeros."""
        answers = () if self._first else (z.new_zeros(len(z), self.head.num_classes),)
        made = None if self._map is None else z.new_zeros(len(z), *self._map)
        said = self.head.follow(z, PreviousExits(answers, made))
        return said.logits, said.confidence_logit


# ---------------------------------------------------------------------------------------------------- sizes


def sized_names(
    names: Sequence[str],
    layouts: Sequence[Layout],
    macs: Sequence[float],
    num_classes: int,
    before: Shape | None = None,
) -> list[str]:
    """The names, with each "auto" replaced by the learned head that its budget allows, or by "pool" if it allows none.

    Args:
        names: one for each exit; "auto+" for one that builds on the head before it, where that makes a map.
        layouts: of the cuts.
        macs: multiply-accumulates that each may cost.
        num_classes: K.
        before: (c, h, w) of the map that the first of them makes, where that is known already.
    """
    found: list[str] = []
    for name, layout, budget in zip(names, layouts, macs, strict=True):
        shape = (layout.channels, layout.height, layout.width)
        reads = before if name.endswith(BUILDS_ON) else None
        found.append(str(blueprint_for(shape, budget, num_classes, reads) or "pool") if name in SIZED else name)
        blueprint = Blueprint.of(found[-1])
        before = blueprint.map_of(shape) if blueprint is not None else before if len(found) == 1 else None
    return found


def blueprint_for(shape: Shape, macs: float, classes: int, before: Shape | None) -> Blueprint | None:
    """The head that a budget allows: first as wide as is usual there, then deeper, at last wider. None if none fits.

    Args:
        shape: (c, h, w) of the map.
        macs: multiply-accumulates that it may cost.
        classes: K.
        before: (c, h, w) of the map that the head before makes; None for the first.
    """
    for strides in _strides(shape, before):
        fitting = [one for one in _blueprints(strides, before) if one.macs(shape, classes, before) <= macs]
        if fitting:
            usual = min(
                USUAL_CHANNELS, max(shape[0], 2 * FEWEST_CHANNELS) * 2 ** len(strides)
            )  # images have few of their own
            return max(fitting, key=lambda one: _merit(one.stages[-1], usual))
    return None


def _merit(last: Stage, usual: int) -> tuple[int, int, int]:
    return min(last.channels, usual), last.blocks, last.channels


def _blueprints(strides: Sequence[int], before: Shape | None) -> Iterator[Blueprint]:
    halvings = len(strides) - 1
    step = FEWEST_CHANNELS << halvings  # each stage is twice as wide as the one before, and as wide as hardware likes
    for width in range(step, MOST_CHANNELS + 1, step):
        for blocks in range(1, DEEPEST + 1):
            stages = tuple(Stage(width >> (halvings - i), blocks, s) for i, s in enumerate(strides))
            yield Blueprint(stages, before is not None)


def _strides(shape: Shape, before: Shape | None) -> list[list[int]]:
    """Of the stages, best first: halves down to a small map, or there in fewer steps.

    Where the head before made a map (and no mere vector), down to the size of that map.
    """
    side, halvings = min(shape[1:]), 0
    goal = min(before[1:]) if before is not None and min(before[1:]) > 1 else SMALLEST
    while side > goal:
        side, halvings = -(-side // 2), halvings + 1
    return [[2 ** (1 + skipped), *[2] * (halvings - 1 - skipped)] for skipped in range(min(halvings, 4))] or [[1]]
