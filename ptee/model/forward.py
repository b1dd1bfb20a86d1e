"""One call of an early-exit model: what happens at each cut while the backbone runs.

The hooks stay on the backbone between calls and hold no state. A `Call` keeps the state of one call: which rows are still
there, and which left where. A hook finds the call of its own thread. So two threads can use one model at once, and a backbone
that is called by itself is the bare backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ptee._common.errors import Argument, PteeError, first_line
from ptee.analysis.cut_points import Cut
from ptee.analysis.freezing import one_parameter
from ptee.analysis.replay import ActiveRows, ReplayCache, RestartForward, Step, run
from ptee.exits.confidence import leaves
from ptee.exits.heads import ExitHead, HeadOutput
from ptee.exits.placement import INPUT
from ptee.exits.rule import ExitRule

COLLAPSED = 0.95  # share of rows at one exit above which the model acts as a shorter network


class ExitOutput(NamedTuple):
    """What `predict` answers, one entry for each row of the batch.

    Attributes:
        logits: (b, K), K classes, of the exit at which the row left, in the type of the backbone's own answer.
        exit_index: (b,) that exit, 0..E; E is the backbone's own output.
        confidence: (b,) h of that exit, float32; 1 at E.
        cost: (b,) what the row cost, as a fraction of the bare backbone.
    """

    logits: Tensor
    exit_index: Tensor
    confidence: Tensor
    cost: Tensor


class AllExits(NamedTuple):
    """What each of the E early exits answers to b rows, and what the backbone does, which comes last.

    Attributes:
        logits: (E+1, b, K); the last are the backbone's.
        confidence: (E+1, b) h, float32; the last are 1.
        confidence_logits: (E, b) of the heads' confidence layers, also where h is computed from something else.
    """

    logits: Tensor
    confidence: Tensor
    confidence_logits: Tensor


class Reading(NamedTuple):
    """What the heads read of some images, computed once however often the heads are trained on it.

    Attributes:
        inputs: for each exit the input of its head, after the layers of the head that are not trained.
        logits: (b, K) of the backbone.
    """

    inputs: tuple[Tensor, ...]
    logits: Tensor


def widest_type(module: nn.Module) -> torch.dtype:
    """The number type that holds those of all floating-point parameters of a network, some of which may be in half precision."""
    types = {p.dtype for p in module.parameters() if p.is_floating_point()}
    return reduce(torch.promote_types, types or {one_parameter(module).dtype})


class ExitHook:
    """A hook at a cut. It holds no model, so that a copy or a pickle of the backbone does not contain one."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Returns what replaces the module's output, or None."""
        call = _CALL.get()
        return None if call is None else call.on_cut(self, output)


