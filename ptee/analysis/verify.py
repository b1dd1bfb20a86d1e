"""Cut points are verified with numbers: rows leave there, and the others must get the answers that they get alone.

`survey` finds cut points from a recording of the forward pass. It cannot see what the network's own code remembers of a
batch. So before an exit is placed at a cut point, the pass is run with rows leaving there. The rows that stay must get the
same logits as each of them gets in a batch of one image. If they do not, the cut point is refused with the reason.

"The same" means: as near as rounding allows. Logits are compared in the network's own number type first. If they differ,
they are computed again in float64. There rounding is gone, but a mistake stays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ptee._common.errors import BackboneError, first_line
from ptee.analysis.arithmetic import (
    TOLERANCES,
    exact_arithmetic,
    exact_copy,
    exact_images,
    relative_gap,
    scratch_copy,
    tolerance,
)
from ptee.analysis.axes import memory_of
from ptee.analysis.classifier import logits_of
from ptee.analysis.cut_points import Cut, random_images, tensors_in, written_by
from ptee.analysis.fake_run import operators_run
from ptee.analysis.freezing import KeptBuffers, hooked
from ptee.analysis.replay import ActiveRows, ReplayCache, RestartForward, make_cached, merged, run, undo_cached

STAYING = 2  # rows that never leave: one alone would broadcast where a skip connection still carries the rows that left
ENDS = [0, -1]  # these are the first and the last, as code may treat either otherwise
LEAVING = 2  # rows at each cut, so that all batches with leaving rows are even ones; one image alone is not
LARGE_BATCH = 48  # groups of 2, 3, 4, 6, 8, 12 or 16 rows fill it, and one image fills none
STEP = 29  # from row to row, for another order of the rows
BRIGHT = 100.0  # times noise: as far from it as bytes are from shares
MOST_ROWS = 3  # what a large batch of small images may cost, in images of full size
FREE = 1e9  # multiply-accumulates that are too few to save on


@torch.inference_mode(False)
def verify_cut_points(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, str]:
    """The cut points (in order of execution) at which rows cannot leave a network in eval mode, each with the reason.

    All are tried in one pass, where some rows leave at each. Only if that fails, each is tried in a pass of its own. A network
    that is random, or whose rows influence one another even without a cut, raises BackboneError.
    """
    with exact_arithmetic:
        try:
            failures = _failures(module, cuts, input_size)
        except _InexactError:
            if (exact := _failures_in_float64(module, cuts, input_size)) is None:
                raise
            failures = exact
        else:
            doubtful = [cut for cut in cuts if cut.name in failures and failures[cut.name].inexact]
            exact = _failures_in_float64(module, cuts, input_size) if doubtful else None
            if exact is not None:
                failures = {name: failure for name, failure in failures.items() if not failure.inexact} | exact
    return {cut.name: failures[cut.name].reason for cut in cuts if cut.name in failures}


@torch.inference_mode(False)
def require_same_in_large_batches(
    module: nn.Module, first: Cut, input_size: tuple[int, int, int], macs: int, operators: Sequence[Any] = ()
) -> None:
    """Refuse a network in eval mode whose code treats images otherwise if the batch is large.

    It is tried on small images, because a large batch of full size may cost more than all else that `augment` does. A network
    that takes no smaller images, or works as much on them, is tried at full size: if it is very small, or if a fake run shows
    that its code does something else with a large batch. Some code fits what it keeps to the size of the images, so a copy is
    tried. A network that cannot be copied is not tried. Most of the rows are tried in a smaller batch, too (`check_other_batches`).

    Args:
        first: a cut; how large its output is tells how much less the work on small images is.
        macs: the cost of one image of full size.
        operators: those that ran in the survey.
    """
    if (copied := scratch_copy(module)) is None:
        return
    with exact_arithmetic, torch.no_grad():
        sizes = _small_sizes(input_size, macs)
        tried = next((t for size in sizes if (t := _tried(copied, first, size, macs)) is not None), False)
        if not tried and (rows := _treated_otherwise(copied, input_size, operators)):
            _tried(copied, first, input_size, macs=0, rows=rows)


def _treated_otherwise(module: nn.Module, input_size: tuple[int, int, int], operators: Sequence[Any]) -> int | None:
    """A number of images on which other operators run than on a few; None if there seems to be none."""
    if operators_run(module, input_size, [LARGE_BATCH]) == [operators]:
        return None
    rows = [STAYING, 9, 17, LARGE_BATCH]
    few, *more = operators_run(module, input_size, rows)
    return next((n for n, run in zip(rows[1:], more, strict=True) if run != few), None)


def _tried(
    module: nn.Module, first: Cut, size: tuple[int, int, int], macs: int, rows: int = LARGE_BATCH
) -> bool | None:
    """Try a large batch of images of this size. None if a larger size may tell more, False if that costs too much."""
    images = random_images(module, rows, size)
    try:
        logits, share = _alone(module, images[ENDS], first)
        if rows * share > MOST_ROWS and rows * share * macs > FREE:
            return False  # and larger images cost even more
        reference = _Reference.with_logits(module, images, logits)
        together = reference.together()
    except BackboneError:  # it takes no images of this size, or no such batch
        return None
    if not logits.isfinite().all():
        return None
    try:
        reference.check_other_batches(together)
    except _InexactError:
        if not _same_in_float64(module, images):
            raise
    return True


def _small_sizes(input_size: tuple[int, int, int], macs: int) -> list[tuple[int, int, int]]:
    """Sizes of images that a network may take and that cost little, the smallest first."""
    channels, height, width = input_size
    side = min(height, width)
    most = max(side // (32 if side >= 128 else 8), 1)
    parts = [n for n in range(most, 1, -1) if not (height % n or width % n)] or [most]  # some networks take any size
    parts = [n for n in parts if n > 1] + [1] * (LARGE_BATCH * macs <= FREE)
    return [(channels, height // n, width // n) for n in parts]


def _alone(module: nn.Module, images: Tensor, first: Cut) -> tuple[Tensor, float]:
    """Logits of each image alone, and how large the output of this cut is, as a share of what it is for images of full size."""
    sizes = [math.prod(first.shape)]

    def note(output: Any) -> None:
        sizes.append(first.feature_map(output)[0].numel())

    with hooked({module.get_submodule(first.name): note}):
        return torch.cat([logits_of(module, image) for image in images.split(1)]), sizes[-1] / sizes[0]


def _same_in_float64(module: nn.Module, images: Tensor) -> bool:
    """Whether rows get the logits in a batch, computed in float64, that they get alone and in another batch."""
    exact = exact_copy(module)
    if exact is None:
        return False
    try:
        reference = _Reference.of(exact, exact_images(images, exact))
        reference.check_other_batches(reference.together())
    except BackboneError:  # they differ, or the network's code casts to a type of its own
        return False
    return True


@contextmanager
def buffers_put_back(module: nn.Module, input_size: tuple[int, int, int]) -> Iterator[KeptBuffers]:
    """Afterwards, the buffers of a network in eval mode that change whenever it answers are as they were before."""
    buffers = KeptBuffers(module)
    try:
        yield buffers
    finally:
        buffers.put_back(buffers.changing(lambda: module(-random_images(module, 2, input_size))))


def require_no_drift(module: nn.Module, buffers: KeptBuffers, input_size: tuple[int, int, int]) -> None:
    """Refuse a network whose answers depend on a buffer that has changed and changes whenever it answers (a running mean).

    It is told by its answer if the buffer had changed a thousand times as much. A count that nothing reads does no harm.
    """
    images = random_images(module, 2, input_size)
    changing = buffers.changing(lambda: module(-images))
    now = {name: b.detach().clone() for name, b in module.named_buffers() if name in changing and b.is_floating_point()}
    for name, value in now.items():
        buffers.put_back(changing)
        with torch.no_grad():
            before = logits_of(module, images.clone())
            buffers.put_back(changing)
            module.get_buffer(name).add_(1000 * (value - buffers.value(name)))
            after = logits_of(module, images.clone())
        if not (after - before).abs().max() <= tolerance(before.dtype, before.device) * before.abs().max():
            raise BackboneError(
                f"{type(module).__name__} changes its buffer {name} whenever it answers, also in eval mode, and its answers depend on "
                "it: they would drift. Let it change only if self.training."
            )


def counting_buffers(module: nn.Module, names: Sequence[str], input_size: tuple[int, int, int]) -> list[str]:
    """Those of these tensors that are buffers, change in each pass in eval mode, and on which no answer depends.

    Empty if that cannot be told: the network cannot be copied, or takes no such images.
    """
    if (copied := scratch_copy(module)) is None:
        return []
    buffers, images = dict(copied.eval().named_buffers()), random_images(copied, 2, input_size)
    try:
        changed = _changed_by(copied, [name for name in names if name in buffers], images)
        # from its first value on: a flag may change in the first pass alone
        copies = ((name, scratch_copy(module)) for name in changed)
        return [name for name, fresh in copies if fresh is not None and _only_counts(fresh.eval(), name, images)]
    except Exception:  # whatever the network's code raises
        return []


@torch.inference_mode(False)
def _changed_by(module: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """The buffers that a forward pass changes."""
    before = {name: module.get_buffer(name).clone() for name in names}
    with torch.no_grad():
        logits_of(module, images.clone())
    return [name for name, value in before.items() if not torch.equal(module.get_buffer(name), value)]


@torch.inference_mode(False)
def _only_counts(module: nn.Module, name: str, images: Tensor) -> bool:
    before = module.get_buffer(name).clone()
    with torch.no_grad(), _Following(module.get_buffer(name)) as followed:
        answer = logits_of(module, images.clone())
    is_read = followed.decides or memory_of(answer) in followed.memory
    return not is_read and not torch.equal(module.get_buffer(name), before)


class _Following(TorchDispatchMode):
    """Follows the values of a tensor: which memory depends on them, and whether the network's code looks at them."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.memory, self.decides = {memory_of(tensor)}, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = tensors_in(out)
        if any(memory_of(t) in self.memory for t in tensors_in((args, kwargs))):
            self.decides = self.decides or not made  # a number for Python: item(), bool()
            self.memory |= {memory_of(t) for t in [*made, *written_by(func, args, kwargs or {})]}
        return out


