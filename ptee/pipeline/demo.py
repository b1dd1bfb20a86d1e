"""What ptee takes where nothing is given: the demo, and Imagenette for ImageNet backbones.

The demo is a small network that reads handwritten digits on canvases (`demo_images`). It needs no connection. The network is
trained once and kept. The demo shows what early exits do, in less than two minutes; it proves nothing about larger problems.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ptee._common.errors import Argument, BackboneError, DataError, RunError, first_line
from ptee._common.files import replace_file, require_writable
from ptee._common.process import no_stdout, own_random_numbers
from ptee.backbones.load import Backbone, load_backbone
from ptee.backbones.weights import weights_hash
from ptee.data.demo_images import DEMO, SIDE
from ptee.data.splits import Data
from ptee.pipeline.fit import Job, Log, fit_backbone
from ptee.pipeline.images import open_images
from ptee.pipeline.recipe import Recipe

MODEL, MODEL_ARGS = "cifar_resnet20", {"in_chans": 1}
INPUT_SIZE, MEAN, STD = (1, SIDE, SIDE), (0.2,), (0.3,)
VIEW: dict[str, Any] = {"input_size": INPUT_SIZE, "mean": MEAN, "std": STD, "model_args": MODEL_ARGS}
HASH = "sha256"  # of the weights, in the file that keeps them
EPOCHS, BATCH, SEED = 6, 64, 0
LR, HIGHEST_LR, WEIGHT_DECAY = 2e-3, 1e-2, 0.05
# The heads are so small that they read easy canvases alone. Larger ones read nearly all of them, and then nobody needs the rest
# of the network.
DEMO_RECIPE: dict[str, Any] = {
    "name": DEMO,
    "about": "Small heads at two exits of a small network that reads digits.",
    "exits": {"places": ("layer1.0", "layer2.0"), "head": "res-16x1s4"},
    "training": {"epochs": 6},
}
SPEED_SECONDS = 5.0  # for measuring the speed, in about


def cache_folder() -> Path:
    """Where ptee keeps what it made or downloaded: below XDG_CACHE_HOME, or ~/.cache.

    Raises:
        DataError: if neither is known.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptee"
    except RuntimeError as why:  # no HOME, and no account that has one
        raise DataError(
            "There is no place to keep files: neither XDG_CACHE_HOME nor HOME is set. Set one to a folder, such as "
            "XDG_CACHE_HOME=/tmp/cache."
        ) from why


def demo(recipe: Recipe, job: Job) -> None:
    """Add exits to the demo's network, and say in plain words what came of it.

    Args:
        recipe: `DEMO_RECIPE`, or what was changed of it.
        job: where, and how it is told.
    """
    untrained = load_backbone(MODEL, pretrained=False, **VIEW)
    # Whatever the recipe's seed: the network has seen the training images of this one.
    data, _ = open_images(DEMO, untrained, seed=SEED, named=True)
    model = fit_backbone(demo_network(data, job.log), data, recipe, replace(job, speed_seconds=SPEED_SECONDS))
    job.log(f"\nSaved in {job.out}. Another threshold: ptee evaluate {job.out} --threshold 0.7\n")
    job.log(what_happened(model.results or {}))


def demo_weights(data: Data) -> Path:
    """The file that keeps the network trained on these images; another recipe, or other images, have another.

    Args:
        data: the demo's.
    """
    network = (MODEL, MODEL_ARGS, INPUT_SIZE, MEAN, STD)
    recipe = repr((network, EPOCHS, BATCH, SEED, LR, HIGHEST_LR, WEIGHT_DECAY, data.split))
    return cache_folder() / f"demo_{MODEL}_{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"


def demo_network(data: Data, log: Log) -> Backbone:
    """The demo's network: the one that was kept, or one that is trained now and kept.

    Args:
        data: the demo's, ready for the network.
        log: prints.

    Raises:
        PteeError: if it cannot be kept, before it is trained.
    """
    file = demo_weights(data)
    if file.is_file():
        try:
            return _kept_network(file)
        except BackboneError as why:
            log(f"The network that was kept cannot be used, so it is trained again: {why}")
    else:
        log(f"A small network is trained on the demo's images once and kept in {file.parent}.")
    try:
        require_writable(file.parent)  # before the training, which takes a minute
    except RunError as why:
        raise RunError(
            f"{str(why).removesuffix('Choose another folder.')}Set XDG_CACHE_HOME to another folder."
        ) from why
    train_demo_network(data, file, log)
    return _kept_network(file)


