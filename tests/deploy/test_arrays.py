"""Arrays of numpy and tensors of torch: the same rows of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptee.deploy.arrays import answers_at_end, as_numpy, select_rows

each_kind = pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray], ids=["torch", "numpy"])


@each_kind
def test_all_entries_of_a_row_are_taken_from_the_axis_that_holds_the_rows(kind):
    given = np.arange(12.0).reshape(2, 6)
    got = select_rows(kind(given), np.array([2, 0]), 1, 2)
    assert as_numpy(got).tolist() == given[:, [4, 5, 0, 1]].tolist()


@each_kind
@pytest.mark.parametrize("possible", [[True, True], [False, False], [True, False]], ids=str)
def test_at_the_end_rows_that_some_exit_could_take_get_the_blended_answer(kind, possible):
    own, blended = np.zeros((2, 3)), np.ones((2, 3))
    got = as_numpy(answers_at_end(np.array(possible), kind(own), kind(blended)))
    assert got.tolist() == [[float(of)] * 3 for of in possible]
