"""The pieces as deployments of Ray Serve: the same answers, also when a replica dies; nothing is lost at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from served import T, images, npy, require_same
from small import made

import ptee
from ptee._common.errors import PteeError
from ptee.serving.app import Rules

pytest.importorskip("ray", reason="needs pip install 'ptee-exits[serve]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.cpu("replicas choose their own device"),
    pytest.mark.filterwarnings("ignore"),
]
NPY = {"Content-Type": "application/x-npy"}
TOKEN = "0123456789abcdef"
PORT = 18431


@pytest.fixture(scope="module")
def model() -> ptee.EarlyExitModel:
    model = made()
    model.threshold = T
    return model


@pytest.fixture(scope="module")
def backend(model: ptee.EarlyExitModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import ray

    from ptee.serving.pieces import Source
    from ptee.serving.ray_serve import deployed, end

    folder: Path = ptee.export(model, tmp_path_factory.mktemp("ray") / "exported")
    source = Source(str(folder), True, "cpu", None, 8, 0.02, 256)
    begun: list[bool] = []
    how = {"host": "127.0.0.1", "port": PORT, "workers": 1, "p99_s": None}
    found = deployed(source, Rules(token=TOKEN), begun=lambda: begun.append(ray.is_initialized()), **how)
    found.source, found.begun = source, begun
    yield found
    end()


@pytest.fixture
def client(backend: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", headers=NPY, timeout=60, trust_env=False) as client:
        yield client


def replicas(deployment: str) -> list[int]:
    """The processes of a deployment that this process has started."""

    def ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid == os.getpid()

    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            name = (place / "cmdline").read_bytes()
            if name.startswith(f"ray::ServeReplica:ptee:{deployment}".encode()) and ours(int(place.name)):
                found.append(int(place.name))
    return found


@pytest.mark.parametrize("most", [1, 4, 100])
def test_a_batch_of_a_piece_has_so_many_images_at_most(model, most):
    from ptee.serving.pieces import pieces_of_model
    from ptee.serving.ray_serve import Piece, Rows

    pieces, sizes, x = pieces_of_model(model), [], images(23)
    first = pieces.steps[0]._replace(run=lambda *alive: (sizes.append(len(alive[0])), pieces.steps[0].run(*alive))[1])
    here = replace(pieces, steps=(first, *pieces.steps[1:]))
    source: Any = SimpleNamespace(pieces=lambda: (here, T), max_batch=most, max_queue=100, max_wait_s=0.0)
    limits = np.broadcast_to(np.asarray(T), (23, 2))
    rows = [Rows([part], wide) for part, wide in zip(np.split(x, [1, 9]), np.split(limits, [1, 9]), strict=True)]
    for n in range(3):
        piece = Piece(source, n, behind=None if n == 2 else "the next")
        sizes.clear()
        found = piece._answered(rows)
        assert not sizes or (max(sizes) == min(most, 23) and sum(sizes) == 23)
        answers = [left[i] for left, _, _ in found for i in sorted(left)]
        with torch.no_grad():
            want = model.predict(torch.from_numpy(x))
        gone = want.exit_index == n
        np.testing.assert_allclose([a.logits for a in answers], want.logits[gone].numpy(), rtol=1e-4, atol=1e-4)
        stayed = zip(found, rows, strict=True)
        rows = [Rows(alive, part.limits[stay]) for (_, stay, alive), part in stayed if len(stay)]


def test_ray_is_there_before_the_deployments(backend):
    assert backend.begun == [True]


def test_a_second_server_of_a_cluster_is_refused_and_the_first_goes_on(backend, client):
    from ptee.serving.ray_serve import deployed

    for port in (PORT, PORT + 1):
        with pytest.raises(PteeError, match="serves a model already") as refused:
            deployed(backend.source, Rules(), host="127.0.0.1", port=port, workers=1, p99_s=None)
        assert "\n" not in str(refused.value)
    assert client.post("/predict", content=npy(images(8))).status_code == 200


@pytest.mark.parametrize("host, port", [("127.0.0.1", PORT + 1), ("0.0.0.0", PORT)])
def test_another_address_than_that_of_a_running_ray_serve_is_refused(backend, client, monkeypatch, host, port):
    from ray import serve

    from ptee.serving.ray_serve import deployed

    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(PteeError, match=f"answers at 127.0.0.1:{PORT}"):
        deployed(backend.source, Rules(), host=host, port=port, workers=1, p99_s=None)
    assert client.post("/predict", content=npy(images(8))).status_code == 200


def test_each_of_many_callers_gets_the_answers_of_predict_from_python(backend, model):
    x = images(60)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(backend.answer(part) for part in np.split(x, [1, 3, 20, 21])))

    require_same([answer for part in asyncio.run(all_at_once()) for answer in part], model, x)


def test_the_http_interface_is_that_of_one_process(client, model):
    x = images(8)
    answers = client.post("/predict?logits=true", content=npy(x)).json()["answers"]
    with torch.no_grad():
        want = model.predict(torch.from_numpy(x))
    assert [a["exit"] for a in answers] == want.exit_index.tolist()
    np.testing.assert_allclose([a["logits"] for a in answers], want.logits.numpy(), rtol=1e-4, atol=1e-4)
    assert client.post("/predict", content=b"x").status_code == 400
    assert client.post("/predict?threshold=7", content=npy(x)).status_code == 400
    assert [a["exit"] for a in client.post("/predict?threshold=2", content=npy(x)).json()["answers"]] == [2] * 8
    assert client.get("/ready").status_code == 200
    assert 'ptee_serve_answers_total{exit="2"}' in client.get("/metrics").text


def test_thresholds_are_live_for_who_has_the_token(client):
    assert (
        client.patch("/settings", json={"threshold": 0.5}, headers={"Content-Type": "application/json"}).status_code
        == 401
    )
    ours = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    assert client.patch("/settings", json={"threshold": 2}, headers=ours).json()["threshold"] == [2, 2]
    assert {a["exit"] for a in client.post("/predict", content=npy(images(8))).json()["answers"]} == {2}
    assert client.patch("/settings", json={"off": [0]}, headers=ours).status_code == 400
    client.patch("/settings", json={"threshold": T}, headers=ours)


def test_a_replica_that_is_killed_costs_no_answer_and_no_answer_is_wrong(client, model):
    x = images(8)
    with torch.no_grad():
        want = model.predict(torch.from_numpy(x)).exit_index.tolist()
    (victim,) = replicas("piece-1")
    threading.Timer(1.0, lambda: os.kill(victim, signal.SIGKILL)).start()
    began = time.monotonic()
    while time.monotonic() - began < 6:
        response = client.post("/predict", content=npy(x))
        assert response.status_code == 200
        assert [a["exit"] for a in response.json()["answers"]] == want
    assert victim not in replicas("piece-1")


def test_thresholds_outlive_the_replica_that_takes_requests(client):
    ours = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    assert client.patch("/settings", json={"threshold": [0.1, 0.7]}, headers=ours).json()["threshold"] == [0.1, 0.7]
    (victim,) = replicas("http")
    os.kill(victim, signal.SIGKILL)
    found = None
    began = time.monotonic()
    while found is None and time.monotonic() - began < 60:
        with suppress(httpx.TransportError):
            response = client.get("/settings")
            found = response.json()["threshold"] if response.status_code == 200 else None
    assert victim not in replicas("http")
    assert found == [0.1, 0.7]
    client.patch("/settings", json={"threshold": T}, headers=ours)


def test_a_stop_answers_what_is_on_its_way(client, backend):
    from ptee.serving.ray_serve import drain_and_end

    found: list[int] = []

    def ask() -> None:
        while True:
            try:
                found.append(client.post("/predict", content=npy(images(8))).status_code)
            except httpx.TransportError:
                return
            if found[-1] != 200:
                return

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    time.sleep(1)
    drain_and_end()
    for caller in callers:
        caller.join(30)
    assert found.count(200) > 4 and set(found) <= {200, 503}
