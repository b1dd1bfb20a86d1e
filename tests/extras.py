"""What only some of ptee's users install: a test that needs it skips, with what to type, where it is absent."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def _needs(extra: str, *modules: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not all(map(find_spec, modules)), reason=f"needs pip install 'ptee-exits[{extra}]'")


needs_onnx = _needs("export", "onnx", "onnxscript", "onnxruntime")
needs_ray = _needs("ray", "ray")
