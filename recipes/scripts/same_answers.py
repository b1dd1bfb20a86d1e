"""Do all ways to run a trained model give the same answers to its images? `predict`, `ptee.optimize`, and both formats of `ptee export`.

    python recipes/scripts/same_answers.py runs/r50 --data FOLDER

With `--time` each is timed, too, in turns with the bare backbone. ONNX Runtime takes all cores that it may use: `taskset -c 0` gives
all of them one.

Prints a line for each way, and ends with status 1 if a row leaves elsewhere or a logit is off by more than 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import ptee
from ptee._common.clock import in_turns, ratio
from ptee._common.text import table
from ptee.data.batches import batches, split_batch
from ptee.pipeline.saved_run import open_run

ALLOWED = 1e-4  # of a logit
TIMED = 256  # images
Ways = Mapping[str, Callable[[Tensor], Any]]


def images(run: str, data: str | None, number: int) -> tuple[ptee.EarlyExitModel, Tensor, Tensor | None]:
    """The model of a run, and some of the images that nothing was chosen on, spread over all of them, with their labels."""
    opened = open_run(run, data=data)
    found, _ = opened.left_by_tuning(given=data is not None)
    step = max(1, len(found) // number)
    chosen: Any = torch.utils.data.Subset(found, range(0, len(found), step))
    parts = [split_batch(part) for part in islice(batches(chosen, batch_size=100, shuffle=False, num_workers=0), 100)]
    x = torch.cat([x for x, _ in parts])[:number]
    labels = [y for _, y in parts if y is not None]
    return opened.model, x, torch.cat(labels)[:number] if labels else None


def ways(model: ptee.EarlyExitModel, folder: Path) -> Ways:
    """What answers images, by name. The first is the model as it is."""
    pt2 = ptee.load_exported(ptee.export(model, folder / "pt2"))
    onnx = ptee.load_exported(ptee.export(model, folder / "onnx", format="onnx"))
    return {
        "predict": model.predict,
        "optimize, eager": ptee.optimize(model, mode="eager").predict,
        "pt2": pt2.predict,
        "onnx": lambda x: onnx.predict(x.numpy()),
    }


@torch.no_grad()
def answers(way: Callable[[Tensor], Any], x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """(n, K) logits and (n,) exits."""
    outs = [way(part) for part in x.split(batch)]
    logits, exits = (torch.cat([torch.as_tensor(out[i]) for out in outs]) for i in (0, 1))
    return logits, exits


def times(model: ptee.EarlyExitModel, every: Ways, x: Tensor) -> dict[str, float]:
    """The time of each way for these images (n, b, c, h, w), divided by that of the bare backbone."""

    def all_of(way: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return lambda: [way(part) for part in x]

    found = in_turns({name: all_of(way) for name, way in {"": model.backbone, **every}.items()}, x.device, seconds=300)
    return {name: ratio(found[name], found[""]) for name in every}


@click.command()
@click.argument("run")
@click.option("--data", default=None, help="The run's own images if left out.")
@click.option("--images", "number", default=1000)
@click.option("--batch-size", default=32)
@click.option("--time", "timed", is_flag=True)
def main(run: str, data: str | None, number: int, batch_size: int, timed: bool) -> None:
    """Compare the answers."""
    model, x, labels = images(run, data, number)
    with tempfile.TemporaryDirectory() as folder:
        every = ways(model, Path(folder))
        found = {name: answers(way, x, batch_size) for name, way in every.items()}
        whole = min(TIMED, len(x)) // batch_size  # batches
        taken = times(model, every, x[: whole * batch_size].unflatten(0, (whole, -1))) if timed else {}
    want, leaves = found["predict"]
    rows, wrong = [("by", "at another exit", "logits off by", "accuracy", "time / bare")], 0
    for name, (logits, exits) in found.items():
        others, off = int((exits != leaves).sum()), (logits - want).abs().max().item()
        accuracy = "-" if labels is None else f"{(logits.argmax(1) == labels).double().mean().item():.4f}"
        time = f"{taken[name]:.3f}" if timed else "-"
        rows.append((name, str(others), f"{off:.1e}", accuracy, time))
        wrong += others or off > ALLOWED
    leaving = torch.bincount(leaves, minlength=len(model.exits) + 1).tolist()
    print(f"{model.plan.backbone}, {len(x)} images; at each exit and the end: {', '.join(map(str, leaving))}")
    print(f"logits up to {want.abs().max().item():.1f}\n\n{table(rows, left={0})}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