@dataclass(frozen=True)
class _Failure:
    """Why rows cannot leave. Inexact if rounding may be the cause: all rows have logits, but they differ too much."""

    reason: str
    inexact: bool = False


class _InexactError(BackboneError):
    """Logits that should be the same differ even without a cut, and rounding may be the cause."""


def _failures(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, _Failure]:
    reference = _Reference.of(module, random_images(module, LEAVING * len(cuts) + STAYING, input_size), cuts)
    plain = [cut for cut in cuts if not cut.steps]
    tried = [cuts, plain] if 0 < len(plain) < len(cuts) else [cuts]  # a pass that starts again repairs what they break
    if cuts and all(reference.failure(some) is None for some in tried):
        return {}
    reference.check_independence()
    reference = _Reference.of(module, random_images(module, LEAVING + STAYING, input_size), cuts)
    alone = {cut.name: failure for cut in cuts if (failure := reference.failure([cut])) is not None}
    return alone | _failing_together(module, [cut for cut in cuts if cut.name not in alone], input_size)


def _failing_together(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, _Failure]:
    """Those of cuts that pass alone at which rows cannot leave after others left at the cuts before."""
    failures: dict[str, _Failure] = {}
    before: list[Cut] = []
    for cut in cuts:
        together = [*before, cut]
        images = random_images(module, LEAVING * len(together) + STAYING, input_size)
        if before and (failure := _Reference.of(module, images, together).failure(together)) is not None:
            failures[cut.name] = failure
        else:
            before.append(cut)
    return failures


