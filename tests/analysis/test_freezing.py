"""A frozen module can be restored as it was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
from tiny import Tiny, as_it_was
from torch import nn

from ptee.analysis.freezing import Attachment, freeze


def test_a_frozen_module_has_no_gradients_and_is_restored_as_it_was():
    module = Tiny().train()
    module.bn.eval()
    before = as_it_was(module)
    state = freeze(module)
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(part.training for part in module.modules())
    state.restore(module)
    assert as_it_was(module) == before


def test_a_frozen_state_survives_copies_of_itself_and_of_the_module():
    module = Tiny().train()
    before = as_it_was(module)
    state = pickle.loads(pickle.dumps(freeze(module)))
    twin = copy.deepcopy(module)
    state.restore(twin)
    assert as_it_was(twin) == before
    assert not any(p.requires_grad for p in module.parameters())


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "is replaced": lambda net: setattr(net, "bn", nn.BatchNorm2d(8)),
    "is added": lambda net: net.add_module("another", nn.Dropout()),
    "is put into a layer": lambda net: net.conv.add_module("another", nn.Dropout()),
    "is put behind the others of a sequence": lambda net: net.several.append(nn.Dropout()),
    "is wrapped": lambda net: setattr(net, "fc", nn.Sequential(net.fc, nn.Dropout())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("twin", [lambda hold: hold, copy.deepcopy, lambda hold: pickle.loads(pickle.dumps(hold))])
def test_a_part_is_held_in_eval_mode_that(change, twin):
    net = Tiny().eval()
    net.several = nn.Sequential(nn.Identity())
    hold = twin(Attachment(net, {}))
    net = hold._module
    for _ in range(2):
        change(net)
        hold.keep()
        assert not any(part.training for part in net.modules())
        net.get_submodule("several.0").train()
        hold.keep()
        assert not any(part.training for part in net.modules())


def test_a_part_that_was_added_has_its_own_mode_again_after_the_release():
    net = Tiny().eval()
    hold = Attachment(net, {})
    net.late, net.later = nn.Dropout(), nn.Dropout().eval()
    hold.keep()
    hold.release()
    assert net.late.training
    assert not net.later.training
