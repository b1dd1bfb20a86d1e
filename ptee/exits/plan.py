"""Plans: where the exits of a backbone stand and what each costs, to be read and printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ptee._common.text import Readable, table
from ptee.analysis.cut_points import Cut
from ptee.analysis.macs import count
from ptee.analysis.parameters import number_of_parameters
from ptee.exits.confidence import CONFIDENCES, LEARNED
from ptee.exits.heads import ExitHead

OF_PARAMETERS = "of parameters: share of the backbone's parameters up to the exit, by which it was placed; backbone: of the operations"


def heads_run(on: Tensor, builds_on_previous: Tensor) -> Tensor:
    """(..., E) which heads run: those that are on (..., E), and those before a head that is on and reads earlier answers (E,)."""
    needed = (on & builds_on_previous).flip(-1).cumsum(-1).flip(-1) > 0  # by this exit or a later one
    return on | torch.cat([needed[..., 1:], torch.zeros_like(needed[..., :1])], -1)


@dataclass(frozen=True)
class Exit:
    """One early exit. All costs are fractions of the bare backbone's multiply-accumulates.

    Attributes:
        name: the module behind which it stands.
        backbone_cost: B_n / B, the backbone up to the end of that module.
        head_cost: H_n / B, its head alone.
        cost: c_n of a sample that leaves here: the backbone so far, and all heads that were run.
        shape: of the tensor its head reads, of one sample.
        parameters: of its head.
        head: name of its head.
        builds_on_previous: its head reads the logits of the exit before.
    """

    name: str
    backbone_cost: float
    head_cost: float
    cost: float
    shape: tuple[int, ...]
    parameters: int
    head: str
    builds_on_previous: bool = False


class TimesOfModules(NamedTuple):
    """What was measured of a backbone.

    Attributes:
        shares: of its time, up to the end of each module.
        seconds: of a batch.
        unit: what the shares are of, in words.
    """

    shares: dict[str, float]
    seconds: float
    unit: str


@dataclass(frozen=True)
class Plan(Readable):
    """Where the exits of a backbone stand and what they cost. Prints as a table.

    Attributes:
        backbone: its name.
        placement: the rule, or how the exits were named.
        input_size: (c, h, w) for which everything was counted.
        exits: in order of execution.
        macs: B, multiply-accumulates of the bare backbone for one sample.
        parameters: of the backbone.
        classes: K.
        cuts: what the hooks need, one per exit.
        off: exits where no row leaves. Their heads do not run, unless a later exit reads their answers.
        confidence: a name of `CONFIDENCES`, by which rows leave.
        times: share of the backbone's time up to each exit; empty if it was not measured.
        unit: what these shares are of, in words.
        parameter_shares: share of the backbone's parameters up to each exit; empty if places were not chosen by these.
    """

    backbone: str
    placement: str
    input_size: tuple[int, int, int]
    exits: tuple[Exit, ...]
    macs: int
    parameters: int
    classes: int
    cuts: tuple[Cut, ...] = field(repr=False)
    off: tuple[int, ...] = ()
    confidence: str = LEARNED
    times: tuple[float, ...] = ()
    unit: str = ""
    parameter_shares: tuple[float, ...] = ()
    legend: ClassVar[str] = (
        "backbone, head cost, cost: fractions of the bare backbone's multiply-accumulates. backbone: up to the exit; cost: of an "
        "image that\nleaves there, with every head on its way."
    )

    @property
    def head(self) -> str:
        """Name of the exits' heads; of each, with commas between, where they differ."""
        names = [e.head for e in self.exits]
        return names[0] if len(set(names)) == 1 else ", ".join(names)

    @property
    def costs(self) -> tuple[float, ...]:
        """c_0 .. c_E: what is spent on a sample that leaves at each exit, and on one that never leaves."""
        return (*(e.cost for e in self.exits), self.final_cost)

    @property
    def final_cost(self) -> float:
        """c_E of a sample that never leaves: the whole backbone and all heads that are run."""
        return 1 + sum(0.0 if n in self.skipped else e.head_cost for n, e in enumerate(self.exits))

    @property
    def reads_earlier_exits(self) -> list[bool]:
        """(E,) exits that read the answers of those before them, for their own answer or for their confidence."""
        everywhere = CONFIDENCES[self.confidence].needs_answers_of_earlier_exits
        return [e.builds_on_previous or everywhere for e in self.exits]

    @property
    def on(self) -> tuple[int, ...]:
        """Exits that are not off."""
        return tuple(n for n in range(len(self.exits)) if n not in self.off)

    @cached_property  # each call of a model asks for it
    def skipped(self) -> tuple[int, ...]:
        """Exits whose heads are not run."""
        last = max((n for n, reads in enumerate(self.reads_earlier_exits) if reads and n not in self.off), default=-1)
        return tuple(n for n in sorted(self.off) if n >= last)  # those before it are run for its sake

    def switched_off(self, off: Sequence[int]) -> Plan:
        """The same plan with these exits off and all others on."""
        plan = replace(self, off=tuple(sorted(off)))
        heads = accumulate(0.0 if n in plan.skipped else e.head_cost for n, e in enumerate(self.exits))
        rows = [replace(e, cost=e.backbone_cost + passed) for e, passed in zip(self.exits, heads, strict=True)]
        return replace(plan, exits=tuple(rows))

    def with_confidence(self, name: str) -> Plan:
        """The same plan where rows leave by another confidence, a key of `CONFIDENCES`."""
        return replace(self, confidence=name).switched_off(self.off)

    @property
    def least_cost(self) -> float:
        """The cost where all rows leave at one exit and the others are off, at the cheapest exit."""
        every = range(len(self.exits))
        return min(self.switched_off([m for m in every if m != n]).costs[n] for n in every)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; "exits" holds a row for each early exit."""
        plain = {k: v for k, v in asdict(self).items() if k != "cuts"}
        rows = [
            asdict(e)
            | {"shape": list(e.shape)}
            | {"tensor": cut.main, "tensors": len(cut.carried), "restarts": bool(cut.steps)}
            for e, cut in zip(self.exits, self.cuts, strict=True)
        ]
        derived = {"head": self.head, "input_size": list(self.input_size), "final_cost": self.final_cost}
        return plain | derived | {"exits": rows}

    def __str__(self) -> str:
        differ = len({e.head for e in self.exits}) > 1
        size = "x".join(map(str, self.input_size))
        heads = "several kinds of heads" if differ else f"{self.head} heads"
        title = f"{self.backbone}, {size}, {self.macs / 1e6:,.1f} M multiply-accumulates; {self.placement}, {heads}"
        timed = [f"time: share of {self.unit}, up to the exit"] * bool(self.times)
        sized = [OF_PARAMETERS] * bool(self.parameter_shares)
        return "\n".join([title, *timed, *sized, self._table(differ), *self._notes()])

    def _table(self, differ: bool) -> str:
        """A row for each exit and one for the backbone. The heads have a column where they differ."""
        more = {"head": [*(e.head for e in self.exits), ""]} if differ else {}
        for name, shares in {"time": self.times, "of parameters": self.parameter_shares}.items():
            more |= {name: [f"{share:.4f}" for share in (*shares, 1.0)]} if shares else {}
        rows = [("exit", "module", "shape", *more, "backbone", "head cost", "cost", "parameters")]
        for n, (e, cut) in enumerate(zip(self.exits, self.cuts, strict=True)):
            costs = (f"{cost:.4f}" for cost in (e.backbone_cost, e.head_cost, e.cost))
            rows.append((str(n), e.name, _shape(e, cut), *(c[n] for c in more.values()), *costs, f"{e.parameters:,}"))
        end = (*(c[-1] for c in more.values()), "1.0000", "", f"{self.final_cost:.4f}", f"{self.parameters:,}")
        return table([*rows, (str(len(self.exits)), "(backbone)", str(self.classes), *end)], left={1})

    def _notes(self) -> Iterator[str]:
        yield from (self._why_too_expensive(n) for n, e in enumerate(self.exits) if e.cost >= 1 and n not in self.off)
        if restarts := [str(n) for n, cut in enumerate(self.cuts) if cut.steps]:
            yield (
                f"When rows leave at exit {', '.join(restarts)}, the forward pass starts again with the other rows, because the "
                "backbone's code remembers the whole batch. No module computes anything twice."
            )
        if self.off:
            needed = ", ".join(str(n) for n in self.off if n not in self.skipped)
            but = f", except at {needed}, which later heads build on" if needed else ""
            yield f"Off: exit {', '.join(map(str, self.off))}. No row leaves there, and no head runs there{but}."
        if self.confidence != LEARNED:
            yield f"Rows leave by the confidence {self.confidence!r}."

    def _why_too_expensive(self, n: int) -> str:
        e = self.exits[n]
        alone = e.backbone_cost + e.head_cost
        mend = f"Take a cheaper head than {e.head} there, or an earlier exit."
        if alone < 1:
            mend = f"Without the heads before it, it would cost {alone:.4f}: take fewer exits or cheaper heads."
        return f"Exit {n} ({e.name}) costs {e.cost:.4f}, no less than the bare backbone: it cannot pay. {mend}"


def _shape(exit_: Exit, cut: Cut) -> str:
    """Of the tensor that the head reads; where the module gives several that are read later, also which of these it is."""
    which = f" ({cut.carried.index(cut.main) + 1} of {len(cut.carried)})" if len(cut.carried) > 1 else ""
    return "x".join(map(str, exit_.shape)) + which


# ---------------------------------------------------------------------------------------------------- counting


def counted(
    backbone_costs: Sequence[float], cuts: Sequence[Cut], heads: Sequence[ExitHead], names: Sequence[str], macs: int
) -> tuple[Exit, ...]:
    """The exits with what their heads cost. `Plan.switched_off` adds up `cost`."""
    return tuple(
        Exit(
            name=cut.name,
            backbone_cost=share,
            head_cost=_head_macs(head, cut, first=n == 0) / macs,
            cost=0.0,
            shape=cut.shape,
            parameters=number_of_parameters(head),
            head=name,
            builds_on_previous=head.builds_on_previous,
        )
        for n, (share, cut, head, name) in enumerate(zip(backbone_costs, cuts, heads, names, strict=True))
    )


def _head_macs(head: ExitHead, cut: Cut, first: bool) -> int:
    """Multiply-accumulates of a head for one sample."""
    like = next(head.parameters())
    example = torch.zeros(1, *cut.shape, device=like.device, dtype=like.dtype)
    return count(_AfterAnother(head, first), example).total


class _AfterAnother(nn.Module):
    """A head as a module of one input, to be counted: after an exit whose logits are 0, or as the first."""

    def __init__(self, head: ExitHead, first: bool) -> None:
        super().__init__()
        self.head, self.first = head, first

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(1, K) logits and (1,) the confidence logit."""
        earlier = () if self.first else (z.new_zeros(len(z), self.head.num_classes),)
        output = self.head(z, earlier)
        return output.logits, output.confidence_logit
