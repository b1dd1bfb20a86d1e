from __future__ import annotations

import copy
import json
import math
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from device import here
from small import blended, labelled, made
from tiny import one_line
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.production.monitor import Alarm, Monitor

X = labelled(24)[0]


def leaving() -> ptee.EarlyExitModel:
    """A model in which some rows leave at exit 0, some at exit 1 and some nowhere."""
    model = made()
    with torch.no_grad():
        first, second, _ = model.all_exits(X).confidence
    model.threshold = [first.sort().values[15:17].mean().item(), second.sort().values[11:13].mean().item()]
    assert set(model.predict(X).exit_index.tolist()) == {0, 1, 2}
    return model


def audited(model: ptee.EarlyExitModel, **more: Any) -> Monitor:
    return model.monitor(**{"audit": 1, "max_fidelity_drop": 0.01} | more)


@pytest.mark.parametrize("call", [lambda m: m.predict(X).logits, lambda m: m(X)], ids=["predict", "model(x)"])
def test_an_audit_changes_no_answer_and_counts_those_that_differ(call):
    model = leaving()
    with torch.inference_mode():
        before, bare = call(model), model.backbone(X).argmax(-1)
        with audited(model) as monitor:
            after = call(model)
    assert torch.equal(before, after)
    seen = monitor.as_dict()
    assert seen["audited"] == len(X)
    assert seen["differed"] == int((before.argmax(-1) != bare).sum()) > 0


def test_counters_are_those_of_the_answers():
    model = leaving()
    with model.monitor(audit=0) as monitor:
        out = [model.predict(x) for x in X.split(7)]
    index, cost, h = (
        torch.cat([getattr(o, name) for o in out]).double() for name in ("exit_index", "cost", "confidence")
    )
    seen = monitor.as_dict()
    assert seen["rows"] == [int((index == n).sum()) for n in range(3)]
    assert seen["mean_cost"] == pytest.approx(cost.mean().item())
    assert seen["mean_confidence"] == pytest.approx([h[index == n].mean().item() for n in range(3)])
    assert (seen["audited"], seen["alarm"]) == (0, None)
    model.predict(X)
    assert monitor.as_dict() == seen, "it was stopped"


def test_blended_answers_are_audited_at_the_end_too():
    model = blended()
    model.threshold = 0.999  # all go on to the end
    with torch.no_grad(), audited(model) as monitor:
        out, bare = model.predict(X), model.backbone(X)
    differ = out.logits.argmax(-1) != bare.argmax(-1)
    assert differ[out.exit_index == len(model.exits)].any()
    assert monitor.as_dict()["differed"] == int(differ.sum())


def test_an_audit_leaves_the_backbone_frozen_whatever_its_user_did():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    model = ptee.augment(net, exits=["2"], input_size=(3, 16, 16))
    fast, x = ptee.optimize(model, mode="eager", max_batch=8), torch.randn(8, 3, 16, 16)
    before = net[1].running_mean.clone()
    net.train()
    with torch.no_grad(), audited(model):
        fast.predict(x)
    assert torch.equal(net[1].running_mean, before)


def test_a_failing_audit_or_alarm_costs_no_answer():
    model = leaving()

    def page(_: Monitor) -> None:
        raise OSError("the pager is down")

    with torch.no_grad(), audited(model, on_alarm=page, max_fidelity_drop=1e-4) as monitor:
        with pytest.warns(
            UserWarning, match="raised an alarm, and its on_alarm failed. The answers stand. OSError: the pager is down"
        ):
            out = model.predict(X)
        assert torch.equal(out.logits, model.predict(X).logits)
    assert monitor.as_dict()["failed"] == 1
    assert monitor.alarm is not None