def _kept_network(file: Path) -> Backbone:
    """Of a file that was written whole and not changed since."""
    from safetensors import safe_open

    network = load_backbone(MODEL, weights=file, **VIEW)
    with safe_open(file, "pt") as opened:
        written = (opened.metadata() or {}).get(HASH)
    if written != weights_hash(network.module):
        raise BackboneError(f"{file} does not hold the weights that were written.")
    return network


def imagenette() -> Path:
    """The folder of Imagenette, ten classes of ImageNet, downloaded through torchvision where it is not there yet.

    Raises:
        DataError: if it cannot be downloaded.
    """
    folder = cache_folder() / "imagenette2-320"
    if folder.is_dir():
        return folder
    from torchvision.datasets import Imagenette

    # Unpacked beside and renamed when whole, so that a broken download is never taken for the data.
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".downloading-") as beside,
            no_stdout,
        ):
            Imagenette(beside, size="320px", download=True)
            (Path(beside) / folder.name).replace(folder)
    except Exception as why:  # whatever urllib, tarfile and the disk can raise
        if folder.is_dir():  # another process was faster
            return folder
        raise DataError(
            f"No data are given, and Imagenette, which is used then, cannot be downloaded: {first_line(why)} Give images of your own: ",
            Argument("data", "FOLDER"),
            ".",
        ) from why
    return folder


def train_demo_network(data: Data, file: Path, log: Log) -> None:
    """Train the network on the demo's training images, and keep it.

    Args:
        data: the demo's, ready for the network.
        file: to write.
        log: prints a line after each epoch.
    """
    from safetensors.torch import save_file

    with own_random_numbers(SEED):
        with torch.device("cpu"):
            net = load_backbone(MODEL, pretrained=False, **VIEW).module.train()
        net.to(memory_format=torch.channels_last)  # faster on CPUs
        every: Any = data.train
        images, labels = (torch.stack(column) for column in zip(*map(_as_tensors, every), strict=True))
        batches = -(-len(images) // BATCH)
        adam = torch.optim.AdamW(net.parameters(), LR, weight_decay=WEIGHT_DECAY)
        plan = torch.optim.lr_scheduler.OneCycleLR(adam, HIGHEST_LR, total_steps=EPOCHS * batches)
        for epoch in range(EPOCHS):
            total = 0.0
            for rows in tqdm(
                torch.randperm(len(images), device="cpu").split(BATCH),
                f"network, epoch {epoch + 1}/{EPOCHS}",
                leave=False,
                disable=None,
            ):
                x = images[rows].to(memory_format=torch.channels_last)
                loss = F.cross_entropy(net(x), labels[rows])
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                plan.step()
                total += loss.item() / batches
            log(f"network, epoch {epoch + 1}/{EPOCHS}  loss {total:.4f}")
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    replace_file(file, lambda path: save_file(state, path, metadata={HASH: weights_hash(net)}))


def _as_tensors(pair: tuple[Tensor, int]) -> tuple[Tensor, Tensor]:
    return pair[0], torch.as_tensor(pair[1], device="cpu")


def what_happened(results: Mapping[str, Any]) -> str:
    """The demo's results in plain words, and what to type next.

    Args:
        results: JSON-able, of an evaluation with labels.
    """
    backbone, own = results["rows"][0], results["rows"][-1]
    *early, end = results["leaving"]
    places = [f"{share:.0%} left at exit {n}" for n, share in enumerate(early) if share > 0]
    places.append(f"{end:.0%} went through the whole network")
    fast = f" and is {own['speedup']:.2g} times as fast on this {results['device']}" if own["speedup"] else ""
    return (
        f"What happened: of {results['samples']:,} images that neither the network nor its exits had seen, "
        f"{', '.join(places[:-1])}{' and ' * (len(places) > 1)}{places[-1]}.\n"
        f"With its exits the network needs {own['cost']:.2f} of its multiply-accumulates{fast}; its accuracy is "
        f"{own['accuracy']:.3f}, without them {backbone['accuracy']:.3f}.\n"
        "With a model and images of your own: ptee augment --model resnet50 --data FOLDER\n"
        "FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg; --weights FILE takes weights of your own."
    )
