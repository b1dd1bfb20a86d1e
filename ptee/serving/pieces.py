"""A model as a server runs it: pieces that take rows of many callers. From a run, or from what `ptee export` wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptee._common.text import type_name
from ptee.deploy.arrays import Array, as_numpy
from ptee.deploy.manifest import Manifest
from ptee.deploy.runner import Runner, load_exported

Where = tuple[tuple[int, int], ...]  # for each tensor the axis of its rows, and how many entries belong to a row
IMAGES: Where = ((0, 1),)


@dataclass(frozen=True)
class About:
    """What a caller must know of a model.

    Attributes:
        backbone: its name.
        input_size: (c, h, w) of an image.
        mean: of the pixels of each channel, in 0..1.
        std: the same.
        interpolation: by which pictures are resized.
        dtype: of the images that the pieces take, such as "float32".
        classes: K.
        class_names: in the order of the logits; empty if they are not known.
        exits: the names of the E exits.
        pixels_known: somebody gave mean and std; else pictures cannot be prepared.
    """

    backbone: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    dtype: str
    classes: int
    class_names: tuple[str, ...]
    exits: tuple[str, ...]
    pixels_known: bool = True

    def described(self) -> dict[str, Any]:
        """For a caller: what nobody knows is None."""
        not_known = {} if self.pixels_known else dict.fromkeys(("mean", "std", "interpolation"))
        return asdict(self) | not_known


class Step(NamedTuple):
    """A piece.

    Attributes:
        run: takes what is alive; gives (what is alive behind ..., logits (b, K), h (b,)), the last piece (the backbone's answer, the
            blended answer).
        exit: the exit at its end; of the last piece E, the end of the backbone.
        rows: where the rows lie in each tensor that is alive behind it.
    """

    run: Callable[..., Sequence[Array]]
    exit: int
    rows: Where


@dataclass(frozen=True)
class Pieces:
    """All that answers rows, as it was when this was made. A change of `off`, `confidence` or `answers` makes another one.

    Attributes:
        about: the model.
        steps: in order.
        costs: (E + 1,) of a row that leaves at each exit, as fractions of the bare backbone.
        off: exits at which nobody leaves.
        confidence: the name of what h is computed from.
        answers: "own" or "blended".
        given: makes what the first piece takes of (b, c, h, w) float32.
    """

    about: About
    steps: tuple[Step, ...]
    costs: tuple[float, ...]
    off: tuple[int, ...]
    confidence: str
    answers: str
    given: Callable[[np.ndarray], Array]

    def leaving(self, step: Step, h: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """(b,) whether rows leave behind a piece: h >= T. One with a confidence of NaN does not."""
        if step.exit in self.off:
            return np.zeros(len(h), dtype=bool)
        found: np.ndarray = h.astype(np.float64) >= limits[:, step.exit]
        return found

    def possible(self, limits: np.ndarray) -> np.ndarray:
        """(b,) whether any exit could take a row: the others get the backbone's own answer, bit for bit."""
        exits = [step.exit for step in self.steps[:-1] if step.exit not in self.off]
        found: np.ndarray = np.any(limits[:, exits] <= 1, axis=1)
        return found


def pieces_of_runner(runner: Runner) -> Pieces:
    """The pieces of an exported model."""
    m = runner.manifest
    steps = [Step(run, end, piece.rows) for piece, end, run in zip(m.pieces, m.ends, runner.pieces, strict=True)]
    return Pieces(about_manifest(m), tuple(steps), m.costs, m.off, m.confidence, m.answers, given_to(m, runner.device))


def about_manifest(m: Manifest) -> About:
    """What a manifest says of its model."""
    return About(
        m.backbone, m.input_size, m.mean, m.std, m.interpolation, m.dtype, m.classes, m.class_names, m.exits, m.pixels_known
    )  # fmt: skip


