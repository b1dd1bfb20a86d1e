"""Freezing a module, and giving it back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

from torch import nn


@dataclass(frozen=True, eq=False)
class FrozenState:
    """How a module was before `freeze`, by the names of its parameters and parts; survives copying and pickling.

    Several may hold one module: it stays frozen until the last of them gives it back.
    """

    requires_grad: dict[str, bool]
    training: dict[str, bool]

    def hold(self, module: nn.Module) -> None:
        """Have the module stay frozen until `restore`; for a copy of the state and the module, too."""
        _HOLDERS.setdefault(module, WeakSet()).add(self)

    def restore(self, module: nn.Module) -> None:
        """Put gradients and modes back as they were; parts that came later are left as they are."""
        holders = _HOLDERS.get(module, WeakSet())
        holders.discard(self)
        if holders:
            return
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        set_modes(module, self.training)


def freeze(module: nn.Module) -> FrozenState:
    """Take all gradients off a module and put all of it in eval mode; what it was before is returned."""
    first = next(iter(_HOLDERS.get(module, ())), None)
    if first is None:
        state = FrozenState({name: p.requires_grad for name, p in module.named_parameters()}, modes(module))
    else:
        state = FrozenState(first.requires_grad, first.training)
    state.hold(module)
    module.requires_grad_(False)
    module.eval()
    return state


_HOLDERS: WeakKeyDictionary[nn.Module, WeakSet[FrozenState]] = WeakKeyDictionary()


def modes(module: nn.Module) -> dict[str, bool]:
    """The training flag of each part, by name."""
    return {name: part.training for name, part in module.named_modules()}


def set_modes(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """Put the flags back; parts that came later keep theirs."""
    for name, part in module.named_modules():
        part.training = flags.get(name, part.training)
