"""Exit heads: small networks that answer from a feature map, and say how sure they are.

Every head turns the map into one feature vector v and ends in two linear layers on it: logits W1 v + b1 (K classes) and
a confidence logit w2 v + b2, of which `confidence` can make h (EENet fig. 3.1, PTEENet fig. 2).
`HEADS` names the ways to make v.

A name with a `+` behind it, such as `conv2+`, is a head that builds on the answer of the exit before it: that answer's
log-probabilities are added to the head's own logits, times one number which is learnt with the head and is 0 at first. So
what it answers is a weighted geometric mean of the answers so far, as in Zero Time Waste (ZTW: Wołczyk et al., NeurIPS
2021), and as there no gradient flows from it into the exit before. What is not done of ZTW: its heads read the answer
before among their features, with a weight for each pair of classes; and the weights of its mean are learnt when the heads
are done, for each earlier exit freely. Here an earlier exit weighs the product of the numbers between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptee._common.errors import PteeError, unknown
from ptee._common.process import few_random_numbers
from ptee.analysis.arithmetic import keeps_rows_apart
from ptee.analysis.layout import Layout

AUTO = "auto"  # the name of a head that is sized when exits are planned (`learned`)
BUILDS_ON = "+"  # behind the name of a head that builds on the one before it
SIZED = (AUTO, AUTO + BUILDS_ON)  # names that stand for another

FeatureFactory = Callable[[int, int, int], nn.Module]


class HeadOutput(NamedTuple):
    """What a head answers for some rows.

    Attributes:
        logits: (b, K).
        confidence_logit: (b,) what its confidence layer gives, in float32 at least.
        map: (b, c, h, w) what it made on its way for the next head, if it is one that does.
    """

    logits: Tensor
    confidence_logit: Tensor
    map: Tensor | None = None


class PreviousExits(NamedTuple):
    """What the exits so far have answered for the rows that are here, for heads that read it.

    Attributes:
        answers: (b, K) logits of each.
        map: (b, c, h, w) of the last of them.
    """

    answers: tuple[Tensor, ...] = ()
    map: Tensor | None = None

    def then(self, output: HeadOutput) -> PreviousExits:
        """The same with one more exit.

        Args:
            output: what its head answered.
        """
        return PreviousExits((*self.answers, output.logits), output.map)


class ExitHead(nn.Module):
    """A head on one cut: any layout in, logits and a confidence logit out.

    Attributes:
        passes_on: (c, h, w) of the map that it makes for the next head; None where it makes none.
        trust: (), how much of the answer before is added to its own; None where it builds on none.
        teaches_back: its gradient flows through that answer into the exit before.

    Args:
        layout: how the cut's tensor lies in memory.
        features: (b, c, h, w) -> (b, F), the vector v.
        num_features: F.
        num_classes: K.
    """

    passes_on: tuple[int, int, int] | None = None
    teaches_back: bool = False

    def __init__(self, layout: Layout, features: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.layout = layout
        self.features = features
        self.num_classes = num_classes
        self.logits: nn.Module = nn.Linear(num_features, num_classes)
        self.confidence = nn.Linear(num_features, 1)
        self.trust: nn.Parameter | None = None

    def build_on_answers(self) -> None:
        """From now on its answer begins at that of the exit before it, where there is one; not at once, as trust is 0."""
        self.trust = nn.Parameter(torch.zeros(()))

    @property
    def linked(self) -> bool:
        """Whether the head itself reads what the exits before it said."""
        return self.trust is not None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Answer from a feature map.

        Args:
            z: the cut's tensor, in its own layout.

        Returns:
            Logits (b, K) and the confidence logit (b,), the latter in float32 at least whatever the precision around.
        """
        said = self.follow(z, PreviousExits())
        return said.logits, said.confidence_logit

    def read(self, z: Tensor) -> Tensor:
        """What is left of a feature map after the part of the head that has nothing to learn: a pooled vector, or all.

        Args:
            z: the cut's tensor, in its own layout.
        """
        x = self.layout.to_map(z)
        for part in self._parts()[0]:
            x = part(x)
        return x

    def follow(self, z: Tensor, previous: PreviousExits) -> HeadOutput:
        """Answer from a feature map, after other exits.

        Args:
            z: the cut's tensor, in its own layout.
            previous: what they answered.
        """
        return self._output(self.features(self.layout.to_map(z)), previous)

    def answer(self, x: Tensor, previous: PreviousExits) -> HeadOutput:
        """Answer from what was read, as `follow` from the feature map.

        Args:
            x: what `read` gave.
            previous: what the exits before answered.
        """
        v = x
        for part in self._parts()[1]:
            v = part(v)
        return self._output(v, previous)

    def _output(self, v: Tensor, previous: PreviousExits, made: Tensor | None = None) -> HeadOutput:
        """The one place where logits and confidence come from; `made` is the map for the next head."""
        return HeadOutput(self._logits(v, previous), self._confidence(v), made)

    def _logits(self, v: Tensor, previous: PreviousExits) -> Tensor:
        logits: Tensor = self.logits(v)
        if self.trust is None or not previous.answers:
            return logits
        before = previous.answers[-1] if self.teaches_back else previous.answers[-1].detach()
        return logits + self.trust * before.log_softmax(-1).to(logits.dtype)

    def _confidence(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            wide = torch.promote_types(v.dtype, torch.float32)
            return F.linear(v.to(wide), self.confidence.weight.to(wide), self.confidence.bias.to(wide))[:, 0]

    def _parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The layers of `features` in front that neither learn nor draw lots, and the others."""
        layers = list(self.features) if type(self.features) is nn.Sequential else [self.features]
        n = next((n for n, layer in enumerate(layers) if not isinstance(layer, NOTHING_TO_LEARN)), len(layers))
        return layers[:n], layers[n:]


class _MeanPool(nn.Module):
    """Global average pool."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


NOTHING_TO_LEARN = (
    _MeanPool,
    nn.Flatten,
    nn.Identity,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
)


def _plain(channels: int, height: int, width: int) -> nn.Module:
    return nn.Flatten()


def _pool(channels: int, height: int, width: int) -> nn.Module:
    return _MeanPool()


def _bnpool(channels: int, height: int, width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), _MeanPool())


