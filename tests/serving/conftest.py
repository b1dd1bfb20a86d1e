"""A small model behind a server. One server serves all tests of a file: capturing a model takes a second."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from served import T
from small import made

import ptee
from ptee.serving.local import Batching, LocalServer


@pytest.fixture(scope="module")
def only_server() -> Iterator[LocalServer]:
    model = made()
    model.threshold = T
    model.origin = replace(model.origin, pixels_known=True)
    server = LocalServer(model, Batching(max_batch=8, max_queue=10_000, workers=2))
    yield server
    server.close()


@pytest.fixture
def server(only_server: LocalServer) -> Iterator[LocalServer]:
    """Its settings are as they were before each test. No test may close it."""
    usual = only_server.settings()
    yield only_server
    if only_server.settings() | {"threshold": T} != usual:
        only_server.change(usual)
    only_server._model.threshold = T


@pytest.fixture
def model(server: LocalServer) -> ptee.EarlyExitModel:
    """The model behind the server."""
    return server._model


@pytest.fixture
def own_model() -> ptee.EarlyExitModel:
    """A model of the test's own."""
    model = made()
    model.threshold = T
    return model
