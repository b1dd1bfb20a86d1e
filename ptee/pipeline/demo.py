"""What ptee takes if nothing is given: the demo, and Imagenette for ImageNet backbones.

The demo is a small network that reads handwritten digits on canvases (`demo_images`). It needs no connection. The network is
trained once and kept, whatever the seed. A recipe's seed changes the heads, and which digits are calibration images and which
validation images; the training images stay those that the network has learned from. The demo shows what early exits do, in
less than two minutes; it proves nothing about larger problems.
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

from ptee._common.devices import made_on_cpu, threads
from ptee._common.errors import Argument, BackboneError, DataError, first_line
from ptee._common.process import no_stdout, own_random_numbers
from ptee._common.progress import Log, with_bar
from ptee._common.text import percent, quoted
from ptee._common.writing import replace_file, require_writable
from ptee.backbones.load import Backbone, load_backbone
from ptee.backbones.weights import weights_hash
from ptee.data.demo_images import DEMO, SIDE
from ptee.data.splits import Data
from ptee.model.early_exit import EarlyExitModel
from ptee.pipeline.fit import Job, fit_backbone
from ptee.pipeline.images import open_images
from ptee.pipeline.recipe import Recipe

MODEL, MODEL_ARGS = "cifar_resnet20", {"in_chans": 1}
INPUT_SIZE, MEAN, STD = (1, SIDE, SIDE), (0.2,), (0.3,)
VIEW: dict[str, Any] = {"input_size": INPUT_SIZE, "mean": MEAN, "std": STD, "model_args": MODEL_ARGS}
HASH = "sha256"  # of the weights, in the file that keeps them
EPOCHS, BATCH, SEED = 6, 64, 0  # of the network
LR, HIGHEST_LR, WEIGHT_DECAY = 2e-3, 1e-2, 0.05
USUAL_THRESHOLD, SOMEWHAT_ABOVE = 0.7, 0.8  # the latter is a power, so that what lies between 0 and 1 stays there
SPEED_SECONDS = 5.0  # about how long measuring the speed may take


@threads(1)  # faster than several for a network as tiny as this
def demo(recipe: Recipe, job: Job) -> None:
    """Add exits to the demo's network by `DEMO_RECIPE` or a change of it, and say in plain words what happened."""
    data = _images(SEED)
    network = demo_network(data, job.log)
    if recipe.seed != SEED:
        data = _images(recipe.seed)
    model = fit_backbone(network, data, recipe, replace(job, speed_seconds=SPEED_SECONDS))
    job.log(f"{another_threshold(model, job.out)}\n")
    job.log(what_happened(model.results or {}))


def another_threshold(model: EarlyExitModel, out: Path | None) -> str:
    """What to type to try another threshold, somewhat above the run's own: far from these all images leave at one place."""
    own = [t for n, t in enumerate(model.threshold) if n not in model.off and 0 < t < 1]
    other = round(max(own) ** SOMEWHAT_ABOVE, 3) if own else USUAL_THRESHOLD
    if other >= 1 or other in own:
        other = USUAL_THRESHOLD
    return f"Another threshold: ptee evaluate {quoted(out)} --threshold {other:g}"


def what_happened(results: Mapping[str, Any]) -> str:
    """The demo's results, JSON-able, in plain words, and what to type next."""
    backbone, own = results["rows"][0], results["rows"][-1]
    *early, end = results["leaving"]
    places = [f"{percent(share, 0)} left at exit {n}" for n, share in enumerate(early) if share > 0]
    places.append(f"{percent(end, 0)} went through the whole network")
    fast = f" and is {own['speedup']:.2g} times as fast on this {results['device']}" if own["speedup"] else ""
    return (
        f"What happened: of {results['samples']:,} images that neither the network nor its exits had seen, "
        f"{', '.join(places[:-1])}{' and ' * (len(places) > 1)}{places[-1]}.\n"
        f"With its exits the network needs {own['cost']:.2f} of its multiply-accumulates{fast}; its accuracy is "
        f"{own['accuracy']:.3f}, without them {backbone['accuracy']:.3f}.\n"
        "With a model and images of your own: ptee augment --model resnet50 --data FOLDER\n"
        "FOLDER holds train/CLASS/*.jpg and val/CLASS/*.jpg; --weights FILE takes weights of your own."
    )


