"""Rows of many callers, in one process: the answers are those of `predict`, whatever else goes on."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from served import T, asked, images, require_same
from small import blended, chained, made

import ptee
from ptee._common.errors import PteeError, UnknownName
from ptee.serving.engine import BusyError, Engine
from ptee.serving.local import Batching, LocalServer
from ptee.serving.metrics import Metrics
from ptee.serving.pieces import pieces_of_model
from ptee.serving.policy import Policy

pytestmark = pytest.mark.cpu("arrays come in host memory")


def test_each_of_many_callers_gets_the_answers_of_predict(server, model):
    x = images(90)
    parts = np.split(x, [1, 2, 5, 25, 26, 60])  # of 1 to 34 rows
    found = asked(server, *parts)
    assert [len(part) for part in found] == [len(part) for part in parts]
    require_same([answer for part in found for answer in part], model, x)
    assert len({answer.exit for part in found for answer in part}) == 3


@pytest.mark.parametrize("threshold", [0.0, 2.0, [2.0, 0.4], [0.4, 2.0]])
def test_a_caller_may_give_a_threshold(server, model, threshold):
    x = images(20)
    limits = np.broadcast_to(np.asarray(threshold, dtype=np.float64), (20, 2))
    require_same(asked(server, x, limits=limits)[0], model, x, threshold)


def test_a_threshold_for_each_row(server, model):
    x, limits = images(20), torch.rand(20, 2, dtype=torch.float64).numpy()
    require_same(asked(server, x, limits=limits)[0], model, x, torch.from_numpy(limits))


def test_thresholds_of_the_model_are_live(server, model):
    x = images(20)
    for threshold in ([0.3, 0.3], [0.9, 0.5]):
        model.threshold = threshold
        require_same(asked(server, x)[0], model, x)


def test_no_images_get_no_answers(server):
    assert asyncio.run(asyncio.wait_for(server.answer(images(3)[:0]), 10)) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (images(1)[0], r"takes images \(b, 3, 8, 8\), not \(3, 8, 8\)\. For one image give x\[None\]\.$"),
        (images(2)[..., :7], r"takes images \(b, 3, 8, 8\), not \(2, 3, 8, 7\)\.$"),
        (torch.zeros(2, 3, 8, 8), r"in an array of numpy, not Tensor\. Give x\.cpu\(\)\.numpy\(\)\.$"),
        (images(2).tolist(), r"in an array of numpy, not list\.$"),
        (images(2).astype("float64"), r"takes images of type float32, not float64\."),
        (images(2).astype("uint8"), r"takes images of type float32, not uint8\."),
        (np.where(np.arange(3)[:, None, None, None] == 1, np.nan, images(3)).astype("f"), "the image of index 1 has others"),
        (np.where(np.arange(3)[:, None, None, None] == 2, -np.inf, images(3)).astype("f"), "the image of index 2 has others"),
    ],
)  # fmt: skip
def test_what_is_no_array_of_such_images_is_refused_in_python(server, given, said):
    with pytest.raises(PteeError, match=said) as raised:
        asyncio.run(asyncio.wait_for(server.answer(given), 10))
    assert raised.value.argument == "images" and raised.value.value is given


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ([0.5], None),
        (0.5, None),
        ([0.5, 0.5, 0.5], "There are 3 thresholds for 2 exits"),
        ("high", "A threshold is a number"),
        (float("nan"), "NaN"),
    ],
)
def test_thresholds_for_one_call_in_python_are_a_number_or_one_for_each_exit(server, model, limits, said):
    x = images(3)
    if said is None:
        require_same(asyncio.run(server.answer(x, threshold=limits)), model, x, 0.5)
        return
    with pytest.raises(PteeError, match=said):
        asyncio.run(asyncio.wait_for(server.answer(x, threshold=limits), 10))


def test_an_argument_that_answer_does_not_have_is_refused_with_the_nearest(server):
    with pytest.raises(UnknownName, match=r"answer\(\) has no argument 'thresholds'\. Did you mean 'threshold'"):
        server.answer(images(3), thresholds=0.5)


def test_an_array_in_any_order_or_that_is_read_only_is_answered_as_it_reads(server, model, recwarn):
    x = images(6)
    fixed = x.copy()
    fixed.flags.writeable = False
    for given in (x[::-1], np.asfortranarray(x), fixed):
        require_same(asked(server, given)[0], model, given.copy(order="C"))
    assert [str(w.message) for w in recwarn if "writable" in str(w.message)] == []


def test_large_finite_numbers_are_no_fault(server):
    assert len(asked(server, np.full((2, 3, 8, 8), 3e38, dtype="f"))[0]) == 2


def patient() -> ptee.EarlyExitModel:
    early = made()
    early.confidence = "patience"
    return early


@pytest.mark.parametrize(
    "make", [blended, patient, lambda: made("res-8x1+"), pytest.param(chained, marks=pytest.mark.slow)]
)
def test_models_whose_exits_read_earlier_answers(make):
    model = make()
    server = LocalServer(model, Batching(max_batch=4))
    x = images(20) if model.plan.input_size == (3, 8, 8) else torch.randn(20, *model.plan.input_size).numpy()
    try:
        for threshold in (0.4, 2.0, [2.0] * (len(model.exits) - 1) + [0.3]):
            model.threshold = threshold
            require_same([a for part in asked(server, *np.split(x, 4)) for a in part], model, x)
    finally:
        server.close()


@pytest.mark.parametrize("format", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_exported_model_answers_as_the_model(own_model, format, tmp_path):
    server = LocalServer(
        ptee.load_exported(ptee.export(own_model, tmp_path / "out", format=format)), Batching(max_batch=8)
    )
    x = images(30)
    try:
        require_same([a for part in asked(server, *np.split(x, 6)) for a in part], own_model, x)
    finally:
        server.close()


def test_a_model_with_all_exits_off_is_the_bare_backbone(own_model):
    own_model.off = [0, 1]
    server = LocalServer(own_model)
    x = images(9)
    try:
        require_same(asked(server, x)[0], own_model, x)
        assert len(server.policy.sizes) == 1
    finally:
        server.close()


# ---------------------------------------------------------------------------------------------------- batches


class Recorded(Metrics):
    """Keeps the batches that were run."""

    def __init__(self) -> None:
        super().__init__(["a", "b"])
        self.batches: list[tuple[int, int]] = []

    def ran(self, piece: int, rows: int, seconds: float) -> None:
        self.batches.append((piece, rows))


def policy(sizes: tuple[int, ...], **changes: object) -> Policy:
    flat = tuple({1: 0.001, size: 0.001 * size} for size in sizes)
    return replace(Policy(flat, sizes, 10.0, None, 1000), **changes)


def test_survivors_of_several_callers_share_a_batch_of_a_later_piece(model):
    heard = Recorded()
    pieces = pieces_of_model(model)
    gate = threading.Event()
    first = pieces.steps[0]._replace(run=lambda *x: (gate.wait(), pieces.steps[0].run(*x))[1])
    engine = Engine(
        replace(pieces, steps=(first, *pieces.steps[1:])),
        policy((4, 8, 8)),
        threshold=lambda: [2.0, 2.0],
        heard=heard,
    )
    done = threading.Barrier(2)
    answered = []
    for part in np.split(images(8), 4):
        engine.submit(part, None, lambda found: (answered.extend(found), len(answered) == 8 and done.wait()))
    gate.set()
    done.wait(10)
    engine.close()
    assert [batch for batch in heard.batches if batch[0] > 0] == [(1, 8), (2, 8)]
    assert sum(rows for piece, rows in heard.batches if piece == 0) == 8
    assert max(rows for _, rows in heard.batches) == 8


def test_a_batch_that_fails_fails_its_callers_and_no_others(server, model, monkeypatch):
    good, bad = images(4), np.full((1, 3, 8, 8), 7.0, dtype=np.float32)
    own = server._engine.pieces

    def run(*alive):
        if float(alive[0].max()) == 7.0:
            raise MemoryError("no room")
        return own.steps[0].run(*alive)

    broken = replace(own, steps=(own.steps[0]._replace(run=run), *own.steps[1:]))
    monkeypatch.setattr(server._engine, "pieces", broken)
    (failed,) = asked(server, bad)
    assert isinstance(failed, MemoryError)
    require_same(asked(server, good)[0], model, good)
    assert server._engine.inside == 0


# ---------------------------------------------------------------------------------------------------- room


def blocked(model: ptee.EarlyExitModel, **changes: object) -> tuple[Engine, threading.Event]:
    """An engine whose first piece waits."""
    gate = threading.Event()
    pieces = pieces_of_model(model)
    first = pieces.steps[0]._replace(run=lambda *x: (gate.wait(), pieces.steps[0].run(*x))[1])
    held = replace(pieces, steps=(first, *pieces.steps[1:]))
    return Engine(held, policy((4, 4, 4), **changes), threshold=lambda: T, heard=Recorded()), gate


def test_a_full_queue_is_busy_and_says_when_to_come_again(model):
    engine, gate = blocked(model, max_queue=6)
    answers: list = []
    engine.submit(images(5), None, answers.append)
    with pytest.raises(BusyError, match="5 images wait, and there is room for 6") as busy:
        engine.submit(images(2), None, answers.append)
    assert busy.value.seconds > 0
    engine.submit(images(1), None, answers.append)
    gate.set()
    engine.close()
    assert [len(found) for found in answers] == [5, 1]


def test_what_would_be_answered_too_late_is_refused_at_once(model):
    engine, gate = blocked(model, p99_s=0.020)
    answers: list = []
    engine.submit(images(1), None, answers.append)  # .003 s a row, and .012 s the way through full batches
    engine.submit(images(2), None, answers.append)
    with pytest.raises(BusyError, match=r"would take about 0.02 s, and 0.02 s are wished for"):
        engine.submit(images(1), None, answers.append)
    gate.set()
    engine.close()
    assert [len(found) for found in answers] == [1, 2]


def test_a_request_larger_than_the_queue_is_taken_when_nobody_waits(model):
    engine, gate = blocked(model, max_queue=2)
    gate.set()
    answers: list = []
    engine.submit(images(5), None, answers.append)
    engine.close()
    assert len(answers[0]) == 5


def test_closing_answers_all_that_came_and_takes_no_more(model):
    engine, gate = blocked(model)
    answers: list = []
    for part in np.split(images(12), 6):
        engine.submit(part, None, answers.append)
    threading.Timer(0.05, gate.set).start()
    engine.close()
    assert [len(found) for found in answers] == [2] * 6
    with pytest.raises(BusyError, match="stopping"):
        engine.submit(images(1), None, answers.append)


# ---------------------------------------------------------------------------------------------------- a model that changes


def test_settings_change_under_load_without_a_wrong_answer(server, model):
    x = images(40)
    before, after = made(), made()
    before.threshold = after.threshold = T
    after.off = [0]
    found: list = []
    asking = threading.Thread(target=lambda: [found.extend(asked(server, *np.split(x, 10))) for _ in range(20)])
    asking.start()
    time.sleep(0.02)
    assert server.change({"off": [0]})["off"] == [0]
    asking.join()
    require_same(asked(server, x)[0], after, x)
    with torch.no_grad():
        possible = [m.predict(torch.from_numpy(x)).logits.numpy() for m in (before, after)]
    answers = np.stack([a.logits for part in found for a in part]).reshape(20, 40, -1)
    near = [np.isclose(answers, logits, atol=1e-4).all(-1) for logits in possible]
    assert (near[0] | near[1]).all()


def test_until_a_change_is_ready_all_goes_on_as_before(server, model, monkeypatch):
    x, made_of = images(40), server._made

    def asks_meanwhile(draft):
        require_same(asked(server, x)[0], model, x)
        assert (server.settings(), model.off) == (before, ())
        return made_of(draft)

    before = server.settings()
    monkeypatch.setattr(server, "_made", asks_meanwhile)
    changed = server.change({"off": [0], "confidence": "entropy", "threshold": 0.2})
    assert (changed["off"], changed["confidence"], changed["threshold"]) == ([0], "entropy", [0.2, 0.2])
    require_same(asked(server, x)[0], model, x)


def test_a_change_that_fails_leaves_all_as_it_was(server, model, monkeypatch):
    def fails(draft):
        raise MemoryError("no room")

    before, pieces, x = server.settings(), server._engine.pieces, images(20)
    monkeypatch.setattr(server, "_made", fails)
    with pytest.raises(MemoryError):
        server.change({"off": [0], "threshold": 0.2})
    assert server.settings() == before and server._engine.pieces is pieces
    require_same(asked(server, x)[0], model, x)


@pytest.mark.parametrize("fails", [False, True])
def test_rows_that_wait_keep_their_settings_and_those_that_come_later_get_what_is_in_force(model, fails):
    engine, gate = blocked(model)
    answers: dict[str, list] = {}
    now = [2.0, 2.0]
    engine._threshold = lambda: now

    def put_in_force():
        if fails:
            raise MemoryError("no room")
        now[:] = [0.0, 0.0]

    def change():
        with suppress(MemoryError):
            engine.exchange(engine.pieces, engine.policy, put_in_force)

    engine.submit(images(9), None, lambda found: answers.update(before=found))
    changing = threading.Thread(target=change)
    changing.start()
    while not engine._held:
        time.sleep(0.001)
    engine.submit(images(3), None, lambda found: answers.update(after=found))
    gate.set()
    changing.join(10)
    engine.close()
    assert {a.exit for a in answers["before"]} == {2}
    assert {a.exit for a in answers["after"]} == ({2} if fails else {0})


def test_a_worker_that_wants_to_change_settings_is_refused(model):
    engine, gate = blocked(model)
    gate.set()
    found: list = []

    def done(_):
        try:
            engine.exchange(engine.pieces, engine.policy)
        except PteeError as why:
            found.append(why)

    engine.submit(images(1), None, done)
    engine.close()
    assert "another thread" in str(found[0])


def test_a_monitor_sees_what_is_answered(own_model):
    with own_model.monitor(max_fidelity_drop=0.01, audit=1.0, seed=0) as monitor:
        server = LocalServer(own_model)
        x = images(30)
        asked(server, *np.split(x, 10))
        asked(server, x[:5], limits=np.zeros((5, 2)))  # thresholds of a caller are not what was promised
        server.close()
    seen = monitor.as_dict()
    with torch.no_grad():
        want = own_model.predict(torch.from_numpy(x))
        bare = own_model.bare(torch.from_numpy(x)).argmax(1)
    assert sum(seen["rows"]) == 35
    assert seen["audited"] == 30
    assert seen["differed"] == int((want.logits.argmax(1) != bare).sum())
    assert "ptee_alarm" in server.metrics.text() and "ptee_serve_alarm" in server.metrics.text()


def alarm_of(server: LocalServer) -> float:
    (line,) = [line for line in server.metrics.text().splitlines() if line.startswith("ptee_serve_alarm ")]
    return float(line.split()[1])


def test_the_promise_of_a_monitor_is_made_again_for_other_thresholds(own_model):
    with own_model.monitor(max_fidelity_drop=0.01, audit=1.0, seed=0) as monitor:
        server = LocalServer(own_model)
        x = images(30)
        asked(server, x)
        server.change({"threshold": 0.9, "off": [0]})
        asked(server, x)
        server.close()
    assert monitor.as_dict()["audited"] == 60 and monitor.tested
    assert monitor.max_fidelity_drop == 0.01


def test_an_alarm_outlives_a_change_that_changes_nothing(own_model):
    with own_model.monitor(max_fidelity_drop=0.01, audit=1.0, seed=0) as monitor:
        server = LocalServer(own_model)
        test = monitor._test
        server.change({"threshold": own_model.threshold})
        server.close()
    assert monitor._test is test


def test_where_nothing_is_tested_the_alarm_is_no_number(own_model):
    with own_model.monitor(max_fidelity_drop=0.01, audit=1.0, seed=0):
        server = LocalServer(own_model)
        assert alarm_of(server) == 0
        own_model.threshold = 0.9  # not through the server: nobody has promised anything for this
        assert np.isnan(alarm_of(server))
        server.close()
