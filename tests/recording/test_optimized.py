"""`ptee.optimize`: the same rows leave at the same exits, and all that can be set can be set."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import slow
from device import here, seeded
from forked import in_a_child
from rerun import stand_in
from small import SIZE, K, blended, chained, made
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import ptee
from ptee._common.errors import PteeError
from ptee.analysis.arithmetic import tolerance
from ptee.model.forward import ExitOutput
from ptee.recording import optimized
from ptee.recording.buckets import sizes_up_to
from ptee.recording.check import check_size
from ptee.recording.graphs import Rerun

NEVER = 2.0
MODES = ["eager", pytest.param("graphs", marks=pytest.mark.cuda)]
AS_ON_GPU = pytest.param("as on a GPU", marks=pytest.mark.cpu("a GPU has graphs"))
HOOKS = "through hooks"


@pytest.fixture(params=[*MODES, AS_ON_GPU, HOOKS])
def mode(request, monkeypatch) -> str:
    """A mode of `optimize`, or a way there is no mode for.

    "as on a GPU": each size is checked when it is recorded, and so on. `HOOKS`: torch.export captures nothing, with a stand-in for
    graphs where there is no GPU.
    """
    if request.param == "as on a GPU":
        monkeypatch.setattr(optimized.OptimizedModel, "_on_gpu", True)
        return "eager"
    if request.param != HOOKS:
        return request.param

    def refuse(*args: object, **how: object) -> None:
        raise PteeError("It cannot be captured.")

    monkeypatch.setattr(optimized, "segments", refuse)
    if here().type == "cuda":
        return "graphs"
    stand_in(monkeypatch)
    return "eager"


@pytest.fixture
def x() -> Tensor:
    return 3 * torch.randn(40, *SIZE, generator=seeded(1))


def require_same(fast: object, model: ptee.EarlyExitModel, x: Tensor, threshold: object = None) -> None:
    got, want = fast.predict(x, threshold), model.predict(x, threshold)
    require_near(got, want)
    assert [t.dtype for t in got] == [t.dtype for t in want]


def require_near(got: ExitOutput, want: ExitOutput) -> None:
    near = tolerance(want.logits.dtype, want.logits.device)  # a GPU takes other algorithms for other numbers of rows
    assert torch.equal(got.exit_index, want.exit_index)
    torch.testing.assert_close(got.logits, want.logits, rtol=near, atol=near)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=near, atol=near)
    torch.testing.assert_close(got.cost, want.cost)


def spread(model: ptee.EarlyExitModel, x: Tensor) -> list[float]:
    """Thresholds between the confidences of two rows, so that some leave at each exit."""
    h = model.blended(model.all_exits(x)).confidence[:-1].sort(dim=1).values
    k = round(0.6 * len(x))
    return ((h[:, k - 1] + h[:, k]) / 2).tolist()


@pytest.mark.parametrize(
    ("model", "confidence"),
    [
        *((made, name) for name in ("learned", "max_prob", "patience")),
        *(slow(made, name) for name in ("entropy", "margin")),
        (chained, "learned"),  # whose heads read earlier ones
        slow(chained, "patience"),
    ],
)
def test_the_same_rows_leave_at_the_same_exits_in_any_batch(model, confidence, mode, x):
    early = model()
    early.confidence = confidence
    fast = ptee.optimize(early, max_batch=16, mode=mode)
    x = x if model is made else 3 * torch.randn(40, *early.plan.input_size, generator=seeded(1))
    limits = [0.3, 0.5, 0.6][: len(early.exits)] if confidence == "patience" else spread(early, x)
    for b in (1, 2, 7, 16, 40):
        require_same(fast, early, x[:b], limits)


def test_the_threshold_is_live_for_all_for_each_exit_for_a_call_and_for_each_row(mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    for value in (0.0, NEVER, spread(early, x), 0.5):
        fast.threshold = value
        assert early.threshold == fast.threshold
        require_same(fast, early, x)
    rows = torch.where(torch.rand(40, 2, generator=seeded(2)) < 0.5, 0.0, NEVER)
    require_same(fast, early, x, rows)
    require_same(fast, early, x, rows[:, :1])
    require_same(fast, early, x)


def test_exits_can_be_switched_off_and_on_and_the_confidence_changed(mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    fast.off = [0]
    assert set(fast.predict(x, 0.0).exit_index.tolist()) == {1}
    require_same(fast, early, x, spread(early, x))
    early.off = []
    fast.confidence = "max_prob"
    assert early.confidence == "max_prob"
    require_same(fast, early, x, spread(early, x))
    with pytest.raises(PteeError, match="bogus"):
        fast.answers = "bogus"


@pytest.mark.parametrize("mode", [*MODES, HOOKS], indirect=True)
@pytest.mark.parametrize("off", [[1], slow([0, 1])], ids=str)
def test_nobody_leaves_at_an_exit_that_is_off_though_its_head_runs_for_a_later_one(off, mode):
    early = chained()
    x = 3 * torch.randn(20, *early.plan.input_size, generator=seeded(1))
    fast = ptee.optimize(early, mode=mode)
    early.off = off
    assert not set(fast.predict(x, 0.0).exit_index.tolist()) & set(off)
    require_same(fast, early, x, spread(early, x))


@pytest.mark.parametrize("to_the_end", [True, False])
def test_blended_answers_are_those_of_the_model(to_the_end, mode, x):
    early = blended(to_the_end=to_the_end)
    fast = ptee.optimize(early, mode=mode)
    for limits in (spread(early, x), [NEVER, NEVER], [spread(early, x)[0], NEVER]):
        require_same(fast, early, x, limits)


def test_a_broken_image_changes_no_other_answer(mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    limits = spread(early, x)
    want = fast.predict(x, limits)
    x[3] = torch.nan
    got, others = fast.predict(x, limits), torch.arange(len(x)) != 3
    assert got.exit_index[3] == len(early.exits)
    assert got.logits[3].isnan().all()
    again = fast.predict(x.nan_to_num(), limits)
    for answer in (got, again):
        assert torch.equal(answer.exit_index[others], want.exit_index[others])
        near = tolerance(x.dtype, x.device)
        torch.testing.assert_close(answer.logits[others], want.logits[others], rtol=near, atol=near)


def test_answers_are_kept_when_the_next_batch_comes(mode, x):
    fast = ptee.optimize(made(), mode=mode)
    first = fast.predict(x)
    kept = [part.clone() for part in first]
    fast.predict(x.flip(0))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_threads_wait_for_one_another(mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    limits = spread(early, x)
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        torch.set_default_device(here())
        for _ in range(5):
            found[i] = fast.predict(x[i : i + 8 + i], limits).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    near = tolerance(x.dtype, x.device)
    for i in range(4):
        torch.testing.assert_close(found[i], early.predict(x[i : i + 8 + i], limits).logits, rtol=near, atol=near)


@pytest.mark.cpu("a child that was forked cannot use a GPU")
def test_a_process_forked_while_another_thread_predicts_can_predict(x, monkeypatch):
    early = made()
    fast = ptee.optimize(early, mode="eager")
    want, inside, done = early.predict(x).logits, threading.Event(), threading.Event()
    within = fast._up_to_date

    def slowly(*args):
        inside.set()
        done.wait(60)
        return within(*args)

    with monkeypatch.context() as patched:
        patched.setattr(fast, "_up_to_date", slowly)
        thread = threading.Thread(target=fast.predict, args=(x,))
        thread.start()
        assert inside.wait(60)
    try:
        assert in_a_child(lambda: torch.allclose(fast.predict(x).logits, want, atol=1e-5))
    finally:
        done.set()
        thread.join()


def test_an_empty_batch_has_no_answers(mode):
    assert ptee.optimize(made(), mode=mode).predict(torch.zeros(0, *SIZE)).logits.shape == (0, K)


@pytest.mark.parametrize(
    ("images", "match"),
    [
        (torch.zeros(2, 3, 9, 9, device="cpu"), r"were made for this size"),
        (torch.zeros(2, *SIZE, dtype=torch.float64, device="cpu"), r"were made for this type|float64"),
        (torch.zeros(2, 5, 8, 8, device="cpu"), r"5 channels|channels"),
        (torch.zeros(3, 8, 8, device="cpu"), r"."),
    ],
    ids=["another size", "another type", "other channels", "no batch"],
)
def test_other_images_are_refused(images, match):
    fast = ptee.optimize(made(), mode="eager")
    with pytest.raises(PteeError, match=match):
        fast.predict(images.to(here()))


def test_a_detached_model_is_refused(x):
    early = made()
    fast = ptee.optimize(early, mode="eager")
    early.detach()
    with pytest.raises(PteeError, match=r"was detached"):
        fast.predict(x)


def test_a_copy_gets_another_number_type_and_the_model_keeps_its_own(x):
    early = made()
    fast = ptee.optimize(early, mode="eager", dtype=torch.float64)
    assert fast.predict(x.double(), NEVER).logits.dtype == torch.float64
    assert early.predict(x, NEVER).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("wish", "match"),
    [
        ({"mode": "fast"}, r"fast"),
        ({"max_batch": 0}, r"max_batch=0"),
        ({"max_batch": 10**6}, r"max_batch=1000000"),
        ({"max_batch": True}, r"max_batch=True"),
    ],
    ids=str,
)
def test_a_wish_that_is_not_possible_is_refused_by_name(wish, match):
    with pytest.raises(PteeError, match=match):
        ptee.optimize(made(), **wish)


@pytest.mark.cpu("there is a GPU")
def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(PteeError, match=r"CUDA graphs need an NVIDIA GPU, and this model is on cpu"):
        ptee.optimize(made(), mode="graphs")


def test_nothing_is_left_of_an_optimized_model_that_is_gone(mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    fast.predict(x)
    gone = weakref.ref(fast._buckets)
    del fast
    gc.collect()
    assert gone() is None
    require_same(ptee.optimize(early, mode=mode), early, x)


@pytest.mark.parametrize("most", [1, 2, 3, 31, 32, 100, 256, 1000, 4096])
def test_buckets_leave_less_than_a_third_of_their_places_empty(most):
    sizes = sizes_up_to(most)
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    assert all(b <= 4 or b <= 1.5 * (a + 1) for a, b in pairwise(sizes))


def in_place(early: ptee.EarlyExitModel) -> None:
    with torch.no_grad():
        for p in early.parameters():
            p.mul_(-1.5)


def another_parameter(early: ptee.EarlyExitModel) -> None:
    early.backbone[-1].weight = nn.Parameter(torch.randn(K, 6), requires_grad=False)


def another_module(early: ptee.EarlyExitModel) -> None:
    early.backbone[-1] = nn.Linear(6, K).eval()


def other_data(early: ptee.EarlyExitModel) -> None:
    vector_to_parameters(-1.5 * parameters_to_vector(early.heads.parameters()), early.heads.parameters())


@pytest.mark.parametrize("change", [in_place, another_module, *map(slow, (another_parameter, other_data))])
def test_weights_that_changed_answer_as_they_are_now(change, mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    for recorded in (False, True):  # by then
        change(early)
        for limits in (NEVER, spread(early, x)):
            require_same(fast, early, x, limits)
        assert len(fast._buckets._buckets) > recorded


def test_weights_are_looked_at_while_the_first_piece_runs(mode, x, monkeypatch):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    fast.predict(x)
    order: list[str] = []
    first = fast._buckets.bucket_for(40).replay
    first[0] = noting(order, "piece", first[0])
    monkeypatch.setattr(fast._made_of, "unchanged", noting(order, "look", fast._made_of.unchanged))
    require_same(fast, early, x)
    assert order == ["piece", "look"]


def noting(order: list[str], name: str, work: Callable[[], object]) -> Callable[[], object]:
    """The work, which notes when it begins."""

    def noted() -> object:
        order.append(name)
        return work()

    return noted


def test_the_memory_of_old_weights_is_kept_until_they_are_seen_to_have_changed(x):
    early = made()
    fast = ptee.optimize(early, mode="eager")
    weight = early.backbone[-1].weight
    old = weight.data_ptr()
    weight.data = torch.randn(K, 6, device=x.device)
    assert old in [t.data_ptr() for t in fast._made_of._memory]
    require_same(fast, early, x)
    assert old not in [t.data_ptr() for t in fast._made_of._memory]


class Stuck(Rerun):
    """A recorder of which one recording repeats nothing."""

    def __init__(self, which: int) -> None:
        self.left = which

    def record(self, work: Callable[[], object]) -> tuple[object, Callable[[], None]]:
        made, again = super().record(work)
        self.left -= 1
        return made, again if self.left else lambda: None


def stuck_at(which: int) -> optimized.OptimizedModel:
    """An optimized model whose recordings are checked, and one of which repeats nothing."""
    fast = ptee.optimize(made(), mode="eager")
    fast._buckets._recorder, fast._buckets.check = Stuck(which), check_size
    return fast


def test_a_recording_that_answers_otherwise_than_the_model_is_refused(x):
    fast = stuck_at(3)  # the last piece of the first size
    for _ in range(2):
        with pytest.raises(PteeError, match=r"Recorded for batches of 40, .* other answers than as it is"):
            fast.predict(x, NEVER)
    assert fast._buckets._recorder.left == 0, "it is not recorded again"
    require_same(fast, fast.model, x[:7])


def test_rows_go_on_in_the_larger_size_where_a_smaller_one_answers_otherwise(x):
    fast = stuck_at(6)  # the last piece of the second size
    for _ in range(2):
        require_same(fast, fast.model, x, spread(fast.model, x))
    assert len(fast._buckets._refused) == 1


class Failing(Rerun):
    """Fails from one recording on, so many times."""

    def __init__(self, first: int, times: int, why: type[Exception]) -> None:
        self.first, self.left, self.why, self.recordings = first, times, why, 0

    def record(self, work: Callable[[], object]) -> tuple[object, Callable[[], None]]:
        self.recordings += 1
        if self.recordings >= self.first and self.left:
            self.left -= 1
            raise self.why("CUDA error")
        return super().record(work)


def test_rows_go_on_in_the_larger_size_where_the_gpu_is_too_full_for_a_smaller_one(x):
    fast = ptee.optimize(made(), mode="eager")
    fast._buckets._recorder = Failing(4, 99, torch.OutOfMemoryError)  # of the second size on
    require_same(fast, fast.model, x, spread(fast.model, x))
    tried = fast._buckets._recorder.left
    require_same(fast, fast.model, x, spread(fast.model, x))
    assert len(fast._buckets._buckets) == 1
    assert fast._buckets._recorder.left == tried < 99, "no batch moves to that size again"
    fast._buckets._recorder.left = 0
    require_same(fast, fast.model, x[:7])


@pytest.mark.parametrize(("times", "works"), [(1, True), (2, False)])
def test_a_recording_that_something_else_on_the_gpu_broke_is_tried_once_more(x, times, works):
    fast = ptee.optimize(made(), mode="eager")
    fast._buckets._recorder = Failing(1, times, torch.AcceleratorError)
    if works:
        require_same(fast, fast.model, x)
        return
    with pytest.raises(PteeError, match=r"^Batches of 40 cannot be recorded .*CUDA error\.$"):
        fast.predict(x)


class Gated(nn.Module):
    """Hands a gate on past the exit that is expanded: many places in it are one number in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.more = nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = x.mean((2, 3), keepdim=True).sigmoid().expand_as(x)
        return self.c(self.more(self.b(x) * gate).mean((2, 3)))


