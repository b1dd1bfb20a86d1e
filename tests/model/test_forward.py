from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ptee
from ptee._common.errors import PteeError
from ptee.exits.confidence import CONFIDENCES
from ptee.model.forward import ExitEarly, ExitHook, RecordAll, StopForward, running

b, C, K = 5, 2, 3
NEVER, ALWAYS = 2.0, 0.0
COSTS = (0.25, 0.5, 1.125)


class Says(nn.Module):
    """A head that gives each row's number as its first logit, and a confidence logit read off the feature map."""

    def __init__(self, exit_index: int) -> None:
        super().__init__()
        self.exit_index = exit_index
        self.confidence = nn.Linear(1, 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.zeros(len(z), K)
        logits[:, 0], logits[:, 1] = z[:, 0], self.exit_index
        return logits, z[:, 1]


class Whole:
    """A cut whose output is one tensor (b, C)."""

    steps = ()

    overwritten = False
    shape: tuple[int, ...] = (C,)

    def feature_map(self, output: Tensor) -> Tensor:
        return output

    def select(self, output: Tensor, rows: Tensor) -> Tensor:
        return output.index_select(0, rows)


def rows(*sureness: float) -> Tensor:
    """(b, C): the row's number, and a logit."""
    return torch.stack([torch.arange(len(sureness), dtype=torch.float32), torch.tensor(sureness)], 1)


def call_of(kind: type = ExitEarly, *threshold: float | Tensor, batch: int = b):
    plan = SimpleNamespace(
        exits=[SimpleNamespace(name="one"), SimpleNamespace(name="two")],
        costs=COSTS,
        cuts=[Whole()] * 2,
        off=(),
        skipped=(),
    )
    hooks = [ExitHook(), ExitHook()]
    more = [CONFIDENCES["learned"], threshold] if kind is ExitEarly else []
    return kind(hooks, [Says(0), Says(1)], plan, batch, *more)


def run(call, x: Tensor) -> Tensor:
    """What a backbone of two modules does, each of which gives what it was given."""
    with running(call):
        for hook in call.hooks:
            out = hook(nn.Identity(), (x,), x)
            x = x if out is None else out
    return torch.cat([x[:, :1], torch.full((len(x), 2), 2.0)], 1)


def test_rows_leave_at_the_first_sure_exit_and_come_back_in_order():
    call = call_of(ExitEarly, 0.9, 0.5)
    answer = run(call, rows(-1.0, 9.0, 1.0, 9.0, -1.0))
    assert answer[:, 0].tolist() == [0, 4]
    out = call.result(answer)
    assert out.exit_index.tolist() == [2, 0, 1, 0, 2]
    assert out.logits[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert out.logits[:, 1].tolist() == [2, 0, 1, 0, 2]
    assert out.cost.tolist() == [1.125, 0.25, 0.5, 0.25, 1.125]
    torch.testing.assert_close(
        out.confidence, torch.tensor([1, 9.0, 1.0, 9.0, 1]).sigmoid().where(out.exit_index < 2, torch.tensor(1.0))
    )


def test_thresholds_of_single_rows_go_along_with_the_rows_that_stay():
    call = call_of(ExitEarly, torch.tensor([0.0, 2, 2, 2, 0]), torch.tensor([2.0, 0, 2, 0, 2]))
    out = call.result(run(call, rows(1, 1, 1, 1, 1)))
    assert out.exit_index.tolist() == [0, 1, 2, 1, 0]


@pytest.mark.parametrize("logit", [float("nan"), float("inf"), float("-inf")])
def test_a_row_with_a_logit_that_is_no_number_stays(logit):
    call = call_of(ExitEarly, ALWAYS, ALWAYS)
    out = call.result(run(call, rows(0, logit, 0, 0, 0)))
    assert out.exit_index.tolist() == [0, 2, 0, 0, 0]


def test_where_everybody_stays_the_output_is_not_copied():
    call, x = call_of(ExitEarly, NEVER, NEVER, batch=3), rows(1, 1, 1)
    with running(call):
        assert all(hook(nn.Identity(), (x,), x) is None for hook in call.hooks)


def test_where_everybody_has_left_the_pass_ends_with_a_signal():
    call = call_of(ExitEarly, ALWAYS, NEVER, batch=2)
    with pytest.raises(StopForward), running(call):
        call.hooks[0](nn.Identity(), (), rows(1, 1))
    assert call.result(None).exit_index.tolist() == [0, 0]


def test_the_signal_is_none_of_the_exceptions_that_a_backbone_catches():
    assert not issubclass(StopForward, Exception)


def test_a_hook_does_nothing_outside_of_a_call_and_nothing_in_another_models_call():
    call, x = call_of(ExitEarly, ALWAYS, ALWAYS, batch=2), rows(1, 1)
    assert call.hooks[0](nn.Identity(), (), x) is None
    with running(call):
        assert ExitHook()(nn.Identity(), (), x) is None
    assert call.passed == 0


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, StopForward], ids=lambda e: e.__name__)
def test_a_call_ends_however_its_pass_ends(error):
    call, x = call_of(ExitEarly, ALWAYS, ALWAYS, batch=2), rows(1, 1)
    with suppress(error), running(call):
        raise error(call)
    assert call.hooks[0](nn.Identity(), (), x) is None


