"""The proof of a cut: rows go there, and the rest of the forward pass must answer exactly those that are left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import BackboneError, first_line
from ptee.analysis.active_rows import ActiveRows
from ptee.analysis.classifier import logits_of
from ptee.analysis.cut_points import Cut, random_images
from ptee.analysis.replay import ReplayCache, RestartForward, make_cached, merged, run, undo_cached

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4}  # of the largest logit; half precision: 3e-2
KEPT = 2  # rows left in a proof: one alone would broadcast past a skip connection that carries the old rows


def prove(module: nn.Module, cuts: Sequence[Cut], input_size: tuple[int, int, int]) -> dict[str, str]:
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
    reference = _Reference.of(module, random_images(module, len(cuts) + KEPT, input_size))
    if cuts and reference.objection(cuts) is None:
        return {}
    reference.check_independence()
    reference = _Reference.of(module, random_images(module, KEPT + 2, input_size))
    return {cut.name: reason for cut in cuts if (reason := reference.objection([cut])) is not None}


@dataclass(frozen=True)
class _Reference:
    """What the last rows of a batch get where each is alone, and how near to it they must come elsewhere."""

    module: nn.Module
    images: Tensor
    answers: Tensor  # of the last `KEPT` rows
    tolerance: float

    @classmethod
    def of(cls, module: nn.Module, images: Tensor) -> _Reference:
        reference = cls._in_own_precision(module, images)
        if reference._rows_differ():
            return reference
        # Untrained networks can answer almost the same for every image; float64 still tells the rows apart.
        try:
            return cls._in_own_precision(copy.deepcopy(module).double(), images.double())
        except Exception:  # it cannot be copied, or casts to a type of its own
            return reference

    @classmethod
    def _in_own_precision(cls, module: nn.Module, images: Tensor) -> _Reference:
        with torch.no_grad():
            answers = torch.cat([logits_of(module, image[None].clone()) for image in images[-KEPT:]])
        tolerance = TOLERANCES.get(answers.dtype, 3e-2) * max(answers.abs().max().item(), 1e-30)
        return cls(module, images, answers, tolerance)

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
        if (together - again).abs().max().item() > self.tolerance:
            raise BackboneError(
                f"{kind} answers the same batch differently each time: something in it is random in eval mode, too (dropout that is "
                "always on, torch.rand in a forward). Make that depend on self.training."
            )
        gap = (self.answers - together[-KEPT:]).abs().max().item()
        if not gap <= self.tolerance:
            raise BackboneError(
                f"{kind} answers the same image differently in another batch (off by {gap:.1e}): "
                "its rows influence one another, so none of them can leave early."
            )

    def objection(self, cuts: Sequence[Cut]) -> str | None:
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
            return f"the rest of the forward pass fails with fewer rows ({first_line(why).rstrip('.')})"
        finally:
            undo_cached(list(steps))
            for handle in handles:
                handle.remove()
        if got.shape != self.answers.shape:
            return f"with {KEPT} rows left the network still answers with shape {tuple(got.shape)}"
        gap = (got - self.answers).abs().max().item()
        if not gap <= self.tolerance:
            return f"resuming from it gives logits off by {gap:.1e} (allowed: {self.tolerance:.1e})"
        return None
