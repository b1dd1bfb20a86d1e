"""Placement: where along the backbone the exits stand, and what each costs: the `Plan`.

A placement rule sees nothing but the cumulative cost at the end of each block, as fractions of the whole. Fed with
shares of the operations it places by what is really spent (ptee's default); fed with shares of the parameters it gives
the tables of the EENet thesis, which calls those shares cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from ptee.backbones import Backbone, load_backbone
from ptee.blocks import blocks
from ptee.costs import Counts, count, parameters
from ptee.cuts import Cut, Survey, random_images, remedy, survey
from ptee.errors import CutError, unknown
from ptee.freezing import freeze
from ptee.heads import ExitHead, make_head
from ptee.proof import prove
from ptee.tables import table

MOST_EXITS = 5  # as many as an unnumbered scheme places
LATEST = 0.95  # share of the backbone's cost behind which an exit has nothing left to save
MOST_REPEATED = 0.01  # share of the backbone's cost that may be spent twice where a pass begins anew
CONVENTIONS = ("full", "paper")

Rule = Callable[[Sequence[float], int], list[int]]
Choice = Callable[[Sequence[float]], list[int]]  # a rule that knows how many exits it places


# ---------------------------------------------------------------------------------------------------- the rules


def first_behind(costs: Sequence[float], wishes: Sequence[float]) -> list[int]:
    """The first block whose cumulative cost reaches each wish; two wishes never share a block.

    Args:
        costs: (L,) cumulative cost at the end of each block, as fractions of the whole, growing.
        wishes: (E,) wanted fractions, growing.

    Returns:
        Indices of blocks, fewer than E where the blocks run out.
    """
    chosen: list[int] = []
    for wish in wishes:
        start = chosen[-1] + 1 if chosen else 0
        block = next((i for i in range(start, len(costs)) if costs[i] >= wish), None)
        if block is None:
            break
        chosen.append(block)
    return chosen


def _by_fraction(fraction: Callable[[int, int], float]) -> Rule:
    return lambda costs, exits: first_behind(costs, [fraction(n, exits) for n in range(exits)])


def _quadratic(costs: Sequence[float], exits: int) -> list[int]:
    step = round(len(costs) / (exits + 1))
    return [i for i in range(step - 1, step * exits, step) if i < len(costs)] if step else []


# EENet (Demir & Akbas) 3.3. "quadratic" has no formula there; this one gives all rows of the thesis's tables.
PLACEMENTS: dict[str, Rule] = {
    "pareto": _by_fraction(lambda n, exits: 1 - 0.8 ** (n + 1)),
    "fine": _by_fraction(lambda n, exits: 1 - 0.95 ** (n + 1)),
    "golden": _by_fraction(lambda n, exits: 1.618034 ** (n - exits)),
    "linear": _by_fraction(lambda n, exits: (n + 1) / (exits + 1)),
    "quadratic": _quadratic,
}


# ---------------------------------------------------------------------------------------------------- the plan


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
    """

    name: str
    backbone_cost: float
    head_cost: float
    cost: float
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class Plan:
    """Where the exits of a backbone stand and what they cost. Prints as a table.

    Attributes:
        backbone: its name.
        head: name of the exits' heads.
        placement: the rule, or how the exits were named.
        input_size: (c, h, w) for which everything was counted.
        exits: in order of execution.
        final_cost: c_E of a sample that never leaves.
        macs: B, multiply-accumulates of the bare backbone for one sample.
        parameters: of the backbone.
        convention: in which the exits' `cost` and `final_cost` are given: "full" or "paper". `costs` is full in any case.
        classes: K.
        cuts: what the hooks need, one per exit.
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

    @property
    def costs(self) -> tuple[float, ...]:
        """c_0 .. c_E in full count, whatever the plan shows: what is really spent on a sample that leaves there."""
        passed = list(accumulate(e.head_cost for e in self.exits))
        return (*(e.backbone_cost + p for e, p in zip(self.exits, passed, strict=True)), 1 + passed[-1])

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
            | {"shape": list(e.shape), "head": self.head}
            | {"tensor": c.main, "tensors": len(c.carried), "begins_anew": bool(c.steps)}
            for e, c in zip(self.exits, self.cuts, strict=True)
        ]
        return plain

    def make_heads(self) -> list[ExitHead]:
        """New heads for these exits, in train mode, on the CPU in float32."""
        return [make_head(self.head, cut.layout, self.classes) for cut in self.cuts]

    def _begun_anew(self) -> str:
        exits = [str(n) for n, cut in enumerate(self.cuts) if cut.steps]
        if not exits:
            return ""
        return (
            f"\nWhere rows leave at {', '.join(exits)}, the pass begins anew with the others, for the backbone's code remembers "
            "the whole batch; no module computes anything twice."
        )

    def __str__(self) -> str:
        shown = {"cost": self.costs} | ({"paper cost": self.paper_costs} if self.convention == "paper" else {})
        costs = [[f"{c:.4f}" for c in each] for each in zip(*shown.values(), strict=True)]
        rows = [
            (str(n), e.name, _shape(e, self.cuts[n]), f"{e.backbone_cost:.4f}", f"{e.head_cost:.4f}",
             *costs[n], f"{e.parameters:,}")
            for n, e in enumerate(self.exits)
        ]  # fmt: skip
        end = (
            str(len(self.exits)),
            "(backbone)",
            str(self.classes),
            "1.0000",
            "",
            *costs[-1],
            f"{self.parameters:,}",
        )
        title = ("exit", "module", "shape", "backbone", "head", *shown, "parameters")
        size = "x".join(map(str, self.input_size))
        return (
            f"{self.backbone}, {size}, {self.macs / 1e6:,.1f} M multiply-accumulates; {self.placement}, {self.head} heads\n"
            + table([title, *rows, end], left={1})
            + "".join(
                f"\nExit {n} ({e.name}) costs more than the bare backbone: it cannot pay. Take fewer exits or cheaper heads."
                for n, e in enumerate(self.exits)
                if self.costs[n] >= 1
            )
            + self._begun_anew()
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
    head: str = "pool",
    convention: str = "full",
) -> Plan:
    """Place exits on a backbone, prove their cuts and count what they cost.

    Args:
        backbone: frozen, in eval mode.
        exits: a rule of `PLACEMENTS`, or wanted fractions of the backbone's cost, or names of modules.
        num_exits: E; None for as many as the rule can place, at most five.
        head: a name of `HEADS`.
        convention: of the costs: "full" counts heads passed on the way, "paper" does not.

    Raises:
        CutError: if an exit cannot stand where it was asked for, or there is no room for so many.
        UnknownName: if the rule, a module, the head or the convention does not exist.
    """
    if convention not in CONVENTIONS:
        raise unknown("cost convention", convention, CONVENTIONS)
    size = backbone.input.input_size
    found = survey(backbone.module, size)
    counts = count(backbone.module, random_images(backbone.module, 1, size))
    placer = _Placer(backbone, found, counts)
    cuts = placer.place(exits, num_exits)
    heads = [make_head(head, cut.layout, found.classes) for cut in cuts]
    rows = _priced(cuts, [placer.cost(cut) for cut in cuts], heads, counts.total, convention)
    end = 1 + sum(row.head_cost for row in rows) if convention == "full" else 1.0
    return Plan(
        backbone.name, head, _words(exits), size, rows, end, counts.total, parameters(backbone.module), convention,
        found.classes, tuple(cuts),
    )  # fmt: skip


def _words(exits: str | Sequence[float] | Sequence[str]) -> str:
    return exits if isinstance(exits, str) else "exits at " + ", ".join(map(str, exits))


def _priced(
    cuts: Sequence[Cut], spent: Sequence[float], heads: Sequence[ExitHead], macs: int, convention: str
) -> tuple[Exit, ...]:
    added = [count(head, torch.zeros(1, *cut.shape)).total / macs for head, cut in zip(heads, cuts, strict=True)]
    passed = list(accumulate(added)) if convention == "full" else added
    return tuple(
        Exit(cut.name, b, h, b + p, cut.shape, parameters(head))
        for cut, b, h, p, head in zip(cuts, spent, added, passed, heads, strict=True)
    )


@dataclass
class _Placer:
    """Turns a request into proven cuts."""

    backbone: Backbone
    survey: Survey
    counts: Counts
    proven: dict[str, Cut] = field(default_factory=dict)  # by name; or tried in vain
    failed: dict[str, str] = field(default_factory=dict)  # why

    def place(self, exits: str | Sequence[float] | Sequence[str], num_exits: int | None) -> list[Cut]:
        if num_exits is not None and not isinstance(num_exits, int):
            raise CutError(f"Cannot place {num_exits!r} exits: give a whole number.")
        if num_exits is not None and num_exits < 1:
            raise CutError(f"Cannot place {num_exits} exits: ask for one at least.")
        if not isinstance(exits, str | Sequence):
            raise CutError(
                f"Exits {exits!r} is no placement and no list. Give a list such as [0.2, 0.5] or ['layer1']."
            )
        if isinstance(exits, str):
            return self._by_rule(exits, num_exits)
        wanted: list[Any] = list(exits)
        if num_exits is not None and num_exits != len(wanted):
            raise CutError(f"{len(wanted)} exits are named, {num_exits} are asked for. Leave one of the two out.")
        if not wanted:
            raise CutError("No exit is named. Give a placement such as 'pareto', fractions, or names of modules.")
        if all(isinstance(e, str) for e in wanted):
            return self._by_name([str(e) for e in wanted])
        if all(isinstance(e, int | float) and not isinstance(e, bool) and 0 < e < 1 for e in wanted):
            return self._by_wish(sorted(float(e) for e in wanted))
        raise CutError(
            f"Exits {wanted} are neither names of modules nor fractions of the backbone's cost between 0 and 1."
        )

    def _by_rule(self, rule: str, num_exits: int | None) -> list[Cut]:
        if rule not in PLACEMENTS:
            raise unknown("placement", rule, PLACEMENTS)

        def choose(exits: int) -> Choice:
            return lambda costs: PLACEMENTS[rule](costs, exits)

        if num_exits is not None:
            return self._somehow(choose(num_exits), num_exits, rule)
        for exits in range(MOST_EXITS, 0, -1):
            for places in (self._blocks, self._cells):
                if found := self._proven(choose(exits), exits, places, LATEST):
                    return found
        raise self._no_room(1, rule)

    def _by_wish(self, wishes: list[float]) -> list[Cut]:
        words = f"at {', '.join(map(str, wishes))}"

        def choose(costs: Sequence[float]) -> list[int]:
            return first_behind(costs, wishes)

        for places in (self._blocks, self._cells, self._parts):
            if found := self._proven(choose, len(wishes), places, LATEST):
                return found
        raise self._no_room(len(wishes), words)

    def _somehow(self, choose: Choice, wanted: int, words: str) -> list[Cut]:
        """As the rule says; where it runs out of blocks, as near to it as leaves a block for each exit."""
        for places in (self._blocks, self._cells, self._parts):
            for rule in (choose, _with_room_for_all(choose, wanted)):
                if found := self._proven(rule, wanted, places, LATEST):
                    return found
        if found := self._proven(_with_room_for_all(choose, wanted), wanted, self._blocks, 1.0):
            return found
        raise self._no_room(wanted, words)

    def _by_name(self, names: list[str]) -> list[Cut]:
        if len(set(names)) < len(names):
            raise CutError(f"The exits {', '.join(names)} name one module twice. Leave one of the two out.")
        wanted = {name: self.survey.cut(name, self.backbone.module) for name in names}
        cuts = [wanted[name] for name in self.survey.order if name in wanted]
        self._prove(cuts)
        for name, reason in self.failed.items():
            raise CutError(
                f"Cut {name!r} of {self.backbone.name} cannot be proven: {reason}. {remedy(name, self.survey.cuts)}"
            )
        cuts = [self.proven[cut.name] for cut in cuts]
        for one, two in pairwise(cuts):
            if self.cost(one) >= self.cost(two):
                raise CutError(
                    f"Exits {one.name!r} and {two.name!r} stand at the same point, nothing is computed between them. "
                    "Leave one of the two out."
                )
        return cuts

    def cost(self, cut: Cut) -> float:
        """B_n / B. A module without any operator of its own (an identity) has what was there before it."""
        order = self.survey.order
        before = reversed(order[: order.index(cut.name) + 1])
        return next((self.counts.until[n] / self.counts.total for n in before if n in self.counts.until), 0.0)

    def _outside(self, cut: Cut) -> float:
        """Share of the backbone's work before a cut that is in none of the modules that need not run again."""
        within = sum(self.counts.inside.get(name, 0) for name in {step.name for step in cut.steps})
        return self.cost(cut) - within / self.counts.total

    @cached_property
    def _blocks(self) -> list[Cut]:
        """The cuts that end a block."""
        return [self.survey.cuts[name] for name in blocks(self.backbone.module, self.survey, self.counts)]

    @cached_property
    def _cells(self) -> list[Cut]:
        """Likewise, where a block may read the outputs of others beside it: cells of networks found by search."""
        if not self.survey.cells & self.survey.bypassed.keys():
            return []
        names = self.survey.cuts.keys() | (self.survey.cells & self.survey.bypassed.keys())
        cuts = self.survey.cuts | self.survey.bypassed
        wider = replace(self.survey, cuts={name: cuts[name] for name in self.survey.order if name in names})
        return [cuts[name] for name in blocks(self.backbone.module, wider, self.counts)]

    @cached_property
    def _parts(self) -> list[Cut]:
        """Likewise, with whole modules around which anything may pass: branches that run one after another."""
        names = [n for n in self.survey.bypassed if self.counts.products.get(n, 0) >= 2]
        outermost = {n for n in names if not any(n.startswith(f"{other}.") for other in names)}
        cuts = {cut.name: cut for cut in self._blocks} | {n: self.survey.bypassed[n] for n in outermost}
        return [cuts[name] for name in self.survey.order if name in cuts]

    def _proven(self, rule: Choice, wanted: int, places: list[Cut], latest: float) -> list[Cut] | None:
        """Let the rule choose among the places, and again without those whose proof fails; None if too few are left."""
        while True:
            places = [cut for cut in places if self.cost(cut) <= latest and cut.name not in self.failed]
            costs = [self.cost(cut) for cut in places]
            chosen = [places[i] for i in rule(costs)]
            if len(chosen) < wanted:
                return None
            self._prove([cut for cut in chosen if cut.name not in self.proven])
            if not any(cut.name in self.failed for cut in chosen):
                return [self.proven[cut.name] for cut in chosen]

    def _prove(self, cuts: Sequence[Cut]) -> None:
        """As they are; what fails because the rest of the pass remembers the old batch, by beginning anew."""
        size = self.backbone.input.input_size
        failed = prove(self.backbone.module, cuts, size)
        anew = [replace(c, steps=self.survey.steps[c.name]) for c in cuts if c.name in failed and not c.steps]
        anew = [cut for cut in anew if cut.steps]
        still = prove(self.backbone.module, anew, size) if anew else {}
        for cut in (*cuts, *anew):
            if cut.steps and (share := self._outside(cut)) > MOST_REPEATED:
                failed[cut.name] = still[cut.name] = (
                    f"the pass would begin anew there, and {share:.0%} of its work lies outside of modules and would be done "
                    "twice"
                )
        self.proven |= {cut.name: cut for cut in (*cuts, *anew)}
        mended = {cut.name for cut in anew} - still.keys()
        self.failed |= {name: why for name, why in failed.items() if name not in mended}

    def _no_room(self, wanted: int, words: str) -> CutError:
        early = [cut for cut in self._blocks if self.cost(cut) <= LATEST]
        if not early:
            return CutError(
                f"No exit can stand on {self.backbone.name}: none of its blocks ends in a cut below {LATEST:.0%} of its "
                "cost. Name a module with --exits MODULE if you know one."
            )
        return CutError(
            f"Cannot place {wanted} exits on {self.backbone.name} ({words}): {len(early)} of its blocks end in a cut below "
            f"{LATEST:.0%} of its cost, the first at {self.cost(early[0]):.3f}, the last at {self.cost(early[-1]):.3f}. "
            f"Ask for fewer (--num-exits), another placement, or name fractions or modules."
        )


def _with_room_for_all(rule: Choice, wanted: int) -> Choice:
    """The rule, with each exit moved forward as far as those behind it need to find a block of their own."""

    def choose(costs: Sequence[float]) -> list[int]:
        last = len(costs) - wanted
        if last < 0:
            return []
        chosen = [*rule(costs), *[len(costs)] * wanted]
        return [min(block, last + n) for n, block in enumerate(chosen[:wanted])]

    return choose


def plan(
    model: Any,
    *,
    exits: str | Sequence[float] | Sequence[str] = "pareto",
    num_exits: int | None = None,
    head: str = "pool",
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
        return make_plan(backbone, exits, num_exits, head)
    finally:
        state.restore(backbone.module)
