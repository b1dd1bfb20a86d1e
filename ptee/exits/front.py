"""The exit at the input: a whole small network in front of the backbone, whose sure answers spare the backbone altogether.

The input is a cut, too: everything depends on it alone, and nothing is spent before it. Its head may be any head; here it is
a classifier with weights of its own, of which nothing is trained but the confidence. A cascade of two networks is this
exit alone. What it computed (logits, the vector that its classifier reads) is there for the heads behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptee._common.errors import BackboneError, CutError, PteeError
from ptee.analysis.arithmetic import keeps_rows_apart
from ptee.analysis.attachment import Hold
from ptee.analysis.classifier import logits_of
from ptee.analysis.cut_points import Cut, random_images
from ptee.analysis.freezing import freeze
from ptee.analysis.layout import Layout
from ptee.backbones.load import OTHERWISE, Backbone, InputConfig, load_backbone
from ptee.exits.heads import AUTO, ExitHead, HeadOutput, PreviousExits

INPUT = "input"  # the exit's name, and that of its cut
FRONT = "front"  # its head's name
LARGEST_SIDE = 2048  # pixels; a network for more is no small one, and a run may come from a stranger
NOT_ITS_OWN = r"\b(num_classes|input_size|model_args)="  # arguments that a front network has not


def input_cut(input_size: tuple[int, int, int]) -> Cut:
    """The images as a cut.

    Args:
        input_size: (c, h, w).
    """
    return Cut(INPUT, input_size, Layout("bchw", *input_size), 0, (0,), overwritten=False)


def beside_input(exits: Any, num_exits: int | None, front: bool, rules: Sequence[str]) -> tuple[bool, Any, int | None]:
    """Whether there is an exit at the input, and what was asked of the others: where, and how many.

    Args:
        exits: as of `make_plan`.
        num_exits: as of `make_plan`; it counts the exit at the input where that is named.
        front: something stands in front of the backbone.
        rules: words of which one behind the input places all others.

    Raises:
        CutError: if the input is named behind another exit, or the number is not that of the exits.
    """
    exits = [INPUT] if isinstance(exits, str) and exits == INPUT else exits
    if not isinstance(exits, Sequence) or isinstance(exits, str) or INPUT not in exits:
        return front, exits, num_exits
    if exits[0] != INPUT:
        raise CutError(f"The exit {INPUT!r} is the first of all. Name it in front of {exits[0]!r}.")
    behind: Any = list(exits[1:])
    if len(behind) == 1 and behind[0] in rules:
        behind = behind[0]
    if not isinstance(num_exits, int):
        return True, behind, num_exits
    if isinstance(behind, list) and num_exits != len(exits):
        raise CutError(f"{len(exits)} exits are named, {num_exits} are asked for. Leave one of the two out.")
    if num_exits < 2 and behind:
        raise CutError(
            f"{INPUT!r} is one exit, and {num_exits} are asked for. Ask for 2 or more, or leave out {behind!r}."
        )
    return True, behind, num_exits - 1


def refuse_namesake(name: str, cuts: Sequence[Cut]) -> None:
    """Refuse a module that is called as the exit at the images.

    Args:
        name: of the backbone.
        cuts: at its modules.

    Raises:
        CutError: if one of them is.
    """
    if any(cut.name == INPUT for cut in cuts):
        raise CutError(
            f"{name} has a module called {INPUT!r}, which is what the exit at the images is called here. "
            "Name the exits, without it."
        )


def front_network(front: FrontHead | str | None) -> FrontHead | None:
    """The front where it is a network of its own, and not "auto" for a learned head.

    Raises:
        PteeError: if it is another word.
    """
    if isinstance(front, str) and front != AUTO:
        raise PteeError(f"The front {front!r} is neither a network nor {AUTO!r}. Load it with load_backbone.")
    return None if isinstance(front, str) else front


def named_front(
    front: str | nn.Module | None,
    behind: Backbone,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FrontHead | str | None:
    """What stands in front of a backbone: the head of a classifier by name or as a module, "auto", or None.

    Args:
        front: a name as of `load_backbone`, a module, "auto" or None.
        behind: the backbone, whose classes it shares.
        weights: for a name: a file of its weights.
        pretrained: for a name: take the library's own weights if no file is given.
        mean: per channel, where its configuration says otherwise.
        std: likewise.

    Raises:
        PteeError: if it cannot be loaded, or answers something else than the backbone.
    """
    if front is None or (isinstance(front, str) and front == AUTO):
        if weights is not None or mean is not None or std is not None:
            raise PteeError(
                "Weights, mean and std of a front network are given, but no such network. Name it, or leave them out."
            )
        return front
    published = isinstance(front, str) and pretrained and weights is None
    says_its_size = isinstance(front, str) or hasattr(front, "pretrained_cfg")
    try:
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
        raise BackboneError(f"The front network: {_with_its_options(str(why))}") from why
    return FrontHead(network, behind.input, behind.num_classes)


def _with_its_options(message: str) -> str:
    """What was said of a backbone's arguments, said of those of the network in front."""
    sentences = re.split(r"(?<=\.) (?=[A-Z])", message.replace(OTHERWISE, "Give a file with weights=FILE."))
    known = [sentence for sentence in sentences if not re.search(NOT_ITS_OWN, sentence)]
    if len(known) < len(sentences):
        known.append("Name another network or file, or give a module of yours from Python.")
    return re.sub(r"\b(weights|mean|std)=", r"front_\1=", " ".join(known))


