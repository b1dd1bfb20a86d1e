"""An exported model on images: accuracy, fidelity and cost, by the files of the folder alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import Argument, DataError
from ptee._common.progress import with_bar
from ptee._common.text import Readable, number_of, or_dash, percent, table
from ptee.backbones.library import InputConfig
from ptee.backbones.load import Backbone
from ptee.data.batches import UNKNOWN_LABEL, batches, numbered, split_batch
from ptee.data.labels import describe_labels
from ptee.data.pictures import all_broken_named
from ptee.data.splits import images_to_report_on
from ptee.deploy.runner import Runner, load_exported
from ptee.exits.config import NEVER
from ptee.model.images import require_answers
from ptee.pipeline.images import open_images

IN_INT8 = "\nThe backbone is that of these files, in int8. ptee export compared with the one in float32, so its fidelity is another number."


@dataclass(frozen=True)
class ExportedResults(Readable):
    """What an exported model answers. Prints as a table.

    Attributes:
        backbone: its name.
        samples: number of images.
        threshold: T of each exit.
        backbone_accuracy: of the backbone alone; None without labels.
        accuracy: at these thresholds.
        fidelity: share of the answers that are the backbone's.
        cost: mean, of the backbone's multiply-accumulates.
        leaving: share of the images that leaves at each exit, and at the end.
        about: which images, in a sentence.
        int8: the files are in whole numbers, and so is the backbone that fidelity is a share of.
    """

    backbone: str
    samples: int
    threshold: list[float]
    backbone_accuracy: float | None
    accuracy: float | None
    fidelity: float
    cost: float
    leaving: list[float]
    about: str
    int8: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @property
    def legend(self) -> str:
        """What the columns mean, a line each."""
        return (
            "accuracy: share of the answers that are the label; fidelity: that are the backbone's.\n"
            "cost: mean multiply-accumulates of an image, heads included, divided by the bare backbone's."
        )

    def __str__(self) -> str:
        rows = [
            ("", "accuracy", "fidelity", "cost"),
            ("backbone", or_dash(self.backbone_accuracy, ".4f"), "1.0000", "1.0000"),
            ("early exit", or_dash(self.accuracy, ".4f"), f"{self.fidelity:.4f}", f"{self.cost:.4f}"),
        ]
        leaving = ", ".join(f"exit {n} {percent(share)}" for n, share in enumerate(self.leaving[:-1]))
        return (
            f"{self.backbone}, exported, {number_of(self.samples, 'image')}; cost in multiply-accumulates\n\n{table(rows, left={0})}\n\n"
            f"Leaving at {leaving}; at the end {percent(self.leaving[-1])}." + IN_INT8 * self.int8
        )


class _AsModule(nn.Module):
    """The backbone of an exported model: no image leaves early."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.runner = runner

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, K) of images (b, c, h, w)."""
        return torch.as_tensor(self.runner.predict(_given(self.runner, x), NEVER).logits, device=x.device)


def _given(runner: Runner, x: Tensor) -> Any:
    """Images as the runner takes them."""
    return runner.from_host(x.float().cpu().numpy())


def _tensor(answer: Any) -> Tensor:
    """An array of either kind, on the CPU."""
    return torch.as_tensor(answer, device="cpu")


NOT_KNOWN = "Which images chose the thresholds is not known of an exported model: on those, it looks better than it is."


def evaluate_exported(
    folder: str,
    *,
    data: str | None,
    data_root: Path | None = None,
    classes: Path | None = None,
    device: Any = None,
    threshold: Any = None,
    batch_size: int = 128,
    num_workers: int = 0,
    word: Callable[[Argument], str] = str,
) -> ExportedResults:
    """Measure an exported model on images.

    Args:
        folder: what `ptee export` wrote.
        data: a folder of images, or the name of a data set.
        data_root: the folder of a data set of torchvision.
        classes: a file that names the classes in the order of the backbone.
        device: where it runs.
        threshold: one number, or one for each exit; None: those of the manifest.
        batch_size: images in a batch.
        num_workers: processes that load images.
        word: says how to call an argument.

    Raises:
        PteeError: if the folder or the images cannot be used.
    """
    if data is None:
        text = f"{folder} is an exported model, and it does not say which images it was made with. Give some: "
        raise DataError(text, Argument("data", "FOLDER"), ".", argument="data")
    runner = load_exported(folder, str(device))
    if threshold is not None:
        runner.threshold = threshold if len(threshold) > 1 else threshold[0]
    images, words, labels = images_for(runner, folder, data, data_root, classes)
    loader = batches(images, batch_size=batch_size, shuffle=False, num_workers=num_workers)
    with all_broken_named([images]):
        *parts, unanswered = [torch.cat(part) for part in zip(*_answered(runner, loader), strict=True)]
    require_answers(unanswered, images)
    return _results(runner, parts, f"{words} {describe_labels(labels, word)} {NOT_KNOWN}")


def images_for(
    runner: Runner, folder: str, data: str, data_root: Path | None, classes: Path | None
) -> tuple[Any, str, Any]:
    """Images to report on for an exported model; which they are, in a sentence; and how their labels were found."""
    runner.require_pixels_known()
    m = runner.manifest
    view = InputConfig(m.input_size, m.mean, m.std, m.interpolation)
    backbone = Backbone(_AsModule(runner), m.backbone, m.classes, view)
    how: dict[str, Any] = {"check": True, "device": "cpu", "report_only": True}
    found, labels = open_images(data, backbone, seed=0, root=data_root, classes=classes, trained=m.class_names, **how)
    return *images_to_report_on(found, {}, folder), labels


def _answered(runner: Runner, loader: Any) -> Iterator[tuple[Tensor, ...]]:
    """For each batch the labels (-1 for none), the backbone's answers, own answers, exits, costs, and whether the backbone has no answer."""
    for batch in with_bar(loader, "answering", True):
        images, labels = split_batch(batch)
        x = _given(runner, images)
        out, bare = runner.predict(x), runner.predict(x, NEVER)
        answers = (_tensor(each.logits).float().argmax(1) for each in (bare, out))
        unanswered = _tensor(bare.logits).isnan().any(1)
        yield numbered(labels, images), *answers, _tensor(out.exit_index), _tensor(out.cost).double(), unanswered


def _results(runner: Runner, parts: list[Tensor], about: str) -> ExportedResults:
    labels, bare, own, exits, cost = parts
    known = not bool((labels == UNKNOWN_LABEL).any())

    def share(right: Tensor) -> float:
        return right.double().mean().item()

    leaving = torch.bincount(exits, minlength=len(runner.manifest.exits) + 1) / len(exits)
    return ExportedResults(
        runner.manifest.backbone,
        len(labels),
        runner.threshold,
        share(bare == labels) if known else None,
        share(own == labels) if known else None,
        share(own == bare),
        cost.mean().item(),
        leaving.tolist(),
        about,
        runner.manifest.int8 is not None,
    )
