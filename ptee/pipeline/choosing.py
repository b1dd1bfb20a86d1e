"""Exits chosen with images: cheap probes at many places, and a search for the places that pay.

A rule places exits by the backbone's cost alone. Where its answers become right differs from network to network, and a head
costs more on one map than on another. So a probe, one linear layer on the pooled map, is trained at every place that could be
one; all of them learn together from one pass of the backbone over some of the images. What they say to images that they have
not learnt makes traces, and of any set of places the solver (`thresholds`) tells what leaving would cost, with the price of
the heads that will stand there.

Probes rank places; they do not predict what a trained model will cost. Heads that learn more than a linear layer say more,
above all early in the network: for them earlier exits, and more of them, pay than are found here. Images that the backbone
has not seen cost more than those that it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ptee._common.devices import resolve_device
from ptee._common.errors import CutError, DataError, PteeError
from ptee._common.process import alone, own_random_numbers
from ptee._common.text import table
from ptee.analysis.cut_points import Cut, random_images, survey
from ptee.analysis.freezing import freeze
from ptee.analysis.macs import count
from ptee.backbones.load import Backbone, load_backbone
from ptee.data.batches import batches, is_loader
from ptee.evaluation.targets import Solution, Wish, solve_wish
from ptee.evaluation.traces import Traces, record
from ptee.exits.head_names import head_names
from ptee.exits.heads import AUTO
from ptee.exits.placement import CHOSEN, MOST_EXITS, PLACEMENTS, Placer, places
from ptee.exits.plan import head_macs
from ptee.exits.residual_head import make_heads
from ptee.model.build import build
from ptee.model.early_exit import EarlyExitModel
from ptee.training.config import Settings
from ptee.training.trainer import train

PROBE, MOST_PLACES = "pool", 24
IMAGES, FEWEST, HELD_OUT = 5_000, 20, 4  # every fourth is held out
UPDATES, BATCH, RATE = 300, 256, 1e-2  # of Adam, on numbers that are standardised
FEWEST_BATCHES = 15  # an epoch
LEAST_GAIN = 0.002  # of the backbone's cost: what one exit more must spare to be worth having
ROUNDING = 1e-9

Set = tuple[int, ...]  # places, growing
Rank = Callable[[Set], tuple[float, float]]


@dataclass(frozen=True)
class Rated:
    """Exits, and what leaving there would cost.

    Attributes:
        rule: that placed them.
        modules: in order of execution.
        backbone_costs: share of the backbone's cost up to each.
        heads: that would stand there.
        cost: mean over the held-out images, in full count, with the best thresholds for the wished drop.
        off: exits that are better off at this drop; their heads are not counted.
    """

    rule: str
    modules: tuple[str, ...]
    backbone_costs: tuple[float, ...]
    heads: tuple[str, ...]
    cost: float
    off: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The exits that were chosen, beside those of the placement rules, as many and by the same probes. Prints as a table.

    The rules choose among the places that have probes, which on a deep network are not all.

    Attributes:
        max_drop: share of the answers that may be others than the backbone's.
        places: how many there were to choose from.
        images: how many the probes learnt from, and how many they were held against.
        rows: the chosen exits first.
    """

    max_drop: float
    places: int
    images: tuple[int, int]
    rows: tuple[Rated, ...]

    @property
    def modules(self) -> list[str]:
        """Where the exits shall stand: for `augment(exits=...)`."""
        return list(self.rows[0].modules)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"images": list(self.images), "rows": [_plain(row) for row in self.rows]}

    def __str__(self) -> str:
        rows = [(r.rule, " ".join(f"{c:.3f}" for c in r.backbone_costs), f"{r.cost:.4f}") for r in self.rows]
        best = self.rows[0]
        pays = (
            ""
            if len(best.off) < len(best.modules)
            else f" By these probes no exit pays at a drop of {self.max_drop:g}."
        )
        return (
            table([("exits", "share of the backbone up to each", "cost"), *rows], left={0, 1})
            + f"\nChosen: {', '.join(best.modules)}; heads {', '.join(best.heads)}.{pays}"
            + f"\nCost at {self.max_drop:g} of other answers than the backbone's, by linear probes at {self.places} places: "
            + f"trained on {self.images[0]:,} images, held against {self.images[1]:,} others. It ranks places; what trained heads "
            + f"cost is another thing.{self._unlike_probes()}\nThe search is greedy: other sets may cost less."
        )

    def _unlike_probes(self) -> str:
        if set(self.rows[0].heads) == {PROBE}:
            return ""
        return (
            " These heads are priced as they are and judged as linear ones: the more they learn, the earlier and the more exits "
            "pay than are chosen here."
        )


