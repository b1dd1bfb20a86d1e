"""Which memory a tensor lies in, as a key that is never given to another."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def memory_of(tensor: Tensor) -> StorageWeakRef:
    """The memory of a tensor and of its views, to be used as a key.

    Its address alone would not do: freed and used again, it stands for other values. The key is a weak reference. While
    there is one, torch gives the address to nobody else, but the numbers themselves are freed.
    """
    return StorageWeakRef(tensor.untyped_storage())
