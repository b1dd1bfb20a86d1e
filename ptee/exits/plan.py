"""Plans: where the exits of a backbone stand and what each costs, to be read, printed and built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ptee._common.errors import unknown
from ptee._common.process import alone
from ptee._common.text import table
from ptee.analysis.cut_points import Cut, random_images, survey
from ptee.analysis.freezing import freeze
from ptee.analysis.macs import count, parameters
from ptee.backbones.load import Backbone, load_backbone
from ptee.exits.confidence import CONFIDENCES, LEARNED
from ptee.exits.front import FrontHead, beside_input, front_network, input_cut, named_front, refuse_namesake
from ptee.exits.head_names import head_names
from ptee.exits.heads import ExitHead
from ptee.exits.placement import CHOSEN, PLACEMENTS, Placer
from ptee.exits.residual_head import AfterOthers, make_heads, require_tensors

CONVENTIONS = ("full", "paper")


def heads_run(on: Tensor, looks_back: Tensor) -> Tensor:
    """Which heads are run: those that are on, and those that one behind them reads which is on.

    Args:
        on: (..., E) bool, exits where rows may leave.
        looks_back: (E,) bool, exits that read what those before them answered.
    """
    reads = (on & looks_back).flip(-1).cumsum(-1).flip(-1) > 0  # this one or a later one
    return on | torch.cat([reads[..., 1:], torch.zeros_like(reads[..., :1])], -1)


@dataclass(frozen=True)
class Exit:
    """One early exit. All costs are fractions of the bare backbone's multiply-accumulates.

    Attributes:
        name: the module behind which it stands.
        backbone_cost: B_n / B, the backbone up to and with that module.
        head_cost: H_n / B, its head alone.
        cost: c_n of a sample that leaves here: all heads passed on the way are counted, unless the plan says "paper".
        shape: of the tensor its head reads, of one sample.
        parameters: of its head.
        head: name of its head.
        linked: its head reads what the heads before it answered.
    """

    name: str
    backbone_cost: float
    head_cost: float
    cost: float
    shape: tuple[int, ...]
    parameters: int
    head: str
    linked: bool = False


@dataclass(frozen=True)
class Plan:
    """Where the exits of a backbone stand and what they cost. Prints as a table.

    Attributes:
        backbone: its name.
        head: name of the exits' heads; of each, with commas between, where they differ.
        placement: the rule, or how the exits were named.
        input_size: (c, h, w) for which everything was counted.
        exits: in order of execution.
        final_cost: c_E of a sample that never leaves.
        macs: B, multiply-accumulates of the bare backbone for one sample.
        parameters: of the backbone.
        convention: in which the exits' `cost` and `final_cost` are given: "full" or "paper". `costs` is full in any case.
        classes: K.
        cuts: what the hooks need, one per exit.
        off: exits at which nobody leaves; their heads are not run, unless a later exit reads what they answer.
        confidence: a name of `CONFIDENCES`, by which rows leave.
    """

    backbone: str
    head: str
    placement: str
    input_size: tuple[int, int, int]
    exits: tuple[Exit, ...]
    final_cost: float
    macs: int
    parameters: int
    convention: str
    classes: int
    cuts: tuple[Cut, ...] = field(repr=False)
    off: tuple[int, ...] = ()
    confidence: str = LEARNED

    @property
    def costs(self) -> tuple[float, ...]:
        """c_0 .. c_E in full count, whatever the plan shows: what is really spent on a sample that leaves there."""
        passed = list(accumulate(0.0 if n in self.skipped else e.head_cost for n, e in enumerate(self.exits)))
        return (*(e.backbone_cost + p for e, p in zip(self.exits, passed, strict=True)), 1 + passed[-1])

    @property
    def looks_back(self) -> list[bool]:
        """(E) exits that read what those before them answered: for their own answer, or to compute their confidence."""
        everywhere = CONFIDENCES[self.confidence].needs_answers_of_earlier_exits
        return [e.linked or everywhere for e in self.exits]

    @cached_property  # each call of a model asks for it
    def skipped(self) -> tuple[int, ...]:
        """Exits whose heads are not run."""
        on = torch.tensor([n not in self.off for n in range(len(self.exits))])
        return tuple(n for n, here in enumerate(heads_run(on, torch.tensor(self.looks_back)).tolist()) if not here)

    def switched_off(self, off: Sequence[int]) -> Plan:
        """The same plan with these exits off, and no others.

        Args:
            off: their numbers.
        """
        plan = replace(self, off=tuple(sorted(off)))
        if self.convention == "paper":
            return plan
        costs = plan.costs
        return replace(
            plan, exits=tuple(replace(e, cost=c) for e, c in zip(self.exits, costs, strict=False)), final_cost=costs[-1]
        )

    def with_confidence(self, name: str) -> Plan:
        """The same plan where rows leave by another confidence.

        Args:
            name: a key of `CONFIDENCES`.
        """
        return replace(self, confidence=name).switched_off(self.off)

    @property
    def least_cost(self) -> float:
        """What it costs where everybody leaves at one exit and the others are off, at the cheapest of them."""
        every = range(len(self.exits))
        return min(self.switched_off([m for m in every if m != n]).costs[n] for n in every)

    @property
    def paper_costs(self) -> tuple[float, ...]:
        """The same in the papers' count: (B_n + H_n) / B, and 1."""
        return (*(e.backbone_cost + e.head_cost for e in self.exits), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; "exits" holds a row for each early exit."""
        plain = {k: v for k, v in asdict(self).items() if k != "cuts"}
        plain["input_size"] = list(self.input_size)
        plain["exits"] = [
            asdict(e)
            | {"shape": list(e.shape)}
            | {"tensor": c.main, "tensors": len(c.carried), "begins_anew": bool(c.steps)}
            for e, c in zip(self.exits, self.cuts, strict=True)
        ]
        return plain

    def make_heads(self, front: FrontHead | None = None) -> list[ExitHead]:
        """New heads for these exits, in train mode, on the CPU in float32.

        Args:
            front: that of the exit at the input, where it is a network of its own.
        """
        return make_heads([e.head for e in self.exits], [cut.layout for cut in self.cuts], self.classes, front)

    def _begun_anew(self) -> str:
        exits = [str(n) for n, cut in enumerate(self.cuts) if cut.steps]
        if not exits:
            return ""
        return (
            f"\nWhere rows leave at {', '.join(exits)}, the pass begins anew with the others, for the backbone's code remembers "
            "the whole batch; no module computes anything twice."
        )

    def _too_dear(self) -> str:
        dear = [n for n in range(len(self.exits)) if self.costs[n] >= 1 and n not in self.off]
        return "".join(f"\n{self._why_too_dear(n)}" for n in dear)

    def _why_too_dear(self, n: int) -> str:
        """Its own head, or those passed on the way; whatever it takes, an earlier exit does it."""
        e = self.exits[n]
        alone = e.backbone_cost + e.head_cost
        mend = f"Take a cheaper head than {e.head} there, or an earlier exit."
        if alone < 1:
            mend = f"Without the heads before it, it would cost {alone:.4f}: take fewer exits or cheaper heads."
        return f"Exit {n} ({e.name}) costs {self.costs[n]:.4f}, no less than the bare backbone: it cannot pay. {mend}"

    def _switched_off(self) -> str:
        if not self.off:
            return ""
        needed = [str(n) for n in self.off if n not in self.skipped]
        run_all_the_same = f", but for {', '.join(needed)}, which later heads read" if needed else ""
        return f"\nOff: exit {', '.join(map(str, self.off))}. Nobody leaves there, and no head is run there{run_all_the_same}."

    def __str__(self) -> str:
        shown = {"cost": self.costs} | ({"paper cost": self.paper_costs} if self.convention == "paper" else {})
        costs = [[f"{c:.4f}" for c in each] for each in zip(*shown.values(), strict=True)]
        differ = len({e.head for e in self.exits}) > 1
        rows = [
            (str(n), e.name, _shape(e, self.cuts[n]), *([e.head] if differ else []), f"{e.backbone_cost:.4f}",
             f"{e.head_cost:.4f}", *costs[n], f"{e.parameters:,}")
            for n, e in enumerate(self.exits)
        ]  # fmt: skip
        end = (
            str(len(self.exits)),
            "(backbone)",
            str(self.classes),
            *([""] if differ else []),
            "1.0000",
            "",
            *costs[-1],
            f"{self.parameters:,}",
        )
        title = (
            "exit",
            "module",
            "shape",
            *(["head"] if differ else []),
            "backbone",
            "head cost" if differ else "head",
            *shown,
            "parameters",
        )
        size = "x".join(map(str, self.input_size))
        return (
            f"{self.backbone}, {size}, {self.macs / 1e6:,.1f} M multiply-accumulates; {self.placement}, "
            f"{'several' if differ else self.head} heads\n"
            + table([title, *rows, end], left={1})
            + self._too_dear()
            + self._begun_anew()
            + self._switched_off()
            + (f"\nRows leave by the confidence {self.confidence!r}." if self.confidence != LEARNED else "")
            + f"\nCosts are fractions of the bare backbone's; {_CONVENTION_TEXT[self.convention]}"
        )


def _shape(exit_: Exit, cut: Cut) -> str:
    """Of the tensor that the head reads, and which one that is where the module gives several."""
    which = f" ({cut.main + 1} of {len(cut.carried)})" if len(cut.carried) > 1 else ""
    return "x".join(map(str, exit_.shape)) + which


_CONVENTION_TEXT = {
    "full": "cost counts every head passed on the way.",
    "paper": "paper cost leaves out the heads passed on the way (EENet, PTEENet); what is really spent is more.",
}


def make_plan(
    backbone: Backbone,
    exits: str | Sequence[float] | Sequence[str] = "pareto",
    num_exits: int | None = None,
    head: str | Sequence[str] = "pool",
    convention: str = "full",
    placed: bool = False,
    head_budget: float | Sequence[float] | None = None,
    front: FrontHead | str | None = None,
    saved: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Place exits on a backbone, prove their cuts and count what they cost.

    Args:
        backbone: frozen, in eval mode.
        exits: a rule of `PLACEMENTS`, or wanted fractions of the backbone's cost, or names of modules.
        num_exits: E; None for as many as the rule can place, at most five.
        head: a name of `HEADS`, of a learned head (`res-32x2-64x2`), or "auto" for learned heads as large as their budget
            allows; one for all exits or one for each. With a + behind it (`auto+`, `conv2+`) it builds on the head before it; one name for
            all leaves the + out at the first.
        convention: of the costs: "full" counts heads passed on the way, "paper" does not.
        placed: `exits` are names that a plan gave, of a saved run.
        head_budget: what each "auto" head may cost, as a share of the backbone; one for all exits or one for each.
        front: a network that stands in front of the backbone, as the head of an exit at the input, before all others;
            "auto" for a learned head there.
        saved: the tensors of a saved run's heads; heads that would have others are refused before they are made.

    Raises:
        CutError: if an exit cannot stand where it was asked for, or there is no room for so many.
        UnknownName: if the rule, a module, the head or the convention does not exist.
    """
    if convention not in CONVENTIONS:
        raise unknown("cost convention", convention, CONVENTIONS)
    size = backbone.input.input_size
    found = survey(backbone.module, size)
    counts = count(backbone.module, random_images(backbone.module, 1, size))
    placer = Placer(backbone, found, counts, placed)
    at_input, behind, number = beside_input(exits, num_exits, front is not None, (*PLACEMENTS, CHOSEN))
    network = front_network(front)
    others = placer.place(behind, number) if behind or not at_input else []
    refuse_namesake(backbone.name, others)
    cuts = [input_cut(size)] * at_input + others
    spent = [0.0] * at_input + [placer.cost(cut) for cut in others]
    names = head_names(head, head_budget, cuts, counts.total, found.classes, front)
    layouts = [cut.layout for cut in cuts]
    if saved is not None:
        require_tensors(names, layouts, found.classes, network, saved)
    heads = make_heads(names, layouts, found.classes, network)
    rows = _priced(cuts, spent, heads, names, counts.total, convention)
    end = _final_cost(rows, convention)
    return Plan(
        backbone.name, names[0] if len(set(names)) == 1 else ", ".join(names), _words(exits), size, rows, end, counts.total, parameters(backbone.module), convention,
        found.classes, tuple(cuts),
    )  # fmt: skip


def _words(exits: str | Sequence[float] | Sequence[str]) -> str:
    if isinstance(exits, str):
        return exits
    where = ", ".join(map(str, exits))
    return f"exits at {where}" if any(isinstance(e, str) for e in exits) else f"exits at or behind {where} of the cost"


def head_macs(heads: Sequence[ExitHead], cut: Cut) -> int:
    """Multiply-accumulates of the last of some heads, which may build on the one before it.

    Args:
        heads: those up to it, in order.
        cut: where it stands.
    """
    before = heads[-2] if len(heads) > 1 else None
    like = next(heads[-1].parameters())
    return count(AfterOthers(heads[-1], before), torch.zeros(1, *cut.shape, device=like.device, dtype=like.dtype)).total


def _priced(
    cuts: Sequence[Cut],
    spent: Sequence[float],
    heads: Sequence[ExitHead],
    names: Sequence[str],
    macs: int,
    convention: str,
) -> tuple[Exit, ...]:
    added = [head_macs(heads[: n + 1], cut) / macs for n, cut in enumerate(cuts)]
    passed = list(accumulate(added)) if convention == "full" else added
    return tuple(
        Exit(
            cut.name,
            b,
            h,
            b + p,
            cut.shape,
            parameters(head),
            name,
            head.linked,
        )
        for cut, b, h, p, head, name in zip(cuts, spent, added, passed, heads, names, strict=True)
    )


def _final_cost(exits: Sequence[Exit], convention: str) -> float:
    return 1 + sum(e.head_cost for e in exits) if convention == "full" else 1.0


@alone()
@torch.inference_mode(False)
def plan(
    model: Any,
    *,
    exits: str | Sequence[float] | Sequence[str] = "pareto",
    num_exits: int | None = None,
    head: str | Sequence[str] = "pool",
    head_budget: float | Sequence[float] | None = None,
    front: str | nn.Module | None = None,
    front_weights: str | None = None,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | None = None,
) -> Plan:
    """Where exits would stand on a model and what they would cost, without building them.

    Takes what `augment` takes, and returns its plan.
    """
    backbone = load_backbone(
        model, weights=weights, pretrained=pretrained, num_classes=num_classes, input_size=input_size
    )
    state = freeze(backbone.module)
    try:
        first = named_front(front, backbone, weights=front_weights, pretrained=pretrained)
        return make_plan(backbone, exits, num_exits, head, head_budget=head_budget, front=first)
    finally:
        state.restore(backbone.module)
