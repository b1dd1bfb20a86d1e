"""What ptee takes where nothing is given: a small network on handwritten digits, and Imagenette for ImageNet backbones.

The digits are scikit-learn's, 1,797 real images of 8 x 8 pixels, and need no connection. The network is trained on them
once and kept. It shows the whole way through ptee in less than two minutes and proves nothing about larger problems.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ptee._common.errors import DataError, first_line
from ptee._common.files import replace_file
from ptee._common.process import no_stdout, own_random_numbers
from ptee._common.progress import with_bar
from ptee.data.sources import Data

MODEL, MODEL_ARGS = "cifar_resnet20", {"in_chans": 1}
INPUT_SIZE, MEAN, STD = (1, 8, 8), (0.3,), (0.38,)
EPOCHS, BATCH, SEED = 12, 64, 0
LR, HIGHEST_LR, WEIGHT_DECAY = 3e-3, 1e-2, 0.01
DIGITS_HEAD, DIGITS_EXITS, DIGITS_EPOCHS = "conv1", 3, 30  # of the exits: few images, so many epochs


def cache_folder() -> Path:
    """Where ptee keeps what it made or downloaded: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptee"


def digits_weights(data: Data) -> Path:
    """The file that keeps the network trained on these digits; another recipe, or split of them, has another.

    Args:
        data: the digits.
    """
    network = (MODEL, MODEL_ARGS, INPUT_SIZE, MEAN, STD)
    recipe = repr((network, EPOCHS, BATCH, SEED, LR, HIGHEST_LR, WEIGHT_DECAY, data.split))
    return cache_folder() / f"digits_{MODEL}_{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.safetensors"


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
            f"No --data is given, and Imagenette, which is used then, cannot be downloaded: {first_line(why)} "
            "Give images of your own: --data FOLDER."
        ) from why
    return folder


def train_digits_network(data: Data, file: Path) -> None:
    """Train the network on the digits' training images, and keep it.

    Args:
        data: the digits, ready for the network.
        file: to write.
    """
    from safetensors.torch import save_file

    from ptee.backbones.load import load_backbone

    with own_random_numbers(SEED):
        net = load_backbone(MODEL, pretrained=False, input_size=INPUT_SIZE, model_args=MODEL_ARGS).module.train()
        loader: Any = torch.utils.data.DataLoader(data.train, BATCH, shuffle=True)
        adam = torch.optim.AdamW(net.parameters(), LR, weight_decay=WEIGHT_DECAY)
        plan = torch.optim.lr_scheduler.OneCycleLR(adam, HIGHEST_LR, total_steps=EPOCHS * len(loader))
        for _ in with_bar(range(EPOCHS), "training a network on the digits"):
            for images, labels in loader:
                loss = F.cross_entropy(net(images), labels)
                adam.zero_grad(set_to_none=True)
                loss.backward()
                adam.step()
                plan.step()
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    replace_file(file, lambda path: save_file(state, path))
