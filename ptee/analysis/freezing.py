"""Taking a user's module: frozen, with hooks on it, until it is given back as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from ptee.analysis.replay import make_cached, undo_cached


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


# ---------------------------------------------------------------------------------------------------- with hooks on it


class Attachment:
    """A module kept frozen with hooks on it, until `release`, or until nobody has this any more.

    Shallow copies of its owner share it; deep copies and pickles hold their own copy of the module.

    Args:
        module: to freeze.
        hooks: a forward hook for each of these parts of it.
        cached: parts whose outputs a call can keep (`replay`).
    """

    def __init__(self, module: nn.Module, hooks: Mapping[str, Callable[..., Any]], cached: Sequence[str] = ()) -> None:
        self._module, self._state = module, freeze(module)
        # The handles are kept for their numbers: unpickling them keeps later hooks from taking the same ones.
        self._handles = [module.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
        self._cached = list(cached)
        self._held = [True]  # empty when the module was given back; shared with the finalizer
        make_cached([module.get_submodule(name) for name in cached])
        self._parts = list(module.modules())  # to look at them at each call; walking the tree takes ten times as long
        self._watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.released:
            self._state.hold(self._module)
            self._watch()

    def _watch(self) -> None:
        arguments = (ref(self._module), self._state, self._handles, self._cached, self._held)
        finalize(self, _release, *arguments).atexit = False

    @property
    def released(self) -> bool:
        """Whether the module was given back."""
        return not self._held

    def release(self) -> None:
        """Take the hooks off and give the module back as it was."""
        _release(ref(self._module), self._state, self._handles, self._cached, self._held)

    def keep(self) -> None:
        """Put the module back into eval mode if any part of it was taken out."""
        if any(part.training for part in self._parts):
            self._module.eval()


def _release(
    module: ref[nn.Module],
    state: FrozenState,
    handles: Sequence[RemovableHandle],
    cached: Sequence[str],
    held: list[bool],
) -> None:
    own = module()
    if own is not None and held:
        undo_cached([own.get_submodule(name) for name in cached])
        for handle in handles:
            handle.remove()
        held.clear()
        state.restore(own)
