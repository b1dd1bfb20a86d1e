"""Outputs are compared with exact arithmetic, and every switch that was set for it is restored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ptee
from ptee._common.errors import BackboneError, PteeError
from ptee.analysis.arithmetic import exact_arithmetic, keeps_rows_apart, tolerance

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SWITCHES = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]


def switches() -> dict[object, object]:
    """All switches that change the arithmetic, as they are now."""
    cudnn = torch.backends.cudnn
    precisions: dict[object, object] = {key: torch._C._get_fp32_precision_getter(*key) for key in SWITCHES}
    return precisions | {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}


@pytest.fixture
def as_before():
    """Restores the switches after a test."""
    cudnn, before = torch.backends.cudnn, switches()
    matmul, generic = torch.get_float32_matmul_precision(), torch._C._get_fp32_precision_getter("generic", "all")
    tf32 = cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32 = tf32  # torch keeps it apart from the new switches, and raises where they disagree
    torch._C._set_fp32_precision_setter("generic", "all", generic)
    cudnn.benchmark, cudnn.deterministic = before["benchmark"], before["deterministic"]
    for key in SWITCHES:
        if torch._C._get_fp32_precision_getter(*key) != before[key]:
            torch._C._set_fp32_precision_setter(*key, before[key])


def untouched() -> None:
    """Leave the switches as torch sets them."""


def general_switch() -> None:
    torch.backends.fp32_precision = "tf32"


def switches_of_operators() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def old_switches() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = True


def old_and_new_switches() -> None:
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # from here on, to read cudnn.allow_tf32 raises
    torch.set_float32_matmul_precision("medium")


def benchmarking() -> None:
    torch.backends.cudnn.benchmark = True


SETTINGS = [untouched, general_switch, switches_of_operators, old_switches, old_and_new_switches, benchmarking]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.__name__)
def test_float32_is_exact_inside_and_all_switches_are_restored_even_after_an_error(
    setting: Callable[[], None], as_before: None
) -> None:
    setting()
    before = switches()
    with pytest.raises(ZeroDivisionError), exact_arithmetic, exact_arithmetic:
        assert switches() == dict.fromkeys(SWITCHES, "ieee") | {"benchmark": False, "deterministic": True}
        raise ZeroDivisionError
    assert switches() == before


def test_switches_that_followed_the_general_one_follow_it_again(as_before: None) -> None:
    def followers(precision: str) -> set[object]:
        torch.backends.fp32_precision = precision
        now = switches()
        torch.backends.fp32_precision = "none"
        return {key for key in SWITCHES if now[key] == precision}

    before = followers("ieee")
    with exact_arithmetic:
        pass
    assert followers("ieee") == before


# ---------------------------------------------------------------------------------------------------- how near is equal


def test_less_exact_types_have_a_larger_tolerance() -> None:
    exact, single, half, brain = (
        tolerance(dtype, CPU) for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    )
    assert exact < single < half == brain


def test_a_device_that_rounds_float32_to_tf32_has_the_tolerance_of_half_precision(as_before: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert tolerance(torch.float32, GPU) == tolerance(torch.float16, GPU)
    assert tolerance(torch.float32, CPU) < tolerance(torch.float16, CPU)
    assert tolerance(torch.float64, GPU) == tolerance(torch.float64, CPU)
    with exact_arithmetic:
        assert tolerance(torch.float32, GPU) == tolerance(torch.float32, CPU)


def test_a_cpu_that_rounds_float32_to_bfloat16_has_the_tolerance_of_bfloat16(as_before: None) -> None:
    torch.set_float32_matmul_precision("medium")
    assert tolerance(torch.float32, CPU) == tolerance(torch.bfloat16, CPU)


# ---------------------------------------------------------------------------------------------------- rounding and mixed rows


class Rounding(nn.Module):
    """Like a GPU: its output depends on the number of rows by 1e-3, but not in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x * (1 + 1e-3 * (len(x) > 1))


class Mixing(nn.Module):
    """Adds a share of the batch's mean to every row: more than its type rounds."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1e-2 if x.dtype in (torch.float32, torch.float64) else 0.3) * x.mean(0, keepdim=True)


def net(part: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    stages = (nn.Conv2d(3, 6, 3), part, nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(6, 4)).to(dtype)


each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@each_type
def test_a_backbone_whose_rounding_depends_on_the_batch_gets_exits(dtype: torch.dtype) -> None:
    model = ptee.augment(net(Rounding(), dtype), exits=["0", "3"], input_size=(3, 8, 8))
    assert [e.name for e in model.exits] == ["0", "3"]


@each_type
def test_a_backbone_that_mixes_rows_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(BackboneError, match="its rows influence one another"):
        ptee.augment(net(nn.Sequential(Rounding(), Mixing()), dtype), exits=["0", "3"], input_size=(3, 8, 8))


def test_a_front_may_round_but_not_mix_rows() -> None:
    model = ptee.augment(net(nn.Identity()), exits=["3"], front=net(Rounding()), input_size=(3, 8, 8))
    assert [e.name for e in model.exits] == ["input", "3"]
    with pytest.raises(PteeError, match="its rows influence one another"):
        ptee.augment(net(nn.Identity()), exits=["3"], front=net(Mixing()), input_size=(3, 8, 8))


@pytest.mark.parametrize(("part", "apart"), [(Rounding(), True), (Mixing(), False)], ids=["rounding", "mixing"])
def test_float64_tells_rounding_from_mixed_rows(part: nn.Module, apart: bool) -> None:
    images = torch.randn(2, 5)
    assert keeps_rows_apart(part, images, lambda module, x: module(x)) is apart


def test_a_network_that_cannot_be_copied_is_compared_in_its_own_precision() -> None:
    class Alone(Rounding):
        def __deepcopy__(self, memo: object) -> Alone:
            raise TypeError("there is only one")

    assert not keeps_rows_apart(Alone(), torch.randn(2, 5), lambda module, x: module(x))
    with pytest.raises(BackboneError, match="its rows influence one another"):
        ptee.augment(net(Alone()), exits=["0"], input_size=(3, 8, 8))


def test_a_backbone_that_casts_to_float32_inside_gets_exits() -> None:
    class Casting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().sigmoid().to(x.dtype)

    model = ptee.augment(net(nn.Sequential(Rounding(), Casting())), exits=["0", "3"], input_size=(3, 8, 8))
    assert len(model.exits) == 2


def test_values_that_are_not_finite_are_not_taken_for_rounding() -> None:
    broken = net(nn.Identity())
    broken[0].weight.data.fill_(float("nan"))
    with pytest.raises(BackboneError, match="values that are not finite"):
        ptee.augment(broken, exits=["0"], input_size=(3, 8, 8))


def test_verification_computes_with_exact_arithmetic() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.deterministic)
            return x

    ptee.augment(net(Watching()), exits=["0"], input_size=(3, 8, 8))
    assert True in seen
