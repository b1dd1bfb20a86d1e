"""Fake runs of heavy networks: the survey finds the same without values, and the network stays as it was."""

from __future__ import annotations

import logging
import random

import numpy as np
import pytest
import timm
import torch
from awkward import SIZE, Applying, Net
from cases import slow
from torch import Tensor, nn

from ptee._common.errors import BackboneError
from ptee.analysis import fake_run
from ptee.analysis.classifier import logits_of
from ptee.analysis.cut_points import survey
from ptee.analysis.fake_run import with_fake_tensors


@pytest.fixture
def heavy(monkeypatch):
    """Every network counts as heavy."""
    monkeypatch.setattr(fake_run, "HEAVY", 0)


@pytest.mark.usefixtures("heavy")
@pytest.mark.parametrize("work", ["a survey", "operators"])
def test_torch_logs_nothing_where_a_fake_run_fails(work):
    net, records = Net(Applying(lambda y: y + torch.zeros(3, 8, 1, 1))).eval(), []
    listening = logging.Handler()
    listening.emit = records.append
    logging.getLogger("torch._subclasses.fake_tensor").addHandler(listening)
    try:
        if work == "operators":
            assert fake_run.operators_run(net, SIZE, [3, 2]) == [[], []]
        else:
            with pytest.raises(BackboneError):
                with_fake_tensors(logits_of, net, torch.zeros(2, *SIZE))
    finally:
        logging.getLogger("torch._subclasses.fake_tensor").removeHandler(listening)
    assert not records


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s", "pit_ti_224", slow("hrnet_w18_small")])
def test_a_survey_finds_the_same_in_a_fake_run(name, monkeypatch):
    net = timm.create_model(name).eval()
    size = net.pretrained_cfg["input_size"]
    real = survey(net, size)
    monkeypatch.setattr(fake_run, "HEAVY", 0)
    assert survey(net, size) == real


class Keeping(nn.Module):
    """Keeps its output for the next call, as caches of position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 2), None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.layer(x.mean((2, 3)))
        return self.kept


def test_no_fake_tensor_stays_in_the_network(heavy):
    net = Keeping().eval()
    shapes = with_fake_tensors(lambda network, x: network(x).shape, net, torch.zeros(3, 4, 8, 8))
    assert shapes == (3, 2)
    assert net.kept is None


class Looking(nn.Module):
    """Decides by values, which fake tensors do not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


class Locked(nn.Identity):
    """Cannot be copied."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("no copies")


@pytest.mark.parametrize("net", [Looking(), Locked()], ids=["decides by values", "cannot be copied"])
def test_a_network_that_allows_no_fake_run_is_run_itself(net, heavy):
    x = torch.ones(1, 1, 2, 2)
    assert with_fake_tensors(lambda network, images: type(network(images)), net, x) is Tensor


def test_a_light_network_is_run_itself():
    net = nn.Conv2d(3, 4, 1)
    assert with_fake_tensors(lambda network, images: network, net, torch.zeros(1, 3, 8, 8)) is net


class Noisy(nn.Module):
    """Draws noise and multiplies it by `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.part, self.head, self.scale = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        return self.head((x + self.scale * torch.randn_like(x)).mean((2, 3)))


def test_whether_random_numbers_matter_is_told_by_values_also_of_a_heavy_network(heavy):
    assert "part" in survey(Noisy(0.0).eval(), (3, 8, 8)).cuts
    with pytest.raises(BackboneError, match="random in eval mode"):
        survey(Noisy(1.0).eval(), (3, 8, 8))


# ---------------------------------------------------------------------------------------------------- numbers of Python and NumPy


RANDOM = {
    "a block left out": ("random", lambda x: x if random.random() > 1e-6 else -x),
    "one of two": ("random", lambda x: random.choice([x, -x])),
    "noise": ("random", lambda x: x + random.gauss(0, 1e-6)),
    "a block left out by NumPy": (r"numpy\.random", lambda x: x if np.random.rand() > 1e-6 else -x),
    "noise of NumPy": (r"numpy\.random", lambda x: x + torch.from_numpy(np.random.randn(8, 1, 1)).to(x) * 1e-6),
}


@pytest.mark.parametrize("case", RANDOM)
def test_a_network_that_is_random_by_python_or_numpy_is_refused_with_the_module_that_is(case, heavy):
    library, function = RANDOM[case]
    with pytest.raises(BackboneError, match=rf"Net is random in eval mode: 'part' draws random numbers \({library}\)"):
        survey(Net(Applying(function)), SIZE)


def seeded(x: Tensor) -> Tensor:
    random.seed(0)
    np.random.seed(0)
    return x * random.random() * np.random.rand()


CERTAIN = {
    "seeded at each call": seeded,
    "times 0": lambda x: x + 0 * random.random() + 0 * np.random.randn(),
    "a number that nothing reads": lambda x: (random.random(), x)[1],
}


@pytest.mark.parametrize("case", CERTAIN)
def test_a_network_that_draws_numbers_of_python_or_numpy_on_which_no_answer_depends_is_accepted(case):
    assert "part" in survey(Net(Applying(CERTAIN[case])), SIZE).cuts


def test_the_users_numbers_of_python_and_numpy_go_on_as_after_one_pass():
    net, drawn = Net(Applying(CERTAIN["times 0"])), []
    for work in (lambda: net(torch.zeros(3, *SIZE)), lambda: survey(net, SIZE)):
        random.seed(1)
        np.random.seed(1)
        work()
        drawn.append((random.random(), np.random.randn()))
    assert drawn[0] == drawn[1]
