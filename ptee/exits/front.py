"""The front network: a small classifier as the head of the exit at the input.

Rows that it is sure of never reach the backbone. Only its confidence layer is trained. With this exit alone, the model is a
cascade of two networks. Later heads may read its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptee._common.devices import made_on_cpu
from ptee._common.errors import BackboneError, PteeError
from ptee.analysis.arithmetic import keeps_rows_apart
from ptee.analysis.classifier import logits_of
from ptee.analysis.cut_points import random_images
from ptee.analysis.freezing import Attachment, freeze
from ptee.analysis.layout import Layout
from ptee.analysis.verify import buffers_put_back, require_no_drift
from ptee.backbones.library import other_words
from ptee.backbones.load import Backbone, InputConfig, load_backbone
from ptee.backbones.published import front_of
from ptee.exits.confidence import log_odds
from ptee.exits.config import AUTO
from ptee.exits.heads import ExitHead

LARGEST_SIDE = 2048  # pixels; a network for more is no small one, and a run may come from a stranger
# What a caller can give for the network in front; everything else follows from the backbone.
AUTO_TIMM = "auto-timm"
ITS_ARGUMENTS = {"model": "front", "weights": "front_weights", "mean": "front_mean", "std": "front_std"}


def named_front(
    front: str | nn.Module | None,
    behind: Backbone,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> FrontHead | str | None:
    """What stands in front of a backbone: the head of a classifier by name or as a module, "auto", or None.

    "auto-timm" is the classifier that timm's published results advise. A classifier by name gets the backbone's classes. `mean` and `std` (per channel) are for images that its own
    configuration does not describe. Errors name the arguments as a caller knows them: front, front_weights and so on.
    """
    if front is None or (isinstance(front, str) and front == AUTO):
        if weights is not None or mean is not None or std is not None:
            raise PteeError(
                "Weights, mean and std of a front network are given, but no such network. Name it, or leave them out."
            )
        return front
    if isinstance(front, str) and front == AUTO_TIMM:
        front = front_of(behind)
    published = isinstance(front, str) and pretrained and weights is None
    says_its_size = isinstance(front, str) or hasattr(front, "pretrained_cfg")
    try:
        with other_words(ITS_ARGUMENTS):
            network = load_backbone(
                front,
                weights=weights,
                pretrained=published,
                num_classes=None if published else behind.num_classes,
                input_size=None if says_its_size else behind.input.input_size,
                mean=mean,
                std=std,
            )
    except BackboneError as why:
        raise BackboneError("The front network: ", *why.parts, argument=why.argument, value=why.value) from why
    return FrontHead(network, behind.input, behind.num_classes)


class FrontHead(ExitHead):
    """A frozen classifier as the head of the exit at the input.

    Its confidence layer reads the network's class probabilities and the log-odds of the largest one. Until `release`, the
    network is in eval mode and has no gradients, whatever is asked of the heads. A network is refused, and left as it was, if
    it has other classes or channels than the backbone, takes very large images, or if its rows influence one another.

    Args:
        network: the classifier.
        images: how the images are prepared for the backbone; they are converted for this network.
        num_classes: K of the backbone.
    """

    def __init__(self, network: Backbone, images: InputConfig, num_classes: int) -> None:
        require_same_question(f"The front network {network.name}", network, images, num_classes)
        require_small(network.name, network.input.input_size)
        module = network.module
        state = freeze(module)
        try:
            with buffers_put_back(module, network.input.input_size) as buffers:
                _require_rows_apart(network)
                require_no_drift(module, buffers, network.input.input_size)
            hold = Attachment(module, {})
        finally:
            state.restore(module)
        with made_on_cpu():  # as other heads
            super().__init__(Layout("bchw", *images.input_size), nn.Identity(), num_classes, num_classes)
            self.confidence = nn.Linear(num_classes + 1, 1)
            self._prepare = Prepare(images, network.input)
        self.logits = nn.Identity()  # the network's own
        if (like := next(module.parameters(), None)) is not None:
            self.confidence.to(like.device, like.dtype)
            self._prepare.to(like.device, like.dtype)
        self.network, self.origin = module, network
        self._hold = hold

    def requires_grad_(self, requires_grad: bool = True) -> FrontHead:
        """Gradients, but not for the network."""
        super().requires_grad_(requires_grad)
        self.network.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> FrontHead:
        """Training mode, but not for the network."""
        super().train(mode)
        self.network.eval()
        return self

    def release(self) -> None:
        """Give the network back with its own gradients and modes, without hooks."""
        self._hold.release()

    def read(self, z: Tensor) -> Tensor:
        """(b, K): the network's logits for the backbone's images."""
        self._hold.keep()
        with torch.no_grad():
            logits: Tensor = self.network(self._prepare(z))
        return logits

    def _confidence(self, v: Tensor) -> Tensor:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))  # half precision cannot tell .995 from .998
        return super()._confidence(torch.cat([wide.softmax(-1), log_odds(wide)[:, None]], -1))


def require_same_question(name: str, network: Backbone, images: InputConfig, num_classes: int) -> None:
    """Refuse a network that has other classes than the backbone, or takes other channels. The message begins with `name`."""
    if network.num_classes != num_classes:
        raise PteeError(
            f"{name} has {network.num_classes} classes, the backbone {num_classes}. Both must answer the same question: "
            "give one with as many classes, by name with a file of its weights, or as a module."
        )
    if network.input.input_size[0] != images.input_size[0]:
        raise PteeError(
            f"{name} takes images of {network.input.input_size[0]} channels, the backbone {images.input_size[0]}. "
            "Both must take the same images."
        )


def require_small(name: str, input_size: tuple[int, int, int]) -> None:
    """Refuse a front network for images that are larger than any should be."""
    if max(input_size[1:]) > LARGEST_SIDE:
        height, width = input_size[1:]
        raise PteeError(
            f"The front network {name} takes images of {height} x {width} pixels; the sides may have {LARGEST_SIDE} at most. "
            "Give one for smaller images: they are resized for it."
        )


class Prepare(nn.Module):
    """Turns images prepared as `given` into images as a network takes them, `wanted`."""

    def __init__(self, given: InputConfig, wanted: InputConfig) -> None:
        super().__init__()
        self.size = None if given.input_size == wanted.input_size else wanted.input_size[1:]
        pairs = zip(given.mean, given.std, wanted.mean, wanted.std, strict=True)
        steps = [(std / own_std, (mean - own_mean) / own_std) for mean, std, own_mean, own_std in pairs]
        self.same = all(step == (1.0, 0.0) for step in steps)
        scale, shift = torch.tensor(steps, dtype=torch.float32, device="cpu").T[:, :, None, None]
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w), rescaled and resized."""
        if not self.same:
            x = x * self.scale + self.shift
        if self.size is None:
            return x
        return F.interpolate(x.float(), self.size, mode="bilinear", antialias=True).to(x.dtype)  # not in half precision


def _require_rows_apart(network: Backbone) -> None:
    """Refuse a network whose rows influence one another, or which overwrites the images that the backbone reads next."""
    images = random_images(network.module, 2, network.input.input_size)
    given = images.clone()
    with torch.no_grad():
        logits_of(network.module, given)
    if not torch.equal(given, images):
        raise PteeError(f"The front network {network.name} overwrites the images. Let it begin with x = x.clone().")
    if not keeps_rows_apart(network.module, images, logits_of):
        raise PteeError(
            f"The front network {network.name} answers a row differently when it is alone: its rows influence one another, so "
            "none of them can leave early."
        )
