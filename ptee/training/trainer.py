"""Training: the heads learn, and the backbone only if that is asked for.

The images run through the backbone in every epoch, or, if it is frozen, once for all epochs (`feature_cache`). Every head
answers, and a loss (`losses`) judges all answers and confidences. accelerate runs the same loop on a CPU, on a GPU and, under
`accelerate launch`, on several.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.devices import accelerator_on, made_on_cpu, no_autocast, require_launch
from ptee._common.errors import Advice, Argument, DataError, PteeError, RunError, ended_worker, first_line, warn
from ptee._common.files import as_path
from ptee._common.process import own_random_numbers
from ptee._common.progress import with_bar
from ptee._common.shares import Share, is_lost, shared_batch_norm
from ptee._common.text import number_of
from ptee._common.validation import checked_with
from ptee._common.writing import clear_unfinished
from ptee.analysis.arithmetic import same_each_time
from ptee.analysis.freezing import device_of
from ptee.backbones.weights import learnable_hashes
from ptee.data.batches import batches, is_loader, odd_labels
from ptee.exits.blend import BLENDED, OWN
from ptee.exits.config import CALIBRATED, LEARNED
from ptee.model.early_exit import EarlyExitModel, require_early_exit
from ptee.model.forward import Reading
from ptee.model.saving import require_saveable
from ptee.training import checkpoint as checkpoints
from ptee.training.augmentation import resolved_mirror, resolved_shift
from ptee.training.config import JOINT, ONE_BY_ONE, TrainingConfig, epochs_for, passes, require_weight_each
from ptee.training.feature_cache import CacheFolder, Estimate, NotCached, entries
from ptee.training.history import Epoch, History, collapse_of
from ptee.training.optimizers import optimizer_of, set_cosine_rate
from ptee.training.step import BatchResult, EpochMeans, EpochSums, Step, Turns, flags_kept, moved, rows_of
from ptee.training.training_data import TrainingData, noting_images, sample_hash


@checked_with(TrainingConfig.model_fields)
def train(
    model: EarlyExitModel,
    train_data: Any,
    val_data: Any = None,
    *,
    config: TrainingConfig | None = None,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_cache: Callable[[Estimate | NotCached], None] | None = None,
    **changes: Any,
) -> History:
    """Train the heads of an early-exit model; not a byte of the backbone changes.

    With `backbone="joint"` the backbone learns with them: it is in training mode meanwhile, those of its parameters learn that
    had gradients before `augment`, and from then on the model saves its weights, too.

    After an error, such as a loss that is no longer finite, or Ctrl-C, the weights are those of the last complete epoch. The same seed, data and settings give the same heads, bit for
    bit, on the same machine. On a GPU cuDNN is deterministic meanwhile, and searches no faster algorithms.

    Args:
        model: as `augment` made it. Afterwards it is in eval mode, on the device it was on.
        train_data: a map-style data set of (image (c, h, w), label), or of (image,) if the targets are the backbone's answers;
            or a loader, whose own batches and order are used; or a cache of very many images (`ptee.open_cache`).
        val_data: likewise; its loss is recorded after each epoch.
        config: the settings; `help(ptee.training.config.TrainingConfig)` has their meaning and defaults.
        device: where to train; None: a GPU if there is one.
        num_workers: processes that load a data set.
        checkpoint: a file to keep the last complete epoch in.
        resume: go on from that file, if it exists.
        on_epoch: called after each epoch, on the main process.
        on_cache: called with the size of the cache of the training images before it is filled, and with why none is kept.
        changes: settings of `TrainingConfig` by name, such as `epochs=20`; they replace those in `config`.

    Raises:
        PteeError: naming the argument, the label or the device that cannot be used; if exits are off, or the model is calibrated.
        RunError: if the checkpoint is damaged or belongs to another training.
        Interrupted: on Ctrl-C (a KeyboardInterrupt); its `history` has the complete epochs.
    """
    require_launch(device)
    require_early_exit(model)
    model.require_all_on()
    config = TrainingConfig() if config is None else config
    if not isinstance(config, TrainingConfig):
        text = f"The config must be a TrainingConfig, not a {type(config).__name__}. Give settings by name instead, such as "
        raise PteeError(text, Argument("epochs", "20"), ".", argument="config", value=config)
    path = None if checkpoint is None else as_path(checkpoint, "checkpoint")
    history = run_training(
        model,
        train_data,
        val_data,
        config.changed(**changes),
        device=device,
        num_workers=num_workers,
        checkpoint=path,
        beside={},
        resume=resume,
        on_epoch=on_epoch,
        on_cache=on_cache,
    )
    if history.interrupted:
        raise history.interruption(path)
    return history


def run_training(
    model: EarlyExitModel,
    train_data: Any,
    val_data: Any,
    config: TrainingConfig,
    *,
    device: str | torch.device | None,
    num_workers: int,
    checkpoint: Path | None,
    beside: Mapping[str, str],
    resume: bool,
    on_epoch: Callable[[Epoch], None] | None,
    on_cache: Callable[[Estimate | NotCached], None] | None,
) -> History:
    """`train` with arguments that were looked at, which returns after Ctrl-C. `beside`: texts of files that each checkpoint is written with, by name."""
    _drop_what_was_fitted(model)
    for name, data in (("train_data", train_data), ("val_data", val_data)):  # refuse what cannot be made into batches
        if data is not None or name == "train_data":
            batches(data, batch_size=config.batch_size, shuffle=False, num_workers=num_workers, argument=name)
    config = resolve_config(config, model, train_data)
    with (
        own_random_numbers(),  # two trainings cannot share accelerate's state, either
        same_each_time,
        accelerator_on(device, config.precision) as accelerator,
        _ready_to_learn(model, accelerator.device, config.backbone == JOINT),
    ):
        config = config.changed(precision=accelerator.mixed_precision)
        loaders = TrainingData(model, accelerator, config, num_workers, on_cache)
        samples = None if is_loader(train_data) else sample_hash(train_data, must_repeat=loaders.caches)
        training: dict[str, Any] = {}
        if checkpoint is not None:
            training = checkpoints.describe_training(config, model, train_data, samples, accelerator.num_processes)
            clear_unfinished(checkpoint.parent)
        run = _Training(model, accelerator, config, training, checkpoint, beside)
        if resume:
            run.resume()
        with noting_images(loaders, train_data, val_data, run.history, changes=samples is None):
            history = run.fit(loaders, train_data, val_data, on_epoch)
    model.origin = replace(model.origin, learned_from=learnable_hashes(model.backbone))
    return history


def resolve_config(config: TrainingConfig, model: EarlyExitModel, train_data: Any) -> TrainingConfig:
    """The settings with a value for every None and "auto". A PteeError if one does not fit the model or the data."""
    require_saveable(model.heads.state_dict(), model.backbone.state_dict() if config.backbone == JOINT else None)
    require_weight_each(config.exit_weights, len(model.exits) + 1)
    values: dict[str, Any] = {"shift": resolved_shift(config, model), "mirror": resolved_mirror(config, train_data)}
    if config.epochs == "auto":
        values["epochs"] = _auto_epochs(config, train_data)
    if config.views == "auto":
        values["views"] = 1 if is_loader(train_data) or isinstance(train_data, CacheFolder) else 2
    return config.resolved().changed(**values)


def _drop_what_was_fitted(model: EarlyExitModel) -> None:
    """Drop calibration and blend, which were fitted to the heads as they are now. Refused while one is in use."""
    anew = f"answers = {OWN!r} first, and choose the thresholds again afterwards (ptee.tune)"
    again = f"confidence = {LEARNED!r} first, and call ptee.calibrate again afterwards"
    for used, what, instead in (
        (model.answers == BLENDED, "model's answers are blended", anew),
        (model.confidence == CALIBRATED, "model is calibrated", again),
    ):
        if used:
            text = f"This {what}, and training changes the heads that this was done for. Set model.{instead}."
            raise PteeError(text)
    model.calibrated = model.blend = model.curve = None


def _auto_epochs(config: TrainingConfig, data: Any) -> int:
    length = length_hint(data, 0)
    if not length:
        text = "A number of epochs cannot be chosen for data that is empty or has no length. Give one, such as "
        raise DataError(text, Argument("epochs", "10"), ".", argument="epochs", value="auto")
    length += len(getattr(data, "gaps", ()))  # a training that goes on without some has as many epochs as before
    return epochs_for(length, 1 if is_loader(data) else config.batch_size)  # a loader is as long as it has batches


@contextmanager
def _ready_to_learn(model: EarlyExitModel, device: torch.device, joint: bool) -> Iterator[None]:
    """The model is on this device, with gradients, those of the backbone if `joint`; afterwards it is in eval mode where it was."""
    home = device_of(model.heads)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast(device):
        model.to(device)
        try:
            with flags_kept(model.heads), model.learning_backbone() if joint else nullcontext():
                yield
        finally:
            model.to(home).eval()


class _Training:
    """One training: the step, its optimizer, and what has been reached."""

    def __init__(
        self,
        model: EarlyExitModel,
        accelerator: Any,
        config: TrainingConfig,
        training: dict[str, Any],
        path: Path | None,
        beside: Mapping[str, str],
    ) -> None:
        self.model, self.accelerator, self.config = model, accelerator, config
        self.training, self.path, self.beside = training, path, beside  # of the checkpoint; the last is written with it
        joint = config.backbone == JOINT
        self.learners: nn.Module = nn.ModuleList([model.heads, model.backbone]) if joint else model.heads
        self.dtype = next(model.heads.parameters()).dtype
        for dtype in {p.dtype for p in self.learners.parameters()} - {torch.float32, torch.float64}:
            raise PteeError(f"Weights in {dtype} cannot be trained well. Train model.float(), then convert it.")
        self.epochs = passes(config, len(model.exits))
        self.epochs_each = self.epochs // (len(model.exits) if config.order == ONE_BY_ONE else 1)
        self.answers = len(model.exits) + 1
        self.turns = Turns(model.heads, config)
        self._begin(0)
        self.history = History(config=config.model_dump())
        self.best: dict[str, Tensor] = {}
        norms = nn.modules.batchnorm._BatchNorm
        self.min_rows = 2 if any(isinstance(m, norms) for m in self.learners.modules()) else 1  # one has no variance

    def _begin(self, stage: int) -> None:
        """Make the step and the optimizer of what learns: one by one, of the head of this number."""
        self.stage, one = stage, self.config.order == ONE_BY_ONE
        if one:
            self.turns.only(stage)
        heads = self.model.heads[stage] if one else self.model.heads
        step = Step(self.model, self.config, stage + 1 if one else None)
        optimizer = optimizer_of(self.config, heads, self.model.backbone, self.accelerator.device)
        self.step, self.optimizer = self.accelerator.prepare(step, optimizer, device_placement=[False, False])
        self.optimizer.zero_grad(set_to_none=True)  # of what the user trained, or of an update that Ctrl-C cut short

    @property
    def is_over(self) -> bool:
        """Whether no epoch is left."""
        return len(self.history.epochs) >= self.epochs or self.history.has_stalled(self.config.patience)

    def fit(self, data: TrainingData, train_data: Any, val_data: Any, on_epoch: Any) -> History:
        with data.opened(train_data, val_data, cached=not self.is_over) as (loader, val_loader):
            try:
                while not self.is_over:
                    if (stage := len(self.history.epochs) // self.epochs_each) != self.stage:
                        self._begin(stage)
                    self._run_epoch(data, loader, val_loader, on_epoch)
            except KeyboardInterrupt:
                self.history.interrupted = True
            except RuntimeError as why:
                if self.accelerator.num_processes > 1 and is_lost(why):
                    raise self._lost(why) from why
                if (ended := ended_worker(why, *self._kept(), given=(train_data, val_data))) is None:
                    raise
                raise ended from why
        if self.history.has_stalled(self.config.patience) and not self.history.interrupted:
            self.learners.load_state_dict(self.best)
            self.history.stopped_early = True
        self._warn_of_collapse()
        return self.history

    def _lost(self, why: RuntimeError) -> RunError:
        """The error where another process has ended."""
        several = f"Another of the {self.accelerator.num_processes} processes that train together has ended"
        return RunError(f"{several} ({first_line(why)[:80]}).", *self._kept("launch all of them again"))

    def _kept(self, go_on: str = "go on") -> Advice:
        """How to go on with the epochs that are complete; nothing if none is kept."""
        if self.path is None or not (done := len(self.history.epochs)):
            return ()
        return f" {number_of(done, 'complete epoch', 'is')} kept: {go_on} with ", Argument("resume", "True"), "."

    def _run_epoch(self, data: TrainingData, loader: Any, val_loader: Any, on_epoch: Any) -> None:
        """One more epoch. If it is interrupted or diverges, the weights go back to those of the last complete one."""
        number = len(self.history.epochs) + 1
        data.begin(number)
        before = None
        try:
            before = copy.deepcopy(self.learners.state_dict())
            epoch = self._epoch(number, loader, val_loader)
            self.history.epochs.append(epoch)
            if self.config.patience is not None and self.history.best is epoch:
                self.best = copy.deepcopy(self.learners.state_dict())
            self._save()
            if on_epoch is not None and self.accelerator.is_main_process:
                on_epoch(epoch)
        except BaseException:
            if before is not None and len(self.history.epochs) < number:
                self.learners.load_state_dict(before)
            raise

    def _place(self, loader: Any) -> tuple[int, int]:
        """Where in its schedule the learning rate is after the last complete epoch, and how long that is: (0, 0) if it is constant."""
        if self.config.schedule == "constant":
            return 0, 0
        steps = length_hint(loader, 0)
        if not steps:
            text = "The cosine schedule needs the number of batches, and this loader has no length. Give "
            raise DataError(text, Argument.text("schedule", "constant"), ".", argument="schedule", value="cosine")
        done = len(self.history.epochs) - self.stage * self.epochs_each
        return done * steps, self.epochs_each * steps

    def _epoch(self, number: int, loader: Any, val_loader: Any) -> Epoch:
        start = time.perf_counter()
        several = self.accelerator.num_processes > 1
        with shared_batch_norm(self.learners) if several else nullcontext():
            means = self._learn(number, loader)
        self._require_finite(number, means.loss)
        found = None if val_loader is None else self._measured_on(val_loader)
        val_loss, val_leaving = (None, None) if found is None else (found.loss, found.leaving)
        return Epoch(number, *means, val_loss, time.perf_counter() - start, val_leaving)

    def _require_finite(self, number: int, loss: float) -> None:
        """Refuse to go on from a loss or weights that are not finite. The last update of an epoch has no loss yet."""
        what = f"The loss is {loss}"
        if math.isfinite(loss):
            what = "Some weights are no longer finite"
            if all(bool(p.isfinite().all()) for p in self.learners.parameters()):
                return
        lower = Argument("lr", f"{(self.config.lr or 1) / 10:g}")
        kept = f" The weights are those of epoch {number - 1}." * (number > 1)
        more = f"), or leave out images with values that are not finite.{kept}"
        raise PteeError(f"{what} in epoch {number}. Lower the learning rate (", lower, more, argument="lr")

    def _learn(self, number: int, loader: Any) -> EpochMeans:
        self.model.train()
        if self.config.order == ONE_BY_ONE:
            self.turns.only(self.stage)
        sums, (done, steps) = EpochSums(self.answers), self._place(loader)
        bar = with_bar(loader, f"epoch {number} of {self.epochs}", bool(self.accelerator.is_local_main_process))
        for n, (batch, labels) in enumerate(entries(bar)):  # also those that are too small count in the schedule
            if steps:
                set_cosine_rate(self.optimizer.optimizer, done + n, steps)  # of torch's, inside accelerate's
            share = getattr(loader, "share", None)  # of several processes
            if (share.whole if share else rows_of(batch)) >= self.min_rows:
                sums.add(self._update(batch, labels, share), rows_of(batch))
            if sums.samples and not bar.disable:  # reading the sums waits for the device
                bar.set_postfix(sums.postfix(), refresh=False)
        if not sums.samples:
            needed = number_of(self.min_rows, "image")
            text = f"The training data gave no batch of {needed} or more. Give more images, or larger batches: of a data set by "
            raise DataError(text, Argument("batch_size", "128"), ", of a loader where it is made.")
        self._share_statistics()
        return EpochSums.means(self._over_processes(sums.tensor()))

    def _update(self, batch: Tensor | Reading, labels: Tensor | None, share: Share | None) -> BatchResult:
        self.accelerator.unwrap_model(self.step).share = share
        result = self._judge(batch, labels, self.step)
        self.accelerator.backward(result.loss if share is None else result.loss * share.weight)
        with made_on_cpu():  # where it counts its steps
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    @torch.no_grad()
    def _measured_on(self, loader: Any) -> EpochMeans:
        self.model.eval()
        sums = EpochSums(self.answers)
        step = self.accelerator.unwrap_model(self.step)  # another process may have no batch left
        for batch, labels in entries(with_bar(loader, "validation", bool(self.accelerator.is_local_main_process))):
            sums.add(self._judge(batch, labels, step), rows_of(batch))
        return EpochSums.means(self._over_processes(sums.tensor()))

    def _judge(self, batch: Tensor | Reading, labels: Tensor | None, step: nn.Module) -> BatchResult:
        if isinstance(batch, Reading):
            batch = moved(batch, self.accelerator.device, self.dtype)
        else:
            batch = self.model.prepared(batch)
        result: BatchResult = step(batch, self._labels(labels))
        return result

    def _labels(self, labels: Tensor | None) -> Tensor | None:
        """On the device; None if there are none, or if they are no classes and only accuracy would need them."""
        fault = "it has no labels" if labels is None else odd_labels(labels, self.model.num_classes)
        if not fault:
            return None if labels is None else labels.to(self.accelerator.device)
        if self.config.backbone == JOINT:
            raise DataError(f"The data cannot be learnt from: {fault}. A backbone that learns needs labels.")
        if self.config.targets == "labels":
            text = f"The data cannot be learnt from: {fault}. Let the heads learn the backbone's answers: "
            raise DataError(text, Argument.text("targets", "pseudo"), ".", argument="targets", value="labels")
        return None

    def _share_statistics(self) -> None:
        """All go on with the statistics of the first process: sums in another order differ in the last bit."""
        from accelerate.utils import broadcast

        if self.accelerator.num_processes > 1:
            for buffer in self.learners.buffers():
                buffer.copy_(broadcast(buffer))

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        return sums

    def _warn_of_collapse(self) -> None:
        self.history.warning = collapse_of(self.history, self.model, self.config)
        if self.history.warning and self.accelerator.is_main_process:
            warn(self.history.warning)

    # ---------------------------------------------------------------------------------------- the checkpoint

    def _save(self) -> None:
        if self.path is None or not self.accelerator.is_main_process:
            return
        weights, optimizer = self.learners.state_dict(), self.optimizer.state_dict()["state"]
        reached = checkpoints.Checkpoint(weights, self.best, optimizer, self.history.epochs)
        checkpoints.write(self.path, reached, self.training, self.beside)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        backbone = self.model.backbone.state_dict(prefix="1.") if self.config.backbone == JOINT else {}  # of `learners`
        reached = checkpoints.found(self.path, self.training, backbone)
        if reached is None:
            return
        if (done := len(reached.epochs)) > self.epochs:
            text = f"{self.path} holds {done} complete epochs, more than "
            raise RunError(text, Argument("epochs", str(self.epochs)), f". Give {done} or more, or delete it.")
        before = copy.deepcopy(self.learners.state_dict())
        try:
            self._load(reached)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as why:
            self.learners.load_state_dict(before)
            text = f"{self.path} does not fit these heads: {first_line(why)} Delete it to start again."
            raise RunError(text) from why
        self.best, self.history.epochs = dict(reached.best), list(reached.epochs)

    def _load(self, reached: checkpoints.Checkpoint) -> None:
        self._begin(max(0, len(reached.epochs) - 1) // self.epochs_each)
        if self.config.patience is not None:
            self.learners.load_state_dict(reached.best)  # training may go back to them, so they must fit
        self.learners.load_state_dict(reached.weights)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": reached.optimizer})
        for p, state in self.optimizer.optimizer.state.items():
            if any(value.dim() and value.shape != p.shape for value in state.values()):
                raise ValueError("the optimizer's state has other shapes")
