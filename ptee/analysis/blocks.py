"""Blocks: the cut points at which a building block of the network ends, found from the network's structure.

Papers place exits after blocks. A network does not say what its blocks are, but its module tree, its cut points and its
costs show it:
- A module of several layers without a cut point between them, such as a residual block, is a block. So is every other
  module of its class.
- A module whose inner blocks make up most of its cost, such as a stage, is divided into them.
- What comes before the first block is the stem, and what comes after the last is the classifier. Neither is a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ptee.analysis.cut_points import Survey
from ptee.analysis.macs import Counts

LARGE = 0.25  # share of the network's cost above which a module is divided if it contains cut points


def blocks(module: nn.Module, survey: Survey, counts: Counts) -> list[str]:
    """The names of the modules that end a block, in order of execution."""
    tree = _Tree(dict(module.named_modules()), survey, counts)
    order = {name: i for i, name in enumerate(survey.cuts)}
    units = sorted(tree.units(""), key=order.__getitem__)
    return tree.without_ends(tree.one_per_layer(units))


@dataclass(frozen=True)
class _Tree:
    """The module tree of a network, with its cut points and costs."""

    modules: dict[str, nn.Module]
    survey: Survey
    counts: Counts

    def units(self, name: str) -> list[str]:
        """The cut points in a module, itself included, that are not divided further."""
        if name and name in self.survey.cuts and not self._is_divided(name):
            return [name] if name in self.counts.until else []  # an identity computes nothing
        prefix = f"{name}." if name else ""
        children = [prefix + child for child, _ in self.modules[name].named_children()]
        return [unit for child in children if child in self.modules for unit in self.units(child)]

    def one_per_layer(self, units: list[str]) -> list[str]:
        """Keep one of several units with no matrix product between them, such as a convolution and its ReLU.

        It is the last block among them, or the last unit if none is a block.
        """
        last: dict[int, str] = {}
        for name in units:
            products = self._products_until(name)
            if self._is_composite(name) or products not in last or not self._is_composite(last[products]):
                last[products] = name
        return list(last.values())

    def without_ends(self, units: list[str]) -> list[str]:
        """Leave out the stem before the first block, and everything after the last block."""
        last = max(self.counts.products_until.values())
        units = [name for name in units if self._products_until(name) < last]  # the classifier
        composite = [i for i, name in enumerate(units) if self._is_composite(name)]
        if not composite or self._is_chain(units, composite):
            return units[1:]
        classes = [type(self.modules[units[i]]) for i in composite]
        # Modules around the network do not count: in Sequential(normalize, net), "1.conv1" is as near the root as "conv1".
        paths = [units[i].split(".") for i in composite]
        shared = next((n for n, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), 0)
        deep = [len(path) > shared + 1 for path in paths]
        inner = [i for i, kind, d in zip(composite, classes, deep, strict=True) if d or classes.count(kind) > 1]
        first = (inner or composite)[0]
        return units[next((i for i in range(1, first) if self._ends_several(units, i)), first) : composite[-1] + 1]

    def _is_chain(self, units: list[str], composite: list[int]) -> bool:
        """Whether single layers, one after another, make up nearly all of the cost, and the first block comes after them."""
        return composite[0] > len(composite) and self._cost(*[units[i] for i in composite]) < LARGE * self.counts.total

    def _ends_several(self, units: list[str], i: int) -> bool:
        """Whether this layer is the last of several between which there is no unit, such as branches that it brings together."""
        layers = self._products_until(units[i]) - self._products_until(units[i - 1])
        return layers >= 2 and not self._is_composite(units[i])

    def _is_divided(self, name: str) -> bool:
        """Whether the blocks are inside of this module, rather than the module being a block itself."""
        inside = self._cuts_inside(name)
        if not inside or self._is_block_class(type(self.modules[name])):
            return False
        parts = [n for n in inside if self._is_composite(n)]
        outermost = [n for n in parts if not any(n.startswith(f"{other}.") for other in parts)]
        if self._cost(*outermost) >= self._cost(name) / 2:
            return True
        return self._cost(name) > LARGE * self.counts.total and bool(self._earlier(name, inside))

    def _is_block_class(self, kind: type[nn.Module]) -> bool:
        """Whether some module of this class contains no cut point before its end, so that all of the class are blocks."""
        if kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            return False
        for name, module in self.modules.items():
            if type(module) is kind and name in self.survey.cuts and self._is_composite(name):
                inside = self._cuts_inside(name)
                if not self._earlier(name, inside) and not any(self._is_composite(n) for n in inside):
                    return True
        return False

    def _cuts_inside(self, name: str) -> list[str]:
        return [n for n in self.survey.cuts if n.startswith(f"{name}.")]

    def _earlier(self, name: str, inside: list[str]) -> list[str]:
        """The cut points inside of a module that come between its first and its last matrix product."""
        end = self._products_until(name)
        return [n for n in inside if end - self.counts.products[name] < self._products_until(n) < end]

    def _is_composite(self, name: str) -> bool:
        """Whether it has more than one layer."""
        return self.counts.products.get(name, 0) >= 2

    def _products_until(self, name: str) -> int:
        return self.counts.products_until.get(name, 0)

    def _cost(self, *names: str) -> int:
        return sum(self.counts.inside.get(name, 0) for name in names)