class WithToken(nn.Module):
    """Hands a weight on past the exit, once for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1, -1)
        return self.c((self.b(self.a(x)) * token.sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("network", [Gated, WithToken])
def test_expanded_tensors_move_with_their_rows(network, mode, x):
    torch.manual_seed(0)
    early = ptee.augment(network().eval(), exits=["a"], head="pool", input_size=SIZE).to(here())
    fast = ptee.optimize(early, mode=mode)
    require_same(fast, early, x, spread(early, x))
    require_same(fast, early, x[:1])
    recorded = fast._buckets
    require_same(fast, early, x[:2], spread(early, x[:2]))
    require_same(fast, early, x[:1])
    assert recorded is fast._buckets and len(recorded._buckets) > 2, "nothing was written into a weight"


def test_without_triton_a_gpu_is_refused_in_one_line(monkeypatch):
    early, gpu = made(), SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(optimized, "find_spec", lambda name: None)
    monkeypatch.setattr(optimized, "one_parameter", lambda module: gpu)
    with pytest.raises(PteeError, match="needs Triton: pip install triton"):
        ptee.optimize(early)


def test_a_model_in_training_mode_is_refused(x):
    with pytest.raises(PteeError, match="eval mode"):
        ptee.optimize(made().train())
    fast = ptee.optimize(made(), mode="eager")
    for _ in range(2):  # before its size is recorded, and after
        fast.model.heads[0].train()
        with pytest.raises(PteeError, match="eval mode"):
            fast.predict(x)
        fast.model.eval()
        require_same(fast, fast.model, x)


def test_an_answer_holds_no_more_than_its_rows(x):
    out = ptee.optimize(made(), mode="eager").predict(x[:1])
    assert [t.untyped_storage().nbytes() for t in out] == [t.numel() * t.element_size() for t in out]


def test_threads_optimize_one_after_another_while_others_predict(x):
    models, serving, limits = [made() for _ in range(3)], made(), [0.4, 0.6]
    want, failed, done = serving.predict(x, limits), [], threading.Event()

    def optimize(model: ptee.EarlyExitModel) -> None:
        torch.set_default_device(here())
        require_same(ptee.optimize(model, mode="eager"), model, x, limits)

    def serve() -> None:
        while not done.is_set():
            require_near(serving.predict(x, limits), want)  # the arithmetic is exact meanwhile, so the last bits differ

    def watched(work: Callable[..., None], *args: object) -> None:
        try:
            work(*args)
        except BaseException as why:
            failed.append(why)

    server = threading.Thread(target=watched, args=(serve,))
    threads = [threading.Thread(target=watched, args=(optimize, model)) for model in models]
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    server.join()
    assert not failed


def test_sizes_that_no_batch_has_are_refused():
    fast = ptee.optimize(made(), mode="eager")
    for sizes in (0, 257, -1, 2.5, "a", [True]):
        with pytest.raises(PteeError, match="Batches have 1 to 256 images"):
            fast.warm_up(sizes)


def test_recorded_in_one_mode_it_answers_in_another(mode, x):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    limits = spread(early, x)
    with torch.inference_mode(), torch.autocast(x.device.type, torch.bfloat16):
        first = fast.predict(x, limits)
    assert torch.equal(first.exit_index, early.predict(x, limits).exit_index)
    require_same(fast, early, x, limits)
    require_same(fast, early, x[:5], limits)


def test_a_call_that_is_interrupted_leaves_the_next_one_as_it_should_be(mode, x, monkeypatch):
    early = made()
    fast = ptee.optimize(early, mode=mode)
    limits = spread(early, x)
    bucket = fast._buckets.bucket_for(40)
    replay = bucket.replay[1]

    def interrupt() -> None:
        raise KeyboardInterrupt

    bucket.replay[1] = interrupt
    with pytest.raises(KeyboardInterrupt):
        fast.predict(x, NEVER)
    bucket.replay[1] = replay
    require_same(fast, early, x, limits)
    require_same(fast, early, x[:7], limits)


@pytest.mark.parametrize("act", [lambda m: m.double(), copy.deepcopy, pickle.dumps], ids=["moved", "copied", "pickled"])
def test_what_would_tear_it_from_its_recordings_is_refused(act):
    with pytest.raises(PteeError, match="optimized model cannot be"):
        act(ptee.optimize(made(), mode="eager"))


def test_a_model_that_was_moved_is_refused(x):
    early = made()
    fast = ptee.optimize(early, mode="eager")
    early.double()
    with pytest.raises(PteeError, match=r"moved after ptee\.optimize"):
        fast.predict(x)


@pytest.mark.slow
def test_compiled_pieces_answer_as_the_model(x):
    early = made()
    require_same(ptee.optimize(early, max_batch=16, mode="compile"), early, x, spread(early, x))


WITHOUT_COMPILER = """
import sys, torch, ptee
from torch import nn
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
model = ptee.augment(net, exits=["1"], head="pool", input_size=(3, 8, 8))
for _ in range(2):
    try:
        ptee.optimize(model, mode="compile").predict(torch.randn(2, 3, 8, 8))
    except ptee.PteeError as why:
        print(why)
