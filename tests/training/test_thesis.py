"""Table 4.1 of EENet's thesis in kind: where the images leave, by loss. EENet-8 from scratch on a small piece of MNIST."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

import ptee
from ptee.backbones.small_networks import EENet8

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Training collapsed")]  # half a minute together


def digits(root: Path, train: bool, n: int) -> TensorDataset:
    """So many digits at half their size, 14x14."""
    from torchvision.datasets import MNIST

    found = MNIST(root, train=train, download=False)
    pictures = F.avg_pool2d(found.data[:n, None].float() / 255, 2)
    return TensorDataset((pictures - 0.1307) / 0.3081, found.targets[:n])


@pytest.fixture
def learn(real_data):
    """Training by a loss, and what then happens at a threshold: (share that leaves at each exit, accuracy)."""

    def learn(loss: str, epochs: int, threshold: float = 0.5, **settings: object) -> tuple[list[float], float]:
        torch.manual_seed(0)
        net = EENet8(filters=8)
        model = ptee.augment(net, exits="quadratic", num_exits=2, head="conv1", input_size=(1, 14, 14))
        how = {"backbone": "joint", "epochs": epochs, "batch_size": 64, "lr": 0.01, "schedule": "cosine", "views": 1}
        ptee.train(model, digits(real_data / "mnist", True, 4000), loss=loss, **how, **settings)
        images, labels = digits(real_data / "mnist", False, 2000).tensors
        out = model.predict(images, threshold)
        return shares(out.exit_index), (out.logits.argmax(-1) == labels).float().mean().item()

    return learn


def shares(index: Tensor) -> list[float]:
    return (torch.bincount(index, minlength=3) / len(index)).tolist()


def test_the_cost_alone_sends_all_to_exit_0(learn):
    assert learn("cost", 1)[0][0] > 0.95


def test_cross_entropy_alone_sends_all_to_the_end_and_with_the_cost_they_spread_at_the_same_accuracy(learn):
    at_the_end, accuracy = learn("mc", 6)
    assert at_the_end[2] > 0.95
    assert accuracy > 0.9
    # after so few steps the exits are too sure of themselves for the thesis's T = .5
    spread, as_accurate = learn("joint_each_exit", 6, 0.95, cost_weight=0.9, cost_unit="parameters")
    assert max(spread) < 0.9
    assert as_accurate > accuracy - 0.01
