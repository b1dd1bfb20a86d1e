"""What a pass that is recorded in pieces reads and writes."""

from __future__ import annotations

import pytest
import torch

from ptee._common.errors import PteeError
from ptee.recording.memory import Memory


def test_what_is_read_is_kept_if_it_was_made_earlier():
    images, weight = torch.ones(2, 3), torch.ones(6)
    memory = Memory(images)
    with memory:
        alive, made_first, read_at_once = images + 1, torch.ones(4), torch.ones(5)
        read_at_once.sum()
        memory.next_piece([alive])
        made_first.view(2, 2).sum()
        alive.add_(1)
        weight.sum()
    assert [t.numel() for t in memory.kept.values()] == [4, 6, 6]


def test_what_depends_on_the_images_is_read_in_its_own_piece_or_goes_through_the_cut():
    images = torch.ones(2, 3)
    memory = Memory(images)
    with memory:
        first = images.relu()
        sums = torch.zeros(2)
        sums.copy_(first.sum(1))
        second = first * 2
        memory.next_piece([second])
        torch.zeros_like(first)
        first.new_ones(3)
        view = first.view(3, 2)
        second.sum()
        for past in (images, first, view, sums):
            with pytest.raises(PteeError, match="reads what depends on the images and went past an exit"):
                past.sum()
        memory.next_piece([])
        with pytest.raises(PteeError, match="went past an exit"):
            second.sum()


def test_memory_that_lasts_is_not_written_into_but_by_ptee():
    images, state = torch.ones(2, 3), torch.ones(3)
    memory = Memory(images)
    with memory:
        images.mul_(2)
        with memory.unwatched():
            state.add_(1)
        with pytest.raises(PteeError, match=r"aten\.add_.* writes into memory that outlives the pass"):
            state.add_(1)
        with pytest.raises(PteeError, match=r"aten\.add\.out writes into memory that outlives the pass"):
            torch.add(images[0], 1, out=state)
    assert state.tolist() == [2, 2, 2]


def test_an_index_of_numbers_asks_for_no_value():
    images = torch.ones(2, 3)
    with Memory(images):
        assert images[torch.tensor([1, 0])].shape == (2, 3)


@pytest.mark.parametrize(
    "ask",
    [lambda x: x.sum().item(), lambda x: bool(x[0, 0]), torch.nonzero, torch.unique, lambda x: x[x > 0]],
    ids=["item", "bool", "nonzero", "unique", "mask"],
)
def test_to_ask_for_values_is_refused(ask):
    images = torch.ones(2, 3)
    with Memory(images), pytest.raises(PteeError, match=r"^aten\..* asks for values, and nothing is computed while"):
        ask(images)


def test_a_copy_between_devices_is_refused():
    images = torch.ones(2, 3)
    with Memory(images), pytest.raises(PteeError, match=r"aten\._to_copy.* copies between devices"):
        images.to("meta")