"""


@pytest.mark.slow
@pytest.mark.cpu("the compiler of C++ is for the CPU")
def test_without_a_compiler_it_is_said_what_to_install_or_which_mode_to_take(tmp_path):
    none = {"CXX": "/nonexistent", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    words = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(words, env=os.environ | none, capture_output=True, text=True, timeout=300)
    one, again = done.stdout.splitlines()
    assert one == again
    assert "C++ compiler" in one
    assert one.endswith("Install that, or give mode='eager'.")


def test_sizes_of_batches_may_be_numpy_s_whole_numbers():
    fast = ptee.optimize(made(), max_batch=np.int64(4), mode="eager")
    assert type(fast.max_batch) is int
    fast.warm_up(np.array([1, 4]))


def test_a_setting_that_is_mistyped_is_refused_as_of_the_model_itself():
    fast = ptee.optimize(made(), max_batch=1)
    with pytest.raises(PteeError, match=r"has no treshold\. Did you mean model\.threshold\?"):
        fast.treshold = 0.7


def test_a_batch_in_parts_is_answered_by_one_choice_of_settings(x):
    early = made()
    fast = ptee.optimize(early, max_batch=4, mode="eager")
    early.choose([NEVER, 0.0], [], None)
    parts = []

    def chosen_meanwhile(*args):
        if not parts:
            early.choose([0.0, NEVER], [1], None)
        parts.append(args)
        return up_to_date(*args)

    up_to_date = fast._up_to_date
    fast._up_to_date = chosen_meanwhile
    assert set(fast.predict(x[:6]).exit_index.tolist()) == {0}
    assert len(parts) == 4, "two parts, and both again"


@pytest.mark.parametrize("name", ["mode", "max_batch"])
def test_what_it_was_made_with_cannot_be_set(name):
    fast = ptee.optimize(made(), max_batch=1)
    with pytest.raises(
        PteeError, match=rf"{name} is what ptee\.optimize was called with\. .*optimize\(fast\.model, {name}=4\)"
    ):
        setattr(fast, name, 4)