def test_an_alarm_that_cannot_be_told_is_warned_of_also_behind_an_audit_that_failed():
    model = leaving()
    fails = {"on_alarm": lambda _: 1 / 0, "max_fidelity_drop": 1e-4}
    with torch.no_grad(), audited(model, **fails) as monitor:
        monitor._failed = 1
        with pytest.warns(
            UserWarning, match="its on_alarm failed. The answers stand. ZeroDivisionError: division by zero"
        ):
            model.predict(X)


def test_who_goes_on_from_an_alarm_leaves_no_row_early():
    model = leaving()
    with torch.no_grad(), audited(model, max_fidelity_drop=1e-4) as monitor:
        model.predict(X)
    state = monitor.as_dict()
    assert state["alarm"]
    with audited(model, max_fidelity_drop=1e-4, on_alarm="never_leave") as monitor:
        monitor.resume(state)
    assert min(model.threshold) > 1


# ---------------------------------------------------------------------------------------------------- what is promised

CHANGES = {
    "threshold": lambda m: setattr(m, "threshold", 0.0),
    "off": lambda m: setattr(m, "off", [1]),
    "confidence": lambda m: setattr(m, "confidence", "max_prob"),
}


def put_back(model: ptee.EarlyExitModel, settings: ptee.EarlyExitModel) -> None:
    model.threshold, model.off, model.confidence = settings.threshold, settings.off, settings.confidence


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_of_the_model_no_answer_is_audited_against_the_old_promise(name):
    model = leaving()
    before = copy.deepcopy(model)
    with torch.no_grad(), audited(model, max_fidelity_drop=0.9) as monitor:
        CHANGES[name](model)
        with pytest.warns(
            UserWarning, match=rf"{name} changed.*counted and not audited.*renew\(max_fidelity_drop=0\.9\)"
        ):
            model.predict(X)
        model.predict(X)  # it is said once
        seen = monitor.as_dict()
        assert (sum(seen["rows"]), seen["audited"], seen["tested"]) == (2 * len(X), 0, False)
        put_back(model, before)
        model.predict(X)
    seen = monitor.as_dict()
    assert (sum(seen["rows"]), seen["audited"], seen["tested"]) == (3 * len(X), len(X), True)


def test_a_change_of_the_blend_ends_the_promise_too():
    model = leaving()
    ptee.tune(model, torch.utils.data.TensorDataset(*labelled(40)), max_fidelity_drop=0.5, answers="blended", margin=0)
    with torch.no_grad(), audited(model, max_fidelity_drop=0.9) as monitor:
        model.blend = replace(
            model.blend, weights={k: tuple(v + 1 for v in of) for k, of in model.blend.weights.items()}
        )
        with pytest.warns(UserWarning, match="blend changed") as told:
            model(X)
        assert told[0].filename == __file__  # and no line of torch or ptee
        model.answers = "own"
        model.predict(X)
    assert monitor.as_dict()["audited"] == 0


def test_a_promise_can_be_renewed_for_the_model_as_it_is():
    model = all_wrong()
    with torch.no_grad(), audited(model) as monitor:
        model.predict(X)
        assert monitor.alarm is not None
        model.threshold = 2.0
        model.predict(X)  # nothing is said: there is an alarm already
        monitor.renew(0.02)
        model.predict(X)
        seen = monitor.as_dict()
        assert (seen["max_fidelity_drop"], seen["tested"], monitor.alarm) == (0.02, True, None)
        assert (sum(seen["rows"]), seen["audited"], seen["test"]["seen"]) == (3 * len(X), 2 * len(X), len(X))
        with pytest.raises(PteeError, match="thresholds were not chosen for that"):
            monitor.renew()
        with pytest.raises(PteeError, match="max_fidelity_drop=0 must be above 0"):
            monitor.renew(0)
        assert monitor.max_fidelity_drop == 0.02


def test_thresholds_that_do_the_same_are_the_same_promise():
    model = all_wrong()
    model.threshold = float("inf")
    with torch.no_grad(), audited(model) as monitor:
        model.threshold = 3.0
        model.predict(X)
        assert json.loads(json.dumps(monitor.as_dict(), allow_nan=False))["audited"] == len(X)


