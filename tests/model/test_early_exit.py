from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import random
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from device import here, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import made
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.hooks import RemovableHandle

import ptee
from ptee._common.errors import CutError, PteeError, UnknownName
from ptee.backbones.weights import weights_hash
from ptee.evaluation.traces import record
from ptee.model.early_exit import EarlyExitModel

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


# what predict answers


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


def test_the_confidences_that_these_tests_use_differ():
    assert all(len(walls(n)) > b / 2 for n in range(E))


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


@settings(deadline=None, max_examples=50)
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


@settings(deadline=None, max_examples=50)
@given(st.lists(each_exit_one, min_size=b, max_size=b), st.randoms(use_true_random=False))
def test_each_row_may_have_thresholds_of_its_own_in_any_order(thresholds, shuffler):
    model, x = shared(), images()
    assert_answers(model.predict(x, thresholds), by_rule(thresholds))
    order = shuffler.sample(range(b), b)
    mixed = model.predict(x[order], torch.tensor(thresholds, dtype=torch.float64)[order])
    back = torch.tensor(order).argsort()
    assert_answers(ptee.ExitOutput(*(part[back] for part in mixed)), by_rule(thresholds))


@pytest.mark.parametrize("threshold", [1.0000001, 1 + 1e-12, NEVER, math.inf])
@pytest.mark.parametrize("sure", [False, True], ids=["as they are", "with confidences of 1"])
def test_above_one_nobody_leaves_and_the_answer_is_the_backbones_bit_for_bit(threshold, sure):
    model, x = make(), images()
    with torch.no_grad():
        for head in model.heads:
            head.confidence.bias += 100 * sure
    out = model.predict(x, threshold)
    assert torch.equal(out.logits, copy.deepcopy(model.backbone)(x))
    assert out.exit_index.tolist() == [E] * b
    assert out.confidence.tolist() == [1] * b
    if sure:
        assert model.predict(x, 1).exit_index.tolist() == [0] * b


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("threshold", [ALWAYS, -math.inf])
def test_a_confidence_that_is_no_number_never_leaves(poison, threshold):
    model = make()
    with torch.no_grad():
        model.heads[0].confidence.bias.fill_(poison)
        model.heads[2].confidence.bias.fill_(poison)
    assert model.predict(images(), threshold).exit_index.tolist() == [1] * b
    assert model.predict(images(), [threshold, NEVER, threshold]).exit_index.tolist() == [E] * b


def test_a_poisoned_row_goes_to_the_end_and_leaves_the_others_alone():
    model, x = shared(), images()
    want = model.predict(x, ALWAYS)
    x[2] = math.nan
    out = model.predict(x, ALWAYS)
    assert out.exit_index.tolist() == [0, 0, E, 0, 0, 0]
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out.logits[others], want.logits[others])


def test_forward_is_predict_at_the_models_own_threshold():
    model, x = make(), images()
    for threshold in (ALWAYS, [walls(n)[2] for n in range(E)], NEVER):
        model.threshold = threshold
        assert torch.equal(model(x), model.predict(x, threshold).logits)


def test_a_confidence_just_below_the_threshold_stays_however_the_threshold_is_given():
    model, x = shared(), images()
    above = recorded()[1][0, 0].item() + 1e-12  # float32 rounds it down onto the confidence
    threshold = [above, NEVER, NEVER]
    traced = record(model, TensorDataset(x), progress=False).leaving(threshold)
    assert traced[0] == model.predict(x, torch.tensor([threshold] * b, dtype=torch.float64)).exit_index[0] == E
    assert model.predict(x, threshold).exit_index[0] == E


def real_pictures(file: Path, count: int) -> tuple[Tensor, Tensor]:
    """So many pictures spread over a tar of class/name.jpg, (n, 3, h, w) in 0..1, and the numbers of their classes."""
    with tarfile.open(file) as tar:
        members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
        classes = sorted({m.name.split("/")[-2] for m in members})
        members = members[:: len(members) // count][:count]
        read = [Image.open(tar.extractfile(m)).convert("RGB") for m in members]
    x = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2) / 255
    return x, torch.tensor([classes.index(m.name.split("/")[-2]) for m in members])


