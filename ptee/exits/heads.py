"""Exit heads: small networks that classify from a feature map and say how sure they are.

Every head turns the map into one feature vector v. Two linear layers follow: logits W1 v + b1 (K classes), and a confidence
logit w2 v + b2 (EENet fig. 3.1, PTEENet fig. 2). `HEADS` names the ways to make v.

A head with a `+` behind its name, such as `conv2+`, also reads the logits y' of the exit before it (after Zero Time Waste,
Wołczyk et al., NeurIPS 2021):

    y = W1 v + b1 + w log_softmax(y')        w is learned with the head and starts at 0; no gradient flows into y'

Its probabilities are then a weighted geometric mean of those of the exits so far. The paper differs in two ways: its heads
have a weight for each pair of classes, and it learns the weights of the mean after the heads, one for each earlier exit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptee._common.devices import without_autocast
from ptee._common.errors import PteeError
from ptee._common.process import own_random_numbers
from ptee._common.validation import checked
from ptee.analysis.arithmetic import keeps_rows_apart
from ptee.analysis.layout import Layout
from ptee.exits.confidence import same_definition
from ptee.exits.config import AUTO, FRONT, HEADS, PLUS
from ptee.exits.head_spec import RESIDUAL_NAME

FeatureFactory = Callable[[int, int, int], nn.Module]


class HeadOutput(NamedTuple):
    """What a head gives for some rows.

    Attributes:
        logits: (b, K).
        confidence_logit: (b,) of its confidence layer, in float32 at least.
    """

    logits: Tensor
    confidence_logit: Tensor


class ExitHead(nn.Module):
    """The head of one exit. Takes the tensor of a cut in any layout, gives logits and a confidence logit.

    Attributes:
        previous_weight: (), the weight of the previous exit's answer; None if the head does not read it.

    Args:
        layout: of the cut's tensor.
        features: (b, c, h, w) -> (b, F), the vector v.
        num_features: F.
        num_classes: K.
        builds_on_previous: it reads the logits of the exit before.
    """

    def __init__(
        self,
        layout: Layout,
        features: nn.Module,
        num_features: int,
        num_classes: int,
        *,
        builds_on_previous: bool = False,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.features = features
        self.num_classes = num_classes
        self.logits: nn.Module = nn.Linear(num_features, num_classes)
        self.confidence = nn.Linear(num_features, 1)
        self.previous_weight = nn.Parameter(torch.zeros((), device="cpu")) if builds_on_previous else None

    @property
    def builds_on_previous(self) -> bool:
        """Whether it reads the logits of the exit before."""
        return self.previous_weight is not None

    def forward(self, z: Tensor, earlier: Sequence[Tensor] = ()) -> HeadOutput:
        """Classify the cut's tensor z, after exits with the logits `earlier` (b, K) each."""
        return self.answer(self.read(z), earlier)

    def read(self, z: Tensor) -> Tensor:
        """The input of the first layer that learns: a pooled vector, or the whole map."""
        x = self.layout.to_map(z)
        if not isinstance(self.confidence.weight, Tensor):  # torch's own quantisation makes a method of it
            raise PteeError(
                f"The layers of this head were made into others (a {type(self.confidence).__module__}.{type(self.confidence).__name__}). "
                "torch's dynamic quantisation looks at all rows together, so a row's answer would depend on the others. Take the model as it "
                "was; for whole numbers export it (ptee export --int8)."
            )
        if not torch.is_autocast_enabled(z.device.type):  # parts of the backbone may compute in another type
            x = x.to(self.confidence.weight.dtype)
        for part in self.parts()[0]:
            x = part(x)
        return x

    def answer(self, x: Tensor, earlier: Sequence[Tensor]) -> HeadOutput:
        """Classify what `read` gave."""
        v = x
        for part in self.parts()[1]:
            v = part(v)
        return HeadOutput(self._logits(v, earlier), self._confidence(v))

    def _logits(self, v: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        logits: Tensor = self.logits(v)
        if self.previous_weight is None or not earlier:
            return logits
        return logits + self.previous_weight * earlier[-1].detach().log_softmax(-1).to(logits.dtype)

    def _confidence(self, v: Tensor) -> Tensor:
        with without_autocast(v.device.type):
            wide = torch.promote_types(v.dtype, torch.float32)
            return F.linear(v.to(wide), self.confidence.weight.to(wide), self.confidence.bias.to(wide))[:, 0]

    def parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The first layers of `features`, which neither learn nor draw random numbers, and the other layers."""
        layers = list(self.features) if type(self.features) is nn.Sequential else [self.features]
        n = next((n for n, layer in enumerate(layers) if not isinstance(layer, NOTHING_TO_LEARN)), len(layers))
        return layers[:n], layers[n:]


# ---------------------------------------------------------------------------------------------------- ways to make v


class _MeanPool(nn.Module):
    """Global average pool."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


_POOLS = (_MeanPool, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d)
NOTHING_TO_LEARN = (*_POOLS, nn.Flatten, nn.Identity)


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


HEADS.update(
    {
        "plain": lambda channels, height, width: nn.Flatten(),
        "pool": lambda channels, height, width: _MeanPool(),
        "bnpool": _bnpool,
        **{f"conv{n}": _conv(n) for n in (1, 2, 3)},
    }
)


def feature_factory(kind: str) -> FeatureFactory:
    """What makes the layers before v, of a name of `HEADS` or convN."""
    factory: FeatureFactory = HEADS[kind] if kind in HEADS else _conv(int(kind.removeprefix("conv")))
    return factory


@checked
def register_head(name: str) -> Callable[[FeatureFactory], FeatureFactory]:
    """Add a head of your own, which can then be named wherever a head is named.

    Args:
        name: the new head's name.

    Returns:
        A decorator for a function or class `(channels, height, width) -> nn.Module` whose module maps a feature map
        (b, c, h, w) to a feature vector (b, F). ptee puts two linear layers behind it: one gives the class logits, one the confidence.

    Raises:
        PteeError: if the name is taken, or ends in +.

    >>> @register_head("maxpool")
    ... def maxpool(channels, height, width):
    ...     return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    """

    def add(factory: FeatureFactory) -> FeatureFactory:
        _require_free(name, factory)
        HEADS[name] = factory
        return factory

    return add


def _require_free(name: str, factory: FeatureFactory) -> None:
    if name.endswith(PLUS):
        raise PteeError(
            f"The head name {name!r} ends in {PLUS}, which marks a head that builds on the exit before. Register it as "
            f"{name.rstrip(PLUS)!r}; any head can then be named with a {PLUS}."
        )
    reserved = name in (AUTO, FRONT) or re.fullmatch(rf"conv\d+|{RESIDUAL_NAME}", name)
    if reserved or (name in HEADS and not same_definition(HEADS[name], factory)):
        raise PteeError(f"The head name {name!r} is taken. Register yours under another name.")


# ---------------------------------------------------------------------------------------------------- what is checked


def vector_length(name: str, features: nn.Module, layout: Layout) -> int:
    """F, found by a trial on random numbers that leaves the layers as they were.

    Refuses layers that do not give one vector for each row, overwrite their input, or mix rows; `name` is for messages.
    """
    shape = (2, layout.channels, layout.height, layout.width)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    rows[1] *= 2  # so that the statistics of both rows together are those of neither
    rows = rows.to(next((p.device for p in features.parameters()), rows.device))
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False), own_random_numbers(wait=False):
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
    """(b, F) of these rows. Refuses a head that gives something else, or overwrites them."""
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