def test_calls_with_thresholds_of_their_own_and_soft_answers_are_not_audited():
    model = leaving()
    with torch.no_grad(), audited(model) as monitor:
        model.predict(X, threshold=0.0)
        model.predict(X, soft=True)
    seen = monitor.as_dict()
    assert (seen["audited"], sum(seen["rows"])) == (0, len(X))


def test_answers_that_were_under_way_while_the_thresholds_were_changed_are_counted_and_not_audited():
    model = leaving()
    with torch.no_grad():
        out = model.predict(X)
        with audited(model) as monitor:
            see = monitor.watch(X, audited=True, at_once=len(X))
            model.threshold = 0.0
            with pytest.warns(UserWarning, match="threshold changed"):
                assert see(out) is out
    seen = monitor.as_dict()
    assert (seen["audited"], sum(seen["rows"])) == (0, len(X))


def test_a_share_of_the_images_is_drawn():
    model = leaving()
    with audited(model, audit=0.1, seed=0) as monitor:
        positions = [monitor._draw(7) for _ in range(3000)]
    drawn = [7 * n + p for n, each in enumerate(positions) for p in each]
    assert len(drawn) == len({*drawn})
    assert 0.09 < len(drawn) / 21_000 < 0.11
    assert {p % 7 for p in drawn} == set(range(7))


class Writes(nn.Module):
    """A user's network that writes into its images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(1)
        return self.fc(self.conv(x).mean((2, 3)))


def test_a_backbone_that_writes_into_its_images_is_audited_on_what_they_were():
    model = ptee.augment(Writes(), exits=["conv"], input_size=(3, 8, 8), head="pool")
    model.threshold = 0
    with torch.no_grad(), audited(model) as monitor:
        out = model.predict(X.clone())
        bare = model.backbone(X.clone()).argmax(-1)
    assert monitor.as_dict()["differed"] == int((out.logits.argmax(-1) != bare).sum())


def test_soft_answers_and_copies_are_not_counted():
    model = leaving()
    with audited(model) as monitor:
        model.predict(X, soft=True)
        for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.predict(X)
        assert copy.deepcopy(model).monitored is None
    assert sum(monitor.as_dict()["rows"]) == 0


def test_an_optimized_model_is_watched_too():
    model = leaving().double()
    fast = ptee.optimize(model)
    with torch.no_grad(), audited(model) as monitor:
        fast.predict(X.double())
        fast(X[:0].double())
    seen = monitor.as_dict()
    assert sum(seen["rows"]) == seen["audited"] == len(X)


# ---------------------------------------------------------------------------------------------------- the alarm


def all_wrong() -> ptee.EarlyExitModel:
    """A model whose early answers are never the backbone's."""
    model = made()
    model.threshold = 0
    with torch.no_grad():
        model.heads[0].logits.weight.zero_()
        model.backbone[-1].weight.zero_()
        model.heads[0].logits.bias.copy_(torch.arange(4.0))
        model.backbone[-1].bias.copy_(-torch.arange(4.0))
    return model


def test_an_alarm_says_since_when_and_is_raised_once():
    model, told = all_wrong(), []
    with audited(model, on_alarm=told.append) as monitor:
        model.predict(X)
        alarm = monitor.alarm
        model.predict(X)
    assert told == [monitor]
    assert monitor.alarm == alarm
    assert alarm is not None
    assert (alarm.since_row, alarm.row, alarm.differed) == (1, alarm.audited, alarm.audited)
    assert "The promise does not hold since about image 1 (20" in str(alarm)


def test_an_alarm_can_switch_early_exits_off():
    model = all_wrong()
    with torch.no_grad(), audited(model, on_alarm="never_leave") as monitor:
        model.predict(X)
        assert min(model.threshold) > 1
        assert torch.equal(model.predict(X).logits, model.backbone(X))
    again = all_wrong()
    with torch.no_grad(), audited(again, on_alarm="never_leave") as other:
        other.resume(monitor.as_dict())
        assert min(again.threshold) > 1, "the promise was of the thresholds before"


