"""Cases of a parametrized test that only `-m slow` runs."""

from __future__ import annotations

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
