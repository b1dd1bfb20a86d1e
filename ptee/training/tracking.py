"""A training as a tracker shows it (TensorBoard, Weights & Biases, MLflow), through accelerate's trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptee._common.errors import PteeError, first_line, unknown

if TYPE_CHECKING:
    from ptee.training.history import Epoch

TRACKERS = ("tensorboard", "wandb", "mlflow")  # each is the name of what must be installed, too
PROJECT = "ptee"


def require_tracker(name: str | None) -> None:
    """Refuse a tracker that there is not, or that is not installed."""
    if name is None:
        return
    if name not in TRACKERS:
        raise unknown("tracker", name, TRACKERS, argument="log")
    if find_spec(name) is None:
        raise PteeError(f"{name} is not installed. Install it: pip install {name}", argument="log", value=name)


@contextmanager
def tracked(name: str | None, folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Callable[[Epoch], None]]:
    """Gives what notes an epoch with a tracker. Without a name it does nothing.

    Args:
        name: one of `TRACKERS`; in all but the main process None.
        folder: of the run: its name is that of the run, and TensorBoard writes beside it.
        settings: of the training, which the tracker shows beside it.

    Raises:
        PteeError: if the tracker does not start, as without an account.
    """
    if name is None:
        yield lambda epoch: None
        return
    tracker = _started(name, folder or Path("run"), settings)
    try:
        yield lambda epoch: tracker.log(numbers(epoch), step=epoch.number)
    finally:
        tracker.finish()


def _started(name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    try:
        if name == "tensorboard":
            tracker = kind(folder.name, logging_dir=folder.parent / "tensorboard")
        else:
            tracker = kind(PROJECT, **{"run_name" if name == "mlflow" else "name": folder.name})
        tracker.main_process_only = False  # the caller sees to that; to ask accelerate would fix its device here
        tracker.start()
        tracker.store_init_configuration({key: _plain(value) for key, value in settings.items()})
    except Exception as why:  # whatever a tracker raises
        raise PteeError(f"{name} does not start: {first_line(why)}", argument="log", value=name) from why
    return tracker


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def numbers(epoch: Epoch) -> dict[str, float]:
    """An epoch as numbers by name, with a number of its own for each exit."""
    found = {"loss": epoch.loss, "seconds": epoch.seconds}
    if epoch.val_loss is not None:
        found["val_loss"] = epoch.val_loss
    for name in ("accuracy", "fidelity", "leaving"):
        if values := getattr(epoch, name):
            places = [*(f"exit {n}" for n in range(len(values) - 1)), "end"]
            found |= {f"{name}/{place}": value for place, value in zip(places, values, strict=True)}
    return found
