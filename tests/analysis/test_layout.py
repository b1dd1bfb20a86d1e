"""Layouts: a tensor of each layout is read as the map that it holds, and any other tensor is refused."""

from __future__ import annotations

import pytest
import torch

from ptee._common.errors import PteeError
from ptee.analysis.layout import Layout

B, C, H, W = 2, 5, 3, 4
MAP = torch.arange(B * C * H * W, dtype=torch.float32).reshape(B, C, H, W)
TOKENS = torch.cat([torch.full((B, 2, C), -1.0), MAP.flatten(2).transpose(1, 2), torch.full((B, 1, C), -1.0)], 1)


def bnc(c: int, h: int, w: int, prefix: int = 0, after: int = 0) -> Layout:
    """Tokens of an h x w grid with other tokens before and after it."""
    return Layout("bnc", c, h, w, prefix, prefix + h * w + after)


READABLE = {
    "bchw": (Layout("bchw", C, H, W), MAP),
    "bhwc": (Layout("bhwc", C, H, W), MAP.permute(0, 2, 3, 1)),
    "bnc": (bnc(C, H, W), MAP.flatten(2).transpose(1, 2)),
    "bnc between other tokens": (bnc(C, H, W, 2, 1), TOKENS),
    "bcn": (Layout("bcn", C, H, W, tokens=H * W), MAP.flatten(2)),
    "bcn between other tokens": (Layout("bcn", C, H, W, prefix=2, tokens=3 + H * W), TOKENS.transpose(1, 2)),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_tensor_of_each_layout_is_read_as_the_map_it_was_made_from(name):
    layout, z = READABLE[name]
    assert torch.equal(layout.to_map(z), MAP)


def test_a_vector_is_read_as_a_map_of_one_position():
    vector = torch.randn(B, C)
    assert torch.equal(Layout("bc", C, 1, 1).to_map(vector), vector.reshape(B, C, 1, 1))


@pytest.mark.parametrize("name", READABLE)
def test_reading_copies_nothing(name):
    layout, z = READABLE[name]
    assert layout.to_map(z).untyped_storage().data_ptr() == z.untyped_storage().data_ptr()


@pytest.mark.parametrize("order", ["bchw", "bhwc"])
def test_a_map_may_have_another_size_than_planned(order):
    z = torch.randn(B, C, 7, 9)
    assert Layout(order, C, H, W).to_map(z if order == "bchw" else z.permute(0, 2, 3, 1)).shape == z.shape


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (Layout("bchw", C, H, W), (B, C, H), r"5 channels, got \(2, 5, 3\)"),
        (Layout("bchw", C, H, W), (B, C + 1, H, W), r"5 channels, got \(2, 6, 3, 4\)"),
        (Layout("bhwc", C, H, W), (B, C, H, W), r"5 channels, got \(2, 5, 3, 4\)"),
        (Layout("bc", C, 1, 1), (B, C, 1, 1), r"5 channels"),
        (bnc(C, H, W, 2), (B, 13, C), r"14 tokens, a grid of 3 x 4 among them, got 13"),
        (bnc(C, H, W, 2), (B, 15, C), r"14 tokens.*got 15: the images have another size"),
    ],
    ids=["rank", "channels", "channels in another place", "a map for a vector", "too few tokens", "too many tokens"],
)
def test_a_tensor_of_another_layout_is_refused(layout, shape, message):
    with pytest.raises(PteeError, match=message):
        layout.to_map(torch.zeros(shape))
