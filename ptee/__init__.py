"""Early exits for a trained image classifier that stays frozen. `ptee.fit` takes all steps; `dir(ptee)` names them.

Importing this package imports nothing heavy; each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptee._common.errors import PteeError as PteeError
    from ptee.deploy.export import export as export
    from ptee.deploy.runner import load_exported as load_exported
    from ptee.evaluation.comparison import compare as compare
    from ptee.evaluation.results import evaluate as evaluate
    from ptee.exits.confidence import register_confidence as register_confidence
    from ptee.exits.heads import register_head as register_head
    from ptee.exits.plan import Exit as Exit
    from ptee.exits.plan import Plan as Plan
    from ptee.model.build import augment as augment
    from ptee.model.build import load as load
    from ptee.model.build import plan as plan
    from ptee.model.early_exit import EarlyExitModel as EarlyExitModel
    from ptee.model.forward import AllExits as AllExits
    from ptee.model.forward import ExitOutput as ExitOutput
    from ptee.pipeline.fit import fit as fit
    from ptee.pipeline.recipe import Recipe as Recipe
    from ptee.pipeline.reported import write_report as write_report
    from ptee.recording.optimized import optimize as optimize
    from ptee.scale.cache import cache as cache
    from ptee.scale.trace import record as record
    from ptee.training.calibration import calibrate as calibrate
    from ptee.training.feature_cache import open_cache as open_cache
    from ptee.training.trainer import train as train
    from ptee.tuning.trace_folder import open_traces as open_traces
    from ptee.tuning.tune import tune as tune

__version__ = "0.2.0.dev0"
_HOMES = {
    "AllExits": "model.forward",
    "EarlyExitModel": "model.early_exit",
    "Exit": "exits.plan",
    "ExitOutput": "model.forward",
    "Plan": "exits.plan",
    "PteeError": "_common.errors",
    "Recipe": "pipeline.recipe",
    "augment": "model.build",
    "cache": "scale.cache",
    "calibrate": "training.calibration",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.results",
    "export": "deploy.export",
    "fit": "pipeline.fit",
    "load": "model.build",
    "load_exported": "deploy.runner",
    "optimize": "recording.optimized",
    "open_cache": "training.feature_cache",
    "open_traces": "tuning.trace_folder",
    "plan": "model.build",
    "record": "scale.trace",
    "register_confidence": "exits.confidence",
    "register_head": "exits.heads",
    "train": "training.trainer",
    "tune": "tuning.tune",
    "write_report": "pipeline.reported",
}
__all__ = sorted(_HOMES)
_MODULES = {  # for who wants more than the names above
    "losses": "training.losses",
    "thresholds": "tuning.targets",
    "traces": "tuning.traces",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ptee.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'ptee' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ptee.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__"})
