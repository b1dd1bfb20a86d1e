"""Plans: where the exits of a backbone stand and what each costs, to be read, printed and built."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ptee.backbones import Backbone, load_backbone
from ptee.costs import count, parameters
from ptee.cuts import Cut, random_images, survey
from ptee.errors import CutError, PteeError, unknown
from ptee.freezing import freeze
from ptee.front import FRONT, INPUT, FrontHead, input_cut, named_front
from ptee.heads import AUTO, ExitHead
from ptee.learned import AfterOthers, make_heads, recipes, require_tensors
from ptee.placement import CHOSEN, PLACEMENTS, Placer
from ptee.solver import run
from ptee.tables import table

CONVENTIONS = ("full", "paper")
HEAD_BUDGET = 0.05  # share of the backbone that an "auto" head may cost where nothing is said


@dataclass(frozen=True)
class Exit:
    """One early exit. All costs are fractions of the bare backbone's multiply-accumulates.

    Attributes:
        name: the module behind which it stands.
        backbone_cost: B_n / B, the backbone up to and with that module.
        head_cost: H_n / B, its head alone, with its gate.
        cost: c_n of a sample that leaves here: all heads passed on the way are counted, unless the plan says "paper".
        shape: of the tensor its head reads, of one sample.
        parameters: of its head.
        head: name of its head.
        gate: what the head's gate reads, "answers" or "features"; None without one.
        looks_back: it, or its gate, reads what the heads before it said.
        linked: it does, whatever its gate reads.
    """

    name: str
    backbone_cost: float
    head_cost: float
    cost: float
    shape: tuple[int, ...]
    parameters: int
    head: str
    gate: str | None = None
    looks_back: bool = False
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
        off: exits at which nobody leaves; their heads are not run, unless a later one reads what they say.
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

    @property
    def costs(self) -> tuple[float, ...]:
        """c_0 .. c_E in full count, whatever the plan shows: what is really spent on a sample that leaves there."""
        passed = list(accumulate(0.0 if n in self.skipped else e.head_cost for n, e in enumerate(self.exits)))
        return (*(e.backbone_cost + p for e, p in zip(self.exits, passed, strict=True)), 1 + passed[-1])

    @property
    def looks_back(self) -> list[bool]:
        """(E) heads that read what those before them said."""
        return [e.looks_back for e in self.exits]

    @cached_property  # each call of a model asks for it
    def skipped(self) -> tuple[int, ...]:
        """Exits whose heads are not run."""
        on = torch.tensor([n not in self.off for n in range(len(self.exits))])
        return tuple(n for n, here in enumerate(run(on, torch.tensor(self.looks_back)).tolist()) if not here)

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

    def with_heads(self, heads: Sequence[ExitHead]) -> Plan:
        """The same exits, counted anew with these heads, which may have got gates.

        Args:
            heads: one for each exit.
        """
        here = [copy.deepcopy(head).cpu().float() for head in heads]
        spent = [e.backbone_cost for e in self.exits]
        rows = _priced(self.cuts, spent, here, [e.head for e in self.exits], self.macs, self.convention)
        return replace(self, exits=rows, final_cost=_final_cost(rows, self.convention)).switched_off(self.off)

    def _begun_anew(self) -> str:
        exits = [str(n) for n, cut in enumerate(self.cuts) if cut.steps]
        if not exits:
            return ""
        return (
            f"\nWhere rows leave at {', '.join(exits)}, the pass begins anew with the others, for the backbone's code remembers "
            "the whole batch; no module computes anything twice."
        )

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
            + "".join(
                f"\nExit {n} ({e.name}) costs more than the bare backbone: it cannot pay. Take fewer exits or cheaper heads."
                for n, e in enumerate(self.exits)
                if self.costs[n] >= 1 and n not in self.off
            )
            + self._begun_anew()
            + self._switched_off()
            + ("\nGates decide who leaves; they are counted with the heads." if any(e.gate for e in self.exits) else "")
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
            allows; one for all exits or one for each.
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
    named, behind, num_exits = _with_input(exits, num_exits)
    at_input = named or front is not None
    learned = isinstance(front, str)
    front = _known_front(front)
    cuts = [input_cut(size)] * at_input + (placer.place(behind, num_exits) if behind or not at_input else [])
    if any(cut.name == INPUT for cut in cuts[at_input:]):
        raise CutError(
            f"{backbone.name} has a module called {INPUT!r}, which is what the exit at the images is called here. "
            "Name the exits, without it."
        )
    spent = [0.0] * at_input + [placer.cost(cut) for cut in cuts[at_input:]]
    if learned and len(_as_list(head)) == 1:
        head = [AUTO, *_as_list(head) * (len(cuts) - 1)]
    names = head_names(head, head_budget, cuts, counts.total, found.classes, front)
    layouts = [cut.layout for cut in cuts]
    if saved is not None:
        require_tensors(names, layouts, found.classes, front, saved)
    heads = make_heads(names, layouts, found.classes, front)
    rows = _priced(cuts, spent, heads, names, counts.total, convention)
    end = _final_cost(rows, convention)
    return Plan(
        backbone.name, names[0] if len(set(names)) == 1 else ", ".join(names), _words(exits), size, rows, end, counts.total, parameters(backbone.module), convention,
        found.classes, tuple(cuts),
    )  # fmt: skip


def _known_front(front: FrontHead | str | None) -> FrontHead | None:
    if isinstance(front, str) and front != AUTO:
        raise PteeError(f"The front {front!r} is neither a network nor {AUTO!r}. Load it with load_backbone.")
    return None if isinstance(front, str) else front


def _with_input(exits: Any, num_exits: int | None) -> tuple[bool, Any, int | None]:
    """Whether an exit at the input is named, what was asked of the others, and how many those are."""
    exits = [INPUT] if isinstance(exits, str) and exits == INPUT else exits
    if not isinstance(exits, Sequence) or isinstance(exits, str) or INPUT not in exits:
        return False, exits, num_exits
    if exits[0] != INPUT:
        raise CutError(f"The exit {INPUT!r} is the first of all. Name it in front of {exits[0]!r}.")
    behind: Any = list(exits[1:])
    if len(behind) == 1 and behind[0] in (*PLACEMENTS, CHOSEN):
        behind = behind[0]
    if not isinstance(num_exits, int):
        return True, behind, num_exits
    if isinstance(behind, list) and num_exits != len(exits):
        raise CutError(f"{len(exits)} exits are named, {num_exits} are asked for. Leave one of the two out.")
    if num_exits < 2 and behind:
        raise CutError(
            f"{INPUT!r} is one exit, and {num_exits} are asked for. Ask for 2 or more, or leave out {behind!r}."
        )
    return True, behind, num_exits - 1


def head_names(
    head: str | Sequence[str],
    budget: float | Sequence[float] | None,
    cuts: Sequence[Cut],
    macs: int,
    classes: int,
    front: FrontHead | None = None,
) -> list[str]:
    """The name of each exit's head; "auto" heads are sized.

    Args:
        head: as of `make_plan`.
        budget: as of `make_plan`.
        cuts: where the exits stand.
        macs: B.
        classes: K.
        front: the first exit's head, where it is a network of its own.

    Raises:
        PteeError: if there is a budget and nothing to size, or it is none.
    """
    names = _names(head, len(cuts), front)
    if AUTO in names:
        shares = _budgets(budget, len(cuts), front)
        first = front.passes_on if front else None
        return recipes(names, [cut.layout for cut in cuts], [share * macs for share in shares], classes, first)
    if budget is not None:
        raise PteeError(
            f"A head budget sizes auto heads, and the heads are {', '.join(names)}. Take head auto, or leave it out."
        )
    return names


def _names(head: str | Sequence[str], exits: int, front: FrontHead | None) -> list[str]:
    """Of the heads; the front network's goes without saying."""
    if front is None:
        return _one_each("head", head, exits)
    if isinstance(head, Sequence) and not isinstance(head, str) and len(head) == exits and head[0] == FRONT:
        head = head[1:]
    return [FRONT, *(_one_each("head", head, exits - 1) if exits > 1 else [])]


