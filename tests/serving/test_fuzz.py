"""Nonsense between good requests: no wrong answer, no dead server, one line for each refusal."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from served import images, npy, saved
from starlette.testclient import TestClient

from ptee.serving.app import Rules, app_of
from ptee.serving.uploads import Limits

pytestmark = pytest.mark.cpu("arrays come in host memory")


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=pytest.mark.fuzz)])
def test_nonsense_is_refused_and_good_requests_are_answered_right(server, model, monkeypatch, requests):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes" / "serving"))
    fuzz = importlib.import_module("fuzz")
    chance, x = random.Random(0), images(8)
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    good = [fuzz.Picture("image/png", saved(Image.fromarray(noise), "PNG"), ""), fuzz.Picture("x", npy(x), "")]
    with torch.no_grad():
        want = model.predict(torch.from_numpy(x)).exit_index.tolist()
    client = TestClient(app_of(server, Rules(Limits(bytes=20_000, seconds=5), token="0123456789abcdef")))
    for n in range(requests):
        if n % 10 == 0:
            answers = client.post("/predict", content=npy(x), headers={"Content-Type": "application/x-npy"}).json()[
                "answers"
            ]
            assert [answer["exit"] for answer in answers] == want
            continue
        odd = fuzz.damaged(chance, good)
        response = client.request(odd.method, odd.path, headers=odd.headers, content=odd.body)
        assert response.status_code != 500, (odd, response.text)
        if response.status_code != 200 and odd.method != "HEAD":
            assert list(response.json()) == ["error"], odd
            assert response.json()["error"].splitlines() == [response.json()["error"]], odd
    assert client.get("/ready").status_code == 200
    assert server._engine.inside == 0
