"""torch.compile, as pieces and whole backbones need it: every size of batches is compiled for itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ptee._common.errors import PteeError, first_line

AUTO, GRAPHS, COMPILE, EAGER = "auto", "graphs", "compile", "eager"  # the modes of `optimize`
SIZES, SIZES_OF_ALL = 256, 4096  # that are compiled; torch's own 8 would leave the others as they are, without a word


def compiled(piece: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """What torch.compile makes of a module or a function, in one of torch's modes.

    Raises:
        PteeError: when it is called, if something is missing here or is not supported.
    """
    import torch._dynamo
    from torch._dynamo.exc import TorchDynamoException

    # Without a mode the caller records the graph, so whatever the environment says, torch must make none of its own.
    options: dict[str, Any] | None = {"triton.cudagraphs": False} if mode is None else None
    made = torch.compile(piece, mode=mode, dynamic=False, options=options)

    def call(*tensors: Tensor) -> Any:
        with torch._dynamo.config.patch(recompile_limit=SIZES, accumulated_recompile_limit=SIZES_OF_ALL):
            try:
                return made(*tensors)
            except TorchDynamoException as why:
                raise _not_compiled(why, tensors[0].device.type) from why

    return call


def _not_compiled(why: Exception, device: str) -> PteeError:
    if device == "cuda":
        needs, other, is_missing = "triton (pip install triton)", f"mode={GRAPHS!r}", find_spec("triton") is None
    else:
        needs, other = "a C++ compiler (such as apt install g++; CXX names another)", f"mode={EAGER!r}"
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]  # that torch may call
        is_missing = not any(map(shutil.which, compilers))
    mend = f"It needs {needs}. Install that, or give {other}." if is_missing else f"Give {other}."
    return PteeError(f"torch.compile cannot make this model's pieces: {first_line(why)} {mend}")