def given_to(m: Manifest, device: str) -> Callable[[np.ndarray], Array]:
    """What makes the first piece's input of images (b, c, h, w) float32."""
    if m.format == "onnx":
        return lambda x: x.astype(m.dtype)
    return _tensors(m.dtype, device)


def pieces_of_model(model: Any) -> Pieces:
    """The pieces of an early-exit model, as it is set now. They share its weights.

    Raises:
        PteeError: if it cannot be taken apart.
    """
    from ptee.analysis.freezing import one_parameter
    from ptee.deploy.check import check_segments
    from ptee.deploy.export import AnsweringPiece, class_names_of
    from ptee.deploy.segments import segments
    from ptee.model.early_exit import require_early_exit

    require_early_exit(model)
    found = segments(model, keep_logits=model.rule.reads_earlier)
    check_segments(model, found)
    like, images = one_parameter(model.backbone), model.origin.input
    dtype = type_name(like.dtype)
    about = About(
        model.plan.backbone, tuple(model.plan.input_size), tuple(images.mean), tuple(images.std), images.interpolation,
        dtype, model.num_classes, tuple(class_names_of(model)), tuple(e.name for e in model.exits), model.origin.pixels_known,
    )  # fmt: skip
    steps, answers = [], model.answer_type(like.new_zeros(1, *model.plan.input_size))
    for before, piece in zip([None, *found], found, strict=False):
        run = _without_gradients(AnsweringPiece(piece, before, model.rule, answers).eval())
        exit = piece.exit if piece.exit >= 0 else len(model.exits)
        steps.append(Step(run, exit, tuple((where.axis, where.each) for where in piece.rows)))
    costs, given = tuple(model.costs), _tensors(dtype, str(like.device))
    return Pieces(about, tuple(steps), costs, tuple(model.off), model.confidence, model.answers, given)


def _without_gradients(module: Callable[..., Sequence[Array]]) -> Callable[..., Sequence[Array]]:
    import torch

    def run(*alive: Array) -> Sequence[Array]:
        with torch.no_grad():
            return module(*alive)

    return run


def _tensors(dtype: str, device: str) -> Callable[[np.ndarray], Array]:
    import torch

    kind = getattr(torch, dtype)
    return lambda x: torch.from_numpy(x).to(device, kind)


def part_of(t: Array, first: int, last: int, where: tuple[int, int]) -> Array:
    """A view of some neighbouring rows of an array."""
    axis, each = where
    index = (slice(None),) * axis + (slice(first * each, last * each),)
    return t[index]


def in_host_memory(t: Array) -> np.ndarray:
    """(b, ...) float32 on the host."""
    return as_numpy(t).astype(np.float32)


def to_host(t: Array) -> Array:
    """For another process: an array of numpy, or a tensor on the CPU where numpy has no such numbers."""
    if isinstance(t, np.ndarray):
        return t
    try:
        return t.cpu().numpy()
    except TypeError:  # bfloat16
        return t.cpu()


@dataclass(frozen=True)
class Source:
    """Where every replica finds the model, and how it collects rows.

    Attributes:
        run: a run or an exported model; each node must see it under this name.
        exported: which of the two.
        device: where pieces run.
        weights: of the backbone, if they were moved.
        max_batch: the largest batch.
        max_wait_s: how long a row may wait behind an exit for others.
        max_queue: images that may be there at once.
        bare: the backbone alone, with all exits off.
    """

    run: str
    exported: bool
    device: str
    weights: Path | None
    max_batch: int
    max_wait_s: float
    max_queue: int
    bare: bool = False

    def pieces(self) -> tuple[Pieces, list[float]]:
        """Those of the model, and its thresholds."""
        if self.exported:
            runner = load_exported(self.run, self.device, threads=1)
            return pieces_of_runner(runner), runner.threshold
        import torch

        from ptee.model.build import load_moved

        torch.set_num_threads(1)
        model = load_moved(self.run, self.weights).to(self.device)
        if self.bare:
            model.answers, model.off = "own", range(len(model.exits))
        return pieces_of_model(model), model.threshold
