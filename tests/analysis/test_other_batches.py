"""An image gets the same answer at any place in any batch, or the network is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from awkward import SIZE, Applying, Net, Two, conv
from torch import Tensor, nn

from ptee._common.errors import BackboneError
from ptee.analysis.cut_points import survey
from ptee.analysis.verify import require_same_in_large_batches, verify_cut_points


def in_row(row: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x[:row], x[row : row + 1] + x.mean(0, keepdim=True) - x[row : row + 1], x[row + 1 :]])


def once_more_if(anything: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * 1.5 if anything(x) else x


PARTS_OF_A_BATCH = {
    "the first row": in_row(0),
    "the third row": in_row(2),
    "the first half": lambda x: torch.cat([x[: len(x) // 2] - x[: len(x) // 2].mean(0), x[len(x) // 2 :]]),
    "an odd number of rows": once_more_if(lambda x: len(x) > 1 and len(x) % 2),
    "five rows": once_more_if(lambda x: len(x) % 5 == 0),
    "seven rows": once_more_if(lambda x: len(x) % 7 == 0),
    "the rest of groups of four": lambda x: torch.cat([x[: len(x) // 4 * 4 or 1], 2 * x[len(x) // 4 * 4 or 1 :]]),
    "values that only strong images have": lambda x: torch.where(x.abs() > 0.3, x.max(), x),
    "all images strong": once_more_if(lambda x: (x.abs().amax((1, 2, 3)) > 2).all()),
    "all images faint": once_more_if(lambda x: (x.abs().amax((1, 2, 3)) < 1).all()),
    "one bright image": once_more_if(lambda x: (x.abs() > 100).any()),
    "one image of zeros": once_more_if(lambda x: len(x) > 1 and (x.std((2, 3)) < 1e-4).any()),
    "an image twice": once_more_if(lambda x: len(x.flatten(1).unique(dim=0)) < len(x)),
}


@pytest.mark.parametrize("case", PARTS_OF_A_BATCH)
def test_code_that_treats_some_rows_or_some_batches_otherwise_is_refused(case):
    net = Net(Applying(PARTS_OF_A_BATCH[case]))
    cut = survey(net, (3, 64, 64)).cuts["entry"]
    with pytest.raises(BackboneError, match="influence one another"):
        require_same_in_large_batches(net, cut, (3, 64, 64), 10**9)


class Bounded(nn.Module):
    """Takes no bright images."""

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 30:
            raise ValueError("too bright")
        return x


def test_a_network_that_takes_no_bright_images_is_not_refused():
    net = nn.Sequential(Bounded(), Net(conv())).eval()
    cut = survey(net, (3, 64, 64)).cuts["1.entry"]
    require_same_in_large_batches(net, cut, (3, 64, 64), 10**9)


@pytest.mark.parametrize("row", [0, -1], ids=["the first row", "the last row"])
def test_no_exit_stands_where_one_row_has_values_of_others_that_no_answer_shows(row):
    def scale(x: Tensor) -> Tensor:
        scales = torch.ones(len(x), 1, 1, 1)
        scales[row] = x.abs().mean() / x[row].abs().mean()
        return x / scales

    net = Net(nn.Sequential(Applying(scale), nn.GroupNorm(1, 8, eps=0.0)))
    cuts = survey(net, SIZE).cuts
    assert verify_cut_points(net, [cuts[name] for name in ("entry", "part.0", "part.1")], SIZE).keys() == {"part.0"}


def test_what_heads_read_of_a_row_is_compared_also_where_cuts_fail_only_together():
    mixes = Applying(lambda x: x / x.abs().max() if len(x) >= 6 else x)
    net = Net(nn.Sequential(mixes, nn.GroupNorm(1, 8, eps=0.0)))
    cuts = [survey(net, SIZE).cuts[name] for name in ("entry", "part.0", "part.1")]
    assert [verify_cut_points(net, [cut], SIZE) for cut in cuts] == [{}, {}, {}]
    assert "other images" in "".join(verify_cut_points(net, cuts, SIZE).values())


class ScalesByRows(Two):
    """Keeps the number of rows over both convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        x = self.two(self.one(x))
        return x * (rows / len(x))


def test_a_cut_behind_which_the_pass_starts_again_does_not_hide_that_rows_cannot_leave_before_it():
    net = Net(ScalesByRows())
    found = survey(net, SIZE)
    one, two = (found.cuts[name] for name in ("part.one", "part.two"))
    again = replace(two, steps=found.steps["part.two"])
    assert verify_cut_points(net, [one, again], SIZE).keys() == {"part.one"}
    assert verify_cut_points(net, [replace(one, steps=found.steps["part.one"]), again], SIZE) == {}
