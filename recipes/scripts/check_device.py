"""Does everything that early exits promise hold on this device? A few minutes, no network, random weights.

    python recipes/scripts/check_device.py --device cuda

Prints a line for each family, number type and promise, and ends with status 1 if one is broken.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import ptee
from ptee._common.devices import resolve_device
from ptee.analysis.arithmetic import tolerance
from ptee.evaluation.traces import record
from ptee.model.early_exit import EarlyExitModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from zoo import failure

CLASSES, ROWS, NOBODY, EVERYBODY = 10, 6, 2.0, 0.0
FAMILIES: dict[str, int] = {  # and the side of their images
    "timm/test_resnet": 64, "timm/test_convnext": 64, "timm/test_efficientnet": 64, "timm/test_vit": 160, "timm/resnet18": 64,
    "torchvision/mobilenet_v3_small": 64, "torchvision/densenet121": 64, "torchvision/swin_t": 64,
    "timm/vit_small_patch16_224": 224, "timm/gcvit_xxtiny": 224,
    "timm/pit_ti_224": 224, "timm/coat_tiny": 224,  # where rows leave, their forward pass begins anew
}  # fmt: skip
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TRAINED = ("timm/test_resnet", "timm/test_vit")  # in float32


def network(family: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network of that family with random weights."""
    torch.manual_seed(0)
    library, _, name = family.partition("/")
    make = timm.create_model if library == "timm" else torchvision.models.get_model
    return make(name, num_classes=CLASSES).eval().to(device, dtype)


def noise(family: str, like: EarlyExitModel) -> Tensor:
    """Random images, the same each time."""
    parameter = next(like.backbone.parameters())
    images = torch.randn(
        ROWS, 3, FAMILIES[family], FAMILIES[family], generator=torch.Generator().manual_seed(1), device="cpu"
    )
    return images.to(parameter.device, parameter.dtype)


