"""Training: the heads learn, the backbone does not.

Each batch runs through the frozen backbone once, or once for all epochs (`cache`); every head answers, and a loss (`losses`)
judges all answers and confidences. The loop is accelerate's: the same on a CPU, on a GPU and, under `accelerate launch`, on
several.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ptee._common.devices import accelerator_on
from ptee._common.errors import DataError, PteeError, RunError, first_line
from ptee._common.files import plain
from ptee._common.process import own_random_numbers
from ptee.backbones.weights import weights_hash
from ptee.data.batches import batches, is_loader
from ptee.data.labels import odd_labels
from ptee.exits.front import FrontHead
from ptee.model.early_exit import EarlyExitModel, Reading, require_early_exit
from ptee.model.forward import COLLAPSED
from ptee.training import checkpoint
from ptee.training.checkpoint import Reached
from ptee.training.config import Settings, check_epochs
from ptee.training.feature_cache import Cache, Estimate, entries, fill
from ptee.training.history import Epoch, History
from ptee.training.losses import ALONE
from ptee.training.optimizers import make_optimizer
from ptee.training.step import Found, Step, Sums, moved, rows_of
from ptee.training.views import Views

MIN_DELTA = 0.001  # by which the loss must fall to count as better (thesis 4.2)


def train(
    model: EarlyExitModel,
    train_data: Any,
    val_data: Any = None,
    *,
    targets: str = "labels",
    temperature: float = 1.0,
    loss: str = "v1",
    cost_weight: float = 1.0,
    reach: bool = False,
    epochs: int = 5,
    batch_size: int = 128,
    optimizer: str = "adam",
    lr: float = 1e-3,
    schedule: str = "constant",
    weight_decay: float = 0.0,
    seed: int = 0,
    patience: int | None = None,
    augment: int = 1,
    mirror: bool = True,
    shift: int = 0,
    mixup: float = 0.0,
    device: str | torch.device | None = None,
    precision: str = "auto",
    num_workers: int = 0,
    cache: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_cache: Callable[[Estimate], None] | None = None,
) -> History:
    """Train the heads of an early-exit model; not a byte of the backbone changes.

    Ctrl-C ends it after the last complete epoch, whose heads are kept.

    Args:
        model: as `augment` made it. In eval mode, on the device it was on, afterwards.
        train_data: a map-style data set of (image (c, h, w), label) or, but for targets="labels", (image,); or a loader,
            whose own batches and order are used.
        val_data: likewise; its loss is recorded after each epoch.
        targets: "labels", "pseudo" (the backbone's own answers) or "soft" (its probabilities). The last two need no
            labels; with labels that are no classes of the backbone there is no accuracy.
        temperature: divides the logits of which targets="soft" makes probabilities, and the heads' too (Hinton). Only for
            loss="each".
        loss: "v1", "v2", "mc" or "cost", which blend all exits' answers by h; or "each", in which every head learns for
            itself and h learns whether its head is right.
        cost_weight: lambda, what a unit of cost is worth in cross-entropy; no part of "each".
        reach: weight each sample at an exit by the chance that it gets there. Only for loss="each".
        epochs: number of passes over the data.
        batch_size: samples per update, on each process.
        optimizer: "adam", "adamw", or "muon" (orthogonal updates of every matrix and convolution, AdamW for the rest), with
            which convolutions learn in far fewer epochs.
        lr: learning rate, at the beginning.
        schedule: "constant", or "cosine": from lr to 0 along half a cosine, a step with each batch. A training that is
            resumed then has the same number of epochs.
        weight_decay: of matrices and convolutions, not of biases and norms.
        seed: of the order of the data.
        patience: stop after so many epochs without a lower loss (of val_data, where given), and go back to the best.
        augment: views of each training image, of which each epoch draws one: the image, its mirror image, and others cut
            out of the padded image at random, all made of the tensors that the data set gives. A cache keeps them all.
        mirror: whether mirror images show the same class; False for digits, letters and traffic signs.
        shift: move what the heads read of each sample by up to so many pixels of the input, at random, all heads alike;
            zeros come in. Only maps (b, c, h, w) are moved, and tokens that a head reads as a grid; pooled vectors are not.
        mixup: mix what the heads read of two samples, and their targets, with weights from Beta(mixup, mixup). The figures
            of an epoch are then those of mixtures, against the heavier sample. Only for loss="each".
        device: None: accelerate's choice, a GPU where there is one.
        precision: "auto" (bf16 where the device computes in it), "no", "bf16" or "fp16".
        num_workers: processes that load a data set.
        cache: run the backbone once over the data instead of in each epoch, and keep what the heads read; right where
            the data set gives the same image each time. Ignored for loaders and under several processes.
        checkpoint: a file to keep the last complete epoch in.
        resume: go on from that file, where it exists.
        on_epoch: called after each epoch, on the main process.
        on_cache: called with the size of a cache of the training images, before it is filled.

    Raises:
        PteeError: naming the argument, the label or the device that cannot be used; if exits are off, or the model is calibrated.
        RunError: if the checkpoint belongs to another training.
    """
    require_early_exit(model)
    check_epochs(epochs)
    model.require_all_on()
    model.forget_calibration()
    settings = Settings(
        targets=targets, loss=loss, cost_weight=cost_weight, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
        seed=seed, precision=precision, patience=patience, temperature=temperature, reach=reach, schedule=schedule,
        optimizer=optimizer, augment=augment, mirror=mirror, shift=shift, mixup=mixup,
    ).checked()  # fmt: skip
    with (
        own_random_numbers(),  # and accelerate's state, which is as little for two trainings at once
        accelerator_on(device, precision) as accelerator,
        _on_device(model, accelerator.device),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        settings = replace(settings, precision=accelerator.mixed_precision)
        same = asdict(settings) | _about(model, train_data)
        if settings.schedule == "cosine":
            same["epochs"] = int(epochs)  # of which each learning rate depends
        run = _Training(model, accelerator, settings, same, Path(checkpoint) if checkpoint else None)
        if resume:
            run.resume()
        return run.fit(train_data, val_data, epochs, num_workers, cache, on_epoch, on_cache)


def _about(model: EarlyExitModel, data: Any) -> dict[str, Any]:
    """What else must be the same for a training to be continued: the model, the data's length and, of files, which.

    With one file more, others are drawn for training.
    """
    files = getattr(data, "files_sha256", None)
    return {
        "exits": [e.name for e in model.exits],
        "head": model.plan.head,
        "classes": model.num_classes,
        "backbone": weights_hash(model.backbone),
        "input": plain(model.origin.input),
        "front": _about_front(model.heads[0]),
        "data": f"{length_hint(data, 0)} long" + (f" of files {files[:16]}" if files else ""),
    }


def _about_front(head: nn.Module) -> dict[str, Any] | None:
    """The network of the exit at the input, whose weights lie among the heads' and would be taken for theirs."""
    if not isinstance(head, FrontHead):
        return None
    return {"weights": weights_hash(head.network)[:16], "input": plain(head.origin.input)}


@torch.no_grad()
def reads_maps(model: EarlyExitModel) -> bool:
    """Whether some head learns from a map (b, c, h, w), which can be shifted.

    Args:
        model: as `augment` made it. In eval mode afterwards.
    """
    like = next(model.heads.parameters())
    read = model.eval().read(torch.zeros(2, *model.plan.input_size, dtype=like.dtype, device=like.device))
    return any(x.dim() == 4 for x in read.inputs)


class _Training:
    """One training: the step, its optimiser, and what has been reached."""

    def __init__(
        self,
        model: EarlyExitModel,
        accelerator: Any,
        settings: Settings,
        same: dict[str, Any],
        checkpoint: Path | None,
    ) -> None:
        self.model, self.accelerator, self.settings = model, accelerator, settings
        self.checkpoint, self.same = checkpoint, same  # and what must be the same for it to be continued
        step = Step(model, settings)
        optimizer = make_optimizer(
            settings.optimizer,
            model.heads,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            device=accelerator.device,
        )
        self.step, self.optimizer = accelerator.prepare(step, optimizer, device_placement=[False, False])
        self.history = History()
        self.best_heads: dict[str, Tensor] = {}
        self.dtype = next(model.heads.parameters()).dtype
        if self.dtype not in (torch.float32, torch.float64):
            raise PteeError(f"Heads in {self.dtype} cannot be trained well. Train model.float(), then convert it.")
        if settings.shift and not reads_maps(model):
            raise PteeError(
                f"The shift {settings.shift} moves feature maps, but {model.plan.head!r} heads read pooled vectors: "
                "take others, such as 'conv1', or augment images instead (augment=)."
            )
        if settings.shift >= min(model.plan.input_size[1:]):
            size = " x ".join(map(str, model.plan.input_size[1:]))
            raise PteeError(
                f"The shift {settings.shift} moves what is seen of images of {size} pixels out of sight. Give fewer pixels, such "
                f"as {max(1, min(model.plan.input_size[1:]) // 8)}."
            )
        # Batch norm in the heads has nothing to learn from one row.
        self.fewest = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.heads.modules()) else 1

    def fit(
        self, train_data: Any, val_data: Any, epochs: int, workers: int, cache: bool, on_epoch: Any, on_cache: Any
    ) -> History:
        train_data = self._with_views(train_data)
        with ExitStack() as stack:
            if cache and self.accelerator.num_processes == 1 and self._goes_on(epochs):
                train_data = self._cached(train_data, "training images", workers, stack, on_cache)
                val_data = None if val_data is None else self._cached(val_data, "held-out images", workers, stack)
            return self._fit(train_data, val_data, epochs, workers, on_epoch)

    def _with_views(self, data: Any) -> Any:
        settings = self.settings
        if settings.augment == 1:
            return data
        batches(data, batch_size=1, shuffle=False)  # refuses what is neither data set nor loader
        if is_loader(data):
            raise DataError(
                f"{settings.augment} views (augment) need a data set, and this is a {type(data).__name__}, which yields its "
                "own batches: pass its data set, or leave augment out."
            )
        return Views(data, settings.augment, seed=settings.seed, mirror=settings.mirror)

    def _cached(self, data: Any, words: str, workers: int, stack: ExitStack, told: Any = None) -> Any:
        """What the heads read of a data set, until the stack is left; a loader as it is."""
        if is_loader(data):
            return data
        self.model.eval()
        filled = fill(
            self.model,
            data,
            batch_size=self.settings.batch_size,
            num_workers=workers,
            prepare=self.model.prepared,
            around=self.accelerator.autocast,
            words=f"backbone, once over the {words}" + (f", {data.views} views" if isinstance(data, Views) else ""),
            told=told,
        )
        stack.callback(filled.close)
        return filled

    def _fit(self, train_data: Any, val_data: Any, epochs: int, workers: int, on_epoch: Any) -> History:
        order = torch.Generator()
        loader = self._loader(train_data, True, workers, order)
        val_loader = None if val_data is None else self._loader(val_data, False, workers)
        rates = self._rates(loader, epochs)
        while self._goes_on(epochs):
            number = len(self.history.epochs) + 1
            order.manual_seed(self.settings.seed * 1_000_003 + number)
            torch.manual_seed(self.settings.seed * 1_000_003 + number)
            if isinstance(train_data, (Cache, Views)):
                train_data.begin(number)
            complete = None
            try:
                complete = copy.deepcopy(self.model.heads.state_dict())
                epoch = self._epoch(number, epochs, loader, val_loader, rates)
                self.history.epochs.append(epoch)
                if self.settings.patience is not None and self._best_epoch() is epoch:
                    self.best_heads = copy.deepcopy(self.model.heads.state_dict())
                self._save()
                if on_epoch is not None and self.accelerator.is_main_process:
                    on_epoch(epoch)
            except BaseException as why:
                if complete is not None and len(self.history.epochs) < number:
                    self.model.heads.load_state_dict(complete)
                if not isinstance(why, KeyboardInterrupt):
                    raise
                self.history.interrupted = True
                break
        if self._nothing_gets_better() and not self.history.interrupted:
            self.model.heads.load_state_dict(self.best_heads)
            self.history.stopped_early = True
        self._warn_of_collapse()
        return self.history

    def _goes_on(self, epochs: int) -> bool:
        return len(self.history.epochs) < epochs and not self._nothing_gets_better()

    def _nothing_gets_better(self) -> bool:
        patience, epochs = self.settings.patience, self.history.epochs
        return patience is not None and bool(epochs) and len(epochs) - self._best_epoch().number >= patience

    def _best_epoch(self) -> Epoch:
        """The first whose loss no later one beat by `MIN_DELTA`."""
        best = self.history.epochs[0]
        for epoch in self.history.epochs[1:]:
            if epoch.judged < best.judged - MIN_DELTA:
                best = epoch
        return best

    def _loader(self, data: Any, shuffle: bool, workers: int, order: torch.Generator | None = None) -> Any:
        size = self.settings.batch_size
        if isinstance(data, Cache):
            return data.loader(size, shuffle, order)
        loader = batches(data, batch_size=size, shuffle=shuffle, generator=order, num_workers=workers)
        if not isinstance(loader, DataLoader) or self.accelerator.num_processes == 1:  # or somebody's own batches
            return loader
        # Who learns goes in step, so the last batches are filled up with other rows; who judges counts each row once.
        self.accelerator.even_batches = shuffle
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def _rates(self, loader: Any, epochs: int) -> LambdaLR | None:
        """The learning rate of each batch, from the one after the last complete epoch on; None where it is constant."""
        if self.settings.schedule == "constant":
            return None
        steps = length_hint(loader, 0)
        if not steps:
            raise DataError(
                "The schedule 'cosine' must know how many batches there are, and this loader has no length. "
                "Take the schedule 'constant'."
            )
        optimizer = self.optimizer.optimizer  # torch's, inside accelerate's
        for group in optimizer.param_groups:
            group["initial_lr"] = self.settings.lr
        done = len(self.history.epochs) * steps
        return LambdaLR(
            optimizer, lambda step: (1 + math.cos(math.pi * step / (epochs * steps))) / 2, last_epoch=done - 1
        )

    def _epoch(self, number: int, epochs: int, loader: Any, val_loader: Any, rates: LambdaLR | None) -> Epoch:
        start = time.perf_counter()
        self.model.train()
        sums = Sums()
        bar = tqdm(loader, desc=f"epoch {number}/{epochs}", leave=False, disable=None if self._is_main() else True)
        for seen, labels in entries(bar):
            if rows_of(seen) >= self.fewest:
                found = self._judge(seen, labels)
                self.accelerator.backward(found.loss)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                sums.add(found, rows_of(seen))
            if rates is not None:
                rates.step()  # after a batch that was too small, too: the plan counts them all
            if sums.samples and not bar.disable:  # reading the sums waits for the device
                bar.set_postfix(sums.postfix(), refresh=False)
        if not sums.samples:
            raise DataError(f"The training data gave no batch of {self.fewest} images or more.")
        self._share_statistics()
        means = Sums.mean(self._over_processes(sums.tensor()))
        if not math.isfinite(means.loss):
            raise PteeError(
                f"The loss is {means.loss} in epoch {number}. Lower the learning rate (lr={self.settings.lr / 10:g}), or leave out "
                "images with values that are no numbers."
            )
        val_loss = None if val_loader is None else self._loss_on(val_loader)
        return Epoch(number, *means, val_loss, time.perf_counter() - start)

    def _share_statistics(self) -> None:
        """Batch norm saw other rows in each process; all go on with those of the first."""
        from accelerate.utils import broadcast

        if self.accelerator.num_processes > 1:
            for buffer in self.model.heads.buffers():
                buffer.copy_(broadcast(buffer))

    @torch.no_grad()
    def _loss_on(self, loader: Any) -> float:
        self.model.eval()
        sums = Sums()
        alone = self.accelerator.unwrap_model(self.step)  # another process may have no batch left to go along with
        for seen, labels in entries(loader):
            sums.add(self._judge(seen, labels, alone), rows_of(seen))
        samples, _, loss = self._over_processes(sums.tensor()[:3]).tolist()
        return float(loss / samples)

    def _judge(self, seen: Tensor | Reading, labels: Tensor | None, step: nn.Module | None = None) -> Found:
        step = step or self.step
        ready = (
            moved(seen, self.accelerator.device, self.dtype) if isinstance(seen, Reading) else self.model.prepared(seen)
        )
        found: Found = step(ready, self._labels(labels))
        return found

    def _labels(self, labels: Tensor | None) -> Tensor | None:
        """On the device; None where there are none, or where they are no classes and only accuracy would need them."""
        fault = "it has no labels" if labels is None else odd_labels(labels, self.model.num_classes)
        if not fault:
            return None if labels is None else labels.to(self.accelerator.device)
        if self.settings.targets == "labels":
            raise DataError(f"The data cannot be learnt from: {fault}. Use the backbone's answers: targets='pseudo'.")
        return None

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        return sums

    def _is_main(self) -> bool:
        return bool(self.accelerator.is_local_main_process)

    def _warn_of_collapse(self) -> None:
        if not self.history.epochs:
            return
        last = self._best_epoch() if self.history.stopped_early else self.history.epochs[-1]
        share, n = max((share, n) for n, share in enumerate(last.leaving))
        if share <= COLLAPSED:
            return
        exits = self.model.exits
        where = f"exit {n} ({exits[n].name})" if n < len(exits) else "the backbone's own output"
        mend = f"{'Lower' if n < len(exits) else 'Raise'} the cost weight (it is {self.settings.cost_weight:g})"
        if self.settings.loss == ALONE:
            return  # h says who is right, not who should leave
        if self.settings.loss in ("cost", "mc"):
            mend = f"The loss {self.settings.loss!r} does that by itself: use 'v1' or 'v2'"
        self.history.warning = (
            f"Training collapsed: {share:.0%} of the samples leave at {where} at threshold {self.model.threshold[0]:g}. "
            f"{mend}, train longer, or set other thresholds."
        )
        if self.accelerator.is_main_process:
            warnings.warn(self.history.warning, stacklevel=4)

    # ---------------------------------------------------------------------------------------- the checkpoint

    def _save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        heads = self.model.heads.state_dict()
        reached = Reached(heads, self.best_heads, self.optimizer.state_dict()["state"], self.history.to_dict())
        checkpoint.write(self.checkpoint, reached, self.same)

    def resume(self) -> None:
        """Go on where the checkpoint stopped; without one, begin."""
        path = self.checkpoint
        if path is None or not path.is_file():
            return
        reached = checkpoint.read(path, self.same)
        try:
            epochs = [Epoch(**epoch) for epoch in reached.history["epochs"]]
            if self.settings.patience is not None:
                self.model.heads.load_state_dict(reached.best_heads)  # fits, where it is gone back to later
            self.model.heads.load_state_dict(reached.heads)
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": reached.optimizer})
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as why:
            raise RunError(f"{path} does not fit these heads: {first_line(why)} Delete it to begin anew.") from why
        self.best_heads, self.history.epochs = reached.best_heads, epochs


@contextmanager
def _on_device(model: EarlyExitModel, device: torch.device) -> Iterator[None]:
    """The model works there, and comes back in eval mode."""
    home = next(model.heads.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home).eval()
