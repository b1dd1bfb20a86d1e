"""An autocast around a training or a load. In it torch keeps copies of weights, which are not those that are trained or loaded."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device import here
from learning import fit, heads, images, made, same

import ptee


def around(dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(here().type, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_learn_what_they_learn_without_it(dtype):
    plain, model = made(), made()
    fit(plain)
    with around(dtype):
        model.predict(images())  # from now on torch has copies of the first weights
        fit(model)
    assert same(heads(plain), heads(model))


def test_after_a_training_it_computes_with_the_trained_weights():
    model = made()
    with around(torch.bfloat16):
        before = model.all_exits(images()).logits
        fit(model)
        inside = model.all_exits(images()).logits
    with around(torch.bfloat16):
        assert torch.equal(model.all_exits(images()).logits, inside)
    assert not torch.equal(before, inside)


def test_a_run_that_is_loaded_in_it_computes_with_the_loaded_weights(tmp_path):
    model = made()
    fit(model)
    backbone = copy.deepcopy(model).detach()
    model.save_pretrained(tmp_path)
    with around(torch.bfloat16):
        loaded = ptee.load(tmp_path, backbone)
        inside = loaded.all_exits(images()).logits
    with around(torch.bfloat16):
        assert torch.equal(model.all_exits(images()).logits, inside)
