"""Verification: rows leave at a cut point, and a wrong logit of the others is noticed and explained."""

from __future__ import annotations

import contextlib
import random
import re
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchvision
from awkward import REAL_SIZE, SIZE, Applying, InPlace, Net, Two, conv, each_network, hooks, real
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import ptee
from ptee._common.errors import BackboneError, PteeError
from ptee.analysis.cut_points import Cut, survey
from ptee.analysis.verify import require_same_in_large_batches, verify_cut_points

# ---------------------------------------------------------------------------------------------------- what only verification sees


class BatchSize(Two):
    """Keeps the number of rows in a Python variable."""

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        return self.two(self.one(x)).view(rows, 8, 8, 8)


class BatchSizeInValues(Two):
    """With fewer rows its shapes are right, but its values are scaled wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        x = self.two(self.one(x))
        return x * (rows / len(x))


class SkipThroughNumpy(Two):
    """A skip connection that torch does not see."""

    def forward(self, x: Tensor) -> Tensor:
        before = x.numpy(force=True).copy()
        return self.two(self.one(x)) + torch.from_numpy(before).to(x.device)


class Halves(nn.Module):
    """One half of the channels passes through `first`, the other around it, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        return torch.cat([self.first(left), self.second(right)], 1)


class Remembering(Two):
    """Keeps values of the rows in a Python list. With fewer rows it uses the values of the wrong ones."""

    def forward(self, x: Tensor) -> Tensor:
        scales = x.mean((1, 2, 3)).tolist()
        x = self.one(x)
        return self.two(x * torch.tensor(scales[: len(x)]).view(-1, 1, 1, 1))


SEEN_BY_VERIFICATION = {
    "a batch size kept in Python": (BatchSize, "part.one", "fails with fewer rows .RuntimeError"),
    "a batch size that scales the values": (BatchSizeInValues, "part.two", "the logits are off by"),
    "a skip connection through numpy": (SkipThroughNumpy, "part.one", "fails with fewer rows"),
    "another view of the same memory": (Halves, "part.first", "fails with fewer rows"),
    "values kept in Python": (Remembering, "part.one", "the logits are off by"),
}


# Values of the batch that Python keeps, unseen by torch, are wrong also when the pass starts again.
VALUES_LOST = {"a skip connection through numpy", "values kept in Python"}


@pytest.mark.parametrize("case", SEEN_BY_VERIFICATION)
def test_verification_finds_what_the_survey_missed_and_a_pass_that_starts_again_mends_it(case):
    part, name, reason = SEEN_BY_VERIFICATION[case]
    net = Net(part())
    found = survey(net, SIZE)
    failed = verify_cut_points(net, [found.cuts["entry"], found.cuts[name], found.cuts["part"]], SIZE)
    assert list(failed) == [name], "the cuts before and after it are good"
    assert re.search(reason, failed[name])
    cuts = [replace(found.cuts[name], steps=found.steps[name]), found.cuts["part"]]
    assert list(verify_cut_points(net, cuts, SIZE)) == ([name] if case in VALUES_LOST else [])
    assert not any("forward" in vars(module) for module in net.modules()), "the network is as it was"


class FixedAnswer(nn.Module):
    """Always returns logits for as many rows as it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        answer = torch.zeros(len(x), 5)
        vectors = self.inner(x).mean((2, 3))
        answer[: len(vectors)] = vectors
        return answer


def test_a_network_that_still_returns_logits_for_all_rows_is_noticed():
    net = FixedAnswer().eval()
    failed = verify_cut_points(net, [survey(net, SIZE).cuts["inner"]], SIZE)
    assert re.search(r"still answers with shape \(\d, 5\)", failed["inner"])


class Beside(Two):
    """Gives what it was given beside its output."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, self.two(self.one(x))]


class Outer(nn.Module):
    def __init__(self, read: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.inner, self.read = Beside(), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.inner(x))


def test_rows_leave_inside_and_behind_a_module_that_gives_back_its_input_which_nobody_reads():
    net = Net(Outer(lambda both: both[1].relu()))
    model = ptee.augment(net, exits=["part.inner.one", "part.inner"], head="pool", input_size=SIZE)
    x, leaves = torch.randn(3, *SIZE), torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    with torch.no_grad():
        out = model.predict(x, leaves)
        alone = torch.cat([model.predict(x[i : i + 1], leaves[i : i + 1]).logits for i in range(3)])
    assert out.exit_index.tolist() == [0, 1, 2]
    assert torch.allclose(out.logits, alone, atol=1e-5)


