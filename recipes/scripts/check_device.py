"""Does everything that early exits promise hold on this device? A few minutes, no network, random weights.

    python recipes/scripts/check_device.py --device cuda

Prints a line for each family, number type and promise, and ends with status 1 if one is broken.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
import traceback
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
from ptee._common.process import own_random_numbers
from ptee.analysis.arithmetic import tolerance
from ptee.analysis.verify import verify_cut_points
from ptee.model.early_exit import EarlyExitModel
from ptee.tuning.traces import record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from zoo import failure

CLASSES, ROWS, NOBODY, EVERYBODY = 10, 6, 2.0, 0.0  # the last two are thresholds
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


def noise(*size: int, rows: int = ROWS) -> Tensor:
    """Random images, the same each time, on the CPU."""
    return torch.randn(rows, *size, generator=torch.Generator().manual_seed(1), device="cpu")


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


def its_cuts_are_proven(model: EarlyExitModel, x: Tensor) -> None:
    """With rows leaving at each of them, the others get the right logits."""
    failed = verify_cut_points(copy.deepcopy(model).detach(), model.plan.cuts, model.plan.input_size)
    require(not failed, str(failed))


def above_one_all_get_the_backbones_answers(model: EarlyExitModel, x: Tensor) -> None:
    """Bit for bit."""
    require(torch.equal(model.predict(x, NOBODY).logits, model.backbone(x)), "other answers than the backbone's")


def rows_in_a_batch_are_answered_as_alone(model: EarlyExitModel, x: Tensor) -> None:
    """Wherever they leave, and what they cost is what torch counts."""
    require(not (wrong := failure(copy.deepcopy(model), x)), wrong)


def rows_leave_where_they_are_told_in_any_order(model: EarlyExitModel, x: Tensor) -> None:
    """Row i leaves at exit i, counted around; then the rows come in another order."""
    rows, exits = torch.arange(len(x), device=x.device), len(model.exits)
    want = rows % (exits + 1)
    thresholds = torch.where(torch.arange(exits, device=x.device) == want[:, None], EVERYBODY, NOBODY)
    every = model.all_exits(x).logits[want, rows]
    for order in (rows, rows.flip(0), rows.roll(2)):
        out = model.predict(x[order], thresholds[order])
        require(torch.equal(out.exit_index, want[order]), f"rows left at {out.exit_index.tolist()}")
        require_near(out.logits, every[order], "a row's answer")


def nobody_leaves_where_an_exit_is_off(model: EarlyExitModel, x: Tensor) -> None:
    """All go on to the next."""
    model.off = [0]
    try:
        require(set(model.predict(x, EVERYBODY).exit_index.tolist()) == {1}, "rows left at an exit that is off")
    finally:
        model.off = []


def inference_mode_changes_nothing(model: EarlyExitModel, x: Tensor) -> None:
    """Exits are made in it, and answer in it."""
    with torch.inference_mode():
        again = ptee.augment(model.backbone, num_exits=2, input_size=model.plan.input_size)
        require([e.name for e in again.exits] == [e.name for e in model.exits], "other exits in inference mode")
        require(len(again.predict(x)) == 4, "no answer")


def a_saved_model_answers_as_before(model: EarlyExitModel, x: Tensor) -> None:
    """Bit for bit, on the same device."""
    before = model.all_exits(x)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = ptee.load(folder, copy.deepcopy(model).detach())
    require(all(torch.equal(a, b) for a, b in zip(before, again.all_exits(x), strict=True)), "other answers")


def an_epoch_changes_the_heads_and_not_the_backbone(model: EarlyExitModel, x: Tensor) -> None:
    """And the traces that are recorded afterwards are what the model says."""
    images = noise(*model.plan.input_size, rows=32)
    data = TensorDataset(images, torch.arange(len(images), device="cpu") % CLASSES)
    before = [copy.deepcopy(part.state_dict()) for part in (model.backbone, model.heads)]
    history = ptee.train(model, data, data, epochs=1, batch_size=8, device=x.device)
    backbone, heads = (
        all(torch.equal(old[name], new) for name, new in part.state_dict().items())
        for old, part in zip(before, (model.backbone, model.heads), strict=True)
    )
    require(backbone, "the backbone changed")
    require(not heads, "no head changed")
    require(len(history.epochs) == 1, "no epoch is recorded")
    said = model.all_exits(images.to(x.device)).logits.argmax(-1).cpu()
    share = (record(model, data, batch_size=8).answers == said).double().mean().item()
    require(share > 0.9, f"traces say the same as the model for {share:.0%} of the images")


def a_front_network_and_learned_heads_serve(model: EarlyExitModel, x: Tensor) -> None:
    """A network of its own at the images, a head with convolutions behind."""
    front, backbone = network("timm/test_resnet", x.dtype, x.device), copy.deepcopy(model).detach()
    served = ptee.augment(backbone, front=front, num_exits=2, head="conv1", input_size=model.plan.input_size)
    require(set(served.predict(x, EVERYBODY).exit_index.tolist()) == {0}, "rows passed the front network")
    require(torch.equal(served.predict(x, NOBODY).logits, served.backbone(x)), "other answers than the backbone's")


Promise = Callable[[EarlyExitModel, Tensor], None]
PROMISES: tuple[Promise, ...] = (
    its_cuts_are_proven, above_one_all_get_the_backbones_answers, rows_in_a_batch_are_answered_as_alone,
    rows_leave_where_they_are_told_in_any_order, nobody_leaves_where_an_exit_is_off, inference_mode_changes_nothing,
    a_saved_model_answers_as_before,
)  # fmt: skip
OF_TRAINED: tuple[Promise, ...] = (
    an_epoch_changes_the_heads_and_not_the_backbone,
    a_front_network_and_learned_heads_serve,
)


def checks(family: str, name: str, device: torch.device) -> Iterator[tuple[str, str, float]]:
    """(promise, what is wrong or nothing, seconds) of a family in a number type, as they are found."""
    model, wrong, seconds = outcome(augmented, family, TYPES[name], device)
    yield "it gets exits", wrong, seconds
    if model is None:
        return
    for promise in PROMISES + (OF_TRAINED if family in TRAINED and name == "float32" else ()):
        _, wrong, seconds = outcome(kept, promise, model)
        yield promise.__name__.replace("_", " "), wrong, seconds


def augmented(family: str, dtype: torch.dtype, device: torch.device) -> EarlyExitModel:
    """A model of that family with two exits."""
    side = FAMILIES[family]
    return ptee.augment(network(family, dtype, device), num_exits=2, input_size=(3, side, side))


def kept(promise: Promise, model: EarlyExitModel) -> None:
    """Raises where a promise is broken; the model is as it was afterwards, but for training."""
    like = next(model.backbone.parameters())
    with own_random_numbers(), torch.no_grad():
        promise(model, noise(*model.plan.input_size).to(like.device, like.dtype))


def place_of(why: BaseException) -> str:
    """Where ptee's code was last when an error was raised, and where it came from."""
    frames = traceback.extract_tb(why.__traceback__)
    own = [frame for frame in frames if Path(ptee.__file__).parent in Path(frame.filename).parents]
    words = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in (*own[-1:], frames[-1])]
    return f" [{' <- '.join(dict.fromkeys(reversed(words)))}]"


