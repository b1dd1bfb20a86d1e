"""Heads trained in other ways, to see which pay: python recipes/scripts/variants.py OUT [NAME...] [--seeds 0,1,2]

A ResNet-56 on CIFAR-10 with a short training: 6 epochs of two views. The backbone runs once for all variants that read the same. Complete
runs in OUT are kept, as NAME0, NAME1, NAME2 for the seeds. `python recipes/scripts/equal_loss.py OUT/NAME? ...` compares them.

\b
one         one exit at .03, the settings that the others change
ranking     beside its cross-entropy, the log-odds of right answers are to lie above those of wrong ones by 1, weight .1
averaged    the mean of the weights of the last two epochs
sharpness   sharpness-aware steps, radius .05
one_view    one view of each image
six_views   six
two         exits at .03 and .4
three       the default's exits
stagewise   three exits, one after the other: the head learns what the product of its answer with the earlier ones loses
front       a ResNet-20 in front, and an exit at .4 behind it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor

from ptee._common.errors import PteeError
from ptee.backbones.load import load_backbone
from ptee.model.run_files import is_run
from ptee.pipeline.fit import Job, fit_backbone
from ptee.pipeline.images import open_images, recipe_for
from ptee.pipeline.recipe import make_recipe
from ptee.pipeline.run_folder import is_interrupted
from ptee.training.losses import LOSSES, separate_loss
from ptee.training.trainer import _Training
from ptee.training.training_data import shared_caches

SHORT = {"epochs": 6, "training.views": 2, "max_drop": 0.005}
ONE = {"exits.places": [0.03], "exits.head_budget": [0.15]}
AT_SECOND = {"exits.places": [0.4], "exits.head_budget": [0.06]}
SETTINGS: dict[str, dict[str, Any]] = {
    "one": ONE,
    "ranking": ONE,
    "averaged": ONE,
    "sharpness": ONE,
    "one_view": ONE | {"training.views": 1},
    "six_views": ONE | {"training.views": 6},
    "two": {"exits.places": [0.03, 0.4], "exits.head_budget": [0.15, 0.04]},
    "three": {},
    "stagewise": {"training.order": "one by one"},
    "front": AT_SECOND,
}


def ranking_loss(logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor, **weights: Any) -> Tensor:
    """`separate_loss`, and by how much the log-odds of a wrong answer come too close to those of a right one in the batch."""
    loss, best = separate_loss(logits, confidence_logits, costs, target, **weights), target
    if target.dim() == 2:
        best = target.argmax(-1)
    for z in logits[:-1]:
        largest = z.float().log_softmax(-1).amax(-1)
        odds = largest - torch.log1p(-largest.exp().clamp(max=1 - 1e-6))
        right = z.argmax(-1) == best
        if right.any() and not right.all():
            loss = loss + 0.1 * (1 + odds[~right][:, None] - odds[right][None]).clamp(min=0).mean()
    return loss


def stagewise_loss(logits: Tensor, confidence_logits: Tensor, costs: Tensor, target: Tensor, **weights: Any) -> Tensor:
    """`separate_loss` of the last head, whose answer is multiplied by those before, which do not learn from it."""
    earlier = logits[:-2].detach().log_softmax(-1).sum(0)
    product = torch.stack([logits[-2] + earlier, logits[-1]])
    return separate_loss(product, confidence_logits[-1:], costs[-2:], target, **weights)


def sharpness_aware_update(self: Any, batch: Any, labels: Tensor | None, share: Any) -> Any:
    """A step with the gradient at the worst place within .05 of the weights (Foret et al., ICLR 2021)."""
    random = torch.get_rng_state()
    result = self._judge(batch, labels, self.step)
    self.accelerator.backward(result.loss)
    parameters = [p for p in self.learners.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
    moves = [p.grad * (0.05 / norm) for p in parameters]
    _add(parameters, moves, 1)
    self.optimizer.zero_grad(set_to_none=True)
    torch.set_rng_state(random)  # the same shifts again
    self.accelerator.backward(self._judge(batch, labels, self.step).loss)
    _add(parameters, moves, -1)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return result


@torch.no_grad()
def _add(parameters: list[Tensor], moves: list[Tensor], sign: int) -> None:
    for p, move in zip(parameters, moves, strict=True):
        p.add_(move, alpha=sign)


def averaging_fit(fit: Callable[..., Any]) -> Callable[..., Any]:
    """The training as it is, and in the end the mean of the weights of its last two epochs."""

    def averaged(self: Any, data: Any, train_data: Any, val_data: Any, on_epoch: Any) -> Any:
        kept: list[Mapping[str, Tensor]] = []

        def after(epoch: Any) -> None:
            kept[:] = [*kept[-1:], deepcopy(self.learners.state_dict())]
            if on_epoch is not None:
                on_epoch(epoch)

        history = fit(self, data, train_data, val_data, after)
        means = {name: _mean([state[name] for state in kept]) for name in kept[-1]}
        self.learners.load_state_dict(means)
        return history

    return averaged


def _mean(values: list[Tensor]) -> Tensor:
    if not values[-1].is_floating_point():
        return values[-1]
    return torch.stack([value.double() for value in values]).mean(0).to(values[-1].dtype)


@contextmanager
def trained_as(name: str) -> Iterator[None]:
    """Within this context ptee trains as the variant does."""
    losses = {"ranking": ranking_loss, "stagewise": stagewise_loss}
    with ExitStack() as stack:
        if name in losses:
            stack.enter_context(patch.dict(LOSSES, {"separate": losses[name]}))
        if name == "sharpness":
            stack.enter_context(patch.object(_Training, "_update", sharpness_aware_update))
        if name == "averaged":
            stack.enter_context(patch.object(_Training, "fit", averaging_fit(_Training.fit)))
        yield


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(SETTINGS)))
@click.option("--seeds", default="0,1,2", show_default=True, help="Each is a digit.")
@click.option("--data", default="../shared/data/cifar10", show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), default=Path("../shared/weights"), show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(out: Path, names: tuple[str, ...], seeds: str, data: str, weights: Path, device: str) -> None:
    """Train what is missing."""
    wanted = seeds.split(",")
    if not all(len(seed) == 1 and seed.isdigit() for seed in wanted):
        raise click.UsageError(f"--seeds {seeds}: give digits, separated by commas, such as 0,1,2.")
    try:
        _train(out, names or tuple(SETTINGS), [int(seed) for seed in wanted], data, weights, device)
    except PteeError as why:
        raise click.ClickException(str(why)) from why


def _train(out: Path, names: Sequence[str], seeds: Sequence[int], data: str, weights: Path, device: str) -> None:
    backbone = load_backbone("cifar_resnet56", weights=weights / "cifar_resnet56.safetensors")
    for seed in seeds:
        images, labels = open_images(data, backbone, seed=seed)
        with shared_caches():
            for name in names:
                run = out / f"{name}{seed}"
                if is_run(run) and not is_interrupted(run):
                    continue
                settings = SHORT | SETTINGS[name] | {"seed": seed}
                if name == "front":
                    file = str(weights / "cifar_resnet20.safetensors")
                    settings |= {"exits.front": "cifar_resnet20", "exits.front_weights": file}
                job = Job(out=run, device=device, overwrite=True, log=lambda text: click.echo(text, err=True))
                with trained_as(name):
                    fit_backbone(backbone, images, recipe_for(labels, make_recipe("ptee", settings)), job).detach()


if __name__ == "__main__":
    main()