@pytest.mark.parametrize("resumed", [False, True])
def test_images_are_numbered_as_they_are_answered_and_counted(resumed):
    model = all_wrong()
    with torch.no_grad(), audited(model) as monitor:
        model.predict(X[:5], threshold=2.0)
        model.predict(X[:7], soft=True)
        with pytest.raises(RuntimeError, match="out of order"), failing(model):
            model.predict(X[:3])
        state = monitor.as_dict()
        model.predict(X)
    assert sum(state["rows"]) == 5
    if resumed:
        with torch.no_grad(), audited(model) as monitor:
            monitor.resume(state)
            model.predict(X)
    alarm = monitor.alarm
    assert alarm is not None
    assert (alarm.since_row, alarm.row) == (6, 5 + alarm.audited)
    assert alarm.row <= sum(monitor.as_dict()["rows"])


@contextmanager
def failing(model: ptee.EarlyExitModel) -> Iterator[None]:
    """Meanwhile the first head raises."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of order")

    hook = model.heads[0].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def test_without_audits_there_is_no_alarm():
    model = all_wrong()
    with audited(model, audit=0) as monitor:
        model.predict(X)
    assert monitor.alarm is None


# ---------------------------------------------------------------------------------------------------- the audit itself


def rounded() -> ptee.EarlyExitModel:
    """A model whose backbone answers 1 in float32 and 0 in bfloat16, where two logits are equal; its first exit answers 0."""
    model = all_wrong()
    with torch.no_grad():
        model.heads[0].logits.bias.copy_(torch.tensor([5.0, 0, 0, 0]))
        model.backbone[-1].bias.copy_(torch.tensor([1.0, 1.001, 0, 0]))
    return model


def test_an_audit_is_in_the_number_type_of_the_answers():
    model = rounded()
    with torch.no_grad(), torch.autocast(here().type, torch.bfloat16):
        assert set(model.backbone(X).argmax(-1).tolist()) == {0}
        with audited(model) as monitor:
            model.predict(X)
    assert (monitor.as_dict()["audited"], monitor.as_dict()["differed"]) == (len(X), 0)
    with torch.no_grad(), audited(model) as monitor:
        model.predict(X)
    assert monitor.as_dict()["differed"] == len(X)


def test_an_optimized_model_is_audited_without_autocast_as_it_answers():
    model = rounded()
    fast = ptee.optimize(model, mode="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), audited(model) as monitor:
        fast.predict(X)
        assert torch.is_autocast_enabled("cpu")
    assert monitor.as_dict()["differed"] == len(X)


@pytest.mark.parametrize(("rows", "max_batch", "most"), [(24, 4, 4), (80, 256, 32), (80, None, 32)])
def test_an_audit_takes_no_more_images_at_once_than_the_model_does(rows, max_batch, most, monkeypatch):
    model, sizes = leaving(), []
    model.threshold = 0
    bare = model.bare
    monkeypatch.setattr(model, "bare", lambda x: sizes.append(len(x)) or bare(x))
    call = model if max_batch is None else ptee.optimize(model, mode="eager", max_batch=max_batch)
    with torch.no_grad(), audited(model) as monitor:
        call.predict(torch.cat([X] * 4)[:rows])
    assert monitor.as_dict()["audited"] == sum(sizes) == rows
    assert max(sizes) == most


def test_a_resumed_monitor_knows_of_failed_audits(monkeypatch):
    model = leaving()
    with torch.no_grad(), audited(model) as monitor:
        monkeypatch.setattr(model, "bare", None)
        with pytest.warns(UserWarning, match="An audit failed"):
            model.predict(X)
    with audited(model) as again:
        again.resume(monitor.as_dict())
        assert again.as_dict() == monitor.as_dict()
    assert again.as_dict()["failed"] == 1


# ---------------------------------------------------------------------------------------------------- what a share finds


def test_how_soon_a_fall_is_found_depends_on_the_share_that_is_audited():
    model = leaving()
    with audited(model, audit=0.05) as often:
        soon = often.images_to_find(0.05)
        assert often.images_to_find(1) < soon < often.images_to_find(0.03)
        assert often.images_to_find(0.01) == math.inf
    with audited(model, audit=0.01) as seldom:
        assert seldom.images_to_find(0.05) == pytest.approx(5 * soon)
    with audited(model, audit=0) as never, pytest.raises(PteeError, match="audits nothing, so it finds nothing"):
        never.images_to_find(0.05)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), True, "0.05", None])
def test_what_is_no_share_is_refused(share):
    with (
        audited(leaving()) as monitor,
        pytest.raises(PteeError, match=r"share=.* must be a number from 0 to 1") as refusal,
    ):
        monitor.images_to_find(share)
    one_line(refusal)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"audit": 1e-5}, r"With audit=1e-05 it takes about 18,000,000 images to find that 0\.039 .* give audit=0\.000\d+ or more"),
        ({"audit": 1e-300}, r"it takes about 1\.8e\+302 images.* give audit=0\.000\d+ or more"),
        ({"audit": 0.5, "max_fidelity_drop": 1e-7}, "give a larger max_fidelity_drop"),
    ],
)  # fmt: skip
def test_a_share_that_finds_nothing_in_reasonable_time_is_warned_of(wish, words):
    with pytest.warns(UserWarning, match=words) as told:
        audited(leaving(), **wish).stop()
    assert len(str(told[0].message)) < 300


# ---------------------------------------------------------------------------------------------------- threads, files


def test_threads_lose_no_count_and_a_reader_sees_whole_ones():
    model, odd = leaving(), []
    with audited(model, audit=0.5, seed=0) as monitor:

        def read() -> None:
            for _ in range(100):
                seen = monitor.as_dict()
                odd.extend([seen] * (sum(seen["rows"]) % 4 != 0 or seen["differed"] > seen["audited"]))
                monitor.prometheus()

        def answer() -> None:
            for _ in range(40):
                model.predict(X[:4])

        threads = [threading.Thread(target=each) for each in (answer, answer, read, read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not odd
    assert sum(monitor.as_dict()["rows"]) == 320
    assert 100 < monitor.as_dict()["audited"] < 220


def test_a_state_holds_what_the_device_has_still_to_add_when_it_is_asked_for(monkeypatch):
    model = leaving()
    with model.monitor(audit=0) as monitor:
        model.predict(X)
        late = monitor._sums.clone()
        monitor._sums.zero_()  # as if a stream had not added these yet
        monkeypatch.setattr("ptee.production.monitor.wait", lambda device: monitor._sums.copy_(late))
        assert sum(monitor.as_dict()["rows"]) == len(X)


def test_a_monitor_is_saved_as_json_and_goes_on():
    model = all_wrong()
    with audited(model) as first:
        model.predict(X[:1])
    with audited(model) as second:
        second.resume(json.loads(json.dumps(first.as_dict())))
        assert second.as_dict() == first.as_dict()
        model.predict(X)
    assert isinstance(second.alarm, Alarm)
    assert second.alarm.since_row == 1
    with audited(model) as third:
        third.resume(second.as_dict())
    assert third.alarm == second.alarm


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.clear(), "no state of a monitor: audited is missing"),
        (lambda s: s.update(rows=[1, 2]), "its parts do not fit each other"),
        (lambda s: s.update(rows=[1, 2, -3]), r"rows\[2\]=-3 must be 0 or more"),
        (lambda s: s.update(cost=[1.0, 2.0, float("nan")]), "must be a finite number"),
        (lambda s: s.update(exits=["0", "1", ""]), "its exits is"),
        (lambda s: s.update(max_fidelity_drop=0.02), "its max_fidelity_drop is 0.02, and here it is 0.01"),
        (lambda s: s.update(rows=[10**400, 0, 0]), "rows"),
        (lambda s: s["test"]["bets"][0].update(moment=1e300), "moment"),
        (lambda s: s["test"]["bets"].pop(), "its parts do not fit each other"),
        (lambda s: s.update(alarm=3), "alarm"),
        (lambda s: s.update(audited=10**6), "its parts do not fit each other"),
        (lambda s: s.update(differed=s["audited"] + 1), "its parts do not fit each other"),
        (lambda s: s["test"]["bets"][1].update(since=10**6), "its parts do not fit each other"),
        (lambda s: s["test"].update(seen=10**6), "its parts do not fit each other"),
        (lambda s: (s.update(alarm=None), s["test"]["bets"][0].update(capital=1e6)), "its parts do not fit each other"),
        *[
            (
                lambda s, name=name, value=value: s["test"]["bets"][2].update({name: value}),
                rf"bets\[2\]\.{name}=.* must be",
            )
            for name in ("capital", "cusum")
            for value in (float("nan"), float("inf"), -1e3, 1e301, "1")
        ],
        (lambda s: s["promised_for"].update(threshold=[0.1, 0.2]), r"its threshold is \[0\.1, 0\.2\], and here it is"),
        (lambda s: s["promised_for"].update(off=[1]), r"its off is \[1\], and here it is \[\]"),
        (lambda s: s["promised_for"].update(confidence="max_prob"), "its confidence is 'max_prob'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_lost(change, words):
    model = leaving()
    with audited(model) as monitor:
        model.predict(X)
        before = monitor.as_dict()
        state = copy.deepcopy(before)
        change(state)
        with pytest.raises(PteeError, match=words) as refusal:
            monitor.resume(state)
    one_line(refusal)
    assert monitor.as_dict() == before


def test_prometheus_reads_every_counter():
    model = leaving()
    with audited(model) as monitor:
        model.predict(X)
    lines, seen = monitor.prometheus().splitlines(), monitor.as_dict()
    assert monitor.prometheus().endswith("\n")
    assert f'ptee_rows_total{{exit="0",module="0"}} {seen["rows"][0]}' in lines
    assert f'ptee_rows_total{{exit="2",module=""}} {seen["rows"][2]}' in lines
    assert f"ptee_audited_total {len(X)}" in lines
    named = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert {line.partition("{")[0].split()[0] for line in lines if line[0] != "#"} == {*named}
    assert len(named) == len({*named})


# ---------------------------------------------------------------------------------------------------- what is refused

NAN = float("nan")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"confidence": 1}, "confidence=1 must be below 1"),
        ({"confidence": 0.0}, "confidence=0.0 must be above 0"),
        ({"confidence": NAN}, "confidence=nan must be a finite number"),
        ({"audit": NAN}, "audit=nan must be a finite number"),
        ({"audit": 1.5}, "audit=1.5 must be 1 or less"),
        ({"audit": True}, "audit=True must be a number"),
        ({"max_fidelity_drop": 0}, "max_fidelity_drop=0 must be above 0"),
        ({"on_alarm": "stop"}, "on_alarm"),
        ({"max_fidelity_drop": None}, "were not chosen for that.*max_fidelity_drop=0.01"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(wrong, words):
    model = leaving()
    with pytest.raises(PteeError, match=words) as refusal:
        audited(model, **wrong)
    one_line(refusal)
    assert model.monitored is None


def test_a_copy_of_a_watched_model_gets_a_monitor_of_its_own():
    model = leaving()
    with audited(model) as monitor, audited(copy.copy(model)) as other:
        assert other is not monitor


def test_a_second_monitor_is_refused():
    model = leaving()
    with audited(model) as monitor:
        with pytest.raises(PteeError, match=r"has a monitor already.*stop"):
            audited(model)
        assert model.monitored is monitor
