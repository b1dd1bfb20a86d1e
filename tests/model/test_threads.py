"""While one thread plans, measures or exports, others run the same network."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import slow
from device import here
from torch import Tensor, nn

import ptee
from ptee._common.process import own_random_numbers
from ptee.analysis.arithmetic import exact_arithmetic, tolerance
from ptee.backbones.load import load_backbone
from ptee.timing.backbone import time_of_modules
from ptee.timing.measure import measure

SIZE = (3, 8, 8)


class Crowded(nn.Module):
    """In the middle of each pass, another thread does something and is awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(4)])
        self.fc = nn.Linear(8, 5)
        self.meanwhile: Callable[[], Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.stem(x)))
        if self.meanwhile is not None and threading.current_thread() is threading.main_thread():
            with ThreadPoolExecutor(1) as other:
                other.submit(self.meanwhile).result(timeout=60)
        return self.fc(self.blocks[3](self.blocks[2](x)).mean((2, 3)))


def crowded() -> Crowded:
    with own_random_numbers(0):
        return Crowded().to(here()).eval()


def planned(net: Crowded, **options: Any) -> ptee.Plan:
    return ptee.plan(net, input_size=SIZE, exits="linear", num_exits=2, **options)


WORK: dict[str, Callable[[Crowded], Any]] = {
    "plans exits": lambda net: planned(net).exits,
    "plans exits by parameters": lambda net: planned(net, places_by="parameters").exits,
    "measures the modules": lambda net: list(
        time_of_modules(load_backbone(net, input_size=SIZE), here(), 2, rounds=1).shares
    ),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_pass_in_another_thread_is_whole_and_disturbs_nothing(work):
    net = crowded()
    model = ptee.augment(net, input_size=SIZE, exits=["blocks.0"], head="pool")
    images = torch.randn(6, *SIZE)
    features = torch.randn(2, 8)
    never = [True, False, True, False, False, False]
    thresholds = torch.tensor(never)[:, None] * 2.0
    with exact_arithmetic:  # in which a GPU computes for all threads while one plans
        want, alone = net(images), model.predict(images, thresholds)
    result = work(net)
    near = tolerance(images.dtype, images.device)
    answers = []
    net.meanwhile = lambda: answers.append((net.fc(features), net(images), model.predict(images, thresholds)))
    with torch.no_grad():
        assert work(net) == result
    assert answers
    for _, bare, left in answers:
        torch.testing.assert_close(bare, want, rtol=near, atol=near)
        assert torch.equal(left.exit_index, alone.exit_index)
        torch.testing.assert_close(left.logits, alone.logits, rtol=near, atol=near)


def test_a_pass_in_another_thread_goes_on_where_that_of_a_benchmark_ends():
    net = crowded()
    model = ptee.augment(net, input_size=SIZE, exits=["blocks.3"], head="pool")
    images = torch.randn(2, *SIZE)
    want, begun, answers = net(images), [], []
    net.meanwhile = lambda: (begun.append(1), answers.append(net(images)))
    measure(model, [2], rounds=1)
    assert len(answers) == len(begun) > 0
    assert all(torch.equal(answer, want) for answer in answers)


CAPTURES = {
    "is exported": lambda model, folder: ptee.export(model, folder / "out"),
    "is optimised": lambda model, _: ptee.optimize(model, max_batch=2),
}


def keep_what_cannot_be_copied(net: Crowded) -> None:
    net.kept, net.blocks[0].kept = threading.Lock(), [threading.Lock()]
    net.blocks[1].kept, net.blocks[2].kept = (n for n in range(3)), torch.ones(2, requires_grad=True) * 2


@pytest.mark.cpu("a GPU is no place for an export")
@pytest.mark.parametrize("copies", [slow(True, id="and can be copied"), pytest.param(False, id="and cannot be copied")])
@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
def test_a_model_answers_while_it(capture, copies, tmp_path):
    net = crowded()
    if not copies:
        keep_what_cannot_be_copied(net)
    model = ptee.augment(net, input_size=SIZE, exits=["blocks.0"], head="pool")
    images = torch.randn(6, *SIZE)
    want, alone, answers = net(images), model.predict(images), []
    net.meanwhile = lambda: answers.append((net(images), model.predict(images), model.all_exits(images)))
    capture(model, tmp_path)
    assert answers
    for bare, left, _ in answers:
        torch.testing.assert_close(bare, want)
        torch.testing.assert_close(left.logits, alone.logits)


@pytest.mark.cpu("a GPU is no place for an export")
@pytest.mark.slow
def test_an_export_leaves_a_front_network_frozen(tmp_path):
    front = crowded()
    model = ptee.augment(crowded(), front=front, input_size=SIZE, exits=["blocks.0"], head="pool")
    ptee.export(model, tmp_path / "out")
    gc.collect()
    assert not any(p.requires_grad for p in [*front.parameters(), *model.backbone.parameters()])


class Closed(Crowded):
    """Runs by a function that holds the network itself, as one that a user puts in place of forward does. A copy runs the original."""

    def __init__(self) -> None:
        super().__init__()
        own = self
        self.forward = lambda x: Crowded.forward(own, x)


@pytest.mark.cpu("a GPU is no place for an export")
def test_rows_leave_a_captured_model_whose_copy_would_run_the_original(tmp_path):
    with own_random_numbers(0):
        net = Closed().eval()
    model = ptee.augment(net, input_size=SIZE, exits=["blocks.0"], head="pool")
    images = torch.randn(6, *SIZE)
    threshold = model.all_exits(images).confidence[0].median().item()
    wanted = model.predict(images, threshold)
    exported = ptee.load_exported(ptee.export(model, tmp_path / "out"))
    for captured in (ptee.optimize(model, mode="eager", max_batch=6), exported):
        answers = captured.predict(images, threshold)
        assert answers.exit_index.tolist() == wanted.exit_index.tolist()
        torch.testing.assert_close(answers.logits, wanted.logits)
    assert {*wanted.exit_index.tolist()} == {0, 1}
