"""Blocks: the cuts that stand between a network's building blocks, found from its structure.

The papers place exits behind blocks. A network of somebody else's says nowhere what its blocks are, but its module tree,
its cuts and its costs together do: a stage holds other cuts that carry most of its cost, so one looks inside; a residual
block holds none, so it is a unit, and so is everything of its class. Before the first block is the stem.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ptee.analysis.cut_points import Survey
from ptee.analysis.macs import Counts

LARGE = 0.25  # share of the whole cost above which a unit with cuts inside is divided


def blocks(module: nn.Module, survey: Survey, counts: Counts) -> list[str]:
    """Names of the modules that end a block, in order of execution, without stem and classifier.

    Args:
        module: the network.
        survey: its cuts.
        counts: its costs.
    """
    tree = _Tree(dict(module.named_modules()), survey, counts)
    order = {name: i for i, name in enumerate(survey.cuts)}
    units = sorted(tree.units(""), key=order.__getitem__)
    return tree.without_ends(tree.one_per_layer(units))


@dataclass(frozen=True)
class _Tree:
    modules: dict[str, nn.Module]
    survey: Survey
    counts: Counts

    def units(self, name: str) -> list[str]:
        """The outermost cuts that are not to be looked into."""
        if name and name in self.survey.cuts and not self._is_transparent(name):
            return [name] if name in self.counts.until else []  # an identity computes nothing
        prefix = f"{name}." if name else ""
        children = [prefix + child for child, _ in self.modules[name].named_children()]
        return [unit for child in children if child in self.modules for unit in self.units(child)]

    def one_per_layer(self, units: list[str]) -> list[str]:
        """Of units that end after the same matrix products, the last block, or else the last: relu behind conv."""
        last: dict[int, str] = {}
        for name in units:
            products = self.counts.products_until.get(name, 0)
            if self.is_composite(name) or products not in last or not self.is_composite(last[products]):
                last[products] = name
        return list(last.values())

    def without_ends(self, units: list[str]) -> list[str]:
        """Drop the stem before the first block, and what stands between the last block and the answer."""
        last = max(self.counts.products_until.values())
        units = [name for name in units if self.counts.products_until.get(name, 0) < last]  # the classifier
        composite = [i for i, name in enumerate(units) if self.is_composite(name)]
        if not composite or self._is_chain(units, composite):
            return units[1:]
        classes = [type(self.modules[units[i]]) for i in composite]
        # What the network is wrapped in does not count: "0.conv1" of Sequential(normalize, net) is as near the root as conv1.
        paths = [units[i].split(".") for i in composite]
        shared = next((n for n, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
        deep = [len(path) > shared + 1 for path in paths]
        inner = [i for i, kind, d in zip(composite, classes, deep, strict=True) if d or classes.count(kind) > 1]
        return units[(inner or composite)[0] : composite[-1] + 1]

    def _is_chain(self, units: list[str], composite: list[int]) -> bool:
        """Single layers, one after another, do nearly all the work: what is composite then comes behind them."""
        cost = sum(self.counts.inside.get(units[i], 0) for i in composite)
        return composite[0] > len(composite) and cost < LARGE * self.counts.total

    def is_composite(self, name: str) -> bool:
        """More than one layer."""
        return self.counts.products.get(name, 0) >= 2

    def _is_transparent(self, name: str) -> bool:
        inside = self._cuts_inside(name)
        if not inside or self._is_opaque(type(self.modules[name])):
            return False
        parts = [n for n in inside if self.is_composite(n)]
        outermost = [n for n in parts if not any(n.startswith(f"{other}.") for other in parts)]
        cost = self.counts.inside.get(name, 0)
        if sum(self.counts.inside.get(n, 0) for n in outermost) >= cost / 2:
            return True
        return cost > LARGE * self.counts.total and bool(self._earlier(name, inside))

    def _is_opaque(self, kind: type[nn.Module]) -> bool:
        """Some module of this class holds no cut but its own end: it is a block, and so are all of its class."""
        if kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            return False
        for name, module in self.modules.items():
            if type(module) is kind and name in self.survey.cuts and self.is_composite(name):
                inside = self._cuts_inside(name)
                if not self._earlier(name, inside) and not any(self.is_composite(n) for n in inside):
                    return True
        return False

    def _cuts_inside(self, name: str) -> list[str]:
        return [n for n in self.survey.cuts if n.startswith(f"{name}.")]

    def _earlier(self, name: str, inside: list[str]) -> list[str]:
        """Those of the cuts inside a module that come before its last matrix product."""
        end = self.counts.products_until.get(name, 0)
        return [n for n in inside if end - self.counts.products[name] < self.counts.products_until.get(n, 0) < end]