class Call:
    """One pass of a model through its backbone. The base class only runs the heads: all rows stay and nothing is kept.

    `model` has `exit_hooks` and `heads`, one for each exit of its `plan`; `batch` is the number of rows.
    """

    skipped: tuple[int, ...] = ()  # exits whose heads do not run
    restarted = False  # this is not the first pass of the call

    def __init__(self, model: Any, batch: int) -> None:
        heads, plan = list(model.heads), model.plan
        if len(heads) != len(plan.exits):
            raise PteeError(
                f"This model has {len(heads)} heads for {len(plan.exits)} exits. Put back those that were taken out, or make it again "
                "with ptee.augment. To do without an exit, set model.off = [its number]."
            )
        self.hooks, self.heads, self.plan = model.exit_hooks, heads, plan
        self.rows = ActiveRows(batch)
        self.passed = 0
        self._enabled = torch.is_grad_enabled()
        self.through = False  # and of the backbone
        self.builds_on_previous = any(getattr(head, "builds_on_previous", False) for head in heads)
        self.keeps_logits = self.builds_on_previous  # for later exits
        self._logits: dict[int, tuple[int, Tensor]] = {}  # of the exits so far, each with its moment

    @property
    def gradients(self) -> bool:
        """Whether answers of heads carry gradients to the heads."""
        return self._enabled

    def forward(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """The backbone's answer. The exit at the input, if there is one, is the first that the images pass."""
        if self.plan.exits[0].name == INPUT:
            self._pass(0, images)
        return self._run_backbone(backbone, images)

    def _run_backbone(self, backbone: nn.Module, images: Tensor) -> Tensor:
        answer: Tensor = backbone(images)
        return answer

    def on_cut(self, hook: ExitHook, output: Any) -> Any:
        """Called with the backbone's output at a cut; returns what replaces it, or None."""
        n = next((i for i, own in enumerate(self.hooks) if own is hook), None)
        if n is None:
            return None  # another model's, on the same backbone
        if n < self.passed and self.restarted:
            return None  # the rows that left here are gone
        if n != self.passed:
            raise PteeError(
                f"Exit {n} ({self.plan.exits[n].name}) was reached when exit {self.passed} was expected: this input "
                "takes another way through the backbone than the one the exits were planned for."
            )
        return self._pass(n, output)

    def on_head_output(self, n: int, cut: Cut, output: Any, said: HeadOutput, earlier: Mapping[int, Tensor]) -> Any:
        """Called with a head's answer and the logits of the exits so far; returns what replaces the backbone's output, or None."""
        return None

    def _pass(self, n: int, output: Any) -> Any:
        self.passed += 1
        if n in self.skipped:
            return None
        cut = self.plan.cuts[n]
        z = cut.feature_map(output)
        if cut.overwritten and self.gradients:
            z = z.clone()  # the backward pass needs it as it is now
        return self._at_exit(n, cut, output, z)

    def _at_exit(self, n: int, cut: Cut, output: Any, z: Tensor) -> Any:
        earlier = self._earlier()
        said = self._run_head(n, cut, z, list(earlier.values()))
        if self.keeps_logits:
            self._logits[n] = self.rows.moment, said.logits
        return self.on_head_output(n, cut, output, said, earlier)

    def _require_all_rows(self, where: str, found: int) -> None:
        """Refuse other rows at a place than those that are left. `where` begins the sentence."""
        if found == (left := self.rows.count):
            return
        said = f"{where} {found} rows where {left} {'is' if left == 1 else 'are'} left: the backbone "
        if self.rows.moment and found > left:
            raise PteeError(
                f"{said}goes on with rows that left. Was a module put in or replaced after augment(), or does its code catch every "
                "exception? Mend that, or make new exits: ptee.augment(model.detach(), ...)."
            )
        fewer = str(found if found < left else left // 2)
        advice = "takes its batch apart. Give it smaller batches: where ptee makes them, "
        raise PteeError(said + advice, Argument("batch_size", fewer), ".")

    def _require_all_rows_at(self, n: int, found: int) -> None:
        self._require_all_rows(f"Exit {n} ({self.plan.exits[n].name}) was reached with", found)

    def _earlier(self) -> dict[int, Tensor]:
        """The logits (b, K) of the exits so far, of the rows that are still there."""
        return {n: self.rows.select(logits, moment) for n, (moment, logits) in self._logits.items()}

    def _run_head(self, n: int, cut: Cut, z: Tensor, earlier: Sequence[Tensor]) -> HeadOutput:
        """The head's answer, given the logits of the exits so far."""
        try:
            with self._beside_backbone(n):
                head: Any = self.heads[n]
                said: HeadOutput = head(z, earlier) if self.builds_on_previous else HeadOutput(*head(z))
        except RuntimeError as why:
            if z.shape[1:] == cut.shape:
                raise
            raise PteeError(
                f"Exit {n} ({self.plan.exits[n].name}) was planned for a feature map {tuple(cut.shape)} and its head cannot "
                f"read this one, {tuple(z.shape[1:])} ({first_line(why).rstrip('.')}): the images have another size than "
                f"{self.plan.input_size}. Plan the exits again with their input_size."
            ) from why

        if said.logits.shape[-1] != self.plan.classes:
            raise PteeError(
                f"Exit {n} ({self.plan.exits[n].name}) answers with {said.logits.shape[-1]} classes, and the exits were made for "
                f"{self.plan.classes}: its head is another than ptee.augment made. Make the model again."
            )
        return said

    @contextmanager
    def _beside_backbone(self, n: int) -> Iterator[None]:
        """A head runs outside of this call, with its own gradients, even where the backbone has none or checkpoints them."""
        if self.through and not torch.is_grad_enabled():
            raise PteeError(
                f"Gradients of the images do not reach exit {n} ({self.plan.exits[n].name}): the backbone computes it without, by "
                "reentrant checkpointing or torch.no_grad in its own code. Switch that off, or give images without requires_grad."
            )
        apart = saved_tensors_hooks(Tensor.detach, lambda t: t) if self.through else nullcontext()
        with running(None), torch.set_grad_enabled(self.gradients), apart:
            yield

    def check(self, answer: Tensor) -> None:
        """Refuse an answer of the backbone that is not of the network that the exits were planned for."""
        self._require_all_rows("The backbone answers for", len(answer))
        self.check_all_passed()
        if answer.shape[1:] != (self.plan.classes,):
            raise PteeError(
                f"The backbone answers with {answer.shape[-1]} classes, and the exits were made for {self.plan.classes}: it has "
                "another last layer. Put that back, or make new exits: ptee.augment(model.detach(), ...)."
            )

    def check_all_passed(self) -> None:
        """Refuse an answer that passed no exit, as of a compiled or changed backbone that does not run its hooks."""
        if self.passed < len(self.plan.exits):
            name = self.plan.exits[self.passed].name
            raise PteeError(
                f"The backbone gave its answer without passing exit {self.passed} ({name}): its hooks did not run. "
                "Was the backbone compiled or changed after augment()?"
            )


class RecordAll(Call):
    """No row leaves, and the heads' answers are kept."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__(model, batch)
        self.outputs: list[HeadOutput] = []

    def on_head_output(self, n: int, cut: Cut, output: Any, said: HeadOutput, earlier: Mapping[int, Tensor]) -> None:
        """Keep what the head answered."""
        self._require_all_rows_at(n, len(said.logits))
        self.outputs.append(said)


class RecordInputs(Call):
    """No row leaves, and the heads' inputs are kept; the heads do not answer."""

    def __init__(self, model: Any, batch: int) -> None:
        super().__init__(model, batch)
        self.inputs: list[Tensor] = []

    def _at_exit(self, n: int, cut: Cut, output: Any, z: Tensor) -> None:
        head = self.heads[n]
        assert isinstance(head, ExitHead)
        with self._beside_backbone(n):
            x = head.read(z)
        self._require_all_rows_at(n, len(x))
        self.inputs.append(x.clone() if cut.overwritten else x)


class _Leavers(NamedTuple):
    """Rows that left together: which (None for all), at which exit, with which answer."""

    rows: Tensor | None
    exit: int
    logits: Tensor
    confidence: Tensor


class ExitEarly(Call):
    """Rows leave at the first exit n with h_n >= T_n.

    `model` also has the `rule`: what the exits answer and how sure they are. `thresholds` has T of each, a number or (b,); `steps` the
    modules to replay where the pass must start again.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        thresholds: Sequence[float | Tensor],
        steps: Mapping[nn.Module, Step] | None = None,
    ) -> None:
        super().__init__(model, batch)
        self.skipped = self.plan.skipped
        self.rule: ExitRule = model.rule
        self.thresholds = thresholds
        self.keeps_logits |= self.rule.reads_earlier
        self.cache = ReplayCache(steps or {}, self.rows)
        self._left: list[_Leavers] = []

    @property
    def gradients(self) -> bool:
        """Only with those of the backbone: else it would depend on the other rows of the batch."""
        return self.through

    @property
    def restarted(self) -> bool:  # type: ignore[override]
        """This is not the first pass of the call."""
        return self.cache.restarted

    def _run_backbone(self, backbone: nn.Module, images: Tensor) -> Tensor:
        return run(backbone, images, self.cache)

    def on_head_output(self, n: int, cut: Cut, output: Any, said: HeadOutput, earlier: Mapping[int, Tensor]) -> Any:
        """Take the rows that are confident enough out of the batch."""
        if n in self.plan.off:
            return None
        self._require_all_rows_at(n, len(said.logits))
        logits, h = self.rule.at_exit(n, said.logits, said.confidence_logit, earlier)
        stay = ~leaves(h, self._threshold(n))
        staying = int(stay.sum())  # the only host synchronisation of this exit
        if staying == len(h):
            return None
        if staying == 0:
            self._left.append(_Leavers(self.rows.since(), n, logits, h))
            self.rows.keep(stay.new_empty(0, dtype=torch.int64))
            raise StopForward
        order = stay.to(torch.uint8).argsort(stable=True)  # leavers first; their number is known without a second look
        leavers, stayers = order[: len(h) - staying], order[len(h) - staying :]
        positions = self.rows.since()
        self._left.append(
            _Leavers(
                leavers if positions is None else positions.index_select(0, leavers),
                n,
                logits.index_select(0, leavers),
                h.index_select(0, leavers),
            )
        )
        return self._go_on_with(stayers, cut, output)

    def _go_on_with(self, stayers: Tensor, cut: Cut, output: Any) -> Any:
        if cut.steps:
            self.cache.require(cut.steps)
        self.rows.keep(stayers)
        if cut.steps:
            raise RestartForward
        return cut.select(output, stayers)

    def _threshold(self, n: int) -> float | Tensor:
        t = self.thresholds[n]
        return t if isinstance(t, float) or t.dim() == 0 else self.rows.select(t)

    def result(self, answer: Tensor | None, dtype: torch.dtype | None = None) -> ExitOutput:
        """The rows back in order. `answer` is the backbone's for rows that never left; None where all rows left."""
        if answer is not None:
            dtype = answer.dtype
            sure = torch.ones(len(answer), dtype=torch.float32, device=answer.device)
            self._left.append(_Leavers(self.rows.since(), len(self.plan.exits), self._at_end(answer), sure))
        costs = self.plan.costs
        logits = _joined([p.logits for p in self._left]).to(dtype or self._left[-1].logits.dtype)
        confidence = _joined([p.confidence for p in self._left])
        index = _joined([torch.full_like(p.confidence, p.exit, dtype=torch.int64) for p in self._left])
        cost = _joined([torch.full_like(p.confidence, costs[p.exit]) for p in self._left])
        if len(self._left) > 1:
            back = torch.cat([p.rows for p in self._left if p.rows is not None]).argsort()
            logits, index, confidence, cost = (t.index_select(0, back) for t in (logits, index, confidence, cost))
        return ExitOutput(logits, index, confidence, cost)

    def _at_end(self, own: Tensor) -> Tensor:
        """The answers of the rows that never left."""
        thresholds = {n: self._threshold(n) for n in range(len(self.thresholds))}
        return self.rule.at_end(own, self._earlier(), thresholds)


class SoftAnswer(ExitEarly):
    """No row leaves, and each gets Y_0, a soft ensemble of all exits that are on and the backbone (h_E = 1):

        Y_n = h_n y_n + (1 - h_n) Y_{n+1}        Y_E = y_E

    y_n are the exits' own probabilities, h_n the model's confidence. This is the first way of inference of differentiable branching
    (Scardapane et al. 2020). It saves nothing: every row costs c_E. An exit that is off has no part in it, as if its h were 0, and
    neither has one whose h is not finite. With all exits off Y_0 is the backbone's answer. Logits are log Y_0.
    """

    def on_head_output(self, n: int, cut: Cut, output: Any, said: HeadOutput, earlier: Mapping[int, Tensor]) -> None:
        """Keep log y_n and h_n."""
        if self.rule.blend is not None:
            raise PteeError(
                "Soft answers are made of the exits' own, and this model's are blended. Set model.answers = 'own'."
            )
        if n not in self.plan.off:
            logits, h = self.rule.at_exit(n, said.logits, said.confidence_logit, earlier)
            self._left.append(_Leavers(None, n, logits.float().log_softmax(-1), h.clamp(0, 1)))

    def result(self, answer: Tensor | None, dtype: torch.dtype | None = None) -> ExitOutput:
        """log Y_0 of all rows; `answer` is the backbone's."""
        assert answer is not None  # no row left
        blended = answer.float().log_softmax(-1)
        for _, _, log_y, h in reversed(self._left):
            leave, stay = (share[:, None] for share in (h.log(), (-h).log1p()))
            blended = torch.where(h[:, None] > 0, torch.logaddexp(leave + log_y, stay + blended), blended)
        sure = torch.ones(len(answer), dtype=torch.float32, device=answer.device)
        end = len(self.plan.exits)
        return ExitOutput(
            blended.to(answer.dtype), torch.full_like(sure, end, dtype=torch.int64), sure, sure * self.plan.costs[-1]
        )


def kind_of_call(soft: bool, given: bool) -> type[ExitEarly]:
    """What is run for hard or soft answers. Thresholds that are given have no meaning for soft ones."""
    if soft and given:
        raise PteeError(
            "Soft answers have no threshold: no row leaves. Leave out ", Argument("threshold"), ".", argument="soft"
        )
    return SoftAnswer if soft else ExitEarly


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class StopForward(BaseException):  # not an Exception: a backbone's own `except Exception` must not swallow it
    """No row is left, so the rest of the backbone need not run."""


_CALL: ContextVar[Call | None] = ContextVar("the call of an early-exit model that is running", default=None)


@contextmanager
def running(call: Call | None) -> Iterator[None]:
    """While this lasts, hooks in this thread belong to `call`."""
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)
