"""The HTTP interface: answers, refusals, settings, health. The server behind it is `LocalServer`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from served import T, images, npy, png, saved
from small import SIZE
from starlette.testclient import TestClient

import ptee
from ptee.serving.app import Rules, app_of
from ptee.serving.engine import BusyError
from ptee.serving.local import Batching, LocalServer
from ptee.serving.uploads import Limits, images_of

pytestmark = pytest.mark.cpu("arrays come in host memory")
TOKEN = "0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
NPY = {"Content-Type": "application/x-npy"}


@pytest.fixture
def client(server: LocalServer) -> Iterator[TestClient]:
    yield TestClient(app_of(server, Rules(Limits(bytes=100_000, pixels=10**4, rows=8, seconds=0.5), (0.2, 1.5), TOKEN)))


def refused(response: httpx.Response, status: int, said: str) -> httpx.Response:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert re.search(said, response.json()["error"]), response.text
    assert "\n" not in response.json()["error"]
    return response


def test_arrays_are_answered_as_predict_does(client, model):
    x = images(8)
    answers = client.post("/predict?logits=true", content=npy(x), headers=NPY).json()["answers"]
    with torch.no_grad():
        want = model.predict(torch.from_numpy(x))
    assert [a["exit"] for a in answers] == want.exit_index.tolist()
    assert [a["class"] for a in answers] == want.logits.argmax(1).tolist()
    assert [a["cost"] for a in answers] == pytest.approx(want.cost.tolist())
    np.testing.assert_allclose([a["logits"] for a in answers], want.logits.numpy(), rtol=1e-4, atol=1e-4)
    assert set(answers[0]) == {"class", "name", "probability", "exit", "confidence", "cost", "logits"}


@pytest.mark.parametrize(("format", "kind"), [("PNG", "image/png"), ("JPEG", "image/jpeg")])
def test_a_picture_is_answered(client, format, kind):
    body = saved(Image.new("RGB", (30, 20), (200, 10, 10)), format)
    answer = client.post("/predict", content=body, headers={"Content-Type": kind}).json()["answers"][0]
    assert 0 < answer["probability"] <= 1 and answer["name"] is None and "logits" not in answer


def test_json_is_answered(client):
    assert len(client.post("/predict", json={"images": images(2).tolist()}).json()["answers"]) == 2


@pytest.mark.parametrize("where", ["query", "header"])
def test_a_threshold_in_the_query_or_the_header(client, model, where):
    given = (
        {"params": {"threshold": "0.3,1.5"}}
        if where == "query"
        else {"headers": {**NPY, "X-PTEE-Threshold": "0.3,1.5"}}
    )
    answers = client.post("/predict", content=npy(images(8)), **{"headers": NPY, **given}).json()["answers"]
    with torch.no_grad():
        want = model.predict(torch.from_numpy(images(8)), [0.3, 1.5]).exit_index.tolist()
    assert [a["exit"] for a in answers] == want


def test_bad_requests_are_refused_in_one_line(client):
    post, one = client.post, npy(images(1))
    refused(post("/predict", content=b"x"), 415, "image/png")
    refused(post("/predict", content=one, headers=NPY, params={"threshold": "0.1"}), 400, "from 0.2 to 1.5")
    refused(post("/predict", content=one, headers=NPY, params={"threshold": "nan"}), 400, "from 0.2 to 1.5")
    refused(post("/predict", content=b"x" * 100_001, headers=NPY), 413, "at most 100,000 bytes")
    refused(post("/predict", content=iter([b"x" * 60_000] * 2), headers=NPY), 413, "at most 100,000 bytes")
    refused(post("/predict", content=b"x", headers={**NPY, "Content-Length": "-3"}), 413, "too large")
    refused(post("/predict", content=npy(images(9)), headers=NPY), 413, "9 images")
    refused(post("/predict", content=png((200, 100)), headers={"Content-Type": "image/png"}), 413, "200 x 100")
    refused(post("/predict", content=b"", headers=NPY), 400, "empty")
    refused(post("/predict", content=one, headers=NPY, params={"treshold": "0.5"}), 400, "treshold.*threshold, logits")
    refused(post("/predict", content=one, headers=NPY, params={"logits": "1"}), 400, "true or false")
    odd = npy(images(10)).replace(b"(10, ", b"(True, ")  # the header would be two letters longer
    odd = odd[:8] + (int.from_bytes(odd[8:10], "little") + 2).to_bytes(2, "little") + odd[10:]
    refused(post("/predict", content=odd, headers=NPY), 400, r"shape \(True, .*sizes of 0 or more")
    refused(post("/predict?threshold=1&threshold=0.5", content=one, headers=NPY), 400, "threshold is given twice")
    two = [*NPY.items(), ("X-Ptee-Threshold", "0"), ("X-Ptee-Threshold", "1")]
    refused(post("/predict", content=one, headers=two), 400, "x-ptee-threshold is given twice")
    both = {**NPY, "X-PTEE-Threshold": "1"}
    refused(post("/predict?threshold=1", content=one, headers=both), 400, "in the query and as x-ptee-threshold")
    refused(post("/predict", content=b"x", headers={"Content-Type": "image/jpeg"}), 400, r"can be read\.$")
    refused(client.get("/predict"), 405, "POST /predict")
    refused(client.get("/../../etc/passwd"), 404, "POST /predict")
    refused(post("/settings", json={}), 405, "PATCH /settings")


def test_a_full_queue_is_503_with_a_time_to_try_again(server, model, monkeypatch):
    def busy(rows: int = 1) -> None:
        raise BusyError("512 images wait.", 2.2)

    monkeypatch.setattr(server._engine, "require_room", busy)
    client = TestClient(app_of(server, Rules()))
    response = refused(client.post("/predict", content=npy(images(1)), headers=NPY), 503, "512 images wait")
    assert response.headers["Retry-After"] == "3"


def test_a_failure_inside_is_500_and_says_nothing_of_the_inside(server, monkeypatch):
    async def fails(*_: object) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(server, "answer", fails)
    client = TestClient(app_of(server, Rules()))
    response = refused(client.post("/predict", content=npy(images(1)), headers=NPY), 500, "RuntimeError")
    assert "secret" not in response.text


def test_a_body_that_comes_too_slowly_is_408_and_others_are_answered_meanwhile(server):
    app = app_of(server, Rules(Limits(seconds=0.2)))

    async def slow():
        yield b"x"
        await asyncio.sleep(5)

    async def both():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            waits = asyncio.ensure_future(client.post("/predict", content=slow(), headers=NPY))
            await asyncio.sleep(0.05)
            quick = await client.post("/predict", content=npy(images(1)), headers=NPY)
            return quick, await waits

    quick, late = asyncio.run(both())
    assert quick.status_code == 200
    refused(late, 408, "within 0.2 s")


def sent_at_once(app, n: int, body: bytes, kind: str, rounds: int = 1) -> list[list[int]]:
    """The sorted statuses of n requests, round by round."""

    async def sent():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            found = []
            for _ in range(rounds):
                asked = (client.post("/predict", content=body, headers={"Content-Type": kind}) for _ in range(n))
                found.append(sorted(response.status_code for response in await asyncio.gather(*asked)))
            return found

    return asyncio.run(sent())


def slowly(monkeypatch) -> None:
    """Uploads are decoded slowly."""

    def decoded(*given):
        time.sleep(0.1)
        return images_of(*given)

    monkeypatch.setattr("ptee.serving.app.images_of", decoded)


def test_pictures_that_wait_to_be_decoded_are_bounded(server, monkeypatch):
    slowly(monkeypatch)
    found = sent_at_once(app_of(server, Rules(decoding=4)), 10, png((300, 300)), "image/png", rounds=2)
    assert found == [[200] * 4 + [503] * 6] * 2
    found = sent_at_once(app_of(server, Rules(decoding=4)), 10, npy(images(1)), "application/x-npy")
    assert found == [[200] * 10]  # decoded where they come, so none waits


def test_bodies_count_until_they_are_decoded(server, monkeypatch):
    slowly(monkeypatch)
    body = png((300, 300))
    served = app_of(server, Rules(uploads=3 * len(body)))
    assert sent_at_once(served, 8, body, "image/png", rounds=2) == [[200] * 3 + [503] * 5] * 2


def test_images_that_are_decoded_take_room_of_the_queue(server, monkeypatch):
    slowly(monkeypatch)
    asked: list[int] = []
    monkeypatch.setattr(server, "require_room", lambda rows=1: asked.append(rows))
    sent_at_once(app_of(server, Rules()), 3, png((300, 300)), "image/png")
    assert max(asked) == 3


def test_all_uploads_together_are_bounded(server):
    client = TestClient(app_of(server, Rules(uploads=1000)))
    refused(client.post("/predict", content=npy(images(2)), headers=NPY), 503, "Too many uploads")
    assert client.post("/predict", content=npy(images(1)), headers=NPY).status_code == 200


# ---------------------------------------------------------------------------------------------------- settings


def test_settings_are_shown_to_all_and_changed_with_the_token(client, model):
    assert client.get("/settings").json() == {"threshold": T, "off": [], "confidence": "learned", "answers": "own"}
    changed = client.patch("/settings", json={"threshold": 0.9}, headers=HEADERS)
    assert changed.json()["threshold"] == [0.9, 0.9] == model.threshold
    assert client.patch("/settings", json={"threshold": [0.1, 2], "off": [1]}, headers=HEADERS).json()["off"] == [1]


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Basic x"}]
)
def test_without_the_token_settings_stay(client, model, headers):
    response = refused(client.patch("/settings", json={"threshold": 0.9}, headers=headers), 401, "Bearer TOKEN")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert model.threshold == T


def test_a_server_without_a_token_changes_nothing(server, model):
    client = TestClient(app_of(server, Rules()))
    refused(client.patch("/settings", json={"threshold": 0.9}, headers={"Authorization": "Bearer "}), 403, "PTEE_TOKEN")
    assert model.threshold == T


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "JSON object"),
        ({}, "JSON object"),
        ({"treshold": 0.5}, "treshold.*Did you mean 'threshold'"),
        ({"T": 0.5}, "T=0.5 is unknown.*threshold"),
        ({"threshold": "high"}, "threshold"),
        ({"threshold": 3}, "threshold"),
        ({"threshold": [0.1, 0.2, 0.3]}, "3 thresholds for 2 exits"),
        ({"threshold": 0.5, "max_cost": 0.5}, "one of"),
        ({"max_cost": 0.5}, "no curve"),
        ({"off": [7]}, "0 to 1"),
        ({"off": "all"}, "off"),
        ({"confidence": "lerned"}, "learned"),
        ({"confidence": "calibrated"}, "calibrate"),
        ({"answers": "blended"}, "blend|tune"),
        ({"answers": 1}, "answers"),
        ({"off": [0], "confidence": "x"}, "confidence"),
        ({"confidence": "entropy"}, "chosen for another confidence. Give threshold"),
    ],
)
def test_settings_that_cannot_be_change_nothing(client, values, said):
    before = client.get("/settings").json()
    refused(client.patch("/settings", json=values, headers=HEADERS), 400, said)
    assert client.get("/settings").json() == before


def test_settings_of_another_type_are_refused_with_the_right_one(client):
    refused(client.patch("/settings?threshold=0.5", json={"off": [0]}, headers=HEADERS), 400, "not in the query")
    form = {**HEADERS, "Content-Type": "application/x-www-form-urlencoded"}
    refused(
        client.patch("/settings", content=b'{"threshold": 0.5}', headers=form),
        415,
        "Send Content-Type: application/json",
    )


def test_thresholds_of_an_exported_model_are_live_and_nothing_else_is(own_model, tmp_path):
    server = LocalServer(ptee.load_exported(ptee.export(own_model, tmp_path / "out")), Batching(max_batch=2))
    client = TestClient(app_of(server, Rules(token=TOKEN)))
    try:
        assert client.patch("/settings", json={"threshold": [0.1, 0.2]}, headers=HEADERS).json()["threshold"] == [
            0.1,
            0.2,
        ]
        refused(client.patch("/settings", json={"off": [0]}, headers=HEADERS), 400, "only threshold")
        unchanged = client.patch("/settings", json={"threshold": None}, headers=HEADERS)
        assert unchanged.status_code == 200 and unchanged.json()["threshold"] == [0.1, 0.2]
        refused(client.patch("/settings", json={"threshold": [1, 1, 1]}, headers=HEADERS), 400, "3 thresholds")
    finally:
        server.close()


# ---------------------------------------------------------------------------------------------------- health


def test_health_readiness_and_what_is_served(client, model):
    assert client.get("/health").json() == {"status": "alive"}
    assert client.get("/ready").json() == {"status": "ready"}
    shown = client.get("/model").json()
    assert shown["input_size"] == list(SIZE) and shown["classes"] == 4 and shown["threshold_bounds"] == [0.2, 1.5]
    assert TOKEN not in str(shown)


def test_a_server_that_stops_is_not_ready(own_model):
    app = app_of(LocalServer(own_model, Batching(max_batch=2)), Rules())
    with TestClient(app) as client:
        app.state.stopping = True
        refused(client.get("/ready"), 503, "stopping")
        answered = client.post("/predict", content=npy(images(1)), headers=NPY)
        assert answered.status_code == 200 and answered.headers["Connection"] == "close"
    refused(TestClient(app).post("/predict", content=npy(images(1)), headers=NPY), 503, "stopping")


def test_metrics_are_for_prometheus(own_model):
    model, server = own_model, LocalServer(own_model, Batching(max_batch=2))
    client = TestClient(app_of(server, Rules()))
    client.post("/predict", content=npy(images(8)), headers=NPY)
    client.post("/predict", content=b"x")
    lines = client.get("/metrics").text.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    with torch.no_grad():
        want = model.predict(torch.from_numpy(images(8)))
    for exit in range(3):
        left = int((want.exit_index == exit).sum())
        assert float(found[f'ptee_serve_exit_share{{exit="{exit}"}}']) == left / 8
        assert float(found.get(f'ptee_serve_latency_seconds_count{{exit="{exit}"}}', 0)) == left
        assert float(found[f'ptee_serve_queue_rows{{piece="{exit}"}}']) == 0
    assert float(found["ptee_serve_mean_cost"]) == pytest.approx(want.cost.mean().item())
    assert float(found['ptee_serve_requests_total{path="/predict",status="200"}']) == 1
    assert float(found['ptee_serve_requests_total{path="/predict",status="415"}']) == 1
    server.close()