def _plain(row: Rated) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(row).items()}


@torch.inference_mode(False)
def choose_exits(
    model: str | nn.Module | Backbone,
    data: Any,
    *,
    num_exits: int | None = None,
    head: str = AUTO,
    head_budget: float | None = None,
    max_drop: float = 0.01,
    images: int = IMAGES,
    seed: int = 0,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    weights: str | None = None,
) -> Choice:
    """Choose how many exits there shall be, and where, by what cheap probes say of some images.

    The search is greedy: the best place, then the best one beside it, and so on while another exit spares something; after
    each step every exit is moved wherever that alone costs less. In the search all exits share one threshold; the costs that are
    shown are of one for each. The result costs no more than that of any placement rule with as many exits, by these probes, and
    there is no bound on what other sets may cost.

    Probes rank places and predict neither accuracies nor costs. For "pool" heads, which are what the probes are, the choice is
    sound; heads that learn more are priced as they are and judged as linear ones, so too few and too late exits are chosen
    for them. On images that the backbone was trained on everything looks cheaper than elsewhere, at all places.

    Args:
        model: as of `augment`.
        data: a map-style data set of (image (c, h, w), label) or (image,), such as the heads will be trained on; labels
            play no part.
        num_exits: how many at most; None for five.
        head: that will stand at each place; its price is counted.
        head_budget: of "auto" heads, as of `augment`.
        max_drop: share of the answers that may be others than the backbone's.
        images: how many are used at most, drawn at random.
        seed: of the images, the probes and their order.
        device: None for a GPU where there is one.
        num_workers: processes that load images.
        input_size: as of `augment`.
        num_classes: as of `augment`.
        pretrained: as of `augment`.
        weights: as of `augment`.

    Raises:
        PteeError: naming what cannot be met, why, and what is possible.
    """
    _check(num_exits, head, head_budget, images)
    wish = Wish.only({"max_fidelity_drop": max_drop})
    Settings(seed=seed).checked()
    learnt, held = _drawn(data, images, seed)
    backbone = (
        model
        if isinstance(model, Backbone)
        else load_backbone(
            model, weights=weights, pretrained=pretrained, num_classes=num_classes, input_size=input_size
        )
    )
    with own_random_numbers(seed):
        sites = _sites(backbone, head, head_budget)
        sites.priced((0,))  # a head that cannot be is refused before the backbone runs
        traces = _probed(backbone, sites.names, learnt, held, seed, device, num_workers)
        rated = _Search(sites, traces, wish).rated(min(num_exits or MOST_EXITS, len(sites.cuts)))
    return Choice(wish.limit, len(sites.cuts), (len(learnt), len(held)), rated)


def _check(num_exits: int | None, head: Any, head_budget: Any, images: int) -> None:
    if num_exits is not None and (not isinstance(num_exits, int) or isinstance(num_exits, bool) or num_exits < 1):
        raise CutError(f"Cannot choose {num_exits!r} exits: give a whole number, one at least.")
    for what, given in (("head", head), ("head budget", head_budget)):
        if isinstance(given, Sequence) and not isinstance(given, str):
            raise PteeError(
                f"{len(given)} values of {what} for exits whose number is still to be chosen. Give one for all of them."
            )
    if not isinstance(images, int) or isinstance(images, bool) or images < FEWEST:
        raise PteeError(f"Cannot choose exits with {images!r} images: give a whole number, {FEWEST} or more.")