def _images(seed: int) -> Data:
    untrained = load_backbone(MODEL, pretrained=False, **VIEW)
    return open_images(DEMO, untrained, seed=seed, named=True)[0]


# ---------------------------------------------------------------------------------------------------- the network


def demo_weights(data: Data) -> Path:
    """The file that keeps the network trained on these images; another network, or other images, have another file."""
    network = (MODEL, MODEL_ARGS, INPUT_SIZE, MEAN, STD)
    recipe = repr((network, EPOCHS, BATCH, SEED, LR, HIGHEST_LR, WEIGHT_DECAY, data.split))
    return cache_folder() / f"demo_{MODEL}_{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"


def demo_network(data: Data, log: Log) -> Backbone:
    """The demo's network, from its file, or else trained now on images that are drawn with `SEED`.

    Raises:
        PteeError: before the training, if it cannot be kept.
    """
    file = demo_weights(data)
    if file.is_file():
        try:
            return _kept_network(file)
        except BackboneError as why:
            log(f"The network that was kept cannot be used, so it is trained again: {why}")
    else:
        log(f"A small network is trained on the demo's images once and kept in {file.parent}.")
    require_writable(file.parent, "Set XDG_CACHE_HOME to another folder.")
    train_demo_network(data, file, log)
    return _kept_network(file)


def _kept_network(file: Path) -> Backbone:
    """The network in a file, if its hash is the one that was written there."""
    from safetensors import safe_open

    network = load_backbone(MODEL, weights=file, **VIEW)
    with safe_open(file, "pt") as opened:
        written = (opened.metadata() or {}).get(HASH)
    if written != weights_hash(network.module):
        raise BackboneError(f"{file} does not hold the weights that were written.")
    return network


def train_demo_network(data: Data, file: Path, log: Log) -> None:
    """Train the network on the demo's training images, and keep it in a file."""
    from safetensors.torch import save_file

    with own_random_numbers(SEED):
        with made_on_cpu():
            net = load_backbone(MODEL, pretrained=False, **VIEW).module.train()
        net.to(memory_format=torch.channels_last)  # faster on CPUs
        every: Any = data.train
        pairs = [(image, torch.as_tensor(label, device="cpu")) for image, label in every]
        images, labels = map(torch.stack, zip(*pairs, strict=True))
        batches = -(-len(images) // BATCH)
        adam = torch.optim.AdamW(net.parameters(), LR, weight_decay=WEIGHT_DECAY)
        plan = torch.optim.lr_scheduler.OneCycleLR(adam, HIGHEST_LR, total_steps=EPOCHS * batches)
        for epoch in range(EPOCHS):
            name, total = f"network, epoch {epoch + 1}/{EPOCHS}", 0.0
            order = torch.randperm(len(images), device="cpu")
            for rows in with_bar(order.split(BATCH), name):
                x = images[rows].to(memory_format=torch.channels_last)
                loss = F.cross_entropy(net(x), labels[rows])
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                plan.step()
                total += loss.item() / batches
            log(f"{name}  loss {total:.4f}")
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    replace_file(file, lambda path: save_file(state, path, metadata={HASH: weights_hash(net)}))


# ---------------------------------------------------------------------------------------------------- what is kept


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


def imagenette() -> Path:
    """The folder of Imagenette, ten classes of ImageNet; torchvision downloads it at first.

    Raises:
        DataError: if it cannot be downloaded.
    """
    folder = cache_folder() / "imagenette2-320"
    if folder.is_dir():
        return folder
    from torchvision.datasets import Imagenette

    try:  # unpacked beside and renamed when it is whole, so that a broken download is never taken for the data
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".downloading-") as beside, no_stdout:
            Imagenette(beside, size="320px", download=True)
            (Path(beside) / folder.name).replace(folder)
    except Exception as why:  # from the connection, the archive or the disk
        if folder.is_dir():  # another process was faster
            return folder
        text = "No data are given, and Imagenette, which is used then, cannot be downloaded: "
        raise DataError(f"{text}{first_line(why)} Give images of your own: ", Argument("data", "FOLDER"), ".") from why
    return folder