def test_calls_nest_and_the_outer_one_goes_on():
    outer, inner, x = call_of(RecordAll), call_of(RecordAll), rows(1, 1)
    with running(outer):
        outer.hooks[0](nn.Identity(), (), x)
        with running(inner):
            outer.hooks[1](nn.Identity(), (), x)
            inner.hooks[0](nn.Identity(), (), x)
        outer.hooks[1](nn.Identity(), (), x)
    assert (outer.passed, inner.passed) == (2, 1)


def test_exits_reached_out_of_order_are_refused():
    call = call_of(RecordAll)
    with pytest.raises(PteeError, match=r"Exit 1 \(two\).*exit 0"), running(call):
        call.hooks[1](nn.Identity(), (), rows(1, 1))


def test_an_exit_that_was_not_passed_is_named():
    call = call_of(RecordAll)
    with running(call):
        call.hooks[0](nn.Identity(), (), rows(1, 1))
    with pytest.raises(PteeError, match=r"exit 1 \(two\)"):
        call.check_all_passed()


class Fails(nn.Module):
    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("planned", "error", "said"),
    [
        (
            (C + 1,),
            PteeError,
            r"Exit 0 \(one\) was planned.*\(3,\).*\(2,\).*mat1.*Plan the exits again with their input_size",
        ),
        ((C,), RuntimeError, "^mat1 and mat2 shapes cannot be multiplied$"),
    ],
    ids=["a feature map of another size", "any other failure"],
)
def test_a_head_that_fails_is_explained_where_the_size_is_another(planned, error, said):
    call = call_of(ExitEarly, ALWAYS, ALWAYS)
    call.plan.cuts[0].shape, call.plan.input_size, call.heads[0] = planned, (3, 8, 8), Fails()
    with pytest.raises(error, match=said), running(call):
        call.hooks[0](nn.Identity(), (), rows(1, 1))


def test_the_logits_have_the_type_that_was_asked_for_even_where_the_backbone_gave_none():
    call = call_of(ExitEarly, ALWAYS, ALWAYS, batch=2)
    with suppress(StopForward):
        run(call, rows(1, 1))
    assert call.result(None, torch.float64).logits.dtype == torch.float64


class HostSyncs(TorchDispatchMode):
    """Notes the operators that hand values to Python, which on a GPU means waiting for it."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if by_mask or any(word in name for word in self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def two_exits() -> ptee.EarlyExitModel:
    stages = (nn.Conv2d(3, C, 3), nn.ReLU(), nn.Conv2d(C, C, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return ptee.augment(nn.Sequential(*stages, nn.Linear(C, K)), exits=["0", "2"], input_size=(3, 8, 8))


@pytest.mark.parametrize(("threshold", "at_most"), [(ALWAYS, 1), (NEVER, 2), ([0.9, 0.5], 2)], ids=str)
def test_each_exit_waits_for_the_device_once(threshold, at_most):
    model = two_exits()
    model.threshold = threshold
    with torch.no_grad(), HostSyncs() as syncs:
        model(torch.randn(b, 3, 8, 8))
    assert len(syncs.seen) <= at_most, syncs.seen


def test_thresholds_of_single_rows_wait_once_more_to_look_for_nan():
    model = two_exits()
    with torch.no_grad(), HostSyncs() as syncs:
        model.predict(torch.randn(b, 3, 8, 8), torch.tensor([[0.9, 0.5]] * b))
    assert len(syncs.seen) <= 3, syncs.seen


def test_the_head_runs_outside_of_the_call():
    class Nosy(Says):
        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            inside.append(call.hooks[0](nn.Identity(), (), z))
            return super().forward(z)

    call, inside = call_of(RecordAll), []
    call.heads[0] = Nosy(0)
    with running(call):
        call.hooks[0](nn.Identity(), (), rows(1, 1))
    assert (inside, call.passed) == ([None], 1)
