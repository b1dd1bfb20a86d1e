"""Head specs: what a name says is read once, and the spec gives the name back."""

from __future__ import annotations

import pytest

from ptee._common.errors import PteeError, UnknownName
from ptee.exits.head_spec import HeadSpec, Stage, parse_head
from ptee.exits.heads import HEADS

NAMES = [*HEADS, "conv12", "auto", "res-32x2-64x2", "res-16x3s1-32x3-64x3", "res-8x1s4"]


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}+" for name in NAMES)])
def test_the_spec_of_a_name_gives_the_name_back(name):
    assert str(parse_head(name)) == name


def test_a_spec_says_what_a_head_is_made_of():
    assert parse_head("conv2+") == HeadSpec("conv2", (), builds_on_previous=True)
    assert parse_head("res-32x2-64x3s1") == HeadSpec("res", (Stage(32, 2), Stage(64, 3, stride=1)))


@pytest.mark.parametrize(
    "name", ["res", "res-", "res-32", "res-32x", "res-x2", "res-32x2s", "res-32x2++", "res-32x2-", "front"]
)
def test_other_names_are_unknown(name):
    with pytest.raises(UnknownName, match="Unknown head"):
        parse_head(name)


@pytest.mark.parametrize("name", ["res-2048x1", "res-0x1", "res-8x0", "res-8x9", "res-8x1s17", "res-8x1s0"])
def test_a_head_larger_than_heads_are_is_refused(name):
    with pytest.raises(PteeError, match=f"{name}.*1 to 1024 channels, 1 to 8 blocks, 1 to 16 stride"):
        parse_head(name)


@pytest.mark.parametrize("given", [5, None, 0.1])
def test_what_is_no_name_is_refused(given):
    with pytest.raises(PteeError, match=r"is no name\. Give a name such as 'pool'"):
        parse_head(given)
