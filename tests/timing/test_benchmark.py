from __future__ import annotations

import functools
import json

import pytest
import torch
from device import here
from small import SIZE, made
from torch import Tensor, nn

import ptee
from ptee._common.errors import PteeError
from ptee.timing import benchmark
from ptee.timing.benchmark import Bench, Case, bench


@pytest.mark.parametrize("batch", [2, 5])
def test_the_counted_cost_is_the_mean_of_the_models_costs(batch):
    model = made()
    first, _, last = model.costs
    half = batch // 2
    some = (half * first + (batch - half) * last) / batch
    assert [case.counted for case in bench(model, [batch], rounds=3).cases] == pytest.approx([last, some, first])


def test_every_batch_size_has_every_case_but_half_of_one_image_cannot_leave():
    found = bench(made(), [1, 4], rounds=3)
    assert [(case.batch, case.leaving) for case in found.cases] == [
        (1, "nobody"), (1, "all at exit 0"), (4, "nobody"), (4, "half at exit 0"), (4, "all at exit 0"),
    ]  # fmt: skip
    for case in found.cases:
        assert case.time > 0
        assert (case.limit is None) == (case.saved is None) == (case.leaving == "nobody")
    assert (found.device, found.exits, found.threads) == (here().type, 2, 1)


def test_the_images_leave_where_the_case_says(monkeypatch):
    seen: dict[str, list[int]] = {}
    model = made()

    def calls_once(calls, device, **_):
        rows: list[int] = []
        handles = [
            part.register_forward_pre_hook(lambda _m, x: rows.append(len(x[0]))) for part in model.backbone.children()
        ]
        for name, call in calls.items():
            rows.clear()
            call()
            seen[name] = list(rows)
        for handle in handles:
            handle.remove()
        return {name: [1 / (i + 1)] for i, name in enumerate(calls)}

    monkeypatch.setattr(benchmark, "in_turns", calls_once)
    bench(model, [4])
    assert seen == {
        "bare": [4] * 6, "bare, half": [2] * 6, "to exit 0": [4], "to exit 0, half": [2],
        "nobody": [4] * 6, "half at exit 0": [4] + [2] * 5, "all at exit 0": [4],
    }  # fmt: skip


def test_time_limit_and_saving_are_ratios_to_the_bare_backbone(monkeypatch):
    times = {
        "bare": 10.0, "bare, half": 6.0, "to exit 0": 4.0, "to exit 0, half": 3.0,
        "nobody": 11.0, "half at exit 0": 7.6, "all at exit 0": 5.5,
    }  # fmt: skip
    monkeypatch.setattr(benchmark, "in_turns", lambda calls, *_, **__: {name: [times[name]] * 3 for name in calls})
    nobody, half, everybody = bench(made(), [4]).cases
    assert (nobody.time, nobody.limit, nobody.saved) == (1.1, None, None)
    assert half.time == pytest.approx(0.76)
    assert half.limit == pytest.approx(0.7)  # all images to exit 0: 4; the other half from there: 6 - 3
    assert half.saved == pytest.approx(0.24 / 0.3)
    assert (everybody.time, everybody.limit) == (0.55, 0.4)
    assert everybody.saved == pytest.approx(0.45 / 0.6)


def test_timing_leaves_the_model_and_its_hooks_as_they_were():
    model = made()
    before = [len(part._forward_hooks) for part in model.modules()]
    bench(model, [2], rounds=3)
    assert [len(part._forward_hooks) for part in model.modules()] == before
    assert model.threshold == [0.5, 0.5]


def test_a_backbone_that_catches_exceptions_is_timed_up_to_its_first_exit_as_well():
    class Careful(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self[0](x)
            except Exception:
                x = torch.zeros(len(x), 6, 6, 6)
            ran.append("the rest")
            return functools.reduce(lambda x, part: part(x), list(self)[1:], x)

    ran: list[str] = []
    model = ptee.augment(Careful(*made().detach()), exits=["0"], input_size=SIZE)
    ran.clear()
    benchmark._up_to_first_exit(model, torch.zeros(2, *SIZE))
    assert ran == []


@pytest.mark.parametrize("batch_sizes", [[0], [4, -1]], ids=str)
def test_a_batch_of_no_images_is_refused(batch_sizes):
    with pytest.raises(
        PteeError, match=r"A batch of .* images cannot be timed.*such as batch_sizes=\[1, 32\]\."
    ) as refused:
        bench(made(), batch_sizes)
    assert (refused.value.argument, refused.value.value) == ("batch_sizes", batch_sizes)


def test_the_table_has_a_line_for_each_case_and_the_legend_explains_its_columns():
    measured = Bench(
        "net", "cpu", 1, 2, (Case(4, "nobody", 1.1, 1.0, None, None), Case(4, "all at exit 0", 0.55, 0.5, 0.4, 0.75))
    )
    assert str(measured).splitlines() == [
        "net with 2 exits on cpu, 1 thread",
        "Times and costs are divided by the bare backbone's.",
        "",
        "batch  who leaves      time   cost  time over cost  best time  saving reached",
        "-----------------------------------------------------------------------------",
        "    4  nobody         1.100  1.000          +10.0%          -               -",
        "    4  all at exit 0  0.550  0.500          +10.0%      0.400           75.0%",
    ]
    for column in ("time", "cost", "time over cost", "best time", "saving reached"):
        assert f"\n{column}: " in f"\n{measured.legend}"
    assert json.loads(json.dumps(measured.to_dict()))["cases"][1]["leaving"] == "all at exit 0"
