"""One call of an early-exit model: what happens at each cut while the backbone runs.

The hooks stay on the backbone between calls and know nothing. What a call knows (who is still in the batch, who left where) lives
in the call, and hooks find the call of their own thread; so two threads may use one model at once, and a backbone that is
called by itself is the bare backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ptee._common.errors import PteeError, first_line
from ptee.analysis.cut_points import Cut
from ptee.analysis.replay import Again, Memory
from ptee.exits.heads import ExitHead, confidence_of
from ptee.exits.placement import INPUT
from ptee.exits.plan import Plan

COLLAPSED = 0.95  # share of the rows at one exit above which the model is a shorter network, not an adaptive one


class ExitOutput(NamedTuple):
    """What `predict` answers, one entry for each row of the batch.

    Attributes:
        logits: (b, K) of the exit at which the row left, in the type of the backbone's own answer.
        exit_index: (b,) that exit, 0..E; E is the backbone's own output.
        confidence: (b,) h of that exit, float32; 1 at E.
        cost: (b,) what the row cost, as a fraction of the bare backbone.
    """

    logits: Tensor
    exit_index: Tensor
    confidence: Tensor
    cost: Tensor


class ExitHook:
    """Stands at a cut. It knows no model, so that copies and pickles of a backbone do not drag one along."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The module has given `output`; what is returned takes its place."""
        call = _CALL.get()
        return None if call is None else call.arrive(self, output)


class Call(ABC):
    """One run of a model through its backbone."""

    def __init__(self, hooks: Sequence[ExitHook], heads: Sequence[nn.Module], plan: Plan) -> None:
        self.hooks, self.heads, self.plan = hooks, heads, plan
        self.passed = 0
        self.gradients = torch.is_grad_enabled()  # wanted of the heads
        self.through = False  # and of the backbone
        self.skipped: tuple[int, ...] = ()  # exits whose heads are not run
        self.memory = Memory({})
        self.earlier: list[Tensor] | None = None  # logits of the exits so far, where a head builds on them
        if any(getattr(head, "builds_on_previous", False) for head in heads):
            self.earlier = []

    def enter(self, images: Tensor) -> None:
        """The images are there: the exit at the input, if there is one, is the first."""
        if self.plan.exits[0].name == INPUT:
            self._pass(0, images)

    def arrive(self, hook: ExitHook, output: Any) -> Any:
        """The backbone has given the output at a cut. Returns what it goes on with, None for the same."""
        n = next((i for i, own in enumerate(self.hooks) if own is hook), None)
        if n is None:
            return None  # another model's, on the same backbone
        if n < self.passed and self.memory.begun_anew:
            return None  # the rows that left here are gone
        if n != self.passed:
            raise PteeError(
                f"Exit {n} ({self.plan.exits[n].name}) was reached when exit {self.passed} was expected: this input "
                "takes another way through the backbone than the one the exits were planned for."
            )
        return self._pass(n, output)

    def _pass(self, n: int, output: Any) -> Any:
        self.passed += 1
        if n in self.skipped:
            return None
        cut = self.plan.cuts[n]
        z = cut.feature_map(output)
        if cut.overwritten and self.gradients:
            z = z.clone()  # the backward pass needs it as it is now
        return self.visit(n, cut, output, *self._ask(n, cut, z))

    def _ask(self, n: int, cut: Cut, z: Tensor) -> tuple[Tensor, Tensor]:
        """What the head says, which runs outside of this call."""
        try:
            with self._beside_backbone(n):
                head: Any = self.heads[n]
                if self.earlier is None:
                    logits, confidence = head(z)
                    return logits, confidence
                output = head.follow(z, self.earlier)
                self.earlier = [*self.earlier, output.logits]
                return output.logits, output.confidence
        except RuntimeError as why:
            if z.shape[1:] == cut.shape:
                raise
            raise PteeError(
                f"Exit {n} ({self.plan.exits[n].name}) was planned for a feature map {tuple(cut.shape)} and its head cannot "
                f"read this one, {tuple(z.shape[1:])} ({first_line(why).rstrip('.')}): the images have another size than "
                f"{self.plan.input_size}. Plan anew with their input_size."
            ) from why

    @contextmanager
    def _beside_backbone(self, n: int) -> Iterator[None]:
        """A head runs outside of this call, with gradients of its own, even where the backbone keeps none or checkpoints them."""
        if self.through and not torch.is_grad_enabled():
            raise PteeError(
                f"Gradients of the images do not reach exit {n} ({self.plan.exits[n].name}): the backbone computes it without, by "
                "reentrant checkpointing or torch.no_grad in its own code. Switch that off, or give images without requires_grad."
            )
        apart = saved_tensors_hooks(Tensor.detach, lambda t: t) if self.through else nullcontext()
        with running(None), torch.set_grad_enabled(self.gradients), apart:
            yield

    @abstractmethod
    def visit(self, n: int, cut: Cut, output: Any, logits: Tensor, confidence: Tensor) -> Any:
        """What to do with a head's answer."""

    def check_all_passed(self) -> None:
        """Nobody may reach the end around an exit: a compiled or changed backbone does not run its hooks."""
        if self.passed < len(self.plan.exits):
            name = self.plan.exits[self.passed].name
            raise PteeError(
                f"The backbone gave its answer without passing exit {self.passed} ({name}): its hooks did not run. "
                "Was the backbone compiled or changed after augment()?"
            )


