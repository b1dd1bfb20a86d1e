"""A small model behind a server, and what it answers by itself."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from device import drawn
from PIL import Image
from small import SIZE

import ptee
from ptee.serving.local import LocalServer
from ptee.serving.queues import Answer

T = [0.45, 0.55]  # rows leave at each exit


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def images(n: int) -> np.ndarray:
    return (3 * torch.randn(n, *SIZE, generator=drawn(1), device="cpu")).numpy()


def asked(server: LocalServer, *parts: np.ndarray, limits: Any = None) -> list[Any]:
    """The answers to several callers who come at once; for those who get none, why."""

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(server.answer(part, limits) for part in parts), return_exceptions=True)

    return asyncio.run(all_at_once())


def require_same(answers: Sequence[Answer], model: ptee.EarlyExitModel, x: np.ndarray, threshold: Any = None) -> None:
    """The answers are those of `predict`: exits, logits, classes, costs."""
    with torch.no_grad():
        want = model.predict(torch.from_numpy(x), threshold)
    assert [a.exit for a in answers] == want.exit_index.tolist()
    np.testing.assert_allclose(np.stack([a.logits for a in answers]), want.logits.numpy(), rtol=1e-4, atol=1e-4)
    assert [a.number for a in answers] == want.logits.argmax(1).tolist()
    assert [a.cost for a in answers] == pytest.approx(want.cost.tolist())
    assert [a.confidence for a in answers] == pytest.approx(want.confidence.tolist(), abs=1e-4)
    assert [a.probability for a in answers] == pytest.approx(want.logits.softmax(1).amax(1).tolist(), abs=1e-4)


def png(size: tuple[int, int] = (20, 12), mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(Image.fromarray(noise).convert(mode), "PNG")


def saved(picture: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format)
    return stream.getvalue()


def npy(array: np.ndarray, **how: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **how)
    return stream.getvalue()
