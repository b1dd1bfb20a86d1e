"""While a library builds a network or fetches its weights: it is quiet, nothing is unpickled, and errors are one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ptee._common.errors import Advice, Argument, BackboneError, first_line
from ptee._common.process import no_logs, no_pickles, no_stdout, no_warnings

CHANGE = ("Change ", Argument("model_args"), " or ", Argument("input_size"), ".")


@contextmanager
def building(label: str, args: Mapping[str, Any], remedy: Advice | None) -> Iterator[None]:
    """Turns whatever a library raises into one line, and keeps what it has to say off the terminal.

    torch.hub prints to standard output, which may be promised to JSON; timm and huggingface_hub log their retries. torchvision
    asks torch to unpickle files, and so did timm before 1.0.26 where a repository on the hub names its file; the environment
    is the one way to overrule them.

    Args:
        label: what the user calls the model.
        args: of the library's constructor, to be named in errors.
        remedy: what to do if the fault is in a download; None if nothing is downloaded.

    Raises:
        BackboneError: for whatever was raised.
    """
    try:
        with no_logs, no_warnings, no_stdout, no_pickles:
            yield
    except Exception as error:
        if remedy and not isinstance(error, TypeError):  # TypeError: an argument that the constructor does not take
            raise BackboneError(f"{label} cannot be downloaded or loaded: {first_line(error)} ", *remedy) from error
        given = " with " + ", ".join(f"{k}={v!r}" for k, v in args.items()) if args else ""
        change = CHANGE if args else ("Choose another model.",)
        raise BackboneError(f"{label} cannot be built{given}: {first_line(error)} ", *change) from error