class Watching(Call):
    """Nobody leaves."""

    def __init__(self, hooks: Sequence[ExitHook], heads: Sequence[nn.Module], plan: Plan) -> None:
        super().__init__(hooks, heads, plan)
        self.logits: list[Tensor] = []
        self.confidence_logits: list[Tensor] = []

    def visit(self, n: int, cut: Cut, output: Any, logits: Tensor, confidence: Tensor) -> None:
        """Keep what the head said; everybody goes on."""
        self.logits.append(logits)
        self.confidence_logits.append(confidence)


class Read(Call):
    """Nobody leaves, and no head answers."""

    def __init__(self, hooks: Sequence[ExitHook], heads: Sequence[nn.Module], plan: Plan) -> None:
        super().__init__(hooks, heads, plan)
        self.inputs: list[Tensor] = []

    def _ask(self, n: int, cut: Cut, z: Tensor) -> tuple[Tensor, Tensor]:
        head = self.heads[n]
        assert isinstance(head, ExitHead)
        with self._beside_backbone(n):
            read = head.read(z)
        return (read.clone() if cut.overwritten else read), z  # there is no confidence

    def visit(self, n: int, cut: Cut, output: Any, logits: Tensor, confidence: Tensor) -> None:
        """Keep what the head read; everybody goes on."""
        self.inputs.append(logits)


class _Part(NamedTuple):
    """Rows that left together: which ones (None for all), where, and what they got."""

    rows: Tensor | None
    exit: int
    logits: Tensor
    confidence: Tensor


class Leaving(Call):
    """Rows leave at the first exit n with h_n >= T_n."""

    def __init__(
        self,
        hooks: Sequence[ExitHook],
        heads: Sequence[nn.Module],
        plan: Plan,
        thresholds: Sequence[float | Tensor],
        memory: Memory | None = None,
    ) -> None:
        super().__init__(hooks, heads, plan)
        self.memory = memory or Memory({})
        self.skipped, self.off = plan.skipped, plan.off
        self.thresholds = thresholds
        self.rows: Tensor | None = None  # who is still here, as positions in the batch; None for all
        self.parts: list[_Part] = []

    def visit(self, n: int, cut: Cut, output: Any, logits: Tensor, confidence: Tensor) -> Any:
        """Take the sure rows out of the batch."""
        if n in self.off:
            return None
        h = confidence_of(confidence)
        if self.memory.batch not in (None, len(h)):
            raise PteeError(
                f"Exit {n} ({self.plan.exits[n].name}) was reached with {len(h)} rows where {self.memory.batch} are left: the "
                "backbone takes its batch apart. Give it smaller batches."
            )
        wide = h if h.device.type == "mps" else h.double()  # a threshold that is no float32 must not be rounded to one
        stay = ~(wide >= self._threshold(n))  # NaN is no answer to "sure enough?"
        staying = int(stay.sum())  # the one host synchronisation of this exit
        if staying == len(h):
            return None
        if staying == 0:
            self.parts.append(_Part(self.rows, n, logits, h))
            raise AllLeft
        order = stay.to(torch.uint8).argsort(stable=True)  # leavers first; their number is known, so no second look
        leavers, stayers = order[: len(h) - staying], order[len(h) - staying :]
        here = torch.arange(len(h), device=h.device) if self.rows is None else self.rows
        self.parts.append(_Part(here[leavers], n, logits.index_select(0, leavers), h.index_select(0, leavers)))
        self.rows = here[stayers]
        self.earlier = self.earlier and [logits.index_select(0, stayers) for logits in self.earlier]
        if cut.steps:
            self.memory.require(cut.steps)
        self.memory.keep_rows(stayers)
        if cut.steps:
            raise Again
        return cut.select(output, stayers)

    def _threshold(self, n: int) -> float | Tensor:
        t = self.thresholds[n]
        return t if self.rows is None or isinstance(t, float) or t.dim() == 0 else t.index_select(0, self.rows)

    def result(self, answer: Tensor | None, dtype: torch.dtype | None = None) -> ExitOutput:
        """Put the rows back in order.

        Args:
            answer: the backbone's for those who never left; None where all did.
            dtype: of the logits; None for that of the answer, or of the last exit.
        """
        if answer is not None:
            sure = torch.ones(len(answer), device=answer.device)
            self.parts.append(_Part(self.rows, len(self.plan.exits), answer, sure))
        costs = self.plan.costs
        logits = _joined([p.logits for p in self.parts]).to(dtype or self.parts[-1].logits.dtype)
        confidence = _joined([p.confidence for p in self.parts])
        index = _joined([torch.full_like(p.confidence, p.exit, dtype=torch.int64) for p in self.parts])
        cost = _joined([torch.full_like(p.confidence, costs[p.exit]) for p in self.parts])
        if len(self.parts) > 1:
            back = torch.cat([p.rows for p in self.parts if p.rows is not None]).argsort()
            logits, index, confidence, cost = (t.index_select(0, back) for t in (logits, index, confidence, cost))
        return ExitOutput(logits, index, confidence, cost)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class AllLeft(BaseException):  # not an Exception: a backbone's own `except Exception` must not swallow it
    """Nobody is left, so the rest of the backbone need not run."""


_CALL: ContextVar[Call | None] = ContextVar("the call of an early-exit model that is going on", default=None)


@contextmanager
def running(call: Call | None) -> Iterator[None]:
    """While this lasts, hooks in this thread belong to `call`."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)
