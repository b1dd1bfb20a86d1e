"""Early exits for a trained image classifier that stays frozen.

Importing this package imports nothing heavy; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptee.calls import ExitOutput as ExitOutput
    from ptee.choosing import choose_exits as choose_exits
    from ptee.comparing import compare as compare
    from ptee.decision import fit_gates as fit_gates
    from ptee.errors import PteeError as PteeError
    from ptee.evaluation import evaluate as evaluate
    from ptee.heads import register_head as register_head
    from ptee.model import AllExits as AllExits
    from ptee.model import EarlyExitModel as EarlyExitModel
    from ptee.model import augment as augment
    from ptee.model import load as load
    from ptee.plans import Exit as Exit
    from ptee.plans import Plan as Plan
    from ptee.plans import plan as plan
    from ptee.training import train as train
    from ptee.tuning import tune as tune

__version__ = "0.1.0"
_HOMES = {
    "AllExits": "model",
    "EarlyExitModel": "model",
    "Exit": "plans",
    "ExitOutput": "calls",
    "Plan": "plans",
    "PteeError": "errors",
    "augment": "model",
    "choose_exits": "choosing",
    "compare": "comparing",
    "evaluate": "evaluation",
    "fit_gates": "decision",
    "load": "model",
    "plan": "plans",
    "register_head": "heads",
    "train": "training",
    "tune": "tuning",
}
__all__ = sorted(_HOMES)
_ROOMS = ("backbones", "data", "thresholds", "traces")  # modules for who wants more than the names above


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"ptee.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ptee' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptee.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
