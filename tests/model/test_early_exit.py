"""An early-exit model: what it answers, what it does to its backbone, and in which modes and types it works."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from device import here, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from small import made
from tiny import as_it_was
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from torch.utils.hooks import RemovableHandle

import ptee
from ptee._common.errors import CutError, PteeError, UnknownName
from ptee.backbones.weights import weights_hash
from ptee.model.early_exit import EarlyExitModel
from ptee.model.production import SLIPS
from ptee.tuning.traces import record

E, b, K = 3, 6, 5
SIZE = (3, 16, 16)
NEVER, ALWAYS = 2.0, 0.0
CLEAR = 1e-4  # how far thresholds stay from every confidence: batches of other sizes round differently


class Net(nn.Module):
    """A user's network: batch norm, dropout, an operation in place behind `body`, a stage that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.pair = Pair()
        self.last = nn.Conv2d(8, 8, 3, 1, 1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        x.relu_().mul_(2)
        left, [right] = self.pair(x)
        return self.fc(self.dropout(self.last(left + right).mean((2, 3))))


class Pair(nn.Module):
    """Gives (tensor, [tensor])."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.left(x), [self.right(x)]


def moved(model: EarlyExitModel) -> EarlyExitModel:
    """The model with its heads moved off their initial values, so that confidences differ between rows."""
    generator = seeded(1)
    with torch.no_grad():
        for p in model.heads.parameters():
            p += torch.randn(p.shape, generator=generator).to(p)
    return model


def make(net: nn.Module | None = None, exits: tuple[str, ...] = ("stem", "body", "pair"), head: str = "pool"):
    return moved(ptee.augment(net or Net(), exits=list(exits), head=head, input_size=SIZE))


def images(rows: int = b) -> Tensor:
    """Rows of growing contrast, so that they differ after pooling."""
    noise = torch.randn(rows, *SIZE, generator=seeded(2))
    return noise * torch.linspace(0.3, 3, rows)[:, None, None, None]


@functools.cache
def shared(head: str = "pool") -> EarlyExitModel:
    """A model for tests that leave it as it is."""
    torch.manual_seed(0)
    return make(head=head)


def sending(wanted: list[int]) -> Tensor:
    """Thresholds (b, E) with which row i leaves at exit wanted[i]."""
    wall = torch.full((len(wanted), E), NEVER)
    for row, n in enumerate(wanted):
        wall[row, n : n + 1] = ALWAYS
    return wall


def assert_works(model: EarlyExitModel, x: Tensor, bare: nn.Module) -> None:
    """Never leaving, it is the backbone bit for bit; leaving, each row gets its own exit's answer."""
    assert torch.equal(model.predict(x, NEVER).logits, bare(x))
    wanted = [row % (E + 1) for row in range(len(x))]
    out, every = model.predict(x, sending(wanted)), model.all_exits(x)
    assert out.exit_index.tolist() == wanted
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.logits, every.logits[wanted, range(len(x))], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- what predict answers


@functools.cache
def recorded() -> tuple[Tensor, Tensor]:
    """(E+1, b, K) logits and (E+1, b) confidences of the shared model."""
    with torch.no_grad():
        every = shared().all_exits(images())
    return every.logits, every.confidence


def walls(n: int) -> list[float]:
    """Thresholds between the confidences of exit n, the first for everybody to leave, the last for nobody."""
    ranked = recorded()[1][n].double().sort(descending=True).values.tolist()
    middles = [(one + two) / 2 for one, two in pairwise(ranked) if one - two > 2 * CLEAR]
    return [ALWAYS, *middles, 1 + 1e-9, math.inf]


def by_rule(threshold: list[list[float]]) -> list[int]:
    """The first n with h_n >= T_n, row by row."""
    h = recorded()[1]
    return [next((n for n in range(E) if h[n, row].item() >= threshold[row][n]), E) for row in range(b)]


def assert_answers(out: ptee.ExitOutput, left: list[int]) -> None:
    logits, h = recorded()
    costs = torch.tensor(shared().costs)
    assert out.exit_index.tolist() == left
    torch.testing.assert_close(out.logits, logits[left, range(b)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.confidence, h[left, range(b)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.cost, costs[left])


each_exit_one = st.tuples(*(st.deferred(lambda n=n: st.sampled_from(walls(n))) for n in range(E))).map(list)


@settings(deadline=None, max_examples=20)
@given(each_exit_one)
def test_a_batch_is_answered_row_by_row_and_as_its_traces_say(threshold):
    model, x = shared(), images()
    with torch.no_grad():
        together = model.predict(x, threshold)
        alone = [model.predict(row[None], threshold) for row in x]
    assert_answers(together, by_rule([threshold] * b))
    assert_answers(ptee.ExitOutput(*map(torch.cat, zip(*alone, strict=True))), together.exit_index.tolist())

    traces = record(model, TensorDataset(x), progress=False)
    leaving = traces.leaving(threshold)
    assert leaving.tolist() == together.exit_index.tolist()
    score = traces.score(leaving)
    assert score.cost == pytest.approx(together.cost.mean().item())
    assert score.fidelity == pytest.approx(
        (together.logits.argmax(1) == recorded()[0][-1].argmax(1)).double().mean().item()
    )


@settings(deadline=None, max_examples=20)
@given(st.lists(each_exit_one, min_size=b, max_size=b), st.randoms(use_true_random=False))
def test_each_row_may_have_thresholds_of_its_own_in_any_order(thresholds, shuffler):
    model, x = shared(), images()
    assert_answers(model.predict(x, thresholds), by_rule(thresholds))
    order = shuffler.sample(range(b), b)
    mixed = model.predict(x[order], torch.tensor(thresholds, dtype=torch.float64)[order])
    back = torch.tensor(order).argsort()
    assert_answers(ptee.ExitOutput(*(part[back] for part in mixed)), by_rule(thresholds))


@pytest.mark.parametrize("threshold", [1 + 1e-12, math.inf])
def test_above_one_not_even_a_row_of_confidence_1_leaves(threshold):
    model, x = make(), images()
    with torch.no_grad():
        for head in model.heads:
            head.confidence.bias += 100
    assert model.predict(x, 1).exit_index.tolist() == [0] * b
    out = model.predict(x, threshold)
    assert torch.equal(out.logits, copy.deepcopy(model.backbone)(x))
    assert out.exit_index.tolist() == [E] * b


def test_a_confidence_just_below_the_threshold_stays_however_the_threshold_is_given():
    model, x = shared(), images()
    above = recorded()[1][0, 0].item() + 1e-12  # float32 rounds it down onto the confidence
    threshold = [above, NEVER, NEVER]
    traced = record(model, TensorDataset(x), progress=False).leaving(threshold)
    assert traced[0] == model.predict(x, torch.tensor([threshold] * b, dtype=torch.float64)).exit_index[0] == E
    assert model.predict(x, threshold).exit_index[0] == E


def test_a_backbone_that_catches_exceptions_around_its_stages_still_stops():
    class Careful(Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.stem(x)
            except Exception:
                x = torch.zeros(len(x), 8, 8, 8)
            return self.fc(self.last(self.body(x)).mean((2, 3)))

    model = make(Careful(), ("stem", "last"))
    ran = []
    model.backbone.body.register_forward_hook(lambda *_: ran.append("body"))
    assert model.predict(images(), ALWAYS).exit_index.tolist() == [0] * b
    assert ran == []


@pytest.mark.parametrize(("threshold", "waits"), [(ALWAYS, 1), (NEVER, E), ([0.9, 0.5, 0.5], E)], ids=str)
def test_each_exit_waits_for_the_device_once(threshold, waits):
    model = copy.deepcopy(shared())
    model.threshold = threshold
    with torch.no_grad(), HostSyncs() as syncs:
        model(images())
    assert len(syncs.seen) <= waits, syncs.seen
    with torch.no_grad(), HostSyncs() as syncs:
        model.predict(images(), torch.tensor(model.threshold).expand(b, E))
    assert len(syncs.seen) <= waits + 1, "one more, to look for NaN"


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


def test_where_all_rows_stay_the_backbones_tensors_are_not_copied():
    model, outputs = make(), {}
    for name in ("stem", "body"):
        part = model.backbone.get_submodule(name)
        part.register_forward_hook(lambda _m, _x, out, name=name: outputs.update({name: out.data_ptr()}))
    model.backbone.body.register_forward_pre_hook(lambda _m, args: outputs.update(given=args[0].data_ptr()))
    model.predict(images(), NEVER)
    assert outputs["given"] == outputs["stem"]


# ---------------------------------------------------------------------------------------------------- the backbone

MODES = ["trainable, in training", "frozen, in eval mode", "mixed"]
each_mode = pytest.mark.parametrize("mode", MODES)


def in_mode(mode: str) -> Net:
    net = Net().requires_grad_(mode != MODES[1]).train(mode != MODES[1])
    if mode == "mixed":
        net.body.requires_grad_(False).eval()
        net.stem.register_forward_hook(lambda *_: None)
    return net


@each_mode
def test_detach_gives_the_backbone_back_as_it_was(mode):
    net = in_mode(mode)
    before = as_it_was(net)
    model = make(net)
    assert model.backbone is net
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(part.training for part in net.modules())
    model.predict(images(), ALWAYS)
    assert model.detach() is net
    assert as_it_was(net) == before


@pytest.mark.parametrize(
    "wish", [{"exits": ["stem", "nowhere"]}, {"exits": ["fc"], "head": "nothing"}, {"num_exits": 99}, {"exits": ["pair.left"]}],
    ids=["no such module", "no such head", "too many", "no cut"],
)  # fmt: skip
def test_a_refused_request_leaves_the_backbone_as_it_was(wish):
    net = in_mode("mixed")
    before = as_it_was(net)
    with pytest.raises((CutError, UnknownName)):
        ptee.augment(net, input_size=SIZE, **wish)
    assert as_it_was(net) == before


@pytest.mark.parametrize("call", ["predict", "all_exits"])
def test_a_detached_model_refuses_to_answer_and_its_backbone_can_get_exits_again(call):
    model = make()
    again = make(model.detach(), ("body", "pair", "last"))
    for rows in (b, 0):
        with pytest.raises(PteeError, match="detached"):
            getattr(model, call)(images(rows))
    assert_works(again, images(), copy.deepcopy(again.backbone))


def test_a_model_that_has_exits_gets_no_others():
    with pytest.raises(PteeError, match=r"has exits already.*ptee\.augment\(model\.detach\(\)"):
        ptee.augment(make())
    inside = made()
    inside.threshold = ALWAYS
    with pytest.raises(PteeError, match=r"cannot be traced.*nor get exits of its own.*model\.detach\(\)"):
        ptee.augment(nn.Sequential(inside), exits="linear", num_exits=1, input_size=inside.plan.input_size)


@pytest.mark.parametrize("first", [0, 1], ids=["the first one", "the last one"])
@pytest.mark.parametrize("how", ["detached", "deleted"])
def test_a_shared_backbone_is_frozen_until_its_last_model_is_gone(first, how):
    net, x = in_mode("mixed"), images()
    before = as_it_was(net)
    models = [make(net), make(net, ("body", "pair", "last"))]
    gone = models.pop(first)
    if how == "detached":
        gone.detach()
    del gone
    assert_works(models[0], x, copy.deepcopy(net).eval())
    assert not any(p.requires_grad for p in net.parameters())
    if how == "detached":
        models[0].detach()
    del models[0]
    assert as_it_was(net) == before


def kept_by_a_circle(net: nn.Module) -> None:
    model = make(net)
    model.me = [model]


@pytest.mark.parametrize(
    "use", [make, kept_by_a_circle, lambda net: copy.copy(make(net))], ids=["model", "circle", "copy"]
)
def test_a_model_that_nobody_holds_any_more_gives_its_backbone_back_as_it_was(use):
    net = in_mode("mixed")
    before = as_it_was(net)
    use(net)
    gc.collect()
    assert as_it_was(net) == before


def test_a_model_made_in_place_of_another_leaves_nothing_of_either():
    net = Net()
    before = as_it_was(net)
    model = make(net)
    model = make(net, ("body", "last"))
    assert sum(len(part._forward_hooks) for part in net.modules()) == 2
    del model
    assert as_it_was(net) == before


def test_the_end_of_a_detached_model_changes_nothing():
    model = make()
    net = model.detach().requires_grad_(False).eval()
    net.stem.register_forward_hook(lambda *_: None)
    before = as_it_was(net)
    model.detach()
    del model
    assert as_it_was(net) == before


def test_the_end_of_a_shallow_copy_leaves_the_model_as_it_is():
    model, x = make(), images()
    copy.copy(model)
    gc.collect()
    assert_works(model, x, copy.deepcopy(model.backbone))


def itself(model: EarlyExitModel) -> EarlyExitModel:
    return model


def unpickled(model: EarlyExitModel) -> EarlyExitModel:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, unpickled], ids=lambda f: f.__name__)
def test_the_end_of_a_copy_gives_its_own_backbone_back_and_no_other(twin_of):
    net, x = Net(), images()
    before = as_it_was(net)
    model = make(net)
    frozen = as_it_was(net)
    twin = twin_of(model)
    own = twin.backbone
    del twin
    assert as_it_was(own) == before
    assert as_it_was(net) == frozen
    assert_works(model, x, copy.deepcopy(net))


def test_a_copy_of_a_detached_model_holds_no_backbone():
    model = make()
    model.detach().requires_grad_(False)
    twin = copy.deepcopy(model)
    again = make(twin.backbone)
    del twin
    again.detach()
    assert not any(p.requires_grad for p in again.backbone.parameters())


def test_a_copy_of_the_backbone_is_a_bare_backbone_even_inside_a_call():
    model, x = make(), images()
    double = copy.deepcopy(model.backbone)
    want, seen = double(x), []
    assert want.shape == (b, K)
    model.backbone.stem.register_forward_pre_hook(lambda *_: seen.append(double(x)))
    assert model.predict(x, ALWAYS).exit_index.tolist() == [0] * b
    assert torch.equal(seen[0], want)


class Around(Net):
    """Runs its first stages without their hooks when told to, as a compiled or changed backbone would."""

    around = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.body.forward(self.stem.forward(x)) if self.around else self.body(self.stem(x))
        return self.fc(self.last(x).mean((2, 3)))


@pytest.mark.parametrize("exits", [("stem",), ("stem", "body"), ("stem", "last")], ids=str)
@pytest.mark.parametrize("call", ["predict", "all_exits"])
def test_hooks_that_do_not_run_are_noticed(exits, call):
    model = make(Around(), exits)
    model.threshold = NEVER
    model.backbone.around = True
    with pytest.raises(PteeError, match=r"hooks did not run|takes another way"):
        getattr(model, call)(images())
    model.backbone.around = False
    assert getattr(model, call)(images()).logits.shape[-1] == K


@pytest.mark.parametrize(
    "use",
    [
        lambda model, out: model.predict(images()),
        lambda model, out: ptee.export(model, out),
        lambda model, out: ptee.tune(model, [(image,) for image in images()], max_cost=0.9),
        lambda model, out: ptee.optimize(model),
        lambda model, out: model.monitor(max_fidelity_drop=0.1),
    ],
    ids=["predict", "export", "tune", "optimize", "monitor"],
)
def test_a_detached_model_is_refused_by_name_whatever_it_is_to_do(use, tmp_path):
    model = make(Around(), ("stem",))
    model.detach()
    with pytest.raises(PteeError, match=r"was detached from its backbone\. Load it again .*ptee\.augment"):
        use(model, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("where", ["backbone.last", "heads.1"])
def test_a_hook_or_a_head_may_call_the_model_that_calls_it(where):
    model, x, seen = make(), images(), []
    want = model.predict(x, sending([3, 2, 1, 0, 1, 2]))

    def ask(*_: object) -> None:
        if not seen:
            seen.append([])
            seen[0] = model.predict(x, sending([0, 1, 2, 3, 2, 1])).exit_index.tolist()

    model.get_submodule(where).register_forward_pre_hook(ask)
    out = model.predict(x, sending([3, 2, 1, 0, 1, 2]))
    assert seen == [[0, 1, 2, 3, 2, 1]]
    assert out.exit_index.tolist() == [3, 2, 1, 0, 1, 2]
    torch.testing.assert_close(out.logits, want.logits)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("where", ["backbone.last", "heads.0"])
def test_an_exception_reaches_the_caller_and_the_model_stays_usable(where, error):
    model, x = make(), images()
    bare = copy.deepcopy(model.backbone)

    def fail(*_: object) -> None:
        raise error("on purpose")

    trap = model.get_submodule(where).register_forward_pre_hook(fail)
    for call in (lambda: model.predict(x, sending([0, 1, 2, 3, 2, 1])), lambda: model.all_exits(x)):
        with pytest.raises(error, match="on purpose"):
            call()
    trap.remove()
    assert torch.equal(model.backbone(x), bare(x))
    assert_works(model, x, bare)


def test_threads_call_one_model_at_once_with_thresholds_of_their_own():
    model, x = make(), images()
    jobs = [sending(random.Random(n).choices(range(E + 1), k=b)) for n in range(4)]
    want = [model.predict(x, job) for job in jobs]
    meeting = threading.Barrier(len(jobs), timeout=20)
    model.backbone.stem.register_forward_pre_hook(lambda *_: (meeting.wait(), None)[1])

    def run(job: Tensor) -> list[ptee.ExitOutput]:
        with torch.no_grad():
            return [model.predict(x, job) for _ in range(5)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for outs, expected in zip(pool.map(run, jobs), want, strict=True):
            for out in outs:
                assert torch.equal(out.exit_index, expected.exit_index)
                torch.testing.assert_close(out.logits, expected.logits)


def test_a_call_waits_while_another_thread_chooses_settings_that_belong_together(monkeypatch):
    model, x = make(), images()
    model.threshold = NEVER
    halfway, go_on, answered = threading.Event(), threading.Event(), threading.Event()
    switched_off = type(model.plan).switched_off

    def slowly(plan, numbers):
        halfway.set()
        assert go_on.wait(20)
        return switched_off(plan, numbers)

    def answer() -> list[int]:
        out = model.predict(x)
        answered.set()
        return out.exit_index.tolist()

    monkeypatch.setattr(type(model.plan), "switched_off", slowly)
    with ThreadPoolExecutor(2) as pool:
        chosen = pool.submit(model.choose, [ALWAYS] * E, [0], None)
        assert halfway.wait(20)
        got = pool.submit(answer)
        assert not answered.wait(0.3), "with the new thresholds, and exit 0 still on"
        go_on.set()
        chosen.result()
        assert got.result() == [1] * b


ANOTHER = {
    "another last layer": (lambda model: setattr(model.backbone, "fc", nn.Linear(8, K + 2)), "7 classes.* for 5.*last layer.*augment"),
    "no last layer": (lambda model: setattr(model.backbone, "fc", nn.Identity()), "8 classes.* for 5.*last layer.*augment"),
    "a head less": (lambda model: model.heads.pop(1), "2 heads for 3 exits.*augment.*model.off"),
    "a head of other classes": (lambda model: setattr(model.heads[1], "logits", nn.Linear(8, K + 1)), r"Exit 1 \(body\).*6 classes.* for 5"),
}  # fmt: skip


@pytest.mark.parametrize("call", ["predict", "all_exits"])
@pytest.mark.parametrize(("change", "said"), ANOTHER.values(), ids=ANOTHER)
def test_a_model_is_refused_that_was_given(change, said, call):
    model = make()
    model.threshold = NEVER
    change(model)
    model.eval()
    with pytest.raises(PteeError, match=said):
        getattr(model, call)(images())


@pytest.mark.parametrize("change", ["replaced", "appended"])
def test_rows_do_not_influence_one_another_through_a_part_that_was(change):
    model, x = make(), images()
    if change == "replaced":
        model.backbone.body[1] = nn.BatchNorm2d(8)
    else:
        model.backbone.stem.append(nn.BatchNorm2d(8))
    together = model.all_exits(x).logits
    alone = torch.cat([model.all_exits(one).logits for one in x.split(1)], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["predict", "all_exits"])
def test_a_head_that_cannot_read_images_of_another_size_is_named_with_both_sizes(call):
    model = make(head="plain")
    with pytest.raises(PteeError, match=r"Exit 0 \(stem\).*\(8, 8, 8\).*\(8, 16, 16\).*\(3, 16, 16\).*input_size"):
        getattr(model, call)(torch.randn(2, 3, 32, 32))


@pytest.mark.cpu("dynamic quantisation is for the CPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", ["predict", "train", "evaluate"])
def test_heads_whose_layers_were_quantised_are_refused_as_rows_would_depend_on_one_another(use):
    quantised = torch.ao.quantization.quantize_dynamic(make(), {nn.Linear}).eval()
    data = TensorDataset(images(), torch.zeros(b, dtype=torch.int64))
    with pytest.raises(
        PteeError, match=r"layers of this head were made into others .*depend on the others\. Take the model as it was"
    ):
        quantised.predict(images()) if use == "predict" else getattr(ptee, use)(quantised, data)


@pytest.mark.parametrize("call", ["predict", "all_exits", "read"])
def test_a_backbone_that_takes_its_batch_apart_asks_for_smaller_batches(call):
    class Parts(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Parts, self).forward(part) for part in x.split(64)])

    model, x = make(Parts()), torch.randn(65, *SIZE)
    getattr(model, call)(x[:64])
    with pytest.raises(
        PteeError, match=r"with 64 rows where 65 are left: .* Give it smaller batches: .*batch_size=64\.$"
    ):
        getattr(model, call)(x)


def test_a_backbone_that_joins_rows_asks_for_smaller_batches_too():
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.cat([x, x]) if len(x) > 64 else x)[: len(x)]

    with pytest.raises(PteeError, match=r"with 130 rows where 65 are left: .*batch_size=32\.$"):
        make(Twice()).all_exits(torch.randn(65, *SIZE))


class Beside(nn.Module):
    """An adapter, put around a module: something passes beside what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.beside = inner, nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.beside(x)


@pytest.mark.parametrize("exits", [("stem", "body"), ("stem", "body", "pair")], ids=["the last", "another"])
def test_rows_that_left_and_pass_beside_an_exit_are_noticed_though_one_row_fits_any_number(exits):
    model = make(exits=exits)
    model.backbone.body = Beside(model.backbone.body).eval()
    thresholds = torch.full((b, len(exits)), NEVER)
    thresholds[1:, 1] = ALWAYS
    with pytest.raises(
        PteeError, match=rf" {b} rows where 1 is left: .*Was a module put in or replaced after augment\(\)"
    ):
        model.predict(images(), thresholds)


def test_a_backbone_that_goes_on_when_nobody_is_left_is_refused():
    class CatchesAll(Net):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except:  # noqa: E722
                return x.new_zeros(len(x), K)

    model = make(CatchesAll())
    with pytest.raises(
        PteeError, match=rf"answers for {b} rows where 0 are left: .*does its code catch every exception"
    ):
        model.predict(images(), ALWAYS)


def test_an_input_that_takes_another_way_through_the_backbone_is_refused():
    class Switch(Net):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.last, self.body) if x.shape[-1] > SIZE[-1] else (self.body, self.last)
            return self.fc(second(first(self.stem(x))).mean((2, 3)))

    model = make(Switch(), ("body", "last"))
    assert model.predict(images(), NEVER).logits.shape == (b, K)
    with pytest.raises(PteeError, match=r"Exit 1 \(last\).*exit 0"):
        model.predict(torch.randn(2, 3, 32, 32), NEVER)


# ---------------------------------------------------------------------------------------------------- modes and types


def test_training_mode_reaches_the_heads_alone_and_predict_refuses_it():
    model, x = make(head="conv1"), images()
    assert model.train() is model
    assert all(part.training for part in model.heads.modules())
    for call in (model, model.predict):
        with pytest.raises(PteeError, match=r"eval\(\)"):
            call(x)
    assert not model.eval().heads[0].training


def test_the_backbone_is_not_put_into_training_mode_even_for_a_moment():
    class Noting(Net):
        def train(self, mode: bool = True) -> nn.Module:
            asked.append(mode)
            return super().train(mode)

    asked: list[bool] = []
    model = make(Noting())
    model.train().eval().train()
    assert model.training and asked and not any(asked)


each_twin = pytest.mark.parametrize("twin", [itself, copy.deepcopy, unpickled], ids=lambda f: f.__name__)


@each_twin
@pytest.mark.parametrize("part", ["", "stem.1", "dropout"])
def test_a_part_of_the_backbone_put_into_training_mode_past_the_model_is_put_back(twin, part):
    model, x = twin(make()), images()
    for call in (model.predict, model.all_exits):
        want, before = call(x).logits, weights_hash(model.backbone)
        model.backbone.get_submodule(part).train()
        assert torch.equal(call(x).logits, want)
        assert weights_hash(model.backbone) == before
        assert not any(p.training for p in model.backbone.modules())


@each_twin
@pytest.mark.parametrize("replaced", [False, True], ids=["its own head", "a head put there later"])
def test_a_part_of_a_head_in_training_mode_is_refused_until_eval(twin, replaced):
    model, x = twin(make(head="conv1")), images()
    if replaced:
        model.heads[1] = copy.deepcopy(model.heads[1])
    model.heads[1].features[1].train()
    with pytest.raises(PteeError, match=r"eval\(\)"):
        model.predict(x)
    assert model.eval().predict(x).logits.shape == (b, K)


def test_a_backbone_in_half_precision_gets_heads_in_half_precision():
    model = make(Net().bfloat16())
    assert {p.dtype for p in model.heads.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16


class Widened(Net):
    """Gives its answers in float32, whatever it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@pytest.mark.parametrize("around", ["bfloat16", "autocast", "both alike"])
@pytest.mark.parametrize("first", [ALWAYS, NEVER], ids=["all leave", "none leaves"])
def test_the_type_of_an_answer_does_not_depend_on_who_leaves(around, first):
    model, x = make(Net() if around == "both alike" else Widened()), images()
    if around != "autocast":
        model, x = model.bfloat16(), x.bfloat16()
    want = torch.bfloat16 if around == "both alike" else torch.float32
    with torch.autocast(here().type, torch.bfloat16, enabled=around == "autocast"), torch.no_grad():
        for threshold in (first, ALWAYS, NEVER, sending([0, 1, 2, 3, 2, 1]), sending([0, 1, 2, 0, 2, 1])):
            assert model.predict(x, threshold).logits.dtype == want
        assert model.predict(x[:0]).logits.dtype == model.all_exits(x[:0]).logits.dtype == want
        assert torch.equal(model.predict(x, NEVER).logits, model.backbone(x))


@pytest.mark.parametrize("threshold", [None, [0.5] * E, torch.zeros(0, E), torch.zeros(1, E)], ids=str)
def test_an_empty_batch_is_a_batch(threshold):
    out, every = shared().predict(images()[:0], threshold), shared().all_exits(images()[:0])
    assert [tuple(part.shape) for part in out] == [(0, K), (0,), (0,), (0,)]
    assert [tuple(part.shape) for part in every] == [(E + 1, 0, K), (E + 1, 0), (E, 0)]
    assert [part.dtype for part in out] == [part.dtype for part in shared().predict(images())]
    assert [part.dtype for part in every] == [part.dtype for part in shared().all_exits(images())]


def test_a_pickled_model_keeps_its_hooks_where_others_are_given_their_numbers(monkeypatch):
    def new_numbers() -> None:
        """Hooks are numbered from zero again, as in a new process."""
        monkeypatch.setattr(RemovableHandle, "next_id", 0)

    new_numbers()
    model, x = make(exits=("stem", "body")), images()
    want, pickled = model.predict(x, ALWAYS), pickle.dumps(model)
    new_numbers()
    model = pickle.loads(pickled)
    first, called = model.backbone.stem, []
    ours = max(first._forward_hooks)
    handles = [first.register_forward_hook(lambda *_: called.append(1)) for _ in range(ours + 2)]
    torch.testing.assert_close(model.predict(x, ALWAYS), want)
    model.predict(x, NEVER)
    assert len(called) == len(handles), "a hook registered here did not run"
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model.predict(x, ALWAYS), want)


