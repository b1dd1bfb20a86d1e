"""Plans: where the exits of a backbone stand and what each costs, to be read, printed and built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import torch

from ptee.backbones import Backbone, load_backbone
from ptee.costs import count, parameters
from ptee.cuts import Cut, random_images, survey
from ptee.errors import unknown
from ptee.freezing import freeze
from ptee.heads import ExitHead, make_head
from ptee.placement import Placer
from ptee.tables import table

CONVENTIONS = ("full", "paper")


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
    placed: bool = False,
) -> Plan:
    """Place exits on a backbone, prove their cuts and count what they cost.

    Args:
        backbone: frozen, in eval mode.
        exits: a rule of `PLACEMENTS`, or wanted fractions of the backbone's cost, or names of modules.
        num_exits: E; None for as many as the rule can place, at most five.
        head: a name of `HEADS`.
        convention: of the costs: "full" counts heads passed on the way, "paper" does not.
        placed: `exits` are names that a plan gave, of a saved run.

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