def _drawn(data: Any, most: int, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Images for the probes to learn from, and others to hold them against."""
    batches(data, batch_size=1, shuffle=False)  # refuses what is neither data set nor loader
    if is_loader(data):
        raise DataError(
            f"Exits are chosen with images drawn from a data set, and this is a {type(data).__name__}: pass its data set."
        )
    if len(data) < FEWEST:
        raise DataError(
            f"Exits cannot be chosen with {len(data)} images: {FEWEST} are needed. Give more, or name a placement."
        )
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:most].tolist()
    held = len(drawn) // HELD_OUT
    return Subset(data, sorted(drawn[held:])), Subset(data, sorted(drawn[:held]))


# ---------------------------------------------------------------------------------------------------- places and prices


@alone()
def _sites(backbone: Backbone, head: str, budget: float | None) -> _Sites:
    """Where exits could stand on a backbone."""
    state = freeze(backbone.module)
    try:
        size = backbone.input.input_size
        found = survey(backbone.module, size)
        counts = count(backbone.module, random_images(backbone.module, 1, size))
        placer = Placer(backbone, found, counts)
        cuts = placer.candidates(MOST_PLACES)
    finally:
        state.restore(backbone.module)
    return _Sites(cuts, [placer.cost(cut) for cut in cuts], counts.total, found.classes, head, budget)


class _Sites:
    """Places for exits, and what heads cost there.

    Args:
        cuts: in order of execution.
        spent: share of the backbone's cost up to each.
        macs: B.
        classes: K.
        head: of each exit.
        budget: of "auto" heads.
    """

    def __init__(
        self, cuts: Sequence[Cut], spent: Sequence[float], macs: int, classes: int, head: str, budget: float | None
    ) -> None:
        self.cuts, self.spent, self.macs, self.classes = cuts, spent, macs, classes
        self.head, self.budget = head, budget
        self._known: dict[Any, tuple[float, bool]] = {}

    @property
    def names(self) -> list[str]:
        """Of the modules."""
        return [cut.name for cut in self.cuts]

    def heads(self, chosen: Set) -> list[str]:
        """Names of the heads at these places; one that builds on another depends on where that stands."""
        return head_names(self.head, self.budget, [self.cuts[i] for i in chosen], self.macs, self.classes)

    def priced(self, chosen: Set) -> tuple[Tensor, Tensor]:
        """(E,) share of the backbone that each head costs there, and (E,) whether it looks back."""
        names, cuts = self.heads(chosen), [self.cuts[i] for i in chosen]
        found = [self._head(names[: n + 1], cuts[: n + 1]) for n in range(len(cuts))]
        return torch.tensor([c for c, _ in found], dtype=torch.float64), torch.tensor([b for _, b in found])

    def _head(self, names: list[str], cuts: list[Cut]) -> tuple[float, bool]:
        """The last of some heads: it knows of the others no more than the map that the one before it makes."""
        key = tuple((name, cut.layout, cut.shape) for name, cut in zip(names[-2:], cuts[-2:], strict=True))
        if key not in self._known:
            heads = make_heads(names, [cut.layout for cut in cuts], self.classes)
            self._known[key] = head_macs(heads, cuts[-1]) / self.macs, heads[-1].linked
        return self._known[key]


# ---------------------------------------------------------------------------------------------------- probes


def _probed(
    backbone: Backbone, names: list[str], learnt: Any, held: Any, seed: int, device: Any, num_workers: int
) -> Traces:
    """What trained probes at these modules say of the images that were held out."""
    model = build(backbone, exits=names, head=PROBE, placed=True)
    for head in model.heads:
        _standardise(head)
    batch = min(BATCH, math.ceil(len(learnt) / FEWEST_BATCHES))
    epochs = math.ceil(UPDATES / math.ceil(len(learnt) / batch))
    try:
        train(
            model, learnt, targets="soft", loss="each", epochs=epochs, batch_size=batch, lr=RATE, schedule="cosine", seed=seed,
            device=device, precision="no", num_workers=num_workers, cache=True,
        )  # fmt: skip
        return _recorded(model, held, device, num_workers)
    finally:
        model.detach()


def _standardise(head: Any) -> None:
    """Let a pooled head read numbers of mean 0 and deviation 1: still linear, and learnt in few updates."""
    norm = nn.BatchNorm1d(head.logits.in_features, affine=False).to(head.logits.weight)
    head.features = nn.Sequential(head.features, norm).train(head.training)


def _recorded(model: EarlyExitModel, held: Any, device: Any, num_workers: int) -> Traces:
    home = next(model.heads.parameters()).device
    model.to(resolve_device(device))
    try:
        traces = record(model, held, batch_size=BATCH, num_workers=num_workers)
    finally:
        model.to(home)
    return replace(traces.under("max_prob"), logits=None, targets=None)


# ---------------------------------------------------------------------------------------------------- the search


class _Search:
    """Sets of places, and what they cost.

    Args:
        sites: the places, one for each exit of the traces.
        traces: what the probes said.
        wish: how much fidelity may be lost.
    """

    def __init__(self, sites: _Sites, traces: Traces, wish: Wish) -> None:
        self.sites, self.traces, self.wish = sites, traces, wish
        self.faithful = (traces.answers == traces.answers[-1]).double().mean(1).tolist()
        self._ranks: dict[Set, tuple[float, float]] = {}
        self._solved: dict[Set, Solution] = {}

    def traces_of(self, chosen: Set) -> Traces:
        """The traces of exits at these places alone, with the heads that would stand there."""
        added, looks_back = self.sites.priced(chosen)
        passed = added.cumsum(0)
        spent = torch.tensor([self.sites.spent[i] for i in chosen], dtype=torch.float64)
        rows = [*chosen, len(self.sites.cuts)]
        return replace(
            self.traces,
            answers=self.traces.answers[rows],
            confidence=self.traces.confidence[rows],
            costs=torch.cat([spent + passed, 1 + passed[-1:]]),
            head_costs=added,
            linked=looks_back,
        )

    def solved(self, chosen: Set) -> Solution:
        """The best thresholds, one for each exit."""
        if chosen not in self._solved:
            self._solved[chosen] = solve_wish(self.traces_of(chosen), self.wish)
        return self._solved[chosen]

    def rank(self, chosen: Set) -> tuple[float, float]:
        """Less is better: the cost with one threshold; where nobody leaves, how unlike the backbone the last exit is."""
        if chosen not in self._ranks:
            found = solve_wish(self.traces_of(chosen), self.wish, one=True)
            self._ranks[chosen] = found.cost, -self.faithful[chosen[-1]]
        return self._ranks[chosen]

    def rated(self, most: int) -> tuple[Rated, ...]:
        """The chosen exits, at most so many, and those of each rule."""
        sets = [self._without_idle(chosen) for chosen in grown(self.rank, len(self.sites.cuts), most)]
        chosen = self._or_a_rules(min(sets, key=lambda s: self.solved(s).cost + LEAST_GAIN * len(s)))
        every = {CHOSEN: chosen} | self._by_rules(len(chosen))
        return tuple(self._rated(rule, exits) for rule, exits in every.items())

    def _by_rules(self, exits: int) -> dict[str, Set]:
        return {rule: tuple(places(rule, self.sites.spent, exits)) for rule in PLACEMENTS}

    def _or_a_rules(self, chosen: Set) -> Set:
        """A rule's exits where as many of them cost less, as no search for one threshold sees everything."""
        while True:
            rival = min(self._by_rules(len(chosen)).values(), key=lambda s: self.solved(s).cost)
            if self.solved(rival).cost >= self.solved(chosen).cost - ROUNDING:
                return chosen
            chosen = self._without_idle(rival)

    def _without_idle(self, chosen: Set) -> Set:
        """Without the exits at which nobody leaves, if others are left."""
        off = self.solved(chosen).off
        kept = tuple(place for n, place in enumerate(chosen) if n not in off)
        return kept if kept and self.solved(kept).cost <= self.solved(chosen).cost + ROUNDING else chosen

    def _rated(self, rule: str, chosen: Set) -> Rated:
        found = self.solved(chosen)
        names = tuple(self.sites.names[i] for i in chosen)
        spent = tuple(self.sites.spent[i] for i in chosen)
        return Rated(rule, names, spent, tuple(self.sites.heads(chosen)), found.cost, found.off)


def grown(rank: Rank, places: int, most: int) -> list[Set]:
    """Sets of 1, 2, ... places, each better than the one before by `LEAST_GAIN`: greedy, with exchange.

    Args:
        rank: of a set; less is better, and the first number is its cost.
        places: how many there are.
        most: how many a set may have.
    """
    found: list[Set] = []
    here: Set = ()
    while len(here) < most:
        here = exchanged(rank, min((_with(here, p) for p in range(places) if p not in here), key=rank), places)
        if found and rank(here)[0] > rank(found[-1])[0] - LEAST_GAIN:
            break
        found.append(here)
    return found


def exchanged(rank: Rank, here: Set, places: int) -> Set:
    """The set, with one place after another exchanged for the best other one while that is better."""
    while True:
        free = [p for p in range(places) if p not in here]
        others = [_with(tuple(q for q in here if q != old), new) for old in here for new in free]
        best = min(others, key=rank, default=here)
        if rank(best) >= rank(here):
            return here
        here = best


def _with(chosen: Set, place: int) -> Set:
    return tuple(sorted((*chosen, place)))
