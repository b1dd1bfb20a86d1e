"""Taking a user's module and giving it back: it is frozen and has hooks meanwhile, and is as it was afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ptee._common.devices import resolve_device
from ptee._common.errors import PteeError
from ptee.analysis.replay import make_cached, undo_cached


@dataclass(frozen=True, eq=False)
class FrozenState:
    """How a module was before `freeze`, by the names of its parameters and parts. It can be copied and pickled.

    A module can be frozen several times. It stays frozen until the last of its states is restored.
    """

    requires_grad: dict[str, bool]
    training: dict[str, bool]

    def hold(self, module: nn.Module) -> None:
        """Keep the module frozen until `restore`. A copy of the state calls this for its copy of the module."""
        _HOLDERS.setdefault(module, WeakSet()).add(self)

    def note(self, module: nn.Module) -> None:
        """Add the modes of parts that were put in later."""
        for name, training in modes(module).items():
            self.training.setdefault(name, training)

    def restore(self, module: nn.Module) -> None:
        """Restore `requires_grad` and the modes. What was added later and not noted stays as it is."""
        holders = _HOLDERS.get(module, WeakSet())
        holders.discard(self)
        if holders:
            return
        for name, parameter in module.named_parameters():
            if not parameter.is_inference():  # of a network that was moved under torch.inference_mode: torch refuses
                parameter.requires_grad_(self.requires_grad.get(name, parameter.requires_grad))
        set_modes(module, self.training)


_TRAINING = attrgetter("training")
_HOLDERS: WeakKeyDictionary[nn.Module, WeakSet[FrozenState]] = WeakKeyDictionary()


def freeze(module: nn.Module) -> FrozenState:
    """Switch off the gradients of a module and put it in eval mode. Returns how it was before."""
    first = next(iter(_HOLDERS.get(module, ())), None)
    if first is None:
        state = FrozenState({name: p.requires_grad for name, p in module.named_parameters()}, modes(module))
    else:
        state = FrozenState(first.requires_grad, first.training)
    state.hold(module)
    module.requires_grad_(False)
    module.eval()
    return state


def modes(module: nn.Module) -> dict[str, bool]:
    """The training flag of each part, by name."""
    return {name: part.training for name, part in module.named_modules()}


def set_modes(module: nn.Module, flags: Mapping[str, bool]) -> None:
    """Restore the training flags. Parts that were added later keep theirs."""
    for name, part in module.named_modules():
        part.training = flags.get(name, part.training)


def one_parameter(module: nn.Module) -> Tensor:
    """A parameter of a network that tells its device and number type."""
    found = next((p for p in module.parameters() if p.is_floating_point()), None)
    return torch.zeros((), device="cpu") if found is None else found


def device_of(module: nn.Module, wanted: str | torch.device | None = None) -> torch.device:
    """The device of that name; None: where a network is."""
    return one_parameter(module).device if wanted is None else resolve_device(wanted)


@contextmanager
def running_on(device: torch.device, module: nn.Module) -> Iterator[None]:
    """Meanwhile a network is on a device, in eval mode. Mode and device are restored."""
    home, before = one_parameter(module).device, modes(module)
    try:
        module.to(device).eval()
        yield
    finally:
        set_modes(module.to(home), before)


@contextmanager
def hooked(
    after: Mapping[nn.Module, Callable[[Any], Any]], before: Mapping[nn.Module, Callable[[], None]] | None = None
) -> Iterator[None]:
    """Meanwhile modules have hooks, which act in this thread alone: others may run the same modules.

    Args:
        after: called with a module's output; gives what replaces it, or None.
        before: called before a module runs.
    """
    here = get_ident()

    def ended(hook: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda _module, _args, output: hook(output) if get_ident() == here else None

    def begun(hook: Callable[[], None]) -> Callable[..., None]:
        return lambda *_: hook() if get_ident() == here else None

    with ExitStack() as hooks:
        for module, begin in (before or {}).items():
            hooks.callback(module.register_forward_pre_hook(begun(begin)).remove)
        for module, end in after.items():
            hooks.callback(module.register_forward_hook(ended(end)).remove)
        yield


@contextmanager
def sparing(module: nn.Module, images: Tensor) -> Iterator[None]:
    """Meanwhile a module that writes into its images writes into a copy: who gives the same images again means the same.

    Args:
        module: tried on one image first; one that does not write gets what is given.
        images: (b, c, h, w) such as it takes.
    """
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference do not count what is written into them
        image = images[:1].clone()
        before = image._version
        module(image)
    with ExitStack() as hooks:
        if image._version != before or not torch.equal(image, images[:1]):  # of .data no write is counted
            copied = module.register_forward_pre_hook(lambda _module, args: (args[0].clone(), *args[1:]))
            hooks.callback(copied.remove)
        yield


class Attachment:
    """Keeps a module frozen, with hooks on it, until `release` is called or this object is gone.

    Shallow copies of its owner share it. Deep copies and pickles have their own copy of the module. Each hook is a forward
    hook of the part of that name. A call can keep the outputs of the `cached` parts (`replay`).
    """

    learns = False  # the module is being trained, so it follows its owner's mode

    def __init__(self, module: nn.Module, hooks: Mapping[str, Callable[..., Any]], cached: Sequence[str] = ()) -> None:
        self._module, self._state = module, freeze(module)
        # The handles are kept for their ids: when they are unpickled, torch does not give the same ids to later hooks.
        self._handles = [module.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
        self._cached = list(cached)
        self._held = [True]  # empty after the release; shared with the finalizer
        make_cached([module.get_submodule(name) for name in cached])
        self._note_parts()
        self._release_when_gone()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not self.released:
            self._state.hold(self._module)
            self._release_when_gone()

    def _release_when_gone(self) -> None:
        finalize(self, _release, *self._release_arguments()).atexit = False

    def _release_arguments(self) -> tuple[Any, ...]:  # the finalizer must not hold this object or the module
        return ref(self._module), self._state, self._handles, self._cached, self._held

    @property
    def released(self) -> bool:
        """Whether the module has been released."""
        return not self._held

    def release(self) -> None:
        """Remove the hooks and restore the module as it was."""
        _release(*self._release_arguments())

    def keep(self) -> None:
        """Put the module back in eval mode if any part of it is in training mode, unless it learns."""
        if self.learns:
            return
        parts, leaves, owned, children = self._noted
        changed = any(leaves) or list(chain.from_iterable(map(dict.values, owned))) != children
        if changed:  # another part is there, or one is gone
            self._state.note(self._module)
            parts = self._note_parts()
        if any(map(_TRAINING, parts)):
            self._module.eval()

    def _note_parts(self) -> list[nn.Module]:
        """Note the parts, and which belong to which. They are read at each call; walking the tree takes ten times as long."""
        parts = list(self._module.modules())
        belonging = [part._modules for part in parts]
        leaves, owned = [of for of in belonging if not of], [of for of in belonging if of]
        self._noted = parts, leaves, owned, [child for of in owned for child in of.values()]
        return parts

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Meanwhile the parameters have gradients that had them before `freeze`; afterwards the module is frozen again. No other attachment may hold it."""
        if len(_HOLDERS[self._module]) > 1:
            gc.collect()  # a model that nobody has any more may hold it
        if len(_HOLDERS[self._module]) > 1:
            raise PteeError(
                "The backbone carries the exits of another model, too, and must not change. Detach that first."
            )
        learning = [p for name, p in self._module.named_parameters() if self._state.requires_grad.get(name)]
        if not learning:
            raise PteeError(
                "No parameter of the backbone requires gradients. Call backbone.requires_grad_() before ptee.augment."
            )
        for parameter in learning:
            parameter.requires_grad_()
        self.learns = True
        try:
            yield
        finally:
            self.learns = False
            self._module.requires_grad_(False).eval()
            self._module.zero_grad(set_to_none=True)


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


