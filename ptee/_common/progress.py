"""A bar for what takes long, on a terminal alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

_Step = TypeVar("_Step")


def with_bar(steps: Iterable[_Step], words: str, progress: bool = True) -> Iterable[_Step]:
    """The steps, with a bar on a terminal.

    Args:
        steps: what takes long.
        words: what is being done.
        progress: show it.
    """
    return tqdm(steps, desc=words, leave=False, disable=None if progress else True)