def test_real_images_get_the_trained_networks_answers_when_nobody_leaves(weights, real_data):
    model = moved(ptee.augment("cifar_resnet20", weights=str(weights / "cifar_resnet20.safetensors"), num_exits=E))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (model.origin.input.mean, model.origin.input.std))
    pictures, labels = real_pictures(real_data / "cifar10" / "calibration.tar", 40)
    x = (pictures - mean) / std
    with torch.no_grad():
        assert_works(model, x, copy.deepcopy(model.backbone))
        right = model.predict(x, NEVER).logits.argmax(1) == labels
    assert right.float().mean() > 0.7  # .887 of all 4,000


# thresholds


FORMS = {
    "a list": [ALWAYS, NEVER, NEVER],
    "a tuple": (ALWAYS, NEVER, NEVER),
    "a list of one list": [[ALWAYS, NEVER, NEVER]],
    "whole numbers": [0, 2, 2],
    "a float32 tensor": torch.tensor([ALWAYS, NEVER, NEVER]),
    "a float64 tensor": torch.tensor([ALWAYS, NEVER, NEVER], dtype=torch.float64),
    "a tensor of whole numbers": torch.tensor([0, 2, 2]),
    "a tensor that wants gradients": torch.tensor([ALWAYS, NEVER, NEVER], requires_grad=True),
    "a NumPy array": torch.tensor([ALWAYS, NEVER, NEVER], device="cpu").numpy(),
    "one row for all": torch.tensor([[ALWAYS, NEVER, NEVER]]),
}
each_form = pytest.mark.parametrize("form", FORMS)


@each_form
def test_a_call_takes_a_threshold_in_any_form(form):
    assert shared().predict(images(), FORMS[form]).exit_index.tolist() == [0] * b


@each_form
def test_the_threshold_can_be_set_in_any_form_and_reads_as_a_list(form):
    model = copy.deepcopy(shared())
    model.threshold = FORMS[form]
    assert model.threshold == [ALWAYS, NEVER, NEVER]
    assert all(type(t) is float for t in model.threshold)
    assert model.predict(images()).exit_index.tolist() == [0] * b


@pytest.mark.parametrize("shape", [(b, E), (b, 1), (1, E), (1, 1), (E,), (1,), ()], ids=str)
def test_a_call_takes_every_shape_that_broadcasts(shape):
    assert shared().predict(images(), torch.full(shape, ALWAYS)).exit_index.tolist() == [0] * b
    assert shared().predict(images(), torch.full(shape, NEVER)).exit_index.tolist() == [E] * b


REFUSED = {
    "two for three exits": ([0.5, 0.5], r"\b2\b.*\b3\b"),
    "none": ([], r"\b0\b.*\b3\b"),
    "NaN": (math.nan, "NaN"),
    "a NaN among them": ([0.5, math.nan, 0.5], "NaN"),
    "a word": ("high", "'high'"),
    "a list with None": ([0.5, None, 0.5], "None"),
    "a complex number": (1j, "1j"),
    "a complex tensor": (torch.tensor(1j), "number"),
    "a truth": (True, "True"),
    "truths": ([True, False, True], "True"),
    "a tensor of truths": (torch.ones(3) > 0, "True"),
}


@pytest.mark.parametrize(("threshold", "said"), REFUSED.values(), ids=REFUSED)
def test_a_bad_threshold_is_refused_and_the_one_in_force_stays(threshold, said):
    model = copy.deepcopy(shared())
    model.threshold = [0.1, 0.2, 0.3]
    with pytest.raises(PteeError, match=said):
        model.threshold = threshold
    with pytest.raises(PteeError, match=said):
        model.predict(images(), threshold)
    assert model.threshold == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("shape", [(b, 2), (b + 1, E), (2, 1), (1, 1, E), (b,)], ids=str)
