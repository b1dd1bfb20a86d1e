"""While a library builds a network or fetches its weights: it is quiet, nothing is unpickled, and errors are one line."""

from __future__ import annotations

import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ptee._common.errors import BackboneError, first_line

_ENVIRONMENT = threading.RLock()


@contextmanager
def building(label: str, args: Mapping[str, Any], remedy: str | None) -> Iterator[None]:
    """Turns whatever a library raises into one line, and keeps what it has to say off the terminal.

    torch.hub prints to standard output, which may be promised to JSON; timm and huggingface_hub log their retries.

    Args:
        label: what the user calls the model.
        args: of the library's constructor, to be named in errors.
        remedy: what to do if the fault is in a download; None if nothing is downloaded.

    Raises:
        BackboneError: for whatever was raised.
    """
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub", "httpx", "urllib3", "filelock")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _nothing_unpickled():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if remedy and not isinstance(error, TypeError):  # TypeError: an argument that the constructor does not take
            raise BackboneError(f"{label} cannot be downloaded or loaded: {first_line(error)} {remedy}") from error
        given = " with " + ", ".join(f"{k}={v!r}" for k, v in args.items()) if args else ""
        change = "Change model_args= or input_size=." if args else "Choose another model."
        raise BackboneError(f"{label} cannot be built{given}: {first_line(error)} {change}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _nothing_unpickled() -> Iterator[None]:
    """torch reads files as data meanwhile, even where a library asks it to unpickle them.

    torchvision asks for that, and so did timm before 1.0.26 where a repository on the hub names its file. The environment
    is the one way to overrule them; it belongs to the whole process, so one thread at a time changes it.
    """
    safe, unsafe = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch refuses to have both
    with _ENVIRONMENT:
        before = {name: os.environ.pop(name) for name in (safe, unsafe) if name in os.environ}
        os.environ[safe] = "1"
        try:
            yield
        finally:
            del os.environ[safe]
            os.environ.update(before)
