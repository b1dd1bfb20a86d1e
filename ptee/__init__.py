"""Early exits for a trained image classifier that stays frozen.

Importing this package imports nothing heavy; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptee.errors import PteeError as PteeError

__version__ = "0.1.0"
_HOMES = {
    "PteeError": "errors",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ptee' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptee.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