def outcome(work: Callable[..., Any], *args: Any) -> tuple[Any, str, float]:
    """What came of it, what was wrong, and how many seconds it took."""
    start, done, wrong = time.perf_counter(), None, ""
    try:
        done = work(*args)
    except Exception as why:
        wrong = f"{type(why).__name__}: {' '.join(str(why).split())}{place_of(why)}"
    return done, wrong, time.perf_counter() - start


@click.command()
@click.option("--device", default="cuda", show_default=True, help="Such as cuda, cuda:1, mps or cpu.")
@click.option(
    "--family", "families", multiple=True, type=click.Choice([*FAMILIES]), help="Only this one; may be repeated."
)
@click.option("--type", "types", multiple=True, type=click.Choice([*TYPES]), help="Only this one; may be repeated.")
def main(device: str, families: tuple[str, ...], types: tuple[str, ...]) -> None:
    """Check every promise on a device, and print a table."""
    try:
        place = resolve_device(device)
    except ptee.PteeError as why:
        raise click.UsageError(str(why)) from why
    total = broken = 0
    for family in families or FAMILIES:
        for name in types or TYPES:
            for promise, wrong, seconds in checks(family, name, place):
                end = f"FAILED: {wrong}" if wrong else "ok"
                click.echo(f"{family:32} {name:9} {promise:46} {seconds:6.1f} s  {end}")
                total, broken = total + 1, broken + bool(wrong)
    click.echo(f"{total - broken} of {total} hold on {place}.")
    raise SystemExit(int(broken > 0))


if __name__ == "__main__":
    main()