def _failures_in_float64(
    module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]
) -> dict[str, _Failure] | None:
    """The cut points that fail in float64; None if the network cannot compute in float64."""
    exact = exact_copy(module)
    if exact is None:
        return None
    try:
        return _failures(exact, cuts, input_size)
    except _InexactError:
        raise
    except BackboneError:  # the network's code casts to a type of its own
        return None


@dataclass(frozen=True)
class _Reference:
    """The logits that the first and the last row of a batch get when each is alone, which they must get in any batch."""

    module: nn.Module
    images: Tensor  # (b, c, h, w)
    logits: Tensor  # (STAYING, K) of the images that stay
    tolerance: float  # how much logits may differ from these
    relative: float  # the same as a share of the largest value
    maps: Mapping[str, Tensor] = field(default_factory=dict)  # (STAYING, ...) what a head reads of them, by cut

    @classmethod
    def of(cls, module: nn.Module, images: Tensor, cuts: Sequence[Cut] = ()) -> _Reference:
        """The reference for a network. It need only be as exact as float32, if that tells its rows apart."""
        reference = cls._run(module, images, TOLERANCES[torch.float32], cuts)
        if reference._rows_differ():
            return reference
        # An untrained network can give nearly the same logits for every image. Float64 still tells the rows apart.
        copied = exact_copy(module)
        try:
            return reference if copied is None else cls._run(copied, exact_images(images, copied), 0.0, cuts)
        except Exception:  # the network's code casts to a type of its own
            return reference

    @classmethod
    def _run(cls, module: nn.Module, images: Tensor, min_tolerance: float, cuts: Sequence[Cut]) -> _Reference:
        maps: dict[str, list[Tensor]] = {cut.name: [] for cut in cuts}

        def note(cut: Cut, output: Any) -> None:
            maps[cut.name].append(cut.feature_map(output).clone())

        with torch.no_grad(), hooked({module.get_submodule(cut.name): partial(note, cut) for cut in cuts}):
            logits = torch.cat([logits_of(module, image[None].clone()) for image in images[ENDS]])
        alike = {name: kept for name, kept in maps.items() if len({z.shape for z in kept}) == 1}
        reference = cls.with_logits(module, images, logits, min_tolerance)
        return replace(reference, maps={name: torch.cat(kept) for name, kept in alike.items()})

    @classmethod
    def with_logits(cls, module: nn.Module, images: Tensor, logits: Tensor, min_tolerance: float = 0.0) -> _Reference:
        """The reference for a network that gives the first and the last row these logits."""
        relative = max(tolerance(logits.dtype, logits.device), min_tolerance)
        return cls(module, images, logits, relative * max(logits.abs().max().item(), 1e-30), relative)

    def _rows_differ(self) -> bool:
        return (self.logits[0] - self.logits[1]).abs().max().item() > 10 * self.tolerance

    def check_independence(self) -> None:
        """Refuse a network that does not give a row the same logits in the same batch again, and in another batch."""
        kind = type(self.module).__name__
        together, again = self.together(), self.together()
        if not self.logits.isfinite().all():
            raise BackboneError(
                f"{kind} answers noise with values that are not finite (inf or nan). Check its weights and its number type."
            )
        gap = (together - again).abs().max().item()
        if gap > self.tolerance:
            raise _error_for(gap)(
                f"{kind} answers the same batch differently each time, so something in it is random in eval mode (a dropout "
                "that is always on, or torch.rand in a forward) or remembers batches. Make that depend on self.training."
            )
        self._require_near(together[ENDS], self.logits, self.tolerance)

    def together(self) -> Tensor:
        """(b, K): the logits of all rows, from one batch."""
        with torch.no_grad():
            return logits_of(self.module, self.images.clone())

    def check_other_batches(self, together: Tensor) -> None:
        """Refuse a network whose rows get other logits alone, or in a smaller batch: in another order, beside images unlike noise."""
        self._require_near(together[ENDS], self.logits, self.tolerance)
        order = STEP * torch.arange(len(self.images) * 3 // 4 - 1, device=self.images.device) % len(self.images)
        images = self.images[order]
        images[1], images[2], images[3], images[4] = 0, 1, BRIGHT * images[0], images[0]
        try:
            moved = replace(self, images=images).together()
        except BackboneError:  # it takes no such images, or no such batch
            return
        noise = [0, *range(5, len(order))]
        want = together[order][noise]
        self._require_near(moved[noise], want, self.relative * max(want.abs().max().item(), 1e-30))

    def _require_near(self, logits: Tensor, want: Tensor, allowed: float) -> None:
        gap = (logits - want).abs().max().item()
        if not gap <= allowed:
            raise _error_for(gap)(
                f"{type(self.module).__name__} answers the same image differently in another batch (off by {gap:.1e}): "
                "its rows influence one another, so none of them can leave early."
            )

    def failure(self, cuts: Sequence[Cut]) -> _Failure | None:
        """Let rows behind the first leave, as many at each cut. None if the first and the last get the right logits."""
        gaps: dict[str, float] = {}
        try:
            logits = self._run_with_rows_leaving(cuts, gaps)
        except Exception as why:  # the network's own code may raise anything when there are fewer rows
            return _Failure(f"the rest of the forward pass fails with fewer rows ({first_line(why).rstrip('.')})")
        if logits.shape != self.logits.shape:
            shape = tuple(logits.shape)
            return _Failure(f"with {STAYING} rows left the network still answers with shape {shape}")
        gap = (logits - self.logits).abs().max().item()
        if not gap <= self.tolerance:
            reason = f"with fewer rows after it the logits are off by {gap:.1e} (allowed: {self.tolerance:.1e})"
            return _Failure(reason, inexact=math.isfinite(gap))
        if (wrong := next((off for off in gaps.values() if not off <= self.relative), None)) is not None:
            reason = (
                f"what a head would read there of an image depends on other images of its batch (off by {wrong:.1e})"
            )
            return _Failure(reason, inexact=math.isfinite(wrong))
        return None

    def _gap_at(self, cut: Cut, output: Any) -> float:
        """How far what a head reads of the rows that stay is from what it reads of each alone, as a share of its size."""
        want, got = self.maps.get(cut.name), cut.feature_map(output)[ENDS]
        if want is None or want.shape != got.shape:
            return 0.0  # a number of tokens that depends on the image, of which no head can be made
        return relative_gap(want, got)

    def _run_with_rows_leaving(self, cuts: Sequence[Cut], gaps: dict[str, float]) -> Tensor:
        """(rows that stay, K). `gaps` gets how far what heads read is from what they read of each row alone, by cut."""
        steps = {self.module.get_submodule(n): step for n, step in merged([cut.steps for cut in cuts]).items()}
        rows = ActiveRows(len(self.images))
        cache = ReplayCache(steps, rows)
        leaving = (len(self.images) - STAYING) // len(cuts)
        passed: set[str] = set()

        def remove_rows(cut: Cut, output: Any) -> Any:
            if cut.name in passed:  # the pass has started again
                return None
            passed.add(cut.name)
            gaps[cut.name] = self._gap_at(cut, output)
            staying = torch.arange(leaving, len(cut.feature_map(output)), device=self.images.device)
            staying[0] = 0
            if cut.steps:
                cache.require(cut.steps)
            rows.keep(staying)
            if cut.steps:
                raise RestartForward
            return cut.select(output, staying)

        hooks = {self.module.get_submodule(cut.name): partial(remove_rows, cut) for cut in cuts}
        make_cached(list(steps))
        try:
            with torch.no_grad(), hooked(hooks):
                return run(self.module, self.images.clone(), cache)  # the network may write into its images
        finally:
            undo_cached(list(steps))


def _error_for(gap: float) -> type[BackboneError]:
    """The error to raise for logits that differ so much. Rounding never makes a difference that is not finite."""
    return _InexactError if math.isfinite(gap) else BackboneError