class FrontHead(ExitHead):
    """A frozen classifier as the head of the exit at the input.

    Its network is always in eval mode and has no gradients, whatever is asked of the heads, until `release`.

    Args:
        network: the classifier.
        images: how the images are prepared, for the backbone; they are prepared anew for this one.
        num_classes: K of the backbone.

    Raises:
        PteeError: if it has other classes, its images have other channels or are very large, or its rows influence one
            another; then the network is left as it was.
    """

    def __init__(self, network: Backbone, images: InputConfig, num_classes: int) -> None:
        require_same_question(f"The front network {network.name}", network, images, num_classes)
        require_small(network.name, network.input.input_size)
        module = network.module
        state = freeze(module)
        try:
            _require_rows_apart(network)
            reader, width = _last_layer(module, network.input.input_size)
            hold = Hold(module, {} if reader is None else {reader: _note_what_is_read})
        finally:
            state.restore(module)
        super().__init__(Layout("bchw", *images.input_size), nn.Identity(), num_classes, num_classes)
        self.logits = nn.Identity()  # the network's own
        self.confidence = nn.Linear(num_classes + width, 1)
        if (like := next(module.parameters(), None)) is not None:
            self.confidence.to(like.device, like.dtype)
        self.network, self.origin = module, network
        self._hold = hold
        self.passes_on = (width, 1, 1) if width else None
        self._prepare = Prepare(images, network.input)

    def requires_grad_(self, requires_grad: bool = True) -> FrontHead:
        """Gradients, but not for the network."""
        super().requires_grad_(requires_grad)
        self.network.requires_grad_(False)
        return self

    def train(self, mode: bool = True) -> FrontHead:
        """Training mode, but for the network."""
        super().train(mode)
        self.network.eval()
        return self

    def release(self) -> None:
        """Give the network back: no hook left, gradients and modes as they were."""
        self._hold.release()

    def read(self, z: Tensor) -> Tensor:
        """(b, K + F): the network's logits, and the vector that its classifier read."""
        self._hold.keep()
        seen: list[Tensor] = []
        token = _READ.set(seen)
        try:
            with torch.no_grad():
                logits = self.network(self._prepare(z))
        finally:
            _READ.reset(token)
        return torch.cat([logits, *seen[-1:]], 1)  # a classifier may be asked twice; the last time counts

    def follow(self, z: Tensor, previous: PreviousExits) -> HeadOutput:
        """Answer images."""
        return self.answer(self.read(z), previous)

    def answer(self, x: Tensor, previous: PreviousExits) -> HeadOutput:
        """Answer from what was read."""
        vector = x[:, self.num_classes :]
        return self._output(x, previous, None if self.passes_on is None else vector[:, :, None, None])

    def _logits(self, v: Tensor, previous: PreviousExits) -> Tensor:
        return v[:, : self.num_classes]

    def _confidence(self, v: Tensor) -> Tensor:
        wide = v.to(torch.promote_types(v.dtype, torch.float32))  # in half precision .995 and .998 would be one number
        sureness = wide[:, : self.num_classes].softmax(-1)  # logits may be large
        return super()._confidence(torch.cat([sureness, wide[:, self.num_classes :]], 1))


