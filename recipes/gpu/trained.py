"""How fast is a trained run on a GPU, with its own thresholds or with those for each batch size, on its own images? In half precision.

    python recipes/gpu/trained.py runs/r50 --data FOLDER
    python recipes/gpu/trained.py runs/r50 --batch 32 --mode graphs
    python recipes/gpu/trained.py runs/r50 --max-drop 0.005     # thresholds and exits chosen by the seconds of each batch size

It prints the time of `predict` over that of the bare backbone by the same executor, and over the bare backbone as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from speed import BARE, Call, medians
from torch import Tensor, nn

import ptee
from ptee.data.splits import parts_for_tuning
from ptee.pipeline.saved_run import open_run
from ptee.timing.times import read_times

IMAGES = 2048
BATCHES = (1, 32, 128, 512, 2048)


def images(data: Any) -> tuple[Tensor, Tensor]:
    """The first images of a data set (n, c, h, w), and their labels (n,)."""
    pairs = [data[i] for i in range(min(IMAGES, len(data)))]
    x = torch.stack([x for x, _ in pairs]).cuda().half().contiguous(memory_format=torch.channels_last)
    return x, torch.tensor([int(y) for _, y in pairs], device="cuda")


def for_each(call: Any, parts: Sequence[Tensor]) -> Call:
    """The call for all batches."""
    return lambda: [call(part) for part in parts]


def line(mode: str, model: Any, fast: Any, bare: nn.Module, parts: Sequence[Tensor], labels: Tensor) -> str:
    """What is measured at one batch size."""
    own = BARE[mode](bare, parts[0])
    found = medians(
        {"ptee": for_each(fast.predict, parts), "bare": lambda: [own() for _ in parts], "eager": for_each(bare, parts)}
    )
    outs, wants = [fast.predict(part) for part in parts], [model.predict(part) for part in parts]
    others = sum(int((a.exit_index != b.exit_index).sum()) for a, b in zip(outs, wants, strict=True))
    right = torch.cat([out.logits for out in outs]).argmax(-1) == labels[: sum(map(len, parts))]
    return (
        f"{mode:8} {len(parts[0]):5}  counted {torch.cat([out.cost for out in outs]).mean().item():.3f}  over bare "
        f"{found['ptee'] / found['bare']:.3f}  over eager bare {found['ptee'] / found['eager']:.3f}  us an image: ptee "
        f"{found['ptee'] / len(right) * 1e6:.2f} bare {found['bare'] / len(right) * 1e6:.2f}  right "
        f"{right.float().mean().item():.4f}  {others} of {len(right)} rows at another exit"
    )


@click.command()
@click.argument("run")
@click.option("--data", default=None, help="The run's own images if left out.")
@click.option("--weights", default=None, help="Of the backbone, if they are not where they were.")
@click.option(
    "--max-drop", default=None, type=float, help="Choose thresholds for each batch size by the seconds kept in the run."
)
@click.option("--mode", "modes", multiple=True, type=click.Choice([*BARE]), help="May be repeated.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, IMAGES), help="May be repeated.")
def main(
    run: str,
    data: str | None,
    weights: str | None,
    max_drop: float | None,
    modes: Sequence[str],
    batches: Sequence[int],
) -> None:
    """Measure, and print a line for each batch size."""
    opened = open_run(run, data=data, weights=weights and Path(weights))
    parts = parts_for_tuning(opened.unseen)
    x, labels = images(parts.report)
    whole = opened.model.cuda()
    chosen = {}
    for rows in batches or BATCHES if max_drop is not None else ():
        chosen[rows] = ptee.tune(whole, parts.calibration, max_drop=max_drop, times=read_times(Path(run)).at(rows))
    model = copy.deepcopy(whole).half()
    model.backbone.to(memory_format=torch.channels_last)
    bare = copy.deepcopy(model).detach()
    click.echo(f"{run} on {torch.cuda.get_device_name()}")
    with torch.no_grad():
        for mode in modes or ("eager", "graphs"):
            fast = model if mode == "eager" else ptee.optimize(model, max_batch=IMAGES, mode=mode)
            for rows in batches or BATCHES:
                if rows in chosen:
                    model.choose(chosen[rows].threshold, chosen[rows].off, chosen[rows].blend)
                click.echo(f"thresholds {model.threshold}, exits off {list(model.off)}, answers {model.answers}")
                some = [part for part in x.split(rows) if len(part) == rows][: 64 if rows == 1 else 8]
                click.echo(line(mode, model, fast, bare, some, labels))


if __name__ == "__main__":
    main()