def test_a_threshold_that_does_not_broadcast_is_refused_with_both_shapes(shape):
    with pytest.raises(PteeError, match=rf"\({', '.join(map(str, shape))},?\).*\({b}, {E}\)"):
        shared().predict(images(), torch.full(shape, 0.5))


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (2, 4)], ids=str)
def test_the_threshold_is_set_by_one_number_for_each_exit_and_not_by_a_table(shape):
    model = make(exits=("stem", "body", "pair", "last"))
    with pytest.raises(PteeError, match=f"{shape[0]} x {shape[1]} thresholds for 4 exits"):
        model.threshold = torch.full(shape, 0.1).tolist()
    assert model.threshold == [0.5] * 4


@pytest.mark.parametrize("call", ["__call__", "predict", "all_exits", "read"])
def test_a_single_image_without_a_batch_axis_is_refused(call):
    with pytest.raises(PteeError, match=r"\(b, c, h, w\).*\(3, 32, 32\).*x\[None\]"):
        getattr(copy.deepcopy(shared()), call)(torch.zeros(3, 32, 32))


def test_the_list_that_is_read_is_a_copy():
    model = copy.deepcopy(shared())
    model.threshold.append(0.1)
    assert model.threshold == [0.5] * E


# what is not computed


def test_nothing_runs_after_the_last_row_has_left_and_only_the_rest_goes_on():
    model, x = make(), images()
    rows: dict[str, int] = {}
    for name in ("stem", "body", "pair", "last"):
        part = model.backbone.get_submodule(name)
        part.register_forward_pre_hook(lambda _m, args, name=name: rows.__setitem__(name, len(args[0])))
    model.predict(x, sending([0, 1, 1, 0, 1, 0]))
    assert rows == {"stem": 6, "body": 6, "pair": 3} or rows == {"stem": 6, "body": 3}
    rows.clear()
    model.predict(x, sending([0, 1, 2, 3, 1, 0]))
    assert rows == {"stem": 6, "body": 4, "pair": 2, "last": 1}


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


# the backbone


MODES = {"trainable, in training": (True, True), "frozen, in eval mode": (False, False), "mixed": (None, None)}


def as_it_is(module: nn.Module) -> tuple[object, ...]:
    return (
        {name: p.requires_grad for name, p in module.named_parameters()},
        {name: part.training for name, part in module.named_modules()},
        {name: len(part._forward_hooks) for name, part in module.named_modules()},
        weights_hash(module),
    )


def in_mode(mode: str) -> Net:
    net, (gradients, training) = Net(), MODES[mode]
    net.requires_grad_(gradients is not False).train(training is not False)
    if mode == "mixed":
        net.body.requires_grad_(False).eval()
        net.stem.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize("mode", MODES)
def test_detach_gives_the_backbone_back_as_it_was(mode):
    net = in_mode(mode)
    before = as_it_is(net)
    model = make(net)
    assert model.backbone is net
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(part.training for part in net.modules())
    model.predict(images(), ALWAYS)
    assert model.detach() is net
    assert as_it_is(net) == before


@pytest.mark.parametrize(
    "request_", [{"exits": ["stem", "nowhere"]}, {"exits": ["fc"], "head": "nothing"}, {"num_exits": 99}, {"exits": ["pair.left"]}],
    ids=["no such module", "no such head", "too many", "no cut"],
)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
def test_a_refused_request_leaves_the_backbone_as_it_was(request_, mode):
    net = in_mode(mode)
    before = as_it_is(net)
    with pytest.raises((CutError, UnknownName)):
        ptee.augment(net, input_size=SIZE, **request_)
    assert as_it_is(net) == before


@pytest.mark.parametrize("rows", [b, 0])
@pytest.mark.parametrize("call", ["predict", "all_exits"])
def test_a_detached_model_refuses_to_answer(call, rows):
    model = make()
    model.detach()
    with pytest.raises(PteeError, match="detached"):
        getattr(model, call)(images()[:rows])


