"""Whatever torch's default device and number type are, a model computes where it lies and gives the same.

Tensors on the meta device have no numbers: what ptee leaves to the default device would fail there, on any machine.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import slow
from device import here
from extras import needs_onnx
from safetensors.torch import save_file
from small import SIZE, labelled, made
from torch import Tensor
from torch.utils.data import TensorDataset

import ptee
from ptee.backbones.load import load_backbone

N = 40
HOW: dict[str, Any] = {"epochs": 2, "batch_size": 8, "precision": "no", "device": here()}


def images_of(data: TensorDataset) -> Tensor:
    return data.tensors[0].to(HOW["device"])


def heads(model: ptee.EarlyExitModel) -> list[Any]:
    return [value.tolist() for value in model.heads.state_dict().values()]


def augmented(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    backbone = model.detach()
    again = ptee.augment(backbone, exits=["0", "2"], head="res-8x1+", front=copy.deepcopy(backbone), input_size=SIZE)
    with torch.no_grad():
        return again.plan.to_dict(), again.predict(images_of(data), 0.3).logits.tolist()


def answered(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    x = images_of(data)
    every = model.all_exits(x)
    thresholds = [0.3, every.confidence[:-1].median(1).values.tolist(), every.confidence[:-1].T]
    return [part.tolist() for threshold in thresholds for part in model.predict(x, threshold)]


def trained(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path, **wish: Any) -> Any:
    ptee.train(model, data, data, **HOW, **wish)
    return heads(model)


def calibrated(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    return [(fit.scale, fit.shift) for fit in ptee.calibrate(model, data, target="right").exits]


def tuned(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    data = TensorDataset(images_of(data), model.bare(images_of(data)).argmax(-1))
    return [ptee.tune(model, data, **limit).to_dict() for limit in ({"max_drop": 0.1}, {"max_cost": 1.5})]


def evaluated(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    return ptee.evaluate(model, data, threshold=0.3, speed=False).to_dict()


def compared(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    return ptee.compare({"mine": model}, data, data, drops=[0.1], device=HOW["device"]).to_dict()


def saved(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    model.save_pretrained(folder)
    again = ptee.load(folder, model.detach())
    return heads(again)


def named(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    """A network that has a name, from a file of its weights, and the run of it."""
    folder.mkdir()
    weights = folder.parent / "weights.safetensors"
    if not weights.exists():
        with torch.device("cpu"):
            save_file(load_backbone("cifar_resnet8", pretrained=False).module.state_dict(), weights)
    torch.manual_seed(1)
    again = ptee.augment("cifar_resnet8", weights=weights, exits=["layer1"], head="pool")
    again.save_pretrained(folder / "run")
    opened = ptee.load(folder / "run").to(HOW["device"])
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float32, device=HOW["device"]).view(2, 3, 32, 32)
    with torch.no_grad():
        return heads(again), opened.predict(images, 0.3).logits.tolist()


def optimized(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    quick = ptee.optimize(model, max_batch=N, mode="eager")
    return [part.tolist() for part in quick.predict(images_of(data), 0.3)]


def exported(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path, format: str = "pt2") -> Any:
    runner = ptee.load_exported(ptee.export(model.cpu(), folder, format=format))
    images = data.tensors[0]
    return [part.tolist() for part in runner.predict(images if format == "pt2" else images.numpy(), 0.3)]


def watched(model: ptee.EarlyExitModel, data: TensorDataset, folder: Path) -> Any:
    ptee.tune(model, data, max_fidelity_drop=0.3)
    with model.monitor(audit=0.5, seed=0) as monitor:
        model.predict(images_of(data))
    so_far = monitor.as_dict()
    with model.monitor(audit=0.5, seed=0) as again:
        again.resume(so_far)
        model.predict(images_of(data))
    found = again.as_dict()
    return [found["audited"], found["differed"], [bet["capital"] for bet in found["test"]["bets"]]]


STEPS: dict[str, Callable[..., Any]] = {
    "exits": augmented,
    "answers": answered,
    "a training of views from a cache": lambda *given: trained(*given, views=3, cache=True),
    "a training of shifted maps": lambda *given: trained(*given, views=1, shift=1, cache=False),
    "a training with processes that read": lambda *given: trained(*given, cache=False, num_workers=1),
    "a calibration": calibrated,
    "thresholds": tuned,
    "results": evaluated,
    "a comparison": compared,
    "a saved model": saved,
    "a network that has a name": named,
    "an optimized model": optimized,
    "an exported model": exported,
    "an exported model, as ONNX": lambda *given: exported(*given, format="onnx"),
    "a monitor": watched,
}


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    """Meanwhile floating-point tensors are made in that type unless a type is given."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {"device": lambda: torch.device("meta"), "number type": bfloat16_by_default}
CASES = [
    (default, step) for default in DEFAULTS for step in STEPS if (default, "ONNX" in step) != ("number type", True)
]


def _marked(default: str, step: str) -> Any:
    """What takes longest is tried with one default alone."""
    if "ONNX" in step:
        return pytest.param(default, step, marks=[needs_onnx, pytest.mark.slow])
    with_number_type = ("a comparison", "a training with processes that read")
    twice = step == "an exported model" or (default == "number type" and step in with_number_type)
    return slow(default, step) if twice else (default, step)


@pytest.mark.parametrize(
    ("default", "step"),
    [_marked(*case) for case in CASES],
)
def test_it_gives_the_same_with_another_default(default, step, usual, tmp_path):
    """Many programs set a number type while they build networks, and a device for all that they do."""
    want = usual(step)
    torch.manual_seed(0)
    model, data = made("conv1"), images_with_labels()
    with DEFAULTS[default]():
        got = STEPS[step](model, data, tmp_path / "two")
    assert got == want


def images_with_labels() -> TensorDataset:
    images, labels = labelled(N)
    return TensorDataset(images.cpu(), labels.cpu())


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Callable[[str], Any]:
    """What each step gives with torch's own defaults."""

    @functools.cache
    def found(step: str) -> Any:
        torch.manual_seed(0)
        model, data = made("conv1"), images_with_labels()
        return STEPS[step](model, data, tmp_path_factory.mktemp("usual") / "one")

    return found
