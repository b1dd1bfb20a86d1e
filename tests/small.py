"""Small models that several test files try things on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from device import here, seeded
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import ptee
from ptee._common.process import own_random_numbers
from ptee.backbones.load import load_backbone
from ptee.exits.blend import Blend, subsets
from ptee.model.build import build
from ptee.model.forward import AllExits, ExitOutput

SIZE, K = (3, 8, 8), 4
EXITS, HEADS = ["layer1.0", "layer2.0", "layer3.0"], ("res-8x1-16x1", "conv1", "res-16x1s1+")


def once(make: Callable[..., ptee.EarlyExitModel]) -> Callable[..., ptee.EarlyExitModel]:
    """Of a function that makes models: each is made once, from the same random numbers, and handed out as copies.

    A copy takes a tenth of the time; a survey, a check of the cuts and a count stand before every model.
    """

    @functools.cache
    def original(device: torch.device, *args: object, **wish: object) -> ptee.EarlyExitModel:
        with own_random_numbers(0):
            return make(*args, **wish)

    @functools.wraps(make)
    def copied(*args: object, **wish: object) -> ptee.EarlyExitModel:
        return copy.deepcopy(original(here(), *args, **wish))

    return copied


@once
def made(head: str = "pool") -> ptee.EarlyExitModel:
    """A small model whose heads differ from row to row."""
    stages = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = ptee.augment(nn.Sequential(*stages, nn.Linear(6, K)), exits=["0", "2"], head=head, input_size=SIZE)
    with torch.no_grad():
        for p in model.heads.parameters():
            p += torch.randn_like(p)
    return model


def blend_for(exits: int, **how: bool) -> Blend:
    """Other weights for each exit and each choice of exits before it."""
    keys = [(n, before) for n in range(exits + 1) for before in subsets(n)]
    return Blend({(n, m): tuple(0.3 + 0.1 * k + 0.2 * n for k in range(len(m) + 1)) for n, m in keys}, **how)


def blended(**how: bool) -> ptee.EarlyExitModel:
    """A small model of blended answers."""
    model = made()
    model.confidence, model.blend = "max_prob", blend_for(len(model.exits), **how)
    model.answers = "blended"
    return model


class OwnLoader:
    """A loader that is not torch's."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int) -> None:
        self.parts = list(zip(x.split(batch_size), y.split(batch_size), strict=True))

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.parts)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Images one after another, without a length."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.items = list(zip(x, y, strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.items)


class Normalises(nn.Module):
    """A network that writes into its images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.sub_(0.45).div_(0.25)).mean((2, 3)))


def labelled(n: int) -> tuple[Tensor, Tensor]:
    """Images for it, always the same, and labels."""
    generator = seeded(4)
    return torch.randn(n, *SIZE, generator=generator), torch.randint(K, (n,), generator=generator)


@once
def chained(head: str | tuple[str, ...] = HEADS) -> ptee.EarlyExitModel:
    """A model for images of (3, 32, 32) whose last head builds on the one before."""
    model = build(load_backbone("cifar_resnet8", pretrained=False), exits=EXITS, head=head)
    with torch.no_grad():
        model.heads[2].previous_weight.fill_(0.7)
    return model


def leaving_everywhere(model: ptee.EarlyExitModel, x: Tensor) -> tuple[AllExits, ExitOutput]:
    """What all exits say of 24 images, and where they leave; at each exit the six surest of those that are left."""
    every = model.all_exits(x)
    left, thresholds = torch.arange(len(x)), []
    for h in every.confidence[:-1]:
        surest = h[left].sort(descending=True)
        thresholds.append(surest.values[5:7].mean().item())
        left = left[surest.indices[6:]]
    model.threshold = thresholds
    together = model.predict(x)
    assert set(together.exit_index.tolist()) == set(range(len(model.exits) + 1))
    return every, together
