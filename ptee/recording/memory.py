"""What a pass that is recorded in pieces reads and writes, seen operator by operator.

A batch may begin a bucket's pieces in the middle. So a later piece may read what goes through the cuts, which is written anew for each
batch, and what never changes. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ptee._common.errors import PteeError
from ptee.analysis.axes import memory_of
from ptee.analysis.cut_points import tensors_in, written_by

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # the host waits for what these give
ONLY_SHAPES = ("_like", "new_")  # in the names of operators that read no value of the tensor that they are given


class Memory(TorchDispatchMode):
    """Holds the memory that a recording reads, so that nothing else is ever written there, and refuses what a recording cannot repeat.

    Args:
        images: (b, c, h, w) that the pass begins with.

    Attributes:
        kept: one tensor for each piece of memory that was made before the piece that reads it, or before the pass.
        constants: the bytes of those that the pass makes of weights alone.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.kept: dict[StorageWeakRef, Tensor] = {}
        self.constants: dict[StorageWeakRef, Tensor] = {}
        self._made = {memory_of(images): 0}  # in which piece
        self._of_images = {memory_of(images)}
        self._given: set[StorageWeakRef] = set()  # to this piece, anew for each batch
        self._piece = 0
        self._watches = True

    def next_piece(self, alive: Sequence[Tensor]) -> None:
        """From here on another piece runs, which is given these tensors."""
        self._piece += 1
        self._given = set(map(memory_of, alive))

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """What ptee itself does between two pieces: its answers outlive the pass."""
        self._watches = False
        try:
            yield
        finally:
            self._watches = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note what it reads and makes."""
        kwargs = kwargs or {}
        if not self._watches:
            return func(*args, **kwargs)
        if _asks(func, args):
            raise PteeError(f"{func} asks for values, and nothing is computed while a GPU records")
        read = {memory_of(t): t for t in tensors_in((args, kwargs))}
        written = set(map(memory_of, written_by(func, args, kwargs)))
        by_shape = _reads_no_value(func)
        for memory, tensor in read.items():
            self._note_read(func, memory, tensor, memory in written, by_shape)
        out = func(*args, **kwargs)
        made = {memory_of(t) for t in tensors_in(out)} - read.keys()  # neither views nor what was written into
        self._made.update(dict.fromkeys(made, self._piece))
        if not by_shape and self._of_images & read.keys():
            self._of_images |= made | written
        if func in COPIES and len({t.device for t in [*read.values(), *tensors_in(out)] if t.dim()}) > 1:
            raise PteeError(f"{func} copies between devices, and a recording has one")
        return out

    def _note_read(self, func: Any, memory: StorageWeakRef, tensor: Tensor, is_written: bool, by_shape: bool) -> None:
        made = self._made.get(memory)
        if made == self._piece:
            return
        self.kept.setdefault(memory, tensor)
        if memory in self._given:
            return
        if is_written:
            whose = "outlives the pass" if made is None else "an earlier piece has made"
            raise PteeError(f"{func} writes into memory that {whose}")
        if memory in self._of_images and not by_shape:
            raise PteeError(f"{func} reads what depends on the images and went past an exit")
        if made is not None and memory not in self._of_images and memory not in self.constants:
            with self.unwatched():
                empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                self.constants[memory] = empty.set_(tensor.untyped_storage())  # all of its bytes


def _asks(func: Any, args: Sequence[Any]) -> bool:
    """Whether the host waits for what an operator gives. An index of numbers is no such question, a mask is."""
    if func._schema.name.startswith("aten::index"):
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1:2]))
    return not ASKS.isdisjoint(func.tags)


def _reads_no_value(func: Any) -> bool:
    """Whether an operator only needs the shape of what it is given, or gives a view of it."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or any(word in func._schema.name for word in ONLY_SHAPES)
