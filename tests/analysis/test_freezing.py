"""A frozen module can be restored as it was."""

from __future__ import annotations

import copy
import pickle

from tiny import Tiny, as_it_was

from ptee.analysis.freezing import freeze


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