def test_of_a_tensor_that_nobody_reads_the_number_of_rows_may_be_read():
    net = Net(Outer(lambda both: both[1].view(len(both[0]), 8, 8, 8)))
    assert verify_cut_points(net, [survey(net, SIZE).cuts["part.inner"]], SIZE) == {}


def test_cuts_that_pass_alone_and_not_together_fail():
    net = Net(Outer(lambda both: both[1].relu()))
    cuts = survey(net, SIZE).cuts
    both = [cuts["part.inner.one"], replace(cuts["part.inner"], carried=(0, 1), unread=())]
    assert [verify_cut_points(net, [cut], SIZE) for cut in both] == [{}, {}]
    assert verify_cut_points(net, both, SIZE).keys() == {"part.inner"}


# ---------------------------------------------------------------------------------------------------- rows must be independent


OWN_NUMBERS = random.Random()
UNUSABLE = {
    "subtracts the batch's mean": (lambda x: x - x.mean(0, keepdim=True), "influence one another"),
    "batch norm without statistics": (nn.BatchNorm2d(8, track_running_stats=False), "influence one another"),
    "random numbers of its own": (lambda x: x * OWN_NUMBERS.random(), r"random in eval mode .*self\.training"),
    "not a number": (lambda x: x / (x - x), "values that are not finite"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("name", ["entry", "part"], ids=["cut before", "cut after"])
def test_an_unusable_network_is_refused_with_the_reason(case, name):
    function, message = UNUSABLE[case]
    net = Net(Applying(function))
    cut = survey(net, SIZE).cuts[name]
    with pytest.raises(BackboneError, match=f"Net answers .*{message}"):
        verify_cut_points(net, [cut], SIZE)


class SortsRows(nn.Module):
    """Each row gets its own answer in any batch. Between `first` and `last` the rows stand in the order of their values."""

    def __init__(self, descending: bool) -> None:
        super().__init__()
        self.first, self.between, self.last, self.descending = conv(), conv(), conv(), descending

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        order = x.mean((1, 2, 3)).argsort(descending=self.descending)
        return self.last(self.between(x[order])[order.argsort()])


@pytest.mark.parametrize("descending", [False, True])
def test_no_rows_leave_where_the_code_has_put_them_in_the_order_of_their_values(descending):
    net = Net(SortsRows(descending))
    entry = survey(net, SIZE).cuts["entry"]
    cuts = [replace(entry, name=name) for name in ("part.first", "part.between", "part.last")]
    assert {"part.between"} <= verify_cut_points(net, cuts, SIZE).keys() <= {"part.first", "part.between"}


WHOLE_BATCH = {
    "bytes or shares": lambda x: x / 255 if x.max() > 1 else x,
    "bytes or shares, lower": lambda x: x if x.abs().max() < 1 else x / x.new_tensor(255),
    "divided by the largest": lambda x: x / x.max(),
}


@pytest.mark.parametrize("case", WHOLE_BATCH)
def test_code_that_looks_at_the_values_of_the_whole_batch_is_refused(case):
    net = nn.Sequential(Applying(WHOLE_BATCH[case]), Net(conv())).eval()
    cuts = survey(net, SIZE).cuts
    with pytest.raises(BackboneError, match="its rows influence one another"):
        verify_cut_points(net, [cuts["1.entry"], cuts["1.part"]], SIZE)


def test_no_exit_stands_where_a_row_has_values_of_others_that_no_answer_shows():
    """The norm behind it divides by each row's own scale, so that the scale of the batch is gone."""
    net = Net(nn.Sequential(Applying(lambda x: x / x.abs().max()), nn.GroupNorm(1, 8, eps=0.0)))
    cuts = survey(net, SIZE).cuts
    failed = verify_cut_points(net, [cuts[name] for name in ("entry", "part.0", "part.1")], SIZE)
    assert failed.keys() == {"part.0"}
    assert "other images" in failed["part.0"]


def test_nan_that_other_images_cause_and_no_answer_shows_is_noticed_behind_a_cut_that_passes():
    widened = Applying(lambda x: torch.cat([x, x[:, :1] * (float("nan") if len(x) > 1 else 1.0)], 1))
    net = Net(nn.Sequential(widened, Applying(lambda x: x[:, :8])))
    cuts = survey(net, SIZE).cuts
    assert verify_cut_points(net, [cuts["entry"], cuts["part.0"]], SIZE).keys() == {"part.0"}


class RoundsAFew(nn.Module):
    """As code that casts to half precision does: of the last bits that a batch changes, a few make a whole step of it.

    It cannot compute in float64, where such bits would be gone.
    """

    def forward(self, x: Tensor) -> Tensor:
        step = torch.zeros_like(x[0])
        step[0, 0, 0] = 1e-3 * (len(x) > 1)
        return (x * (1 + step)).float()


def test_a_few_values_that_are_rounded_otherwise_in_a_batch_are_no_values_of_other_images():
    net = Net(RoundsAFew())
    assert verify_cut_points(net, [survey(net, SIZE).cuts["part"]], SIZE) == {}


def other_for_groups_of(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x * 1.5 if len(x) % rows == 0 else x


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("cuts", [["1"], ["1", "3"], ["1", "3", "5"]], ids=["one cut", "two cuts", "three cuts"])
def test_code_that_treats_an_even_number_of_rows_otherwise_is_refused(cuts, where):
    parts = [conv(3, 8), conv(), nn.Identity(), conv(), nn.Identity(), conv(), nn.Identity()]
    parts[2 * where] = nn.Sequential(parts[2 * where], Applying(other_for_groups_of(2)))
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()
    found = survey(net, SIZE).cuts
    with pytest.raises(BackboneError, match="influence one another"):
        verify_cut_points(net, [found[name] for name in cuts], SIZE)


@pytest.mark.parametrize("rows", [3, 4, 8, 16])
def test_code_that_treats_whole_groups_of_rows_otherwise_is_refused(rows):
    net = Net(Applying(other_for_groups_of(rows)))
    cut = survey(net, (3, 64, 64)).cuts["entry"]
    with pytest.raises(BackboneError, match="influence one another"):
        require_same_in_large_batches(net, cut, (3, 64, 64), 10**9)


def mixes_above(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x - x.mean(0) if len(x) > rows else x


@pytest.mark.parametrize(("pixels", "macs"), [(16, 10**6), (64, 10**9), (224, 10**9)])
def test_code_that_mixes_rows_of_large_batches_is_refused(pixels, macs):
    size, nets = (3, pixels, pixels), [Net(Applying(mixes_above(rows))) for rows in (8, 32, 64)]
    for net, refused in zip(nets, (True, True, False), strict=True):
        cut = survey(net, size).cuts["entry"]
        with pytest.raises(BackboneError, match="influence one another") if refused else contextlib.nullcontext():
            require_same_in_large_batches(net, cut, size, macs)


rows_seen: list[int] = []  # outside of the network, because a copy of it is tried


class OfOneSize(Net):
    """Takes one size of images, or makes it of others, and notes how many images it gets."""

    def __init__(self, part: nn.Module, resizes: bool) -> None:
        super().__init__(part)
        self.resizes = resizes

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            rows_seen.append(len(x))
        if self.resizes:
            x = nn.functional.interpolate(x, (64, 64))
        if x.shape[-1] != 64:
            raise ValueError("64 pixels")
        return super().forward(x)


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize(("macs", "tried"), [(10**9, False), (10**6, True)], ids=["large", "very small"])
def test_a_large_batch_of_full_size_is_tried_only_where_it_costs_little(resizes, macs, tried):
    net = OfOneSize(conv(), resizes)
    found = survey(net, (3, 64, 64))
    rows_seen.clear()
    require_same_in_large_batches(net, found.cuts["entry"], (3, 64, 64), macs, found.operators)
    assert (max(rows_seen) > 30) == tried


SIZE_OF_BATCH = {
    "mixes": mixes_above,
    "scales": lambda rows: lambda x: x * (0.5 if len(x) > rows else 1.0),
}


@pytest.mark.parametrize("resizes", [False, True])
@pytest.mark.parametrize("case", SIZE_OF_BATCH)
def test_code_for_large_batches_is_found_in_a_network_that_takes_one_size_of_images(case, resizes):
    for rows, refused in ((8, True), (16, True), (32, True), (64, False)):
        net = OfOneSize(Applying(SIZE_OF_BATCH[case](rows)), resizes)
        found = survey(net, (3, 64, 64))
        with pytest.raises(BackboneError, match="influence one another") if refused else contextlib.nullcontext():
            require_same_in_large_batches(net, found.cuts["entry"], (3, 64, 64), 10**9, found.operators)


# ---------------------------------------------------------------------------------------------------- rows are told apart


class WrongRows(Cut):
    """A wrong cut: it keeps the right number of rows, but the wrong ones."""

    def select(self, output, rows):
        return super().select(output, rows - 1)


def broken(cut: Cut) -> WrongRows:
    return WrongRows(**vars(cut))


def nearly_constant(spread: float) -> nn.Module:
    """A network whose logits are about 1 and differ from image to image by about `spread`."""
    net = Net(nn.ReLU())
    with torch.no_grad():
        net.classifier.weight.mul_(spread)
        net.classifier.bias.fill_(1)
    return net


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-5, 1e-8])
def test_wrong_rows_are_noticed_even_if_float32_cannot_tell_the_rows_apart(spread):
    net = nearly_constant(spread)
    cut = survey(net, SIZE).cuts["entry"]
    assert verify_cut_points(net, [cut], SIZE) == {}
    assert "off by" in verify_cut_points(net, [broken(cut)], SIZE)["entry"]


@pytest.mark.parametrize(
    ("name", "bias"),
    [("efficientnet_b0", 0), ("mobilenet_v2", 0), ("mobilenet_v2", 0.05)],
    ids=["efficientnet_b0", "mobilenet_v2", "mobilenet_v2 with a bias in its classifier"],
)
def test_wrong_rows_are_noticed_in_an_untrained_torchvision_network(name, bias):
    net = getattr(torchvision.models, name)(num_classes=5).eval()
    nn.init.uniform_(net.classifier[-1].bias, -bias, bias)  # its answers differ by 1e-9
    cut = survey(net, (3, 32, 32)).cuts["features.2"]
    assert verify_cut_points(net, [cut], (3, 32, 32)) == {}
    assert "off by" in verify_cut_points(net, [broken(cut)], (3, 32, 32)).get("features.2", "nothing noticed")


def test_a_nearly_constant_network_that_cannot_be_copied_is_verified_in_its_own_precision():
    net = nearly_constant(1e-8)
    net.lock = threading.Lock()
    assert verify_cut_points(net, [survey(net, SIZE).cuts["entry"]], SIZE) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_cut_points_are_found_and_verified_in_other_precisions(dtype):
    net = Net(InPlace()).to(dtype)
    cut = survey(net, SIZE).cuts["part.one"]
    assert verify_cut_points(net, [cut], SIZE) == {}
    assert verify_cut_points(net, [broken(cut)], SIZE)


# ---------------------------------------------------------------------------------------------------- real networks, and no trace


@each_network
def test_every_cut_point_of_a_real_network_passes_verification(name):
    net, found = real(name)
    assert len(found.cuts) > 5
    assert verify_cut_points(net, list(found.cuts.values()), REAL_SIZE) == {}


@each_network
def test_one_wrong_cut_point_among_many_is_found(name):
    net, found = real(name)
    cuts = list(found.cuts.values())
    place = len(cuts) // 2
    failed = verify_cut_points(net, [*cuts[:place:3], broken(cuts[place]), *cuts[place + 1 :: 3]], REAL_SIZE)
    assert list(failed) == [cuts[place].name]


def fails_with_fewer_rows(x: Tensor) -> Tensor:
    if len(x) == 2:
        raise ZeroDivisionError("on purpose")
    return x


@pytest.mark.parametrize("part", [InPlace, BatchSize, lambda: Applying(fails_with_fewer_rows)])
def test_verification_leaves_no_hook(part):
    net = Net(part())
    cuts = list(survey(net, SIZE).cuts.values())
    with contextlib.suppress(PteeError):
        verify_cut_points(net, cuts, SIZE)
    assert hooks(net) == 0
