"""Images that were seen before are known again, and no other image is taken for one of them."""

from __future__ import annotations

import pytest
import torch
from device import seeded
from torch import Tensor

from ptee.data.batches import NO_MARK, marks_in, marks_of, number_of_repeats, number_of_shared, sample_of_marks


def drawn(n: int, size: tuple[int, int, int] = (3, 32, 32), seed: int = 0) -> Tensor:
    return torch.rand(n, *size, generator=seeded(seed))


def test_an_image_has_the_same_mark_in_any_batch_order_and_memory_format():
    x = drawn(9)
    marks = marks_of(x)
    assert marks.unique().numel() == 9
    order = torch.randperm(9, generator=seeded())
    assert torch.equal(marks_of(x[order]), marks[order.cpu()])
    assert torch.equal(marks_of(x.contiguous(memory_format=torch.channels_last)), marks)
    assert torch.equal(marks_of(x[4:5]), marks[4:5])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [64, 128, 192, 224, 256, 320, 384, 512])
def test_images_with_the_same_border_are_told_apart(side, channels):
    x = drawn(6, (channels, side, side))
    for border in (x[..., :2], x[..., -2:], x[..., :2, :], x[..., -2:, :]):
        border.fill_(1.0)
    assert marks_of(x).unique().numel() == 6


def test_large_and_small_values_are_told_apart():
    assert marks_of(drawn(6) * 1e6 + 65504).unique().numel() == 6
    assert marks_of(drawn(6) * 1e-9).unique().numel() == 6


def test_an_image_of_one_value_is_like_too_many_others_and_has_no_mark():
    blank = torch.zeros(3, 3, 32, 32)
    blank[1] = torch.nan
    blank[2] = torch.tensor([2.2, 2.4, 2.6])[:, None, None]  # white, normalised
    assert marks_of(blank).tolist() == [NO_MARK] * 3
    marks = torch.cat([marks_of(blank), marks_of(drawn(3))])
    assert number_of_shared(marks, marks) == 3
    assert len(marks_in(sample_of_marks(marks))) == 3


def test_images_that_stand_there_once_more_are_counted_but_not_those_of_one_colour():
    marks = marks_of(torch.cat([drawn(5), drawn(3), torch.zeros(4, 3, 32, 32)]))
    assert number_of_repeats(marks) == 3
    assert number_of_repeats(marks_of(drawn(5))) == 0


def test_a_sample_is_a_text_of_a_few_marks_whatever_the_order():
    marks = marks_of(drawn(300))
    sample = sample_of_marks(marks)
    assert sample == sample_of_marks(marks.flip(0))
    assert len(marks_in(sample)) == 256
    assert number_of_shared(marks_in(sample), marks) == 256
    assert number_of_shared(marks_in(sample), marks_of(drawn(100, seed=1))) == 0
