"""Memory of this process: what the C library is told about it."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_OF_THEIR_OWN = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let the next tensor have the memory of the last one, for the rest of the process.

    glibc gives everything above 32 MiB back to the system at once and gets it anew, page by page, for the next feature
    map; with large batches of large images that takes longer than the convolutions. For programs, not for libraries: a
    caller's process is the caller's. Does nothing where the C library is another, or has been told already.

    Returns:
        Whether it was done.
    """
    if any(name in os.environ for name in _OF_THEIR_OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