def test_a_detached_backbone_can_be_augmented_again():
    model = make()
    again = make(model.detach(), ("body", "pair", "last"))
    assert_works(again, images(), copy.deepcopy(again.backbone))


def test_a_model_that_has_exits_is_refused_before_anything_else_is_asked_of_it():
    with pytest.raises(PteeError, match=r"has exits already.*ptee\.augment\(model\.detach\(\)"):
        ptee.augment(make())


def test_two_models_share_one_backbone_and_each_goes_its_own_way():
    net, x = Net(), images()
    one, two = make(net), make(net, ("body", "pair", "last"))
    bare = copy.deepcopy(net)
    for model in (one, two, one):
        assert_works(model, x, bare)
    one.detach()
    net.eval()
    assert_works(two, x, bare)


@pytest.mark.parametrize(
    "first",
    [
        "the last one",
        "the first one",
    ],
)
def test_a_shared_backbone_is_frozen_until_the_last_model_is_detached(first):
    net, x = Net(), images()
    before = as_it_is(net)
    one, two = make(net), make(net, ("body", "pair", "last"))
    gone, left = (two, one) if first == "the last one" else (one, two)
    gone.detach()
    assert_works(left, x, copy.deepcopy(net).eval())
    assert not any(p.requires_grad for p in net.parameters())
    left.detach()
    assert as_it_is(net) == before


def kept_by_a_circle(net: nn.Module) -> None:
    model = make(net)
    model.me = [model]