def labelled(family: str, rows: int = 32) -> TensorDataset:
    """Images on the CPU, as a data set gives them, and labels."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(rows, 3, FAMILIES[family], FAMILIES[family], generator=generator, device="cpu")
    return TensorDataset(images, torch.randint(CLASSES, (rows,), generator=generator, device="cpu"))


def require(holds: bool, otherwise: str) -> None:
    """A promise that is broken is an error."""
    if not holds:
        raise AssertionError(otherwise)


def require_near(got: Tensor, expected: Tensor, what: str) -> None:
    """Answers may lie apart by what this device and type round."""
    allowed = tolerance(expected.dtype, expected.device) * max(1.0, expected.abs().max().item())
    gap = (got - expected).abs().max().item()
    require(gap <= allowed, f"{what}: off by {gap:.1e}, allowed are {allowed:.1e}")


# ---------------------------------------------------------------------------------------------------- the promises


def above_one_all_get_the_backbones_answers(model: EarlyExitModel, x: Tensor, _: str) -> None:
    """Bit for bit."""
    require(torch.equal(model.predict(x, NOBODY).logits, model.backbone(x)), "other answers than the backbone's")


def rows_in_a_batch_are_answered_as_alone(model: EarlyExitModel, x: Tensor, _: str) -> None:
    """Wherever they leave, and what they cost is what torch counts."""
    require(not (wrong := failure(copy.deepcopy(model), x)), wrong)


def each_row_has_its_own_thresholds(model: EarlyExitModel, x: Tensor, _: str) -> None:
    """Row i leaves at exit i, counted around."""
    exits = len(model.exits)
    want = torch.arange(len(x), device=x.device) % (exits + 1)
    thresholds = torch.where(torch.arange(exits, device=x.device) == want[:, None], EVERYBODY, NOBODY)
    out, every = model.predict(x, thresholds), model.all_exits(x)
    require(out.exit_index.tolist() == want.tolist(), f"rows left at {out.exit_index.tolist()}")
    require_near(out.logits, every.logits[want, torch.arange(len(x), device=x.device)], "a row's answer")


def nobody_leaves_where_an_exit_is_off(model: EarlyExitModel, x: Tensor, _: str) -> None:
    """All go on to the next."""
    model.off = [0]
    try:
        require(set(model.predict(x, EVERYBODY).exit_index.tolist()) == {1}, "rows left at an exit that is off")
    finally:
        model.off = []


def inference_mode_changes_nothing(model: EarlyExitModel, x: Tensor, family: str) -> None:
    """Exits are made in it, and answer in it."""
    with torch.inference_mode():
        again = ptee.augment(model.backbone, num_exits=2, input_size=tuple(x.shape[1:]))
        require([e.name for e in again.exits] == [e.name for e in model.exits], "other exits in inference mode")
        require(len(again.predict(x)) == 4, "no answer")


def a_saved_model_answers_as_before(model: EarlyExitModel, x: Tensor, _: str) -> None:
    """Bit for bit, on the same device."""
    before = model.all_exits(x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = ptee.load(folder, copy.deepcopy(model).detach())
    require(all(torch.equal(a, b) for a, b in zip(before, again.all_exits(x), strict=True)), "other answers")


def heads_learn_and_traces_are_what_predict_says(model: EarlyExitModel, x: Tensor, family: str) -> None:
    """One epoch; the backbone stays as it is, bit for bit."""
    data, device = labelled(family), x.device
    before, heads = copy.deepcopy(model.backbone.state_dict()), copy.deepcopy(model.heads.state_dict())
    history = ptee.train(model, data, data, epochs=1, batch_size=8, device=device)
    require(
        all(torch.equal(a, b) for a, b in zip(before.values(), model.backbone.state_dict().values(), strict=True)),
        "the backbone changed",
    )
    require(
        any(not torch.equal(a, b) for a, b in zip(heads.values(), model.heads.state_dict().values(), strict=True)),
        "no head changed",
    )
    require(len(history.epochs) == 1, "no epoch is recorded")
    traces = record(model, data, batch_size=8)
    said = model.all_exits(data.tensors[0].to(device)).logits.argmax(-1).cpu()
    require((traces.answers == said).float().mean().item() > 0.9, "traces say something else than the model")


def a_front_and_learned_heads_serve(model: EarlyExitModel, x: Tensor, family: str) -> None:
    """A network of its own at the images, a head with convolutions behind."""
    small = network("timm/test_resnet", x.dtype, x.device)
    backbone = copy.deepcopy(model).detach()
    served = ptee.augment(backbone, front=small, num_exits=2, head="conv1", input_size=tuple(x.shape[1:]))
    require(set(served.predict(x, EVERYBODY).exit_index.tolist()) == {0}, "rows passed the front")
    require(torch.equal(served.predict(x, NOBODY).logits, served.backbone(x)), "other answers than the backbone's")


Promise = Callable[[EarlyExitModel, Tensor, str], None]
PROMISES: tuple[Promise, ...] = (
    above_one_all_get_the_backbones_answers, rows_in_a_batch_are_answered_as_alone, each_row_has_its_own_thresholds,
    nobody_leaves_where_an_exit_is_off, inference_mode_changes_nothing, a_saved_model_answers_as_before,
)  # fmt: skip
OF_TRAINED: tuple[Promise, ...] = (heads_learn_and_traces_are_what_predict_says, a_front_and_learned_heads_serve)


def checks(
    families: tuple[str, ...], types: tuple[str, ...], device: torch.device
) -> Iterator[tuple[str, str, str, str, float]]:
    """(family, type, promise, what is wrong or nothing, seconds), as they are found."""
    for family in families:
        for name in types:
            start = time.perf_counter()
            model, wrong = outcome(augmented, family, TYPES[name], device)
            yield family, name, "it gets exits", wrong, time.perf_counter() - start
            if model is None:
                continue
            more = OF_TRAINED if family in TRAINED and name == "float32" else ()
            for promise in PROMISES + more:
                start = time.perf_counter()
                _, wrong = outcome(kept, promise, model, family)
                yield family, name, promise.__name__.replace("_", " "), wrong, time.perf_counter() - start


def augmented(family: str, dtype: torch.dtype, device: torch.device) -> EarlyExitModel:
    """A model of that family with two exits."""
    side = FAMILIES[family]
    return ptee.augment(network(family, dtype, device), num_exits=2, input_size=(3, side, side))


def kept(promise: Promise, model: EarlyExitModel, family: str) -> None:
    """Raises where a promise is broken; the model is as it was afterwards, but for training."""
    with torch.random.fork_rng(), torch.no_grad():
        promise(model, noise(family, model), family)


def outcome(work: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """What came of it, and what was wrong."""
    try:
        return work(*args), ""
    except Exception as why:
        return None, f"{type(why).__name__}: {' '.join(str(why).split())}"


@click.command()
@click.option("--device", default="cuda", show_default=True, help="Such as cuda, cuda:1, mps or cpu.")
@click.option(
    "--family", "families", multiple=True, type=click.Choice([*FAMILIES]), help="Only this one; may be repeated."
)
@click.option("--type", "types", multiple=True, type=click.Choice([*TYPES]), help="Only this one; may be repeated.")
def main(device: str, families: tuple[str, ...], types: tuple[str, ...]) -> None:
    """Check every promise on a device, and print a table."""
    place = resolve_device(device)
    total = broken = 0
    for family, name, promise, wrong, seconds in checks(families or tuple(FAMILIES), types or tuple(TYPES), place):
        click.echo(f"{family:32} {name:9} {promise:46} {seconds:6.1f} s  {'FAILED: ' + wrong if wrong else 'ok'}")
        total, broken = total + 1, broken + bool(wrong)
    click.echo(f"{total - broken} of {total} hold on {place}.")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
