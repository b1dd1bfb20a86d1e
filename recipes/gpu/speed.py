"""How fast are early exits on a GPU? Random weights in half precision, no network, a few minutes.

    python recipes/gpu/speed.py

For each backbone, executor and batch size it prints the time of `predict` over that of the bare backbone by the same executor:
if no image leaves, if half leave at exit 0, if all leave there, and if 60 / 10 / 10 / 20 % leave at exits 0 / 1 / 2 / end.
Compiled, it is only the first and the last, because compiling for one more size of batches takes long. The counted cost is in
parentheses. "pieces" is the time of the pieces alone, one behind the other, if no image leaves. Times are medians, measured in
turns.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn

import ptee
from ptee.model.early_exit import EarlyExitModel
from ptee.timing.measure import by_compile, in_a_graph

CHANNELS_LAST = {"resnet50": True, "vit_base_patch16_224": False, "convnext_base": True, "efficientnet_b0": True}
SIZE = (3, 224, 224)
SHARES: dict[str, tuple[float, ...]] = {  # of the rows that reach each exit, how many leave there
    "never": (),
    "half": (0.5,),
    "all": (1.0,),
    "mix": (0.6, 0.25, 1 / 3),
}
NOBODY, EVERYBODY = 0.9999999, 0.0  # below 1, so that the decision is made and waited for
LONG_ENOUGH = 0.02  # seconds of one measurement
Call = Callable[[], Any]


def early_exits(name: str, exits: int) -> EarlyExitModel:
    """A model with random weights on the GPU."""
    torch.manual_seed(0)
    backbone = timm.create_model(name).eval().cuda()  # planned on the GPU, too: on a CPU that takes long
    model = ptee.augment(backbone, exits="pareto", num_exits=exits, head="pool", input_size=SIZE).half()
    if CHANNELS_LAST.get(name, False):
        model.backbone.to(memory_format=torch.channels_last)
    return model


def noise(name: str, rows: int) -> Tensor:
    """Random images in the memory format of the backbone."""
    x = torch.randn(rows, *SIZE, device="cuda", dtype=torch.half)
    return x.contiguous(memory_format=torch.channels_last) if CHANNELS_LAST.get(name, False) else x


def thresholds(model: EarlyExitModel, x: Tensor, shares: Sequence[float]) -> list[float]:
    """With which these shares of the rows that reach an exit leave there."""
    h = model.all_exits(x).confidence[:-1].double()
    here, chosen = torch.ones(len(x), dtype=torch.bool, device=x.device), []
    for n, row in enumerate(h):
        count = int(here.sum())
        leaving = round(shares[n] * count) if n < len(shares) else 0
        surest = row[here].sort(descending=True).values
        chosen.append(
            NOBODY
            if not leaving
            else EVERYBODY
            if leaving == count
            else surest[leaving - 1 : leaving + 1].mean().item()
        )
        here &= row < chosen[-1]
    return chosen


BARE: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": lambda backbone, x: lambda: backbone(x),
    "graphs": in_a_graph,
    "compile": by_compile,
}


def deployed(model: Any, x: Tensor, limits: list[float]) -> Call:
    """`predict` with thresholds that were set before."""

    def call() -> Any:
        if model.threshold != limits:
            model.threshold = limits
        return model.predict(x)

    return call


def medians(calls: Mapping[str, Call], rounds: int = 7) -> dict[str, float]:
    """Seconds of each call, the median of measurements in turns."""
    repeats, found = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call(), call()
        repeats[name] = max(1, min(50, int(LONG_ENOUGH / max(seconds(call, 1), 1e-6))))
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call, repeats[name]))
    return {name: statistics.median(times) for name, times in found.items()}


def seconds(call: Call, repeats: int) -> float:
    """Of one call, the mean of some."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def line(name: str, mode: str, model: EarlyExitModel, fast: Any, bare: nn.Module, rows: int) -> str:
    """What is measured at one batch size."""
    x = noise(name, rows)
    ways = [way for way in SHARES if rows >= 8 or way in ("never", "all")]
    if mode == "compile":  # each further size of batches is compiled for long
        ways = [way for way in ways if way in ("never", "mix")]
    limits = {way: thresholds(model, x, SHARES[way]) for way in ways}
    calls: dict[str, Call] = {"bare": BARE[mode](bare, x), "eager": BARE["eager"](bare, x)}
    calls |= {way: deployed(fast, x, limits[way]) for way in ways}
    if mode != "eager":
        replays = fast._buckets.bucket_for(rows).replay
        calls["pieces"] = lambda: [replay() for replay in replays]
    time_of = medians(calls)
    wants = {way: model.predict(x, limits[way]) for way in ways}
    others = sum(int((fast.predict(x, limits[way]).exit_index != wants[way].exit_index).sum()) for way in ways)
    cells = [f"{way} {time_of[way] / time_of['bare']:.3f} ({wants[way].cost.mean().item():.3f})" for way in ways]
    cells += [f"pieces {time_of['pieces'] / time_of['bare']:.3f}"] if mode != "eager" else []
    start = (
        f"{name:22} {mode:8} {rows:4}   bare {time_of['bare'] * 1e3:7.3f} ms, eager {time_of['eager'] * 1e3:7.3f} ms"
    )
    return " | ".join([start, *cells, f"{others} of {len(ways) * rows} rows at another exit"])


@click.command()
@click.option("--backbone", "backbones", multiple=True, help="Of timm; may be repeated.")
@click.option("--mode", "modes", multiple=True, type=click.Choice([*BARE]), help="May be repeated.")
@click.option("--batch", "batches", multiple=True, type=int, help="May be repeated.")
@click.option("--exits", default=4, show_default=True)
def main(backbones: Sequence[str], modes: Sequence[str], batches: Sequence[int], exits: int) -> None:
    """Measure, and print a table."""
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}")
    batches = batches or (1, 32, 256)
    for name in backbones or CHANNELS_LAST:
        for mode in modes or BARE:
            begun = time.perf_counter()
            model = early_exits(name, exits)
            bare = copy.deepcopy(model).detach()
            fast = model if mode == "eager" else ptee.optimize(model, max_batch=max(batches), mode=mode)
            with torch.no_grad():
                for rows in batches:
                    click.echo(line(name, mode, model, fast, bare, rows))
            click.echo(f"    {time.perf_counter() - begun:.0f} s in all")
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
