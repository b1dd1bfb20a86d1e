"""Placement: where along the backbone the exits stand.

A rule sees the cumulative cost at the end of each block, as a fraction of the whole, and chooses blocks. The rules have the
names of EENet (Demir & Akbas 2021), which divides the number of parameters; ptee divides the multiply-accumulates, and the
parameters where that is asked for. Exit n of
E, counted from 0, stands behind the first block whose cumulative cost reaches

    pareto   1 - 0.8^(n+1)       a fifth of what is left
    fine     1 - 0.95^(n+1)      a twentieth of what is left
    golden   phi^(n-E)           phi = (1 + sqrt 5) / 2
    linear   (n+1) / (E+1)

(EENet section 3.3; `set_thresholds` in eenet.py of github.com/eksuas/eenets.pytorch). With

    quadratic                    behind every s-th of L blocks, s = L / (E+1), rounded, a half to the even number

the cost between two exits grows, as later blocks have more parameters. EENet gives no formula for it; this one gives all
rows of the tables 4.5 and 4.8 of the thesis.

The images themselves are a cut, too, called "input". Nothing is computed before it, and it stands before all other exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

from ptee._common.errors import Advice, Argument, BackboneError, CutError, some, unknown
from ptee._common.text import as_shares, number_of
from ptee._common.validation import whole
from ptee.analysis.blocks import blocks
from ptee.analysis.cut_points import Cut, Survey, remedy, survey
from ptee.analysis.layout import Layout
from ptee.analysis.macs import Counts
from ptee.analysis.verify import verify_cut_points
from ptee.backbones.load import Backbone

INPUT = "input"  # the exit at the images, and its cut
PHI = (1 + 5**0.5) / 2
MOST_EXITS = 5  # as many as a rule places where no number is given
LATEST = 0.95  # share of the backbone's cost behind which an exit has nothing left to save
HEAVY = 2e10  # multiply-accumulates of one image above which a cut is verified on a smaller image
MOST_NAMES = 12  # of rules and blocks in a message
SMALLEST_SIDE = 40  # pixels; the smaller image has no shorter side. Three patches of 14 still fit
ROUNDING = 1e-12  # of a share: 1 - .95 is above .05 by it
MOST_REPEATED = 0.01  # share of the backbone's cost that may be spent twice where a pass starts again

Rule = Callable[[Sequence[float], int], list[int]]
Choice = Callable[[Sequence[float]], list[int]]  # a rule that knows how many exits it places


# ---------------------------------------------------------------------------------------------------- the rules


def first_behind(costs: Sequence[float], fractions: Sequence[float]) -> list[int]:
    """The first block whose cumulative cost reaches each fraction; two fractions never share a block.

    `costs` (L,) at the end of each block and `fractions` (E,) both grow. Fewer than E blocks if they run out.
    """
    chosen: list[int] = []
    for fraction in fractions:
        start = chosen[-1] + 1 if chosen else 0
        block = next((i for i in range(start, len(costs)) if costs[i] >= fraction - ROUNDING), None)
        if block is None:
            break
        chosen.append(block)
    return chosen


def _by_fraction(fraction: Callable[[int, int], float]) -> Rule:
    return lambda costs, exits: first_behind(costs, [fraction(n, exits) for n in range(exits)])


def _quadratic(costs: Sequence[float], exits: int) -> list[int]:
    step = round(len(costs) / (exits + 1))
    return [i for i in range(step - 1, step * exits, step) if i < len(costs)] if step else []


PLACEMENTS: dict[str, Rule] = {
    "pareto": _by_fraction(lambda n, exits: 1 - 0.8 ** (n + 1)),
    "fine": _by_fraction(lambda n, exits: 1 - 0.95 ** (n + 1)),
    "golden": _by_fraction(lambda n, exits: PHI ** (n - exits)),
    "linear": _by_fraction(lambda n, exits: (n + 1) / (exits + 1)),
    "quadratic": _quadratic,
}


def _choice(rule: str, exits: int) -> Choice:
    return lambda costs: PLACEMENTS[rule](costs, exits)


def _with_room_for_all(rule: Choice, wanted: int, latest: float) -> Choice:
    """The rule, with exits moved forward where those behind them would find no block of their own before `latest`."""

    def choose(costs: Sequence[float]) -> list[int]:
        early = sum(cost <= latest for cost in costs)
        last = early - wanted
        if last < 0:
            return []
        chosen = [*rule(costs), *[early] * wanted]
        return [min(block, last + n) for n, block in enumerate(chosen[:wanted])]

    return choose


# ---------------------------------------------------------------------------------------------------- placing


@dataclass
class Placer:
    """Turns a request for exits into verified cuts.

    Attributes:
        backbone: frozen, in eval mode.
        survey: of the backbone.
        counts: of the backbone.
        placed: names are those that a rule gave before, so values may pass their modules (`Survey.bypassed`).
        verified: the cuts that were tried, by name.
        failed: why a cut that was tried failed, by name.
        shares: of the backbone's time or parameters up to the end of each module; if given, places are chosen by these.
    """

    backbone: Backbone
    survey: Survey
    counts: Counts
    placed: bool = False
    verified: dict[str, Cut] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    shares: Mapping[str, float] | None = None

    def place(
        self, exits: str | Sequence[float] | Sequence[str], num_exits: int | None, front: bool = False
    ) -> list[Cut]:
        """Verified cuts, in order of execution.

        `exits` is a rule, wanted fractions of the backbone's cost, or names of modules. `num_exits` is E; None for as many
        as the rule can place, at most five. `front`: there is an exit at the input, named or not.
        """
        num_exits = _checked_number(num_exits)
        named, behind, number = self._split_off_input(exits if self.placed else self._read(exits), num_exits)
        at_input = named or front
        find = self._by_rule if isinstance(behind, str) else self._by_list
        cuts = find(behind, number) if behind or not at_input else []
        if any(cut.name == INPUT for cut in cuts):
            raise CutError(
                f"{self.backbone.name} has a module called {INPUT!r}, which is what the exit at the images is called here. "
                "Name the exits, without it."
            )
        size = self.backbone.input.input_size
        return [Cut(INPUT, size, Layout("bchw", *size), 0, (0,), overwritten=False)] * at_input + cuts

    def _split_off_input(self, exits: Any, num_exits: int | None) -> tuple[bool, Any, int | None]:
        """Whether an exit at the input is named; what is asked for behind it; and how many exits there.

        `["input", "pareto"]` asks for the rule behind the input. `num_exits` counts an exit at the input that is named.
        """
        if isinstance(exits, str) or INPUT not in exits:
            return False, exits, num_exits
        if exits[0] != INPUT:
            raise CutError(f"The exit {INPUT!r} is the first of all. Name it in front of {exits[0]!r}.")
        behind = list(exits[1:])
        by_rule = len(behind) == 1 and behind[0] in PLACEMENTS and behind[0] not in self._names
        if num_exits is not None and not by_rule and num_exits != len(exits):
            raise _named_otherwise(exits, num_exits)
        if num_exits == 1 and behind:
            raise CutError(f"{INPUT!r} is one exit, and 1 is asked for. Ask for 2 or more, or leave out {behind[0]!r}.")
        return True, behind[0] if by_rule else behind, None if num_exits is None else num_exits - 1

    def _read(self, exits: Any) -> str | list[float | str]:
        """A rule, or a list of fractions or of names; "0.2,0.5" and "layer1,layer2" are lists, too."""
        given = exits.split(",") if isinstance(exits, str) else [exits] if isinstance(exits, int | float) else exits
        if not isinstance(given, Sequence) or not all(isinstance(e, str | int | float) for e in given):
            raise CutError(
                f"Exits {exits!r:.60} is no placement and no list. Give a list such as [0.2, 0.5] or ['layer1']; of a plan [e.name for e in plan.exits]."
            )
        names = self._names
        parts = [_name_or_number(part, names) for part in given]
        word = parts[0] if len(parts) == 1 else None
        if word in PLACEMENTS and word not in names:
            return str(word)
        if isinstance(exits, str) and isinstance(word, str) and word not in (INPUT, *names) and not as_shares(parts):
            possible = self.survey.possible(self._passed)
            outer = [name for name in possible if any(other.startswith(f"{name}.") for other in names)]
            raise unknown("placement or module", word, possible, first=[*PLACEMENTS, *outer][:MOST_NAMES])
        return parts

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, _ in self.backbone.module.named_modules() if name]

    def _by_list(self, wanted: list[Any], num_exits: int | None) -> list[Cut]:
        if num_exits is not None and num_exits != len(wanted):
            raise _named_otherwise(wanted, num_exits)
        if not wanted:
            raise CutError("No exit is named. Give a placement such as 'pareto', fractions, or names of modules.")
        if not (meant := _as_fractions(wanted)) and all(isinstance(e, str) for e in wanted):
            return self._by_name([str(e) for e in wanted])
        if not (wrong := [e for e in wanted if isinstance(e, bool | str) or not 0 < e < 1]):
            return self._by_fractions(sorted(float(e) for e in wanted))
        neither = "neither names of modules nor fractions of the backbone's cost between 0 and 1"
        which = "" if len(wrong) == len(wanted) else some([str(e) for e in wrong if not isinstance(e, str)])
        text = f"Exits {wanted} are {neither}{f': {which}' * bool(which)}."
        raise CutError(text, *meant, *_as_number(wanted))

    def _by_rule(self, rule: str, num_exits: int | None) -> list[Cut]:
        if num_exits is not None:
            return self._so_many(rule, num_exits)
        for kinds in ((self._blocks, self._cells), (self._parts,)):
            for exits in range(MOST_EXITS, 0, -1):
                for places in kinds:
                    if found := self._chosen(_choice(rule, exits), exits, places):
                        return found
        one = _with_room_for_all(_choice(rule, 1), 1, LATEST)
        for places in (self._blocks, self._cells, self._parts):
            if found := self._chosen(one, 1, places):
                return found
        raise self._no_room(1, rule)

    def _so_many(self, rule: str, exits: int) -> list[Cut]:
        """As the rule says. If it runs out of blocks, as near to it as leaves a block for each exit."""
        if exits > len(self.survey.order):
            raise self._no_room(exits, rule)
        choose = _choice(rule, exits)
        nearest = _with_room_for_all(choose, exits, LATEST)
        for places in (self._blocks, self._cells, self._parts):
            for choice in (choose, nearest):
                if found := self._chosen(choice, exits, places):
                    return found
        anywhere = _with_room_for_all(choose, exits, 1.0)
        if found := self._chosen(anywhere, exits, self._blocks, latest=1.0):
            return found
        raise self._no_room(exits, rule)

    def _by_fractions(self, fractions: list[float]) -> list[Cut]:
        for places in (self._blocks, self._cells, self._parts):
            if found := self._chosen(partial(first_behind, fractions=fractions), len(fractions), places):
                return found
        raise self._no_room(len(fractions), f"at {', '.join(map(str, fractions))}")

    def _by_name(self, names: list[str]) -> list[Cut]:
        if len(set(names)) < len(names):
            raise CutError(f"The exits {', '.join(names)} name one module twice. Leave one of the two out.")
        wanted = {name: self.survey.cut(name, self.backbone.module, self._passed) for name in names}
        cuts = [wanted[name] for name in self.survey.order if name in wanted]
        self._verify(cuts)
        for name, reason in self.failed.items():
            others = [other for other in self.survey.possible(self._passed) if other not in self.failed]
            raise CutError(f"Cut {name!r} of {self.backbone.name} fails its check: {reason}. {remedy(name, others)}")
        cuts = [self.verified[cut.name] for cut in cuts]
        for one, two in pairwise(cuts):
            if self.cost(one) >= self.cost(two):
                raise CutError(
                    f"Exits {one.name!r} and {two.name!r} stand at the same point, nothing is computed between them. "
                    "Leave one of the two out."
                )
        return cuts

    @cached_property
    def _passed(self) -> list[str]:
        """Modules that values pass, and that can be named as exits all the same: those that no early cut point holds.

        A cut point has what passes its parts, too. Where no block ends early, rules place exits at any of them. So all can be named.
        """
        early = [f"{cut.name}." for cut in self.survey.cuts.values() if self._is_early(cut)]
        if self.placed or not any(map(self._is_early, self._blocks)):
            return list(self.survey.bypassed)
        return [name for name in self.survey.bypassed if not name.startswith(tuple(early))]

    def _is_early(self, cut: Cut) -> bool:
        return self.cost(cut) <= LATEST

    def cost(self, cut: Cut) -> float:
        """B_n / B, the backbone's cost up to a cut. An identity costs what was spent before it."""
        order = self.survey.order
        before = reversed(order[: order.index(cut.name) + 1])
        return next((self.counts.until[n] / self.counts.total for n in before if n in self.counts.until), 0.0)

    def _share(self, cut: Cut) -> float:
        """What places are chosen by: the share up to a cut that is given, such as that of the time, else its cost."""
        return self.cost(cut) if self.shares is None else self.shares.get(cut.name, self.cost(cut))

    def _outside(self, cut: Cut) -> float:
        """Share of the backbone's cost that is spent twice if the pass starts again at a cut: outside of kept modules."""
        within = sum(self.counts.inside.get(name, 0) for name in {step.name for step in cut.steps})
        return self.cost(cut) - within / self.counts.total

    @cached_property
    def _blocks(self) -> list[Cut]:
        """The cuts that end a block."""
        return [self.survey.cuts[name] for name in blocks(self.backbone.module, self.survey, self.counts)]

    @cached_property
    def _cells(self) -> list[Cut]:
        """The cuts that end a block or a cell, which may read the outputs of other cells (networks found by search)."""
        if not self.survey.cells & self.survey.bypassed.keys():
            return []
        names = self.survey.cuts.keys() | (self.survey.cells & self.survey.bypassed.keys())
        cuts = self.survey.cuts | self.survey.bypassed
        wider = replace(self.survey, cuts={name: cuts[name] for name in self.survey.order if name in names})
        return [cuts[name] for name in blocks(self.backbone.module, wider, self.counts)]

    @cached_property
    def _parts(self) -> list[Cut]:
        """The cuts that end a block or a whole module past which values go: branches that run one after another.

        The last branch of a block ends where the block does, and the block has what passes the branch, too.
        """
        layers = {n: self.counts.products.get(n, 0) for n in self.survey.bypassed}
        names = [n for n in layers if layers[n] >= 2] or [n for n in layers if layers[n]]
        ends = {self.cost(cut) for cut in self._blocks}
        outermost = {n for n in names if not any(n.startswith(f"{other}.") for other in names)}
        cuts = {cut.name: cut for cut in self._blocks} | {
            n: cut for n in outermost if self.cost(cut := self.survey.bypassed[n]) not in ends
        }
        return [cuts[name] for name in self.survey.order if name in cuts]

    def _chosen(self, rule: Choice, wanted: int, places: list[Cut], latest: float = LATEST) -> list[Cut] | None:
        """What the rule chooses among the places that pass their check; None if too few are left."""
        while True:
            places = [cut for cut in places if cut.name not in self.failed]
            chosen = [places[i] for i in rule([self._share(cut) for cut in places])]
            if len(chosen) < wanted or any(self._share(cut) > latest for cut in chosen):
                return None
            self._verify(chosen)
            if not any(cut.name in self.failed for cut in chosen):
                return [self.verified[cut.name] for cut in chosen]

    def _verify(self, cuts: Sequence[Cut]) -> None:
        """Verify cuts together. One that fails because the code keeps the number of rows is tried again with a pass that restarts."""
        cuts = [self.verified.get(cut.name, cut) for cut in cuts]
        failed: dict[str, str] = {}
        while found := verify_cut_points(self.backbone.module, cuts, self._size_to_verify_at):
            steps = {cut.name: self.survey.steps[cut.name] for cut in cuts if cut.name in found and not cut.steps}
            steps = {name: again for name, again in steps.items() if again}
            failed |= {name: why for name, why in found.items() if name not in steps}
            if not steps:
                break
            cuts = [replace(cut, steps=steps.get(cut.name, cut.steps)) for cut in cuts if cut.name not in failed]
        for cut in cuts:
            if cut.steps and (share := self._outside(cut)) > MOST_REPEATED:
                failed[cut.name] = (
                    f"the forward pass would start again there, and {share:.0%} of its work lies outside of modules and would be "
                    "done twice"
                )
        self.verified |= {cut.name: cut for cut in cuts}
        self.failed |= failed

    @cached_property
    def _size_to_verify_at(self) -> tuple[int, int, int]:
        """(c, h, w): the images' own, or for a large network smaller ones that take the same way through it."""
        channels, height, width = size = self.backbone.input.input_size
        if self.counts.total < HEAVY:
            return size
        most = min(height, width) // SMALLEST_SIDE
        whole = [n for n in range(most, 1, -1) if not (height % n or width % n)]
        for part in whole or [most] * (most > 1):  # a prime side has no whole part; some networks take any size
            small = (channels, height // part, width // part)
            try:
                found = survey(self.backbone.module, small)
            except BackboneError:  # it takes no such images
                continue
            if _way(found) == _way(self.survey):
                return small
        return size

    def _no_room(self, wanted: int, words: str) -> CutError:
        early = [cut for cut in self._blocks if self._is_early(cut)]
        if not early:
            others = [name for name, cut in self.survey.cuts.items() if self._is_early(cut)]
            return CutError(
                f"No place for an exit was found on {self.backbone.name}: none of its blocks ends in a cut below {LATEST:.0%} of its cost."
                f"{self._for_example()} "
                + (f"Modules that can be named as exits: {some(others)}." if others else "No other module can be one.")
            )
        fewer: Advice = ("fewer (", Argument("num_exits"), "), ") if wanted > 1 else ()
        return CutError(
            f"Cannot place {wanted} exit{'s' * (wanted > 1)} on {self.backbone.name} ({words}): {len(early)} of its blocks "
            f"end{'s' * (len(early) == 1)} in a cut below {LATEST:.0%} of its cost, the first at {self.cost(early[0]):.3f}, the last at "
            f"{self.cost(early[-1]):.3f}. {self._failures(early)}Ask for ", *fewer,
            "another placement, or name fractions or modules.",
            argument="num_exits", value=wanted,
        )  # fmt: skip

    def _failures(self, cuts: Sequence[Cut]) -> str:
        """Which of these cuts fail their check, and why the first of them does."""
        failed = [cut.name for cut in cuts if cut.name in self.failed]
        if not failed:
            return ""
        verb, why = "fails its" if len(failed) == 1 else "fail their", self.failed[failed[0]].rstrip(".")
        return (
            f"{some(list(map(repr, failed)))} {verb} check{': ' if len(failed) == 1 else ', the first because '}{why}. "
        )

    def _for_example(self) -> str:
        """Why the largest module that is no cut is none."""
        names = [n for n in self.survey.refused if n in self.counts.inside]
        early = [n for n in names if self.counts.until[n] <= LATEST * self.counts.total]
        largest = max(early or names, key=lambda n: self.counts.inside[n], default=None)
        return "" if largest is None else f" Not at {largest!r}, for one: {self.survey.refused[largest]}."


def _named_otherwise(named: Sequence[Any], asked: int) -> CutError:
    """Why exits that are named cannot be another number of exits. A recipe may have named them."""
    names, n = some([str(e) for e in named]), len(named)
    given = f"{number_of(n, 'exit', 'is')} named ({names}), {asked} {'are' if asked != 1 else 'is'} asked for."
    text = f"{given} Leave the number out, or give a placement: "
    return CutError(text, Argument.text("exits", "pareto"), ".", argument="num_exits", value=asked)


def _as_number(wanted: list[Any]) -> Advice:
    """What to type where one whole number was given as exits: it may be meant as their number."""
    number: Any = wanted[0] if len(wanted) == 1 and not isinstance(wanted[0], bool | str) else None
    if number is None or number not in range(1, 100):
        return ()
    return (f" For {number_of(int(number), 'exit')}: ", Argument("num_exits", f"{number:.0f}"), ".")


def _as_fractions(wanted: list[Any]) -> Advice:
    """What to type where percentages were given as exits. A small number may be meant as that of exits."""
    percent = any(isinstance(e, str) or e > MOST_EXITS for e in wanted)
    shares = as_shares(wanted) if percent else ""
    return (" Did you mean ", Argument("exits", f"[{shares}]"), "?") if shares else ()


def _name_or_number(part: float | str, names: Sequence[str]) -> float | str:
    """A module may be called "0"; then its name is meant, but a number between 0 and 1 is a fraction."""
    text = part.strip() if isinstance(part, str) else str(part) if isinstance(part, int) else f"{part:g}"
    if text in names and (isinstance(part, str) or not 0 < part < 1):
        return text
    try:
        return float(text) if isinstance(part, str) else part
    except ValueError:
        return text


def _checked_number(num_exits: Any) -> int | None:
    number = whole(num_exits)
    if num_exits is not None and number is None:
        raise CutError(f"Cannot place {num_exits!r} exits: give a whole number.", argument="num_exits", value=num_exits)
    if number is not None and number < 1:
        raise CutError(f"Cannot place {num_exits} exits: ask for one at least.", argument="num_exits", value=num_exits)
    return number


def _way(survey: Survey) -> tuple[Any, ...]:
    """The modules in order, the cuts, and the values that are alive past each."""
    return survey.order, survey.refused, survey.steps, list(survey.cuts), list(survey.bypassed)