class KeptBuffers:
    """The values that the buffers of a module have now. A forward pass may change them, also in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept = {
            f"{name}.{key}".lstrip("."): (part._buffers, key, buffer, buffer.detach().clone())
            for name, part in module.named_modules()
            for key, buffer in part._buffers.items()
            if buffer is not None
            and buffer.layout is torch.strided
            and not (buffer.is_quantized or buffer.is_inference() or buffer.is_nested)
        }

    def value(self, name: str) -> Tensor:
        """The value that a buffer had."""
        return self._kept[name][3]

    def changing(self, answer: Callable[[], object]) -> list[str]:
        """The names of buffers that have changed and do so again in `answer`, a forward pass over other images.

        One that has changed and now stays, or has another shape, is a cache, and the network's code may know that it is filled.
        """
        if not (changed := self._changed()):
            return []
        now = KeptBuffers(self._module)
        with torch.no_grad(), suppress(Exception):
            answer()
        return [name for name in now._changed() if name in changed]

    def _changed(self) -> list[str]:
        now = {name: buffers.get(key) for name, (buffers, key, _, _) in self._kept.items()}
        return [name for name, tensor in now.items() if tensor is not None and _differ(tensor, self.value(name))]

    def put_back(self, names: Sequence[str] | None = None) -> None:
        """Give these buffers, by default all, the values that they had."""
        for name in self._kept if names is None else names:
            buffers, key, tensor, value = self._kept[name]
            buffers[key] = tensor
            if _differ(tensor, value):  # graphs of autograd notice what is written
                with torch.no_grad():
                    tensor.copy_(value)


def _differ(now: Tensor, before: Tensor) -> bool:
    """Whether a buffer has other values of the same shape and type."""
    if (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
        return False
    same = (now == before) | ((now != now) & (before != before))  # nan is the same as nan
    return not bool(same.all())
