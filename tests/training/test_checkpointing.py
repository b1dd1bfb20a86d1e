"""Gradient checkpointing that was left on: heads learn all the same, as the backbone needs no gradients."""

from __future__ import annotations

import pytest
import timm
import torch
from device import here, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import ptee
from ptee._common.errors import PteeError

SIZE = (3, 16, 16)
pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch's, of reentrant checkpoints


class Checkpointed(nn.Module):
    """A network whose blocks are run again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.fc, self.reentrant = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5), reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(inplace=True)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.fc(x.mean((2, 3)))


def model_and_twin(reentrant: bool) -> tuple[ptee.EarlyExitModel, ptee.EarlyExitModel]:
    """The same model with checkpointing and without."""
    models = []
    for kind in (reentrant, None):
        torch.manual_seed(0)
        models.append(ptee.augment(Checkpointed(kind), exits=["blocks.0", "blocks.1"], head="conv1", input_size=SIZE))
    return models[0], models[1]


each_kind = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
x = torch.randn(8, *SIZE, generator=seeded(0))
y = torch.arange(8) % 5


@each_kind
@pytest.mark.parametrize("cache", [False, True])
def test_heads_learn_what_they_would_without(reentrant, cache):
    pair = model_and_twin(reentrant)
    for model in pair:
        ptee.train(model, TensorDataset(x, y), epochs=2, batch_size=4, cache=cache, precision="no", device=here())
    one, other = (model.heads.state_dict() for model in pair)
    assert all(torch.equal(one[key], other[key]) for key in one)


@each_kind
def test_rows_leave_and_costs_are_counted_as_without(reentrant):
    model, twin = model_and_twin(reentrant)
    assert model.costs == twin.costs
    walls = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 2.0]]).repeat(3, 1)[:8]
    for threshold in (2.0, 0.0, walls):
        out, expected = model.predict(x, threshold), twin.predict(x, threshold)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_gradients_of_images_are_those_without_or_are_refused_where_they_would_be_cut_off():
    found = []
    for model in model_and_twin(False):
        images = x.clone().requires_grad_()
        every = model.all_exits(images)
        (every.logits.sum() + every.confidence.sum()).backward()
        found.append(images.grad)
    assert torch.equal(*found)
    with pytest.raises(PteeError, match=r"Gradients of the images do not reach exit 0 \(blocks.0\).*reentrant"):
        model_and_twin(True)[0].all_exits(x.clone().requires_grad_())


def test_heads_learn_while_the_backbone_keeps_no_gradients():
    model, _ = model_and_twin(False)
    model.all_exits(x).logits.sum().backward()
    assert all(p.grad is not None for head in model.heads for p in head.logits.parameters())
    assert not any(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv2_100"])
def test_timms_networks_with_checkpointing_on_can_be_trained_for(name):
    net = timm.create_model(name, num_classes=5, **({"img_size": 32} if name.startswith("vit") else {}))
    net.set_grad_checkpointing(True)
    model = ptee.augment(net, num_exits=2, input_size=(3, 32, 32))
    assert ptee.train(model, TensorDataset(torch.randn(4, 3, 32, 32), y[:4]), epochs=1).epochs