def require_same_question(name: str, network: Backbone, images: InputConfig, num_classes: int) -> None:
    """Refuse a network that answers something else than the backbone.

    Args:
        name: of the network, as the message begins.
        network: a classifier.
        images: the backbone's.
        num_classes: the backbone's.

    Raises:
        PteeError: if it has other classes, or its images other channels.
    """
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
    """Refuse a front network for images that are larger than any should be.

    Args:
        name: of the network.
        input_size: (c, h, w) of its images.

    Raises:
        PteeError: saying what is possible.
    """
    if max(input_size[1:]) > LARGEST_SIDE:
        height, width = input_size[1:]
        raise PteeError(
            f"The front network {name} takes images of {height} x {width} pixels; the sides may have {LARGEST_SIDE} at most. "
            "Give one for smaller images: they are resized for it."
        )


_READ: ContextVar[list[Tensor] | None] = ContextVar(
    "what the classifiers of front networks read in this call", default=None
)


def _note_what_is_read(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Stands behind a front network's classifier for good, so that threads do not put up and take down one another's."""
    seen = _READ.get()
    if seen is not None and args:
        seen.append(args[0])


class Prepare(nn.Module):
    """Images prepared for one network as another takes them.

    Args:
        given: how they are prepared.
        wanted: how the network takes them.
    """

    def __init__(self, given: InputConfig, wanted: InputConfig) -> None:
        super().__init__()
        self.size = None if given.input_size == wanted.input_size else wanted.input_size[1:]
        pairs = zip(given.mean, given.std, wanted.mean, wanted.std, strict=True)
        steps = [(std / own_std, (mean - own_mean) / own_std) for mean, std, own_mean, own_std in pairs]
        self.same = all(step == (1.0, 0.0) for step in steps)
        scale, shift = torch.tensor(steps).T[:, :, None, None]
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w)."""
        if not self.same:
            x = x * self.scale + self.shift
        if self.size is None:
            return x
        return F.interpolate(x.float(), self.size, mode="bilinear", antialias=True).to(
            x.dtype
        )  # no half precision there


def _require_rows_apart(network: Backbone) -> None:
    """Refuse a network whose rows influence one another, or which writes into the images that the backbone goes on with."""
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


def _last_layer(module: nn.Module, input_size: tuple[int, int, int]) -> tuple[str | None, int]:
    """The linear layer that gives the logits, and how many numbers it reads; (None, 0) where there is none."""
    made: dict[str, Any] = {}
    handles = [
        part.register_forward_hook(lambda _m, args, out, name=name: made.update({name: (*args[:1], out)}))
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    try:
        with torch.no_grad():
            logits = logits_of(module, random_images(module, 2, input_size))
    finally:
        for handle in handles:
            handle.remove()
    for name, (read, given) in ((name, each) for name, each in made.items() if len(each) == 2):  # else by keyword
        if read.dim() == 2 and given.shape == logits.shape and torch.equal(given, logits):
            return name, read.shape[1]
    return None, 0
