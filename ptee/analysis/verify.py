"""The proof of a cut: rows go there, and the rest of the forward pass must answer exactly those that are left.

Answers are compared in the network's own precision first. Where they differ, float64 tells rounding from mixed rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import BackboneError, first_line
from ptee.analysis.arithmetic import TOLERANCES, comparable, exact_copy, exact_images, tolerance
from ptee.analysis.classifier import logits_of
from ptee.analysis.cut_points import Cut, random_images
from ptee.analysis.replay import ActiveRows, ReplayCache, RestartForward, make_cached, merged, run, undo_cached

KEPT = 2  # rows left in a proof: one alone would broadcast past a skip connection that carries the old rows


@torch.inference_mode(False)
def verify_cut_points(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, str]:
    """Let rows go at each cut, and require that the network answers exactly those that are left.

    All cuts are tried in one pass, each of which takes one row away; only if that fails are they tried one by one.

    Args:
        module: the network in eval mode.
        cuts: what to prove, in order of execution.
        input_size: (c, h, w).

    Returns:
        Why each cut that failed is none, by name; empty when all are proven.

    Raises:
        BackboneError: if the network is random, or rows of one batch change one another's answers even without a cut.
    """
    with comparable():
        try:
            refused = _refused(module, cuts, input_size)
        except _OffError:
            if (exactly := _in_float64(module, cuts, input_size)) is None:
                raise
            return exactly
        doubtful = [cut for cut in cuts if cut.name in refused and refused[cut.name].off]
        exactly = _in_float64(module, doubtful, input_size) if doubtful else None
    if exactly is None:
        return {name: why.words for name, why in refused.items()}
    certain = {name: why.words for name, why in refused.items() if not why.off}
    return {cut.name: (certain | exactly)[cut.name] for cut in cuts if cut.name in certain | exactly}


@dataclass(frozen=True)
class _Objection:
    """Why cuts are none."""

    words: str
    off: bool = False  # the answers are there and lie too far off, which rounding may do


class _OffError(BackboneError):
    """Without any cut, answers that should be the same lie apart, which rounding may do."""


def _refused(
    module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int], exact: bool = False
) -> dict[str, _Objection]:
    reference = _Reference.of(module, random_images(module, len(cuts) + KEPT, input_size), exact)
    if cuts and reference.objection(cuts) is None:
        return {}
    reference.check_independence()
    reference = _Reference.of(module, random_images(module, KEPT + 2, input_size), exact)
    return {cut.name: why for cut in cuts if (why := reference.objection([cut])) is not None}


def _in_float64(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, str] | None:
    """Why each cut that failed is none; None where the network cannot compute in float64."""
    exact = exact_copy(module)
    if exact is None:
        return None
    try:
        return {name: why.words for name, why in _refused(exact, cuts, input_size, exact=True).items()}
    except _OffError:
        raise
    except BackboneError:  # it casts to a type of its own
        return None


@dataclass(frozen=True)
class _Reference:
    """What the last rows of a batch get where each is alone, and how near to it they must come elsewhere."""

    module: nn.Module
    images: Tensor
    answers: Tensor  # of the last `KEPT` rows
    tolerance: float

    @classmethod
    def of(cls, module: nn.Module, images: Tensor, exact: bool = False) -> _Reference:
        """For a network, or an `exact` copy of one, of which no more is asked than of float32, where that tells rows apart."""
        reference = cls._asked(module, images, TOLERANCES[torch.float32] if exact else 0.0)
        if reference._rows_differ():
            return reference
        # Untrained networks can answer almost the same for every image; float64 still tells the rows apart.
        twin = module if exact else exact_copy(module)
        try:
            return reference if twin is None else cls._asked(twin, exact_images(images, twin))
        except Exception:  # it casts to a type of its own
            return reference

    @classmethod
    def _asked(cls, module: nn.Module, images: Tensor, least: float = 0.0) -> _Reference:
        with torch.no_grad():
            answers = torch.cat([logits_of(module, image[None].clone()) for image in images[-KEPT:]])
        relative = max(tolerance(answers.dtype, answers.device), least)
        return cls(module, images, answers, relative * max(answers.abs().max().item(), 1e-30))

    def _rows_differ(self) -> bool:
        n = len(self.answers)
        gaps = [(self.answers[i] - self.answers[j]).abs().max().item() for i in range(n) for j in range(i)]
        return min(gaps) > 10 * self.tolerance

    def check_independence(self) -> None:
        """The same rows must get the same answers, in the same batch and in another."""
        kind = type(self.module).__name__
        with torch.no_grad():
            together, again = (logits_of(self.module, self.images.clone()) for _ in range(2))
        if not self.answers.isfinite().all():
            raise BackboneError(
                f"{kind} answers noise with what is no finite number. Check its weights and its number type."
            )
        gap = (together - again).abs().max().item()
        if gap > self.tolerance:
            raise _off(gap)(
                f"{kind} answers the same batch differently each time: something in it is random in eval mode, too (dropout that is "
                "always on, torch.rand in a forward). Make that depend on self.training."
            )
        gap = (self.answers - together[-KEPT:]).abs().max().item()
        if not gap <= self.tolerance:
            raise _off(gap)(
                f"{kind} answers the same image differently in another batch (off by {gap:.1e}): "
                "its rows influence one another, so none of them can leave early."
            )

    def objection(self, cuts: Sequence[Cut]) -> _Objection | None:
        """Why these are no cuts, or None where the proof succeeds: the first rows leave, as many at each."""
        images = self.images
        leaving = (len(images) - KEPT) // len(cuts)

        steps = {self.module.get_submodule(n): step for n, step in merged([cut.steps for cut in cuts]).items()}
        rows = ActiveRows(len(images))
        cache = ReplayCache(steps, rows)
        passed: set[str] = set()

        def drop(cut: Cut, output: Any) -> Any:
            if cut.name in passed:  # the pass has started again
                return None
            passed.add(cut.name)
            staying = torch.arange(leaving, len(cut.feature_map(output)), device=images.device)
            if cut.steps:
                cache.require(cut.steps)
            rows.keep(staying)
            if cut.steps:
                raise RestartForward
            return cut.select(output, staying)

        handles = [
            self.module.get_submodule(cut.name).register_forward_hook(lambda _m, _i, out, cut=cut: drop(cut, out))
            for cut in cuts
        ]
        make_cached(list(steps))
        try:
            with torch.no_grad():
                got = run(self.module, images.clone(), cache)  # it may write into them
        except Exception as why:  # whatever the network's own code raises on fewer rows
            return _Objection(f"the rest of the forward pass fails with fewer rows ({first_line(why).rstrip('.')})")
        finally:
            undo_cached(list(steps))
            for handle in handles:
                handle.remove()
        if got.shape != self.answers.shape:
            return _Objection(f"with {KEPT} rows left the network still answers with shape {tuple(got.shape)}")
        gap = (got - self.answers).abs().max().item()
        if not gap <= self.tolerance:
            words = f"resuming from it gives logits off by {gap:.1e} (allowed: {self.tolerance:.1e})"
            return _Objection(words, off=math.isfinite(gap))
        return None


def _off(gap: float) -> type[BackboneError]:
    """What to raise of answers that lie so far apart; no rounding makes what is no number."""
    return _OffError if math.isfinite(gap) else BackboneError