def _budgets(given: float | Sequence[float] | None, exits: int, front: FrontHead | None) -> list[float]:
    """Of the heads; a front network has none."""
    own = _one_each("head budget", HEAD_BUDGET if given is None else given, exits - (front is not None))
    for budget in own:
        if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget < math.inf:
            raise PteeError(f"A head budget {budget!r} is no share of the backbone above 0. Give one such as 0.05.")
    return [0.0] * (front is not None) + own


def _words(exits: str | Sequence[float] | Sequence[str]) -> str:
    return exits if isinstance(exits, str) else "exits at " + ", ".join(map(str, exits))


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]


def _one_each(what: str, given: Any, exits: int) -> list[Any]:
    """One for each exit."""
    each = _as_list(given)
    if len(each) not in (1, exits):
        raise PteeError(f"{len(each)} values of {what} for {exits} exits. Give one, or one for each exit.")
    return each * (exits if len(each) == 1 else 1)


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
            None if head.gate is None else head.gate.reads,
            head.looks_back,
            head.linked,
        )
        for cut, b, h, p, head, name in zip(cuts, spent, added, passed, heads, names, strict=True)
    )


def _final_cost(exits: Sequence[Exit], convention: str) -> float:
    return 1 + sum(e.head_cost for e in exits) if convention == "full" else 1.0


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
