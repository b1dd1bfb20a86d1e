"""The zoo in pieces: the model of every family is exported, and its files answer as it does.

`pytest -m zoo` runs it. `python tests/zoo_exported.py > recipes/exported.txt` prints the table; `python tests/zoo_exported.py onnx
resnet pit` tries two families with ONNX Runtime.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from zoo import EXITS, HEAD, PLACEMENT, Family, classes_of, families, line

from ptee._common.errors import PteeError
from ptee.backbones.load import load_backbone
from ptee.deploy.export import BATCHES, FORMATS, PT2, export
from ptee.deploy.manifest import read_manifest
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel

PIXELS = 96  # the plumbing is the same in small images; a model that does not take them gets its own size
TITLE = ["library", "family", "model", "pixels", "alive", "seconds", "verdict"]
WIDTHS = [11, 25, 33, 6, 9, 7, 0]


@dataclass(frozen=True)
class Verdict:
    """What became of a family.

    Attributes:
        family: which.
        pixels: the side of its images.
        alive: for each exit, how many tensors the next piece takes.
        seconds: of the export, its checks included.
        refusal: why there are no files; empty if there are, and they answer as the model.
    """

    family: Family
    pixels: int = 0
    alive: tuple[int, ...] = ()
    seconds: float = 0.0
    refusal: str = ""

    @property
    def row(self) -> list[str]:
        """What the table says of it."""
        alive = " ".join(map(str, self.alive)) or "-"
        family = [self.family.library, self.family.name, self.family.model]
        return [*family, str(self.pixels or "-"), alive, f"{self.seconds:.0f}", self.refusal or "ok"]


def check(family: Family, format: str = PT2) -> Verdict:
    """Export a family's model. `export` compares batches of 1, 2, 7 and 32 with it."""
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        model = _model(family)
        verdict = Verdict(family, model.plan.input_size[-1])
        with tempfile.TemporaryDirectory() as folder:
            pieces = read_manifest(export(model, Path(folder) / "out", format=format)).pieces
        verdict = replace(verdict, alive=tuple(len(piece.rows) for piece in pieces[:-1]))
    except PteeError as why:
        verdict = Verdict(family, refusal=str(why))
    return replace(verdict, seconds=time.perf_counter() - start)


def _model(family: Family) -> EarlyExitModel:
    """With untrained exits, for small images where it takes them."""
    try:
        return _sized(family, (3, PIXELS, PIXELS))
    except PteeError:
        return _sized(family, family.input_size)


def _sized(family: Family, size: tuple[int, int, int] | None) -> EarlyExitModel:
    name = f"{family.library}/{family.model}"
    backbone = load_backbone(name, pretrained=False, num_classes=classes_of(family), input_size=size)
    return build(backbone, exits=PLACEMENT, num_exits=EXITS, head=HEAD)


def summary(verdicts: Sequence[Verdict], format: str) -> str:
    """How many families of each library are exported."""
    by_library: dict[str, list[bool]] = {}
    for v in verdicts:
        by_library.setdefault(v.family.library, []).append(not v.refusal)
    counts = ", ".join(f"{sum(good)} of {len(good)} of {library}" for library, good in by_library.items())
    sizes = ", ".join(map(str, BATCHES))
    return (
        f"Families that are exported as {format}: {counts}. alive: how many tensors go from each piece to the next. ok: the files "
        f"answer batches of {sizes} as the model does: the same exits, logits within 1e-4."
    )


def main(arguments: Sequence[str]) -> None:
    """Print a table of the families, line by line as they are exported.

    Args:
        arguments: a format, if another than pt2 is wanted, and families as of `zoo.families`.
    """
    format = next((a for a in arguments if a in FORMATS), PT2)
    verdicts = []
    print(line(TITLE, WIDTHS), flush=True)
    for family in families([a for a in arguments if a not in FORMATS]):
        verdicts.append(check(family, format))
        print(line(verdicts[-1].row, WIDTHS), flush=True)
    print(f"\n{summary(verdicts, format)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PteeError as why:
        sys.exit(str(why))