@pytest.mark.parametrize(
    "use", [make, kept_by_a_circle, lambda net: copy.copy(make(net))], ids=["model", "circle", "copy"]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_nobody_holds_any_more_gives_its_backbone_back_as_it_was(mode, use):
    net = in_mode(mode)
    before = as_it_is(net)
    use(net)
    gc.collect()
    assert as_it_is(net) == before


def test_a_model_made_in_place_of_another_leaves_nothing_of_either():
    net = Net()
    before = as_it_is(net)
    model = make(net)
    model = make(net, ("body", "last"))
    assert_hooks(net, 2)
    del model
    assert as_it_is(net) == before
    model = make(net)
    model.detach()
    assert as_it_is(net) == before


def assert_hooks(net: nn.Module, count: int) -> None:
    assert sum(len(part._forward_hooks) for part in net.modules()) == count


def test_the_end_of_one_model_leaves_the_other_on_the_same_backbone_alone():
    net, x = Net(), images()
    before = as_it_is(net)
    one, two = make(net), make(net, ("body", "pair", "last"))
    del one
    assert_hooks(net, 3)
    assert not any(p.requires_grad for p in net.parameters())
    assert_works(two, x, copy.deepcopy(net))
    del two
    assert as_it_is(net) == before


def test_the_end_of_a_detached_model_changes_nothing():
    model = make()
    net = model.detach().requires_grad_(False).eval()
    hook = net.stem.register_forward_hook(lambda *_: None)
    before = as_it_is(net)
    model.detach()
    del model
    assert as_it_is(net) == before
    hook.remove()


def test_the_end_of_a_shallow_copy_leaves_the_model_as_it_is():
    model, x = make(), images()
    copy.copy(model)
    gc.collect()
    assert_works(model, x, copy.deepcopy(model.backbone))


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_the_end_of_a_copy_gives_its_own_backbone_back_and_no_other(twin_of):
    net, x = Net(), images()
    before = as_it_is(net)
    model = make(net)
    frozen = as_it_is(net)
    twin = twin_of(model)
    other = make(twin.backbone, ("body", "last"))
    net_of_twin = twin.backbone
    del twin
    assert_hooks(net_of_twin, 2)
    del other
    assert as_it_is(net_of_twin) == before
    assert as_it_is(net) == frozen
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
    model.threshold = ALWAYS
    double = copy.deepcopy(model.backbone)
    want, seen = double(x), []
    assert want.shape == (b, K)
    model.backbone.stem.register_forward_pre_hook(lambda *_: seen.append(double(x)))
    assert model.predict(x).exit_index.tolist() == [0] * b
    assert torch.equal(seen[0], want)


def test_the_backbone_itself_is_bare_outside_of_a_call():
    net, x = Net(), images()
    want = copy.deepcopy(net).eval()(x)
    model = make(net)
    model.threshold = ALWAYS
    model(x)
    assert torch.equal(net(x), want)


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


@pytest.fixture
def dynamo() -> Iterator[None]:
    """What torch.compile keeps is forgotten before and afterwards."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiling_the_backbone_after_augment_changes_no_answer(dynamo):
    model, x = make(exits=("pair",)), images()  # each exit is compiled with the backbone, which takes seconds
    bare, every = copy.deepcopy(model.backbone), model.all_exits(x).logits
    leaving = torch.tensor([ALWAYS, NEVER]).repeat(b // 2)
    model.backbone.compile(backend="eager")
    assert torch.equal(model.backbone(x), bare(x))
    assert torch.equal(model.predict(x, NEVER).logits, bare(x))
    out = model.predict(x, leaving[:, None])
    assert out.exit_index.tolist() == [0, 1] * (b // 2)
    torch.testing.assert_close(out.logits, every[out.exit_index, range(b)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.all_exits(x).logits, every, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "compiled",
    [functools.partial(torch.compile, backend="eager"), torch.jit.script],
    ids=["torch.compile", "torch.jit.script"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backbone_is_refused_in_words_of_ours(compiled, dynamo):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K))
    with pytest.raises(PteeError, match="compiled"):
        ptee.augment(compiled(net.eval()), exits="linear", num_exits=1, input_size=SIZE)


def test_a_compiled_model_answers_the_same(dynamo):
    model, x = make(), images()
    compiled = torch.compile(model, backend="eager")
    for threshold in (ALWAYS, [walls(n)[2] for n in range(E)], NEVER):
        model.threshold = threshold
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x[:3]), model(x[:3]))


def test_a_model_compiled_into_one_graph_fails_loudly(dynamo):
    with pytest.raises(RuntimeError, match="disable"):
        torch.compile(make(), backend="eager", fullgraph=True)(images())


AGAIN = """
import ptee
from small import SIZE, made
from torch import nn
model = made()
model.threshold = 0
for backbone in (model, nn.Sequential(model)):
    try:
        ptee.augment(backbone, exits="linear", num_exits=1, input_size=SIZE)
    except ptee.PteeError as why:
        print(f"refused: {why}")
"""


def test_an_early_exit_model_gets_no_exits_of_its_own():
    # In a process of its own: rows that left while fvcore traced have brought it down.
    done = subprocess.run(
        [sys.executable, "-c", AGAIN], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-300:]
    assert len(re.findall(r"refused: .*detach\(\)", done.stdout)) == 2


# calls


def asks_again(model: EarlyExitModel, x: Tensor, seen: list[list[int]]) -> Callable[..., None]:
    def ask(*_: object) -> None:
        if not seen:
            seen.append([])
            seen[0] = model.predict(x, sending([0, 1, 2, 3, 2, 1])).exit_index.tolist()

    return ask


@pytest.mark.parametrize("where", ["backbone.body", "backbone.last", "heads.1", "heads.2"])
def test_a_hook_or_a_head_may_call_the_model_that_calls_it(where):
    model, x, seen = make(), images(), []
    want = model.predict(x, sending([3, 2, 1, 0, 1, 2]))
    model.get_submodule(where).register_forward_pre_hook(asks_again(model, x, seen))
    out = model.predict(x, sending([3, 2, 1, 0, 1, 2]))
    assert seen == [[0, 1, 2, 3, 2, 1]]
    assert out.exit_index.tolist() == [3, 2, 1, 0, 1, 2]
    torch.testing.assert_close(out.logits, want.logits)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("where", ["backbone.stem", "backbone.last", "heads.0", "heads.2"])
def test_an_exception_reaches_the_caller_and_the_model_stays_usable(where, error):
    model, x = make(), images()
    bare = copy.deepcopy(model.backbone)

    def fail(*_: object) -> None:
        raise error("on purpose")

    trap = model.get_submodule(where).register_forward_pre_hook(fail)
    for call in (lambda: model.predict(x, sending([0, 1, 2, 3, 2, 1])), lambda: model.all_exits(x)):
        with pytest.raises(error, match="on purpose"):
            call()
    if where.startswith("heads"):
        assert torch.equal(model.backbone(x), bare(x))
    trap.remove()
    assert_works(model, x, bare)


def test_threads_call_one_model_at_once_with_thresholds_of_their_own():
    model, x = make(), images()
    jobs = [sending(random.Random(n).choices(range(E + 1), k=b)) for n in range(4)]
    want = [model.predict(x, job) for job in jobs]
    meeting = threading.Barrier(len(jobs), timeout=20)

    def meet(*_: object) -> None:
        meeting.wait()

    model.backbone.stem.register_forward_pre_hook(meet)

    def run(job: Tensor) -> list[ptee.ExitOutput]:
        with torch.no_grad():
            return [model.predict(x, job) for _ in range(5)]

    with ThreadPoolExecutor(len(jobs)) as pool:
        for outs, expected in zip(pool.map(run, jobs), want, strict=True):
            for out in outs:
                assert torch.equal(out.exit_index, expected.exit_index)
                torch.testing.assert_close(out.logits, expected.logits)


@pytest.mark.parametrize("call", ["predict", "all_exits"])
def test_a_head_that_cannot_read_images_of_another_size_is_named_with_both_sizes(call):
    model = make(head="plain")
    with pytest.raises(PteeError, match=r"Exit 0 \(stem\).*\(8, 8, 8\).*\(8, 16, 16\).*\(3, 16, 16\).*input_size"):
        getattr(model, call)(torch.randn(2, 3, 32, 32))


def test_an_input_that_takes_another_way_through_the_backbone_is_refused():
    class Switch(Net):
        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.last, self.body) if x.shape[-1] > SIZE[-1] else (self.body, self.last)
            return self.fc(second(first(self.stem(x))).mean((2, 3)))

    model = make(Switch(), ("body", "last"))
    assert model.predict(images(), NEVER).logits.shape == (b, K)
    with pytest.raises(PteeError, match=r"Exit 1 \(last\).*exit 0"):
        model.predict(torch.randn(2, 3, 32, 32), NEVER)


# modes, types, formats


def test_training_mode_reaches_the_heads_alone_and_predict_refuses_it():
    model, x = make(head="conv1"), images()
    want, before = model.backbone(x), weights_hash(model.backbone)
    assert model.train() is model
    assert all(part.training for part in model.heads.modules())
    assert not any(part.training for part in model.backbone.modules())
    for call in (model, model.predict):
        with pytest.raises(PteeError, match=r"eval\(\)"):
            call(x)
    assert torch.equal(model.all_exits(x).logits[-1], want)
    assert weights_hash(model.backbone) == before
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


def itself(model: EarlyExitModel) -> EarlyExitModel:
    return model


def unpickled(model: EarlyExitModel) -> EarlyExitModel:
    return pickle.loads(pickle.dumps(model))


each_twin = pytest.mark.parametrize("twin", [itself, copy.deepcopy, unpickled], ids=lambda f: f.__name__)


@each_twin
@pytest.mark.parametrize("part", ["", "stem", "stem.1", "dropout"])
@pytest.mark.parametrize("call", ["predict", "all_exits"])
def test_a_part_of_the_backbone_put_into_training_mode_past_the_model_is_put_back(twin, part, call):
    model, x = twin(make()), images()
    want, before = getattr(model, call)(x).logits, weights_hash(model.backbone)
    model.backbone.get_submodule(part).train()
    assert torch.equal(getattr(model, call)(x).logits, want)
    assert weights_hash(model.backbone) == before
    assert not any(p.training for p in model.backbone.modules())


@each_twin
@pytest.mark.parametrize("part", ["", "features", "features.1"])
@pytest.mark.parametrize("replaced", [False, True], ids=["its own head", "a head put there later"])
def test_a_part_of_a_head_in_training_mode_is_refused_until_eval(twin, part, replaced):
    model, x = twin(make(head="conv1")), images()
    if replaced:
        model.heads[1] = copy.deepcopy(model.heads[1])
    model.heads[1].get_submodule(part).train()
    with pytest.raises(PteeError, match=r"eval\(\)"):
        model.predict(x)
    assert model.eval().predict(x).logits.shape == (b, K)


def half(model: EarlyExitModel, x: Tensor) -> tuple[EarlyExitModel, Tensor]:
    return model.bfloat16(), x.bfloat16()


def wide(model: EarlyExitModel, x: Tensor) -> tuple[EarlyExitModel, Tensor]:
    return model.double(), x.double()


def channels_last(model: EarlyExitModel, x: Tensor) -> tuple[EarlyExitModel, Tensor]:
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [half, wide, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("head", ["pool", "conv1"])
def test_the_model_works_in_other_types_and_formats_with_confidences_in_float32(change, head):
    model, x = change(copy.deepcopy(shared(head)), images())
    with torch.no_grad():
        assert_works(model, x, copy.deepcopy(model.backbone))
        for confidence in (model.predict(x, ALWAYS).confidence, model.all_exits(x).confidence):
            assert confidence.dtype == torch.float32


def test_a_backbone_in_half_precision_gets_heads_in_half_precision():
    model = make(Net().bfloat16())
    assert {p.dtype for p in model.heads.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16


def test_the_model_works_under_autocast_with_confidences_in_float32():
    model, x = shared("conv1"), images()
    with torch.autocast(here().type, torch.bfloat16), torch.no_grad():
        assert torch.equal(model.predict(x, NEVER).logits, model.backbone(x))
        out = model.predict(x, sending([0, 1, 2, 3, 2, 1]))
    assert out.exit_index.tolist() == [0, 1, 2, 3, 2, 1]
    assert out.confidence.dtype == torch.float32
    assert not torch.equal(out.confidence, out.confidence.bfloat16().float())


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


def test_the_model_works_in_inference_mode_and_trains_afterwards():
    model, x = make(), images()
    bare = copy.deepcopy(model.backbone)
    with torch.inference_mode():
        assert_works(model, x, bare)
    model.all_exits(x).logits.sum().backward()


@pytest.mark.parametrize("threshold", [None, ALWAYS, [0.5] * E, torch.zeros(0, E), torch.zeros(1, E)], ids=str)
def test_an_empty_batch_is_a_batch(threshold):
    out, every = shared().predict(images()[:0], threshold), shared().all_exits(images()[:0])
    assert [tuple(part.shape) for part in out] == [(0, K), (0,), (0,), (0,)]
    assert [tuple(part.shape) for part in every] == [(E + 1, 0, K), (E + 1, 0), (E, 0)]
    like = shared().predict(
        images(), threshold if threshold is None or len(torch.as_tensor(threshold).shape) < 2 else None
    )
    assert [part.dtype for part in out] == [part.dtype for part in like]


# copies


def test_a_deep_copy_answers_the_same_and_lives_a_life_of_its_own():
    model, x = make(), images()
    want = model.predict(x, ALWAYS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.heads.parameters():
            p.zero_()
    model.detach()
    torch.testing.assert_close(twin.predict(x, ALWAYS), want)
    assert_works(twin, x, model.backbone.eval())
    twin.detach()
    assert not any(part._forward_hooks for part in twin.backbone.modules())


def test_a_pickle_round_trip_changes_nothing():
    model, x = make(head="conv1"), images()
    model.threshold = [walls(n)[2] for n in range(E)]
    back = pickle.loads(pickle.dumps(model))
    assert back.threshold == model.threshold
    torch.testing.assert_close(back.predict(x), model.predict(x), rtol=0, atol=0)
    assert_works(back, x, copy.deepcopy(model.backbone))


@pytest.fixture
def new_numbers(monkeypatch) -> Callable[[], None]:
    """Hooks are numbered from zero again, as in a new process."""
    return functools.partial(monkeypatch.setattr, RemovableHandle, "next_id", 0)


def test_a_pickled_model_keeps_its_hooks_where_others_are_given_their_numbers(new_numbers):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K)
    )
    new_numbers()
    model, x = make(net, ("0", "2")), images()
    want, pickled = model.predict(x, ALWAYS), pickle.dumps(model)
    new_numbers()
    model = pickle.loads(pickled)
    first, called = model.backbone[0], []
    ours = max(first._forward_hooks)
    handles = [first.register_forward_hook(lambda *_: called.append(1)) for _ in range(ours + 2)]
    torch.testing.assert_close(model.predict(x, ALWAYS), want)
    model.predict(x, NEVER)
    assert len(called) == len(handles), "a hook registered here did not run"
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model.predict(x, ALWAYS), want)


def test_the_state_of_one_model_fits_another_of_the_same_make():
    one, two, x = make(), make(), images()
    with torch.no_grad():
        for p in two.parameters():
            p.add_(1)
    two.load_state_dict(one.state_dict())
    torch.testing.assert_close(two.predict(x, ALWAYS), one.predict(x, ALWAYS))


# what all_exits gives


def test_all_exits_gives_every_answer_and_confidences_are_the_sigmoid_of_their_logits():
    every = shared().all_exits(images())
    assert [tuple(part.shape) for part in every] == [(E + 1, b, K), (E + 1, b), (E, b)]
    torch.testing.assert_close(every.confidence[:-1], every.confidence_logits.sigmoid())
    assert every.confidence[-1].tolist() == [1] * b
    assert torch.equal(every.logits[-1], shared().backbone(images()))


@pytest.mark.parametrize("head", ["pool", "bnpool", "conv2", "plain"])
def test_gradients_reach_every_head_and_nothing_else(head):
    model = make(head=head)
    every = model.all_exits(images())
    (every.logits.square().sum() + every.confidence.sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.heads.parameters())
    assert not any(p.grad is not None for p in model.backbone.parameters())


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


def test_heads_may_share_their_weights():
    model, x = make(), images()
    model.heads[1].confidence = model.heads[0].confidence
    model.heads[1].logits = model.heads[0].logits
    assert len(list(model.heads.parameters())) == 8
    assert_works(model, x, copy.deepcopy(model.backbone))
    model.all_exits(x).logits.sum().backward()
    twin = copy.deepcopy(model)
    assert twin.heads[1].logits is twin.heads[0].logits
    assert_works(pickle.loads(pickle.dumps(model)), x, copy.deepcopy(model.backbone))


# making


def test_exits_are_taken_in_order_of_execution():
    model = ptee.augment(Net(), exits=["pair", "stem", "body"], input_size=SIZE)
    assert [e.name for e in model.exits] == ["stem", "body", "pair"]
    assert model.costs == (*(e.cost for e in model.exits), model.plan.final_cost)


def test_a_new_model_is_in_eval_mode_on_its_backbones_device_with_thresholds_of_one_half():
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


def test_a_compiled_early_exit_model_is_one():
    model = made()
    data = TensorDataset(torch.rand(4, *model.plan.input_size))
    assert ptee.evaluate(torch.compile(model), data, speed=False) == ptee.evaluate(model, data, speed=False)


@pytest.mark.parametrize("images", [np.zeros((1, 3, 32, 32)), [1], None], ids=["numpy", "a list", "None"])
def test_images_that_are_no_tensor_are_refused_by_type(images):
    with pytest.raises(PteeError, match=f"a tensor .b, c, h, w., not as {type(images).__name__}"):
        made()(images)


@pytest.mark.parametrize("off", [None, 0.5, torch.tensor(1)], ids=str)
def test_exits_that_are_off_are_given_by_number(off):
    with pytest.raises(PteeError, match=r"Exits that are off are given by their numbers, such as .1., not as"):
        made().off = off
