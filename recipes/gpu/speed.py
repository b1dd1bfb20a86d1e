"""How fast is an early-exit model on a GPU? Random weights, no network, a few minutes.

    python recipes/gpu/speed.py

For each backbone, executor and batch size it prints the time of `predict` over the time of the bare backbone by the same
executor, if no image leaves, half leave at exit 0, all leave there, and 60 / 10 / 10 / 20 % leave at exits 0 / 1 / 2 / end.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn

import ptee
from ptee.deploy.recording import Graphs
from ptee.model.early_exit import EarlyExitModel

BACKBONES = {
    "resnet50": True,
    "vit_base_patch16_224": False,
    "convnext_base": True,
    "efficientnet_b0": True,
}  # channels_last
SIZE = (3, 224, 224)
SHARES = {"never": (0.0,), "half": (0.5,), "all": (1.0,), "mix": (0.6, 0.25, 1 / 3)}  # of the rows that reach each exit
NOBODY, EVERYBODY = 0.9999999, 0.0
Call = Callable[[Tensor], Any]


def made(name: str, exits: int) -> EarlyExitModel:
    """A model with random weights in half precision on the GPU."""
    torch.manual_seed(0)
    model = ptee.augment(timm.create_model(name).eval(), exits="pareto", num_exits=exits, head="pool", input_size=SIZE)
    model = model.cuda().half()
    if BACKBONES.get(name, False):
        model.backbone.to(memory_format=torch.channels_last)
    return model


def images(name: str, rows: int) -> Tensor:
    """Noise, in the memory format of the backbone."""
    x = torch.randn(rows, *SIZE, device="cuda", dtype=torch.half)
    return x.contiguous(memory_format=torch.channels_last) if BACKBONES.get(name, False) else x


def thresholds(model: EarlyExitModel, x: Tensor, shares: tuple[float, ...]) -> list[float]:
    """With which these shares of the rows that reach an exit leave there."""
    h = model.all_exits(x).confidence[:-1].double()
    left = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    chosen = []
    for n in range(len(h)):
        leaving = round(shares[n] * int((~left).sum())) if n < len(shares) else 0
        order = h[n].masked_fill(left, -1).sort(descending=True).values
        t = (
            NOBODY
            if not leaving
            else EVERYBODY
            if leaving == int((~left).sum())
            else float(order[leaving - 1 : leaving + 1].mean())
        )
        chosen.append(t)
        left |= h[n] >= t
    return chosen


def in_graph(backbone: nn.Module, x: Tensor) -> Call:
    """The bare backbone in a CUDA graph of its own."""
    static = x.clone(memory_format=torch.preserve_format)
    with torch.no_grad():
        answer, replay = Graphs().record(lambda: backbone(static))

    def call(x: Tensor) -> Tensor:
        static.copy_(x)
        replay()
        return answer.clone()

    return call


def compiled(backbone: nn.Module) -> Call:
    """The bare backbone as torch.compile makes it fastest."""
    fast = torch.compile(backbone, mode="reduce-overhead", dynamic=False)
    return lambda x: fast(x).clone()


def deployed(model: Any, x: Tensor, t: list[float]) -> Any:
    """With thresholds that were set before."""
    if model.threshold != t:
        model.threshold = t
    return model.predict(x)


def times(calls: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each, measured in turns."""
    repeats, found = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call(), call()
        repeats[name] = max(1, min(50, int(0.02 / max(once(call, 1), 1e-6))))
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(once(call, repeats[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def once(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, the mean of some."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(name: str, mode: str, batches: list[int], exits: int) -> None:
    """Print the lines of a backbone and an executor."""
    begun = time.perf_counter()
    model = made(name, exits)
    bare = copy.deepcopy(model).detach()
    fast = model if mode == "eager" else ptee.optimize(model, max_batch=max(batches), mode=mode)
    first = time.perf_counter() - begun
    if mode == "compile":
        base = compiled(bare)
    for b in batches:
        x = images(name, b)
        with torch.no_grad():
            if mode == "eager":
                base = bare
            elif mode == "graphs":
                base = in_graph(bare, x)
            calls: dict[str, Callable[[], Any]] = {"bare": lambda: base(x), "eager bare": lambda: bare(x)}
            counted, same = {}, {}
            for way, shares in SHARES.items():
                if way in ("half", "mix") and b < 8:
                    continue
                t = thresholds(model, x, shares)
                want, got = model.predict(x, t), fast.predict(x, t)
                same[way] = int((want.exit_index == got.exit_index).sum()), gap(want, got)
                counted[way] = want.cost.mean().item()
                calls[way] = lambda t=t: deployed(fast, x, t)
            if mode != "eager":
                calls["pieces"] = lambda: [replay() for replay in fast._buckets().bucket_for(b).replay]
            found = times(calls)
        line = f"{name:22} {mode:8} b={b:4} eager bare {found['eager bare'] * 1e3:8.3f} ms bare {found['bare'] * 1e3:8.3f} ms"
        for way in counted:
            line += f" | {way} {found[way] / found['bare']:.3f} ({counted[way]:.3f})"
        if mode != "eager":
            line += f" | pieces {found['pieces'] / found['bare']:.3f}"
        click.echo(
            f"{line} | same exit {min(s for s, _ in same.values())}/{b} gap {max(g for _, g in same.values()):.0e}"
        )
    used = torch.cuda.max_memory_reserved() / 2**30
    click.echo(f"    made in {first:.0f} s, all in {time.perf_counter() - begun:.0f} s, {used:.1f} GiB reserved")


def gap(want: Any, got: Any) -> float:
    """The largest difference of logits of rows that left at the same exit, over the largest logit."""
    same = want.exit_index == got.exit_index
    apart = (want.logits.float() - got.logits.float())[same].abs()
    return (apart.max() / want.logits.float().abs().max()).item() if len(apart) else 0.0


@click.command()
@click.option("--backbone", "backbones", multiple=True, help="Of timm; may be repeated.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(["eager", "graphs", "compile"]))
@click.option("--batch", "batches", multiple=True, type=int)
@click.option("--exits", default=4, show_default=True)
def main(backbones: tuple[str, ...], modes: tuple[str, ...], batches: tuple[int, ...], exits: int) -> None:
    """Measure, and print a table."""
    click.echo(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in backbones or BACKBONES:
        for mode in modes or ("graphs",):
            measure(name, mode, list(batches or (1, 32, 256)), exits)
            torch._dynamo.reset()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