def test_operations_in_place_behind_a_cut_change_neither_answers_nor_gradients():
    class Tidy(Net):
        def forward(self, x: Tensor) -> Tensor:
            left, [right] = self.pair(self.body(self.stem(x)).relu().mul(2))
            return self.fc(self.dropout(self.last(left + right).mean((2, 3))))

    hasty, tidy = make(Net(), head="conv1"), make(Tidy(), head="conv1")
    tidy.load_state_dict(hasty.state_dict())
    assert [cut.overwritten for cut in hasty.plan.cuts] == [False, True, False]
    for model in (hasty, tidy):
        model.train().all_exits(images()).logits.square().sum().backward()
    for one, two in zip(hasty.heads.parameters(), tidy.heads.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_answers_carry_gradients_where_the_images_do_whichever_rows_leave():
    model, x = make(), images()
    h = model.all_exits(x).confidence[0].detach()
    for threshold in (h.median().item(), ALWAYS, NEVER):
        assert not model.predict(x, threshold).logits.requires_grad
        assert model.predict(x.clone().requires_grad_(), threshold).logits.requires_grad


def test_heads_may_share_their_weights():
    model, x = make(), images()
    model.heads[1].confidence, model.heads[1].logits = model.heads[0].confidence, model.heads[0].logits
    assert len(list(model.heads.parameters())) == 8
    twin = copy.deepcopy(model)
    assert twin.heads[1].logits is twin.heads[0].logits
    for one in (model, twin, unpickled(model)):
        assert_works(one, x, copy.deepcopy(model.backbone))
    model.all_exits(x).logits.sum().backward()


# ---------------------------------------------------------------------------------------------------- making


def test_a_new_model_is_in_eval_mode_with_thresholds_of_one_half():
    model = ptee.augment(Net(), exits=["body"], input_size=SIZE)
    assert not model.training
    assert model.threshold == [0.5]
    assert model.num_classes == K
    assert model.results is None


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "resnet50"], ids=["a module", "a name"])
@pytest.mark.parametrize("name", ["train", "calibrate", "tune", "evaluate", "compare"])
def test_what_has_no_exits_is_refused_by_name(name, thing):
    data = TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))
    words = {"tune": {"max_cost": 0.9}}.get(name, {})
    with pytest.raises(PteeError, match=f"{type(thing).__name__}, not an early-exit model. Give what ptee.augment"):
        if name == "compare":
            ptee.compare({"a": thing}, data, data)
        else:
            getattr(ptee, name)(thing, data, **words)


class Once(Net):
    """A network of which no second one is to be made."""

    def __deepcopy__(self, memo: object) -> Once:
        raise AssertionError("the backbone was copied")


def test_building_a_model_copies_no_backbone():
    assert ptee.augment(Once(), exits=["stem"], input_size=SIZE).exits[0].name == "stem"


@pytest.mark.parametrize(("slip", "meant"), SLIPS.items())
def test_a_setting_that_is_mistyped_is_refused_and_names_of_ones_own_are_not(slip, meant):
    model = made()
    with pytest.raises(PteeError, match=rf"has no {slip}\. Did you mean model\.{meant}\?"):
        setattr(model, slip, 0.7)
    assert hasattr(model, meant) and not hasattr(model, slip)
    model.mine, model.layer, model.weight = 1, torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(2))
    assert {"layer.weight", "weight"} <= {name for name, _ in model.named_parameters()}
