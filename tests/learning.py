"""A small network, data for it, and short trainings, for the tests of training."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from device import here, seeded
from small import once
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import ptee
from ptee._common import errors
from ptee.data.batches import SAMPLED_MARKS
from ptee.training.history import History
from ptee.training.training_data import SAMPLES

SIZE, K, N = (3, 16, 16), 4, 48
EXITS = ["one", "two"]


class Net(nn.Module):
    """A user's network with what training could disturb: batch norm and dropout."""

    def __init__(self, num_classes: int = K) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Conv2d(6, 8, 3, 2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.two(self.one(x)).mean((2, 3))))


@once
def made(head: str = "conv1", seed: int = 0) -> ptee.EarlyExitModel:
    """The same backbone each time; the heads begin as `seed` says."""
    return on(Net(), head, seed)


def on(net: nn.Module, head: str = "conv1", seed: int = 0) -> ptee.EarlyExitModel:
    torch.manual_seed(seed)
    model = ptee.augment(net, exits=EXITS, head=head, input_size=SIZE)
    with torch.no_grad():
        for p in model.heads.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


@functools.cache
def images() -> Tensor:
    noise = torch.randn(N, *SIZE, generator=seeded(5))
    return noise * torch.linspace(0.3, 3, N)[:, None, None, None]


def labels() -> Tensor:
    return torch.arange(N) % K


def data() -> TensorDataset:
    return TensorDataset(images(), labels())


def fit(model: ptee.EarlyExitModel, train_data: Any = None, *more: Any, **settings: Any) -> History:
    """A short joint training in float32, without augmentation, cache and the warning of a collapse; after Ctrl-C the epochs until then."""
    plain = {"loss": "joint", "epochs": 3, "batch_size": 16, "lr": 1e-2, "views": 1, "shift": 0, "cache": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        settings = plain | {"precision": "no", "device": here()} | settings
        try:
            return ptee.train(model, data() if train_data is None else train_data, *more, **settings)
        except errors.Interrupted as why:
            return why.history


def heads(model: ptee.EarlyExitModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.heads.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


class Interrupted(Dataset[Any]):
    """The data, until an error is raised after training has read so many items."""

    def __init__(self, items: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = items + 2 * SAMPLES + min(SAMPLED_MARKS, N), error  # some are read before

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return images()[index], labels()[index]


def stubborn() -> TensorDataset:
    """Images on which training makes the loss rise sooner or later."""
    generator = seeded(6)
    return TensorDataset(torch.randn(32, *SIZE, generator=generator), torch.randint(K, (32,), generator=generator))


def stopping(model: ptee.EarlyExitModel, train_data: Any = None, **settings: Any) -> History:
    return fit(model, train_data, stubborn(), **{"epochs": 30, "lr": 0.1, "patience": 3} | settings)