def _conv(blocks: int) -> FeatureFactory:
    """Blocks of [3x3 convolution C -> C without bias, batch norm, ReLU], then the pool."""

    def make(channels: int, height: int, width: int) -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        return nn.Sequential(*layers, _MeanPool())

    return make


HEADS: dict[str, FeatureFactory] = {
    "plain": _plain,
    "pool": _pool,
    "bnpool": _bnpool,
    "conv1": _conv(1),
    "conv2": _conv(2),
    "conv3": _conv(3),
}


def register_head(name: str) -> Callable[[FeatureFactory], FeatureFactory]:
    """Add a head of your own, to be named wherever a head is named.

    Args:
        name: the new head's name; one that exists is refused, and one with a + at its end.

    Returns:
        A decorator for a function or class `(channels, height, width) -> nn.Module` whose module maps a feature map
        (b, c, h, w) to a feature vector (b, F). ptee puts the two linear layers behind it.

    Raises:
        PteeError: if the name is taken, or ends in +.

    >>> @register_head("maxpool")
    ... def maxpool(channels, height, width):
    ...     return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    """

    def add(factory: FeatureFactory) -> FeatureFactory:
        own = HEADS.get(name)
        again = own is not None and _where(own) == _where(factory)  # a notebook cell that is run twice
        if name.endswith(BUILDS_ON):
            raise PteeError(
                f"The head name {name!r} ends in {BUILDS_ON}, which says that a head builds on the one before it. Register "
                f"{name.rstrip(BUILDS_ON)!r}, and name it with the {BUILDS_ON} where it shall."
            )
        if (own is not None and not again) or re.fullmatch(r"conv\d+", name):
            raise PteeError(f"The head name {name!r} is taken. Register yours under another name.")
        HEADS[name] = factory
        return factory

    return add


def _where(factory: FeatureFactory) -> tuple[str, str]:
    return getattr(factory, "__module__", ""), getattr(factory, "__qualname__", repr(factory))


def make_head(name: str, layout: Layout, num_classes: int) -> ExitHead:
    """Build a head by name.

    Args:
        name: one of `HEADS`, or convN with N blocks; with a + behind it, one that builds on the answer before.
        layout: of the cut it will read.
        num_classes: K.

    Raises:
        UnknownName: if there is no such head.
        PteeError: if a registered head does not give one vector for each row, overwrites its input, or mixes rows.
    """
    own = name.removesuffix(BUILDS_ON)
    factory = HEADS.get(own) or _conv_of(own)
    if factory is None:
        raise unknown(
            "head", name, [*HEADS, "convN with a number, such as conv4", "auto", "res-32x2-64x2 and its likes"]
        )
    features = factory(layout.channels, layout.height, layout.width)
    head = ExitHead(layout, features, _width(own, features, layout), num_classes)
    if own != name:
        head.build_on_answers()
    return head


def _conv_of(name: str) -> FeatureFactory | None:
    match = re.fullmatch(r"conv([1-9]\d?)", name)
    return _conv(int(match[1])) if match else None


def conv_features(name: str, channels: int) -> nn.Module | None:
    """Of a head convN or convN+, all but what every head has; None for the others.

    Args:
        name: of any head.
        channels: of the map that it reads.
    """
    factory = _conv_of(name.removesuffix(BUILDS_ON))
    return None if factory is None else nn.ModuleDict({"features": factory(channels, 1, 1)})


def _width(name: str, features: nn.Module, layout: Layout) -> int:
    """F, found by trying."""
    shape = (2, layout.channels, layout.height, layout.width)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    rows[1] *= 2  # of other contrast, so that statistics of both are those of neither
    rows = rows.to(next((p.device for p in features.parameters()), rows.device))
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False), few_random_numbers():
        features.eval()
        width = int(_vectors(name, features, rows).shape[1])
        apart = keeps_rows_apart(features, rows, lambda module, some: _vectors(name, module, some))
        buffers = [(buffer, buffer.clone()) for buffer in features.buffers()]
        _vectors(name, features.train(), rows)  # dropout may work in place, too
        for buffer, before in buffers:
            buffer.copy_(before)
    if not apart:
        raise PteeError(
            f"The head {name!r} answers a row differently when it is alone: its rows influence one another, so none of "
            "them can leave early. Use layers that keep rows apart in eval mode, such as a batch norm with running statistics."
        )
    return width


def _vectors(name: str, features: nn.Module, rows: Tensor) -> Tensor:
    """(b, F) of these rows, or the refusal of a head that gives something else or harms the backbone."""
    given = rows.clone()
    v = features(given)
    if not torch.equal(given, rows):
        raise PteeError(
            f"The head {name!r} overwrites the feature map that it is given, with which the backbone goes on. "
            "Use inplace=False in it, or let it begin with x.clone()."
        )
    if not isinstance(v, Tensor) or v.dim() != 2 or len(v) != len(rows):
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise PteeError(f"The head {name!r} must map (b, c, h, w) to one vector for each row (b, F); it gave {got}.")
    return v
